//! `vmem`: resize the memory of a running guest, and see that it works.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::error::ErrorKind;
use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use virtio_mem_driver::driver::{Mode, Strategy};
use vmm_harness::demo::{self, BackingKind, DemoOptions};
use vmm_harness::linux::{
    self, DeviceKind, KernelSeries, LinuxError, LinuxOptions, LinuxStep, Matrix, MatrixOptions,
    MatrixRun, OwnOptions, Progress, SCRIPTS, Script,
};
use vmm_harness::replay::{self, Inputs, ReplayError, Summary};
use vmm_harness::serve::control::Command as ControlCommand;
use vmm_harness::serve::{self, ServeError, ServeOptions};
use vmm_harness::{GuestKind, parse_size};

/// Resizes the memory of a running guest through a virtio memory device.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    demo: DemoArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Grows and shrinks a working guest step by step and checks each step. The default.
    #[command(after_help = EXIT_CODES)]
    Demo(DemoArgs),
    /// Runs recorded traces of real kernels through the model of memory hotplug and the driver, and reports the first
    /// difference.
    #[command(after_help = REPLAY_HELP)]
    Replay(ReplayArgs),
    /// Boots a stock Linux kernel in QEMU with a memory device, for a prompt or a script.
    #[command(after_help = LINUX_HELP)]
    Linux(LinuxArgs),
    /// Resizes a guest of `vmem linux` from another terminal.
    Resize {
        /// The socket its prompt has named
        socket: PathBuf,
        /// The new size; without it, the state is printed
        #[arg(value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Serves a memory device to VMMs that speak vfio-user, and resizes it as told on standard input.
    #[command(after_help = SERVE_HELP)]
    Serve(ServeArgs),
}

const EXIT_CODES: &str = "\
Sizes are bytes, or have a binary unit: 6M, 130MiB, 4G.
RUST_LOG=debug shows what device and harness say on the way.

Exit codes:
  0  each size was reached as far as the driver can, and every check held
  1  a check failed, or something could not be done; the error names it
  2  the options are wrong
  3  the rogue guest was caught, as asked for with --rogue";

const REPLAY_HELP: &str = "\
Where a virtio-mem device was recorded, our driver follows the same targets on our device, under Linux's policy, and each of
its requests is compared with the recorded one: kind, address, blocks, answer.

What only the kernel knew is taken from the recording, and counted in the report:
  EBUSY, EINTR   a memory block could not be taken offline; endless: it was still being tried
  busy places    online memory the kernel could not empty, and passed over
  given up       the kernel stopped unplugging, with online memory left to try
  retries        the driver's retry timer had run out before the next request
A recording that claims more busy places than 8 and one for each 8 requests is a difference.
RUST_LOG=vmm_harness=debug names each place.

Exit codes:
  0  every step of every file agrees
  1  a step differs, or a file cannot be replayed; the others are replayed all the same
  2  the options are wrong";

const LINUX_HELP: &str = "\
Kernels, QEMU and a shell are Debian packages: fetched once, as any user, from the mirrors of this machine's apt
configuration, unpacked into the cache and not installed. What is in the cache is used without the network.
Needs an amd64 machine with apt and dpkg, no KVM, and about 400 MB of disk.

The prompt names a socket. It takes the lines of vmem serve and answers as it does; vmem resize speaks for people.
The prompt of --kernel ours knows status, load PAGES, verify, free, pin, unpin, obstacles, retry, remove, probe,
restart and quit.

With --matrix each script runs on each Linux with each device, and what device and guest have after each step is
compared between the devices. About 35 minutes in all with --minutes 1; --script, --kernel and --device take lists.

Exit codes:
  0  every script held and the devices agree, or the prompt was left
  1  a check failed, or something could not be had or done; the error names it
  2  the options are wrong";

#[derive(Args)]
#[command(group(ArgGroup::new("work").args(["script", "matrix"]).multiple(true)))]
struct LinuxArgs {
    /// Linux of a series, or this project's kernel [default: 6.12; each Linux with --matrix]
    #[arg(long, value_enum, value_delimiter = ',')]
    kernel: Vec<Kernel>,
    /// In which order the driver of `--kernel ours` plugs and unplugs [default: direct]
    #[arg(long, value_enum)]
    policy: Option<Policy>,
    /// Memory device of the guest [default: ours; both with --matrix]
    #[arg(long, value_enum, value_delimiter = ',')]
    device: Vec<Device>,
    /// What to try; without it, the guest gives a prompt [default with --matrix: everything]
    #[arg(long, value_name = "NAME", value_parser = script_names(), value_delimiter = ',')]
    script: Vec<String>,
    /// Try each script on each kernel with each device, compare the devices, and print a table
    #[arg(long)]
    matrix: bool,
    /// How many guests run at the same time
    #[arg(long, value_name = "N", default_value = "1", requires = "matrix")]
    jobs: NonZeroUsize,
    /// Put the results between the marks of a document
    #[arg(long, value_name = "FILE", requires = "matrix")]
    report: Option<PathBuf>,
    /// Where packages are kept [default: $XDG_CACHE_HOME/vmem or ~/.cache/vmem]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Seed of what is random [default: a new one each time]
    #[arg(long, value_name = "N", env = "VMEM_SEED")]
    seed: Option<u64>,
    /// How long `--script random` goes on
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes: u64,
    /// Print one JSON document instead of the table
    #[arg(long, requires = "work")]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kernel {
    /// Debian 12's
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's
    #[value(name = "6.12")]
    V6_12,
    /// Debian 13's newest
    #[value(name = "7.2")]
    V7_2,
    /// This project's, which has a prompt and no scripts
    Ours,
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    /// This project's, served to QEMU over vfio-user by vmem itself
    Ours,
    /// QEMU's own virtio-mem-pci, as the reference
    Qemu,
}

impl Kernel {
    /// Which Linux, if it is one.
    fn series(self) -> Option<KernelSeries> {
        match self {
            Self::V6_1 => Some(KernelSeries::V6_1),
            Self::V6_12 => Some(KernelSeries::V6_12),
            Self::V7_2 => Some(KernelSeries::V7_2),
            Self::Ours => None,
        }
    }
}

impl From<Device> for DeviceKind {
    fn from(device: Device) -> Self {
        match device {
            Device::Ours => Self::Ours,
            Device::Qemu => Self::Qemu,
        }
    }
}

/// Names of scripts, each with what it does.
fn script_names() -> PossibleValuesParser {
    SCRIPTS
        .iter()
        .map(|script| PossibleValue::new(script.name()).help(script.about()))
        .collect::<Vec<_>>()
        .into()
}

const SERVE_HELP: &str = "\
Standard input takes lines, each answered by a line of JSON on standard output:
  resize SIZE     ask the driver to have SIZE plugged
  status          sizes only, as the other answers have them as well
  freeze, thaw    hold requests off for a while
  quit            end, as SIGINT and SIGTERM do

The guest memory of the client must be shared and cover the region; a guest that is to leave the region to the device
must not know it as RAM.

Exit codes:
  0  told to end
  1  the socket is in use, or something could not be done; the error names it
  2  the options are wrong";

#[derive(Args)]
struct DemoArgs {
    /// Memory the guest has from the start
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    boot_memory: u64,
    /// Size of the device-managed region
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    region: u64,
    /// Size of a device block, a power of two
    #[arg(long, value_name = "SIZE", default_value = "2M", value_parser = parse_size)]
    block_size: u64,
    /// In which order the guest's driver plugs and unplugs
    #[arg(long, value_enum, default_value_t = Policy::Direct)]
    policy: Policy,
    /// How the guest's driver deals with blocks; by default sbm where that is possible
    #[arg(long, value_enum)]
    mode: Option<DriverMode>,
    /// Size of a big block, a power of two; by default the larger of a block and a memory block
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bbm_block_size: Option<u64>,
    /// Host memory behind the region
    #[arg(long, value_enum, default_value_t = Backing::Anon)]
    backing: Backing,
    /// Sizes to ask for, one after another; by default 1G,130M,2G,6M,0, rounded up to what the driver can do
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = parse_size)]
    targets: Option<Vec<u64>>,
    /// Number of vCPUs, all of which work in the memory
    #[arg(long, value_name = "N", default_value_t = 2)]
    vcpus: usize,
    /// Where the guest runs
    #[arg(long, value_enum, default_value_t = Guest::Auto)]
    guest: Guest,
    /// Seed of everything the guest chooses at random
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Let the guest touch an unplugged block at last
    #[arg(long)]
    rogue: bool,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReplayArgs {
    /// Traces
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print a map of memory blocks and zones at boot and after each step that changes it
    #[arg(long, conflicts_with = "json")]
    show: bool,
    /// Print one JSON document instead of one line for each file
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ServeArgs {
    /// Where clients connect; its user only. A socket nobody listens to any more is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Guest-physical address of the device-managed region
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    region_start: u64,
    /// Size of the region
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_size)]
    region_size: u64,
    /// Size of a device block, a power of two; 2M if not given
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    block_size: Option<u64>,
    /// Proximity domain of the memory
    #[arg(long, value_name = "N")]
    node: Option<u16>,
    /// Size to ask the driver for at the start
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    size: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Guest {
    /// On KVM if it can be used, else in this process
    Auto,
    /// On KVM or not at all
    Kvm,
    /// In this process
    InProcess,
}

#[derive(Clone, Copy, ValueEnum)]
enum Policy {
    /// The fewest requests, several in flight, retries after 10 ms or more
    Direct,
    /// Linux's order, one request at a time, retries after 50 s or more
    Linux,
}

impl From<Policy> for Strategy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Direct => Self::Direct,
            Policy::Linux => Self::Linux,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum DriverMode {
    /// Sub-Block Mode: memory blocks of 128 MiB may be plugged in part; for blocks up to 64 MiB
    Sbm,
    /// Big-Block Mode: one or more memory blocks are plugged as a whole
    Bbm,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backing {
    /// Private anonymous memory, base pages
    Anon,
    /// Private anonymous memory, transparent huge pages
    Thp,
    /// Shared memory (memfd), base pages
    Memfd,
    /// Huge pages of 2 MiB from the host's pool
    #[value(name = "hugetlb-2m")]
    Hugetlb2m,
}

fn main() -> ExitCode {
    // Warnings are for whoever runs it: what a client or a guest does wrong is told nowhere else.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Demo(args)) => run_demo(&args),
        Some(Command::Replay(args)) => run_replay(&args),
        Some(Command::Linux(args)) => run_linux(&args),
        Some(Command::Resize { socket, size }) => run_resize(&socket, size),
        Some(Command::Serve(args)) => run_serve(args),
        None => run_demo(&cli.demo),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let demo = error.downcast_ref().is_some_and(demo::DemoError::is_usage);
            let usage = demo || error.downcast_ref().is_some_and(ServeError::is_usage);
            eprintln!("vmem: {error:#}");
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run_demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let options = DemoOptions {
        boot_memory: args.boot_memory,
        region: args.region,
        block_size: args.block_size,
        backing: match args.backing {
            Backing::Anon => BackingKind::Anon,
            Backing::Thp => BackingKind::Thp,
            Backing::Memfd => BackingKind::Memfd,
            Backing::Hugetlb2m => BackingKind::Hugetlb2m,
        },
        strategy: args.policy.into(),
        mode: args.mode.map(|mode| match mode {
            DriverMode::Sbm => Mode::SubBlock,
            DriverMode::Bbm => Mode::BigBlock,
        }),
        bbm_block_size: args.bbm_block_size,
        targets: args.targets.clone(),
        vcpu_count: args.vcpus,
        guest: match args.guest {
            Guest::Auto => GuestKind::Auto,
            Guest::Kvm => GuestKind::Kvm,
            Guest::InProcess => GuestKind::InProcess,
        },
        seed: args.seed,
        rogue: args.rogue,
        ..DemoOptions::default()
    };
    let summary = match args.json {
        true => {
            let summary = demo::run(&options, &mut io::sink())?;
            serde_json::to_writer_pretty(io::stdout().lock(), &summary)?;
            println!();
            summary
        }
        false => demo::run(&options, &mut io::stdout())?,
    };
    Ok(ExitCode::from(if summary.rogue.is_some() { 3 } else { 0 }))
}

fn run_serve(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let options = ServeOptions {
        socket: args.socket,
        region_start: args.region_start,
        region_size: args.region_size,
        block_size: args.block_size,
        node_id: args.node,
        requested_size: args.size,
    };
    serve::run(&options, io::stdin(), &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn run_replay(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let mut totals = Totals::default();
    let mut reports = Vec::new();
    for file in &args.files {
        let mut written = Ok(());
        let mut show = |map: &str| {
            if written.is_ok() {
                written = writeln!(out, "{map}");
            }
        };
        let result = replay::replay_file(file, args.show.then_some(&mut show));
        written?;
        totals.add(&result);
        match args.json {
            true => reports.push(json_report(file, &result)),
            false => print_report(&mut out, file, &result)?,
        }
    }
    if args.json {
        serde_json::to_writer_pretty(&mut out, &reports)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{totals}")?;
    }
    Ok(ExitCode::from(u8::from(totals.agreeing < totals.files)))
}

/// Options that do not go together, beyond what clap can be told.
fn misused(args: &LinuxArgs) -> Option<(ErrorKind, String)> {
    let own = args.kernel.iter().any(|kernel| kernel.series().is_none());
    let conflict = |error: &str| Some((ErrorKind::ArgumentConflict, error.to_owned()));
    if own && (args.matrix || !args.script.is_empty()) {
        return conflict("--script and --matrix are for Linux kernels");
    }
    if !own && args.policy.is_some() {
        return conflict("--policy is for --kernel ours");
    }
    let counts = [
        ("kernel", args.kernel.len()),
        ("device", args.device.len()),
        ("script", args.script.len()),
    ];
    let mut several = counts.into_iter().filter(|&(_, count)| count > 1);
    let (what, _) = several.find(|_| !args.matrix)?;
    let error = format!("more than one {what} needs --matrix");
    Some((ErrorKind::TooManyValues, error))
}

fn run_linux(args: &LinuxArgs) -> anyhow::Result<ExitCode> {
    if let Some((kind, error)) = misused(args) {
        Cli::command().error(kind, error).exit();
    }
    let cache = args.cache.clone().or_else(linux::Cache::default_path);
    let cache =
        cache.context("neither XDG_CACHE_HOME nor HOME is set; name a folder with --cache")?;
    let series = |kernels: &[Kernel]| -> Vec<_> {
        kernels.iter().copied().filter_map(Kernel::series).collect()
    };
    let kernels = series(&args.kernel);
    let devices: Vec<_> = args.device.iter().copied().map(DeviceKind::from).collect();
    let named = args.script.iter().map(String::as_str);
    let scripts: Vec<_> = named.filter_map(Script::named).collect();
    let seed = args.seed.unwrap_or_else(linux::new_seed);
    let random_for = Duration::from_secs(60 * args.minutes);
    if args.matrix {
        let all_kernels = series(Kernel::value_variants());
        let all_scripts: Vec<_> = SCRIPTS.iter().collect();
        let options = MatrixOptions {
            cache: &cache,
            kernels: if kernels.is_empty() {
                &all_kernels
            } else {
                &kernels
            },
            scripts: if scripts.is_empty() {
                &all_scripts
            } else {
                &scripts
            },
            devices: if devices.is_empty() {
                &[DeviceKind::Ours, DeviceKind::Qemu]
            } else {
                &devices
            },
            seed,
            random_for,
            jobs: args.jobs,
        };
        return run_linux_matrix(&options, args);
    }
    let device = devices.first().copied().unwrap_or(DeviceKind::Ours);
    let mut progress = Progress::stderr();
    let kernel = args.kernel.first().copied().unwrap_or(Kernel::V6_12);
    let Some(kernel) = kernel.series() else {
        let policy = args.policy.unwrap_or(Policy::Direct);
        let options = OwnOptions::new(&cache, policy.into(), device);
        linux::run_own_prompt(&options, &mut progress)?;
        return Ok(ExitCode::SUCCESS);
    };
    let options = LinuxOptions {
        cache: &cache,
        kernel,
        device,
        seed,
        random_for,
    };
    let Some(script) = scripts.first() else {
        linux::run_prompt(&options, &mut progress)?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut out = io::stdout();
    if !args.json {
        writeln!(
            out,
            "{} on Linux {}, VMEM_SEED={}",
            script.name(),
            options.kernel.version(),
            options.seed
        )?;
        writeln!(
            out,
            "{:>9} {:>9} {:>9} {:>6} {:>10} {:>11} {:>8}  step",
            "requested", "plugged", "MemTotal", "blocks", "System RAM", "resident", "time"
        )?;
    }
    let mut written = Ok(());
    let run = linux::run_script(&options, script, &mut progress, &mut |step| {
        if !args.json && written.is_ok() {
            written = linux_row(&mut out, step);
        }
    })?;
    written?;
    match args.json {
        true => {
            serde_json::to_writer_pretty(&mut out, &run.steps)?;
            writeln!(out)?;
        }
        false => writeln!(out, "ok: {} steps, every check held", run.steps.len())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run_linux_matrix(options: &MatrixOptions<'_>, args: &LinuxArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout();
    let mut show = |matrix: &Matrix, run: &MatrixRun| {
        if !args.json {
            let written = writeln!(out, "{}", matrix.line(run)).and_then(|()| out.flush());
            written.map_err(LinuxError::file("/dev/stdout"))?;
        }
        // After each run: what has been found is not lost if the rest is not waited for.
        match &args.report {
            Some(path) => write_report(path, matrix, options),
            None => Ok(()),
        }
    };
    let matrix = linux::run_matrix(options, &mut Progress::stderr(), &mut show)?;
    match args.json {
        true => {
            serde_json::to_writer_pretty(&mut out, &matrix)?;
            writeln!(out)?;
        }
        false => write!(out, "{}", matrix.table())?,
    }
    Ok(ExitCode::from(u8::from(!matrix.is_green())))
}

fn write_report(
    path: &Path,
    matrix: &Matrix,
    options: &MatrixOptions<'_>,
) -> Result<(), LinuxError> {
    let document = fs::read_to_string(path).map_err(LinuxError::file(path))?;
    let generated = matrix.markdown(options);
    let new = linux::replace_generated(&document, &generated);
    let new =
        new.ok_or_else(|| LinuxError::Unsupported(format!("{} has no marks", path.display())))?;
    fs::write(path, new).map_err(LinuxError::file(path))
}

fn linux_row(out: &mut dyn Write, step: &LinuxStep) -> io::Result<()> {
    let size = |bytes| demo::size(bytes);
    writeln!(
        out,
        "{:>9} {:>9} {:>9} {:>6} {:>10} {:>11} {:>6.1} s  {}",
        size(step.requested),
        size(step.plugged),
        format!("+{}", size(step.mem_total)),
        step.memory_blocks,
        size(step.system_ram),
        size(step.resident),
        step.seconds,
        step.what
    )
}

fn run_resize(socket: &Path, size: Option<u64>) -> anyhow::Result<ExitCode> {
    let command = size.map_or(ControlCommand::Status, ControlCommand::Resize);
    let report = linux::execute_at(socket, command)?;
    println!(
        "requested {}, plugged {}",
        demo::size(report.requested_size),
        demo::size(report.plugged_size)
    );
    Ok(ExitCode::SUCCESS)
}

/// All files together.
#[derive(Default)]
struct Totals {
    files: usize,
    agreeing: usize,
    steps: usize,
    requests: u64,
    comparisons: u64,
    inputs: Inputs,
}

impl Totals {
    fn add(&mut self, result: &Result<Summary, ReplayError>) {
        self.files += 1;
        if let Ok(summary) = result {
            self.agreeing += usize::from(summary.difference.is_none());
            self.steps += summary.steps;
            self.requests += summary.requests;
            self.comparisons += summary.comparisons;
            self.inputs += summary.inputs;
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            files,
            agreeing,
            steps,
            requests,
            comparisons,
            inputs,
        } = self;
        write!(
            f,
            "{agreeing} of {files} files agree: {steps} steps, {requests} requests, {comparisons} comparisons; \
             taken from the traces: {inputs}"
        )
    }
}

fn print_report(
    out: &mut dyn Write,
    file: &Path,
    result: &Result<Summary, ReplayError>,
) -> io::Result<()> {
    let file = file.display();
    match result {
        Ok(Summary {
            difference: Some(difference),
            ..
        }) => writeln!(out, "{file}: {difference}"),
        Ok(Summary {
            steps,
            requests,
            comparisons,
            inputs,
            ..
        }) => {
            write!(out, "{file}: agrees: {steps} steps, ")?;
            if *requests > 0 {
                write!(out, "{requests} requests, ")?;
            }
            writeln!(out, "{comparisons} comparisons; taken: {inputs}")
        }
        Err(error) => {
            out.flush()?;
            writeln!(io::stderr(), "vmem: {file}: {error}")
        }
    }
}

fn json_report(file: &Path, result: &Result<Summary, ReplayError>) -> serde_json::Value {
    match result {
        Ok(summary) => serde_json::json!({ "file": file, "summary": summary }),
        Err(error) => serde_json::json!({ "file": file, "error": error.to_string() }),
    }
}

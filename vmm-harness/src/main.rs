//! `vmem`: resize the memory of a running guest, and see that it works.

mod cli;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use vmm_harness::demo::{self, DemoOptions};
use vmm_harness::linux::{
    self, DeviceKind, KernelSeries, LinuxOptions, LinuxStep, Progress, SCRIPTS, Script,
};
use vmm_harness::parse_size;
use vmm_harness::replay::{self, Inputs, ReplayError, Summary};
use vmm_harness::run::RunError;
use vmm_harness::serve::{self, ServeError, ServeOptions};

use crate::cli::{MachineArgs, ResizeArgs, RunArgs, StatusArgs, client};

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
    /// Keeps a guest alive, to be resized, watched, frozen and saved through a control API.
    #[command(after_help = cli::RUN_HELP)]
    Run(RunArgs),
    /// Resizes a guest of `vmem run`, or one of `vmem linux`.
    #[command(after_help = cli::RESIZE_HELP)]
    Resize(ResizeArgs),
    /// Says how the memory of a guest of `vmem run` is.
    #[command(after_help = cli::CLIENT_HELP)]
    Status(StatusArgs),
    /// Holds requests of the guest's driver off.
    #[command(after_help = cli::CLIENT_HELP)]
    Freeze(client::Api),
    /// Ends that.
    #[command(after_help = cli::CLIENT_HELP)]
    Thaw(client::Api),
    /// Writes the state of a frozen device into a file.
    #[command(after_help = cli::SNAPSHOT_HELP)]
    Snapshot(client::FileArgs),
    /// Starts a guest of `vmem run --no-start` with a device that is as it was saved.
    #[command(after_help = cli::SNAPSHOT_HELP)]
    Restore(client::FileArgs),
    /// Prints what a shell needs to complete options.
    #[command(after_help = cli::COMPLETIONS_HELP)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Resizes working guests all the time, with faults if asked for, and checks them all the time.
    #[command(after_help = cli::STRESS_HELP)]
    Stress(cli::StressArgs),
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

Exit codes:
  0  the script held, or the prompt was left
  1  a check failed, or something could not be had or done; the error names it
  2  the options are wrong";

#[derive(Args)]
struct LinuxArgs {
    /// Series of the kernel
    #[arg(long, value_enum, default_value_t = Kernel::V6_12)]
    kernel: Kernel,
    /// Memory device of the guest
    #[arg(long, value_enum, default_value_t = Device::Ours)]
    device: Device,
    /// What to try; without it, the guest gives a prompt
    #[arg(long, value_name = "NAME", value_parser = script_names())]
    script: Option<String>,
    /// Where packages are kept [default: $XDG_CACHE_HOME/vmem or ~/.cache/vmem]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Seed of what is random [default: a new one each time]
    #[arg(long, value_name = "N", env = "VMEM_SEED")]
    seed: Option<u64>,
    /// How long `--script random` goes on
    #[arg(long, value_name = "N", default_value_t = 10)]
    minutes: u64,
    /// Print one JSON document instead of the table
    #[arg(long, requires = "script")]
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
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    /// This project's, served to QEMU over vfio-user by vmem itself
    Ours,
    /// QEMU's own virtio-mem-pci, as the reference
    Qemu,
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
    #[command(flatten)]
    machine: MachineArgs,
    /// Sizes to ask for, one after another; by default 1G,130M,2G,6M,0, rounded up to what the driver can do
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = parse_size)]
    targets: Option<Vec<u64>>,
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

fn main() -> ExitCode {
    env_logger::init();
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Demo(args)) => run_demo(&args),
        Some(Command::Replay(args)) => run_replay(&args),
        Some(Command::Linux(args)) => run_linux(&args),
        Some(Command::Run(args)) => cli::run(args),
        Some(Command::Resize(args)) => cli::resize(&args),
        Some(Command::Status(args)) => cli::status(&args),
        Some(Command::Freeze(api)) => client::freeze(&api),
        Some(Command::Thaw(api)) => client::thaw(&api),
        Some(Command::Snapshot(args)) => client::snapshot(&args),
        Some(Command::Restore(args)) => client::restore(&args),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "vmem", &mut io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Stress(args)) => cli::stress(&args),
        Some(Command::Serve(args)) => run_serve(args),
        None => run_demo(&cli.demo),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let demo = error.downcast_ref().is_some_and(demo::DemoError::is_usage);
            let serve = error.downcast_ref().is_some_and(ServeError::is_usage);
            let run = error.downcast_ref().is_some_and(RunError::is_usage);
            let usage = demo || serve || run || error.is::<cli::UsageError>();
            eprintln!("vmem: {error:#}");
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run_demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let options = DemoOptions {
        targets: args.targets.clone(),
        rogue: args.rogue,
        ..args.machine.options()
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

fn run_linux(args: &LinuxArgs) -> anyhow::Result<ExitCode> {
    let cache = args.cache.clone().or_else(linux::Cache::default_path);
    let options = LinuxOptions {
        cache: &cache
            .context("neither XDG_CACHE_HOME nor HOME is set; name a folder with --cache")?,
        kernel: match args.kernel {
            Kernel::V6_1 => KernelSeries::V6_1,
            Kernel::V6_12 => KernelSeries::V6_12,
            Kernel::V7_2 => KernelSeries::V7_2,
        },
        device: match args.device {
            Device::Ours => DeviceKind::Ours,
            Device::Qemu => DeviceKind::Qemu,
        },
        seed: args.seed.unwrap_or_else(linux::new_seed),
        random_for: Duration::from_secs(60 * args.minutes),
    };
    let mut progress = Progress::stderr();
    let Some(script) = args.script.as_deref().and_then(Script::named) else {
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
    let steps = linux::run_script(&options, script, &mut progress, &mut |step| {
        if !args.json && written.is_ok() {
            written = linux_row(&mut out, step);
        }
    })?;
    written?;
    match args.json {
        true => {
            serde_json::to_writer_pretty(&mut out, &steps)?;
            writeln!(out)?;
        }
        false => writeln!(out, "ok: {} steps, every check held", steps.len())?,
    }
    Ok(ExitCode::SUCCESS)
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

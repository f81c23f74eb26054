//! `vmem linux`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{ArgGroup, Args, ValueEnum};
use vmm_harness::demo;
use vmm_harness::linux::{
    self, DeviceKind, KernelSeries, LinuxError, LinuxOptions, LinuxStep, Matrix, MatrixOptions,
    OwnOptions, Progress, SCRIPTS, Script,
};

use super::UsageError;
use super::machine::Policy;

pub(crate) const HELP: &str = "\
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
pub(crate) struct LinuxArgs {
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

/// What options that do not go together have against each other, beyond what clap can be told.
fn misused(args: &LinuxArgs) -> Option<String> {
    let own = args.kernel.iter().any(|kernel| kernel.series().is_none());
    if own && (args.matrix || !args.script.is_empty()) {
        return Some("--script and --matrix are for Linux kernels".into());
    }
    if !own && args.policy.is_some() {
        return Some("--policy is for --kernel ours".into());
    }
    let counts = [
        ("kernel", args.kernel.len()),
        ("device", args.device.len()),
        ("script", args.script.len()),
    ];
    let mut several = counts.into_iter().filter(|&(_, count)| count > 1);
    let (what, _) = several.find(|_| !args.matrix)?;
    Some(format!("more than one {what} needs --matrix"))
}

pub(crate) fn run(args: &LinuxArgs) -> anyhow::Result<ExitCode> {
    if let Some(error) = misused(args) {
        return Err(UsageError(error).into());
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
        };
        return run_matrix(&options, args);
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
            written = row(&mut out, step);
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

fn run_matrix(options: &MatrixOptions<'_>, args: &LinuxArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout();
    let mut show = |matrix: &Matrix| {
        if let (false, Some(run)) = (args.json, matrix.runs().last()) {
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

fn row(out: &mut dyn Write, step: &LinuxStep) -> io::Result<()> {
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

//! `vmem stress`.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, ValueEnum};
use vmm_harness::linux::new_seed;
use vmm_harness::stress::{self, Limit, StressOptions};

use super::MachineArgs;

pub(crate) const STRESS_HELP: &str = "\
Exit codes:
  0  every check held until the end
  1  a check failed, or something could not be done; the error names it, and a line that repeats the run
  2  the options are wrong
  4  ended early by SIGINT or SIGTERM; every check held until then";

#[derive(Args)]
pub(crate) struct StressArgs {
    /// How long to go on [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "resizes")]
    duration: Option<Duration>,
    /// How many resizes to do, instead of a time
    #[arg(long, value_name = "N")]
    resizes: Option<u64>,
    /// How the target moves
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pattern: Pattern,
    /// How many guests run side by side
    #[arg(long, value_name = "N", default_value_t = 1)]
    vms: usize,
    /// How long a resize may take without progress or a reason
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    stuck_after: Duration,
    /// Print one JSON document instead of the summary
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pattern {
    /// Up in steps, each waited for, then down at once
    Sawtooth,
    /// Anything; about half of the sizes are left before they are reached
    Random,
    /// Far up and far down in turns, hardly ever waited for
    Thrash,
    /// Many sizes within no time, then one that is waited for, then a pause
    Burst,
}

impl From<Pattern> for stress::Pattern {
    fn from(pattern: Pattern) -> Self {
        match pattern {
            Pattern::Sawtooth => Self::Sawtooth,
            Pattern::Random => Self::Random,
            Pattern::Thrash => Self::Thrash,
            Pattern::Burst => Self::Burst,
        }
    }
}

pub(crate) fn stress(args: &StressArgs) -> anyhow::Result<ExitCode> {
    let mut guest = args.machine.options();
    guest.seed = args.machine.seed().unwrap_or_else(new_seed);
    let options = StressOptions {
        pattern: args.pattern.into(),
        limit: match (args.resizes, args.duration) {
            (Some(count), _) => Limit::Resizes(count),
            (None, duration) => Limit::Duration(duration.unwrap_or(Duration::from_secs(60))),
        },
        vm_count: args.vms,
        stuck_after: args.stuck_after,
        guest,
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    let run = stress::run(&options, &interrupted, &mut |progress| {
        eprintln!("{progress:?}");
    })?;
    serde_json::to_writer_pretty(io::stdout(), &run.summary)?;
    println!();
    if let Some(failure) = &run.failure {
        println!("{failure}: {}", failure.source);
        return Ok(ExitCode::from(1));
    }
    Ok(ExitCode::SUCCESS)
}

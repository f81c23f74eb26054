//! `vmem stress`.

use std::env::{self, VarError};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use vmm_harness::Size;
use vmm_harness::linux::new_seed;
use vmm_harness::report::{self, Outcome, Recording};
use vmm_harness::stress::{self, Fault, Limit, Pattern, Progress, ReasonCount, StressOptions};

use super::UsageError;
use super::machine::MachineArgs;

/// How often to say how far a run is where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(crate) const HELP: &str = "\
Checked all the time: pages are what the guest wrote; no more is resident than plugged; resizes progress or have a
reason. Whenever the guest has settled, too: device and driver have the same blocks; no slot, mapping, descriptor or
thread is left over. The first failure ends the run.

A seed repeats which sizes are asked for, which faults are tried and when, and what the guest chooses; not the timing
of threads.

Examples:
  vmem stress --duration 10m --workload mixed --pattern random --report out
  vmem stress --resizes 1000 --faults open,discard,slot,busy,stall --seed 7
  vmem stress --vms 4 --budget 6G --pattern thrash

Exit codes:
  0  every check held until the end
  1  a check failed, or something could not be done; the error names it, and a line that repeats the run
  2  the options are wrong
  4  ended early by SIGINT or SIGTERM; every check held until then
  130, 143  ended at once by a second SIGINT, SIGTERM; nothing is known";

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
    /// What the guests do with their memory
    #[arg(long, value_enum, default_value_t = Workload::Mixed)]
    workload: Workload,
    /// What goes wrong now and then
    #[arg(long, value_enum, value_name = "FAULT,…", value_delimiter = ',')]
    faults: Vec<Fault>,
    /// How many guests run side by side
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    vms: u16,
    /// What all guests together may have [default: what they can have]
    #[arg(long, value_name = "SIZE")]
    budget: Option<Size>,
    /// How long a resize may take without progress or a reason; a guest is looked at every 40 ms or so, below that all
    /// is stuck
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    stuck_after: Duration,
    /// Write a page with plots, and the data behind it, into this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print one JSON document instead of the summary
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Allocate, fill, read back and free pages
    Alloc,
    /// As well, many pages are pinned or otherwise cannot be moved for a while
    Pin,
    /// The same with few pages
    Mixed,
    /// As alloc; each guest reaches for an unplugged block in the end, is caught, and another one starts
    Rogue,
}

pub(crate) fn run(args: &StressArgs) -> anyhow::Result<ExitCode> {
    let mut guest = args.machine.options();
    guest.workload = match args.workload {
        Workload::Alloc | Workload::Rogue => vmm_harness::Workload::Alloc,
        Workload::Pin => vmm_harness::Workload::Pin,
        Workload::Mixed => vmm_harness::Workload::Mixed,
    };
    guest.seed = match args.machine.seed() {
        Some(seed) => seed,
        None => seed_of_environment()?.unwrap_or_else(new_seed),
    };
    let options = StressOptions {
        pattern: args.pattern,
        limit: match (args.resizes, args.duration) {
            (Some(count), _) => Limit::Resizes(count),
            (None, duration) => Limit::Duration(duration.unwrap_or(Duration::from_secs(60))),
        },
        rogue: args.workload == Workload::Rogue,
        faults: args.faults.clone(),
        budget: args.budget.map(|Size(bytes)| bytes),
        vm_count: args.vms.into(),
        stuck_after: args.stuck_after,
        guest,
    };
    if !options.faults.is_empty() && env::var_os("RUST_LOG").is_none() {
        // Failures are what was asked for.
        log::set_max_level(log::LevelFilter::Error);
    }
    if let Some(dir) = &args.report {
        // Before the run, not after it.
        report::prepare(dir).with_context(|| dir.display().to_string())?;
    }
    let interrupted = stress::interrupted_by_signals()?;
    let began = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let args_of_process = env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let command = command_line(args_of_process, options.guest.seed);
    let mut show = Show::new(options.limit);
    let mut told = false;
    let run = stress::run(
        &options,
        &interrupted,
        &mut |progress| match &progress.failure {
            // At once: a host that does not answer may keep the run from its end, and what is written then may fail.
            Some(failure) if !told => {
                told = true;
                show.bar.finish_and_clear();
                let (text, seed) = (failure.text(), options.guest.seed);
                // Nobody is left to tell if standard error is gone.
                let _ = writeln!(
                    io::stderr(),
                    "vmem: {text}\nVMEM_SEED={seed}; to repeat: {command}"
                );
            }
            Some(_) => {}
            None => show.progress(progress),
        },
    )?;
    show.bar.finish_and_clear();
    let mut recording = Recording::new(&options, run, command.clone(), began);
    let reported = args
        .report
        .as_ref()
        .map(|dir| report::write(dir, &recording).with_context(|| dir.display().to_string()));
    recording.forget_series();
    let mut out = io::stdout().lock();
    match args.json {
        true => {
            serde_json::to_writer_pretty(&mut out, &recording)?;
            writeln!(out)?;
        }
        false => print_summary(&mut out, &recording)?,
    }
    reported.transpose()?;
    if let (Some(dir), false) = (&args.report, args.json) {
        writeln!(out, "report: {}", dir.join("index.html").display())?;
    }
    Ok(match recording.outcome {
        Outcome::Passed => ExitCode::SUCCESS,
        Outcome::Interrupted => ExitCode::from(4),
        Outcome::Failed => ExitCode::from(1),
    })
}

fn seed_of_environment() -> anyhow::Result<Option<u64>> {
    let seed = match env::var("VMEM_SEED") {
        Ok(seed) => seed,
        Err(VarError::NotPresent) => return Ok(None),
        Err(VarError::NotUnicode(seed)) => seed.to_string_lossy().into_owned(),
    };
    let wrong = |_| UsageError(format!("VMEM_SEED is {seed:?}, which is no number"));
    Ok(Some(seed.parse().map_err(wrong)?))
}

/// The line that repeats a run, fit for a shell, without its report.
fn command_line(args: impl Iterator<Item = String>, seed: u64) -> String {
    let quoted = |arg: String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+@%".contains(c);
        match !arg.is_empty() && arg.chars().all(plain) {
            true => arg,
            false => format!("'{}'", arg.replace('\'', "'\\''")),
        }
    };
    let mut words = vec!["vmem".to_owned()];
    let mut args = args.skip(1);
    while let Some(arg) = args.next() {
        // What was found is not to be overwritten by what is found next.
        match arg.as_str() {
            "--report" => drop(args.next()),
            arg if arg.starts_with("--report=") => {}
            _ => words.push(quoted(arg)),
        }
    }
    if !words
        .iter()
        .any(|word| word == "--seed" || word.starts_with("--seed="))
    {
        words.extend(["--seed".to_owned(), seed.to_string()]);
    }
    words.join(" ")
}

/// How far a run is: a bar on a terminal, else a line now and then.
struct Show {
    bar: ProgressBar,
    limit: Limit,
    next_line: Duration,
}

impl Show {
    fn new(limit: Limit) -> Self {
        let (length, rest) = match limit {
            Limit::Duration(duration) => (millis(duration), ""),
            Limit::Resizes(count) => (count, "{pos}/{len} "),
        };
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::new(length);
        let template = format!("{{bar:24}} {{percent:>3}}% {rest}{{msg}}; {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Self {
            bar,
            limit,
            next_line: LINE_INTERVAL,
        }
    }

    fn progress(&mut self, progress: &Progress) {
        let seconds = progress.elapsed.as_secs_f64().max(0.001);
        let Progress {
            elapsed,
            resizes,
            blocks_moved,
            pages_verified,
            ..
        } = *progress;
        // No more is asked for, but what was has to come to its end.
        let rest = match self.limit {
            Limit::Duration(duration) if elapsed >= duration => "; ending",
            Limit::Resizes(count) if resizes >= count => "; ending",
            _ => "",
        };
        let line = format!(
            "{resizes} resizes ({:.1}/s), {blocks_moved} blocks moved, {pages_verified} pages verified{rest}",
            resizes as f64 / seconds
        );
        if self.bar.is_hidden() {
            if elapsed >= self.next_line {
                self.next_line = elapsed + LINE_INTERVAL;
                // Nobody is left to tell if standard error is gone.
                let _ = writeln!(io::stderr(), "{seconds:>6.0} s: {line}");
            }
            return;
        }
        self.bar.set_position(match self.limit {
            Limit::Duration(_) => millis(elapsed),
            Limit::Resizes(_) => resizes,
        });
        self.bar.set_message(line);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn print_summary(out: &mut dyn Write, recording: &Recording) -> io::Result<()> {
    let Recording { run, summary, .. } = recording;
    writeln!(out, "{}, seed {}", run.backend, run.seed)?;
    for (count, what) in summary.totals() {
        writeln!(out, "{count:>12} {what}")?;
    }
    if !summary.reasons.is_empty() {
        let reason = |count: &ReasonCount| format!("{} {}", count.count, count.reason);
        let reasons: Vec<_> = summary.reasons.iter().map(reason).collect();
        writeln!(
            out,
            "looked at on the way to a size: {}",
            reasons.join(", ")
        )?;
    }
    if !summary.faults.is_empty() {
        let faults = summary
            .faults
            .iter()
            .map(|fault| format!("{} {}", fault.count, fault.fault));
        writeln!(out, "faults: {}", faults.collect::<Vec<_>>().join(", "))?;
    }
    writeln!(
        out,
        "{:<10} {:<6} {:>9} {:>10} {:>10} {:>10} {:>10}",
        "request", "answer", "count", "mean", "p50 <", "p99 <", "max"
    )?;
    for latency in &summary.requests {
        let ms = |duration: Duration| format!("{:.3} ms", duration.as_secs_f64() * 1e3);
        writeln!(
            out,
            "{:<10} {:<6} {:>9} {:>10} {:>10} {:>10} {:>10}",
            latency.request,
            latency.answer,
            latency.count,
            format!("{:.3} ms", latency.mean_us / 1e3),
            ms(latency.percentile(50)),
            ms(latency.percentile(99)),
            format!("{:.3} ms", latency.max_us / 1e3),
        )?;
    }
    match recording.outcome {
        Outcome::Passed => writeln!(out, "0 failures"),
        Outcome::Interrupted => writeln!(out, "0 failures until it was ended early"),
        Outcome::Failed => writeln!(out, "1 failure, which has ended the run"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_repeats_a_run_has_its_seed_once_and_survives_a_shell() {
        let line = |args: &[&str]| command_line(args.iter().map(|arg| (*arg).to_owned()), 7);
        assert_eq!(
            line(&["/a/vmem", "stress", "--vcpus", "2"]),
            "vmem stress --vcpus 2 --seed 7"
        );
        assert_eq!(
            line(&["vmem", "stress", "--seed", "8"]),
            "vmem stress --seed 8"
        );
        assert_eq!(
            line(&["vmem", "stress", "--seed=8"]),
            "vmem stress --seed=8"
        );
        assert_eq!(
            line(&["vmem", "stress", "--backing", "a b'c"]),
            "vmem stress --backing 'a b'\\''c' --seed 7"
        );
        assert_eq!(
            line(&["vmem", "stress", "--report", "a", "--json", "--report=b"]),
            "vmem stress --json --seed 7"
        );
    }
}

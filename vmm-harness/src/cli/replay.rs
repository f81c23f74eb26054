//! `vmem replay`.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use vmm_harness::replay::{self, Inputs, ReplayError, Summary};

pub(crate) const HELP: &str = "\
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

#[derive(Args)]
pub(crate) struct ReplayArgs {
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

pub(crate) fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
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

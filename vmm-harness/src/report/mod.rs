//! What a stress run leaves behind to be looked at: a page with plots, and the data behind it.

mod page;
mod plots;
mod svg;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::Serialize;

use crate::linux::date_and_machine;
use crate::stress::{self, Pattern, StressOptions, Summary};

/// Everything recorded about a run. `report.json` is this.
#[derive(Clone, Debug, Serialize)]
pub struct Recording {
    /// What ran.
    pub run: Run,
    /// How it ended.
    pub outcome: Outcome,
    /// What failed first, and where.
    pub failure: Option<String>,
    /// What was done.
    pub summary: Summary,
    /// Each guest over time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<Vm>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every check held until the end.
    Passed,
    /// A check failed, or something could not be done.
    Failed,
    /// Ended early by a signal; every check held until then.
    Interrupted,
}

/// What ran, and where.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The line that repeats it.
    pub command: String,
    /// How the target moves.
    pub pattern: Pattern,
    /// Seed of everything chosen at random.
    pub seed: u64,
    /// Version of `vmem`.
    pub version: &'static str,
    /// What the guests ran on.
    pub backend: String,
    /// The date, and the host's processors and memory.
    pub machine: String,
    /// When it began, RFC 3339, UTC.
    pub began: String,
    /// Bytes of a region.
    pub region_size: u64,
    /// Bytes of a device block.
    pub block_size: u64,
    /// Bytes all guests together may have requested; 0 without a limit.
    pub budget: u64,
}

/// One guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Vm {
    /// How often it was looked at.
    pub looks: u64,
    /// Looks of an interval. Of each interval there are samples of the last look and of those at which one of the sizes
    /// was least or most, and the map of the first; but of the last 200 looks there is everything.
    pub stride: u64,
    /// Its sizes over time.
    pub samples: Vec<Sample>,
    /// Its blocks over time.
    pub maps: Vec<Map>,
}

/// One guest at one time. Sizes are bytes; counts are since the run began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Since the run began.
    pub seconds: f64,
    /// What the driver is asked to have plugged.
    pub requested: u64,
    /// What is plugged.
    pub plugged: u64,
    /// Hotplugged memory the guest's page allocator works with.
    pub online: u64,
    /// Host memory behind the region.
    pub resident: u64,
    /// Sizes asked for.
    pub resizes: u64,
    /// Blocks plugged.
    pub blocks_plugged: u64,
    /// Blocks unplugged.
    pub blocks_unplugged: u64,
    /// Pages read back and found right.
    pub pages_verified: u64,
    /// Times the guest has settled and everything was checked.
    pub rests: u64,
    /// Guests started, one after another.
    pub lives: u64,
}

impl Sample {
    /// The sizes.
    pub const SIZES: [fn(&Self) -> u64; 4] = [
        |sample| sample.requested,
        |sample| sample.plugged,
        |sample| sample.online,
        |sample| sample.resident,
    ];
}

/// The blocks of one guest at one time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Map {
    /// Since the run began.
    pub seconds: f64,
    /// From the region's start, one digit for each equal share of it: how many ninths of its blocks are plugged, 0 only
    /// for none and 9 only for all.
    pub shares: String,
}

impl Recording {
    /// What there is to say about `run`, which was made by `command` and has begun at `began`.
    #[must_use]
    pub fn new(options: &StressOptions, run: stress::Run, command: String, began: String) -> Self {
        let guest = &options.guest;
        let mut failure: Option<String> = None;
        if let Some(failed) = &run.failure {
            let text =
                std::iter::successors(Some(failed as &dyn std::error::Error), |e| e.source())
                    .map(ToString::to_string)
                    .collect::<Vec<_>>();
            failure = Some(text.join(": "));
        }
        Self {
            run: Run {
                command,
                pattern: options.pattern,
                seed: guest.seed,
                version: env!("CARGO_PKG_VERSION"),
                backend: run.backend,
                machine: date_and_machine(),
                began,
                region_size: guest.region,
                block_size: guest.block_size,
                budget: options.budget.unwrap_or(0),
            },
            outcome: match (&run.failure, run.interrupted) {
                (Some(_), _) => Outcome::Failed,
                (None, true) => Outcome::Interrupted,
                (None, false) => Outcome::Passed,
            },
            failure,
            summary: run.summary,
            vms: run.vms,
        }
    }
}

/// Writes `index.html`, `report.json` and `samples.csv` into `dir`, which exists.
///
/// # Errors
///
/// If a file cannot be written.
pub fn write(dir: &Path, recording: &Recording) -> io::Result<()> {
    fs::write(dir.join("index.html"), page::page(recording))?;
    let mut json = BufWriter::new(File::create(dir.join("report.json"))?);
    serde_json::to_writer(&mut json, recording)?;
    json.flush()?;
    let mut csv = BufWriter::new(File::create(dir.join("samples.csv"))?);
    samples(recording, &mut csv)?;
    csv.flush()
}

/// All samples of all guests as lines of numbers, below a line of names.
fn samples(recording: &Recording, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "vm,seconds,requested,plugged,online,resident,resizes,blocks_plugged,blocks_unplugged,pages_verified,\
         rests,lives"
    )?;
    for (index, vm) in recording.vms.iter().enumerate() {
        for sample in &vm.samples {
            let Sample {
                seconds,
                requested,
                plugged,
                online,
                resident,
                resizes,
                blocks_plugged,
                blocks_unplugged,
                pages_verified,
                rests,
                lives,
            } = sample;
            writeln!(
                out,
                "{index},{seconds:.6},{requested},{plugged},{online},{resident},{resizes},{blocks_plugged},\
                 {blocks_unplugged},{pages_verified},{rests},{lives}"
            )?;
        }
    }
    Ok(())
}

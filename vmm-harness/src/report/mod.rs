//! What a stress run leaves behind to be looked at: a page with plots, and the data behind it.

mod page;
mod plots;
mod svg;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::Serialize;

use crate::demo::options::{mode_name, policy_name};
use crate::demo::{BackingKind, DemoError};
use crate::linux::date_and_machine;
use crate::stress::{self, Fault, Limit, Pattern, StressOptions, Summary};
use crate::{GuestKind, Workload};

/// Everything recorded about a run. `report.json` is this.
#[derive(Clone, Debug, Serialize)]
pub struct Recording {
    /// What ran.
    pub run: Run,
    /// How it ended.
    pub outcome: Outcome,
    /// What failed first, and where.
    pub failure: Option<Failure>,
    /// What was done.
    pub summary: Summary,
    /// Each guest over time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<Vm>,
    /// What the guests held of the budget, whenever that changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<Held>,
}

/// What failed first.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Which guest, from 0, if one can be named.
    pub vm: Option<usize>,
    /// When it was found, since the run began.
    pub seconds: f64,
    /// Name of the check, if it was one.
    pub check: Option<&'static str>,
    /// What happened.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What all guests may come to have plugged from one moment on: of each, the larger of what is requested and what is
/// plugged, as the budget counts it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    /// Since the run began.
    pub seconds: f64,
    /// Of each guest.
    pub bytes: Vec<u64>,
}

impl Held {
    /// Of all guests together.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.bytes.iter().sum()
    }
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
    /// What was asked for, whether by an option or because it is the default.
    pub options: Options,
}

/// What a run was asked for. Sizes are bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Options {
    /// How the target moves.
    pub pattern: Pattern,
    /// What the guests do with their memory, as on the command line.
    pub workload: &'static str,
    /// What goes wrong now and then.
    pub faults: Vec<Fault>,
    /// After how many seconds it was enough, if not after a number of resizes.
    pub seconds: Option<f64>,
    /// After how many resizes it was enough, if not after a time.
    pub resizes: Option<u64>,
    /// Seconds a resize may take without progress or reason.
    pub stuck_after: f64,
    /// Guests side by side.
    pub vms: usize,
    /// What all guests together may have requested or plugged, if it is less than all their memory.
    pub budget: Option<u64>,
    /// Where the guests were to run.
    pub guest: GuestKind,
    /// vCPUs of a guest.
    pub vcpus: usize,
    /// Memory a guest has from the start.
    pub boot_memory: u64,
    /// Size of a region.
    pub region: u64,
    /// Size of a device block.
    pub block_size: u64,
    /// Size of a memory slot, if it was not the device's choice.
    pub slot_size: Option<u64>,
    /// Proximity domain the device names, if it names one.
    pub node: Option<u16>,
    /// Host memory behind a region.
    pub backing: BackingKind,
    /// In which order the guest's driver plugs and unplugs, as on the command line.
    pub policy: &'static str,
    /// Mode of the driver, if it was not its choice, as on the command line.
    pub mode: Option<&'static str>,
    /// Size of a big block, if it was not the driver's choice.
    pub bbm_block_size: Option<u64>,
}

impl From<&StressOptions> for Options {
    fn from(options: &StressOptions) -> Self {
        let guest = &options.guest;
        let (seconds, resizes) = match options.limit {
            Limit::Duration(duration) => (Some(duration.as_secs_f64()), None),
            Limit::Resizes(count) => (None, Some(count)),
        };
        Self {
            pattern: options.pattern,
            workload: match guest.workload {
                _ if options.rogue => "rogue",
                Workload::Alloc => "alloc",
                Workload::Pin => "pin",
                Workload::Mixed => "mixed",
            },
            faults: options.faults.clone(),
            seconds,
            resizes,
            stuck_after: options.stuck_after.as_secs_f64(),
            vms: options.vm_count,
            budget: options
                .budget
                .filter(|budget| *budget < guest.region.saturating_mul(options.vm_count as u64)),
            guest: guest.guest,
            vcpus: guest.vcpu_count,
            boot_memory: guest.boot_memory,
            region: guest.region,
            block_size: guest.block_size,
            slot_size: guest.slot_size,
            node: guest.node_id,
            backing: guest.backing,
            policy: policy_name(guest.strategy),
            mode: guest.mode.map(mode_name),
            bbm_block_size: guest.bbm_block_size,
        }
    }
}

/// One guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Vm {
    /// How often it was looked at.
    pub looks: u64,
    /// Seconds between two looks at the most.
    pub longest_gap: f64,
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
    /// What the device has plugged, without the blocks of an UNPLUG that is being carried out.
    pub plugged: u64,
    /// Most that was plugged at a time while `online` and `resident` were measured.
    pub most_plugged: u64,
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
    /// The sizes that go together.
    pub const SIZES: [fn(&Self) -> u64; 4] = [
        |sample| sample.requested,
        |sample| sample.most_plugged,
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
        let failure = run.failure.as_ref().map(|failed| Failure {
            vm: failed.vm,
            seconds: failed.after.as_secs_f64(),
            check: match &failed.source {
                DemoError::Check(check) => Some(check.name),
                _ => None,
            },
            message: failed.text(),
        });
        Self {
            run: Run {
                command,
                seed: options.guest.seed,
                version: env!("CARGO_PKG_VERSION"),
                backend: run.backend,
                machine: date_and_machine(),
                began,
                options: options.into(),
            },
            outcome: match (&run.failure, run.interrupted) {
                (Some(_), _) => Outcome::Failed,
                (None, true) => Outcome::Interrupted,
                (None, false) => Outcome::Passed,
            },
            failure,
            summary: run.summary,
            vms: run.vms,
            held: run.held,
        }
    }

    /// Leaves out what changed over time: the totals stay.
    pub fn forget_series(&mut self) {
        self.vms.clear();
        self.held.clear();
    }
}

/// The files of a report.
const PAGE: &str = "index.html";
const DATA: &str = "report.json";
const SAMPLES: &str = "samples.csv";

/// Writes `index.html`, `report.json` and `samples.csv` into `dir`, which exists.
///
/// # Errors
///
/// If a file cannot be written.
pub fn write(dir: &Path, recording: &Recording) -> io::Result<()> {
    let mut json = BufWriter::new(File::create(dir.join(DATA))?);
    serde_json::to_writer(&mut json, recording)?;
    json.flush()?;
    let mut csv = BufWriter::new(File::create(dir.join(SAMPLES))?);
    samples(recording, &mut csv)?;
    csv.flush()?;
    // Last: where it is, there is the data behind it.
    fs::write(dir.join(PAGE), page::page(recording))
}

/// Makes `dir` if it is not there, and finds out whether a report can be written there.
///
/// # Errors
///
/// If it cannot.
pub fn prepare(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for file in [DATA, SAMPLES, PAGE] {
        // What is there from another run stays until there is something to take its place.
        File::options()
            .append(true)
            .create(true)
            .open(dir.join(file))?;
    }
    Ok(())
}

/// All samples of all guests as lines of numbers, below a line of names.
fn samples(recording: &Recording, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "vm,seconds,requested,plugged,most_plugged,online,resident,resizes,blocks_plugged,blocks_unplugged,pages_verified,\
         rests,lives"
    )?;
    for (index, vm) in recording.vms.iter().enumerate() {
        for sample in &vm.samples {
            let Sample {
                seconds,
                requested,
                plugged,
                most_plugged,
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
                "{index},{seconds:.6},{requested},{plugged},{most_plugged},{online},{resident},{resizes},{blocks_plugged},\
                 {blocks_unplugged},{pages_verified},{rests},{lives}"
            )?;
        }
    }
    Ok(())
}

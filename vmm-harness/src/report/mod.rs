//! What a stress run leaves behind to be looked at: a page with plots, and the data behind it.

use serde::Serialize;

/// Everything recorded about a run. `report.json` is this.
#[derive(Clone, Debug, Serialize)]
pub struct Recording {
    /// What ran.
    pub run: Run,
    /// What it came to.
    pub summary: crate::stress::Summary,
    /// Each guest over time.
    pub vms: Vec<Vm>,
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
    /// The host's processors, memory and kernel.
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
}

/// The blocks of one guest at one time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Map {
    /// Since the run began.
    pub seconds: f64,
    /// From the region's start, one digit for each equal share of the region: how many ninths of its blocks are plugged,
    /// 0 only for none and 9 only for all.
    pub shares: String,
}

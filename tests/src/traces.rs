//! Recorded traces of real kernels, and their replay.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use vmm_harness::replay::{ReplayError, Summary, Trace, replay};

/// A trace of the folder `traces`.
///
/// # Panics
///
/// If there is none of that name.
#[must_use]
pub fn recorded(name: &str) -> Value {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "traces", name]
        .iter()
        .collect();
    serde_json::from_slice(&fs::read(path).expect("the trace is there")).expect("it is JSON")
}

/// Replays a trace, perhaps a changed one.
///
/// # Errors
///
/// It cannot be replayed.
pub fn try_replay(trace: &Value) -> Result<Summary, ReplayError> {
    let trace = Trace::parse(trace.to_string().as_bytes())?;
    replay(&trace, None)
}

//! Recorded traces of real kernels, run through the model of memory hotplug.
//!
//! A trace has what was done to a kernel and what was seen after each step. The same is done to
//! [`Hotplug`](virtio_mem_driver::hotplug::Hotplug), and everything that was seen must be what the model says: results,
//! states, zones, spans, counters, uevents, nodes, resources. The first difference ends the replay.
//!
//! Where a virtio-mem device was recorded, the device of this project takes its place and
//! [`MemDriver`](virtio_mem_driver::driver::MemDriver) works on it under Linux's policy; its requests must be those
//! that were recorded.
//!
//! Taken from the trace, because it depends on where the kernel keeps its own pages: which attempts to empty memory
//! failed or went on for ever ([`Inputs`]), and how many pages at boot are in use for ever.
//!
//! | to find | look at |
//! |---|---|
//! | the files | `trace.rs`, `step.rs`, `qmp.rs`; what is sane, `check.rs` |
//! | the state at boot | `boot.rs` |
//! | what is done to the model, and what it is told | `guest.rs`, `inputs.rs` |
//! | how ACPI adds and ejects a DIMM | `acpi.rs`, `eject.rs` |
//! | the virtio-mem device; its driver, request by request | `rig.rs`, `requests.rs`; `mem_device.rs`, `course.rs` |
//! | the recorded shell scripts | `script.rs`, `shell.rs`, `console.rs` |
//! | what is compared | `compare.rs` |
//! | the map of blocks and zones | `show.rs` |

mod acpi;
mod boot;
mod check;
mod compare;
mod console;
mod course;
mod eject;
mod guest;
mod inputs;
mod mem_device;
mod qmp;
mod requests;
mod rig;
mod script;
mod shell;
mod show;
mod snapshot;
mod step;
mod trace;

use std::path::Path;

use serde::Serialize;
use thiserror::Error;
use virtio_mem_driver::hotplug::Error as HotplugError;

pub use compare::Difference;
pub use inputs::Inputs;
pub use trace::{Trace, TraceError};

use compare::{Comparison, Mismatch};
use guest::Guest;
use step::{Op, Step};
use trace::Parameter;

/// A recording may claim so many busy places, and one more for each so many of its requests. Real kernels have one or
/// two in a memory block that has been theirs, and most of their requests come from others.
const MOST_BUSY_PLACES: u64 = 8;
const REQUESTS_PER_BUSY_PLACE: u64 = 8;

/// Why a file cannot be replayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// It is not a trace, or not one that can be replayed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The model does not boot with this memory.
    #[error("the model does not boot: {error}")]
    Boot {
        /// What the model says.
        error: HotplugError,
    },
    /// What the step asks for cannot be done.
    #[error("step {step} ({operation}): {what}")]
    Step {
        /// Number of the step, from 0.
        step: usize,
        /// What was done.
        operation: String,
        /// What is wrong with it.
        what: String,
    },
}

/// What came of a replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Steps that agree.
    pub steps: usize,
    /// Requests to a virtio-mem device compared.
    pub requests: u64,
    /// Values compared, requests among them.
    pub comparisons: u64,
    /// What was taken from the trace.
    pub inputs: Inputs,
    /// Where recording and model part, if they do.
    pub difference: Option<Difference>,
}

/// Who gets a map of blocks and zones at boot, and after each step that changes it.
pub type Show<'a> = &'a mut dyn FnMut(&str);

/// Replays a file, and shows what happens if anybody wants to see it.
///
/// # Errors
///
/// [`ReplayError`] if the file cannot be replayed; that model and recording differ is not an error but the result.
pub fn replay_file(path: &Path, show: Option<Show<'_>>) -> Result<Summary, ReplayError> {
    replay(&Trace::load(path)?, show)
}

/// Replays a trace, like [`replay_file`].
///
/// # Errors
///
/// [`ReplayError`] if the trace cannot be replayed.
pub fn replay(trace: &Trace, show: Option<Show<'_>>) -> Result<Summary, ReplayError> {
    let mut plan = boot::Plan::new(trace)?;
    // What the model, booted with all pages free, has too much, is what the kernel uses for ever.
    let empty = Guest::boot(&plan)?.snapshot();
    plan.reserve(trace, &empty);
    let mut guest = Guest::boot(&plan)?;
    let comparison = Comparison::new(&trace.boot, plan.boot_blocks(), &trace.steps);
    let mut replay = Replay {
        comparison,
        shown: String::new(),
        show,
        block_pages: plan.block_pages(),
    };
    let mut steps = 0;
    let difference = replay.run(trace, &mut guest, &mut steps)?;
    Ok(Summary {
        steps,
        requests: guest.requests,
        comparisons: replay.comparison.count,
        inputs: guest.inputs,
        difference,
    })
}

struct Replay<'t, 's> {
    comparison: Comparison<'t>,
    /// The map as it was shown last.
    shown: String,
    show: Option<Show<'s>>,
    block_pages: u64,
}

impl Replay<'_, '_> {
    fn run(
        &mut self,
        trace: &Trace,
        guest: &mut Guest,
        steps: &mut usize,
    ) -> Result<Option<Difference>, ReplayError> {
        if let Err(mismatch) = self.parameters(trace, guest) {
            return Ok(Some(mismatch.at(None, "boot")));
        }
        // The driver of virtio-mem was there before the recorder looked.
        let probed = trace
            .steps
            .iter()
            .take_while(|step| matches!(step.op, Op::Probe { .. }));
        let probed = probed.count();
        if let Some(difference) = self.steps(&trace.steps[..probed], guest, steps)? {
            return Ok(Some(difference));
        }
        if let Err(mismatch) = self.boot(guest) {
            return Ok(Some(mismatch.at(None, "boot")));
        }
        if let Some(difference) = self.steps(&trace.steps[probed..], guest, steps)? {
            return Ok(Some(difference));
        }
        let Inputs {
            busy_places,
            given_up,
            ..
        } = guest.inputs;
        // A recording that is believed in everything would prove nothing.
        let most = MOST_BUSY_PLACES + guest.requests / REQUESTS_PER_BUSY_PLACE;
        if busy_places > most || busy_places + given_up > guest.requests {
            let most = format!(
                "at most {most} busy places and one input for each of {} requests",
                guest.requests
            );
            let taken = format!("{busy_places} busy places, {given_up} given up");
            let mismatch = self
                .comparison
                .value("taken from the recording", "", &most, &taken);
            return Ok(mismatch.err().map(|mismatch| mismatch.at(None, "requests")));
        }
        for (name, expected) in &trace.params_at_end {
            let got = guest.read(&format!("parameters/{name}"));
            if let Err(mismatch) = self.comparison.value(name, "value", &expected.0, &got) {
                return Ok(Some(mismatch.at(None, "parameters at the end")));
            }
        }
        Ok(None)
    }

    /// Steps, of which `done` were done before.
    fn steps(
        &mut self,
        list: &[Step],
        guest: &mut Guest,
        done: &mut usize,
    ) -> Result<Option<Difference>, ReplayError> {
        for step in list {
            let index = *done;
            let compared = self
                .step(index, step, guest)
                .map_err(|what| ReplayError::Step {
                    step: index,
                    operation: step.label.clone(),
                    what,
                })?;
            if let Err(mismatch) = compared {
                return Ok(Some(mismatch.at(Some(index), &step.label)));
            }
            *done += 1;
        }
        Ok(None)
    }

    fn parameters(&mut self, trace: &Trace, guest: &mut Guest) -> Result<(), Mismatch> {
        // Init has set it after boot, so DIMMs found at boot do not know of it.
        let policy = &trace.boot.auto_online_blocks;
        if guest.set("auto_online_blocks", policy).is_err() {
            let known = "a way to bring memory online".to_owned();
            self.comparison
                .value("auto_online_blocks", "text", policy, &known)?;
        }
        for (name, Parameter(expected)) in &trace.boot.memory_hotplug_params {
            let file = format!("parameters/{name}");
            // Where the command line says nothing, init may have set it.
            if guest.read(&file) != *expected
                && !trace.boot.sets(name)
                && guest.set(&file, expected).is_ok()
            {
                guest.inputs.parameters += 1;
            }
            let got = guest.read(&file);
            self.comparison.value(name, "value", expected, &got)?;
        }
        Ok(())
    }

    fn boot(&mut self, guest: &mut Guest) -> Result<(), Mismatch> {
        let snapshot = guest.snapshot();
        self.show(|| "boot".to_owned(), &snapshot);
        self.comparison.boot(&snapshot)
    }

    fn step(
        &mut self,
        index: usize,
        step: &Step,
        guest: &mut Guest,
    ) -> Result<Result<(), Mismatch>, String> {
        let mut pending = !guest.ejects.is_empty();
        let (outcome, checks) = guest.perform(step)?;
        if matches!(step.op, Op::Probe { .. }) {
            // Nobody listened yet.
            guest.take_uevents();
        }
        // While an eject goes on, what was read of one step is of several moments.
        pending &= !guest.ejects.is_empty();
        let mut uevents = std::mem::take(&mut guest.held);
        uevents.extend(guest.take_uevents());
        if pending && uevents.len() > step.uevents.len() {
            guest.held = uevents.split_off(step.uevents.len());
            guest.inputs.late_uevents += guest.held.len() as u64;
        }
        let comparison = &mut self.comparison;
        comparison.arriving.clear();
        if pending {
            comparison.arriving.clone_from(&guest.taken);
        }
        let mut compare = || {
            if let (Some(recorded), Some(got)) = (&step.result, &outcome) {
                comparison.value("result", "", recorded, got)?;
            }
            for check in &checks {
                comparison.value(&check.subject, check.field, &check.expected, &check.got)?;
            }
            Ok(())
        };
        if let Err(mismatch) = compare() {
            return Ok(Err(mismatch));
        }
        if self.show.is_none() && !step.shows_state() {
            return Ok(self.comparison.uevents(&step.uevents, &uevents));
        }
        let snapshot = guest.snapshot();
        self.show(|| format!("step {index}: {}", step.label), &snapshot);
        let compared = self
            .comparison
            .step(step, &snapshot)
            .and_then(|()| self.comparison.uevents(&step.uevents, &uevents));
        guest.inputs.early_states = self.comparison.early_states;
        Ok(compared)
    }

    fn show(&mut self, operation: impl FnOnce() -> String, snapshot: &snapshot::Snapshot) {
        let Some(show) = &mut self.show else { return };
        let map = show::render(snapshot, self.block_pages);
        if map != self.shown {
            show(&format!("{}\n{map}", operation()));
            self.shown = map;
        }
    }
}

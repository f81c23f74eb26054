//! The main job: a guest that works in its memory while it is grown and shrunk, checked at every step.

pub(crate) mod checks;
pub(crate) mod options;
mod residency;
mod table;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;
use virtio_mem::{Counters, Handle};
use virtio_mem_wire::{Answer, RequestKind};

pub use checks::CheckFailed;
pub use options::{BackingKind, DemoOptions};
pub use table::size;

use self::options::Plan;
use self::residency::unplugged_resident;
use crate::faults::Faults;
use crate::{
    InterruptCounts, Machine, Outcome, Report, ReportError, Shortfall, StartError, UnpluggedAccess,
};

/// How long a step may take before it counts as stuck. Not a measure of anything: a step takes well under a
/// second on an idle machine.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// The demonstration did not come to its end.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The options do not go together.
    #[error("{0}")]
    Options(String),
    /// The guest did not start.
    #[error("the guest could not be started")]
    Start(#[from] StartError),
    /// What was found is not what must be.
    #[error(transparent)]
    Check(#[from] CheckFailed),
    /// The guest did not get there.
    #[error("step to {target}")]
    Guest {
        /// The target, for people.
        target: String,
        /// What happened instead.
        #[source]
        source: ReportError,
    },
    /// The guest ended otherwise than it should.
    #[error("the guest should have {expected}, but: {outcome}")]
    Outcome {
        /// What it should have done.
        expected: &'static str,
        /// What it did.
        outcome: String,
    },
    /// The host does not have what the region needs.
    #[error("host memory for a region of {0}")]
    Backing(String, #[source] io::Error),
    /// The pool of huge pages does not hold the largest target.
    #[error(
        "{needed} huge pages of 2 MiB are needed and {free} are free; \
         as root: echo {needed} > /proc/sys/vm/nr_hugepages"
    )]
    HugePages {
        /// For the largest target.
        needed: u64,
        /// What the host has.
        free: u64,
    },
    /// Memory could not be measured, or the output not be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl DemoError {
    /// Whether the options are at fault and not the run.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Options(_)
                | Self::Start(
                    StartError::Device(_) | StartError::Layout(_) | StartError::Memory(..)
                )
        )
    }
}

/// One step of the demonstration: what was asked for, and what was there when it was reached.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Bytes asked for.
    pub target: u64,
    /// Bytes plugged.
    pub plugged: u64,
    /// Bytes of the target that are out of the driver's reach, and why.
    pub unreachable: Option<Unreachable>,
    /// Bytes of hotplugged memory the guest's page allocator works with.
    pub online: u64,
    /// Bytes of host memory behind the region.
    pub resident: u64,
    /// Requests of this step, those that came.
    pub requests: Vec<RequestCount>,
    /// Used-buffer notifications of this step.
    pub used_interrupts: u64,
    /// Configuration-change notifications of this step.
    pub config_interrupts: u64,
    /// Pages the workers read back in full and found right, in this step.
    pub pages_verified: u64,
    /// Pages the driver moved out of the way, in this step.
    pub pages_moved: u64,
    /// From the request of the operator until the driver had settled, in milliseconds.
    pub resize_ms: f64,
}

/// What the driver says of the part of a target it cannot reach.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Unreachable {
    /// Bytes between the target and what is plugged.
    pub bytes: u64,
    /// Why.
    pub reason: &'static str,
}

/// Requests of one type with one answer.
#[derive(Clone, Debug, Serialize)]
pub struct RequestCount {
    /// Type of the request.
    pub request: &'static str,
    /// The answer.
    pub answer: &'static str,
    /// How many.
    pub count: u64,
}

/// What the whole run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// What the guest ran on.
    pub backend: String,
    /// What the guest says its driver is.
    pub driver: Driver,
    /// Every step.
    pub steps: Vec<Step>,
    /// The forbidden access, if one was asked for.
    pub rogue: Option<Rogue>,
    /// Requests in all.
    pub requests: u64,
    /// Pages verified in all, and none was wrong.
    pub pages_verified: u64,
}

/// The guest's driver.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Driver {
    /// `direct` or `linux`.
    pub policy: &'static str,
    /// `sbm` or `bbm`.
    pub mode: &'static str,
    /// Bytes it plugs or unplugs at least.
    pub granule_size: u64,
}

impl From<&Report> for Driver {
    fn from(report: &Report) -> Self {
        Self {
            policy: options::policy_name(report.strategy),
            mode: options::mode_name(report.mode),
            granule_size: report.granule_size,
        }
    }
}

/// A guest reached for memory it had not plugged.
#[derive(Clone, Debug, Serialize)]
pub struct Rogue {
    /// Guest-physical address.
    pub address: u64,
    /// The vCPU that did it.
    pub vcpu: usize,
    /// Whether it wanted to write.
    pub write: bool,
    /// Bytes of host memory behind unplugged blocks before and after.
    pub unplugged_resident: (u64, u64),
    /// Bytes of host memory behind the whole region before and after.
    pub resident: (u64, u64),
}

/// Runs the demonstration, telling `out` about it as it goes.
///
/// # Errors
///
/// [`DemoError`]: bad options, a guest that does not start or get on, or a failed check with its name.
pub fn run(options: &DemoOptions, out: &mut dyn Write) -> Result<Summary, DemoError> {
    options.check()?;
    let plan = Plan::new(options)?;
    let most = plan.targets.iter().max().copied().unwrap_or(0);
    check_pool(options.backing, most)?;
    let (config, device) = options.machine_for(&plan, Faults::default())?;
    let mut machine = Machine::start(&config, device)?;
    let handle = machine.handle();
    let booted = machine
        .settled(0, STEP_TIMEOUT)
        .map_err(|source| DemoError::Guest {
            target: table::size(0),
            source,
        })?;
    checks::driver(&plan, &booted)?;
    let driver = Driver::from(&booted);
    table::header(out, &machine, options, &plan)?;
    let mut steps = Vec::new();
    let mut last = Moment::now(&machine, &handle, booted);
    for target in &plan.targets {
        let (step, now) = step(&machine, &plan, *target, &last)?;
        table::row(out, &step)?;
        steps.push(step);
        last = now;
        if options.rogue && beside_plugged_block(&handle).is_some() {
            break;
        }
    }
    let mut summary = Summary {
        backend: machine.backend().to_string(),
        driver,
        steps,
        rogue: None,
        requests: last.report.requests,
        pages_verified: last.verified(),
    };
    match options.rogue {
        true => {
            let rogue = go_rogue(machine, &handle)?;
            table::rogue(out, &rogue)?;
            summary.rogue = Some(rogue);
        }
        false => {
            summary.pages_verified = end(&mut machine)?;
            table::end(out, &summary)?;
        }
    }
    Ok(summary)
}

/// Plugging more than the pool of huge pages holds is BUSY, and whoever plugs up to `most` bytes would wait for
/// somebody to fill it.
pub(crate) fn check_pool(backing: BackingKind, most: u64) -> Result<(), DemoError> {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    if backing != BackingKind::Hugetlb2m {
        return Ok(());
    }
    let text = std::fs::read_to_string(POOL).unwrap_or_default();
    let free: u64 = text.trim().parse().unwrap_or(0);
    let needed = most.div_ceil(2 << 20);
    match free < needed {
        true => Err(DemoError::HugePages { needed, free }),
        false => Ok(()),
    }
}

/// The running totals at one moment.
struct Moment {
    counters: Counters,
    interrupts: InterruptCounts,
    report: Report,
}

impl Moment {
    fn now(machine: &Machine, handle: &Handle, report: Report) -> Self {
        Self {
            counters: handle.counters(),
            interrupts: machine.interrupts(),
            report,
        }
    }

    fn verified(&self) -> u64 {
        pages_verified(&self.report)
    }
}

pub(crate) fn pages_verified(report: &Report) -> u64 {
    report
        .workers
        .iter()
        .map(|worker| worker.pages_verified)
        .sum()
}

/// One resize: asks, waits until the driver has settled, lets the workers use what there is, and checks.
fn step(
    machine: &Machine,
    plan: &Plan,
    target: u64,
    last: &Moment,
) -> Result<(Step, Moment), DemoError> {
    let handle = machine.handle();
    let failed = |source| DemoError::Guest {
        target: table::size(target),
        source,
    };
    let started = Instant::now();
    handle
        .resize(target)
        .map_err(|error| DemoError::Options(error.to_string()))?;
    let mut report = machine.settled(target, STEP_TIMEOUT).map_err(failed)?;
    let resize_time = started.elapsed();
    let expected = checks::Expected {
        plan,
        target,
        plugged: plan.reachable(target, last.report.plugged_size),
        host_failures: 0,
    };
    checks::reached(machine.device(), &expected, &report)?;
    let goal = match expected.plugged {
        0 => 0,
        _ => last.verified() + plan.pages_per_step,
    };
    while pages_verified(&report) < goal {
        let left = STEP_TIMEOUT.saturating_sub(started.elapsed());
        report = machine.settled(target, left).map_err(failed)?;
    }
    let resident = checks::step(
        machine.device(),
        &expected,
        last.report.plugged_size,
        &report,
    )?;
    let now = Moment::now(machine, &handle, report);
    let step = Step {
        target,
        plugged: now.report.plugged_size,
        unreachable: unreachable(&now.report),
        online: now.report.online_size,
        resident,
        requests: requests_between(&last.counters, &now.counters),
        used_interrupts: now.interrupts.used_buffer - last.interrupts.used_buffer,
        config_interrupts: now.interrupts.config_change - last.interrupts.config_change,
        pages_verified: now.verified() - last.verified(),
        pages_moved: now.report.pages_moved - last.report.pages_moved,
        resize_ms: resize_time.as_secs_f64() * 1e3,
    };
    Ok((step, now))
}

fn unreachable(report: &Report) -> Option<Unreachable> {
    let reason = match report.unreachable_reason? {
        Shortfall::Remainder => "less than a granule",
        Shortfall::Capacity => "no whole unit of the region is left",
        // `checks::reached` lets no other pass.
        _ => return None,
    };
    Some(Unreachable {
        bytes: report.unreachable,
        reason,
    })
}

fn requests_between(before: &Counters, after: &Counters) -> Vec<RequestCount> {
    let mut counts = Vec::new();
    for kind in RequestKind::ALL {
        for answer in Answer::ALL {
            let count = after.requests(kind, answer) - before.requests(kind, answer);
            if count > 0 {
                counts.push(RequestCount {
                    request: kind.name(),
                    answer: answer.name(),
                    count,
                });
            }
        }
    }
    counts
}

/// An unplugged block whose neighbour is plugged: the hardest to keep apart, they share a memory slot.
fn beside_plugged_block(handle: &Handle) -> Option<u64> {
    const SLOT: u64 = 128 << 20;
    let geometry = handle.geometry();
    let plugged = handle.plugged();
    let mut behind_runs = plugged.runs().map(|run| run.end());
    let inside_slot = |block: &u64| {
        *block < geometry.block_count() && !geometry.bytes(*block).is_multiple_of(SLOT)
    };
    let block = behind_runs.find(inside_slot)?;
    Some(geometry.address(block))
}

pub(crate) fn go_rogue(machine: Machine, handle: &Handle) -> Result<Rogue, DemoError> {
    let geometry = handle.geometry();
    let first_unplugged = handle.plugged().next(0, false);
    let address = beside_plugged_block(handle)
        .or_else(|| first_unplugged.map(|block| geometry.address(block)))
        .ok_or_else(|| {
            DemoError::Options("every block is plugged, none is left to touch".into())
        })?;
    let device = machine.device().clone();
    let before = (handle.resident_bytes()?, unplugged_resident(&device)?);
    machine.rogue(address);
    let ended = machine.wait(STEP_TIMEOUT);
    // Either way the machine comes to its end before anything is concluded.
    let outcome = machine.stop(STEP_TIMEOUT);
    let access = match ended.unwrap_or(outcome) {
        Outcome::UnpluggedAccess(access) => access,
        other => {
            return Err(DemoError::Outcome {
                expected: "been caught at an unplugged block",
                outcome: other.to_string(),
            });
        }
    };
    let after = (handle.resident_bytes()?, unplugged_resident(&device)?);
    let UnpluggedAccess {
        vcpu,
        address: found,
        write,
        ..
    } = access;
    let rogue = Rogue {
        address: found,
        vcpu,
        write,
        resident: (before.0, after.0),
        unplugged_resident: (before.1, after.1),
    };
    checks::rogue(&device, address, &rogue)?;
    Ok(rogue)
}

pub(crate) fn end(machine: &mut Machine) -> Result<u64, DemoError> {
    let device = machine.device().clone();
    match machine.finish(STEP_TIMEOUT) {
        Outcome::Exited => checks::end(&device, &machine.progress()),
        other => Err(DemoError::Outcome {
            expected: "verified its pages and exited",
            outcome: other.to_string(),
        }),
    }
}

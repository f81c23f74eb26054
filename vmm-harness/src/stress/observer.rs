//! What must hold at any time, and what is recorded of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use virtio_mem::Handle;
use virtio_mem_wire::{Answer, RequestKind};

use super::operator::BlockCount;
use super::stop::Stop;
use super::watch::Watch;
use super::{Shared, lock};
use crate::control::Reason;
use crate::demo::checks::{check, no_page_lost};
use crate::demo::{DemoError, pages_verified};
use crate::{Machine, Report, report};

/// How often a guest is looked at.
const INTERVAL: Duration = Duration::from_millis(40);

/// What was seen in a life.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) observations: u64,
    /// Why the size was not there, as often as it was not.
    pub(super) reasons: BTreeMap<Reason, u64>,
    /// Most pages at a time that could not be moved.
    pub(super) most_unmovable: u64,
}

/// Looks at one guest for one life.
#[derive(Debug)]
pub(super) struct Observer<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) vm: usize,
    pub(super) machine: &'a Machine,
    pub(super) blocks: &'a BlockCount,
    /// What lives before this one have counted.
    pub(super) before: report::Sample,
}

impl Observer<'_> {
    /// Looks until `over` is raised.
    pub(super) fn run(&self, over: &Stop, seen: &mut Seen) -> Result<(), DemoError> {
        let mut watch = Watch::new(self.shared.options.stuck_after, Instant::now());
        while !over.wait(INTERVAL) {
            let (reason, unmovable) = self.look(&mut watch)?;
            seen.observations += 1;
            seen.most_unmovable = seen.most_unmovable.max(unmovable);
            if let Some(reason) = reason {
                *seen.reasons.entry(reason).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Why the size is not there, if it is not, and how many pages cannot be moved.
    fn look(&self, watch: &mut Watch) -> Result<(Option<Reason>, u64), DemoError> {
        let handle = self.machine.handle();
        // One that is late is told what is known: being late is the operator's and the watch's business.
        let report = self.machine.report(INTERVAL);
        let report = report.unwrap_or_else(|_| self.machine.progress());
        no_page_lost(&report)?;
        let resident = resident_bytes(&handle)?;
        let (status, counters) = (handle.status(), handle.counters());
        let broken = counters.unusable_chains + counters.unknown_requests + counters.queue_errors;
        check("driver-speaks-the-protocol", broken == 0, || {
            format!("{counters:?}")
        })?;
        let failure = status.failure.as_deref();
        check("device-has-not-failed", failure.is_none(), || {
            format!("{failure:?}")
        })?;
        let plugged = || handle.status().plugged_size;
        self.shared.budget.check(self.vm, plugged)?;
        let reason = watch.observe(Instant::now(), &status, &counters, &report)?;
        self.record(&handle, &report, resident);
        let unmovable = report.workers.iter().map(|worker| worker.pages_unmovable);
        Ok((reason, unmovable.sum()))
    }

    fn record(&self, handle: &Handle, report: &Report, resident: u64) {
        let status = handle.status();
        let (plugged, unplugged) = self.blocks.get();
        let state = &self.shared.vms[self.vm];
        let mut live = lock(&state.live);
        *live = report::Sample {
            seconds: self.shared.began.elapsed().as_secs_f64(),
            requested: status.requested_size,
            plugged: status.plugged_size,
            online: report.online_size,
            resident,
            resizes: live.resizes,
            blocks_plugged: self.before.blocks_plugged + plugged,
            blocks_unplugged: self.before.blocks_unplugged + unplugged,
            pages_verified: self.before.pages_verified + pages_verified(report),
            rests: live.rests,
            lives: live.lives,
        };
        lock(&state.recorder).sample(*live, || handle.plugged());
    }
}

/// Bytes resident, which are no more than are plugged.
///
/// Measuring takes a while in which blocks come and go. What is resident is what the guest has touched, and it touches
/// nothing before it knows that a PLUG is done, which the device has counted by then: if none was counted meanwhile,
/// the bytes plugged before are a bound.
fn resident_bytes(handle: &Handle) -> Result<u64, DemoError> {
    let plugs = || handle.counters().requests(RequestKind::Plug, Answer::Ack);
    let (before, plugged) = (plugs(), handle.status().plugged_size);
    let resident = handle.resident_bytes()?;
    check(
        "resident-within-plugged",
        resident <= plugged || plugs() != before,
        || format!("{resident} bytes are resident, {plugged} are plugged"),
    )?;
    Ok(resident)
}

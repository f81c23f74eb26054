//! What must hold at any time, and what is recorded of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use virtio_mem::Status;
use virtio_mem_wire::BlockMap;

use super::blocks::Blocks;
use super::stop::Stop;
use super::watch::Watch;
use super::{Shared, lock};
use crate::control::Reason;
use crate::demo::checks::{self, CheckFailed, check};
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
    pub(super) blocks: &'a Blocks,
    /// What lives before this one have counted.
    pub(super) before: report::Sample,
}

/// What one look has seen.
#[derive(Debug)]
struct Look {
    report: Report,
    /// The device after the report.
    status: Status,
    plugged: BlockMap,
    sizes: Sizes,
}

/// Sizes that go together, although they are measured one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    /// Most bytes plugged at a time while the others were measured.
    most_plugged: u64,
    /// What the guest works with.
    online: u64,
    /// Host memory behind the region.
    resident: u64,
    /// Bytes of blocks that were plugged at some time while `resident` was measured, which is done piece by piece.
    ever_plugged: u64,
}

impl Sizes {
    /// The guest works with memory between the answer to a PLUG and its UNPLUG, which is at any time no more than is
    /// plugged then, of which there was no more than the most. Only what it may touch can be resident.
    fn check(self) -> Result<(), CheckFailed> {
        let Self {
            most_plugged,
            online,
            resident,
            ever_plugged,
        } = self;
        check("resident-within-plugged", resident <= ever_plugged, || {
            format!("{resident} bytes are resident, {ever_plugged} were plugged at some time")
        })?;
        check("online-within-plugged", online <= most_plugged, || {
            format!("the guest works with {online} bytes, {most_plugged} were plugged at the most")
        })
    }
}

impl Observer<'_> {
    /// Looks until `over` is raised.
    pub(super) fn run(&self, over: &Stop, seen: &mut Seen) -> Result<(), DemoError> {
        let mut watch = Watch::new(self.shared.options.stuck_after, Instant::now());
        let mut most_plugged = 0;
        while !over.wait(INTERVAL) {
            let look = self.look(&mut most_plugged)?;
            // What is wrong is in the record as well.
            self.record(&look);
            let reason = self.check(&look, &mut watch)?;
            let unmovable = look
                .report
                .workers
                .iter()
                .map(|worker| worker.pages_unmovable);
            seen.observations += 1;
            seen.most_unmovable = seen.most_unmovable.max(unmovable.sum());
            if let Some(reason) = reason {
                *seen.reasons.entry(reason).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Nothing of this waits for the device: it may have been left alone by the host. `most_plugged` is kept from look
    /// to look, for a guest that does not report in time: what it has said last is of a time before.
    fn look(&self, most_plugged: &mut u64) -> Result<Look, DemoError> {
        let handle = self.machine.handle();
        let device = self.machine.device();
        // What an UNPLUG that is being carried out takes may still be resident; to `blocks` it is gone.
        let before = handle.status().plugged_size;
        // One that is late is told what is known: being late is the operator's and the watch's business.
        let (report, in_time) = match self.machine.report(INTERVAL) {
            Ok(report) => (report, true),
            Err(_) => (self.machine.progress(), false),
        };
        // Of one request that is under way, a PLUG is in the former already and an UNPLUG still in the latter.
        let (now, so_far) = self.blocks.plugged_bytes();
        let there = now.max(handle.status().plugged_size);
        let resident = device.backing().resident_bytes()?;
        let ever_plugged = there + (self.blocks.plugged_bytes().1 - so_far);
        // Before the most: it is in it.
        let plugged = handle.plugged();
        let most = self.blocks.take_most().max(before);
        *most_plugged = match in_time {
            true => most,
            false => most.max(*most_plugged),
        };
        Ok(Look {
            status: handle.status(),
            plugged,
            sizes: Sizes {
                most_plugged: *most_plugged,
                online: report.online_size,
                resident,
                ever_plugged,
            },
            report,
        })
    }

    /// Why the size is not there, if it is not.
    fn check(&self, look: &Look, watch: &mut Watch) -> Result<Option<Reason>, DemoError> {
        let handle = self.machine.handle();
        checks::no_page_lost(&look.report)?;
        look.sizes.check()?;
        let counters = handle.counters();
        checks::protocol(&counters)?;
        let failure = look.status.failure.as_deref();
        check("device-has-not-failed", failure.is_none(), || {
            format!("{failure:?}")
        })?;
        let plugged = || handle.status().plugged_size;
        self.shared.budget.check(self.vm, plugged)?;
        Ok(watch.observe(Instant::now(), &look.status, &counters, &look.report)?)
    }

    fn record(&self, look: &Look) {
        let (plugged, unplugged) = self.blocks.counts();
        let block_size = self.machine.device().geometry().block_size();
        let state = &self.shared.vms[self.vm];
        let mut live = lock(&state.live);
        *live = report::Sample {
            seconds: self.shared.began.elapsed().as_secs_f64(),
            requested: look.status.requested_size,
            plugged: look.plugged.count() * block_size,
            most_plugged: look.sizes.most_plugged,
            online: look.sizes.online,
            resident: look.sizes.resident,
            resizes: live.resizes,
            blocks_plugged: self.before.blocks_plugged + plugged,
            blocks_unplugged: self.before.blocks_unplugged + unplugged,
            pages_verified: self.before.pages_verified + pages_verified(&look.report),
            rests: live.rests,
            lives: live.lives,
        };
        lock(&state.recorder).sample(*live, &look.plugged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_was_ever_plugged_is_found() {
        let sizes = |most_plugged, online, resident| {
            let sizes = Sizes {
                most_plugged,
                online,
                resident,
                ever_plugged: 10,
            };
            sizes.check().map_err(|failed| failed.name)
        };
        assert_eq!(sizes(8, 8, 10), Ok(()));
        assert_eq!(sizes(8, 0, 11), Err("resident-within-plugged"));
        assert_eq!(sizes(8, 9, 0), Err("online-within-plugged"));
    }
}

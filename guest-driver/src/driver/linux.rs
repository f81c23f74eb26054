//! [`Strategy::Linux`](super::Strategy::Linux): one request at a time, in Linux's order (`virtio_mem_run_wq`).

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::BlockRange;

use super::answers::Sent;
use super::layout::Mode;
use super::plan::{NoRoom, linux};
use super::progress::{Failure, Progress, Stall};
use super::step::Aim;
use super::take::{Emptying, Taking, give_back};
use super::{MemDriver, Policy};
use crate::hotplug::{Error, Hotplug, PhysicalMemory};

impl From<NoRoom> for Stall {
    fn from(no_room: NoRoom) -> Self {
        match no_room {
            NoRoom::NoSpace => Self::NoSpace,
            NoRoom::OfflineThreshold => Self::OfflineThreshold,
        }
    }
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    pub(super) fn advance_linux<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Result<Progress, Failure> {
        if self.requests_in_flight() > 0 {
            return Ok(Progress::AwaitingDevice);
        }
        match self.take_some(hotplug) {
            Some(Taking::More) => return Ok(Progress::Converging),
            Some(Taking::Taken(range)) => return self.taken_linux(hotplug, range),
            Some(Taking::InUse(range, error)) => {
                self.pass_over(range, error);
                return Ok(Progress::Converging);
            }
            None => {}
        }
        // What could not be added, or was removed without being unplugged (`virtio_mem_cleanup_pending_mb`).
        if let Some(first) = self.maps.taken.next(0, true) {
            let unit = self.layout.unit(self.layout.unit_of(first));
            if let Some(run) = self.maps.taken.runs_in(unit, true).last() {
                return self.unplug_linux(run);
            }
        }
        if let Some(stall) = self.pending_stall.take() {
            self.wait(stall);
            return Ok(self.resting());
        }
        match self.aim() {
            Aim::Reached => self.settle(),
            Aim::Grow(granules) => {
                let may_be_added = self.may_be_added(hotplug, self.layout.unit_size);
                let next = self.with_view(hotplug, |view| {
                    linux::next_plug(view, granules, may_be_added)
                });
                match next {
                    Ok(range) => {
                        self.send(Sent::Plug(range))?;
                        return Ok(Progress::AwaitingDevice);
                    }
                    Err(no_room) => self.wait(no_room.into()),
                }
            }
            Aim::Shrink(granules) => {
                let Policy { unplug_online, .. } = self.policy;
                let next = self.with_view(hotplug, |view| {
                    linux::next_unplug(view, granules, &self.in_use, unplug_online)
                });
                match next {
                    Some(range) => {
                        self.emptying = Some(Emptying::new(&self.layout, range));
                        return Ok(Progress::Converging);
                    }
                    // What is online is left alone, and that is all right.
                    None if !unplug_online => self.settle(),
                    None => self.wait(Stall::MemoryInUse),
                }
            }
        }
        Ok(self.resting())
    }

    /// G-11: all of `range` is withheld. A big block leaves the hotplug core before it is unplugged.
    fn taken_linux<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        range: BlockRange,
    ) -> Result<Progress, Failure> {
        if self.layout.mode == Mode::BigBlock {
            let refused = core::mem::take(&mut self.removal.refused);
            let removed = self.remove_unit(hotplug, self.layout.unit_of(range.first));
            self.removal.refused = refused;
            if !removed {
                give_back(&self.layout, hotplug, self.layout.bytes(range));
                self.pass_over(range, Error::Busy);
                return Ok(Progress::Converging);
            }
        }
        self.maps.taken.insert(range);
        self.unplug_linux(range)
    }

    /// Unplugs the end of a run of what is taken.
    fn unplug_linux(&mut self, run: BlockRange) -> Result<Progress, Failure> {
        let unit = self.layout.unit(self.layout.unit_of(run.end() - 1));
        let first = run.first.max(unit.first);
        let count = (run.end() - first).min(self.layout.request_blocks);
        self.send(Sent::Unplug(BlockRange {
            first: run.end() - count,
            count,
        }))?;
        Ok(Progress::AwaitingDevice)
    }

    /// A page in use makes the driver try another range; that there is nowhere to move pages to is true of every
    /// range.
    fn pass_over(&mut self, range: BlockRange, error: Error) {
        if error == Error::NoMemory {
            self.wait(Stall::MemoryInUse);
        } else {
            self.note_in_use(range);
        }
    }

    /// Notes that `range` cannot be emptied for now: a memory block perhaps in part, a granule not at all.
    pub(super) fn note_in_use(&mut self, range: BlockRange) {
        if range.count > self.layout.granule_blocks {
            let start = self.layout.bytes(range).start;
            let id = start / self.layout.memory_block_size;
            self.in_use.memory_blocks.insert(id);
        } else {
            self.in_use.granules.insert(range);
        }
    }
}

//! Memory that was plugged goes to the hotplug core, and memory that was unplugged comes out of it.

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::BlockRange;

use super::attach::owner;
use super::progress::{Failure, Stall};
use super::state::Presence;
use super::{MemDriver, Strategy};
use crate::hotplug::{AddMemory, BlockState, Error, Hotplug, PhysicalMemory, Target};

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Gives the lowest fresh memory to the hotplug core: the rest of a unit that is there, or a new unit.
    pub(super) fn give_one<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Result<(), Failure> {
        let Some(first) = self.maps.fresh.next(0, true) else {
            return Ok(());
        };
        let unit = self.layout.unit_of(first);
        let blocks = self.layout.unit(unit);
        let ours = self.with_view(hotplug, |view| {
            let mut ids = view.layout.memory_blocks(unit).map(view.presence);
            ids.all(|presence| presence.is_ours() || presence == Presence::GoingOffline)
        });
        if !ours {
            return self.add_unit(hotplug, unit);
        }
        let Some(run) = self.maps.fresh.runs_in(blocks, true).next() else {
            return Ok(());
        };
        self.maps.fresh.remove(run);
        let bytes = self.layout.bytes(run);
        for (id, part) in self.layout.by_memory_block(bytes) {
            let done = hotplug.fake_online(part.start, part.end - part.start);
            done.map_err(|error| Failure::Hotplug {
                operation: "completing",
                id,
                error,
            })?;
        }
        Ok(())
    }

    /// Adds a unit; what of it is not fresh is withheld (G-06, G-10).
    fn add_unit<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        unit: u64,
    ) -> Result<(), Failure> {
        let blocks = self.layout.unit(unit);
        let fresh: alloc::vec::Vec<BlockRange> = self.maps.fresh.runs_in(blocks, true).collect();
        let withheld = {
            let mut gaps = self.maps.fresh.runs_in(blocks, false);
            gaps.next().map_or(0..0, |first| {
                let last = gaps.last().unwrap_or(first);
                self.layout.bytes(first).start..self.layout.bytes(last).end
            })
        };
        let bytes = self.layout.bytes(blocks);
        let request = AddMemory {
            target: Target::Group(self.attachment.group),
            owner: owner(),
            resource_name: "System RAM (virtio_mem)",
            merge_resource: true,
            withheld: withheld.clone(),
            ..AddMemory::new(bytes.start, bytes.end - bytes.start)
        };
        for run in &fresh {
            self.maps.fresh.remove(*run);
        }
        if let Err(error) = hotplug.add_memory(&request) {
            for run in fresh {
                self.maps.taken.insert(run);
            }
            return self.not_added(unit, error);
        }
        for run in fresh {
            let run = self.layout.bytes(run);
            let hidden = run.start.max(withheld.start)..run.end.min(withheld.end);
            if !hidden.is_empty() {
                super::take::give_back(&self.layout, hotplug, hidden);
            }
        }
        self.bring_online(hotplug, unit);
        Ok(())
    }

    /// Somebody may object to bringing it online; the memory is there all the same.
    fn bring_online<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, unit: u64) {
        let Some(online_type) = self.policy.auto_online else {
            return;
        };
        for id in self.layout.memory_blocks(unit) {
            if hotplug.block_state(id) == Some(BlockState::Offline)
                && let Err(error) = hotplug.online(id, online_type)
            {
                log::warn!("virtio-mem: memory block {id} stays offline: {error}");
            }
        }
    }

    /// No memory for its bookkeeping; or somebody else has added it meanwhile.
    fn not_added(&mut self, unit: u64, error: Error) -> Result<(), Failure> {
        let stall = match error {
            Error::NoMemory => Stall::NoMemory,
            error => Stall::NotAdded(error),
        };
        match (self.policy.strategy, error) {
            // Unplugged before the wait.
            (Strategy::Linux, Error::NoMemory | Error::Exists) => self.pending_stall = Some(stall),
            (Strategy::Linux, error) => {
                return Err(Failure::Hotplug {
                    operation: "adding",
                    id: self.layout.memory_blocks(unit).start,
                    error,
                });
            }
            // Stays plugged, and is added once that works, or unplugged if it is not wanted any more.
            (Strategy::Direct, _) => self.wait(stall),
        }
        Ok(())
    }

    /// Removes the lowest unit that is there without plugged blocks; `false` if there is none to look at any more. It
    /// can hardly be refused, but if it is, it is tried again (H-10).
    pub(super) fn remove_one<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) -> bool {
        if !self.removal.check {
            return false;
        }
        let from = self.removal.from;
        let empty = self.with_view(hotplug, |view| {
            let units = view.layout.all_units();
            let mut units = units.start.max(from)..units.end;
            let empty = units.find(|unit| {
                let blocks = view.layout.unit(*unit);
                let mut ids = view.layout.memory_blocks(*unit).map(view.presence);
                self.maps.plugged.count_in(blocks) == 0
                    && self.maps.intended.count_in(blocks) == 0
                    && ids.any(|presence| presence.is_ours() || presence == Presence::GoingOffline)
            });
            empty.map(|unit| (unit, view.common(unit).is_some_and(Presence::is_ours)))
        });
        let Some((unit, removable)) = empty else {
            self.removal.check = false;
            self.removal.from = 0;
            return false;
        };
        self.removal.from = unit + 1;
        match removable {
            true => {
                self.remove_unit(hotplug, unit);
            }
            // Somebody is taking it offline, or has added a part of it.
            false => self.removal.refused = true,
        }
        true
    }

    /// Takes a unit offline, everything of it being withheld, and removes it.
    pub(super) fn remove_unit<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        unit: u64,
    ) -> bool {
        let bytes = self.layout.bytes(self.layout.unit(unit));
        let size = bytes.end - bytes.start;
        match hotplug.offline_and_remove_memory(owner(), bytes.start, size) {
            Ok(()) => {
                self.removed_in_run = true;
                true
            }
            Err(error) => {
                log::warn!(
                    "virtio-mem: memory at {:#x} cannot be removed: {error}",
                    bytes.start
                );
                self.removal.refused = true;
                false
            }
        }
    }
}

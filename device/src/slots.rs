//! Hypervisor memory slots: created with their first block, removed with their last.

use std::fmt::Debug;
use std::io;

use virtio_mem_wire::{BlockRange, Geometry};

use crate::transition::StepError;

/// One memory slot of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Number of the slot within the device, from 0. Always the same range for the same number.
    pub index: u32,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Where the VMM sees it, as an address of its own address space.
    pub host_address: u64,
    /// Bytes.
    pub len: u64,
}

/// Creates and removes memory slots of a hypervisor.
///
/// The device calls for each slot alternately: [`map`](Self::map), [`unmap`](Self::unmap), … A slot may have
/// blocks in it that are not plugged; their memory is closed ([`Backing`](crate::Backing)), so a guest access
/// there must end in the VMM and not in the guest. KVM does so: `KVM_RUN` returns `EFAULT`.
pub trait SlotMapper: Debug + Send + Sync {
    /// The most slots there can be at a time; a device that may need more is not built.
    fn max_count(&self) -> u64 {
        u64::MAX
    }

    /// Makes the slot's memory the guest's.
    ///
    /// # Errors
    ///
    /// Whatever the hypervisor says; the slot is then not there.
    fn map(&self, slot: &Slot) -> io::Result<()>;

    /// Takes the slot from the guest. After it returns no access of the guest goes there any more.
    ///
    /// # Errors
    ///
    /// Whatever the hypervisor says; the slot is then still there.
    fn unmap(&self, slot: &Slot) -> io::Result<()>;
}

/// For a device whose memory no hypervisor maps: in-process tests, or a VMM that maps the region once.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSlots;

impl SlotMapper for NoSlots {
    fn map(&self, _slot: &Slot) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, _slot: &Slot) -> io::Result<()> {
        Ok(())
    }
}

/// The slots of one device, and how many plugged blocks each has.
#[derive(Debug)]
pub(crate) struct SlotTable {
    mapper: Box<dyn SlotMapper>,
    geometry: Geometry,
    host_address: u64,
    blocks_per_slot: u64,
    plugged: Vec<u64>,
    mapped_count: u64,
}

impl SlotTable {
    pub(crate) fn new(
        mapper: Box<dyn SlotMapper>,
        geometry: Geometry,
        host_address: u64,
        slot_size: u64,
    ) -> Self {
        let blocks_per_slot = slot_size / geometry.block_size();
        let count = geometry.block_count().div_ceil(blocks_per_slot);
        Self {
            mapper,
            geometry,
            host_address,
            blocks_per_slot,
            plugged: vec![0; usize::try_from(count).unwrap_or(usize::MAX)],
            mapped_count: 0,
        }
    }

    /// Number of slots that exist now.
    pub(crate) fn mapped_count(&self) -> u64 {
        self.mapped_count
    }

    /// Counts the blocks of `range` in and maps the slots that get their first block with it.
    ///
    /// On an error everything is as before, unless the error says otherwise.
    pub(crate) fn add(&mut self, range: BlockRange) -> Result<(), StepError> {
        for (done, (slot, blocks)) in self.parts(range).enumerate() {
            if self.plugged[slot] == 0
                && let Err(source) = self.mapper.map(&self.slot(slot))
            {
                return Err(self.undo(range, done, source, false));
            }
            self.mapped_count += u64::from(self.plugged[slot] == 0);
            self.plugged[slot] += blocks;
        }
        Ok(())
    }

    /// Unmaps every slot there is, whatever blocks it has. All are tried; the last error.
    pub(crate) fn unmap_all(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for index in 0..self.plugged.len() {
            if self.plugged[index] == 0 {
                continue;
            }
            match self.mapper.unmap(&self.slot(index)) {
                Ok(()) => {
                    self.plugged[index] = 0;
                    self.mapped_count -= 1;
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Counts the blocks of `range`, all counted in before, out and unmaps the slots that lose their last
    /// block with it.
    ///
    /// On an error everything is as before, unless the error says otherwise.
    pub(crate) fn remove(&mut self, range: BlockRange) -> Result<(), StepError> {
        for (done, (slot, blocks)) in self.parts(range).enumerate() {
            if self.plugged[slot] == blocks
                && let Err(source) = self.mapper.unmap(&self.slot(slot))
            {
                return Err(self.undo(range, done, source, true));
            }
            self.plugged[slot] -= blocks;
            self.mapped_count -= u64::from(self.plugged[slot] == 0);
        }
        Ok(())
    }

    /// Turns the first `done` parts of an `add` or (`removed`) a `remove` back.
    fn undo(
        &mut self,
        range: BlockRange,
        done: usize,
        source: io::Error,
        removed: bool,
    ) -> StepError {
        let mut undone = true;
        for (slot, blocks) in self.parts(range).take(done) {
            let (alone, result) = match removed {
                true if self.plugged[slot] == 0 => (true, self.mapper.map(&self.slot(slot))),
                false if self.plugged[slot] == blocks => {
                    (true, self.mapper.unmap(&self.slot(slot)))
                }
                _ => (false, Ok(())),
            };
            if let Err(error) = result {
                log::error!("cannot restore memory slot {slot}: {error}");
                undone = false;
                continue;
            }
            match removed {
                true => {
                    self.plugged[slot] += blocks;
                    self.mapped_count += u64::from(alone);
                }
                false => {
                    self.plugged[slot] -= blocks;
                    self.mapped_count -= u64::from(alone);
                }
            }
        }
        StepError { source, undone }
    }

    fn slot(&self, index: usize) -> Slot {
        let first = index as u64 * self.blocks_per_slot;
        let count = self
            .blocks_per_slot
            .min(self.geometry.block_count() - first);
        let offset = self.geometry.bytes(first);
        Slot {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            guest_address: self.geometry.address(first),
            // Inside the backing's mapping, so it does not wrap.
            host_address: self.host_address.wrapping_add(offset),
            len: self.geometry.bytes(count),
        }
    }

    /// Which slots `range` falls into, and how many of its blocks into each.
    fn parts(&self, range: BlockRange) -> impl Iterator<Item = (usize, u64)> + use<> {
        let per_slot = self.blocks_per_slot;
        let mut from = range.first;
        std::iter::from_fn(move || {
            if from >= range.end() {
                return None;
            }
            let slot = from / per_slot;
            let until = range.end().min((slot + 1) * per_slot);
            let blocks = until - from;
            from = until;
            Some((usize::try_from(slot).ok()?, blocks))
        })
    }
}

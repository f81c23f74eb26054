//! What to plug or unplug next: pure decisions.

use alloc::collections::BTreeSet;

use virtio_mem_wire::{BlockMap, BlockRange};

pub(super) mod direct;
pub(super) mod linux;

/// What could not be emptied since the driver last waited.
#[derive(Debug)]
pub(super) struct InUse {
    /// Granules with a page in use.
    pub(super) granules: BlockMap,
    /// Memory blocks that cannot be emptied as a whole, but perhaps in part.
    pub(super) memory_blocks: BTreeSet<u64>,
}

impl InUse {
    pub(super) fn new(len: u64) -> Self {
        Self {
            granules: BlockMap::new(len),
            memory_blocks: BTreeSet::new(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.granules.clear();
        self.memory_blocks.clear();
    }
}

/// Why nothing more can be plugged for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There is no place left.
    NoSpace,
    /// Too much memory is offline already.
    OfflineThreshold,
}

/// What to plug next.
pub(super) type NextPlug = Result<BlockRange, NoRoom>;

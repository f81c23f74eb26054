//! Where memory blocks and sub-blocks lie among the device blocks.

use core::ops::Range;

use thiserror::Error;
use virtio_mem_wire::{BlockRange, Geometry, MAX_BLOCKS_PER_REQUEST};

use crate::hotplug::Profile;

/// A device block size that Sub-Block Mode cannot work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// Linux uses Big-Block Mode then.
    #[error(
        "blocks of {block_size:#x} bytes do not fit into memory blocks of {memory_block_size:#x} bytes"
    )]
    BlockTooLarge {
        /// Bytes in a device block.
        block_size: u64,
        /// Bytes in a memory block.
        memory_block_size: u64,
    },
    /// A single request could not name a sub-block.
    #[error(
        "a sub-block of {sub_block_size:#x} bytes has more blocks of {block_size:#x} bytes than a request can name"
    )]
    BlockTooSmall {
        /// Bytes in a device block.
        block_size: u64,
        /// Bytes in a sub-block.
        sub_block_size: u64,
    },
}

/// The sizes of Sub-Block Mode. Memory blocks have absolute ids: physical address / memory block size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) memory_block_size: u64,
    /// The larger of a device block and a pageblock.
    pub(super) sub_block_size: u64,
    /// Device blocks in a sub-block.
    pub(super) sub_block_blocks: u64,
    /// The most device blocks one request names: whole sub-blocks only (H-2).
    pub(super) request_blocks: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry, profile: &Profile) -> Result<Self, LayoutError> {
        let block_size = geometry.block_size();
        let memory_block_size = profile.memory_block_size();
        let sub_block_size = block_size.max(profile.pageblock_size());
        if sub_block_size > memory_block_size {
            return Err(LayoutError::BlockTooLarge {
                block_size,
                memory_block_size,
            });
        }
        let sub_block_blocks = sub_block_size / block_size;
        let request_sub_blocks = u64::from(MAX_BLOCKS_PER_REQUEST) / sub_block_blocks;
        if request_sub_blocks == 0 {
            return Err(LayoutError::BlockTooSmall {
                block_size,
                sub_block_size,
            });
        }
        Ok(Self {
            geometry,
            memory_block_size,
            sub_block_size,
            sub_block_blocks,
            request_blocks: request_sub_blocks * sub_block_blocks,
        })
    }

    /// Ids of the memory blocks that lie entirely in the first `usable_size` bytes of the region (G-14).
    pub(super) fn memory_blocks(&self, usable_size: u64) -> Range<u64> {
        let start = self.geometry.addr();
        // Does not wrap: the usable region was checked against the region, and that when it was made.
        let end = start + usable_size.min(self.geometry.region_size());
        start.div_ceil(self.memory_block_size)..end / self.memory_block_size
    }

    /// Sub-blocks in those memory blocks.
    pub(super) fn capacity(&self, usable_size: u64) -> u64 {
        let ids = self.memory_blocks(usable_size);
        let memory_blocks = ids.end.saturating_sub(ids.start);
        memory_blocks * (self.memory_block_size / self.sub_block_size)
    }

    /// The device blocks of memory block `id`, which lies in the region.
    pub(super) fn memory_block(&self, id: u64) -> BlockRange {
        let offset = id * self.memory_block_size - self.geometry.addr();
        BlockRange {
            first: offset / self.geometry.block_size(),
            count: self.memory_block_size / self.geometry.block_size(),
        }
    }

    /// The memory block device block `index` lies in.
    pub(super) fn memory_block_of(&self, index: u64) -> u64 {
        self.geometry.address(index) / self.memory_block_size
    }

    /// The sub-blocks of a range of whole ones.
    pub(super) fn sub_blocks(
        &self,
        range: BlockRange,
    ) -> impl DoubleEndedIterator<Item = BlockRange> + use<> {
        let count = self.sub_block_blocks;
        (0..range.count / count).map(move |i| BlockRange {
            first: range.first + i * count,
            count,
        })
    }

    /// The bytes of a range: start and size.
    pub(super) fn bytes(&self, range: BlockRange) -> (u64, u64) {
        let start = self.geometry.address(range.first);
        (start, self.geometry.bytes(range.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn layout(addr: u64, region_size: u64, block_size: u64) -> Result<Layout, LayoutError> {
        let geometry = Geometry::new(addr, region_size, block_size).unwrap();
        Layout::new(geometry, &Profile::X86_64)
    }

    #[test]
    fn g_14_only_whole_memory_blocks_of_the_usable_region_are_used() {
        let layout = layout(4096 * MIB + 64 * MIB, 1024 * MIB, 2 * MIB).unwrap();
        assert_eq!(layout.memory_blocks(1024 * MIB), 33..40);
        assert_eq!(layout.capacity(1024 * MIB), 7 * 64);
        assert_eq!(layout.memory_block(33).first, 32);
        for too_small in [0, 64 * MIB, 190 * MIB] {
            assert_eq!(layout.capacity(too_small), 0);
        }
        assert_eq!(layout.capacity(192 * MIB), 64);
    }

    #[test]
    fn h_06_region_at_address_zero_begins_with_memory_block_zero() {
        let layout = layout(0, 256 * MIB, 2 * MIB).unwrap();
        assert_eq!(layout.memory_blocks(256 * MIB), 0..2);
    }

    #[test]
    fn h_02_requests_name_whole_sub_blocks_up_to_65535_blocks() {
        let layout = layout(0, 1024 * MIB, 4096).unwrap();
        assert_eq!(
            (layout.sub_block_blocks, layout.request_blocks),
            (512, 65024)
        );
    }

    #[test]
    fn block_larger_than_a_memory_block_is_refused() {
        assert!(matches!(
            layout(0, 1024 * MIB, 256 * MIB),
            Err(LayoutError::BlockTooLarge { .. })
        ));
        assert!(layout(0, 1024 * MIB, 128 * MIB).is_ok());
        assert!(matches!(
            layout(0, 1024 * MIB, 16),
            Err(LayoutError::BlockTooSmall { .. })
        ));
    }
}

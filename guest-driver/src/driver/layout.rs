//! Where memory blocks, units and granules lie among the device blocks.
//!
//! ```text
//!  Sub-Block Mode   unit = memory block   granule = sub-block: the larger of a device block and a pageblock
//!  Big-Block Mode   unit = big block      granule = the whole unit
//! ```
//!
//! A *unit* is what is added and removed, a *granule* the least that is plugged or unplugged. All ids are absolute:
//! address / size.

use core::ops::Range;

use virtio_mem_wire::{BlockRange, Geometry, MAX_BLOCKS_PER_REQUEST};

use super::Policy;
use crate::hotplug::Profile;

/// How the blocks of the device and the memory blocks of the machine go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Several blocks make up a memory block, and an online one may be plugged in part.
    SubBlock,
    /// One or more memory blocks make up a big block, which is plugged as a whole.
    BigBlock,
}

/// What the driver makes of a device, a machine and a policy, before there is a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Sub-Block Mode, if at least two sub-blocks fit into a memory block and the policy does not forbid it.
    pub mode: Mode,
    /// Bytes of a unit: what is added and removed at a time.
    pub unit_size: u64,
    /// Bytes of a granule: the least that is plugged or unplugged.
    pub granule_size: u64,
}

impl Sizes {
    /// For device blocks of `block_size` bytes on a machine with `profile` (Linux: `virtio_mem_init`).
    #[must_use]
    pub fn new(block_size: u64, profile: &Profile, policy: &Policy) -> Self {
        let memory_block_size = profile.memory_block_size();
        let sub_block_size = block_size.max(profile.pageblock_size());
        if sub_block_size < memory_block_size && !policy.force_bbm {
            return Self {
                mode: Mode::SubBlock,
                unit_size: memory_block_size,
                granule_size: sub_block_size,
            };
        }
        let size = big_block_size(block_size.max(memory_block_size), policy);
        Self {
            mode: Mode::BigBlock,
            unit_size: size,
            granule_size: size,
        }
    }
}

/// The sizes of the mode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) mode: Mode,
    pub(super) memory_block_size: u64,
    pub(super) unit_size: u64,
    pub(super) granule_size: u64,
    /// Device blocks in a granule.
    pub(super) granule_blocks: u64,
    /// The most device blocks one request names: whole granules, unless a granule alone is too large (H-2).
    pub(super) request_blocks: u64,
    /// Where memory that can be added ends.
    pluggable_end: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry, profile: &Profile, policy: &Policy) -> Self {
        let block_size = geometry.block_size();
        let memory_block_size = profile.memory_block_size();
        let Sizes {
            mode,
            unit_size,
            granule_size,
        } = Sizes::new(block_size, profile, policy);
        let granule_blocks = granule_size / block_size;
        let most = u64::from(MAX_BLOCKS_PER_REQUEST);
        Self {
            geometry,
            mode,
            memory_block_size,
            unit_size,
            granule_size,
            granule_blocks,
            request_blocks: match most / granule_blocks {
                0 => most,
                granules => granules * granule_blocks,
            },
            pluggable_end: 1u64
                .checked_shl(profile.physical_address_bits)
                .unwrap_or(u64::MAX),
        }
    }

    /// Whether a granule takes several requests (H-2).
    pub(super) fn splits_granules(&self) -> bool {
        self.granule_blocks > self.request_blocks
    }

    /// Granules in so many bytes, rounded down.
    pub(super) fn granules(&self, bytes: u64) -> u64 {
        bytes / self.granule_size
    }

    /// Ids of the units that lie entirely in the first `usable_size` bytes of the region, and where memory can be
    /// (G-14).
    pub(super) fn units(&self, usable_size: u64) -> Range<u64> {
        let start = self.geometry.addr();
        // Does not wrap: the usable region was checked against the region, and that when it was made.
        let end = start + usable_size.min(self.geometry.region_size());
        let first = start.div_ceil(self.unit_size);
        let end = end.min(self.pluggable_end) / self.unit_size;
        first..end.max(first)
    }

    /// All units of the region.
    pub(super) fn all_units(&self) -> Range<u64> {
        self.units(self.geometry.region_size())
    }

    /// Granules in the units of the usable region.
    pub(super) fn capacity(&self, usable_size: u64) -> u64 {
        let ids = self.units(usable_size);
        (ids.end - ids.start).saturating_mul(self.unit_size / self.granule_size)
    }

    /// The device blocks of unit `id`, which lies in the region.
    pub(super) fn unit(&self, id: u64) -> BlockRange {
        self.blocks(id * self.unit_size..(id + 1) * self.unit_size)
    }

    /// The unit device block `index` lies in, whole or not.
    pub(super) fn unit_of(&self, index: u64) -> u64 {
        self.geometry.address(index) / self.unit_size
    }

    /// The granule around device block `index`; the block alone if it lies in no whole unit.
    pub(super) fn granule_of(&self, index: u64) -> BlockRange {
        let address = self.geometry.address(index);
        if !self.all_units().contains(&(address / self.unit_size)) {
            return BlockRange {
                first: index,
                count: 1,
            };
        }
        let start = address - address % self.granule_size;
        self.blocks(start..start + self.granule_size)
    }

    /// The device blocks of a range of addresses in the region that are made of whole ones.
    fn blocks(&self, bytes: Range<u64>) -> BlockRange {
        BlockRange {
            first: (bytes.start - self.geometry.addr()) / self.geometry.block_size(),
            count: (bytes.end - bytes.start) / self.geometry.block_size(),
        }
    }

    /// The granules of a range of whole ones.
    pub(super) fn granules_in(
        &self,
        range: BlockRange,
    ) -> impl DoubleEndedIterator<Item = BlockRange> + use<> {
        let count = self.granule_blocks;
        (0..range.count / count).map(move |i| BlockRange {
            first: range.first + i * count,
            count,
        })
    }

    /// The addresses of a range of device blocks.
    pub(super) fn bytes(&self, range: BlockRange) -> Range<u64> {
        let start = self.geometry.address(range.first);
        start..start + self.geometry.bytes(range.count)
    }

    /// Ids of the memory blocks of a unit.
    pub(super) fn memory_blocks(&self, unit: u64) -> Range<u64> {
        let count = self.unit_size / self.memory_block_size;
        unit * count..(unit + 1) * count
    }

    /// The parts of a range of addresses in each memory block, ascending.
    pub(super) fn by_memory_block(
        &self,
        bytes: Range<u64>,
    ) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let size = self.memory_block_size;
        let end = match bytes.is_empty() {
            true => 0,
            false => bytes.end.div_ceil(size),
        };
        (bytes.start / size..end).map(move |id| {
            let part = bytes.start.max(id * size)..bytes.end.min((id + 1) * size);
            (id, part)
        })
    }
}

/// `bbm_block_size`, if that makes sense.
fn big_block_size(least: u64, policy: &Policy) -> u64 {
    let wanted = policy.bbm_block_size;
    if wanted.is_power_of_two() && wanted >= least {
        return wanted;
    }
    if wanted != 0 {
        log::warn!("virtio-mem: big blocks of {wanted:#x} bytes are not possible");
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn layout(addr: u64, region_size: u64, block_size: u64) -> Layout {
        with(addr, region_size, block_size, Policy::default())
    }

    fn with(addr: u64, region_size: u64, block_size: u64, policy: Policy) -> Layout {
        let geometry = Geometry::new(addr, region_size, block_size).unwrap();
        Layout::new(geometry, &Profile::X86_64, &policy)
    }

    #[test]
    fn g_14_only_whole_memory_blocks_of_the_usable_region_are_used() {
        let layout = layout(4096 * MIB + 64 * MIB, 1024 * MIB, 2 * MIB);
        assert_eq!(layout.units(1024 * MIB), 33..40);
        assert_eq!(layout.capacity(1024 * MIB), 7 * 64);
        assert_eq!(layout.unit(33).first, 32);
        for too_small in [0, 64 * MIB, 190 * MIB] {
            assert_eq!(layout.capacity(too_small), 0);
        }
        assert_eq!(layout.capacity(192 * MIB), 64);
    }

    #[test]
    fn h_06_region_at_address_zero_begins_with_memory_block_zero() {
        let layout = layout(0, 256 * MIB, 2 * MIB);
        assert_eq!(layout.units(256 * MIB), 0..2);
    }

    #[test]
    fn h_02_requests_name_whole_sub_blocks_up_to_65535_blocks() {
        let layout = layout(0, 1024 * MIB, 4096);
        assert_eq!((layout.granule_blocks, layout.request_blocks), (512, 65024));
        assert!(!layout.splits_granules());
    }

    #[test]
    fn h_02_granule_of_more_than_65535_blocks_is_split() {
        let policy = Policy {
            bbm_block_size: 128 * GIB,
            force_bbm: true,
            ..Policy::default()
        };
        let layout = with(0, 512 * GIB, 2 * MIB, policy);
        assert_eq!(layout.granule_blocks, 65536);
        assert_eq!(layout.request_blocks, 65535);
        assert!(layout.splits_granules());
    }

    #[test]
    fn no_bytes_lie_in_no_memory_block() {
        let layout = layout(0, GIB, 2 * MIB);
        let parts = |bytes| layout.by_memory_block(bytes).collect::<Vec<_>>();
        assert_eq!(parts(130 * MIB..130 * MIB), []);
        assert_eq!(
            parts(130 * MIB..258 * MIB),
            [(1, 130 * MIB..256 * MIB), (2, 256 * MIB..258 * MIB)]
        );
    }

    #[test]
    fn mode_is_sub_block_where_two_sub_blocks_fit_into_a_memory_block() {
        for (block, mode, unit) in [
            (4096, Mode::SubBlock, 128),
            (64 * MIB, Mode::SubBlock, 128),
            (128 * MIB, Mode::BigBlock, 128),
            (256 * MIB, Mode::BigBlock, 256),
        ] {
            let layout = layout(0, GIB, block);
            assert_eq!((layout.mode, layout.unit_size), (mode, unit * MIB));
        }
        let geometry = Geometry::new(0, GIB, 2 * MIB).unwrap();
        let layout = Layout::new(geometry, &Profile::ARM64_64K, &Policy::default());
        assert_eq!((layout.mode, layout.unit_size), (Mode::BigBlock, 512 * MIB));
    }

    #[test]
    fn size_of_big_blocks_can_be_raised_to_a_power_of_two() {
        for (wanted, unit) in [
            (0, 128),
            (64 * MIB, 128),
            (384 * MIB, 128),
            (512 * MIB, 512),
        ] {
            let policy = Policy {
                force_bbm: true,
                bbm_block_size: wanted,
                ..Policy::default()
            };
            assert_eq!(with(0, GIB, 2 * MIB, policy).unit_size, unit * MIB);
        }
        // Without Big-Block Mode it means nothing.
        let policy = Policy {
            bbm_block_size: 512 * MIB,
            ..Policy::default()
        };
        assert_eq!(with(0, GIB, 2 * MIB, policy).mode, Mode::SubBlock);
    }
}

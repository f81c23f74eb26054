//! Device blocks: their size, place and number (virtio 1.4, 5.15.1).

use thiserror::Error;

use crate::{MAX_BLOCKS_PER_REQUEST, Span};

/// A contiguous run of device blocks by index, the first block of the region being 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRange {
    /// Index of the first block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// The index after the last block.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Whether there is no block in the range.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The device-managed region and how it is cut into blocks.
///
/// By construction `addr` and `region_size` are multiples of `block_size` and the region does not wrap, so
/// the address of every block of the region is representable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    addr: u64,
    region_size: u64,
    block_shift: u32,
}

/// A region that cannot be cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// D-05
    #[error("block size {0:#x} is not a power of two")]
    BlockSizeNotPowerOfTwo(u64),
    /// D-06
    #[error("region address {addr:#x} is not a multiple of the block size {block_size:#x}")]
    AddressMisaligned {
        /// Guest-physical start of the region.
        addr: u64,
        /// Bytes per block.
        block_size: u64,
    },
    /// D-06
    #[error("region size {region_size:#x} is not a multiple of the block size {block_size:#x}")]
    SizeMisaligned {
        /// Bytes in the region.
        region_size: u64,
        /// Bytes per block.
        block_size: u64,
    },
    /// The region does not fit below 2^64.
    #[error("region of {region_size:#x} bytes at {addr:#x} exceeds the address space")]
    Wraps {
        /// Guest-physical start of the region.
        addr: u64,
        /// Bytes in the region.
        region_size: u64,
    },
}

/// A span that names no blocks of the usable region: every request with one is answered ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RangeError {
    /// The address is not a multiple of the block size.
    #[error("address {0:#x} is not aligned to a block")]
    Misaligned(u64),
    /// No blocks are named.
    #[error("no blocks")]
    Empty,
    /// Part of the span lies outside the usable region, or beyond the address space.
    #[error("{block_count} blocks at {addr:#x} are not all inside the usable region")]
    Outside {
        /// Guest-physical address of the first block.
        addr: u64,
        /// Number of blocks.
        block_count: u16,
    },
}

impl Geometry {
    /// A region of `region_size` bytes at guest-physical `addr`, in blocks of `block_size` bytes.
    ///
    /// An empty region is legal (D-07).
    ///
    /// # Errors
    ///
    /// See [`GeometryError`].
    pub const fn new(addr: u64, region_size: u64, block_size: u64) -> Result<Self, GeometryError> {
        if !block_size.is_power_of_two() {
            return Err(GeometryError::BlockSizeNotPowerOfTwo(block_size));
        }
        let geometry = Self {
            addr,
            region_size,
            block_shift: block_size.trailing_zeros(),
        };
        if !geometry.is_aligned(addr) {
            return Err(GeometryError::AddressMisaligned { addr, block_size });
        }
        if !geometry.is_aligned(region_size) {
            return Err(GeometryError::SizeMisaligned {
                region_size,
                block_size,
            });
        }
        if addr.checked_add(region_size).is_none() {
            return Err(GeometryError::Wraps { addr, region_size });
        }
        Ok(geometry)
    }

    /// Guest-physical start of the region.
    #[must_use]
    pub const fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes in the region.
    #[must_use]
    pub const fn region_size(&self) -> u64 {
        self.region_size
    }

    /// Bytes per block, a power of two.
    #[must_use]
    pub const fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Number of blocks in the region.
    #[must_use]
    pub const fn block_count(&self) -> u64 {
        self.region_size >> self.block_shift
    }

    /// Whether `bytes`, a size or an address, is a multiple of the block size.
    #[must_use]
    pub const fn is_aligned(&self, bytes: u64) -> bool {
        bytes.trailing_zeros() >= self.block_shift
    }

    /// Bytes in `count` blocks. Saturates, which no count of blocks of this region reaches.
    #[must_use]
    pub const fn bytes(&self, count: u64) -> u64 {
        count.saturating_mul(self.block_size())
    }

    /// Guest-physical address of block `index`. Saturates, which no block of this region reaches.
    #[must_use]
    pub const fn address(&self, index: u64) -> u64 {
        self.addr.saturating_add(self.bytes(index))
    }

    /// The block `address` lies in; `None` outside the region.
    #[must_use]
    pub const fn block_at(&self, address: u64) -> Option<u64> {
        match address.checked_sub(self.addr) {
            Some(offset) if offset < self.region_size => Some(offset >> self.block_shift),
            _ => None,
        }
    }

    /// The blocks that overlap `[addr, addr + len)`; `None` if any byte lies outside the region or `len` is 0.
    #[must_use]
    pub const fn blocks_touching(&self, addr: u64, len: u64) -> Option<BlockRange> {
        let Some(last_byte) = addr.checked_add(len.saturating_sub(1)) else {
            return None;
        };
        match (len, self.block_at(addr), self.block_at(last_byte)) {
            (1.., Some(first), Some(last)) => Some(BlockRange {
                first,
                count: last.saturating_sub(first).saturating_add(1),
            }),
            _ => None,
        }
    }

    /// The blocks a request names, if all of them lie in the first `usable_size` bytes of the region
    /// (D-26, D-33, D-46).
    ///
    /// # Errors
    ///
    /// See [`RangeError`].
    pub const fn locate(&self, span: Span, usable_size: u64) -> Result<BlockRange, RangeError> {
        let Span { addr, block_count } = span;
        if !self.is_aligned(addr) {
            return Err(RangeError::Misaligned(addr));
        }
        if block_count == 0 {
            return Err(RangeError::Empty);
        }
        let Some(offset) = addr.checked_sub(self.addr) else {
            return Err(RangeError::Outside { addr, block_count });
        };
        let range = BlockRange {
            first: offset >> self.block_shift,
            count: block_count as u64,
        };
        let usable_blocks = if usable_size < self.region_size {
            usable_size >> self.block_shift
        } else {
            self.block_count()
        };
        if range.end() > usable_blocks {
            return Err(RangeError::Outside { addr, block_count });
        }
        Ok(range)
    }

    /// `range` as the spans of the fewest requests that name all of it, ascending: each span but the last
    /// has [`MAX_BLOCKS_PER_REQUEST`] blocks.
    #[must_use]
    pub const fn spans(&self, range: BlockRange) -> Spans {
        Spans {
            geometry: *self,
            rest: range,
        }
    }
}

/// Iterator over the spans of a range, see [`Geometry::spans`].
#[derive(Clone, Debug)]
pub struct Spans {
    geometry: Geometry,
    rest: BlockRange,
}

impl Iterator for Spans {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        let block_count = u16::try_from(self.rest.count).unwrap_or(MAX_BLOCKS_PER_REQUEST);
        if block_count == 0 {
            return None;
        }
        let span = Span {
            addr: self.geometry.address(self.rest.first),
            block_count,
        };
        self.rest.first = self.rest.first.saturating_add(u64::from(block_count));
        self.rest.count = self.rest.count.saturating_sub(u64::from(block_count));
        Some(span)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn four_gib_in_2_mib_blocks() -> Geometry {
        Geometry::new(4 << 30, 4 << 30, 2 * MIB).unwrap()
    }

    fn span(addr: u64, block_count: u16) -> Span {
        Span { addr, block_count }
    }

    #[test]
    fn d_05_block_size_is_a_power_of_two() {
        for bad in [0, 3 * MIB, u64::MAX] {
            assert_eq!(
                Geometry::new(0, 0, bad),
                Err(GeometryError::BlockSizeNotPowerOfTwo(bad))
            );
        }
    }

    #[test]
    fn d_06_region_is_made_of_whole_blocks() {
        assert!(matches!(
            Geometry::new(MIB, 0, 2 * MIB),
            Err(GeometryError::AddressMisaligned { .. })
        ));
        assert!(matches!(
            Geometry::new(0, 3 * MIB, 2 * MIB),
            Err(GeometryError::SizeMisaligned { .. })
        ));
    }

    #[test]
    fn d_07_empty_region_is_legal_and_has_no_blocks() {
        let empty = Geometry::new(0, 0, MIB).unwrap();
        assert_eq!(empty.block_count(), 0);
        assert_eq!(
            empty.locate(span(0, 1), u64::MAX),
            Err(RangeError::Outside {
                addr: 0,
                block_count: 1
            })
        );
    }

    #[test]
    fn region_may_not_reach_beyond_the_address_space() {
        assert!(matches!(
            Geometry::new(u64::MAX - MIB + 1, MIB, MIB),
            Err(GeometryError::Wraps { .. })
        ));
    }

    #[test]
    fn span_at_the_end_of_the_usable_region() {
        let g = four_gib_in_2_mib_blocks();
        let usable = 64 * MIB;
        let last = g.addr() + usable - 2 * MIB;
        assert_eq!(
            g.locate(span(last, 1), usable),
            Ok(BlockRange {
                first: 31,
                count: 1
            })
        );
        assert!(g.locate(span(last, 2), usable).is_err());
        assert!(g.locate(span(last + 2 * MIB, 1), usable).is_err());
        assert!(g.locate(span(g.addr() - 2 * MIB, 1), usable).is_err());
    }

    #[test]
    fn span_that_wraps_the_address_space_is_outside() {
        let g = four_gib_in_2_mib_blocks();
        assert!(
            g.locate(span(u64::MAX - 2 * MIB + 1, u16::MAX), u64::MAX)
                .is_err()
        );
    }

    #[test]
    fn runs_longer_than_a_request_are_split() {
        let g = Geometry::new(0, 1 << 40, 2 * MIB).unwrap();
        let counts: Vec<_> = g
            .spans(BlockRange {
                first: 1,
                count: 131_071,
            })
            .map(|s| (s.addr, s.block_count))
            .collect();
        assert_eq!(
            counts,
            [
                (2 * MIB, 65535),
                (2 * MIB + 65535 * 2 * MIB, 65535),
                (2 * MIB + 131_070 * 2 * MIB, 1)
            ]
        );
    }

    proptest! {
        #[test]
        fn locate_agrees_with_arithmetic_that_cannot_overflow(
            addr: u64, block_count: u16, usable_blocks in 0u64..=2048, near in 0u64..3000,
        ) {
            let g = four_gib_in_2_mib_blocks();
            // Half of the addresses are aimed near the region, or nothing would ever be inside.
            for addr in [addr, g.addr() + near * MIB] {
                let usable = usable_blocks * 2 * MIB;
                let end = u128::from(addr) + u128::from(block_count) * u128::from(2 * MIB);
                let inside = addr % (2 * MIB) == 0
                    && block_count > 0
                    && addr >= g.addr()
                    && end <= u128::from(g.addr() + usable);
                let located = g.locate(span(addr, block_count), usable);
                prop_assert_eq!(located.is_ok(), inside);
                if let Ok(range) = located {
                    prop_assert_eq!(g.address(range.first), addr);
                    prop_assert_eq!(g.spans(range).collect::<Vec<_>>(), [span(addr, block_count)]);
                }
            }
        }
    }
}

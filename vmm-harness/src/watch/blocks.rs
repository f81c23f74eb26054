//! How blocks become cells.

use serde::Deserialize;

/// What `GET /hotplug/memory/blocks` answers, as far as it is drawn.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Blocks {
    /// Guest-physical start of the region.
    pub address: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// A letter for each block, `#` plugged, `.` unplugged, `+` and `-` where the guest's driver says otherwise.
    pub blocks: String,
    /// Blocks the guest's page allocator works with.
    pub guest_online: Vec<Run>,
    /// Those of them in zone Movable.
    pub guest_movable: Vec<Run>,
    /// Those of them with a page that cannot be moved for now.
    pub guest_pinned: Vec<Run>,
}

/// Blocks in a row.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a block is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// No memory.
    Unplugged,
    /// Memory the guest's page allocator does not work with.
    Plugged,
    /// In use, in a kernel zone.
    Online,
    /// In use, in zone Movable.
    Movable,
    /// In use, with a page that cannot be moved for now.
    Pinned,
    /// Plugged or unplugged a moment ago: the guest's driver says otherwise than the device.
    Differs,
}

impl BlockKind {
    /// In the order of a legend.
    pub const ALL: [Self; 6] = [
        Self::Unplugged,
        Self::Plugged,
        Self::Online,
        Self::Movable,
        Self::Pinned,
        Self::Differs,
    ];
}

/// What a cell stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Blocks that are all alike.
    All(BlockKind),
    /// Blocks that are not, none of them pinned.
    Mixed,
    /// Blocks that are not, some of them pinned.
    SomePinned,
}

/// All blocks of a region.
#[derive(Clone, Debug)]
pub struct BlockMap {
    /// Guest-physical start of the region.
    pub address: u64,
    /// Bytes of a block.
    pub block_size: u64,
    kinds: Vec<BlockKind>,
}

impl From<&Blocks> for BlockMap {
    /// What makes no sense is left out: a block beyond the end, or one in use that is not plugged.
    fn from(blocks: &Blocks) -> Self {
        let letters = blocks.blocks.chars();
        let mut kinds: Vec<_> = letters
            .map(|letter| match letter {
                '#' => BlockKind::Plugged,
                '.' => BlockKind::Unplugged,
                _ => BlockKind::Differs,
            })
            .collect();
        let mut raise = |runs: &[Run], from: BlockKind, to: BlockKind| {
            for run in runs {
                let index = |block: u64| {
                    usize::try_from(block)
                        .unwrap_or(usize::MAX)
                        .min(kinds.len())
                };
                let range = index(run.first)..index(run.first.saturating_add(run.count));
                for kind in kinds[range].iter_mut().filter(|kind| **kind == from) {
                    *kind = to;
                }
            }
        };
        raise(&blocks.guest_online, BlockKind::Plugged, BlockKind::Online);
        raise(&blocks.guest_movable, BlockKind::Online, BlockKind::Movable);
        for from in [BlockKind::Online, BlockKind::Movable] {
            raise(&blocks.guest_pinned, from, BlockKind::Pinned);
        }
        Self {
            address: blocks.address,
            block_size: blocks.block_size,
            kinds,
        }
    }
}

impl BlockMap {
    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there is no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// How many blocks a cell has to stand for if there are no more than `max_cells`: a power of two, so that cells and
    /// rows begin at round addresses.
    #[must_use]
    pub fn blocks_per_cell(&self, max_cells: usize) -> usize {
        self.len().div_ceil(max_cells.max(1)).next_power_of_two()
    }

    /// The cells, each of as many blocks, the last of what is left.
    pub fn cells(&self, blocks_per_cell: usize) -> impl Iterator<Item = Cell> + '_ {
        self.kinds.chunks(blocks_per_cell.max(1)).map(cell)
    }
}

fn cell(kinds: &[BlockKind]) -> Cell {
    match kinds {
        [first, rest @ ..] if rest.iter().all(|kind| kind == first) => Cell::All(*first),
        _ if kinds.contains(&BlockKind::Pinned) => Cell::SomePinned,
        _ => Cell::Mixed,
    }
}

#[cfg(test)]
mod tests {
    use super::BlockKind::*;
    use super::*;

    fn runs(ranges: &[(u64, u64)]) -> Vec<Run> {
        let run = |(first, count): &(u64, u64)| Run {
            first: *first,
            count: *count,
        };
        ranges.iter().map(run).collect()
    }

    fn map() -> BlockMap {
        BlockMap::from(&Blocks {
            address: 0x1_0000_0000,
            block_size: 2 << 20,
            blocks: "########..+-####".into(),
            guest_online: runs(&[(1, 7), (13, 3)]),
            guest_movable: runs(&[(2, 6)]),
            guest_pinned: runs(&[(4, 1), (13, 1)]),
        })
    }

    #[test]
    fn the_most_that_is_known_of_a_block_is_its_kind() {
        let expected = [
            Plugged, Online, Movable, Movable, Pinned, Movable, Movable, Movable, // 0
            Unplugged, Unplugged, Differs, Differs, Plugged, Pinned, Online, Online, // 8
        ];
        assert_eq!(map().kinds, expected);
    }

    #[test]
    fn cell_of_several_blocks_says_whether_they_are_alike() {
        let cells: Vec<_> = map().cells(2).collect();
        let expected = [
            Cell::Mixed,
            Cell::All(Movable),
            Cell::SomePinned,
            Cell::All(Movable),
            Cell::All(Unplugged),
            Cell::All(Differs),
            Cell::SomePinned,
            Cell::All(Online),
        ];
        assert_eq!(cells, expected);
        assert_eq!(map().cells(5).last(), Some(Cell::All(Online)));
        assert_eq!(map().cells(16).collect::<Vec<_>>(), [Cell::SomePinned]);
    }

    #[test]
    fn cells_are_enough_and_of_a_power_of_two() {
        let map = map();
        for (max_cells, blocks) in [(0, 16), (1, 16), (3, 8), (4, 4), (15, 2), (16, 1), (99, 1)] {
            assert_eq!(map.blocks_per_cell(max_cells), blocks, "{max_cells}");
        }
    }

    #[test]
    fn nonsense_of_a_server_is_left_out() {
        let map = BlockMap::from(&Blocks {
            blocks: "#.".into(),
            guest_online: runs(&[(1, u64::MAX), (u64::MAX, u64::MAX), (0, 0)]),
            ..Blocks::default()
        });
        assert_eq!(map.kinds, [Plugged, Unplugged]);
        let none = BlockMap::from(&Blocks::default());
        assert_eq!((none.cells(1).count(), none.blocks_per_cell(0)), (0, 1));
    }
}

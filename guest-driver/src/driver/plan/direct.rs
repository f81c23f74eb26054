//! The fewest requests: whole runs, the largest first, and the last one from the run that fits best.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use virtio_mem_wire::{BlockMap, BlockRange};

/// Which end of a run is used, and which of two runs that are equally good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Edge {
    /// The lowest addresses: for plugging.
    Low,
    /// The highest addresses: for unplugging.
    High,
}

/// Runs to choose from, by size, so that the best one is found without looking at all.
#[derive(Debug)]
pub(in super::super) struct Candidates {
    edge: Edge,
    /// Blocks, and the first or the last block, such that the smaller one is better.
    by_size: BTreeSet<(u64, u64)>,
}

impl Candidates {
    pub(in super::super) fn new(map: &BlockMap, edge: Edge) -> Self {
        let mut candidates = Self {
            edge,
            by_size: BTreeSet::new(),
        };
        map.runs().for_each(|run| candidates.insert(run));
        candidates
    }

    /// Takes `want` blocks, or all there are, in the fewest pieces of at most `request_blocks`.
    ///
    /// As long as more is wanted than any run has, the largest goes entirely: no other choice covers more with as many
    /// pieces. The last piece comes from the smallest run that has enough, so that large ones stay large.
    pub(in super::super) fn choose(&mut self, want: u64, request_blocks: u64) -> Vec<BlockRange> {
        let mut rest = want;
        let mut pieces = Vec::new();
        while rest > 0
            && let Some(piece) = self.take(rest.min(request_blocks))
        {
            rest -= piece.count;
            pieces.push(piece);
        }
        pieces
    }

    fn insert(&mut self, run: BlockRange) {
        if run.count > 0 {
            let key = match self.edge {
                Edge::Low => run.first,
                Edge::High => u64::MAX - run.end(),
            };
            self.by_size.insert((run.count, key));
        }
    }

    fn remove(&mut self, (count, key): (u64, u64)) -> BlockRange {
        self.by_size.remove(&(count, key));
        let first = match self.edge {
            Edge::Low => key,
            Edge::High => u64::MAX - key - count,
        };
        BlockRange { first, count }
    }

    /// The next piece of at most `want` blocks; what is left of its run is put back.
    pub(in super::super) fn take(&mut self, want: u64) -> Option<BlockRange> {
        let fitting = self.by_size.range((want, 0)..).next().copied();
        let best = fitting.or_else(|| {
            let (largest, _) = *self.by_size.last()?;
            self.by_size.range((largest, 0)..).next().copied()
        })?;
        let run = self.remove(best);
        let count = run.count.min(want);
        let (piece, rest) = match self.edge {
            Edge::Low => (run.first, run.first + count),
            Edge::High => (run.end() - count, run.first),
        };
        self.insert(BlockRange {
            first: rest,
            count: run.count - count,
        });
        Some(BlockRange {
            first: piece,
            count,
        })
    }
}

/// The same for those who choose once.
pub(in super::super) fn choose(
    map: &BlockMap,
    want: u64,
    request_blocks: u64,
    edge: Edge,
) -> Vec<BlockRange> {
    Candidates::new(map, edge).choose(want, request_blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn map(runs: &[(u64, u64)]) -> BlockMap {
        let mut map = BlockMap::new(200);
        for &(first, count) in runs {
            map.insert(BlockRange { first, count });
        }
        map
    }

    fn chosen(runs: &[(u64, u64)], want: u64, most: u64, edge: Edge) -> Vec<(u64, u64)> {
        let pieces = choose(&map(runs), want, most, edge);
        pieces.into_iter().map(|p| (p.first, p.count)).collect()
    }

    #[test]
    fn smallest_run_that_has_enough_is_used_at_its_edge() {
        let runs = [(0, 10), (20, 4), (30, 6), (40, 6)];
        assert_eq!(chosen(&runs, 5, 99, Edge::Low), [(30, 5)]);
        assert_eq!(chosen(&runs, 5, 99, Edge::High), [(41, 5)]);
    }

    #[test]
    fn largest_runs_go_entirely_and_the_last_piece_fits_best() {
        let runs = [(0, 3), (20, 9), (40, 5), (60, 4)];
        assert_eq!(chosen(&runs, 12, 99, Edge::Low), [(20, 9), (0, 3)]);
        assert_eq!(
            chosen(&runs, 99, 99, Edge::High),
            vec![(20, 9), (40, 5), (60, 4), (0, 3)]
        );
    }

    #[test]
    fn runs_are_split_at_the_size_of_a_request() {
        assert_eq!(
            chosen(&[(0, 25)], 21, 10, Edge::Low),
            [(0, 10), (10, 10), (20, 1)]
        );
        assert_eq!(
            chosen(&[(0, 25)], 21, 10, Edge::High),
            [(15, 10), (5, 10), (4, 1)]
        );
    }

    /// The fewest pieces by trying every number of full pieces and leftovers: sizes sorted, largest first.
    fn fewest(sizes: &[u64], want: u64, most: u64) -> usize {
        let mut pieces: Vec<u64> = sizes
            .iter()
            .flat_map(|size| {
                let full = (0..size / most).map(|_| most).collect::<Vec<_>>();
                full.into_iter().chain([size % most])
            })
            .filter(|size| *size > 0)
            .collect();
        pieces.sort_unstable();
        let mut rest = want.min(sizes.iter().sum());
        let mut count = 0;
        while rest > 0 {
            rest = rest.saturating_sub(pieces.pop().unwrap_or(u64::MAX));
            count += 1;
        }
        count
    }

    proptest! {
        #[test]
        fn pieces_are_disjoint_enough_and_as_few_as_can_be(
            bits in prop::collection::vec(any::<bool>(), 200),
            want in 0..220u64,
            most in 1..60u64,
            low in any::<bool>(),
        ) {
            let mut candidates = BlockMap::new(200);
            for (index, bit) in bits.iter().enumerate() {
                if *bit {
                    candidates.insert(BlockRange { first: index as u64, count: 1 });
                }
            }
            let edge = if low { Edge::Low } else { Edge::High };
            let pieces = choose(&candidates, want, most, edge);
            let mut left = candidates.clone();
            for piece in &pieces {
                prop_assert!(piece.count <= most);
                prop_assert_eq!(left.count_in(*piece), piece.count);
                left.remove(*piece);
            }
            let total: u64 = pieces.iter().map(|p| p.count).sum();
            prop_assert_eq!(total, want.min(candidates.count()));
            let sizes: Vec<u64> = candidates.runs().map(|run| run.count).collect();
            prop_assert_eq!(pieces.len(), fewest(&sizes, want, most));
        }
    }
}

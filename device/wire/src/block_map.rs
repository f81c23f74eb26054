//! Which blocks are plugged: one bit a block, with run queries.

use alloc::vec;
use alloc::vec::Vec;

use thiserror::Error;

use crate::{BlockRange, BlockState};

const BITS: u64 = u64::BITS as u64;

/// A set of blocks, one bit each, that knows how many blocks and how many runs are in it.
///
/// Both halves keep one: the device of its plugged blocks, the driver of what it believes plugged. Queries
/// work on whole words; [`run_count`](Self::run_count) and [`count`](Self::count) are kept, not computed.
/// A range that reaches beyond the map is cut at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    words: Vec<u64>,
    len: u64,
    count: u64,
    run_count: u64,
}

/// Words that are no map of so many blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BlockMapError {
    /// Too few or too many of them.
    #[error("{words} words for {len} blocks")]
    Length {
        /// Number of words.
        words: usize,
        /// Number of blocks.
        len: u64,
    },
    /// Bits are set behind the last block.
    #[error("bits {bits:#x} are set behind the last block")]
    TrailingBits {
        /// Those bits of the last word.
        bits: u64,
    },
}

#[expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "every index is below `len`, whose words were allocated, so they fit both u64 and usize"
)]
impl BlockMap {
    /// An empty set over blocks `0 .. len`.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            words: vec![0; len.div_ceil(BITS) as usize],
            len,
            count: 0,
            run_count: 0,
        }
    }

    /// A set over blocks `0 .. len`, saved as [`words`](Self::words).
    ///
    /// # Errors
    ///
    /// [`BlockMapError`] if the words are not those of such a set.
    pub fn from_words(len: u64, words: &[u64]) -> Result<Self, BlockMapError> {
        if words.len() as u64 != len.div_ceil(BITS) {
            return Err(BlockMapError::Length {
                words: words.len(),
                len,
            });
        }
        let used = match len % BITS {
            0 => u64::MAX,
            rest => (1 << rest) - 1,
        };
        let bits = words.last().map_or(0, |last| last & !used);
        if bits != 0 {
            return Err(BlockMapError::TrailingBits { bits });
        }
        let mut map = Self {
            words: words.to_vec(),
            len,
            count: words.iter().map(|w| u64::from(w.count_ones())).sum(),
            run_count: 0,
        };
        map.run_count = map.run_starts_in(BlockRange {
            first: 0,
            count: len,
        });
        Ok(map)
    }

    /// The set as bits: block `i` is bit `i % 64` of word `i / 64`. Unused bits are zero.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of blocks there are, in the set or not.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no blocks at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of blocks in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of maximal runs of blocks in the set.
    #[must_use]
    pub fn run_count(&self) -> u64 {
        self.run_count
    }

    /// Whether block `index` is in the set.
    #[must_use]
    pub fn contains(&self, index: u64) -> bool {
        index < self.len && self.words[(index / BITS) as usize] & (1 << (index % BITS)) != 0
    }

    /// Number of blocks of `range` in the set.
    #[must_use]
    pub fn count_in(&self, range: BlockRange) -> u64 {
        self.masks(range)
            .map(|(word, mask)| u64::from((self.words[word] & mask).count_ones()))
            .sum()
    }

    /// What the blocks of `range` have in common. An empty range is [`BlockState::Unplugged`].
    #[must_use]
    pub fn state(&self, range: BlockRange) -> BlockState {
        let mut masks = self.masks(range);
        let Some((word, mask)) = masks.next() else {
            return BlockState::Unplugged;
        };
        let of = |word: usize, mask: u64| match self.words[word] & mask {
            0 => BlockState::Unplugged,
            bits if bits == mask => BlockState::Plugged,
            _ => BlockState::Mixed,
        };
        let first = of(word, mask);
        match masks.all(|(word, mask)| of(word, mask) == first) {
            true => first,
            false => BlockState::Mixed,
        }
    }

    /// Puts every block of `range` into the set.
    pub fn insert(&mut self, range: BlockRange) {
        self.update(range, true);
    }

    /// Takes every block of `range` out of the set.
    pub fn remove(&mut self, range: BlockRange) {
        self.update(range, false);
    }

    /// Takes every block out of the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
        self.run_count = 0;
    }

    /// The first block at or after `from` that is in the set (`present`), or is not.
    #[must_use]
    pub fn next(&self, from: u64, present: bool) -> Option<u64> {
        let flip = if present { 0 } else { u64::MAX };
        let mut mask = u64::MAX.checked_shl((from % BITS) as u32)?;
        for (word, bits) in self.words.iter().enumerate().skip((from / BITS) as usize) {
            let found = (bits ^ flip) & mask;
            if found != 0 {
                let index = word as u64 * BITS + u64::from(found.trailing_zeros());
                // The unused bits of the last word look like absent blocks.
                return (index < self.len).then_some(index);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The maximal runs of blocks in the set, ascending.
    pub fn runs(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.runs_in(
            BlockRange {
                first: 0,
                count: self.len,
            },
            true,
        )
    }

    /// The maximal runs inside `range` of blocks that are in the set (`present`), or are not, ascending.
    pub fn runs_in(
        &self,
        range: BlockRange,
        present: bool,
    ) -> impl Iterator<Item = BlockRange> + '_ {
        let end = range.end().min(self.len);
        let mut from = range.first;
        core::iter::from_fn(move || {
            let first = self.next(from, present).filter(|first| *first < end)?;
            from = self
                .next(first, !present)
                .map_or(end, |after| after.min(end));
            Some(BlockRange {
                first,
                count: from - first,
            })
        })
    }

    /// How many runs the set would have with every block of `range`, now all absent (`insert`) or all
    /// present, turned over.
    #[must_use]
    pub fn run_count_after(&self, range: BlockRange, insert: bool) -> u64 {
        let before = range.first.checked_sub(1).is_some_and(|i| self.contains(i));
        let after = self.contains(range.end());
        let neighbours = u64::from(before) + u64::from(after);
        match insert {
            // Alone it is a new run, beside one it joins it, between two it makes one of them.
            true => self.run_count + 1 - neighbours,
            false => self.run_count + neighbours - 1,
        }
    }

    /// Each word that `range` touches, with the mask of its bits inside the range.
    fn masks(&self, range: BlockRange) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = range.end().min(self.len);
        let mut from = range.first;
        core::iter::from_fn(move || {
            if from >= end {
                return None;
            }
            let word = from / BITS;
            let stop = end.min((word + 1) * BITS);
            let mask = (u64::MAX >> (BITS - (stop - from))) << (from % BITS);
            from = stop;
            Some((word as usize, mask))
        })
    }

    fn update(&mut self, range: BlockRange, present: bool) {
        // Runs are counted by their first blocks, and only those of the range and the one behind it change.
        let behind = BlockRange {
            first: range.first,
            count: range.count.saturating_add(1),
        };
        self.run_count -= self.run_starts_in(behind);
        for (word, mask) in self.masks(range) {
            let old = self.words[word];
            let new = if present { old | mask } else { old & !mask };
            self.words[word] = new;
            self.count = self.count + u64::from(new.count_ones()) - u64::from(old.count_ones());
        }
        self.run_count += self.run_starts_in(behind);
    }

    /// Number of blocks in `range` that are in the set while the block before them is not.
    fn run_starts_in(&self, range: BlockRange) -> u64 {
        self.masks(range)
            .map(|(word, mask)| {
                let carry = word
                    .checked_sub(1)
                    .map_or(0, |w| self.words[w] >> (BITS - 1));
                let bits = self.words[word];
                u64::from((bits & !(bits << 1 | carry) & mask).count_ones())
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs_of(bits: &[bool]) -> Vec<BlockRange> {
        let mut runs: Vec<BlockRange> = Vec::new();
        for (i, _) in bits.iter().enumerate().filter(|(_, set)| **set) {
            match runs.last_mut() {
                Some(run) if run.end() == i as u64 => run.count += 1,
                _ => runs.push(BlockRange {
                    first: i as u64,
                    count: 1,
                }),
            }
        }
        runs
    }

    #[test]
    fn terabyte_of_two_megabyte_blocks_takes_64_kib() {
        let map = BlockMap::new((1 << 40) / (2 << 20));
        assert_eq!(size_of_val(map.words.as_slice()), 64 << 10);
    }

    #[test]
    fn range_beyond_the_end_is_cut() {
        let mut map = BlockMap::new(70);
        map.insert(BlockRange {
            first: 60,
            count: u64::MAX,
        });
        assert_eq!((map.count(), map.run_count()), (10, 1));
        map.insert(BlockRange {
            first: u64::MAX,
            count: 1,
        });
        assert_eq!(map.next(70, true), None);
        assert_eq!(map.next(u64::MAX, false), None);
    }

    #[test]
    fn words_of_another_length_or_with_trailing_bits_are_refused() {
        assert_eq!(
            BlockMap::from_words(70, &[0]),
            Err(BlockMapError::Length { words: 1, len: 70 })
        );
        assert_eq!(
            BlockMap::from_words(70, &[0, 1 << 6 | 1]),
            Err(BlockMapError::TrailingBits { bits: 1 << 6 })
        );
        assert_eq!(BlockMap::from_words(0, &[]), Ok(BlockMap::new(0)));
    }

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_booleans(
            len in 1u64..300,
            ops in proptest::collection::vec((any::<bool>(), 0u64..320, 0u64..150), 1..40),
        ) {
            let mut map = BlockMap::new(len);
            let mut model = vec![false; len as usize];
            for (present, first, count) in ops {
                let range = BlockRange { first, count };
                let inside = first.min(len) as usize..range.end().min(len) as usize;
                let set = model[inside.clone()].iter().filter(|b| **b).count();
                prop_assert_eq!(map.count_in(range), set as u64);
                prop_assert_eq!(map.state(range), match set {
                    0 => BlockState::Unplugged,
                    n if n == inside.len() => BlockState::Plugged,
                    _ => BlockState::Mixed,
                });
                let foreseen = (set == if present { 0 } else { inside.len() } && !inside.is_empty())
                    .then(|| map.run_count_after(BlockRange { first, count: inside.len() as u64 }, present));
                model[inside].fill(present);
                if present { map.insert(range) } else { map.remove(range) }
                let runs = runs_of(&model);
                prop_assert_eq!(map.count(), model.iter().filter(|b| **b).count() as u64);
                prop_assert_eq!(map.run_count(), runs.len() as u64);
                if let Some(foreseen) = foreseen {
                    prop_assert_eq!(foreseen, map.run_count());
                }
                prop_assert_eq!(map.runs().collect::<Vec<_>>(), runs);
                for i in 0..len + 3 {
                    prop_assert_eq!(map.contains(i), model.get(i as usize).copied().unwrap_or(false));
                    let next_absent = (i..len).find(|i| !model[*i as usize]);
                    prop_assert_eq!(map.next(i, false), next_absent);
                }
            }
            prop_assert_eq!(BlockMap::from_words(len, map.words()), Ok(map.clone()));
            map.clear();
            prop_assert_eq!(map, BlockMap::new(len));
        }
    }
}

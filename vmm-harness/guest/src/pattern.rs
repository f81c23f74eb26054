//! What is written into a page, such that no two pages ever hold the same.
#![expect(unsafe_code, reason = "pages are raw memory")]

use core::ptr::NonNull;

/// Words in a page of 4 KiB.
const WORDS: usize = 512;

/// The golden ratio, the increment of splitmix64.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// A permutation of the 64-bit numbers that looks random (the finalizer of splitmix64).
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A generator of pseudo-random numbers (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, worker: u64) -> Self {
        Self(mix(seed ^ mix(worker)))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        // The bias is far below what matters here.
        (self.next() % end as u64) as usize
    }
}

/// The contents of one page: the stream of splitmix64 from a start of its own.
///
/// For one seed, different workers or sequence numbers have different starts, because [`mix`] is a permutation;
/// sequence numbers are below 2^56.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern(u64);

impl Pattern {
    /// What page `sequence` of `worker` holds.
    #[must_use]
    pub const fn new(seed: u64, worker: u64, sequence: u64) -> Self {
        Self(mix(seed ^ mix(worker << 56 | sequence)))
    }

    const fn word(self, index: usize) -> u64 {
        mix(self.0.wrapping_add(GAMMA.wrapping_mul(index as u64)))
    }

    /// Fills the page.
    ///
    /// # Safety
    ///
    /// `page` must be valid for writes of 4 KiB, aligned to 8 bytes, and nobody else may access it.
    pub unsafe fn fill(self, page: NonNull<u8>) {
        let page = page.cast::<u64>();
        for index in 0..WORDS {
            // SAFETY: The word lies in the page.
            let word = unsafe { page.add(index) };
            // SAFETY: The caller gives us the page.
            unsafe { word.write(self.word(index)) };
        }
    }

    /// Whether the whole page still holds what [`fill`](Self::fill) has written.
    ///
    /// # Safety
    ///
    /// `page` must be valid for reads of 4 KiB, aligned to 8 bytes, and nobody may write it.
    pub unsafe fn matches(self, page: NonNull<u8>) -> bool {
        let page = page.cast::<u64>();
        let mut difference = 0;
        for index in 0..WORDS {
            // SAFETY: The word lies in the page.
            let word = unsafe { page.add(index) };
            // SAFETY: The caller gives us the page.
            difference |= unsafe { word.read() } ^ self.word(index);
        }
        difference == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn page(pattern: Pattern) -> Box<[u64; WORDS]> {
        let mut page = Box::new([0; WORDS]);
        // SAFETY: The page is ours.
        unsafe { pattern.fill(NonNull::from(page.as_mut()).cast()) };
        page
    }

    fn matches(pattern: Pattern, page: &[u64; WORDS]) -> bool {
        // SAFETY: The page is borrowed.
        unsafe { pattern.matches(NonNull::from(page).cast()) }
    }

    #[test]
    fn generator_is_splitmix64() {
        // The first numbers of the reference implementation for seed 1234567.
        let mut random = Random(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let pattern = Pattern::new(1, 2, 3);
        let mut page = page(pattern);
        assert!(matches(pattern, &page));
        for word in 0..WORDS {
            let bit = 1 << (word % 64);
            page[word] ^= bit;
            assert!(!matches(pattern, &page));
            page[word] ^= bit;
        }
        assert!(matches(pattern, &page));
    }

    #[test]
    fn no_two_pages_hold_the_same() {
        let mut first_words = HashSet::new();
        for worker in 0..16 {
            for sequence in 0..1000 {
                let pattern = Pattern::new(7, worker, sequence);
                assert!(first_words.insert(pattern.word(0)));
            }
        }
        let (one, other) = (Pattern::new(7, 0, 1), Pattern::new(7, 1, 0));
        assert!(!matches(one, &page(other)));
        assert!(!matches(Pattern::new(8, 0, 1), &page(one)));
    }

    #[test]
    fn numbers_are_below_their_end_and_reach_everywhere() {
        let mut random = Random::new(1, 0);
        let numbers: HashSet<_> = (0..1000).map(|_| random.below(10)).collect();
        assert_eq!(numbers, (0..10).collect());
    }
}

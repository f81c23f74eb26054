//! Disjoint byte ranges, each with a value.

use alloc::vec::Vec;
use core::ops::Range;

use crate::hotplug::Error;

/// The bytes two ranges have in common; empty if there are none.
pub(super) fn intersection(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// Disjoint ranges, ascending; neighbours differ in their value.
#[derive(Debug)]
pub(super) struct RangeMap<T> {
    entries: Vec<(Range<u64>, T)>,
}

impl<T> RangeMap<T> {
    pub(super) const fn new() -> Self {
        Self {
            entries: Vec::new(),
        }
    }
}

impl<T: Copy + PartialEq> RangeMap<T> {
    /// Makes room for so many more entries.
    pub(super) fn reserve(&mut self, count: usize) -> Result<(), Error> {
        self.entries.try_reserve(count).map_err(|_| Error::NoMemory)
    }

    /// Gives every byte of `range`, which is not empty, this value or none.
    ///
    /// One entry more at most, or two if a value replaces others. With room for them it does not allocate.
    pub(super) fn set(&mut self, mut range: Range<u64>, value: Option<T>) {
        // Those that only touch the range are included, as they may have to be joined.
        let first = self.entries.partition_point(|(r, _)| r.end < range.start);
        let end = self.entries.partition_point(|(r, _)| r.start <= range.end);
        let touched = &self.entries[first..end];
        let mut before = touched.first().cloned();
        let mut after = touched.last().cloned();
        for (rest, bounds) in [
            (&mut before, 0..range.start),
            (&mut after, range.end..u64::MAX),
        ] {
            *rest = rest.take().and_then(|(entry, of_entry)| {
                let outside = intersection(&entry, &bounds);
                if outside.is_empty() {
                    return None;
                }
                if value == Some(of_entry) {
                    range = range.start.min(outside.start)..range.end.max(outside.end);
                    return None;
                }
                Some((outside, of_entry))
            });
        }
        self.entries.drain(first..end);
        let set = value.map(|value| (range, value));
        for entry in [after, set, before].into_iter().flatten() {
            self.entries.insert(first, entry);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Range<u64>, T)> {
        self.entries.iter().cloned()
    }

    /// The entries that have bytes in `range`, ascending.
    pub(super) fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, T)> {
        let first = self.entries.partition_point(|(r, _)| r.end <= range.start);
        self.entries[first..]
            .iter()
            .take_while(move |(r, _)| r.start < range.end)
            .cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_and_joined_as_values_are_set() {
        let mut map = RangeMap::new();
        let mut set = |range, value, expected: &[(Range<u64>, char)]| {
            map.reserve(2).unwrap();
            let capacity = map.entries.capacity();
            map.set(range, value);
            assert_eq!(map.entries, expected);
            assert_eq!(map.entries.capacity(), capacity);
        };
        set(0..9, Some('a'), &[(0..9, 'a')]);
        set(3..6, Some('b'), &[(0..3, 'a'), (3..6, 'b'), (6..9, 'a')]);
        set(
            4..5,
            None,
            &[(0..3, 'a'), (3..4, 'b'), (5..6, 'b'), (6..9, 'a')],
        );
        set(4..5, Some('b'), &[(0..3, 'a'), (3..6, 'b'), (6..9, 'a')]);
        set(3..6, Some('a'), &[(0..9, 'a')]);
        set(9..12, Some('b'), &[(0..9, 'a'), (9..12, 'b')]);
        set(2..10, None, &[(0..2, 'a'), (10..12, 'b')]);
        set(0..12, Some('c'), &[(0..12, 'c')]);
        set(0..12, None, &[]);
    }
}

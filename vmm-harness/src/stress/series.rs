//! What there is to keep of a run that may go on for days.

use std::collections::VecDeque;

/// Entries at the end of a series that are all kept: what happened just before a failure is among them.
pub(crate) const RECENT: usize = 200;

/// Intervals there are at most.
const INTERVALS: usize = 300;

/// Entries in the order they came. The last [`RECENT`] are all there. Those before are in intervals of so many entries,
/// of each of which only some stay; when there would be too many intervals, each two neighbours become one.
#[derive(Debug)]
pub(super) struct Series<T> {
    intervals: Vec<Vec<T>>,
    room: usize,
    /// Entries of an interval.
    stride: u64,
    /// Entries the last interval has had.
    filled: u64,
    /// Takes away from an interval what is not to stay.
    thin: fn(&mut Vec<T>),
    recent: VecDeque<T>,
    seen: u64,
}

impl<T> Series<T> {
    /// `thin` leaves of a thinned list and more entries what it leaves of all of them.
    pub(super) fn new(thin: fn(&mut Vec<T>)) -> Self {
        Self {
            intervals: Vec::new(),
            room: INTERVALS,
            stride: 1,
            filled: 0,
            thin,
            recent: VecDeque::new(),
            seen: 0,
        }
    }

    pub(super) fn push(&mut self, entry: T) {
        self.seen += 1;
        self.recent.push_back(entry);
        let old = match self.recent.len() > RECENT {
            true => self.recent.pop_front(),
            false => None,
        };
        let Some(old) = old else {
            return;
        };
        let filled = self.filled == self.stride || self.intervals.is_empty();
        if filled && self.intervals.len() == self.room {
            self.merge();
        }
        match self.intervals.last_mut() {
            Some(interval) if self.filled < self.stride => {
                interval.push(old);
                (self.thin)(interval);
                self.filled += 1;
            }
            _ => {
                self.intervals.push(vec![old]);
                self.filled = 1;
            }
        }
    }

    fn merge(&mut self) {
        let mut merged = Vec::new();
        let mut intervals = std::mem::take(&mut self.intervals).into_iter();
        while let Some(mut interval) = intervals.next() {
            interval.extend(intervals.next().into_iter().flatten());
            (self.thin)(&mut interval);
            merged.push(interval);
        }
        self.intervals = merged;
        self.stride *= 2;
        // Full intervals in even number have become full ones.
        self.filled = self.stride;
    }

    /// Entries that came.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// Of how many entries some are kept, except the last; 1 while all are there.
    pub(super) fn stride(&self) -> u64 {
        self.stride
    }

    /// What is kept, in its order.
    pub(super) fn into_kept(self) -> Vec<T> {
        let old = self.intervals.into_iter().flatten();
        old.chain(self.recent).collect()
    }
}

/// Leaves the last entry and, of each value, the first at which it was least and the first at which it was most. Each
/// is an entry as it came: its values are of one moment.
pub(super) fn keep_extremes<T>(entries: &mut Vec<T>, values: &[fn(&T) -> u64]) {
    let mut kept = vec![false; entries.len()];
    for value in values {
        let by = |index: &usize| value(&entries[*index]);
        let least = (0..entries.len()).min_by_key(by);
        // The last of those that are equal is what is found, here the first.
        let most = (0..entries.len()).rev().max_by_key(by);
        for index in [least, most].into_iter().flatten() {
            kept[index] = true;
        }
    }
    if let Some(last) = kept.last_mut() {
        *last = true;
    }
    let mut kept = kept.into_iter();
    entries.retain(|_| kept.next() == Some(true));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(entries: &mut Vec<u64>) {
        entries.truncate(1);
    }

    fn of(room: usize, thin: fn(&mut Vec<u64>), entries: impl Iterator<Item = u64>) -> Series<u64> {
        let mut series = Series::new(thin);
        series.room = room;
        entries.for_each(|entry| series.push(entry));
        series
    }

    #[test]
    fn the_last_entries_are_all_kept_and_of_earlier_ones_each_interval() {
        for len in [0, 1, 199, 200, 201, 207, 208, 209, 300, 10_000] {
            let series = of(8, first, 0..len);
            assert_eq!(series.seen(), len);
            let stride = series.stride();
            assert!(series.intervals.len() <= 8 && (len < 208 || series.intervals.len() >= 4));
            let old = len.saturating_sub(RECENT as u64);
            let expected: Vec<u64> = (0..old)
                .step_by(usize::try_from(stride).unwrap())
                .chain(old..len)
                .collect();
            assert_eq!(series.into_kept(), expected, "{len}");
            assert!(len > 208 || stride == 1);
        }
    }

    #[test]
    fn no_peak_is_lost_wherever_it_is() {
        let thin = |entries: &mut Vec<u64>| keep_extremes(entries, &[|entry| *entry]);
        for peak in 0..2000 {
            for value in [0, 1000] {
                let entries = (0..2000).map(|i| if i == peak { value } else { 400 + i % 7 });
                let series = of(8, thin, entries);
                assert!(series.stride() > 100);
                let kept = series.into_kept();
                assert!(kept.contains(&value), "{value} at {peak}");
                assert!(kept.len() <= RECENT + 8 * 3, "{}", kept.len());
            }
        }
    }

    #[test]
    fn each_value_has_its_extremes_and_they_keep_their_order() {
        let mut entries = vec![(3, 3), (1, 9), (1, 5), (7, 5), (7, 2), (4, 4), (5, 5)];
        keep_extremes(&mut entries, &[|entry| entry.0, |entry| entry.1]);
        assert_eq!(entries, [(1, 9), (7, 5), (7, 2), (5, 5)]);
        let mut none: Vec<u64> = Vec::new();
        keep_extremes(&mut none, &[|entry| *entry]);
        assert!(none.is_empty());
    }
}

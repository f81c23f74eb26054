//! Samples, as many as there is room for.

use virtio_mem_wire::{BlockMap, BlockRange};

use crate::report::{Map, Sample, Vm};

/// Samples of a guest that are kept at most.
const SAMPLES: usize = 2000;

/// Maps of a guest that are kept at most.
const MAPS: usize = 400;

/// Shares a map of the region has at most.
const SHARES: u64 = 128;

/// A series that stays below a length: once it is full, every second entry goes, and from then on every second that
/// comes.
#[derive(Debug)]
struct Series<T> {
    kept: Vec<T>,
    room: usize,
    /// One of so many is kept.
    stride: u64,
    seen: u64,
}

impl<T> Series<T> {
    fn new(room: usize) -> Self {
        Self {
            kept: Vec::new(),
            room,
            stride: 1,
            seen: 0,
        }
    }

    fn push(&mut self, entry: impl FnOnce() -> T) {
        if self.seen.is_multiple_of(self.stride) {
            if self.kept.len() == self.room {
                let mut index = 0;
                self.kept.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.stride *= 2;
            }
            if self.seen.is_multiple_of(self.stride) {
                self.kept.push(entry());
            }
        }
        self.seen += 1;
    }
}

/// One guest over time.
#[derive(Debug)]
pub(super) struct Recorder {
    samples: Series<Sample>,
    maps: Series<Map>,
}

impl Recorder {
    pub(super) fn new() -> Self {
        Self {
            samples: Series::new(SAMPLES),
            maps: Series::new(MAPS),
        }
    }

    pub(super) fn sample(&mut self, sample: Sample, plugged: impl FnOnce() -> BlockMap) {
        let seconds = sample.seconds;
        self.samples.push(|| sample);
        self.maps.push(|| Map {
            seconds,
            shares: shares(&plugged()),
        });
    }

    pub(super) fn into_vm(self) -> Vm {
        Vm {
            samples: self.samples.kept,
            maps: self.maps.kept,
        }
    }
}

fn shares(plugged: &BlockMap) -> String {
    let blocks = plugged.len();
    let count = blocks.min(SHARES);
    let share = |index: u64| {
        let (first, end) = (index * blocks / count, (index + 1) * blocks / count);
        let range = BlockRange {
            first,
            count: end - first,
        };
        let runs = plugged.runs_in(range, true);
        let plugged: u64 = runs.map(|run| run.count).sum();
        let ninths = match plugged {
            0 => 0,
            all if all == range.count => 9,
            some => (some * 9 / range.count).clamp(1, 8),
        };
        char::from(b'0' + u8::try_from(ninths).unwrap_or(9))
    };
    (0..count).map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_keeps_its_first_entry_equal_distances_and_its_bound() {
        for len in [0, 1, 7, 8, 9, 100, 10_000] {
            let mut series = Series::new(8);
            (0..len).for_each(|i| series.push(|| i));
            assert!(series.kept.len() <= 8);
            let expected: Vec<u64> = (0..len)
                .step_by(usize::try_from(series.stride).unwrap())
                .collect();
            assert_eq!(series.kept, expected);
            assert!(len < 8 || series.kept.len() >= 4);
        }
    }

    #[test]
    fn shares_tell_none_some_and_all() {
        let mut map = BlockMap::new(1280);
        map.insert(BlockRange {
            first: 10,
            count: 10,
        });
        map.insert(BlockRange {
            first: 20,
            count: 1,
        });
        map.insert(BlockRange {
            first: 30,
            count: 9,
        });
        map.insert(BlockRange {
            first: 1275,
            count: 5,
        });
        let shares = shares(&map);
        assert_eq!(shares.len(), 128);
        assert_eq!(&shares[..5], "09180");
        assert_eq!(&shares[126..], "04");
        assert_eq!(super::shares(&BlockMap::new(3)), "000");
    }
}

//! What was seen of a guest, as much as there is room for.

use virtio_mem_wire::{BlockMap, BlockRange};

use super::series::{Series, keep_extremes};
use crate::report::{Map, Sample, Vm};

/// Shares a map of the region has at most.
const SHARES: u64 = 128;

/// One guest over time.
#[derive(Debug)]
pub(super) struct Recorder {
    samples: Series<Sample>,
    maps: Series<Map>,
    /// When it was looked at last.
    last: Option<f64>,
    longest_gap: f64,
}

/// What has its extremes kept: the sizes that are drawn, and what was plugged when they were looked at.
const EXTREMES: [fn(&Sample) -> u64; 5] = {
    let [requested, most_plugged, online, resident] = Sample::SIZES;
    [requested, most_plugged, online, resident, |sample| {
        sample.plugged
    }]
};

impl Recorder {
    pub(super) fn new() -> Self {
        Self {
            samples: Series::new(|samples| keep_extremes(samples, &EXTREMES)),
            maps: Series::new(|maps| maps.truncate(1)),
            last: None,
            longest_gap: 0.0,
        }
    }

    pub(super) fn sample(&mut self, sample: Sample, plugged: &BlockMap) {
        if let Some(last) = self.last.replace(sample.seconds) {
            self.longest_gap = self.longest_gap.max(sample.seconds - last);
        }
        self.samples.push(sample);
        self.maps.push(Map {
            seconds: sample.seconds,
            shares: shares(plugged),
        });
    }

    pub(super) fn into_vm(self) -> Vm {
        Vm {
            looks: self.samples.seen(),
            longest_gap: self.longest_gap,
            stride: self.samples.stride(),
            samples: self.samples.into_kept(),
            maps: self.maps.into_kept(),
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
    fn a_size_that_was_there_for_one_look_is_in_a_long_recording() {
        let mut recorder = Recorder::new();
        for look in 0..50_000_u64 {
            let short = u64::from(look == 12_345);
            let sample = Sample {
                // Once nobody looked for a while.
                seconds: look as f64 + if look > 20_000 { 7.0 } else { 0.0 },
                requested: 10 + 90 * short,
                most_plugged: 10,
                online: 10 - 9 * short,
                resident: 5 + 2 * short,
                ..Sample::default()
            };
            recorder.sample(sample, &BlockMap::new(4));
        }
        let vm = recorder.into_vm();
        assert_eq!((vm.looks, vm.stride, vm.longest_gap), (50_000, 256, 8.0));
        let there = vm.samples.iter().find(|sample| sample.requested == 100);
        let there = there.unwrap();
        assert_eq!(
            (there.seconds, there.online, there.resident),
            (12_345.0, 1, 7)
        );
        assert!(vm.samples.len() < 3000 && vm.maps.len() <= 500);
        assert!(vm.samples.is_sorted_by_key(|sample| sample.seconds));
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

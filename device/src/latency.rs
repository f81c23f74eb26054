//! How long requests take, as plain data.

use std::sync::PoisonError;
use std::time::Duration;

use virtio_mem_wire::{Answer, RequestKind};

use crate::device::Device;

/// Durations, counted in buckets that double.
///
/// A factor of two tells a system call from page clearing from a stall, which is what these numbers are for,
/// and takes 40 words; a finer histogram would take a dependency and kilobytes for each kind of request. Who
/// wants quantiles to the digit records the same durations through the feature `metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// `buckets[i]` counts durations below 2^i ns that are not in a bucket before; the last has the rest too.
    pub buckets: [u64; Self::BUCKETS],
    /// All durations together.
    pub total: Duration,
    /// The longest.
    pub max: Duration,
}

impl Histogram {
    /// The last bucket begins at 2^38 ns, 4.6 minutes.
    pub const BUCKETS: usize = 40;

    /// Number of durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// An upper bound of the shortest `percent` of the durations, at most twice too large; zero if there are
    /// none.
    #[must_use]
    pub fn percentile(&self, percent: u8) -> Duration {
        let rank = (u128::from(self.count()) * u128::from(percent.min(100))).div_ceil(100);
        let mut seen = 0;
        for (i, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank && seen > 0 {
                return Duration::from_nanos(1 << i).min(self.max);
            }
        }
        Duration::ZERO
    }

    fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - nanos.leading_zeros()) as usize;
        self.buckets[bucket.min(Self::BUCKETS - 1)] += 1;
        self.total = self.total.saturating_add(duration);
        self.max = self.max.max(duration);
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; Self::BUCKETS],
            total: Duration::ZERO,
            max: Duration::ZERO,
        }
    }
}

/// How long requests took by type and answer, from when the device had read them to when it knew the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// `requests[kind as usize][answer as usize]`.
    pub requests: [[Histogram; 4]; 4],
}

impl Latencies {
    /// Of requests of `kind` answered with `answer`.
    #[must_use]
    pub fn of(&self, kind: RequestKind, answer: Answer) -> &Histogram {
        &self.requests[kind as usize][answer as usize]
    }
}

impl Device {
    pub(crate) fn count(&self, kind: RequestKind, answer: Answer, duration: Duration) {
        self.totals.count_request(kind, answer);
        let mut latencies = self
            .latencies
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        latencies.requests[kind as usize][answer as usize].record(duration);
        drop(latencies);
        self.publish_request(kind, answer, duration);
    }

    pub(crate) fn latencies(&self) -> Latencies {
        let latencies = self.latencies.lock();
        latencies.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_of_their_power_of_two() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(100), Duration::ZERO);
        for nanos in [0, 1, 1023, 1024, u64::MAX] {
            histogram.record(Duration::from_nanos(nanos));
        }
        histogram.record(Duration::MAX);
        assert_eq!(histogram.buckets[0], 1);
        assert_eq!(histogram.buckets[1], 1);
        assert_eq!(histogram.buckets[10], 1);
        assert_eq!(histogram.buckets[11], 1);
        assert_eq!(histogram.buckets[39], 2);
        assert_eq!(histogram.count(), 6);
        assert_eq!(
            (histogram.total, histogram.max),
            (Duration::MAX, Duration::MAX)
        );
        assert_eq!(histogram.percentile(50), Duration::from_nanos(1024));
    }
}

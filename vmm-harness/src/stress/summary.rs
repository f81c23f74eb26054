//! What a run came to, in numbers.

use std::time::Duration;

use serde::Serialize;
use virtio_mem::{Histogram, Latencies};
use virtio_mem_wire::{Answer, RequestKind};

use super::Fault;
use crate::Report;
use crate::control::Reason;
use crate::demo::pages_verified;

/// Totals of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How long it took.
    pub seconds: f64,
    /// Guests started.
    pub lives: u64,
    /// Sizes asked for.
    pub resizes: u64,
    /// Times a guest has settled and everything was checked.
    pub rests: u64,
    /// Times what must hold at any time was checked.
    pub observations: u64,
    /// Blocks plugged, and those that stayed because unplugging them failed.
    pub blocks_plugged: u64,
    /// Blocks unplugged, also if that failed in the end.
    pub blocks_unplugged: u64,
    /// Pages allocated and filled.
    pub pages_written: u64,
    /// Pages read back in full and found right.
    pub pages_verified: u64,
    /// Pages the driver moved out of the way.
    pub pages_moved: u64,
    /// Most pages of a guest that were seen not to be movable at a time.
    pub most_unmovable: u64,
    /// Accesses to unplugged memory that were asked for, and caught.
    pub rogues: u64,
    /// Faults injected, by kind.
    pub faults: Vec<FaultCount>,
    /// Why a size was not there, and at how many observations.
    pub reasons: Vec<ReasonCount>,
    /// How long requests took, by type and answer; those that came.
    pub requests: Vec<Latency>,
}

/// Faults of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FaultCount {
    /// What went wrong.
    pub fault: Fault,
    /// How many.
    pub count: u64,
}

/// Times a size was not there for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReasonCount {
    /// Its name, as in the control API.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// Requests of one type with one answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Type of the request.
    pub request: &'static str,
    /// The answer.
    pub answer: &'static str,
    /// How many.
    pub count: u64,
    /// Mean, in microseconds.
    pub mean_us: f64,
    /// Longest, in microseconds.
    pub max_us: f64,
    /// `buckets[i]` counts those below 2^i ns that are not in a bucket before.
    pub buckets: Vec<u64>,
}

impl Summary {
    /// The totals, as people read them: how many, and of what.
    #[must_use]
    pub fn totals(&self) -> Vec<(String, &'static str)> {
        let mut totals = vec![
            (format!("{:.1}", self.seconds), "seconds"),
            (self.resizes.to_string(), "resizes"),
            (self.rests.to_string(), "times at rest, all checked"),
            (self.observations.to_string(), "looks on the way"),
            (self.lives.to_string(), "guests started"),
            (self.blocks_plugged.to_string(), "blocks plugged"),
            (self.blocks_unplugged.to_string(), "blocks unplugged"),
            (self.pages_written.to_string(), "pages written"),
            (self.pages_verified.to_string(), "pages verified"),
            (self.pages_moved.to_string(), "pages moved"),
            (
                self.most_unmovable.to_string(),
                "pages at most not movable at a time",
            ),
        ];
        if self.rogues > 0 {
            let caught = "accesses to unplugged memory, all caught";
            totals.push((self.rogues.to_string(), caught));
        }
        totals
    }

    /// Adds a life that is over: what its guest and its device counted.
    pub(super) fn add_life(&mut self, report: &Report, latencies: &Latencies) {
        self.lives += 1;
        self.pages_written += report.workers.iter().map(|w| w.pages_written).sum::<u64>();
        self.pages_verified += pages_verified(report);
        self.pages_moved += report.pages_moved;
        for kind in RequestKind::ALL {
            for answer in Answer::ALL {
                let histogram = latencies.of(kind, answer);
                if histogram.count() > 0 {
                    self.add_latency(&Latency::new(kind, answer, histogram));
                }
            }
        }
    }

    pub(super) fn add_fault(&mut self, fault: Fault, count: u64) {
        match self.faults.iter_mut().find(|have| have.fault == fault) {
            Some(have) => have.count += count,
            None => self.faults.push(FaultCount { fault, count }),
        }
    }

    pub(super) fn add_reason(&mut self, reason: Reason, count: u64) {
        // The names are those its serialization gives it.
        let name = serde_json::to_value(reason).unwrap_or_default();
        self.add_reason_named(name.as_str().unwrap_or_default(), count);
    }

    fn add_reason_named(&mut self, reason: &str, count: u64) {
        match self.reasons.iter_mut().find(|have| have.reason == reason) {
            Some(have) => have.count += count,
            None => self.reasons.push(ReasonCount {
                reason: reason.to_owned(),
                count,
            }),
        }
    }

    fn add_latency(&mut self, other: &Latency) {
        let same =
            |have: &&mut Latency| (have.request, have.answer) == (other.request, other.answer);
        match self.requests.iter_mut().find(same) {
            Some(have) => have.add(other),
            None => self.requests.push(other.clone()),
        }
    }

    /// Adds everything but the time.
    pub(super) fn add(&mut self, other: &Self) {
        self.lives += other.lives;
        self.resizes += other.resizes;
        self.rests += other.rests;
        self.observations += other.observations;
        self.blocks_plugged += other.blocks_plugged;
        self.blocks_unplugged += other.blocks_unplugged;
        self.pages_written += other.pages_written;
        self.pages_verified += other.pages_verified;
        self.pages_moved += other.pages_moved;
        self.most_unmovable = self.most_unmovable.max(other.most_unmovable);
        self.rogues += other.rogues;
        for fault in &other.faults {
            self.add_fault(fault.fault, fault.count);
        }
        for reason in &other.reasons {
            self.add_reason_named(&reason.reason, reason.count);
        }
        for latency in &other.requests {
            self.add_latency(latency);
        }
    }
}

impl Latency {
    fn new(kind: RequestKind, answer: Answer, histogram: &Histogram) -> Self {
        let count = histogram.count();
        Self {
            request: kind.name(),
            answer: answer.name(),
            count,
            mean_us: histogram.total.as_secs_f64() * 1e6 / count as f64,
            max_us: histogram.max.as_secs_f64() * 1e6,
            buckets: histogram.buckets.to_vec(),
        }
    }

    fn add(&mut self, other: &Self) {
        let total = self.mean_us * self.count as f64 + other.mean_us * other.count as f64;
        self.count += other.count;
        self.mean_us = total / self.count as f64;
        self.max_us = self.max_us.max(other.max_us);
        for (have, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *have += more;
        }
    }

    /// An upper bound of the shortest `percent` of the durations, at most twice too large.
    #[must_use]
    pub fn percentile(&self, percent: u8) -> Duration {
        let mut buckets = [0; Histogram::BUCKETS];
        for (bucket, count) in buckets.iter_mut().zip(&self.buckets) {
            *bucket = *count;
        }
        let histogram = Histogram {
            buckets,
            total: Duration::ZERO,
            max: Duration::from_secs_f64(self.max_us / 1e6),
        };
        histogram.percentile(percent)
    }
}

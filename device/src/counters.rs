//! What the device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_mem_wire::{Answer, RequestKind};

/// Running totals since the device was built. A copy, at one moment for each number, not for all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests by type and answer: `requests[kind as usize][answer as usize]`.
    pub requests: [[u64; 4]; 4],
    /// Requests of a type no specification defines, answered ERROR.
    pub unknown_requests: u64,
    /// Chains that could not carry a request and its answer, given back with length 0.
    pub unusable_chains: u64,
    /// Times the virtqueue itself could not be used: index out of range, ring outside guest memory.
    pub queue_errors: u64,
    /// Host failures: memory or a slot was refused. Each was answered BUSY.
    pub host_failures: u64,
    /// Config-change notifications sent.
    pub config_notifications: u64,
    /// Used-buffer notifications sent.
    pub used_notifications: u64,
}

impl Counters {
    /// Requests of `kind` answered with `answer`.
    #[must_use]
    pub fn requests(&self, kind: RequestKind, answer: Answer) -> u64 {
        self.requests[kind as usize][answer as usize]
    }
}

/// The totals while they run.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    requests: [[AtomicU64; 4]; 4],
    pub(crate) unknown_requests: Total,
    pub(crate) unusable_chains: Total,
    pub(crate) queue_errors: Total,
    pub(crate) host_failures: Total,
    pub(crate) config_notifications: Total,
    pub(crate) used_notifications: Total,
}

/// One running total.
#[derive(Debug, Default)]
pub(crate) struct Total(AtomicU64);

impl Total {
    /// Counts one. True for the 1st, 2nd, 4th, 8th … time: a limit for log lines that a guest can cause at
    /// will, which needs no clock and still shows how often.
    pub(crate) fn count(&self) -> bool {
        (self.0.fetch_add(1, Ordering::Relaxed) + 1).is_power_of_two()
    }
}

impl Totals {
    pub(crate) fn count_request(&self, kind: RequestKind, answer: Answer) {
        self.requests[kind as usize][answer as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let load = |total: &Total| total.0.load(Ordering::Relaxed);
        Counters {
            requests: std::array::from_fn(|kind| {
                std::array::from_fn(|answer| self.requests[kind][answer].load(Ordering::Relaxed))
            }),
            unknown_requests: load(&self.unknown_requests),
            unusable_chains: load(&self.unusable_chains),
            queue_errors: load(&self.queue_errors),
            host_failures: load(&self.host_failures),
            config_notifications: load(&self.config_notifications),
            used_notifications: load(&self.used_notifications),
        }
    }
}

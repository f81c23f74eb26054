//! Requests and answers, counted.

use virtio_mem_wire::{Answer, RequestKind};

/// Requests sent and answers received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    requests: [u64; RequestKind::ALL.len()],
    answers: [[u64; Answer::ALL.len()]; RequestKind::ALL.len()],
}

impl Counters {
    /// Requests of this kind that were sent.
    #[must_use]
    pub fn requests(&self, kind: RequestKind) -> u64 {
        self.requests[kind as usize]
    }

    /// Requests of this kind that were answered like this.
    #[must_use]
    pub fn answers(&self, kind: RequestKind, answer: Answer) -> u64 {
        self.answers[kind as usize][answer as usize]
    }

    /// Requests that were sent.
    #[must_use]
    pub fn total_requests(&self) -> u64 {
        self.requests.iter().sum()
    }

    pub(super) fn count_request(&mut self, kind: RequestKind) {
        self.requests[kind as usize] += 1;
    }

    pub(super) fn count_answer(&mut self, kind: RequestKind, answer: Answer) {
        self.answers[kind as usize][answer as usize] += 1;
    }
}

//! Whether a guest gets on.

use std::time::{Duration, Instant};

use virtio_mem::{Counters, Status};
use virtio_mem_wire::{Answer, RequestKind};
use vmem_guest::abi::DriverState;

use crate::Report;
use crate::demo::CheckFailed;

/// How much longer a driver may take that says why.
const WITH_A_REASON: u32 = 4;

/// Notices a resize that neither progresses nor has a reason for that.
#[derive(Debug)]
pub(super) struct Watch {
    /// How long nothing may happen.
    limit: Duration,
    last: Option<Signs>,
    since: Instant,
}

/// Progress is that one of these changes. A request that is not carried out is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signs {
    requested_size: u64,
    plugged_size: u64,
    acknowledged: u64,
    pages_moved: u64,
}

impl Watch {
    pub(super) fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            last: None,
            since: now,
        }
    }

    /// Looks at a guest at `now`.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        status: &Status,
        counters: &Counters,
        report: &Report,
    ) -> Result<(), CheckFailed> {
        let signs = Signs {
            requested_size: status.requested_size,
            plugged_size: status.plugged_size,
            acknowledged: RequestKind::ALL
                .iter()
                .map(|kind| counters.requests(*kind, Answer::Ack))
                .sum(),
            pages_moved: report.pages_moved,
        };
        let arrived = status.requested_size == status.plugged_size;
        if arrived || status.frozen || self.last != Some(signs) {
            self.last = Some(signs);
            self.since = now;
            return Ok(());
        }
        let state = report.driver_state;
        let busy = matches!(status.last_answer, Some((Answer::Busy, _)));
        // What it says of another target is no reason.
        let told = matches!(state, Some(DriverState::Settled | DriverState::Stalled))
            && report.requested_size == status.requested_size;
        let has_reason = busy || told;
        let limit = match has_reason {
            true => self.limit.saturating_mul(WITH_A_REASON),
            false => self.limit,
        };
        let idle = now.saturating_duration_since(self.since);
        if idle <= limit {
            return Ok(());
        }
        let found = format!(
            "{} bytes are requested, {} are plugged, and nothing has happened for {idle:.1?}; the driver is {state:?} \
             with {:?}, its target is {}",
            status.requested_size,
            status.plugged_size,
            report.unreachable_reason,
            report.requested_size,
        );
        Err(CheckFailed::new("no-resize-is-stuck", found))
    }
}

//! Whether a guest gets on.

use std::time::{Duration, Instant};

use virtio_mem::{Counters, Status};
use virtio_mem_wire::{Answer, RequestKind};
use vmem_guest::abi::DriverState;

use crate::Report;
use crate::control::Reason;
use crate::demo::CheckFailed;

/// How much longer a driver may take that says why, and the host for a request: it gives and takes gigabytes.
pub(super) const WITH_A_REASON: u32 = 4;

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

    /// Looks at a guest at `now`; why its size is not there, if it is not.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        status: &Status,
        counters: &Counters,
        report: &Report,
    ) -> Result<Option<Reason>, CheckFailed> {
        let signs = Signs {
            requested_size: status.requested_size,
            plugged_size: status.plugged_size,
            acknowledged: RequestKind::ALL
                .iter()
                .map(|kind| counters.requests(*kind, Answer::Ack))
                .sum(),
            pages_moved: report.pages_moved,
        };
        // With all its blocks the driver may have something to do still, and must come to an end with it.
        let settled = report.driver_state == Some(DriverState::Settled)
            && report.requested_size == status.requested_size;
        let reason = Reason::of(status, Some(report), None)
            .or_else(|| (!settled || status.serving.is_some()).then_some(Reason::Converging));
        let Some(why) = reason.filter(|_| self.last == Some(signs)) else {
            self.last = Some(signs);
            self.since = now;
            return Ok(reason);
        };
        let limit = match why {
            Reason::Converging | Reason::DriverBooting if status.serving.is_none() => self.limit,
            _ => self.limit.saturating_mul(WITH_A_REASON),
        };
        let idle = now.saturating_duration_since(self.since);
        if idle <= limit {
            return Ok(reason);
        }
        let found = format!(
            "{} bytes are requested, {} are plugged, and nothing has happened for {idle:.1?} but {why:?}; the driver \
             says {:?} because of {:?}, and its target is {}; the device is at {:?}",
            status.requested_size,
            status.plugged_size,
            report.driver_state,
            report.unreachable_reason,
            report.requested_size,
            status.serving.map(|(request, _)| request),
        );
        Err(CheckFailed::new("no-resize-is-stuck", found))
    }
}

#[cfg(test)]
mod tests {
    use vmem_guest::abi::Shortfall;

    use super::*;
    use crate::control::report as reported;

    const LIMIT: Duration = Duration::from_secs(30);
    const TARGET: u64 = 8 << 20;

    fn status(plugged_size: u64) -> Status {
        Status {
            requested_size: TARGET,
            plugged_size,
            usable_region_size: 1 << 30,
            slot_count: 1,
            frozen: false,
            serving: None,
            last_answer: None,
            failure: None,
        }
    }

    fn report(reason: Shortfall, requested_size: u64) -> Report {
        Report {
            requested_size,
            ..reported(DriverState::Stalled, reason)
        }
    }

    /// After how many seconds it is found that nothing happens, if it is within 1000.
    fn stuck_after(mut look: impl FnMut(u64) -> (Status, Counters, Report)) -> Option<u64> {
        let begun = Instant::now();
        let mut watch = Watch::new(LIMIT, begun);
        (0..1000).find(|seconds| {
            let (status, counters, report) = look(*seconds);
            let now = begun + Duration::from_secs(*seconds);
            let seen = watch.observe(now, &status, &counters, &report);
            assert!(
                seen.as_ref().is_ok() || seen.as_ref().unwrap_err().name == "no-resize-is-stuck"
            );
            seen.is_err()
        })
    }

    #[test]
    fn nothing_without_a_reason_is_stuck_and_with_one_it_takes_longer() {
        let none = Counters::default();
        let converging = report(Shortfall::None, TARGET);
        let stalled = report(Shortfall::MemoryInUse, TARGET);
        let of_another_target = report(Shortfall::MemoryInUse, 0);
        assert_eq!(
            stuck_after(|_| (status(0), none, converging.clone())),
            Some(31)
        );
        assert_eq!(
            stuck_after(|_| (status(0), none, of_another_target.clone())),
            Some(31)
        );
        assert_eq!(
            stuck_after(|_| (status(0), none, stalled.clone())),
            Some(121)
        );
        let busy = Status {
            last_answer: Some((Answer::Busy, Instant::now())),
            ..status(0)
        };
        assert_eq!(
            stuck_after(|_| (busy.clone(), none, converging.clone())),
            Some(121)
        );
        // It begins again with the last progress.
        let late = |seconds: u64| {
            (
                status(if seconds < 100 { 0 } else { 1 << 20 }),
                none,
                stalled.clone(),
            )
        };
        assert_eq!(stuck_after(late), Some(221));
    }

    #[test]
    fn requests_that_are_not_carried_out_are_no_progress() {
        let count = |answer: Answer| {
            move |seconds: u64| {
                let mut counters = Counters::default();
                counters.requests[RequestKind::Plug as usize][answer as usize] = seconds;
                (status(0), counters, report(Shortfall::None, TARGET))
            }
        };
        assert_eq!(stuck_after(count(Answer::Ack)), None);
        assert_eq!(stuck_after(count(Answer::Nack)), Some(31));
    }

    #[test]
    fn a_request_that_does_not_end_is_stuck() {
        let none = Counters::default();
        let settled = Report {
            driver_state: Some(DriverState::Settled),
            ..report(Shortfall::None, TARGET)
        };
        for (plugged_size, report) in [(0, report(Shortfall::None, TARGET)), (TARGET, settled)] {
            let serving = Status {
                serving: Some((RequestKind::UnplugAll, Instant::now())),
                ..status(plugged_size)
            };
            let found = stuck_after(|_| (serving.clone(), none, report.clone()));
            assert_eq!(found, Some(121));
        }
    }

    #[test]
    fn who_has_settled_is_not_stuck_and_nobody_is_held_off_for_ever() {
        let none = Counters::default();
        let working = report(Shortfall::None, TARGET);
        let settled = Report {
            driver_state: Some(DriverState::Settled),
            ..working.clone()
        };
        let arrived = |report: &Report| stuck_after(|_| (status(TARGET), none, report.clone()));
        assert_eq!(arrived(&settled), None);
        assert_eq!(arrived(&working), Some(31));
        let frozen = Status {
            frozen: true,
            ..status(0)
        };
        let held_off = stuck_after(|_| (frozen.clone(), none, working.clone()));
        assert_eq!(held_off, Some(121));
    }
}

//! When the driver rests, why, and what wakes it.

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;

use super::progress::{Progress, Stall, Unreachable, UnreachableReason};
use super::state::offline_threshold;
use super::{MemDriver, Strategy};
use crate::hotplug::{Hotplug, PhysicalMemory};

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Something, perhaps.
    None,
    /// Nothing, until something changes.
    Settled,
    /// Nothing for now.
    Waiting(Waiting),
}

/// Why and until when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) reason: Stall,
    /// Time to try again; without one something has to change.
    pub(super) retry_at_ms: Option<u64>,
}

/// The first and the longest wait in milliseconds. It doubles each time it has passed in vain (Linux:
/// `VIRTIO_MEM_RETRY_TIMER_MIN_MS`, `VIRTIO_MEM_RETRY_TIMER_MAX_MS`).
pub(super) const fn delays(strategy: Strategy) -> (u64, u64) {
    match strategy {
        Strategy::Linux => (50_000, 300_000),
        Strategy::Direct => (10, 1000),
    }
}

/// Under [`Strategy::Direct`] the driver rests so many times as long as it has looked in vain, up to a limit.
const REST_PER_WORK: u64 = 9;
const REST_MAX_MS: u64 = 30_000;

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Rests for a while, or until something changes, because of `reason`.
    pub(super) fn wait(&mut self, reason: Stall) {
        self.wait_for(reason, self.retry_delay_ms);
    }

    /// The same once everything was tried.
    pub(super) fn give_up_for_now(&mut self, reason: Stall) {
        // What went wrong before is overcome.
        self.resyncs = 0;
        let mut delay_ms = self.retry_delay_ms;
        if self.policy.strategy == Strategy::Direct {
            // A large guest in use from end to end takes a while to look through.
            let spent_ms = self.now_ms.saturating_sub(self.awake_since_ms);
            delay_ms = delay_ms.max(spent_ms.saturating_mul(REST_PER_WORK).min(REST_MAX_MS));
        }
        self.wait_for(reason, delay_ms);
    }

    fn wait_for(&mut self, reason: Stall, delay_ms: u64) {
        if matches!(self.rest, Rest::Waiting(_)) {
            // Several requests in flight were refused: one wait is enough.
            return;
        }
        let linux = self.policy.strategy == Strategy::Linux;
        if linux && core::mem::take(&mut self.removed_in_run) {
            // The removal of memory is a reason to look again at once (`virtio_mem_retry`).
            self.end_rest();
            return;
        }
        let timed = match reason {
            Stall::NoSpace => !linux,
            Stall::OfflineThreshold => false,
            _ => true,
        };
        let retry_at_ms = timed.then(|| self.now_ms.saturating_add(delay_ms));
        // Said once, however often it is tried again.
        let level = match self.said == Some(reason) {
            true => log::Level::Debug,
            false => log::Level::Info,
        };
        log::log!(level, "virtio-mem: {reason}");
        self.said = Some(reason);
        self.rest = Rest::Waiting(Waiting {
            reason,
            retry_at_ms,
        });
    }

    /// All that can be done is done.
    pub(super) fn settle(&mut self) {
        if self.removal.refused {
            self.wait(Stall::NotRemoved);
            return;
        }
        self.removed_in_run = false;
        self.said = None;
        self.retry_delay_ms = delays(self.policy.strategy).0;
        self.resyncs = 0;
        self.rest = Rest::Settled;
    }

    /// Everything may be tried again.
    pub(super) fn end_rest(&mut self) {
        self.rest = Rest::None;
        self.awake_since_ms = self.now_ms;
        self.in_use.clear();
        self.campaign.clear();
        self.removed_in_run = false;
        self.removal.from = 0;
        self.removal.check |= core::mem::take(&mut self.removal.refused);
    }

    /// Wakes the driver if its time has come, or if memory has gone online or offline.
    ///
    /// Under [`Strategy::Linux`] an online wakes it only once half of the threshold is free, and an offline only
    /// where nothing but offline memory is unplugged.
    pub(super) fn check_triggers<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        if let Rest::Waiting(Waiting {
            retry_at_ms: Some(at),
            ..
        }) = self.rest
            && self.now_ms >= at
        {
            let (_, most) = delays(self.policy.strategy);
            self.retry_delay_ms = self.retry_delay_ms.saturating_mul(2).min(most);
            self.end_rest();
        }
        let seen = self.attachment.watch.seen();
        let onlined = seen.onlined != self.seen.onlined;
        let offlined = seen.offlined != self.seen.offlined;
        if !(onlined || offlined) {
            return;
        }
        if self.rest == Rest::None {
            // What was chosen to be taken may be another kind of memory now.
            self.campaign.clear();
            self.stop_emptying(hotplug);
            return;
        }
        let wakes = match self.policy.strategy {
            Strategy::Linux => {
                let half = offline_threshold(&self.layout) / 2;
                (onlined && self.may_be_added(hotplug, half))
                    || (offlined && !self.policy.unplug_online)
            }
            Strategy::Direct => true,
        };
        if wakes {
            self.end_rest();
        }
    }

    /// Whether `size` bytes more may be added, as far as offline memory goes (Linux: `virtio_mem_could_add_memory`).
    pub(super) fn may_be_added<M: PhysicalMemory>(&self, hotplug: &Hotplug<M>, size: u64) -> bool {
        let units = self.layout.all_units();
        let offline = self.with_view(hotplug, |view| view.offline_size(units));
        offline.saturating_add(size) <= offline_threshold(&self.layout)
    }

    /// What a poll that finds nothing to do at once says.
    pub(super) fn resting(&self) -> Progress {
        match self.rest {
            _ if self.requests_in_flight() > 0 => Progress::AwaitingDevice,
            Rest::None => Progress::Converging,
            Rest::Settled => Progress::Settled,
            Rest::Waiting(waiting) => Progress::Stalled {
                reason: waiting.reason,
                retry_at_ms: waiting.retry_at_ms,
            },
        }
    }

    /// Ends a wait that has a time limit: what could not be done is tried again by the next
    /// [`poll`](Self::poll). To be called when memory has become free, for example.
    pub fn retry(&mut self) {
        if matches!(self.rest, Rest::Waiting(w) if w.retry_at_ms.is_some()) {
            self.end_rest();
        }
    }

    /// What of the target is out of reach, while the driver [rests](Progress::Settled) or is
    /// [stalled](Progress::Stalled): G-15.
    pub fn unreachable(&self) -> Option<Unreachable> {
        let requested = self.config.mutable.requested_size;
        let plugged = self.plugged_size();
        let bytes = requested.abs_diff(plugged);
        let reason = match self.rest {
            Rest::None => return None,
            _ if bytes == 0 => return None,
            Rest::Waiting(waiting) => UnreachableReason::Stalled(waiting.reason),
            Rest::Settled if bytes < self.layout.granule_size => UnreachableReason::Remainder {
                granule_size: self.layout.granule_size,
            },
            Rest::Settled if requested > plugged => UnreachableReason::Capacity,
            Rest::Settled => UnreachableReason::OnlineMemory,
        };
        Some(Unreachable { bytes, reason })
    }
}

//! What is seen of a device without waiting for the request it is at.
//!
//! A request can take seconds: the host gives and takes gigabytes. Who looks meanwhile sees the device as it was
//! before, and what it is at.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_mem_wire::RequestKind;

use crate::device::{Core, Status};
use crate::resize::ResizeState;

/// What is seen of [`Core`], all at one moment.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) status: Status,
    /// When `status.plugged_size` last changed.
    pub(crate) last_change: Instant,
    /// When the driver was first refused since the last ACK or resize.
    pub(crate) refused_since: Option<Instant>,
}

impl View {
    pub(crate) fn of(core: &Core) -> Self {
        Self {
            status: Status {
                requested_size: core.sizes.requested_size,
                plugged_size: core.sizes.plugged_size,
                usable_region_size: core.sizes.usable_region_size,
                slot_count: core.slots.mapped_count(),
                frozen: core.frozen,
                serving: None,
                last_answer: core.last_answer,
                failure: core.failure.clone(),
            },
            last_change: core.last_change,
            refused_since: core.refused_since,
        }
    }
}

/// The latest view, and those who wait for another. Its lock is held for moments only.
#[derive(Debug)]
pub(crate) struct Views {
    latest: Mutex<Numbered>,
    changed: Condvar,
}

#[derive(Debug)]
struct Numbered {
    view: View,
    /// Raised with each view.
    number: u64,
}

impl Views {
    pub(crate) fn new(view: View) -> Self {
        Self {
            latest: Mutex::new(Numbered { view, number: 0 }),
            changed: Condvar::new(),
        }
    }

    /// What `look` makes of the latest view; no resize settles meanwhile.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.lock().view)
    }

    /// A request begins. The next [`show`](Self::show) is its end.
    pub(crate) fn begin(&self, request: RequestKind, now: Instant) {
        let mut latest = self.lock();
        latest.view.status.serving = Some((request, now));
        latest.number = latest.number.wrapping_add(1);
        drop(latest);
        self.changed.notify_all();
    }

    /// Lets everybody see `core`; a resize whose size is there ends at the same moment.
    pub(crate) fn show(&self, core: &Core) {
        let mut latest = self.lock();
        latest.view = View::of(core);
        latest.number = latest.number.wrapping_add(1);
        if core.sizes.plugged_size == core.sizes.requested_size {
            core.operation.end(ResizeState::Settled);
        }
        drop(latest);
        self.changed.notify_all();
    }

    /// Waits until `done` says so of a snapshot, which is taken as [`look`](Self::look) does, or until `deadline`;
    /// the snapshot then, and whether it is done.
    pub(crate) fn wait_for<T>(
        &self,
        deadline: Instant,
        snapshot: impl Fn(&View) -> T,
        done: impl Fn(&T) -> bool,
    ) -> (T, bool) {
        loop {
            let latest = self.lock();
            let (now, seen) = (snapshot(&latest.view), latest.number);
            drop(latest);
            // The caller's, so without the lock.
            if done(&now) {
                return (now, true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (now, false);
            }
            let unchanged = |latest: &mut Numbered| latest.number == seen;
            drop(
                self.changed
                    .wait_timeout_while(self.lock(), left, unchanged),
            );
        }
    }

    // Nothing is left half done under it.
    fn lock(&self) -> MutexGuard<'_, Numbered> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! BUSY, and telling the driver when trying again is worth it.
//!
//! Linux waits 50 to 300 s after BUSY, or until a config-change notification. So the device remembers why it
//! said BUSY and sends one when the reason is gone.

use std::sync::{MutexGuard, PoisonError};

use crate::device::Device;

/// Why a request was answered BUSY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BusyCause {
    /// Between freeze and thaw.
    Frozen = 1,
    /// Another device of the VMM holds memory of a block; ends with its last pin.
    Pinned = 2,
    /// The host or an observer refused; ends when blocks, slots or mappings are given back, or by `retry`.
    Host = 4,
    /// A failure that could not be undone; never ends.
    Failed = 8,
}

/// What the driver was answered BUSY for and has not been told the end of.
///
/// Under a lock of its own: pins end on threads of other devices, and inside observers, which neither may wait
/// for a request that is running.
#[derive(Debug, Default)]
pub(crate) struct Busy {
    causes: u8,
    frozen: bool,
}

impl Device {
    pub(crate) fn begin_busy(&self, cause: BusyCause) {
        self.lock_busy().causes |= cause as u8;
    }

    /// Sends one notification if the driver was answered BUSY because of `cause`, which has ended.
    pub(crate) fn end_busy(&self, cause: BusyCause) {
        if !self.is_ready() {
            // A driver that was told BUSY where this device was saved hears of it when it is served again.
            return;
        }
        let mut busy = self.lock_busy();
        if busy.causes & cause as u8 == 0 {
            return;
        }
        busy.causes &= !(cause as u8);
        if busy.frozen {
            // Another try would be BUSY; thawing tells the driver.
            busy.causes |= BusyCause::Frozen as u8;
            return;
        }
        drop(busy);
        self.notify_config();
    }

    /// The next driver was not told anything.
    pub(crate) fn forget_busy(&self) {
        self.lock_busy().causes = 0;
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.lock_busy().causes != 0
    }

    pub(crate) fn set_frozen(&self, frozen: bool) {
        let mut core = self.lock();
        core.frozen = frozen;
        self.lock_busy().frozen = frozen;
        self.show(&core);
        drop(core);
        if !frozen {
            self.end_busy(BusyCause::Frozen);
        }
    }

    fn lock_busy(&self) -> MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

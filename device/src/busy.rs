//! BUSY, and telling the driver when trying again is worth it.
//!
//! Linux waits 50 to 300 s after BUSY, or until a config-change notification. So the device remembers why it
//! said BUSY and sends one when the reason is gone.

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

/// The causes the driver was answered BUSY for and has not been told the end of.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BusyCauses(u8);

impl BusyCauses {
    pub(crate) fn insert(&mut self, cause: BusyCause) {
        self.0 |= cause as u8;
    }

    /// Whether the cause was there.
    fn remove(&mut self, cause: BusyCause) -> bool {
        let was = self.0;
        self.0 &= !(cause as u8);
        was != self.0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Device {
    /// Sends one notification if the driver was answered BUSY because of `cause`, which has ended.
    pub(crate) fn end_busy(&self, cause: BusyCause) {
        let mut core = self.lock();
        if !core.busy.remove(cause) {
            return;
        }
        if core.frozen {
            // Another try would be BUSY; thawing tells the driver.
            core.busy.insert(BusyCause::Frozen);
            return;
        }
        drop(core);
        self.notify_config();
    }
}

//! Why a size is not there.

use serde::Serialize;
use virtio_mem::Status;
use virtio_mem::wire::Answer;
use vmem_guest::abi::{DriverState, Shortfall};

use crate::{Outcome, Report};

/// What keeps the plugged size from the requested one; `docs/operating.md` says what to do about each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// There is no guest yet.
    NotStarted,
    /// The guest has ended.
    GuestEnded,
    /// The device is frozen: every PLUG and UNPLUG is answered BUSY.
    Frozen,
    /// A failure of the host could not be undone: every PLUG and UNPLUG is answered BUSY.
    DeviceFailed,
    /// The guest's driver has given up.
    DriverFailed,
    /// The guest's driver is not there yet.
    DriverBooting,
    /// The device answers BUSY: the host has no memory or slots left, or holds memory of the guest.
    HostBusy,
    /// What is missing is less than the driver can plug or unplug.
    Remainder,
    /// The region has no whole memory block left.
    Capacity,
    /// The driver could not empty what is still to be unplugged, and tries again later.
    MemoryInUse,
    /// The driver cannot add memory for now, and tries again later.
    CannotAdd,
    /// Nothing: it is being done.
    Converging,
}

impl Reason {
    /// The first that applies, from what rules out all else to what passes by itself. `None` if the size is there.
    pub(super) fn of(
        status: &Status,
        report: Option<&Report>,
        outcome: Option<&Outcome>,
    ) -> Option<Self> {
        if status.requested_size == status.plugged_size {
            return None;
        }
        if outcome.is_some() {
            return Some(Self::GuestEnded);
        }
        if status.failure.is_some() {
            return Some(Self::DeviceFailed);
        }
        if status.frozen {
            return Some(Self::Frozen);
        }
        let driver = report.and_then(|report| report.driver_state);
        match driver {
            Some(DriverState::Failed) => return Some(Self::DriverFailed),
            Some(DriverState::Booting) => return Some(Self::DriverBooting),
            _ => {}
        }
        if matches!(status.last_answer, Some((Answer::Busy, _))) {
            return Some(Self::HostBusy);
        }
        // What the driver says of another target does not count.
        let report = report.filter(|report| report.requested_size == status.requested_size);
        let at_rest = matches!(driver, Some(DriverState::Settled | DriverState::Stalled));
        match report.and_then(|report| report.unreachable_reason) {
            Some(Shortfall::Remainder) if at_rest => Some(Self::Remainder),
            Some(Shortfall::Capacity) if at_rest => Some(Self::Capacity),
            _ if report.is_some() && at_rest => {
                Some(match status.plugged_size > status.requested_size {
                    true => Self::MemoryInUse,
                    false => Self::CannotAdd,
                })
            }
            _ => Some(Self::Converging),
        }
    }
}

/// What the API's names of reasons mean, for people.
#[must_use]
pub fn explain(reason: &str) -> &str {
    match reason {
        "not_started" => "the guest is not started",
        "guest_ended" => "the guest has ended",
        "frozen" => "the device is frozen",
        "device_failed" => "the device has failed",
        "driver_failed" => "the guest's driver has given up",
        "driver_booting" => "the guest's driver is not there yet",
        "host_busy" => "the device answers BUSY",
        "remainder" => "the rest is less than the driver can plug or unplug",
        "capacity" => "the region has no whole memory block left",
        "memory_in_use" => "the memory to be unplugged is in use",
        "cannot_add" => "the driver cannot add memory for now",
        "converging" => "on its way",
        // Of a newer server.
        other => other,
    }
}

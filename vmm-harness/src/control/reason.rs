//! Why a size is not there.

use serde::Serialize;
use virtio_mem::Status;
use virtio_mem::wire::Answer;
use vmem_guest::abi::{DriverState, Shortfall};

use crate::{Outcome, Report};

/// What keeps the plugged size from the requested one; `docs/operating.md` says what to do about each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
    /// Only offline memory may be unplugged.
    OnlineMemory,
    /// The device has answered NACK to a request to plug that its target allows.
    Refused,
    /// Nothing that is still to be unplugged could be emptied; it is tried again.
    MemoryInUse,
    /// The guest has no memory for the metadata of more memory.
    NoMetadata,
    /// The guest does not add memory that was plugged.
    NotAdded,
    /// The guest does not let go of memory of which nothing is plugged any more.
    NotRemoved,
    /// Too much of the guest's memory is offline to add more.
    OfflineThreshold,
    /// The driver cannot read the configuration for changes.
    ConfigUnstable,
    /// Nothing: it is being done.
    Converging,
}

impl Reason {
    /// The first that applies, from what rules out all else to what passes by itself. `None` if the size is there.
    pub(crate) fn of(
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
        match report.and_then(|report| report.driver_state) {
            Some(DriverState::Failed) => return Some(Self::DriverFailed),
            Some(DriverState::Booting) => return Some(Self::DriverBooting),
            _ => {}
        }
        // What the driver says of another target does not count.
        let report = report.filter(|report| report.requested_size == status.requested_size);
        let told = report.and_then(|report| report.unreachable_reason);
        if let Some(reason) = told.and_then(Self::told) {
            return Some(reason);
        }
        // It has not seen the answer yet, or does not say.
        match status.last_answer {
            Some((Answer::Busy, _)) => Some(Self::HostBusy),
            _ => Some(Self::Converging),
        }
    }

    /// What the guest's driver says.
    fn told(shortfall: Shortfall) -> Option<Self> {
        Some(match shortfall {
            Shortfall::None => return None,
            Shortfall::Remainder => Self::Remainder,
            Shortfall::Capacity => Self::Capacity,
            Shortfall::OnlineMemory => Self::OnlineMemory,
            Shortfall::DeviceBusy => Self::HostBusy,
            Shortfall::Refused => Self::Refused,
            Shortfall::MemoryInUse => Self::MemoryInUse,
            Shortfall::NoMetadata => Self::NoMetadata,
            Shortfall::NotAdded => Self::NotAdded,
            Shortfall::NotRemoved => Self::NotRemoved,
            Shortfall::OfflineThreshold => Self::OfflineThreshold,
            Shortfall::ConfigUnstable => Self::ConfigUnstable,
        })
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
        "online_memory" => "only offline memory is unplugged",
        "refused" => "the device refuses to plug more memory",
        "no_metadata" => "the guest has no memory for the metadata of more memory",
        "not_added" => "the guest does not add memory that was plugged",
        "not_removed" => "the guest does not let go of memory that is unplugged",
        "offline_threshold" => "too much of the guest's memory is offline to add more",
        "config_unstable" => "the driver cannot read the configuration for changes",
        "converging" => "on its way",
        // Of a newer server.
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io;
    use std::sync::Arc;
    use std::time::Instant;

    use virtio_mem_driver::driver::{Mode, Strategy};
    use virtio_mem_wire::BlockMap;

    use super::*;

    const STATUS: Status = Status {
        requested_size: 4 << 20,
        plugged_size: 0,
        usable_region_size: 64 << 20,
        slot_count: 0,
        frozen: false,
        serving: None,
        last_answer: None,
        failure: None,
    };

    pub(crate) fn report(driver_state: DriverState, unreachable_reason: Shortfall) -> Report {
        Report {
            driver_state: Some(driver_state),
            requested_size: STATUS.requested_size,
            plugged_size: 0,
            node: 0,
            online_size: 0,
            pages_moved: 0,
            interrupts: 0,
            requests: 0,
            strategy: Strategy::Direct,
            mode: Mode::SubBlock,
            granule_size: 2 << 20,
            unreachable: 0,
            unreachable_reason: Some(unreachable_reason),
            workers: Vec::new(),
            view: BlockMap::new(32),
            message: None,
        }
    }

    #[test]
    fn the_driver_s_own_reason_is_given_and_each_is_another() {
        let mut given = Vec::new();
        for value in 1.. {
            let Some(shortfall) = Shortfall::from_value(value) else {
                break;
            };
            assert_eq!(shortfall as u32, value);
            let report = report(DriverState::Stalled, shortfall);
            let reason = Reason::of(&STATUS, Some(&report), None).unwrap();
            assert!(!given.contains(&reason), "{reason:?} twice");
            given.push(reason);
        }
        assert_eq!(given.len(), 11);
        assert_eq!(given[0], Reason::Remainder);
        assert_eq!(given[3], Reason::HostBusy);
        assert_eq!(given[5], Reason::MemoryInUse);
    }

    #[test]
    fn what_rules_out_all_else_comes_first() {
        let busy = Status {
            last_answer: Some((Answer::Busy, Instant::now())),
            ..STATUS
        };
        let frozen = Status {
            frozen: true,
            ..busy.clone()
        };
        let failed = Status {
            failure: Some(Arc::new(io::Error::other("test"))),
            ..frozen.clone()
        };
        let in_use = report(DriverState::Stalled, Shortfall::MemoryInUse);
        let none = report(DriverState::Converging, Shortfall::None);
        let broken = report(DriverState::Failed, Shortfall::MemoryInUse);
        let other_target = Report {
            requested_size: 0,
            ..in_use.clone()
        };
        let ended = Some(&Outcome::Exited);
        for (status, report, outcome, reason) in [
            (&failed, Some(&broken), ended, Reason::GuestEnded),
            (&failed, Some(&broken), None, Reason::DeviceFailed),
            (&frozen, Some(&broken), None, Reason::Frozen),
            (&busy, Some(&broken), None, Reason::DriverFailed),
            (&busy, Some(&in_use), None, Reason::MemoryInUse),
            (&busy, Some(&other_target), None, Reason::HostBusy),
            (&busy, Some(&none), None, Reason::HostBusy),
            (&STATUS, Some(&other_target), None, Reason::Converging),
            (&STATUS, None, None, Reason::Converging),
        ] {
            let given = Reason::of(status, report, outcome);
            assert_eq!(given, Some(reason), "{status:?} {report:?}");
        }
        let there = Status {
            plugged_size: STATUS.requested_size,
            ..failed
        };
        assert_eq!(Reason::of(&there, Some(&broken), ended), None);
    }
}

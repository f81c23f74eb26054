//! What the driver does, for a kernel to log or to show.

use alloc::boxed::Box;
use core::fmt;
use core::ops::Range;

use super::progress::{Failure, Progress, ResyncReason, Stall, Unreachable};
use super::state::UnitState;

/// Something has happened. Addresses are physical, sizes are bytes, times are on the clock of the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device asks for so many bytes.
    Target {
        /// The size it asks for.
        requested_size: u64,
    },
    /// The device has plugged a range.
    Plugged(Range<u64>),
    /// The device has unplugged a range.
    Unplugged(Range<u64>),
    /// The device has unplugged everything.
    UnpluggedAll,
    /// A unit is in another state.
    Unit {
        /// Its id: address / size of a unit.
        id: u64,
        /// Its state now.
        state: UnitState,
    },
    /// The driver cannot get on for now.
    Stalled {
        /// What is in the way.
        reason: Stall,
        /// When it tries again; without it, only an interrupt or memory going online or offline helps.
        retry_at_ms: Option<u64>,
    },
    /// The driver has done what it can.
    Settled {
        /// Bytes that are plugged now.
        plugged_size: u64,
        /// What of the target cannot be reached.
        unreachable: Option<Unreachable>,
    },
    /// The driver asks the device which blocks are plugged.
    Resync(ResyncReason),
    /// What the device has plugged is known again.
    Resynced {
        /// Bytes that are plugged.
        plugged_size: u64,
    },
    /// The device is not used any more.
    Failed(Failure),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Target { requested_size } => write!(f, "target {requested_size:#x}"),
            Self::Plugged(range) => write!(f, "plugged {range:#x?}"),
            Self::Unplugged(range) => write!(f, "unplugged {range:#x?}"),
            Self::UnpluggedAll => f.write_str("unplugged everything"),
            Self::Unit { id, state } => write!(f, "unit {id} is {state:?}"),
            Self::Stalled {
                reason,
                retry_at_ms,
            } => Progress::Stalled {
                reason: *reason,
                retry_at_ms: *retry_at_ms,
            }
            .fmt(f),
            Self::Settled {
                plugged_size,
                unreachable,
            } => {
                write!(f, "settled, {plugged_size:#x} bytes are plugged")?;
                match unreachable {
                    Some(unreachable) => write!(f, "; {unreachable}"),
                    None => Ok(()),
                }
            }
            Self::Resync(reason) => write!(f, "asking what is plugged: {reason}"),
            Self::Resynced { plugged_size } => write!(f, "{plugged_size:#x} bytes are plugged"),
            Self::Failed(failure) => Progress::Failed(*failure).fmt(f),
        }
    }
}

/// Who takes the events. Without one they are dropped.
#[derive(Default)]
pub(super) struct Sink(pub(super) Option<Box<dyn FnMut(Event) + Send>>);

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sink").field(&self.0.is_some()).finish()
    }
}

impl Sink {
    pub(super) fn emit(&mut self, event: Event) {
        if let Some(sink) = &mut self.0 {
            sink(event);
        }
    }
}

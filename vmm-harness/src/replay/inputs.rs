//! What a replay takes from the trace.

use std::fmt;
use std::ops::AddAssign;

use serde::Serialize;

/// What was taken from the trace because it depends on where the kernel's pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inputs {
    /// Attempts to take a memory block offline that found a page that cannot be moved.
    pub busy: u64,
    /// Attempts that went on until a signal ended them.
    pub interrupted: u64,
    /// Attempts of an eject that went on beyond the step.
    pub endless: u64,
}

impl AddAssign for Inputs {
    fn add_assign(&mut self, other: Self) {
        self.busy += other.busy;
        self.interrupted += other.interrupted;
        self.endless += other.endless;
    }
}

impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            busy,
            interrupted,
            endless,
        } = self;
        write!(f, "{busy} EBUSY, {interrupted} EINTR, {endless} endless")
    }
}

//! What a replay takes from the trace.

use std::fmt;
use std::ops::AddAssign;

use serde::Serialize;

/// What was taken from the trace because it depends on where the kernel's pages are, or on when something was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inputs {
    /// Attempts to take a memory block offline that found a page that cannot be moved.
    pub busy: u64,
    /// Attempts that went on until a signal ended them.
    pub interrupted: u64,
    /// Attempts of an eject that went on beyond the step.
    pub endless: u64,
    /// Pages that could not be poisoned because the kernel uses them.
    pub in_use: u64,
    /// States read just before an eject took the memory block offline.
    pub early_states: u64,
    /// Uevents of an eject that were heard one step late.
    pub late_uevents: u64,
    /// Places of virtio-mem memory that were passed over because the kernel uses them.
    pub busy_places: u64,
    /// Times the kernel stopped unplugging with memory left that it could have tried.
    pub given_up: u64,
    /// Times the driver of virtio-mem has tried again after a wait.
    pub retries: u64,
    /// Module parameters that were set between boot and the first step.
    pub parameters: u64,
}

impl AddAssign for Inputs {
    fn add_assign(&mut self, other: Self) {
        self.busy += other.busy;
        self.interrupted += other.interrupted;
        self.endless += other.endless;
        self.in_use += other.in_use;
        self.early_states += other.early_states;
        self.late_uevents += other.late_uevents;
        self.busy_places += other.busy_places;
        self.given_up += other.given_up;
        self.retries += other.retries;
        self.parameters += other.parameters;
    }
}

impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            busy,
            interrupted,
            endless,
            in_use,
            early_states,
            late_uevents,
            busy_places,
            given_up,
            retries,
            parameters,
        } = self;
        write!(f, "{busy} EBUSY, {interrupted} EINTR, {endless} endless")?;
        // Seldom, so said only if there are.
        for (count, what) in [
            (in_use, "in use"),
            (early_states, "early states"),
            (late_uevents, "late uevents"),
            (busy_places, "busy places"),
            (given_up, "given up"),
            (retries, "retries"),
            (parameters, "parameters"),
        ] {
            if *count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

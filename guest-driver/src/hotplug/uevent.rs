//! Uevents: what udev and the reloaders of crash kernels hang on. Nobody can object here: that is for notifiers.
//!
//! Linux: `kobject_uevent` of memory block devices.

use alloc::boxed::Box;
use core::fmt;

use super::Hotplug;

/// What happened to a memory block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UeventAction {
    /// It was added.
    Add,
    /// It went online.
    Online,
    /// It went offline.
    Offline,
    /// It was removed.
    Remove,
}

/// An event of the memory subsystem. Displayed as Linux names it: `online memory37`.
///
/// ```text
///  Add ----> Online <----> Offline ----> Remove
///   |                                      ^
///   +--------------------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// What happened.
    pub action: UeventAction,
    /// The memory block's id.
    pub block: u64,
}

impl fmt::Display for Uevent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            UeventAction::Add => "add",
            UeventAction::Online => "online",
            UeventAction::Offline => "offline",
            UeventAction::Remove => "remove",
        };
        write!(f, "{action} memory{}", self.block)
    }
}

/// Who takes the events.
pub(super) type UeventSink = Box<dyn FnMut(Uevent) + Send>;

impl<M> Hotplug<M> {
    /// Lets `sink` have every event from now on. Before, and without one, they are dropped: nothing piles up.
    pub fn set_uevent_sink(&mut self, sink: Box<dyn FnMut(Uevent) + Send>) {
        self.uevents = Some(sink);
    }

    pub(super) fn emit(&mut self, action: UeventAction, block: u64) {
        if let Some(sink) = &mut self.uevents {
            sink(Uevent { action, block });
        }
    }
}

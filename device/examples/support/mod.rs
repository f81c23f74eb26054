//! What the example needs and a VMM has: a virtual machine with a guest in it, and the guest's driver.

mod driver;
mod guest;

use std::ops::Range;

pub(crate) use driver::Driver;
pub(crate) use guest::{Guest, boot_memory};

/// Where the guest reads the configuration space; a transport has its registers before it.
pub(crate) const CONFIG: Range<u64> = 0xd000_0100..0xd000_0200;
/// A write of 0 here notifies queue 0.
pub(crate) const DOORBELL: u64 = 0xd000_0050;
/// A write here says that the guest has done what it was to do.
pub(crate) const DONE: u64 = 0xd000_1000;

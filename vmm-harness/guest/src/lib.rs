//! The guest program of `vmem`: drives the memory device and works with the memory it brings.
//!
//! The same code runs in the freestanding image on KVM and in the harness's process; a [`Platform`] is what
//! tells them apart. vCPU 0 runs the driver and, in between, a worker; every other vCPU runs a worker. A
//! worker allocates pages of hotplugged memory, fills each with a pattern only it can expect, reads them back
//! in full, and frees them, while the memory under them is plugged, moved and unplugged.
//!
//! What the host wants and what the guest has to say goes through the [`Mailbox`](abi::Mailbox).
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod abi;
mod guest;
mod lock;
mod message;
mod pattern;
mod platform;
mod worker;

pub use guest::{BootError, Guest, Parameters};
pub use message::write_message;
pub use pattern::Pattern;
pub use platform::Platform;

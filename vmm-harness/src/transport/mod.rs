//! Transports: how a driver finds and drives the device.
//!
//! `core.rs` has what they share, a transport only the addresses, widths and interrupts that are its own.

mod core;
mod interrupt;
mod mmio;
pub mod pci;

pub use interrupt::{InterruptCounts, InterruptLine};
pub use mmio::{MmioTransport, NOTIFY_OFFSET};

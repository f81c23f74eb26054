//! Transports: how a driver finds and drives the device.

mod interrupt;
mod mmio;

pub use interrupt::{InterruptCounts, InterruptLine};
pub use mmio::{MmioTransport, NOTIFY_OFFSET};

//! Stock Linux kernels in QEMU as the peer of a memory device.

mod apt;
mod cache;
mod error;
mod packages;
mod progress;
mod signals;
mod sources;

pub use cache::Cache;
pub use error::LinuxError;
pub use packages::KernelSeries;
pub use progress::{Phase, Progress};

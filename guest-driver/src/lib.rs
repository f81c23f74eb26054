//! The guest half of virtio-mem, for Rust kernels and unikernels.
//!
//! | module | what it is |
//! |---|---|
//! | [`hotplug`] | bookkeeping of sections, memory blocks and pages, usable without virtio |
//! | [`driver`] | the virtio-mem driver on top of it, over the transports of `virtio-drivers` |
//!
//! Without std; needs a heap. A kernel gives it access to physical memory
//! ([`PhysicalMemory`](hotplug::PhysicalMemory)), DMA memory ([`Hal`](virtio_drivers::Hal)), a clock and its
//! loop, from which it calls [`MemDriver::poll`](driver::MemDriver::poll). Nothing here blocks, and nothing
//! the device says or does makes it panic.
//!
//! ```
//! use core::error::Error;
//! use virtio_drivers::{Hal, transport::Transport};
//! use virtio_mem_driver::driver::{MemDriver, Policy, Progress};
//! use virtio_mem_driver::hotplug::{Hotplug, PhysicalMemory, Profile};
//!
//! fn drive<H: Hal>(
//!     transport: impl Transport,
//!     memory: impl PhysicalMemory,
//!     now_ms: impl Fn() -> u64,
//!     wait_for_interrupt: impl Fn(Option<u64>),
//! ) -> Result<(), Box<dyn Error>> {
//!     let mut hotplug = Hotplug::new(Profile::X86_64, memory)?;
//!     let mut driver = MemDriver::<H, _>::probe(transport, &mut hotplug, Policy::default())?;
//!     loop {
//!         match driver.poll(&mut hotplug, now_ms()) {
//!             Progress::Converging => continue,
//!             Progress::Failed(failure) => return Err(failure.into()),
//!             _ => wait_for_interrupt(driver.deadline_ms()),
//!         }
//!         driver.on_interrupt();
//!     }
//! }
//! ```
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod driver;
pub mod hotplug;

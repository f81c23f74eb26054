//! What a Rust program needs to run on a bare vCPU.
//!
//! Every program: [`memory`] stands in for the C library's memory functions, [`heap`] is the allocator, [`identity`] is
//! memory mapped one to one.
//!
//! Programs the harness boots, at ring 3: [`start`] takes over from the host, [`mod@panic`] tells the host about a
//! panic, [`registers`] are its port registers and the clock, [`platform`] and [`forbidden`] are for the guest program;
//! [`guest_main!`] puts them together.
//!
//! There are no interrupts, no exceptions (a fault ends the machine) and no thread-local storage.
#![no_std]

extern crate alloc;

pub mod forbidden;
pub mod heap;
pub mod identity;
pub mod memory;
pub mod panic;
pub mod platform;
pub mod registers;
pub mod start;

//! What a Rust program needs to run on a bare vCPU at ring 3.
//!
//! [`start`] takes over from the host and enters the program, [`memory`] stands in for the C library's
//! memory functions, [`heap`] is the allocator, [`mod@panic`] tells the host about a panic, [`registers`] are the
//! harness's port registers and the clock. A program names its entry with [`guest_main!`].
//!
//! There are no interrupts, no exceptions (a fault ends the machine, the harness reports it) and no
//! thread-local storage.
#![no_std]

pub mod forbidden;
pub mod heap;
pub mod memory;
pub mod panic;
pub mod platform;
pub mod registers;
pub mod start;

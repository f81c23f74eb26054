//! Accesses where there may be no memory.
//!
//! Instructions and not volatile pointers: to Rust, an access through a pointer to nothing is undefined, while an
//! instruction is what the processor makes of it, which here is an exit to the host.
#![expect(unsafe_code, reason = "assembly is unsafe")]

use core::arch::asm;

/// Reads 8 bytes at `address`, whatever is there.
#[must_use]
pub fn read(address: u64) -> u64 {
    let value;
    // SAFETY: one load, with no effect on anything the compiler knows of; without memory it ends in the host.
    unsafe {
        asm!("mov {value}, [{address}]", address = in(reg) address, value = out(reg) value,
             options(nostack, preserves_flags, readonly));
    }
    value
}

/// Writes 8 bytes at `address`, whatever is there. The caller names no memory that belongs to this program.
pub fn write(address: u64, value: u64) {
    // SAFETY: one store, to memory that no Rust object lives in: the callers write what they have read there, or
    // where a test of the host wants an access and no memory is. Without memory it ends in the host.
    unsafe {
        asm!("mov [{address}], {value}", address = in(reg) address, value = in(reg) value,
             options(nostack, preserves_flags));
    }
}

//! Ports of the processor.
#![expect(unsafe_code, reason = "port instructions")]

use core::arch::asm;

/// Reads a byte.
pub(crate) fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: no port this program names reads or writes memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    };
    value
}

/// Writes a byte.
pub(crate) fn write_u8(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    };
}

/// Reads 4 bytes.
pub(crate) fn read_u32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
    };
    value
}

/// Writes 4 bytes.
pub(crate) fn write_u32(port: u16, value: u32) {
    // SAFETY: as above, but for what a PCI device is told to do, which is its driver's.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    };
}

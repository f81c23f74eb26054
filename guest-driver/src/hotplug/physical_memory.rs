//! Access to physical memory.
#![expect(
    unsafe_code,
    reason = "the one place where a physical address becomes a pointer"
)]

use core::ptr::NonNull;

/// Turns physical addresses into pointers: the identity in a kernel that maps memory one to one, an offset in
/// the process that simulates one.
///
/// # Safety
///
/// While a page is allocated, and while another is being moved into it or out of it, the pointer to it must be valid
/// for reads and writes of the whole page, stay the same, and name memory no other page's pointer names. Pages that are
/// withheld, reserved, holes or metadata are never asked for.
pub unsafe trait PhysicalMemory {
    /// A pointer to the page at `address`.
    fn page(&self, address: u64) -> NonNull<u8>;
}

/// Copies the page at `from` to the page at `to`.
///
/// # Safety
///
/// Both must be addresses of online pages of `page_size` bytes, two different ones. Nobody else may access
/// either of them during the call.
pub(super) unsafe fn copy_page(memory: &impl PhysicalMemory, from: u64, to: u64, page_size: u64) {
    let from = memory.page(from);
    let to = memory.page(to);
    // SAFETY: By the trait's contract both pointers are valid for a page, and distinct because the caller
    // promises two pages; it also promises that there is no concurrent access.
    unsafe { to.copy_from_nonoverlapping(from, page_size as usize) };
}

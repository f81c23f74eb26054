//! The heap: the boot memory the host left to the guest.
#![expect(
    unsafe_code,
    reason = "the allocator is handed raw memory, and DMA memory leaves it as raw memory"
)]

use core::alloc::Layout;
use core::ptr::NonNull;

use linked_list_allocator::LockedHeap;

use crate::identity::address;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Gives the heap its memory.
///
/// # Safety
///
/// The `size` bytes at `start` are mapped there, and nobody else uses them. Nothing has been allocated yet.
pub unsafe fn init(start: u64, size: u64) {
    let start = core::ptr::with_exposed_provenance_mut(address(start));
    // SAFETY: the caller's promise.
    unsafe { HEAP.lock().init(start, address(size)) };
}

/// `layout` bytes of zeroed memory; `None` if the heap is full.
#[must_use]
pub fn allocate_zeroed(layout: Layout) -> Option<NonNull<u8>> {
    let memory = HEAP.lock().allocate_first_fit(layout).ok()?;
    // SAFETY: the heap has just handed out this many bytes.
    unsafe { memory.write_bytes(0, layout.size()) };
    Some(memory)
}

/// Gives back what [`allocate_zeroed`] returned for the same `layout`.
///
/// # Safety
///
/// `memory` came from [`allocate_zeroed`] with `layout`, and nobody uses it any more.
pub unsafe fn free(memory: NonNull<u8>, layout: Layout) {
    // SAFETY: the caller's promise is the one asked for here.
    unsafe { HEAP.lock().deallocate(memory, layout) };
}

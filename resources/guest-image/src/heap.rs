//! The heap: the boot memory the host left to the guest.
#![expect(
    unsafe_code,
    reason = "the allocator is handed raw memory, and DMA memory leaves it as raw memory"
)]

use core::alloc::Layout;
use core::ptr::NonNull;

use linked_list_allocator::LockedHeap;
use vmem_guest::abi::BootInfo;

use crate::registers;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Gives the heap its memory. Called once, by vCPU 0, before anything allocates.
pub(crate) fn init(boot: &BootInfo) {
    let start = core::ptr::with_exposed_provenance_mut(registers::address(boot.heap_start));
    // SAFETY: the host has set this memory aside for the heap and for nothing else, and `start::enter` calls
    // this once.
    unsafe { HEAP.lock().init(start, registers::address(boot.heap_size)) };
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

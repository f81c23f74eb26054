//! Physical memory where all of it is mapped one to one.
#![expect(
    unsafe_code,
    reason = "physical addresses become pointers, and `Hal` and `PhysicalMemory` are unsafe traits"
)]

use core::alloc::Layout;
use core::ptr::{self, NonNull};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use virtio_mem_driver::hotplug::PhysicalMemory;

use crate::heap;

/// `address` as the pointer-sized number it is on this machine.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the image is built for x86-64 only, where usize has 64 bits"
)]
pub const fn address(address: u64) -> usize {
    address as usize
}

/// A pointer to `address`, which is not 0: nothing is mapped there.
pub(crate) fn pointer(address: u64) -> NonNull<u8> {
    NonNull::new(ptr::with_exposed_provenance_mut(self::address(address)))
        .expect("nobody asks for address 0")
}

/// Physical memory, mapped one to one.
#[derive(Clone, Copy, Debug)]
pub struct IdentityMapped;

// SAFETY: the page tables map boot memory and the device-managed region one to one, and plugged blocks, where online
// pages are, have memory behind them.
unsafe impl PhysicalMemory for IdentityMapped {
    fn page(&self, address: u64) -> NonNull<u8> {
        pointer(address)
    }
}

/// DMA memory from the heap, which is boot memory mapped one to one.
#[derive(Debug)]
pub struct HeapHal;

fn pages(count: usize) -> Option<Layout> {
    let bytes = count.checked_mul(PAGE_SIZE)?;
    Layout::from_size_align(bytes, PAGE_SIZE).ok()
}

// SAFETY: `dma_alloc` hands out zeroed memory of the heap, aligned to pages; on failure it returns address 0,
// which virtio-drivers takes as one. Addresses are the same for the device and for the guest.
unsafe impl Hal for HeapHal {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match pages(count).and_then(heap::allocate_zeroed) {
            Some(memory) => (memory.as_ptr().expose_provenance() as u64, memory),
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, count: usize) -> i32 {
        let Some(layout) = pages(count) else {
            return -1;
        };
        // SAFETY: the caller promises that `memory` came from `dma_alloc` with the same number of pages.
        unsafe { heap::free(memory, layout) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        pointer(address)
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {
        // The device has worked on the buffer itself.
    }
}

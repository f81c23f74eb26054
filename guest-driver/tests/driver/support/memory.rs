//! The memory of the device region, as the guest reaches it: only where it is plugged.
#![expect(unsafe_code, reason = "host memory stands in for physical memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use virtio_mem_driver::hotplug::PhysicalMemory;
use virtio_mem_wire::BlockRange;

use super::device::Device;

/// Zeroed memory that the host only provides where it is touched.
#[derive(Debug)]
pub(crate) struct Region {
    allocation: NonNull<u8>,
    /// The first whole page of the allocation.
    start: NonNull<u8>,
    addr: u64,
    size: usize,
}

// SAFETY: Raw memory; who accesses it vouches for its accesses.
unsafe impl Send for Region {}
// SAFETY: As above.
unsafe impl Sync for Region {}

impl Region {
    pub(crate) fn new(addr: u64, size: u64) -> Self {
        let size = size as usize;
        // SAFETY: The layout is not empty.
        let allocation = NonNull::new(unsafe { alloc_zeroed(Self::layout(size)) }).unwrap();
        // SAFETY: The layout has a page to spare.
        let start = unsafe { allocation.add(allocation.align_offset(4096)) };
        Self {
            allocation,
            start,
            addr,
            size,
        }
    }

    /// Not aligned to pages: memory would be zeroed by touching all of it then.
    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size + 4096, 16).unwrap()
    }

    fn pointer(&self, address: u64) -> NonNull<u8> {
        let offset = (address - self.addr) as usize;
        assert!(offset < self.size);
        // SAFETY: The offset lies in the allocation.
        unsafe { self.start.add(offset) }
    }

    /// Whether the first page of each block, of which none is smaller, holds nothing but this byte.
    pub(crate) fn is_scribbled(&self, range: BlockRange, block_size: u64, with: u8) -> bool {
        (range.first..range.end()).all(|block| {
            let page = self.pointer(self.addr + block * block_size);
            // SAFETY: The page lies in the region; it was zeroed at first, and the block belongs to the device now.
            let bytes: [u8; 4096] = unsafe { page.cast().read() };
            bytes == [with; 4096]
        })
    }

    /// Overwrites the first page of each block, or all of a smaller one, as a device may when it (un)plugs it (D-17).
    pub(crate) fn scribble(&self, range: BlockRange, block_size: u64, with: u8) {
        for block in range.first..range.end() {
            let page = self.pointer(self.addr + block * block_size);
            // SAFETY: The page lies in the region, and the block belongs to the device now.
            unsafe { page.write_bytes(with, block_size.min(4096) as usize) };
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: Allocated with this layout.
        unsafe { dealloc(self.allocation.as_ptr(), Self::layout(self.size)) };
    }
}

/// Access to the region that panics where the device has nothing plugged (G-06, G-10).
#[derive(Clone, Debug)]
pub(crate) struct PluggedMemory(pub(crate) Arc<Device>);

// SAFETY: Each address of the region has its own memory, which lives as long as the device.
unsafe impl PhysicalMemory for PluggedMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        assert!(
            self.0.is_plugged(address),
            "g_06: {address:#x} is unplugged"
        );
        self.0.region.pointer(address)
    }
}

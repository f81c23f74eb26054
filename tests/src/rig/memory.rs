//! The guest's memory: of boot, and of the region.
#![expect(
    unsafe_code,
    reason = "`PhysicalMemory` is an unsafe trait: it turns addresses into pointers"
)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use virtio_mem_driver::hotplug::PhysicalMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_harness::BootMemory;
use vmm_harness::in_process::HostMemory;

/// Where DMA memory is: not at 0, which is no address to a driver.
pub const DMA: Range<u64> = 1 << 20..2 << 20;

/// Where memory of boot is that the hotplug core manages, if there is any. It begins and ends with a pageblock of
/// most architectures.
pub const BOOT_RAM: Range<u64> = 1 << 30..(1 << 30) + (64 << 20);

/// Memory of boot, and what of the region is plugged.
#[derive(Debug)]
pub struct GuestMemory {
    /// [`DMA`] and [`BOOT_RAM`].
    pub boot: Arc<BootMemory>,
    /// The region.
    pub region: HostMemory,
}

// SAFETY: both parts are mapped once, at one place, for as long as this lives, and apart from each other.
unsafe impl PhysicalMemory for GuestMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        if !BOOT_RAM.contains(&address) {
            return self.region.page(address);
        }
        let page = self.boot.get_host_address(GuestAddress(address));
        NonNull::new(page.expect("memory of boot")).expect("a mapping")
    }
}

//! The guest program's place on a bare vCPU: all memory mapped one to one.
#![expect(
    unsafe_code,
    reason = "physical addresses become pointers, and `Hal` and `PhysicalMemory` are unsafe traits"
)]

use core::alloc::Layout;
use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU64;

use virtio_drivers::transport::mmio::{MmioError, MmioTransport, VirtIOHeader};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use virtio_mem_driver::hotplug::PhysicalMemory;
use vmem_guest::Platform;
use vmem_guest::abi::{BootInfo, Mailbox};

use crate::{forbidden, heap, registers, start};

/// Bytes of virtio-mmio registers, with the configuration space.
const REGISTERS_LEN: usize = 0x1000;

/// A bare vCPU of the harness.
#[derive(Clone, Copy, Debug)]
pub struct BarePlatform {
    boot: &'static BootInfo,
}

impl BarePlatform {
    /// The place `boot` describes.
    #[must_use]
    pub fn new(boot: &'static BootInfo) -> Self {
        Self { boot }
    }

    /// The registers of the memory device.
    ///
    /// # Errors
    ///
    /// [`MmioError`] if there is no such device.
    pub fn transport(&self) -> Result<MmioTransport<'static>, MmioError> {
        let header = ptr::with_exposed_provenance_mut(registers::address(self.boot.virtio_mmio));
        let header = NonNull::<VirtIOHeader>::new(header).ok_or(MmioError::MmioRegionTooSmall)?;
        // SAFETY: the host maps a page of registers there for the guest's lifetime; nothing else uses it.
        unsafe { MmioTransport::new(header, REGISTERS_LEN) }
    }
}

/// A pointer to `address`, which is not 0: nothing is mapped there.
fn pointer(address: u64) -> NonNull<u8> {
    NonNull::new(ptr::with_exposed_provenance_mut(registers::address(
        address,
    )))
    .expect("nobody asks for address 0")
}

impl Platform for BarePlatform {
    type Hal = HeapHal;
    type Transport = MmioTransport<'static>;
    type Memory = IdentityMapped;

    fn memory(&self) -> IdentityMapped {
        IdentityMapped
    }

    fn mailbox(&self) -> &Mailbox {
        start::mailbox(self.boot)
    }

    fn view(&self) -> &[AtomicU64] {
        let words = pointer(self.boot.view).cast::<AtomicU64>();
        let words = NonNull::slice_from_raw_parts(words, registers::address(self.boot.view_words));
        // SAFETY: the host has set as many zeroed, aligned words aside there for the guest's lifetime.
        unsafe { words.as_ref() }
    }

    fn now_ms(&self) -> u64 {
        registers::now_ms()
    }

    fn wait(&self, deadline_ms: Option<u64>) {
        match deadline_ms {
            Some(deadline_ms) => registers::wait_until(self.boot, deadline_ms),
            None => registers::wait(self.boot),
        }
    }

    fn touch(&self, address: u64) {
        // What is there stays as it is.
        forbidden::write(address, forbidden::read(address));
    }
}

/// Physical memory, mapped one to one.
#[derive(Clone, Copy, Debug)]
pub struct IdentityMapped;

// SAFETY: the host's page tables map the device-managed region one to one, and plugged blocks, where online
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

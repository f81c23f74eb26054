//! DMA memory with addresses that are not pointers, so that mixing them up shows.
#![expect(unsafe_code, reason = "a Hal hands out raw memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// One allocation: where it lies in the process, as a number, and how long it is.
#[derive(Clone, Copy)]
struct Allocation {
    host: usize,
    pages: usize,
}

/// All live allocations, by physical address.
static ARENA: Mutex<BTreeMap<PhysAddr, Allocation>> = Mutex::new(BTreeMap::new());

/// The next physical address.
static NEXT: AtomicU64 = AtomicU64::new(0x10_0000);

/// A [`Hal`] over the process's heap. Sharing memory that is not DMA memory panics (G-08).
#[derive(Debug)]
pub(crate) struct FakeHal;

fn arena() -> MutexGuard<'static, BTreeMap<PhysAddr, Allocation>> {
    ARENA.lock().unwrap()
}

fn layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap()
}

/// Whether the page at `address` is allocated.
pub(crate) fn is_allocated(address: PhysAddr) -> bool {
    arena().contains_key(&address)
}

/// Whether `address` lies in an allocation.
pub(crate) fn is_inside(address: PhysAddr) -> bool {
    let arena = arena();
    let below = arena.range(..=address).next_back();
    below.is_some_and(|(start, a)| address < start + (a.pages * PAGE_SIZE) as u64)
}

/// Reads DMA memory as the device does.
pub(crate) fn read<const N: usize>(address: PhysAddr) -> [u8; N] {
    // SAFETY: `host` has checked that the bytes are allocated; the driver does not write them meanwhile.
    unsafe { host(address, N).cast::<[u8; N]>().read_unaligned() }
}

/// Writes DMA memory as the device does.
pub(crate) fn write(address: PhysAddr, bytes: &[u8]) {
    let to = host(address, bytes.len());
    // SAFETY: As for `read`.
    unsafe { to.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
}

fn host(address: PhysAddr, len: usize) -> NonNull<u8> {
    let arena = arena();
    let (start, allocation) = arena.range(..=address).next_back().expect("DMA address");
    let offset = (address - start) as usize;
    assert!(offset + len <= allocation.pages * PAGE_SIZE, "DMA address");
    NonNull::new((allocation.host + offset) as *mut u8).unwrap()
}

// SAFETY: Memory comes zeroed and page-aligned from the global allocator and is given back once.
unsafe impl Hal for FakeHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: The layout is not empty.
        let host = NonNull::new(unsafe { alloc_zeroed(layout(pages)) }).unwrap();
        // Never the same address twice, so that stale ones are noticed; a gap between any two.
        let len = ((pages + 1) * PAGE_SIZE) as u64;
        let address = NEXT.fetch_add(len, Ordering::Relaxed);
        arena().insert(
            address,
            Allocation {
                host: host.as_ptr() as usize,
                pages,
            },
        );
        (address, host)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        let allocation = arena().remove(&paddr).expect("allocated");
        assert_eq!(
            (allocation.host, allocation.pages),
            (vaddr.as_ptr() as usize, pages)
        );
        // SAFETY: Allocated with this layout, and out of the arena now.
        unsafe { dealloc(vaddr.as_ptr(), layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("no PCI here")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        let host = buffer.cast::<u8>().as_ptr() as usize;
        let arena = arena();
        let allocation = arena.iter().find(|(_, a)| {
            (a.host..a.host + a.pages * PAGE_SIZE - buffer.len() + 1).contains(&host)
        });
        let (address, allocation) = allocation.expect("g_08: only DMA memory is shared");
        address + (host - allocation.host) as u64
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

//! DMA memory of a guest in this process: pages of its boot memory.
//!
//! virtio-drivers asks for DMA memory through functions without a receiver, so the arena is a property of the
//! thread. What a driver keeps elsewhere, on its stack for instance, the device cannot reach: it is copied
//! into the arena and back.
#![expect(
    unsafe_code,
    reason = "DMA memory is raw memory, and `Hal` is an unsafe trait"
)]

use std::cell::RefCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use virtio_mem_wire::{BlockMap, BlockRange};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::BootMemory;
use crate::layout::PAGE;

thread_local! {
    static ARENA: RefCell<Option<Arc<Arena>>> = const { RefCell::new(None) };
}

/// Boot memory for DMA, handed out in pages.
#[derive(Debug)]
pub struct Arena {
    start: u64,
    len: u64,
    host_address: NonNull<u8>,
    taken: Mutex<BlockMap>,
    /// Keeps the pages where they are.
    _memory: Arc<BootMemory>,
}

// SAFETY: the address is that of memory which `_memory` keeps; the pages themselves are handed out one by one
// under the lock.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// The pages of `range`, which nothing else uses.
    ///
    /// # Errors
    ///
    /// It does not lie in one piece of boot memory.
    pub fn new(memory: &Arc<BootMemory>, range: Range<u64>) -> Result<Self, GuestMemoryError> {
        let start = range.start;
        let len = range.end.saturating_sub(start);
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let pages = memory.get_slice(GuestAddress(start), count)?;
        let host_address = pages.ptr_guard_mut().as_ptr();
        Ok(Self {
            start,
            len,
            host_address: NonNull::new(host_address)
                .ok_or(GuestMemoryError::HostAddressNotAvailable)?,
            taken: Mutex::new(BlockMap::new(len / PAGE)),
            _memory: Arc::clone(memory),
        })
    }

    /// Makes this the arena of the current thread.
    pub fn enter(self: &Arc<Self>) {
        ARENA.set(Some(Arc::clone(self)));
    }

    /// Pages that are handed out now.
    #[must_use]
    pub fn pages_taken(&self) -> u64 {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.count()
    }

    /// Zeroed pages in a row; their guest-physical address and where they are.
    fn allocate(&self, pages: u64) -> Option<(u64, NonNull<u8>)> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all = BlockRange {
            first: 0,
            count: taken.len(),
        };
        let first = taken
            .runs_in(all, false)
            .find(|run| run.count >= pages && pages > 0)?
            .first;
        taken.insert(BlockRange {
            first,
            count: pages,
        });
        let offset = usize::try_from(first * PAGE).ok()?;
        let len = usize::try_from(pages * PAGE).ok()?;
        // SAFETY: `first` and the pages after it lie inside the arena, so inside its mapping.
        let at = unsafe { self.host_address.add(offset) };
        // SAFETY: as above, and nobody else has these pages.
        unsafe { at.write_bytes(0, len) };
        Some((self.start + first * PAGE, at))
    }

    /// Gives pages back; false if they are not pages of the arena that are taken.
    fn free(&self, address: u64, pages: u64) -> bool {
        let Some(first) = address.checked_sub(self.start).map(|offset| offset / PAGE) else {
            return false;
        };
        let range = BlockRange {
            first,
            count: pages,
        };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let were_taken = pages > 0 && taken.count_in(range) == pages;
        taken.remove(range);
        were_taken
    }

    /// The guest-physical address of a buffer that lies in the arena.
    fn address_of(&self, buffer: NonNull<[u8]>) -> Option<u64> {
        let start = self.host_address.addr().get() as u64;
        let offset = (buffer.addr().get() as u64).checked_sub(start)?;
        let end = offset.checked_add(buffer.len() as u64)?;
        (end <= self.len).then_some(self.start + offset)
    }

    /// Where the VMM sees `address`, which is in the arena.
    fn host_address_of(&self, address: u64) -> Option<NonNull<u8>> {
        let offset = address
            .checked_sub(self.start)
            .filter(|offset| *offset < self.len)?;
        // SAFETY: inside the arena, so inside its mapping.
        Some(unsafe { self.host_address.add(usize::try_from(offset).ok()?) })
    }
}

fn pages_of(buffer: NonNull<[u8]>) -> u64 {
    (buffer.len() as u64).div_ceil(PAGE)
}

/// Calls `f` with the arena of this thread, if it has one.
fn with_arena<R>(f: impl FnOnce(&Arena) -> Option<R>) -> Option<R> {
    ARENA.with_borrow(|arena| arena.as_deref().and_then(f))
}

/// DMA memory from the arena of the current thread.
#[derive(Debug)]
pub struct ArenaHal;

// SAFETY: `dma_alloc` hands out pages of a mapping that the thread's arena keeps, aligned to pages because
// the arena is, zeroed, and never twice at a time; on failure it returns address 0, which virtio-drivers takes
// as one. There is no MMIO memory to hand out.
unsafe impl Hal for ArenaHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        with_arena(|arena| arena.allocate(pages as u64)).unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        match with_arena(|arena| Some(arena.free(address, pages as u64))) {
            Some(true) => 0,
            _ => -1,
        }
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        // For PCI only, which there is not.
        NonNull::dangling()
    }

    /// Without memory for a copy this is address 0, where the guest has nothing: the device will not find a
    /// request there that it could fulfil.
    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let share = |arena: &Arena| {
            if let Some(address) = arena.address_of(buffer) {
                return Some(address);
            }
            let (address, copy) = arena.allocate(pages_of(buffer))?;
            if direction != BufferDirection::DeviceToDriver {
                // SAFETY: the caller's buffer is valid for its length, the copy was allocated for as much, and
                // one is in the arena and the other is not.
                unsafe { copy.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
            }
            Some(address)
        };
        with_arena(share).unwrap_or(0)
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let unshare = |arena: &Arena| {
            if arena.address_of(buffer).is_some() {
                return None;
            }
            let copy = arena.host_address_of(address)?;
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: as in `share`, which returned this address for this buffer.
                unsafe { buffer.cast().copy_from_nonoverlapping(copy, buffer.len()) };
            }
            arena.free(address, pages_of(buffer)).then_some(())
        };
        // Nothing to do for a buffer of the arena.
        let _ = with_arena(unshare);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arc<Arena> {
        let memory = BootMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        Arc::new(Arena::new(&Arc::new(memory), 4 << 20..64 << 20).unwrap())
    }

    #[test]
    fn pages_are_zeroed_aligned_and_handed_out_once() {
        let arena = arena();
        let (first, at) = arena.allocate(3).unwrap();
        let (second, _) = arena.allocate(1).unwrap();
        assert_eq!((first % PAGE, second), (0, first + 3 * PAGE));
        assert_eq!(at.addr().get() % 4096, 0);
        // SAFETY: three pages were handed out there.
        unsafe { at.write_bytes(0xff, 3 * 4096) };
        assert!(arena.free(first, 3));
        assert!(!arena.free(first, 3));
        let (again, at) = arena.allocate(2).unwrap();
        assert_eq!(again, first);
        // SAFETY: two pages were handed out there.
        assert_eq!(unsafe { at.read() }, 0);
        assert_eq!(arena.allocate(1 << 40), None);
        assert_eq!(arena.allocate(0), None);
    }

    #[test]
    fn buffers_outside_the_arena_are_copied_there_and_back() {
        let arena = arena();
        arena.enter();
        let mut buffer = [7u8; 5000];
        let shared = NonNull::from(&mut buffer[..]);
        // SAFETY: a buffer of this function.
        let address = unsafe { ArenaHal::share(shared, BufferDirection::Both) };
        let copy = arena.host_address_of(address).unwrap();
        // SAFETY: the copy is as long as the buffer.
        let last = unsafe { copy.add(4999) };
        // SAFETY: the copy is there until it is unshared.
        assert_eq!(unsafe { last.read() }, 7);
        // SAFETY: as above.
        unsafe { copy.write(9) };
        // SAFETY: the address is the one `share` returned.
        unsafe { ArenaHal::unshare(address, shared, BufferDirection::Both) };
        assert_eq!((buffer[0], buffer[1]), (9, 7));
        assert_eq!(arena.taken.lock().unwrap().count(), 0);
    }

    #[test]
    fn thread_without_an_arena_gets_no_memory() {
        ARENA.set(None);
        assert_eq!(ArenaHal::dma_alloc(1, BufferDirection::Both).0, 0);
    }
}

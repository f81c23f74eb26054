//! The host's end of the mailbox, and the guest's view of the blocks.
//!
//! Everything here is written by a guest at any time. It is read through atomics, once, and checked.
#![expect(
    unsafe_code,
    reason = "the mailbox lies in memory the guest writes at the same time"
)]

use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_mem_driver::driver::{Mode, Strategy};
use virtio_mem_wire::{BlockMap, BlockRange};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileMemory};
use vmem_guest::abi::{self, DriverState, Mailbox, Shortfall, map};

use crate::BootMemory;
use crate::layout::Layout;
use crate::text::is_unfit;

/// Mailbox and view words of one guest. Keeps the memory they lie in.
#[derive(Clone, Debug)]
pub(crate) struct SharedMailbox {
    mailbox: NonNull<Mailbox>,
    views: Vec<NonNull<[AtomicU64]>>,
    _memory: Arc<BootMemory>,
}

// SAFETY: all pointers are to atomics in memory that lives as long as this; sharing them between threads is
// what atomics are for.
unsafe impl Send for SharedMailbox {}
// SAFETY: as above.
unsafe impl Sync for SharedMailbox {}

impl SharedMailbox {
    /// The mailbox and the views where `layout` puts them in `memory`.
    pub(crate) fn new(memory: &Arc<BootMemory>, layout: &Layout) -> Result<Self, GuestMemoryError> {
        let mailbox = host_pointer(memory, layout.mailbox, Mailbox::PAGES_LEN)?;
        let view = |view: &Range<u64>| {
            let len = view.end - view.start;
            let start = host_pointer(memory, view.start, len)?;
            let words =
                usize::try_from(len / 8).map_err(|_| GuestMemoryError::GuestAddressOverflow)?;
            Ok(NonNull::slice_from_raw_parts(start.cast(), words))
        };
        let views: Result<_, GuestMemoryError> = layout.views.iter().map(view).collect();
        Ok(Self {
            mailbox: mailbox.cast(),
            views: views?,
            _memory: Arc::clone(memory),
        })
    }

    /// The words of the guest's view of device `index`.
    pub(crate) fn view(&self, index: usize) -> &[AtomicU64] {
        // SAFETY: as many words of boot memory as the layout sets aside for this, aligned to a page; all
        // accesses to them, the guest's too, are atomic ones or the guest's own risk.
        unsafe { self.views[index].as_ref() }
    }
}

impl Deref for SharedMailbox {
    type Target = Mailbox;

    fn deref(&self) -> &Mailbox {
        // SAFETY: as in `view`; a mailbox is made of atomics and any bits are valid in it.
        unsafe { self.mailbox.as_ref() }
    }
}

/// Where the VMM sees `len` bytes at `address`, all of them.
fn host_pointer(
    memory: &BootMemory,
    address: u64,
    len: u64,
) -> Result<NonNull<u8>, GuestMemoryError> {
    let at = GuestAddress(address);
    let overflow = || GuestMemoryError::GuestAddressOverflow;
    let slice = memory.get_slice(at, usize::try_from(len).map_err(|_| overflow())?)?;
    at.checked_add(len).ok_or_else(overflow)?;
    NonNull::new(slice.as_volatile_slice().ptr_guard_mut().as_ptr())
        .ok_or(GuestMemoryError::HostAddressNotAvailable)
}

/// What the guest says about itself and one of its memory devices, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What the driver makes of the target; `None` if the guest wrote a state that does not exist.
    pub driver_state: Option<DriverState>,
    /// The target as the driver last read it, in bytes.
    pub requested_size: u64,
    /// Bytes the driver believes plugged.
    pub plugged_size: u64,
    /// The node the device's memory is on.
    pub node: u64,
    /// Bytes of hotplugged memory of that node that the guest's page allocator works with.
    pub online_size: u64,
    /// Pages moved out of memory that was being unplugged.
    pub pages_moved: u64,
    /// Interrupts the guest has taken.
    pub interrupts: u64,
    /// Requests the driver has sent.
    pub requests: u64,
    /// The driver's strategy.
    pub strategy: Strategy,
    /// The driver's mode.
    pub mode: Mode,
    /// Bytes the driver plugs or unplugs at least.
    pub granule_size: u64,
    /// Bytes between the target and what is plugged, once the driver has settled.
    pub unreachable: u64,
    /// Why they are out of reach; `None` if the guest wrote a reason that does not exist.
    pub unreachable_reason: Option<Shortfall>,
    /// What each worker has done, the vCPU index being the index.
    pub workers: Vec<WorkerReport>,
    /// The blocks the driver believes plugged. Bits beyond the region are left out.
    pub view: BlockMap,
    /// Why the driver failed, if it did.
    pub message: Option<String>,
}

/// What the guest does with the blocks of a device, as of the last report that was asked for with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockUse {
    /// The blocks the driver believes plugged.
    pub plugged: BlockMap,
    /// The blocks the guest's page allocator works with.
    pub online: BlockMap,
    /// Those of them in zone Movable.
    pub movable: BlockMap,
    /// The blocks online with a page that cannot be moved for now.
    pub pinned: BlockMap,
}

/// What one worker has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerReport {
    /// Pages allocated and filled with their tag.
    pub pages_written: u64,
    /// Pages read back in full and found right.
    pub pages_verified: u64,
    /// Pages read back and found wrong.
    pub pages_wrong: u64,
    /// Pages held now.
    pub pages_held: u64,
    /// Of these, pages that cannot be moved.
    pub pages_unmovable: u64,
    /// Slices of work done.
    pub slices: u64,
}

impl SharedMailbox {
    /// Copies everything about device `index`, for a guest with `vcpu_count` vCPUs and a region of `block_count`
    /// blocks.
    pub(crate) fn report(&self, index: usize, vcpu_count: usize, block_count: u64) -> Report {
        let driver = &self.drivers[index];
        let load = |field: &AtomicU64| field.load(Ordering::Relaxed);
        Report {
            driver_state: DriverState::from_value(driver.state.load(Ordering::Relaxed)),
            requested_size: load(&driver.requested_size),
            plugged_size: load(&driver.plugged_size),
            node: load(&driver.node),
            online_size: load(&driver.online_size),
            pages_moved: load(&self.pages_moved),
            interrupts: load(&self.interrupts),
            requests: load(&driver.requests),
            strategy: match load(&driver.driver) & abi::driver::LINUX {
                0 => Strategy::Direct,
                _ => Strategy::Linux,
            },
            mode: match load(&driver.driver) & abi::driver::BIG_BLOCK {
                0 => Mode::SubBlock,
                _ => Mode::BigBlock,
            },
            granule_size: load(&driver.granule_size),
            unreachable: load(&driver.unreachable),
            unreachable_reason: Shortfall::from_value(
                driver.unreachable_reason.load(Ordering::Relaxed),
            ),
            workers: self
                .workers
                .iter()
                .take(vcpu_count)
                .map(|worker| WorkerReport {
                    pages_written: load(&worker.pages_written),
                    pages_verified: load(&worker.pages_verified),
                    pages_wrong: load(&worker.pages_wrong),
                    pages_held: load(&worker.pages_held),
                    pages_unmovable: load(&worker.pages_unmovable),
                    slices: load(&worker.slices),
                })
                .collect(),
            view: self.map(index, map::PLUGGED, block_count),
            message: self.message(),
        }
    }

    /// What the guest does with the blocks of device `index`. Bits beyond the region are left out.
    pub(crate) fn block_use(&self, index: usize, block_count: u64) -> BlockUse {
        BlockUse {
            plugged: self.map(index, map::PLUGGED, block_count),
            online: self.map(index, map::ONLINE, block_count),
            movable: self.map(index, map::MOVABLE, block_count),
            pinned: self.map(index, map::PINNED, block_count),
        }
    }

    fn map(&self, index: usize, map: usize, block_count: u64) -> BlockMap {
        let view = self.view(index);
        let words = view.len() / map::COUNT;
        let words = view[map * words..].iter().take(words);
        block_map(words.map(|word| word.load(Ordering::Relaxed)), block_count)
    }

    /// The guest's message, if there is one, fit to be printed: what is not UTF-8 or would control a terminal
    /// is replaced.
    pub(crate) fn message(&self) -> Option<String> {
        let len = self.message_len.load(Ordering::Acquire) as usize;
        let bytes: Vec<u8> = self
            .message
            .iter()
            .take(len)
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect();
        let printable = |c: char| {
            // Nothing a guest says may move the cursor of whoever reads it.
            match c {
                '\n' | '\t' => ' ',
                c if is_unfit(c) => char::REPLACEMENT_CHARACTER,
                c => c,
            }
        };
        let text = String::from_utf8_lossy(&bytes);
        (!bytes.is_empty()).then(|| text.chars().map(printable).collect())
    }
}

/// The set whose bits are `words`, lowest bit first.
fn block_map(words: impl Iterator<Item = u64>, block_count: u64) -> BlockMap {
    let mut map = BlockMap::new(block_count);
    for (word, first) in words.zip((0..).step_by(64)) {
        let mut rest = word;
        while rest != 0 {
            let skip = rest.trailing_zeros();
            let count = (rest >> skip).trailing_ones();
            let first = first + u64::from(skip);
            map.insert(BlockRange {
                first,
                count: u64::from(count),
            });
            rest &= u64::MAX.checked_shl(skip + count).unwrap_or(0);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use virtio_mem_wire::Geometry;

    use super::*;
    use crate::layout::{IMAGE_START, REGION_START};

    #[test]
    fn view_words_become_the_same_set() {
        let words = [0, 1, 1 << 63, u64::MAX, 0xf0f0_0000_0000_0f0f, 0b1011];
        let map = block_map(words.into_iter(), 6 * 64 - 62);
        for block in 0..6 * 64 {
            let bit = words[block / 64] >> (block % 64) & 1 != 0 && block < 6 * 64 - 62;
            assert_eq!(map.contains(block as u64), bit, "{block}");
        }
    }

    #[test]
    fn what_a_hostile_guest_writes_is_cut_to_size() {
        let geometry = Geometry::new(REGION_START, 100 << 21, 2 << 20).unwrap();
        let layout = Layout::new(64 << 20, IMAGE_START, &[geometry], 2).unwrap();
        let memory = Arc::new(BootMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap());
        let mailbox = SharedMailbox::new(&memory, &layout).unwrap();
        assert_eq!(mailbox.message(), None);

        mailbox.message_len.store(u32::MAX, Ordering::Relaxed);
        for (cell, byte) in mailbox.message.iter().zip(*b"\xff\x1b[2J\n\xe2\x80\xaex") {
            cell.store(byte, Ordering::Relaxed);
        }
        let message = mailbox.message().unwrap();
        assert!(
            message.starts_with("\u{fffd}\u{fffd}[2J \u{fffd}x"),
            "{message:?}"
        );
        mailbox.drivers[0].state.store(77, Ordering::Relaxed);
        mailbox.view(0)[1].store(u64::MAX, Ordering::Relaxed);
        let report = mailbox.report(0, 2, 100);
        assert_eq!(report.driver_state, None);
        assert_eq!(report.view.count(), 36);
        // Each map of these blocks has two words.
        for (word, bits) in [(2, 0b1), (4, 0b10), (7, 0b1_0011)] {
            mailbox.view(0)[word].store(bits, Ordering::Relaxed);
        }
        let block_use = mailbox.block_use(0, 68);
        let run = |first, count| BlockRange { first, count };
        for (map, runs) in [
            (&block_use.plugged, run(64, 4)),
            (&block_use.online, run(0, 1)),
            (&block_use.movable, run(1, 1)),
            (&block_use.pinned, run(64, 2)),
        ] {
            assert_eq!(map.runs().collect::<Vec<_>>(), [runs]);
        }
    }
}

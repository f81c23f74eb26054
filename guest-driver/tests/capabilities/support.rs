//! Fixtures the capability tests share.
#![expect(unsafe_code, reason = "host memory stands in for physical memory")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use virtio_mem_driver::hotplug::{
    AddMemory, Boot, BootRange, Config, Error, Hotplug, OnlineType, PageHandle, PhysicalMemory,
    Profile,
};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// Words in a page of 64 KiB, the largest.
const WORDS: usize = 8192;

/// Physical memory of which only the pages that are touched exist.
#[derive(Debug, Default)]
pub(crate) struct SparseMemory(RefCell<BTreeMap<u64, NonNull<[u64; WORDS]>>>);

// SAFETY: Each address has its own allocation, which lives and stays where it is as long as the memory.
unsafe impl PhysicalMemory for SparseMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        let mut pages = self.0.borrow_mut();
        let page = pages.entry(address).or_insert_with(|| {
            let words = vec![0u64; WORDS].into_boxed_slice();
            NonNull::new(Box::into_raw(words).cast()).unwrap()
        });
        page.cast()
    }
}

impl Drop for SparseMemory {
    fn drop(&mut self) {
        for page in self.0.borrow().values() {
            // SAFETY: It was a box of exactly this, and nobody has a pointer to it any more.
            drop(unsafe { Box::from_raw(page.as_ptr()) });
        }
    }
}

/// The core under test.
pub(crate) type Machine = Hotplug<SparseMemory>;

/// A kernel without boot memory, with Linux's defaults.
pub(crate) fn bare(profile: Profile) -> Machine {
    Hotplug::new(profile, SparseMemory::default()).unwrap()
}

/// A kernel that finds RAM at these ranges of (start, end, node) when it starts.
pub(crate) fn booted(config: Config, ram: &[(u64, u64, u32)]) -> Machine {
    let ram = ram.iter().map(|(start, end, nid)| BootRange {
        bytes: *start..*end,
        nid: *nid,
    });
    let boot = Boot {
        ram: ram.collect(),
        ..Boot::default()
    };
    Hotplug::boot(config, &boot, SparseMemory::default()).unwrap()
}

/// Adds memory blocks on node 0 and brings them online.
pub(crate) fn add_online(machine: &mut Machine, start: u64, size: u64, online_type: OnlineType) {
    machine.add_memory(&AddMemory::new(start, size)).unwrap();
    let block = machine.profile().memory_block_size();
    for id in start / block..(start + size) / block {
        machine.online(id, online_type).unwrap();
    }
}

/// Writes a tag over a page.
pub(crate) fn write(machine: &mut Machine, page: PageHandle, tag: u64) {
    let words = machine.profile().page_size() as usize / 8;
    let first = machine.pin(page).unwrap().cast::<u64>();
    for index in 0..words {
        // SAFETY: The page has this many words.
        let word = unsafe { first.add(index) };
        // SAFETY: The page is pinned, and nothing else runs.
        unsafe { word.write(tag) };
    }
    machine.unpin(page).unwrap();
}

/// The tag all of a page holds.
pub(crate) fn read(machine: &mut Machine, page: PageHandle) -> u64 {
    let words = machine.profile().page_size() as usize / 8;
    let first = machine.pin(page).unwrap().cast::<u64>();
    let words: Vec<u64> = (0..words)
        .map(|index| {
            // SAFETY: The page has this many words.
            let word = unsafe { first.add(index) };
            // SAFETY: The page is pinned, and nothing else runs.
            unsafe { word.read() }
        })
        .collect();
    machine.unpin(page).unwrap();
    assert!(words.iter().all(|word| *word == words[0]), "a page is torn");
    words[0]
}

/// Lets the machine's uevents be looked at: each as Linux names it, `online memory37`.
pub(crate) fn uevents(machine: &mut Machine) -> Arc<Mutex<Vec<String>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    machine.set_uevent_sink(Box::new(move |event| {
        sink.lock().unwrap().push(event.to_string());
    }));
    events
}

/// What must hold at any time.
pub(crate) fn check(machine: &Machine) {
    assert_eq!(machine.check_invariants(), Ok(()));
}

/// `operation` is refused with `error`, and nothing has changed.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(
    machine: &mut Machine,
    error: Error,
    operation: impl FnOnce(&mut Machine) -> Result<T, Error>,
) {
    let before = machine.snapshot();
    assert_eq!(operation(machine).unwrap_err(), error);
    assert_eq!(machine.snapshot(), before);
    check(machine);
}

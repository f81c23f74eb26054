//! A small machine: 4 KiB pages, four to a pageblock, memory blocks of two sections and 128 KiB.
#![expect(unsafe_code, reason = "host memory stands in for physical memory")]

use std::cell::UnsafeCell;
use std::ptr::NonNull;

use virtio_mem_driver::hotplug::{Hotplug, PageHandle, PhysicalMemory, Profile};

pub(crate) const SMALL: Profile = Profile {
    page_shift: 12,
    pageblock_shift: 14,
    sub_section_shift: 13,
    section_shift: 16,
    memory_block_shift: 17,
    ..Profile::X86_64
};
pub(crate) const PAGE: u64 = 1 << 12;
pub(crate) const PAGEBLOCK: u64 = 1 << 14;
pub(crate) const BLOCK: u64 = 1 << 17;

/// Where the memory begins, and how many memory blocks it has.
pub(crate) const START: u64 = 5 * BLOCK;
pub(crate) const BLOCK_COUNT: u64 = 4;

/// One 4 KiB page.
type Page = UnsafeCell<[u64; 512]>;

#[derive(Debug)]
pub(crate) struct HostMemory(Vec<Page>);

impl HostMemory {
    pub(crate) fn new() -> Self {
        let pages = BLOCK_COUNT * BLOCK / PAGE;
        Self((0..pages).map(|_| UnsafeCell::new([0; 512])).collect())
    }
}

// SAFETY: Each address has its own cell, which lives as long as the memory.
unsafe impl PhysicalMemory for HostMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        let index = (address - START) / PAGE;
        NonNull::new(self.0[index as usize].get()).unwrap().cast()
    }
}

/// Fills a page with a tag.
pub(crate) fn write(hotplug: &mut Hotplug<HostMemory>, page: PageHandle, tag: u64) {
    let words = hotplug.pin(page).unwrap().cast::<[u64; 512]>();
    // SAFETY: The page is pinned, and nothing else runs.
    unsafe { words.write([tag; 512]) };
    hotplug.unpin(page).unwrap();
}

/// The tag a page is filled with.
pub(crate) fn read(hotplug: &mut Hotplug<HostMemory>, page: PageHandle) -> u64 {
    let words = hotplug.pin(page).unwrap().cast::<[u64; 512]>();
    // SAFETY: The page is pinned, and nothing else runs.
    let words = unsafe { words.read() };
    hotplug.unpin(page).unwrap();
    assert!(words.iter().all(|word| *word == words[0]), "a page is torn");
    words[0]
}

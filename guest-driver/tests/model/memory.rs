//! Physical memory of which only the pages that are touched exist, and what is written into them.
#![expect(unsafe_code, reason = "host memory stands in for physical memory")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;

use virtio_mem_driver::hotplug::{Hotplug, PageHandle, PhysicalMemory};

/// The core under test.
pub(crate) type Machine = Hotplug<SparseMemory>;

/// Words in a page of 64 KiB, the largest.
const MOST_WORDS: usize = 8192;

/// Pages by address, each of the size the profile says.
#[derive(Debug)]
pub(crate) struct SparseMemory {
    words: usize,
    pages: RefCell<HashMap<u64, NonNull<u64>>>,
}

impl SparseMemory {
    pub(crate) fn new(page_size: u64) -> Self {
        let words = page_size as usize / size_of::<u64>();
        assert!(words <= MOST_WORDS);
        Self {
            words,
            pages: RefCell::default(),
        }
    }
}

// SAFETY: Each address has its own allocation, which lives and stays where it is as long as the memory.
unsafe impl PhysicalMemory for SparseMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        let mut pages = self.pages.borrow_mut();
        let page = pages.entry(address).or_insert_with(|| {
            let words = vec![0u64; self.words].into_boxed_slice();
            NonNull::new(Box::into_raw(words).cast()).expect("a box is not null")
        });
        page.cast()
    }
}

impl Drop for SparseMemory {
    fn drop(&mut self) {
        for page in self.pages.borrow().values() {
            let words = std::ptr::slice_from_raw_parts_mut(page.as_ptr(), self.words);
            // SAFETY: It was a box of exactly this, and nobody has a pointer to it any more.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

/// The words of a page that carry its tag: a copy that stops early or begins late loses one.
fn marked_words(machine: &Machine) -> [usize; 3] {
    let words = machine.profile().page_size() as usize / size_of::<u64>();
    [0, words / 2, words - 1]
}

/// Writes a tag into a page.
pub(crate) fn write_tag(machine: &mut Machine, page: PageHandle, tag: u64) {
    let first = machine
        .pin(page)
        .expect("the page is allocated")
        .cast::<u64>();
    for index in marked_words(machine) {
        // SAFETY: The page has more words than this.
        let word = unsafe { first.add(index) };
        // SAFETY: The page is pinned, and nothing else runs.
        unsafe { word.write(tag) };
    }
    machine.unpin(page).expect("it has just been pinned");
}

/// The tag in a page, if it is the same everywhere.
pub(crate) fn read_tag(machine: &mut Machine, page: PageHandle) -> Option<u64> {
    let first = machine
        .pin(page)
        .expect("the page is allocated")
        .cast::<u64>();
    let [tag, middle, last] = marked_words(machine).map(|index| {
        // SAFETY: The page has more words than this.
        let word = unsafe { first.add(index) };
        // SAFETY: The page is pinned, and nothing else runs.
        unsafe { word.read() }
    });
    machine.unpin(page).expect("it has just been pinned");
    (tag == middle && tag == last).then_some(tag)
}

//! Memory hotplug: sections, memory blocks, their pages, and how pages in use are moved out of the way.
//!
//! A first, honest bookkeeping with Linux's words and order: memory is [added](Hotplug::add_memory) in whole
//! memory blocks, becomes allocatable when a block is brought [online](Hotplug::online), and leaves the other
//! way round. It knows nothing of virtio. Not here yet: zones, nodes, notifiers, the cost of page metadata,
//! device memory, boot memory.
//!
//! Pages are allocated lowest address first, because memory is unplugged from high to low. The user of a
//! movable page holds a [`PageHandle`] and pins it around each access; a page that is not pinned may be moved,
//! with its contents, at any other time.
//!
//! Emptying a range takes time, so it is an [`Isolation`] that is worked on in bounded steps:
//! [`isolate`](Hotplug::isolate), [`migrate`](Hotplug::migrate) until nothing is left, then
//! [`commit`](Hotplug::commit) or [`cancel`](Hotplug::cancel).

use alloc::collections::{BTreeMap, BTreeSet};
use core::fmt;
use core::ops::Range;

mod allocator;
mod error;
mod handle;
mod invariants;
mod isolation;
mod memory_block;
mod physical_memory;
mod profile;
mod section;

pub use error::Error;
pub use handle::{Mobility, PageHandle};
pub use isolation::{Isolation, Migration};
pub use memory_block::BlockState;
pub use physical_memory::PhysicalMemory;
pub use profile::Profile;

use handle::Handles;
use section::Section;

/// Pages of hotplugged memory, by what the page allocator makes of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of online memory blocks.
    pub present: u64,
    /// Present pages the allocator works with: not those withheld because they are unplugged.
    pub managed: u64,
    /// Managed pages nobody has allocated.
    pub free: u64,
    /// Free pages that can be allocated: not in a pageblock that is being emptied.
    pub allocatable: u64,
}

/// What has been done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Pages moved to make room.
    pub pages_migrated: u64,
    /// Times a page could not be moved because it was pinned.
    pub pages_pinned: u64,
}

/// The memory that was added after boot, and its pages.
pub struct Hotplug<M> {
    profile: Profile,
    memory: M,
    /// State of each memory block, by id.
    blocks: BTreeMap<u64, BlockState>,
    /// Each section that is present, by number.
    sections: BTreeMap<u64, Section>,
    /// Numbers of the pageblocks that have free pages and are not isolated.
    allocatable: BTreeSet<u64>,
    handles: Handles,
    counts: PageCounts,
    statistics: Statistics,
}

impl<M> fmt::Debug for Hotplug<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither pages nor handles: there are thousands.
        f.debug_struct("Hotplug")
            .field("profile", &self.profile)
            .field("blocks", &self.blocks)
            .field("counts", &self.counts)
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// No memory yet.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the sizes of `profile` do not fit into each other.
    pub fn new(profile: Profile, memory: M) -> Result<Self, Error> {
        profile.check()?;
        Ok(Self {
            profile,
            memory,
            blocks: BTreeMap::new(),
            sections: BTreeMap::new(),
            allocatable: BTreeSet::new(),
            handles: Handles::default(),
            counts: PageCounts::default(),
            statistics: Statistics::default(),
        })
    }

    /// The sizes in use.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Pages by what the allocator makes of them.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// What has been done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The pageblocks of the byte range, which must be aligned to them and not empty.
    fn pageblocks(&self, start: u64, size: u64) -> Result<Range<u64>, Error> {
        self.units(start, size, self.profile.pageblock_shift)
    }

    /// The units of `1 << shift` bytes in a byte range made of whole ones.
    fn units(&self, start: u64, size: u64, shift: u32) -> Result<Range<u64>, Error> {
        let end = start.checked_add(size).ok_or(Error::Invalid)?;
        let aligned = (start | size).trailing_zeros() >= shift;
        (aligned && size > 0)
            .then_some(start >> shift..end >> shift)
            .ok_or(Error::Invalid)
    }

    /// The section a pageblock lies in, and the pageblock's index in it.
    fn locate(&self, pageblock: u64) -> (u64, usize) {
        let shift = self.profile.section_shift - self.profile.pageblock_shift;
        let index = pageblock & ((1 << shift) - 1);
        (pageblock >> shift, index as usize)
    }

    /// The section that contains a page frame, and the page's index in it.
    fn locate_page(&self, pfn: u64) -> (u64, u32) {
        let shift = self.profile.section_shift - self.profile.page_shift;
        let index = pfn & ((1 << shift) - 1);
        (pfn >> shift, index as u32)
    }

    fn pfn(&self, section: u64, page: u32) -> u64 {
        let shift = self.profile.section_shift - self.profile.page_shift;
        (section << shift) + u64::from(page)
    }

    fn pageblock_of(&self, pfn: u64) -> u64 {
        pfn >> (self.profile.pageblock_shift - self.profile.page_shift)
    }

    /// The section of a pageblock that is known to be present, and the pageblock's index in it.
    fn present(&self, pageblock: u64) -> (&Section, usize) {
        let (number, index) = self.locate(pageblock);
        let section = self.sections.get(&number);
        (section.expect("the pageblock is present"), index)
    }

    fn present_mut(&mut self, pageblock: u64) -> (&mut Section, usize) {
        let (number, index) = self.locate(pageblock);
        let section = self.sections.get_mut(&number);
        (section.expect("the pageblock is present"), index)
    }

    /// Gives every page of an offline pageblock of an online section to the allocator.
    fn release_pageblock(&mut self, pageblock: u64) {
        let (section, index) = self.present_mut(pageblock);
        section.set_free(index);
        let pages = u64::from(self.profile.pageblock_pages());
        self.counts.managed += pages;
        self.counts.free += pages;
        self.counts.allocatable += pages;
        self.allocatable.insert(pageblock);
    }

    /// Takes every page of an isolated pageblock, none of them held, from the allocator.
    fn withhold_pageblock(&mut self, pageblock: u64) {
        let (section, index) = self.present_mut(pageblock);
        let free = u64::from(section.pageblocks[index].free);
        section.set_offline(index);
        section.pageblocks[index].isolated = false;
        self.counts.managed -= free;
        self.counts.free -= free;
    }
}

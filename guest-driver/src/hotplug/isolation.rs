//! Emptying a range: isolate its pageblocks, move what is in use, take the pages or undo everything.
//!
//! Linux: `start_isolate_page_range`, `migrate_pages`, `undo_isolate_page_range`; `alloc_contig_range` and
//! `offline_pages` are made of these.
#![expect(
    unsafe_code,
    reason = "the contents of a page are copied when it is moved"
)]

use core::ops::Range;

use super::physical_memory::copy_page;
use super::section::Page;
use super::{BlockState, Error, Hotplug, PhysicalMemory};

/// How often a range is gone through before pinned pages in it are reported.
const PASSES: u32 = 5;

/// A range that is being emptied: its free pages are not allocated.
///
/// Must be given back with [`Hotplug::commit`] or [`Hotplug::cancel`].
#[must_use = "the range stays isolated until it is committed or cancelled"]
#[derive(Debug)]
pub struct Isolation {
    purpose: Purpose,
    pageblocks: Range<u64>,
    /// The next page to look at.
    cursor: u64,
    /// Whether this pass left pages behind.
    blocked: bool,
    passes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The pages are taken from the allocator.
    Take,
    /// The memory block goes offline.
    Offline(u64),
}

/// How far [`Hotplug::migrate`] has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migration {
    /// There may be pages left.
    More,
    /// The range is empty.
    Done,
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// Starts to empty `[start, start + size)` so that its pages can be taken from the allocator.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of whole pageblocks of online memory; [`Error::Busy`] if a
    /// page in it can never be moved or is withheld already, or a pageblock is being emptied by someone else;
    /// [`Error::NoMemory`] if there are not enough pages elsewhere.
    pub fn isolate(&mut self, start: u64, size: u64) -> Result<Isolation, Error> {
        let pageblocks = self.pageblocks(start, size)?;
        self.start_isolation(pageblocks, Purpose::Take)
    }

    /// Starts to empty memory block `id` so that it can go offline.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block or it is not online; otherwise like
    /// [`isolate`](Self::isolate), but withheld pages do not matter.
    pub fn isolate_block(&mut self, id: u64) -> Result<Isolation, Error> {
        if self.block_state(id) != Some(BlockState::Online) {
            return Err(Error::Invalid);
        }
        let pageblocks = self.pageblocks_of_block(id);
        let isolation = self.start_isolation(pageblocks, Purpose::Offline(id))?;
        self.set_block_state(id, BlockState::GoingOffline);
        Ok(isolation)
    }

    /// Moves at most `max_pages` pages out of the range.
    ///
    /// Pinned pages are passed over and looked at again in the next pass, five times.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if pages are still pinned after the last pass, [`Error::NoMemory`] if there is no page to
    /// move one to. The range stays isolated; the caller cancels.
    pub fn migrate(
        &mut self,
        isolation: &mut Isolation,
        max_pages: u32,
    ) -> Result<Migration, Error> {
        let pages = u64::from(self.profile.pageblock_pages());
        let end = isolation.pageblocks.end * pages;
        let mut budget = max_pages;
        while isolation.cursor < end {
            let (section, pageblock) = self.present(self.pageblock_of(isolation.cursor));
            if section.held_pages(pageblock) == 0 {
                isolation.cursor = (isolation.cursor / pages + 1) * pages;
                continue;
            }
            let (_, page) = self.locate_page(isolation.cursor);
            if let Page::Held { handle } = section.page(page) {
                if budget == 0 {
                    return Ok(Migration::More);
                }
                budget -= 1;
                isolation.blocked |= !self.migrate_page(isolation.cursor, handle)?;
            }
            isolation.cursor += 1;
        }
        if !isolation.blocked {
            return Ok(Migration::Done);
        }
        isolation.passes += 1;
        if isolation.passes == PASSES {
            return Err(Error::Busy);
        }
        isolation.cursor = isolation.pageblocks.start * pages;
        isolation.blocked = false;
        Ok(Migration::More)
    }

    /// Takes the emptied range: its pages are withheld, or its memory block is offline.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if it is not empty yet; everything is undone then.
    pub fn commit(&mut self, isolation: Isolation) -> Result<(), Error> {
        let mut pageblocks = isolation.pageblocks.clone();
        let in_use = pageblocks.any(|pageblock| {
            let (section, index) = self.present(pageblock);
            section.held_pages(index) > 0
        });
        if in_use {
            self.cancel(isolation);
            return Err(Error::Busy);
        }
        for pageblock in isolation.pageblocks {
            self.withhold_pageblock(pageblock);
        }
        if let Purpose::Offline(id) = isolation.purpose {
            self.set_block_offline(id);
        }
        Ok(())
    }

    /// Lets the pages of the range be allocated again. Pages that were moved stay where they are.
    pub fn cancel(&mut self, isolation: Isolation) {
        for pageblock in isolation.pageblocks {
            let (section, index) = self.present_mut(pageblock);
            let counts = &mut section.pageblocks[index];
            counts.isolated = false;
            let free = counts.free;
            if free > 0 {
                self.allocatable.insert(pageblock);
                self.counts.allocatable += u64::from(free);
            }
        }
        if let Purpose::Offline(id) = isolation.purpose {
            self.set_block_state(id, BlockState::Online);
        }
    }

    /// Takes the pages of `[start, start + size)` from the allocator, moving what is in use (Linux:
    /// `alloc_contig_range` and `PageOffline`).
    ///
    /// # Errors
    ///
    /// Those of [`isolate`](Self::isolate) and [`migrate`](Self::migrate). Everything is undone then, but pages
    /// that were moved stay where they are.
    pub fn fake_offline(&mut self, start: u64, size: u64) -> Result<(), Error> {
        let isolation = self.isolate(start, size)?;
        self.empty(isolation)
    }

    /// Gives the withheld pages of `[start, start + size)` to the allocator. Their contents are undefined (G-12).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of whole pageblocks of online memory, all withheld.
    pub fn fake_online(&mut self, start: u64, size: u64) -> Result<(), Error> {
        let pageblocks = self.pageblocks(start, size)?;
        let pages = self.profile.pageblock_pages();
        let withheld = pageblocks.clone().all(|pageblock| {
            let (number, index) = self.locate(pageblock);
            self.sections.get(&number).is_some_and(|section| {
                let counts = &section.pageblocks[index];
                section.online && counts.offline == pages && !counts.isolated
            })
        });
        if !withheld {
            return Err(Error::Invalid);
        }
        for pageblock in pageblocks {
            self.release_pageblock(pageblock);
        }
        Ok(())
    }

    fn start_isolation(
        &mut self,
        pageblocks: Range<u64>,
        purpose: Purpose,
    ) -> Result<Isolation, Error> {
        let mut held = 0;
        let mut free = 0;
        for pageblock in pageblocks.clone() {
            let (number, index) = self.locate(pageblock);
            let section = self.sections.get(&number).filter(|s| s.online);
            let section = section.ok_or(Error::Invalid)?;
            let counts = &section.pageblocks[index];
            let taken = purpose == Purpose::Take && counts.offline > 0;
            if counts.isolated || counts.unmovable > 0 || taken {
                return Err(Error::Busy);
            }
            held += u64::from(section.held_pages(index));
            free += u64::from(counts.free);
        }
        if held > self.counts.allocatable - free {
            return Err(Error::NoMemory);
        }
        for pageblock in pageblocks.clone() {
            let (section, index) = self.present_mut(pageblock);
            section.pageblocks[index].isolated = true;
            self.allocatable.remove(&pageblock);
        }
        self.counts.allocatable -= free;
        Ok(Isolation {
            purpose,
            cursor: pageblocks.start * u64::from(self.profile.pageblock_pages()),
            pageblocks,
            blocked: false,
            passes: 0,
        })
    }

    /// Moves one held page to where there is room; `false` if it is pinned.
    fn migrate_page(&mut self, from: u64, handle: u32) -> Result<bool, Error> {
        if self.handles.by_index(handle).is_pinned() {
            self.statistics.pages_pinned += 1;
            return Ok(false);
        }
        let to = self.take_page(handle)?;
        let page_shift = self.profile.page_shift;
        // SAFETY: Both frames are held by this handle, in online sections, and different, because `from` is
        // held while `to` was free. The handle is not pinned, and can only be pinned through the exclusive
        // reference we have, so nobody has a pointer to either.
        unsafe {
            copy_page(
                &self.memory,
                from << page_shift,
                to << page_shift,
                self.profile.page_size(),
            );
        }
        self.handles.move_to(handle, to);
        self.put_page(from);
        self.statistics.pages_migrated += 1;
        Ok(true)
    }
}

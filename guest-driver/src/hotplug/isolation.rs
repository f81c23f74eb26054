//! Emptying a range: isolate its pageblocks, move what is in use, take the pages or undo everything.
//!
//! Linux: `start_isolate_page_range`, `migrate_pages`, `undo_isolate_page_range`; `alloc_contig_range` and
//! `offline_pages` are made of these.
#![expect(
    unsafe_code,
    reason = "the contents of a page are copied when it is moved"
)]

use core::ops::Range;

use super::notifier::MemoryAction;
use super::page::{Memmap, Page};
use super::physical_memory::copy_page;
use super::{BlockState, Error, Hotplug, Mobility, PhysicalMemory, Step, ZoneKind};

/// How often a range is gone through before pinned pages in it are reported: where everything is supposed to be
/// movable, and elsewhere. Offlining tries as often as the former.
const PASSES_MOVABLE: u32 = 5;
const PASSES_KERNEL: u32 = 1;

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
    passes_left: u32,
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
    /// [`Error::Invalid`] if there is no such block, it is not online, is in several zones or has holes, or memory
    /// cannot be taken offline at all; whatever a notifier objects with; otherwise like [`isolate`](Self::isolate), but
    /// withheld and poisoned pages do not matter.
    pub fn isolate_block(&mut self, id: u64) -> Result<Isolation, Error> {
        let block = self.blocks.get(&id).copied().ok_or(Error::Invalid)?;
        let whole = block.ram_pages == self.block_pages();
        let possible = self.config.hot_remove && block.zone.is_some() && whole;
        if block.state != BlockState::Online || !possible {
            return Err(Error::Invalid);
        }
        let mut pageblocks = self.pageblocks_of_block(id);
        pageblocks.start = self.pageblock_of(self.pages_of_block(id).start + block.memmap_pages);
        let isolation = self.start_isolation(pageblocks, Purpose::Offline(id))?;
        self.set_block_state(id, BlockState::GoingOffline);
        let event = self.event(id, &block, MemoryAction::GoingOffline);
        if let Err(veto) = self.notifiers.ask(&event) {
            self.cancel(isolation);
            return Err(veto);
        }
        Ok(isolation)
    }

    /// Moves at most `max_pages` pages out of the range.
    ///
    /// Pinned pages are passed over and looked at again in the next pass, of which there are five in Movable and one in
    /// kernel zones.
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
        let pages = u64::from(self.config.profile.pageblock_pages());
        let end = isolation.pageblocks.end * pages;
        let mut budget = max_pages;
        while isolation.cursor < end {
            let pageblock = self.pageblock_of(isolation.cursor);
            let (memmap, index) = self.present(pageblock);
            let (_, page) = self.locate_page(isolation.cursor);
            let touched = memmap.touched_pages_of(index);
            if memmap.pageblocks[index].held == 0 || page >= touched.end {
                isolation.cursor = (pageblock + 1) * pages;
                continue;
            }
            if let Page::Held { handle } = memmap.page(page) {
                if budget == 0 {
                    return Ok(Migration::More);
                }
                budget -= 1;
                match self.migrate_away(isolation.cursor, handle)? {
                    Some(to) => {
                        self.handles.move_to(handle, to);
                        self.put_page(isolation.cursor, Mobility::Movable);
                    }
                    None => isolation.blocked = true,
                }
            }
            isolation.cursor += 1;
        }
        if !isolation.blocked {
            return Ok(Migration::Done);
        }
        isolation.passes_left = isolation.passes_left.saturating_sub(1);
        if isolation.passes_left == 0 {
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
    /// [`Error::Busy`] if it is not empty yet, or pages are to be taken and one of them broke meanwhile; everything is
    /// undone then.
    pub fn commit(&mut self, isolation: Isolation) -> Result<(), Error> {
        let takes = isolation.purpose == Purpose::Take;
        let in_use = isolation.pageblocks.clone().any(|pageblock| {
            let (memmap, index) = self.present(pageblock);
            let counts = &memmap.pageblocks[index];
            counts.held > 0 || (takes && counts.poisoned > 0)
        });
        let done = self.faults.reach(Step::Commit);
        let done = done.and(if in_use { Err(Error::Busy) } else { Ok(()) });
        if let Err(error) = done {
            self.cancel(isolation);
            return Err(error);
        }
        match isolation.purpose {
            Purpose::Take => self.set_withheld(isolation.pageblocks, true),
            Purpose::Offline(id) => self.set_block_offline(id),
        }
        Ok(())
    }

    /// Lets the pages of the range be allocated again. Pages that were moved stay where they are.
    pub fn cancel(&mut self, isolation: Isolation) {
        for pageblock in isolation.pageblocks {
            self.modify(pageblock, |memmap, index| {
                memmap.pageblocks[index].isolated = false;
            });
        }
        if let Purpose::Offline(id) = isolation.purpose {
            self.set_block_state(id, BlockState::Online);
            if let Some(block) = self.blocks.get(&id).copied() {
                let event = self.event(id, &block, MemoryAction::CancelOffline);
                self.notifiers.tell(&event);
            }
        }
    }

    /// Keeps the pages of `[start, start + size)` from the allocator, moving what is in use: the range is allocated in one
    /// piece and marked, and its memory block can still go offline (Linux: `alloc_contig_range` and `PageOffline`).
    ///
    /// Pages of offline memory blocks are kept from it once they go online.
    ///
    /// # Errors
    ///
    /// Those of [`isolate`](Self::isolate) and [`migrate`](Self::migrate). Everything is undone then, but pages
    /// that were moved stay where they are.
    pub fn fake_offline(&mut self, start: u64, size: u64) -> Result<(), Error> {
        let pageblocks = self.pageblocks(start, size)?;
        if self.state_of(&pageblocks)? == BlockState::Offline {
            let taken = |pageblock| self.is_withheld(pageblock) || self.holds_metadata(pageblock);
            if pageblocks.clone().any(taken) {
                return Err(Error::Busy);
            }
            self.set_withheld(pageblocks, true);
            return Ok(());
        }
        let isolation = self.isolate(start, size)?;
        self.empty(isolation)
    }

    /// Gives the withheld pages of `[start, start + size)` to the allocator, at once or when their memory block goes
    /// online. Their contents are undefined (G-12).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of whole pageblocks, all withheld, of memory blocks in one state.
    pub fn fake_online(&mut self, start: u64, size: u64) -> Result<(), Error> {
        let pageblocks = self.pageblocks(start, size)?;
        self.state_of(&pageblocks)?;
        if !pageblocks
            .clone()
            .all(|pageblock| self.is_withheld(pageblock))
        {
            return Err(Error::Invalid);
        }
        self.set_withheld(pageblocks, false);
        Ok(())
    }

    /// The state that all memory blocks of the range share.
    fn state_of(&self, pageblocks: &Range<u64>) -> Result<BlockState, Error> {
        let first = self.block_of_pageblock(pageblocks.start);
        let last = self.block_of_pageblock(pageblocks.end - 1);
        let state = self.block_state(first).ok_or(Error::Invalid)?;
        let same = (first..=last).all(|id| self.block_state(id) == Some(state));
        same.then_some(state).ok_or(Error::Invalid)
    }

    /// Whether a pageblock is withheld; one that is a hole in boot memory is not.
    fn is_withheld(&self, pageblock: u64) -> bool {
        let (number, index) = self.locate(pageblock);
        let memmap = self.sections.get(&number).and_then(|s| s.memmap.as_ref());
        memmap.is_some_and(|memmap| memmap.pageblocks[index].withheld)
    }

    /// Whether a pageblock holds the metadata of its own memory block, or will when that is online.
    pub(super) fn holds_metadata(&self, pageblock: u64) -> bool {
        let id = self.block_of_pageblock(pageblock);
        self.blocks.get(&id).is_some_and(|block| {
            let first = self.pages_of_block(id).start;
            pageblock < self.pageblock_of(first + block.memmap_pages)
        })
    }

    /// Takes emptied pageblocks from the allocator or gives withheld ones to it.
    fn set_withheld(&mut self, pageblocks: Range<u64>, withheld: bool) {
        for pageblock in pageblocks {
            self.modify(pageblock, |memmap, index| {
                memmap.pageblocks[index].withheld = withheld;
                // What is given back into a memory block that is going offline stays isolated.
                memmap.pageblocks[index].isolated &= !withheld;
                if memmap.pageblocks[index].zone.is_some() {
                    let state = match withheld {
                        true => Page::Withheld,
                        false => Page::Free { next: None },
                    };
                    memmap.fill(index, state);
                }
            });
        }
    }

    fn start_isolation(
        &mut self,
        pageblocks: Range<u64>,
        purpose: Purpose,
    ) -> Result<Isolation, Error> {
        self.faults.reach(Step::Isolate)?;
        let mut held = 0;
        let mut free = 0;
        let mut passes = PASSES_MOVABLE;
        for pageblock in pageblocks.clone() {
            let (number, index) = self.locate(pageblock);
            let section = self.sections.get(&number).filter(|s| s.online);
            let memmap = section.and_then(|section| section.memmap.as_ref());
            let memmap = memmap.ok_or(Error::Invalid)?;
            let counts = &memmap.pageblocks[index];
            let zone = counts.zone.ok_or(Error::Invalid)?;
            if counts.isolated || !can_be_emptied(memmap, index, purpose) {
                return Err(Error::Busy);
            }
            if zone.kind != ZoneKind::Movable && purpose == Purpose::Take {
                passes = PASSES_KERNEL;
            }
            held += u64::from(counts.held);
            free += u64::from(counts.free);
        }
        let allocatable = self.counts().allocatable;
        if held > allocatable - free {
            return Err(Error::NoMemory);
        }
        for pageblock in pageblocks.clone() {
            self.modify(pageblock, |memmap, index| {
                memmap.pageblocks[index].isolated = true;
            });
        }
        Ok(Isolation {
            purpose,
            cursor: pageblocks.start * u64::from(self.config.profile.pageblock_pages()),
            pageblocks,
            blocked: false,
            passes_left: passes,
        })
    }

    /// Copies a held page to where there is room, for the handle with this index, which then names neither yet: the
    /// caller moves it on and decides what becomes of the old page. `None` if it is pinned.
    pub(super) fn migrate_away(&mut self, from: u64, handle: u32) -> Result<Option<u64>, Error> {
        if self.handles.by_index(handle).is_pinned() {
            self.statistics.pages_pinned += 1;
            return Ok(None);
        }
        self.faults.reach(Step::Migrate)?;
        let (memmap, index) = self.present(self.pageblock_of(from));
        let nid = memmap.pageblocks[index].zone.map_or(0, |zone| zone.nid);
        let target = self.nodes.pick_target(nid).ok_or(Error::NoMemory)?;
        Ok(Some(self.copy_to(from, handle, target)))
    }

    /// Moves a page that is not pinned to a pageblock that has free ones.
    pub(super) fn move_page(&mut self, from: u64, handle: u32, target: u64) {
        let to = self.copy_to(from, handle, target);
        self.handles.move_to(handle, to);
        self.put_page(from, Mobility::Movable);
    }

    fn copy_to(&mut self, from: u64, handle: u32, target: u64) -> u64 {
        debug_assert!(!self.handles.by_index(handle).is_pinned());
        let to = self.take_page(target, handle, Mobility::Movable);
        let page_shift = self.config.profile.page_shift;
        // SAFETY: Both frames are held by this handle, in online sections, and different, because `from` is
        // held while `to` was free. The handle is not pinned, and can only be pinned through the exclusive
        // reference we have, so nobody has a pointer to either.
        unsafe {
            copy_page(
                &self.memory,
                from << page_shift,
                to << page_shift,
                self.config.profile.page_size(),
            );
        }
        self.statistics.pages_migrated += 1;
        to
    }
}

/// Whether nothing in the pageblock is there for ever, or is somebody else's.
fn can_be_emptied(memmap: &Memmap, index: usize, purpose: Purpose) -> bool {
    let counts = &memmap.pageblocks[index];
    let pages = memmap.pageblock_pages;
    let movable = counts.unmovable == 0 && counts.reserved(pages) == 0 && counts.absent == 0;
    // Memory for contiguous allocations is emptied for those, not for offlining.
    let wanted = match purpose {
        Purpose::Take => counts.free + counts.held == pages,
        Purpose::Offline(_) => counts.class != super::page::Class::Cma,
    };
    movable && wanted
}

//! Emptying a range: isolate its pageblocks, move what is in use, take the pages or undo everything. Who wants the
//! range, and why, is not asked.
//!
//! Linux: `start_isolate_page_range`, `migrate_pages`, `undo_isolate_page_range`; `alloc_contig_range` and
//! `offline_pages` are made of these.
#![expect(
    unsafe_code,
    reason = "the contents of a page are copied when it is moved"
)]

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use super::memory_block::MemoryBlock;
use super::notifier::MemoryAction;
use super::page::{Memmap, Page};
use super::physical_memory::copy_page;
use super::{BlockState, Error, Hotplug, Mobility, PageHandle, PhysicalMemory, Step, ZoneKind};

/// How often a range is gone through before pinned pages in it are reported: where everything is supposed to be
/// movable, and elsewhere. Offlining tries as often as the former.
const PASSES_MOVABLE: u32 = 5;
const PASSES_KERNEL: u32 = 1;

/// Names a range that is being emptied: its free pages are not allocated.
///
/// Must be given back with [`Hotplug::commit`] or [`Hotplug::cancel`]; one that was lost is still among
/// [`Hotplug::isolations`]. Names are never used twice, by no [`Hotplug`].
///
/// ```text
///            isolate, isolate_block             migrate: Done          commit
///   in use -------------------------> isolated --------------> empty ----------> withheld, or its memory block offline
///     ^                                | |  ^                    |
///     |                                | +--+ migrate: More,     |
///     |                                |      or an error        |
///     +--------------------------------+-------------------------+
///          cancel, or commit before it is empty
/// ```
#[must_use = "the range stays isolated until it is committed or cancelled"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isolation(u64);

/// The name of the next isolation, anywhere.
static NEXT_ISOLATION: AtomicU64 = AtomicU64::new(0);

/// A range that is being emptied.
#[derive(Clone, Debug)]
struct Ongoing {
    purpose: Purpose,
    pageblocks: Range<u64>,
    /// The next page to look at.
    cursor: u64,
    /// Whether this pass left pages behind.
    blocked: bool,
    passes_left: u32,
}

/// All ranges that are being emptied.
#[derive(Debug, Default)]
pub(super) struct Isolations(BTreeMap<u64, Ongoing>);

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
        self.check_isolation(&pageblocks, Purpose::Take)?;
        self.check_room(&pageblocks)?;
        Ok(self.start_isolation(pageblocks, Purpose::Take))
    }

    /// Starts to empty memory block `id` so that it can go offline.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block, it is not online, is in several zones or has holes, or memory
    /// cannot be taken offline at all; whatever a notifier objects with; otherwise like [`isolate`](Self::isolate), but
    /// withheld and poisoned pages do not matter.
    pub fn isolate_block(&mut self, id: u64) -> Result<Isolation, Error> {
        self.isolate_offlinable(id, false)
    }

    fn isolate_offlinable(&mut self, id: u64, wants_room: bool) -> Result<Isolation, Error> {
        let (block, pageblocks) = self.offlinable(id)?;
        let purpose = Purpose::Offline(id);
        self.check_isolation(&pageblocks, purpose)?;
        if wants_room {
            self.check_room(&pageblocks)?;
        }
        let isolation = self.start_isolation(pageblocks, purpose);
        self.set_block_state(id, BlockState::GoingOffline);
        let event = self.event(id, &block, MemoryAction::GoingOffline);
        if let Err(veto) = self.notifiers.ask(&event) {
            self.cancel(isolation);
            return Err(veto);
        }
        Ok(isolation)
    }

    /// Takes memory block `id` offline: everything in use is moved elsewhere. Withheld pages do not matter.
    ///
    /// Where Linux would try for ever, this gives up, before it has moved anything if there is no room;
    /// [`isolate_block`](Self::isolate_block) leaves that to the caller.
    ///
    /// # Errors
    ///
    /// Those of [`isolate_block`](Self::isolate_block) and [`migrate`](Self::migrate). The block is online as before
    /// then.
    pub fn offline(&mut self, id: u64) -> Result<(), Error> {
        let isolation = self.isolate_offlinable(id, true)?;
        self.empty(isolation)
    }

    /// Memory block `id` and those of its pageblocks that have to be emptied, if it may go offline at all.
    fn offlinable(&self, id: u64) -> Result<(MemoryBlock, Range<u64>), Error> {
        let block = self.blocks.get(&id).copied().ok_or(Error::Invalid)?;
        if self.obstacle_of_block(&block).is_some() {
            return Err(Error::Invalid);
        }
        let mut pageblocks = self.pageblocks_of_block(id);
        pageblocks.start = self.pageblock_of(self.pages_of_block(id).start + block.memmap_pages);
        Ok((block, pageblocks))
    }

    /// Moves at most `max_pages` pages out of the range.
    ///
    /// Pages that are pinned, or that cannot be moved for the moment, are passed over and looked at again in the next
    /// pass. There are five passes; one, where a range in a kernel zone is to be taken.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if there are such pages after the last pass; [`Error::NoMemory`] if there is no page to move one
    /// to: it can go on when there is. The range stays isolated, and the caller cancels when it has had enough.
    /// [`Error::Invalid`] for what is not being emptied any more.
    pub fn migrate(&mut self, isolation: &Isolation, max_pages: u32) -> Result<Migration, Error> {
        let ongoing = self.isolations.0.get(&isolation.0).cloned();
        let mut ongoing = ongoing.ok_or(Error::Invalid)?;
        let result = self.migrate_some(&mut ongoing, max_pages);
        self.isolations.0.insert(isolation.0, ongoing);
        result
    }

    fn migrate_some(
        &mut self,
        isolation: &mut Ongoing,
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
                // Offlining leaves the node, if it can; taking a range does not.
                let leave_node = isolation.purpose != Purpose::Take;
                match self.migrate_away(isolation.cursor, handle, leave_node) {
                    Ok(to) => {
                        self.handles.move_to(handle, to);
                        self.put_page(isolation.cursor, Mobility::Movable);
                    }
                    Err(Error::Busy | Error::Again) => isolation.blocked = true,
                    Err(error) => return Err(error),
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
    /// undone then. [`Error::Invalid`] for what is not being emptied any more.
    pub fn commit(&mut self, isolation: Isolation) -> Result<(), Error> {
        let ongoing = self.isolations.0.get(&isolation.0).cloned();
        let ongoing = ongoing.ok_or(Error::Invalid)?;
        let takes = ongoing.purpose == Purpose::Take;
        let in_use = ongoing.pageblocks.clone().any(|pageblock| {
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
        self.isolations.0.remove(&isolation.0);
        match ongoing.purpose {
            Purpose::Take => self.set_withheld(ongoing.pageblocks, true),
            Purpose::Offline(id) => self.set_block_offline(id),
        }
        Ok(())
    }

    /// Lets the pages of the range be allocated again. Pages that were moved stay where they are. What is not being
    /// emptied any more is left alone.
    pub fn cancel(&mut self, isolation: Isolation) {
        let Some(isolation) = self.isolations.0.remove(&isolation.0) else {
            return;
        };
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

    /// Cancels the taking of pages anywhere in `[start, start + size)`, for a driver that is gone. Memory blocks that are
    /// going offline are left alone.
    pub fn cancel_taking(&mut self, start: u64, size: u64) {
        let shift = self.config.profile.page_shift;
        let pages = start >> shift..start.saturating_add(size) >> shift;
        let range = self.pageblock_of(pages.start)..self.pageblock_of(pages.end);
        let inside = |ongoing: &Ongoing| {
            let Range { start, end } = ongoing.pageblocks;
            ongoing.purpose == Purpose::Take && start < range.end && range.start < end
        };
        let ongoing = self
            .isolations
            .0
            .iter()
            .filter(|(_, ongoing)| inside(ongoing));
        let abandoned: Vec<_> = ongoing.map(|(id, _)| Isolation(*id)).collect();
        for isolation in abandoned {
            self.cancel(isolation);
        }
    }

    /// Allocates the pages of `[start, start + size)`, unmovable, lowest address first, moving what is in use (Linux:
    /// `alloc_contig_range`).
    ///
    /// This is how a driver comes by memory it hands on: until it [frees](Self::free) the pages, their memory block can
    /// neither go offline nor be removed, which is not so for what is [withheld](Self::fake_offline). Their contents are
    /// undefined (G-12).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] in Movable, where nothing may stay; those of [`isolate`](Self::isolate) and
    /// [`migrate`](Self::migrate); [`Error::NoMemory`] if the handles do not fit into the heap. No page is allocated
    /// then, but those that were moved stay where they are.
    pub fn allocate_contiguous(&mut self, start: u64, size: u64) -> Result<Vec<PageHandle>, Error> {
        let pageblocks = self.pageblocks(start, size)?;
        for pageblock in pageblocks.clone() {
            let (memmap, index) = self.online_pageblock(pageblock)?;
            let zone = memmap.pageblocks[index].zone;
            if zone.is_some_and(|zone| zone.kind == ZoneKind::Movable) {
                return Err(Error::Invalid);
            }
        }
        let isolation = self.isolate(start, size)?;
        let done = self.allocate_isolated(&isolation, pageblocks);
        self.cancel(isolation);
        done
    }

    fn allocate_isolated(
        &mut self,
        isolation: &Isolation,
        pageblocks: Range<u64>,
    ) -> Result<Vec<PageHandle>, Error> {
        while self.migrate(isolation, u32::MAX)? == Migration::More {}
        self.faults.reach(Step::Commit)?;
        let pageblock_pages = u64::from(self.config.profile.pageblock_pages());
        let count = (pageblocks.end - pageblocks.start) * pageblock_pages;
        let mut pages = Vec::new();
        pages
            .try_reserve_exact(count as usize)
            .map_err(|_| Error::NoMemory)?;
        for pageblock in pageblocks {
            for _ in 0..pageblock_pages {
                let Ok(handle) = self.handles.reserve() else {
                    self.refund_pages(pages);
                    return Err(Error::NoMemory);
                };
                let pfn = self.take_page(pageblock, handle, Mobility::Unmovable);
                pages.push(self.handles.insert(pfn, Mobility::Unmovable));
            }
        }
        Ok(pages)
    }

    /// Keeps the pages of `[start, start + size)` from the allocator, moving what is in use: the range is allocated in
    /// one piece and marked, and its memory block can still go offline (Linux: `alloc_contig_range` and `PageOffline`).
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

    /// Whether all pages of `[start, start + size)` are withheld; `None` if some are and some are not.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of whole pageblocks of memory blocks that were added.
    pub fn withheld(&self, start: u64, size: u64) -> Result<Option<bool>, Error> {
        let pageblocks = self.pageblocks(start, size)?;
        let first = self.block_of_pageblock(pageblocks.start);
        let last = self.block_of_pageblock(pageblocks.end - 1);
        if !(first..=last).all(|id| self.block_state(id).is_some()) {
            return Err(Error::Invalid);
        }
        let withheld = self.is_withheld(pageblocks.start);
        let same = pageblocks
            .clone()
            .all(|pageblock| self.is_withheld(pageblock) == withheld);
        Ok(same.then_some(withheld))
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

    /// Refuses a range that cannot be emptied, whatever room there is.
    fn check_isolation(&mut self, pageblocks: &Range<u64>, purpose: Purpose) -> Result<(), Error> {
        self.faults.reach(Step::Isolate)?;
        for pageblock in pageblocks.clone() {
            let (memmap, index) = self.online_pageblock(pageblock)?;
            if !can_be_emptied(memmap, index, purpose) {
                return Err(Error::Busy);
            }
        }
        Ok(())
    }

    /// The metadata of a pageblock that is in a zone.
    fn online_pageblock(&self, pageblock: u64) -> Result<(&Memmap, usize), Error> {
        let (number, index) = self.locate(pageblock);
        let section = self.sections.get(&number).filter(|s| s.online);
        let memmap = section.and_then(|section| section.memmap.as_ref());
        let memmap = memmap.filter(|memmap| memmap.pageblocks[index].zone.is_some());
        Ok((memmap.ok_or(Error::Invalid)?, index))
    }

    /// Refuses if there are not enough pages elsewhere for those in use in a range that can be isolated.
    fn check_room(&self, pageblocks: &Range<u64>) -> Result<(), Error> {
        let (mut held, mut free) = (0, 0);
        for pageblock in pageblocks.clone() {
            let (memmap, index) = self.present(pageblock);
            held += u64::from(memmap.pageblocks[index].held);
            free += u64::from(memmap.pageblocks[index].free);
        }
        match held <= self.counts().allocatable - free {
            true => Ok(()),
            false => Err(Error::NoMemory),
        }
    }

    /// Nothing in here is refused; the isolation gets a node from the heap.
    fn start_isolation(&mut self, pageblocks: Range<u64>, purpose: Purpose) -> Isolation {
        let mut passes_left = PASSES_MOVABLE;
        for pageblock in pageblocks.clone() {
            let kind = self.modify(pageblock, |memmap, index| {
                memmap.pageblocks[index].isolated = true;
                memmap.pageblocks[index].zone.map(|zone| zone.kind)
            });
            if kind != Some(ZoneKind::Movable) && purpose == Purpose::Take {
                passes_left = PASSES_KERNEL;
            }
        }
        let id = NEXT_ISOLATION.fetch_add(1, Ordering::Relaxed);
        let ongoing = Ongoing {
            purpose,
            cursor: pageblocks.start * u64::from(self.config.profile.pageblock_pages()),
            pageblocks,
            blocked: false,
            passes_left,
        };
        self.isolations.0.insert(id, ongoing);
        Isolation(id)
    }

    /// Copies a held page to where there is room, for the handle with this index, which then names neither yet: the
    /// caller moves it on and decides what becomes of the old page.
    ///
    /// With `leave_node` other nodes come first (Linux: `do_migrate_range`, which does without the own node even if no
    /// other has room), else the own one.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if it is pinned, [`Error::NoMemory`] if there is no room.
    pub(super) fn migrate_away(
        &mut self,
        from: u64,
        handle: u32,
        leave_node: bool,
    ) -> Result<u64, Error> {
        if self.handles.by_index(handle).is_fixed() {
            self.statistics.pages_pinned += 1;
            return Err(Error::Busy);
        }
        self.faults.reach(Step::Migrate)?;
        let (memmap, index) = self.present(self.pageblock_of(from));
        let nid = memmap.pageblocks[index].zone.map_or(0, |zone| zone.nid);
        let target = match leave_node {
            true => self.nodes.pick_elsewhere(nid),
            false => self.nodes.pick(nid, Mobility::Movable),
        };
        Ok(self.copy_to(from, handle, target.ok_or(Error::NoMemory)?))
    }

    /// Moves a page that is not pinned to a pageblock that has free ones.
    pub(super) fn move_page(&mut self, from: u64, handle: u32, target: u64) {
        let to = self.copy_to(from, handle, target);
        self.handles.move_to(handle, to);
        self.put_page(from, Mobility::Movable);
    }

    fn copy_to(&mut self, from: u64, handle: u32, target: u64) -> u64 {
        debug_assert!(!self.handles.by_index(handle).is_fixed());
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
    if counts.isolated {
        return false;
    }
    let movable = counts.unmovable == 0 && counts.reserved(pages) == 0 && counts.absent == 0;
    // Memory for contiguous allocations is emptied for those, not for offlining.
    let wanted = match purpose {
        Purpose::Take => counts.free + counts.held == pages,
        Purpose::Offline(_) => counts.class != super::page::Class::Cma,
    };
    movable && wanted
}

impl<M> Hotplug<M> {
    /// All ranges that are being emptied.
    pub fn isolations(&self) -> impl Iterator<Item = Isolation> + '_ {
        self.isolations.0.keys().map(|id| Isolation(*id))
    }
}

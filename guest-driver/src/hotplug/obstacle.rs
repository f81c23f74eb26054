//! Why a memory block cannot go offline: the first page that would stay.
//!
//! Linux: the checks of `offline_pages`, `has_unmovable_pages`, and `dump_page` of what could not be moved.

use super::handle::Mobility;
use super::memory_block::{BlockState, MemoryBlock};
use super::page::{Class, Page};
use super::{Error, Hotplug};

/// What keeps a page where it is, or a memory block as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Memory cannot be taken offline at all (Linux: no `MEMORY_HOTREMOVE`).
    NotSupported,
    /// The memory block is offline already, or going offline.
    NotOnline,
    /// There is no memory: a hole between what was there at boot (Linux: "memory holes").
    Hole,
    /// The memory block was there at boot, and is in several zones (Linux: "multizone range").
    SeveralZones,
    /// Its pageblock is being emptied by somebody else.
    BeingEmptied,
    /// Memory for contiguous allocations.
    Contiguous,
    /// In use since boot, for ever.
    Reserved,
    /// Its user remembers the address.
    Unmovable,
    /// Somebody accesses it: for a moment, or for as long as a device has it.
    Pinned,
}

impl<M> Hotplug<M> {
    /// The first page that keeps memory block `id` from going offline now: its address, and the reason (Linux writes
    /// that into its log). Where the reason is the memory block itself, it is the block's first page.
    ///
    /// `None` if there is none; then what is in use can be moved, if there is room and no notifier objects.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block.
    pub fn obstacle(&self, id: u64) -> Result<Option<(u64, Obstacle)>, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        let mut pageblocks = self.pageblocks_of_block(id);
        let found = match self.obstacle_of_block(block) {
            None => pageblocks.find_map(|pageblock| self.obstacle_in(pageblock)),
            Some(Obstacle::Hole) => pageblocks
                .find_map(|pageblock| self.hole_in(pageblock))
                .map(|pfn| (pfn, Obstacle::Hole)),
            Some(obstacle) => Some((self.pages_of_block(id).start, obstacle)),
        };
        let shift = self.config.profile.page_shift;
        Ok(found.map(|(pfn, obstacle)| (pfn << shift, obstacle)))
    }

    /// The addresses of the allocated pages that cannot be moved now, because they are unmovable or pinned, in no
    /// order. It looks at every allocated page once.
    pub fn fixed_pages(&self) -> impl Iterator<Item = u64> + '_ {
        let shift = self.config.profile.page_shift;
        self.handles.fixed().map(move |pfn| pfn << shift)
    }

    /// What is in the way before any page is looked at, in the order of Linux.
    pub(super) fn obstacle_of_block(&self, block: &MemoryBlock) -> Option<Obstacle> {
        let pages = self.config.profile.memory_block_pages();
        match block {
            _ if !self.config.hot_remove => Some(Obstacle::NotSupported),
            _ if block.state != BlockState::Online => Some(Obstacle::NotOnline),
            _ if block.ram_pages != pages => Some(Obstacle::Hole),
            _ if block.zone.is_none() => Some(Obstacle::SeveralZones),
            _ => None,
        }
    }

    /// The first page of a pageblock that is a hole.
    fn hole_in(&self, pageblock: u64) -> Option<u64> {
        let (number, index) = self.locate(pageblock);
        let first = pageblock * u64::from(self.config.profile.pageblock_pages());
        let Some(memmap) = self.sections.get(&number).and_then(|s| s.memmap.as_ref()) else {
            return Some(first);
        };
        if memmap.pageblocks[index].absent == 0 {
            return None;
        }
        let mut pages = memmap.different_pages_of(index);
        let hole = pages.find(|page| memmap.page(*page) == Page::Absent)?;
        Some(self.pfn(number, hole))
    }

    /// The first page of a pageblock of a whole, online memory block that keeps it from being emptied.
    fn obstacle_in(&self, pageblock: u64) -> Option<(u64, Obstacle)> {
        let (memmap, index) = self.present(pageblock);
        let (number, _) = self.locate(pageblock);
        let first = pageblock * u64::from(self.config.profile.pageblock_pages());
        let counts = &memmap.pageblocks[index];
        if counts.isolated {
            return Some((first, Obstacle::BeingEmptied));
        }
        if counts.class == Class::Cma {
            return Some((first, Obstacle::Contiguous));
        }
        if counts.held == 0 && counts.reserved(memmap.pageblock_pages) == 0 {
            return None;
        }
        memmap.different_pages_of(index).find_map(|page| {
            let obstacle = match memmap.page(page) {
                Page::Reserved => Obstacle::Reserved,
                Page::Held { handle } => {
                    let held = self.handles.by_index(handle);
                    match held.mobility() {
                        Mobility::Unmovable => Obstacle::Unmovable,
                        Mobility::Movable if held.is_pinned() => Obstacle::Pinned,
                        Mobility::Movable => return None,
                    }
                }
                _ => return None,
            };
            Some((self.pfn(number, page), obstacle))
        })
    }
}

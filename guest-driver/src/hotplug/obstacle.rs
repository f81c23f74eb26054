//! Why a memory block cannot go offline: the first page that would stay.

use super::handle::Mobility;
use super::page::{Class, Page};
use super::{Error, Hotplug};

/// What keeps a page where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Its user remembers the address.
    Unmovable,
    /// Somebody accesses it: for a moment, or for as long as a device has it.
    Pinned,
    /// In use since boot, for ever.
    Reserved,
    /// There is no memory: a hole between what was there at boot.
    Hole,
    /// Memory for contiguous allocations.
    Contiguous,
    /// Its pageblock is being emptied by somebody else.
    BeingEmptied,
}

impl<M> Hotplug<M> {
    /// The first page that keeps memory block `id` from going offline now: its address, and the reason (Linux writes
    /// that into its log). `None` if there is none; then what is in use can be moved, if there is room.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block.
    pub fn obstacle(&self, id: u64) -> Result<Option<(u64, Obstacle)>, Error> {
        self.blocks.get(&id).ok_or(Error::Invalid)?;
        let shift = self.config.profile.page_shift;
        let mut pageblocks = self.pageblocks_of_block(id);
        let found = pageblocks.find_map(|pageblock| self.obstacle_in(pageblock));
        Ok(found.map(|(pfn, obstacle)| (pfn << shift, obstacle)))
    }

    fn obstacle_in(&self, pageblock: u64) -> Option<(u64, Obstacle)> {
        let (number, index) = self.locate(pageblock);
        let first = pageblock * u64::from(self.config.profile.pageblock_pages());
        let Some(memmap) = self.sections.get(&number).and_then(|s| s.memmap.as_ref()) else {
            return Some((first, Obstacle::Hole));
        };
        let counts = &memmap.pageblocks[index];
        if counts.isolated {
            return Some((first, Obstacle::BeingEmptied));
        }
        if counts.class == Class::Cma {
            return Some((first, Obstacle::Contiguous));
        }
        memmap.pages_of(index).find_map(|page| {
            let obstacle = match memmap.page(page) {
                Page::Reserved => Obstacle::Reserved,
                Page::Absent => Obstacle::Hole,
                Page::Held { handle } => {
                    let held = self.handles.by_index(handle);
                    match held.mobility() {
                        Mobility::Unmovable => Obstacle::Unmovable,
                        Mobility::Movable if held.is_pinned() => Obstacle::Pinned,
                        Mobility::Movable => return None,
                    }
                }
                Page::Free { .. } | Page::Withheld | Page::Memmap | Page::Poisoned => return None,
            };
            Some((self.pfn(number, page), obstacle))
        })
    }
}

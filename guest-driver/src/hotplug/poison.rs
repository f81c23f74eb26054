//! Broken memory: pages the hardware cannot be trusted with. Nothing here finds out which they are.
//!
//! Linux: `memory_failure`, `soft_offline_page`.

use super::page::Page;
use super::{Error, Hotplug, Mobility, PhysicalMemory};

impl<M: PhysicalMemory> Hotplug<M> {
    /// Takes a page with uncorrectable errors out of use. Whoever held it has lost its contents: pinning it is
    /// [`Error::HwPoison`] from then on.
    ///
    /// A poisoned page leaves the allocator for good. It does not keep its memory block from going offline, and leaves
    /// with it; but the block cannot come online again, and no range that contains the page can be taken.
    ///
    /// # Errors
    ///
    /// [`Error::NoAddress`] if it is not online RAM, [`Error::HwPoison`] if it is poisoned already, [`Error::Busy`] if
    /// it is pinned or its user cannot do without it (Linux counts such a page nevertheless).
    pub fn hard_offline_page(&mut self, address: u64) -> Result<(), Error> {
        if self.page_at(address) == Some(Page::Poisoned) {
            return Err(Error::HwPoison);
        }
        self.poison(address, Error::Busy, |hotplug, pfn, handle| {
            if hotplug.handles.by_index(handle).is_fixed() {
                return Err(Error::Busy);
            }
            hotplug.handles.lose(handle);
            hotplug.retire(pfn);
            Ok(())
        })
    }

    /// Takes a page with corrected errors out of use, after moving what is in it elsewhere.
    ///
    /// # Errors
    ///
    /// [`Error::NoAddress`] if it has no metadata, [`Error::Io`] if it is not online RAM or its user cannot do without
    /// it, [`Error::Busy`] if it is pinned, [`Error::NoMemory`] if there is no page to move it to. A page that is
    /// poisoned already is no error.
    pub fn soft_offline_page(&mut self, address: u64) -> Result<(), Error> {
        let pfn = address >> self.config.profile.page_shift;
        if self.pfn_valid(pfn) && self.page_at(address).is_none() {
            return Err(Error::Io);
        }
        self.poison(address, Error::Io, |hotplug, pfn, handle| {
            if hotplug.handles.by_index(handle).mobility() == Mobility::Unmovable {
                return Err(Error::Io);
            }
            // It must not become free in between.
            let to = hotplug.migrate_away(pfn, handle, false)?;
            hotplug.handles.move_to(handle, to);
            hotplug.retire(pfn);
            Ok(())
        })
    }

    fn poison(
        &mut self,
        address: u64,
        unhandled: Error,
        detach: impl FnOnce(&mut Self, u64, u32) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let pfn = address >> self.config.profile.page_shift;
        match self.page_at(address).ok_or(Error::NoAddress)? {
            Page::Poisoned => return Ok(()),
            Page::Free { .. } => self.retire(pfn),
            Page::Held { handle } => detach(self, pfn, handle)?,
            Page::Absent => return Err(Error::NoAddress),
            Page::Withheld | Page::Reserved | Page::Memmap => return Err(unhandled),
        }
        let id = self.block_of_pfn(pfn);
        if let Some(block) = self.blocks.get_mut(&id) {
            block.poisoned += 1;
        }
        self.poisoned_pages += 1;
        Ok(())
    }

    /// What a page of online RAM is used for.
    fn page_at(&self, address: u64) -> Option<Page> {
        let pfn = address >> self.config.profile.page_shift;
        self.pfn_is_online(pfn).then(|| {
            let (memmap, _) = self.present(self.pageblock_of(pfn));
            let (_, page) = self.locate_page(pfn);
            memmap.page(page)
        })
    }

    /// Takes a page without a handle out of use.
    fn retire(&mut self, pfn: u64) {
        let (_, page) = self.locate_page(pfn);
        self.modify(self.pageblock_of(pfn), |memmap, _| {
            memmap.poison(page, Mobility::Movable);
        });
    }

    /// Pages the hardware cannot be trusted with, in all memory that is there, online or not (Linux:
    /// `HardwareCorrupted`).
    pub fn hardware_corrupted_pages(&self) -> u64 {
        self.poisoned_pages
    }
}

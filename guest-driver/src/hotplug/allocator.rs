//! The page allocator: single pages, lowest address first.

use core::ptr::NonNull;

use super::section::Page;
use super::{Error, Hotplug, Mobility, PageHandle, PhysicalMemory};

impl<M: PhysicalMemory> Hotplug<M> {
    /// Allocates a page. Its contents are undefined (G-12).
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] if no page is free.
    pub fn allocate(&mut self, mobility: Mobility) -> Result<PageHandle, Error> {
        let index = self.handles.reserve()?;
        let pfn = self.take_page(index)?;
        if mobility == Mobility::Unmovable {
            let (section, pageblock) = self.present_mut(self.pageblock_of(pfn));
            section.pageblocks[pageblock].unmovable += 1;
        }
        Ok(self.handles.insert(pfn, mobility))
    }

    /// Frees a page; its handle means nothing from then on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a page that is free already, [`Error::Busy`] while it is pinned.
    pub fn free(&mut self, handle: PageHandle) -> Result<(), Error> {
        let held = self.handles.get(handle)?;
        if held.is_unmovable() {
            let (section, pageblock) = self.present_mut(self.pageblock_of(held.pfn));
            section.pageblocks[pageblock].unmovable -= 1;
        } else if held.is_pinned() {
            return Err(Error::Busy);
        }
        self.put_page(held.pfn);
        self.handles.remove(handle);
        Ok(())
    }

    /// Keeps a page where it is until [`unpin`](Self::unpin), once for each pin, and returns a pointer to it.
    ///
    /// The pointer is valid for reads and writes of the whole page until then.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a free page, [`Error::Busy`] if the pins cannot be counted any more.
    pub fn pin(&mut self, handle: PageHandle) -> Result<NonNull<u8>, Error> {
        let pfn = self.handles.pin(handle)?;
        Ok(self.memory.page(pfn << self.profile.page_shift))
    }

    /// Takes back one [`pin`](Self::pin).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a free page, or of one that is not pinned.
    pub fn unpin(&mut self, handle: PageHandle) -> Result<(), Error> {
        self.handles.unpin(handle)
    }

    /// The physical address of a page; out of date as soon as the page may be moved.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a free page.
    pub fn address(&self, handle: PageHandle) -> Result<u64, Error> {
        Ok(self.handles.get(handle)?.pfn << self.profile.page_shift)
    }

    /// Gives the lowest allocatable page to the handle with this index.
    pub(super) fn take_page(&mut self, handle: u32) -> Result<u64, Error> {
        let pageblock = *self.allocatable.first().ok_or(Error::NoMemory)?;
        let (number, _) = self.locate(pageblock);
        let (section, index) = self.present_mut(pageblock);
        let page = section.take(index, handle);
        let page = page.expect("allocatable pageblocks have free pages");
        if section.pageblocks[index].free == 0 {
            self.allocatable.remove(&pageblock);
        }
        self.counts.free -= 1;
        self.counts.allocatable -= 1;
        Ok(self.pfn(number, page))
    }

    /// Makes a held page free; one in an isolated pageblock cannot be allocated again yet.
    pub(super) fn put_page(&mut self, pfn: u64) {
        let pageblock = self.pageblock_of(pfn);
        let (_, page) = self.locate_page(pfn);
        let (section, index) = self.present_mut(pageblock);
        debug_assert!(matches!(section.page(page), Page::Held { .. }));
        section.put(page);
        let isolated = section.pageblocks[index].isolated;
        self.counts.free += 1;
        if !isolated {
            self.counts.allocatable += 1;
            self.allocatable.insert(pageblock);
        }
    }
}

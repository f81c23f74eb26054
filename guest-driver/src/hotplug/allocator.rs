//! The page allocator: single pages, lowest address first, unmovable ones kept together.

use core::ptr::NonNull;

use super::page::Page;
use super::{Error, Hotplug, Mobility, PageHandle, PhysicalMemory, ZoneKind};

impl<M: PhysicalMemory> Hotplug<M> {
    /// Allocates a page of any node. Its contents are undefined (G-12).
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] if no page is free, or none that an unmovable page may be in.
    pub fn allocate(&mut self, mobility: Mobility) -> Result<PageHandle, Error> {
        self.allocate_on(0, mobility)
    }

    /// Allocates a page on node `nid`, or on another if that has none.
    ///
    /// Movable pages come from Movable first, unmovable ones only from kernel zones.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] if no page is free, or none that an unmovable page may be in.
    pub fn allocate_on(&mut self, nid: u32, mobility: Mobility) -> Result<PageHandle, Error> {
        let index = self.handles.reserve()?;
        let pageblock = self.nodes.pick(nid, mobility).ok_or(Error::NoMemory)?;
        let pfn = self.take_page(pageblock, index, mobility);
        Ok(self.handles.insert(pfn, mobility))
    }

    /// Frees a page; its handle means nothing from then on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a page that is free already, [`Error::Busy`] while it is pinned.
    pub fn free(&mut self, handle: PageHandle) -> Result<(), Error> {
        let held = self.handles.get(handle)?;
        let mobility = held.mobility();
        if held.is_pinned() {
            return Err(Error::Busy);
        }
        if let Some(pfn) = held.pfn() {
            self.put_page(pfn, mobility);
        }
        self.handles.remove(handle);
        Ok(())
    }

    /// Keeps a page where it is until [`unpin`](Self::unpin), once for each pin, and returns a pointer to it.
    ///
    /// The pointer is valid for reads and writes of the whole page until then. Pin for the time of an access:
    /// [`pin_long_term`](Self::pin_long_term) is for devices.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a handle of a free page, [`Error::HwPoison`] for one whose contents are lost,
    /// [`Error::Busy`] if the pins cannot be counted any more.
    pub fn pin(&mut self, handle: PageHandle) -> Result<NonNull<u8>, Error> {
        let pfn = self.handles.pin(handle)?;
        Ok(self.memory.page(pfn << self.config.profile.page_shift))
    }

    /// Like [`pin`](Self::pin), for a time without end: a page in Movable, or in memory for contiguous allocations, is
    /// moved out of there first (Linux: `FOLL_LONGTERM`).
    ///
    /// # Errors
    ///
    /// Those of [`pin`](Self::pin); [`Error::Busy`] if somebody has pinned it there already, [`Error::NoMemory`] if
    /// there is no page in a kernel zone to move it to.
    pub fn pin_long_term(&mut self, handle: PageHandle) -> Result<NonNull<u8>, Error> {
        let pfn = self.handles.get(handle)?.pfn().ok_or(Error::HwPoison)?;
        let (memmap, index) = self.present(self.pageblock_of(pfn));
        let pageblock = &memmap.pageblocks[index];
        let movable = pageblock
            .zone
            .is_some_and(|zone| zone.kind == ZoneKind::Movable);
        if movable || pageblock.class == super::page::Class::Cma {
            if self.handles.get(handle)?.is_pinned() {
                return Err(Error::Busy);
            }
            let nid = pageblock.zone.map_or(0, |zone| zone.nid);
            let target = self.nodes.pick(nid, Mobility::Unmovable);
            self.move_page(pfn, handle.index(), target.ok_or(Error::NoMemory)?);
        }
        self.pin(handle)
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
    /// [`Error::Invalid`] for a handle of a free page, [`Error::HwPoison`] for one whose contents are lost.
    pub fn address(&self, handle: PageHandle) -> Result<u64, Error> {
        let pfn = self.handles.get(handle)?.pfn().ok_or(Error::HwPoison)?;
        Ok(pfn << self.config.profile.page_shift)
    }

    /// Gives a page of a pageblock that has some to the handle with this index.
    pub(super) fn take_page(&mut self, pageblock: u64, handle: u32, mobility: Mobility) -> u64 {
        let (number, _) = self.locate(pageblock);
        let page = self.modify(pageblock, |memmap, index| {
            memmap.take(index, handle, mobility)
        });
        let page = page.expect("pageblocks on a shelf have free pages");
        self.pfn(number, page)
    }

    /// Makes a held page free; one in an isolated pageblock cannot be allocated again yet.
    pub(super) fn put_page(&mut self, pfn: u64, mobility: Mobility) {
        let (_, page) = self.locate_page(pfn);
        self.modify(self.pageblock_of(pfn), |memmap, _| {
            debug_assert!(matches!(memmap.page(page), Page::Held { .. }));
            memmap.put(page, mobility);
        });
    }
}

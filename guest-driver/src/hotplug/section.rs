//! A section: page metadata (the memmap), four bytes a page, and the pageblocks it is divided into.

use alloc::vec::Vec;

use super::{Error, Profile};

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    /// Free, and followed by this page in its pageblock's list.
    Free { next: Option<u32> },
    /// Not for the allocator: unplugged, or offline altogether (Linux: `PageOffline`).
    Offline,
    /// Allocated to the handle with this index.
    Held { handle: u32 },
}

/// A [`Page`] in four bytes.
#[derive(Clone, Copy, Debug)]
struct PackedPage(u32);

impl PackedPage {
    const OFFLINE: u32 = u32::MAX;
    const FREE: u32 = 1 << 31;
    const LAST: u32 = Self::FREE - 2;

    const fn pack(page: Page) -> Self {
        Self(match page {
            Page::Free { next: Some(next) } => Self::FREE | next,
            Page::Free { next: None } => Self::FREE | Self::LAST,
            Page::Offline => Self::OFFLINE,
            Page::Held { handle } => handle,
        })
    }

    const fn unpack(self) -> Page {
        match self.0 {
            Self::OFFLINE => Page::Offline,
            handle if handle & Self::FREE == 0 => Page::Held { handle },
            free if free & !Self::FREE == Self::LAST => Page::Free { next: None },
            free => Page::Free {
                next: Some(free & !Self::FREE),
            },
        }
    }
}

/// The unit of isolation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pageblock {
    /// First page of the list of free pages; the list is as long as `free`.
    first_free: Option<u32>,
    /// Number of free pages.
    pub(super) free: u32,
    /// Number of pages withheld from the allocator.
    pub(super) offline: u32,
    /// Number of pages that can never be moved.
    pub(super) unmovable: u32,
    /// Free pages are not allocated: the pageblock is being emptied (Linux: `MIGRATE_ISOLATE`).
    pub(super) isolated: bool,
}

/// A section that is present; one that is not has no `Section`. Pages and pageblocks are numbered from its start.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) online: bool,
    pages: Vec<PackedPage>,
    pub(super) pageblocks: Vec<Pageblock>,
    pageblock_pages: u32,
}

impl Section {
    /// Handles beyond this cannot be told from free pages.
    pub(super) const MAX_HANDLES: usize = PackedPage::FREE as usize;

    /// An offline section.
    pub(super) fn new(profile: &Profile) -> Result<Self, Error> {
        let filled = |shift: u32| 1usize << (profile.section_shift - shift);
        let mut pages = Vec::new();
        let page_count = filled(profile.page_shift);
        pages
            .try_reserve_exact(page_count)
            .map_err(|_| Error::NoMemory)?;
        pages.resize(page_count, PackedPage::pack(Page::Offline));
        let mut pageblocks = Vec::new();
        let pageblock_count = filled(profile.pageblock_shift);
        pageblocks
            .try_reserve_exact(pageblock_count)
            .map_err(|_| Error::NoMemory)?;
        let offline = Pageblock {
            offline: profile.pageblock_pages(),
            ..Pageblock::default()
        };
        pageblocks.resize(pageblock_count, offline);
        Ok(Self {
            online: false,
            pages,
            pageblocks,
            pageblock_pages: profile.pageblock_pages(),
        })
    }

    pub(super) fn page(&self, page: u32) -> Page {
        self.pages[page as usize].unpack()
    }

    /// The pages of `pageblock`.
    pub(super) fn pages_of(&self, pageblock: usize) -> core::ops::Range<u32> {
        let first = pageblock as u32 * self.pageblock_pages;
        first..first + self.pageblock_pages
    }

    /// Number of allocated pages in `pageblock`.
    pub(super) fn held_pages(&self, pageblock: usize) -> u32 {
        let counts = &self.pageblocks[pageblock];
        self.pageblock_pages - counts.free - counts.offline
    }

    /// Makes every page of `pageblock`, none of them held, free.
    pub(super) fn set_free(&mut self, pageblock: usize) {
        let pages = self.pages_of(pageblock);
        let mut next = None;
        for page in pages.clone().rev() {
            self.set(page, Page::Free { next });
            next = Some(page);
        }
        let counts = &mut self.pageblocks[pageblock];
        counts.first_free = next;
        counts.free = self.pageblock_pages;
        counts.offline = 0;
    }

    /// Withholds every page of `pageblock`, none of them held, from the allocator.
    pub(super) fn set_offline(&mut self, pageblock: usize) {
        for page in self.pages_of(pageblock) {
            self.set(page, Page::Offline);
        }
        let counts = &mut self.pageblocks[pageblock];
        counts.first_free = None;
        counts.free = 0;
        counts.offline = self.pageblock_pages;
    }

    /// Gives a free page of `pageblock` to `handle`.
    pub(super) fn take(&mut self, pageblock: usize, handle: u32) -> Option<u32> {
        let page = self.pageblocks[pageblock].first_free?;
        let Page::Free { next } = self.page(page) else {
            return None;
        };
        let counts = &mut self.pageblocks[pageblock];
        counts.first_free = next;
        counts.free -= 1;
        self.set(page, Page::Held { handle });
        Some(page)
    }

    /// Makes the held `page` free again.
    pub(super) fn put(&mut self, page: u32) {
        let counts = &mut self.pageblocks[(page / self.pageblock_pages) as usize];
        let next = counts.first_free.replace(page);
        counts.free += 1;
        self.set(page, Page::Free { next });
    }

    fn set(&mut self, page: u32, state: Page) {
        self.pages[page as usize] = PackedPage::pack(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_state_survives_packing() {
        for page in [
            Page::Offline,
            Page::Free { next: None },
            Page::Free { next: Some(0) },
            Page::Free {
                next: Some((1 << 30) - 1),
            },
            Page::Held { handle: 0 },
            Page::Held {
                handle: PackedPage::FREE - 1,
            },
        ] {
            assert_eq!(PackedPage::pack(page).unpack(), page);
        }
    }

    #[test]
    fn page_metadata_takes_four_bytes_a_page() {
        let section = Section::new(&Profile::X86_64).unwrap();
        assert_eq!(size_of_val(section.pages.as_slice()), 128 << 10);
    }

    #[test]
    fn pages_are_taken_from_the_lowest_and_come_back() {
        let mut section = Section::new(&Profile::X86_64).unwrap();
        section.set_free(1);
        assert_eq!(section.take(1, 7), Some(512));
        assert_eq!(section.take(1, 8), Some(513));
        assert_eq!(section.held_pages(1), 2);
        section.put(512);
        assert_eq!(section.take(1, 9), Some(512));
        assert_eq!(section.page(512), Page::Held { handle: 9 });
        assert_eq!(section.take(0, 9), None);
    }
}

//! Page metadata of a section (the memmap): four bytes a page, and the pageblocks it is divided into. A pageblock that
//! changes here may have to move between the sets of its zone, which need the heap; they are not here.
//!
//! Most pages of a pageblock are usually in the same state. They are not written one by one: a pageblock notes
//! how many of its pages have been `touched`, and the state of all the `rest`.
//!
//! ```text
//!                 touched
//!                    v
//!  | held free held |  rest: free ............................ |   one pageblock
//!         |                  `- taken lowest first, when the list is empty
//!         `- on the list `first_free`
//! ```

use alloc::vec::Vec;
use core::ops::Range;

use super::node::ZoneId;
use super::{Error, Mobility, Profile};

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    /// Free, and followed by this page in its pageblock's list.
    Free { next: Option<u32> },
    /// Allocated to the handle with this index.
    Held { handle: u32 },
    /// Kept from the allocator by a driver, or offline altogether (Linux: `PageOffline`).
    Withheld,
    /// In use since boot, for ever.
    Reserved,
    /// Metadata without memory: a hole in boot memory.
    Absent,
    /// Holds the metadata of its own memory block.
    Memmap,
    /// Broken (Linux: `PageHWPoison`).
    Poisoned,
}

/// A [`Page`] in four bytes.
#[derive(Clone, Copy, Debug)]
struct PackedPage(u32);

impl PackedPage {
    const FREE: u32 = 1 << 31;
    const LAST: u32 = u32::MAX - 5;
    const WITHHELD: u32 = u32::MAX - 4;
    const RESERVED: u32 = u32::MAX - 3;
    const ABSENT: u32 = u32::MAX - 2;
    const MEMMAP: u32 = u32::MAX - 1;
    const POISONED: u32 = u32::MAX;

    const fn pack(page: Page) -> Self {
        Self(match page {
            Page::Held { handle } => handle,
            Page::Free { next: Some(next) } => Self::FREE | next,
            Page::Free { next: None } => Self::LAST,
            Page::Withheld => Self::WITHHELD,
            Page::Reserved => Self::RESERVED,
            Page::Absent => Self::ABSENT,
            Page::Memmap => Self::MEMMAP,
            Page::Poisoned => Self::POISONED,
        })
    }

    const fn unpack(self) -> Page {
        match self.0 {
            handle if handle & Self::FREE == 0 => Page::Held { handle },
            Self::LAST => Page::Free { next: None },
            Self::WITHHELD => Page::Withheld,
            Self::RESERVED => Page::Reserved,
            Self::ABSENT => Page::Absent,
            Self::MEMMAP => Page::Memmap,
            Self::POISONED => Page::Poisoned,
            free => Page::Free {
                next: Some(free & !Self::FREE),
            },
        }
    }
}

/// What a pageblock's pages are for (Linux: migratetype).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Class {
    /// Pages that can be moved; nobody's yet, while all of it is free.
    #[default]
    Movable,
    /// Pages that cannot: kept together, so that other pageblocks can be emptied.
    Unmovable,
    /// Movable pages only, for ever: memory for contiguous allocations.
    Cma,
}

/// Where the allocator finds a pageblock that has free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shelf {
    /// All of it is free.
    Whole,
    /// Part of it is, among movable pages.
    Movable,
    /// Part of it is, among unmovable pages.
    Unmovable,
    /// For movable pages only.
    Cma,
}

impl Shelf {
    pub(super) const COUNT: usize = 4;
}

/// What a pageblock adds to the counters of its zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) present: u32,
    pub(super) managed: u32,
    pub(super) free: u32,
    pub(super) allocatable: u32,
    pub(super) cma: u32,
    pub(super) isolated: u32,
}

/// The unit of isolation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pageblock {
    /// First page of the list of free pages below `touched`.
    first_free: Option<u32>,
    /// How many pages, from the first, have a state of their own.
    touched: u32,
    /// The state of all other pages; `next` is not used.
    rest: Page,
    /// The zone its pages are in while they are online.
    pub(super) zone: Option<ZoneId>,
    pub(super) class: Class,
    /// Number of free pages.
    pub(super) free: u32,
    /// Number of allocated pages.
    pub(super) held: u32,
    /// Number of allocated pages that can never be moved.
    pub(super) unmovable: u32,
    /// Number of broken pages.
    pub(super) poisoned: u32,
    /// Number of pages that are holes.
    pub(super) absent: u32,
    /// Free pages are not allocated: the pageblock is being emptied (Linux: `MIGRATE_ISOLATE`).
    pub(super) isolated: bool,
    /// Its pages are, or will be when online, kept from the allocator.
    pub(super) withheld: bool,
}

impl Pageblock {
    const OFFLINE: Self = Self {
        first_free: None,
        touched: 0,
        rest: Page::Withheld,
        zone: None,
        class: Class::Movable,
        free: 0,
        held: 0,
        unmovable: 0,
        poisoned: 0,
        absent: 0,
        isolated: false,
        withheld: false,
    };

    /// What is counted in its zone; nothing while it is in none.
    pub(super) fn tally(&self, pages: u32) -> Tally {
        if self.zone.is_none() {
            return Tally::default();
        }
        Tally {
            present: pages - self.absent,
            managed: self.free + self.held + self.poisoned,
            free: self.free,
            allocatable: if self.isolated { 0 } else { self.free },
            cma: if self.class == Class::Cma { pages } else { 0 },
            isolated: u32::from(self.isolated),
        }
    }

    /// Where the allocator finds it; `None` while nothing can be allocated from it.
    pub(super) fn shelf(&self, pages: u32) -> Option<Shelf> {
        if self.zone.is_none() || self.isolated || self.free == 0 {
            return None;
        }
        Some(match self.class {
            Class::Cma => Shelf::Cma,
            _ if self.free == pages => Shelf::Whole,
            Class::Movable => Shelf::Movable,
            Class::Unmovable => Shelf::Unmovable,
        })
    }

    /// Whether all of it holds the metadata of its memory block.
    pub(super) fn is_memmap(&self) -> bool {
        self.rest == Page::Memmap
    }

    /// Pages that neither the allocator nor a driver has: reserved since boot.
    pub(super) fn reserved(&self, pages: u32) -> u32 {
        match self.rest {
            Page::Withheld | Page::Memmap => 0,
            _ => pages - self.free - self.held - self.poisoned - self.absent,
        }
    }
}

/// The page metadata of a section of System RAM. Pages and pageblocks are numbered from its start.
#[derive(Debug)]
pub(super) struct Memmap {
    pages: Vec<PackedPage>,
    pub(super) pageblocks: Vec<Pageblock>,
    pub(super) pageblock_pages: u32,
}

impl Memmap {
    /// Handles beyond this cannot be told from free pages.
    pub(super) const MAX_HANDLES: usize = PackedPage::FREE as usize;

    /// Of a section all of whose pages are offline.
    pub(super) fn new(profile: &Profile) -> Result<Self, Error> {
        let count = |shift: u32| 1usize << (profile.section_shift - shift);
        Ok(Self {
            pages: filled(PackedPage(0), count(profile.page_shift))?,
            pageblocks: filled(Pageblock::OFFLINE, count(profile.pageblock_shift))?,
            pageblock_pages: profile.pageblock_pages(),
        })
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.pages.capacity() * size_of::<PackedPage>()
            + self.pageblocks.capacity() * size_of::<Pageblock>()
    }

    pub(super) fn page(&self, page: u32) -> Page {
        let pageblock = &self.pageblocks[(page / self.pageblock_pages) as usize];
        if page % self.pageblock_pages < pageblock.touched {
            self.pages[page as usize].unpack()
        } else {
            pageblock.rest
        }
    }

    /// The pages of `pageblock`.
    pub(super) fn pages_of(&self, pageblock: usize) -> Range<u32> {
        let first = pageblock as u32 * self.pageblock_pages;
        first..first + self.pageblock_pages
    }

    /// The pages of `pageblock` that have a state of their own.
    pub(super) fn touched_pages_of(&self, pageblock: usize) -> Range<u32> {
        let first = pageblock as u32 * self.pageblock_pages;
        first..first + self.pageblocks[pageblock].touched
    }

    /// The pages of `pageblock` that may be in different states: all others are like the last one.
    pub(super) fn different_pages_of(&self, pageblock: usize) -> Range<u32> {
        let (all, touched) = (self.pages_of(pageblock), self.touched_pages_of(pageblock));
        touched.start..all.end.min(touched.end + 1)
    }

    /// Puts every page of `pageblock`, none of them held, into the same state.
    pub(super) fn fill(&mut self, pageblock: usize, state: Page) {
        let pages = self.pageblock_pages;
        let all_if = |condition| if condition { pages } else { 0 };
        let block = &mut self.pageblocks[pageblock];
        *block = Pageblock {
            first_free: None,
            touched: 0,
            rest: state,
            class: if block.class == Class::Cma {
                Class::Cma
            } else {
                Class::Movable
            },
            free: all_if(matches!(state, Page::Free { .. })),
            held: 0,
            unmovable: 0,
            poisoned: 0,
            absent: all_if(state == Page::Absent),
            ..*block
        };
    }

    /// Puts one page of `pageblock` that is in its first state since [`fill`](Self::fill) into another: at boot.
    pub(super) fn assign(&mut self, page: u32, state: Page) {
        self.touch(page);
        let old = self.page(page);
        if let Page::Free { .. } = old {
            self.unlink(page);
        }
        let block = self.block_of(page);
        match old {
            Page::Free { .. } => block.free -= 1,
            Page::Absent => block.absent -= 1,
            _ => {}
        }
        match state {
            Page::Free { .. } => {
                let next = block.first_free.replace(page);
                block.free += 1;
                self.set(page, Page::Free { next });
                return;
            }
            Page::Absent => block.absent += 1,
            Page::Poisoned => block.poisoned += 1,
            _ => {}
        }
        self.set(page, state);
    }

    /// Gives a free page of `pageblock` to `handle`: one freed lately, else the lowest.
    pub(super) fn take(
        &mut self,
        pageblock: usize,
        handle: u32,
        mobility: Mobility,
    ) -> Option<u32> {
        let first = self.pages_of(pageblock).start;
        let whole = self.pageblock_pages;
        let next = match self.pageblocks[pageblock].first_free {
            Some(page) => match self.page(page) {
                Page::Free { next } => Some((page, next)),
                _ => None,
            },
            None => None,
        };
        let block = &mut self.pageblocks[pageblock];
        let page = match next {
            Some((page, next)) => {
                block.first_free = next;
                page
            }
            None if matches!(block.rest, Page::Free { .. }) && block.touched < whole => {
                block.touched += 1;
                first + block.touched - 1
            }
            None => return None,
        };
        if mobility == Mobility::Unmovable {
            // Memory for contiguous allocations stays that, also while one has it.
            if block.free == whole && block.class != Class::Cma {
                block.class = Class::Unmovable;
            }
            block.unmovable += 1;
        }
        block.free -= 1;
        block.held += 1;
        self.set(page, Page::Held { handle });
        Some(page)
    }

    /// Makes the held `page` free again.
    pub(super) fn put(&mut self, page: u32, mobility: Mobility) {
        let whole = self.pageblock_pages;
        let block = self.block_of(page);
        block.unmovable -= u32::from(mobility == Mobility::Unmovable);
        block.held -= 1;
        block.free += 1;
        let next = block.first_free.replace(page);
        if block.free == whole {
            // As new: lowest address first again, and anybody's.
            let index = (page / whole) as usize;
            self.fill(index, Page::Free { next: None });
        } else {
            self.set(page, Page::Free { next });
        }
    }

    /// Takes the free or held `page` out of use for good; it has no handle any more.
    pub(super) fn poison(&mut self, page: u32, mobility: Mobility) {
        if let Page::Held { .. } = self.page(page) {
            let block = self.block_of(page);
            block.unmovable -= u32::from(mobility == Mobility::Unmovable);
            block.held -= 1;
            block.poisoned += 1;
            self.set(page, Page::Poisoned);
        } else {
            self.assign(page, Page::Poisoned);
        }
    }

    /// Gives every page up to `page` a state of its own.
    fn touch(&mut self, page: u32) {
        let index = (page / self.pageblock_pages) as usize;
        let first = self.pages_of(index).start;
        while first + self.pageblocks[index].touched <= page {
            let block = &mut self.pageblocks[index];
            let touched = first + block.touched;
            block.touched += 1;
            let state = match block.rest {
                Page::Free { .. } => Page::Free {
                    next: block.first_free.replace(touched),
                },
                other => other,
            };
            self.set(touched, state);
        }
    }

    /// Takes a free page out of its pageblock's list.
    fn unlink(&mut self, page: u32) {
        let Page::Free { next: after } = self.page(page) else {
            return;
        };
        let mut cursor = self.block_of(page).first_free;
        if cursor == Some(page) {
            self.block_of(page).first_free = after;
            return;
        }
        while let Some(before) = cursor {
            let Page::Free { next } = self.page(before) else {
                return;
            };
            if next == Some(page) {
                self.set(before, Page::Free { next: after });
                return;
            }
            cursor = next;
        }
    }

    fn block_of(&mut self, page: u32) -> &mut Pageblock {
        &mut self.pageblocks[(page / self.pageblock_pages) as usize]
    }

    fn set(&mut self, page: u32, state: Page) {
        self.pages[page as usize] = PackedPage::pack(state);
    }
}

fn filled<T: Clone>(value: T, count: usize) -> Result<Vec<T>, Error> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(count).map_err(|_| Error::NoMemory)?;
    vec.resize(count, value);
    Ok(vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Page = Page::Free { next: None };

    #[test]
    fn every_page_state_survives_packing() {
        for page in [
            FREE,
            Page::Free { next: Some(0) },
            Page::Free {
                next: Some((1 << 30) - 1),
            },
            Page::Held { handle: 0 },
            Page::Held {
                handle: PackedPage::FREE - 1,
            },
            Page::Withheld,
            Page::Reserved,
            Page::Absent,
            Page::Memmap,
            Page::Poisoned,
        ] {
            assert_eq!(PackedPage::pack(page).unpack(), page);
        }
    }

    #[test]
    fn pages_are_taken_lowest_first_and_only_from_their_pageblock() {
        let mut memmap = Memmap::new(&Profile::X86_64).unwrap();
        memmap.fill(1, FREE);
        assert_eq!(memmap.take(1, 7, Mobility::Movable), Some(512));
        assert_eq!(memmap.take(1, 8, Mobility::Movable), Some(513));
        assert_eq!(memmap.pageblocks[1].held, 2);
        memmap.put(512, Mobility::Movable);
        assert_eq!(memmap.take(1, 9, Mobility::Movable), Some(512));
        assert_eq!(memmap.page(512), Page::Held { handle: 9 });
        assert_eq!(memmap.take(0, 9, Mobility::Movable), None);
    }

    #[test]
    fn poisoned_page_is_never_taken_wherever_it_was() {
        let mut memmap = Memmap::new(&Profile::X86_64).unwrap();
        memmap.fill(0, FREE);
        for handle in 0..4 {
            memmap.take(0, handle, Mobility::Movable);
        }
        for page in [3, 1, 2] {
            memmap.put(page, Mobility::Movable);
        }
        // In the list, held, and not touched yet.
        for page in [1, 0, 100] {
            memmap.poison(page, Mobility::Movable);
        }
        let counts = memmap.pageblocks[0];
        assert_eq!((counts.free, counts.held, counts.poisoned), (509, 0, 3));
        let mut taken: Vec<u32> =
            core::iter::from_fn(|| memmap.take(0, 0, Mobility::Movable)).collect();
        taken.sort_unstable();
        let expected: Vec<u32> = (0..512)
            .filter(|page| ![0, 1, 100].contains(page))
            .collect();
        assert_eq!(taken, expected);
    }
}

//! What must hold between any two operations, recomputed from scratch.

use super::section::Page;
use super::{BlockState, Hotplug, PageCounts, PhysicalMemory};

impl<M: PhysicalMemory> Hotplug<M> {
    /// Recounts everything. For tests: it looks at every page.
    ///
    /// # Errors
    ///
    /// What does not hold.
    pub fn check_invariants(&self) -> Result<(), &'static str> {
        let ensure = |holds: bool, what| if holds { Ok(()) } else { Err(what) };
        let sections_per_block =
            1usize << (self.profile.memory_block_shift - self.profile.section_shift);
        ensure(
            self.sections.len() == self.blocks.len() * sections_per_block,
            "a section without a memory block",
        )?;
        let mut counts = PageCounts::default();
        let mut held = 0;
        let mut allocatable_pageblocks = 0;
        for (id, state) in &self.blocks {
            for number in self.sections_of_block(*id) {
                let section = self.sections.get(&number);
                let section = section.ok_or("a memory block without its sections")?;
                ensure(
                    section.online == (*state != BlockState::Offline),
                    "a section is not in the state of its memory block",
                )?;
                if section.online {
                    counts.present += self.block_pages() / sections_per_block as u64;
                }
            }
            for pageblock in self.pageblocks_of_block(*id) {
                let (section, index) = self.present(pageblock);
                let (number, _) = self.locate(pageblock);
                let noted = &section.pageblocks[index];
                let (mut free, mut offline, mut unmovable) = (0, 0, 0);
                for page in section.pages_of(index) {
                    match section.page(page) {
                        Page::Free { .. } => free += 1,
                        Page::Offline => offline += 1,
                        Page::Held { handle } => {
                            held += 1;
                            let owner = self.handles.by_index(handle);
                            unmovable += u32::from(owner.is_unmovable());
                            let named = owner.pfn == self.pfn(number, page);
                            ensure(named, "a held page is not the one its handle names")?;
                        }
                    }
                }
                ensure(
                    (free, offline, unmovable) == (noted.free, noted.offline, noted.unmovable),
                    "the counts of a pageblock are wrong",
                )?;
                ensure(
                    section.online || offline == self.profile.pageblock_pages(),
                    "an offline memory block has pages in use",
                )?;
                ensure(
                    *state != BlockState::GoingOffline || noted.isolated,
                    "a block going offline is not isolated",
                )?;
                let allocatable = free > 0 && !noted.isolated;
                ensure(
                    allocatable == self.allocatable.contains(&pageblock),
                    "the allocator's pageblocks are not those with free pages",
                )?;
                allocatable_pageblocks += usize::from(allocatable);
                counts.managed += u64::from(self.profile.pageblock_pages() - offline);
                counts.free += u64::from(free);
                counts.allocatable += if allocatable { u64::from(free) } else { 0 };
            }
        }
        ensure(
            allocatable_pageblocks == self.allocatable.len(),
            "the allocator has pageblocks that were removed",
        )?;
        ensure(counts == self.counts, "the page counts are wrong")?;
        ensure(
            held == self.handles.count(),
            "a handle without a page, or a page without a handle",
        )
    }
}

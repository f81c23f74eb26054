//! What must hold between any two operations, recomputed from scratch.

use alloc::collections::BTreeMap;

use super::node::{Share, Zone};
use super::page::Page;
use super::section::{SubSections, sub_sections_by_section};
use super::{BlockState, Hotplug};

impl<M> Hotplug<M> {
    /// Recounts everything. For tests: it looks at every page that was ever used.
    ///
    /// | | holds |
    /// |---|---|
    /// | 1 | present pages of a zone = pages of its online memory blocks |
    /// | 2 | managed = present − withheld − reserved − self-hosted metadata |
    /// | 3 | free ≤ managed |
    /// | 4 | a page is in one zone at most: a pageblock in one, an offline one in none |
    /// | 5 | a span covers all pages of its zone |
    /// | 6 | no page of withheld or offline memory is free or allocated |
    /// | 7 | memory blocks, sections, resources and nodes agree |
    /// | 8 | counters of pageblocks, zones, groups, nodes and poisoned pages = a recount |
    /// | 9 | each allocated page has one handle, which names it |
    /// | 10 | active sub-sections = those of System RAM and those of device memory |
    ///
    /// # Errors
    ///
    /// What does not hold.
    pub fn check_invariants(&self) -> Result<(), &'static str> {
        let mut zones: BTreeMap<(u32, usize), Zone> = BTreeMap::new();
        let mut held = 0;
        let mut blocks_of_node: BTreeMap<u32, u64> = BTreeMap::new();
        let mut groups: BTreeMap<_, (u64, u64, u64)> = BTreeMap::new();
        let mut poisoned_total = 0;
        let mut ram_sections = 0;
        for (id, block) in &self.blocks {
            let online = block.state != BlockState::Offline;
            *blocks_of_node.entry(block.nid).or_default() += 1;
            poisoned_total += u64::from(block.poisoned);
            ensure(
                online || block.zone.is_none(),
                "an offline memory block is in a zone",
            )?;
            if let Some(group) = block.group {
                let counted = groups.entry(group).or_default();
                counted.0 += 1;
                match (online, block.zone) {
                    (true, Some(super::ZoneKind::Movable)) => {
                        counted.2 += self.config.profile.memory_block_pages();
                    }
                    (true, _) => counted.1 += self.config.profile.memory_block_pages(),
                    (false, _) => {}
                }
            }
            let mut present = 0;
            for number in self.sections_of_block(*id) {
                let Some(section) = self.sections.get(&number) else {
                    ensure(block.early, "a memory block without its sections")?;
                    continue;
                };
                if block.early && section.memmap.is_none() {
                    // Device memory beside the sections that were there at boot.
                    continue;
                }
                ram_sections += 1;
                ensure(
                    section.online == online,
                    "a section is not in the state of its memory block",
                )?;
                ensure(
                    section.early == block.early,
                    "a section is not as early as its memory block",
                )?;
                let Some(memmap) = &section.memmap else {
                    return Err("System RAM without metadata");
                };
                for index in 0..memmap.pageblocks.len() {
                    let noted = &memmap.pageblocks[index];
                    let pageblock = self.first_pageblock(number) + index as u64;
                    let (mut free, mut allocated, mut unmovable) = (0, 0, 0);
                    let (mut poisoned, mut absent, mut others) = (0, 0, 0);
                    let touched = memmap.touched_pages_of(index);
                    let pages = memmap.pages_of(index);
                    let rest = pages.end - touched.end;
                    // All pages beyond the touched ones are alike: one stands for them.
                    let alike = (rest > 0).then_some((touched.end, rest));
                    for (page, count) in touched.map(|page| (page, 1)).chain(alike) {
                        match memmap.page(page) {
                            Page::Free { .. } => free += count,
                            Page::Absent => absent += count,
                            Page::Poisoned => poisoned += count,
                            Page::Withheld | Page::Memmap | Page::Reserved => others += count,
                            Page::Held { handle } => {
                                allocated += count;
                                held += 1;
                                let owner = self.handles.by_index(handle);
                                unmovable +=
                                    u32::from(owner.mobility() == super::Mobility::Unmovable);
                                let named = owner.pfn() == Some(self.pfn(number, page));
                                ensure(named, "an allocated page is not the one its handle names")?;
                            }
                        }
                    }
                    ensure(
                        (free, allocated, unmovable, poisoned, absent)
                            == (
                                noted.free,
                                noted.held,
                                noted.unmovable,
                                noted.poisoned,
                                noted.absent,
                            ),
                        "the counters of a pageblock are wrong",
                    )?;
                    ensure(
                        free + allocated + poisoned + absent + others == memmap.pageblock_pages,
                        "a page is lost",
                    )?;
                    ensure(
                        !online || noted.zone.is_some() || absent == memmap.pageblock_pages,
                        "an online pageblock is in no zone",
                    )?;
                    ensure(
                        online || (noted.zone.is_none() && free + allocated == 0),
                        "an offline memory block has pages in use",
                    )?;
                    ensure(
                        !(noted.withheld && online && free + allocated > 0),
                        "a withheld pageblock has pages in use",
                    )?;
                    ensure(
                        block.state != BlockState::GoingOffline
                            || noted.isolated
                            || noted.is_memmap(),
                        "a block going offline is not isolated",
                    )?;
                    if let Some(zone) = noted.zone {
                        ensure(
                            block.zone.is_none() || block.zone == Some(zone.kind),
                            "a pageblock is not in the zone of its memory block",
                        )?;
                        let tally = noted.tally(memmap.pageblock_pages);
                        present += u64::from(tally.present);
                        let first = self.pfn(number, pages.start);
                        let recount = zones.entry((zone.nid, zone.kind as usize)).or_default();
                        recount.count(
                            pageblock,
                            section.early,
                            Share {
                                zone,
                                tally,
                                shelf: noted.shelf(memmap.pageblock_pages),
                            },
                        );
                        let span = self.nodes.0[&zone.nid].zone(zone.kind).span.clone();
                        ensure(
                            absent > 0
                                || span.is_some_and(|span| {
                                    span.start <= first
                                        && first + u64::from(memmap.pageblock_pages) <= span.end
                                }),
                            "a span does not cover a page of its zone",
                        )?;
                    }
                }
            }
            ensure(
                !online || present == block.ram_pages,
                "the present pages of a memory block are wrong",
            )?;
            let start = id << self.config.profile.memory_block_shift;
            let size = self.config.profile.memory_block_size();
            ensure(
                block.early
                    || self.resources.intersects(start..start + size)
                        == super::Intersection::Intersects,
                "a memory block without its resource",
            )?;
        }
        let device_only = self.sections.values().filter(|s| s.memmap.is_none());
        ensure(
            self.sections.len() == ram_sections + device_only.count(),
            "a section without a memory block",
        )?;
        self.check_sub_sections()?;
        for (id, zone) in self.nodes.zones() {
            let recount = zones
                .remove(&(id.nid, id.kind as usize))
                .unwrap_or_default();
            ensure(recount.agrees(zone), "the counters of a zone are wrong")?;
            ensure(
                zone.free <= zone.managed,
                "more pages are free than managed",
            )?;
            ensure(
                zone.managed <= zone.present,
                "more pages are managed than present",
            )?;
        }
        ensure(
            zones.is_empty(),
            "pages are in a zone of a node that is not there",
        )?;
        for (nid, node) in &self.nodes.0 {
            let counted = blocks_of_node.remove(nid).unwrap_or(0);
            ensure(
                counted == node.block_count,
                "a node's blocks are miscounted",
            )?;
        }
        for (id, group) in self.groups.iter() {
            let counted = groups.remove(&id).unwrap_or_default();
            ensure(
                counted
                    == (
                        group.block_count,
                        group.present_kernel_pages,
                        group.present_movable_pages,
                    ),
                "the counters of a group are wrong",
            )?;
        }
        ensure(groups.is_empty(), "a memory block of an unknown group")?;
        ensure(
            poisoned_total == self.poisoned_pages,
            "the poisoned pages are miscounted",
        )?;
        ensure(
            held == self.handles.count(),
            "a handle without a page, or a page without a handle",
        )
    }

    /// The sub-sections that have memory are those of System RAM and those of device memory.
    fn check_sub_sections(&self) -> Result<(), &'static str> {
        let profile = &self.config.profile;
        let count = profile.sub_sections_per_section();
        let whole = SubSections::of(0..count);
        let mut of_devices: BTreeMap<u64, SubSections> = BTreeMap::new();
        for entry in self.device_ranges.iter() {
            let bytes = entry.range.bytes.clone();
            ensure(
                self.resources.intersects(bytes.clone()) == super::Intersection::Disjoint,
                "device memory in System RAM",
            )?;
            let claimed = |r: &super::Resource| r.range() == bytes && r.name() == &*entry.name;
            ensure(
                self.resources.iomem().any(claimed),
                "device memory without its resource",
            )?;
            for (number, range) in sub_sections_by_section(profile, bytes) {
                let others = of_devices.entry(number).or_default();
                ensure(!others.intersects(range), "device memory twice")?;
                *others = others.union(range);
                let section = self.sections.get(&number);
                ensure(
                    section.is_some_and(|s| s.active.contains_all(range)),
                    "device memory without metadata",
                )?;
                ensure(
                    range == whole || section.is_some_and(|s| s.device_taint),
                    "a section that does not know of its device memory",
                )?;
            }
        }
        for (number, section) in &self.sections {
            ensure(!section.active.is_empty(), "a section without memory")?;
            let device = of_devices.remove(number).unwrap_or_default();
            for index in 0..count {
                let active = section.active.contains(index);
                let ram = section.memmap.as_ref().is_some_and(|memmap| {
                    let pages = profile.pages_per_sub_section();
                    (index * pages..(index + 1) * pages)
                        .any(|page| memmap.page(page) != Page::Absent)
                });
                ensure(
                    active == (ram || device.contains(index)),
                    "a sub-section that has memory is not active, or the other way round",
                )?;
            }
        }
        Ok(())
    }

    fn first_pageblock(&self, section: u64) -> u64 {
        section << (self.config.profile.section_shift - self.config.profile.pageblock_shift)
    }
}

fn ensure(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(what) }
}

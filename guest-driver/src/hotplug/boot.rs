//! The memory a kernel finds when it starts. It is not added: it is online before anybody could object.
//!
//! Linux: `memblock`, `free_area_init`, `sparse_init`, `memory_dev_init`.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use super::memory_block::{BlockState, MemoryBlock};
use super::node::ZoneId;
use super::notifier::prevent_boot_memory_removal;
use super::page::{Class, Memmap, Page};
use super::resource::ResourceFlags;
use super::section::{Section, sub_sections_by_section};
use super::zone::ZoneKind;
use super::zone_rules::ZoneRules;
use super::{Config, Error, Hotplug, PhysicalMemory};

/// A range of System RAM at boot, of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootRange {
    /// The bytes; a page at either end that is not all RAM is not used.
    pub bytes: Range<u64>,
    /// The node.
    pub nid: u32,
}

/// The memory a kernel finds when it starts.
///
/// ```text
///  RAM       |######################|.......|##############################|   |=============|
///  zones     |DMA|      DMA32       |       |     Normal     |   Movable   |    special_purpose:
///            |  |rr|                |       |  |cc|          |             |    Soft Reserved, in no zone
///                ^ reserved           hole       ^ cma       ^ movable_from
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// System RAM, as the firmware's memory map has it.
    pub ram: Vec<BootRange>,
    /// Memory set aside for a driver (firmware: special purpose; Linux: `Soft Reserved`): not RAM until that
    /// [adds](Hotplug::add_kmem) it, unless [`Config::soft_reserve`] is off.
    pub special_purpose: Vec<BootRange>,
    /// Addresses where memory may be added later, and the node it is on then (ACPI: the hot-pluggable ranges of the
    /// SRAT), see [`Hotplug::target_node`].
    pub hot_pluggable: Vec<BootRange>,
    /// What ACPI calls each node, in the order of the nodes; empty on a machine without such a table (Linux:
    /// `node_to_pxm_map`), see [`Hotplug::node_of_proximity_domain`].
    pub proximity_domains: Vec<u32>,
    /// Where Movable begins on a node: the node and the address, a whole pageblock's (Linux: `kernelcore`,
    /// `movablecore`, `movable_node`). On other nodes there is no Movable at boot.
    pub movable_from: Vec<(u32, u64)>,
    /// Bytes of RAM in use for ever: kernel text, metadata of boot memory.
    pub reserved: Vec<Range<u64>>,
    /// Bytes of RAM for contiguous allocations, whole pageblocks.
    pub cma: Vec<Range<u64>>,
    /// Nodes with CPUs, which are online without memory.
    pub cpu_nodes: Vec<u32>,
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// A kernel with this memory at boot, all of it online.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the sizes of the profile do not fit into each other, a node is not possible, a pageblock
    /// would be in two zones or on two nodes, or Movable begins in the middle of one, or memory for contiguous
    /// allocations is not made of whole ones; [`Error::TooBig`] beyond what can be addressed, [`Error::Exists`] if two
    /// ranges overlap, [`Error::NoMemory`] if the metadata does not fit into the heap.
    pub fn boot(config: Config, boot: &Boot, memory: M) -> Result<Self, Error> {
        let mut hotplug = Self::with_config(config, memory)?;
        if !config.profile.boot_memory_removable {
            hotplug.register_notifier(0, Box::new(prevent_boot_memory_removal));
        }
        let mut all = [boot.ram.as_slice(), &boot.special_purpose].concat();
        all.sort_by_key(|range| range.bytes.start);
        let overlap = |pair: &[BootRange]| pair[1].bytes.start < pair[0].bytes.end;
        if all.windows(2).any(overlap) {
            return Err(Error::Exists);
        }
        let mut ram = boot.ram.clone();
        match config.soft_reserve {
            true => hotplug.soft_reserve(&boot.special_purpose)?,
            false => ram.extend_from_slice(&boot.special_purpose),
        }
        hotplug.boot_ram.clone_from(&ram);
        hotplug.reserved_ranges = [boot.special_purpose.as_slice(), &boot.hot_pluggable].concat();
        for range in &boot.hot_pluggable {
            hotplug.possible(range.nid)?;
        }
        if boot.proximity_domains.len() > config.possible_nodes as usize {
            return Err(Error::Invalid);
        }
        hotplug
            .proximity_domains
            .clone_from(&boot.proximity_domains);
        for nid in &boot.cpu_nodes {
            hotplug.possible(*nid)?;
            hotplug.nodes.get_mut(*nid).has_cpus = true;
        }
        ram.sort_by_key(|range| range.bytes.start);
        for range in &ram {
            hotplug.add_boot_range(range)?;
        }
        for range in &ram {
            hotplug.fill_boot_range(range, boot)?;
        }
        for range in &boot.cma {
            let pageblocks =
                hotplug.pageblocks(range.start, range.end.saturating_sub(range.start))?;
            for pageblock in pageblocks {
                hotplug.known_pageblock(pageblock)?;
                let whole = hotplug.modify(pageblock, |memmap, index| {
                    memmap.pageblocks[index].class = Class::Cma;
                    memmap.pageblocks[index].absent == 0
                });
                if !whole {
                    return Err(Error::Invalid);
                }
            }
        }
        for range in &boot.reserved {
            hotplug.reserve(range)?;
        }
        hotplug.span_boot_zones(&ram, boot);
        hotplug.describe_boot_blocks(&ram);
        Ok(hotplug)
    }

    /// Leaves memory to its drivers.
    fn soft_reserve(&mut self, ranges: &[BootRange]) -> Result<(), Error> {
        for BootRange { bytes, nid } in ranges {
            self.possible(*nid)?;
            let size = bytes.end.saturating_sub(bytes.start);
            let range = self.addressable(bytes.start, size)?;
            let flags = ResourceFlags::RESERVED;
            self.resources.claim(range, "Soft Reserved", flags)?;
        }
        Ok(())
    }

    /// Resources, sections and metadata of a range.
    fn add_boot_range(&mut self, range: &BootRange) -> Result<(), Error> {
        self.possible(range.nid)?;
        let profile = self.config.profile;
        let bytes = &range.bytes;
        let size = bytes.end.checked_sub(bytes.start).ok_or(Error::Invalid)?;
        let bytes = self.addressable(bytes.start, size)?;
        self.resources.add_boot_ram(bytes.clone())?;
        // A sub-section has memory if any whole page of it has.
        let pages = self.whole_pages(&bytes);
        if pages.is_empty() {
            return Ok(());
        }
        let pages_per_sub_section = u64::from(profile.pages_per_sub_section());
        let first = pages.start / pages_per_sub_section;
        let end = pages.end.div_ceil(pages_per_sub_section);
        let touched = first << profile.sub_section_shift..end << profile.sub_section_shift;
        for (number, active) in sub_sections_by_section(&profile, touched) {
            let section = match self.sections.get_mut(&number) {
                Some(section) => section,
                None => {
                    let mut memmap = Memmap::new(&profile)?;
                    for index in 0..memmap.pageblocks.len() {
                        memmap.fill(index, Page::Absent);
                    }
                    let new = Section {
                        online: true,
                        early: true,
                        memmap: Some(memmap),
                        ..Section::default()
                    };
                    self.sections.entry(number).or_insert(new)
                }
            };
            // Two ranges may meet in one sub-section.
            section.active = section.active.union(active);
        }
        Ok(())
    }

    /// Puts the pages of a range into their zones, free.
    fn fill_boot_range(&mut self, range: &BootRange, boot: &Boot) -> Result<(), Error> {
        let pages = self.whole_pages(&range.bytes);
        let pageblock_pages = u64::from(self.config.profile.pageblock_pages());
        let mut first = pages.start;
        while first < pages.end {
            let pageblock = self.pageblock_of(first);
            let end = pages.end.min((pageblock + 1) * pageblock_pages);
            let zone = self.boot_zone(range.nid, first, end, boot)?;
            let whole = end - first == pageblock_pages;
            let (_, first_page) = self.locate_page(first);
            let fits = self.modify(pageblock, |memmap, index| {
                if memmap.pageblocks[index]
                    .zone
                    .is_some_and(|other| other != zone)
                {
                    return false;
                }
                memmap.pageblocks[index].zone = Some(zone);
                if whole {
                    memmap.fill(index, Page::Free { next: None });
                } else {
                    // From the highest, so that the lowest is allocated first.
                    for page in (first_page..first_page + (end - first) as u32).rev() {
                        memmap.assign(page, Page::Free { next: None });
                    }
                }
                true
            });
            if !fits {
                return Err(Error::Invalid);
            }
            first = end;
        }
        Ok(())
    }

    /// The zone of page frames that lie in one pageblock.
    fn boot_zone(&self, nid: u32, first: u64, end: u64, boot: &Boot) -> Result<ZoneId, Error> {
        let zones = self.boot_zone_limits(nid, boot)?;
        let zone = zones
            .into_iter()
            .find(|(_, limits)| limits.contains(&first))
            .filter(|(_, limits)| end <= limits.end);
        let (kind, _) = zone.ok_or(Error::Invalid)?;
        Ok(ZoneId { nid, kind })
    }

    /// Which page frames of a node are in which zone at boot.
    fn boot_zone_limits(
        &self,
        nid: u32,
        boot: &Boot,
    ) -> Result<[(ZoneKind, Range<u64>); ZoneKind::ALL.len()], Error> {
        let profile = &self.config.profile;
        let movable = boot.movable_from.iter().find(|(node, _)| *node == nid);
        let movable = match movable {
            Some((_, address)) if address.trailing_zeros() < profile.pageblock_shift => {
                return Err(Error::Invalid);
            }
            Some((_, address)) => address >> profile.page_shift,
            None => u64::MAX,
        };
        let dma = (profile.dma_end >> profile.page_shift).min(movable);
        let dma32 = (profile.dma32_end >> profile.page_shift)
            .min(movable)
            .max(dma);
        Ok([
            (ZoneKind::Dma, 0..dma),
            (ZoneKind::Dma32, dma..dma32),
            (ZoneKind::Normal, dma32..movable),
            (ZoneKind::Movable, movable..u64::MAX),
        ])
    }

    /// Takes RAM out of use for ever.
    fn reserve(&mut self, range: &Range<u64>) -> Result<(), Error> {
        let profile = self.config.profile;
        let last = range.end.checked_sub(1).ok_or(Error::Invalid)?;
        let pages = range.start >> profile.page_shift..(last >> profile.page_shift) + 1;
        let per_pageblock = u64::from(profile.pageblock_pages());
        let mut first = pages.start;
        while first < pages.end {
            let pageblock = self.pageblock_of(first);
            self.known_pageblock(pageblock)?;
            let end = pages.end.min((pageblock + 1) * per_pageblock);
            let count = end - first;
            let (_, page) = self.locate_page(first);
            self.modify(pageblock, |memmap, index| {
                if u64::from(memmap.pageblocks[index].free) == per_pageblock
                    && count == per_pageblock
                {
                    return memmap.fill(index, Page::Reserved);
                }
                for page in page..page + count as u32 {
                    if let Page::Free { .. } = memmap.page(page) {
                        memmap.assign(page, Page::Reserved);
                    }
                }
            });
            first = end;
        }
        Ok(())
    }

    /// A zone spans what its node has between its limits, holes included.
    fn span_boot_zones(&mut self, ram: &[BootRange], boot: &Boot) {
        for range in ram {
            let nodes = ram.iter().filter(|other| other.nid == range.nid);
            let pages = nodes.map(|other| self.whole_pages(&other.bytes));
            let hull = pages.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            let (Some(hull), Ok(limits)) = (hull, self.boot_zone_limits(range.nid, boot)) else {
                continue;
            };
            for (kind, limits) in limits {
                let span = hull.start.max(limits.start)..hull.end.min(limits.end);
                let zone = self.nodes.get_mut(range.nid).zone_mut(kind);
                if zone.present > 0 && !span.is_empty() {
                    zone.extend(&span);
                }
            }
        }
    }

    /// A memory block exists where any of its sections does.
    fn describe_boot_blocks(&mut self, ram: &[BootRange]) {
        let shift = self.config.profile.memory_block_shift - self.config.profile.section_shift;
        let mut ids: Vec<u64> = self.sections.keys().map(|number| number >> shift).collect();
        ids.dedup();
        for id in ids {
            let mut zones = Vec::new();
            let mut ram_pages = 0;
            for pageblock in self.pageblocks_of_block(id) {
                let (number, index) = self.locate(pageblock);
                let memmap = self.sections.get(&number).and_then(|s| s.memmap.as_ref());
                let Some(memmap) = memmap else { continue };
                let counts = &memmap.pageblocks[index];
                ram_pages += u64::from(memmap.pageblock_pages - counts.absent);
                if counts.zone.is_some_and(|zone| !zones.contains(&zone)) {
                    zones.extend(counts.zone);
                }
            }
            let pages = self.pages_of_block(id);
            let here = ram.iter().filter(|range| {
                let other = self.whole_pages(&range.bytes);
                other.start < pages.end && pages.start < other.end
            });
            let nid = here.last().map_or(0, |range| range.nid);
            let zone = match zones.as_slice() {
                [only] => Some(only.kind),
                _ => None,
            };
            let block = MemoryBlock {
                state: BlockState::Online,
                nid,
                zone,
                joined: zone.filter(|_| self.config.zone_rules == ZoneRules::UpTo4_12),
                online_type: None,
                group: None,
                memmap_pages: 0,
                ram_pages,
                poisoned: 0,
                early: true,
            };
            self.blocks.insert(id, block);
            self.nodes.get_mut(nid).block_count += 1;
        }
    }

    /// The pages that lie wholly in a byte range.
    fn whole_pages(&self, bytes: &Range<u64>) -> Range<u64> {
        let profile = &self.config.profile;
        let end = bytes.end >> profile.page_shift;
        let start = bytes.start.div_ceil(profile.page_size());
        start..end.max(start)
    }

    /// Refuses pageblocks that are not in any zone.
    fn known_pageblock(&self, pageblock: u64) -> Result<(), Error> {
        let (number, index) = self.locate(pageblock);
        let memmap = self.sections.get(&number).and_then(|s| s.memmap.as_ref());
        memmap
            .and_then(|memmap| memmap.pageblocks[index].zone)
            .map(|_| ())
            .ok_or(Error::Invalid)
    }
}

//! What is where, counted from scratch.

use super::*;

impl Model {
    pub(super) fn is_ram(&self, pfn: u64) -> bool {
        self.block_at(pfn).is_some_and(|block| {
            !block.early || self.boot_ram.iter().any(|(range, _)| range.contains(&pfn))
        })
    }

    pub(super) fn device_at(&self, address: u64) -> Option<&Device> {
        self.devices
            .iter()
            .find(|device| device.bytes.contains(&address))
    }

    /// A sub-section that a whole page of RAM is in.
    pub(super) fn sub_section_has_ram(&self, number: u64) -> bool {
        let size = self.profile.sub_section_size();
        let bytes = number * size..(number + 1) * size;
        match self.blocks.get(&(bytes.start / self.block_size())) {
            Some(block) if block.early => self.ram.iter().any(|ram| {
                let page = self.page();
                let whole = ram.bytes.start.div_ceil(page) * page..ram.bytes.end / page * page;
                whole.start < whole.end && meet(&whole, &bytes)
            }),
            Some(_) => true,
            None => false,
        }
    }

    pub(super) fn sub_section_is_active(&self, number: u64) -> bool {
        let size = self.profile.sub_section_size();
        self.sub_section_has_ram(number) || self.device_at(number * size).is_some()
    }

    pub(super) fn is_early_section(&self, number: u64) -> bool {
        let first = number * self.profile.section_size() / self.profile.pageblock_size();
        self.pageblocks
            .get(&first)
            .is_some_and(|record| record.early)
    }

    /// Number, online, early, device, active sub-sections of each section.
    pub(crate) fn sections(&self) -> Vec<(u64, bool, bool, bool, u32)> {
        let section = self.profile.section_size();
        let sub_section = self.profile.sub_section_size();
        let mut numbers: BTreeSet<u64> = self
            .pageblocks
            .keys()
            .map(|pageblock| pageblock * self.profile.pageblock_size() / section)
            .collect();
        for device in &self.devices {
            numbers.extend(device.bytes.start / section..(device.bytes.end - 1) / section + 1);
        }
        let describe = |number: u64| {
            let first = number * section / self.profile.pageblock_size();
            let is_ram = self.pageblocks.contains_key(&first);
            let block = self.blocks.get(&(number * section / self.block_size()));
            let online = is_ram && block.is_some_and(|block| block.state != BlockState::Offline);
            let subs = number * section / sub_section..(number + 1) * section / sub_section;
            let active = match block {
                Some(block) if is_ram && !block.early => subs.end - subs.start,
                _ => subs.filter(|sub| self.sub_section_is_active(*sub)).count() as u64,
            };
            let early = self.is_early_section(number);
            (
                number,
                online,
                early,
                self.tainted.contains(&number),
                active as u32,
            )
        };
        numbers.into_iter().map(describe).collect()
    }

    pub(crate) fn pfn_valid(&self, pfn: u64) -> bool {
        let address = pfn * self.page();
        self.is_early_section(address / self.profile.section_size())
            || self.sub_section_is_active(address / self.profile.sub_section_size())
    }

    pub(crate) fn pfn_is_online(&self, pfn: u64) -> bool {
        let address = pfn * self.page();
        self.block_at(pfn)
            .is_some_and(|block| block.state != BlockState::Offline)
            && self.sub_section_has_ram(address / self.profile.sub_section_size())
            && self.device_at(address).is_none()
    }

    pub(super) fn uses(&self) -> BTreeMap<u64, Uses> {
        let per = self.pageblock_pages();
        let mut uses: BTreeMap<u64, Uses> = BTreeMap::new();
        for page in &self.held {
            if let Some(pfn) = page.pfn {
                let uses = uses.entry(pfn / per).or_default();
                uses.held += 1;
                uses.unmovable += u64::from(page.unmovable);
                uses.pinned += u64::from(page.pins > 0);
            }
        }
        for (pfn, what) in &self.unusual {
            let uses = uses.entry(pfn / per).or_default();
            match what {
                Unusual::Reserved => uses.reserved += 1,
                Unusual::Poisoned => uses.poisoned += 1,
            }
        }
        uses
    }

    /// Managed pages of a pageblock.
    pub(super) fn managed(record: &Pageblock, uses: &Uses) -> u64 {
        match record.withheld || record.memmap || record.zone.is_none() {
            true => 0,
            false => record.ram - uses.reserved,
        }
    }

    pub(super) fn charged(&self) -> BTreeMap<(u32, usize), u64> {
        let mut charged = BTreeMap::new();
        let blocks = self.blocks.values().flat_map(|block| &block.charges);
        for ((nid, kind), pages) in
            blocks.chain(self.devices.iter().flat_map(|device| &device.charges))
        {
            *charged.entry((*nid, *kind as usize)).or_default() += *pages;
        }
        charged
    }

    /// Counts every zone.
    pub(crate) fn zones(&self) -> BTreeMap<(u32, usize), Counts> {
        let uses = self.uses();
        let mut zones: BTreeMap<(u32, usize), Counts> = BTreeMap::new();
        for (pageblock, record) in &self.pageblocks {
            let Some((nid, kind)) = record.zone else {
                continue;
            };
            let uses = uses.get(pageblock).copied().unwrap_or_default();
            let counts = zones.entry((nid, kind as usize)).or_default();
            counts.present += record.ram;
            counts.early += if record.early { record.ram } else { 0 };
            let managed = Self::managed(record, &uses);
            counts.managed += managed;
            let free = managed.saturating_sub(uses.held + uses.poisoned);
            counts.free += free;
            counts.cma += if record.cma {
                self.pageblock_pages()
            } else {
                0
            };
            counts.isolated += u64::from(record.isolated);
            if !record.isolated {
                counts.allocatable += free;
                counts.general += if record.cma { 0 } else { free };
                counts.whole += u64::from(free == self.pageblock_pages() && !record.cma);
            }
        }
        for (zone, pages) in self.charged() {
            // Charged pages are never in a pageblock that is being emptied, nor in memory for contiguous allocations.
            let counts = zones
                .get_mut(&zone)
                .expect("pages are charged to zones that are there");
            counts.free -= pages;
            counts.allocatable -= pages;
            counts.general -= pages;
            counts.charged = pages;
        }
        zones
    }

    pub(crate) fn span(&self, nid: u32, kind: ZoneKind) -> Option<Range<u64>> {
        self.spans.get(&(nid, kind as usize)).cloned()
    }

    pub(super) fn extend(&mut self, zone: Zone, pages: &Range<u64>) {
        let span = self
            .spans
            .entry((zone.0, zone.1 as usize))
            .or_insert(pages.clone());
        *span = span.start.min(pages.start)..span.end.max(pages.end);
    }

    /// The zone a sub-section is in.
    pub(super) fn zone_of_sub_section(&self, number: u64) -> Option<Zone> {
        if !self.sub_section_has_ram(number) {
            return None;
        }
        let size = self.profile.sub_section_size();
        let block = self.blocks.get(&(number * size / self.block_size()))?;
        if block.state == BlockState::Offline {
            return block.joined.map(|kind| (block.nid, kind));
        }
        let per = self.profile.pageblock_size();
        let mut pageblocks = number * size / per..((number + 1) * size - 1) / per + 1;
        pageblocks.find_map(|pageblock| self.pageblocks.get(&pageblock)?.zone)
    }

    /// `pages` have left the zone: an edge of the span that was there moves on to what is left.
    pub(super) fn shrink(&mut self, zone: Zone, pages: &Range<u64>) {
        let key = (zone.0, zone.1 as usize);
        let Some(span) = self.spans.get(&key).cloned() else {
            return;
        };
        let per = self.profile.sub_section_size() / self.page();
        let subs = |range: Range<u64>| range.start / per..range.end.div_ceil(per);
        let wanted = |sub: &u64| self.zone_of_sub_section(*sub) == Some(zone);
        let left = if span.start == pages.start {
            let first = self
                .sub_sections_with_ram(subs(pages.end..span.end.max(pages.end)))
                .find(wanted);
            first.map(|first| first * per..span.end)
        } else if span.end == pages.end {
            let last = self
                .sub_sections_with_ram(subs(span.start..pages.start))
                .rev()
                .find(wanted);
            last.map(|last| span.start..(last + 1) * per)
        } else {
            return;
        };
        match left {
            Some(span) => self.spans.insert(key, span),
            None => self.spans.remove(&key),
        };
    }

    /// The sub-sections of a range that are in memory blocks.
    pub(super) fn sub_sections_with_ram(&self, range: Range<u64>) -> std::vec::IntoIter<u64> {
        let per = self.block_size() / self.profile.sub_section_size();
        let in_blocks = self.blocks.keys().flat_map(|id| id * per..(id + 1) * per);
        in_blocks
            .filter(|sub| range.contains(sub))
            .collect::<Vec<_>>()
            .into_iter()
    }
}

//! The naive model: what the machine must look like, worked out from scratch each time.
//!
//! It keeps a record of each memory block, each pageblock and each page that is something else than free, and recounts
//! everything else. It shares nothing with the core but the names of things. Where pages are is the core's
//! business: the model takes it from there and checks that they may be there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use virtio_mem_driver::hotplug::{
    BlockState, Boot, Config, DeviceKind, Error, GroupId, MemmapOnMemory, MemmapRule, MemoryAction,
    Migration, Mobility, OnlinePolicy, OnlineType, Owner, PageHandle, Profile, Step, ZoneKind,
    ZoneRules,
};

use crate::operation::{Add, Injected, Operation, Target, Veto};

pub(crate) type Outcome = Result<(), Error>;
/// A zone of a node.
pub(crate) type Zone = (u32, ZoneKind);

pub(crate) const KINDS: [ZoneKind; 4] = [
    ZoneKind::Dma,
    ZoneKind::Dma32,
    ZoneKind::Normal,
    ZoneKind::Movable,
];
const NAMES: [&str; 4] = ["DMA", "DMA32", "Normal", "Movable"];

fn name(kind: ZoneKind) -> &'static str {
    let index = KINDS.iter().position(|each| *each == kind);
    NAMES[index.expect("not for device memory")]
}

fn is_kernel(kind: ZoneKind) -> bool {
    kind != ZoneKind::Movable
}

fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Block {
    pub(crate) state: BlockState,
    pub(crate) nid: u32,
    pub(crate) zone: Option<ZoneKind>,
    /// The zone it is in whether online or not, up to Linux 4.12.
    joined: Option<ZoneKind>,
    sticky: Option<OnlineType>,
    /// Place in the list of groups.
    pub(crate) group: Option<usize>,
    pub(crate) memmap_pages: u64,
    pub(crate) poisoned: u32,
    pub(crate) early: bool,
    /// Where its metadata is charged: zones and pages.
    charges: Vec<(Zone, u64)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Pageblock {
    zone: Option<Zone>,
    /// Pages that are no holes.
    ram: u64,
    withheld: bool,
    isolated: bool,
    cma: bool,
    memmap: bool,
    early: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Unusual {
    Reserved,
    Poisoned,
}

/// A page somebody holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Held {
    pub(crate) handle: PageHandle,
    pub(crate) tag: u64,
    pub(crate) pins: u32,
    pub(crate) unmovable: bool,
    /// `None` if it broke.
    pub(crate) pfn: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
struct Ram {
    bytes: Range<u64>,
    name: String,
    mergeable: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Device {
    pub(crate) bytes: Range<u64>,
    pub(crate) nid: u32,
    pub(crate) kind: DeviceKind,
    charges: Vec<(Zone, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum GroupKind {
    Static(u64),
    Dynamic(u64),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub(crate) id: GroupId,
    live: bool,
    nid: u32,
    kind: GroupKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Isolation {
    pageblocks: Range<u64>,
    /// The block that goes offline; else the pages are taken.
    block: Option<u64>,
    passes_left: u32,
    /// Pinned pages have been met.
    blocked: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Notifier {
    priority: i32,
    /// Its number, or none for the one that protects boot memory.
    number: Option<usize>,
}

/// What a notifier was told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) notifier: usize,
    pub(crate) action: MemoryAction,
    pub(crate) start_pfn: u64,
    pub(crate) page_count: u64,
    pub(crate) nid: u32,
    pub(crate) early: bool,
}

/// What the core did, where that depends on which page is where.
#[derive(Clone, Debug)]
pub(crate) struct Hint {
    pub(crate) result: Outcome,
    pub(crate) fault_hit: bool,
    /// How many memory blocks went offline.
    pub(crate) offlined: usize,
    pub(crate) migration: Option<Migration>,
    /// Where the pages of an allocation are.
    pub(crate) allocated: Vec<(PageHandle, u64)>,
    pub(crate) group: Option<GroupId>,
    /// Whether it met pinned pages.
    pub(crate) pinned: bool,
    /// How many pages an isolation moved.
    pub(crate) moved: u64,
}

/// Counters of a zone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) present: u64,
    pub(crate) early: u64,
    pub(crate) managed: u64,
    pub(crate) free: u64,
    pub(crate) allocatable: u64,
    pub(crate) cma: u64,
    pub(crate) isolated: u64,
    pub(crate) whole: u64,
    /// Pages metadata is charged to.
    pub(crate) charged: u64,
    /// Allocatable pages that unmovable pages may have.
    general: u64,
}

/// What the pages of a pageblock are, but for free ones.
#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    held: u64,
    unmovable: u64,
    pinned: u64,
    reserved: u64,
    poisoned: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) config: Config,
    profile: Profile,
    boot_ram: Vec<(Range<u64>, u32)>,
    regions: Vec<Range<u64>>,
    cpu_nodes: Vec<u32>,
    pub(crate) blocks: BTreeMap<u64, Block>,
    pageblocks: BTreeMap<u64, Pageblock>,
    unusual: BTreeMap<u64, Unusual>,
    pub(crate) held: Vec<Held>,
    spans: BTreeMap<(u32, usize), Range<u64>>,
    ram: Vec<Ram>,
    /// Who owns each sub-section of System RAM, but for what is there since boot.
    owners: BTreeMap<u64, Owner>,
    pub(crate) devices: Vec<Device>,
    /// Sections that device memory was in, since they are there.
    tainted: BTreeSet<u64>,
    pub(crate) groups: Vec<Group>,
    pub(crate) isolations: Vec<Isolation>,
    chain: Vec<Notifier>,
    notifiers: usize,
    next_tag: u64,
}

/// What an operation leaves behind besides the state.
#[derive(Debug, Default)]
pub(crate) struct Trail {
    pub(crate) uevents: Vec<String>,
    pub(crate) told: Vec<Told>,
    pub(crate) fault: Option<Injected>,
    pub(crate) veto: Option<Veto>,
    /// The injected fault must have come.
    pub(crate) fault_came: bool,
    /// Pageblocks that were emptied: pages in them may have moved.
    pub(crate) emptied: Vec<Range<u64>>,
    pub(crate) offlined: usize,
}

impl Trail {
    fn reach(&mut self, step: Step) -> Outcome {
        match &mut self.fault {
            Some(fault) if fault.step == step => {
                if fault.skip > 0 {
                    fault.skip -= 1;
                    return Ok(());
                }
                let error = fault.error;
                self.fault = None;
                self.fault_came = true;
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

impl Model {
    pub(crate) fn new(config: Config, boot: &Boot) -> Self {
        let profile = config.profile;
        let mut model = Self {
            config,
            profile,
            boot_ram: Vec::new(),
            regions: boot.special_purpose.clone(),
            cpu_nodes: boot.cpu_nodes.clone(),
            blocks: BTreeMap::new(),
            pageblocks: BTreeMap::new(),
            unusual: BTreeMap::new(),
            held: Vec::new(),
            spans: BTreeMap::new(),
            ram: Vec::new(),
            owners: BTreeMap::new(),
            devices: Vec::new(),
            tainted: BTreeSet::new(),
            groups: Vec::new(),
            isolations: Vec::new(),
            chain: Vec::new(),
            notifiers: 0,
            next_tag: 1,
        };
        if !profile.boot_memory_removable {
            model.chain.push(Notifier {
                priority: 0,
                number: None,
            });
        }
        model.start(boot);
        model
    }

    fn start(&mut self, boot: &Boot) {
        let page = self.page();
        let mut ram = boot.ram.clone();
        ram.sort_by_key(|range| range.bytes.start);
        let limits = |nid: u32, kind: ZoneKind| {
            let movable = boot.movable_from.iter().find(|(node, _)| *node == nid);
            let movable = movable.map_or(u64::MAX, |(_, address)| address / page);
            let dma = (self.profile.dma_end / page).min(movable);
            let dma32 = (self.profile.dma32_end / page)
                .clamp(dma, movable.max(dma))
                .min(movable);
            match kind {
                ZoneKind::Dma => 0..dma,
                ZoneKind::Dma32 => dma..dma32,
                ZoneKind::Normal => dma.max(dma32)..movable,
                _ => movable..u64::MAX,
            }
        };
        let mut spans: BTreeMap<(u32, usize), Range<u64>> = BTreeMap::new();
        for range in &ram {
            let pages = range.bytes.start.div_ceil(page)..range.bytes.end / page;
            self.boot_ram.push((pages.clone(), range.nid));
            self.ram.push(Ram {
                bytes: range.bytes.clone(),
                name: "System RAM".into(),
                mergeable: false,
            });
            let section = self.profile.section_size();
            for number in range.bytes.start / section..(range.bytes.end - 1) / section + 1 {
                let per_section = section / self.profile.pageblock_size();
                for pageblock in number * per_section..(number + 1) * per_section {
                    self.pageblocks.entry(pageblock).or_default().early = true;
                }
            }
        }
        for (pages, nid) in self.boot_ram.clone() {
            for (index, kind) in KINDS.into_iter().enumerate() {
                let limits = limits(nid, kind);
                if !meet(&limits, &pages) {
                    continue;
                }
                let here = limits.start.max(pages.start)..limits.end.min(pages.end);
                let per = self.pageblock_pages();
                for pageblock in here.start / per..(here.end - 1) / per + 1 {
                    let part =
                        (pageblock * per).max(here.start)..((pageblock + 1) * per).min(here.end);
                    let record = self
                        .pageblocks
                        .get_mut(&pageblock)
                        .expect("it has just been made");
                    assert!(
                        record.zone.is_none_or(|zone| zone == (nid, kind)),
                        "a boot this test does not mean"
                    );
                    record.zone = Some((nid, kind));
                    record.ram += part.end - part.start;
                }
                // A zone spans all the node has between its limits, holes included.
                let all = self.boot_ram.iter().filter(|(_, node)| *node == nid);
                let first = all.clone().map(|(pages, _)| pages.start).min().unwrap_or(0);
                let end = all.map(|(pages, _)| pages.end).max().unwrap_or(0);
                spans.insert((nid, index), first.max(limits.start)..end.min(limits.end));
            }
        }
        self.spans = spans;
        let per_block = self.profile.memory_block_size() / self.profile.pageblock_size();
        let ids: BTreeSet<u64> = self
            .pageblocks
            .keys()
            .map(|pageblock| pageblock / per_block)
            .collect();
        for id in ids {
            let zones: BTreeSet<(u32, &str)> = self
                .pageblocks
                .range(id * per_block..(id + 1) * per_block)
                .filter_map(|(_, record)| record.zone.map(|(nid, kind)| (nid, name(kind))))
                .collect();
            let zone = match zones.first() {
                Some((_, only)) if zones.len() == 1 => {
                    KINDS.into_iter().find(|kind| name(*kind) == *only)
                }
                _ => None,
            };
            let pages = self.pages_of(id);
            let nid = self
                .boot_ram
                .iter()
                .rev()
                .find(|(range, _)| meet(range, &pages));
            let block = Block {
                state: BlockState::Online,
                nid: nid.map_or(0, |(_, nid)| *nid),
                zone,
                joined: zone.filter(|_| self.config.zone_rules == ZoneRules::UpTo4_12),
                sticky: None,
                group: None,
                memmap_pages: 0,
                poisoned: 0,
                early: true,
                charges: Vec::new(),
            };
            self.blocks.insert(id, block);
        }
        for range in &boot.cma {
            let per = self.profile.pageblock_size();
            for pageblock in range.start / per..range.end / per {
                self.pageblocks
                    .get_mut(&pageblock)
                    .expect("it is in RAM")
                    .cma = true;
            }
        }
        for range in &boot.reserved {
            for pfn in range.start / page..(range.end - 1) / page + 1 {
                if self.is_ram(pfn) {
                    self.unusual.insert(pfn, Unusual::Reserved);
                }
            }
        }
    }

    // Sizes.

    pub(crate) fn page(&self) -> u64 {
        self.profile.page_size()
    }

    fn block_size(&self) -> u64 {
        self.profile.memory_block_size()
    }

    fn pageblock_pages(&self) -> u64 {
        self.profile.pageblock_size() / self.page()
    }

    pub(crate) fn pages_of(&self, id: u64) -> Range<u64> {
        let pages = self.block_size() / self.page();
        id * pages..(id + 1) * pages
    }

    fn pageblocks_of(&self, id: u64) -> Range<u64> {
        let per = self.block_size() / self.profile.pageblock_size();
        id * per..(id + 1) * per
    }

    fn block_at(&self, pfn: u64) -> Option<&Block> {
        self.blocks.get(&(pfn * self.page() / self.block_size()))
    }

    // What is where.

    fn is_ram(&self, pfn: u64) -> bool {
        self.block_at(pfn).is_some_and(|block| {
            !block.early || self.boot_ram.iter().any(|(range, _)| range.contains(&pfn))
        })
    }

    fn device_at(&self, address: u64) -> Option<&Device> {
        self.devices
            .iter()
            .find(|device| device.bytes.contains(&address))
    }

    /// A sub-section that RAM is in, even if it is less than a page of it.
    fn sub_section_has_ram(&self, number: u64) -> bool {
        let size = self.profile.sub_section_size();
        let bytes = number * size..(number + 1) * size;
        match self.blocks.get(&(bytes.start / self.block_size())) {
            Some(block) if block.early => self.ram.iter().any(|ram| meet(&ram.bytes, &bytes)),
            Some(_) => true,
            None => false,
        }
    }

    fn sub_section_is_active(&self, number: u64) -> bool {
        let size = self.profile.sub_section_size();
        self.sub_section_has_ram(number) || self.device_at(number * size).is_some()
    }

    fn is_early_section(&self, number: u64) -> bool {
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

    fn uses(&self) -> BTreeMap<u64, Uses> {
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
    fn managed(record: &Pageblock, uses: &Uses) -> u64 {
        match record.withheld || record.memmap || record.zone.is_none() {
            true => 0,
            false => record.ram - uses.reserved,
        }
    }

    fn charged(&self) -> BTreeMap<(u32, usize), u64> {
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

    fn extend(&mut self, zone: Zone, pages: &Range<u64>) {
        let span = self
            .spans
            .entry((zone.0, zone.1 as usize))
            .or_insert(pages.clone());
        *span = span.start.min(pages.start)..span.end.max(pages.end);
    }

    /// The zone a sub-section is in.
    fn zone_of_sub_section(&self, number: u64) -> Option<Zone> {
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
    fn shrink(&mut self, zone: Zone, pages: &Range<u64>) {
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
    fn sub_sections_with_ram(&self, range: Range<u64>) -> std::vec::IntoIter<u64> {
        let per = self.block_size() / self.profile.sub_section_size();
        let in_blocks = self.blocks.keys().flat_map(|id| id * per..(id + 1) * per);
        in_blocks
            .filter(|sub| range.contains(sub))
            .collect::<Vec<_>>()
            .into_iter()
    }

    // Zone choice.

    fn spans_meet(&self, nid: u32, kind: ZoneKind, pages: &Range<u64>) -> bool {
        self.span(nid, kind).is_some_and(|span| meet(&span, pages))
    }

    fn kernel_zone(&self, nid: u32, pages: &Range<u64>) -> ZoneKind {
        [ZoneKind::Dma, ZoneKind::Dma32]
            .into_iter()
            .find(|kind| self.spans_meet(nid, *kind, pages))
            .unwrap_or(ZoneKind::Normal)
    }

    /// Up to 4.12: from the end of its zone upwards, or from the start of it downwards, over nothing in between.
    fn can_shift(&self, nid: u32, pages: &Range<u64>, from: ZoneKind, to: ZoneKind) -> bool {
        let (from_index, to_index) = (from as usize, to as usize);
        let span = self.span(nid, from);
        let at_edge = match from_index.cmp(&to_index) {
            std::cmp::Ordering::Equal => return true,
            std::cmp::Ordering::Less => span.is_some_and(|span| span.end == pages.end),
            std::cmp::Ordering::Greater => span.is_some_and(|span| span.start == pages.start),
        };
        let between = from_index.min(to_index) + 1..from_index.max(to_index);
        at_edge
            && between
                .into_iter()
                .all(|index| self.span(nid, KINDS[index]).is_none())
    }

    fn kernel_allowed_4_13(&self, nid: u32, pages: &Range<u64>) -> bool {
        self.span(nid, ZoneKind::Movable)
            .is_none_or(|movable| movable.start >= pages.end)
    }

    fn movable_allowed_4_13(&self, nid: u32, pages: &Range<u64>) -> bool {
        let kernel = self.kernel_zone(nid, pages);
        self.span(nid, kernel)
            .is_none_or(|kernel| kernel.end <= pages.start)
    }

    fn zone_for(&self, id: u64, online_type: OnlineType) -> Result<ZoneKind, Error> {
        let block = &self.blocks[&id];
        let (nid, pages) = (block.nid, self.pages_of(id));
        let kernel = self.kernel_zone(nid, &pages);
        if online_type == OnlineType::Online
            && self.config.online_policy == OnlinePolicy::AutoMovable
        {
            return Ok(if self.fits_movable(id) {
                ZoneKind::Movable
            } else {
                kernel
            });
        }
        match self.config.zone_rules {
            ZoneRules::UpTo4_12 => {
                let current = block.joined.expect("everything has joined a zone then");
                let target = match online_type {
                    OnlineType::Online => return Ok(current),
                    OnlineType::Kernel => ZoneKind::Normal,
                    OnlineType::Movable => ZoneKind::Movable,
                };
                self.can_shift(nid, &pages, current, target)
                    .then_some(target)
                    .ok_or(Error::Invalid)
            }
            ZoneRules::V4_13 => match online_type {
                OnlineType::Online if self.kernel_allowed_4_13(nid, &pages) => Ok(kernel),
                OnlineType::Online => Ok(ZoneKind::Movable),
                OnlineType::Kernel if self.kernel_allowed_4_13(nid, &pages) => Ok(kernel),
                OnlineType::Movable if self.movable_allowed_4_13(nid, &pages) => {
                    Ok(ZoneKind::Movable)
                }
                _ => Err(Error::Invalid),
            },
            ZoneRules::Since4_14 => Ok(match online_type {
                OnlineType::Kernel => kernel,
                OnlineType::Movable => ZoneKind::Movable,
                OnlineType::Online => {
                    let in_kernel = self.spans_meet(nid, kernel, &pages);
                    let in_movable = self.spans_meet(nid, ZoneKind::Movable, &pages);
                    match (in_kernel, in_movable) {
                        (true, false) => kernel,
                        (false, true) => ZoneKind::Movable,
                        _ if self.config.movable_node => ZoneKind::Movable,
                        _ => kernel,
                    }
                }
            }),
        }
    }

    fn pages_of_group(&self, group: usize, kernel: bool) -> u64 {
        let online = self.blocks.values().filter(|block| {
            block.group == Some(group) && block.zone.is_some_and(|zone| is_kernel(zone) == kernel)
        });
        online.count() as u64 * (self.block_size() / self.page())
    }

    /// Whether what is left of the device fits into Movable.
    fn fits_movable(&self, id: u64) -> bool {
        let block = &self.blocks[&id];
        let block_pages = self.block_size() / self.page();
        let pages = match block.group.map(|group| (group, self.groups[group].kind)) {
            Some((group, GroupKind::Static(max))) => {
                if self.pages_of_group(group, true) > 0 {
                    return false;
                }
                max.saturating_sub(self.pages_of_group(group, false))
            }
            Some((_, GroupKind::Dynamic(unit))) if unit != block_pages => {
                let blocks = unit / block_pages;
                let first = id / blocks * blocks;
                let unit_blocks = first..first + blocks;
                let online: Vec<_> = self
                    .blocks
                    .iter()
                    .filter(|(id, block)| {
                        unit_blocks.contains(id) && block.state != BlockState::Offline
                    })
                    .collect();
                if online
                    .iter()
                    .any(|(_, block)| block.zone != Some(ZoneKind::Movable))
                {
                    return false;
                }
                unit - online.len() as u64 * block_pages
            }
            _ => block_pages,
        };
        self.ratio_allows(None, block.group, pages)
            && (!self.config.auto_movable_numa_aware
                || self.ratio_allows(Some(block.nid), block.group, pages))
    }

    fn ratio_allows(&self, nid: Option<u32>, own: Option<usize>, pages: u64) -> bool {
        let ratio = i128::from(self.config.auto_movable_ratio);
        if ratio == 0 {
            return false;
        }
        let (mut kernel, mut movable) = (0i128, 0i128);
        for ((node, kind), counts) in self.zones() {
            if nid.is_some_and(|nid| nid != node) {
                continue;
            }
            if KINDS[kind] == ZoneKind::Movable {
                movable += i128::from(counts.present);
            } else {
                kernel += i128::from(counts.early) - i128::from(counts.cma);
                movable += i128::from(counts.cma);
            }
        }
        let mut needed = 0;
        for (index, group) in self.groups.iter().enumerate() {
            let elsewhere = nid.is_some_and(|nid| nid != group.nid);
            if !group.live
                || elsewhere
                || Some(index) == own
                || !matches!(group.kind, GroupKind::Dynamic(_))
            {
                continue;
            }
            let group_movable = i128::from(self.pages_of_group(index, false));
            let group_kernel = i128::from(self.pages_of_group(index, true));
            needed += (group_movable * 100 / ratio - group_kernel).max(0);
            movable -= group_movable;
        }
        if needed >= kernel {
            return false;
        }
        kernel -= needed;
        if let Some(own) = own
            && matches!(self.groups[own].kind, GroupKind::Dynamic(_))
        {
            kernel += i128::from(self.pages_of_group(own, true));
        }
        movable + i128::from(pages) <= ratio * kernel / 100
    }

    pub(crate) fn valid_zones(&self, id: u64) -> String {
        let block = &self.blocks[&id];
        let (nid, pages) = (block.nid, self.pages_of(id));
        let online = (block.state == BlockState::Online).then_some(block.zone);
        if online == Some(None) {
            return "none".into();
        }
        let mut zones = Vec::new();
        let normal_then_movable = [ZoneKind::Normal, ZoneKind::Movable];
        match (self.config.zone_rules, online.flatten()) {
            (ZoneRules::UpTo4_12, online) => {
                let current = online
                    .or(block.joined)
                    .expect("everything has joined a zone then");
                zones.push(current);
                zones.extend(
                    normal_then_movable
                        .into_iter()
                        .filter(|to| self.can_shift(nid, &pages, current, *to)),
                );
            }
            (_, Some(zone)) => zones.push(zone),
            (ZoneRules::V4_13, None) => {
                if self.kernel_allowed_4_13(nid, &pages) {
                    zones.push(self.kernel_zone(nid, &pages));
                }
                if self.movable_allowed_4_13(nid, &pages) {
                    zones.push(ZoneKind::Movable);
                }
            }
            (ZoneRules::Since4_14, None) => {
                zones.extend(self.zone_for(id, OnlineType::Online));
                zones.extend([self.kernel_zone(nid, &pages), ZoneKind::Movable]);
            }
        }
        let mut names: Vec<&str> = Vec::new();
        for zone in zones {
            if !names.contains(&name(zone)) {
                names.push(name(zone));
            }
        }
        names.join(" ")
    }

    // Resources.

    fn region_of(&self, bytes: &Range<u64>) -> Option<usize> {
        self.regions
            .iter()
            .position(|region| contains(region, bytes))
    }

    /// Whether a busy resource may be put there.
    fn is_vacant(&self, bytes: &Range<u64>) -> bool {
        let taken = self
            .ram
            .iter()
            .map(|ram| &ram.bytes)
            .chain(self.devices.iter().map(|device| &device.bytes));
        !taken.into_iter().any(|other| meet(other, bytes))
            && !self
                .regions
                .iter()
                .any(|region| meet(region, bytes) && !contains(region, bytes))
    }

    pub(crate) fn iomem(&self) -> String {
        let mut lines: Vec<(Range<u64>, usize, &str)> = self
            .regions
            .iter()
            .map(|region| (region.clone(), 0, "Soft Reserved"))
            .collect();
        let depth = |bytes: &Range<u64>| usize::from(self.region_of(bytes).is_some());
        lines.extend(
            self.ram
                .iter()
                .map(|ram| (ram.bytes.clone(), depth(&ram.bytes), ram.name.as_str())),
        );
        lines.extend(
            self.devices
                .iter()
                .map(|device| (device.bytes.clone(), depth(&device.bytes), "namespace")),
        );
        lines.sort_by_key(|(bytes, depth, _)| (bytes.start, *depth));
        let line = |(bytes, depth, name): (Range<u64>, usize, &str)| {
            format!(
                "{}{:08x}-{:08x} : {name}\n",
                "  ".repeat(depth),
                bytes.start,
                bytes.end - 1
            )
        };
        lines.into_iter().map(line).collect()
    }

    pub(crate) fn kexec_destinations(&self) -> Vec<Range<u64>> {
        let plain = self.ram.iter().filter(|ram| ram.name == "System RAM");
        let mut ranges: Vec<_> = plain.map(|ram| ram.bytes.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    pub(crate) fn owner(&self, address: u64) -> Option<Owner> {
        self.ram.iter().find(|ram| ram.bytes.contains(&address))?;
        let sub = address / self.profile.sub_section_size();
        Some(self.owners.get(&sub).copied().unwrap_or(Owner::BOOT))
    }

    fn is_all_ram(&self, bytes: &Range<u64>) -> bool {
        let covered: u64 = self
            .ram
            .iter()
            .map(|ram| {
                ram.bytes
                    .end
                    .min(bytes.end)
                    .saturating_sub(ram.bytes.start.max(bytes.start))
            })
            .sum();
        covered == bytes.end - bytes.start
    }

    fn owns(&self, owner: Owner, bytes: &Range<u64>) -> Outcome {
        if bytes.is_empty() || !self.is_all_ram(bytes) {
            return Err(Error::Invalid);
        }
        let size = self.profile.sub_section_size();
        let mut subs = bytes.start / size..(bytes.end - 1) / size + 1;
        let own = subs.all(|sub| self.owners.get(&sub).copied().unwrap_or(Owner::BOOT) == owner);
        own.then_some(()).ok_or(Error::NotPermitted)
    }

    fn merge(&mut self, bytes: &Range<u64>) {
        let index = self
            .ram
            .iter()
            .position(|ram| ram.bytes == *bytes)
            .expect("it has just been added");
        self.ram[index].mergeable = true;
        loop {
            let found = self.ram.iter().enumerate().find_map(|(low, a)| {
                let high = self.ram.iter().position(|b| {
                    (meet(&a.bytes, bytes) || meet(&b.bytes, bytes))
                        && a.bytes.end == b.bytes.start
                        && a.mergeable
                        && b.mergeable
                        && a.name == b.name
                        && self.region_of(&a.bytes) == self.region_of(&b.bytes)
                        && self.owner(a.bytes.end - 1) == self.owner(a.bytes.end)
                })?;
                Some((low, high))
            });
            let Some((low, high)) = found else { return };
            self.ram[low].bytes.end = self.ram[high].bytes.end;
            self.ram.remove(high);
        }
    }

    // Notifiers and events.

    fn told(&self, id: u64, action: MemoryAction, notifier: usize) -> Told {
        let block = &self.blocks[&id];
        let pages = self.pages_of(id);
        Told {
            notifier,
            action,
            start_pfn: pages.start + block.memmap_pages,
            page_count: pages.end - pages.start - block.memmap_pages,
            nid: block.nid,
            early: block.early,
        }
    }

    fn notify(&self, id: u64, action: MemoryAction, trail: &mut Trail) -> Outcome {
        let asked = matches!(
            action,
            MemoryAction::GoingOnline | MemoryAction::GoingOffline
        );
        for notifier in &self.chain {
            let answer = match notifier.number {
                None if action == MemoryAction::GoingOffline && self.blocks[&id].early => {
                    Err(Error::NotPermitted)
                }
                None => Ok(()),
                Some(number) => {
                    trail.told.push(self.told(id, action, number));
                    match trail.veto {
                        Some(veto) if veto.notifier == number && veto.action == action => {
                            trail.veto = None;
                            Err(veto.error)
                        }
                        _ => Ok(()),
                    }
                }
            };
            if asked {
                answer?;
            }
        }
        Ok(())
    }

    // Operations.

    /// Charges the metadata of `bytes` to kernel memory; all or nothing.
    fn charge(
        &self,
        nid: u32,
        bytes: u64,
        room: &mut BTreeMap<(u32, usize), u64>,
    ) -> Result<Vec<(Zone, u64)>, Error> {
        let struct_page = u64::from(self.config.struct_page_size);
        let mut needed = (bytes / self.page() * struct_page).div_ceil(self.page());
        let mut charges = Vec::new();
        for zone in self.zones_in_order(nid, false) {
            let Some(room) = room.get_mut(&(zone.0, zone.1 as usize)) else {
                continue;
            };
            let taken = needed.min(*room);
            *room -= taken;
            needed -= taken;
            if taken > 0 {
                charges.push((zone, taken));
            }
        }
        if needed > 0 {
            Err(Error::NoMemory)
        } else {
            Ok(charges)
        }
    }

    fn general_room(&self) -> BTreeMap<(u32, usize), u64> {
        self.zones()
            .into_iter()
            .map(|(zone, counts)| (zone, counts.general))
            .collect()
    }

    /// The zones pages are taken from: first those of the node, the highest first.
    fn zones_in_order(&self, nid: u32, movable: bool) -> Vec<Zone> {
        let mut nodes = vec![nid];
        nodes.extend((0..self.config.possible_nodes).filter(|node| *node != nid));
        let kinds = KINDS
            .into_iter()
            .rev()
            .filter(|kind| movable || is_kernel(*kind));
        let kinds: Vec<_> = kinds.collect();
        nodes
            .into_iter()
            .flat_map(|nid| {
                kinds
                    .iter()
                    .map(move |kind| (nid, *kind))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    fn addressable(&self, bytes: &Range<u64>) -> bool {
        bytes.end <= 1 << self.profile.physical_address_bits
    }

    fn add(&mut self, add: &Add, trail: &mut Trail) -> Outcome {
        let plain = add.name == "System RAM";
        if !plain && !(add.name.starts_with("System RAM (") && add.name.ends_with(')')) {
            return Err(Error::Invalid);
        }
        if add.size == 0 {
            return Err(Error::Invalid);
        }
        let Some(end) = add.start.checked_add(add.size) else {
            return Err(Error::TooBig);
        };
        let bytes = add.start..end;
        if !self.addressable(&bytes) {
            return Err(Error::TooBig);
        }
        trail.reach(Step::Resource)?;
        if !self.is_vacant(&bytes) {
            return Err(Error::Exists);
        }
        if bytes.start % self.block_size() != 0 || bytes.end % self.block_size() != 0 {
            return Err(Error::Invalid);
        }
        let per = self.profile.pageblock_size();
        let withheld = &add.withheld;
        if !withheld.is_empty() && (withheld.start % per != 0 || withheld.end % per != 0) {
            return Err(Error::Invalid);
        }
        let (nid, group) = match add.target {
            Target::Node(nid) => (nid, None),
            Target::Group(index) => match self.groups.get(index).filter(|group| group.live) {
                Some(group) => (group.nid, Some(index)),
                None => return Err(Error::Invalid),
            },
        };
        if nid >= self.config.possible_nodes {
            return Err(Error::Invalid);
        }
        trail.reach(Step::Node)?;
        trail.reach(Step::Mapping)?;
        let memmap_pages = if add.memmap {
            self.self_hosted(add.size)?
        } else {
            None
        };
        let ids = bytes.start / self.block_size()..bytes.end / self.block_size();
        let sections = self.block_size() / self.profile.section_size();
        let mut charges = Vec::new();
        let mut room = if memmap_pages.is_none() {
            self.general_room()
        } else {
            BTreeMap::new()
        };
        for _ in ids.clone() {
            let mut of_block = Vec::new();
            for _ in 0..sections {
                trail.reach(Step::Memmap)?;
                if memmap_pages.is_none() {
                    of_block.extend(self.charge(nid, self.profile.section_size(), &mut room)?);
                }
            }
            charges.push(of_block);
        }
        for _ in ids.clone() {
            trail.reach(Step::MemoryBlock)?;
        }
        self.ram.push(Ram {
            bytes: bytes.clone(),
            name: add.name.into(),
            mergeable: false,
        });
        let sub = self.profile.sub_section_size();
        self.owners
            .extend((bytes.start / sub..bytes.end / sub).map(|number| (number, add.owner)));
        if add.merge {
            self.merge(&bytes);
        }
        for (id, charges) in ids.clone().zip(charges) {
            let pages = self.pages_of(id);
            let joined = (self.config.zone_rules == ZoneRules::UpTo4_12).then(|| {
                let movable = self.span(nid, ZoneKind::Movable);
                match movable.is_some_and(|movable| movable.start <= pages.start) {
                    true => ZoneKind::Movable,
                    false => ZoneKind::Normal,
                }
            });
            if let Some(kind) = joined {
                self.extend((nid, kind), &pages);
            }
            let memmap_pages = memmap_pages.unwrap_or(0);
            self.blocks.insert(
                id,
                Block {
                    state: BlockState::Offline,
                    nid,
                    zone: None,
                    joined,
                    sticky: None,
                    group,
                    memmap_pages,
                    poisoned: 0,
                    early: false,
                    charges,
                },
            );
            let first_free = self.pageblocks_of(id).start + memmap_pages / self.pageblock_pages();
            for pageblock in self.pageblocks_of(id) {
                let memmap = pageblock < first_free;
                let record = Pageblock {
                    ram: self.pageblock_pages(),
                    withheld: !memmap && withheld.contains(&(pageblock * per)),
                    memmap,
                    ..Pageblock::default()
                };
                self.pageblocks.insert(pageblock, record);
            }
            trail.uevents.push(format!("add memory{id}"));
        }
        if let Some(online_type) = self.config.default_online_type {
            for id in ids {
                if self.online(id, online_type, trail).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Pages of each block that hold its metadata.
    fn self_hosted(&self, size: u64) -> Result<Option<u64>, Error> {
        let (mode, rule) = (self.config.memmap_on_memory, self.config.memmap_rule);
        let per_pageblock = self.pageblock_pages();
        let bytes = self.block_size() / self.page() * 64;
        let mut pages = bytes / self.page();
        if mode == MemmapOnMemory::Force && rule == MemmapRule::PerBlock {
            pages = pages.div_ceil(per_pageblock) * per_pageblock;
        }
        let possible = mode != MemmapOnMemory::Off
            && bytes.is_multiple_of(self.page())
            && bytes.is_multiple_of(1 << self.profile.pmd_shift)
            && pages.is_multiple_of(per_pageblock)
            && pages < self.block_size() / self.page()
            && (rule == MemmapRule::PerBlock || size == self.block_size());
        match (possible, rule) {
            (true, _) => Ok(Some(pages)),
            (false, MemmapRule::PerBlock) => Ok(None),
            (false, MemmapRule::SingleBlock) => Err(Error::Invalid),
        }
    }

    fn removable(&self, owner: Owner, bytes: &Range<u64>) -> Result<Range<u64>, Error> {
        let size = self.block_size();
        if bytes.is_empty() || bytes.start % size != 0 || bytes.end % size != 0 {
            return Err(Error::Invalid);
        }
        let ids = bytes.start / size..bytes.end / size;
        if !ids.clone().all(|id| self.blocks.contains_key(&id)) {
            return Err(Error::Invalid);
        }
        self.owns(owner, bytes)?;
        Ok(ids)
    }

    fn remove(&mut self, owner: Owner, bytes: &Range<u64>, trail: &mut Trail) -> Outcome {
        let ids = self.removable(owner, bytes)?;
        if !self.config.hot_remove
            || !ids
                .clone()
                .all(|id| self.blocks[&id].state == BlockState::Offline)
        {
            return Err(Error::Busy);
        }
        let index = self
            .ram
            .iter()
            .position(|ram| contains(&ram.bytes, bytes))
            .ok_or(Error::Invalid)?;
        let whole = self.ram.remove(index);
        for rest in [whole.bytes.start..bytes.start, bytes.end..whole.bytes.end] {
            if !rest.is_empty() {
                self.ram.push(Ram {
                    bytes: rest,
                    ..whole.clone()
                });
            }
        }
        let sub = self.profile.sub_section_size();
        for number in bytes.start / sub..bytes.end / sub {
            self.owners.remove(&number);
        }
        for id in ids {
            let block = self.blocks.remove(&id).expect("it was looked up");
            let pages = self.pages_of(id);
            if let Some(kind) = block.joined {
                self.shrink((block.nid, kind), &pages);
            }
            for pageblock in self.pageblocks_of(id) {
                self.pageblocks.remove(&pageblock);
            }
            let section = self.profile.section_size();
            for number in id * self.block_size() / section..(id + 1) * self.block_size() / section {
                self.tainted.remove(&number);
            }
            trail.uevents.push(format!("remove memory{id}"));
        }
        Ok(())
    }

    fn online(&mut self, id: u64, online_type: OnlineType, trail: &mut Trail) -> Outcome {
        let block = self.blocks.get_mut(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Err(Error::Invalid);
        }
        block.sticky = None;
        if block.poisoned > 0 {
            return Err(Error::HwPoison);
        }
        let kind = self.zone_for(id, online_type)?;
        trail.reach(Step::PrepareOnline)?;
        if let Err(veto) = self.notify(id, MemoryAction::GoingOnline, trail) {
            let _told = self.notify(id, MemoryAction::CancelOnline, trail);
            return Err(veto);
        }
        let pages = self.pages_of(id);
        let block = self.blocks.get_mut(&id).expect("it was looked up");
        let nid = block.nid;
        block.state = BlockState::Online;
        block.zone = Some(kind);
        let left = block.joined.filter(|old| *old != kind);
        if block.joined.is_some() {
            block.joined = Some(kind);
        }
        for pageblock in self.pageblocks_of(id) {
            let record = self
                .pageblocks
                .get_mut(&pageblock)
                .expect("blocks that were offline are whole");
            record.zone = Some((nid, kind));
        }
        if let Some(old) = left {
            self.shrink((nid, old), &pages);
        }
        self.extend((nid, kind), &pages);
        let _told = self.notify(id, MemoryAction::Online, trail);
        trail.uevents.push(format!("online memory{id}"));
        Ok(())
    }

    fn device_online(&mut self, id: u64, trail: &mut Trail) -> Result<bool, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Ok(false);
        }
        let online_type = block.sticky.unwrap_or(OnlineType::Online);
        self.online(id, online_type, trail).map(|()| true)
    }

    fn device_offline(&mut self, id: u64, hint: &Hint, trail: &mut Trail) -> Result<bool, Error> {
        match self.blocks.get(&id).map(|block| block.state) {
            Some(BlockState::Offline) => Ok(false),
            _ => self.offline(id, hint, trail).map(|()| true),
        }
    }

    /// The bytes as whole pageblocks.
    fn whole_pageblocks(&self, bytes: &Range<u64>) -> Result<Range<u64>, Error> {
        let size = self.profile.pageblock_size();
        let whole = !bytes.is_empty() && bytes.start % size == 0 && bytes.end % size == 0;
        whole
            .then_some(bytes.start / size..bytes.end / size)
            .ok_or(Error::Invalid)
    }

    fn start_isolation(
        &mut self,
        pageblocks: Range<u64>,
        block: Option<u64>,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Result<Isolation, Error> {
        trail.reach(Step::Isolate)?;
        let zones = self.zones();
        let uses = self.uses();
        let per = self.pageblock_pages();
        let (mut capacity, mut passes_left, mut may_be_busy) = (0, 5, false);
        let mut check = |pageblock: u64| {
            let record = self.pageblocks.get(&pageblock).ok_or(Error::Invalid)?;
            let (nid, kind) = record.zone.ok_or(Error::Invalid)?;
            let uses = uses.get(&pageblock).copied().unwrap_or_default();
            let stuck = uses.unmovable > 0 || uses.reserved > 0 || record.ram < per;
            let wrong = match block {
                Some(_) => record.cma,
                None => record.withheld || record.memmap || uses.poisoned > 0,
            };
            if record.isolated || stuck || wrong {
                return Err(Error::Busy);
            }
            // Metadata may be anywhere in the zone it is charged to.
            may_be_busy |=
                zones[&(nid, kind as usize)].charged > 0 && !record.withheld && !record.cma;
            if kind != ZoneKind::Movable && block.is_none() {
                passes_left = 1;
            }
            capacity += Self::managed(record, &uses) - uses.poisoned;
            Ok(())
        };
        let checked = pageblocks.clone().try_for_each(&mut check);
        if may_be_busy
            && hint.result == Err(Error::Busy)
            && !hint.pinned
            && hint.offlined == trail.offlined
        {
            return Err(Error::Busy);
        }
        checked?;
        let allocatable: u64 = zones.values().map(|counts| counts.allocatable).sum();
        // Pages that were in a block this operation took offline are somewhere else by now.
        let displaced = self
            .held
            .iter()
            .filter_map(|page| page.pfn)
            .filter(|pfn| self.pageblocks[&(pfn / per)].zone.is_none());
        if capacity > allocatable - displaced.count() as u64 {
            return Err(Error::NoMemory);
        }
        for pageblock in pageblocks.clone() {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was looked up")
                .isolated = true;
        }
        Ok(Isolation {
            pageblocks,
            block,
            passes_left,
            blocked: false,
        })
    }

    fn isolate_block(
        &mut self,
        id: u64,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Result<Isolation, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        let whole = !block.early
            || self.pageblocks_of(id).all(|pageblock| {
                self.pageblocks
                    .get(&pageblock)
                    .is_some_and(|record| record.ram == self.pageblock_pages())
            });
        if block.state != BlockState::Online
            || !self.config.hot_remove
            || block.zone.is_none()
            || !whole
        {
            return Err(Error::Invalid);
        }
        let mut pageblocks = self.pageblocks_of(id);
        pageblocks.start += block.memmap_pages / self.pageblock_pages();
        let isolation = self.start_isolation(pageblocks, Some(id), hint, trail)?;
        self.blocks.get_mut(&id).expect("it was looked up").state = BlockState::GoingOffline;
        if let Err(veto) = self.notify(id, MemoryAction::GoingOffline, trail) {
            self.cancel(isolation, trail);
            return Err(veto);
        }
        Ok(isolation)
    }

    fn cancel(&mut self, isolation: Isolation, trail: &mut Trail) {
        for pageblock in isolation.pageblocks {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was isolated")
                .isolated = false;
        }
        if let Some(id) = isolation.block {
            self.blocks
                .get_mut(&id)
                .expect("it was going offline")
                .state = BlockState::Online;
            let _told = self.notify(id, MemoryAction::CancelOffline, trail);
        }
    }

    fn uses_of(&self, pageblocks: &Range<u64>) -> Uses {
        let mut sum = Uses::default();
        for (pageblock, uses) in self.uses() {
            if pageblocks.contains(&pageblock) {
                sum.held += uses.held;
                sum.pinned += uses.pinned;
                sum.poisoned += uses.poisoned;
            }
        }
        sum
    }

    /// Moves everything out, then takes the pages; or undoes everything.
    fn empty(&mut self, isolation: Isolation, hint: &Hint, trail: &mut Trail) -> Outcome {
        trail.emptied.push(isolation.pageblocks.clone());
        let uses = self.uses_of(&isolation.pageblocks);
        let mut done = Ok(());
        if let Some(fault) = trail.fault
            && fault.step == Step::Migrate
        {
            // Where nothing has moved yet in this operation, it is known how many pages are to be moved.
            let must_come = u64::from(fault.skip) < uses.held - uses.pinned;
            if trail.offlined == 0 && (must_come || hint.offlined == 0) {
                assert_eq!(
                    hint.fault_hit, must_come,
                    "whether a fault comes in migration"
                );
            }
            if hint.fault_hit && hint.offlined == trail.offlined {
                trail.fault = None;
                trail.fault_came = true;
                done = Err(fault.error);
            }
        }
        if done.is_ok() && uses.pinned > 0 {
            done = Err(Error::Busy);
        }
        if let Err(error) = done {
            self.cancel(isolation, trail);
            return Err(error);
        }
        self.finish(isolation, trail)
    }

    fn commit(&mut self, isolation: Isolation, trail: &mut Trail) -> Outcome {
        let uses = self.uses_of(&isolation.pageblocks);
        let left = uses.held > 0 || (isolation.block.is_none() && uses.poisoned > 0);
        let done = trail
            .reach(Step::Commit)
            .and(if left { Err(Error::Busy) } else { Ok(()) });
        match done {
            Ok(()) => self.take(isolation, trail),
            Err(_) => self.cancel(isolation, trail),
        }
        done
    }

    /// Like [`commit`](Self::commit), but everything has been moved out before.
    fn finish(&mut self, isolation: Isolation, trail: &mut Trail) -> Outcome {
        let done = trail.reach(Step::Commit);
        match done {
            Ok(()) => self.take(isolation, trail),
            Err(_) => self.cancel(isolation, trail),
        }
        done
    }

    fn take(&mut self, isolation: Isolation, trail: &mut Trail) {
        let Some(id) = isolation.block else {
            for pageblock in isolation.pageblocks {
                let record = self
                    .pageblocks
                    .get_mut(&pageblock)
                    .expect("it was isolated");
                record.withheld = true;
                record.isolated = false;
            }
            return;
        };
        let pages = self.pages_of(id);
        for pageblock in self.pageblocks_of(id) {
            let record = self
                .pageblocks
                .get_mut(&pageblock)
                .expect("it was isolated");
            record.isolated = false;
            record.zone = None;
        }
        self.unusual.retain(|pfn, _| !pages.contains(pfn));
        let block = self.blocks.get_mut(&id).expect("it was going offline");
        let (nid, joined, kind) = (block.nid, block.joined, block.zone.take());
        block.state = BlockState::Offline;
        if let (None, Some(kind)) = (joined, kind) {
            self.shrink((nid, kind), &pages);
        }
        let _told = self.notify(id, MemoryAction::Offline, trail);
        trail.uevents.push(format!("offline memory{id}"));
        trail.offlined += 1;
    }

    fn offline(&mut self, id: u64, hint: &Hint, trail: &mut Trail) -> Outcome {
        let isolation = self.isolate_block(id, hint, trail)?;
        self.empty(isolation, hint, trail)
    }

    fn offline_and_remove(
        &mut self,
        owner: Owner,
        bytes: &Range<u64>,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let ids = self.removable(owner, bytes)?;
        let mut undo = Vec::new();
        let offline = || {
            for id in ids {
                if self.blocks[&id].state != BlockState::Offline {
                    let zone = self.blocks[&id].zone;
                    self.offline(id, hint, trail)?;
                    undo.push((id, zone));
                }
            }
            Ok(())
        };
        let done = offline();
        let done = done.and_then(|()| self.remove(owner, bytes, trail));
        if done.is_err() {
            for (id, zone) in undo {
                let online_type = match zone {
                    Some(ZoneKind::Movable) => OnlineType::Movable,
                    _ => OnlineType::Kernel,
                };
                let _warned = self.online(id, online_type, trail);
            }
        }
        done
    }

    fn fake_offline(&mut self, bytes: &Range<u64>, hint: &Hint, trail: &mut Trail) -> Outcome {
        let pageblocks = self.whole_pageblocks(bytes)?;
        if self.common_state(&pageblocks)? == BlockState::Offline {
            let records = || {
                pageblocks
                    .clone()
                    .map(|pageblock| &self.pageblocks[&pageblock])
            };
            if records().any(|record| record.withheld || record.memmap) {
                return Err(Error::Busy);
            }
            for pageblock in pageblocks {
                self.pageblocks
                    .get_mut(&pageblock)
                    .expect("it was looked up")
                    .withheld = true;
            }
            return Ok(());
        }
        let isolation = self.start_isolation(pageblocks, None, hint, trail)?;
        self.empty(isolation, hint, trail)
    }

    fn fake_online(&mut self, bytes: &Range<u64>) -> Outcome {
        let pageblocks = self.whole_pageblocks(bytes)?;
        self.common_state(&pageblocks)?;
        let withheld = |pageblock| {
            self.pageblocks
                .get(&pageblock)
                .is_some_and(|record| record.withheld)
        };
        if !pageblocks.clone().all(withheld) {
            return Err(Error::Invalid);
        }
        for pageblock in pageblocks {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was looked up")
                .withheld = false;
        }
        Ok(())
    }

    fn common_state(&self, pageblocks: &Range<u64>) -> Result<BlockState, Error> {
        let per = self.block_size() / self.profile.pageblock_size();
        let states: Option<Vec<_>> = (pageblocks.start / per..(pageblocks.end - 1) / per + 1)
            .map(|id| self.blocks.get(&id).map(|block| block.state))
            .collect();
        let states = states.ok_or(Error::Invalid)?;
        let same = states.iter().all(|state| *state == states[0]);
        same.then_some(states[0]).ok_or(Error::Invalid)
    }

    fn migrate(&mut self, index: usize, budget: u32, hint: &Hint, trail: &mut Trail) -> Outcome {
        let uses = self.uses_of(&self.isolations[index].pageblocks);
        let isolation = self.isolations[index].clone();
        trail.emptied.push(isolation.pageblocks.clone());
        assert!(
            hint.moved <= u64::from(budget),
            "more pages moved than asked for"
        );
        let all_moved = hint.moved == uses.held;
        if let Some(fault) = trail.fault
            && fault.step == Step::Migrate
            && hint.fault_hit
        {
            trail.fault = None;
            trail.fault_came = true;
            return Err(fault.error);
        }
        let allocatable: u64 = self.zones().values().map(|counts| counts.allocatable).sum();
        let movable = uses.held - uses.pinned;
        match hint.result {
            Err(Error::NoMemory) => {
                assert_eq!(
                    hint.moved, allocatable,
                    "gave up although there was room, or went on although there was none"
                );
                assert!(
                    hint.moved < movable,
                    "no memory, but nothing was left to move"
                );
            }
            Err(Error::Busy) => {
                assert!(
                    uses.pinned > 0 || isolation.blocked,
                    "busy, but nothing is pinned"
                );
                assert!(isolation.passes_left <= 1, "gave up too early");
            }
            Ok(()) => {
                assert!(hint.moved <= allocatable);
                match hint.migration {
                    Some(Migration::Done) => assert!(all_moved, "done, but pages are left"),
                    _ => assert!(
                        movable > hint.moved
                            || hint.moved == u64::from(budget)
                            || uses.pinned > 0
                            || isolation.blocked,
                        "nothing was left to do"
                    ),
                }
            }
            // Compared with the result by the caller.
            Err(_) => return Ok(()),
        }
        let isolation = &mut self.isolations[index];
        isolation.blocked |= uses.pinned > 0;
        // Whether this ended a pass depends on where the pinned pages are.
        if hint.result.is_ok() && hint.migration == Some(Migration::More) && isolation.blocked {
            isolation.passes_left = isolation.passes_left.saturating_sub(1);
        }
        hint.result
    }

    fn allocate(&mut self, nid: u32, mobility: Mobility, count: usize, hint: &Hint) -> Outcome {
        let movable = mobility == Mobility::Movable;
        let zones = self.zones();
        let mut room: BTreeMap<(u32, usize), u64> = zones
            .iter()
            .map(|(zone, counts)| {
                (
                    *zone,
                    if movable {
                        counts.allocatable
                    } else {
                        counts.general
                    },
                )
            })
            .collect();
        let order = self.zones_in_order(nid, movable);
        let mut pages = hint.allocated.iter();
        for _ in 0..count {
            let zone = order.iter().find(|zone| {
                room.get(&(zone.0, zone.1 as usize))
                    .is_some_and(|room| *room > 0)
            });
            let Some(zone) = zone else {
                assert_eq!(pages.next(), None, "a page out of nowhere");
                return Err(Error::NoMemory);
            };
            let Some((handle, pfn)) = pages.next() else {
                return Ok(());
            };
            let record = &self.pageblocks[&(pfn / self.pageblock_pages())];
            assert_eq!(record.zone, Some(*zone), "the zone of an allocated page");
            *room
                .get_mut(&(zone.0, zone.1 as usize))
                .expect("it was looked up") -= 1;
            self.held.push(Held {
                handle: *handle,
                tag: self.next_tag,
                pins: 0,
                unmovable: !movable,
                pfn: Some(*pfn),
            });
            self.next_tag += 1;
        }
        Ok(())
    }

    fn pin(&mut self, index: usize) -> Outcome {
        let page = &mut self.held[index];
        page.pfn.ok_or(Error::HwPoison)?;
        if !page.unmovable {
            page.pins += 1;
        }
        Ok(())
    }

    fn pin_long_term(&mut self, index: usize, trail: &mut Trail) -> Outcome {
        let pfn = self.held[index].pfn.ok_or(Error::HwPoison)?;
        let pageblock = pfn / self.pageblock_pages();
        let record = &self.pageblocks[&pageblock];
        let (_, kind) = record.zone.expect("pages are in zones");
        if kind == ZoneKind::Movable || record.cma {
            if self.held[index].pins > 0 {
                return Err(Error::Busy);
            }
            if self
                .general_room()
                .iter()
                .all(|((_, kind), room)| !is_kernel(KINDS[*kind]) || *room == 0)
            {
                return Err(Error::NoMemory);
            }
            trail.emptied.push(pageblock..pageblock + 1);
        }
        self.pin(index)
    }

    fn unpin(&mut self, index: usize) -> Outcome {
        let page = &mut self.held[index];
        if !page.unmovable {
            page.pins = page.pins.checked_sub(1).ok_or(Error::Invalid)?;
        }
        Ok(())
    }

    fn poison(&mut self, address: u64, soft: bool, hint: &Hint, trail: &mut Trail) -> Outcome {
        let pfn = address / self.page();
        if !self.pfn_is_online(pfn) || !self.is_ram(pfn) {
            return Err(Error::NoAddress);
        }
        let pageblock = pfn / self.pageblock_pages();
        let record = &self.pageblocks[&pageblock];
        match self.unusual.get(&pfn) {
            Some(Unusual::Poisoned) => return Ok(()),
            Some(Unusual::Reserved) => return Err(Error::Busy),
            None if record.withheld || record.memmap => return Err(Error::Busy),
            None => {}
        }
        let (nid, kind) = record.zone.expect("online pages are in zones");
        if let Some(index) = self.held.iter().position(|page| page.pfn == Some(pfn)) {
            if self.held[index].unmovable || self.held[index].pins > 0 {
                return Err(Error::Busy);
            }
            if soft {
                trail.reach(Step::Migrate)?;
                if self.zones().values().all(|counts| counts.allocatable == 0) {
                    return Err(Error::NoMemory);
                }
                trail.emptied.push(pageblock..pageblock + 1);
            } else {
                self.held[index].pfn = None;
            }
        } else {
            let charged = self.zones()[&(nid, kind as usize)].charged;
            if charged > 0 && !record.isolated && !record.cma && hint.result == Err(Error::Busy) {
                return Err(Error::Busy);
            }
        }
        self.unusual.insert(pfn, Unusual::Poisoned);
        let id = address / self.block_size();
        self.blocks.get_mut(&id).expect("it is online").poisoned += 1;
        Ok(())
    }

    fn add_device(
        &mut self,
        bytes: &Range<u64>,
        nid: u32,
        kind: DeviceKind,
        trail: &mut Trail,
    ) -> Outcome {
        if bytes.start >= bytes.end {
            return Err(Error::Invalid);
        }
        if self.device_at(bytes.start).is_some() || self.device_at(bytes.end - 1).is_some() {
            return Err(Error::NoMemory);
        }
        if self.ram.iter().any(|ram| meet(&ram.bytes, bytes)) {
            return Err(Error::NoAddress);
        }
        let size = self.profile.sub_section_size();
        let misplaced =
            bytes.start % size != 0 || bytes.end % size != 0 || nid >= self.config.possible_nodes;
        if misplaced || !self.addressable(bytes) {
            return Err(Error::Invalid);
        }
        trail.reach(Step::Mapping)?;
        let section = self.profile.section_size();
        let numbers = bytes.start / section..(bytes.end - 1) / section + 1;
        let part = |number: u64| {
            (number * section).max(bytes.start) / size
                ..((number + 1) * section).min(bytes.end) / size
        };
        for number in numbers.clone() {
            trail.reach(Step::Memmap)?;
            if part(number).any(|sub| self.sub_section_is_active(sub)) {
                return Err(Error::Exists);
            }
        }
        trail.reach(Step::Resource)?;
        if !self.is_vacant(bytes) {
            return Err(Error::Busy);
        }
        let per_section = section / self.profile.pageblock_size();
        let own = numbers
            .clone()
            .filter(|number| !self.pageblocks.contains_key(&(number * per_section)));
        let own: u64 = own.map(|number| part(number).count() as u64).sum();
        let charges = self.charge(nid, own * size, &mut self.general_room())?;
        self.tainted.extend(numbers);
        self.devices.push(Device {
            bytes: bytes.clone(),
            nid,
            kind,
            charges,
        });
        Ok(())
    }

    fn remove_device(&mut self, bytes: &Range<u64>) -> Outcome {
        let index = self
            .devices
            .iter()
            .position(|device| device.bytes == *bytes)
            .ok_or(Error::Invalid)?;
        self.devices.remove(index);
        let left: BTreeSet<u64> = self
            .sections()
            .into_iter()
            .map(|(number, ..)| number)
            .collect();
        self.tainted.retain(|number| left.contains(number));
        Ok(())
    }

    fn write(&mut self, file: &str, text: &str, hint: &Hint, trail: &mut Trail) -> Outcome {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let word = |text: &str| match text {
            "offline" => Ok(None),
            "online" => Ok(Some(OnlineType::Online)),
            "online_kernel" => Ok(Some(OnlineType::Kernel)),
            "online_movable" => Ok(Some(OnlineType::Movable)),
            _ => Err(Error::Invalid),
        };
        let truth = |text: &str| match text {
            "1" | "y" | "Y" | "on" | "yes" => Ok(true),
            "0" | "n" | "N" | "off" | "no" => Ok(false),
            _ => Err(Error::Invalid),
        };
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).map_err(|_| Error::Invalid),
            None => text.parse().map_err(|_| Error::Invalid),
        };
        if let Some((block, name)) = file
            .split_once('/')
            .filter(|(folder, _)| folder.starts_with("memory"))
        {
            let id: u64 = block["memory".len()..]
                .parse()
                .map_err(|_| Error::NotFound)?;
            let block = self.blocks.get_mut(&id).ok_or(Error::NotFound)?;
            return match name {
                "state" | "online" if text.is_empty() => Ok(()),
                "state" => {
                    let changed = match word(line)? {
                        None => self.device_offline(id, hint, trail)?,
                        Some(online_type) => {
                            block.sticky = Some(online_type);
                            self.device_online(id, trail)?
                        }
                    };
                    changed.then_some(()).ok_or(Error::Invalid)
                }
                "online" => match truth(line)? {
                    true => self.device_online(id, trail).map(|_| ()),
                    false => self.device_offline(id, hint, trail).map(|_| ()),
                },
                "valid_zones" | "phys_index" | "removable" | "node" | "phys_device" => {
                    Err(Error::AccessDenied)
                }
                _ => Err(Error::NotFound),
            };
        }
        match file {
            "parameters/online_policy" => {
                self.config.online_policy = match line {
                    "contig-zones" => OnlinePolicy::ContigZones,
                    "auto-movable" => OnlinePolicy::AutoMovable,
                    _ => return Err(Error::Invalid),
                };
            }
            "parameters/auto_movable_ratio" => {
                self.config.auto_movable_ratio =
                    number(line)?.try_into().map_err(|_| Error::Invalid)?;
            }
            "parameters/auto_movable_numa_aware" => {
                self.config.auto_movable_numa_aware = truth(line)?
            }
            "parameters/memmap_on_memory" | "block_size_bytes" | "crash_hotplug" => {
                return Err(Error::AccessDenied);
            }
            "auto_online_blocks" | "probe" | "hard_offline_page" | "soft_offline_page"
                if text.is_empty() => {}
            "auto_online_blocks" => self.config.default_online_type = word(line)?,
            "hard_offline_page" => return self.poison(number(line)?, false, hint, trail),
            "soft_offline_page" => return self.poison(number(line)?, true, hint, trail),
            "probe" => {
                let start = number(line)?;
                if start % self.block_size() != 0 {
                    return Err(Error::Invalid);
                }
                let below = self
                    .blocks
                    .iter()
                    .rfind(|(id, _)| *id * self.block_size() <= start);
                let nid = below.map_or(0, |(_, block)| block.nid);
                let add = Add {
                    start,
                    size: self.block_size(),
                    target: Target::Node(nid),
                    owner: Owner::PROBE,
                    name: "System RAM",
                    merge: false,
                    memmap: false,
                    withheld: 0..0,
                };
                return self.add(&add, trail);
            }
            _ => return Err(Error::NotFound),
        }
        Ok(())
    }

    /// What an operation comes to. Where that depends on which page is where, `hint` tells what the core did.
    pub(crate) fn play(
        &mut self,
        operation: &Operation,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        match operation {
            Operation::Add(add) => self.add(add, trail),
            Operation::Remove(owner, bytes) => self.remove(*owner, bytes, trail),
            Operation::OfflineAndRemove(owner, bytes) => {
                self.offline_and_remove(*owner, bytes, hint, trail)
            }
            Operation::Adopt(owner, bytes) => {
                if bytes.is_empty() {
                    return Err(Error::Invalid);
                }
                if !self.addressable(bytes) {
                    return Err(Error::TooBig);
                }
                self.owns(Owner::BOOT, bytes)?;
                let sub = self.profile.sub_section_size();
                self.owners
                    .extend((bytes.start / sub..bytes.end / sub).map(|number| (number, *owner)));
                Ok(())
            }
            Operation::Online(id, online_type) => self.online(*id, *online_type, trail),
            Operation::DeviceOnline(id) => self.device_online(*id, trail).map(|_| ()),
            Operation::DeviceOffline(id) => self.device_offline(*id, hint, trail).map(|_| ()),
            Operation::Offline(id) => self.offline(*id, hint, trail),
            Operation::Write(file, text) => self.write(file, text, hint, trail),
            Operation::Isolate(bytes) => {
                let pageblocks = self.whole_pageblocks(bytes)?;
                let isolation = self.start_isolation(pageblocks, None, hint, trail)?;
                self.isolations.push(isolation);
                Ok(())
            }
            Operation::IsolateBlock(id) => {
                let isolation = self.isolate_block(*id, hint, trail)?;
                self.isolations.push(isolation);
                Ok(())
            }
            Operation::Migrate(index, budget) => self.migrate(*index, *budget, hint, trail),
            Operation::Commit(index) => {
                let isolation = self.isolations.swap_remove(*index);
                self.commit(isolation, trail)
            }
            Operation::Cancel(index) => {
                let isolation = self.isolations.swap_remove(*index);
                self.cancel(isolation, trail);
                Ok(())
            }
            Operation::FakeOffline(bytes) => self.fake_offline(bytes, hint, trail),
            Operation::FakeOnline(bytes) => self.fake_online(bytes),
            Operation::Allocate(nid, mobility, count) => {
                self.allocate(*nid, *mobility, *count, hint)
            }
            Operation::Free(index, count) => {
                for _ in 0..*count {
                    if *index >= self.held.len() {
                        break;
                    }
                    if self.held[*index].pins > 0 {
                        return Err(Error::Busy);
                    }
                    self.held.swap_remove(*index);
                }
                Ok(())
            }
            Operation::Pin(index) => self.pin(*index),
            Operation::Unpin(index) => self.unpin(*index),
            Operation::PinLongTerm(index) => self.pin_long_term(*index, trail),
            Operation::UseFreedPage => Err(Error::Invalid),
            Operation::HardOffline(address) => self.poison(*address, false, hint, trail),
            Operation::SoftOffline(address) => self.poison(*address, true, hint, trail),
            Operation::AddDevice(bytes, nid, kind) => self.add_device(bytes, *nid, *kind, trail),
            Operation::RemoveDevice(bytes) => self.remove_device(bytes),
            Operation::RegisterStatic(nid, pages) => {
                let valid = *nid < self.config.possible_nodes && *pages > 0;
                self.register(valid, *nid, GroupKind::Static(*pages), hint)
            }
            Operation::RegisterDynamic(nid, pages) => {
                let block_pages = self.block_size() / self.page();
                let valid = *nid < self.config.possible_nodes
                    && pages.is_power_of_two()
                    && *pages >= block_pages;
                self.register(valid, *nid, GroupKind::Dynamic(*pages), hint)
            }
            Operation::Unregister(index) => {
                if !self.groups[*index].live {
                    return Err(Error::Invalid);
                }
                if self
                    .blocks
                    .values()
                    .any(|block| block.group == Some(*index))
                {
                    return Err(Error::Busy);
                }
                self.groups[*index].live = false;
                Ok(())
            }
            Operation::RegisterNotifier(priority) => {
                let position = self
                    .chain
                    .iter()
                    .take_while(|other| other.priority >= *priority)
                    .count();
                let number = Some(self.notifiers);
                self.chain.insert(
                    position,
                    Notifier {
                        priority: *priority,
                        number,
                    },
                );
                self.notifiers += 1;
                Ok(())
            }
            Operation::UnregisterNotifier(number) => {
                self.chain
                    .retain(|notifier| notifier.number != Some(*number));
                Ok(())
            }
        }
    }

    fn register(&mut self, valid: bool, nid: u32, kind: GroupKind, hint: &Hint) -> Outcome {
        if !valid {
            return Err(Error::Invalid);
        }
        let Some(id) = hint.group else { return Ok(()) };
        // Ids are used again.
        self.groups
            .iter()
            .for_each(|group| assert!(!group.live || group.id != id, "a group id is given twice"));
        self.groups.push(Group {
            id,
            live: true,
            nid,
            kind,
        });
        Ok(())
    }

    /// Whether a registered id names this group and no other.
    pub(crate) fn group_is_live(&self, index: usize) -> bool {
        self.groups[index].live
    }

    /// Notifiers that are registered.
    pub(crate) fn registered_notifiers(&self) -> Vec<usize> {
        self.chain
            .iter()
            .filter_map(|notifier| notifier.number)
            .collect()
    }

    /// The page `index` is at `pfn` now.
    pub(crate) fn page_is_at(&mut self, index: usize, pfn: u64, emptied: &[Range<u64>]) {
        let per = self.pageblock_pages();
        let page = &mut self.held[index];
        let old = page.pfn.replace(pfn).expect("it is not lost");
        assert!(!page.unmovable, "an unmovable page was moved");
        let from = old / per;
        assert!(
            emptied.iter().any(|range| range.contains(&from)),
            "page {old:#x} was moved for no reason"
        );
    }

    /// Every allocated page is where one may be.
    pub(crate) fn check_places(&self) {
        let mut places = BTreeSet::new();
        let per = self.pageblock_pages();
        for page in &self.held {
            let Some(pfn) = page.pfn else { continue };
            assert!(places.insert(pfn), "two handles name page {pfn:#x}");
            assert!(self.is_ram(pfn), "page {pfn:#x} is no RAM");
            assert_eq!(
                self.unusual.get(&pfn),
                None,
                "page {pfn:#x} cannot be allocated"
            );
            let record = &self.pageblocks[&(pfn / per)];
            let (_, kind) = record.zone.expect("an allocated page is offline");
            assert!(
                !record.withheld && !record.memmap,
                "page {pfn:#x} is withheld"
            );
            assert!(
                !page.unmovable || (is_kernel(kind) && !record.cma),
                "an unmovable page among movable ones"
            );
        }
    }

    pub(crate) fn is_in_kernel_memory(&self, pfn: u64) -> bool {
        let record = &self.pageblocks[&(pfn / self.pageblock_pages())];
        record.zone.is_some_and(|(_, kind)| is_kernel(kind)) && !record.cma
    }

    pub(crate) fn poisoned(&self) -> u64 {
        self.blocks
            .values()
            .map(|block| u64::from(block.poisoned))
            .sum()
    }

    /// Node, online, has memory, has normal memory.
    pub(crate) fn nodes(&self) -> Vec<(u32, bool, bool, bool)> {
        let zones = self.zones();
        let describe = |nid: u32| {
            let present = |kernel_only: bool| {
                zones.iter().any(|((node, kind), counts)| {
                    *node == nid && counts.present > 0 && (!kernel_only || is_kernel(KINDS[*kind]))
                })
            };
            let online =
                self.cpu_nodes.contains(&nid) || self.blocks.values().any(|block| block.nid == nid);
            (nid, online, present(false), present(true))
        };
        (0..self.config.possible_nodes).map(describe).collect()
    }
}

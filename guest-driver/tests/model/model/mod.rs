//! The naive model: what the machine must look like, worked out from scratch each time.
//!
//! It keeps a record of each memory block, each pageblock and each page that is something else than free, and recounts
//! everything else. It shares nothing with the core but the names of things. Where pages are is the core's
//! business: the model takes it from there and checks that they may be there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use virtio_mem_driver::hotplug::{
    BlockState, Boot, BootRange, Config, DeviceKind, Error, GroupId, MemmapOnMemory, MemmapRule,
    MemoryAction, Migration, Mobility, OnlinePolicy, OnlineType, Owner, PageHandle, Profile, Step,
    ZoneKind, ZoneRules,
};

use crate::operation::{Add, Injected, Operation, Target, Veto};

mod counts;
mod notifiers;
mod operations;
mod resources;
mod zones;

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
    node_ranges: Vec<BootRange>,
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
            regions: boot
                .special_purpose
                .iter()
                .map(|range| range.bytes.clone())
                .collect(),
            cpu_nodes: boot.cpu_nodes.clone(),
            node_ranges: boot
                .ram
                .iter()
                .chain(boot.special_purpose.iter().filter(|_| !config.soft_reserve))
                .cloned()
                .collect(),
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
            // Part of a page makes no section.
            let section = self.profile.section_size();
            let sections = match pages.is_empty() {
                true => 0..0,
                false => pages.start * page / section..(pages.end * page).div_ceil(section),
            };
            for number in sections {
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
}

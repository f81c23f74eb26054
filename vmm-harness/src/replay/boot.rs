//! The state at boot: what kernel it is, what memory it finds, and where the pages it never gives back are.

use std::collections::BTreeSet;
use std::ops::Range;

use virtio_mem_driver::hotplug::{Boot, BootRange, Config, MemmapRule, OnlineType, Profile};

use super::check::{check_dimm, parse_node_list};
use super::requests::RecordedDevice;
use super::snapshot::Snapshot;
use super::trace::{Dimm, MAX_MEMORY, PAGE_SIZE, Trace, TraceError, impossible};

/// Where a kernel's version or build makes a difference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// How DIMMs go online that are found at boot, before anybody can say otherwise: Debian's choice.
    default_online_type: Option<OnlineType>,
    /// Memory failures are handled: the files to poison pages exist.
    pub(super) memory_failure: bool,
    /// When memory blocks hold their own metadata.
    memmap_rule: MemmapRule,
}

impl Kernel {
    fn of(release: &str) -> Option<Self> {
        let mut numbers = release.split('.');
        let mut number = || {
            let digits = numbers
                .next()?
                .split(|c: char| !c.is_ascii_digit())
                .next()?;
            digits.parse::<u32>().ok()
        };
        let version = (number()?, number()?);
        // Debian's cloud kernels: both came after 6.1.
        let newer = version > (6, 1);
        Some(Self {
            default_online_type: newer.then_some(OnlineType::Online),
            memory_failure: newer,
            // Blocks one by one since 6.8.
            memmap_rule: match version < (6, 8) {
                true => MemmapRule::SingleBlock,
                false => MemmapRule::PerBlock,
            },
        })
    }
}

/// What the model is booted with.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) kernel: Kernel,
    pub(super) config: Config,
    pub(super) boot: Boot,
    /// DIMMs on the machine's command line: ACPI adds them during boot.
    pub(super) dimms: Vec<Dimm>,
    /// A virtio-mem device.
    pub(super) device: Option<RecordedDevice>,
    /// Boot blocks the trace takes offline, so that nothing in them is in use for ever.
    taken_offline: BTreeSet<u64>,
    block_size: u64,
}

impl Plan {
    pub(super) fn new(trace: &Trace) -> Result<Self, TraceError> {
        let recorded = &trace.boot;
        let kernel = Kernel::of(&trace.kernel)
            .ok_or_else(|| impossible("kernel", format!("{:?} has no version", trace.kernel)))?;
        let mut profile = Profile::X86_64;
        profile.memory_block_shift = recorded.block_size.trailing_zeros();
        let mut config = Config::new(profile);
        config.memmap_rule = kernel.memmap_rule;
        config.default_online_type = kernel.default_online_type;
        config.apply_command_line(&recorded.cmdline);
        let dimms = machine_dimms(trace)?;
        let mut boot = Boot {
            ram: boot_ram(trace, &dimms)?,
            ..Boot::default()
        };
        for zone in recorded.zones.iter().filter(|zone| zone.zone == "Movable") {
            let Some(span) = zone.span() else { continue };
            let bytes = span.start * PAGE_SIZE..span.end * PAGE_SIZE;
            let has_ram = boot.ram.iter().any(|ram| {
                let overlaps = ram.bytes.start < bytes.end && bytes.start < ram.bytes.end;
                ram.nid == zone.node && overlaps
            });
            // Otherwise it has DIMMs only.
            if has_ram {
                boot.movable_from.push((zone.node, bytes.start));
            }
        }
        boot.cpu_nodes = cpu_nodes(trace, &boot, &dimms)?;
        let highest_node = highest_node(trace, &boot);
        config.possible_nodes = 1 + highest_node;
        boot.proximity_domains = (0..=highest_node).collect();
        Ok(Self {
            kernel,
            config,
            boot,
            dimms,
            device: trace.device,
            taken_offline: taken_offline(trace),
            block_size: recorded.block_size,
        })
    }

    /// Pages of a memory block.
    pub(super) fn block_pages(&self) -> u64 {
        self.block_size / PAGE_SIZE
    }

    /// Ids of the memory blocks of boot memory.
    pub(super) fn boot_blocks(&self) -> BTreeSet<u64> {
        let ranges = self.boot.ram.iter().map(|range| &range.bytes);
        ranges
            .flat_map(|bytes| bytes.start / self.block_size..=(bytes.end - 1) / self.block_size)
            .collect()
    }

    /// Puts pages that are in use for ever where the model, booted without, has more of them managed than the kernel.
    ///
    /// A trace says how many there are in a zone, not where: they go to the top of it, but not into memory blocks
    /// that go offline later.
    pub(super) fn reserve(&mut self, trace: &Trace, model: &Snapshot) {
        for row in &trace.boot.zones {
            let found = model
                .zones
                .iter()
                .find(|zone| zone.node == row.node && zone.zone == row.zone);
            let managed = found.map_or(0, |zone| zone.managed);
            let mut left = managed.saturating_sub(row.managed);
            let limits = self.zone_limits(row.node, &row.zone);
            let pieces = self
                .boot
                .ram
                .iter()
                .filter(|range| range.nid == row.node)
                .rev();
            let mut reserved = Vec::new();
            for range in pieces {
                let pages = range.bytes.start.div_ceil(PAGE_SIZE)..range.bytes.end / PAGE_SIZE;
                let mut pages = pages.start.max(limits.start)..pages.end.min(limits.end);
                while left > 0 && !pages.is_empty() {
                    let block = (pages.end - 1) * PAGE_SIZE / self.block_size;
                    let start = (block * self.block_size / PAGE_SIZE).max(pages.start);
                    if !self.taken_offline.contains(&block) {
                        let count = left.min(pages.end - start);
                        left -= count;
                        reserved.push((pages.end - count) * PAGE_SIZE..pages.end * PAGE_SIZE);
                    }
                    pages.end = start;
                }
            }
            self.boot.reserved.extend(reserved);
        }
    }

    /// The page frames a zone can have at boot.
    fn zone_limits(&self, node: u32, zone: &str) -> Range<u64> {
        let movable = self.boot.movable_from.iter().find(|(nid, _)| *nid == node);
        let movable = movable.map_or(u64::MAX, |(_, address)| address / PAGE_SIZE);
        let [dma, dma32] = [self.config.profile.dma_end, self.config.profile.dma32_end]
            .map(|end| (end / PAGE_SIZE).min(movable));
        match zone {
            "DMA" => 0..dma,
            "DMA32" => dma..dma32,
            "Normal" => dma32..movable,
            "Movable" => movable..u64::MAX,
            _ => 0..0,
        }
    }
}

/// The boot blocks the trace takes offline.
fn taken_offline(trace: &Trace) -> BTreeSet<u64> {
    let uevents = trace.steps.iter().flat_map(|step| &step.uevents);
    uevents
        .filter_map(|event| event.strip_prefix("offline memory")?.parse().ok())
        .collect()
}

/// System RAM at boot without the DIMMs, cut where the node changes.
fn boot_ram(trace: &Trace, dimms: &[Dimm]) -> Result<Vec<BootRange>, TraceError> {
    let mut ram: Vec<BootRange> = Vec::new();
    let spans: Vec<_> = trace
        .boot
        .zones
        .iter()
        .filter_map(|row| row.span().map(|span| (row.node, span)))
        .collect();
    // A node's memory begins and ends where a zone does.
    let mut cuts: BTreeSet<u64> = spans
        .iter()
        .flat_map(|(_, span)| [span.start * PAGE_SIZE, span.end * PAGE_SIZE])
        .collect();
    cuts.extend(
        dimms
            .iter()
            .flat_map(|dimm| [dimm.addr, dimm.addr + dimm.size]),
    );
    for range in trace.system_ram()? {
        let mut joins = false;
        let mut start = range.start;
        while start < range.end {
            let end = cuts
                .range(start + 1..range.end)
                .next()
                .copied()
                .unwrap_or(range.end);
            let dimm = dimms
                .iter()
                .any(|dimm| (dimm.addr..dimm.addr + dimm.size).contains(&start));
            if !dimm {
                // Zones of several nodes may interleave; the narrowest is the most likely.
                let pfn = start.div_ceil(PAGE_SIZE);
                let around = spans.iter().filter(|(_, span)| span.contains(&pfn));
                let narrowest = around.min_by_key(|(_, span)| span.end - span.start);
                let before = ram.last().map_or(0, |last| last.nid);
                let nid = narrowest.map_or(before, |(node, _)| *node);
                match ram.last_mut().filter(|last| joins && last.nid == nid) {
                    Some(last) => last.bytes.end = end,
                    None => ram.push(BootRange {
                        bytes: start..end,
                        nid,
                    }),
                }
            }
            joins = !dimm;
            start = end;
        }
    }
    match ram.is_empty() {
        true => Err(impossible("boot.iomem", "there is no System RAM but DIMMs")),
        false => Ok(ram),
    }
}

/// The value of `key` in an option like `node,nodeid=1,memdev=m1`.
pub(super) fn property<'a>(option: &'a str, key: &str) -> Option<&'a str> {
    option
        .split(',')
        .find_map(|part| part.split_once('=').filter(|(name, _)| *name == key))
        .map(|(_, value)| value)
}

/// The options of one kind on the machine's command line.
pub(super) fn options<'a>(trace: &'a Trace, kind: &str) -> impl Iterator<Item = &'a str> {
    trace
        .boot
        .machine_args
        .windows(2)
        .filter(move |pair| pair[0] == kind)
        .map(|pair| pair[1].as_str())
}

/// The DIMMs on the machine's command line.
fn machine_dimms(trace: &Trace) -> Result<Vec<Dimm>, TraceError> {
    const LOW_MEMORY_LIMIT: u64 = 0xb000_0000;
    const LOW_MEMORY: u64 = 2 << 30;
    let wrong = |option: &str| impossible("boot.machine_args", format!("cannot place {option}"));
    let ram = trace.boot.ram_bytes;
    // Where QEMU's q35 puts them: from the next GiB behind RAM, one behind the other.
    let above = if ram >= LOW_MEMORY_LIMIT {
        ram - LOW_MEMORY
    } else {
        0
    };
    let mut next = ((4 << 30) + above).next_multiple_of(1 << 30);
    let mut dimms: Vec<Dimm> = Vec::new();
    for option in options(trace, "-device").filter(|option| option.starts_with("pc-dimm,")) {
        let memdev = property(option, "memdev").ok_or_else(|| wrong(option))?;
        let backend =
            options(trace, "-object").find(|object| property(object, "id") == Some(memdev));
        let size = backend
            .and_then(|object| property(object, "size"))
            .and_then(parse_bytes);
        let addr = match property(option, "addr") {
            Some(text) => parse_bytes(text)
                .filter(|addr| *addr != 0)
                .ok_or_else(|| wrong(option))?,
            None => next,
        };
        let node = match property(option, "node") {
            Some(text) => Some(text.parse().map_err(|_| wrong(option))?),
            None => None,
        };
        let dimm = Dimm {
            id: property(option, "id").unwrap_or_default().to_owned(),
            addr,
            size: size.ok_or_else(|| wrong(option))?,
            node,
        };
        check_dimm("boot.machine_args", &dimm, trace.boot.block_size)?;
        let total: u64 = dimms.iter().map(|dimm| dimm.size).sum();
        if total + dimm.size > MAX_MEMORY {
            return Err(wrong(option));
        }
        next = next.max(dimm.addr + dimm.size);
        dimms.push(dimm);
    }
    Ok(dimms)
}

/// A size or address as QEMU takes it: decimal or hexadecimal, with a binary unit.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    let shift = match text.chars().last()?.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift > 0 {
        &text[..text.len() - 1]
    } else {
        text
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The nodes that stay online without memory.
fn cpu_nodes(trace: &Trace, boot: &Boot, dimms: &[Dimm]) -> Result<Vec<u32>, TraceError> {
    let mut nodes = BTreeSet::new();
    let mut numa = options(trace, "-numa").peekable();
    if numa.peek().is_none() {
        nodes.insert(0);
    }
    for option in numa {
        let nid = match option.split(',').next() {
            Some("node") if property(option, "cpus").is_some() => property(option, "nodeid"),
            Some("cpu") => property(option, "node-id"),
            _ => None,
        };
        nodes.extend(nid.and_then(|nid| nid.parse::<u32>().ok()));
    }
    // Whoever is online without memory has them.
    if let Some(online) = trace
        .boot
        .nodes
        .as_ref()
        .and_then(|nodes| nodes.online.as_deref())
    {
        let online = parse_node_list(online).ok_or_else(|| {
            impossible(
                "boot.nodes.online",
                format!("{online:?} is not a list of nodes"),
            )
        })?;
        nodes.extend(online.into_iter().filter(|nid| {
            let ram = boot.ram.iter().any(|range| range.nid == *nid);
            !ram && !dimms.iter().any(|dimm| dimm.node.unwrap_or(0) == *nid)
        }));
    }
    Ok(nodes.into_iter().collect())
}

fn highest_node(trace: &Trace, boot: &Boot) -> u32 {
    let numa =
        options(trace, "-numa").filter_map(|option| property(option, "nodeid")?.parse().ok());
    let steps = trace.steps.iter().filter_map(|step| match &step.op {
        super::step::Op::AddDimm(dimm) => dimm.node,
        _ => None,
    });
    let ram = boot.ram.iter().map(|range| range.nid);
    let mem_device = trace.device.map(|device| device.node.into());
    numa.chain(steps)
        .chain(mem_device)
        .chain(trace.dimms.iter().filter_map(|dimm| dimm.node))
        .chain(ram)
        .chain(boot.cpu_nodes.iter().copied())
        // Beyond what Linux can have there is nothing to be found.
        .filter(|nid| *nid < 1024)
        .max()
        .unwrap_or(0)
}

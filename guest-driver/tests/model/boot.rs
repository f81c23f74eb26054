//! Random machines: an architecture, a configuration, and memory at boot.

use std::ops::Range;

use virtio_mem_driver::hotplug::{
    Boot, BootRange, Config, MemmapOnMemory, MemmapRule, OnlinePolicy, OnlineType, Profile,
    ZoneRules,
};

use crate::random::Random;

/// A machine before it starts.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) profile_name: &'static str,
    pub(crate) config: Config,
    pub(crate) boot: Boot,
    /// The memory blocks that operations are about, by id.
    pub(crate) window: Range<u64>,
}

/// Sixteen pages to a section, so that everything is soon full.
const SMALL: Profile = Profile {
    page_shift: 12,
    pageblock_shift: 14,
    sub_section_shift: 13,
    section_shift: 16,
    memory_block_shift: 17,
    pmd_shift: 12,
    physical_address_bits: 24,
    dma_end: 2 << 17,
    dma32_end: 5 << 17,
    ..Profile::X86_64
};

/// The same with pageblocks smaller than sub-sections, as on s390x.
const SMALL_PAGEBLOCKS: Profile = Profile {
    pageblock_shift: 13,
    sub_section_shift: 14,
    dma_end: 0,
    boot_memory_removable: false,
    ..SMALL
};

/// Each profile with its share of the machines.
pub(crate) fn profiles() -> Vec<(&'static str, Profile, u64)> {
    let large_blocks = |shift| Profile {
        memory_block_shift: shift,
        ..Profile::X86_64
    };
    let mut profiles: Vec<_> = Profile::ALL
        .into_iter()
        .map(|(name, profile)| (name, profile, if name.starts_with("s390x") { 2 } else { 4 }))
        .collect();
    profiles.extend([
        ("x86-64, blocks of 256 MiB", large_blocks(28), 2),
        ("x86-64, blocks of 2 GiB", large_blocks(31), 1),
        ("small", SMALL, 12),
        ("small pageblocks", SMALL_PAGEBLOCKS, 6),
    ]);
    profiles
}

/// A machine of this architecture.
pub(crate) fn layout(random: &mut Random, name: &'static str, profile: Profile) -> Layout {
    let block = profile.memory_block_size();
    let blocks = match profile.memory_block_shift {
        31.. => 5,
        29..=30 => 6,
        _ => random.within(6..13),
    };
    let last_block = 1u64 << (profile.physical_address_bits - profile.memory_block_shift);
    let bases = [
        0,
        (profile.dma32_end.max(profile.dma_end) / block).saturating_sub(4),
        (1 << 36) / block,
        last_block - blocks,
    ];
    let first = random.pick(&bases).min(last_block - blocks);
    let mut config = Config::new(profile);
    config.possible_nodes = random.within(1..4) as u32;
    config.default_online_type = match random.below(6) {
        0 => Some(OnlineType::Online),
        1 => Some(OnlineType::Kernel),
        2 => Some(OnlineType::Movable),
        _ => None,
    };
    if random.one_in(3) {
        config.online_policy = OnlinePolicy::AutoMovable;
    }
    config.auto_movable_ratio = random.pick(&[301, 301, 100, 50, 1000, 0, 1]);
    config.auto_movable_numa_aware = !random.one_in(3);
    config.memmap_on_memory = random.pick(&[
        MemmapOnMemory::Off,
        MemmapOnMemory::On,
        MemmapOnMemory::Force,
    ]);
    config.memmap_rule = random.pick(&[MemmapRule::PerBlock, MemmapRule::SingleBlock]);
    config.movable_node = random.one_in(4);
    config.zone_rules = random.pick(&[
        ZoneRules::Since4_14,
        ZoneRules::Since4_14,
        ZoneRules::UpTo4_12,
        ZoneRules::V4_13,
    ]);
    config.hot_remove = !random.one_in(16);
    config.struct_page_size = random.pick(&[0, 64]);
    let boot = boot(random, &config, first, blocks);
    Layout {
        profile_name: name,
        config,
        boot,
        window: first..first + blocks,
    }
}

fn boot(random: &mut Random, config: &Config, first: u64, blocks: u64) -> Boot {
    let profile = &config.profile;
    let block = profile.memory_block_size();
    let mut boot = Boot::default();
    if random.one_in(3) {
        boot.cpu_nodes
            .push(random.below(u64::from(config.possible_nodes)) as u32);
    }
    let at_boot = random.below(blocks / 2 + 1);
    if random.one_in(4) {
        let start = (first + at_boot + random.below(2)) * block;
        boot.special_purpose.push(BootRange {
            bytes: start..start + 2 * block,
            nid: 0,
        });
    }
    if at_boot == 0 {
        return boot;
    }
    let (start, end) = (first * block, (first + at_boot) * block);
    // Borders of zones and nodes are whole pageblocks and sub-sections.
    let border = 1 << profile.pageblock_shift.max(profile.sub_section_shift);
    let border_in = |random: &mut Random, range: &Range<u64>| {
        random.within(range.start / border..range.end / border + 1) * border
    };
    let ragged = |random: &mut Random| match random.below(3) {
        0 => 0,
        1 => random.below(3 * block / 2 / profile.page_size()) * profile.page_size(),
        _ => random.below(8 * profile.page_size()),
    };
    let nid = |random: &mut Random| random.below(u64::from(config.possible_nodes)) as u32;
    let middle = border_in(random, &(start..end));
    let low = start + ragged(random) / 4..middle;
    let high = middle..end.saturating_sub(ragged(random));
    match random.below(3) {
        // One range, or none where it would be empty.
        0 => push_ram(&mut boot, low.start..high.end, nid(random)),
        // Two, of two nodes perhaps.
        1 => {
            push_ram(&mut boot, low, nid(random));
            push_ram(&mut boot, high, nid(random));
        }
        // With a hole.
        _ => {
            let node = nid(random);
            let hole = ragged(random);
            push_ram(&mut boot, low.start..low.end.saturating_sub(hole), node);
            push_ram(&mut boot, high, node);
        }
    }
    let page = profile.page_size();
    boot.ram
        .retain(|range| range.bytes.start.div_ceil(page) < range.bytes.end / page);
    if let Some(range) = boot.ram.last().cloned()
        && random.one_in(3)
    {
        boot.movable_from
            .push((range.nid, border_in(random, &range.bytes)));
    }
    for range in boot.ram.clone() {
        let page = profile.page_size();
        let whole = range.bytes.start.div_ceil(page)..range.bytes.end / page;
        if whole.is_empty() {
            continue;
        }
        let pageblocks = range.bytes.start.div_ceil(profile.pageblock_size())
            ..range.bytes.end / profile.pageblock_size();
        let mut cma = 0..0;
        if !pageblocks.is_empty() && random.one_in(4) {
            let pageblock = random.within(pageblocks) * profile.pageblock_size();
            cma = pageblock..pageblock + profile.pageblock_size();
            boot.cma.push(cma.clone());
        }
        for _ in 0..random.below(3) {
            let first = random.within(whole.clone());
            let end = (first + random.within(1..40)).min(whole.end);
            let bytes = first * page..end * page;
            if bytes.end <= cma.start || cma.end <= bytes.start {
                boot.reserved.push(bytes);
            }
        }
    }
    boot
}

fn push_ram(boot: &mut Boot, bytes: Range<u64>, nid: u32) {
    if bytes.start < bytes.end {
        boot.ram.push(BootRange { bytes, nid });
    }
}

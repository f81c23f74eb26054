//! Sub-sections: device memory beside RAM and beside other device memory, while RAM stays as coarse as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Config, DeviceKind, DeviceRange, Error, Fault, Intersection,
    MemoryAction, MemoryEvent, Mobility, OnlineType, Owner, Profile, Resource, ResourceFlags,
    SectionInfo, Step, ZoneKind,
};

use crate::support::{GIB, MIB, Machine, add_online, booted, uevents};

/// Sizes of the namespaces on the persistent memory of S0-1: none a multiple of a section, together two.
const NAMESPACES: [u64; 3] = [66 * MIB, 130 * MIB, 60 * MIB];

/// x86-64 without sub-sections: what there was before them (Linux: `SPARSEMEM` without `SPARSEMEM_VMEMMAP`).
const SECTIONS_ONLY: Profile = Profile {
    sub_section_shift: Profile::X86_64.section_shift,
    ..Profile::X86_64
};

/// A range given in MiB.
fn mib(range: Range<u64>) -> Range<u64> {
    range.start * MIB..range.end * MIB
}

/// Adds a namespace of persistent memory.
pub(crate) fn add_namespace(machine: &mut Machine, bytes: Range<u64>) -> Result<(), Error> {
    machine.add_device_memory(DeviceRange::new(bytes, DeviceKind::FsDax), "namespace")
}

/// A boot that finds 1 GiB of RAM, and the persistent memory with its namespaces at `base`.
pub(crate) fn boot_with_persistent_memory(profile: Profile, base: u64) -> Machine {
    let mut machine = booted(Config::new(profile), &[(0, GIB, 0)]);
    let size: u64 = NAMESPACES.iter().sum();
    machine
        .claim_resource(
            base..base + size,
            "Persistent Memory",
            ResourceFlags::RESERVED,
        )
        .unwrap();
    machine
}

/// Where the namespaces are when the persistent memory is at `base`: they touch.
pub(crate) fn namespaces_at(base: u64) -> Vec<Range<u64>> {
    let mut start = base;
    NAMESPACES
        .iter()
        .map(|size| {
            let bytes = start..start + size;
            start = bytes.end;
            bytes
        })
        .collect()
}

/// The bases a firmware may choose from one boot to the next: 64 MiB up in steps of 2 MiB.
pub(crate) fn bases() -> impl Iterator<Item = u64> {
    (0..=32).map(|step| 4 * GIB + step * 2 * MIB)
}

fn section(machine: &Machine, address: u64) -> Option<SectionInfo> {
    let number = address / machine.profile().section_size();
    machine.sections().find(|section| section.number == number)
}

fn active_count(machine: &Machine, address: u64) -> u32 {
    section(machine, address).map_or(0, |section| section.active.count())
}

fn is_valid(machine: &Machine, address: u64) -> bool {
    machine.pfn_valid(address / machine.profile().page_size())
}

fn is_online(machine: &Machine, address: u64) -> bool {
    machine.pfn_is_online(address / machine.profile().page_size())
}

fn span(machine: &Machine, kind: ZoneKind) -> Option<Range<u64>> {
    let zone = machine.zones().find(|zone| zone.kind == kind).unwrap();
    let start = zone.start_pfn?;
    let page = machine.profile().page_size();
    Some(start * page..(start + zone.spanned_pages) * page)
}

fn node_span(machine: &Machine) -> Option<Range<u64>> {
    let node = machine.nodes().next().unwrap();
    let start = node.start_pfn?;
    let page = machine.profile().page_size();
    Some(start * page..(start + node.spanned_pages) * page)
}

/// x86-64 with metadata that costs what Linux's does.
fn charging() -> Config {
    Config {
        struct_page_size: 64,
        ..Config::new(Profile::X86_64)
    }
}

/// S0-1.
#[test]
fn s0_01_namespaces_map_wherever_a_boot_finds_them_but_not_with_whole_sections() {
    for base in bases() {
        let mut machine = boot_with_persistent_memory(Profile::X86_64, base);
        for bytes in namespaces_at(base) {
            add_namespace(&mut machine, bytes.clone()).unwrap();
            machine.check_invariants().unwrap();
            assert!(is_valid(&machine, bytes.start) && is_valid(&machine, bytes.end - 1));
        }
        assert_eq!(machine.device_memory().count(), 3);

        let mut coarse = boot_with_persistent_memory(SECTIONS_ONLY, base);
        let before = coarse.snapshot();
        for bytes in namespaces_at(base) {
            assert_eq!(add_namespace(&mut coarse, bytes), Err(Error::Invalid));
        }
        assert_eq!(coarse.snapshot(), before);
    }
    // Rounded to whole sections, a namespace takes pages of the one before.
    let mut coarse = booted(Config::new(SECTIONS_ONLY), &[(0, GIB, 0)]);
    let rounded = |bytes: &Range<u64>| {
        let start = bytes.start / (128 * MIB) * (128 * MIB);
        start..bytes.end.next_multiple_of(128 * MIB)
    };
    let namespaces = namespaces_at(4 * GIB + 64 * MIB);
    add_namespace(&mut coarse, rounded(&namespaces[0])).unwrap();
    assert_eq!(
        add_namespace(&mut coarse, rounded(&namespaces[1])),
        Err(Error::NoMemory)
    );
}

/// S0-2.
#[test]
fn s0_02_ram_and_three_namespaces_share_a_section_in_every_order() {
    const ORDERS: [[usize; 3]; 6] = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let ram = mib(1024..1064);
    let namespaces = [mib(1066..1068), mib(1068..1100), mib(1150..1152)];
    for (added, removed) in ORDERS.into_iter().flat_map(|a| ORDERS.map(|b| (a, b))) {
        let mut machine = booted(Config::new(Profile::X86_64), &[(0, ram.end, 0)]);
        let mut present = BTreeSet::new();
        let steps = added.map(|index| (index, true)).into_iter();
        for (index, add) in steps.chain(removed.map(|index| (index, false))) {
            let bytes = namespaces[index].clone();
            if add {
                add_namespace(&mut machine, bytes).unwrap();
                present.insert(index);
            } else {
                machine.remove_device_memory(bytes).unwrap();
                present.remove(&index);
            }
            machine.check_invariants().unwrap();
            let shared = section(&machine, ram.start).unwrap();
            assert!(shared.early && shared.online);
            for index in 0..64 {
                let address = ram.start + u64::from(index) * 2 * MIB;
                let of_device = present
                    .iter()
                    .any(|index| namespaces[*index].contains(&address));
                assert_eq!(
                    shared.active.contains(index),
                    ram.contains(&address) || of_device
                );
                assert_eq!(is_online(&machine, address), ram.contains(&address));
                assert_eq!(machine.is_device_memory(address), of_device);
                assert!(
                    is_valid(&machine, address),
                    "the metadata covers the section"
                );
            }
        }
    }
}

/// S0-3.
#[test]
fn s0_03_device_memory_comes_in_sub_sections_and_ram_in_memory_blocks() {
    for (name, profile) in Profile::ALL {
        let mut machine = booted(Config::new(profile), &[]);
        let before = machine.snapshot();
        let block = profile.memory_block_size();
        for (start, size) in [
            (2 * MIB, block),
            (0, 2 * MIB),
            (0, block + 2 * MIB),
            (2 * MIB, 2 * MIB),
        ] {
            let request = AddMemory::new(4 * GIB + start, size);
            assert_eq!(machine.add_memory(&request), Err(Error::Invalid), "{name}");
        }
        assert_eq!(machine.snapshot(), before);
        for (start, size) in [
            (2 * MIB, block),
            (2 * GIB, 2 * MIB),
            (3 * GIB, block + 2 * MIB),
        ] {
            add_namespace(&mut machine, 4 * GIB + start..4 * GIB + start + size).unwrap();
            machine.check_invariants().unwrap();
        }
        let before = machine.snapshot();
        for wrong in [MIB..3 * MIB, 0..MIB, 2 * MIB..4 * MIB + profile.page_size()] {
            assert_eq!(
                add_namespace(&mut machine, wrong),
                Err(Error::Invalid),
                "{name}"
            );
        }
        assert_eq!(machine.snapshot(), before);
    }
}

/// S0-4.
#[test]
fn s0_04_boot_memory_is_removed_on_x86_and_not_early_when_it_comes_back() {
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(0, GIB, 0), (4 * GIB, 4 * GIB + 128 * MIB, 0)],
    );
    let early = section(&machine, 4 * GIB).unwrap();
    assert!(early.early && early.online);
    machine.adopt(Owner::ACPI, 4 * GIB, 128 * MIB).unwrap();
    machine
        .offline_and_remove_memory(Owner::ACPI, 4 * GIB, 128 * MIB)
        .unwrap();
    machine.check_invariants().unwrap();
    assert_eq!(section(&machine, 4 * GIB), None);
    assert!(!is_valid(&machine, 4 * GIB));

    add_online(&mut machine, 4 * GIB, 128 * MIB, OnlineType::Movable);
    machine.check_invariants().unwrap();
    let again = section(&machine, 4 * GIB).unwrap();
    assert!(!again.early && again.online);
    let movable = machine
        .zones()
        .find(|zone| zone.kind == ZoneKind::Movable)
        .unwrap();
    assert_eq!(
        (movable.present_pages, movable.present_early_pages),
        (32768, 0)
    );
}

/// S0-4.
#[test]
fn s0_04_boot_memory_stays_on_arm64_by_a_veto() {
    for profile in [Profile::ARM64_4K, Profile::ARM64_16K, Profile::ARM64_64K] {
        let block = profile.memory_block_size();
        let mut machine = booted(Config::new(profile), &[(4 * GIB, 5 * GIB, 0)]);
        add_online(&mut machine, 5 * GIB, block, OnlineType::Kernel);
        machine.adopt(Owner::ACPI, 4 * GIB, block).unwrap();
        let before = machine.snapshot();
        let refused = machine.offline_and_remove_memory(Owner::ACPI, 4 * GIB, block);
        assert_eq!(refused, Err(Error::NotPermitted));
        assert_eq!(machine.snapshot(), before);
        // What was added later may go.
        machine
            .offline_and_remove_memory(Owner::PROBE, 5 * GIB, block)
            .unwrap();
        machine.check_invariants().unwrap();
    }
}

/// S0-5.
#[test]
fn s0_05_metadata_and_being_online_are_two_questions() {
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(0, 1064 * MIB, 0), (8 * GIB, 8 * GIB + 128 * MIB, 0)],
    );
    add_namespace(&mut machine, mib(1066..1068)).unwrap();
    add_namespace(&mut machine, mib(1068..1070)).unwrap();
    machine.remove_device_memory(mib(1068..1070)).unwrap();
    add_namespace(&mut machine, mib(2050..2052)).unwrap();
    add_online(&mut machine, 4 * GIB, 128 * MIB, OnlineType::Online);
    machine
        .add_memory(&AddMemory::new(4 * GIB + 128 * MIB, 128 * MIB))
        .unwrap();
    machine.offline(64).unwrap();
    machine.check_invariants().unwrap();
    let last_page = 2 * MIB - 4096;
    for (what, address, valid, online) in [
        ("early, RAM", 0, true, true),
        ("early and shared, RAM", 1062 * MIB, true, true),
        (
            "early and shared, last page of RAM",
            1062 * MIB + last_page,
            true,
            true,
        ),
        ("early and shared, hole", 1064 * MIB, true, false),
        ("early and shared, device memory", 1066 * MIB, true, false),
        (
            "early and shared, last page of device memory",
            1066 * MIB + last_page,
            true,
            false,
        ),
        (
            "early and shared, device memory that went",
            1068 * MIB,
            true,
            false,
        ),
        ("early, RAM that is offline", 8 * GIB, true, false),
        ("added, online", 4 * GIB, true, true),
        ("added, offline", 4 * GIB + 128 * MIB, true, false),
        ("partial, below device memory", 2048 * MIB, false, false),
        (
            "partial, last page below device memory",
            2048 * MIB + last_page,
            false,
            false,
        ),
        ("partial, device memory", 2050 * MIB, true, false),
        (
            "partial, last page of device memory",
            2050 * MIB + last_page,
            true,
            false,
        ),
        ("partial, above device memory", 2052 * MIB, false, false),
        ("no section", 16 * GIB, false, false),
        ("no address", u64::MAX, false, false),
    ] {
        assert_eq!(is_valid(&machine, address), valid, "{what}");
        assert_eq!(is_online(&machine, address), online, "{what}");
    }
}

/// S0-6.
#[test]
fn s0_06_boot_memory_is_extended_by_device_memory_which_goes_again_alone() {
    let mut machine = booted(charging(), &[(0, 1064 * MIB, 0)]);
    let address = 1024 * MIB;
    let before = (
        section(&machine, address).unwrap(),
        machine.counts(),
        machine.metadata_bytes(),
    );
    assert_eq!(before.0.active.count(), 20);

    // The rest of the section: 88 MiB, right beside the RAM. The metadata is there.
    add_namespace(&mut machine, mib(1064..1152)).unwrap();
    machine.check_invariants().unwrap();
    assert_eq!(active_count(&machine, address), 64);
    assert_eq!(machine.counts(), before.1, "nothing is charged");
    assert_eq!(machine.metadata_bytes(), before.2);

    machine.remove_device_memory(mib(1064..1152)).unwrap();
    machine.check_invariants().unwrap();
    let after = section(&machine, address).unwrap();
    assert_eq!(
        (after.active, after.early, after.online),
        (before.0.active, true, true)
    );
    assert!(after.device_taint, "as in Linux, the hint stays");
    assert_eq!(machine.metadata_bytes(), before.2, "the metadata stays");
    assert!(is_valid(&machine, 1151 * MIB));

    // Across the border of the section, only what is beyond is charged: 8 pages for each 2 MiB.
    add_namespace(&mut machine, mib(1150..1156)).unwrap();
    assert_eq!(before.1.free - machine.counts().free, 16);
    assert_eq!(active_count(&machine, 1152 * MIB), 2);
    machine.remove_device_memory(mib(1150..1156)).unwrap();
    assert_eq!(machine.counts(), before.1);
    assert_eq!(
        section(&machine, 1152 * MIB),
        None,
        "its last sub-section has gone"
    );
    assert_eq!(active_count(&machine, address), 20);
    machine.check_invariants().unwrap();

    // Half-full boot memory cannot go offline, with device memory beside it or without.
    add_namespace(&mut machine, mib(1064..1066)).unwrap();
    machine.adopt(Owner::ACPI, 1024 * MIB, 40 * MIB).unwrap();
    assert_eq!(machine.offline(8), Err(Error::Invalid));
    machine.check_invariants().unwrap();
}

/// A change to device memory, in sub-sections of 2 MiB.
#[derive(Clone, Debug)]
enum Change {
    Add {
        first: usize,
        count: usize,
    },
    /// Starts or ends in the middle of a sub-section.
    AddMisaligned {
        first: usize,
        count: usize,
    },
    /// All of one that is there, if any.
    Remove(usize),
    /// A range that was not added like this.
    RemoveWrong {
        first: usize,
        count: usize,
    },
}

fn change(units: usize) -> impl Strategy<Value = Change> {
    let range = move || (0..units, 1..units / 2);
    prop_oneof![
        4 => range().prop_map(|(first, count)| Change::Add { first, count }),
        2 => (0..units, 1..8usize).prop_map(|(first, count)| Change::Add { first, count }),
        1 => range().prop_map(|(first, count)| Change::AddMisaligned { first, count }),
        4 => any::<usize>().prop_map(Change::Remove),
        1 => range().prop_map(|(first, count)| Change::RemoveWrong { first, count }),
    ]
}

/// What a sub-section is in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Nothing,
    Ram,
    Device(usize),
}

/// Applies changes to device memory beside RAM, which ends in the middle of a section, and compares it with an array.
fn compare_with_array(profile: Profile, changes: &[Change]) {
    let base = 4 * GIB;
    let per_section = profile.sub_sections_per_section() as usize;
    let units = 5 * per_section;
    let mut model = vec![Unit::Nothing; units];
    let tail = base + 3 * profile.section_size() + profile.section_size() / 2;
    let block = base + profile.section_size();
    let mut machine = booted(
        Config::new(profile),
        &[(tail - profile.section_size() / 2, tail, 0)],
    );
    add_online(
        &mut machine,
        block,
        profile.memory_block_size(),
        OnlineType::Online,
    );
    model[per_section..2 * per_section].fill(Unit::Ram);
    model[3 * per_section..3 * per_section + per_section / 2].fill(Unit::Ram);
    let bytes_of = |range: Range<usize>| {
        base + range.start as u64 * 2 * MIB..base + range.end as u64 * 2 * MIB
    };
    let mut ranges: BTreeMap<usize, Range<usize>> = BTreeMap::new();
    for (serial, change) in changes.iter().enumerate() {
        let clip = |first: usize, count: usize| first..(first + count).min(units);
        match *change {
            Change::Add { first, count } => {
                let range = clip(first, count);
                let expected = match &model[range.clone()] {
                    [Unit::Device(_), ..] | [.., Unit::Device(_)] => Err(Error::NoMemory),
                    units if units.contains(&Unit::Ram) => Err(Error::NoAddress),
                    units if units.iter().any(|unit| *unit != Unit::Nothing) => Err(Error::Exists),
                    _ => Ok(()),
                };
                assert_eq!(
                    add_namespace(&mut machine, bytes_of(range.clone())),
                    expected
                );
                if expected.is_ok() {
                    model[range.clone()].fill(Unit::Device(serial));
                    ranges.insert(serial, range);
                }
            }
            Change::AddMisaligned { first, count } => {
                let bytes = bytes_of(clip(first, count));
                let before = machine.snapshot();
                let wrong = bytes.start + profile.page_size()..bytes.end;
                assert!(add_namespace(&mut machine, wrong).is_err());
                assert_eq!(machine.snapshot(), before);
            }
            Change::Remove(index) => {
                let Some(key) = ranges.keys().copied().nth(index % ranges.len().max(1)) else {
                    continue;
                };
                let range = ranges.remove(&key).unwrap();
                machine
                    .remove_device_memory(bytes_of(range.clone()))
                    .unwrap();
                model[range].fill(Unit::Nothing);
            }
            Change::RemoveWrong { first, count } => {
                let range = clip(first, count);
                if !ranges.values().any(|known| *known == range) {
                    let refused = machine.remove_device_memory(bytes_of(range));
                    assert_eq!(refused, Err(Error::Invalid));
                }
            }
        }
        for (index, unit) in model.iter().enumerate() {
            let address = bytes_of(index..index + 1).start;
            let early = index / per_section == 3;
            assert_eq!(is_valid(&machine, address), early || *unit != Unit::Nothing);
            assert_eq!(is_online(&machine, address), *unit == Unit::Ram);
            assert_eq!(
                machine.is_device_memory(address),
                matches!(unit, Unit::Device(_))
            );
        }
        for (index, section_units) in model.chunks(per_section).enumerate() {
            let active = section_units
                .iter()
                .filter(|unit| **unit != Unit::Nothing)
                .count();
            let address = bytes_of(index * per_section..(index + 1) * per_section).start;
            assert_eq!(active_count(&machine, address) as usize, active);
            assert_eq!(section(&machine, address).is_some(), active > 0);
        }
        machine.check_invariants().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "tests/proptest-regressions/capabilities.txt",
        ))),
        ..ProptestConfig::default()
    })]

    /// S0-7.
    #[test]
    fn s0_07_ranges_across_section_borders_are_those_of_an_array(
        changes in prop::collection::vec(change(5 * 64), 1..60),
        profile in prop::sample::select(vec![
            Profile::X86_64, Profile::ARM64_16K, Profile::ARM64_64K, Profile::RISCV64, Profile::S390X,
        ]),
    ) {
        compare_with_array(profile, &changes);
    }

    /// S0-8.
    #[test]
    fn s0_08_spans_are_those_of_a_walk_over_all_sub_sections(
        changes in prop::collection::vec((0..6u64, any::<bool>()), 1..80),
    ) {
        walk_spans(&changes);
    }
}

/// Boot memory above 4 GiB that ends 128 KiB early, in a sub-section, and device memory behind it.
fn boot_with_ragged_end(profile: Profile) -> Machine {
    let ragged_end = 4 * GIB + 100 * MIB - 128 * 1024;
    let mut machine = booted(Config::new(profile), &[(4 * GIB, ragged_end, 0)]);
    add_namespace(&mut machine, 4 * GIB + 112 * MIB..4 * GIB + 116 * MIB).unwrap();
    machine
}

/// S0-8.
#[test]
fn s0_08_span_shrinks_to_the_sub_section_where_its_zone_ends() {
    // Pageblocks of 2 MiB, 32 MiB, 1 MiB: smaller and larger than a sub-section.
    for profile in [Profile::X86_64, Profile::ARM64_16K, Profile::S390X_128M] {
        let mut machine = boot_with_ragged_end(profile);
        let at = |offset: u64| 4 * GIB + offset;
        let boot = at(0)..at(100 * MIB - 128 * 1024);
        assert_eq!(span(&machine, ZoneKind::Normal), Some(boot));
        add_online(&mut machine, at(256 * MIB), 128 * MIB, OnlineType::Kernel);
        assert_eq!(span(&machine, ZoneKind::Normal), Some(at(0)..at(384 * MIB)));
        machine.offline(34).unwrap();
        // Past the device memory, but not into the middle of a sub-section.
        assert_eq!(span(&machine, ZoneKind::Normal), Some(at(0)..at(100 * MIB)));
        assert_eq!(node_span(&machine), Some(at(0)..at(100 * MIB)));
        machine.check_invariants().unwrap();
    }
    // The lower end, up to boot memory that starts in the middle of a sub-section.
    for profile in [Profile::X86_64, Profile::S390X_128M] {
        let ram = 4 * GIB + 129 * MIB..4 * GIB + 256 * MIB;
        let mut machine = booted(Config::new(profile), &[(ram.start, ram.end, 0)]);
        add_online(&mut machine, 4 * GIB, 128 * MIB, OnlineType::Kernel);
        assert_eq!(span(&machine, ZoneKind::Normal), Some(4 * GIB..ram.end));
        machine.offline(32).unwrap();
        assert_eq!(
            span(&machine, ZoneKind::Normal),
            Some(4 * GIB + 128 * MIB..ram.end)
        );
        machine.check_invariants().unwrap();
    }
    // What goes in the middle leaves a hole; what goes last leaves nothing.
    let mut machine = booted(Config::new(Profile::X86_64), &[]);
    add_online(&mut machine, 4 * GIB, 384 * MIB, OnlineType::Movable);
    machine.offline(33).unwrap();
    assert_eq!(
        span(&machine, ZoneKind::Movable),
        Some(4 * GIB..4 * GIB + 384 * MIB)
    );
    machine.offline(32).unwrap();
    assert_eq!(
        span(&machine, ZoneKind::Movable),
        Some(4 * GIB + 256 * MIB..4 * GIB + 384 * MIB)
    );
    machine.offline(34).unwrap();
    assert_eq!(span(&machine, ZoneKind::Movable), None);
    assert_eq!(node_span(&machine), None);
}

/// Brings memory blocks 33 to 38 online and offline, and compares the spans with those of an array of sub-sections.
fn walk_spans(changes: &[(u64, bool)]) {
    const UNIT: u64 = 2 * MIB;
    let base = 4 * GIB;
    let mut machine = boot_with_ragged_end(Profile::X86_64);
    machine
        .add_memory(&AddMemory::new(base + 128 * MIB, 768 * MIB))
        .unwrap();
    let mut zone_of = vec![None; 7 * 64];
    zone_of[..50].fill(Some(ZoneKind::Normal));
    let mut spans = BTreeMap::from([(
        ZoneKind::Normal as usize,
        base..base + 100 * MIB - 128 * 1024,
    )]);
    for (block, movable) in changes {
        let id = 33 + block;
        let bytes = id * 128 * MIB..(id + 1) * 128 * MIB;
        let units = (64 + block * 64) as usize..(128 + block * 64) as usize;
        let Some(kind) = zone_of[units.start] else {
            let (online_type, kind) = match movable {
                true => (OnlineType::Movable, ZoneKind::Movable),
                false => (OnlineType::Kernel, ZoneKind::Normal),
            };
            machine.online(id, online_type).unwrap();
            zone_of[units].fill(Some(kind));
            let span = spans.entry(kind as usize).or_insert_with(|| bytes.clone());
            *span = span.start.min(bytes.start)..span.end.max(bytes.end);
            continue;
        };
        machine.offline(id).unwrap();
        zone_of[units].fill(None);
        let span = spans.remove(&(kind as usize)).unwrap();
        let mine = |unit: &usize| zone_of[*unit] == Some(kind);
        let at_an_edge = span.start == bytes.start || span.end == bytes.end;
        let first = (0..zone_of.len())
            .find(mine)
            .map(|unit| base + unit as u64 * UNIT);
        let last = (0..zone_of.len())
            .rfind(mine)
            .map(|unit| base + (unit as u64 + 1) * UNIT);
        let left = match (first, last) {
            _ if !at_an_edge => Some(span),
            (Some(first), _) if span.start == bytes.start => Some(first..span.end),
            (_, Some(last)) => Some(span.start..last),
            _ => None,
        };
        spans.extend(left.map(|span| (kind as usize, span)));
        for kind in [ZoneKind::Normal, ZoneKind::Movable] {
            assert_eq!(
                self::span(&machine, kind),
                spans.get(&(kind as usize)).cloned()
            );
        }
        let hull = spans
            .values()
            .cloned()
            .reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        assert_eq!(node_span(&machine), hull);
        machine.check_invariants().unwrap();
    }
}

/// S0-9.
#[test]
fn s0_09_memory_block_of_two_nodes_or_two_zones_stays_online() {
    let two_nodes = |profile| Config {
        possible_nodes: 2,
        ..Config::new(profile)
    };
    let border = GIB + 64 * MIB;
    let large_blocks = Profile::X86_64.with_memory_block_size(2 * GIB).unwrap();
    for (profile, shared, zone_border) in [(Profile::X86_64, 8, 0), (large_blocks, 0, 0)] {
        let mut machine = booted(two_nodes(profile), &[(0, border, 0), (border, 4 * GIB, 1)]);
        machine.adopt(Owner::ACPI, 0, 4 * GIB).unwrap();
        let before = machine.snapshot();
        let block = profile.memory_block_size();
        // Between nodes, and between DMA and DMA32.
        for id in [shared, zone_border] {
            let file = |name: &str| format!("memory{id}/{name}");
            assert_eq!(machine.read(&file("valid_zones")).unwrap(), "none");
            assert_eq!(machine.offline(id), Err(Error::Invalid));
            assert_eq!(
                machine.write(&file("state"), "offline"),
                Err(Error::Invalid)
            );
            assert_eq!(machine.write(&file("online"), "0"), Err(Error::Invalid));
            let start = id * block;
            assert_eq!(
                machine.remove_memory(Owner::ACPI, start, block),
                Err(Error::Busy)
            );
            let refused = machine.offline_and_remove_memory(Owner::ACPI, start, block);
            assert_eq!(refused, Err(Error::Invalid));
        }
        assert_eq!(machine.read(&format!("memory{shared}/node")).unwrap(), "1");
        assert_eq!(machine.snapshot(), before);
        machine.check_invariants().unwrap();
        // The neighbour has one node and one zone.
        let neighbour = shared + 1;
        assert_eq!(
            machine
                .read(&format!("memory{neighbour}/valid_zones"))
                .unwrap(),
            "DMA32"
        );
        machine
            .offline_and_remove_memory(Owner::ACPI, neighbour * block, block)
            .unwrap();
        machine.check_invariants().unwrap();
    }
}

/// S0-9: a hole is no better, even in one zone.
#[test]
fn s0_09_memory_block_with_a_hole_stays_online() {
    for end in [2 * GIB - 128 * 1024, 2 * GIB - 2 * MIB, 2 * GIB - 64 * MIB] {
        let mut machine = booted(Config::new(Profile::X86_64), &[(0, end, 0)]);
        let before = machine.snapshot();
        assert_eq!(machine.read("memory15/valid_zones").unwrap(), "DMA32");
        assert_eq!(
            machine.offline(15),
            Err(Error::Invalid),
            "RAM ends at {end:x}"
        );
        assert_eq!(machine.snapshot(), before);
        machine.offline(14).unwrap();
        assert_eq!(
            machine.read("memory14/valid_zones").unwrap(),
            "DMA32 Movable"
        );
        machine.check_invariants().unwrap();
    }
}

/// S0-10.
#[test]
fn s0_10_device_memory_never_comes_online() {
    let mut machine = booted(Config::new(Profile::X86_64), &[(0, 1064 * MIB, 0)]);
    let untainted = section(&machine, 1024 * MIB).unwrap();
    assert!(!untainted.device_taint);
    let before = (machine.counts(), machine.blocks().count());
    // Beside RAM, a whole memory block, and a part of one.
    let ranges = [
        mib(1066..1068),
        4 * GIB..4 * GIB + 128 * MIB,
        mib(8190..8194),
    ];
    for bytes in &ranges {
        add_namespace(&mut machine, bytes.clone()).unwrap();
    }
    assert_eq!((machine.counts(), machine.blocks().count()), before);
    for file in [
        "memory32/state",
        "memory32/valid_zones",
        "memory63/state",
        "memory64/state",
    ] {
        assert_eq!(machine.read(file), Err(Error::NotFound), "{file}");
        assert_eq!(
            machine.write(file, "online"),
            Err(Error::NotFound),
            "{file}"
        );
    }
    assert_eq!(machine.online(32, OnlineType::Movable), Err(Error::Invalid));
    assert_eq!(machine.offline(32), Err(Error::Invalid));
    assert_eq!(machine.fake_online(4 * GIB, 2 * MIB), Err(Error::Invalid));
    assert_eq!(machine.hard_offline_page(1066 * MIB), Err(Error::NoAddress));
    for bytes in &ranges {
        for address in bytes.clone().step_by(4096) {
            assert!(is_valid(&machine, address) && !is_online(&machine, address));
        }
    }
    // Of RAM in the same section it has to be found out page by page; a section of its own needs no second look.
    assert!(section(&machine, 1024 * MIB).unwrap().device_taint);
    assert!(
        (1024 * MIB..1064 * MIB)
            .step_by(4096)
            .all(|address| is_online(&machine, address))
    );
    let sections: Vec<_> = machine
        .sections()
        .filter(|section| !section.early)
        .collect();
    assert_eq!(
        sections
            .iter()
            .map(|s| (s.number, s.online, s.device_taint))
            .collect::<Vec<_>>(),
        [(32, false, false), (63, false, true), (64, false, true)],
    );
    machine.check_invariants().unwrap();
}

/// S0-11.
#[test]
fn s0_11_memory_blocks_are_one_to_sixteen_sections() {
    for sections_per_block in [1, 2, 4, 8, 16] {
        let block = sections_per_block * 128 * MIB;
        let profile = Profile::X86_64.with_memory_block_size(block).unwrap();
        let mut machine = booted(Config::new(profile), &[(0, block, 0)]);
        assert_eq!(
            machine.read("block_size_bytes").unwrap(),
            format!("{block:x}")
        );
        let start = 8 * GIB;
        let id = start / block;
        if sections_per_block > 1 {
            for (start, size) in [
                (start, 128 * MIB),
                (start + 128 * MIB, block),
                (start, block + 128 * MIB),
            ] {
                let part = AddMemory::new(start, size);
                assert_eq!(machine.add_memory(&part), Err(Error::Invalid));
            }
        }
        let before = machine.snapshot();
        machine.add_memory(&AddMemory::new(start, block)).unwrap();
        let added = |machine: &Machine, online| {
            let sections = machine
                .sections()
                .filter(|s| s.number >= start / (128 * MIB));
            sections.filter(|s| s.online == online && !s.early).count() as u64
        };
        assert_eq!(
            (added(&machine, false), added(&machine, true)),
            (sections_per_block, 0)
        );
        assert_eq!(
            machine.blocks().map(|block| block.id).collect::<Vec<_>>(),
            [0, id]
        );
        machine.online(id, OnlineType::Movable).unwrap();
        assert_eq!(
            (added(&machine, false), added(&machine, true)),
            (0, sections_per_block)
        );
        let movable = machine
            .zones()
            .find(|zone| zone.kind == ZoneKind::Movable)
            .unwrap();
        assert_eq!(movable.present_pages, sections_per_block * 32768);
        machine.check_invariants().unwrap();
        machine
            .offline_and_remove_memory(Owner::PROBE, start, block)
            .unwrap();
        assert_eq!((added(&machine, false), added(&machine, true)), (0, 0));
        assert_eq!(machine.snapshot(), before);
        machine.check_invariants().unwrap();
    }
}

/// S0-11: a block of boot memory need not have all of its sections, and device memory may fill the gap.
#[test]
fn s0_11_boot_block_of_2_gib_with_few_sections_has_device_memory_in_others() {
    let profile = Profile::X86_64.with_memory_block_size(2 * GIB).unwrap();
    let mut machine = booted(
        Config::new(profile),
        &[(0, 128 * MIB, 0), (4 * GIB, 4 * GIB + 300 * MIB, 0)],
    );
    let before = machine.sections().count();
    assert_eq!(before, 4);
    let ranges = [
        4 * GIB + 300 * MIB..4 * GIB + 302 * MIB,
        5 * GIB + 2 * MIB..5 * GIB + 256 * MIB,
    ];
    for bytes in &ranges {
        add_namespace(&mut machine, bytes.clone()).unwrap();
        machine.check_invariants().unwrap();
    }
    assert_eq!(machine.sections().count(), before + 2);
    assert_eq!(machine.block_state(2), Some(BlockState::Online));
    assert_eq!(machine.offline(2), Err(Error::Invalid), "it has holes");
    // Asking for parts of the block that are no RAM is an error, whatever is asked for.
    for hole in [5 * GIB, 5 * GIB + 512 * MIB] {
        assert_eq!(machine.fake_online(hole, 2 * MIB), Err(Error::Invalid));
        assert_eq!(machine.fake_offline(hole, 2 * MIB), Err(Error::Invalid));
    }
    for bytes in ranges {
        machine.remove_device_memory(bytes).unwrap();
        machine.check_invariants().unwrap();
    }
    assert_eq!(machine.sections().count(), before);
}

/// What a crash kernel's loader knows of RAM: what was there when it started, and uevents.
fn online_blocks_from(boot: &[u64], events: &[String]) -> BTreeSet<u64> {
    let mut online: BTreeSet<u64> = boot.iter().copied().collect();
    let mut known = online.clone();
    for event in events {
        let (action, device) = event.split_once(' ').unwrap();
        let id = device.strip_prefix("memory").unwrap().parse().unwrap();
        let news = match action {
            "add" => known.insert(id),
            "remove" => known.remove(&id) && !online.contains(&id),
            "online" => known.contains(&id) && online.insert(id),
            "offline" => online.remove(&id),
            _ => false,
        };
        assert!(news, "{event} after {known:?}, online {online:?}");
    }
    online
}

/// S0-12.
#[test]
fn s0_12_map_of_ram_rebuilt_from_uevents_is_the_truth() {
    let mut machine = booted(Config::new(Profile::X86_64), &[(0, 256 * MIB, 0)]);
    assert_eq!(machine.read("crash_hotplug").unwrap(), "1");
    let boot: Vec<u64> = machine.blocks().map(|block| block.id).collect();
    let events = uevents(&mut machine);
    let check = |machine: &Machine| {
        let online = machine
            .blocks()
            .filter(|block| block.state == BlockState::Online);
        let truth: BTreeSet<u64> = online.map(|block| block.id).collect();
        assert_eq!(online_blocks_from(&boot, &events.lock().unwrap()), truth);
    };
    let veto = |event: &MemoryEvent| match event.action {
        MemoryAction::GoingOnline | MemoryAction::GoingOffline => Err(Error::Busy),
        _ => Ok(()),
    };
    machine
        .add_memory(&AddMemory::new(4 * GIB, 512 * MIB))
        .unwrap();
    check(&machine);
    for id in [35, 32, 33] {
        machine.online(id, OnlineType::Movable).unwrap();
        check(&machine);
    }
    let vetoing = machine.register_notifier(0, Box::new(veto));
    assert_eq!(machine.online(34, OnlineType::Movable), Err(Error::Busy));
    assert_eq!(machine.offline(33), Err(Error::Busy));
    machine.unregister_notifier(vetoing);
    check(&machine);
    machine
        .offline_and_remove_memory(Owner::PROBE, 4 * GIB + 128 * MIB, 128 * MIB)
        .unwrap();
    check(&machine);
    machine
        .write("auto_online_blocks", "online_movable")
        .unwrap();
    machine
        .add_memory(&AddMemory::new(4 * GIB + 128 * MIB, 128 * MIB))
        .unwrap();
    check(&machine);
    // Removing fails at the second block, and the first comes back.
    machine.write("memory32/state", "offline").unwrap();
    machine.write("memory32/state", "online_kernel").unwrap();
    let page = machine.allocate(Mobility::Movable).unwrap();
    let in_block = machine.address(page).unwrap() / (128 * MIB);
    machine.pin(page).unwrap();
    assert_eq!(in_block, 33);
    let refused = machine.offline_and_remove_memory(Owner::PROBE, 4 * GIB, 256 * MIB);
    assert_eq!(refused, Err(Error::Busy));
    check(&machine);
    // Device memory is none of its business.
    add_namespace(&mut machine, 8 * GIB..8 * GIB + 128 * MIB).unwrap();
    check(&machine);
    assert_eq!(
        *events.lock().unwrap(),
        [
            "add memory32",
            "add memory33",
            "add memory34",
            "add memory35",
            "online memory35",
            "online memory32",
            "online memory33",
            "offline memory33",
            "remove memory33",
            "add memory33",
            "online memory33",
            "offline memory32",
            "online memory32",
            "offline memory32",
            "online memory32",
        ],
    );
    machine.check_invariants().unwrap();
}

/// S0-13.
#[test]
fn s0_13_ram_and_device_memory_exclude_each_other() {
    let large_blocks = Profile::X86_64.with_memory_block_size(2 * GIB).unwrap();
    for (_, profile) in Profile::ALL
        .into_iter()
        .chain([("x86-64, 2 GiB", large_blocks)])
    {
        let block = profile.memory_block_size();
        let mut machine = booted(Config::new(profile), &[]);
        let persistent = 4 * GIB..4 * GIB + 4 * block;
        machine
            .claim_resource(persistent, "Persistent Memory", ResourceFlags::RESERVED)
            .unwrap();
        let ram = AddMemory::new(4 * GIB, block);
        // At either end of the block, and across its border.
        for device in [
            0..2 * MIB,
            block - 2 * MIB..block,
            block - 2 * MIB..block + 2 * MIB,
        ] {
            let device = 4 * GIB + device.start..4 * GIB + device.end;
            add_namespace(&mut machine, device.clone()).unwrap();
            let before = machine.snapshot();
            assert_eq!(machine.add_memory(&ram), Err(Error::Exists));
            assert_eq!(machine.snapshot(), before);
            machine.remove_device_memory(device.clone()).unwrap();

            machine.add_memory(&ram).unwrap();
            let before = machine.snapshot();
            assert_eq!(add_namespace(&mut machine, device), Err(Error::NoAddress));
            assert_eq!(machine.snapshot(), before);
            machine.remove_memory(Owner::PROBE, 4 * GIB, block).unwrap();
            machine.check_invariants().unwrap();
        }
        // Side by side they do not meet: RAM fills all the sections it is in.
        machine.add_memory(&ram).unwrap();
        add_namespace(&mut machine, 4 * GIB + block..4 * GIB + block + 2 * MIB).unwrap();
        machine.check_invariants().unwrap();
    }
}

/// S0-14.
#[test]
fn s0_14_every_kind_of_device_memory_has_metadata_and_all_but_private_is_mapped() {
    use DeviceKind::{DevDax, FsDax, PeerToPeer, Private};
    let mut machine = booted(charging(), &[(0, 16 * MIB, 0)]);
    let empty = machine.snapshot();
    let free = machine.counts().free;
    for (kind, is_mapped) in [
        (FsDax, true),
        (DevDax, true),
        (PeerToPeer, true),
        (Private, false),
    ] {
        let bytes = 4 * GIB..4 * GIB + 256 * MIB;
        let range = DeviceRange::new(bytes.clone(), kind);
        assert_eq!(range.is_mapped(), is_mapped);
        let fault = |step| Fault {
            step,
            skip: 0,
            error: Error::NoMemory,
        };
        machine.inject(fault(Step::Mapping));
        let added = machine.add_device_memory(range.clone(), "device");
        assert_eq!(
            added.is_err(),
            is_mapped,
            "only what is mapped can fail to be"
        );
        machine.clear_faults();
        if is_mapped {
            assert_eq!(machine.snapshot(), empty);
            machine.inject(Fault {
                skip: 1,
                ..fault(Step::Memmap)
            });
            assert_eq!(
                machine.add_device_memory(range.clone(), "device"),
                Err(Error::NoMemory)
            );
            assert_eq!(machine.snapshot(), empty);
            machine.add_device_memory(range, "device").unwrap();
        }
        // 65536 pages of 64 bytes: 4 MiB.
        assert_eq!(free - machine.counts().free, 1024);
        assert!(is_valid(&machine, bytes.start) && !is_online(&machine, bytes.start));
        machine.check_invariants().unwrap();
        machine.remove_device_memory(bytes).unwrap();
        assert_eq!(machine.snapshot(), empty);
    }
}

/// S0-14: the metadata of more device memory than kernel memory can bear may be in itself.
#[test]
fn s0_14_device_memory_holds_its_own_metadata_where_kernel_memory_is_short() {
    let mut machine = booted(charging(), &[(0, 16 * MIB, 0)]);
    let empty = machine.snapshot();
    let range = DeviceRange::new(4 * GIB..6 * GIB, DeviceKind::FsDax);
    let add = |machine: &mut Machine, range: &DeviceRange| {
        machine.add_device_memory(range.clone(), "pmem")
    };
    assert_eq!(add(&mut machine, &range), Err(Error::NoMemory));
    let with = |altmap| DeviceRange {
        altmap,
        ..range.clone()
    };
    // One page short of the 32 MiB it takes; not whole pages; more than there is; where nobody can reach it.
    assert_eq!(
        add(&mut machine, &with(32 * MIB - 4096)),
        Err(Error::NoMemory)
    );
    assert_eq!(add(&mut machine, &with(32 * MIB + 1)), Err(Error::Invalid));
    assert_eq!(
        add(&mut machine, &with(2 * GIB + 4096)),
        Err(Error::Invalid)
    );
    let private = DeviceRange {
        kind: DeviceKind::Private,
        ..with(32 * MIB)
    };
    assert_eq!(add(&mut machine, &private), Err(Error::Invalid));
    assert_eq!(machine.snapshot(), empty);

    let before = machine.counts();
    add(&mut machine, &with(32 * MIB)).unwrap();
    assert_eq!(machine.counts(), before, "kernel memory pays nothing");
    let usable = machine.device_memory().next().unwrap().usable();
    assert_eq!(usable, 4 * GIB + 32 * MIB..6 * GIB);
    assert!(
        machine.is_device_memory(4 * GIB),
        "also what holds the metadata"
    );
    machine.check_invariants().unwrap();
    machine.remove_device_memory(4 * GIB..6 * GIB).unwrap();
    assert_eq!(machine.snapshot(), empty);
}

/// S0-15.
#[test]
fn s0_15_no_byte_is_lost_to_padding() {
    for base in bases() {
        let mut machine = boot_with_persistent_memory(Profile::X86_64, base);
        for bytes in namespaces_at(base) {
            add_namespace(&mut machine, bytes).unwrap();
        }
        let usable: Vec<_> = machine.device_memory().map(DeviceRange::usable).collect();
        assert_eq!(usable, namespaces_at(base));
        let sum: u64 = usable.iter().map(|bytes| bytes.end - bytes.start).sum();
        assert_eq!(sum, NAMESPACES.iter().sum());
        assert_eq!(
            machine.resources().intersects(base..base + sum),
            Intersection::Disjoint
        );
        let children = machine.resources().iomem().filter(|r| r.depth() == 1);
        assert_eq!(
            children.map(Resource::range).collect::<Vec<_>>(),
            namespaces_at(base)
        );
    }
}

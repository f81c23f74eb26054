//! The sysfs files, and the zones a memory block may go to: the machine of the question, and three generations of answers.

use virtio_mem_driver::hotplug::{
    BlockState, Boot, BootRange, Config, Error, Hotplug, OnlineType, Profile, ZoneKind, ZoneRules,
};

use crate::support::{GIB, MIB, Machine, SparseMemory, bare, uevents};

const BLOCK: u64 = 128 * MIB;

/// `-m 2G,slots=4,maxmem=4G` with two nodes: 1 GiB each, nothing in Normal or Movable, and 4 to 10 GiB for hotplug on node 0.
fn two_gib_on_two_nodes(rules: ZoneRules) -> Machine {
    let range = |start, end, nid| BootRange {
        bytes: start..end,
        nid,
    };
    let boot = Boot {
        ram: vec![
            range(0x1000, 0x9_f000, 0),
            range(0x10_0000, 0x4000_0000, 0),
            range(0x4000_0000, 0x7ffe_0000, 1),
        ],
        hot_pluggable: vec![range(0x1_0000_0000, 0x2_8000_0000, 0)],
        ..Boot::default()
    };
    let config = Config {
        zone_rules: rules,
        possible_nodes: 2,
        ..Config::new(Profile::X86_64)
    };
    Hotplug::boot(config, &boot, SparseMemory::default()).unwrap()
}

fn probe(machine: &mut Machine, id: u64) -> Result<(), Error> {
    machine.write("probe", &format!("{:#x}", id * BLOCK))
}

/// The machine after blocks 32, 33 and 34 were probed.
fn three_probes(rules: ZoneRules) -> Machine {
    let mut machine = two_gib_on_two_nodes(rules);
    for id in 32..35 {
        probe(&mut machine, id).unwrap();
    }
    machine
}

/// `valid_zones` of the memory blocks from 32 on.
fn valid_zones(machine: &Machine) -> Vec<String> {
    let ids = machine.blocks().map(|block| block.id);
    ids.filter(|id| *id >= 32)
        .map(|id| machine.read(&format!("memory{id}/valid_zones")).unwrap())
        .collect()
}

fn online_movable(machine: &mut Machine, id: u64) -> Result<(), Error> {
    machine.write(&format!("memory{id}/state"), "online_movable")
}

#[test]
fn s4_01_probe_adds_one_memory_block_at_an_aligned_address_once() {
    let mut machine = two_gib_on_two_nodes(ZoneRules::Since4_14);
    let events = uevents(&mut machine);
    assert_eq!(machine.write("probe", "0x100000000"), Ok(()));
    assert_eq!(*events.lock().unwrap(), ["add memory32"]);
    let before = machine.snapshot();
    for (text, error) in [
        ("0x100000000", Error::Exists),
        ("0x108000001", Error::Invalid),
        ("0x104000000", Error::Invalid),
        ("0", Error::Exists),
        ("memory33", Error::Invalid),
        ("-1", Error::Invalid),
        ("0x400000000000", Error::TooBig),
        ("0x10000000000000000", Error::OutOfRange),
    ] {
        assert_eq!(machine.write("probe", text), Err(error), "{text}");
    }
    assert_eq!(machine.snapshot(), before);
    assert_eq!(machine.read("probe"), Err(Error::AccessDenied));
    assert_eq!(machine.write("probe", "4429185024\n"), Ok(()));
    assert_eq!(machine.read("memory33/state").unwrap(), "offline");
    machine.check_invariants().unwrap();
}

#[test]
fn s4_02_valid_zones_change_as_blocks_are_added_up_to_4_12_and_never_since() {
    const BOTH: &str = "Normal Movable";
    for (rules, probed) in [
        (
            ZoneRules::UpTo4_12,
            [
                vec![BOTH],
                vec!["Normal", BOTH],
                vec!["Normal", "Normal", BOTH],
            ],
        ),
        (ZoneRules::V4_13, [vec![BOTH], vec![BOTH; 2], vec![BOTH; 3]]),
        (
            ZoneRules::Since4_14,
            [vec![BOTH], vec![BOTH; 2], vec![BOTH; 3]],
        ),
    ] {
        let mut machine = two_gib_on_two_nodes(rules);
        for (id, expected) in (32..).zip(probed) {
            probe(&mut machine, id).unwrap();
            assert_eq!(
                valid_zones(&machine),
                expected,
                "{rules:?}, block {id} probed"
            );
        }
        machine.check_invariants().unwrap();
    }
    // The last of three becomes Movable.
    for (rules, expected) in [
        (ZoneRules::UpTo4_12, ["Normal", BOTH, "Movable Normal"]),
        (ZoneRules::V4_13, [BOTH, BOTH, "Movable"]),
        (ZoneRules::Since4_14, [BOTH, BOTH, "Movable"]),
    ] {
        let mut machine = three_probes(rules);
        online_movable(&mut machine, 34).unwrap();
        assert_eq!(valid_zones(&machine), expected, "{rules:?}");
        machine.check_invariants().unwrap();
    }
    // The first of three does instead.
    let mut machine = three_probes(ZoneRules::UpTo4_12);
    assert_eq!(online_movable(&mut machine, 32), Err(Error::Invalid));
    for (rules, others) in [(ZoneRules::V4_13, "Movable"), (ZoneRules::Since4_14, BOTH)] {
        let mut machine = three_probes(rules);
        online_movable(&mut machine, 32).unwrap();
        assert_eq!(
            valid_zones(&machine),
            ["Movable", others, others],
            "{rules:?}"
        );
    }
}

/// A udev rule that brings every memory block online as Movable, and comes to it `delay` additions after its event. Returns
/// which blocks it got online.
fn udev(rules: ZoneRules, blocks: u64, delay: u64) -> Vec<bool> {
    let mut machine = two_gib_on_two_nodes(rules);
    let mut online = Vec::new();
    for id in 32..32 + blocks + delay {
        if id < 32 + blocks {
            probe(&mut machine, id).unwrap();
        }
        if let Some(due) = id.checked_sub(delay).filter(|due| *due >= 32) {
            online.push(online_movable(&mut machine, due).is_ok());
        }
    }
    machine.check_invariants().unwrap();
    online
}

#[test]
fn s4_03_udev_rule_for_movable_loses_its_race_up_to_4_12_and_cannot_lose_it_since() {
    // In time for each block, udev finds it the last.
    assert_eq!(udev(ZoneRules::UpTo4_12, 8, 0), [true; 8]);
    // Late, it finds others behind it; what is added behind Movable memory is Movable from the start.
    for delay in 1..8 {
        let mut expected = [false; 8];
        expected[7] = true;
        assert_eq!(
            udev(ZoneRules::UpTo4_12, 8, delay),
            expected,
            "{delay} late"
        );
    }
    for rules in [ZoneRules::V4_13, ZoneRules::Since4_14] {
        for delay in 0..8 {
            assert_eq!(udev(rules, 8, delay), [true; 8], "{rules:?}, {delay} late");
        }
    }
}

/// All orders of the first `count` numbers.
fn permutations(count: usize) -> Vec<Vec<u64>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let shorter = permutations(count - 1);
    let longer = shorter.iter().flat_map(|order| {
        (0..count).map(|place| {
            let mut order = order.clone();
            order.insert(place, count as u64 - 1);
            order
        })
    });
    longer.collect()
}

#[test]
fn s4_04_proposed_rule_keeps_kernel_memory_below_movable_whatever_is_tried() {
    const BLOCKS: u64 = 4;
    let mut tried = 0;
    for order in permutations(BLOCKS as usize) {
        for choices in 0..1 << BLOCKS {
            let mut machine = two_gib_on_two_nodes(ZoneRules::V4_13);
            for block in 0..BLOCKS {
                probe(&mut machine, 32 + block).unwrap();
            }
            let mut layout = [None; BLOCKS as usize];
            for block in &order {
                let movable = choices & (1 << block) != 0;
                let online_type = match movable {
                    true => OnlineType::Movable,
                    false => OnlineType::Kernel,
                };
                let mut after = layout;
                after[*block as usize] = Some(movable);
                let highest_kernel = after.iter().rposition(|zone| *zone == Some(false));
                let lowest_movable = after.iter().position(|zone| *zone == Some(true));
                let ordered = highest_kernel
                    .zip(lowest_movable)
                    .is_none_or(|(kernel, movable)| kernel < movable);
                let result = machine.online(32 + block, online_type);
                assert_eq!(result.is_ok(), ordered, "{layout:?}, block {block}");
                if ordered {
                    layout = after;
                } else {
                    assert_eq!(result, Err(Error::Invalid));
                }
                tried += 1;
            }
            let span = |kind| {
                let zone = machine
                    .zones()
                    .find(|zone| zone.nid == 0 && zone.kind == kind);
                let zone = zone.unwrap();
                zone.start_pfn
                    .map(|start| (start, start + zone.spanned_pages))
            };
            if let (Some(kernel), Some(movable)) = (span(ZoneKind::Normal), span(ZoneKind::Movable))
            {
                assert!(
                    kernel.1 <= movable.0,
                    "zones overlap: {kernel:x?} {movable:x?}"
                );
            }
        }
    }
    assert_eq!(tried, 24 * 16 * 4);
}

/// What Linux 6.1 and 6.12 did, as recorded: the blocks of a DIMM are there, then one after the other goes online. The whole
/// recordings are what `vmem replay` is for.
#[test]
fn s4_05_without_ordering_every_block_goes_where_it_is_told_as_recorded() {
    const OFFLINE: (&str, &str) = ("offline", "Normal Movable");
    let recorded = [
        (
            34,
            "online_kernel",
            [OFFLINE, OFFLINE, ("online", "Normal")],
        ),
        (
            32,
            "online_movable",
            [("online", "Movable"), OFFLINE, ("online", "Normal")],
        ),
        (
            33,
            "online",
            [
                ("online", "Movable"),
                ("online", "Normal"),
                ("online", "Normal"),
            ],
        ),
    ];
    let mut machine = three_probes(ZoneRules::Since4_14);
    for (id, online_type, expected) in recorded {
        machine
            .write(&format!("memory{id}/state"), online_type)
            .unwrap();
        for (id, (state, zones)) in (32..).zip(expected) {
            assert_eq!(machine.read(&format!("memory{id}/state")).unwrap(), state);
            assert_eq!(machine.valid_zones(id).unwrap(), zones, "memory{id}");
        }
        machine.check_invariants().unwrap();
    }
}

#[test]
fn s4_06_machine_of_the_question_has_its_zones_below_4_gib_and_hotplug_on_node_0() {
    let mut machine = two_gib_on_two_nodes(ZoneRules::Since4_14);
    let zones: Vec<_> = machine
        .zones()
        .filter(|zone| zone.present_pages > 0)
        .map(|zone| (zone.nid, zone.kind, zone.start_pfn, zone.spanned_pages))
        .collect();
    assert_eq!(
        zones,
        [
            (0, ZoneKind::Dma, Some(1), 4095),
            (0, ZoneKind::Dma32, Some(0x1000), 0x3_f000),
            (1, ZoneKind::Dma32, Some(0x4_0000), 0x3_ffe0),
        ]
    );
    // 0x100000000 is node 0's, as firmware says, though node 1's memory is nearer.
    assert_eq!(machine.target_node(0x1_0000_0000), Some(0));
    assert_eq!(machine.target_node(0x2_7fff_ffff), Some(0));
    assert_eq!(machine.target_node(0x2_8000_0000), None);
    assert_eq!(machine.target_node(0x4000_0000), Some(1));
    probe(&mut machine, 32).unwrap();
    assert_eq!(machine.read("memory32/node").unwrap(), "0");
    assert_eq!(machine.read("memory8/node").unwrap(), "1");
    machine.online(32, OnlineType::Online).unwrap();
    let normal = machine.zones().find(|zone| zone.kind == ZoneKind::Normal);
    assert_eq!(normal.unwrap().present_pages, 32768);
}

/// Linux forgets where memory was only announced before it looks an address up for `probe`: it falls back to the first
/// node, even where firmware named another.
#[test]
fn s4_06_probe_goes_by_the_ram_of_boot_and_not_by_what_may_be_plugged_in() {
    let range = |start, end, nid| BootRange {
        bytes: start * GIB..end * GIB,
        nid,
    };
    let boot = Boot {
        ram: vec![
            range(0, 1, 2),
            range(2, 3, 1),
            range(4, 5, 1),
            range(6, 7, 0),
        ],
        hot_pluggable: vec![range(8, 16, 1)],
        ..Boot::default()
    };
    let config = Config {
        possible_nodes: 3,
        ..Config::new(Profile::X86_64)
    };
    let mut machine = Hotplug::boot(config, &boot, SparseMemory::default()).unwrap();
    for (gib, nid, target, why) in [
        (1, 2, None, "between two nodes"),
        (3, 1, None, "a hole in one node"),
        (5, 2, None, "between two nodes"),
        (9, 2, Some(1), "announced, not there"),
    ] {
        let id = gib * GIB / BLOCK;
        probe(&mut machine, id).unwrap();
        let node = machine.read(&format!("memory{id}/node")).unwrap();
        assert_eq!(node, nid.to_string(), "{why}");
        assert_eq!(machine.target_node(gib * GIB), target, "{why}");
    }
    // What was added since boot draws nobody to its node.
    probe(&mut machine, 3 * GIB / BLOCK + 1).unwrap();
    probe(&mut machine, GIB / BLOCK + 1).unwrap();
    assert_eq!(machine.read("memory9/node").unwrap(), "2");
    machine.check_invariants().unwrap();
}

#[test]
fn s4_07_memory_block_at_4_gib_is_memory32() {
    let mut machine = bare(Profile::X86_64);
    machine.write("probe", "0x100000000").unwrap();
    let block = machine.blocks().next().unwrap();
    assert_eq!((block.id, block.state), (32, BlockState::Offline));
    assert_eq!(machine.read("memory32/phys_index").unwrap(), "00000020");
    assert_eq!(machine.read("block_size_bytes").unwrap(), "8000000");
    for unknown in [
        "memory31/state",
        "memory032/state",
        "memory+32/state",
        "memory32",
        "memory32/",
        "memory/state",
    ] {
        assert_eq!(machine.read(unknown), Err(Error::NotFound), "{unknown}");
    }
    // With larger memory blocks the same address has another id.
    let large = Profile::X86_64.with_memory_block_size(2 * GIB).unwrap();
    let mut machine = bare(large);
    machine.write("probe", "0x100000000").unwrap();
    assert_eq!(machine.read("memory2/phys_index").unwrap(), "00000002");
    assert_eq!(machine.read("block_size_bytes").unwrap(), "80000000");
}

#[test]
fn s4_08_memory_nobody_announced_works_once_it_is_probed() {
    // No event reaches the guest: there is neither a notification nor anybody to take uevents.
    let mut machine = two_gib_on_two_nodes(ZoneRules::Since4_14);
    let before = machine.total_pages();
    for id in 32..40 {
        probe(&mut machine, id).unwrap();
        online_movable(&mut machine, id).unwrap();
    }
    assert_eq!(machine.total_pages() - before, 8 * 32768);
    // An announcement that comes late finds the memory there.
    assert_eq!(probe(&mut machine, 32), Err(Error::Exists));
    machine.check_invariants().unwrap();
}

//! Memory hotplug as its users see it: CXL memory from boot to the shell.
//!
//! Every row has a test. Of S2-2 (flat against sparse page metadata) only sparse exists here; its test shows that.
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges that have one"
)]

use std::sync::{Arc, Mutex};

use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Boot, BootRange, Config, DeviceKind, DeviceRange, Error, Fault, Hotplug,
    KmemDevice, MemmapOnMemory, MemoryAction, MemoryEvent, Mobility, NodeInfo, Obstacle,
    OnlinePolicy, OnlineType, Owner, PageHandle, Profile, Step, Target, ZoneInfo, ZoneKind,
};

use crate::support::{
    GIB, MIB, Machine, SparseMemory, add_online, bare, booted, check, read, refused, uevents, write,
};

const BLOCK: u64 = 128 * MIB;
const PAGE: u64 = 4096;

/// What charges page metadata to kernel memory, as Linux does.
fn charging(profile: Profile) -> Config {
    Config {
        struct_page_size: 64,
        ..Config::new(profile)
    }
}

/// Memory blocks that carry their metadata where they can.
fn self_hosting(profile: Profile) -> Config {
    Config {
        memmap_on_memory: MemmapOnMemory::On,
        ..charging(profile)
    }
}

fn with_blocks_of(profile: Profile, size: u64) -> Profile {
    Profile {
        memory_block_shift: size.trailing_zeros(),
        ..profile
    }
}

fn request(start: u64, size: u64, nid: u32) -> AddMemory<'static> {
    AddMemory {
        target: Target::Node(nid),
        ..AddMemory::new(start, size)
    }
}

fn zone(machine: &Machine, nid: u32, kind: ZoneKind) -> ZoneInfo {
    let mut zones = machine.zones();
    zones.find(|z| z.nid == nid && z.kind == kind).unwrap()
}

/// Free pages of all kernel zones of a node.
fn kernel_free(machine: &Machine, nid: u32) -> u64 {
    let zones = machine.zones();
    let kernel = zones.filter(|z| z.nid == nid && z.kind.is_kernel());
    kernel.map(|z| z.free_pages).sum()
}

fn node(machine: &Machine, nid: u32) -> Option<NodeInfo> {
    machine.nodes().find(|node| node.nid == nid)
}

fn block_of(machine: &Machine, page: PageHandle) -> u64 {
    machine.address(page).unwrap() / machine.profile().memory_block_size()
}

/// The ids and states of all memory blocks.
fn states(machine: &Machine) -> Vec<(u64, BlockState)> {
    machine.blocks().map(|b| (b.id, b.state)).collect()
}

/// Everything notifiers hear.
fn listen(machine: &mut Machine) -> Arc<Mutex<Vec<MemoryEvent>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    machine.register_notifier(
        0,
        Box::new(move |event: &MemoryEvent| {
            log.lock().unwrap().push(*event);
            Ok(())
        }),
    );
    events
}

#[test]
fn s2_01_memory_block_is_contiguous_frames_with_contiguous_metadata() {
    for (size, sections) in [(BLOCK, 1), (256 * MIB, 2), (2 * GIB, 16)] {
        let profile = with_blocks_of(Profile::X86_64, size);
        let mut machine = booted(self_hosting(profile), &[]);
        machine
            .add_memory(&AddMemory {
                memmap_on_memory: true,
                ..AddMemory::new(8 * GIB, size)
            })
            .unwrap();
        let frames = 8 * GIB / PAGE..(8 * GIB + size) / PAGE;
        let found: Vec<_> = machine
            .sections()
            .map(|s| (s.number, s.active.count()))
            .collect();
        let expected: Vec<_> = (64..64 + sections).map(|number| (number, 64)).collect();
        assert_eq!(found, expected, "sections follow each other, all of each");
        assert!(frames.clone().all(|pfn| machine.pfn_valid(pfn)));
        assert!(!machine.pfn_valid(frames.start - 1) && !machine.pfn_valid(frames.end));

        let block = machine.blocks().next().unwrap();
        assert_eq!(block.id, 8 * GIB / size);
        machine.online(block.id, OnlineType::Kernel).unwrap();
        let metadata = block.memmap_pages * PAGE;
        assert_eq!(metadata, size / 64);
        // In one piece at the start: the first page anybody gets lies right behind it.
        let first = machine.allocate(Mobility::Movable).unwrap();
        assert_eq!(machine.address(first), Ok(8 * GIB + metadata));
        let normal = zone(&machine, 0, ZoneKind::Normal);
        assert_eq!(normal.start_pfn, Some(frames.start));
        assert_eq!(
            normal.managed_pages,
            normal.present_pages - block.memmap_pages
        );
        check(&machine);
    }
}

#[test]
fn s2_02_metadata_is_sparse_so_a_gap_of_terabytes_costs_nothing() {
    let metadata_with_second_block_at = |start| {
        let mut machine = bare(Profile::X86_64);
        machine.add_memory(&AddMemory::new(4 * GIB, BLOCK)).unwrap();
        machine.add_memory(&AddMemory::new(start, BLOCK)).unwrap();
        assert!(machine.pfn_valid(start / PAGE));
        assert!(
            !machine.pfn_valid((4 * GIB + BLOCK + start) / 2 / PAGE) || start == 4 * GIB + BLOCK
        );
        check(&machine);
        machine.metadata_bytes()
    };
    let adjacent = metadata_with_second_block_at(4 * GIB + BLOCK);
    assert_eq!(metadata_with_second_block_at(32 << 40), adjacent);
}

#[test]
fn s2_03_offlining_moves_what_is_in_use_with_its_contents() {
    let mut machine = bare(Profile::X86_64);
    add_online(&mut machine, 4 * GIB, 2 * BLOCK, OnlineType::Movable);
    let pages: Vec<PageHandle> = (0..700)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    for (tag, page) in (1000..).zip(&pages) {
        write(&mut machine, *page, tag);
    }
    assert!(pages.iter().all(|page| block_of(&machine, *page) == 32));
    machine.offline(32).unwrap();
    check(&machine);
    assert_eq!(machine.statistics().pages_migrated, 700);
    for (tag, page) in (1000..).zip(&pages) {
        assert_eq!(block_of(&machine, *page), 33);
        assert_eq!(read(&mut machine, *page), tag);
    }
    machine.remove_memory(Owner::PROBE, 4 * GIB, BLOCK).unwrap();
    assert_eq!(read(&mut machine, pages[699]), 1699);
    // Nowhere to move to any more.
    refused(&mut machine, Error::NoMemory, |m| m.offline(33));
    assert_eq!(read(&mut machine, pages[0]), 1000);
}

#[test]
fn s2_04_build_options_decide_what_can_be_done() {
    let boot = [(4 * GIB, 5 * GIB, 0)];
    // MEMORY_HOTREMOVE
    for hot_remove in [true, false] {
        let config = Config {
            hot_remove,
            ..charging(Profile::X86_64)
        };
        let mut machine = booted(config, &boot);
        add_online(&mut machine, 8 * GIB, BLOCK, OnlineType::Movable);
        machine.add_memory(&AddMemory::new(9 * GIB, BLOCK)).unwrap();
        let removable = machine.read("memory64/removable").unwrap();
        assert_eq!(removable, if hot_remove { "1" } else { "0" });
        let file = "memory64/valid_zones";
        let refused_with = match hot_remove {
            true => Error::AccessDenied,
            false => Error::NotFound,
        };
        assert_eq!(machine.read(file).is_ok(), hot_remove);
        assert_eq!(machine.write(file, "Normal"), Err(refused_with));
        if hot_remove {
            machine.write("memory64/state", "offline").unwrap();
            machine.remove_memory(Owner::PROBE, 8 * GIB, BLOCK).unwrap();
            machine.remove_memory(Owner::PROBE, 9 * GIB, BLOCK).unwrap();
            continue;
        }
        refused(&mut machine, Error::Invalid, |m| m.offline(64));
        refused(&mut machine, Error::Invalid, |m| {
            m.write("memory64/state", "offline")
        });
        refused(&mut machine, Error::Invalid, |m| {
            m.write("memory64/online", "0")
        });
        for (start, error) in [(8 * GIB, Error::Invalid), (9 * GIB, Error::Busy)] {
            refused(&mut machine, Error::Busy, |m| {
                m.remove_memory(Owner::PROBE, start, BLOCK)
            });
            refused(&mut machine, error, |m| {
                m.offline_and_remove_memory(Owner::PROBE, start, BLOCK)
            });
        }
    }
    // MHP_DEFAULT_ONLINE_TYPE_*
    for (default, text, zone) in [
        (None, "offline", None),
        (Some(OnlineType::Online), "online", Some(ZoneKind::Normal)),
        (
            Some(OnlineType::Kernel),
            "online_kernel",
            Some(ZoneKind::Normal),
        ),
        (
            Some(OnlineType::Movable),
            "online_movable",
            Some(ZoneKind::Movable),
        ),
    ] {
        let config = Config {
            default_online_type: default,
            ..charging(Profile::X86_64)
        };
        let mut machine = booted(config, &boot);
        assert_eq!(machine.read("auto_online_blocks").unwrap(), text);
        machine
            .add_memory(&AddMemory::new(8 * GIB, 2 * BLOCK))
            .unwrap();
        let added: Vec<_> = machine
            .blocks()
            .filter(|b| !b.early)
            .map(|b| b.zone)
            .collect();
        assert_eq!(added, [zone, zone], "{text}");
        check(&machine);
    }
    // MHP_MEMMAP_ON_MEMORY, and whether metadata is charged at all
    for (mode, struct_page_size, hosted, charged) in [
        (MemmapOnMemory::Off, 64, 0, 512),
        (MemmapOnMemory::Off, 0, 0, 0),
        (MemmapOnMemory::On, 64, 512, 0),
        (MemmapOnMemory::Force, 64, 512, 0),
    ] {
        let config = Config {
            memmap_on_memory: mode,
            struct_page_size,
            ..Config::new(Profile::X86_64)
        };
        let mut machine = booted(config, &boot);
        let before = machine.counts().free;
        machine
            .add_memory(&AddMemory {
                memmap_on_memory: true,
                ..AddMemory::new(8 * GIB, BLOCK)
            })
            .unwrap();
        assert_eq!(before - machine.counts().free, charged);
        let block = machine.blocks().last().unwrap();
        assert_eq!((block.id, block.memmap_pages), (64, hosted));
    }
}

/// RAM at 4 GiB on node 0, and a gigabyte of special purpose memory at 8 GiB, on node 1.
fn with_special_purpose_memory(command_line: &str) -> Machine {
    let mut config = Config {
        possible_nodes: 2,
        ..charging(Profile::X86_64)
    };
    config.apply_command_line(command_line);
    let range = |start, nid| BootRange {
        bytes: start..start + GIB,
        nid,
    };
    let boot = Boot {
        ram: vec![range(4 * GIB, 0)],
        special_purpose: vec![range(8 * GIB, 1)],
        ..Boot::default()
    };
    Hotplug::boot(config, &boot, SparseMemory::default()).unwrap()
}

const DAX: KmemDevice<'static> = KmemDevice {
    name: "dax0.0",
    ranges: &[8 * GIB..9 * GIB],
    nid: 1,
    owner: Owner::ACPI,
    memmap_on_memory: false,
};

#[test]
fn s2_05_special_purpose_memory_is_absent_until_its_driver_adds_it() {
    let mut machine = with_special_purpose_memory("quiet");
    let ram: Vec<_> = (32..40).map(|id| (id, BlockState::Online)).collect();
    assert_eq!(states(&machine), ram);
    for id in 32..40 {
        assert_eq!(machine.valid_zones(id).unwrap(), "Normal");
    }
    assert_eq!(
        machine.resources().to_string(),
        "100000000-13fffffff : System RAM\n200000000-23fffffff : Soft Reserved\n"
    );
    assert!(!machine.pfn_valid(8 * GIB / PAGE));
    assert_eq!(machine.total_pages(), GIB / PAGE);
    assert!(node(&machine, 1).is_none_or(|node| !node.online));

    let kmem = machine.add_kmem(&DAX).unwrap();
    assert_eq!(kmem.ranges(), DAX.ranges);
    assert_eq!(kmem.lost_bytes(), 0);
    let added: Vec<_> = (64..72).map(|id| (id, BlockState::Offline)).collect();
    assert_eq!(states(&machine), [ram, added].concat());
    assert_eq!(
        machine.resources().to_string(),
        "100000000-13fffffff : System RAM\n200000000-23fffffff : Soft Reserved\n\
         \x20\x20200000000-23fffffff : dax0.0\n\
         \x20\x20\x20\x20200000000-23fffffff : System RAM (kmem)\n"
    );
    assert_eq!(machine.read("memory64/node").unwrap(), "1");
    check(&machine);

    // The kernel was told to take it for RAM: nothing is left for the driver.
    let mut machine = with_special_purpose_memory("efi=debug,nosoftreserve quiet");
    let all: Vec<_> = (32..40)
        .chain(64..72)
        .map(|id| (id, BlockState::Online))
        .collect();
    assert_eq!(states(&machine), all);
    assert_eq!(machine.valid_zones(64).unwrap(), "Normal");
    assert!(!machine.resources().to_string().contains("Soft Reserved"));
    assert_eq!(machine.total_pages(), 2 * GIB / PAGE);
    assert!(node(&machine, 1).unwrap().has_normal_memory);
    refused(&mut machine, Error::Busy, |m| m.add_kmem(&DAX));
}

#[test]
fn s2_06_driver_managed_memory_has_a_name_is_trimmed_to_blocks_and_is_one_static_group() {
    let mut machine = booted(charging(Profile::X86_64), &[(GIB, GIB + BLOCK, 0)]);
    for name in [
        "",
        "kmem",
        "System RAM(kmem)",
        "System RAM (kmem",
        "System RAM ",
        "system ram (kmem)",
    ] {
        // Even where other things are wrong, too: the name is looked at first.
        for start in [4 * GIB, 1 << 60, GIB] {
            refused(&mut machine, Error::Invalid, |m| {
                m.add_memory(&AddMemory {
                    resource_name: name,
                    ..AddMemory::new(start, BLOCK)
                })
            });
        }
    }

    // 126 MiB in front, 88 behind, and all of the second, which has no whole block in it.
    let ranges = [
        4 * GIB + 2 * MIB..4 * GIB + 600 * MIB,
        8 * GIB - 64 * MIB..8 * GIB + 64 * MIB,
        9 * GIB..9 * GIB + 256 * MIB,
    ];
    let owner = Owner::driver(3);
    let device = KmemDevice {
        name: "dax1.0",
        ranges: &ranges,
        nid: 0,
        owner,
        memmap_on_memory: false,
    };
    let before = machine.snapshot();
    let mut kmem = machine.add_kmem(&device).unwrap();
    let added = [
        4 * GIB + BLOCK..4 * GIB + 4 * BLOCK,
        9 * GIB..9 * GIB + 2 * BLOCK,
    ];
    assert_eq!(kmem.ranges(), added);
    assert_eq!(kmem.lost_bytes(), (126 + 88 + 128) * MIB);
    assert_eq!(kmem.refused(), []);
    let ids: Vec<_> = machine
        .blocks()
        .filter(|b| !b.early)
        .map(|b| b.id)
        .collect();
    assert_eq!(ids, [33, 34, 35, 72, 73]);
    assert!(
        machine
            .blocks()
            .filter(|b| !b.early)
            .all(|b| b.group == Some(kmem.group()))
    );
    let iomem = machine.resources().iomem();
    let ram: Vec<_> = iomem.filter(|r| r.name() == "System RAM (kmem)").collect();
    assert!(
        ram.iter()
            .all(|r| r.flags().driver_managed && r.depth() == 1)
    );
    assert_eq!(ram.len(), 2);

    // Only its driver removes it, and only while it is offline.
    refused(&mut machine, Error::NotPermitted, |m| {
        m.remove_memory(Owner::ACPI, added[0].start, BLOCK)
    });
    machine.online(35, OnlineType::Movable).unwrap();
    assert_eq!(machine.remove_kmem(&mut kmem), Err(Error::Busy));
    assert_eq!(kmem.ranges(), &added[..1], "the other range is gone");
    refused(&mut machine, Error::Busy, |m| {
        m.unregister_group(kmem.group())
    });
    machine.offline(35).unwrap();
    assert_eq!(machine.remove_kmem(&mut kmem), Ok(()));
    assert_eq!(machine.snapshot(), before);
    assert_eq!(states(&machine), [(8, BlockState::Online)]);
    assert_eq!(machine.unregister_group(kmem.group()), Err(Error::Invalid));
    check(&machine);

    // The claim of the device goes with a failure, at any stage of adding.
    for step in [
        Step::Resource,
        Step::Node,
        Step::Mapping,
        Step::Memmap,
        Step::MemoryBlock,
    ] {
        machine.inject(Fault {
            step,
            skip: 0,
            error: Error::NoMemory,
        });
        refused(&mut machine, Error::NoMemory, |m| m.add_kmem(&device));
    }

    // No whole block at all, no such node, first range taken: nothing happens. A later one is left out.
    let add = |ranges, nid| {
        move |m: &mut Machine| {
            m.add_kmem(&KmemDevice {
                ranges,
                nid,
                ..device
            })
        }
    };
    refused(&mut machine, Error::Invalid, add(&ranges[1..2], 0));
    refused(&mut machine, Error::Invalid, add(&[], 0));
    refused(&mut machine, Error::Invalid, add(&ranges, 7));
    machine.add_memory(&AddMemory::new(9 * GIB, BLOCK)).unwrap();
    refused(&mut machine, Error::Busy, add(&ranges[2..], 0));
    let kmem = add(&ranges, 0)(&mut machine).unwrap();
    assert_eq!(kmem.ranges(), &added[..1]);
    assert_eq!(kmem.refused(), [(added[1].clone(), Error::Busy)]);
    check(&machine);

    static_group_goes_to_movable_only_if_all_of_the_device_fits();
}

/// The group is over all of the device, so the policy looks at all of it.
fn static_group_goes_to_movable_only_if_all_of_the_device_fits() {
    // 640 MiB of device: more than 301 % of 128 MiB, less than that of 256 MiB. Its first range alone would fit.
    let ranges = [4 * GIB..4 * GIB + 3 * BLOCK, 9 * GIB..9 * GIB + 2 * BLOCK];
    for (boot, expected) in [(BLOCK, ZoneKind::Normal), (2 * BLOCK, ZoneKind::Movable)] {
        let config = Config {
            online_policy: OnlinePolicy::AutoMovable,
            default_online_type: Some(OnlineType::Online),
            ..Config::new(Profile::X86_64)
        };
        let mut machine = booted(config, &[(GIB, GIB + boot, 0)]);
        let device = KmemDevice {
            ranges: &ranges,
            nid: 0,
            ..DAX
        };
        let kmem = machine.add_kmem(&device).unwrap();
        let of_device = machine.blocks().filter(|b| b.group == Some(kmem.group()));
        let zones: Vec<_> = of_device.map(|b| b.zone).collect();
        assert_eq!(zones, [Some(expected); 5]);
        check(&machine);
    }
}

#[test]
fn s2_07_failure_at_any_stage_leaves_no_trace() {
    let fail = |step, skip| Fault {
        step,
        skip,
        error: Error::NoMemory,
    };
    // Two blocks of two sections each.
    let profile = with_blocks_of(Profile::X86_64, 256 * MIB);
    let mut machine = booted(charging(profile), &[(4 * GIB, 5 * GIB, 0)]);
    let events = uevents(&mut machine);
    let add = AddMemory {
        resource_name: "System RAM (kmem)",
        merge_resource: true,
        withheld: 8 * GIB..8 * GIB + 2 * MIB,
        ..AddMemory::new(8 * GIB, 512 * MIB)
    };
    for (step, times) in [
        (Step::Resource, 1),
        (Step::Node, 1),
        (Step::Mapping, 1),
        (Step::Memmap, 4),
        (Step::MemoryBlock, 2),
    ] {
        for skip in 0..times {
            machine.inject(fail(step, skip));
            refused(&mut machine, Error::NoMemory, |m| m.add_memory(&add));
            assert_eq!(machine.clear_faults(), 0, "{step:?} {skip}: reached");
        }
        machine.inject(fail(step, times));
        machine.add_memory(&add).unwrap();
        assert_eq!(
            machine.clear_faults(),
            1,
            "{step:?} is reached {times} times"
        );
        machine
            .remove_memory(Owner::PROBE, 8 * GIB, 512 * MIB)
            .unwrap();
    }
    events
        .lock()
        .unwrap()
        .retain(|event| !event.starts_with("add") && !event.starts_with("remove"));
    machine.add_memory(&add).unwrap();

    machine.inject(fail(Step::PrepareOnline, 0));
    refused(&mut machine, Error::NoMemory, |m| {
        m.online(32, OnlineType::Movable)
    });
    machine.online(32, OnlineType::Movable).unwrap();
    machine.online(33, OnlineType::Movable).unwrap();
    let pages: Vec<_> = (0..10)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    for (tag, page) in (0..).zip(&pages) {
        write(&mut machine, *page, tag);
    }
    for step in [Step::Isolate, Step::Migrate] {
        machine.inject(fail(step, 0));
        refused(&mut machine, Error::NoMemory, |m| m.offline(32));
    }
    // What has moved by then stays where it is, whole.
    for (step, skip, moved) in [(Step::Migrate, 5, 5), (Step::Commit, 0, 10)] {
        let before = (machine.counts(), states(&machine));
        machine.inject(fail(step, skip));
        assert_eq!(machine.offline(32), Err(Error::NoMemory));
        assert_eq!((machine.counts(), states(&machine)), before);
        let elsewhere = pages.iter().filter(|page| block_of(&machine, **page) != 32);
        assert_eq!(elsewhere.count(), moved);
        check(&machine);
    }
    for (tag, page) in (0..).zip(&pages) {
        assert_eq!(read(&mut machine, *page), tag);
    }
    machine.offline(32).unwrap();
    assert_eq!(
        events
            .lock()
            .unwrap()
            .iter()
            .filter(|e| e.ends_with("memory32"))
            .collect::<Vec<_>>(),
        ["add memory32", "online memory32", "offline memory32"],
        "failures are silent"
    );

    // Device memory goes the same way, without a memory block.
    let device_bytes = 16 * GIB + 2 * MIB..16 * GIB + 256 * MIB;
    let device = DeviceRange::new(device_bytes, DeviceKind::DevDax);
    for (step, skip) in [
        (Step::Mapping, 0),
        (Step::Memmap, 0),
        (Step::Memmap, 1),
        (Step::Resource, 0),
    ] {
        machine.inject(fail(step, skip));
        refused(&mut machine, Error::NoMemory, |m| {
            m.add_device_memory(device.clone(), "dax2.0")
        });
        assert_eq!(machine.clear_faults(), 0, "{step:?} {skip}: reached");
    }
    machine.add_device_memory(device, "dax2.0").unwrap();
    check(&machine);
}

#[test]
fn s2_08_metadata_costs_one_64th_of_memory_at_4_kib_pages() {
    for (profile, of_256_gib) in [
        (Profile::X86_64, 4 * GIB),
        (Profile::ARM64_4K, 4 * GIB),
        (Profile::RISCV64, 4 * GIB),
        (Profile::ARM64_16K, GIB),
        (Profile::ARM64_64K, 256 * MIB),
    ] {
        let config = charging(profile);
        let page = profile.page_size();
        assert_eq!(config.metadata_pages(256 * GIB) * page, of_256_gib);

        // As much is taken from kernel memory when a gigabyte is added, and given back when it goes.
        let mut machine = booted(config, &[(4 * GIB, 6 * GIB, 0)]);
        let before = machine.snapshot();
        let free = kernel_free(&machine, 0);
        machine.add_memory(&AddMemory::new(8 * GIB, GIB)).unwrap();
        assert_eq!((free - kernel_free(&machine, 0)) * page, of_256_gib / 256);
        check(&machine);
        machine.remove_memory(Owner::PROBE, 8 * GIB, GIB).unwrap();
        assert_eq!(machine.snapshot(), before);
    }
    // Exactly 1.5625 %, and nothing where metadata is not charged.
    let pages = |config: Config| config.metadata_pages(256 * GIB);
    assert_eq!(
        pages(charging(Profile::X86_64)) * PAGE * 10_000,
        256 * GIB * 10_000 / 64
    );
    assert_eq!(pages(Config::new(Profile::X86_64)), 0);
}

#[test]
fn s2_09_metadata_of_movable_memory_exhausts_kernel_memory_at_a_predicted_block() {
    // 4 GiB of kernel memory is what the metadata of 256 GiB takes: nothing would be left.
    let config = charging(Profile::X86_64);
    assert_eq!(config.metadata_pages(256 * GIB), 4 * GIB / PAGE);

    // The same at a 32nd: 128 MiB of kernel memory, 8 MiB of it in use, and blocks that take 2 MiB each.
    let kernel_with_8_mib_in_use = || {
        let mut machine = booted(config, &[(GIB, GIB + BLOCK, 0)]);
        for _ in 0..8 * MIB / PAGE {
            machine.allocate(Mobility::Unmovable).unwrap();
        }
        machine
    };
    let mut machine = kernel_with_8_mib_in_use();
    let predicted = kernel_free(&machine, 0) / config.metadata_pages(BLOCK);
    assert_eq!(predicted, 60);
    let block = |index| 4 * GIB + index * BLOCK;
    for index in 0..predicted {
        add_online(&mut machine, block(index), BLOCK, OnlineType::Movable);
    }
    refused(&mut machine, Error::NoMemory, |m| {
        m.add_memory(&AddMemory::new(block(predicted), BLOCK))
    });
    assert_eq!(kernel_free(&machine, 0), 0);
    assert_eq!(machine.allocate(Mobility::Unmovable), Err(Error::NoMemory));
    assert_eq!(
        zone(&machine, 0, ZoneKind::Movable).free_pages,
        60 * BLOCK / PAGE
    );
    // Offline blocks have their price, too; only removing one makes room for another.
    machine.offline(32).unwrap();
    refused(&mut machine, Error::NoMemory, |m| {
        m.add_memory(&AddMemory::new(block(predicted), BLOCK))
    });
    machine
        .remove_memory(Owner::PROBE, block(0), BLOCK)
        .unwrap();
    machine
        .add_memory(&AddMemory::new(block(predicted), BLOCK))
        .unwrap();

    // A request that fails half way gives back what it had taken.
    let mut machine = kernel_with_8_mib_in_use();
    refused(&mut machine, Error::NoMemory, |m| {
        m.add_memory(&AddMemory::new(block(0), 61 * BLOCK))
    });

    // Blocks that are kernel memory pay for their successors, and blocks that carry their metadata for themselves.
    let mut machine = kernel_with_8_mib_in_use();
    add_online(&mut machine, block(0), BLOCK, OnlineType::Kernel);
    let more = kernel_free(&machine, 0) / 512;
    assert_eq!(more, 59 + 64);
    let config = Config {
        memmap_on_memory: MemmapOnMemory::On,
        ..config
    };
    let mut machine = booted(config, &[(GIB, GIB + BLOCK, 0)]);
    let free = kernel_free(&machine, 0);
    machine
        .add_memory(&AddMemory {
            memmap_on_memory: true,
            ..AddMemory::new(block(0), 70 * BLOCK)
        })
        .unwrap();
    assert_eq!(kernel_free(&machine, 0), free);
}

#[test]
fn s2_10_metadata_prefers_the_node_of_the_memory_and_falls_back_to_others() {
    let config = Config {
        possible_nodes: 3,
        ..charging(Profile::X86_64)
    };
    let ram = [(GIB, GIB + 2 * BLOCK, 0), (2 * GIB, 2 * GIB + BLOCK, 1)];
    let mut machine = booted(config, &ram);
    let free = |m: &Machine| [kernel_free(m, 0), kernel_free(m, 1)];
    let [zero, one] = free(&machine);

    machine.add_memory(&request(4 * GIB, BLOCK, 1)).unwrap();
    assert_eq!(free(&machine), [zero, one - 512], "node 1 pays for itself");
    machine.add_memory(&request(5 * GIB, BLOCK, 2)).unwrap();
    assert_eq!(
        free(&machine),
        [zero - 512, one - 512],
        "node 2 has nothing to pay with"
    );

    while kernel_free(&machine, 1) > 100 {
        machine.allocate_on(1, Mobility::Unmovable).unwrap();
    }
    let mut add = request(6 * GIB, BLOCK, 1);
    machine.add_memory(&add).unwrap();
    assert_eq!(
        free(&machine),
        [zero - 512 - 412, 0],
        "what node 1 has left, then node 0"
    );
    add.start = 7 * GIB;
    machine.add_memory(&add).unwrap();
    assert_eq!(
        free(&machine),
        [zero - 512 - 412 - 512, 0],
        "node 1 is full"
    );
    check(&machine);

    // Movable memory of the node is of no use for it.
    machine.online(32, OnlineType::Movable).unwrap();
    add.start = 8 * GIB;
    machine.add_memory(&add).unwrap();
    assert_eq!(free(&machine), [zero - 412 - 3 * 512, 0]);
    assert_eq!(
        zone(&machine, 1, ZoneKind::Movable).free_pages,
        BLOCK / PAGE
    );
    check(&machine);
}

#[test]
fn s2_11_kernel_use_and_pins_keep_a_block_from_going_offline_and_say_where() {
    let mut machine = bare(Profile::X86_64);
    add_online(&mut machine, 4 * GIB, 2 * BLOCK, OnlineType::Kernel);
    let movable = machine.allocate(Mobility::Movable).unwrap();
    assert_eq!(machine.obstacle(32), Ok(None));

    let kernel = machine.allocate(Mobility::Unmovable).unwrap();
    let at = machine.address(kernel).unwrap();
    assert_eq!(at / BLOCK, 32);
    assert_eq!(machine.fixed_pages().collect::<Vec<_>>(), [at]);
    refused(&mut machine, Error::Busy, |m| m.offline(32));
    refused(&mut machine, Error::Busy, |m| {
        m.write("memory32/state", "offline")
    });
    refused(&mut machine, Error::Busy, |m| m.hard_offline_page(at));
    refused(&mut machine, Error::Io, |m| m.soft_offline_page(at));
    refused(&mut machine, Error::Busy, |m| {
        m.offline_and_remove_memory(Owner::PROBE, 4 * GIB, 2 * BLOCK)
    });
    assert_eq!(machine.obstacle(32), Ok(Some((at, Obstacle::Unmovable))));
    assert_eq!(machine.obstacle(33), Ok(None));
    machine.free(kernel).unwrap();
    assert_eq!(machine.fixed_pages().count(), 0);

    machine.pin(movable).unwrap();
    let at = machine.address(movable).unwrap();
    assert_eq!(machine.fixed_pages().collect::<Vec<_>>(), [at]);
    refused(&mut machine, Error::Busy, |m| m.offline(32));
    assert_eq!(machine.obstacle(32), Ok(Some((at, Obstacle::Pinned))));
    machine.unpin(movable).unwrap();
    assert_eq!(machine.fixed_pages().count(), 0);

    let isolation = machine.isolate(4 * GIB + 4 * MIB, 2 * MIB).unwrap();
    let expected = (4 * GIB + 4 * MIB, Obstacle::BeingEmptied);
    assert_eq!(machine.obstacle(32), Ok(Some(expected)));
    refused(&mut machine, Error::Busy, |m| m.offline(32));
    machine.cancel(isolation);
    assert_eq!(machine.obstacle(32), Ok(None));
    machine.offline(32).unwrap();
    assert_eq!(machine.obstacle(99), Err(Error::Invalid));

    // Memory of boot: what is reserved, what is missing, what is for contiguous allocations.
    let boot = Boot {
        ram: vec![BootRange {
            bytes: 4 * GIB..4 * GIB + 4 * BLOCK - MIB,
            nid: 0,
        }],
        reserved: vec![4 * GIB + 3 * MIB..4 * GIB + 4 * MIB],
        cma: vec![4 * GIB + BLOCK..4 * GIB + BLOCK + 4 * MIB],
        ..Boot::default()
    };
    let config = Config::new(Profile::X86_64);
    let mut machine = Hotplug::boot(config, &boot, SparseMemory::default()).unwrap();
    for (id, error, obstacle) in [
        (32, Error::Busy, (4 * GIB + 3 * MIB, Obstacle::Reserved)),
        (33, Error::Busy, (4 * GIB + BLOCK, Obstacle::Contiguous)),
        (
            35,
            Error::Invalid,
            (4 * GIB + 4 * BLOCK - MIB, Obstacle::Hole),
        ),
    ] {
        refused(&mut machine, error, |m| m.offline(id));
        assert_eq!(machine.obstacle(id), Ok(Some(obstacle)));
    }
    machine.offline(34).unwrap();

    // The metadata of a block is kernel use of another one: while 33 is there, 32 cannot go.
    let mut machine = booted(charging(Profile::X86_64), &[(GIB, GIB + 2 * MIB, 0)]);
    add_online(&mut machine, 4 * GIB, BLOCK, OnlineType::Kernel);
    machine
        .add_memory(&AddMemory::new(4 * GIB + BLOCK, BLOCK))
        .unwrap();
    refused(&mut machine, Error::Busy, |m| m.offline(32));
    assert_eq!(
        machine.obstacle(32),
        Ok(Some((4 * GIB, Obstacle::Unmovable)))
    );
    machine
        .remove_memory(Owner::PROBE, 4 * GIB + BLOCK, BLOCK)
        .unwrap();
    machine.offline(32).unwrap();
    check(&machine);
}

#[test]
fn s2_12_long_term_pin_never_stays_in_movable() {
    let mut machine = bare(Profile::X86_64);
    add_online(&mut machine, 4 * GIB, BLOCK, OnlineType::Movable);
    let page = machine.allocate(Mobility::Movable).unwrap();
    write(&mut machine, page, 7);

    // There is nowhere else to pin it: it is not pinned at all.
    refused(&mut machine, Error::NoMemory, |m| m.pin_long_term(page));
    assert_eq!(machine.unpin(page), Err(Error::Invalid));

    add_online(&mut machine, 5 * GIB, BLOCK, OnlineType::Kernel);
    // Somebody accesses it just now: it cannot be moved out.
    machine.pin(page).unwrap();
    refused(&mut machine, Error::Busy, |m| m.pin_long_term(page));
    machine.unpin(page).unwrap();

    machine.pin_long_term(page).unwrap();
    assert_eq!(block_of(&machine, page), 40, "moved out of Movable first");
    assert_eq!(read(&mut machine, page), 7);
    check(&machine);
    machine.offline(32).unwrap();
    machine.online(32, OnlineType::Movable).unwrap();
    refused(&mut machine, Error::Busy, |m| m.offline(40));
    // A second one leaves it where it is.
    let at = machine.address(page);
    machine.pin_long_term(page).unwrap();
    assert_eq!(machine.address(page), at);
    machine.unpin(page).unwrap();
    machine.unpin(page).unwrap();
    machine.offline(40).unwrap();
    assert_eq!(
        (block_of(&machine, page), read(&mut machine, page)),
        (32, 7)
    );

    // Movable is an attempt, no promise: a pin for the time of an access holds a block up.
    machine.online(40, OnlineType::Kernel).unwrap();
    machine.pin(page).unwrap();
    refused(&mut machine, Error::Busy, |m| m.offline(32));
    machine.unpin(page).unwrap();
    machine.offline(32).unwrap();

    // Memory for contiguous allocations is as protected.
    let boot = Boot {
        ram: vec![BootRange {
            bytes: 4 * GIB..4 * GIB + BLOCK,
            nid: 0,
        }],
        cma: vec![4 * GIB..4 * GIB + 2 * MIB],
        ..Boot::default()
    };
    let config = Config::new(Profile::X86_64);
    let mut machine = Hotplug::boot(config, &boot, SparseMemory::default()).unwrap();
    let pages: Vec<_> = (0..BLOCK / PAGE)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    let in_cma = |m: &Machine, page| m.address(page).unwrap() < 4 * GIB + 2 * MIB;
    let (inside, outside): (Vec<_>, Vec<_>) = pages.into_iter().partition(|p| in_cma(&machine, *p));
    assert_eq!(inside.len(), 512);
    refused(&mut machine, Error::NoMemory, |m| {
        m.pin_long_term(inside[0])
    });
    // A free page among them is of no use either: that is what nothing unmovable goes to.
    machine.free(inside[1]).unwrap();
    refused(&mut machine, Error::NoMemory, |m| {
        m.pin_long_term(inside[0])
    });
    refused(&mut machine, Error::NoMemory, |m| {
        m.allocate(Mobility::Unmovable)
    });
    machine.free(outside[0]).unwrap();
    machine.pin_long_term(inside[0]).unwrap();
    assert!(!in_cma(&machine, inside[0]));
    check(&machine);
}

#[test]
fn s2_13_sources_of_the_zone_each_stronger_than_the_one_before() {
    use OnlineType::{Kernel, Movable, Online};
    let zone_of_new_block =
        |build, boot_parameter: &str, file: Option<&str>, user: Option<&str>| {
            let mut config = Config {
                default_online_type: build,
                ..Config::new(Profile::X86_64)
            };
            config.apply_command_line(boot_parameter);
            let mut machine = booted(config, &[(4 * GIB, 4 * GIB + BLOCK, 0)]);
            if let Some(text) = file {
                machine.write("auto_online_blocks", text).unwrap();
            }
            machine.add_memory(&AddMemory::new(8 * GIB, BLOCK)).unwrap();
            if let Some(text) = user {
                // As udev or daxctl do it: what is online already has to go offline first.
                machine.write("memory64/online", "0").unwrap();
                machine.write("memory64/state", text).unwrap();
            }
            check(&machine);
            machine.blocks().last().unwrap().zone.map(ZoneKind::name)
        };
    let movable = "memhp_default_state=online_movable";
    let kernel = "memhp_default_state=online_kernel";
    let offline = "memhp_default_state=offline";
    for (build, boot_parameter, file, user, expected) in [
        (None, "", None, None, None),
        (Some(Online), "", None, None, Some("Normal")),
        (Some(Movable), "", None, None, Some("Movable")),
        // The boot parameter over the build, in both directions; a wrong one does not count, the last one does.
        (None, movable, None, None, Some("Movable")),
        (Some(Movable), kernel, None, None, Some("Normal")),
        (Some(Movable), offline, None, None, None),
        (
            Some(Movable),
            "memhp_default_state=movable",
            None,
            None,
            Some("Movable"),
        ),
        (
            None,
            &format!("{kernel} {movable}"),
            None,
            None,
            Some("Movable"),
        ),
        // The file over both.
        (
            Some(Movable),
            movable,
            Some("online_kernel"),
            None,
            Some("Normal"),
        ),
        (
            Some(Kernel),
            kernel,
            Some("online_movable"),
            None,
            Some("Movable"),
        ),
        (Some(Kernel), kernel, Some("offline"), None, None),
        // User space over all.
        (
            Some(Kernel),
            kernel,
            Some("online_kernel"),
            Some("online_movable"),
            Some("Movable"),
        ),
        (
            Some(Movable),
            movable,
            Some("online_movable"),
            Some("online_kernel"),
            Some("Normal"),
        ),
        (
            None,
            offline,
            Some("offline"),
            Some("online"),
            Some("Normal"),
        ),
    ] {
        let found = zone_of_new_block(build, boot_parameter, file, user);
        assert_eq!(
            found, expected,
            "{build:?} {boot_parameter} {file:?} {user:?}"
        );
    }

    // The file is for blocks added from now on, and takes only what it knows.
    let mut machine = bare(Profile::X86_64);
    machine.add_memory(&AddMemory::new(4 * GIB, BLOCK)).unwrap();
    machine
        .write("auto_online_blocks", "online_movable\n")
        .unwrap();
    refused(&mut machine, Error::Invalid, |m| {
        m.write("auto_online_blocks", "movable")
    });
    refused(&mut machine, Error::Invalid, |m| {
        m.write("auto_online_blocks", "online_movable ")
    });
    assert_eq!(
        machine.read("auto_online_blocks").unwrap(),
        "online_movable"
    );
    assert_eq!(machine.write("auto_online_blocks", ""), Ok(()));
    assert_eq!(machine.write("parameters/online_policy", ""), Ok(()));
    refused(&mut machine, Error::AccessDenied, |m| {
        m.write("parameters/memmap_on_memory", "")
    });
    assert_eq!(machine.block_state(32), Some(BlockState::Offline));
    machine.add_memory(&AddMemory::new(5 * GIB, BLOCK)).unwrap();
    assert_eq!(machine.valid_zones(40).unwrap(), "Movable");
    // The word belongs into `state`: `online` takes a truth value, so only the first two letters count there.
    machine.write("memory32/online", "online_movable").unwrap();
    assert_eq!(machine.valid_zones(32).unwrap(), "Normal");
}

#[test]
fn s2_14_self_hosted_metadata_leaves_252_of_256_mib_in_both_zones() {
    let profile = with_blocks_of(Profile::X86_64, 256 * MIB);
    for kind in [ZoneKind::Normal, ZoneKind::Movable] {
        let online_type = match kind {
            ZoneKind::Movable => OnlineType::Movable,
            _ => OnlineType::Kernel,
        };
        let mut machine = booted(self_hosting(profile), &[(GIB, 2 * GIB, 0)]);
        let events = listen(&mut machine);
        let total = machine.total_pages();
        let kernel = kernel_free(&machine, 0);
        let before = machine.snapshot();
        let add = AddMemory {
            memmap_on_memory: true,
            ..AddMemory::new(4 * GIB, 512 * MIB)
        };
        machine.add_memory(&add).unwrap();
        assert_eq!(
            kernel_free(&machine, 0),
            kernel,
            "nothing is charged elsewhere"
        );
        machine.online(16, online_type).unwrap();
        let found = zone(&machine, 0, kind);
        assert_eq!(found.present_pages * PAGE, 256 * MIB);
        assert_eq!(found.managed_pages * PAGE, 252 * MIB);
        assert_eq!((machine.total_pages() - total) * PAGE, 252 * MIB);
        assert_eq!(
            (found.start_pfn, found.spanned_pages),
            (Some(4 * GIB / PAGE), 65_536)
        );
        machine.online(17, online_type).unwrap();
        assert_eq!(zone(&machine, 0, kind).managed_pages * PAGE, 504 * MIB);
        check(&machine);

        // All of what is left can be used and emptied again; metadata is nobody's page.
        let mut pages = Vec::new();
        while zone(&machine, 0, kind).free_pages > 0 {
            pages.push(machine.allocate(Mobility::Movable).unwrap());
        }
        let usable = |a: u64| a < 4 * GIB || a % (256 * MIB) >= 4 * MIB;
        assert!(
            pages
                .iter()
                .all(|page| usable(machine.address(*page).unwrap()))
        );
        assert_eq!(machine.hard_offline_page(4 * GIB), Err(Error::Busy));
        assert_eq!(machine.soft_offline_page(4 * GIB), Err(Error::Io));
        assert_eq!(machine.isolate(4 * GIB, 2 * MIB).unwrap_err(), Error::Busy);
        for page in pages {
            machine.free(page).unwrap();
        }
        machine.offline(16).unwrap();
        machine.offline(17).unwrap();
        // Nobody keeps it for himself while it is offline, to hand it out later.
        for size in [2 * MIB, 256 * MIB] {
            refused(&mut machine, Error::Busy, |m| m.fake_offline(4 * GIB, size));
        }
        refused(&mut machine, Error::Busy, |m| {
            m.fake_offline(4 * GIB + 252 * MIB, 6 * MIB)
        });
        machine.fake_offline(4 * GIB + 4 * MIB, 252 * MIB).unwrap();
        machine
            .remove_memory(Owner::PROBE, 4 * GIB, 512 * MIB)
            .unwrap();
        assert_eq!(machine.snapshot(), before);
        let told = events.lock().unwrap();
        assert!(
            told.iter()
                .all(|event| event.page_count * PAGE == 252 * MIB)
        );
        assert_eq!(
            told[0].start_pfn,
            (4 * GIB + 4 * MIB) / PAGE,
            "notifiers do not hear of the metadata"
        );
    }

    // Where part of a block is withheld, the hint does not count: metadata has to be there.
    let mut machine = booted(self_hosting(profile), &[(GIB, 2 * GIB, 0)]);
    machine
        .add_memory(&AddMemory {
            memmap_on_memory: true,
            withheld: 4 * GIB..4 * GIB + 2 * MIB,
            ..AddMemory::new(4 * GIB, 256 * MIB)
        })
        .unwrap();
    assert_eq!(machine.blocks().last().unwrap().memmap_pages, 0);

    // Who does not ask, or asks a kernel that does not do it, has all of the block and pays elsewhere.
    for (config, asks) in [(self_hosting(profile), false), (charging(profile), true)] {
        let mut machine = booted(config, &[(GIB, 2 * GIB, 0)]);
        let kernel = kernel_free(&machine, 0);
        machine
            .add_memory(&AddMemory {
                memmap_on_memory: asks,
                ..AddMemory::new(4 * GIB, 256 * MIB)
            })
            .unwrap();
        machine.online(16, OnlineType::Movable).unwrap();
        let movable = zone(&machine, 0, ZoneKind::Movable);
        assert_eq!(movable.managed_pages * PAGE, 256 * MIB);
        assert_eq!((kernel - kernel_free(&machine, 0)) * PAGE, 4 * MIB);
    }

    // The arithmetic of other sizes: metadata must fill whole page directory entries, and leave something.
    for (profile, mode, block, metadata) in [
        (Profile::X86_64, MemmapOnMemory::On, 128 * MIB, 2 * MIB),
        (Profile::X86_64, MemmapOnMemory::On, 512 * MIB, 8 * MIB),
        (Profile::X86_64, MemmapOnMemory::Force, 2 * GIB, 32 * MIB),
        (Profile::ARM64_4K, MemmapOnMemory::On, 128 * MIB, 2 * MIB),
        (Profile::ARM64_16K, MemmapOnMemory::Force, 128 * MIB, 0),
        (Profile::ARM64_64K, MemmapOnMemory::Force, 512 * MIB, 0),
    ] {
        let config = Config {
            memmap_on_memory: mode,
            ..charging(with_blocks_of(profile, block))
        };
        let page = profile.page_size();
        let mut machine = booted(config, &[(4 * GIB, 6 * GIB, 0)]);
        let total = machine.total_pages();
        machine
            .add_memory(&AddMemory {
                memmap_on_memory: true,
                ..AddMemory::new(8 * GIB, block)
            })
            .unwrap();
        let added = machine.blocks().last().unwrap();
        assert_eq!(added.memmap_pages * page, metadata);
        machine.online(added.id, OnlineType::Movable).unwrap();
        assert_eq!((machine.total_pages() - total) * page, block - metadata);
        check(&machine);
    }
}

#[test]
fn s2_15_capacity_is_stranded_where_memory_is_not_aligned_to_blocks() {
    // CXL windows are multiples of 256 MiB.
    let window = 4 * GIB + 256 * MIB..10 * GIB + 256 * MIB;
    for (block, lost) in [
        (128 * MIB, 0),
        (256 * MIB, 0),
        (512 * MIB, 512 * MIB),
        (GIB, GIB),
        (2 * GIB, 2 * GIB),
    ] {
        let profile = with_blocks_of(Profile::X86_64, block);
        let mut machine = booted(Config::new(profile), &[]);
        let ranges = [window.clone()];
        let device = KmemDevice {
            ranges: &ranges,
            nid: 0,
            ..DAX
        };
        let kmem = machine.add_kmem(&device).unwrap();
        assert_eq!(kmem.lost_bytes(), lost, "{block}");
        let blocks = machine.blocks().count() as u64;
        assert_eq!(blocks * block + kmem.lost_bytes(), 6 * GIB);
        let (first, last) = (
            machine.blocks().next().unwrap(),
            machine.blocks().last().unwrap(),
        );
        assert!(window.start <= first.id * block && (last.id + 1) * block <= window.end);
        check(&machine);
    }
    // Two windows of 1 GiB that are neighbours: each alone is worth nothing at 2 GiB a block.
    let ranges = [5 * GIB..6 * GIB, 6 * GIB..7 * GIB];
    let profile = with_blocks_of(Profile::X86_64, 2 * GIB);
    let mut machine = booted(Config::new(profile), &[]);
    let device = KmemDevice {
        ranges: &ranges,
        nid: 0,
        ..DAX
    };
    refused(&mut machine, Error::Invalid, |m| m.add_kmem(&device));
}

#[test]
fn s2_16_kexec_hands_on_system_ram_but_not_what_a_driver_manages() {
    let mut machine = with_special_purpose_memory("");
    machine.add_memory(&AddMemory::new(6 * GIB, BLOCK)).unwrap();
    let mut kmem = machine.add_kmem(&DAX).unwrap();
    for id in [48, 64, 65] {
        machine.online(id, OnlineType::Online).unwrap();
    }
    let plain = [4 * GIB..5 * GIB, 6 * GIB..6 * GIB + BLOCK];
    assert!(machine.resources().firmware_map().eq(plain.clone()));
    assert!(machine.resources().kexec_destinations().eq(plain.clone()));

    // The next kernel: what was added by hand is memory of boot now, and the device's is not there.
    let ram = machine.resources().reboot().unwrap();
    assert_eq!(ram, plain);
    let ram = ram.into_iter().map(|bytes| BootRange { bytes, nid: 0 });
    let boot = Boot {
        ram: ram.collect(),
        special_purpose: vec![BootRange {
            bytes: 8 * GIB..9 * GIB,
            nid: 1,
        }],
        ..Boot::default()
    };
    let mut next = Hotplug::boot(*machine.config(), &boot, SparseMemory::default()).unwrap();
    assert_eq!(next.block_state(48), Some(BlockState::Online));
    assert!(next.blocks().all(|block| block.early && block.id < 64));
    // Until the driver asks for it again.
    next.add_kmem(&DAX).unwrap();
    assert_eq!(next.blocks().filter(|block| !block.early).count(), 8);
    check(&next);

    // The map does not change with what the driver removes, but with what was added by hand.
    for id in [64, 65] {
        machine.offline(id).unwrap();
    }
    machine.remove_kmem(&mut kmem).unwrap();
    assert!(machine.resources().firmware_map().eq(plain.clone()));
    machine
        .offline_and_remove_memory(Owner::PROBE, 6 * GIB, BLOCK)
        .unwrap();
    assert!(
        machine
            .resources()
            .firmware_map()
            .eq(plain[..1].iter().cloned())
    );
    check(&machine);
}

#[test]
fn s2_17_broken_page_leaves_with_its_block_which_never_comes_back_online() {
    let mut machine = bare(Profile::X86_64);
    add_online(&mut machine, 4 * GIB, 2 * BLOCK, OnlineType::Movable);
    let page = machine.allocate(Mobility::Movable).unwrap();
    let soft = machine.allocate(Mobility::Movable).unwrap();
    write(&mut machine, page, 1);
    write(&mut machine, soft, 2);
    let (hard_at, soft_at) = (
        machine.address(page).unwrap(),
        machine.address(soft).unwrap(),
    );

    // One in use, one free, one with corrected errors: its contents move on.
    machine.hard_offline_page(hard_at).unwrap();
    machine.write("hard_offline_page", "0x100200000").unwrap();
    machine
        .write("soft_offline_page", &soft_at.to_string())
        .unwrap();
    assert_eq!(machine.hardware_corrupted_pages(), 3);
    assert_eq!(machine.pin(page), Err(Error::HwPoison));
    assert_eq!(read(&mut machine, soft), 2);
    assert_ne!(machine.address(soft), Ok(soft_at));
    refused(&mut machine, Error::HwPoison, |m| {
        m.hard_offline_page(hard_at)
    });
    let before = machine.snapshot();
    assert_eq!(machine.soft_offline_page(hard_at), Ok(()));
    assert_eq!(machine.snapshot(), before, "broken already");
    let movable = zone(&machine, 0, ZoneKind::Movable);
    assert_eq!(
        movable.managed_pages,
        2 * BLOCK / PAGE,
        "broken pages stay managed"
    );
    assert_eq!(movable.free_pages, 2 * BLOCK / PAGE - 4);
    check(&machine);

    // Taking the pages of its pageblock fails; those of others do not.
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB + 2 * MIB, 2 * MIB)
    });
    machine.fake_offline(4 * GIB + 4 * MIB, 2 * MIB).unwrap();
    machine.fake_online(4 * GIB + 4 * MIB, 2 * MIB).unwrap();

    // Offline works, online does not, in any way.
    machine.offline(32).unwrap();
    assert_eq!(machine.hardware_corrupted_pages(), 3);
    for (file, text) in [
        ("memory32/state", "online"),
        ("memory32/state", "online_movable"),
        ("memory32/state", "online_kernel"),
        ("memory32/online", "1"),
    ] {
        refused(&mut machine, Error::HwPoison, |m| m.write(file, text));
    }
    refused(&mut machine, Error::HwPoison, |m| {
        m.online(32, OnlineType::Kernel)
    });
    refused(&mut machine, Error::NoAddress, |m| {
        m.hard_offline_page(4 * GIB)
    });
    refused(&mut machine, Error::Io, |m| m.soft_offline_page(4 * GIB));
    refused(&mut machine, Error::NoAddress, |m| {
        m.soft_offline_page(64 * GIB)
    });
    // Nothing brings it online while another block keeps it from being removed.
    add_online(&mut machine, 5 * GIB, BLOCK, OnlineType::Kernel);
    machine.pin(soft).unwrap();
    assert_eq!(block_of(&machine, soft), 33);
    refused(&mut machine, Error::Busy, |m| {
        m.offline_and_remove_memory(Owner::PROBE, 4 * GIB, 2 * BLOCK)
    });
    machine.unpin(soft).unwrap();

    // It leaves with the memory, and new memory there is as good as any.
    machine.remove_memory(Owner::PROBE, 4 * GIB, BLOCK).unwrap();
    assert_eq!(machine.hardware_corrupted_pages(), 0);
    add_online(&mut machine, 4 * GIB, BLOCK, OnlineType::Movable);
    assert_eq!(
        zone(&machine, 0, ZoneKind::Movable).present_pages,
        2 * BLOCK / PAGE
    );
    check(&machine);
    machine.free(page).unwrap();
    check(&machine);
}

#[test]
fn s2_18_node_comes_and_goes_with_its_memory() {
    let mut config = Config::new(Profile::X86_64);
    config.possible_nodes = 3;
    let mut machine = booted(config, &[(4 * GIB, 4 * GIB + BLOCK, 0)]);
    let events = listen(&mut machine);
    let states = |m: &Machine, nid| {
        let node = node(m, nid);
        node.map_or([false; 3], |n| {
            [n.online, n.has_memory, n.has_normal_memory]
        })
    };
    // Whether the last change of state was one of the node.
    let node_changed = |action| {
        let event = events.lock().unwrap().pop().unwrap();
        assert_eq!(event.action, action);
        event.node_changes
    };
    refused(&mut machine, Error::Invalid, |m| {
        m.add_memory(&request(8 * GIB, BLOCK, 3))
    });
    assert_eq!(states(&machine, 1), [false, false, false]);

    // Added: the node is there. Online: it has memory; kernel memory only with a kernel zone.
    machine.add_memory(&request(8 * GIB, 2 * BLOCK, 1)).unwrap();
    assert_eq!(states(&machine, 1), [true, false, false]);
    machine.online(64, OnlineType::Movable).unwrap();
    assert!(node_changed(MemoryAction::Online));
    assert_eq!(states(&machine, 1), [true, true, false]);
    machine.online(65, OnlineType::Kernel).unwrap();
    assert!(!node_changed(MemoryAction::Online));
    assert_eq!(states(&machine, 1), [true, true, true]);
    check(&machine);

    machine.offline(65).unwrap();
    assert!(!node_changed(MemoryAction::Offline));
    assert_eq!(states(&machine, 1), [true, true, false]);
    // What is in use there moves to another node.
    let page = machine.allocate_on(1, Mobility::Movable).unwrap();
    write(&mut machine, page, 5);
    assert_eq!(block_of(&machine, page), 64);
    machine.offline(64).unwrap();
    assert!(node_changed(MemoryAction::Offline));
    assert!(node_changed(MemoryAction::GoingOffline), "announced");
    assert_eq!(
        (block_of(&machine, page), read(&mut machine, page)),
        (32, 5)
    );
    assert_eq!(states(&machine, 1), [true, false, false]);
    machine.remove_memory(Owner::PROBE, 8 * GIB, BLOCK).unwrap();
    assert_eq!(states(&machine, 1), [true, false, false], "a block is left");
    machine
        .remove_memory(Owner::PROBE, 8 * GIB + BLOCK, BLOCK)
        .unwrap();
    assert_eq!(states(&machine, 1), [false, false, false]);
    assert!(zone(&machine, 1, ZoneKind::Movable).start_pfn.is_none());
    check(&machine);

    // A failed add does not bring a node up.
    machine.inject(Fault {
        step: Step::MemoryBlock,
        skip: 1,
        error: Error::NoMemory,
    });
    refused(&mut machine, Error::NoMemory, |m| {
        m.add_memory(&request(8 * GIB, 2 * BLOCK, 2))
    });
    assert_eq!(states(&machine, 2), [false, false, false]);

    // A node with CPUs stays without memory; the node of boot memory goes with the last of it.
    let boot = Boot {
        ram: vec![
            BootRange {
                bytes: 4 * GIB..4 * GIB + BLOCK,
                nid: 0,
            },
            BootRange {
                bytes: 5 * GIB..5 * GIB + BLOCK,
                nid: 1,
            },
        ],
        cpu_nodes: vec![0, 2],
        ..Boot::default()
    };
    let mut machine = Hotplug::boot(config, &boot, SparseMemory::default()).unwrap();
    assert_eq!(states(&machine, 2), [true, false, false]);
    assert_eq!(states(&machine, 1), [true, true, true]);
    machine.adopt(Owner::ACPI, 5 * GIB, BLOCK).unwrap();
    machine
        .offline_and_remove_memory(Owner::ACPI, 5 * GIB, BLOCK)
        .unwrap();
    assert_eq!(states(&machine, 1), [false, false, false]);
    machine.add_memory(&request(8 * GIB, BLOCK, 2)).unwrap();
    machine.online(64, OnlineType::Online).unwrap();
    assert_eq!(states(&machine, 2), [true, true, true]);
    machine
        .offline_and_remove_memory(Owner::PROBE, 8 * GIB, BLOCK)
        .unwrap();
    assert_eq!(states(&machine, 2), [true, false, false]);
    check(&machine);
}

//! Boot memory, and who may remove what.
//!
//! Without a test: S1-13 (metadata of huge pages that is freed): the core has no huge pages whose tail metadata could be
//! shared; what metadata costs is in `Config::struct_page_size`.

use std::sync::{Arc, Mutex};

use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Boot, BootRange, Config, Error, Fault, Hotplug, MemoryAction,
    MemoryEvent, Mobility, Owner, PageHandle, Profile, SectionInfo, Step, ZoneInfo, ZoneKind,
};
use virtio_mem_driver::hotplug::{Obstacle, OnlineType};

use crate::support::{GIB, MIB, Machine, SparseMemory, add_online, bare, booted, read, write};

const BLOCK: u64 = 128 * MIB;
const PAGEBLOCK: u64 = 2 * MIB;
const PAGE: u64 = 4096;

fn check(machine: &Machine) {
    assert_eq!(machine.check_invariants(), Ok(()));
}

/// `operation` is refused with `error`, and nothing has changed.
#[track_caller]
fn refused<T: std::fmt::Debug>(
    machine: &mut Machine,
    error: Error,
    operation: impl FnOnce(&mut Machine) -> Result<T, Error>,
) {
    let before = machine.snapshot();
    assert_eq!(operation(machine).unwrap_err(), error);
    assert_eq!(machine.snapshot(), before);
    check(machine);
}

fn section(machine: &Machine, address: u64) -> Option<SectionInfo> {
    let number = address >> machine.profile().section_shift;
    machine.sections().find(|section| section.number == number)
}

fn zone(machine: &Machine, kind: ZoneKind) -> ZoneInfo {
    let mut zones = machine.zones();
    zones.find(|z| z.nid == 0 && z.kind == kind).unwrap()
}

/// What ACPI does for a memory module that is plugged in: it adds it, or takes over what was there at boot.
fn acpi_finds(machine: &mut Machine, start: u64, size: u64) -> Result<(), Error> {
    let added = machine.add_memory(&AddMemory {
        owner: Owner::ACPI,
        ..AddMemory::new(start, size)
    });
    match added {
        Err(Error::Exists) => machine.adopt(Owner::ACPI, start, size),
        other => other,
    }
}

/// The next kernel on the same machine: all it knows is the firmware's memory map.
fn reboot(machine: &Machine, movable_from: Option<u64>, reserved: &[(u64, u64)]) -> Machine {
    let ram = machine.resources().reboot().unwrap();
    let boot = Boot {
        ram: ram
            .into_iter()
            .map(|bytes| BootRange { bytes, nid: 0 })
            .collect(),
        movable_from: movable_from.iter().map(|start| (0, *start)).collect(),
        reserved: reserved.iter().map(|(start, end)| *start..*end).collect(),
        ..Boot::default()
    };
    Hotplug::boot(*machine.config(), &boot, SparseMemory::default()).unwrap()
}

/// The actions a notifier of this priority hears.
fn listen(machine: &mut Machine, priority: i32) -> Arc<Mutex<Vec<(MemoryAction, bool)>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    machine.register_notifier(
        priority,
        Box::new(move |event: &MemoryEvent| {
            log.lock().unwrap().push((event.action, event.early));
            Ok(())
        }),
    );
    events
}

#[test]
fn s1_01_only_the_owner_removes_memory_and_acpi_adopts_what_it_finds_after_a_reboot() {
    let memory = [
        (8 * GIB, Owner::PROBE, "System RAM"),
        (9 * GIB, Owner::ACPI, "System RAM"),
        (10 * GIB, Owner::driver(0), "System RAM (virtio_mem)"),
        (11 * GIB, Owner::driver(1), "System RAM (virtio_mem)"),
    ];
    let everybody = [
        Owner::BOOT,
        Owner::PROBE,
        Owner::ACPI,
        Owner::driver(0),
        Owner::driver(1),
    ];
    let mut machine = booted(Config::new(Profile::X86_64), &[(4 * GIB, 5 * GIB, 0)]);
    for (start, owner, resource_name) in memory {
        let request = AddMemory {
            owner,
            resource_name,
            ..AddMemory::new(start, 2 * BLOCK)
        };
        machine.add_memory(&request).unwrap();
        machine.online(start / BLOCK, OnlineType::Movable).unwrap();
    }
    for (start, owner, _) in memory {
        for foreign in everybody.into_iter().filter(|other| *other != owner) {
            // Online or offline, a part or all of it.
            for (start, size) in [(start, BLOCK), (start + BLOCK, BLOCK), (start, 2 * BLOCK)] {
                refused(&mut machine, Error::NotPermitted, |m| {
                    m.remove_memory(foreign, start, size)
                });
                refused(&mut machine, Error::NotPermitted, |m| {
                    m.offline_and_remove_memory(foreign, start, size)
                });
            }
            refused(&mut machine, Error::NotPermitted, |m| {
                m.adopt(foreign, start, BLOCK)
            });
        }
    }
    // Boot memory belongs to nobody who could remove it.
    for owner in everybody.into_iter().skip(1) {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(owner, 4 * GIB, BLOCK)
        });
    }

    // The next kernel cannot tell who added what; what drivers manage it does not see.
    let mut machine = reboot(&machine, None, &[]);
    let found: Vec<u64> = machine
        .blocks()
        .map(|b| b.id * BLOCK)
        .filter(|start| *start >= 5 * GIB)
        .collect();
    assert_eq!(found, [8 * GIB, 8 * GIB + BLOCK, 9 * GIB, 9 * GIB + BLOCK]);
    refused(&mut machine, Error::NotPermitted, |m| {
        m.offline_and_remove_memory(Owner::ACPI, 9 * GIB, 2 * BLOCK)
    });
    let exists = machine.add_memory(&AddMemory::new(9 * GIB, 2 * BLOCK));
    assert_eq!(exists, Err(Error::Exists));
    acpi_finds(&mut machine, 9 * GIB, 2 * BLOCK).unwrap();
    check(&machine);
    // It owns the module now, and not a byte more.
    for owner in [Owner::PROBE, Owner::driver(0), Owner::BOOT] {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(owner, 9 * GIB, BLOCK)
        });
        refused(&mut machine, Error::NotPermitted, |m| {
            m.adopt(owner, 9 * GIB, BLOCK)
        });
    }
    for foreign in [8 * GIB, 4 * GIB] {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(Owner::ACPI, foreign, BLOCK)
        });
    }
    machine
        .offline_and_remove_memory(Owner::ACPI, 9 * GIB, 2 * BLOCK)
        .unwrap();
    assert_eq!(machine.block_state(9 * GIB / BLOCK), None);
    // Plugged in again it is added, not adopted.
    acpi_finds(&mut machine, 9 * GIB, BLOCK).unwrap();
    assert_eq!(
        machine.block_state(9 * GIB / BLOCK),
        Some(BlockState::Offline)
    );
    machine.remove_memory(Owner::ACPI, 9 * GIB, BLOCK).unwrap();
    check(&machine);
}

#[test]
fn s1_03_memory_lent_as_contiguous_allocation_stays_present_and_removable() {
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(4 * GIB, 4 * GIB + 2 * BLOCK, 0)],
    );
    acpi_finds(&mut machine, 8 * GIB, 2 * BLOCK).unwrap();
    machine.online(64, OnlineType::Movable).unwrap();
    machine.online(65, OnlineType::Movable).unwrap();
    let pages: Vec<PageHandle> = (0..1000)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    for (tag, page) in (1..).zip(&pages) {
        write(&mut machine, *page, tag);
    }
    assert!(
        pages
            .iter()
            .all(|page| machine.address(*page).unwrap() / BLOCK == 64)
    );
    let before = machine.snapshot();
    let (blocks, resources) = (
        machine.blocks().collect::<Vec<_>>(),
        machine.resources().to_string(),
    );
    let (counts, total) = (machine.counts(), machine.total_pages());

    // In use, so it is allocated, which moves what is there; and it is not offline.
    machine.fake_offline(8 * GIB, BLOCK).unwrap();
    check(&machine);
    assert_eq!(machine.blocks().collect::<Vec<_>>(), blocks);
    assert_eq!(machine.resources().to_string(), resources);
    assert_eq!(machine.block_state(64), Some(BlockState::Online));
    assert!(machine.pfn_is_online(8 * GIB / PAGE) && machine.pfn_valid(8 * GIB / PAGE));
    assert_eq!(machine.counts().present, counts.present);
    assert_eq!(machine.total_pages(), total - BLOCK / PAGE);
    assert_eq!(machine.statistics().pages_migrated, 1000);
    for (tag, page) in (1..).zip(&pages) {
        assert_eq!(machine.address(*page).unwrap() / BLOCK, 65);
        assert_eq!(read(&mut machine, *page), tag);
    }
    // Nobody else gets it.
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(8 * GIB, PAGEBLOCK)
    });
    // Given back, all is as before, but for where the pages are.
    machine.fake_online(8 * GIB, BLOCK).unwrap();
    assert_eq!(machine.counts(), counts);
    for (tag, page) in (1..).zip(&pages) {
        assert_eq!(read(&mut machine, *page), tag);
    }
    assert_eq!(machine.snapshot(), before);

    // The module can be unplugged while it is lent: who does not want that has to object.
    machine.fake_offline(8 * GIB, BLOCK).unwrap();
    assert_eq!(machine.obstacle(64), Ok(None));
    machine
        .offline_and_remove_memory(Owner::ACPI, 8 * GIB, BLOCK)
        .unwrap();
    assert_eq!(machine.block_state(64), None);
    check(&machine);
    // Boot memory is lent the same way; what can never move is not.
    let fixed = machine.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(machine.address(fixed), Ok(4 * GIB));
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB, BLOCK)
    });
    assert_eq!(
        machine.obstacle(32),
        Ok(Some((4 * GIB, Obstacle::Unmovable)))
    );
    machine.fake_offline(4 * GIB + BLOCK, BLOCK).unwrap();
    assert!(section(&machine, 4 * GIB + BLOCK).unwrap().early);
    check(&machine);
}

#[test]
fn s1_04_arm64_vetoes_offlining_of_boot_memory_and_everybody_hears_the_cancellation() {
    use MemoryAction::{CancelOffline, GoingOffline, Offline};
    for profile in [
        Profile::ARM64_4K,
        Profile::ARM64_16K,
        Profile::ARM64_64K,
        Profile::X86_64,
    ] {
        let block = profile.memory_block_size();
        let mut machine = booted(Config::new(profile), &[(4 * GIB, 5 * GIB, 0)]);
        add_online(&mut machine, 5 * GIB, block, OnlineType::Movable);
        let page = machine.allocate_on(0, Mobility::Movable).unwrap();
        write(&mut machine, page, 7);
        let ahead = listen(&mut machine, 1);
        let behind = listen(&mut machine, -1);
        let heard = |log: &Mutex<Vec<_>>| std::mem::take(&mut *log.lock().unwrap());
        let boot_id = 4 * GIB / block;

        if profile.boot_memory_removable {
            machine.offline(boot_id).unwrap();
            assert_eq!(heard(&ahead), [(GoingOffline, true), (Offline, true)]);
            assert_eq!(heard(&behind), [(GoingOffline, true), (Offline, true)]);
        } else {
            refused(&mut machine, Error::NotPermitted, |m| m.offline(boot_id));
            assert_eq!(Error::NotPermitted.errno_name(), "EPERM");
            assert_eq!(heard(&ahead), [(GoingOffline, true), (CancelOffline, true)]);
            // Not asked any more, but told.
            assert_eq!(heard(&behind), [(CancelOffline, true)]);
            let file = format!("memory{boot_id}/state");
            refused(&mut machine, Error::NotPermitted, |m| {
                m.write(&file, "offline")
            });
            refused(&mut machine, Error::NotPermitted, |m| {
                m.isolate_block(boot_id)
            });
            assert_eq!(machine.isolations().count(), 0);
            assert_eq!(machine.read(&file).unwrap(), "online");
            // Not even its firmware may.
            machine.adopt(Owner::ACPI, 4 * GIB, block).unwrap();
            refused(&mut machine, Error::NotPermitted, |m| {
                m.offline_and_remove_memory(Owner::ACPI, 4 * GIB, block)
            });
            assert_eq!(heard(&ahead).len(), 6);
            assert_eq!(heard(&behind), [(CancelOffline, true); 3]);
        }
        assert_eq!(machine.statistics().pages_migrated, 0);
        // Memory that was added later is nobody's business.
        machine
            .offline_and_remove_memory(Owner::PROBE, 5 * GIB, block)
            .unwrap();
        assert_eq!(heard(&ahead), [(GoingOffline, false), (Offline, false)]);
        assert_eq!(heard(&behind), [(GoingOffline, false), (Offline, false)]);
        assert_eq!(machine.statistics().pages_migrated, 1);
        assert_eq!(read(&mut machine, page), 7);
        check(&machine);
    }
}

#[test]
fn s1_06_module_is_early_memory_after_a_reboot_and_goes_again_if_movable() {
    const DIMM: u64 = 8 * GIB;
    let mut first = booted(
        Config {
            movable_node: true,
            ..Config::new(Profile::X86_64)
        },
        &[(0, GIB, 0)],
    );
    acpi_finds(&mut first, DIMM, 2 * BLOCK).unwrap();
    for id in [64, 65] {
        first.online(id, OnlineType::Online).unwrap();
        assert_eq!(
            first.read(&format!("memory{id}/valid_zones")).unwrap(),
            "Movable"
        );
    }
    assert!(!section(&first, DIMM).unwrap().early);
    check(&first);

    // With movable_node, what firmware calls hotpluggable is Movable from boot on.
    let mut next = reboot(&first, Some(DIMM), &[]);
    let movable = zone(&next, ZoneKind::Movable);
    assert_eq!(movable.present_early_pages, 2 * BLOCK / PAGE);
    for address in [DIMM, DIMM + BLOCK] {
        assert!(section(&next, address).unwrap().early);
    }
    assert!(
        next.blocks()
            .filter(|b| b.id >= 64)
            .all(|b| b.early && b.zone == Some(ZoneKind::Movable))
    );
    let fixed = next.allocate(Mobility::Unmovable).unwrap();
    let moving = next.allocate(Mobility::Movable).unwrap();
    write(&mut next, moving, 5);
    assert!(next.address(fixed).unwrap() < GIB);
    assert_eq!(next.address(moving), Ok(DIMM));
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    next.offline_and_remove_memory(Owner::ACPI, DIMM, 2 * BLOCK)
        .unwrap();
    assert_eq!(read(&mut next, moving), 5);
    assert_eq!(zone(&next, ZoneKind::Movable).present_pages, 0);
    check(&next);
    // The kernel after that does not find it any more.
    assert_eq!(next.resources().reboot().unwrap(), [0..GIB]);

    // Without, it is kernel memory like any other: the first to be used for what never moves.
    let mut next = reboot(&first, None, &[]);
    assert!(
        next.blocks()
            .filter(|b| b.id >= 64)
            .all(|b| b.early && b.zone == Some(ZoneKind::Normal))
    );
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    let fixed = next.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(next.address(fixed), Ok(DIMM));
    for (start, size) in [(DIMM, BLOCK), (DIMM, 2 * BLOCK)] {
        refused(&mut next, Error::Busy, |m| {
            m.offline_and_remove_memory(Owner::ACPI, start, size)
        });
    }
    assert_eq!(next.obstacle(64), Ok(Some((DIMM, Obstacle::Unmovable))));
    // The half without such a page goes, and the rest once that page is free.
    next.offline_and_remove_memory(Owner::ACPI, DIMM + BLOCK, BLOCK)
        .unwrap();
    next.free(fixed).unwrap();
    next.offline_and_remove_memory(Owner::ACPI, DIMM, BLOCK)
        .unwrap();
    check(&next);

    // What the kernel put there while it booted never goes.
    let mut next = reboot(&first, None, &[(DIMM + 5 * PAGE, DIMM + 6 * PAGE)]);
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    refused(&mut next, Error::Busy, |m| {
        m.offline_and_remove_memory(Owner::ACPI, DIMM, BLOCK)
    });
    assert_eq!(
        next.obstacle(64),
        Ok(Some((DIMM + 5 * PAGE, Obstacle::Reserved)))
    );
}

/// There is no way to say so: only who removes memory and adds it again gets a section that is not early.
#[test]
fn s1_07_section_is_early_until_it_is_removed() {
    let mut machine = booted(Config::new(Profile::X86_64), &[(4 * GIB, 5 * GIB, 0)]);
    let early = |machine: &Machine| section(machine, 4 * GIB).map(|section| section.early);
    machine.adopt(Owner::ACPI, 4 * GIB, BLOCK).unwrap();
    assert_eq!(early(&machine), Some(true));
    machine.offline(32).unwrap();
    assert_eq!(early(&machine), Some(true));
    machine.online(32, OnlineType::Movable).unwrap();
    assert_eq!(early(&machine), Some(true));
    let movable = zone(&machine, ZoneKind::Movable);
    assert_eq!(movable.present_early_pages, movable.present_pages);
    machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
    machine
        .offline_and_remove_memory(Owner::ACPI, 4 * GIB, BLOCK)
        .unwrap();
    assert_eq!(early(&machine), None);

    acpi_finds(&mut machine, 4 * GIB, BLOCK).unwrap();
    assert_eq!(early(&machine), Some(false));
    machine.online(32, OnlineType::Movable).unwrap();
    assert_eq!(early(&machine), Some(false));
    assert_eq!(zone(&machine, ZoneKind::Movable).present_early_pages, 0);
    assert!(!machine.blocks().find(|block| block.id == 32).unwrap().early);
    check(&machine);
}

#[test]
fn s1_12_contiguous_allocation_tries_five_times_in_movable_and_once_in_kernel_zones() {
    let busy = Fault {
        step: Step::Migrate,
        skip: 0,
        error: Error::Busy,
    };
    for (online_type, passes) in [(OnlineType::Movable, 5), (OnlineType::Kernel, 1)] {
        for failures in 0..=6 {
            let mut machine = bare(Profile::X86_64);
            add_online(&mut machine, 4 * GIB, BLOCK, online_type);
            let page = machine.allocate(Mobility::Movable).unwrap();
            write(&mut machine, page, 9);
            for _ in 0..failures {
                machine.inject(busy);
            }
            if failures < passes {
                machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
                assert_eq!(machine.clear_faults(), 0);
                assert_eq!(machine.address(page), Ok(4 * GIB + PAGEBLOCK));
            } else {
                refused(&mut machine, Error::Busy, |m| {
                    m.fake_offline(4 * GIB, PAGEBLOCK)
                });
                assert_eq!(
                    machine.clear_faults(),
                    failures - passes,
                    "tried {passes} times"
                );
                assert_eq!(machine.address(page), Ok(4 * GIB));
                assert_eq!(machine.isolations().count(), 0);
                // The next attempt has as many.
                machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
            }
            assert_eq!(read(&mut machine, page), 9);
            check(&machine);
        }
        // A pin is such a failure; it is counted once each time.
        let mut machine = bare(Profile::X86_64);
        add_online(&mut machine, 4 * GIB, 2 * BLOCK, online_type);
        let pinned = machine.allocate(Mobility::Movable).unwrap();
        machine.pin(pinned).unwrap();
        refused(&mut machine, Error::Busy, |m| {
            m.fake_offline(4 * GIB, PAGEBLOCK)
        });
        assert_eq!(machine.statistics().pages_pinned, passes as u64);
        // Offlining tries five times, whatever the zone.
        refused(&mut machine, Error::Busy, |m| m.offline(32));
        assert_eq!(machine.statistics().pages_pinned, passes as u64 + 5);
        // Other ranges do not suffer.
        machine
            .fake_offline(4 * GIB + PAGEBLOCK, PAGEBLOCK)
            .unwrap();
        machine.unpin(pinned).unwrap();
        machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
        check(&machine);
    }
    // Memory for contiguous allocations is in a kernel zone, too; what never moves is not in it.
    let boot = Boot {
        ram: vec![BootRange {
            bytes: 4 * GIB..4 * GIB + BLOCK,
            nid: 0,
        }],
        cma: vec![4 * GIB..4 * GIB + 4 * PAGEBLOCK],
        ..Boot::default()
    };
    let mut machine =
        Hotplug::boot(Config::new(Profile::X86_64), &boot, SparseMemory::default()).unwrap();
    let fixed = machine.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(machine.address(fixed), Ok(4 * GIB + 4 * PAGEBLOCK));
    // Movable pages are there once there is no room elsewhere.
    let others: Vec<PageHandle> = (0..60 * 512 - 1)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    let movable = machine.allocate(Mobility::Movable).unwrap();
    assert_eq!(machine.address(movable), Ok(4 * GIB));
    refused(&mut machine, Error::NoMemory, |m| {
        m.fake_offline(4 * GIB, 4 * PAGEBLOCK)
    });
    machine.free(others[0]).unwrap();
    machine.inject(busy);
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB, 4 * PAGEBLOCK)
    });
    machine.fake_offline(4 * GIB, 4 * PAGEBLOCK).unwrap();
    assert!(machine.address(movable).unwrap() >= 4 * GIB + 4 * PAGEBLOCK);
    check(&machine);
}

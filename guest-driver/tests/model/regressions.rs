//! What random operations have found, as short as it gets.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::ops::Range;

use virtio_mem_driver::hotplug::{
    AddMemory, Boot, BootRange, Config, DeviceKind, DeviceRange, Error, Hotplug, MemmapOnMemory,
    Mobility, OnlineType, Profile, ZoneKind,
};

use crate::memory::{Machine, SparseMemory};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 128 * MIB;

fn booted(config: Config, ram: Range<u64>) -> Machine {
    let boot = Boot {
        ram: vec![BootRange { bytes: ram, nid: 0 }],
        ..Boot::default()
    };
    Hotplug::boot(config, &boot, SparseMemory::new(config.profile.page_size())).unwrap()
}

fn bare(config: Config) -> Machine {
    Hotplug::boot(
        config,
        &Boot::default(),
        SparseMemory::new(config.profile.page_size()),
    )
    .unwrap()
}

/// Memory blocks from 32 on, online in Normal.
fn online(config: Config, count: u64) -> Machine {
    let mut machine = bare(config);
    machine
        .add_memory(&AddMemory::new(32 * BLOCK, count * BLOCK))
        .unwrap();
    for id in 32..32 + count {
        machine.online(id, OnlineType::Kernel).unwrap();
    }
    machine
}

fn add_device(machine: &mut Machine, bytes: Range<u64>) {
    let range = DeviceRange {
        altmap: 0,
        bytes,
        nid: 0,
        kind: DeviceKind::DevDax,
    };
    machine.add_device_memory(range, "namespace").unwrap();
}

#[test]
fn wrong_name_is_refused_before_an_address_that_is_too_large() {
    let mut machine = bare(Config::new(Profile::X86_64));
    let request = AddMemory {
        resource_name: "RAM",
        ..AddMemory::new(1 << 60, BLOCK)
    };
    assert_eq!(machine.add_memory(&request), Err(Error::Invalid));
}

#[test]
fn metadata_in_a_memory_block_is_never_withheld_nor_given_to_the_allocator() {
    let mut config = Config::new(Profile::X86_64);
    config.memmap_on_memory = MemmapOnMemory::On;
    let mut machine = bare(config);
    let start = 32 * BLOCK;
    let request = AddMemory {
        memmap_on_memory: true,
        ..AddMemory::new(start, BLOCK)
    };
    machine.add_memory(&request).unwrap();
    machine.fake_offline(start + 2 * MIB, 2 * MIB).unwrap();
    assert_eq!(machine.fake_offline(start, 2 * MIB), Err(Error::Busy));
    assert_eq!(machine.fake_online(start, 2 * MIB), Err(Error::Invalid));
    machine.online(32, OnlineType::Kernel).unwrap();
    assert_eq!(machine.fake_online(start, 2 * MIB), Err(Error::Invalid));
    assert_eq!(machine.total_pages(), (BLOCK - 4 * MIB) >> 12);
    machine.fake_online(start + 2 * MIB, 2 * MIB).unwrap();
    assert_eq!(machine.total_pages(), (BLOCK - 2 * MIB) >> 12);
    machine.check_invariants().unwrap();
}

#[test]
fn range_in_which_a_page_broke_after_isolation_is_not_taken() {
    let mut machine = online(Config::new(Profile::X86_64), 2);
    let isolation = machine.isolate(32 * BLOCK, 2 * MIB).unwrap();
    machine.hard_offline_page(32 * BLOCK).unwrap();
    assert_eq!(machine.commit(isolation), Err(Error::Busy));
    assert_eq!(machine.total_pages(), (2 * BLOCK) >> 12);
    machine.check_invariants().unwrap();
}

#[test]
fn migration_that_gave_up_keeps_saying_so() {
    let mut machine = online(Config::new(Profile::X86_64), 2);
    let page = machine.allocate(Mobility::Movable).unwrap();
    machine.pin(page).unwrap();
    let isolation = machine.isolate(32 * BLOCK, 2 * MIB).unwrap();
    assert_eq!(machine.migrate(&isolation, 9), Err(Error::Busy));
    assert_eq!(machine.migrate(&isolation, 9), Err(Error::Busy));
    machine.cancel(isolation);
    machine.check_invariants().unwrap();
}

#[test]
fn giving_back_a_hole_of_boot_memory_is_refused() {
    let profile = Profile::X86_64.with_memory_block_size(2 << 30).unwrap();
    let mut machine = booted(Config::new(profile), 0..BLOCK);
    assert_eq!(machine.fake_online(4 * BLOCK, 2 * MIB), Err(Error::Invalid));
    add_device(&mut machine, 4 * BLOCK..4 * BLOCK + 2 * MIB);
    assert_eq!(machine.fake_online(4 * BLOCK, 2 * MIB), Err(Error::Invalid));
}

#[test]
fn device_memory_in_a_hole_of_a_boot_block_is_no_ram_of_the_block() {
    let profile = Profile::X86_64.with_memory_block_size(2 << 30).unwrap();
    let mut machine = booted(Config::new(profile), 0..BLOCK);
    add_device(&mut machine, 4 * BLOCK..4 * BLOCK + 2 * MIB);
    machine.check_invariants().unwrap();
}

#[test]
fn zone_does_not_shrink_onto_device_memory_in_the_pageblock_of_its_last_page() {
    // Pageblocks of 32 MiB, so that RAM and device memory share one.
    let ram = 4096 * MIB..4096 * MIB + 66 * MIB;
    let mut machine = booted(Config::new(Profile::ARM64_16K), ram.clone());
    add_device(&mut machine, ram.end + 2 * MIB..ram.end + 4 * MIB);
    machine
        .add_memory(&AddMemory::new(33 * BLOCK, BLOCK))
        .unwrap();
    machine.online(33, OnlineType::Kernel).unwrap();
    machine.offline(33).unwrap();
    let normal = machine
        .zones()
        .find(|zone| zone.kind == ZoneKind::Normal)
        .unwrap();
    assert_eq!(normal.spanned_pages, (66 * MIB) >> 14);
}

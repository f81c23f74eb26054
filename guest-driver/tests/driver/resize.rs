//! Growing and shrinking: which requests, in which order, and what becomes of pages in use.

use virtio_mem_driver::driver::{Policy, Progress, Stall};
use virtio_mem_driver::hotplug::{AddMemory, BlockState, Mobility, OnlineType};
use virtio_mem_wire::{Answer, RequestKind};

use crate::support::device::Device;
use crate::support::{GIB, MIB, Rig};

fn unreachable(rig: &Rig) -> u64 {
    rig.driver.unreachable().map_or(0, |rest| rest.bytes)
}

type Requests = Vec<(String, u64, u64)>;

fn plug(first: u64, count: u64) -> (String, u64, u64) {
    ("plug".to_owned(), first, count)
}

fn unplug(first: u64, count: u64) -> (String, u64, u64) {
    ("unplug".to_owned(), first, count)
}

/// One request for each memory block.
fn whole_blocks(
    request: fn(u64, u64) -> (String, u64, u64),
    ids: impl Iterator<Item = u64>,
) -> Requests {
    ids.map(|id| request(id * 64, 64)).collect()
}

/// One request for each block, from high to low.
fn one_by_one(blocks: std::ops::Range<u64>) -> Requests {
    blocks.rev().map(|block| unplug(block, 1)).collect()
}

#[test]
fn idle_memory_is_resized_in_linux_order() {
    let mut rig = Rig::linux(4 * GIB);
    let mut resize = |size| {
        rig.resize(size);
        rig.device.state().take_requests()
    };
    assert_eq!(resize(GIB), whole_blocks(plug, 0..8));
    // 447 blocks go: six whole memory blocks, and 63 blocks of the next.
    assert_eq!(
        resize(130 * MIB),
        [whole_blocks(unplug, (2..8).rev()), one_by_one(65..128)].concat()
    );
    // The partly plugged memory block is completed before new ones are added.
    assert_eq!(
        resize(2 * GIB),
        [vec![plug(65, 63)], whole_blocks(plug, 2..16)].concat()
    );
    assert_eq!(
        resize(6 * MIB),
        [whole_blocks(unplug, (1..16).rev()), one_by_one(3..64)].concat()
    );
    assert_eq!(resize(0), one_by_one(0..3));
    assert_eq!(rig.hotplug.blocks().count(), 0);
    assert_eq!(rig.hotplug.counts(), Default::default());
    let counters = rig.driver.counters();
    assert_eq!(counters.requests(RequestKind::Plug), 8 + 15);
    assert_eq!(counters.answers(RequestKind::Plug, Answer::Ack), 8 + 15);
}

#[test]
fn pages_in_use_are_moved_with_their_contents() {
    let mut rig = Rig::new(GIB);
    rig.resize(512 * MIB);
    let mut handles = rig.allocate(96 * 1024, Mobility::Movable);
    // What stays is scattered over all memory blocks.
    let mut index = 0;
    let (kept, freed): (Vec<_>, Vec<_>) = handles.drain(..).partition(|_| {
        index += 1;
        index % 64 == 0
    });
    for handle in freed {
        rig.hotplug.free(handle).unwrap();
    }
    for (tag, handle) in kept.iter().enumerate() {
        crate::support::tagged::write(&mut rig.hotplug, *handle, tag as u64);
    }
    rig.resize(8 * MIB);
    rig.verify(&kept);
    assert!(rig.hotplug.statistics().pages_migrated > 1000);
    rig.resize(512 * MIB);
    rig.verify(&kept);
    // More than fits into what is left.
    rig.device.request(4 * MIB);
    for _ in 0..8 {
        let Progress::Stalled {
            reason: Stall::MemoryInUse,
            retry_at_ms: Some(at),
        } = rig.run()
        else {
            panic!("it is neither done nor hopeless");
        };
        rig.check();
        rig.now_ms = at;
    }
    assert_eq!(rig.driver.plugged_size(), 6 * MIB);
    rig.verify(&kept);
}

#[test]
fn pinned_page_keeps_its_sub_block_until_it_is_unpinned() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    let handles = rig.allocate(20_000, Mobility::Movable);
    let pinned = handles[19_999];
    rig.hotplug.pin(pinned).unwrap();
    let address = rig.hotplug.address(pinned).unwrap();
    for handle in &handles[..19_999] {
        rig.hotplug.free(*handle).unwrap();
    }
    rig.device.request(0);
    // There is nowhere to move the page to. That may pass, so the whole is tried again, less and less often,
    // before all but the page's sub-block goes.
    let mut waits = Vec::new();
    while rig.driver.plugged_size() > 2 * MIB {
        let Progress::Stalled {
            reason: Stall::MemoryInUse,
            retry_at_ms: Some(at),
        } = rig.run()
        else {
            panic!("it is neither done nor hopeless");
        };
        waits.push(at - rig.now_ms);
        // Nothing happens before its time.
        rig.now_ms = at - 1;
        assert!(matches!(rig.step(), Progress::Stalled { .. }));
        rig.now_ms = at;
    }
    assert_eq!(waits[..3], [10, 20, 40]);
    rig.check();
    assert_eq!(rig.driver.plugged_size(), 2 * MIB);
    assert_eq!(rig.hotplug.address(pinned), Ok(address));
    assert!(matches!(rig.run(), Progress::Stalled { .. }));
    rig.hotplug.unpin(pinned).unwrap();
    rig.hotplug.free(pinned).unwrap();
    rig.driver.retry();
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 0);
}

#[test]
fn unmovable_page_is_worked_around() {
    let policy = Policy {
        auto_online: Some(OnlineType::Kernel),
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(256 * MIB);
    let unmovable = rig.allocate(1, Mobility::Unmovable)[0];
    rig.resize(2 * MIB);
    rig.device.request(0);
    assert!(matches!(rig.run(), Progress::Stalled { .. }));
    rig.hotplug.free(unmovable).unwrap();
    rig.driver.retry();
    assert_eq!(rig.run(), Progress::Settled);
}

#[test]
fn target_that_changes_while_memory_is_emptied_is_followed() {
    let mut rig = Rig::linux(GIB);
    rig.resize(256 * MIB);
    let handles = rig.allocate(1000, Mobility::Movable);
    rig.device.request(128 * MIB);
    // The upper memory block is isolated by now.
    rig.step();
    rig.step();
    rig.device.state().take_requests();
    rig.resize(512 * MIB);
    rig.verify(&handles);
    // What was about to go has stayed.
    assert_eq!(rig.device.state().take_requests(), whole_blocks(plug, 2..4));
}

#[test]
fn memory_block_somebody_else_takes_offline_is_left_alone() {
    let mut rig = Rig::new(256 * MIB);
    rig.resize(64 * MIB);
    let isolation = rig.hotplug.isolate_block(32).unwrap();
    // Not into the block that goes offline.
    rig.resize(100 * MIB);
    rig.device.request(0);
    assert!(matches!(rig.run(), Progress::Stalled { .. }));
    assert_eq!(rig.driver.plugged_size(), 64 * MIB);
    rig.hotplug.cancel(isolation);
    rig.driver.retry();
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.hotplug.blocks().count(), 0);
}

#[test]
fn capacity_that_no_whole_memory_block_reaches_is_reported() {
    let device = Device::new(4 * GIB + 64 * MIB, 256 * MIB, MIB);
    let mut rig = Rig::on(device, Policy::default());
    // One whole memory block, 64 MiB from the start of the region.
    rig.device.request(256 * MIB);
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.device.state().take_requests(), [plug(64, 128)]);
    assert_eq!(unreachable(&rig), 128 * MIB);
    // Half a sub-block is not plugged, and does not stay plugged.
    rig.device.request(5 * MIB);
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 4 * MIB);
    assert_eq!(unreachable(&rig), MIB);
    rig.check();
}

#[test]
fn h_02_no_request_names_more_than_65535_blocks() {
    // 4 KiB blocks: a memory block has 32,768 of them, a sub-block 512.
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 4096), Policy::default());
    rig.resize(256 * MIB);
    assert_eq!(
        rig.device.state().take_requests(),
        [plug(0, 65024), plug(65024, 512)]
    );
    rig.resize(2 * MIB);
    rig.resize(0);
}

#[test]
fn memory_that_stays_offline_is_unplugged_without_being_emptied() {
    let policy = Policy::linux();
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(130 * MIB);
    rig.device.state().take_requests();
    assert_eq!(rig.hotplug.block_state(32), Some(BlockState::Offline));
    assert_eq!(rig.hotplug.counts().managed, 0);
    // Offline memory goes before online memory, in whole runs.
    rig.driver
        .online_block(&mut rig.hotplug, 33, OnlineType::Movable)
        .unwrap();
    assert_eq!(rig.hotplug.counts().managed, 512);
    rig.resize(10 * MIB);
    assert_eq!(rig.device.state().take_requests(), [unplug(4, 60)]);
    assert_eq!(rig.hotplug.block_state(32), Some(BlockState::Offline));
    rig.resize(0);
    assert_eq!(
        rig.device.state().take_requests(),
        [unplug(0, 4), unplug(64, 1)]
    );
    assert_eq!(rig.hotplug.blocks().count(), 0);
}

#[test]
fn foreign_memory_in_the_region_is_left_alone() {
    let mut rig = Rig::new(256 * MIB);
    rig.hotplug
        .add_memory(&AddMemory::new(4 * GIB, 128 * MIB))
        .unwrap();
    rig.device.request(256 * MIB);
    assert_eq!(
        rig.run(),
        Progress::Stalled {
            reason: Stall::NoSpace,
            retry_at_ms: Some(10)
        }
    );
    assert_eq!(rig.device.state().take_requests(), [plug(64, 64)]);
    rig.resize(0);
    assert_eq!(rig.hotplug.block_state(32), Some(BlockState::Offline));
}

#[test]
fn spurious_interrupts_and_polls_change_nothing() {
    let mut rig = Rig::new(GIB);
    rig.resize(130 * MIB);
    rig.device.state().take_requests();
    for _ in 0..10 {
        rig.device.state().change_config();
        rig.driver.on_interrupt();
        rig.driver.on_interrupt();
        assert_eq!(rig.run(), Progress::Settled);
    }
    assert_eq!(rig.device.state().take_requests(), []);
}

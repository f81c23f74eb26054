//! Linux's order in both modes: the sequences are those of recorded kernels.

use virtio_mem_driver::driver::{Mode, Policy, Progress, Stall, UnitState, UnreachableReason};
use virtio_mem_driver::hotplug::{Mobility, OnlineType, Profile};

use crate::support::device::{Device, Misbehave};
use crate::support::{GIB, LINUX, MIB, NO_METADATA, Rig};
use OnlineType::{Kernel, Movable};
use virtio_mem_wire::Answer;

type Requests = Vec<(String, u64, u64)>;

fn named(name: &str, blocks: &[(u64, u64)]) -> Requests {
    let request = |&(first, count)| (name.to_owned(), first, count);
    blocks.iter().map(request).collect()
}

fn plug(blocks: &[(u64, u64)]) -> Requests {
    named("plug", blocks)
}

fn unplug(blocks: &[(u64, u64)]) -> Requests {
    named("unplug", blocks)
}

/// Linux's defaults: nobody brings memory online.
fn offline(region_size: u64, block_size: u64) -> Rig {
    let device = Device::new(4 * GIB, region_size, block_size);
    Rig::on(device, Policy::linux())
}

fn waits_for(rig: &mut Rig, expected: Stall) -> Option<u64> {
    match rig.run() {
        Progress::Stalled {
            reason,
            retry_at_ms,
        } if reason == expected => retry_at_ms,
        other => panic!("{other:?}"),
    }
}

#[test]
fn partial_blocks_are_completed_kernel_first_then_movable_then_offline() {
    let mut rig = offline(4 * GIB, 2 * MIB);
    let eight: Vec<_> = (0..8).map(|id| (id * 64, 64)).collect();
    assert_eq!(rig.requests_for(GIB), plug(&eight));
    for (size, first, id, online_type) in [
        (1014, 507, 39, Some(Movable)),
        (1004, 443, 38, Some(Kernel)),
        (994, 379, 37, Some(Movable)),
        (984, 315, 36, Some(Kernel)),
        (974, 251, 0, None),
    ] {
        assert_eq!(rig.requests_for(size * MIB), unplug(&[(first, 5)]));
        if let Some(online_type) = online_type {
            assert_eq!(rig.requests_after_online(id, online_type), []);
        }
    }
    assert_eq!(
        rig.driver.unit_state(&rig.hotplug, 36),
        Some(UnitState::KernelPartial)
    );
    assert_eq!(
        rig.driver.unit_state(&rig.hotplug, 35),
        Some(UnitState::OfflinePartial)
    );
    assert_eq!(
        rig.driver.unit_state(&rig.hotplug, 40),
        Some(UnitState::Unused)
    );
    assert_eq!(rig.driver.unit_state(&rig.hotplug, 64), None);
    // Kernel, kernel, movable, movable, offline, new.
    let all = [(315, 5), (443, 5), (379, 5), (507, 5), (251, 5), (512, 1)];
    assert_eq!(rig.requests_for(1026 * MIB), plug(&all));
}

#[test]
fn threshold_stops_plugging_and_half_of_it_free_resumes_it() {
    let mut rig = offline(4 * GIB, 2 * MIB);
    let blocks = |ids: std::ops::Range<u64>| ids.map(|id| (id * 64, 64)).collect::<Vec<_>>();
    assert_eq!(rig.requests_for(2 * GIB), plug(&blocks(0..8)));
    assert_eq!(waits_for(&mut rig, Stall::OfflineThreshold), None);
    for (id, online_type) in [(32, Movable), (33, Kernel), (35, Movable)] {
        assert_eq!(rig.requests_after_online(id, online_type), []);
    }
    let resumed = rig.requests_after_online(36, Movable);
    assert_eq!(resumed, plug(&blocks(8..12)));
    assert_eq!(rig.requests_after_online(37, Kernel), []);
    assert_eq!(rig.requests_for(1600 * MIB), plug(&[(768, 32)]));
    // Offline partly plugged, then offline: from high to low, in runs.
    for (size, requests) in [
        (1598, vec![(799, 1)]),
        (1300, vec![(768, 31), (704, 64), (650, 54)]),
        (1028, vec![(640, 10), (576, 64), (514, 62)]),
        (902, vec![(512, 2), (451, 61)]),
        (900, vec![(450, 1)]),
        (640, vec![(448, 2), (384, 64), (128, 64)]),
    ] {
        assert_eq!(rig.requests_for(size * MIB), unplug(&requests), "{size}");
    }
}

#[test]
fn big_blocks_go_offline_ones_first_then_those_without_kernel_memory() {
    let mut rig = offline(4 * GIB, 256 * MIB);
    assert_eq!(rig.driver.mode(), Mode::BigBlock);
    assert_eq!(
        rig.requests_for(1536 * MIB),
        plug(&[(0, 1), (1, 1), (2, 1), (3, 1)])
    );
    assert_eq!(waits_for(&mut rig, Stall::OfflineThreshold), None);
    for (id, online_type) in [(32, Movable), (33, Kernel), (37, Movable)] {
        assert_eq!(rig.requests_after_online(id, online_type), []);
    }
    let resumed = rig.requests_after_online(36, Movable);
    assert_eq!(resumed, plug(&[(4, 1), (5, 1)]));
    assert_eq!(rig.requests_after_online(34, Movable), []);
    let pages = rig.allocate(1, Mobility::Unmovable);
    assert_eq!(rig.requests_for(GIB), unplug(&[(5, 1), (4, 1)]));
    assert_eq!(rig.requests_for(512 * MIB), unplug(&[(3, 1), (2, 1)]));
    assert_eq!(rig.requests_for(256 * MIB), unplug(&[(1, 1)]));
    // One kernel page keeps all of it: it is restored completely.
    assert_eq!(rig.requests_for(0), []);
    assert_eq!(waits_for(&mut rig, Stall::MemoryInUse), Some(50_000));
    assert_eq!(rig.hotplug.counts().managed, 256 * MIB / 4096);
    rig.verify(&pages);
}

#[test]
fn big_blocks_are_emptied_removed_and_unplugged() {
    let policy = Policy {
        force_bbm: true,
        bbm_block_size: 512 * MIB,
        ..LINUX
    };
    let mut rig = Rig::on(Device::new(4 * GIB, 4 * GIB, 2 * MIB), policy);
    assert_eq!(rig.driver.unit_size(), 512 * MIB);
    assert_eq!(rig.requests_for(GIB), plug(&[(0, 256), (256, 256)]));
    let pages = rig.allocate(1000, Mobility::Movable);
    // Less than a big block stays as it is, both ways.
    assert_eq!(rig.requests_for(768 * MIB), []);
    let rest = rig.driver.unreachable().unwrap();
    assert_eq!(
        (rest.bytes, rest.reason.to_string()),
        (
            256 * MIB,
            "less than the 0x20000000 bytes that can be plugged or unplugged".to_owned()
        )
    );
    assert_eq!(rig.requests_for(1280 * MIB), []);
    assert_eq!(rig.requests_for(512 * MIB), unplug(&[(256, 256)]));
    assert_eq!(rig.hotplug.blocks().count(), 4);
    rig.verify(&pages);
}

#[test]
fn memory_about_to_be_taken_out_of_use_is_named() {
    let mut rig = Rig::on(Device::new(4 * GIB, 4 * GIB, 2 * MIB), LINUX);
    rig.requests_for(256 * MIB);
    assert_eq!(rig.driver.emptying(), None);
    rig.device.request(126 * MIB);
    let mut named = Vec::new();
    for _ in 0..1000 {
        rig.step();
        named.extend(rig.driver.emptying());
    }
    named.dedup();
    // A memory block at once, then the granule that is left.
    let end = 4 * GIB + 256 * MIB;
    assert_eq!(
        named,
        [end - 128 * MIB..end, end - 130 * MIB..end - 128 * MIB]
    );
    assert_eq!(rig.driver.emptying(), None);
}

#[test]
fn refused_big_block_is_unplugged_later_without_being_added_again() {
    let device = Device::new(4 * GIB, 4 * GIB, 256 * MIB);
    let mut rig = Rig::on(device, LINUX);
    rig.requests_for(512 * MIB);
    rig.device
        .state()
        .misbehave
        .push_back(Misbehave::Answer(Answer::Busy));
    assert_eq!(
        rig.requests_for(256 * MIB),
        named("unplug busy", &[(1, 1)])
            .into_iter()
            .chain(
                // Removing it was a reason to look again at once.
                unplug(&[(1, 1)])
            )
            .collect::<Vec<_>>()
    );
    assert_eq!(rig.hotplug.blocks().count(), 2);
    rig.resize(512 * MIB);
}

#[test]
fn online_memory_stays_without_unplug_online_until_somebody_takes_it_offline() {
    let policy = Policy {
        unplug_online: false,
        ..LINUX
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(512 * MIB);
    rig.device.state().take_requests();
    assert_eq!(rig.requests_for(256 * MIB), []);
    let reason = rig.driver.unreachable().unwrap().reason;
    assert_eq!(reason, UnreachableReason::OnlineMemory);
    for (id, first) in [(35, 192), (33, 64)] {
        rig.hotplug.offline(id).unwrap();
        rig.run();
        assert_eq!(rig.device.state().take_requests(), unplug(&[(first, 64)]));
    }
    assert_eq!(rig.requests_for(100 * MIB), []);
    rig.driver.set_unplug_online(true);
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.device.state().take_requests(), []);
    let single: Vec<_> = (51..64).rev().map(|block| (block, 1)).collect();
    let expected = [vec![(128, 64)], single].concat();
    assert_eq!(rig.requests_for(102 * MIB), unplug(&expected));
}

#[test]
fn waits_are_50_seconds_and_double_as_they_pass_up_to_300() {
    let mut rig = Rig::linux(GIB);
    rig.resize(128 * MIB);
    let page = rig.allocate(1, Mobility::Movable)[0];
    rig.hotplug.pin(page).unwrap();
    rig.device.request(0);
    for wait in [50_000, 100_000, 200_000, 300_000, 300_000] {
        let at = waits_for(&mut rig, Stall::MemoryInUse).unwrap();
        assert_eq!(at - rig.now_ms, wait);
        assert_eq!(rig.driver.deadline_ms(), Some(at));
        rig.now_ms = at;
    }
    rig.hotplug.unpin(page).unwrap();
    rig.hotplug.free(page).unwrap();
    rig.now_ms += 300_000;
    assert_eq!(rig.run(), Progress::Settled);
}

#[test]
fn memory_that_cannot_be_added_is_unplugged_before_the_wait() {
    let mut rig = Rig::linux(GIB);
    rig.hotplug.inject(NO_METADATA);
    assert_eq!(
        rig.requests_for(128 * MIB),
        [plug(&[(0, 64)]), unplug(&[(0, 64)])].concat()
    );
    assert_eq!(waits_for(&mut rig, Stall::NoMemory), Some(50_000));
    rig.now_ms = 50_000;
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 128 * MIB);
}

#[test]
fn everything_works_in_every_profile_and_mode() {
    for (name, profile) in Profile::ALL {
        for force_bbm in [false, true] {
            for policy in [LINUX, Policy::default()] {
                let policy = Policy {
                    force_bbm,
                    ..policy
                };
                let device = Device::new(4 * GIB, 4 * GIB, 2 * MIB);
                let mut rig = Rig::with_profile(device, policy, profile);
                for size in [2 * GIB, GIB, 3 * GIB, 0] {
                    rig.resize(size);
                }
                assert_eq!(rig.hotplug.blocks().count(), 0, "{name}");
            }
        }
    }
}

/// Regression: it waited 50 s because memory could not be added that nobody wanted any more.
#[test]
fn new_target_does_not_wait_for_what_went_wrong_before() {
    let mut rig = Rig::linux(GIB);
    rig.resize(128 * MIB);
    rig.hotplug.inject(NO_METADATA);
    rig.device.state().hold = true;
    rig.device.request(256 * MIB);
    rig.run();
    rig.device.answer();
    // What could not be added is unplugged.
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    rig.device.request(0);
    rig.device.answer();
    rig.device.state().hold = false;
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 0);
}

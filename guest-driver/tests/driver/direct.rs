//! The fewest requests, against a model that only counts.

use proptest::prelude::*;
use virtio_mem_driver::driver::{Policy, Progress, Stall};
use virtio_mem_driver::hotplug::{Mobility, OnlineType, PageHandle};
use virtio_mem_wire::BlockRange;

use crate::support::device::Device;
use crate::support::{GIB, MIB, NO_METADATA, Rig};

const BLOCKS: usize = 256;

/// Sizes of the maximal runs of blocks that are `plugged`, or are not.
fn runs(map: &[bool], plugged: bool) -> Vec<usize> {
    let parts = map.split(|block| *block != plugged);
    parts.map(<[bool]>::len).filter(|len| *len > 0).collect()
}

/// The fewest requests for `want` blocks out of runs of these sizes.
fn fewest(mut sizes: Vec<usize>, want: usize) -> usize {
    sizes.sort_unstable();
    let mut rest = want;
    let mut count = 0;
    while rest > 0 {
        rest = rest.saturating_sub(sizes.pop().expect("enough blocks"));
        count += 1;
    }
    count
}

/// The fewest requests from `map` to `target` blocks.
fn model(map: &[bool], target: usize) -> usize {
    let plugged = map.iter().filter(|block| **block).count();
    match target {
        0 => usize::from(plugged > 0),
        _ if target > plugged => fewest(runs(map, false), target - plugged),
        _ => fewest(runs(map, true), plugged - target),
    }
}

/// The fewest requests from `map` to `target` blocks, found by trying all: each request plugs, or unplugs, some blocks
/// in a row, and UNPLUG ALL everything. Blocks that shall stay are not unplugged to be plugged again, as their contents
/// would be lost.
fn fewest_of_all(map: u16, blocks: u32, target: u32) -> usize {
    let grows = target > map.count_ones();
    let runs: Vec<u16> = (0..blocks)
        .flat_map(|first| (1..=blocks - first).map(move |count| ((1 << count) - 1) << first))
        .collect();
    let mut reached = vec![map];
    for requests in 0.. {
        if reached.iter().any(|map| map.count_ones() == target) {
            return requests;
        }
        let mut next = Vec::new();
        for map in reached {
            for run in &runs {
                let (fits, then) = match grows {
                    true => (map & run == 0, map | run),
                    false => (map & run == *run, map & !run),
                };
                let overshoots = match grows {
                    true => then.count_ones() > target,
                    false => then.count_ones() < target,
                };
                if fits && !overshoots {
                    next.push(then);
                }
            }
            if target == 0 {
                next.push(0);
            }
        }
        next.sort_unstable();
        next.dedup();
        reached = next;
    }
    unreachable!("blocks can be plugged one by one")
}

#[test]
fn model_counts_as_few_requests_as_there_can_be() {
    const BLOCKS: u32 = 8;
    for map in 0..1 << BLOCKS {
        let blocks: Vec<_> = (0..BLOCKS).map(|block| map >> block & 1 == 1).collect();
        for target in 0..=BLOCKS {
            assert_eq!(
                model(&blocks, target as usize),
                fewest_of_all(map, BLOCKS, target),
                "{map:#010b} to {target}"
            );
        }
    }
}

/// A driver that has taken over a device with these blocks plugged.
fn rig_with(map: &[bool]) -> Rig {
    let device = Device::new(4 * GIB, map.len() as u64 * 2 * MIB, 2 * MIB);
    {
        let mut state = device.state();
        for (first, _) in (0..).zip(map).filter(|(_, plugged)| **plugged) {
            state.plugged.insert(BlockRange { first, count: 1 });
        }
        let size = state.plugged.count() * 2 * MIB;
        state.config.mutable.plugged_size = size;
        state.config.mutable.requested_size = size;
    }
    let mut rig = Rig::on(device, Policy::default());
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    let requests = rig.device.state().take_requests();
    assert!(requests.iter().all(|request| request.0 == "state"));
    rig
}

/// Requests it takes to get to `target` blocks.
fn requests_to(rig: &mut Rig, target: usize) -> usize {
    rig.resize(target as u64 * 2 * MIB);
    rig.device.state().take_requests().len()
}

fn current(rig: &Rig) -> Vec<bool> {
    let map = rig.driver.plugged_map();
    (0..map.len()).map(|block| map.contains(block)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn requests_are_as_few_as_the_model_needs(
        map in prop::collection::vec(any::<bool>(), BLOCKS),
        targets in prop::collection::vec(0..=BLOCKS, 1..6),
    ) {
        let mut rig = rig_with(&map);
        for target in targets {
            let expected = model(&current(&rig), target);
            prop_assert_eq!(requests_to(&mut rig, target), expected);
        }
    }
}

#[test]
fn growing_and_shrinking_takes_one_request_each() {
    let mut rig = rig_with(&[false; BLOCKS]);
    for target in [256, 1, 200, 130, 131, 0, 77, 0] {
        assert_eq!(requests_to(&mut rig, target), 1, "{target}");
    }
    assert_eq!(rig.hotplug.blocks().count(), 0);
}

#[test]
fn checkerboard_takes_a_request_for_each_square() {
    let map: Vec<_> = (0..BLOCKS).map(|block| block % 2 == 0).collect();
    let mut rig = rig_with(&map);
    assert_eq!(requests_to(&mut rig, 256), 128);
    let mut rig = rig_with(&map);
    assert_eq!(requests_to(&mut rig, 100), 28);
    assert_eq!(requests_to(&mut rig, 0), 1);
    assert_eq!(rig.device.state().plugged.count(), 0);
}

#[test]
fn several_requests_are_in_flight() {
    let map: Vec<_> = (0..BLOCKS).map(|block| block % 2 == 0).collect();
    let mut rig = rig_with(&map);
    rig.device.state().hold = true;
    rig.device.request(512 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    assert!(rig.driver.awaits_device(0));
    assert_eq!(rig.driver.deadline_ms(), Some(30_000));
    assert_eq!(
        rig.driver
            .counters()
            .requests(virtio_mem_wire::RequestKind::Plug),
        8
    );
    for _ in 0..8 {
        rig.device.answer();
    }
    rig.device.state().hold = false;
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    assert_eq!(rig.driver.plugged_size(), 512 * MIB);
}

#[test]
fn small_queue_is_enough() {
    for queue_max in [2, 3, 4, 8, 15] {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        device.state().queue_max = queue_max;
        let mut rig = Rig::on(device, Policy::default());
        rig.resize(512 * MIB);
        rig.resize(2 * MIB);
    }
}

#[test]
fn what_is_in_use_is_passed_over_for_other_memory() {
    let policy = Policy {
        auto_online: Some(OnlineType::Kernel),
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(512 * MIB);
    // An unmovable page in the highest memory block: memory is allocated from the lowest address on.
    let filling = rig.allocate(96 * 1024 + 5000, Mobility::Movable);
    let page = rig.allocate(1, Mobility::Unmovable)[0];
    for handle in filling {
        rig.hotplug.free(handle).unwrap();
    }
    rig.device.state().take_requests();
    let address = rig.hotplug.address(page).unwrap();
    let block = (address - 4 * GIB) / (2 * MIB);
    assert!((192..255).contains(&block));
    let requests = rig.requests_for(256 * MIB);
    // Above the page, and below its memory block's lower part.
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert_eq!(rig.hotplug.address(page), Ok(address));
    assert_eq!(rig.driver.plugged_size(), 256 * MIB);
}

#[test]
fn target_that_rises_again_during_a_campaign_gets_its_memory_back_without_a_request() {
    let mut rig = Rig::new(GIB);
    rig.resize(512 * MIB);
    rig.device.state().take_requests();
    let pages = rig.allocate(2000, Mobility::Movable);
    rig.device.request(128 * MIB);
    for _ in 0..6 {
        rig.step();
    }
    assert!(rig.hotplug.counts().managed < 512 * MIB / 4096);
    assert_eq!(rig.requests_for(512 * MIB), []);
    assert_eq!(rig.hotplug.counts().managed, 512 * MIB / 4096);
    // Half of it.
    rig.device.request(128 * MIB);
    for _ in 0..6 {
        rig.step();
    }
    assert_eq!(
        rig.requests_for(448 * MIB),
        [("unplug".to_owned(), 224, 32)]
    );
    rig.verify(&pages);
}

#[test]
fn offline_memory_is_not_added_beyond_the_threshold_and_any_online_resumes() {
    let policy = Policy {
        auto_online: None,
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, 4 * GIB, 2 * MIB), policy);
    assert_eq!(rig.requests_for(2 * GIB), [("plug".to_owned(), 0, 512)]);
    assert!(matches!(
        rig.run(),
        Progress::Stalled {
            reason: Stall::OfflineThreshold,
            retry_at_ms: None
        }
    ));
    let after = rig.requests_after_online(32, OnlineType::Movable);
    assert_eq!(after, [("plug".to_owned(), 512, 64)]);
}

#[test]
fn memory_that_cannot_be_added_stays_plugged_and_is_added_later() {
    let mut rig = Rig::new(GIB);
    rig.hotplug.inject(NO_METADATA);
    rig.device.request(256 * MIB);
    let Progress::Stalled {
        reason: Stall::NoMemory,
        retry_at_ms: Some(at),
    } = rig.run()
    else {
        panic!("added all the same");
    };
    rig.now_ms = at;
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(
        rig.device.state().take_requests(),
        [("plug".to_owned(), 0, 128)]
    );
    assert_eq!(rig.hotplug.counts().managed, 256 * MIB / 4096);
}

#[test]
fn h_10_memory_that_cannot_be_removed_is_removed_later() {
    use virtio_mem_driver::hotplug::{Error, MemoryAction, MemoryEvent};
    for mut rig in [Rig::new(GIB), Rig::linux(GIB)] {
        rig.resize(256 * MIB);
        let veto = |event: &MemoryEvent| match event.action {
            MemoryAction::GoingOffline => Err(Error::NotPermitted),
            _ => Ok(()),
        };
        let id = rig.hotplug.register_notifier(10, Box::new(veto));
        rig.device.request(0);
        let Progress::Stalled {
            reason: Stall::NotRemoved,
            retry_at_ms: Some(at),
        } = rig.run()
        else {
            panic!("removed all the same");
        };
        rig.check();
        assert_eq!(rig.driver.plugged_size(), 0);
        assert_eq!(rig.hotplug.blocks().count(), 2);
        rig.hotplug.unregister_notifier(id);
        rig.now_ms = at;
        assert_eq!(rig.run(), Progress::Settled);
        assert_eq!(rig.hotplug.blocks().count(), 0);
    }
}

/// Regression: the rest after a search in vain was taken where there was merely no room for the moment.
#[test]
fn guest_without_room_is_asked_again_soon_however_long_it_took() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    let _pages = rig.allocate(28_000, Mobility::Movable);
    rig.device.request(64 * MIB);
    loop {
        rig.now_ms += 5;
        if let Progress::Stalled {
            retry_at_ms: Some(at),
            ..
        } = rig.step()
        {
            assert!(at - rig.now_ms <= 10, "{at} {}", rig.now_ms);
            break;
        }
    }
}

/// Regression: each interrupt made the driver begin anew.
#[test]
fn interrupts_without_a_change_do_not_hold_it_up() {
    let mut rig = Rig::new(GIB);
    rig.resize(512 * MIB);
    rig.allocate(20_000, Mobility::Movable);
    rig.device.request(256 * MIB);
    let mut polls = 0;
    while rig.driver.plugged_size() > 256 * MIB {
        if polls % 3 == 0 {
            rig.device.state().change_config();
        }
        rig.step();
        polls += 1;
        assert!(polls < 10_000);
    }
}

/// All of a kernel zone in use, one page in each granule.
fn full_of_kernel_pages(size: u64) -> (Rig, Vec<PageHandle>) {
    let policy = Policy {
        auto_online: Some(OnlineType::Kernel),
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(size);
    let mut kept = Vec::new();
    for (index, page) in rig
        .allocate(size / 4096, Mobility::Unmovable)
        .into_iter()
        .enumerate()
    {
        match index % 512 {
            0 => kept.push(page),
            _ => rig.hotplug.free(page).unwrap(),
        }
    }
    (rig, kept)
}

/// Looks until it has given up, each poll taking 5 ms, and returns how long it looked and rests.
fn look_in_vain(rig: &mut Rig) -> (u64, u64) {
    let begin = rig.now_ms;
    loop {
        if let Progress::Stalled {
            retry_at_ms: Some(at),
            ..
        } = rig.step()
        {
            return (rig.now_ms - begin, at - rig.now_ms);
        }
        rig.now_ms += 5;
    }
}

#[test]
fn driver_rests_nine_times_as_long_as_it_has_looked_in_vain() {
    let (mut rig, _kept) = full_of_kernel_pages(256 * MIB);
    rig.device.request(0);
    let (looked, rests) = look_in_vain(&mut rig);
    assert!(looked > 1000, "{looked}");
    assert!(
        (looked * 8..=looked * 9).contains(&rests),
        "{looked} {rests}"
    );
    rig.now_ms += rests;
    let (_, rests) = look_in_vain(&mut rig);
    // No longer than this, however large the guest.
    let (mut large, _kept) = full_of_kernel_pages(GIB);
    large.device.request(0);
    let (looked, longest) = look_in_vain(&mut large);
    assert!(
        rests < longest && looked * 9 > longest,
        "{rests} {longest} {looked}"
    );
    assert_eq!(longest, 30_000);
}

/// The time a device takes to answer was not spent looking.
#[test]
fn slow_device_does_not_make_the_driver_rest() {
    let (mut rig, mut kept) = full_of_kernel_pages(64 * MIB);
    rig.hotplug.free(kept.pop().unwrap()).unwrap();
    rig.device.request(0);
    rig.device.state().hold = true;
    while rig.run() != Progress::AwaitingDevice {}
    rig.now_ms += 20_000;
    rig.device.state().hold = false;
    rig.device.answer();
    let (looked, rests) = look_in_vain(&mut rig);
    assert!(rests <= looked * 9, "{looked} {rests}");
}

/// Memory that goes online while a campaign runs is not what was chosen any more.
#[test]
fn memory_that_goes_online_meanwhile_is_left_alone_where_only_offline_memory_goes() {
    let policy = Policy {
        auto_online: None,
        unplug_online: false,
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(512 * MIB);
    rig.device.request(0);
    while rig.hotplug.withheld(4 * GIB + 384 * MIB, 128 * MIB) != Ok(Some(true)) {
        rig.step();
    }
    for id in 32..35 {
        rig.driver
            .online_block(&mut rig.hotplug, id, OnlineType::Movable)
            .unwrap();
    }
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 384 * MIB);
    assert_eq!(rig.hotplug.counts().managed, 384 * MIB / 4096);
}

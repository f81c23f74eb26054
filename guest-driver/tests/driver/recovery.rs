//! What the driver recovers from: lost answers, resets, sizes that do not match, an earlier life.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{
    Event, Failure, Policy, ProbeError, Progress, ResyncReason, Stall,
};
use virtio_mem_driver::hotplug::{BlockState, Error, Migration, Mobility, OnlineType};
use virtio_mem_wire::{Answer, BlockRange, RequestKind};

use crate::support::device::{Device, FakeTransport, Misbehave};
use crate::support::{Driver, GIB, LINUX, MIB, Rig};

fn range(first: u64, count: u64) -> BlockRange {
    BlockRange { first, count }
}

/// Changes what is plugged behind the driver's back.
fn meddle(rig: &Rig, plug: &[BlockRange], unplug: &[BlockRange]) {
    let mut state = rig.device.state();
    plug.iter().for_each(|range| state.plugged.insert(*range));
    unplug.iter().for_each(|range| state.plugged.remove(*range));
    state.config.mutable.plugged_size = state.plugged.count() * state.config.geometry.block_size();
    state.change_config();
}

fn needs_reset(rig: &Rig) {
    rig.device.state().need_reset();
}

#[test]
fn h_07_size_that_does_not_match_is_resolved_by_asking_for_the_states() {
    let mut rig = Rig::new(GIB);
    rig.resize(128 * MIB);
    let pages = rig.allocate(1000, Mobility::Movable);
    // The upper half is gone, nobody used it; a run that nobody asked for has appeared.
    meddle(&rig, &[range(100, 8)], &[range(32, 32)]);
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    assert_eq!(rig.driver.plugged_size(), 128 * MIB);
    assert_eq!(rig.hotplug.counts().managed, 128 * MIB / 4096);
    assert!(rig.driver.counters().requests(RequestKind::State) > 0);
    rig.verify(&pages);
}

#[test]
fn memory_in_use_that_the_device_has_lost_is_a_failure() {
    let mut rig = Rig::new(GIB);
    rig.resize(128 * MIB);
    let _pages = rig.allocate(600, Mobility::Movable);
    meddle(&rig, &[], &[range(0, 64)]);
    // The free rest of it is withdrawn.
    let lost = Failure::MemoryLost {
        address: 4 * GIB,
        bytes: 4 * MIB,
    };
    assert_eq!(rig.run(), Progress::Failed(lost));
    assert_eq!(rig.hotplug.counts().managed, 1024);
}

#[test]
fn wrong_answer_is_forgiven_once() {
    for wrong in [
        Misbehave::Answer(Answer::Error),
        Misbehave::Raw(vec![9, 0, 0, 0, 0, 0, 0, 0], 8),
        Misbehave::Raw(vec![0; 10], 2),
        Misbehave::WrongBuffer,
    ] {
        let mut rig = Rig::new(GIB);
        rig.device.state().misbehave.push_back(wrong.clone());
        rig.resize(64 * MIB);
        // And again, after it was right for a while.
        rig.device.state().misbehave.push_back(wrong.clone());
        rig.resize(16 * MIB);
        for _ in 0..20 {
            rig.device.state().misbehave.push_back(wrong.clone());
        }
        rig.device.request(64 * MIB);
        assert!(matches!(rig.run(), Progress::Failed(_)), "{wrong:?}");
        rig.hotplug.check_invariants().unwrap();
    }
}

#[test]
fn v_09_reset_that_the_device_needs_is_done_and_what_was_in_flight_found_out() {
    for done in [false, true] {
        let mut rig = Rig::new(GIB);
        rig.resize(256 * MIB);
        let pages = rig.allocate(1000, Mobility::Movable);
        for size in [512 * MIB, 128 * MIB] {
            rig.device.state().hold = true;
            rig.device.request(size);
            while rig.run() != Progress::AwaitingDevice {}
            match (done, size == 512 * MIB) {
                (true, true) => meddle(&rig, &[range(128, 128)], &[]),
                (true, false) => meddle(&rig, &[], &[range(64, 192)]),
                (false, _) => {}
            }
            needs_reset(&rig);
            rig.device.state().hold = false;
            assert_eq!(rig.run(), Progress::Settled);
            rig.check();
            assert_eq!(rig.driver.plugged_size(), size);
            assert_eq!(rig.hotplug.counts().managed, size / 4096);
        }
        rig.verify(&pages);
    }
}

#[test]
fn h_03_answer_that_does_not_come_is_waited_for_30_seconds() {
    let mut rig = Rig::new(GIB);
    rig.device.state().hold = true;
    rig.device.request(64 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    let deadline = rig.driver.deadline_ms().unwrap();
    assert_eq!(deadline, 30_000);
    rig.now_ms = deadline - 1;
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    rig.now_ms = deadline;
    rig.device.state().hold = false;
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    assert_eq!(rig.driver.plugged_size(), 64 * MIB);

    let mut rig = Rig::linux(GIB);
    rig.device.state().hold = true;
    rig.device.request(64 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    rig.now_ms = 30_000;
    assert_eq!(rig.run(), Progress::Failed(Failure::AnswerTimeout));
}

#[test]
fn h_08_memory_of_an_earlier_driver_is_taken_over_with_everything_in_it() {
    for force_bbm in [false, true] {
        let policy = Policy {
            force_bbm,
            ..Policy::default()
        };
        let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
        rig.resize(640 * MIB);
        let pages = rig.allocate(5000, Mobility::Movable);
        rig.resize(384 * MIB);
        rig.device.state().take_requests();
        let mut rig = rig.probe_again(policy).unwrap();
        assert_eq!(rig.run(), Progress::Settled);
        rig.check();
        assert_eq!(rig.driver.plugged_size(), 384 * MIB);
        let requests = rig.device.state().take_requests();
        assert!(
            requests.iter().all(|request| request.0 == "state"),
            "{requests:?}"
        );
        rig.verify(&pages);
        rig.resize(128 * MIB);
        rig.resize(GIB);
        rig.verify(&pages);
    }
}

#[test]
fn earlier_driver_that_has_left_in_the_middle_of_a_campaign_leaves_nothing_behind() {
    let mut rig = Rig::new(GIB);
    rig.resize(512 * MIB);
    rig.device.request(128 * MIB);
    // One memory block is withheld, the next not isolated.
    rig.step();
    rig.step();
    while rig.hotplug.counts().managed == 512 * MIB / 4096 {
        rig.step();
    }
    let mut rig = rig.probe_again(Policy::default()).unwrap();
    rig.resize(512 * MIB);
    assert_eq!(rig.hotplug.counts().managed, 512 * MIB / 4096);
    rig.resize(0);
    assert_eq!(rig.hotplug.blocks().count(), 0);
}

#[test]
fn memory_plugged_in_another_life_is_used() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    {
        let mut state = device.state();
        state.plugged.insert(range(3, 9));
        state.plugged.insert(range(200, 100));
        state.config.mutable.plugged_size = 218 * MIB;
        state.config.mutable.requested_size = 218 * MIB;
    }
    let mut rig = Rig::on(device, Policy::default());
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    assert_eq!(rig.hotplug.counts().managed, 218 * MIB / 4096);
    assert_eq!(rig.hotplug.block_state(32), Some(BlockState::Online));
    rig.resize(0);
}

#[test]
fn scan_of_one_run_takes_few_requests_and_is_reported() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    rig.device.state().take_requests();
    let mut rig = rig.probe_again(Policy::default()).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    rig.driver.set_event_sink(Box::new(move |event| {
        let _sent = sender.send(event);
    }));
    rig.run();
    // The region, and its halves down to the edge.
    assert_eq!(rig.device.state().take_requests().len(), 5);
    let events: Vec<_> = receiver.try_iter().collect();
    use virtio_mem_driver::driver::Event;
    assert!(events.contains(&Event::Resynced {
        plugged_size: 256 * MIB
    }));
    assert!(!events.contains(&Event::Resync(ResyncReason::Answer)));
}

#[test]
fn state_that_is_not_acknowledged_is_not_believed() {
    for answer in [Answer::Error, Answer::Nack] {
        let mut rig = Rig::new(GIB);
        rig.resize(64 * MIB);
        rig.device
            .state()
            .misbehave
            .push_back(Misbehave::Answer(answer));
        meddle(&rig, &[], &[range(31, 1)]);
        assert!(matches!(
            rig.run(),
            Progress::Failed(Failure::Answer { request, .. }) if request.kind() == RequestKind::State
        ));
    }
}

/// H-10. Regression: it was forgotten.
#[test]
fn memory_block_somebody_takes_offline_while_it_is_unplugged_is_removed_later() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    rig.device.state().hold = true;
    rig.device.request(128 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    let isolation = rig.hotplug.isolate_block(33).unwrap();
    rig.device.answer();
    rig.device.state().hold = false;
    let stalled = rig.run();
    assert!(
        matches!(
            stalled,
            Progress::Stalled {
                reason: Stall::NotRemoved,
                ..
            }
        ),
        "{stalled:?}"
    );
    while rig.hotplug.migrate(&isolation, 64).unwrap() == Migration::More {}
    rig.hotplug.commit(isolation).unwrap();
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.hotplug.block_state(33), None);
}

/// G-06. Regression: memory the device had unplugged went to the page allocator.
#[test]
fn what_is_not_known_to_be_plugged_stays_out_of_use() {
    let mut rig = Rig::new(GIB);
    rig.resize(512 * MIB);
    let _pages = rig.allocate(600, Mobility::Movable);
    rig.device.request(128 * MIB);
    // Memory is taken, and no UNPLUG sent.
    while rig.hotplug.counts().managed > 256 * MIB / 4096 {
        rig.step();
    }
    {
        let mut state = rig.device.state();
        state.plugged.clear();
        state.config.mutable.plugged_size = 0;
        state.change_config();
    }
    let failed = rig.run();
    assert!(
        matches!(failed, Progress::Failed(Failure::MemoryLost { .. })),
        "{failed:?}"
    );
    let managed = rig.hotplug.counts().managed;
    let Rig {
        driver,
        mut hotplug,
        ..
    } = rig;
    driver.remove(&mut hotplug);
    assert_eq!(hotplug.counts().managed, managed);
}

/// Regression: each time the guest had nowhere to move pages to counted as a recovery.
#[test]
fn device_that_refuses_to_unplug_is_given_up_by_a_guest_without_room() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    let _pages = rig.allocate(28_000, Mobility::Movable);
    rig.device.request(64 * MIB);
    // The device says what is plugged, and refuses everything else.
    let scanning = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&scanning);
    rig.driver
        .set_event_sink(Box::new(move |event| match event {
            Event::Resync(_) => told.store(true, Ordering::Relaxed),
            Event::Resynced { .. } => told.store(false, Ordering::Relaxed),
            _ => {}
        }));
    for _ in 0..100_000 {
        rig.device.state().misbehave.clear();
        if !scanning.load(Ordering::Relaxed) {
            let error = Misbehave::Answer(Answer::Error);
            rig.device.state().misbehave.push_back(error);
        }
        match rig.step() {
            Progress::Stalled {
                retry_at_ms: Some(at),
                ..
            } => rig.now_ms = at,
            Progress::Failed(_) => return,
            _ => {}
        }
    }
    panic!("the driver recovers for ever");
}

/// Regression: the second driver withheld all memory of the first.
#[test]
fn region_with_a_driver_is_no_region_for_another() {
    for policy in [LINUX, Policy::default()] {
        let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
        rig.resize(256 * MIB);
        let other = Device::new(4 * GIB + 512 * MIB, GIB, 2 * MIB);
        let transport = FakeTransport(Arc::clone(&other));
        let second = Driver::probe(transport, &mut rig.hotplug, Policy::default());
        assert_eq!(second.err(), Some(ProbeError::Region(Error::Busy)));
        rig.resize(128 * MIB);
    }
}

/// Makes the device ask for a reset.
fn ask_for_a_reset(rig: &Rig) {
    let mut state = rig.device.state();
    state.status |= DeviceStatus::DEVICE_NEEDS_RESET;
    state.change_config();
}

/// Each time the driver has done what it can, what went wrong before is forgotten.
#[test]
fn resets_far_apart_do_not_add_up() {
    let policy = Policy {
        auto_online: Some(OnlineType::Kernel),
        ..Policy::default()
    };
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
    rig.resize(256 * MIB);
    let _page = rig.allocate(1, Mobility::Unmovable);
    rig.device.request(0);
    for _ in 0..10 {
        let stalled = rig.run();
        assert!(matches!(stalled, Progress::Stalled { .. }), "{stalled:?}");
        ask_for_a_reset(&rig);
    }
}

#[test]
fn v_09_device_that_asks_for_a_reset_again_and_again_is_given_up() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    // It never gets as far as to answer.
    rig.device.state().hold = true;
    for _ in 0..3 {
        ask_for_a_reset(&rig);
        assert_eq!(rig.run(), Progress::AwaitingDevice);
    }
    ask_for_a_reset(&rig);
    assert_eq!(rig.run(), Progress::Failed(Failure::NeedsReset));
}

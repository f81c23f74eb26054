//! Suspend, removal, crash dumps, events.

use std::sync::Arc;
use std::sync::mpsc::channel;

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{
    DumpView, Event, Policy, Progress, ResyncReason, Suspend, SuspendError, UnitState,
};
use virtio_mem_driver::hotplug::{Error, Mobility, OnlineType};
use virtio_mem_wire::{Answer, BlockRange, RequestKind};

use crate::support::device::{Device, FakeTransport, Misbehave};
use crate::support::dma::FakeHal;
use crate::support::{GIB, LINUX, MIB, Rig};

#[test]
fn g_16_what_an_earlier_driver_has_left_plugged_is_a_reason_to_stay_awake() {
    for policy in [LINUX, Policy::default()] {
        let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
        rig.resize(64 * MIB);
        let Rig { device, driver, .. } = rig;
        drop(driver);
        let mut rig = Rig::on(device, policy);
        let ram = rig.driver.suspend(&mut rig.hotplug, Suspend::Ram);
        let plugged_size = 64 * MIB;
        assert_eq!(ram, Err(SuspendError::MemoryPlugged { plugged_size }));
    }
}

#[test]
fn suspend_waits_for_what_is_in_flight_and_nothing_new_is_sent() {
    let mut rig = Rig::new(GIB);
    rig.device.state().hold = true;
    rig.device.request(64 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    let idle = |rig: &mut Rig| rig.driver.suspend(&mut rig.hotplug, Suspend::Idle);
    assert_eq!(idle(&mut rig), Err(SuspendError::Pending));
    rig.device.request(128 * MIB);
    assert_eq!(rig.run(), Progress::AwaitingDevice);
    rig.device.answer();
    assert_eq!(rig.run(), Progress::Suspended);
    assert_eq!(rig.hotplug.counts().managed, 64 * MIB / 4096);
    assert_eq!(idle(&mut rig), Ok(()));
    rig.device.state().hold = false;
    rig.driver.resume().unwrap();
    rig.resize(128 * MIB);
}

#[test]
fn removal_takes_everything_back_or_says_what_is_left() {
    for policy in [LINUX, Policy::default()] {
        let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), policy);
        let before = rig.hotplug.resources().iomem().count();
        assert_eq!(before, 1);
        rig.resize(192 * MIB);
        let Rig {
            device,
            driver,
            mut hotplug,
            ..
        } = rig;
        assert_eq!(driver.remove(&mut hotplug).added_size, 256 * MIB);
        assert!(device.state().status.is_empty());
        assert_eq!(hotplug.resources().iomem().count(), 2);
    }
    let mut rig = Rig::new(GIB);
    rig.resize(192 * MIB);
    rig.resize(0);
    assert_eq!(rig.driver.remove(&mut rig.hotplug).added_size, 0);
    assert_eq!(rig.hotplug.resources().iomem().count(), 0);
}

#[test]
fn linux_removal_takes_memory_blocks_that_are_offline_and_plugged_in_part() {
    let mut rig = Rig::on(Device::new(4 * GIB, GIB, 2 * MIB), Policy::linux());
    rig.resize(192 * MIB);
    let removed = rig.driver.remove(&mut rig.hotplug);
    assert_eq!(removed.added_size, 128 * MIB);
}

#[test]
fn dropped_driver_objects_to_nothing() {
    let mut rig = Rig::new(GIB);
    rig.resize(128 * MIB);
    drop(rig.driver);
    assert!(rig.device.state().status.is_empty());
    rig.hotplug.offline(32).unwrap();
    rig.hotplug.online(32, OnlineType::Kernel).unwrap();
}

#[test]
fn only_plugged_memory_is_dumped_and_nothing_is_changed() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    {
        let mut state = device.state();
        state.plugged.insert(BlockRange { first: 3, count: 2 });
        state.plugged.insert(BlockRange {
            first: 64,
            count: 100,
        });
        state.config.mutable.plugged_size = 204 * MIB;
        state.config.mutable.usable_region_size = 512 * MIB;
    }
    let transport = FakeTransport(Arc::clone(&device));
    let mut view = DumpView::<FakeHal, _>::probe(transport).unwrap();
    let at = |block: u64| 4 * GIB + block * 2 * MIB;
    let mut is_ram = |address| view.is_ram(address, || true);
    for (address, expected) in [
        (0, true),
        (5 * GIB, true),
        (at(2), false),
        (at(3), true),
        (at(3) + 4096, true),
        (at(5) - 1, true),
        (at(5), false),
        // Not usable: not even asked for.
        (at(300), false),
    ] {
        assert_eq!(is_ram(address), expected, "{address:#x}");
    }
    // The last answer is kept.
    assert_eq!(device.state().take_requests().len(), 4);
    let ram = view.ram(128 * MIB, || true);
    assert_eq!(ram, [at(3)..at(5), at(64)..at(164)]);
    let requests = device.state().take_requests();
    assert!(requests.iter().all(|request| request.0 == "state"));
    // G-21, and no answer at all.
    let wrong = Misbehave::Answer(virtio_mem_wire::Answer::Error);
    device.state().misbehave.push_back(wrong);
    assert!(!view.is_ram(at(70), || true));
    assert!(view.is_ram(at(71), || true));
    device.state().hold = true;
    let mut patience = 10;
    let keep_waiting = || {
        patience -= 1;
        patience > 0
    };
    assert!(!view.is_ram(at(70), keep_waiting));
    assert_eq!(device.state().plugged.count(), 102);
    drop(view);
    assert!(device.state().status.is_empty());
}

#[test]
fn empty_device_is_not_asked_about() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    let transport = FakeTransport(Arc::clone(&device));
    let mut view = DumpView::<FakeHal, _>::probe(transport).unwrap();
    assert!(!view.is_ram(4 * GIB, || true));
    assert_eq!(view.ram(GIB, || true), []);
    assert!(device.state().requests.is_empty());
    assert!(device.state().status.contains(DeviceStatus::DRIVER_OK));
}

#[test]
fn events_tell_what_happens() {
    let mut rig = Rig::linux(GIB);
    let (sender, receiver) = channel();
    rig.driver.set_event_sink(Box::new(move |event| {
        let _sent = sender.send(event);
    }));
    rig.resize(130 * MIB);
    let start = 4 * GIB;
    let unit = |id, state| Event::Unit { id, state };
    assert_eq!(
        receiver.try_iter().collect::<Vec<_>>(),
        [
            Event::Target {
                requested_size: 130 * MIB
            },
            Event::Plugged(start..start + 128 * MIB),
            unit(32, UnitState::Plugged),
            unit(32, UnitState::Movable),
            Event::Plugged(start + 128 * MIB..start + 130 * MIB),
            unit(33, UnitState::Plugged),
            unit(33, UnitState::MovablePartial),
            Event::Settled {
                plugged_size: 130 * MIB,
                unreachable: None
            },
        ]
    );
    let page = rig.allocate(1, Mobility::Movable)[0];
    rig.hotplug.pin(page).unwrap();
    rig.device.request(0);
    rig.run();
    let events: Vec<_> = receiver.try_iter().collect();
    assert!(events.contains(&Event::Unplugged(start + 128 * MIB..start + 130 * MIB)));
    assert!(events.contains(&unit(33, UnitState::Unused)));
    assert!(matches!(events.last(), Some(Event::Stalled { .. })));
}

#[test]
fn notifier_only_hears_of_its_own_region() {
    let mut rig = Rig::new(GIB);
    rig.resize(128 * MIB);
    assert_eq!(
        rig.driver
            .online_block(&mut rig.hotplug, 32, OnlineType::Movable),
        Err(Error::Invalid)
    );
    assert_eq!(
        rig.driver
            .online_block(&mut rig.hotplug, 99, OnlineType::Movable),
        Err(Error::Invalid)
    );
}

/// Regression: a suspend that was refused while another one was pending left the driver frozen.
#[test]
fn driver_goes_on_after_a_suspend_that_is_refused() {
    for kind in [Suspend::Ram, Suspend::Disk] {
        let mut rig = Rig::new(GIB);
        rig.device.state().hold = true;
        rig.device.request(64 * MIB);
        rig.run();
        let pending = rig.driver.suspend(&mut rig.hotplug, Suspend::Ram);
        assert_eq!(pending, Err(SuspendError::Pending));
        rig.device.answer();
        rig.device.state().hold = false;
        assert_eq!(rig.run(), Progress::Suspended);
        let refused = rig.driver.suspend(&mut rig.hotplug, kind);
        let expected = match kind {
            Suspend::Disk => SuspendError::NotPermitted,
            _ => SuspendError::MemoryPlugged {
                plugged_size: 64 * MIB,
            },
        };
        assert_eq!(refused, Err(expected));
        rig.resize(128 * MIB);
    }
}

/// Regression: the device was used although it had been told to reset itself.
#[test]
fn device_that_does_not_complete_the_reset_of_a_suspend_is_reset_again() {
    let mut rig = Rig::new(GIB);
    rig.resize(64 * MIB);
    rig.device.state().reset_reads = 100_001;
    let refused = rig.driver.suspend(&mut rig.hotplug, Suspend::Idle);
    assert_eq!(refused, Err(SuspendError::ResetTimeout));
    rig.device.state().reset_reads = 0;
    rig.resize(128 * MIB);
}

/// Regression: nobody could use, or unplug, what the driver before had been emptying.
#[test]
fn range_a_dropped_driver_was_emptying_is_of_use_again() {
    let mut rig = Rig::new(GIB);
    rig.resize(256 * MIB);
    let pages = rig.allocate(30_000, Mobility::Movable);
    rig.device.request(128 * MIB);
    while rig.hotplug.isolations().count() == 0 {
        rig.step();
    }
    rig.device.request(256 * MIB);
    let mut rig = rig.probe_again(Policy::default()).unwrap();
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.hotplug.isolations().count(), 0);
    rig.verify(&pages);
    rig.resize(128 * MIB);
}

/// Regression: a target that came with a reset was not announced, and the scan after it twice.
#[test]
fn targets_and_scans_are_announced_once_however_they_come() {
    let mut rig = Rig::new(GIB);
    let (sink, events) = std::sync::mpsc::channel();
    rig.driver
        .set_event_sink(Box::new(move |event| sink.send(event).unwrap()));
    let announced = |rig: &mut Rig| {
        assert_eq!(rig.run(), Progress::Settled);
        let mut told = Vec::new();
        for event in events.try_iter() {
            match event {
                Event::Target { requested_size } => told.push(requested_size / MIB),
                Event::Resync(ResyncReason::NeedsReset) => told.push(u64::MAX),
                _ => {}
            }
        }
        told
    };
    assert_eq!(announced(&mut rig), [0]);
    rig.driver.suspend(&mut rig.hotplug, Suspend::Idle).unwrap();
    rig.device.state().config.mutable.requested_size = 128 * MIB;
    rig.driver.resume().unwrap();
    assert_eq!(announced(&mut rig), [128]);
    rig.device.state().config.mutable.requested_size = 256 * MIB;
    rig.device.state().status |= DeviceStatus::DEVICE_NEEDS_RESET;
    rig.device.state().change_config();
    assert_eq!(announced(&mut rig), [u64::MAX, 256]);
}

/// Regression: fresh memory waited for a scan, the scan for the end of the suspend, and that for fresh memory.
#[test]
fn suspend_does_not_wait_for_memory_a_scan_has_to_look_for() {
    let mut rig = Rig::new(2 * GIB);
    rig.resize(512 * MIB);
    let mut pages = rig.allocate(100_000, Mobility::Movable);
    let middle = pages.swap_remove(70_000);
    rig.hotplug.pin(middle).unwrap();
    for page in pages {
        rig.hotplug.free(page).unwrap();
    }
    // Two runs, on both sides of the pinned page.
    rig.device.state().hold = true;
    rig.device.request(2 * MIB);
    while rig.driver.counters().requests(RequestKind::Unplug) < 2 {
        if let Progress::Stalled {
            retry_at_ms: Some(at),
            ..
        } = rig.step()
        {
            rig.now_ms = at;
        }
    }
    let answers = [Answer::Error, Answer::Busy].map(Misbehave::Answer);
    rig.device.state().misbehave.extend(answers);
    rig.device.state().hold = false;
    rig.device.answer();
    rig.device.answer();
    let mut polls = 0;
    while rig.driver.suspend(&mut rig.hotplug, Suspend::Idle) == Err(SuspendError::Pending) {
        rig.step();
        polls += 1;
        assert!(polls < 100);
    }
    assert_eq!(rig.step(), Progress::Suspended);
    rig.driver.resume().unwrap();
    rig.hotplug.unpin(middle).unwrap();
    rig.resize(2 * MIB);
}

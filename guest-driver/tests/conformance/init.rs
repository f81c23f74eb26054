//! Initialisation: G-04 and G-05, queue sizes, and devices that are others after a reset.

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{
    ConfigReadError, Failure, ProbeError, Progress, Stall, Strategy, Suspend,
};
use virtio_mem_driver::hotplug::Mobility;
use virtio_mem_wire::{Answer, BlockRange, Features, Field};

use crate::setup::{SETUPS, UNIT, run, works};
use crate::support::device::{Device, Event, Misbehave, State};
use crate::support::{GIB, MIB, Rig, probe};

/// V-02, V-03: whatever else is offered.
#[test]
fn g_04_unplugged_inaccessible_is_accepted_wherever_it_is_offered() {
    let version_1 = Features::VERSION_1;
    let known = version_1 | Features::UNPLUGGED_INACCESSIBLE | Features::PERSISTENT_SUSPEND;
    for setup in SETUPS {
        for (offered, accepted) in [
            (u64::MAX, known),
            (known.bits(), known),
            (version_1.bits(), version_1),
            (
                (version_1 | Features::UNPLUGGED_INACCESSIBLE).bits(),
                version_1 | Features::UNPLUGGED_INACCESSIBLE,
            ),
            ((version_1 | Features::ACPI_PXM).bits(), version_1),
        ] {
            let mut rig = setup.prepared(|device| device.state().offered = offered);
            assert_eq!(rig.driver.features(), accepted);
            let write = Event::WriteFeatures(accepted.bits());
            assert!(rig.device.state().events.contains(&write));
            works(&mut rig, &[]);
        }
    }
}

/// Two units of another life; `requested_size` as given.
fn leave_behind(device: &Device, requested_size: u64) {
    let mut state = device.state();
    state.plugged.insert(BlockRange {
        first: 64,
        count: 128,
    });
    state.config.mutable.plugged_size = 2 * UNIT;
    state.config.mutable.requested_size = requested_size;
}

#[test]
fn g_05_leftovers_are_unplugged_until_the_device_has_done_it() {
    for setup in SETUPS.into_iter().filter(|setup| setup.is_linux()) {
        for refusals in 0..6 {
            let mut rig = setup.prepared(|device| {
                leave_behind(device, UNIT);
                let busy = std::iter::repeat_n(Misbehave::Answer(Answer::Busy), refusals);
                device.state().misbehave.extend(busy);
            });
            let ended = run(&mut rig);
            ended.settled(&rig);
            assert_eq!(ended.stalls, vec![Stall::DeviceBusy; refusals]);
            let requests = rig.device.state().take_requests();
            let expected = [
                vec![("unplug_all busy".to_owned(), 0, 0); refusals],
                vec![("unplug_all".to_owned(), 0, 0), ("plug".to_owned(), 0, 64)],
            ];
            assert_eq!(requests, expected.concat());
        }
    }
}

/// What is taken over is in use.
#[test]
fn g_05_leftovers_that_can_be_used_are_not_unplugged_under_direct() {
    for setup in SETUPS.into_iter().filter(|setup| !setup.is_linux()) {
        let mut rig = setup.prepared(|device| leave_behind(device, 2 * UNIT));
        run(&mut rig).settled(&rig);
        let requests = rig.device.state().take_requests();
        assert!(
            requests.iter().all(|request| request.0 == "state"),
            "{requests:?}"
        );
        assert_eq!(rig.hotplug.counts().managed, 2 * UNIT / 4096);
        works(&mut rig, &[]);
        // And what is not wanted goes.
        let mut rig = setup.prepared(|device| leave_behind(device, 0));
        run(&mut rig).settled(&rig);
        assert_eq!(rig.driver.plugged_size(), 0);
    }
}

#[test]
fn g_05_nothing_is_asked_of_a_device_that_has_nothing_plugged() {
    for setup in SETUPS {
        let mut rig = setup.rig();
        run(&mut rig).settled(&rig);
        assert_eq!(rig.device.state().requests, []);
    }
}

#[test]
fn g_05_memory_that_is_still_in_use_is_not_unplugged() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(2 * UNIT);
        let pages = rig.allocate(100, Mobility::Movable);
        let device = std::sync::Arc::clone(&rig.device);
        match rig.probe_again(setup.policy()) {
            Err(error) => {
                assert!(setup.is_linux());
                assert_eq!(error, ProbeError::MemoryAdded { bytes: 2 * UNIT });
            }
            Ok(mut rig) => {
                assert!(!setup.is_linux());
                run(&mut rig).settled(&rig);
                rig.verify(&pages);
            }
        }
        let requests = device.state().take_requests();
        assert!(
            requests.iter().all(|request| request.0 == "state"),
            "{requests:?}"
        );
        assert_eq!(device.state().config.mutable.plugged_size, 2 * UNIT);
    }
}

/// M-03
#[test]
fn queue_of_any_size_that_holds_a_request_is_enough() {
    for max in [0, 1] {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        device.state().queue_max = max;
        assert!(matches!(probe(&device), Err(ProbeError::Queue(_))));
        let state = device.state();
        assert!(state.events.contains(&Event::Status(128 | 11)));
        assert_eq!(state.status, DeviceStatus::empty());
    }
    for setup in SETUPS {
        for max in [2, 3, 4, 7, 8, 15, 16, 17, 1024, 32768, 65536, u32::MAX] {
            let mut rig = setup.prepared(|device| device.state().queue_max = max);
            works(&mut rig, &[]);
            let events = rig.device.state().events.clone();
            let size = events.iter().find_map(|event| match event {
                Event::QueueSet(size) => Some(*size),
                _ => None,
            });
            let size = size.unwrap();
            assert!(size.is_power_of_two() && size <= max);
        }
    }
}

/// What is different, and what the driver says to it.
type Change = (fn(&mut State), fn(Failure) -> bool);

/// V-09, D-02: what comes back from a reset is looked at as at first.
#[test]
fn device_that_is_another_after_a_reset_is_given_up() {
    let changes: [Change; 8] = [
        (
            |s| s.offered &= !Features::VERSION_1.bits(),
            |f| f == Failure::Restart(ProbeError::NoVersion1),
        ),
        (
            |s| s.refuse_features = true,
            |f| matches!(f, Failure::Restart(ProbeError::FeaturesRefused(_))),
        ),
        (
            |s| s.queue_max = 1,
            |f| matches!(f, Failure::Restart(ProbeError::Queue(_))),
        ),
        (
            |s| s.forged = vec![(Field::BlockSize.offset(), 0)],
            |f| {
                matches!(
                    f,
                    Failure::Restart(ProbeError::Config(ConfigReadError::Invalid(_)))
                )
            },
        ),
        (
            |s| s.on_config_read = Some(Box::new(|state, _| state.generation += 1)),
            |f| f == Failure::Restart(ProbeError::Config(ConfigReadError::Unstable)),
        ),
        (
            |s| s.forged = vec![(Field::RegionSize.offset(), 2 * GIB)],
            |f| f == Failure::RegionChanged,
        ),
        (|s| s.reset_reads = u32::MAX, |f| f == Failure::NeedsReset),
        // All that it had plugged is gone, with a page in use.
        (
            |s| {
                s.plugged.clear();
                s.config.mutable.plugged_size = 0;
            },
            |f| matches!(f, Failure::MemoryLost { address, .. } if address == 4 * GIB),
        ),
    ];
    for setup in SETUPS {
        for (index, (change, expected)) in changes.into_iter().enumerate() {
            let mut rig = setup.with_plugged(UNIT);
            rig.allocate(1, Mobility::Movable);
            rig.device.state().need_reset();
            change(&mut rig.device.state());
            let ended = run(&mut rig);
            let Progress::Failed(failure) = ended.last else {
                panic!("{setup:?} {index}: {ended:?}");
            };
            match setup.strategy {
                Strategy::Linux => assert_eq!(failure, Failure::NeedsReset),
                Strategy::Direct => assert!(expected(failure), "{index}: {failure}"),
            }
        }
    }
}

/// What has failed can still be suspended, resumed and removed; memory in use stays what it is.
#[test]
fn driver_that_has_given_up_can_be_put_away() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(UNIT);
        let pages = rig.allocate(100, Mobility::Movable);
        rig.device.state().forged = vec![(Field::RegionSize.offset(), 2 * GIB)];
        rig.device.state().change_config();
        assert_eq!(run(&mut rig).failure(&mut rig), Failure::RegionChanged);
        let idle = rig.driver.suspend(&mut rig.hotplug, Suspend::Idle);
        assert_eq!(idle, Ok(()));
        assert_eq!(rig.driver.resume(), Err(Failure::RegionChanged));
        rig.verify(&pages);
        let Rig {
            device,
            driver,
            mut hotplug,
            ..
        } = rig;
        assert_eq!(driver.remove(&mut hotplug).added_size, UNIT);
        hotplug.check_invariants().unwrap();
        assert_eq!(device.state().status, DeviceStatus::empty());
        assert_eq!(device.state().config.mutable.plugged_size, UNIT);
    }
}

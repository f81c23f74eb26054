//! A resize is watched, waited for, overtaken and cancelled; sizes are events; BUSY ends.

mod rig;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rig::{BLOCK, GIB, Rig, driver_features};
use virtio_mem::wire::{Answer, Response};
use virtio_mem::{ResizeError, ResizeState, WaitError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

fn far() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn resize_converges_and_settles() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let resize = rig.handle.resize(4 * BLOCK).unwrap();
    let asked = resize.progress();
    assert_eq!(asked.state, ResizeState::Converging);
    assert_eq!((asked.requested_size, asked.plugged_size), (4 * BLOCK, 0));
    assert!(asked.driver_ready);
    rig.plug(0, 3);
    let progress = resize.progress();
    assert_eq!(progress.state, ResizeState::Converging);
    assert_eq!(progress.plugged_size, 3 * BLOCK);
    assert!(progress.last_change > asked.last_change);
    rig.plug(3, 1);
    assert_eq!(resize.wait(far()).unwrap().state, ResizeState::Settled);
    // It has been there; what comes after that is another story.
    rig.unplug(0, 1);
    assert_eq!(resize.progress().state, ResizeState::Settled);
}

#[test]
fn resize_to_what_is_plugged_is_settled_at_once() {
    let rig = Rig::with(4 * GIB, |b| b);
    let resize = rig.handle.resize(0).unwrap();
    assert_eq!(resize.progress().state, ResizeState::Settled);
    assert_eq!(
        rig.notifications.config(),
        1,
        "the driver is told all the same"
    );
}

#[test]
fn refusals_stall_a_resize_until_the_driver_gets_somewhere() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let resize = rig.handle.resize(4 * BLOCK).unwrap();
    rig.faults.open.script(&[false, false]);
    assert_eq!(rig.plug(0, 1), Response::Busy);
    let ResizeState::Stalled { last_answer, since } = resize.progress().state else {
        panic!("not stalled");
    };
    assert_eq!(last_answer, Answer::Busy);
    rig.plug(0, 1);
    assert_eq!(rig.plug(0, 5), Response::Nack);
    assert_eq!(
        resize.progress().state,
        ResizeState::Stalled {
            last_answer: Answer::Nack,
            since
        },
        "since the first of them"
    );
    rig.plug(0, 1);
    assert_eq!(resize.progress().state, ResizeState::Converging);
}

#[test]
fn waiter_is_woken_by_the_last_block_and_by_nothing_else() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let resize = rig.handle.resize(2 * BLOCK).unwrap();
    let late = resize.wait(Instant::now());
    assert!(matches!(late, Err(WaitError::Deadline(progress)) if progress.plugged_size == 0));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| resize.wait(far()));
        rig.plug(0, 1);
        rig.plug(1, 1);
        assert_eq!(waiter.join().unwrap().unwrap().plugged_size, 2 * BLOCK);
    });
}

#[test]
fn overtaken_resize_is_told_by_what() {
    let rig = Rig::with(4 * GIB, |b| b);
    let first = rig.handle.resize(2 * BLOCK).unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| first.wait(far()));
        let second = rig.handle.resize(BLOCK).unwrap();
        let end = waiter.join().unwrap();
        let superseded = ResizeState::Superseded { by: BLOCK };
        assert!(matches!(end, Err(WaitError::Superseded(p)) if p.state == superseded));
        assert_eq!(second.progress().state, ResizeState::Converging);
        assert!(!first.cancel(), "it has ended");
    });
    assert_eq!(rig.handle.status().requested_size, BLOCK);
}

#[test]
fn asking_for_the_same_size_again_joins_in_and_tells_the_driver_again() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let first = rig.handle.resize(BLOCK).unwrap();
    let second = rig.handle.resize(BLOCK).unwrap();
    assert_eq!(rig.notifications.config(), 2);
    rig.plug(0, 1);
    assert_eq!(first.progress().state, ResizeState::Settled);
    assert_eq!(second.progress().state, ResizeState::Settled);
    rig.unplug(0, 1);
    let third = rig.handle.resize(BLOCK).unwrap();
    assert_eq!(third.progress().state, ResizeState::Converging);
}

#[test]
fn cancelled_resize_leaves_what_is_plugged_requested() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let resize = rig.handle.resize(4 * BLOCK).unwrap();
    rig.plug(0, 3);
    let notified = rig.notifications.config();
    assert!(resize.cancel());
    assert!(!resize.cancel(), "once");
    let config = rig.config().mutable;
    assert_eq!(config.requested_size, 3 * BLOCK);
    assert!(config.usable_region_size >= config.requested_size);
    assert_eq!(rig.notifications.config(), notified + 1);
    assert!(matches!(resize.wait(far()), Err(WaitError::Cancelled(_))));
    assert_eq!(rig.plug(3, 1), Response::Nack, "one on its way");
}

#[test]
fn cancelled_shrink_stops_the_driver_where_it_is() {
    let mut rig = Rig::new();
    rig.plug(0, 100);
    let resize = rig.handle.resize(0).unwrap();
    rig.unplug(50, 50);
    assert!(resize.cancel());
    assert_eq!(rig.config().mutable.requested_size, 50 * BLOCK);
    assert_eq!(rig.handle.status().requested_size, 50 * BLOCK);
}

#[test]
fn resize_before_the_driver_is_there_is_kept_and_served() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    rig.device.reset();
    let resize = rig.handle.resize(2 * BLOCK).unwrap();
    assert!(!resize.progress().driver_ready);
    assert_eq!(rig.notifications.config(), 0, "nobody to tell");
    rig.activate(driver_features());
    assert!(resize.progress().driver_ready);
    assert_eq!(rig.config().mutable.requested_size, 2 * BLOCK);
    rig.plug(0, 2);
    assert_eq!(resize.wait(far()).unwrap().state, ResizeState::Settled);
}

#[test]
fn size_events_make_a_descriptor_readable_and_are_merged() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    let mut events = rig.handle.size_events().unwrap();
    let other = rig.handle.size_events().unwrap();
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, events.as_raw_fd(), interest)
        .unwrap();
    let readable = || {
        let mut ready = [EpollEvent::default()];
        epoll.wait(0, &mut ready).unwrap() == 1
    };
    assert!(!readable());
    assert_eq!(events.take(), None);
    rig.handle.resize(8 * BLOCK).unwrap();
    rig.plug(0, 1);
    rig.plug(1, 1);
    assert!(readable());
    let sizes = events.take().unwrap();
    assert_eq!(sizes, rig.config().mutable);
    assert_eq!(sizes.plugged_size, 2 * BLOCK);
    assert!(!readable());
    assert_eq!(events.take(), None);
    // Nothing changes, nothing is said.
    rig.plug(0, 1);
    rig.state(0, 1);
    rig.handle.resize(8 * BLOCK).unwrap();
    assert!(!readable());
    drop(other);
    rig.unplug(0, 1);
    assert_eq!(events.take().unwrap().plugged_size, BLOCK);
}

#[test]
fn busy_for_lack_of_mappings_ends_when_the_device_gives_some_back() {
    let mut rig = Rig::new();
    rig.faults.max_open_runs.store(2, Ordering::Relaxed);
    rig.plug(0, 1);
    rig.plug(2, 1);
    assert_eq!(rig.plug(4, 1), Response::Busy);
    assert_eq!(rig.notifications.config(), 0);
    // Two runs become one: no block is given back, but a mapping is.
    rig.plug(1, 1);
    assert_eq!(rig.notifications.config(), 1);
    assert_eq!(rig.plug(4, 1), Response::Ack);
    rig.unplug(4, 1);
    assert_eq!(rig.notifications.config(), 1, "nobody was told BUSY");
}

#[test]
fn busy_for_lack_of_memory_or_slots_ends_with_an_unplug() {
    for requests in 0..2 {
        let mut rig = Rig::new();
        rig.plug(0, 2);
        match requests {
            0 => rig.faults.open.script(&[false]),
            _ => rig.faults.map.script(&[false]),
        }
        assert_eq!(rig.plug(64, 1), Response::Busy);
        assert_eq!(rig.unplug(5, 1), Response::Error);
        assert_eq!(rig.notifications.config(), 0);
        assert_eq!(rig.unplug(0, 1), Response::Ack);
        assert_eq!(rig.notifications.config(), 1);
    }
}

#[test]
fn cause_that_ends_while_frozen_is_told_with_the_thaw() {
    let mut rig = Rig::new();
    rig.faults.open.script(&[false]);
    assert_eq!(rig.plug(0, 1), Response::Busy);
    rig.handle.freeze();
    rig.handle.retry();
    assert_eq!(rig.notifications.config(), 0, "it would be BUSY again");
    rig.handle.thaw();
    assert_eq!(rig.notifications.config(), 1);
}

#[test]
fn busy_of_a_driver_that_is_gone_is_not_told_to_the_next() {
    let mut rig = Rig::new();
    rig.handle.freeze();
    assert_eq!(rig.plug(0, 1), Response::Busy);
    rig.device.reset();
    rig.activate(driver_features());
    rig.handle.thaw();
    assert_eq!(rig.notifications.config(), 0);
}

#[test]
fn device_is_removed_only_when_nothing_is_plugged_or_asked_for() {
    use virtio_mem::RemoveRefusal::{BlocksPlugged, SizeRequested};

    let mut rig = Rig::with(4 * GIB, |b| b);
    rig.handle.resize(BLOCK).unwrap();
    let refused = rig.device.clone().try_remove().unwrap_err();
    let requested_size = BLOCK;
    assert_eq!(refused.reason, SizeRequested { requested_size });
    rig.plug(0, 1);
    rig.handle.resize(0).unwrap();
    let refused = refused.device.try_remove().unwrap_err();
    let plugged_size = BLOCK;
    assert_eq!(refused.reason, BlocksPlugged { plugged_size });
    assert_eq!(rig.unplug(0, 1), Response::Ack, "it goes on");
    refused.device.try_remove().unwrap();
    assert_eq!(rig.serve(), virtio_mem::Served::Stopped);
    assert_eq!(rig.handle.resize(BLOCK).unwrap_err(), ResizeError::Removed);
}

#[test]
fn total_is_split_over_the_devices_of_two_nodes() {
    let small = Rig::with(GIB, |b| b.node_id(0));
    let large = Rig::with(4 * GIB, |b| b.node_id(1));
    let handles = [small.handle.clone(), large.handle.clone()];
    let split = virtio_mem::split(4 * GIB, &handles);
    assert_eq!(split.rest, 0);
    let resizes = split.resize(&handles).unwrap();
    assert_eq!(resizes.len(), 2);
    assert_eq!(small.config().mutable.requested_size, GIB);
    assert_eq!(large.config().mutable.requested_size, 3 * GIB);
}

//! Refusals, and devices that break the rules.

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{Failure, Progress, Stall};
use virtio_mem_driver::hotplug::Mobility;
use virtio_mem_wire::Answer;

use crate::support::device::{Event, Misbehave};
use crate::support::{GIB, MIB, Rig};

fn misbehave(rig: &Rig, how: Misbehave) {
    rig.device.state().misbehave.push_back(how);
}

fn failure(rig: &mut Rig) -> Failure {
    let Progress::Failed(failure) = rig.run() else {
        panic!("the driver goes on");
    };
    assert!(rig.device.state().status.contains(DeviceStatus::FAILED));
    // And never again.
    assert_eq!(rig.step(), Progress::Failed(failure));
    rig.hotplug.check_invariants().unwrap();
    failure
}

#[test]
fn d_28_busy_plug_is_retried_after_a_while() {
    let mut rig = Rig::new(GIB);
    for _ in 0..3 {
        misbehave(&rig, Misbehave::Answer(Answer::Busy));
    }
    rig.device.request(4 * MIB);
    for delay in [10, 20, 40] {
        assert_eq!(
            rig.run(),
            Progress::Stalled {
                reason: Stall::DeviceBusy,
                retry_at_ms: Some(rig.now_ms + delay)
            }
        );
        rig.now_ms += delay;
    }
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    assert_eq!(rig.device.state().requests.len(), 4);
}

#[test]
fn config_interrupt_ends_the_wait_for_a_busy_device() {
    let mut rig = Rig::new(GIB);
    misbehave(&rig, Misbehave::Answer(Answer::Busy));
    rig.device.request(4 * MIB);
    assert!(matches!(rig.run(), Progress::Stalled { .. }));
    rig.device.state().change_config();
    assert_eq!(rig.run(), Progress::Settled);
}

#[test]
fn d_35_memory_goes_back_to_the_allocator_while_the_device_is_busy() {
    let mut rig = Rig::new(GIB);
    rig.resize(128 * MIB);
    let handles = rig.allocate(100, Mobility::Movable);
    for _ in 0..5 {
        misbehave(&rig, Misbehave::Answer(Answer::Busy));
    }
    rig.device.request(64 * MIB);
    for _ in 0..5 {
        let Progress::Stalled {
            reason: Stall::DeviceBusy,
            retry_at_ms: Some(at),
        } = rig.run()
        else {
            panic!("not stalled");
        };
        rig.check();
        assert_eq!(rig.hotplug.counts().managed, 128 * MIB / 4096);
        rig.now_ms = at;
    }
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    rig.verify(&handles);
}

#[test]
fn h_01_nack_is_not_repeated_before_the_configuration_changes() {
    let mut rig = Rig::new(GIB);
    misbehave(&rig, Misbehave::Answer(Answer::Nack));
    rig.device.request(4 * MIB);
    let refused_until = |at| Progress::Stalled {
        reason: Stall::Refused,
        retry_at_ms: Some(at),
    };
    assert_eq!(rig.run(), refused_until(10));
    assert_eq!(rig.run(), refused_until(10));
    assert_eq!(rig.driver.counters().total_requests(), 1);
    rig.device.state().change_config();
    assert_eq!(rig.run(), Progress::Settled);
}

#[test]
fn h_01_device_that_refuses_for_no_reason_is_asked_less_and_less_often() {
    let mut rig = Rig::new(GIB);
    for _ in 0..3 {
        misbehave(&rig, Misbehave::Answer(Answer::Nack));
    }
    rig.device.request(4 * MIB);
    let mut waits = Vec::new();
    while let Progress::Stalled {
        reason: Stall::Refused,
        retry_at_ms: Some(at),
    } = rig.run()
    {
        waits.push(at - rig.now_ms);
        rig.now_ms = at;
    }
    assert_eq!(waits, [10, 20, 40]);
    assert_eq!(rig.driver.plugged_size(), 4 * MIB);
}

/// Regression: lowered and raised again while a PLUG was under way, with both interrupts taken before its NACK,
/// the target looked as if it had never changed, and the driver waited for a change that did not come.
#[test]
fn target_that_is_lowered_and_raised_again_behind_a_plug_is_reached() {
    let mut rig = Rig::new(GIB);
    rig.device.state().hold = true;
    rig.device.request(256 * MIB);
    while rig.step() != Progress::AwaitingDevice {}
    rig.device.request(4 * MIB);
    rig.device.state().hold = false;
    rig.device.answer();
    rig.device.request(256 * MIB);
    while let Progress::Stalled { retry_at_ms, .. } = rig.run() {
        rig.now_ms = retry_at_ms.expect("a time to try again");
    }
    assert_eq!(rig.driver.plugged_size(), 256 * MIB);
}

#[test]
fn nack_because_the_target_was_lowered_is_followed_at_once() {
    let mut rig = Rig::new(GIB);
    rig.device.state().hold = true;
    rig.device.request(256 * MIB);
    while rig.step() != Progress::AwaitingDevice {}
    // Lowered behind the driver's back: the interrupt is late.
    rig.device.state().config.mutable.requested_size = 4 * MIB;
    rig.device.state().hold = false;
    rig.device.answer();
    assert_eq!(rig.run(), Progress::Settled);
    rig.check();
    let requests = rig.device.state().take_requests();
    assert_eq!(requests[0].0, "plug nack");
    assert_eq!(rig.driver.plugged_size(), 4 * MIB);
}

#[test]
fn refused_unplug_is_a_violation_and_its_memory_is_not_touched_again() {
    for answer in [Answer::Error, Answer::Nack] {
        let mut rig = Rig::linux(GIB);
        rig.resize(4 * MIB);
        misbehave(&rig, Misbehave::Answer(answer));
        rig.device.request(2 * MIB);
        assert!(matches!(failure(&mut rig), Failure::Answer { .. }));
        assert_eq!(rig.hotplug.counts().managed, 512);
    }
}

#[test]
fn v_09_device_that_needs_a_reset_is_not_waited_for() {
    let mut rig = Rig::linux(GIB);
    rig.device.state().hold = true;
    rig.device.request(2 * MIB);
    while rig.step() != Progress::AwaitingDevice {}
    assert!(rig.driver.awaits_device(rig.now_ms));
    {
        let mut state = rig.device.state();
        state.status |= DeviceStatus::DEVICE_NEEDS_RESET;
        state.change_config();
    }
    assert_eq!(failure(&mut rig), Failure::NeedsReset);
    assert!(!rig.driver.awaits_device(rig.now_ms));
}

#[test]
fn d_08_usable_region_that_shrinks_is_noticed() {
    let mut rig = Rig::new(GIB);
    rig.device.state().config.mutable.usable_region_size = 512 * MIB;
    rig.device.state().change_config();
    assert_eq!(
        failure(&mut rig),
        Failure::UsableShrunk {
            from: GIB,
            to: 512 * MIB
        }
    );
}

#[test]
fn h_07_plugged_size_that_does_not_match_is_noticed() {
    let mut rig = Rig::linux(GIB);
    rig.resize(4 * MIB);
    rig.device.state().config.mutable.plugged_size = 2 * MIB;
    rig.device.state().change_config();
    assert_eq!(
        failure(&mut rig),
        Failure::OutOfSync {
            device: 2 * MIB,
            driver: 4 * MIB
        }
    );
}

#[test]
fn driver_never_notifies_twice_for_one_request() {
    let mut rig = Rig::new(GIB);
    rig.device.state().hold = true;
    rig.device.request(2 * MIB);
    for _ in 0..100 {
        rig.step();
    }
    let events = rig.device.state().events.clone();
    assert_eq!(events.iter().filter(|e| **e == Event::Notify).count(), 1);
}

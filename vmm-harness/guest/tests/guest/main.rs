//! The guest program on threads of this process, with a device that follows the specification.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

mod host;
// The driver's own tests made these.
#[expect(dead_code, reason = "only the device and the memory are used here")]
#[path = "../../../../guest-driver/tests/driver/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_mem_driver::driver::{Policy, Strategy};
use virtio_mem_driver::hotplug::Profile;
use virtio_mem_wire::Answer;
use vmem_guest::abi::{DriverState, MAX_VCPUS, WorkerCounters, command, map};
use vmem_guest::{BootError, Guest, Parameters};

use host::{Host, PARAMETERS, TestPlatform};
use support::device::{Device, Event, FakeTransport, Misbehave};
use support::{GIB, MIB};

#[test]
fn memory_is_resized_under_working_vcpus_and_no_page_is_lost() {
    let device = Device::new(4 * GIB, 4 * GIB, 2 * MIB);
    Host::run(&device, PARAMETERS, |host| {
        let mut moved = 0;
        for target in [GIB, 130 * MIB, 2 * GIB, 6 * MIB, 256 * MIB, 0] {
            host.resize(target);
            // The view is the device's map, and at rest all of it is in use.
            let mailbox = host.mailbox();
            mailbox.use_request.store(1, Ordering::Release);
            host.report();
            for map in [map::PLUGGED, map::ONLINE, map::MOVABLE] {
                assert_eq!(host.view(map), host.device.state().plugged, "{map}");
            }
            assert_eq!(host.driver().plugged_size.load(Ordering::Relaxed), target);
            assert_eq!(host.driver().online_size.load(Ordering::Relaxed), target);
            moved = mailbox.pages_moved.load(Ordering::Relaxed);
            if target > 0 {
                // Everybody finds work, however little memory there is.
                host.await_work();
            }
        }
        assert!(moved > 0);
    });
}

#[test]
fn report_is_never_older_than_an_interrupt_before_it() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run(&device, PARAMETERS, |host| {
        for blocks in (1..200).map(|step| step % 7) {
            host.device.request(blocks * 2 * MIB);
            let state = host.report();
            let requested_size = host.driver().requested_size.load(Ordering::Relaxed);
            assert!(state != DriverState::Settled || requested_size == blocks * 2 * MIB);
        }
    });
}

#[test]
fn stop_ends_a_guest_that_sleeps_and_one_that_works() {
    for target in [0, 64 * MIB] {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        Host::run(&device, PARAMETERS, |host| host.resize(target));
    }
}

#[test]
fn guest_without_memory_sleeps() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run(&device, PARAMETERS, |host| {
        host.resize(0);
        // Nothing to do, so both wait and stay there.
        host.await_sleepers(2);
        assert_eq!(host.report(), DriverState::Settled);
        host.await_sleepers(2);
    });
}

#[test]
fn rogue_address_is_touched_once_and_by_the_last_vcpu() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run(&device, PARAMETERS, |host| {
        host.resize(2 * MIB);
        let address = 4 * GIB + 512 * MIB;
        let mailbox = host.mailbox();
        mailbox.rogue_address.store(address, Ordering::Relaxed);
        host.command(command::ROGUE);
        host.until(|| mailbox.command.load(Ordering::Acquire) == 0);
        host.report();
        host.until(|| !host.touched().is_empty());
        assert_eq!(*host.touched(), [(1, address)]);
    });
}

#[test]
fn failure_of_the_driver_is_reported_with_its_reason() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run(&device, PARAMETERS, |host| {
        host.resize(64 * MIB);
        // The request, and the question what is plugged that follows.
        for _ in 0..2 {
            let wrong = Misbehave::Answer(Answer::Error);
            device.state().misbehave.push_back(wrong);
        }
        device.request(128 * MIB);
        host.until(|| host.report() == DriverState::Failed);
        assert_eq!(host.message(), "state was answered ERROR");
        // What is plugged goes on being used.
        host.await_work();
    });
}

#[test]
fn busy_device_is_asked_again() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    for _ in 0..3 {
        let busy = Misbehave::Answer(Answer::Busy);
        device.state().misbehave.push_back(busy);
    }
    Host::run(&device, PARAMETERS, |host| {
        host.resize(64 * MIB);
        assert_eq!(host.driver().requests.load(Ordering::Relaxed), 4);
    });
}

/// A vCPU that sleeps until the device answers wakes by itself when it is too late for that.
#[test]
fn device_that_does_not_answer_is_noticed_by_a_sleeping_guest() {
    for policy in [PARAMETERS.policy, Policy::linux()] {
        let parameters = Parameters {
            policy,
            ..PARAMETERS
        };
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        Host::run_with_clock(&device, parameters, 1000, |host| {
            host.resize(0);
            // One request only: were all of them held, the guest's fast clock would be over before this thread, which
            // has to be given a CPU first, let them go.
            let lost = Misbehave::Lost { done: false };
            device.state().misbehave.push_back(lost);
            device.request(64 * MIB);
            match policy.strategy {
                Strategy::Linux => {
                    host.until(|| host.driver_state() == DriverState::Failed);
                    assert_eq!(host.message(), "the device does not answer");
                }
                Strategy::Direct => {
                    // Another reset than that of the probe; it asks what is plugged, and goes on.
                    let resets = || {
                        let reset = |event: &&Event| matches!(event, Event::Status(0));
                        device.state().events.iter().filter(reset).count()
                    };
                    host.until(|| resets() > 1);
                    host.resize(64 * MIB);
                }
            }
        });
    }
}

/// Linux's driver waits for 50 s when the device is busy, and so does who polls it.
#[test]
fn busy_device_is_asked_again_after_linuxs_delay() {
    let parameters = Parameters {
        policy: Policy::linux(),
        ..PARAMETERS
    };
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    let busy = Misbehave::Answer(Answer::Busy);
    device.state().misbehave.push_back(busy);
    Host::run_with_clock(&device, parameters, 1000, |host| {
        host.resize(256 * MIB);
        // One in each memory block.
        assert_eq!(host.driver().requests.load(Ordering::Relaxed), 3);
    });
}

/// Linux's driver would look again after 50 s, and here the clock stands still.
#[test]
fn driver_need_not_wait_for_workers_that_have_let_go() {
    let parameters = Parameters {
        policy: Policy::linux(),
        worker_pages: 8192,
        ..PARAMETERS
    };
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run_with_clock(&device, parameters, 0, |host| {
        let held = |worker: &WorkerCounters| worker.pages_held.load(Ordering::Relaxed);
        let workers = &host.mailbox().workers[..parameters.vcpu_count];
        for target in [2 * MIB, 0, 0] {
            host.resize(128 * MIB);
            host.until(|| workers.iter().all(|worker| held(worker) > 8000));
            host.resize(target);
        }
    });
}

#[test]
fn one_vcpu_is_enough() {
    let parameters = Parameters {
        vcpu_count: 1,
        ..PARAMETERS
    };
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    Host::run(&device, parameters, |host| {
        for target in [256 * MIB, 2 * MIB, 0] {
            host.resize(target);
        }
    });
}

#[test]
fn guest_that_cannot_start_says_why() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    let boot = |parameters, view_words| {
        let platform = TestPlatform::new(&device, view_words, 1);
        let transport = FakeTransport(Arc::clone(&device));
        let error = Guest::boot(&platform, vec![transport], parameters).unwrap_err();
        assert_eq!(platform.message(), error.to_string());
        assert_eq!(platform.driver_state(), DriverState::Failed);
        error
    };
    for vcpu_count in [0, MAX_VCPUS + 1] {
        let parameters = Parameters {
            vcpu_count,
            ..PARAMETERS
        };
        assert_eq!(boot(parameters, 32), BootError::VcpuCount(vcpu_count));
    }
    let profile = Profile {
        page_shift: 30,
        ..Profile::X86_64
    };
    let parameters = Parameters {
        profile,
        ..PARAMETERS
    };
    assert!(matches!(boot(parameters, 32), BootError::Profile(_)));
    assert_eq!(
        boot(PARAMETERS, 7),
        BootError::ViewTooSmall { have: 7, need: 32 }
    );
    device.state().refuse_features = true;
    assert!(matches!(boot(PARAMETERS, 32), BootError::Probe(_)));
}

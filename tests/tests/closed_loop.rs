//! Our driver and our device in a closed loop, on KVM and in this process.

use std::time::Instant;

use integration_tests::random::{Random, seed};
use integration_tests::{
    LONG, MIB, assert_consistent, assert_ends_well, device, guest_kinds, start,
};
use virtio_mem::wire::{Answer, RequestKind};
use vmm_harness::DriverState;

const REGION: u64 = 1024 * MIB;

#[test]
fn random_resizes_under_load_end_consistent() {
    let seed = seed();
    for kind in guest_kinds("random_resizes_under_load_end_consistent") {
        let machine = start(kind, seed, device(REGION));
        let mut random = Random::new(seed);
        let mut targets = Vec::new();
        for _ in 0..60 {
            let target = random.below(REGION / (2 * MIB) + 1) * 2 * MIB;
            targets.push(target);
            machine.handle().resize(target).unwrap();
            let report = machine.settled(target, LONG).unwrap();
            assert_eq!(
                machine.handle().status().plugged_size,
                target,
                "{kind:?} {targets:?}"
            );
            assert_consistent(&machine, &report);
        }
        let handle = machine.handle();
        assert_ends_well(machine);
        let counters = handle.counters();
        for kind in RequestKind::ALL {
            assert_eq!(counters.requests(kind, Answer::Error), 0, "{counters:?}");
        }
        assert_eq!(
            counters.unusable_chains + counters.queue_errors,
            0,
            "{counters:?}"
        );
    }
}

/// The target changes while the driver is still on its way to the last one.
#[test]
fn target_may_change_at_any_moment() {
    let seed = seed();
    for kind in guest_kinds("target_may_change_at_any_moment") {
        let machine = start(kind, seed, device(REGION));
        let mut random = Random::new(seed);
        for _ in 0..20 {
            for _ in 0..random.below(8) + 1 {
                let target = random.below(REGION / (2 * MIB) + 1) * 2 * MIB;
                machine.handle().resize(target).unwrap();
                for _ in 0..random.below(20_000) {
                    std::hint::spin_loop();
                }
            }
            let target = machine.handle().status().requested_size;
            let report = machine.settled(target, LONG).unwrap();
            assert_eq!(machine.handle().status().plugged_size, target);
            assert_consistent(&machine, &report);
        }
        assert_ends_well(machine);
    }
}

/// BUSY while frozen: the driver waits, nothing is lost, and it goes on when the device thaws.
#[test]
fn frozen_device_is_waited_for() {
    for kind in guest_kinds("frozen_device_is_waited_for") {
        let machine = start(kind, 1, device(REGION));
        let handle = machine.handle();
        handle.resize(256 * MIB).unwrap();
        machine.settled(256 * MIB, LONG).unwrap();
        handle.freeze();
        handle.resize(64 * MIB).unwrap();
        let deadline = Instant::now() + LONG;
        let busy = |answer| matches!(answer, Some((Answer::Busy, _)));
        handle
            .wait_until(deadline, |status| busy(status.last_answer))
            .unwrap();
        assert_eq!(handle.status().plugged_size, 256 * MIB);
        let report = machine.report(LONG).unwrap();
        assert_ne!(
            report.driver_state,
            Some(DriverState::Failed),
            "{:?}",
            report.message
        );
        handle.thaw();
        let report = machine.settled(64 * MIB, LONG).unwrap();
        assert_consistent(&machine, &report);
        assert!(
            handle
                .counters()
                .requests(RequestKind::Unplug, Answer::Busy)
                > 0
        );
        assert_ends_well(machine);
    }
}

/// A size requested before the guest runs is there when its driver comes.
#[test]
fn size_requested_before_boot_is_served() {
    for kind in guest_kinds("size_requested_before_boot_is_served") {
        let machine = start(kind, 2, device(REGION).requested_size(130 * MIB));
        let report = machine.settled(130 * MIB, LONG).unwrap();
        assert_consistent(&machine, &report);
        assert_ends_well(machine);
    }
}

/// Pages in use are moved, not lost, when what they lie in goes.
#[test]
fn shrink_moves_pages_in_use() {
    for kind in guest_kinds("shrink_moves_pages_in_use") {
        let machine = start(kind, 3, device(REGION));
        machine.handle().resize(512 * MIB).unwrap();
        let held = |report: &vmm_harness::Report| -> u64 {
            report.workers.iter().map(|worker| worker.pages_held).sum()
        };
        let mut report = machine.settled(512 * MIB, LONG).unwrap();
        // Both workers hold what they may: 32 MiB of the lowest memory, some of which has to go.
        while held(&report) < 2 * 4096 {
            report = machine.settled(512 * MIB, LONG).unwrap();
        }
        let moved_before = report.pages_moved;
        for target in [24 * MIB, 512 * MIB, 24 * MIB, 512 * MIB, 24 * MIB] {
            machine.handle().resize(target).unwrap();
            report = machine.settled(target, LONG).unwrap();
            let verified: u64 = report
                .workers
                .iter()
                .map(|worker| worker.pages_verified)
                .sum();
            let mut now = verified;
            while now < verified + 20_000 {
                report = machine.settled(target, LONG).unwrap();
                now = report
                    .workers
                    .iter()
                    .map(|worker| worker.pages_verified)
                    .sum();
            }
            assert_consistent(&machine, &report);
        }
        assert!(report.pages_moved > moved_before);
        assert_ends_well(machine);
    }
}

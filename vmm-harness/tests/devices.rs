//! Several memory devices in one guest, each on a node of its own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "this file needs no device of the common kind")]
mod common;

use std::time::Duration;

use virtio_mem::{Anonymous, Builder, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::REGION_START;
use vmm_harness::{
    DriverState, GuestKind, LayoutError, Machine, MachineConfig, Outcome, Report, StartError,
};

use common::kvm_or_skip;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Generous: nothing here depends on how fast the machine is.
const LONG: Duration = Duration::from_secs(60);

fn device(start: u64, size: u64, block_size: u64, node: u16) -> Builder {
    let backing = Anonymous::base_pages(size).unwrap();
    VirtioMem::builder(GuestAddress(start), backing)
        .block_size(block_size)
        .node_id(node)
}

fn on_each_guest(test: impl Fn(GuestKind)) {
    test(GuestKind::InProcess);
    if kvm_or_skip() {
        test(GuestKind::Kvm);
    }
}

/// Asks for a size of each device at the same time, and waits until all are there.
fn resize(machine: &Machine, targets: &[u64]) -> Vec<Report> {
    for (device, target) in machine.devices().zip(targets) {
        device.handle().resize(*target).unwrap();
    }
    loop {
        let reports = machine.reports(LONG).unwrap();
        let there = |(report, target): (&Report, &u64)| {
            report.requested_size == *target
                && report.plugged_size == *target
                && report.driver_state == Some(DriverState::Settled)
        };
        if reports.iter().zip(targets).all(there) {
            return reports;
        }
    }
}

#[test]
fn devices_are_resized_on_their_own_and_their_memory_is_on_their_nodes() {
    on_each_guest(|guest| {
        let config = MachineConfig {
            guest,
            ..MachineConfig::default()
        };
        // Domains are names, not numbers from 0; nodes are in their order. Blocks differ, and so do modes.
        let devices = vec![
            device(REGION_START, GIB, 2 * MIB, 7),
            device(REGION_START + GIB, 2 * GIB, 256 * MIB, 3),
        ];
        let mut machine = Machine::start_with(&config, devices).unwrap();
        for targets in [[256, 512], [130, 1024], [1024, 0], [0, 2048], [6, 256]] {
            let targets = targets.map(|mib| mib * MIB);
            let reports = resize(&machine, &targets);
            let nodes: Vec<_> = reports.iter().map(|report| report.node).collect();
            assert_eq!(nodes, [1, 0]);
            for (device, (report, target)) in machine.devices().zip(reports.iter().zip(targets)) {
                assert_eq!(report.online_size, target);
                // What the guest believes is what the device has, block by block.
                assert_eq!(report.view, device.handle().plugged());
                assert!(device.handle().resident_bytes().unwrap() <= target);
            }
        }
        // Both have been worked in: the last sizes leave the workers half of each.
        assert!(
            machine
                .devices()
                .all(|device| device.handle().resident_bytes().unwrap() > 0)
        );
        assert_eq!(machine.finish(LONG), Outcome::Exited);
        let workers = machine.progress().workers;
        assert!(workers.iter().all(|worker| worker.pages_wrong == 0));
        assert!(workers.iter().all(|worker| worker.pages_verified > 0));
    });
}

#[test]
fn rogue_guest_is_caught_in_the_region_of_any_device() {
    on_each_guest(|guest| {
        let config = MachineConfig {
            guest,
            ..MachineConfig::default()
        };
        let second = REGION_START + GIB;
        let devices = vec![
            device(REGION_START, GIB, 2 * MIB, 0),
            device(second, GIB, 2 * MIB, 1),
        ];
        let machine = Machine::start_with(&config, devices).unwrap();
        resize(&machine, &[GIB, 2 * MIB]);
        // Beside a plugged block of the device, in a slot.
        let plugged = machine.devices().nth(1).unwrap().handle().plugged();
        let block = (0..).find(|block| !plugged.contains(*block)).unwrap();
        let address = second + block * 2 * MIB;
        machine.rogue(address);
        let Some(Outcome::UnpluggedAccess(access)) = machine.wait(LONG) else {
            unreachable!("{:?}", machine.outcome());
        };
        assert_eq!((access.address, access.vcpu), (address, 1));
    });
}

#[test]
fn devices_that_cannot_be_together_are_refused() {
    let config = MachineConfig {
        guest: GuestKind::InProcess,
        ..MachineConfig::default()
    };
    let overlapping = vec![
        device(REGION_START, GIB, 2 * MIB, 0),
        device(REGION_START + GIB / 2, GIB, 2 * MIB, 1),
    ];
    let many = (0..5).map(|index| device(REGION_START + index * GIB, GIB, 2 * MIB, 0));
    for (devices, error) in [
        (
            overlapping,
            LayoutError::RegionOverlap(REGION_START + GIB / 2),
        ),
        (many.collect(), LayoutError::DeviceCount(5)),
        (Vec::new(), LayoutError::DeviceCount(0)),
    ] {
        let refused = Machine::start_with(&config, devices).unwrap_err();
        assert!(
            matches!(&refused, StartError::Layout(other) if *other == error),
            "{refused:?}"
        );
    }
}

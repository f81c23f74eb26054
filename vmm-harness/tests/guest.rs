//! The guest program resizes, on KVM and in this process: the same scenarios in both places.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::{LONG, device, kvm_or_skip};
use vmm_harness::layout::REGION_START;
use vmm_harness::{
    Backend, DriverState, GuestKind, Machine, MachineConfig, Outcome, ReportError, UnpluggedAccess,
};

const MIB: u64 = 1 << 20;
const REGION_SIZE: u64 = 1024 * MIB;

/// `None`, and says so, if the guest is to run on KVM and there is none.
fn start(guest: GuestKind) -> Option<Machine> {
    if guest == GuestKind::Kvm && !kvm_or_skip() {
        return None;
    }
    let config = MachineConfig {
        boot_memory: 64 * MIB,
        guest,
        seed: 42,
        ..MachineConfig::default()
    };
    Some(Machine::start(&config, device(REGION_SIZE)).unwrap())
}

fn memory_follows_the_target(guest: GuestKind) {
    let Some(machine) = start(guest) else { return };
    let handle = machine.handle();
    for target in [512, 130, 600, 6, 0] {
        let target = target * MIB;
        handle.resize(target).unwrap();
        let report = machine.settled(target, LONG).unwrap();
        assert_eq!(report.view, handle.plugged());
        assert_eq!(handle.status().plugged_size, target);
        assert_eq!(report.plugged_size, target);
        assert!(handle.resident_bytes().unwrap() <= target);
        assert!(
            report.workers.iter().all(|worker| worker.pages_wrong == 0),
            "{report:?}"
        );
    }
    let interrupts = machine.interrupts();
    // The driver may have found the first target there when it came.
    assert!(
        interrupts.config_change >= 4 && interrupts.used_buffer > 0,
        "{interrupts:?}"
    );
    assert_eq!(machine.stop(LONG), Outcome::Exited);
    assert_eq!(handle.resident_bytes().unwrap(), 0);
}

#[test]
fn memory_follows_the_target_on_kvm() {
    memory_follows_the_target(GuestKind::Kvm);
}

#[test]
fn memory_follows_the_target_in_process() {
    memory_follows_the_target(GuestKind::InProcess);
}

fn workers_verify_what_they_wrote(guest: GuestKind) {
    let Some(machine) = start(guest) else { return };
    machine.handle().resize(256 * MIB).unwrap();
    let deadline = Instant::now() + LONG;
    while machine
        .progress()
        .workers
        .iter()
        .any(|worker| worker.pages_verified < 1000)
    {
        assert!(Instant::now() < deadline, "{:?}", machine.progress());
        assert_eq!(machine.wait(Duration::from_millis(1)), None);
    }
    assert!(
        machine
            .progress()
            .workers
            .iter()
            .all(|worker| worker.pages_wrong == 0)
    );
    assert_eq!(machine.stop(LONG), Outcome::Exited);
}

#[test]
fn workers_verify_what_they_wrote_on_kvm() {
    workers_verify_what_they_wrote(GuestKind::Kvm);
}

#[test]
fn workers_verify_what_they_wrote_in_process() {
    workers_verify_what_they_wrote(GuestKind::InProcess);
}

/// The guest touches an unplugged block, in a slot that has others plugged.
fn rogue_guest_is_reported(guest: GuestKind) {
    let Some(machine) = start(guest) else { return };
    machine.handle().resize(64 * MIB).unwrap();
    let plugged = |status: &virtio_mem::Status| status.plugged_size == 64 * MIB;
    machine
        .handle()
        .wait_until(Instant::now() + LONG, plugged)
        .unwrap();
    let block = machine.handle().plugged().next(0, false).unwrap();
    let address = REGION_START + block * 2 * MIB + 0x1008;
    let resident = machine.handle().resident_bytes().unwrap();

    machine.rogue(address);
    let access = UnpluggedAccess {
        vcpu: 1,
        address,
        write: false,
        len: 8,
    };
    assert_eq!(machine.wait(LONG), Some(Outcome::UnpluggedAccess(access)));
    let text = format!("vCPU 1 read 8 bytes at {address:#x}, which is not plugged");
    assert_eq!(access.to_string(), text);
    let ended = Err(ReportError::Ended(Outcome::UnpluggedAccess(access)));
    assert_eq!(machine.report(LONG), ended);
    let handle = machine.handle();
    assert_eq!(machine.stop(LONG), Outcome::UnpluggedAccess(access));
    // Workers may have written to plugged pages after the first look, but not outside them.
    assert!(handle.resident_bytes().unwrap() <= handle.status().plugged_size);
    assert!(resident <= 64 * MIB);
}

#[test]
fn rogue_guest_is_reported_on_kvm() {
    rogue_guest_is_reported(GuestKind::Kvm);
}

#[test]
fn rogue_guest_is_reported_in_process() {
    rogue_guest_is_reported(GuestKind::InProcess);
}

fn guest_that_settles_sleeps_and_reports_when_asked(guest: GuestKind) {
    let Some(machine) = start(guest) else { return };
    for _ in 0..3 {
        let report = machine.report(LONG).unwrap();
        assert_eq!((report.view.count(), report.message.as_deref()), (0, None));
    }
    assert_eq!(
        machine.settled(0, LONG).unwrap().driver_state,
        Some(DriverState::Settled)
    );
    assert_eq!(
        machine.settled(1, Duration::ZERO),
        Err(ReportError::Late(Duration::ZERO))
    );
    assert_eq!(machine.stop(LONG), Outcome::Exited);
}

#[test]
fn guest_that_settles_sleeps_and_reports_when_asked_on_kvm() {
    guest_that_settles_sleeps_and_reports_when_asked(GuestKind::Kvm);
}

#[test]
fn guest_that_settles_sleeps_and_reports_when_asked_in_process() {
    guest_that_settles_sleeps_and_reports_when_asked(GuestKind::InProcess);
}

#[test]
fn backend_is_named() {
    let Some(machine) = start(GuestKind::InProcess) else {
        return;
    };
    assert_eq!(*machine.backend(), Backend::InProcess { reason: None });
    assert_eq!(machine.backend().to_string(), "in-process, as asked");
    assert_eq!(machine.exits(), None);
    drop(machine);

    let Some(machine) = start(GuestKind::Auto) else {
        return;
    };
    match vmm_harness::open_kvm() {
        Ok(_) => assert!(machine.backend().to_string().starts_with("KVM")),
        Err(reason) => {
            let text = format!("in-process, because {reason}");
            assert_eq!(machine.backend().to_string(), text);
        }
    }
}

//! The virtual machine itself, with the probe program as its guest. Skipped where KVM cannot be used.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::{LONG, kvm_or_skip};
use virtio_mem::{Anonymous, Builder, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::{IMAGE_START, REGION_START, VIRTIO_MMIO};
use vmm_harness::{
    Backend, Crash, GuestKind, Machine, MachineConfig, Outcome, StartError, UnpluggedAccess,
};

/// `resources/guest-image/src/bin/probe.rs`; its behaviours have these numbers.
static PROBE: &[u8] = include_bytes!(env!("VMEM_PROBE_IMAGE"));
const WORK: u64 = 0;
const PANIC: u64 = 1;
const READ: u64 = 2;
const WRITE: u64 = 3;
const WAIT: u64 = 5;
const SLEEP: u64 = 6;

const REGION_SIZE: u64 = 256 << 20;

fn device() -> Builder {
    common::device(REGION_SIZE)
}

fn config(vcpu_count: usize, behaviour: u64, argument: u64) -> MachineConfig {
    MachineConfig {
        boot_memory: 32 << 20,
        vcpu_count,
        guest: GuestKind::Kvm,
        seed: behaviour,
        worker_pages: argument,
        image: PROBE,
        ..MachineConfig::default()
    }
}

/// `None`, and says so, where there is no KVM.
fn start(vcpu_count: usize, behaviour: u64, argument: u64) -> Option<Machine> {
    if !kvm_or_skip() {
        return None;
    }
    let machine = Machine::start(&config(vcpu_count, behaviour, argument), device()).unwrap();
    assert!(matches!(machine.backend(), Backend::Kvm { .. }));
    Some(machine)
}

#[test]
fn program_runs_in_64_bit_user_mode_on_each_number_of_vcpus() {
    for vcpu_count in [1, 2, 3] {
        let Some(machine) = start(vcpu_count, WORK, 0) else {
            return;
        };
        assert_eq!(machine.wait(LONG), Some(Outcome::Exited));
        assert_eq!(machine.exits().unwrap().others, 0);
        assert_eq!(machine.stop(LONG), Outcome::Exited);
    }
}

#[test]
fn panic_message_reaches_the_host() {
    let Some(machine) = start(2, PANIC, 0) else {
        return;
    };
    let Some(Outcome::Panicked { vcpu: 1, message }) = machine.wait(LONG) else {
        panic!("{:?}", machine.outcome());
    };
    assert!(message.contains("asked to panic on vCPU 1"), "{message}");
}

#[test]
fn touching_the_region_where_no_slot_is_reports_address_and_vcpu() {
    let address = REGION_START + 0x12_3450;
    for (behaviour, write) in [(READ, false), (WRITE, true)] {
        let Some(machine) = start(2, behaviour, address) else {
            return;
        };
        let access = UnpluggedAccess {
            vcpu: 1,
            address,
            write,
            len: 8,
        };
        assert_eq!(machine.wait(LONG), Some(Outcome::UnpluggedAccess(access)));
        assert_eq!(machine.handle().resident_bytes().unwrap(), 0);
        assert_eq!(machine.stop(LONG), Outcome::UnpluggedAccess(access));
    }
}

#[test]
fn address_nobody_has_reads_as_ones_and_takes_writes() {
    let stray = VIRTIO_MMIO + 0x8000;
    for behaviour in [READ, WRITE] {
        let Some(machine) = start(1, behaviour, stray) else {
            return;
        };
        assert_eq!(machine.wait(LONG), Some(Outcome::Exited));
    }
}

#[test]
fn null_pointer_and_page_tables_are_out_of_reach() {
    for address in [8, IMAGE_START - 8, 30 << 20] {
        let Some(machine) = start(1, WRITE, address) else {
            return;
        };
        let outcome = machine.wait(LONG);
        let Some(Outcome::Crashed(Crash { vcpu: 0, .. })) = outcome else {
            panic!("{address:#x}: {outcome:?}");
        };
    }
}

#[test]
fn waiting_guest_sleeps_until_it_is_told_to_stop() {
    let Some(machine) = start(2, WAIT, 0) else {
        return;
    };
    let reads = || machine.exits().unwrap().mmio_reads;
    let begun = Instant::now();
    while reads() == 0 {
        assert!(begun.elapsed() < LONG);
        assert_eq!(machine.wait(Duration::from_millis(1)), None);
    }
    // It has asked to wait, and has not been running in a circle since.
    assert_eq!(machine.wait(Duration::from_millis(50)), None);
    assert_eq!(reads(), 1);
    assert_eq!(machine.stop(LONG), Outcome::Exited);
}

#[test]
fn guest_can_wait_with_a_deadline() {
    let Some(machine) = start(1, SLEEP, 20) else {
        return;
    };
    assert_eq!(machine.wait(LONG), Some(Outcome::Exited));
}

#[test]
fn start_refuses_what_cannot_work() {
    let too_small = MachineConfig {
        boot_memory: 4 << 20,
        ..config(1, WORK, 0)
    };
    let no_image = MachineConfig {
        image: b"no ELF",
        ..config(1, WORK, 0)
    };
    let no_vcpu = MachineConfig {
        vcpu_count: 0,
        ..config(1, WORK, 0)
    };
    if !kvm_or_skip() {
        return;
    }
    assert!(matches!(
        Machine::start(&too_small, device()),
        Err(StartError::Layout(_))
    ));
    assert!(matches!(
        Machine::start(&no_image, device()),
        Err(StartError::Boot(_))
    ));
    assert!(matches!(
        Machine::start(&no_vcpu, device()),
        Err(StartError::Layout(_))
    ));
    let misplaced = VirtioMem::builder(
        GuestAddress(1 << 30),
        Anonymous::base_pages(REGION_SIZE).unwrap(),
    );
    assert!(matches!(
        Machine::start(&config(1, WORK, 0), misplaced),
        Err(StartError::Layout(_))
    ));
}

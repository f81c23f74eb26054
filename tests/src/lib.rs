//! What the integration tests share: machines with a memory device, and what must always hold of them.

pub mod openapi;
pub mod random;
pub mod rig;
pub mod traces;

use std::io::Write;
use std::time::Duration;

use virtio_mem::{Anonymous, Builder, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::REGION_START;
use vmm_harness::{GuestKind, Machine, MachineConfig, Outcome, Report, open_kvm};

/// Bytes per MiB.
pub const MIB: u64 = 1 << 20;

/// Longer than anything here takes; nothing depends on how fast the machine is.
pub const LONG: Duration = Duration::from_secs(120);

/// A region of `bytes` in blocks of 2 MiB.
///
/// # Panics
///
/// If the host has no such address space.
#[must_use]
pub fn device(bytes: u64) -> Builder {
    let backing = Anonymous::base_pages(bytes).expect("address space for the region");
    VirtioMem::builder(GuestAddress(REGION_START), backing).block_size(2 * MIB)
}

/// A guest of `kind` with 2 vCPUs and `device`.
///
/// # Panics
///
/// If it does not start.
#[must_use]
pub fn start(kind: GuestKind, seed: u64, device: Builder) -> Machine {
    let config = MachineConfig {
        guest: kind,
        seed,
        worker_pages: 4096,
        ..MachineConfig::default()
    };
    Machine::start(&config, device).expect("the guest starts")
}

/// The kinds of guest this machine can run. Says so, past the test runner's capture, where KVM is not one.
///
/// # Panics
///
/// If KVM is not one and `VMEM_REQUIRE_KVM` says that it must be.
#[must_use]
pub fn guest_kinds(test: &str) -> Vec<GuestKind> {
    let mut kinds = vec![GuestKind::InProcess];
    match open_kvm() {
        Ok(_) => kinds.push(GuestKind::Kvm),
        Err(reason) => {
            let required = std::env::var_os("VMEM_REQUIRE_KVM").is_some();
            assert!(!required, "KVM is required: {reason}");
            // `eprintln` would be captured, and a skip must be seen. Nobody is left to tell if this fails.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test} on KVM: {reason}");
        }
    }
    kinds
}

/// What must hold whenever the driver has settled: host, device and guest agree about every block.
///
/// # Panics
///
/// If it does not hold.
pub fn assert_consistent(machine: &Machine, report: &Report) {
    let handle = machine.handle();
    let (status, plugged) = (handle.status(), handle.plugged());
    assert_eq!(
        report.view, plugged,
        "the guest's view is the device's bitmap"
    );
    assert_eq!(
        status.plugged_size,
        handle.geometry().bytes(plugged.count())
    );
    assert_eq!(report.plugged_size, status.plugged_size);
    assert_eq!(report.online_size, status.plugged_size);
    let resident = handle
        .resident_bytes()
        .expect("resident bytes can be measured");
    assert!(
        resident <= status.plugged_size,
        "{resident} resident of {} plugged",
        status.plugged_size
    );
    let wrong: u64 = report.workers.iter().map(|worker| worker.pages_wrong).sum();
    assert_eq!(wrong, 0, "no page is lost or wrong");
}

/// Ends the guest, whose workers then verify and free every page they hold.
///
/// # Panics
///
/// If it does not end so, or a page was wrong or is still held.
pub fn assert_ends_well(mut machine: Machine) {
    assert_eq!(machine.finish(LONG), Outcome::Exited);
    for worker in machine.progress().workers {
        assert_eq!((worker.pages_wrong, worker.pages_held), (0, 0));
    }
}

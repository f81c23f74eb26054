//! What the tests share.

use std::io::Write;
use std::time::Duration;

use virtio_mem::{Anonymous, Builder, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::REGION_START;
use vmm_harness::open_kvm;

/// Longer than anything takes: nothing here depends on how fast the machine is.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A device with a region of `bytes` in blocks of 2 MiB.
pub(crate) fn device(bytes: u64) -> Builder {
    let backing = Anonymous::base_pages(bytes).unwrap();
    VirtioMem::builder(GuestAddress(REGION_START), backing).block_size(2 << 20)
}

/// Whether there is KVM. Where there is none the test says so, past the harness that hides what passing tests
/// print, and is to return; with `VMEM_REQUIRE_KVM` set it fails.
pub(crate) fn kvm_or_skip() -> bool {
    let Err(reason) = open_kvm() else {
        return true;
    };
    let required = std::env::var_os("VMEM_REQUIRE_KVM").is_some();
    assert!(!required, "KVM is required: {reason}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let mut stderr = std::io::stderr().lock();
    writeln!(stderr, "SKIPPED {test}: {reason}").unwrap();
    false
}

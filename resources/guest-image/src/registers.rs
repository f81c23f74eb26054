//! Port registers of the harness, and the clock.
#![expect(
    unsafe_code,
    reason = "registers are raw addresses, and the time stamp counter is an instruction"
)]

use core::sync::atomic::{AtomicU64, Ordering};

use vmem_guest::abi::{BootInfo, port};

use crate::identity::address;

static TSC_KHZ: AtomicU64 = AtomicU64::new(1);

/// Reads the port register at `offset`.
#[must_use]
pub fn read(boot: &BootInfo, offset: u64) -> u32 {
    let register = core::ptr::with_exposed_provenance::<u32>(address(boot.port + offset));
    // SAFETY: the host maps the port registers there; there is no memory behind them.
    unsafe { register.read_volatile() }
}

/// Writes the port register at `offset`.
pub fn write(boot: &BootInfo, offset: u64, value: u32) {
    let register = core::ptr::with_exposed_provenance_mut::<u32>(address(boot.port + offset));
    // SAFETY: as in `read`.
    unsafe { register.write_volatile(value) };
}

/// Blocks until the host has something to say.
pub fn wait(boot: &BootInfo) {
    // The value means nothing, reading it is what blocks.
    let _ = read(boot, port::WAIT);
}

/// Blocks until the host has something to say or [`now_ms`] reaches `deadline_ms`.
pub fn wait_until(boot: &BootInfo, deadline_ms: u64) {
    let left = deadline_ms.saturating_sub(now_ms());
    if let Ok(left) = u32::try_from(left) {
        write(boot, port::WAIT, left);
    } else {
        wait(boot);
    }
}

/// Ends this vCPU.
pub fn exit(boot: &BootInfo) -> ! {
    loop {
        // The host does not enter the vCPU again after the first time.
        write(boot, port::EXIT, 0);
    }
}

/// The host knows how fast the time stamp counter runs and says so at the entry point.
pub(crate) fn set_tsc_khz(khz: u64) {
    TSC_KHZ.store(khz.max(1), Ordering::Relaxed);
}

/// Milliseconds since some moment before the guest started.
#[must_use]
pub fn now_ms() -> u64 {
    // SAFETY: the harness leaves CR4.TSD clear, so the counter can be read at ring 3.
    let ticks = unsafe { core::arch::x86_64::_rdtsc() };
    ticks / TSC_KHZ.load(Ordering::Relaxed)
}

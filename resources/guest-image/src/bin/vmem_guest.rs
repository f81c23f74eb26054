//! The guest program on bare vCPUs.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "one vCPU makes the guest, the others find it through a pointer"
)]
extern crate alloc;

use alloc::boxed::Box;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use vmem_guest::abi::BootInfo;
use vmem_guest::{Guest, Parameters};
use vmem_guest_image::guest_main;
use vmem_guest_image::platform::BarePlatform;

guest_main!(main);

/// Null until vCPU 0 has booted the guest.
static GUEST: AtomicPtr<Guest<BarePlatform>> = AtomicPtr::new(ptr::null_mut());

fn main(boot: &'static BootInfo, vcpu: usize) {
    if vcpu == 0 {
        GUEST.store(Box::into_raw(Box::new(start(boot))), Ordering::Release);
    }
    let guest = loop {
        // SAFETY: not null means that vCPU 0 stored a guest that is never dropped.
        match unsafe { GUEST.load(Ordering::Acquire).as_ref() } {
            Some(guest) => break guest,
            None => spin_loop(),
        }
    };
    guest.run_vcpu(vcpu);
}

#[expect(
    clippy::panic,
    reason = "how a program at ring 3 tells the host that it cannot go on"
)]
fn start(boot: &'static BootInfo) -> Guest<BarePlatform> {
    let platform = BarePlatform::new(boot);
    let transports = match platform.transports() {
        Ok(transports) => transports,
        Err(error) => panic!("no memory device: {error}"),
    };
    match Guest::boot(platform, transports, Parameters::from(boot)) {
        Ok(guest) => guest,
        Err(error) => panic!("the memory device cannot be used: {error}"),
    }
}

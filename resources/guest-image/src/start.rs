//! The way from the first instruction to the program.
#![expect(
    unsafe_code,
    reason = "the entry point is assembly, and what the host passes is a raw address"
)]

use core::arch::global_asm;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use vmem_guest::abi::{BOOT_MAGIC, BootInfo, Mailbox};

use crate::{heap, registers};

// rdi, rsi and rdx are the arguments of `enter`, see there. rbp = 0 ends a stack trace.
global_asm!(
    ".section .text.boot, \"ax\"",
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "call {enter}",
    "ud2",
    enter = sym enter,
);

/// Names the program: `guest_main!(path)` with `fn(&'static BootInfo, vcpu: usize)`, run on every vCPU.
#[macro_export]
macro_rules! guest_main {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn vmem_guest_main(boot: &'static ::vmem_guest::abi::BootInfo, vcpu: usize) {
            let main: fn(&'static ::vmem_guest::abi::BootInfo, usize) = $main;
            main(boot, vcpu)
        }
    };
}

unsafe extern "Rust" {
    safe fn vmem_guest_main(boot: &'static BootInfo, vcpu: usize);
}

static BOOT: AtomicPtr<BootInfo> = AtomicPtr::new(core::ptr::null_mut());
static HEAP_READY: AtomicBool = AtomicBool::new(false);

/// What the host told the guest; `None` before the first vCPU has looked at it.
#[must_use]
pub fn boot_info() -> Option<&'static BootInfo> {
    // SAFETY: only `enter` stores here, the address of a BootInfo that nobody writes any more.
    unsafe { BOOT.load(Ordering::Acquire).as_ref() }
}

/// The memory both sides write.
#[must_use]
pub fn mailbox(boot: &BootInfo) -> &'static Mailbox {
    let mailbox = core::ptr::with_exposed_provenance::<Mailbox>(registers::address(boot.mailbox));
    // SAFETY: the host has set a zeroed, page-aligned Mailbox aside there for the guest's lifetime, and all
    // its fields are atomics.
    unsafe { &*mailbox }
}

/// Runs on every vCPU, on the stack the host gave it.
extern "C" fn enter(boot: *const BootInfo, vcpu: usize, tsc_khz: u64) -> ! {
    // SAFETY: the host passes the address of a BootInfo in mapped memory that it does not change any more.
    let info = unsafe { &*boot };
    if info.magic == BOOT_MAGIC {
        if vcpu == 0 {
            BOOT.store(boot.cast_mut(), Ordering::Release);
            registers::set_tsc_khz(tsc_khz);
            heap::init(info);
            HEAP_READY.store(true, Ordering::Release);
        }
        while !HEAP_READY.load(Ordering::Acquire) {
            spin_loop();
        }
        vmem_guest_main(info, vcpu);
    }
    registers::exit(info)
}

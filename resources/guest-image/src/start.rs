//! The way from the first instruction to the program.
#![expect(unsafe_code, reason = "what the host passes is a raw address")]

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use vmem_guest::abi::{BOOT_MAGIC, BootInfo, Mailbox};

use crate::identity::address;
use crate::{heap, registers};

/// Makes the program: `guest_main!(path)` with `fn(&'static BootInfo, vcpu: usize)`, run on every vCPU.
#[macro_export]
macro_rules! guest_main {
    ($main:path) => {
        // rdi, rsi and rdx are the arguments of `enter`. rbp = 0 ends a stack trace.
        ::core::arch::global_asm!(
            ".section .text.boot, \"ax\"",
            ".globl _start",
            "_start:",
            "xor ebp, ebp",
            "call {enter}",
            "ud2",
            enter = sym enter,
        );

        extern "C" fn enter(boot: *const ::vmem_guest::abi::BootInfo, vcpu: usize, tsc_khz: u64) -> ! {
            // SAFETY: the host passes the address of a BootInfo in mapped memory that it does not change any more,
            // and enters each vCPU once.
            unsafe { $crate::start::run(boot, vcpu, tsc_khz, $main) }
        }

        #[panic_handler]
        fn panic(info: &::core::panic::PanicInfo<'_>) -> ! {
            $crate::panic::report(info)
        }
    };
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
    let mailbox = core::ptr::with_exposed_provenance::<Mailbox>(address(boot.mailbox));
    // SAFETY: the host has set a zeroed, page-aligned Mailbox aside there for the guest's lifetime, and all
    // its fields are atomics.
    unsafe { &*mailbox }
}

/// Runs `main` on a vCPU, on the stack the host gave it.
///
/// # Safety
///
/// `boot` is the address of a BootInfo that is not changed any more, and vCPU 0 comes by here once.
pub unsafe fn run(
    boot: *const BootInfo,
    vcpu: usize,
    tsc_khz: u64,
    main: fn(&'static BootInfo, usize),
) -> ! {
    // SAFETY: the caller's promise.
    let info = unsafe { &*boot };
    if info.magic == BOOT_MAGIC {
        if vcpu == 0 {
            BOOT.store(boot.cast_mut(), Ordering::Release);
            registers::set_tsc_khz(tsc_khz);
            // SAFETY: the host has set this memory aside for the heap and for nothing else.
            unsafe { heap::init(info.heap_start, info.heap_size) };
            HEAP_READY.store(true, Ordering::Release);
        }
        while !HEAP_READY.load(Ordering::Acquire) {
            spin_loop();
        }
        main(info, vcpu);
    }
    registers::exit(info)
}

//! A program for the tests of the virtual machine: one small behaviour, done by the last vCPU.
//!
//! `BootInfo::seed` chooses the behaviour and `BootInfo::worker_pages` is its argument; the others exit, or
//! spin if the bit [`OTHERS_SPIN`] is added.
//! `vmm-harness/tests/vm.rs` uses the same numbers.
#![no_std]
#![no_main]
extern crate alloc;

use alloc::vec;
use core::sync::atomic::Ordering;

use vmem_guest::abi::{BootInfo, command};
use vmem_guest_image::{forbidden, guest_main, registers, start};

guest_main!(main);

/// Uses memory, heap and floating point, on every vCPU; then exits.
const WORK: u64 = 0;
/// Panics.
const PANIC: u64 = 1;
/// Reads the address in the argument, then exits.
const READ: u64 = 2;
/// Writes to the address in the argument, then exits.
const WRITE: u64 = 3;
/// Never leaves the vCPU.
const SPIN: u64 = 4;
/// Sleeps in WAIT until told to stop.
const WAIT: u64 = 5;
/// Sleeps in WAIT for the milliseconds in the argument, then exits.
const SLEEP: u64 = 6;
/// Added to a behaviour: the other vCPUs never leave.
const OTHERS_SPIN: u64 = 0x100;

#[expect(clippy::panic, reason = "one of the behaviours")]
fn main(boot: &'static BootInfo, vcpu: usize) {
    if boot.seed == WORK {
        return work(vcpu);
    }
    if vcpu as u64 + 1 != boot.vcpu_count {
        return if boot.seed & OTHERS_SPIN != 0 {
            spin()
        };
    }
    let argument = boot.worker_pages;
    match boot.seed & !OTHERS_SPIN {
        PANIC => panic!("asked to panic on vCPU {vcpu}"),
        READ => {
            let _ = forbidden::read(argument);
        }
        WRITE => forbidden::write(argument, 0x7665_6d76),
        SPIN => spin(),
        WAIT => {
            let mailbox = start::mailbox(boot);
            while mailbox.command.load(Ordering::Acquire) & command::STOP == 0 {
                registers::wait(boot);
            }
        }
        SLEEP => {
            let until = registers::now_ms() + argument;
            registers::wait_until(boot, until);
            assert!(registers::now_ms() + 1 >= until, "woke up too early");
        }
        seed => panic!("no behaviour {seed}"),
    }
}

fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

fn work(vcpu: usize) {
    let pattern = vcpu as u64 + 1;
    let mut pages = vec![[0u64; 512]; 64];
    pages.fill([pattern; 512]);
    pages.copy_within(1..40, 3);
    assert!(pages.iter().flatten().all(|word| *word == pattern));
    let sum: f64 = pages.iter().map(|page| page.len() as f64).sum();
    assert_eq!(sum, 64.0 * 512.0);
}

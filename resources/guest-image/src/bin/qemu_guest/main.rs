//! A kernel for QEMU: the driver, its page allocator, and commands on the serial port.
//!
//! It is entered as PVH has it (`qemu-system-x86_64 -kernel`), and needs the first serial port, the HPET,
//! `isa-debug-exit` at 0xf4, and a processor with pages of 1 GiB. Options on the command line: `policy=direct` or
//! `policy=linux`, and `mem=BYTES`, behind which memory is left alone.
//!
//! A command is a line of a token and words; the answer ends with a line of the token and 0, or 1 if it failed:
//!
//! | command | |
//! |---|---|
//! | `status` | what driver and page allocator have, as JSON; sizes in bytes |
//! | `load N`, `free` | takes N pages that may be moved and fills them; gives all back |
//! | `verify` | reads them all |
//! | `pin`, `unpin` | keeps the first of them that is in hotplugged memory where it is |
//! | `obstacles` | what keeps memory blocks from going offline: block, address, reason |
//! | `retry` | ends a wait of the driver |
//! | `remove`, `probe` | takes the driver away, and starts it again |
//! | `restart` | starts anew without a word to the device, as a kernel that another one has loaded |
//! | `prompt` | from now on for a person: what is typed is shown, and there are no tokens |
//! | `quit` | ends the machine |
#![no_std]
#![no_main]
extern crate alloc;

mod boot;
mod clock;
mod kernel;
mod pci;
mod ports;
mod serial;

use boot::Machine;
use clock::Clock;
use kernel::{Answer, Kernel};
use serial::Lines;
use virtio_mem_driver::driver::Policy;

/// What the host waits for.
const READY: &str = "vmem: ready";

/// What a person sees.
const PROMPT: &str = "guest> ";

#[expect(
    clippy::panic,
    reason = "a machine without what is needed has nobody to tell but the console"
)]
fn main(machine: &Machine) -> ! {
    let clock = Clock::start().expect("the machine has an HPET");
    let policy = policy(machine.command_line);
    loop {
        let mut kernel = match Kernel::boot(&machine.memory, policy, clock) {
            Ok(kernel) => kernel,
            Err(error) => panic!("{error}"),
        };
        println!("{READY}");
        let mut lines = Lines::default();
        loop {
            kernel.poll();
            let Some(line) = lines.next() else { continue };
            let (token, command) = match lines.for_people {
                true => ("", line.as_str()),
                false => line.split_once(' ').unwrap_or((&line, "")),
            };
            let failed = match kernel.execute(command) {
                Answer::Done => false,
                Answer::Failed(why) => {
                    println!("{why}");
                    true
                }
                Answer::Prompt => {
                    lines.for_people = true;
                    false
                }
                Answer::Restart => break,
                Answer::Quit => serial::exit(0),
            };
            match lines.for_people {
                true => print!("{PROMPT}"),
                false => println!("{token} {}", u8::from(failed)),
            }
        }
    }
}

#[expect(clippy::panic, reason = "as above")]
fn policy(command_line: &str) -> Policy {
    match boot::option(command_line, "policy=") {
        None | Some("direct") => Policy::default(),
        Some("linux") => Policy::linux(),
        Some(policy) => panic!("no policy {policy:?}"),
    }
}

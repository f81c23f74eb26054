//! A panic becomes a message in the mailbox and the end of the machine.

use core::panic::PanicInfo;

use vmem_guest::abi::port;
use vmem_guest::write_message;

use crate::{registers, start};

/// Says what has happened, and stops.
pub fn report(info: &PanicInfo<'_>) -> ! {
    if let Some(boot) = start::boot_info() {
        write_message(start::mailbox(boot), info);
        registers::write(boot, port::PANIC, 1);
    }
    loop {
        core::hint::spin_loop();
    }
}

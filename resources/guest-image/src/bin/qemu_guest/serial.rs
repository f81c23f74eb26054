//! The first serial port, without interrupts, and the port that ends QEMU.

use core::fmt;

use alloc::string::String;

use crate::ports;

/// COM1.
const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// `isa-debug-exit`: QEMU exits with `2 * value + 1`.
const EXIT: u16 = 0xf4;

/// The output.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while ports::read_u8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            ports::write_u8(DATA, byte);
        }
        Ok(())
    }
}

/// Writes a line.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {
        // It cannot fail.
        let _ = ::core::fmt::Write::write_fmt(&mut $crate::serial::Serial, format_args!("{}\n", format_args!($($argument)*)));
    };
}

/// The input, line by line.
#[derive(Default)]
pub(crate) struct Lines {
    partial: String,
}

impl Lines {
    /// The next line, if all of it has come.
    pub(crate) fn next(&mut self) -> Option<String> {
        while ports::read_u8(LINE_STATUS) & DATA_READY != 0 {
            match ports::read_u8(DATA) {
                b'\n' | b'\r' => return Some(core::mem::take(&mut self.partial)),
                byte => self.partial.push(byte.into()),
            }
        }
        None
    }
}

/// Ends the machine; 0 becomes exit code 1.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        ports::write_u8(EXIT, code);
    }
}

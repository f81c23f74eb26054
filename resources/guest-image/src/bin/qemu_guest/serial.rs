//! The first serial port, without interrupts, and the port that ends QEMU.

use core::fmt;

use alloc::string::String;

use crate::ports;

/// COM1.
const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

const BACKSPACE: u8 = 8;
const DELETE: u8 = 0x7f;

/// `isa-debug-exit`: QEMU exits with `2 * value + 1`.
const EXIT: u16 = 0xf4;

/// The output. Lines end with a carriage return, too, for terminals.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                write_byte(b'\r');
            }
            write_byte(byte);
        }
        Ok(())
    }
}

fn write_byte(byte: u8) {
    while ports::read_u8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
    ports::write_u8(DATA, byte);
}

/// Writes text.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {{
        // It cannot fail.
        let _ = ::core::fmt::Write::write_fmt(&mut $crate::serial::Serial, format_args!($($argument)*));
    }};
}

/// Writes a line.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {
        $crate::print!("{}\n", format_args!($($argument)*))
    };
}

/// The input, line by line.
#[derive(Default)]
pub(crate) struct Lines {
    partial: String,
    /// What is typed is shown, and can be taken back.
    pub(crate) for_people: bool,
}

impl Lines {
    /// The next line, if all of it has come.
    pub(crate) fn next(&mut self) -> Option<String> {
        while ports::read_u8(LINE_STATUS) & DATA_READY != 0 {
            let byte = ports::read_u8(DATA);
            match byte {
                b'\n' | b'\r' => {
                    self.echo("\n");
                    return Some(core::mem::take(&mut self.partial));
                }
                BACKSPACE | DELETE if self.for_people => {
                    if self.partial.pop().is_some() {
                        self.echo("\x08 \x08");
                    }
                }
                byte => {
                    self.partial.push(byte.into());
                    self.echo(char::from(byte).encode_utf8(&mut [0; 4]));
                }
            }
        }
        None
    }

    fn echo(&self, text: &str) {
        if self.for_people {
            print!("{text}");
        }
    }
}

/// Ends the machine; 0 becomes exit code 1.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        ports::write_u8(EXIT, code);
    }
}

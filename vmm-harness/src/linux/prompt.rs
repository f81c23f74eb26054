//! A person at the guest's console.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::control::Control;
use super::{LinuxError, LinuxGuest, signals};

/// Ctrl-], which leaves the console as it leaves telnet.
const LEAVE: u8 = 0x1d;

/// How long the guest is listened to before the terminal and the socket are looked at.
const TURN: Duration = Duration::from_millis(10);

/// End of input, at a terminal.
const END: u8 = 4;

/// Passes bytes between terminal and console until the guest ends or the person leaves.
pub(super) fn run(guest: &mut LinuxGuest, control: &Control) -> Result<(), LinuxError> {
    let LinuxGuest {
        qemu,
        device,
        kernel,
    } = guest;
    qemu.console.send(kernel.prompt().as_bytes())?;
    let _raw = RawTerminal::enter().map_err(LinuxError::file("/dev/stdin"))?;
    let mut input = Some(read_input());
    loop {
        match qemu.console.receive(TURN) {
            Ok(bytes) => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes)
                    .and_then(|()| out.flush())
                    .map_err(LinuxError::file("/dev/stdout"))?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        match input.as_ref().map(Receiver::try_recv) {
            Some(Ok(bytes)) if bytes.contains(&LEAVE) => return Ok(()),
            Some(Ok(bytes)) => qemu.console.send(&bytes)?,
            Some(Err(TryRecvError::Disconnected)) => {
                input = None;
                qemu.console.send(&[END])?;
            }
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        control.serve(|bytes| {
            if let Some(bytes) = bytes {
                device.resize(&mut qemu.qmp, bytes)?;
            }
            device.status(&mut qemu.qmp)
        });
        if signals::interrupted() {
            return Err(LinuxError::Interrupted);
        }
    }
}

/// What is typed. The thread is left behind in its read when the guest ends, and ends with the process.
fn read_input() -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) {
            if sender.send(bytes[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Standard input without a line editor of its own, if it is a terminal; as before in the end.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // If the terminal is gone there is nothing to put back.
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}

//! A person at the guest's console.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

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
    guest.qemu.console.send(guest.kernel.prompt().as_bytes())?;
    let _raw = RawTerminal::enter(io::stdin()).map_err(LinuxError::file("/dev/stdin"))?;
    let mut input = Some(read_input());
    loop {
        match guest.qemu.console.receive(TURN) {
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
            Some(Ok(bytes)) => guest.qemu.console.send(&bytes)?,
            Some(Err(TryRecvError::Disconnected)) => {
                input = None;
                guest.qemu.console.send(&[END])?;
            }
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        if control.serve(|command| guest.execute(command)) {
            return Ok(());
        }
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

/// A terminal without a line editor of its own, if it is one; as before in the end.
struct RawTerminal<T: AsFd> {
    terminal: T,
    before: Option<Termios>,
}

impl<T: AsFd> RawTerminal<T> {
    fn enter(terminal: T) -> io::Result<Self> {
        let before = match isatty(&terminal) {
            true => Some(tcgetattr(&terminal)?),
            false => None,
        };
        if let Some(mut raw) = before.clone() {
            raw.make_raw();
            tcsetattr(&terminal, OptionalActions::Flush, &raw)?;
        }
        Ok(Self { terminal, before })
    }
}

impl<T: AsFd> Drop for RawTerminal<T> {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // If the terminal is gone there is nothing to put back.
            let _ = tcsetattr(&self.terminal, OptionalActions::Flush, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    #[test]
    fn terminal_is_raw_for_as_long_as_the_value_lives() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let controller = openpt(flags).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let terminal = File::options().read(true).write(true).open(name).unwrap();
        let edits = || {
            let modes = tcgetattr(&terminal).unwrap().local_modes;
            let editing = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            (modes.contains(editing), modes.intersects(editing))
        };
        assert_eq!(edits(), (true, true));
        let raw = RawTerminal::enter(&terminal).unwrap();
        assert_eq!(edits(), (false, false));
        drop(raw);
        assert_eq!(edits(), (true, true));
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let file = tempfile::tempfile().unwrap();
        let raw = RawTerminal::enter(&file).unwrap();
        assert!(raw.before.is_none());
    }
}

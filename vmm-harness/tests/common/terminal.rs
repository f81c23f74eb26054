//! A real pseudo terminal with a command in it, and an emulator at the other end.
#![expect(
    unsafe_code,
    reason = "a terminal becomes a child's own between fork and exec"
)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, ioctl_tiocsctty, kill_process, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was on the terminal before.
pub(crate) const BEFORE: &[u8] = b"$ vmem";

/// A terminal with a command in it.
pub(crate) struct Terminal {
    keyboard: File,
    /// Keeps the terminal there when the command has ended.
    line: File,
    parser: Arc<Mutex<vt100::Parser>>,
    before: Termios,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

impl Terminal {
    /// Runs `command` in a terminal of that size.
    pub(crate) fn new(mut command: Command, columns: u16, rows: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let emulator = openpt(flags).unwrap();
        grantpt(&emulator).unwrap();
        unlockpt(&emulator).unwrap();
        let name = ptsname(&emulator, Vec::new())
            .unwrap()
            .into_string()
            .unwrap();
        let line = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name)
            .unwrap();
        let emulator = File::from(emulator);
        tcsetwinsize(&emulator, size(columns, rows)).unwrap();
        let before = tcgetattr(&line).unwrap();
        let mut parser = vt100::Parser::new(nonzero(rows), nonzero(columns), 0);
        parser.process(BEFORE);
        parser.process(b"\r\n");
        let parser = Arc::new(Mutex::new(parser));

        let end = || line.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end());
        command
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .env_remove("RUST_LOG");
        let become_terminal = || {
            setsid()?;
            ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        // SAFETY: two system calls, which may be made there.
        unsafe { command.pre_exec(become_terminal) };
        let child = command.spawn().unwrap();

        let screen = Arc::clone(&parser);
        let mut output = emulator.try_clone().unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error is that the other end is closed.
            while let Ok(len @ 1..) = output.read(&mut bytes) {
                screen.lock().unwrap().process(&bytes[..len]);
            }
        });
        Self {
            keyboard: emulator,
            line,
            parser,
            before,
            reader: Some(reader),
            child,
        }
    }

    /// What is on the screen.
    pub(crate) fn parser(&self) -> MutexGuard<'_, vt100::Parser> {
        self.parser.lock().unwrap()
    }

    /// The rows of the screen.
    pub(crate) fn rows(&self) -> Vec<String> {
        let parser = self.parser();
        let columns = parser.screen().size().1.get();
        parser.screen().rows(0, columns).collect()
    }

    /// Waits until `done` says so of the rows.
    pub(crate) fn until(&self, what: &str, done: impl Fn(&[String]) -> bool) {
        let start = Instant::now();
        while !done(&self.rows()) {
            let screen = self.rows().join("\n");
            assert!(start.elapsed() < PATIENCE, "not there: {what}\n{screen}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a row has `text`.
    pub(crate) fn until_shown(&self, text: &str) {
        self.until(text, |rows| rows.iter().any(|row| row.contains(text)));
    }

    /// Types.
    pub(crate) fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Makes the terminal as large.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        self.parser()
            .screen_mut()
            .set_size(nonzero(rows), nonzero(columns));
        tcsetwinsize(&self.keyboard, size(columns, rows)).unwrap();
    }

    /// Sends a signal to the command.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The command has the whole screen and every key.
    pub(crate) fn assert_taken(&self) {
        assert!(self.parser().screen().alternate_screen());
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        assert!(
            !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
            "{modes:?}"
        );
    }

    /// Waits for the end of the command; the terminal must then be as it was. What is on it, and the exit code.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "it does not end:\n{}",
                self.rows().join("\n")
            );
            thread::sleep(Duration::from_millis(10));
        };
        let after = tcgetattr(&self.line).unwrap();
        assert_eq!(
            format!("{after:?}"),
            format!("{:?}", self.before),
            "modes are not restored"
        );
        // Its last user: all that was written is read before the reader is told of the end.
        let Self {
            line,
            parser,
            reader,
            ..
        } = &mut self;
        *line = File::open("/dev/null").unwrap();
        reader.take().unwrap().join().unwrap();
        let parser = parser.lock().unwrap();
        let screen = parser.screen();
        assert!(!screen.alternate_screen(), "still on the alternate screen");
        assert!(!screen.hide_cursor(), "the cursor is hidden");
        let contents = screen.contents();
        assert!(contents.as_bytes().starts_with(BEFORE), "{contents}");
        (status.code(), contents)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A test that has failed leaves none behind; one that has ended is not there to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nonzero(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

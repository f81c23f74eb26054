//! What it does to a terminal: a real pseudo terminal, with an emulator at the other end, and a live `vmem run`.
#![expect(
    unsafe_code,
    reason = "a terminal becomes a child's own between fork and exec"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::num::NonZeroU16;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, ioctl_tiocsctty, kill_process, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use tempfile::TempDir;
use vmm_harness::watch::with_screen;

use crate::running::{Running, output, vmem};
use crate::svg::svg;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was on the terminal before.
const BEFORE: &[u8] = b"$ vmem watch";

/// A terminal with a command in it.
struct Terminal {
    keyboard: File,
    /// Keeps the terminal there when the command has ended.
    line: File,
    parser: Arc<Mutex<vt100::Parser>>,
    before: Termios,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

impl Terminal {
    fn new(mut command: Command, columns: u16, rows: u16) -> Self {
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

    fn watch(socket: &Path) -> Self {
        let socket = socket.to_str().unwrap();
        Self::new(
            vmem(&["watch", "--interval", "50ms", "--api-sock", socket]),
            80,
            24,
        )
    }

    fn parser(&self) -> MutexGuard<'_, vt100::Parser> {
        self.parser.lock().unwrap()
    }

    /// The rows of the screen.
    fn rows(&self) -> Vec<String> {
        let parser = self.parser();
        let columns = parser.screen().size().1.get();
        parser.screen().rows(0, columns).collect()
    }

    fn until(&self, what: &str, done: impl Fn(&[String]) -> bool) {
        let start = Instant::now();
        while !done(&self.rows()) {
            let screen = self.rows().join("\n");
            assert!(start.elapsed() < PATIENCE, "not there: {what}\n{screen}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn until_shown(&self, text: &str) {
        self.until(text, |rows| rows.iter().any(|row| row.contains(text)));
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.parser()
            .screen_mut()
            .set_size(nonzero(rows), nonzero(columns));
        tcsetwinsize(&self.keyboard, size(columns, rows)).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn assert_taken(&self) {
        assert!(self.parser().screen().alternate_screen());
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        assert!(
            !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
            "{modes:?}"
        );
    }

    /// Waits for the end of the command; the terminal must then be as it was. What is on it, and the exit code.
    fn end(mut self) -> (Option<i32>, String) {
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

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm.sock");
    (folder, socket)
}

fn vmem_resize(socket: &Path, size: &str) {
    let (code, _, stderr) = output(&[
        "resize",
        size,
        "--wait",
        "--api-sock",
        socket.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn live_guest_is_shown_and_the_terminal_is_given_back() {
    let (_folder, socket) = folder();
    let running = Running::start(&socket, &["--size", "64M"]);
    let mut terminal = Terminal::watch(&socket);
    terminal.until_shown(" plugged 64 MiB ");
    terminal.assert_taken();
    vmem_resize(&socket, "256M");
    terminal.until("256 MiB everywhere", |rows| {
        rows[1].contains("requested 256 MiB ")
            && rows[1].contains(" plugged 256 MiB ")
            && rows[1].contains(" online 256 MiB ")
    });
    terminal.until_shown("the size is there");
    terminal.until_shown("resize 1 to 256 MiB: settled");
    // 128 blocks of 2 MiB, 8 in a cell, all in Movable; it happens that a page is pinned for a moment.
    terminal.until_shown(&format!("0x100000000 {}....", "█".repeat(16)));
    terminal.until("requests", |rows| {
        rows.iter()
            .any(|row| row.starts_with("│plug ack") && !row.contains(" 0 "))
    });

    // From within.
    terminal.press(b"r128M");
    terminal.until_shown("resize to: 128M_");
    terminal.press(b"\r");
    terminal.until_shown(" plugged 128 MiB ");
    terminal.press(b"r64T\r");
    terminal.until("a refusal", |rows| rows[23].contains("exceed the region"));

    // It follows the terminal's size.
    terminal.resize(120, 40);
    terminal.until("the 40th row", |rows| {
        rows[39].contains("exceed the region")
    });
    terminal.press(b" ");
    terminal.until("all keys on the last row", |rows| {
        rows[39].trim_end() == "q quit   r resize"
    });
    terminal.resize(40, 10);
    terminal.until("fewer panels", |rows| rows[9].contains("no room: blocks,"));
    terminal.resize(30, 10);
    terminal.until_shown("too small: 40 x 10 at least");

    terminal.press(b"q");
    let (code, contents) = terminal.end();
    assert_eq!((code, contents.as_bytes()), (Some(0), BEFORE));
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn interrupts_and_signals_end_it_as_q_does() {
    let (_folder, socket) = folder();
    let running = Running::start(&socket, &[]);
    let ends: [&dyn Fn(&mut Terminal); 3] = [
        &|terminal| terminal.press(b"\x03"),
        &|terminal| terminal.signal(Signal::TERM),
        &|terminal| terminal.signal(Signal::INT),
    ];
    for end in ends {
        let mut terminal = Terminal::watch(&socket);
        terminal.until_shown(" plugged 0 B ");
        terminal.assert_taken();
        end(&mut terminal);
        let (code, contents) = terminal.end();
        assert_eq!((code, contents.as_bytes()), (Some(0), BEFORE));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn server_that_goes_is_looked_for_and_found() {
    let (_folder, socket) = folder();
    let running = Running::start(&socket, &["--size", "64M"]);
    let mut terminal = Terminal::watch(&socket);
    terminal.until_shown(" plugged 64 MiB ");
    running.signal(Signal::KILL);
    assert_eq!(running.end().0, None);
    terminal.until_shown("NO SERVER for ");
    terminal.until_shown("nobody serves");
    let running = Running::start(&socket, &["--size", "32M"]);
    terminal.until_shown(" plugged 32 MiB ");
    terminal.until_shown("the server is back");
    // And so is its event stream.
    vmem_resize(&socket, "96M");
    terminal.until_shown("resize 1 to 96 MiB: settled");
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
    terminal.until_shown("NO SERVER for ");
    terminal.press(b"q");
    let (code, contents) = terminal.end();
    assert_eq!(code, Some(1));
    assert!(contents.contains("the server is gone: "), "{contents}");
}

#[test]
fn guest_that_is_not_started_has_no_blocks_yet() {
    let (_folder, socket) = folder();
    let running = Running::start(&socket, &["--no-start", "--size", "64M"]);
    let mut terminal = Terminal::watch(&socket);
    terminal.until_shown("Not started");
    terminal.until_shown("the guest is not started");
    terminal.until_shown(" blocks: none yet ");
    terminal.press(b"q");
    assert_eq!(terminal.end().0, Some(0));
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn what_it_cannot_watch_or_draw_on_is_an_error_before_the_terminal_is_taken() {
    let (_folder, socket) = folder();
    let terminal = Terminal::watch(&socket);
    let (code, contents) = terminal.end();
    assert_eq!(code, Some(1));
    assert!(contents.contains("nobody serves"), "{contents}");

    let running = Running::start(&socket, &[]);
    let (code, stdout, stderr) = output(&["watch", "--api-sock", socket.to_str().unwrap()]);
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(
        stderr.contains("must be a terminal") && stderr.contains("`vmem status`"),
        "{stderr}"
    );
    for (interval, right) in [
        ("49ms", false),
        ("2h", false),
        ("soon", false),
        ("50ms", true),
        ("1h", true),
    ] {
        let (code, _, stderr) = output(&[
            "watch",
            "--interval",
            interval,
            "--api-sock",
            socket.to_str().unwrap(),
        ]);
        assert_eq!(code, 2);
        assert_eq!(stderr.contains("must be a terminal"), right, "{stderr}");
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

/// This program once more, in a terminal, for one of the tests below that take it.
fn in_terminal(test: &str) -> (Option<i32>, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        test,
        "--ignored",
        "--nocapture",
        "--test-threads=1",
    ]);
    command.env("RUST_BACKTRACE", "0");
    Terminal::new(command, 80, 24).end_after_taking()
}

impl Terminal {
    /// As [`end`](Self::end), for a command that says nothing else of having taken the terminal.
    fn end_after_taking(self) -> (Option<i32>, String) {
        self.until("the picture", |rows| rows[0].starts_with("taken"));
        self.assert_taken();
        self.signal(Signal::USR1);
        self.end()
    }
}

#[test]
fn panic_and_error_give_the_terminal_back_and_can_be_read() {
    let (code, contents) = in_terminal("terminal::panics_on_the_screen");
    assert_eq!(code, Some(101));
    assert!(contents.contains("a bug in drawing"), "{contents}");
    let (code, contents) = in_terminal("terminal::fails_on_the_screen");
    assert_eq!(code, Some(101));
    assert!(contents.contains("the disk is full"), "{contents}");
}

/// Draws a word, and waits until it was looked at.
fn take(terminal: &mut ratatui::DefaultTerminal) -> io::Result<()> {
    let seen = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let usr1 = signal_hook::consts::SIGUSR1;
    signal_hook::flag::register(usr1, Arc::clone(&seen))?;
    terminal.draw(|frame| frame.render_widget("taken", frame.area()))?;
    while !seen.load(std::sync::atomic::Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
#[ignore = "a part of panic_and_error_give_the_terminal_back_and_can_be_read, which runs it in a terminal"]
fn panics_on_the_screen() {
    let _: io::Result<()> = with_screen(|terminal| {
        take(terminal)?;
        panic!("a bug in drawing");
    });
}

#[test]
#[ignore = "a part of panic_and_error_give_the_terminal_back_and_can_be_read, which runs it in a terminal"]
fn fails_on_the_screen() {
    let failed: io::Result<()> = with_screen(|terminal| {
        take(terminal)?;
        Err(io::Error::other("the disk is full"))
    });
    failed.unwrap();
}

/// Writes the pictures of the documentation.
#[test]
#[ignore = "writes docs/watch.svg and a part of docs/operating.md, from a guest that works for some seconds"]
fn capture() {
    let (folder, socket) = folder();
    let mut command = vmem(&["run", "--size", "1G", "--region", "4G", "--api-sock"]);
    let running = Running::listening(command.arg(&socket));
    let socket_name = socket.to_str().unwrap();
    let mut command = vmem(&["watch", "--interval", "200ms", "--api-sock", "vm.sock"]);
    command.current_dir(folder.path());
    let mut terminal = Terminal::new(command, 80, 24);
    let pause = |seconds| thread::sleep(Duration::from_secs(seconds));
    pause(3);
    vmem_resize(&socket, "3G");
    pause(4);
    vmem_resize(&socket, "640M");
    pause(3);
    assert_eq!(output(&["freeze", "--api-sock", socket_name]).0, 0);
    assert_eq!(output(&["resize", "2G", "--api-sock", socket_name]).0, 0);
    terminal.until_shown("the device is frozen");
    pause(1);
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    fs::write(docs.join("watch.svg"), svg(terminal.parser().screen())).unwrap();
    let page = docs.join("operating.md");
    let text = fs::read_to_string(&page).unwrap();
    let (head, rest) = text.split_once("<!-- vmem watch -->\n```\n").unwrap();
    let (_, tail) = rest.split_once("```\n").unwrap();
    let screen = terminal.rows().join("\n");
    let text = format!("{head}<!-- vmem watch -->\n```\n{screen}\n```\n{tail}");
    fs::write(page, text).unwrap();
    assert_eq!(output(&["thaw", "--api-sock", socket_name]).0, 0);
    terminal.press(b"q");
    assert_eq!(terminal.end().0, Some(0));
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

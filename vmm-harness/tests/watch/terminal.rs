//! What it does to a terminal: a real pseudo terminal, with an emulator at the other end, and a live `vmem run`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use vmm_harness::watch::with_screen;

use crate::pty::{BEFORE, Terminal};
use crate::running::{Running, output, vmem};
use crate::svg::svg;

fn watch(socket: &Path) -> Terminal {
    let socket = socket.to_str().unwrap();
    Terminal::new(
        vmem(&["watch", "--interval", "50ms", "--api-sock", socket]),
        80,
        24,
    )
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
    let mut terminal = watch(&socket);
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
        rows.iter().any(|row| {
            let mut words = row.split_whitespace();
            words.by_ref().take(2).eq(["│plug", "ack"])
                && words.next().is_some_and(|count| count != "0")
        })
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
        let mut terminal = watch(&socket);
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
    let mut terminal = watch(&socket);
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
    let mut terminal = watch(&socket);
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
    let terminal = watch(&socket);
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
    end_after_taking(Terminal::new(command, 80, 24))
}

/// As [`Terminal::end`], for a command that says nothing else of having taken the terminal.
fn end_after_taking(terminal: Terminal) -> (Option<i32>, String) {
    terminal.until("the picture", |rows| rows[0].starts_with("taken"));
    terminal.assert_taken();
    terminal.signal(Signal::USR1);
    terminal.end()
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

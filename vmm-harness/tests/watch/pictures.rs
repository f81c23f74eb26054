//! What is drawn, cell by cell, without a terminal.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Color;
use serde_json::json;
use vmm_harness::watch::{Blocks, Guest, Memory, Requests, Run, Update, View, draw};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn picture(view: &View, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, view)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let rows = buffer
        .content()
        .chunks(usize::from(buffer.area.width).max(1));
    rows.map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect())
        .collect()
}

/// Compares with the file of that name; `VMEM_BLESS=1` writes it.
fn assert_picture(name: &str, buffer: &Buffer) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/watch/{name}.txt"));
    let drawn = lines(buffer).join("\n") + "\n";
    if std::env::var_os("VMEM_BLESS").is_some() {
        fs::write(&path, &drawn).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    let differ = drawn
        .lines()
        .zip(expected.lines())
        .position(|(drawn, expected)| drawn != expected);
    assert!(
        drawn == expected,
        "{name} differs in row {differ:?}:\n{drawn}\nexpected:\n{expected}"
    );
}

fn run(first: u64, count: u64) -> Run {
    Run { first, count }
}

fn requests(request: &str, answer: &str, count: u64, p50_ns: u64, p99_ns: u64) -> Requests {
    Requests {
        request: request.into(),
        answer: answer.into(),
        count,
        p50_ns,
        p99_ns,
    }
}

/// A guest of 4 GiB in blocks of 2 MiB.
fn memory(
    requested: u64,
    plugged: u64,
    online: u64,
    resident: u64,
    requests: Vec<Requests>,
) -> Memory {
    Memory {
        requested_size: requested,
        plugged_size: plugged,
        resident_size: resident,
        total_size: 4 * GIB,
        state: "Running".into(),
        reason: (requested != plugged).then(|| "memory_in_use".into()),
        guest: Some(Guest {
            driver_state: Some("stalled".into()),
            online_size: online,
            pages_moved: 123_456,
            pages_wrong: 0,
        }),
        requests,
        ..Memory::default()
    }
}

/// Twenty seconds in which the guest grew to 3 GiB and shrinks to 1 GiB, which it cannot for now.
fn busy(colours: bool) -> View {
    let mut view = View::new("/run/vm.sock", colours);
    let at = Duration::from_millis;
    for look in 0..40 {
        let plugs = requests("plug", "ack", 3 + look, 900_000, 12_000_000);
        let unplugs = requests("unplug", "ack", 100 * look, 350_000, 1_800_000);
        let busy = requests("unplug", "busy", 17, 4_200, 9_900);
        let (requested, plugged, resident) = match look {
            0..10 => (GIB, GIB, look * 50 * MIB),
            10..15 => (3 * GIB, GIB + (look - 9) * 400 * MIB, 600 * MIB),
            15..25 => (3 * GIB, 3 * GIB, 600 * MIB + (look - 15) * 80 * MIB),
            _ => (GIB, 3 * GIB - (look - 24) * 64 * MIB, 1400 * MIB),
        };
        let online = plugged - plugged / 16;
        let list = match look {
            0..25 => vec![plugs],
            _ => vec![plugs, unplugs, busy],
        };
        let memory = memory(requested, plugged, online, resident, list);
        view.apply(at(500 * look), Update::Memory(Box::new(memory)));
    }
    for (millis, event) in [
        (
            4_900,
            json!({"event": "operation", "id": 1, "requested_size": 3 * GIB, "state": "converging"}),
        ),
        (
            7_400,
            json!({"event": "operation", "id": 1, "requested_size": 3 * GIB, "state": "settled"}),
        ),
        (
            12_400,
            json!({"event": "operation", "id": 2, "requested_size": GIB, "state": "converging"}),
        ),
        (13_000, json!({"event": "refused", "answer": "busy"})),
        (
            19_500,
            json!({"event": "sizes", "plugged_size": 2 * GIB, "requested_size": GIB}),
        ),
    ] {
        view.apply(at(millis), Update::Event(event));
    }
    view.apply(
        at(19_500),
        Update::Blocks(Some(Blocks {
            address: 4 * GIB,
            block_size: 2 * MIB,
            // 512 plugged, 64 that the driver does not know of yet, 448 plugged in every second, and none.
            blocks: "#".repeat(512) + &"-".repeat(64) + &"#.".repeat(224) + &".".repeat(1024),
            guest_online: vec![run(16, 1008)],
            guest_movable: vec![run(64, 448)],
            guest_pinned: vec![run(64, 1), run(128, 8), run(600, 1)],
        })),
    );
    view
}

#[test]
fn everything_is_on_80x24() {
    let view = busy(true);
    assert_picture("80x24", &picture(&view, 80, 24));
}

#[test]
fn larger_terminal_shows_more_of_it() {
    assert_picture("120x40", &picture(&busy(true), 120, 40));
}

#[test]
fn smaller_terminals_drop_events_requests_and_blocks_in_this_order_and_say_so() {
    let view = busy(true);
    assert_picture("40x10", &picture(&view, 40, 10));
    for (width, height, hidden) in [
        (80, 17, ""),
        (79, 24, "no room: events"),
        (79, 18, "no room: events"),
        (79, 17, "no room: requests, events"),
        (80, 16, "no room: requests, events"),
        (80, 13, "no room: requests, events"),
        (80, 12, "no room: blocks, requests, events"),
    ] {
        let lines = lines(&picture(&view, width, height));
        let keys = lines.last().unwrap();
        assert!(keys.starts_with("q quit   r resize"), "{keys}");
        assert_eq!(
            keys.trim_end()
                .trim_start_matches("q quit   r resize")
                .trim(),
            hidden,
            "{width}x{height}"
        );
        let titles = [
            " 2048 blocks of 2 MiB",
            " requests ",
            " events, the last first ",
        ];
        let names = ["blocks", "requests", "events"];
        for (title, name) in titles.into_iter().zip(names) {
            let shown = lines.iter().any(|line| line.contains(title));
            assert_eq!(shown, !hidden.contains(name), "{width}x{height}: {name}");
        }
    }
    assert_eq!(
        lines(&picture(&view, 39, 10))[..2],
        [
            "too small: 40 x 10 at least            ",
            "q quit                                 "
        ]
    );
    assert!(lines(&picture(&view, 200, 9))[0].starts_with("too small"));
}

#[test]
fn every_size_can_be_drawn() {
    let mut views = [View::new("vm.sock", true), busy(true), busy(false)];
    views[2].apply(Duration::MAX, Update::Lost("gone".into()));
    for view in &views {
        for (width, height) in (1..140)
            .step_by(3)
            .flat_map(|w| (1..60).map(move |h| (w, h)))
        {
            let lines = lines(&picture(view, width, height));
            assert_eq!(lines.len(), usize::from(height));
            // Until there is no room even for that.
            if width >= 6 && height >= 2 {
                assert!(
                    lines.iter().any(|line| line.contains("q quit")),
                    "{width}x{height}"
                );
            }
        }
    }
}

#[test]
fn nothing_is_said_by_colour_alone() {
    let (plain, coloured) = (picture(&busy(false), 80, 24), picture(&busy(true), 80, 24));
    assert_eq!(lines(&plain), lines(&coloured));
    let colours = |buffer: &Buffer| -> BTreeSet<String> {
        buffer
            .content()
            .iter()
            .map(|cell| format!("{:?}", cell.fg))
            .collect()
    };
    assert_eq!(
        colours(&plain),
        BTreeSet::from([format!("{:?}", Color::Reset)])
    );
    assert!(colours(&coloured).len() > 6, "{:?}", colours(&coloured));
}

#[test]
fn nothing_is_known_at_first() {
    let lines = lines(&picture(&View::new("vm.sock", true), 80, 24));
    assert!(lines[0].starts_with("vmem watch vm.sock ") && lines[0].ends_with(" connecting"));
    assert_eq!(
        lines[1].trim_end(),
        "requested ?           plugged ?           online ?           resident ?"
    );
    assert!(lines.iter().any(|line| line.contains(" blocks: none yet ")));
}

#[test]
fn server_that_is_gone_is_named_and_what_was_known_stays() {
    let mut view = busy(true);
    let since = Duration::from_secs(20);
    view.apply(since, Update::Lost("nobody serves there".into()));
    view.apply(
        since + Duration::from_secs(12),
        Update::Lost("nobody serves there".into()),
    );
    let buffer = picture(&view, 80, 24);
    let lines = lines(&buffer);
    assert!(
        lines[0].ends_with(" NO SERVER for 12s, looking for it"),
        "{}",
        lines[0]
    );
    assert_eq!(buffer[(79, 0)].fg, Color::Red);
    assert_eq!(lines[23].trim_end(), "q quit   nobody serves there");
    assert!(lines[1].starts_with("requested 1 GiB "), "{}", lines[1]);
    assert!(
        lines
            .iter()
            .any(|line| line.contains(" 12s the server is gone ")),
        "{lines:#?}"
    );
}

#[test]
fn prompt_and_what_it_led_to_are_on_the_last_line() {
    let mut view = busy(true);
    for c in "r2G".chars() {
        view.input(&Event::Key(KeyEvent::new(
            KeyCode::Char(c),
            KeyModifiers::NONE,
        )));
    }
    let last = |view: &View| lines(&picture(view, 80, 24)).pop().unwrap();
    assert_eq!(
        last(&view).trim_end(),
        "resize to: 2G_   Enter asks for it, Esc does not"
    );
    view.input(&Event::Key(KeyEvent::new(
        KeyCode::Enter,
        KeyModifiers::NONE,
    )));
    view.apply(
        Duration::from_secs(30),
        Update::Message("too large: ".to_owned() + &"x".repeat(200)),
    );
    let last = last(&view);
    assert!(
        last.starts_with("too large: xxx") && last.ends_with("xx…"),
        "{last}"
    );
}

/// Whatever a server or a guest writes, no cell has anything in it that moves a cursor, and each row is as wide as it
/// was.
#[test]
fn hostile_text_stays_in_its_place() {
    let hostile = "\x1b[2J\x1b]0;owned\x07\u{9b}31m\r\n\u{202e}\u{200d}";
    let mut view = View::new(hostile, true);
    let mut memory = memory(
        GIB,
        GIB,
        GIB,
        u64::MAX,
        vec![requests(hostile, hostile, u64::MAX, u64::MAX, 0)],
    );
    memory.state = hostile.into();
    memory.reason = Some(hostile.into());
    memory.guest.as_mut().unwrap().driver_state = Some(hostile.into());
    memory.guest.as_mut().unwrap().pages_wrong = 5;
    view.apply(Duration::ZERO, Update::Memory(Box::new(memory)));
    for event in [
        json!({"event": "ended", "outcome": hostile}),
        json!({"event": hostile}),
        json!({"event": "operation", "id": hostile, "state": hostile}),
    ] {
        view.apply(Duration::ZERO, Update::Event(event));
    }
    view.apply(
        Duration::ZERO,
        Update::Blocks(Some(Blocks {
            address: u64::MAX,
            block_size: u64::MAX,
            blocks: hostile.into(),
            guest_online: vec![run(0, u64::MAX)],
            ..Blocks::default()
        })),
    );
    view.apply(Duration::ZERO, Update::Message(hostile.into()));
    let clean = picture(&view, 80, 24);
    view.input(&Event::Key(KeyEvent::new(KeyCode::Esc, KeyModifiers::NONE)));
    view.apply(Duration::ZERO, Update::Lost(hostile.into()));
    for buffer in [clean, picture(&view, 80, 24)] {
        for cell in buffer.content() {
            let symbol = cell.symbol();
            assert_eq!(symbol.chars().count(), 1, "{symbol:?}");
            assert!(
                !symbol.contains(['\u{202e}', '\u{200d}']) && !symbol.contains(char::is_control),
                "{symbol:?}"
            );
        }
        let lines = lines(&buffer);
        // What was there is to be seen, as characters.
        assert!(
            lines[0].contains("\u{fffd}[2J\u{fffd}]0;owned\u{fffd}"),
            "{}",
            lines[0]
        );
        assert!(
            lines[2].contains("; 5 PAGES WRONG; driver \u{fffd}[2J"),
            "{}",
            lines[2]
        );
        assert!(
            lines
                .iter()
                .any(|line| line.contains("0s the guest has ended: \u{fffd}[2J")),
            "{lines:#?}"
        );
    }
}

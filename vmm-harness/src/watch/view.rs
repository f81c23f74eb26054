//! What is known of the guest, and what an answer of the server or a key changes about it.

use std::collections::VecDeque;
use std::time::Duration;

use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Deserialize;
use serde_json::Value;

use super::blocks::{BlockMap, Blocks};
use crate::demo::size as size_text;
use crate::parse_size;
use crate::text::clean;

/// Looks that are remembered: more than the widest terminal has columns.
const MAX_SAMPLES: usize = 1024;

/// Events that are remembered: more than the highest terminal has lines.
const MAX_EVENTS: usize = 256;

/// What a rate is taken over.
const RATE_TIME: Duration = Duration::from_secs(5);

/// What `GET /hotplug/memory` answers, as far as it is drawn. Sizes are bytes.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Memory {
    /// The device.
    #[serde(default)]
    pub id: String,
    /// What the driver is asked to have plugged.
    pub requested_size: u64,
    /// What is plugged.
    pub plugged_size: u64,
    /// Host memory behind the region.
    pub resident_size: u64,
    /// The region.
    pub total_size: u64,
    /// Whether requests are held off.
    pub frozen: bool,
    /// Where the guest is in its life.
    pub state: String,
    /// Why the size is not there.
    pub reason: Option<String>,
    /// What the guest says of itself.
    pub guest: Option<Guest>,
    /// What the device has answered.
    #[serde(default)]
    pub requests: Vec<Requests>,
}

/// What the guest says of itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Guest {
    /// What its driver makes of the target.
    pub driver_state: Option<String>,
    /// Bytes of hotplugged memory its page allocator works with.
    pub online_size: u64,
    /// Pages it has moved out of memory that was being unplugged.
    pub pages_moved: u64,
    /// Pages read back and found wrong.
    pub pages_wrong: u64,
}

/// Requests of one type with one answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Requests {
    /// The type.
    pub request: String,
    /// The answer.
    pub answer: String,
    /// Number of them.
    pub count: u64,
    /// Half of them took no longer; nanoseconds.
    pub p50_ns: u64,
    /// All but one in a hundred took no longer; nanoseconds.
    pub p99_ns: u64,
}

/// Something that was found out.
#[derive(Debug)]
pub enum Update {
    /// The memory as it is now.
    Memory(Box<Memory>),
    /// The blocks; `None` if there are none yet.
    Blocks(Option<Blocks>),
    /// Something has happened.
    Event(Value),
    /// Something that was asked for here was not done.
    Message(String),
    /// The server does not answer, and why.
    Lost(String),
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Watch no longer.
    End,
    /// Ask for another size, in bytes.
    Resize(u64),
}

/// One look, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) at: Duration,
    pub(super) requested: u64,
    pub(super) plugged: u64,
    pub(super) online: u64,
    pub(super) resident: u64,
}

/// All that is drawn. Times count from when watching began.
#[derive(Clone, Debug)]
pub struct View {
    pub(super) socket: String,
    pub(super) colours: bool,
    pub(super) now: Duration,
    pub(super) memory: Option<Memory>,
    pub(super) samples: VecDeque<Sample>,
    pub(super) blocks: Option<BlockMap>,
    pub(super) events: VecDeque<(Duration, String)>,
    /// Counts of requests at looks of the last while, the oldest first.
    counts: VecDeque<(Duration, Vec<Requests>)>,
    /// Since when the server does not answer, and why.
    pub(super) lost: Option<(Duration, String)>,
    /// What is being typed.
    pub(super) prompt: Option<String>,
    pub(super) message: Option<String>,
}

impl View {
    /// Nothing is known yet of the guest behind `socket`.
    #[must_use]
    pub fn new(socket: &str, colours: bool) -> Self {
        Self {
            socket: clean(socket),
            colours,
            now: Duration::ZERO,
            memory: None,
            samples: VecDeque::new(),
            blocks: None,
            events: VecDeque::new(),
            counts: VecDeque::new(),
            lost: None,
            prompt: None,
            message: None,
        }
    }

    /// Why the server does not answer, if it does not.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_ref().map(|(_, reason)| reason.as_str())
    }

    /// Takes note of something found out at `now`.
    pub fn apply(&mut self, now: Duration, update: Update) {
        self.now = now;
        match update {
            Update::Memory(memory) => self.look(*memory),
            Update::Blocks(blocks) => self.blocks = blocks.as_ref().map(BlockMap::from),
            Update::Event(event) => {
                let text = event_text(&event);
                match event["device"].as_str().filter(|id| self.is_other(id)) {
                    Some(other) => self.event(&format!("{other}: {text}")),
                    None => self.event(&text),
                }
            }
            Update::Message(message) => self.message = Some(clean(&message)),
            Update::Lost(reason) => {
                if self.lost.is_none() {
                    self.event("the server is gone");
                }
                let since = self.lost.as_ref().map_or(now, |(since, _)| *since);
                self.lost = Some((since, clean(&reason)));
            }
        }
    }

    fn look(&mut self, memory: Memory) {
        if self.lost.take().is_some() {
            self.event("the server is back");
            // It may be another one, which counts from 0.
            self.counts.clear();
        }
        push(
            &mut self.samples,
            MAX_SAMPLES,
            Sample {
                at: self.now,
                requested: memory.requested_size,
                plugged: memory.plugged_size,
                online: memory.guest.as_ref().map_or(0, |guest| guest.online_size),
                resident: memory.resident_size,
            },
        );
        self.counts.push_back((self.now, memory.requests.clone()));
        // One from before that time stays, to count from.
        while let Some((next, _)) = self.counts.get(1)
            && self.now.saturating_sub(*next) >= RATE_TIME
        {
            self.counts.pop_front();
        }
        self.memory = Some(memory);
    }

    /// Whether a device is another than the one that is watched.
    fn is_other(&self, device: &str) -> bool {
        self.memory
            .as_ref()
            .is_none_or(|memory| memory.id != device)
    }

    fn event(&mut self, text: &str) {
        push(&mut self.events, MAX_EVENTS, (self.now, clean(text)));
    }

    /// Requests like `requests` in the last while, and how long that was.
    pub(super) fn recent(&self, requests: &Requests) -> (u64, Duration) {
        let Some((since, counts)) = self.counts.front() else {
            return (0, Duration::ZERO);
        };
        let same = |other: &&Requests| {
            (&other.request, &other.answer) == (&requests.request, &requests.answer)
        };
        let before = counts.iter().find(same).map_or(0, |other| other.count);
        let looked = self.counts.back().map_or(*since, |(at, _)| *at);
        (
            requests.count.saturating_sub(before),
            looked.saturating_sub(*since),
        )
    }

    /// What a key, or something else the terminal tells, is for. All of it is followed by drawing.
    pub fn input(&mut self, event: &Event) -> Option<Action> {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.key(*key),
            _ => None,
        }
    }

    fn key(&mut self, key: KeyEvent) -> Option<Action> {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Some(Action::End);
        }
        let Some(mut typed) = self.prompt.take() else {
            self.message = None;
            match key.code {
                KeyCode::Char('q') => return Some(Action::End),
                KeyCode::Char('r') => self.prompt = Some(String::new()),
                _ => {}
            }
            return None;
        };
        match key.code {
            KeyCode::Esc => return None,
            KeyCode::Enter => match parse_size(&typed) {
                Ok(size) => return Some(Action::Resize(size)),
                Err(_) => self.message = Some(format!("{typed:?} is no size; 512M, 2G are")),
            },
            KeyCode::Backspace => {
                typed.pop();
                self.prompt = Some(typed);
            }
            KeyCode::Char(c) if (c.is_ascii_alphanumeric() || c == '.') && typed.len() < 20 => {
                typed.push(c);
                self.prompt = Some(typed);
            }
            _ => self.prompt = Some(typed),
        }
        None
    }
}

fn push<T>(list: &mut VecDeque<T>, max: usize, item: T) {
    if list.len() == max {
        list.pop_front();
    }
    list.push_back(item);
}

/// An event in words. One that is not known is shown as it came.
fn event_text(event: &Value) -> String {
    let bytes = |field: &str| size_text(event[field].as_u64().unwrap_or(0));
    let text = |field: &str| event[field].as_str().unwrap_or("unknown").to_owned();
    match event["event"].as_str() {
        Some("started") => "the guest runs".to_owned(),
        Some("ended") => format!("the guest has ended: {}", text("outcome")),
        Some("sizes") => format!(
            "{} of {} plugged",
            bytes("plugged_size"),
            bytes("requested_size")
        ),
        Some("operation") => format!(
            "resize {} to {}: {}",
            event["id"],
            bytes("requested_size"),
            text("state")
        ),
        Some("refused") => format!("the driver was answered {}", text("answer").to_uppercase()),
        Some("frozen") => "frozen".to_owned(),
        Some("thawed") => "thawed".to_owned(),
        Some("failed") => format!("the device has failed: {}", text("reason")),
        Some("missed") => format!("{} events were missed", event["count"]),
        _ => event.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn press(view: &mut View, code: KeyCode) -> Option<Action> {
        view.input(&Event::Key(KeyEvent::new(code, KeyModifiers::NONE)))
    }

    fn type_in(view: &mut View, text: &str) {
        for c in text.chars() {
            assert_eq!(press(view, KeyCode::Char(c)), None);
        }
    }

    fn plugs(count: u64) -> Update {
        let requests = Requests {
            request: "plug".into(),
            answer: "ack".into(),
            count,
            p50_ns: 0,
            p99_ns: 0,
        };
        Update::Memory(Box::new(Memory {
            requests: vec![requests],
            ..Memory::default()
        }))
    }

    fn recent(view: &View) -> (u64, Duration) {
        view.recent(&view.memory.as_ref().unwrap().requests[0])
    }

    #[test]
    fn rates_are_of_the_last_seconds_and_begin_anew_with_a_new_server() {
        let mut view = View::new("vm.sock", false);
        for (millis, count) in [(0, 10), (1_000, 15), (4_000, 20)] {
            view.apply(at(millis), plugs(count));
        }
        assert_eq!(recent(&view), (10, at(4_000)));
        view.apply(at(6_500), plugs(21));
        assert_eq!(recent(&view), (6, at(5_500)));
        view.apply(at(60_000), plugs(22));
        assert_eq!(recent(&view), (1, at(53_500)));
        view.apply(at(61_000), Update::Lost("gone".into()));
        view.apply(at(62_000), plugs(2));
        assert_eq!(recent(&view), (0, at(0)));
        view.apply(at(63_000), plugs(3));
        assert_eq!(recent(&view), (1, at(1_000)));
    }

    #[test]
    fn server_that_goes_and_comes_back_is_told_of_once_each() {
        let mut view = View::new("vm.sock", false);
        view.apply(at(0), plugs(0));
        assert_eq!(view.lost(), None);
        for second in 1..4 {
            view.apply(at(1_000 * second), Update::Lost("refused\n".into()));
        }
        assert_eq!(view.lost, Some((at(1_000), "refused\u{fffd}".into())));
        view.apply(at(5_000), plugs(0));
        assert_eq!(view.lost(), None);
        let events: Vec<_> = view
            .events
            .iter()
            .map(|(at, text)| (at.as_secs(), text.as_str()))
            .collect();
        assert_eq!(
            events,
            [(1, "the server is gone"), (5, "the server is back")]
        );
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let mut view = View::new("vm.sock", false);
        for second in 0..5_000 {
            view.apply(at(1_000 * second), plugs(second));
            view.apply(
                at(1_000 * second),
                Update::Event(json!({"event": "frozen"})),
            );
        }
        assert_eq!(
            (view.samples.len(), view.events.len()),
            (MAX_SAMPLES, MAX_EVENTS)
        );
        assert_eq!(view.samples.back().unwrap().at, at(4_999_000));
        assert!(view.counts.len() < 10);
    }

    #[test]
    fn events_are_told_in_words_and_unknown_ones_as_they_came() {
        for (event, text) in [
            (json!({"event": "started"}), "the guest runs"),
            (
                json!({"event": "ended", "outcome": "stopped\u{1b}["}),
                "the guest has ended: stopped\u{fffd}[",
            ),
            (
                json!({"event": "sizes", "plugged_size": GIB, "requested_size": 2 * GIB, "usable_region_size": 0}),
                "1 GiB of 2 GiB plugged",
            ),
            (
                json!({"event": "operation", "id": 7, "requested_size": GIB, "state": "settled"}),
                "resize 7 to 1 GiB: settled",
            ),
            (
                json!({"event": "refused", "answer": "busy"}),
                "the driver was answered BUSY",
            ),
            (json!({"event": "frozen"}), "frozen"),
            (json!({"event": "thawed"}), "thawed"),
            (
                json!({"event": "failed", "reason": "ENOMEM"}),
                "the device has failed: ENOMEM",
            ),
            (
                json!({"event": "missed", "count": 3}),
                "3 events were missed",
            ),
            (json!({"event": "new"}), r#"{"event":"new"}"#),
            (json!(5), "5"),
        ] {
            let mut view = View::new("vm.sock", false);
            view.apply(at(3), Update::Event(event));
            assert_eq!(view.events, [(at(3), text.to_owned())]);
        }
    }

    #[test]
    fn keys_end_it_and_a_prompt_takes_a_size() {
        let mut view = View::new("vm.sock", false);
        assert_eq!(press(&mut view, KeyCode::Char('x')), None);
        assert_eq!(press(&mut view, KeyCode::Char('q')), Some(Action::End));
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(view.input(&Event::Key(interrupt)), Some(Action::End));

        type_in(&mut view, "r51x");
        press(&mut view, KeyCode::Backspace);
        type_in(&mut view, "2.0M-\u{e9}");
        assert_eq!(view.prompt.as_deref(), Some("512.0M"));
        // `q` is typed here, but an interrupt is one.
        assert_eq!(
            view.clone().input(&Event::Key(interrupt)),
            Some(Action::End)
        );
        assert_eq!(press(&mut view.clone(), KeyCode::Char('q')), None);
        assert_eq!(
            press(&mut view, KeyCode::Enter),
            Some(Action::Resize(512 << 20))
        );
        assert_eq!(view.prompt, None);

        type_in(&mut view, "rmuch");
        assert_eq!(press(&mut view, KeyCode::Enter), None);
        assert_eq!(
            view.message.as_deref(),
            Some("\"much\" is no size; 512M, 2G are")
        );
        type_in(&mut view, "r1");
        assert_eq!(view.message, None);
        assert_eq!(press(&mut view, KeyCode::Esc), None);
        assert_eq!(view.prompt, None);
        view.apply(at(0), Update::Message("refused".into()));
        assert_eq!(view.message.as_deref(), Some("refused"));
    }
}

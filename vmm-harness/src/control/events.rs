//! What happens, numbered, for who listens and for who comes back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{Receiver, Sender};

use super::Operation;

/// Events that are kept for who comes back, and that wait for a slow listener; of more, the oldest are lost.
const MAX_EVENTS: usize = 1024;

/// What happens to a device and its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The guest runs.
    Started,
    /// The guest has ended.
    Ended {
        /// How.
        outcome: String,
    },
    /// A size has changed; bytes.
    Sizes {
        /// The device.
        device: String,
        /// What the driver is asked to have plugged.
        requested_size: u64,
        /// What is plugged.
        plugged_size: u64,
        /// From the region's start, where blocks may be plugged.
        usable_region_size: u64,
    },
    /// A resize was asked for, or has ended.
    Operation(Operation),
    /// The driver was refused something, for the first time since its last ACK.
    Refused {
        /// The device.
        device: String,
        /// NACK, BUSY or ERROR.
        answer: &'static str,
    },
    /// Requests are held off.
    Frozen {
        /// The device.
        device: String,
    },
    /// No more.
    Thawed {
        /// The device.
        device: String,
    },
    /// The device takes no more requests.
    Failed {
        /// The device.
        device: String,
        /// What the host could not undo.
        reason: String,
    },
}

/// Where events go; clones are the same. Numbers are from 1, without gaps.
#[derive(Clone, Debug)]
pub struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kept: Mutex<Kept>,
    sender: Sender<(u64, Event)>,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    events: VecDeque<(u64, Event)>,
}

impl Default for Events {
    /// Nothing has happened yet.
    fn default() -> Self {
        Self(Arc::new(Inner {
            kept: Mutex::default(),
            sender: Sender::new(MAX_EVENTS),
        }))
    }
}

impl Events {
    pub(super) fn tell(&self, event: Event) {
        // Sent under the lock, so that numbers are heard in order.
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.last += 1;
        if kept.events.len() == MAX_EVENTS {
            kept.events.pop_front();
        }
        let event = (kept.last, event);
        kept.events.push_back(event.clone());
        // An error is that nobody listens.
        let _ = self.0.sender.send(event);
    }

    /// Listens to what happens after the event with the number `after`; to what happens from now on without it, or if
    /// there has been no such event yet.
    #[must_use]
    pub fn listen(&self, after: Option<u64>) -> Listener {
        let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let after = after.filter(|after| *after <= kept.last);
        let after = after.unwrap_or(kept.last);
        let events = kept.events.iter();
        Listener {
            last: after,
            kept: events.filter(|(id, _)| *id > after).cloned().collect(),
            receiver: self.0.sender.subscribe(),
        }
    }
}

/// Hears events, in order.
#[derive(Debug)]
pub struct Listener {
    last: u64,
    kept: VecDeque<(u64, Event)>,
    receiver: Receiver<(u64, Event)>,
}

impl Listener {
    /// The next event, its number, and how many before it were lost; `None` if there will be none. Who gives up waiting
    /// loses nothing.
    pub async fn next(&mut self) -> Option<(u64, u64, Event)> {
        let (id, event) = match self.kept.pop_front() {
            Some(event) => event,
            None => loop {
                match self.receiver.recv().await {
                    Ok(event) => break event,
                    // How many, the number of the next one says.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            },
        };
        let lost = id - self.last - 1;
        self.last = id;
        Some((lost, id, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(listener: &mut Listener, count: usize) -> Vec<(u64, u64)> {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let mut heard = Vec::new();
            for _ in 0..count {
                let (lost, id, _) = listener.next().await.unwrap();
                heard.push((lost, id));
            }
            heard
        })
    }

    #[test]
    fn who_comes_back_hears_what_he_has_missed_and_how_much_is_lost() {
        let events = Events::default();
        let frozen = || Event::Frozen { device: "a".into() };
        let mut slow = events.listen(None);
        for _ in 0..3 {
            events.tell(frozen());
        }
        let mut back = events.listen(Some(1));
        let mut new = events.listen(None);
        let mut of_another_life = events.listen(Some(99));
        events.tell(frozen());
        assert_eq!(heard(&mut back, 3), [(0, 2), (0, 3), (0, 4)]);
        assert_eq!(heard(&mut new, 1), [(0, 4)]);
        assert_eq!(heard(&mut of_another_life, 1), [(0, 4)]);
        for _ in 0..MAX_EVENTS {
            events.tell(frozen());
        }
        let mut late = events.listen(Some(2));
        assert_eq!(heard(&mut late, 2), [(2, 5), (0, 6)]);
        assert_eq!(heard(&mut slow, 2), [(4, 5), (0, 6)]);
    }
}

//! Requests in flight, and what their answers change.

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{BlockRange, Request, RequestKind, Response, Span};

use super::events::Event;
use super::progress::{Failure, Stall};
use super::queue::{Answered, RequestQueue};
use super::rest::delays;
use super::state::Presence;
use super::{MemDriver, Strategy};
use crate::hotplug::{Hotplug, PhysicalMemory};

/// How long a request may be with the device (H-3). To unplug 128 GiB takes a host seconds.
pub(super) const ANSWER_TIMEOUT_MS: u64 = 30_000;

/// A request, in device blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    UnplugAll,
    Plug(BlockRange),
    Unplug(BlockRange),
    State(BlockRange),
}

/// A request the device has not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) sent: Sent,
    pub(super) at_ms: u64,
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    pub(super) fn requests_in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// Whether another request may be sent: under [`Strategy::Linux`], and where granules are split, one at a time.
    pub(super) fn can_send(&self) -> bool {
        let queue = self.queue.as_ref().map_or(0, RequestQueue::capacity);
        let split = self.layout.splits_granules() && self.scan.is_none();
        let most = match self.policy.strategy {
            Strategy::Linux => queue.min(1),
            Strategy::Direct if split => queue.min(1),
            Strategy::Direct => queue,
        };
        self.requests_in_flight() < most
    }

    /// Sends a request; [`can_send`](Self::can_send) has said that there is room.
    pub(super) fn send(&mut self, sent: Sent) -> Result<(), Failure> {
        let Some(queue) = &mut self.queue else {
            return Err(Failure::Queue(virtio_drivers::Error::NotReady));
        };
        let request = request(&self.layout, sent);
        let slot = queue.send(request, &mut self.transport)?;
        self.counters.count_request(request.kind());
        match sent {
            Sent::Plug(range) => self.maps.intended.insert(range),
            Sent::Unplug(range) => self.maps.intended.remove(range),
            Sent::UnplugAll => self.maps.intended.clear(),
            Sent::State(_) => {}
        }
        let at_ms = self.now_ms;
        self.in_flight[slot] = Some(InFlight { sent, at_ms });
        Ok(())
    }

    /// Takes the next answer; `false` if there is none.
    pub(super) fn receive<M: PhysicalMemory>(
        &mut self,
        hotplug: &Hotplug<M>,
    ) -> Result<bool, Failure> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        let Some(Answered { slot, response }) = queue.receive()? else {
            return Ok(false);
        };
        let Some(InFlight { sent, .. }) = self.in_flight[slot].take() else {
            return Err(Failure::Queue(virtio_drivers::Error::WrongToken));
        };
        self.handle(hotplug, sent, response?).map(|()| true)
    }

    /// Acts on the answer; of the response only its type is looked at, and the state of a STATE request that was
    /// acknowledged (G-17 … G-21).
    fn handle<M: PhysicalMemory>(
        &mut self,
        hotplug: &Hotplug<M>,
        sent: Sent,
        response: Response,
    ) -> Result<(), Failure> {
        let request = request(&self.layout, sent);
        let answer = response.answer();
        self.counters.count_answer(request.kind(), answer);
        log::debug!("virtio-mem: {request:x?}: {}", answer.name());
        match (sent, response) {
            (Sent::State(range), Response::AckState(state)) => {
                if let Some(scan) = &mut self.scan {
                    scan.answer(&self.layout, range, state);
                }
            }
            // There is no such answer (D-47), but it is clear what it means.
            (Sent::State(range), Response::Busy) => {
                if let Some(scan) = &mut self.scan {
                    scan.repeat(range);
                }
                self.wait(Stall::DeviceBusy);
            }
            (Sent::State(_), _) => return Err(Failure::Answer { request, answer }),
            (_, Response::Ack | Response::AckState(_)) => self.done(sent),
            (_, Response::Busy) => {
                self.refused(hotplug, sent);
                self.wait(Stall::DeviceBusy);
            }
            (Sent::Plug(range), Response::Nack) => {
                self.maps.intended.remove(range);
                // H-1: look once whether the target has changed, never simply again.
                self.refused_at = Some(self.config.mutable.requested_size);
                self.config_changed = true;
            }
            (_, Response::Nack | Response::Error) => {
                return Err(Failure::Answer { request, answer });
            }
        }
        Ok(())
    }

    fn done(&mut self, sent: Sent) {
        match sent {
            Sent::Plug(range) => {
                self.maps.plug_done(&self.layout, range);
                self.events.emit(Event::Plugged(self.layout.bytes(range)));
            }
            Sent::Unplug(range) => {
                self.maps.unplug_done(&self.layout, range);
                self.check_removal();
                self.events.emit(Event::Unplugged(self.layout.bytes(range)));
            }
            Sent::UnplugAll => {
                self.maps.unplug_all_done();
                self.check_removal();
                self.unplug_all = false;
                // D-43, N-09: the usable region may be smaller now, and nothing announces it.
                self.usable_may_shrink = true;
                self.config_changed = true;
                self.events.emit(Event::UnpluggedAll);
            }
            Sent::State(_) => {}
        }
        if self.policy.strategy == Strategy::Direct {
            self.retry_delay_ms = delays(Strategy::Direct).0;
            self.awake_since_ms = self.now_ms;
            self.starved = 0;
        }
    }

    pub(super) fn check_removal(&mut self) {
        self.removal.check = true;
        self.removal.from = 0;
    }

    /// The device has not done it: memory that is there goes back to the page allocator.
    fn refused<M: PhysicalMemory>(&mut self, hotplug: &Hotplug<M>, sent: Sent) {
        match sent {
            Sent::Plug(range) => self.maps.intended.remove(range),
            Sent::Unplug(range) => {
                self.maps.intended.insert(range);
                self.release_present(hotplug, range);
            }
            Sent::UnplugAll => {
                self.maps.intended = self.maps.plugged.clone();
                let all = BlockRange {
                    first: 0,
                    count: self.layout.geometry.block_count(),
                };
                self.release_present(hotplug, all);
            }
            Sent::State(_) => {}
        }
    }

    /// Releases what is taken of `range` in units that are added.
    pub(super) fn release_present<M: PhysicalMemory>(
        &mut self,
        hotplug: &Hotplug<M>,
        range: BlockRange,
    ) {
        let runs: alloc::vec::Vec<_> = self.maps.taken.runs_in(range, true).collect();
        for run in runs {
            let mut first = run.first;
            while first < run.end() {
                let unit = self.layout.unit_of(first);
                let end = match self.layout.all_units().contains(&unit) {
                    true => self.layout.unit(unit).end().min(run.end()),
                    false => first + 1,
                };
                let absent =
                    self.with_view(hotplug, |view| view.common(unit) == Some(Presence::Absent));
                if !absent {
                    let count = end - first;
                    self.maps.release(BlockRange { first, count });
                }
                first = end;
            }
        }
    }

    /// Whether a request has been in flight for too long (H-3).
    pub(super) fn answer_overdue(&self) -> bool {
        self.answer_deadline_ms()
            .is_some_and(|at| self.now_ms >= at)
    }

    pub(super) fn answer_deadline_ms(&self) -> Option<u64> {
        let sent = self.in_flight.iter().flatten().map(|sent| sent.at_ms);
        Some(sent.min()?.saturating_add(ANSWER_TIMEOUT_MS))
    }

    /// Whether any PLUG, or any UNPLUG, is in flight.
    pub(super) fn in_flight_of(&self, kind: RequestKind) -> bool {
        let mut sent = self.in_flight.iter().flatten();
        sent.any(|entry| request(&self.layout, entry.sent).kind() == kind)
    }
}

fn request(layout: &super::layout::Layout, sent: Sent) -> Request {
    let span = |range: BlockRange| Span {
        addr: layout.geometry.address(range.first),
        // Plans keep to `Layout::request_blocks`.
        block_count: u16::try_from(range.count).unwrap_or(u16::MAX),
    };
    match sent {
        Sent::UnplugAll => Request::UnplugAll,
        Sent::Plug(range) => Request::Plug(span(range)),
        Sent::Unplug(range) => Request::Unplug(span(range)),
        Sent::State(range) => Request::State(span(range)),
    }
}

//! The requests of one step: what was recorded, how far the driver has come, and what it is told on the way.
//!
//! Where the kernel keeps pages of its own is taken from the recording at the moment the driver is about to find out:
//! when it is about to empty online memory, and the next recorded request is not the one that would follow, then that
//! memory could not be emptied. If more UNPLUG requests follow in the step, the kernel has passed it over (EBUSY). If
//! none does, the kernel has given up there: out of memory to move pages to, or with nothing left that was not in use.
//! What is tried, in which order, and what is asked for is the driver's own doing, and compared.

use std::collections::BTreeMap;
use std::ops::Range;

use virtio_mem_driver::hotplug::{BlockState, Error, Fault, Hotplug, Step as Point, ZoneKind};
use virtio_mem_wire::{Request, Span};

use super::guest::{Check, NoContents};
use super::inputs::Inputs;
use super::requests::{Exchange, Recorded, RecordedDevice};

/// The clocks of the machine, which the requests were timed with, and of its guest may differ by so much.
const CLOCK_ERROR_MS: u64 = 1000;

/// The requests of one step: what was recorded, and how far the driver has come.
#[derive(Debug)]
pub(super) struct Course<'a> {
    recorded: &'a [Recorded],
    /// The recorder did not wait until the driver had done all it could.
    cut_short: bool,
    /// How many requests were compared: the number of the next one.
    pub(super) next: usize,
    /// What the driver is about to take out of use, and how the recording says that ends, if not well.
    attempt: Option<(Range<u64>, Option<Error>)>,
    /// What could not be emptied, for as long as nothing changes: start and end, and why.
    refused: BTreeMap<(u64, u64), Error>,
    /// Of these, the first since the last request.
    passed: Option<Range<u64>>,
    pub(super) inputs: Inputs,
    pub(super) checks: Vec<Check>,
    /// Recording and driver have parted.
    parted: bool,
}

impl<'a> Course<'a> {
    pub(super) fn new(recorded: &'a [Recorded], cut_short: bool) -> Self {
        Self {
            recorded,
            cut_short,
            next: 0,
            attempt: None,
            refused: BTreeMap::new(),
            passed: None,
            inputs: Inputs::default(),
            checks: Vec::new(),
            parted: false,
        }
    }

    /// The next recorded request.
    pub(super) fn expected(&self) -> Option<&'a Recorded> {
        self.recorded.get(self.next)
    }

    /// Whether there is nothing more to be compared, whatever the driver does: after a difference, and where the
    /// recording was cut short.
    pub(super) fn is_over(&self) -> bool {
        self.parted || (self.cut_short && self.expected().is_none())
    }

    /// Whether the next recorded request was sent when the retry timer had run out.
    pub(super) fn waits_until(&self, retry_at_ms: Option<u64>) -> bool {
        let next = self.expected().zip(retry_at_ms);
        next.is_some_and(|(next, at)| at <= next.at_ms.saturating_add(CLOCK_ERROR_MS))
    }

    /// Something has changed: what was in use may be free now.
    pub(super) fn forget_refusals(&mut self) {
        self.refused.clear();
    }

    /// Tells the hotplug core how the driver's next attempt to take memory out of use ends, and notes what came of
    /// the last one.
    pub(super) fn watch(
        &mut self,
        hotplug: &mut Hotplug<NoContents>,
        device: &RecordedDevice,
        emptying: Option<Range<u64>>,
    ) {
        if let Some((range, told)) = self
            .attempt
            .take_if(|(range, _)| emptying.as_ref() != Some(range))
        {
            // What has not come was not asked for.
            let asked_for = hotplug.clear_faults() == 0;
            if let Some(error) = told.filter(|_| asked_for) {
                if self
                    .refused
                    .insert((range.start, range.end), error)
                    .is_none()
                {
                    let (start, end) = (range.start, range.end);
                    log::debug!(
                        "request {}: {start:#x}-{end:#x} cannot be emptied: {error}",
                        self.next
                    );
                    match error {
                        Error::Busy => self.inputs.busy_places += 1,
                        _ => self.inputs.given_up += 1,
                    }
                }
                self.passed.get_or_insert(range);
            }
        }
        let Some(range) = emptying.filter(|_| self.attempt.is_none()) else {
            return;
        };
        let told = self.obstacle(hotplug, device, &range);
        if let Some(error) = told {
            hotplug.inject(Fault {
                step: Point::Isolate,
                skip: 0,
                error,
            });
        }
        self.attempt = Some((range, told));
    }

    /// How the recording says that an attempt to empty `range` ends, if not well.
    fn obstacle(
        &self,
        hotplug: &Hotplug<NoContents>,
        device: &RecordedDevice,
        range: &Range<u64>,
    ) -> Option<Error> {
        let block_size = hotplug.profile().memory_block_size();
        let mut ids = range.start / block_size..range.end.div_ceil(block_size);
        // Nothing is in use in what is offline.
        if ids.all(|id| hotplug.block_state(id) == Some(BlockState::Offline)) {
            return None;
        }
        // Pages of the kernel's are in kernel zones. What is in Movable can be moved, unless somebody has a page for a
        // moment: then the rest of the same memory block follows.
        let mut ids = range.start / block_size..range.end.div_ceil(block_size);
        let movable = |id| {
            let block = hotplug.block(id);
            block.is_some_and(|block| block.zone == Some(ZoneKind::Movable))
        };
        let all_movable = ids.all(movable);
        let follows = |addr: u64| addr < range.end && addr / block_size == range.start / block_size;
        // The driver may look again at once; the kernel's pages are where they were.
        if let Some(error) = self.refused.get(&(range.start, range.end)) {
            return Some(*error);
        }
        match self.expected().map(|next| next.exchange.request) {
            Some(Request::Unplug(Span { addr, block_count })) => {
                let bytes = u64::from(block_count).saturating_mul(device.block_size);
                let this = (addr, bytes) == (range.start, range.end - range.start);
                (!this && (!all_movable || follows(addr))).then_some(Error::Busy)
            }
            _ => Some(Error::NoMemory),
        }
    }

    /// Compares a request with the next recorded one; when that was sent, if they agree.
    pub(super) fn compare(&mut self, got: Exchange) -> Option<u64> {
        let expected = self.expected();
        let same = expected.filter(|expected| expected.exchange == got);
        self.parted |= same.is_none();
        let passed = self.passed.take().filter(|_| same.is_none());
        let tried = passed.map_or(String::new(), |range| {
            format!(" (it tried {:#x} first)", range.start)
        });
        self.check(format!("{got}{tried}"));
        self.next += 1;
        same.map(|same| same.at_ms)
    }

    /// The next recorded request is not sent.
    pub(super) fn missing(&mut self, reason: &str) {
        let tried = self.passed.take().map_or(String::new(), |range| {
            format!(" tried {:#x} first, and now", range.start)
        });
        self.parted = true;
        self.check(format!("none: the driver{tried} rests, {reason}"));
    }

    /// The driver has given up on its device; Linux's never did.
    pub(super) fn failed(&mut self, failure: &str) {
        self.parted = true;
        self.checks.push(Check {
            subject: "driver".into(),
            field: "failure",
            expected: "none".into(),
            got: failure.to_owned(),
        });
    }

    fn check(&mut self, got: String) {
        self.checks.push(Check {
            subject: format!("request {}", self.next),
            field: "",
            expected: self
                .expected()
                .map_or("none".to_owned(), |expected| expected.exchange.to_string()),
            got,
        });
    }
}

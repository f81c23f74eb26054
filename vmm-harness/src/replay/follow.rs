//! The virtio-mem driver on the recorded device, request by request.
//!
//! What the recording says of the kernel's pages is taken from it where the driver asks: when it is about to empty
//! online memory and the next recorded request is not the one that would follow, then that memory could not be
//! emptied. If more UNPLUG requests follow in the step, the kernel has passed it over (EBUSY); if none does, the
//! kernel has stopped there (ENOMEM, or all that was left was in use). Everything else, and so what is tried in which
//! order, is the driver's own doing.

use std::collections::BTreeMap;
use std::ops::Range;

use virtio_mem_driver::driver::{Mode, Policy, Progress};
use virtio_mem_driver::hotplug::{BlockState, Error, Fault, Hotplug, Step as Point};
use virtio_mem_wire::{Request, Span};

use super::guest::{Check, NoContents};
use super::inputs::Inputs;
use super::requests::{Exchange, Recorded, RecordedDevice};
use super::rig::{Driver, Rig, RigError};

/// The clocks of the machine, which the requests were timed with, and of its guest may differ by so much.
const CLOCK_ERROR_MS: u64 = 1000;

/// The device, and the driver while there is one.
pub(super) struct MemDevice {
    rig: Rig,
    device: RecordedDevice,
    policy: Policy,
    driver: Option<Driver>,
    /// The driver's clock goes by the recorded requests.
    now_ms: u64,
}

/// The requests of one step: what was recorded, and how far the driver has come.
#[derive(Debug)]
pub(super) struct Course<'a> {
    recorded: &'a [Recorded],
    /// The recorder did not wait until the driver had done all it could.
    cut_short: bool,
    /// The next recorded request.
    next: usize,
    /// What the driver is about to take out of use, and how the recording says that ends, if not well.
    attempt: Option<(Range<u64>, Option<Error>)>,
    /// What could not be emptied, for as long as nothing changes: start and end, and why.
    refused: BTreeMap<(u64, u64), Error>,
    /// Of these, the first since the last request.
    passed: Option<Range<u64>>,
    inputs: Inputs,
    pub(super) checks: Vec<Check>,
}

/// Why the driver does nothing, and until when.
struct Resting {
    reason: String,
    retry_at_ms: Option<u64>,
}

impl MemDevice {
    pub(super) fn new(
        device: RecordedDevice,
        policy: Policy,
        memory_block_size: u64,
    ) -> Result<Self, RigError> {
        Ok(Self {
            rig: Rig::new(&device, memory_block_size)?,
            device,
            policy,
            driver: None,
            now_ms: 0,
        })
    }

    /// The driver binds to the device; whether it could.
    pub(super) fn bind(&mut self, hotplug: &mut Hotplug<NoContents>) -> bool {
        if self.driver.is_some() {
            return false;
        }
        match Driver::probe(self.rig.transport(), hotplug, self.policy) {
            Ok(driver) => self.driver = Some(driver),
            Err(error) => log::info!("the driver does not bind: {error}"),
        }
        self.driver.is_some()
    }

    /// The driver is unbound from the device; whether it was bound.
    pub(super) fn unbind(&mut self, hotplug: &mut Hotplug<NoContents>) -> bool {
        let driver = self.driver.take();
        let bound = driver.is_some();
        if let Some(driver) = driver {
            let removed = driver.remove(hotplug);
            log::info!("the driver is gone: {removed}");
        }
        bound
    }

    pub(super) fn set_unplug_online(&mut self, unplug_online: bool) {
        self.policy.unplug_online = unplug_online;
        if let Some(driver) = &mut self.driver {
            driver.set_unplug_online(unplug_online);
        }
    }

    /// The operator asks for another size.
    pub(super) fn resize(&self, size: u64) -> Result<(), String> {
        let resized = self.rig.handle().resize(size);
        resized.map(drop).map_err(|error| error.to_string())
    }

    /// Requested and plugged size, as the device has them.
    pub(super) fn sizes(&self) -> (u64, u64) {
        let status = self.rig.handle().status();
        (status.requested_size, status.plugged_size)
    }

    /// Bytes of what is plugged at a time, and the name Linux has for it.
    pub(super) fn granule(&self) -> Option<(&'static str, u64)> {
        let driver = self.driver.as_ref()?;
        let name = match driver.mode() {
            Mode::SubBlock => "subblock size",
            Mode::BigBlock => "big block size",
        };
        Some((name, driver.granule_size()))
    }

    /// The retry timer may have run out before the operation of a step: a driver that tries again then still works
    /// towards what was requested before.
    pub(super) fn retry(
        &mut self,
        hotplug: &mut Hotplug<NoContents>,
        course: &mut Course<'_>,
    ) -> Result<(), String> {
        let retry_at_ms = self.driver.as_ref().and_then(Driver::deadline_ms);
        let unplugs = course
            .expected()
            .is_some_and(|first| matches!(first.exchange.request, Request::Unplug(_)));
        if unplugs && course.waits_until(retry_at_ms) {
            self.let_time_pass(retry_at_ms, course);
            self.run(hotplug, course)?;
        }
        Ok(())
    }

    /// The driver does what is left to do after the operation of a step.
    pub(super) fn finish(
        &mut self,
        hotplug: &mut Hotplug<NoContents>,
        course: &mut Course<'_>,
    ) -> Result<(), String> {
        course.refused.clear();
        let mut waited_for = None;
        while let Some(Resting {
            reason,
            retry_at_ms,
        }) = self.run(hotplug, course)?
        {
            if course.expected().is_none() {
                break;
            }
            if waited_for == Some(course.next) || !course.waits_until(retry_at_ms) {
                course.missing(&reason);
                break;
            }
            waited_for = Some(course.next);
            self.let_time_pass(retry_at_ms, course);
        }
        Ok(())
    }

    fn let_time_pass(&mut self, retry_at_ms: Option<u64>, course: &mut Course<'_>) {
        let then = course.expected().map(|next| next.at_ms);
        self.now_ms = self.now_ms.max(then.max(retry_at_ms).unwrap_or(0));
        course.inputs.retries += 1;
        course.refused.clear();
    }

    /// Lets the driver work until it rests. `None` at a difference, or where the recording ends.
    fn run(
        &mut self,
        hotplug: &mut Hotplug<NoContents>,
        course: &mut Course<'_>,
    ) -> Result<Option<Resting>, String> {
        let Some(driver) = &mut self.driver else {
            let reason = "the driver is not bound".to_owned();
            return Ok(Some(Resting {
                reason,
                retry_at_ms: None,
            }));
        };
        while !(course.cut_short && course.expected().is_none()) {
            driver.on_interrupt();
            let progress = driver.poll(hotplug, self.now_ms);
            course.watch(hotplug, &self.device, driver.emptying());
            while driver.awaits_device(self.now_ms) {
                self.rig.wait()?;
            }
            for exchange in self.rig.exchanges()? {
                match course.compare(exchange) {
                    Some(at_ms) => self.now_ms = self.now_ms.max(at_ms),
                    None => return Ok(None),
                }
            }
            let (reason, retry_at_ms) = match progress {
                Progress::Converging | Progress::AwaitingDevice => continue,
                Progress::Stalled {
                    reason,
                    retry_at_ms,
                } => (reason.to_string(), retry_at_ms),
                Progress::Failed(failure) => (failure.to_string(), None),
                Progress::Settled | Progress::Suspended => ("all is done".to_owned(), None),
            };
            return Ok(Some(Resting {
                reason,
                retry_at_ms,
            }));
        }
        Ok(None)
    }
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
        }
    }

    /// Requests compared, and what was taken from the recording for it.
    pub(super) fn counts(&self) -> (u64, Inputs) {
        (self.next as u64, self.inputs)
    }

    fn expected(&self) -> Option<&'a Recorded> {
        self.recorded.get(self.next)
    }

    /// Whether the next recorded request was sent when the retry timer had run out.
    fn waits_until(&self, retry_at_ms: Option<u64>) -> bool {
        let next = self.expected().zip(retry_at_ms);
        next.is_some_and(|(next, at)| at <= next.at_ms.saturating_add(CLOCK_ERROR_MS))
    }

    /// Tells the hotplug core how the driver's next attempt to take memory out of use ends, and notes what came of
    /// the last one.
    fn watch(
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
        // The driver may look again at once; the kernel's pages are where they were.
        if let Some(error) = self.refused.get(&(range.start, range.end)) {
            return Some(*error);
        }
        match self.expected().map(|next| next.exchange.request) {
            Some(Request::Unplug(Span { addr, block_count })) => {
                let bytes = u64::from(block_count).saturating_mul(device.block_size);
                let this = (addr, bytes) == (range.start, range.end - range.start);
                (!this).then_some(Error::Busy)
            }
            _ => Some(Error::NoMemory),
        }
    }

    /// Compares a request with the next recorded one; when that was sent, if they agree.
    fn compare(&mut self, got: Exchange) -> Option<u64> {
        let expected = self.expected();
        let same = expected.filter(|expected| expected.exchange == got);
        let passed = self.passed.take().filter(|_| same.is_none());
        let tried = passed.map_or(String::new(), |range| {
            format!(" (it tried {:#x} first)", range.start)
        });
        self.check(format!("{got}{tried}"));
        self.next += 1;
        same.map(|same| same.at_ms)
    }

    /// The next recorded request is not sent.
    fn missing(&mut self, reason: &str) {
        let tried = self.passed.take().map_or(String::new(), |range| {
            format!(" tried {:#x} first, and now", range.start)
        });
        self.check(format!("none: the driver{tried} rests, {reason}"));
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

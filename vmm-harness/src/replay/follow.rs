//! The virtio-mem driver on the recorded device, request by request.
//!
//! What the recording says of the kernel's pages is taken from it where the driver asks: when it is about to empty
//! online memory and the next recorded request is not the one that would follow, then that memory could not be
//! emptied. If more UNPLUG requests follow in the step, the kernel has passed it over (EBUSY); if none does, the
//! kernel has stopped there (ENOMEM, or all that was left was in use). Everything else, and so what is tried in which
//! order, is the driver's own doing.

use std::ops::Range;

use virtio_mem_driver::driver::{Mode, Policy, Progress};
use virtio_mem_driver::hotplug::{BlockState, Error, Fault, Hotplug, Step as Point};
use virtio_mem_wire::Request;

use super::guest::{Check, NoContents};
use super::inputs::Inputs;
use super::requests::{Exchange, Recorded, RecordedDevice};
use super::rig::{Driver, Rig, RigError};

/// The device, and the driver while there is one.
pub(super) struct MemDevice {
    rig: Rig,
    device: RecordedDevice,
    policy: Policy,
    driver: Option<Driver>,
    /// The driver's clock goes by the recorded requests.
    now_ms: u64,
}

/// What the driver wants to take out of use.
#[derive(Debug)]
struct Attempt {
    range: Range<u64>,
    /// How the recording says that ends, if not well.
    told: Option<Error>,
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

    /// Lets the driver work until it rests, and compares what it asks for with what was recorded. Returns at the
    /// first difference.
    pub(super) fn follow(
        &mut self,
        hotplug: &mut Hotplug<NoContents>,
        recorded: &[Recorded],
        inputs: &mut Inputs,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        let mut next = 0;
        let mut attempt: Option<Attempt> = None;
        // Of what was taken from the recording since the last request, the first.
        let mut passed: Option<Range<u64>> = None;
        let mut places = Vec::new();
        let mut waited_for = None;
        loop {
            let Some(driver) = &mut self.driver else {
                checks.extend(missing(recorded, next, "the driver is not bound"));
                return Ok(());
            };
            driver.on_interrupt();
            let progress = driver.poll(hotplug, self.now_ms);
            if let Some(tried) =
                attempt.take_if(|tried| driver.emptying().as_ref() != Some(&tried.range))
            {
                // What was injected and has not come was not asked for.
                let struck = hotplug.clear_faults() == 0;
                if let Some(error) = tried.told.filter(|_| struck) {
                    match error {
                        _ if places.contains(&tried.range) => {}
                        Error::Busy => inputs.busy_places += 1,
                        _ => inputs.stops += 1,
                    }
                    passed.get_or_insert_with(|| tried.range.clone());
                    places.push(tried.range);
                }
            }
            if attempt.is_none()
                && let Some(range) = driver.emptying()
            {
                let told = obstacle(hotplug, &self.device, &range, recorded.get(next));
                if let Some(error) = told {
                    hotplug.inject(Fault {
                        step: Point::Isolate,
                        skip: 0,
                        error,
                    });
                }
                attempt = Some(Attempt { range, told });
            }
            while driver.awaits_device(self.now_ms) {
                self.rig.wait()?;
            }
            for exchange in self.rig.exchanges()? {
                let expected = recorded.get(next);
                checks.push(compared(next, expected, &exchange, passed.take()));
                match expected {
                    Some(expected) if expected.exchange == exchange => {
                        self.now_ms = self.now_ms.max(expected.at_ms);
                    }
                    _ => return Ok(()),
                }
                next += 1;
            }
            let (reason, retry_at_ms) = match progress {
                Progress::Converging | Progress::AwaitingDevice => continue,
                Progress::Stalled {
                    reason,
                    retry_at_ms,
                } => (reason.to_string(), retry_at_ms),
                Progress::Failed(failure) => (failure.to_string(), None),
                Progress::Settled | Progress::Suspended => {
                    ("it has done all it can".to_owned(), None)
                }
            };
            let Some(expected) = recorded.get(next) else {
                return Ok(());
            };
            // The retry timer: a request cannot come before it.
            if retry_at_ms.is_some_and(|at| at <= expected.at_ms) && waited_for != Some(next) {
                waited_for = Some(next);
                self.now_ms = expected.at_ms;
                inputs.retries += 1;
                continue;
            }
            let wanted = passed.map_or(String::new(), |range| {
                format!(
                    ", after it wanted to unplug {:#x} blocks {}",
                    range.start,
                    self.device.blocks(&range)
                )
            });
            checks.extend(missing(
                recorded,
                next,
                &format!("the driver rests: {reason}{wanted}"),
            ));
            return Ok(());
        }
    }
}

/// Whether the recording says that `range` cannot be emptied now, and why not.
fn obstacle(
    hotplug: &Hotplug<NoContents>,
    device: &RecordedDevice,
    range: &Range<u64>,
    next: Option<&Recorded>,
) -> Option<Error> {
    let block_size = hotplug.profile().memory_block_size();
    let mut ids = range.start / block_size..range.end.div_ceil(block_size);
    // Nothing is in use in what is offline.
    if ids.all(|id| hotplug.block_state(id) == Some(BlockState::Offline)) {
        return None;
    }
    match next.map(|next| next.exchange.request) {
        Some(Request::Unplug(span)) => {
            let follows =
                span.addr == range.start && u64::from(span.block_count) == device.blocks(range);
            (!follows).then_some(Error::Busy)
        }
        _ => Some(Error::NoMemory),
    }
}

impl RecordedDevice {
    fn blocks(&self, range: &Range<u64>) -> u64 {
        (range.end - range.start) / self.block_size
    }
}

fn compared(
    index: usize,
    expected: Option<&Recorded>,
    got: &Exchange,
    passed: Option<Range<u64>>,
) -> Check {
    let passed = passed.filter(|_| expected.is_none_or(|expected| expected.exchange != *got));
    let passed = passed.map_or(String::new(), |range| {
        format!(" after an attempt at {:#x}", range.start)
    });
    Check {
        subject: format!("request {index}"),
        field: "",
        expected: expected.map_or("none".to_owned(), |expected| expected.exchange.to_string()),
        got: format!("{got}{passed}"),
    }
}

/// What was recorded and is not asked for.
fn missing(recorded: &[Recorded], next: usize, reason: &str) -> Option<Check> {
    recorded.get(next).map(|expected| Check {
        subject: format!("request {next}"),
        field: "",
        expected: expected.exchange.to_string(),
        got: format!("none ({reason})"),
    })
}

//! The virtio-mem device, and its driver in the guest.

use virtio_mem_driver::driver::{Mode, Policy, Progress};
use virtio_mem_driver::hotplug::Hotplug;
use virtio_mem_wire::Request;

use super::course::Course;
use super::guest::{Check, Guest, NoContents};
use super::requests::RecordedDevice;
use super::rig::{Driver, Rig, RigError};
use super::step::Step;

/// Where the module `virtio_mem` has its parameters.
const PARAMETERS: &str = "/sys/module/virtio_mem/parameters/";

/// Where the driver is bound and unbound.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_mem/";

/// The device, and the driver while there is one.
pub(super) struct MemDevice {
    /// Before the rig: its end is a reset of the device.
    driver: Option<Driver>,
    rig: Rig,
    device: RecordedDevice,
    policy: Policy,
    /// The driver's clock goes by the recorded requests.
    now_ms: u64,
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

    /// The retry timer may have run out before another `size` was requested. It has, if memory was unplugged though
    /// there shall be more.
    pub(super) fn retry_before(
        &mut self,
        size: u64,
        hotplug: &mut Hotplug<NoContents>,
        course: &mut Course<'_>,
    ) -> Result<(), String> {
        let (_, plugged) = self.sizes();
        let first = course.expected().map(|first| first.exchange.request);
        let unplugs = matches!(first, Some(Request::Unplug(_)));
        let retry_at_ms = self.driver.as_ref().and_then(Driver::deadline_ms);
        if unplugs && size >= plugged && course.waits_until(retry_at_ms) {
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
        course.forget_refusals();
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
        course.forget_refusals();
    }

    /// Lets the driver work until it rests. `None` at a difference, or where the recording was cut short.
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
        while !course.is_over() {
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
                Progress::Failed(failure) => {
                    course.failed(&failure.to_string());
                    return Ok(None);
                }
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

impl Guest {
    /// Writes a file of the driver or of its module; whether that worked. `None` if it is none of those.
    pub(super) fn write_driver_file(&mut self, file: &str, text: &str) -> Option<bool> {
        let device = self.mem_device.as_mut()?;
        if let Some(name) = file.strip_prefix(PARAMETERS) {
            // The only one that can be written at run time.
            let value = parse_bool(text.trim()).filter(|_| name == "unplug_online");
            if let Some(value) = value {
                device.set_unplug_online(value);
            }
            return Some(value.is_some());
        }
        match file.strip_prefix(DRIVER)? {
            "bind" => Some(device.bind(&mut self.hotplug)),
            "unbind" => Some(device.unbind(&mut self.hotplug)),
            _ => None,
        }
    }

    /// The driver comes to its device, with the parameters that its module says it has; the kernel's log says how it
    /// works.
    pub(super) fn probe(&mut self, out: &str, checks: &mut Vec<Check>) -> Result<(), String> {
        let recorded = self.recorded_device.ok_or("there is no device to probe")?;
        let mut policy = Policy::linux();
        for (name, value) in out
            .lines()
            .filter_map(|line| line.strip_prefix(PARAMETERS)?.split_once(' '))
        {
            let wrong = || format!("{value:?} is no value of {name}");
            let truth = || parse_bool(value).ok_or_else(wrong);
            match name {
                "unplug_online" => policy.unplug_online = truth()?,
                "force_bbm" => policy.force_bbm = truth()?,
                "bbm_block_size" => policy.bbm_block_size = value.parse().map_err(|_| wrong())?,
                _ => {}
            }
        }
        let mut device =
            MemDevice::new(recorded, policy, self.block_size).map_err(|error| error.to_string())?;
        device.bind(&mut self.hotplug);
        let log = |name: &str| {
            let mut lines = out
                .lines()
                .filter_map(|line| line.split_once("virtio_mem ")?.1.split_once(": "));
            lines.find_map(|(_, rest)| rest.strip_prefix(name)?.strip_prefix(": 0x"))
        };
        for (name, mode) in [
            ("subblock size", Mode::SubBlock),
            ("big block size", Mode::BigBlock),
        ] {
            let driver = device
                .driver
                .as_ref()
                .filter(|driver| driver.mode() == mode);
            checks.extend(log(name).map(|recorded| Check {
                subject: "driver".into(),
                field: name,
                expected: recorded.to_owned(),
                got: driver.map_or("none".to_owned(), |driver| {
                    format!("{:x}", driver.granule_size())
                }),
            }));
        }
        self.mem_device = Some(device);
        Ok(())
    }

    /// The driver does what is left to do after a step.
    pub(super) fn finish_requests(
        &mut self,
        step: &Step,
        mut course: Course<'_>,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        let Some(device) = &mut self.mem_device else {
            return Ok(());
        };
        device.finish(&mut self.hotplug, &mut course)?;
        self.requests += course.next as u64;
        self.inputs += course.inputs;
        checks.append(&mut course.checks);
        let (requested, plugged) = device.sizes();
        for (field, expected, got) in [
            ("requested_size", step.requested_size, requested),
            ("plugged_size", step.plugged_size, plugged),
        ] {
            checks.extend(expected.map(|expected| Check {
                subject: "device".into(),
                field,
                expected: expected.to_string(),
                got: got.to_string(),
            }));
        }
        Ok(())
    }
}

/// A truth, as the kernel reads it from module parameters.
fn parse_bool(text: &str) -> Option<bool> {
    match text.as_bytes() {
        [b'y' | b'Y' | b't' | b'T' | b'1', ..] => Some(true),
        [b'n' | b'N' | b'f' | b'F' | b'0', ..] => Some(false),
        [b'o' | b'O', b'n' | b'N', ..] => Some(true),
        [b'o' | b'O', b'f' | b'F', ..] => Some(false),
        _ => None,
    }
}

//! A guest and its device, and what must hold of both after each change.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::device::DeviceStatus;
use super::facts::{self, Facts};
use super::{LinuxError, LinuxGuest, signals};
use crate::demo::size;

/// Far longer than any single step takes, even where the kernel waits 50 seconds before it tries again.
pub(super) const LONG: Duration = Duration::from_secs(600);

/// How often a change is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// What the kernel says when something is wrong with it.
const COMPLAINTS: &str = "dmesg | grep -E -A 25 'WARNING:|BUG:|Oops|general protection' || true";

/// One step of a script, as measured. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct LinuxStep {
    /// What was done.
    pub what: String,
    /// The size that was asked for at last.
    pub requested: u64,
    /// What the device has plugged.
    pub plugged: u64,
    /// `MemTotal` above what it was without the device.
    pub mem_total: u64,
    /// Memory blocks of the driver, and their size.
    pub memory_blocks: usize,
    /// Bytes of `System RAM (virtio_mem)` in `/proc/iomem`.
    pub system_ram: u64,
    /// Host memory behind the device's region.
    pub resident: u64,
    /// Seconds until everything agreed.
    pub seconds: f64,
}

/// A run of a script.
pub(super) struct Session<'a> {
    pub(super) guest: LinuxGuest,
    /// Told of each step.
    show: &'a mut dyn FnMut(&LinuxStep),
    steps: Vec<LinuxStep>,
}

impl<'a> Session<'a> {
    pub(super) fn new(guest: LinuxGuest, show: &'a mut dyn FnMut(&LinuxStep)) -> Self {
        Self {
            guest,
            show,
            steps: Vec::new(),
        }
    }

    /// The steps, after a last look at what the kernel says.
    pub(super) fn finish(mut self) -> Result<Vec<LinuxStep>, LinuxError> {
        let complaints = self.run(COMPLAINTS)?;
        check(complaints.is_empty(), || {
            format!("the kernel complains:\n{complaints}")
        })?;
        Ok(self.steps)
    }

    /// Runs a command in the guest that must succeed.
    pub(super) fn run(&mut self, command: &str) -> Result<String, LinuxError> {
        self.guest.qemu.console.run(command, LONG)
    }

    /// What the kernel has said of the driver that contains `text`.
    pub(super) fn driver_says(&mut self, text: &str) -> Result<Vec<String>, LinuxError> {
        let lines = self.run("dmesg | grep virtio_mem || true")?;
        Ok(lines
            .lines()
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect())
    }

    pub(super) fn status(&mut self) -> Result<DeviceStatus, LinuxError> {
        self.guest.device.status(&mut self.guest.qemu.qmp)
    }

    pub(super) fn request(&mut self, bytes: u64) -> Result<(), LinuxError> {
        self.guest.device.resize(&mut self.guest.qemu.qmp, bytes)
    }

    pub(super) fn resident_bytes(&mut self) -> Result<u64, LinuxError> {
        self.guest.device.resident_bytes(self.guest.qemu.pid())
    }

    pub(super) fn facts(&mut self) -> Result<Facts, LinuxError> {
        Facts::read(&self.run(facts::COMMAND)?)
    }

    /// Asks for `bytes`, waits until all of it is there or gone, and checks everything.
    pub(super) fn resize(&mut self, bytes: u64) -> Result<(), LinuxError> {
        let begun = Instant::now();
        self.request(bytes)?;
        self.settled(&format!("resize to {}", size(bytes)), bytes, begun)?;
        let said = self.driver_says("requested size:")?;
        let expected = format!("requested size: {bytes:#x}");
        check(
            said.last().is_some_and(|line| line.ends_with(&expected)),
            || format!("the driver has not said {expected:?} last: {said:?}"),
        )
    }

    /// Waits until device and guest agree on `bytes`, and checks everything.
    pub(super) fn settled(
        &mut self,
        what: &str,
        bytes: u64,
        begun: Instant,
    ) -> Result<(), LinuxError> {
        let mut status = self.status()?;
        until(LONG, || {
            status = self.status()?;
            Ok(status.plugged == bytes)
        })?;
        let expected = DeviceStatus {
            requested: bytes,
            plugged: bytes,
        };
        check(status == expected, || {
            format!("{what}: the device has {status:?}")
        })?;
        // The request is answered before the kernel has put the block online.
        let mut facts = self.facts()?;
        until(LONG, || {
            facts = self.facts()?;
            Ok(facts.differ_from(bytes).is_none())
        })?;
        if let Some(difference) = facts.differ_from(bytes) {
            return Err(LinuxError::Check(format!("{what}: {difference}")));
        }
        self.record(what, status, &facts, begun)
    }

    /// Waits until a state of the device has not changed for a while; what it is then.
    pub(super) fn unchanged(&mut self, still: Duration) -> Result<DeviceStatus, LinuxError> {
        let (mut status, mut since) = (self.status()?, Instant::now());
        until(LONG, || {
            let now = self.status()?;
            if now != status {
                (status, since) = (now, Instant::now());
            }
            Ok(since.elapsed() >= still)
        })?;
        Ok(status)
    }

    /// Writes down a step. Unplugged memory must have come back to the host.
    fn record(
        &mut self,
        what: &str,
        status: DeviceStatus,
        facts: &Facts,
        begun: Instant,
    ) -> Result<(), LinuxError> {
        let resident = self.resident_bytes()?;
        check(resident <= status.plugged, || {
            format!(
                "{what}: {resident:#x} bytes of host memory behind {:#x} plugged",
                status.plugged
            )
        })?;
        self.show_step(LinuxStep {
            what: what.to_owned(),
            requested: status.requested,
            plugged: status.plugged,
            mem_total: facts.mem_total - facts.boot_mem_total,
            memory_blocks: facts.added.len(),
            system_ram: facts.added_bytes(),
            resident,
            seconds: begun.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Writes down a step in which guest and device need not agree.
    pub(super) fn note(&mut self, what: &str, begun: Instant) -> Result<(), LinuxError> {
        let (status, resident) = (self.status()?, self.resident_bytes()?);
        let facts = self.facts()?;
        self.show_step(LinuxStep {
            what: what.to_owned(),
            requested: status.requested,
            plugged: status.plugged,
            mem_total: facts.mem_total.saturating_sub(facts.boot_mem_total),
            memory_blocks: facts.added.len(),
            system_ram: facts.added_bytes(),
            resident,
            seconds: begun.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    fn show_step(&mut self, step: LinuxStep) {
        (self.show)(&step);
        self.steps.push(step);
    }
}

/// An error that says what is wrong, if something is.
pub(super) fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), LinuxError> {
    match holds {
        true => Ok(()),
        false => Err(LinuxError::Check(what())),
    }
}

/// Waits for something; whoever waits looks afterwards whether it came.
pub(super) fn until(
    patience: Duration,
    mut come: impl FnMut() -> Result<bool, LinuxError>,
) -> Result<(), LinuxError> {
    let deadline = Instant::now() + patience;
    while !come()? && Instant::now() < deadline {
        if signals::interrupted() {
            return Err(LinuxError::Interrupted);
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

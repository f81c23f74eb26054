//! A guest and its device, and what must hold of both after each change.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::facts::{self, Facts};
use super::{LinuxError, LinuxGuest, signals};
use crate::demo::size;
use crate::serve::control::{Command, Report};

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
    /// Whether device and guest had to agree at the end of it: what they have then follows from the script alone.
    pub settled: bool,
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

    pub(super) fn execute(&mut self, command: Command) -> Result<Report, LinuxError> {
        self.guest.execute(command)
    }

    pub(super) fn status(&mut self) -> Result<Report, LinuxError> {
        self.execute(Command::Status)
    }

    pub(super) fn request(&mut self, bytes: u64) -> Result<(), LinuxError> {
        self.execute(Command::Resize(bytes)).map(drop)
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
            Ok(status.plugged_size == bytes)
        })?;
        let sizes = (status.requested_size, status.plugged_size);
        check(sizes == (bytes, bytes), || {
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
        let seconds = begun.elapsed().as_secs_f64();
        self.same_memory(what, &facts)?;
        self.record(what, true, &facts, seconds)
    }

    /// What our device has plugged is what the guest has, address by address.
    fn same_memory(&mut self, what: &str, facts: &Facts) -> Result<(), LinuxError> {
        let Some(handle) = self.guest.device.handle() else {
            return Ok(());
        };
        let runs = handle.plugged_runs();
        let plugged: Vec<_> = runs
            .iter()
            .map(|run| run.guest_address..run.guest_address + run.len)
            .collect();
        let pages = self.run(&facts.pages_command())?;
        match facts.misplaced(&plugged, &pages) {
            Some(difference) => Err(LinuxError::Check(format!("{what}: {difference}"))),
            None => Ok(()),
        }
    }

    /// Waits until a state of the device has not changed for a while; what it is then.
    pub(super) fn unchanged(&mut self, still: Duration) -> Result<Report, LinuxError> {
        let (mut status, mut since) = (self.status()?, Instant::now());
        until(LONG, || {
            let now = self.status()?;
            if now.plugged_size != status.plugged_size {
                since = Instant::now();
            }
            status = now;
            Ok(since.elapsed() >= still)
        })?;
        Ok(status)
    }

    /// Writes down a step in which guest and device need not agree.
    pub(super) fn note(&mut self, what: &str, begun: Instant) -> Result<(), LinuxError> {
        let seconds = begun.elapsed().as_secs_f64();
        let facts = self.facts()?;
        self.record(what, false, &facts, seconds)
    }

    /// Writes down a step. At its end, unplugged memory must have come back to the host.
    fn record(
        &mut self,
        what: &str,
        settled: bool,
        facts: &Facts,
        seconds: f64,
    ) -> Result<(), LinuxError> {
        let status = self.status()?;
        check(
            !settled || status.resident_size <= status.plugged_size,
            || format!("{what}: more host memory than is plugged: {status:?}"),
        )?;
        let step = LinuxStep {
            what: what.to_owned(),
            settled,
            requested: status.requested_size,
            plugged: status.plugged_size,
            mem_total: facts.mem_total.saturating_sub(facts.boot_mem_total),
            memory_blocks: facts.added.len(),
            system_ram: facts.added_bytes(),
            resident: status.resident_size,
            seconds,
        };
        (self.show)(&step);
        self.steps.push(step);
        Ok(())
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

//! This project's kernel as the guest: the driver with a device it was not written for.

use std::path::Path;

use serde::Deserialize;
use virtio_mem_driver::driver::Strategy;

use super::cache::Cache;
use super::initramfs::READY;
use super::kernel::Kernel;
use super::packages::Tools;
use super::progress::Progress;
use super::qemu::Setup;
use super::session::{LONG, until};
use super::{DeviceKind, LinuxError, LinuxGuest, scripts, signals};
use crate::serve::control::{Command, Report};

/// What to run. Sizes are in bytes.
#[derive(Clone, Debug)]
pub struct OwnOptions<'a> {
    /// Where QEMU is kept.
    pub cache: &'a Path,
    /// How the driver works.
    pub strategy: Strategy,
    /// Which device.
    pub device: DeviceKind,
    /// Size of the device's blocks.
    pub block_size: u64,
    /// What is requested before the guest starts.
    pub requested: u64,
}

impl<'a> OwnOptions<'a> {
    /// A device with blocks of 2 MiB, of which none is requested.
    #[must_use]
    pub fn new(cache: &'a Path, strategy: Strategy, device: DeviceKind) -> Self {
        let Setup {
            block_size,
            requested,
            ..
        } = scripts::SETUP;
        Self {
            cache,
            strategy,
            device,
            block_size,
            requested,
        }
    }
}

/// What driver and page allocator have. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DriverFacts {
    /// What the driver is about, and why it rests.
    pub progress: String,
    /// What cannot be reached.
    pub unreachable: u64,
    /// Sub-Block or Big-Block Mode.
    pub mode: String,
    /// The least that the driver plugs.
    pub granule: u64,
    /// Size of the device's blocks.
    pub block_size: u64,
    /// First address of the region, and the one behind it.
    pub region: (u64, u64),
    /// How much of the region may be plugged now.
    pub usable: u64,
    /// What the device asks for.
    pub requested: u64,
    /// What the driver has plugged.
    pub plugged: u64,
    /// What the page allocator has of it.
    pub hotplugged: u64,
    /// Memory blocks of it.
    pub memory_blocks: u64,
    /// Pages in use.
    pub pages: u64,
    /// How often a page was moved.
    pub moved: u64,
    /// Requests the driver has sent.
    pub requests: u64,
    /// Features agreed on.
    pub features: u64,
}

/// This project's kernel, running in QEMU.
pub struct OwnGuest(LinuxGuest);

impl std::fmt::Debug for OwnGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OwnGuest").field(&self.0.qemu).finish()
    }
}

impl OwnGuest {
    /// Boots it up to its first answer.
    ///
    /// # Errors
    ///
    /// If QEMU is not to be had, or the guest does not run.
    pub fn boot(options: &OwnOptions<'_>, progress: &mut Progress) -> Result<Self, LinuxError> {
        boot(options, progress).map(Self)
    }

    /// Runs a command of the kernel, for what it prints (`resources/guest-image/src/bin/qemu_guest/main.rs`).
    ///
    /// # Errors
    ///
    /// If it fails, or the guest does not answer.
    pub fn run(&mut self, command: &str) -> Result<String, LinuxError> {
        self.0.qemu.console.run(command, LONG)
    }

    /// What the driver has.
    ///
    /// # Errors
    ///
    /// If there is none, or the guest does not answer.
    pub fn facts(&mut self) -> Result<DriverFacts, LinuxError> {
        let text = self.run("status")?;
        serde_json::from_str(&text).map_err(|error| LinuxError::Check(format!("{error}: {text}")))
    }

    /// What the driver has, as soon as it is as wanted, or after a long while.
    ///
    /// # Errors
    ///
    /// As [`facts`](Self::facts).
    pub fn wait_for(
        &mut self,
        wanted: impl Fn(&DriverFacts) -> bool,
    ) -> Result<DriverFacts, LinuxError> {
        let mut facts = self.facts()?;
        until(LONG, || {
            facts = self.facts()?;
            Ok(wanted(&facts))
        })?;
        Ok(facts)
    }

    /// Changes what the device asks for.
    ///
    /// # Errors
    ///
    /// If the device refuses.
    pub fn request(&mut self, bytes: u64) -> Result<(), LinuxError> {
        self.0.execute(Command::Resize(bytes)).map(drop)
    }

    /// What the device has, and how much host memory is behind its region.
    ///
    /// # Errors
    ///
    /// If it does not say.
    pub fn device(&mut self) -> Result<Report, LinuxError> {
        self.0.execute(Command::Status)
    }

    /// Resets the machine as its reset button does, and waits until the guest answers again.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn system_reset(&mut self) -> Result<(), LinuxError> {
        self.0.qemu.system_reset()
    }

    /// Starts the kernel anew without resetting machine or device, as one kernel starts another, and waits until it
    /// answers again.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn restart(&mut self) -> Result<(), LinuxError> {
        let console = &mut self.0.qemu.console;
        console.send(b"vmem restart\n")?;
        console.wait_for(READY, LONG, || ())
    }
}

pub(super) fn boot(
    options: &OwnOptions<'_>,
    progress: &mut Progress,
) -> Result<LinuxGuest, LinuxError> {
    signals::catch().map_err(LinuxError::file("signal handler"))?;
    let cache = Cache::open(options.cache)?;
    let tools = Tools::get(&cache, progress)?;
    let setup = Setup {
        block_size: options.block_size,
        requested: options.requested,
        ..scripts::SETUP
    };
    let kernel = Kernel::Own(options.strategy);
    LinuxGuest::start(&tools, kernel, options.device, &setup, progress)
}

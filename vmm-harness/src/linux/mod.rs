//! Stock Linux kernels in QEMU as the peer of a memory device.
//!
//! | to find | look at |
//! |---|---|
//! | where kernels, QEMU and shell come from | `packages.rs`, `apt.rs`, `sources.rs` |
//! | where they are kept | [`Cache`] |
//! | what runs in the guest | `initramfs.rs` |
//! | how QEMU is started, asked and ended | `qemu.rs`, `qmp.rs` |
//! | how the guest is told what to do | `console.rs` |
//! | which kernel the guest is | `kernel.rs`; of this project's: `own.rs` |
//! | which device it has | `device.rs` |
//! | what is tried | `scripts.rs` |
//! | what must hold | `session.rs`, `facts.rs` |
//! | all of it on both devices | [`Matrix`] |

mod apt;
mod cache;
mod console;
mod control;
mod device;
mod error;
mod facts;
mod host;
mod initramfs;
mod kernel;
mod matrix;
mod own;
mod packages;
mod progress;
mod prompt;
mod qemu;
mod qmp;
mod scripts;
mod session;
mod sources;

use std::path::Path;
use std::time::Duration;

pub use cache::Cache;
pub use control::execute_at;
pub use device::DeviceKind;
pub use error::LinuxError;
pub(crate) use host::date_and_machine;
pub use matrix::{Matrix, MatrixOptions, MatrixRun, differences, replace_generated, run_matrix};
pub use own::{DriverFacts, OwnGuest, OwnOptions};
pub use packages::{Browser, KernelSeries};
pub use progress::{Phase, Progress};
pub use scripts::{SCRIPTS, Script};
pub use session::LinuxStep;

use self::control::Control;
use self::device::{Host, MemoryDevice};
use self::kernel::Kernel;
use self::packages::{LinuxKernel, Tools};
use self::qemu::Qemu;
use self::session::Session;
use crate::serve::control::{Command, Report};

/// What to run.
#[derive(Debug)]
pub struct LinuxOptions<'a> {
    /// Where artefacts are kept.
    pub cache: &'a Path,
    /// Which kernel.
    pub kernel: KernelSeries,
    /// Which device.
    pub device: DeviceKind,
    /// Seed of what is random.
    pub seed: u64,
    /// How long random resizing goes on.
    pub random_for: Duration,
}

/// A script that has come to its end.
#[derive(Debug)]
pub struct LinuxRun {
    /// Packages that were used, and their versions.
    pub versions: Vec<String>,
    /// What was done and seen.
    pub steps: Vec<LinuxStep>,
}

/// Boots a guest and runs a script with it.
///
/// `show` is told of each step once it is over.
///
/// # Errors
///
/// If a part is not to be had, the guest does not run, or a check fails.
pub fn run_script(
    options: &LinuxOptions<'_>,
    script: &Script,
    progress: &mut Progress,
    show: &mut dyn FnMut(&LinuxStep),
) -> Result<LinuxRun, LinuxError> {
    let choices = scripts::Choices {
        seed: options.seed,
        random_for: options.random_for,
    };
    let mut session = Session::new(boot(options, script.setup(), progress)?, show);
    script.run(&mut session, &choices)?;
    let versions = session.guest.versions.clone();
    let steps = session.finish()?;
    Ok(LinuxRun { versions, steps })
}

/// Boots a guest and gives its console to whoever sits at the terminal.
///
/// # Errors
///
/// If a part is not to be had, or the guest does not run.
pub fn run_prompt(options: &LinuxOptions<'_>, progress: &mut Progress) -> Result<(), LinuxError> {
    prompt(boot(options, &scripts::SETUP, progress)?, progress)
}

/// Boots this project's kernel and gives its console to whoever sits at the terminal.
///
/// # Errors
///
/// If QEMU is not to be had, or the guest does not run.
pub fn run_own_prompt(options: &OwnOptions<'_>, progress: &mut Progress) -> Result<(), LinuxError> {
    prompt(own::boot(options, progress)?, progress)
}

fn prompt(mut guest: LinuxGuest, progress: &mut Progress) -> Result<(), LinuxError> {
    let socket = guest.qemu.dir().join("control");
    let control = Control::listen(&socket)?;
    progress.note(&format!(
        "to resize, from another terminal: vmem resize {} 1G",
        socket.display()
    ));
    progress.note("to leave: Ctrl-], or exit");
    prompt::run(&mut guest, &control)
}

/// A running guest and its device.
struct LinuxGuest {
    // Before the device, which is served to it until it ends.
    qemu: Qemu,
    device: Box<dyn MemoryDevice>,
    kernel: Kernel,
    versions: Vec<String>,
}

/// What a guest needs, from the cache or into it.
fn provision(
    cache: &Path,
    kernel: KernelSeries,
    progress: &mut Progress,
) -> Result<(Tools, LinuxKernel), LinuxError> {
    crate::signals::catch().map_err(LinuxError::file("signal handler"))?;
    let cache = Cache::open(cache)?;
    let tools = Tools::get(&cache, progress)?;
    let kernel = LinuxKernel::get(&cache, kernel, progress)?;
    Ok((tools, kernel))
}

fn boot(
    options: &LinuxOptions<'_>,
    setup: &qemu::Setup,
    progress: &mut Progress,
) -> Result<LinuxGuest, LinuxError> {
    let (tools, kernel) = provision(options.cache, options.kernel, progress)?;
    let kernel = Kernel::Linux(kernel);
    LinuxGuest::start(&tools, kernel, options.device, setup, progress)
}

impl LinuxGuest {
    fn start(
        tools: &Tools,
        kernel: Kernel,
        device: DeviceKind,
        setup: &qemu::Setup,
        progress: &mut Progress,
    ) -> Result<Self, LinuxError> {
        let mut device = device.make();
        let versions = [tools.versions()?, kernel.versions()?].concat();
        for version in &versions {
            progress.note(version);
        }
        progress.note(&format!("device: {}", device.name()));
        let qemu = Qemu::start(tools, &kernel, setup, device.as_mut(), progress)?;
        Ok(Self {
            qemu,
            device,
            kernel,
            versions,
        })
    }

    /// Has something done with the device; its state afterwards.
    fn execute(&mut self, command: Command) -> Result<Report, LinuxError> {
        let pid = self.qemu.pid();
        let qmp = &mut self.qemu.qmp;
        self.device.execute(&mut Host { qmp, pid }, command)
    }
}

/// A seed that is another one each time.
#[must_use]
pub fn new_seed() -> u64 {
    fastrand::u64(0..1 << 32)
}

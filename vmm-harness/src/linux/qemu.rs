//! One QEMU: its process, console and control socket, and the files they need. All of it ends with the value.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::LinuxError;
use super::console::Console;
use super::device::MemoryDevice;
use super::initramfs;
use super::kernel::Kernel;
use super::packages::Tools;
use super::progress::Progress;
use super::qmp::Qmp;
use super::signals;

/// Booting takes seconds, or a minute on a busy machine.
const BOOT: Duration = Duration::from_secs(600);

/// How often something is looked for that comes soon.
const LOOK: Duration = Duration::from_millis(20);

/// What the machine is like at the start. Sizes are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// Memory the guest has without the device.
    pub(super) boot_memory: u64,
    /// Size of the device's region.
    pub(super) region: u64,
    /// Size of the device's blocks.
    pub(super) block_size: u64,
    /// What is requested before the guest starts.
    pub(super) requested: u64,
    /// What the kernel does with memory that is added: a value of `auto_online_blocks`.
    pub(super) online: &'static str,
}

/// A running guest.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) console: Console,
    pub(super) qmp: Qmp,
    process: Process,
}

/// Ends QEMU, before its files are removed.
#[derive(Debug)]
struct Process {
    child: Child,
    dir: TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended; there is nobody to tell if it cannot be ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Boots the guest up to its first answer.
    pub(super) fn start(
        tools: &Tools,
        kernel: &Kernel,
        setup: &Setup,
        device: &mut dyn MemoryDevice,
        progress: &mut Progress,
    ) -> Result<Self, LinuxError> {
        let dir = tempfile::Builder::new().prefix("vmem-").tempdir();
        let dir = dir.map_err(LinuxError::file(std::env::temp_dir()))?;
        let socket = dir.path().join("qmp");

        let mut command = own_loader(&tools.qemu_root());
        command.args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "1",
        ]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        // However this process ends, QEMU does not outlive it.
        command.args(["-run-with", "exit-with-parent=on"]);
        let mut options = device.kernel_options(setup);
        options.insert_str(0, &kernel.options(setup));
        command.args(kernel.qemu_options(tools, dir.path())?);
        command.arg("-append").arg(options);
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(device.qemu_options(setup, dir.path())?);
        let mut phase = progress.phase("boot");
        let (mut process, input, output) = Process::spawn(command, dir)?;
        let qmp = process.connect(&socket)?;
        let mut console = Console::new(input, output);
        let booted = console.wait_for(initramfs::READY, BOOT, || phase.tick(""));
        booted.map_err(|error| process.explain(error))?;
        phase.done("");
        Ok(Self {
            console,
            qmp,
            process,
        })
    }

    /// Resets the machine as its reset button does, and waits until the guest answers again.
    pub(super) fn system_reset(&mut self) -> Result<(), LinuxError> {
        // A reset nobody asked for ends QEMU, this one does not.
        self.qmp
            .execute("set-action", &json!({ "reboot": "reset" }))?;
        self.qmp.execute("system_reset", &json!({}))?;
        self.console.wait_for(initramfs::READY, BOOT, || ())?;
        self.qmp
            .execute("set-action", &json!({ "reboot": "shutdown" }))?;
        Ok(())
    }

    /// The process's id.
    pub(super) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Folder for more files of this run.
    pub(super) fn dir(&self) -> &Path {
        self.process.dir.path()
    }
}

impl Process {
    fn spawn(
        mut command: Command,
        dir: TempDir,
    ) -> Result<(Self, ChildStdin, ChildStdout), LinuxError> {
        let log = dir.path().join("stderr");
        let errors = File::create(&log).map_err(LinuxError::file(log))?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let program = Path::new(command.get_program()).to_owned();
        let mut child = command.spawn().map_err(LinuxError::file(program))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let process = Self { child, dir };
        let (input, output) = pipes.ok_or_else(|| LinuxError::Qemu("it has no console".into()))?;
        Ok((process, input, output))
    }

    /// Waits for the control socket.
    fn connect(&mut self, socket: &Path) -> Result<Qmp, LinuxError> {
        let deadline = Instant::now() + BOOT;
        loop {
            match Qmp::connect(socket) {
                Ok(qmp) => return Ok(qmp),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) if signals::interrupted() => return Err(LinuxError::Interrupted),
                Err(error) => {
                    if let Ok(Some(status)) = self.child.try_wait() {
                        return Err(
                            self.explain(LinuxError::Qemu(format!("it has ended with {status}")))
                        );
                    }
                    // Not there yet, or there and nobody listens yet.
                    if !matches!(error, LinuxError::File { .. }) {
                        return Err(error);
                    }
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Adds what QEMU said on standard error.
    fn explain(&self, error: LinuxError) -> LinuxError {
        let said = fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default();
        match error {
            LinuxError::Interrupted => error,
            _ if said.trim().is_empty() => error,
            _ => LinuxError::Qemu(format!("{}\n{error}", said.trim())),
        }
    }
}

/// QEMU with the C library it was built for, which need not be that of this machine.
fn own_loader(root: &Path) -> Command {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(&libraries)
        .args(["--argv0", "qemu-system-x86_64"]);
    command.arg(root.join("usr/bin/qemu-system-x86_64"));
    command
        .arg("-L")
        .arg(root.join("usr/share/qemu"))
        .arg("-L")
        .arg(root.join("usr/share/seabios"));
    // Else it finds the modules of another QEMU, which it refuses.
    command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_does_not_start_says_why() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such machine >&2; exit 3"]);
        let (mut process, _input, _output) =
            Process::spawn(command, tempfile::tempdir().unwrap()).unwrap();
        let error = process
            .connect(Path::new("/nonexistent/qmp"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no such machine") && error.contains("exit status: 3"),
            "{error}"
        );
    }

    #[test]
    fn the_process_and_its_files_end_with_the_value() {
        let mut command = Command::new("sh");
        command.args(["-c", "exec sleep 1000"]);
        let (process, _input, _output) =
            Process::spawn(command, tempfile::tempdir().unwrap()).unwrap();
        let (dir, pid) = (process.dir.path().to_owned(), process.child.id());
        assert!(dir.exists() && Path::new(&format!("/proc/{pid}")).exists());
        drop(process);
        assert!(!dir.exists() && !Path::new(&format!("/proc/{pid}")).exists());
    }
}

//! `vmem run` as a process.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

/// The command, with `args`.
pub(crate) fn vmem(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmem"));
    command.args(args).env_remove("VMEM_API_SOCK");
    command
}

/// Exit code, standard output and standard error of the command.
pub(crate) fn output(args: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = vmem(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// For a `vmem` that is broken; nothing here depends on how fast the machine is.
const PATIENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// A `vmem run` that listens; it does not outlive the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    stdout: BufReader<Patient<ChildStdout>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error is that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fails to read what does not come.
struct Patient<T>(T);

impl<T: Read + AsFd> Read for Patient<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let readable = PollFd::new(&self.0, PollFlags::IN);
        match poll(&mut [readable], Some(&PATIENCE))? {
            0 => Err(ErrorKind::TimedOut.into()),
            _ => self.0.read(buffer),
        }
    }
}

impl Running {
    /// Serves at `socket`, with a guest in process.
    pub(crate) fn start(socket: &Path, args: &[&str]) -> Self {
        let mut command = vmem(&["run", "--guest", "in-process"]);
        Self::listening(command.args(args).arg("--api-sock").arg(socket))
    }

    /// Runs a command until it says that it listens.
    pub(crate) fn listening(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(Patient(child.stdout.take().unwrap()));
        let mut running = Self { child, stdout };
        let mut line = String::new();
        running.stdout.read_line(&mut line).unwrap();
        assert!(line.contains("control API at"), "{line}");
        running
    }

    /// Tells it to do something, or to end.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The exit code and what else it has said.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

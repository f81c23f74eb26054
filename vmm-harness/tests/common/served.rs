//! `vmem serve` as a process, and a VMM that is its client.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use virtio_mem::wire::{Features, Request, Span};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_harness::BootMemory;
use vmm_harness::layout::REGION_START;

use crate::ring;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 2 * MIB;
pub(crate) const RAM: u64 = MIB;
pub(crate) const REGION: u64 = 64 * MIB;

pub(crate) const CONNECT: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;

/// A server, killed when the test is over.
pub(crate) struct Served {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// What it says on standard error, shown if the test fails.
    log: File,
    pub(crate) socket: PathBuf,
}

/// What a server holds of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// The kind of each descriptor, ordered.
    descriptors: Vec<String>,
    threads: usize,
    /// Shared ones: what is private is the server's own, and comes and goes with its heap.
    mappings: usize,
}

/// A path nobody else uses.
pub(crate) fn socket_path() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("vmem-serve-{}-{count}.sock", std::process::id());
    std::env::temp_dir().join(name)
}

fn vmem_serve(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmem"));
    command.arg("serve").arg("--socket").arg(socket).args(args);
    command
}

/// Exit code and standard error of a server that should not start. One that does is told to quit at once.
pub(crate) fn refused(socket: &Path, args: &[&str]) -> (Option<i32>, String) {
    let (quit, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"quit\n").unwrap();
    let output = vmem_serve(socket, args).stdin(quit).output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

impl Served {
    /// A device of [`REGION`] bytes in blocks of [`BLOCK`], of which 16 MiB are requested.
    pub(crate) fn start() -> Self {
        Self::start_at(&socket_path())
    }

    pub(crate) fn start_at(socket: &Path) -> Self {
        let args = [
            "--region-size",
            "64M",
            "--block-size",
            "2M",
            "--size",
            "16M",
        ];
        let log = tempfile::tempfile().unwrap();
        let mut child = vmem_serve(socket, &args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.try_clone().unwrap())
            .spawn()
            .unwrap();
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut served = Self {
            child,
            commands,
            answers,
            log,
            socket: socket.to_owned(),
        };
        assert!(served.answer()["listening"].is_string());
        served
    }

    fn answer(&mut self) -> Value {
        assert!(is_readable(self.answers.get_ref(), 60), "no answer");
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// What the server answers to `line`.
    pub(crate) fn command(&mut self, line: &str) -> Value {
        writeln!(self.commands.as_mut().unwrap(), "{line}").unwrap();
        self.answer()
    }

    pub(crate) fn plugged(&mut self) -> u64 {
        self.command("status")["plugged_size"].as_u64().unwrap()
    }

    pub(crate) fn close_input(&mut self) {
        self.commands = None;
    }

    /// Counted while a client is there that has done nothing yet: then the one before is gone for good.
    pub(crate) fn holdings(&self) -> Holdings {
        let client = vfio_user::Client::new(&self.socket).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let entries = |name| std::fs::read_dir(proc.join(name)).unwrap();
        let target = |entry: std::io::Result<std::fs::DirEntry>| {
            let target = std::fs::read_link(entry.unwrap().path()).unwrap();
            // Without the number of the inode.
            let target = target.to_str().unwrap();
            target
                .split(['[', '/'])
                .find(|part| !part.is_empty())
                .unwrap()
                .to_owned()
        };
        let mut descriptors: Vec<_> = entries("fd").map(target).collect();
        descriptors.sort();
        let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
        drop(client);
        Holdings {
            descriptors,
            threads: entries("task").count(),
            mappings: maps.lines().filter(|line| is_shared(line)).count(),
        }
    }

    /// What it has said on standard error; read by offset, since the server's descriptor shares the position.
    fn log(&self) -> String {
        let mut log = vec![0; self.log.metadata().unwrap().len() as usize];
        self.log.read_exact_at(&mut log, 0).unwrap();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Waits until it has said `text`.
    pub(crate) fn until_said(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not said");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many descriptors it has, and how many of them a child of it would have as well.
    pub(crate) fn descriptors(&self) -> (usize, usize) {
        let fdinfo = std::fs::read_dir(format!("/proc/{}/fdinfo", self.child.id())).unwrap();
        let is_inherited = |entry: std::io::Result<std::fs::DirEntry>| {
            let info = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            flags & rustix::fs::OFlags::CLOEXEC.bits() == 0
        };
        let inherited: Vec<_> = fdinfo.map(is_inherited).collect();
        let count = inherited.iter().filter(|inherited| **inherited).count();
        (inherited.len(), count)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that says whose the socket is.
    pub(crate) fn lock(&self) -> PathBuf {
        self.socket.with_extension("sock.lock")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server said:\n{}", self.log());
        }
        for left in [&self.socket, &self.lock()] {
            let _ = std::fs::remove_file(left);
        }
    }
}

/// Whether a line of `/proc/…/maps` is a shared mapping: `7f00-7f10 rw-s …`.
fn is_shared(line: &str) -> bool {
    line.split(' ').nth(1).unwrap().ends_with('s')
}

/// The memory of a machine: RAM at 0 and the device's region, in one file.
pub(crate) struct GuestMemory {
    pub(crate) file: Arc<File>,
    pub(crate) view: BootMemory,
}

impl GuestMemory {
    pub(crate) fn new() -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("guest", flags).unwrap();
        let file = Arc::new(File::from(fd));
        file.set_len(RAM + REGION).unwrap();
        let part = |address, len, offset| {
            let file = FileOffset::from_arc(Arc::clone(&file), offset);
            (GuestAddress(address), len as usize, Some(file))
        };
        let parts = [part(0, RAM, 0), part(REGION_START, REGION, RAM)];
        let view = BootMemory::from_ranges_with_files(parts).unwrap();
        // All of RAM has its pages now: what is allocated from here on is the region's.
        view.write_slice(&[0; RAM as usize], GuestAddress(0))
            .unwrap();
        Self { file, view }
    }

    /// From now on nobody can punch holes into it.
    pub(crate) fn seal(&self) {
        rustix::fs::fcntl_add_seals(&self.file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    }

    /// Bytes of the host's that RAM and region have, as the host counts them.
    pub(crate) fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.file.metadata().unwrap()) * 512
    }
}

/// A driver in a machine whose device is served.
pub(crate) struct Guest {
    pub(crate) client: vfio_user::Client,
    pub(crate) memory: GuestMemory,
    /// Vector 0 for configuration changes, 1 for the queue.
    pub(crate) vectors: [File; 2],
    sent: u16,
}

/// Where the structures are in BAR 0, as the capabilities say.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
pub(crate) const ISR: u8 = 3;
pub(crate) const DEVICE: u8 = 4;

impl Guest {
    /// All memory is mapped, MSI-X is enabled, the driver has not come yet.
    pub(crate) fn connect(served: &Served) -> Self {
        let mut guest = Self::without_memory(served);
        guest.map(0, 0, RAM);
        guest.map(RAM, REGION_START, REGION);
        guest
    }

    pub(crate) fn without_memory(served: &Served) -> Self {
        let mut client = vfio_user::Client::new(&served.socket).unwrap();
        let vectors = [(); 2].map(|()| eventfd());
        // As QEMU does it: MSI-X first, then the vectors one by one.
        let index = VFIO_PCI_MSIX_IRQ_INDEX;
        client.set_irqs(index, CONNECT, 0, 1, &[]).unwrap();
        for (number, vector) in (0..).zip(&vectors) {
            let fd = vector.as_raw_fd();
            client.set_irqs(index, CONNECT, number, 1, &[fd]).unwrap();
        }
        Self {
            client,
            memory: GuestMemory::new(),
            vectors,
            sent: 0,
        }
    }

    pub(crate) fn map(&mut self, offset: u64, address: u64, size: u64) {
        let fd = self.memory.file.as_raw_fd();
        self.client.dma_map(offset, address, size, fd).unwrap();
    }

    fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xa5; N];
        let region = VFIO_PCI_CONFIG_REGION_INDEX;
        self.client.region_read(region, offset, &mut data).unwrap();
        data
    }

    /// Offset in BAR 0 of the structure of type `cfg_type`.
    fn structure(&mut self, cfg_type: u8) -> u64 {
        let [mut at] = self.config(0x34);
        loop {
            assert_ne!(at, 0, "no capability of type {cfg_type}");
            let [id, next, _, found, bar] = self.config(at.into());
            if (id, found, bar) == (0x09, cfg_type, 0) {
                return u32::from_le_bytes(self.config(u64::from(at) + 8)).into();
            }
            at = next;
        }
    }

    pub(crate) fn read<const N: usize>(&mut self, cfg_type: u8, offset: u64) -> [u8; N] {
        let mut data = [0xa5; N];
        let at = self.structure(cfg_type) + offset;
        self.client.region_read(0, at, &mut data).unwrap();
        data
    }

    pub(crate) fn write(&mut self, cfg_type: u8, offset: u64, data: &[u8]) {
        let at = self.structure(cfg_type) + offset;
        self.client.region_write(0, at, data).unwrap();
    }

    pub(crate) fn status(&mut self) -> u8 {
        let [status] = self.read(COMMON, 0x14);
        status
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        self.write(COMMON, 0x14, &[status]);
    }

    /// From a reset to DRIVER_OK, with rings in RAM.
    pub(crate) fn start_driver(&mut self) {
        self.start_driver_without_memory();
        assert_eq!(self.status(), 1 | 2 | 8 | 4);
    }

    /// As [`start_driver`](Self::start_driver), for a device that cannot start.
    pub(crate) fn start_driver_without_memory(&mut self) {
        ring::clear(&self.memory.view);
        self.sent = 0;
        for status in [0, 1, 1 | 2] {
            self.set_status(status);
        }
        let accepted = (Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE).bits();
        for (word, features) in [(0u32, accepted as u32), (1, (accepted >> 32) as u32)] {
            self.write(COMMON, 0x08, &word.to_le_bytes());
            self.write(COMMON, 0x0c, &features.to_le_bytes());
        }
        self.set_status(1 | 2 | 8);
        assert_eq!(self.status(), 1 | 2 | 8);
        self.write(COMMON, 0x10, &0u16.to_le_bytes());
        self.write(COMMON, 0x16, &0u16.to_le_bytes());
        self.write(COMMON, 0x18, &ring::SIZE.to_le_bytes());
        self.write(COMMON, 0x1a, &1u16.to_le_bytes());
        for (offset, ring) in [
            (0x20, ring::DESCRIPTORS),
            (0x28, ring::AVAILABLE),
            (0x30, ring::USED),
        ] {
            self.write(COMMON, offset, &ring.to_le_bytes());
        }
        self.write(COMMON, 0x1c, &1u16.to_le_bytes());
        self.set_status(1 | 2 | 8 | 4);
    }

    /// Sends a request and does not wait for the answer.
    pub(crate) fn send(&mut self, request: Request) {
        ring::add(&self.memory.view, self.sent, request);
        self.sent += 1;
        self.write(NOTIFY, 0, &0u16.to_le_bytes());
    }

    /// Sends a request with room for its answer in block `block`; the bytes written there, and the first of them.
    pub(crate) fn request_answered_in(&mut self, request: Request, block: u64) -> (u32, u64) {
        let index = self.sent;
        ring::add(&self.memory.view, index, request);
        let buffer = GuestAddress(ring::DESCRIPTORS + 16);
        let block = REGION_START + block * BLOCK;
        self.memory.view.write_obj(block, buffer).unwrap();
        self.sent += 1;
        self.write(NOTIFY, 0, &0u16.to_le_bytes());
        assert!(signalled(&self.vectors[1]));
        let used = ring::USED + 4 + u64::from(index % ring::SIZE) * 8;
        let read = |at| self.memory.view.read_obj(GuestAddress(at)).unwrap();
        let [_, written]: [u32; 2] = [read(used), read(used + 4)];
        (
            written,
            self.memory.view.read_obj(GuestAddress(block)).unwrap(),
        )
    }

    /// Sends a request; type and state of its answer, once the queue's vector has been signalled.
    pub(crate) fn request(&mut self, request: Request) -> (u16, u16) {
        self.send(request);
        assert!(signalled(&self.vectors[1]));
        assert_eq!(ring::used_index(&self.memory.view), self.sent);
        ring::response(&self.memory.view)
    }

    pub(crate) fn plug(&mut self, first: u64, count: u16) -> u16 {
        self.request(Request::Plug(span(first, count))).0
    }

    pub(crate) fn unplug(&mut self, first: u64, count: u16) -> u16 {
        self.request(Request::Unplug(span(first, count))).0
    }

    /// Writes to each page of `count` blocks.
    pub(crate) fn fill(&self, first: u64, count: u64) {
        for page in first * BLOCK / 4096..(first + count) * BLOCK / 4096 {
            let at = GuestAddress(REGION_START + page * 4096);
            self.memory.view.write_obj(page + 1, at).unwrap();
        }
    }

    /// The number [`fill`](Self::fill) has left in the first page of a block, 0 in a hole.
    pub(crate) fn mark(&self, block: u64) -> u64 {
        let at = GuestAddress(REGION_START + block * BLOCK);
        self.memory.view.read_obj(at).unwrap()
    }
}

pub(crate) fn span(first: u64, block_count: u16) -> Span {
    Span {
        addr: REGION_START + first * BLOCK,
        block_count,
    }
}

pub(crate) fn eventfd() -> File {
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
    File::from(fd.unwrap())
}

/// Waits until an eventfd is signalled, and takes the signal. False after longer than anything takes.
pub(crate) fn signalled(eventfd: &File) -> bool {
    take_signal(eventfd, 60)
}

/// As [`signalled`], for what has happened already or not at all.
pub(crate) fn is_signalled(eventfd: &File) -> bool {
    take_signal(eventfd, 0)
}

fn take_signal(mut eventfd: &File, seconds: i64) -> bool {
    is_readable(eventfd, seconds) && eventfd.read_exact(&mut [0; 8]).is_ok()
}

fn is_readable(fd: &impl AsFd, seconds: i64) -> bool {
    let mut poll = [PollFd::new(fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut poll, Some(&timeout)).unwrap() == 1
}

//! Which memory device the guest gets, and how the host resizes it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use serde::Serialize;
use serde_json::json;
use virtio_mem::{Handle, LentFiles, VirtioMem};
use vm_memory::GuestAddress;

use super::LinuxError;
use super::qemu::Setup;
use super::qmp::Qmp;
use crate::serve::control::{Command, Report};
use crate::vfio_user::{Server, ServerError, ServerSocket};

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum DeviceKind {
    /// QEMU's own `virtio-mem-pci`, which this driver has been tested against for years: the reference.
    Qemu,
    /// Ours, served over vfio-user by this process.
    Ours,
}

impl DeviceKind {
    /// In a word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Ours => "ours",
        }
    }

    pub(super) fn make(self) -> Box<dyn MemoryDevice> {
        match self {
            Self::Qemu => Box::new(Reference),
            Self::Ours => Box::new(Ours::default()),
        }
    }
}

/// A memory device as seen from the host.
pub(super) trait MemoryDevice: Send {
    /// For people.
    fn name(&self) -> &'static str;

    /// Options of QEMU for the guest's memory and the device. Files for it go to `dir`.
    fn qemu_options(&mut self, setup: &Setup, dir: &Path) -> Result<Vec<String>, LinuxError>;

    /// Options of the kernel.
    fn kernel_options(&self, _setup: &Setup) -> String {
        String::new()
    }

    /// Does what the host wants done with it; its state afterwards.
    fn execute(&mut self, host: &mut Host<'_>, command: Command) -> Result<Report, LinuxError>;

    /// More than its state, if the device is ours.
    fn handle(&self) -> Option<&Handle> {
        None
    }
}

/// How QEMU is asked.
pub(super) struct Host<'a> {
    pub(super) qmp: &'a mut Qmp,
    pub(super) pid: u32,
}

/// QEMU's path of the device.
const DEVICE: &str = "/machine/peripheral/vmem0";

/// QEMU's name for a file of this kind.
const MEMFD: &str = "memory-backend-memfd";

/// QEMU's device. Its region is the only memory of QEMU's that is a file.
#[derive(Debug)]
struct Reference;

impl MemoryDevice for Reference {
    fn name(&self) -> &'static str {
        "QEMU's virtio-mem-pci"
    }

    fn qemu_options(&mut self, setup: &Setup, _dir: &Path) -> Result<Vec<String>, LinuxError> {
        let Setup {
            boot_memory,
            region,
            block_size,
            requested,
            ..
        } = *setup;
        let device = json!({
            "driver": "virtio-mem-pci", "id": "vmem0", "memdev": "vmem",
            "block-size": block_size, "requested-size": requested,
        });
        // Room for the region above the guest's memory, whatever its alignment.
        let most = boot_memory + 2 * region;
        Ok(vec![
            "-m".into(),
            format!("size={boot_memory}B,maxmem={most}B"),
            "-object".into(),
            format!("{MEMFD},id=vmem,size={region},share=on"),
            "-device".into(),
            device.to_string(),
        ])
    }

    fn execute(&mut self, host: &mut Host<'_>, command: Command) -> Result<Report, LinuxError> {
        match command {
            Command::Resize(bytes) => {
                let arguments =
                    json!({ "path": DEVICE, "property": "requested-size", "value": bytes });
                host.qmp.execute("qom-set", &arguments)?;
            }
            Command::Freeze | Command::Thaw => {
                let name = self.name();
                return Err(LinuxError::Unsupported(format!("{name} cannot be frozen")));
            }
            Command::Status | Command::Quit => {}
        }
        let mut get = |property: &str| {
            let arguments = json!({ "path": DEVICE, "property": property });
            let value = host.qmp.execute("qom-get", &arguments)?;
            value
                .as_u64()
                .ok_or_else(|| LinuxError::Qemu(format!("{property} is no size: {value}")))
        };
        Ok(Report {
            requested_size: get("requested-size")?,
            plugged_size: get("size")?,
            usable_region_size: None,
            resident_size: resident_bytes(host.pid)?,
            frozen: false,
        })
    }
}

/// Host memory behind the region.
fn resident_bytes(pid: u32) -> Result<u64, LinuxError> {
    let dir = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(&dir).map_err(LinuxError::file(&dir))? {
        let path = entry.map_err(LinuxError::file(&dir))?.path();
        // Another descriptor may be closed meanwhile.
        let target = fs::read_link(&path).unwrap_or_default();
        if is_memfd(&target) {
            let file = fs::metadata(&path).map_err(LinuxError::file(&path))?;
            return Ok(file.blocks() * 512);
        }
    }
    Err(LinuxError::Qemu("it has no memory that is a file".into()))
}

/// Where a machine of this kind has its memory above 4 GiB, and how much of it is below that.
const HIGH_MEMORY: u64 = 4 << 30;
const LOW_MEMORY: u64 = 2 << 30;

/// Our device. Its region is memory of the machine that the kernel is told to leave alone.
#[derive(Debug, Default)]
struct Ours {
    served: Option<Served>,
}

/// The device, and the thread that serves it to one client.
#[derive(Debug)]
struct Served {
    handle: Handle,
    socket: PathBuf,
    server: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        // Should QEMU not have come, this client goes again at once. If nobody listens any more, the better.
        drop(UnixStream::connect(&self.socket));
        if let Some(Ok(Err(error))) = self.server.take().map(JoinHandle::join) {
            log::error!("memory device: {error}");
        }
    }
}

impl Ours {
    fn serve(setup: &Setup, socket: PathBuf) -> Result<Served, LinuxError> {
        let failed = |error: &dyn std::error::Error| LinuxError::Device(error.to_string());
        let lent = LentFiles::new(setup.region).map_err(|error| failed(&error))?;
        let device = VirtioMem::builder(GuestAddress(HIGH_MEMORY), lent.clone());
        let device = device
            .block_size(setup.block_size)
            .requested_size(setup.requested)
            .build();
        let device = device.map_err(|error| failed(&error))?;
        let handle = device.handle();
        let listener = ServerSocket::bind(&socket).map_err(|error| failed(&error))?;
        let mut server = Server::new(&listener, device, lent).map_err(|error| failed(&error))?;
        let serve = move || {
            let served = server.serve_client();
            // Its file goes when nobody can connect any more.
            drop(listener);
            served
        };
        let server = thread::Builder::new()
            .name("vmem-serve".into())
            .spawn(serve)
            .map_err(|error| failed(&error))?;
        Ok(Served {
            handle,
            socket,
            server: Some(server),
        })
    }
}

impl MemoryDevice for Ours {
    fn name(&self) -> &'static str {
        "this project's, over vfio-user"
    }

    fn qemu_options(&mut self, setup: &Setup, dir: &Path) -> Result<Vec<String>, LinuxError> {
        let socket = dir.join("device");
        let device =
            json!({ "driver": "vfio-user-pci", "socket": { "type": "unix", "path": &socket } });
        self.served = Some(Self::serve(setup, socket)?);
        let memory = LOW_MEMORY + setup.region;
        Ok(vec![
            "-m".into(),
            format!("size={memory}B"),
            "-object".into(),
            format!("{MEMFD},id=ram,size={memory},share=on"),
            "-machine".into(),
            "memory-backend=ram".into(),
            "-device".into(),
            device.to_string(),
        ])
    }

    fn kernel_options(&self, setup: &Setup) -> String {
        format!("mem={}", setup.boot_memory)
    }

    fn execute(&mut self, _: &mut Host<'_>, command: Command) -> Result<Report, LinuxError> {
        let handle = self.handle();
        let handle = handle.ok_or_else(|| LinuxError::Device("it is not served".into()))?;
        Ok(command.execute(handle)?)
    }

    fn handle(&self) -> Option<&Handle> {
        self.served.as_ref().map(|served| &served.handle)
    }
}

/// `/memfd:NAME (deleted)`
fn is_memfd(target: &Path) -> bool {
    target
        .to_string_lossy()
        .starts_with(&format!("/memfd:{MEMFD}"))
}

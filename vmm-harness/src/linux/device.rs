//! Which memory device the guest gets, and how the host resizes it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use serde_json::json;
use virtio_mem::{Handle, LentFiles, VirtioMem};
use vm_memory::GuestAddress;

use super::LinuxError;
use super::qemu::Setup;
use super::qmp::Qmp;
use crate::serve::control::{Command, Report};
use crate::vfio_user::{Server, ServerError, ServerSocket};

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// QEMU's own `virtio-mem-pci`, which this driver has been tested against for years: the reference.
    Qemu,
    /// Ours, served over vfio-user by this process.
    Ours,
}

impl DeviceKind {
    pub(super) fn make(self) -> Box<dyn MemoryDevice> {
        match self {
            Self::Qemu => Box::new(Reference),
            Self::Ours => Box::new(Ours::default()),
        }
    }
}

/// The state of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// What the host asks for.
    pub requested: u64,
    /// What the guest has plugged.
    pub plugged: u64,
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

    /// Changes the requested size.
    fn resize(&mut self, qmp: &mut Qmp, bytes: u64) -> Result<(), LinuxError>;

    /// Requested and plugged size.
    fn status(&mut self, qmp: &mut Qmp) -> Result<DeviceStatus, LinuxError>;

    /// Host memory behind the device's region, in bytes; `pid` is QEMU's.
    fn resident_bytes(&mut self, pid: u32) -> Result<u64, LinuxError>;

    /// Holds requests off, or ends that.
    fn set_frozen(&mut self, _frozen: bool) -> Result<(), LinuxError> {
        Err(LinuxError::Unsupported(format!(
            "{} cannot be frozen",
            self.name()
        )))
    }
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

    fn resize(&mut self, qmp: &mut Qmp, bytes: u64) -> Result<(), LinuxError> {
        let arguments = json!({ "path": DEVICE, "property": "requested-size", "value": bytes });
        qmp.execute("qom-set", &arguments).map(|_| ())
    }

    fn status(&mut self, qmp: &mut Qmp) -> Result<DeviceStatus, LinuxError> {
        let mut get = |property: &str| {
            let value = qmp.execute("qom-get", &json!({ "path": DEVICE, "property": property }))?;
            value
                .as_u64()
                .ok_or_else(|| LinuxError::Qemu(format!("{property} is no size: {value}")))
        };
        Ok(DeviceStatus {
            requested: get("requested-size")?,
            plugged: get("size")?,
        })
    }

    fn resident_bytes(&mut self, pid: u32) -> Result<u64, LinuxError> {
        let dir = format!("/proc/{pid}/fd");
        for entry in fs::read_dir(&dir).map_err(LinuxError::file(&dir))? {
            let path = entry.map_err(LinuxError::file(&dir))?.path();
            // Another descriptor may be closed meanwhile.
            let target = fs::read_link(&path).unwrap_or_default();
            if is_memfd(&target) {
                let blocks = fs::metadata(&path)
                    .map_err(LinuxError::file(&path))?
                    .blocks();
                return Ok(blocks * 512);
            }
        }
        Err(LinuxError::Qemu("it has no memory that is a file".into()))
    }
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

    fn execute(&self, command: Command) -> Result<Report, LinuxError> {
        let served = self
            .served
            .as_ref()
            .ok_or_else(|| LinuxError::Device("it is not served".into()))?;
        command
            .execute(&served.handle)
            .map_err(|error| LinuxError::Device(error.to_string()))
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

    fn resize(&mut self, _: &mut Qmp, bytes: u64) -> Result<(), LinuxError> {
        self.execute(Command::Resize(bytes)).map(|_| ())
    }

    fn status(&mut self, _: &mut Qmp) -> Result<DeviceStatus, LinuxError> {
        let report = self.execute(Command::Status)?;
        Ok(DeviceStatus {
            requested: report.requested_size,
            plugged: report.plugged_size,
        })
    }

    fn resident_bytes(&mut self, _: u32) -> Result<u64, LinuxError> {
        Ok(self.execute(Command::Status)?.resident_size)
    }

    fn set_frozen(&mut self, frozen: bool) -> Result<(), LinuxError> {
        self.execute(if frozen {
            Command::Freeze
        } else {
            Command::Thaw
        })
        .map(|_| ())
    }
}

/// `/memfd:NAME (deleted)`
fn is_memfd(target: &Path) -> bool {
    target
        .to_string_lossy()
        .starts_with(&format!("/memfd:{MEMFD}"))
}

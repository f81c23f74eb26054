//! Which memory device the guest gets, and how the host resizes it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use super::LinuxError;
use super::qemu::Setup;
use super::qmp::Qmp;

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// QEMU's own `virtio-mem-pci`, which this driver has been tested against for years: the reference.
    Qemu,
}

impl DeviceKind {
    pub(super) fn make(self) -> Box<dyn MemoryDevice> {
        match self {
            Self::Qemu => Box::new(Reference),
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

    /// Options of QEMU for the guest's memory and the device.
    fn qemu_options(&self, setup: &Setup) -> Vec<String>;

    /// Changes the requested size.
    fn resize(&mut self, qmp: &mut Qmp, bytes: u64) -> Result<(), LinuxError>;

    /// Requested and plugged size.
    fn status(&mut self, qmp: &mut Qmp) -> Result<DeviceStatus, LinuxError>;

    /// Host memory behind the device's region, in bytes; `pid` is QEMU's.
    fn resident_bytes(&mut self, pid: u32) -> Result<u64, LinuxError>;
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

    fn qemu_options(&self, setup: &Setup) -> Vec<String> {
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
        vec![
            "-m".into(),
            format!("size={boot_memory}B,maxmem={most}B"),
            "-object".into(),
            format!("{MEMFD},id=vmem,size={region},share=on"),
            "-device".into(),
            device.to_string(),
        ]
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

/// `/memfd:NAME (deleted)`
fn is_memfd(target: &Path) -> bool {
    target
        .to_string_lossy()
        .starts_with(&format!("/memfd:{MEMFD}"))
}

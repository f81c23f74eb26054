//! The memory device on the first PCI bus, where firmware has given addresses to everything.

use core::fmt;

use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, PciError, PciRoot,
};
use virtio_drivers::transport::pci::{PciTransport, VirtioPciError, virtio_device_type};
use vmem_guest_image::identity::HeapHal;

use crate::boot::MAPPED;
use crate::ports;

/// Configuration space by ports.
struct Ports;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

fn select(device: DeviceFunction, register: u8) {
    let DeviceFunction {
        bus,
        device,
        function,
    } = device;
    let device = u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(function) << 8;
    ports::write_u32(ADDRESS, ENABLE | device | u32::from(register));
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, device: DeviceFunction, register: u8) -> u32 {
        select(device, register);
        ports::read_u32(DATA)
    }

    fn write_word(&mut self, device: DeviceFunction, register: u8, data: u32) {
        select(device, register);
        ports::write_u32(DATA, data);
    }

    #[expect(unsafe_code, reason = "the trait has it so")]
    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// Why the memory device cannot be reached.
#[derive(Debug)]
pub(crate) enum NoDevice {
    /// None on the bus.
    Absent,
    /// A register is beyond what is mapped.
    OutOfReach(u64),
    /// The bus is broken.
    Bus(PciError),
    /// The device is.
    Virtio(VirtioPciError),
}

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => write!(f, "no memory device on PCI bus 0"),
            Self::OutOfReach(address) => write!(f, "its registers are at {address:#x}"),
            Self::Bus(error) => error.fmt(f),
            Self::Virtio(error) => error.fmt(f),
        }
    }
}

/// The registers of the first memory device.
pub(crate) fn memory_device() -> Result<PciTransport, NoDevice> {
    let mut root = PciRoot::new(Ports);
    let (device, _) = root
        .enumerate_bus(0)
        .find(|(_, info)| virtio_device_type(info) == Some(DeviceType::Memory))
        .ok_or(NoDevice::Absent)?;
    for bar in root.bars(device).map_err(NoDevice::Bus)?.iter().flatten() {
        if let Some((address, size)) = BarInfo::memory_address_size(bar)
            && address.saturating_add(size) > MAPPED
        {
            return Err(NoDevice::OutOfReach(address));
        }
    }
    let (_, command) = root.get_status_command(device);
    root.set_command(
        device,
        command | Command::MEMORY_SPACE | Command::BUS_MASTER,
    );
    PciTransport::new::<HeapHal, _>(&mut root, device).map_err(NoDevice::Virtio)
}

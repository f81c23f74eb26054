//! A driver's transport that calls the device's registers instead of trapping into them.

use std::ops::Deref;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::transport::MmioTransport;

/// The registers a driver in this process works with.
pub trait Registers {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

impl Registers for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        Self::read(self, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        Self::write(self, offset, data);
    }
}

impl<P: Deref<Target: Registers>> Registers for P {
    fn read(&self, offset: u64, data: &mut [u8]) {
        (**self).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        (**self).write(offset, data);
    }
}

/// The driver's end of a [`MmioTransport`] in the same process: the same registers in the same order as a
/// driver on a bus. Tests put themselves in between with [`Registers`] of their own.
#[derive(Debug)]
pub struct LoopbackTransport<R: Registers = Arc<MmioTransport>> {
    registers: R,
}

impl<R: Registers> LoopbackTransport<R> {
    /// Drives the device behind `registers`.
    pub fn new(registers: R) -> Self {
        Self { registers }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.registers.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.registers.write(register.into(), &value.to_le_bytes());
    }

    fn write_64(&self, low: u32, high: u32, value: u64) {
        self.write(low, low_half(value));
        self.write(high, low_half(value >> 32));
    }
}

fn low_half(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl<R: Registers> Transport for LoopbackTransport<R> {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn read_device_features(&mut self) -> u64 {
        let word = |sel| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for (sel, word) in [(0, features), (1, features >> 32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, low_half(word));
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.read(VIRTIO_MMIO_QUEUE_NUM_MAX)
    }

    fn notify(&mut self, queue: u16) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.read(VIRTIO_MMIO_STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(VIRTIO_MMIO_STATUS, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {
        // For legacy devices.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write_64(
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            VIRTIO_MMIO_QUEUE_DESC_HIGH,
            descriptors,
        );
        self.write_64(
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
            driver_area,
        );
        self.write_64(
            VIRTIO_MMIO_QUEUE_USED_LOW,
            VIRTIO_MMIO_QUEUE_USED_HIGH,
            device_area,
        );
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        // The register does not answer before the device has let go of the queue.
        self.write(VIRTIO_MMIO_QUEUE_READY, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.read(VIRTIO_MMIO_QUEUE_READY) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, status);
        InterruptStatus::from_bits_retain(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(VIRTIO_MMIO_CONFIG_GENERATION)
    }

    /// Reads in the widest accesses a bus allows: 32 bits (M-05).
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        let start = u64::from(VIRTIO_MMIO_CONFIG) + offset as u64;
        for (register, data) in (start..).step_by(4).zip(value.as_mut_bytes().chunks_mut(4)) {
            self.registers.read(register, data);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _: usize, _: T) -> Result<()> {
        // G-01: there is nothing to write.
        Err(Error::Unsupported)
    }
}

impl<R: Registers> Drop for LoopbackTransport<R> {
    fn drop(&mut self) {
        // As the transport on a bus: the device lets go of the driver's memory.
        self.write(VIRTIO_MMIO_STATUS, 0);
    }
}

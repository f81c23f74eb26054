//! The guest program's place on a bare vCPU of the harness.
#![expect(unsafe_code, reason = "physical addresses become pointers")]

use alloc::vec::Vec;
use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU64;

use virtio_drivers::transport::mmio::{MmioError, MmioTransport, VirtIOHeader};
use vmem_guest::Platform;
use vmem_guest::abi::{BootInfo, DeviceInfo, Mailbox};

use crate::identity::{HeapHal, IdentityMapped, address, pointer};
use crate::{forbidden, registers, start};

/// Bytes of virtio-mmio registers, with the configuration space.
const REGISTERS_LEN: usize = 0x1000;

/// A bare vCPU of the harness.
#[derive(Clone, Copy, Debug)]
pub struct BarePlatform {
    boot: &'static BootInfo,
}

impl BarePlatform {
    /// The place `boot` describes.
    #[must_use]
    pub fn new(boot: &'static BootInfo) -> Self {
        Self { boot }
    }

    /// The registers of each memory device.
    ///
    /// # Errors
    ///
    /// [`MmioError`] if one is not there.
    pub fn transports(&self) -> Result<Vec<MmioTransport<'static>>, MmioError> {
        let devices = self
            .boot
            .devices
            .iter()
            .take(address(self.boot.device_count));
        let transport = |device: &DeviceInfo| {
            let header = ptr::with_exposed_provenance_mut(address(device.virtio_mmio));
            let header =
                NonNull::<VirtIOHeader>::new(header).ok_or(MmioError::MmioRegionTooSmall)?;
            // SAFETY: the host maps a page of registers there for the guest's lifetime; nothing else uses it.
            unsafe { MmioTransport::new(header, REGISTERS_LEN) }
        };
        devices.map(transport).collect()
    }
}

impl Platform for BarePlatform {
    type Hal = HeapHal;
    type Transport = MmioTransport<'static>;
    type Memory = IdentityMapped;

    fn memory(&self) -> IdentityMapped {
        IdentityMapped
    }

    fn mailbox(&self) -> &Mailbox {
        start::mailbox(self.boot)
    }

    fn view(&self, index: usize) -> &[AtomicU64] {
        let device = &self.boot.devices[index];
        let words = pointer(device.view).cast::<AtomicU64>();
        let words = NonNull::slice_from_raw_parts(words, address(device.view_words));
        // SAFETY: the host has set as many zeroed, aligned words aside there for the guest's lifetime.
        unsafe { words.as_ref() }
    }

    fn now_ms(&self) -> u64 {
        registers::now_ms()
    }

    fn wait(&self, deadline_ms: Option<u64>) {
        match deadline_ms {
            Some(deadline_ms) => registers::wait_until(self.boot, deadline_ms),
            None => registers::wait(self.boot),
        }
    }

    fn touch(&self, address: u64) {
        // What is there stays as it is.
        forbidden::write(address, forbidden::read(address));
    }
}

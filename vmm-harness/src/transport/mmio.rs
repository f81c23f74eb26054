//! The virtio-mmio registers of a memory device (virtio 1.4, 4.2.2).
//!
//! A guest may write anything anywhere. Accesses of another width than the specification gives a register, to
//! registers that are not there, or in a state that does not allow them read as 0 and are otherwise ignored.
//! Legacy devices (version 1) and queue reset (`VIRTIO_F_RING_RESET`) are not offered.
//!
//! Reads of the configuration space, its generation, the interrupt status and the device status take no lock:
//! a vCPU that only looks never waits for a request that runs.

use std::fmt;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_mem::VirtioMem;
use virtio_mem::wire::VIRTIO_ID_MEM;
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

use super::InterruptLine;
use super::core::{QueueSetup, TransportCore, set_half};
use crate::BootMemory;
use crate::events::Remote;

/// Offset of `QueueNotify`, for an ioeventfd.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "vmem", little-endian; the specification leaves it to the vendor.
const VENDOR: u32 = 0x6d65_6d76;

/// One memory device behind virtio-mmio registers.
pub struct MmioTransport(TransportCore<Arc<BootMemory>, InterruptLine>);

impl MmioTransport {
    /// Puts `device` behind registers. Its queue lies in `memory` and is served in the event loop of `events`.
    ///
    /// # Errors
    ///
    /// No eventfd is left.
    pub fn new(
        device: VirtioMem,
        memory: Arc<BootMemory>,
        events: Remote,
        interrupt: Arc<InterruptLine>,
    ) -> io::Result<Self> {
        TransportCore::new(device, memory, Some(events), interrupt).map(Self)
    }

    /// As [`new`](Self::new), but the queue is served by [`serve`](Self::serve) and by nothing else: what happens
    /// when is the caller's to decide, which makes it the same each time.
    ///
    /// # Errors
    ///
    /// No eventfd is left.
    pub fn by_hand(
        device: VirtioMem,
        memory: Arc<BootMemory>,
        interrupt: Arc<InterruptLine>,
    ) -> io::Result<Self> {
        TransportCore::new(device, memory, None, interrupt).map(Self)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &VirtioMem {
        self.0.device()
    }

    /// Interrupts raised, and their status.
    #[must_use]
    pub fn interrupt(&self) -> &InterruptLine {
        self.0.interrupt()
    }

    /// What a notification of queue 0 signals: connect it to [`NOTIFY_OFFSET`] with data match 0, and most
    /// notifications never come by here.
    #[must_use]
    pub fn notify(&self) -> &EventFd {
        self.0.notify()
    }

    /// Answers all requests in the queue of a transport that is served [by hand](Self::by_hand), on this thread.
    pub fn serve(&self) {
        self.0.serve();
    }

    /// The queue and how far the device has got with it, while it is served [by hand](Self::by_hand).
    #[must_use]
    pub fn queue(&self) -> Option<QueueState> {
        self.0.queue_state()
    }

    /// Reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.0.read_config(config_offset, data);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    /// Writes `data` at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // The configuration space, beyond the registers, is read-only to the driver (G-01).
        if let Ok(value) = <[u8; 4]>::try_from(data)
            && let Ok(offset) = u32::try_from(offset)
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Ok(offset) = u32::try_from(offset) else {
            return 0;
        };
        let core = &self.0;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_MEM,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt().pending(),
            VIRTIO_MMIO_STATUS => core.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.device().config_generation(),
            // A shared memory region that is not there has length and base -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_DEVICE_FEATURES => core.device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX if core.queue().is_some() => {
                u32::from(VirtioMem::QUEUE_MAX_SIZE)
            }
            VIRTIO_MMIO_QUEUE_READY => {
                u32::from(core.queue().is_some_and(|queue| queue.is_ready()))
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        let core = &self.0;
        match offset {
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt().acknowledge(value),
            VIRTIO_MMIO_STATUS => core.write_status(value),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.select_device_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.select_driver_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES => core.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => core.select_queue(value),
            VIRTIO_MMIO_QUEUE_READY if value & 1 == 0 => core.disable_queue(),
            VIRTIO_MMIO_QUEUE_READY => core.enable_queue(),
            VIRTIO_MMIO_QUEUE_NOTIFY => core.notify_queue(value),
            _ => core.set_up_queue(|queue| write_queue_register(queue, offset, value)),
        }
    }
}

fn write_queue_register(queue: &mut QueueSetup, offset: u32, value: u32) {
    match offset {
        VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
        VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
        VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
        VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
        _ => {}
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MmioTransport").field(&self.0).finish()
    }
}

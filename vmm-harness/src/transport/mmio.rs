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
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
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
use virtio_mem::wire::{GUEST_REQUEST_QUEUE, VIRTIO_ID_MEM};
use virtio_mem::{Interrupt, QueueHandler, Served, VirtioMem};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::InterruptLine;
use crate::BootMemory;
use crate::events::Remote;

/// Offset of `QueueNotify`, for an ioeventfd.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "vmem", little-endian; the specification leaves it to the vendor.
const VENDOR: u32 = 0x6d65_6d76;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The bits a driver may set.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// One memory device behind virtio-mmio registers.
pub struct MmioTransport {
    device: VirtioMem,
    memory: Arc<BootMemory>,
    /// The loop that serves the queue; `None` if it is served by hand.
    events: Option<Remote>,
    interrupt: Arc<InterruptLine>,
    notify: EventFd,
    /// Changed only with `registers` locked.
    status: AtomicU32,
    registers: Mutex<Registers>,
}

/// What the driver has written.
#[derive(Debug, Default)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queue: QueueRegisters,
    /// What serves the queue, while it is served.
    handler: Option<Handler>,
}

/// Where the handler of the queue is.
#[derive(Debug)]
enum Handler {
    /// In the event loop.
    Subscribed(SubscriberId),
    /// Here, for [`MmioTransport::serve`].
    Kept(QueueHandler<Arc<BootMemory>>),
}

#[derive(Debug)]
struct QueueRegisters {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
}

impl Default for QueueRegisters {
    fn default() -> Self {
        Self {
            size: u32::from(VirtioMem::QUEUE_MAX_SIZE),
            descriptors: 0,
            available: 0,
            used: 0,
            ready: false,
        }
    }
}

impl QueueRegisters {
    /// The queue, if the driver's numbers make one. Whether it lies in memory the device finds out.
    fn build(&self) -> Option<Queue> {
        let mut queue = Queue::new(VirtioMem::QUEUE_MAX_SIZE).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        let address = vm_memory::GuestAddress;
        queue
            .try_set_desc_table_address(address(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(address(self.available))
            .ok()?;
        queue.try_set_used_ring_address(address(self.used)).ok()?;
        queue.set_ready(true);
        Some(queue)
    }
}

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
        Self::with(device, memory, Some(events), interrupt)
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
        Self::with(device, memory, None, interrupt)
    }

    fn with(
        device: VirtioMem,
        memory: Arc<BootMemory>,
        events: Option<Remote>,
        interrupt: Arc<InterruptLine>,
    ) -> io::Result<Self> {
        Ok(Self {
            device,
            memory,
            events,
            interrupt,
            notify: EventFd::new(EFD_NONBLOCK)?,
            status: AtomicU32::new(0),
            registers: Mutex::default(),
        })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &VirtioMem {
        &self.device
    }

    /// Interrupts raised, and their status.
    #[must_use]
    pub fn interrupt(&self) -> &InterruptLine {
        &self.interrupt
    }

    /// What a notification of queue 0 signals: connect it to [`NOTIFY_OFFSET`] with data match 0, and most
    /// notifications never come by here.
    #[must_use]
    pub fn notify(&self) -> &EventFd {
        &self.notify
    }

    /// Answers all requests in the queue of a transport that is served [by hand](Self::by_hand), on this thread.
    pub fn serve(&self) {
        if let Some(Handler::Kept(handler)) = &mut self.registers().handler {
            while handler.serve() == Served::More {}
        }
    }

    /// The queue and how far the device has got with it, while it is served [by hand](Self::by_hand).
    #[must_use]
    pub fn queue(&self) -> Option<QueueState> {
        match &self.registers().handler {
            Some(Handler::Kept(handler)) => Some(handler.queue().state()),
            _ => None,
        }
    }

    /// Reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let width = data.len() as u64;
            if width.is_power_of_two() && config_offset.is_multiple_of(width) {
                self.device.read_config(config_offset, data);
            }
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
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_MEM,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            // A shared memory region that is not there has length and base -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                let features = self.device.device_features().bits();
                half(features, self.registers().device_features_sel)
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX if self.registers().selected() => {
                u32::from(VirtioMem::QUEUE_MAX_SIZE)
            }
            VIRTIO_MMIO_QUEUE_READY => {
                let registers = self.registers();
                u32::from(registers.selected() && registers.queue.ready)
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        if offset == VIRTIO_MMIO_INTERRUPT_ACK {
            return self.interrupt.acknowledge(value);
        }
        let mut registers = self.registers();
        match offset {
            VIRTIO_MMIO_STATUS => self.write_status(&mut registers, value),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            // Features are settled by FEATURES_OK (V-02).
            VIRTIO_MMIO_DRIVER_FEATURES if self.status() & (DRIVER | FEATURES_OK) == DRIVER => {
                let sel = registers.driver_features_sel;
                set_half(&mut registers.driver_features, sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_READY if registers.selected() => {
                self.write_queue_ready(&mut registers, value);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY
                if registers.handler.is_some() && value == u32::from(GUEST_REQUEST_QUEUE) =>
            {
                self.signal();
            }
            _ if registers.selected() && !registers.queue.ready => {
                registers.queue.write(offset, value);
            }
            _ => {}
        }
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // Registers have no invariant between them that a panic could break.
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The Status register: 0 resets, else bits are added in order and never taken away (V-01, V-05).
    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        let old = self.status();
        let added = value & DRIVER_BITS & !old;
        let removed = old & DRIVER_BITS & !value;
        let needs = |bit: u32, first: u32| added & bit == 0 || first != 0;
        let in_order = needs(DRIVER, (old | added) & ACKNOWLEDGE)
            && needs(FEATURES_OK, (old | added) & DRIVER)
            // A driver that sets DRIVER_OK along with FEATURES_OK has not read back whether the latter held.
            && needs(DRIVER_OK, old & FEATURES_OK);
        if removed != 0 || old & FAILED != 0 || !in_order {
            log::debug!("driver may not change the device status from {old:#x} to {value:#x}");
            return;
        }
        let mut new = old | added;
        if added & FEATURES_OK != 0
            && let Err(error) = self.device.acknowledge_features(registers.driver_features)
        {
            log::warn!("features are not accepted: {error}");
            new &= !FEATURES_OK;
        }
        self.status.store(new, Ordering::Release);
        if added & DRIVER_OK != 0
            && let Err(reason) = self.activate(registers)
        {
            log::warn!("the device cannot start: {reason}");
            self.status.store(new | NEEDS_RESET, Ordering::Release);
            // V-09: the driver is told by a configuration change.
            self.interrupt.config_change();
        }
    }

    /// Starts serving the queue.
    fn activate(&self, registers: &mut Registers) -> Result<(), String> {
        if !registers.queue.ready {
            return Err("the driver has not set up the guest-request queue".into());
        }
        let queue = registers
            .queue
            .build()
            .ok_or("size or alignment of the queue is wrong")?;
        let notify = self.notify.try_clone().map_err(|error| error.to_string())?;
        let interrupt: Arc<dyn Interrupt> = self.interrupt.clone();
        let handler = self
            .device
            .activate(Arc::clone(&self.memory), queue, notify, interrupt)
            .map_err(|error| error.to_string())?;
        registers.handler = Some(match &self.events {
            None => Handler::Kept(handler),
            Some(events) => {
                let id = events.add(Box::new(handler)).map_err(|error| {
                    self.device.reset();
                    error.to_string()
                })?;
                Handler::Subscribed(id)
            }
        });
        Ok(())
    }

    /// Stops serving the queue. After it returns the device does not touch it.
    fn deactivate(&self, registers: &mut Registers) {
        self.device.reset();
        if let Some(Handler::Subscribed(id)) = registers.handler.take()
            && let Some(events) = &self.events
            && let Err(error) = events.remove(id)
        {
            // The loop is gone, and the handler with it.
            log::debug!("handler of the guest-request queue: {error}");
        }
    }

    /// Device reset. Blocks and contents stay (D-13, D-14).
    fn reset(&self, registers: &mut Registers) {
        self.deactivate(registers);
        self.interrupt.reset();
        *registers = Registers::default();
        // Last: a driver that reads 0 finds everything reset (V-05).
        self.status.store(0, Ordering::Release);
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) {
        let negotiated = self.status() & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        match value & 1 {
            0 if registers.queue.ready => {
                registers.queue.ready = false;
                // M-04, M-08: the driver takes the queue away, for good unless it resets the device.
                if registers.handler.is_some() {
                    self.deactivate(registers);
                }
            }
            // A queue that cannot be used does not become ready, which the driver can read back.
            1 if negotiated => registers.queue.ready = registers.queue.build().is_some(),
            _ => {}
        }
    }

    /// The driver notifies the queue by way of the register.
    fn signal(&self) {
        if let Err(error) = self.notify.write(1) {
            // The counter is full: the handler will run anyway.
            log::debug!("notification: {error}");
        }
    }
}

impl Registers {
    fn selected(&self) -> bool {
        self.queue_sel == u32::from(GUEST_REQUEST_QUEUE)
    }
}

impl QueueRegisters {
    fn write(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => self.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut self.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut self.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut self.available, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut self.available, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut self.used, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut self.used, 1, value),
            _ => {}
        }
    }
}

/// Word 0 or 1 of `value`, low word first; 0 for any other.
fn half(value: u64, word: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match word {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Replaces word 0 or 1 of `value`, low word first.
fn set_half(value: &mut u64, word: u32, half: u32) {
    match word {
        0 => *value = *value >> 32 << 32 | u64::from(half),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(half) << 32,
        _ => {}
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("status", &self.status())
            .field("registers", &*self.registers())
            .field("interrupt", &self.interrupt)
            .finish_non_exhaustive()
    }
}

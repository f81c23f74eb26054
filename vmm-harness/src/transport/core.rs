//! What all transports have in common: status, features, the queue, reset.
//!
//! A transport gives these registers addresses and widths of its own and has no rules of its own about them: the
//! order of initialisation (virtio 1.4, 3.1.1), what a driver may change when (2.1, 2.2), and what a reset does
//! (2.4) are decided here.
//!
//! The device status is read without a lock: a vCPU that only looks never waits for a request that runs.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_mem::wire::GUEST_REQUEST_QUEUE;
use virtio_mem::{Interrupt, QueueHandler, Served, VirtioMem};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::events::Remote;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The bits a driver may set.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// The interrupt of a transport: what is pending is forgotten when the device is reset (M-08).
pub(super) trait TransportInterrupt: Interrupt + 'static {
    /// Back to how it was before any driver came.
    fn reset(&self);
}

/// A device, and what its driver has written.
pub(super) struct TransportCore<M, I> {
    device: VirtioMem,
    memory: M,
    /// The loop that serves the queue; `None` if it is served by hand.
    events: Option<Remote>,
    interrupt: Arc<I>,
    notify: EventFd,
    /// Changed only with `driver` locked.
    status: AtomicU32,
    driver: Mutex<Written<M>>,
}

/// What the driver has written since the last reset.
struct Written<M> {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u32,
    queue: QueueSetup,
    /// What serves the queue, while it is served.
    handler: Option<Handler<M>>,
}

impl<M> Default for Written<M> {
    fn default() -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queue: QueueSetup::default(),
            handler: None,
        }
    }
}

/// Where the handler of the queue is.
enum Handler<M> {
    /// In the event loop.
    Subscribed(SubscriberId),
    /// Here, for [`TransportCore::serve`].
    Kept(QueueHandler<M>),
}

/// Where the queue is.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueSetup {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    ready: bool,
}

impl Default for QueueSetup {
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

impl QueueSetup {
    /// Whether the device may use it.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// The queue, if the driver's numbers make one. Whether it lies in memory the device finds out.
    fn build(&self) -> Option<Queue> {
        let mut queue = Queue::new(VirtioMem::QUEUE_MAX_SIZE).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        let address = GuestAddress;
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

impl<M> Written<M> {
    fn queue_is_selected(&self) -> bool {
        self.queue_select == u32::from(GUEST_REQUEST_QUEUE)
    }
}

impl<M, I> TransportCore<M, I>
where
    M: GuestAddressSpace + Clone + Send + 'static,
    I: TransportInterrupt,
{
    /// The queue of `device` will lie in `memory` and be served in the event loop of `events`; without one, by
    /// [`serve`](Self::serve).
    ///
    /// # Errors
    ///
    /// No eventfd is left.
    pub(super) fn new(
        device: VirtioMem,
        memory: M,
        events: Option<Remote>,
        interrupt: Arc<I>,
    ) -> io::Result<Self> {
        Ok(Self {
            device,
            memory,
            events,
            interrupt,
            notify: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            status: AtomicU32::new(0),
            driver: Mutex::default(),
        })
    }

    /// Device status: 0 resets, else bits are added in order and never taken away (V-01, V-05).
    pub(super) fn write_status(&self, value: u32) {
        let mut driver = self.driver();
        if value == 0 {
            return self.reset_device(&mut driver);
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
            && let Err(error) = self.device.acknowledge_features(driver.driver_features)
        {
            log::warn!("features are not accepted: {error}");
            new &= !FEATURES_OK;
        }
        self.status.store(new, Ordering::Release);
        if added & DRIVER_OK != 0
            && let Err(reason) = self.activate(&mut driver)
        {
            log::warn!("the device cannot start: {reason}");
            self.status.store(new | NEEDS_RESET, Ordering::Release);
            // V-09: the driver is told by a configuration change.
            self.interrupt.config_change();
        }
    }

    /// As [`write_status`](Self::write_status) of 0.
    pub(super) fn reset(&self) {
        self.write_status(0);
    }

    pub(super) fn select_device_features(&self, word: u32) {
        self.driver().device_feature_select = word;
    }

    /// The selected word of what the device offers; 0 beyond the second.
    pub(super) fn device_features(&self) -> u32 {
        let features = self.device.device_features().bits();
        half(features, self.driver().device_feature_select)
    }

    pub(super) fn select_driver_features(&self, word: u32) {
        self.driver().driver_feature_select = word;
    }

    /// Takes the selected word. Features are settled by FEATURES_OK (V-02).
    pub(super) fn set_driver_features(&self, features: u32) {
        let mut driver = self.driver();
        if self.status() & (DRIVER | FEATURES_OK) == DRIVER {
            let word = driver.driver_feature_select;
            set_half(&mut driver.driver_features, word, features);
        }
    }

    pub(super) fn select_queue(&self, index: u32) {
        self.driver().queue_select = index;
    }

    /// The selected word of what the driver has accepted; 0 beyond the second.
    pub(super) fn driver_features(&self) -> u32 {
        let driver = self.driver();
        half(driver.driver_features, driver.driver_feature_select)
    }

    /// The selected queue; `None` if there is none of that number.
    pub(super) fn queue(&self) -> Option<QueueSetup> {
        let driver = self.driver();
        driver.queue_is_selected().then_some(driver.queue)
    }

    /// Lets the driver change where the selected queue is, unless it is ready (M-04).
    pub(super) fn set_up_queue(&self, change: impl FnOnce(&mut QueueSetup)) {
        let mut driver = self.driver();
        if driver.queue_is_selected() && !driver.queue.ready {
            change(&mut driver.queue);
        }
    }

    /// The selected queue is ready from now on, between FEATURES_OK and DRIVER_OK and if the device can use it,
    /// which the driver can read back.
    pub(super) fn enable_queue(&self) {
        let mut driver = self.driver();
        let negotiated = self.status() & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        if driver.queue_is_selected() && negotiated {
            driver.queue.ready = driver.queue.build().is_some();
        }
    }

    /// The driver takes the selected queue away, for good unless it resets the device (M-04, M-08).
    pub(super) fn disable_queue(&self) {
        let mut driver = self.driver();
        if driver.queue_is_selected() && driver.queue.ready {
            driver.queue.ready = false;
            if driver.handler.is_some() {
                self.deactivate(&mut driver);
            }
        }
    }

    /// The driver notifies queue `index` by way of a register.
    pub(super) fn notify_queue(&self, index: u32) {
        if index != u32::from(GUEST_REQUEST_QUEUE) || self.driver().handler.is_none() {
            return;
        }
        if let Err(error) = self.notify.write(1) {
            // The counter is full: the handler will run anyway.
            log::debug!("notification: {error}");
        }
    }

    /// Answers all requests in the queue, on this thread, unless an event loop does.
    pub(super) fn serve(&self) {
        if let Some(Handler::Kept(handler)) = &mut self.driver().handler {
            while handler.serve() == Served::More {}
        }
    }

    /// The queue and how far the device has got with it, unless an event loop serves it.
    pub(super) fn served_queue(&self) -> Option<QueueState> {
        match &self.driver().handler {
            Some(Handler::Kept(handler)) => Some(handler.queue().state()),
            _ => None,
        }
    }

    /// Starts serving the queue.
    fn activate(&self, driver: &mut Written<M>) -> Result<(), String> {
        if !driver.queue.ready {
            return Err("the driver has not set up the guest-request queue".into());
        }
        let queue = driver
            .queue
            .build()
            .ok_or("size or alignment of the queue is wrong")?;
        let notify = self.notify.try_clone().map_err(|error| error.to_string())?;
        let interrupt: Arc<dyn Interrupt> = self.interrupt.clone();
        let handler = self
            .device
            .activate(self.memory.clone(), queue, notify, interrupt)
            .map_err(|error| error.to_string())?;
        driver.handler = Some(match &self.events {
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
    fn deactivate(&self, driver: &mut Written<M>) {
        self.device.reset();
        if let Some(Handler::Subscribed(id)) = driver.handler.take()
            && let Some(events) = &self.events
            && let Err(error) = events.remove(id)
        {
            // The loop is gone, and the handler with it.
            log::debug!("handler of the guest-request queue: {error}");
        }
    }

    /// Device reset. Blocks and contents stay (D-13, D-14).
    fn reset_device(&self, driver: &mut Written<M>) {
        self.deactivate(driver);
        self.interrupt.reset();
        *driver = Written::default();
        // Last: a driver that reads 0 finds everything reset (V-05).
        self.status.store(0, Ordering::Release);
    }
}

impl<M, I> TransportCore<M, I> {
    pub(super) fn device(&self) -> &VirtioMem {
        &self.device
    }

    pub(super) fn interrupt(&self) -> &Arc<I> {
        &self.interrupt
    }

    /// What a notification of queue 0 signals.
    pub(super) fn notify(&self) -> &EventFd {
        &self.notify
    }

    /// Fills `data` from the device's configuration space, in aligned accesses of 1, 2, 4 or 8 bytes.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let width = data.len() as u64;
        match width.is_power_of_two() && width <= 8 && offset.is_multiple_of(width) {
            true => self.device.read_config(offset, data),
            false => data.fill(0),
        }
    }

    pub(super) fn device_feature_select(&self) -> u32 {
        self.driver().device_feature_select
    }

    pub(super) fn driver_feature_select(&self) -> u32 {
        self.driver().driver_feature_select
    }

    pub(super) fn queue_select(&self) -> u32 {
        self.driver().queue_select
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn driver(&self) -> MutexGuard<'_, Written<M>> {
        // What a driver has written has no invariant that a panic could break.
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M, I: fmt::Debug> fmt::Debug for TransportCore<M, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportCore")
            .field("status", &self.status())
            .field("queue", &self.driver().queue)
            .field("interrupt", &self.interrupt)
            .finish_non_exhaustive()
    }
}

/// Word 0 or 1 of `value`, low word first; 0 for any other.
pub(super) fn half(value: u64, word: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match word {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Replaces word 0 or 1 of `value`, low word first.
pub(super) fn set_half(value: &mut u64, word: u32, half: u32) {
    match word {
        0 => *value = *value >> 32 << 32 | u64::from(half),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(half) << 32,
        _ => {}
    }
}

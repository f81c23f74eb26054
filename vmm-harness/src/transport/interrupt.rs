//! The interrupt of a virtio-mmio device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_mem::Interrupt;

/// `InterruptStatus`, and the wire to the guest. Shared by the transport and the device.
///
/// Nothing here waits: the device raises an interrupt in the middle of a request.
pub struct InterruptLine {
    status: AtomicU32,
    used_buffer: AtomicU64,
    config_change: AtomicU64,
    raise: Box<dyn Fn() + Send + Sync>,
}

/// Interrupts raised so far, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// Used-buffer notifications.
    pub used_buffer: u64,
    /// Configuration-change notifications.
    pub config_change: u64,
}

impl InterruptLine {
    /// A line that calls `raise` for each interrupt.
    pub fn new(raise: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            status: AtomicU32::new(0),
            used_buffer: AtomicU64::new(0),
            config_change: AtomicU64::new(0),
            raise: Box::new(raise),
        })
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn counts(&self) -> InterruptCounts {
        InterruptCounts {
            used_buffer: self.used_buffer.load(Ordering::Relaxed),
            config_change: self.config_change.load(Ordering::Relaxed),
        }
    }

    /// The `InterruptStatus` register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The `InterruptACK` register: clears the bits the driver has handled (M-06).
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Device reset clears what is pending (M-08).
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
    }

    fn raise(&self, bit: u32, count: &AtomicU64) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        count.fetch_add(1, Ordering::Relaxed);
        (self.raise)();
    }
}

impl Interrupt for InterruptLine {
    fn used_buffer(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING, &self.used_buffer);
    }

    fn config_change(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG, &self.config_change);
    }
}

impl std::fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InterruptLine")
            .field("status", &self.status())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

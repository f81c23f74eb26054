//! What an interrupt is for, and the interrupt line of a virtio-mmio device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_mem::Interrupt;

use super::core::TransportInterrupt;

/// Bit of a used-buffer notification, in `InterruptStatus` of virtio-mmio and in the ISR status of virtio-pci.
pub(super) const USED_BUFFER: u32 = VIRTIO_MMIO_INT_VRING;
/// Bit of a configuration-change notification, in both as well.
pub(super) const CONFIG_CHANGE: u32 = VIRTIO_MMIO_INT_CONFIG;

/// Why the driver was interrupted, and how often.
#[derive(Debug, Default)]
pub(super) struct InterruptStatus {
    pending: AtomicU32,
    used_buffer: AtomicU64,
    config_change: AtomicU64,
}

/// Interrupts raised so far, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// Used-buffer notifications.
    pub used_buffer: u64,
    /// Configuration-change notifications.
    pub config_change: u64,
}

impl InterruptStatus {
    pub(super) fn counts(&self) -> InterruptCounts {
        InterruptCounts {
            used_buffer: self.used_buffer.load(Ordering::Relaxed),
            config_change: self.config_change.load(Ordering::Relaxed),
        }
    }

    pub(super) fn pending(&self) -> u32 {
        self.pending.load(Ordering::Acquire)
    }

    /// Clears `bits`; those that were pending of all.
    pub(super) fn clear(&self, bits: u32) -> u32 {
        self.pending.fetch_and(!bits, Ordering::AcqRel)
    }

    /// `bit` is pending from now on.
    pub(super) fn set_pending(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::AcqRel);
    }

    pub(super) fn count(&self, bit: u32) {
        let count = match bit {
            USED_BUFFER => &self.used_buffer,
            _ => &self.config_change,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// `InterruptStatus`, and the wire to the guest. Shared by the transport and the device.
///
/// Nothing here waits: the device raises an interrupt in the middle of a request.
pub struct InterruptLine {
    status: InterruptStatus,
    raise: Box<dyn Fn() + Send + Sync>,
}

impl InterruptLine {
    /// A line that calls `raise` for each interrupt.
    pub fn new(raise: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            status: InterruptStatus::default(),
            raise: Box::new(raise),
        })
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn counts(&self) -> InterruptCounts {
        self.status.counts()
    }

    /// The `InterruptStatus` register.
    pub(super) fn pending(&self) -> u32 {
        self.status.pending()
    }

    /// The `InterruptACK` register: clears the bits the driver has handled (M-06).
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.clear(bits);
    }

    fn raise(&self, bit: u32) {
        self.status.set_pending(bit);
        self.status.count(bit);
        (self.raise)();
    }
}

impl Interrupt for InterruptLine {
    fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }
}

impl TransportInterrupt for InterruptLine {
    fn reset(&self) {
        self.status.clear(u32::MAX);
    }
}

impl std::fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InterruptLine")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

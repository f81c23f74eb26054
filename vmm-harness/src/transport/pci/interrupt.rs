//! Interrupts of a PCI function: MSI-X vectors, or the line and its ISR status.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use virtio_mem::Interrupt;

use crate::transport::InterruptCounts;
use crate::transport::core::TransportInterrupt;
use crate::transport::interrupt::{CONFIG_CHANGE, InterruptStatus, USED_BUFFER};

/// Number of MSI-X vectors: one for the queue, one for configuration changes.
pub const VECTOR_COUNT: u16 = 2;
/// `VIRTIO_MSI_NO_VECTOR`: the event sends no message.
pub const NO_VECTOR: u16 = 0xffff;

/// How interrupts leave the function. Called in the middle of a request: nothing here may wait.
pub trait PciSignals: Send + Sync {
    /// Whether MSI-X has taken over from the interrupt line.
    fn msix_is_enabled(&self) -> bool;

    /// Sends the message of an MSI-X vector, or notes that it is pending.
    fn send_message(&self, vector: u16);

    /// The interrupt line is asserted. It is deasserted when the driver has read the ISR status.
    fn assert_line(&self);
}

/// The interrupts of one function. Shared by the transport and the device.
pub struct PciInterrupt {
    status: InterruptStatus,
    config_vector: AtomicU16,
    queue_vector: AtomicU16,
    /// Interrupt Disable of the command register.
    line_is_disabled: AtomicBool,
    signals: Arc<dyn PciSignals>,
}

impl PciInterrupt {
    /// Interrupts that leave by way of `signals`.
    pub fn new(signals: Arc<dyn PciSignals>) -> Arc<Self> {
        Arc::new(Self {
            status: InterruptStatus::default(),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vector: AtomicU16::new(NO_VECTOR),
            line_is_disabled: AtomicBool::new(false),
            signals,
        })
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn counts(&self) -> InterruptCounts {
        self.status.counts()
    }

    /// Asserts the line again if it still should be: for carriers that mask it with each interrupt, when they
    /// unmask it.
    pub fn refresh_line(&self) {
        if self.line_is_pending() && !self.line_is_disabled.load(Ordering::Acquire) {
            self.signals.assert_line();
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn queue_vector(&self) -> u16 {
        self.queue_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(existing(vector), Ordering::Release);
    }

    pub(super) fn set_queue_vector(&self, vector: u16) {
        self.queue_vector.store(existing(vector), Ordering::Release);
    }

    /// The ISR status; reading clears it and deasserts the line.
    pub(super) fn take_pending(&self) -> u8 {
        let pending = self.status.clear(USED_BUFFER | CONFIG_CHANGE);
        (pending & (USED_BUFFER | CONFIG_CHANGE)) as u8
    }

    /// Interrupt Status of the PCI status register: whether the line wants to be asserted.
    pub(super) fn line_is_pending(&self) -> bool {
        !self.signals.msix_is_enabled() && self.status.pending() != 0
    }

    pub(super) fn enable_line(&self, enabled: bool) {
        if self.line_is_disabled.swap(!enabled, Ordering::AcqRel) == enabled {
            self.refresh_line();
        }
    }

    fn raise(&self, bit: u32, vector: u16) {
        self.status.count(bit);
        if !self.signals.msix_is_enabled() {
            self.status.set_pending(bit);
            self.refresh_line();
            return;
        }
        // 4.1.4.5.1: this bit also with MSI-X, the other without it only.
        if bit == CONFIG_CHANGE {
            self.status.set_pending(bit);
        }
        if vector != NO_VECTOR {
            self.signals.send_message(vector);
        }
    }
}

/// `vector` if there is one of that number: a driver reads back [`NO_VECTOR`] where mapping has failed.
fn existing(vector: u16) -> u16 {
    match vector < VECTOR_COUNT {
        true => vector,
        false => NO_VECTOR,
    }
}

impl Interrupt for PciInterrupt {
    fn used_buffer(&self) {
        self.raise(USED_BUFFER, self.queue_vector());
    }

    fn config_change(&self) {
        self.raise(CONFIG_CHANGE, self.config_vector());
    }
}

impl TransportInterrupt for PciInterrupt {
    fn reset(&self) {
        self.status.clear(u32::MAX);
        self.set_config_vector(NO_VECTOR);
        self.set_queue_vector(NO_VECTOR);
    }
}

impl fmt::Debug for PciInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciInterrupt")
            .field("status", &self.status)
            .field("config_vector", &self.config_vector())
            .field("queue_vector", &self.queue_vector())
            .finish_non_exhaustive()
    }
}

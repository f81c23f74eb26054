//! Suspend and resume (Linux: `virtio_mem_freeze`, `virtio_mem_restore`, and its PM notifier).

use thiserror::Error;
use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::Features;

use super::probe::reset;
use super::progress::Failure;
use super::{MemDriver, Phase};
use crate::hotplug::{Hotplug, PhysicalMemory};

/// What the machine is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspend {
    /// Suspend to idle: memory stays as it is.
    Idle,
    /// Suspend to RAM, or any other sleep in which firmware runs.
    Ram,
    /// Hibernation, or restoring from it: memory is read from a disk, where there may be other memory.
    Disk,
}

/// Why the machine must not suspend now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SuspendError {
    /// Never with this driver.
    #[error("memory that can be unplugged cannot be hibernated")]
    NotPermitted,
    /// G-16: what is plugged would be gone, as `VIRTIO_MEM_F_PERSISTENT_SUSPEND` is not negotiated. Once nothing is
    /// plugged any more, it is all right.
    #[error("{plugged_size:#x} bytes that are plugged would be lost")]
    MemoryPlugged {
        /// Bytes that are plugged.
        plugged_size: u64,
    },
    /// Requests are in flight. Nothing new is sent from now on: [`poll`](MemDriver::poll) until
    /// [`Progress::Suspended`](super::Progress::Suspended), and ask again. [`resume`](MemDriver::resume) takes it
    /// back.
    #[error("requests are in flight")]
    Pending,
    /// The device does not complete its reset. The driver goes on as if the device had asked for one.
    #[error("the device does not complete its reset")]
    ResetTimeout,
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Prepares for suspend: the device is reset, which keeps all blocks plugged (D-13), and its queue given up.
    ///
    /// # Errors
    ///
    /// See [`SuspendError`]. The driver goes on, but for [`SuspendError::Pending`].
    pub fn suspend<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        kind: Suspend,
    ) -> Result<(), SuspendError> {
        // What the configuration says is as old as its last change, but may be all there is to go by.
        let unsure = self.unplug_all || self.scan.is_some() || self.failure.is_some();
        let plugged_size = match unsure {
            true => self.plugged_size().max(self.config.mutable.plugged_size),
            false => self.plugged_size(),
        };
        let keeps = self.features.contains(Features::PERSISTENT_SUSPEND);
        let refusal = match kind {
            Suspend::Disk => Some(SuspendError::NotPermitted),
            Suspend::Ram if plugged_size > 0 && !keeps => {
                Some(SuspendError::MemoryPlugged { plugged_size })
            }
            Suspend::Ram | Suspend::Idle => None,
        };
        if let Some(refusal) = refusal {
            if self.phase == Phase::Freezing {
                self.phase = Phase::Running;
            }
            return Err(refusal);
        }
        if self.phase == Phase::Suspended {
            return Ok(());
        }
        self.stop_emptying(hotplug);
        // What is fresh is not known to be plugged while a scan is under way; that goes on after the suspend.
        let fresh = self.maps.fresh.count() > 0 && self.scan.is_none();
        if self.failure.is_none() && (self.requests_in_flight() > 0 || fresh) {
            self.phase = Phase::Freezing;
            return Err(SuspendError::Pending);
        }
        if !reset(&mut self.transport) {
            self.phase = Phase::Running;
            self.needs_reset = true;
            return Err(SuspendError::ResetTimeout);
        }
        self.stop_queue();
        self.phase = Phase::Suspended;
        Ok(())
    }

    /// Goes on after a suspend, or takes back a suspend that was [pending](SuspendError::Pending); the
    /// configuration is read again.
    ///
    /// # Errors
    ///
    /// [`Failure`], which is final.
    pub fn resume(&mut self) -> Result<(), Failure> {
        let suspended = self.phase == Phase::Suspended;
        self.phase = Phase::Running;
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if suspended {
            self.restart().inspect_err(|failure| self.fail(*failure))?;
            // What the device says is compared with what the driver knows: nothing may have changed (D-13, D-23).
        }
        Ok(())
    }
}

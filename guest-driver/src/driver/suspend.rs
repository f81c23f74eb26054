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
    /// The device does not complete its reset.
    #[error("the device does not complete its reset")]
    ResetTimeout,
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Prepares for suspend: the device is reset, which keeps all blocks plugged (D-13), and its queue given up.
    ///
    /// # Errors
    ///
    /// See [`SuspendError`]; but for [`SuspendError::Pending`] nothing has changed.
    pub fn suspend<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        kind: Suspend,
    ) -> Result<(), SuspendError> {
        let mut plugged_size = self.plugged_size();
        if self.unplug_all || self.scan.is_some() || self.failure.is_some() {
            // The driver does not know all that is plugged. Otherwise what it has read is older than what it has done.
            plugged_size = plugged_size.max(self.config.mutable.plugged_size);
        }
        match kind {
            Suspend::Disk => return Err(SuspendError::NotPermitted),
            Suspend::Ram
                if plugged_size > 0 && !self.features.contains(Features::PERSISTENT_SUSPEND) =>
            {
                return Err(SuspendError::MemoryPlugged { plugged_size });
            }
            Suspend::Ram | Suspend::Idle => {}
        }
        if self.phase == Phase::Suspended {
            return Ok(());
        }
        self.stop_emptying(hotplug);
        if self.failure.is_none() && (self.requests_in_flight() > 0 || self.maps.fresh.count() > 0)
        {
            self.phase = Phase::Freezing;
            return Err(SuspendError::Pending);
        }
        if !reset(&mut self.transport) {
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

//! Removing a device from a running guest.

use crate::VirtioMem;
use crate::device::Device;

/// The device cannot be removed now; it is given back and goes on.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct RemoveError {
    /// The device, as it was.
    pub device: VirtioMem,
    /// What has to change first.
    pub reason: RemoveRefusal,
}

/// What keeps a device from being removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemoveRefusal {
    /// The guest has blocks in use. Resize to 0 first.
    #[error("{plugged_size:#x} bytes are plugged")]
    BlocksPlugged {
        /// Bytes plugged.
        plugged_size: u64,
    },
    /// The driver is being asked to plug. Resize to 0 first.
    #[error("{requested_size:#x} bytes are requested")]
    SizeRequested {
        /// Bytes requested.
        requested_size: u64,
    },
}

impl VirtioMem {
    /// Removes the device: stops serving the queue as [`reset`](Self::reset) does, and refuses every resize
    /// from then on, whoever still has a handle.
    ///
    /// # Errors
    ///
    /// [`RemoveError`] if blocks are plugged or asked for, and then nothing has changed.
    pub fn try_remove(self) -> Result<(), RemoveError> {
        match self.0.mark_removed() {
            Ok(()) => {
                self.reset();
                Ok(())
            }
            Err(reason) => Err(RemoveError {
                device: self,
                reason,
            }),
        }
    }
}

impl Device {
    /// From here on nothing can be plugged: nothing is requested, and nothing will be.
    fn mark_removed(&self) -> Result<(), RemoveRefusal> {
        let mut core = self.lock();
        let (plugged_size, requested_size) = (core.sizes.plugged_size, core.sizes.requested_size);
        if plugged_size > 0 {
            return Err(RemoveRefusal::BlocksPlugged { plugged_size });
        }
        if requested_size > 0 {
            return Err(RemoveRefusal::SizeRequested { requested_size });
        }
        core.removed = true;
        Ok(())
    }
}

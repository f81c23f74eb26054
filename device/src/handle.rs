//! The operator's end: resize the device and watch it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_mem_wire::{BlockMap, Geometry};

use crate::counters::Counters;
use crate::device::{Device, Status};

/// Resizes a device and tells how it is. Cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Handle(pub(crate) Arc<Device>);

/// A size the device cannot ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// D-06
    #[error("{size:#x} bytes are not a multiple of the block size {block_size:#x}")]
    Misaligned {
        /// The size asked for, in bytes.
        size: u64,
        /// Bytes per block.
        block_size: u64,
    },
    /// More than there is.
    #[error("{size:#x} bytes exceed the region of {region_size:#x}")]
    ExceedsRegion {
        /// The size asked for, in bytes.
        size: u64,
        /// Bytes in the region.
        region_size: u64,
    },
}

impl Handle {
    /// Asks the driver to have `size` bytes plugged. Takes effect when the driver acts; a driver that is not
    /// there yet finds it when it comes.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; nothing has changed then.
    pub fn resize(&self, size: u64) -> Result<(), ResizeError> {
        check_size(&self.0.geometry, size)?;
        self.0.resize(size);
        Ok(())
    }

    /// The device as it is now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// Waits until `done` says so, without polling.
    ///
    /// # Errors
    ///
    /// The status at `deadline`, if it was not done by then.
    pub fn wait_until(
        &self,
        deadline: Instant,
        done: impl Fn(&Status) -> bool,
    ) -> Result<Status, Status> {
        match self.0.wait(deadline, done) {
            (status, true) => Ok(status),
            (status, false) => Err(status),
        }
    }

    /// Holds requests that would change blocks off: they are answered BUSY until [`thaw`](Self::thaw).
    ///
    /// For as long as guest memory is being copied elsewhere. STATE is still answered.
    pub fn freeze(&self) {
        self.0.set_frozen(true);
    }

    /// Ends [`freeze`](Self::freeze), and tells a driver that was answered BUSY meanwhile.
    pub fn thaw(&self) {
        self.0.set_frozen(false);
    }

    /// The plugged blocks.
    #[must_use]
    pub fn plugged(&self) -> BlockMap {
        self.0.access.with_plugged(BlockMap::clone)
    }

    /// Bytes of host memory behind the region, measured now.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.0.backing.resident_bytes()
    }

    /// What the device has counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.0.counters()
    }

    /// Block size, address and size of the region.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }
}

pub(crate) fn check_size(geometry: &Geometry, size: u64) -> Result<(), ResizeError> {
    if !geometry.is_aligned(size) {
        return Err(ResizeError::Misaligned {
            size,
            block_size: geometry.block_size(),
        });
    }
    if size > geometry.region_size() {
        return Err(ResizeError::ExceedsRegion {
            size,
            region_size: geometry.region_size(),
        });
    }
    Ok(())
}

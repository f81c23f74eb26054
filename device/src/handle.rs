//! The operator's end: resize the device and watch it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_mem_wire::{BlockMap, BlockRange, Geometry};

use crate::busy::BusyCause;
use crate::counters::Counters;
use crate::device::{Device, Status};
use crate::events::SizeEvents;
use crate::latency::Latencies;
use crate::observers::{ObserverError, ObserverId, PlugObserver, Run};
use crate::resize::Resize;
use crate::state::{SaveError, State};

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
    /// See [`VirtioMem::try_remove`](crate::VirtioMem::try_remove).
    #[error("the device is removed")]
    Removed,
}

impl Handle {
    /// Asks the driver to have `size` bytes plugged. Takes effect when the driver acts; a driver that is not
    /// there yet finds it when it comes. Waits for a request that is being carried out.
    ///
    /// What is returned watches the resize, waits for it or cancels it, and may as well be dropped.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; nothing has changed then.
    pub fn resize(&self, size: u64) -> Result<Resize, ResizeError> {
        self.0.resize(size)
    }

    /// The device as it is now; while it carries out a request, as it was before, with
    /// [`serving`](Status::serving) set. Never waits for a request: it is how a host that does not answer is found.
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.views().look(|view| view.status.clone())
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
        match self
            .0
            .views()
            .wait_for(deadline, |view| view.status.clone(), done)
        {
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

    /// Tells a driver that was answered BUSY because the host or an observer refused that trying again is
    /// worth it. Without this it hears of what the device itself gives back only.
    ///
    /// For a VMM that has made room, and for observers that have. Never waits for a request.
    pub fn retry(&self) {
        self.0.end_busy(BusyCause::Host);
    }

    /// Adds an observer, and tells it of every run that is plugged already.
    ///
    /// # Errors
    ///
    /// [`ObserverError`]; the observer then has nothing mapped.
    pub fn add_observer(
        &self,
        observer: impl PlugObserver + 'static,
    ) -> Result<ObserverId, ObserverError> {
        self.0.add_observer(Arc::new(observer))
    }

    /// Removes an observer after it has let go of every run.
    ///
    /// # Errors
    ///
    /// [`ObserverError`]; it stays then.
    pub fn remove_observer(&self, id: ObserverId) -> Result<(), ObserverError> {
        self.0.remove_observer(id)
    }

    /// A descriptor that becomes readable when a size changes, for event loops.
    ///
    /// # Errors
    ///
    /// If there are no descriptors left.
    pub fn size_events(&self) -> io::Result<SizeEvents> {
        SizeEvents::new(Arc::clone(&self.0))
    }

    /// The device as data, from which [`Builder::restore`](crate::Builder::restore) makes it again.
    ///
    /// # Errors
    ///
    /// [`SaveError`] unless it is [frozen](Self::freeze) or no driver is served.
    pub fn save(&self) -> Result<State, SaveError> {
        self.0.save()
    }

    /// The plugged blocks as runs of addresses, ascending: what a RAM stream has to send.
    ///
    /// They stay as they are while the device is [frozen](Self::freeze).
    #[must_use]
    pub fn plugged_runs(&self) -> Vec<Run> {
        self.0.runs()
    }

    /// The plugged blocks.
    #[must_use]
    pub fn plugged(&self) -> BlockMap {
        self.0.access.with_plugged(BlockMap::clone)
    }

    /// Bytes of host memory behind the whole region, measured now: also where nothing is plugged, where none should be.
    ///
    /// Takes time by the size of the region with most backings: a second for a TiB or two of base pages.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        let bytes = self.0.backing.resident_bytes()?;
        self.0.publish_resident(bytes);
        Ok(bytes)
    }

    /// Bytes of host memory behind plugged blocks, measured now: all there is, as long as closed memory cannot be
    /// touched, but for what an UNPLUG is about to give back.
    ///
    /// Takes time by what is plugged, and not by the size of the region. Blocks may come and go meanwhile.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    pub fn plugged_resident_bytes(&self) -> io::Result<u64> {
        let geometry = self.geometry();
        let offsets = |run: BlockRange| geometry.bytes(run.first)..geometry.bytes(run.end());
        let runs = |plugged: &BlockMap| plugged.runs().map(offsets).collect::<Vec<_>>();
        let open = self.0.access.with_plugged(runs);
        let bytes = self.0.backing.resident_bytes_in(&open)?;
        self.0.publish_resident(bytes);
        Ok(bytes)
    }

    /// What the device has counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.0.counters()
    }

    /// How long requests have taken so far.
    #[must_use]
    pub fn latencies(&self) -> Latencies {
        self.0.latencies()
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

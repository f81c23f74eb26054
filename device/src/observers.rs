//! Users of guest memory that keep their own map of it: VFIO, vhost, vhost-user.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio_mem_wire::Geometry;

use crate::transition::StepError;

/// Follows which memory is plugged, to keep a map of its own in step: an IOMMU's, a vhost backend's.
///
/// The device calls for one contiguous run at a time, and never two calls at a time, from whatever thread
/// serves the queue or registers the observer. It holds its lock meanwhile, so an observer does not call the
/// device back, but for [`Handle::retry`](crate::Handle::retry); letting go of guest memory is fine, too. (The
/// device owns its observers: one that keeps a [`Handle`](crate::Handle) keeps the device for ever.)
pub trait PlugObserver: Debug + Send + Sync {
    /// How many mappings it can hold, and how it cuts runs into mappings.
    fn limits(&self) -> MappingLimits;

    /// The memory of `run` is there now: the guest may be about to use it.
    ///
    /// # Errors
    ///
    /// The observer cannot map it and has mapped nothing of it. The guest is answered BUSY, and those that
    /// were told before are told [`unplugging`](Self::unplugging).
    fn plugged(&self, run: &Run) -> io::Result<()>;

    /// The memory of `run`, which is part of what was told [`plugged`](Self::plugged) but not always one
    /// whole such run, will be gone when all observers have agreed. After this returns the observer and what
    /// it serves do not touch it.
    ///
    /// If a later step fails the memory stays, and the observer is told `plugged` again. A device that has
    /// failed ([`Status::failure`](crate::Status::failure)) tells every run when it is dropped, also one that
    /// an observer has not mapped: better once too often than a mapping of memory that is another's by then.
    ///
    /// # Errors
    ///
    /// The observer cannot let go and has the whole run mapped still. The guest is answered BUSY.
    fn unplugging(&self, run: &Run) -> io::Result<()>;
}

impl<T: PlugObserver + ?Sized> PlugObserver for Arc<T> {
    fn limits(&self) -> MappingLimits {
        (**self).limits()
    }

    fn plugged(&self, run: &Run) -> io::Result<()> {
        (**self).plugged(run)
    }

    fn unplugging(&self, run: &Run) -> io::Result<()> {
        (**self).unplugging(run)
    }
}

/// A contiguous run of blocks, as everybody sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes from the start of the region, and so in a file that backs it.
    pub offset: u64,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Where the VMM sees it, as an address of its own address space.
    pub host_address: u64,
    /// Bytes, a multiple of the block size.
    pub len: u64,
}

impl Run {
    /// The guest-physical addresses.
    #[must_use]
    pub fn guest_range(&self) -> Range<u64> {
        // Inside the region, which does not wrap.
        self.guest_address..self.guest_address.saturating_add(self.len)
    }
}

/// What an observer's map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingLimits {
    /// The most mappings at one time. VFIO type 1 has 65,535 unless its module was told otherwise.
    pub max_mappings: u64,
    /// What one mapping covers.
    pub granularity: Granularity,
}

/// What one mapping of an observer covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// One block: for maps that cannot give part of a mapping back, as VFIO type 1.
    Block,
    /// So many bytes, a power of two that is no larger than a block.
    Bytes(u64),
    /// A whole run; mappings are joined and cut as runs are.
    Run,
}

impl MappingLimits {
    /// For an observer that has no limits.
    pub const NONE: Self = Self {
        max_mappings: u64::MAX,
        granularity: Granularity::Run,
    };

    /// Checks that every state the region can be in can be mapped: what cannot is an error when the observer
    /// comes, not when the guest has plugged its 65,536th block.
    pub(crate) fn check(&self, geometry: &Geometry) -> Result<(), ObserverError> {
        let block_size = geometry.block_size();
        let needed = match self.granularity {
            Granularity::Block => geometry.block_count(),
            Granularity::Bytes(bytes) if bytes.is_power_of_two() && bytes <= block_size => {
                geometry.region_size() / bytes
            }
            Granularity::Bytes(bytes) => {
                return Err(ObserverError::Granularity { bytes, block_size });
            }
            // Every second block.
            Granularity::Run => geometry.block_count().div_ceil(2),
        };
        match needed > self.max_mappings {
            true => Err(ObserverError::TooManyMappings {
                needed,
                max_mappings: self.max_mappings,
            }),
            false => Ok(()),
        }
    }
}

/// An observer that cannot follow this device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserverError {
    /// Larger blocks, or a smaller region, need fewer mappings.
    #[error("the region can need {needed} mappings, an observer can hold {max_mappings}")]
    TooManyMappings {
        /// The most mappings any state of the region needs.
        needed: u64,
        /// What the observer can hold.
        max_mappings: u64,
    },
    /// A single block could not be mapped.
    #[error("mappings of {bytes:#x} bytes do not fit blocks of {block_size:#x}")]
    Granularity {
        /// Bytes per mapping.
        bytes: u64,
        /// Bytes per block.
        block_size: u64,
    },
    /// It refused a run that is plugged already, or did not let go of one.
    #[error("the observer refused")]
    Refused(#[source] io::Error),
    /// No observer of this device has this id.
    #[error("no such observer")]
    Unknown,
}

/// Names an observer that came late, for [`remove_observer`](crate::Handle::remove_observer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObserverId(u64);

/// The observers of one device, in the order they are told.
#[derive(Debug, Default)]
pub(crate) struct Observers {
    list: Vec<(ObserverId, Arc<dyn PlugObserver>)>,
    next_id: u64,
}

impl Observers {
    /// Adds one that knows what is plugged already.
    pub(crate) fn add(&mut self, observer: Arc<dyn PlugObserver>) -> ObserverId {
        let id = ObserverId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.list.push((id, observer));
        id
    }

    pub(crate) fn get(&self, id: ObserverId) -> Option<Arc<dyn PlugObserver>> {
        let found = self.list.iter().find(|(of, _)| *of == id);
        found.map(|(_, observer)| Arc::clone(observer))
    }

    pub(crate) fn remove(&mut self, id: ObserverId) {
        self.list.retain(|(of, _)| *of != id);
    }

    /// Tells all that `run` is plugged, or if one refuses, none.
    pub(crate) fn plugged(&self, run: &Run) -> Result<(), StepError> {
        all_or_none(
            &self.list,
            |(_, observer)| observer.plugged(run),
            |(_, observer)| observer.unplugging(run),
        )
    }

    /// Tells all that `run` goes, or if one refuses, none.
    pub(crate) fn unplugging(&self, run: &Run) -> Result<(), StepError> {
        all_or_none(
            &self.list,
            |(_, observer)| observer.unplugging(run),
            |(_, observer)| observer.plugged(run),
        )
    }
}

/// Does `step` for all of `items`; if it fails for one, undoes it for those before, last first.
pub(crate) fn all_or_none<T>(
    items: &[T],
    step: impl Fn(&T) -> io::Result<()>,
    undo: impl Fn(&T) -> io::Result<()>,
) -> Result<(), StepError> {
    for (done, item) in items.iter().enumerate() {
        if let Err(source) = step(item) {
            let mut undone = true;
            for item in items[..done].iter().rev() {
                if let Err(error) = undo(item) {
                    log::error!("an observer could not be told that a step was undone: {error}");
                    undone = false;
                }
            }
            return Err(StepError { source, undone });
        }
    }
    Ok(())
}

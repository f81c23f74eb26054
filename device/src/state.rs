//! Saving a device and building it again elsewhere.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_mem_wire::{BlockMap, BlockMapError};

use crate::busy::BusyCause;
use crate::check_features;
use crate::device::{Device, Refusal};
use crate::resize::Operation;

/// Everything of a device that its driver can see or has agreed to, as plain data.
///
/// Taken by [`Handle::save`](crate::Handle::save), given to [`Builder::restore`](crate::Builder::restore).
/// The contents of the blocks travel in the VMM's RAM stream, and the queue in the transport's state.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct State {
    /// [`State::VERSION`]
    pub version: u16,
    /// Guest-physical start of the region.
    pub addr: u64,
    /// Bytes in the region.
    pub region_size: u64,
    /// Bytes per block.
    pub block_size: u64,
    /// The proximity domain; 0 without one.
    pub node_id: u16,
    /// Feature bits offered.
    pub offered_features: u64,
    /// Feature bits the driver has accepted; 0 if there is none.
    pub acknowledged_features: u64,
    /// Bytes requested.
    pub requested_size: u64,
    /// Bytes of the region in which blocks may be plugged.
    pub usable_region_size: u64,
    /// Bytes plugged.
    pub plugged_size: u64,
    /// Block `i` is plugged if bit `i % 64` of word `i / 64` is set.
    pub plugged: Vec<u64>,
    /// The driver was answered BUSY and waits for a notification.
    pub busy: bool,
}

impl State {
    /// The version of what is written now, and the only one that is read.
    pub const VERSION: u16 = 1;
}

/// The device cannot be saved now.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SaveError {
    /// The driver could change it any moment: freeze or reset it first.
    #[error("the device is neither frozen nor stopped: freeze it first")]
    Running,
    /// What a failure of the host has left is not worth saving.
    #[error("the device has failed")]
    Failed(#[source] Arc<io::Error>),
}

/// A state that is not one of this device: the first field found wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Of another version of this crate.
    #[error("state version {0} is unknown")]
    Version(u16),
    /// Saved of a region elsewhere.
    #[error("region address {saved:#x}, but the device has {built:#x}")]
    Address {
        /// In the state.
        saved: u64,
        /// Of the device.
        built: u64,
    },
    /// Saved of a larger or smaller region.
    #[error("region size {saved:#x}, but the device has {built:#x}")]
    RegionSize {
        /// In the state.
        saved: u64,
        /// Of the device.
        built: u64,
    },
    /// Saved of a device with other blocks.
    #[error("block size {saved:#x}, but the device has {built:#x}")]
    BlockSize {
        /// In the state.
        saved: u64,
        /// Of the device.
        built: u64,
    },
    /// Saved of a device of another NUMA node.
    #[error("node id {saved}, but the device has {built}")]
    NodeId {
        /// In the state.
        saved: u16,
        /// Of the device.
        built: u16,
    },
    /// Saved of a device that offers others; the driver has seen them.
    #[error("features {saved:#x}, but the device offers {built:#x}")]
    OfferedFeatures {
        /// In the state.
        saved: u64,
        /// Of the device.
        built: u64,
    },
    /// Features no driver can have accepted.
    #[error("accepted features {0:#x} could not have been accepted")]
    AcknowledgedFeatures(u64),
    /// D-06
    #[error("requested size {0:#x} is not a multiple of the block size")]
    RequestedMisaligned(u64),
    /// D-06
    #[error("usable region size {0:#x} is not a multiple of the block size")]
    UsableMisaligned(u64),
    /// The usable region is part of the region.
    #[error("usable region size {0:#x} exceeds the region")]
    UsableExceedsRegion(u64),
    /// D-04
    #[error("requested size {requested:#x} exceeds the usable region of {usable:#x}")]
    RequestedExceedsUsable {
        /// In the state.
        requested: u64,
        /// In the state.
        usable: u64,
    },
    /// The bitmap has not as many words as the region needs.
    #[error("bitmap of {words} words, but {expected} are needed")]
    BitmapLength {
        /// In the state.
        words: usize,
        /// For this many blocks.
        expected: u64,
    },
    /// The bitmap has blocks behind the end of the region.
    #[error("bits {0:#x} are set behind the last block")]
    TrailingBits(u64),
    /// The bitmap is not the one the size belongs to.
    #[error("plugged size {saved:#x}, but the bitmap has {counted:#x}")]
    PluggedSize {
        /// In the state.
        saved: u64,
        /// From the bitmap.
        counted: u64,
    },
    /// N-03
    #[error("block {0} is plugged outside the usable region")]
    PluggedOutsideUsable(u64),
    /// The backing here can hold fewer mappings than the one there.
    #[error("{runs} separate runs are plugged, the backing can hold {limit}")]
    TooManyRuns {
        /// From the bitmap.
        runs: u64,
        /// Of the backing.
        limit: u64,
    },
    /// Memory, a slot or an observer refused; nothing stays.
    #[error("{what} failed")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
}

impl Device {
    pub(crate) fn save(&self) -> Result<State, SaveError> {
        let core = self.lock();
        if let Some(failure) = &core.failure {
            return Err(SaveError::Failed(Arc::clone(failure)));
        }
        if !core.frozen && self.is_ready() {
            return Err(SaveError::Running);
        }
        Ok(State {
            version: State::VERSION,
            addr: self.geometry.addr(),
            region_size: self.geometry.region_size(),
            block_size: self.geometry.block_size(),
            node_id: self.config.node_id(),
            offered_features: self.offered.bits(),
            acknowledged_features: self.acknowledged.load(Ordering::Relaxed),
            requested_size: core.sizes.requested_size,
            usable_region_size: core.sizes.usable_region_size,
            plugged_size: core.sizes.plugged_size,
            plugged: self.access.with_plugged(|plugged| plugged.words().to_vec()),
            busy: self.is_busy(),
        })
    }

    /// Makes this device, which is new, the one that was saved.
    pub(crate) fn restore(&self, state: &State) -> Result<(), RestoreError> {
        let plugged = self.check(state)?;
        let mut core = self.lock();
        core.operation = Operation::new(state.requested_size);
        core.sizes.requested_size = state.requested_size;
        core.sizes.usable_region_size = state.usable_region_size;
        for run in plugged.runs() {
            self.give(&mut core, run).map_err(|refusal| {
                let (what, source) = match refusal {
                    Refusal::Host(what, error) => (what, error),
                    Refusal::Answer(_) | Refusal::Busy(_) => {
                        ("plugging", io::ErrorKind::ResourceBusy.into())
                    }
                };
                RestoreError::Host { what, source }
            })?;
        }
        if state.busy {
            // Told when the queue is served again, see `start`.
            self.begin_busy(BusyCause::Frozen);
        }
        let features = state.acknowledged_features;
        self.acknowledged.store(features, Ordering::Relaxed);
        // See `start`.
        self.owed.store(true, Ordering::Relaxed);
        self.publish(&mut core);
        Ok(())
    }

    /// The plugged blocks of `state`, if every field of it fits this device and the others.
    fn check(&self, state: &State) -> Result<BlockMap, RestoreError> {
        let geometry = &self.geometry;
        if state.version != State::VERSION {
            return Err(RestoreError::Version(state.version));
        }
        let (saved, built) = (state.addr, geometry.addr());
        if saved != built {
            return Err(RestoreError::Address { saved, built });
        }
        let (saved, built) = (state.region_size, geometry.region_size());
        if saved != built {
            return Err(RestoreError::RegionSize { saved, built });
        }
        let (saved, built) = (state.block_size, geometry.block_size());
        if saved != built {
            return Err(RestoreError::BlockSize { saved, built });
        }
        let (saved, built) = (state.node_id, self.config.node_id());
        if saved != built {
            return Err(RestoreError::NodeId { saved, built });
        }
        let (saved, built) = (state.offered_features, self.offered.bits());
        if saved != built {
            return Err(RestoreError::OfferedFeatures { saved, built });
        }
        let acknowledged = state.acknowledged_features;
        if acknowledged != 0 && check_features(self.offered, acknowledged).is_err() {
            return Err(RestoreError::AcknowledgedFeatures(acknowledged));
        }
        let (requested, usable) = (state.requested_size, state.usable_region_size);
        if !geometry.is_aligned(requested) {
            return Err(RestoreError::RequestedMisaligned(requested));
        }
        if !geometry.is_aligned(usable) {
            return Err(RestoreError::UsableMisaligned(usable));
        }
        if usable > geometry.region_size() {
            return Err(RestoreError::UsableExceedsRegion(usable));
        }
        if requested > usable {
            return Err(RestoreError::RequestedExceedsUsable { requested, usable });
        }
        let plugged = BlockMap::from_words(geometry.block_count(), &state.plugged);
        let plugged = plugged.map_err(|error| match error {
            BlockMapError::Length { words, len } => RestoreError::BitmapLength {
                words,
                expected: len.div_ceil(u64::from(u64::BITS)),
            },
            BlockMapError::TrailingBits { bits } => RestoreError::TrailingBits(bits),
        })?;
        let counted = geometry.bytes(plugged.count());
        if state.plugged_size != counted {
            return Err(RestoreError::PluggedSize {
                saved: state.plugged_size,
                counted,
            });
        }
        if let Some(block) = plugged.next(usable / geometry.block_size(), true) {
            return Err(RestoreError::PluggedOutsideUsable(block));
        }
        let (runs, limit) = (plugged.run_count(), self.backing.max_open_runs());
        if runs > limit {
            return Err(RestoreError::TooManyRuns { runs, limit });
        }
        Ok(plugged)
    }
}

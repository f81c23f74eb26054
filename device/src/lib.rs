//! A virtio memory device that any Rust VMM can attach.
//!
//! The device (virtio 1.4, section 5.15) gives a running guest memory and takes it back, in blocks the guest
//! chooses, inside a region the VMM has set aside. The crate knows no hypervisor and no transport: a VMM
//! brings a [`Backing`] for the memory, a [`SlotMapper`] for its hypervisor (feature `kvm` has one for KVM),
//! and an [`Interrupt`] from its transport.
//!
//! | to find | look at |
//! |---|---|
//! | which request gets which answer | `device.rs`, `Device::process` |
//! | what a chain may look like | `queue.rs`, `serve_chain` |
//! | what becomes of the memory | [`Backing`], `backing/` |
//! | what the guest's CPUs can reach | [`SlotMapper`], `slots.rs` |
//! | what the VMM's other devices can reach | [`MemoryRegion`], `access.rs` |
//! | who else keeps a map of the memory | [`PlugObserver`], `transition.rs` |
//! | resizing | [`Handle`], [`Resize`], [`split()`] |
//! | saving and restoring | [`State`], [`Handle::plugged_runs`], [`DeviceRegion::dirty_bitmap`] |
//! | a thread of its own | [`QueueHandler::spawn`] |
//!
//! # Example
//!
//! A device without a hypervisor, its queue driven by hand, is resized and asked for nothing yet:
//!
//! ```
//! use virtio_mem::{Anonymous, VirtioMem};
//! use vm_memory::GuestAddress;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = VirtioMem::builder(GuestAddress(4 << 30), Anonymous::base_pages(4 << 30)?)
//!     .block_size(2 << 20)
//!     .build()?;
//! let handle = device.handle();
//! handle.resize(1 << 30)?;
//! assert_eq!(handle.status().requested_size, 1 << 30);
//! assert_eq!(handle.status().plugged_size, 0); // no driver has plugged anything
//! # Ok(())
//! # }
//! ```

mod access;
mod backing;
mod builder;
mod busy;
mod config_space;
mod counters;
mod device;
mod dirty;
mod events;
mod handle;
#[cfg(feature = "kvm")]
mod kvm;
mod latency;
mod metrics;
mod observers;
mod queue;
mod region;
mod removal;
mod resize;
mod slots;
mod split;
mod state;
mod transition;
mod view;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

pub use backing::{Anonymous, Backing, Hugetlb, LentFiles, Memfd, PrivateFile};
pub use builder::{BuildError, Builder};
pub use counters::Counters;
pub use device::{Interrupt, ResetError, Status};
pub use events::SizeEvents;
pub use handle::{Handle, ResizeError};
#[cfg(feature = "kvm")]
pub use kvm::KvmSlots;
pub use latency::{Histogram, Latencies};
pub use observers::{Granularity, MappingLimits, ObserverError, ObserverId, PlugObserver, Run};
pub use queue::{QueueHandler, Served};
pub use region::{DeviceRegion, MemoryRegion, PinningBitmap, PinningSlice};
pub use removal::{RemoveError, RemoveRefusal};
pub use resize::{Progress, Resize, ResizeState, WaitError};
pub use slots::{NoSlots, Slot, SlotMapper};
pub use split::{Deviation, Share, Split, split};
pub use state::{RestoreError, SaveError, State};
pub use virtio_mem_wire as wire;
use wire::{Features, Geometry};
pub use worker::{Worker, WorkerDied};

use crate::device::Device;
use crate::dirty::MarkDirty;

/// The example of the README, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// A virtio memory device. Cheap to clone; all clones are the same device.
///
/// These are the calls a transport makes. [`handle`](Self::handle) is for whoever resizes.
#[derive(Clone, Debug)]
pub struct VirtioMem(Arc<Device>);

/// Features a driver may not leave the device with; the transport must not keep FEATURES_OK (V-01).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// V-02
    #[error("features {0:#x} were not offered")]
    NotOffered(u64),
    /// V-04: virtio-mem has no legacy form.
    #[error("VIRTIO_F_VERSION_1 was not accepted")]
    NoVersion1,
    /// D-12: a driver that expects to read unplugged blocks would fault.
    #[error("VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE was not accepted")]
    NoUnpluggedInaccessible,
}

/// The device cannot start serving the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// Features are not negotiated, or not all the device needs.
    #[error(transparent)]
    Features(#[from] FeatureError),
    /// The queue is not ready or not all of it lies in guest memory.
    #[error("the guest-request queue is not valid")]
    InvalidQueue,
    /// It is active; reset it first.
    #[error("the device is active already")]
    AlreadyActive,
}

impl VirtioMem {
    /// The most descriptors the queue may have.
    pub const QUEUE_MAX_SIZE: u16 = 128;

    /// A device whose region starts at guest-physical `addr` and is as large as `backing`.
    pub fn builder(addr: GuestAddress, backing: impl Backing + 'static) -> Builder {
        Builder::new(addr, backing)
    }

    /// For the operator: resize and watch.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.0))
    }

    /// The region for the VMM's vm-memory collection; it refuses unplugged blocks. `bitmap` records what the
    /// VMM writes and which blocks came and went, offset 0 being the start of the region; `()` if nobody
    /// asks.
    pub fn region<B: Bitmap + Send + Sync + 'static>(&self, bitmap: B) -> MemoryRegion<B> {
        let device = &self.0;
        let bitmap = Arc::new(bitmap);
        let marked: Arc<dyn MarkDirty> = Arc::<B>::clone(&bitmap);
        device.dirty.add(Arc::downgrade(&marked));
        MemoryRegion::Device(DeviceRegion::new(
            device.geometry,
            Arc::clone(&device.backing),
            Arc::clone(&device.access),
            bitmap,
        ))
    }

    /// Block size, address and size of the region.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// Bytes per hypervisor memory slot; the last one may be shorter.
    #[must_use]
    pub fn slot_size(&self) -> u64 {
        self.0.slot_size
    }

    /// The proximity domain the device names, for whoever writes the guest's tables; `None` without
    /// `VIRTIO_MEM_F_ACPI_PXM`.
    #[must_use]
    pub fn node_id(&self) -> Option<u16> {
        let named = self.device_features().contains(Features::ACPI_PXM);
        named.then(|| self.0.config.node_id())
    }

    /// The most hypervisor memory slots the device uses at a time. How many it uses now is in
    /// [`Status::slot_count`].
    #[must_use]
    pub fn max_slot_count(&self) -> u64 {
        self.0.geometry.region_size().div_ceil(self.0.slot_size)
    }

    /// The backing, for VMMs that map it elsewhere themselves.
    #[must_use]
    pub fn backing(&self) -> Arc<dyn Backing> {
        Arc::clone(&self.0.backing)
    }

    /// What the device offers.
    #[must_use]
    pub fn device_features(&self) -> Features {
        self.0.offered
    }

    /// FEATURES_OK: takes the features the driver accepts.
    ///
    /// # Errors
    ///
    /// [`FeatureError`]; the transport must then show FEATURES_OK cleared.
    pub fn acknowledge_features(&self, features: u64) -> Result<(), FeatureError> {
        check_features(self.0.offered, features)?;
        self.0.acknowledged.store(features, Ordering::Relaxed);
        Ok(())
    }

    /// Fills `data` from `offset` of the configuration space, zero beyond its end. Never waits for a request.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.config.read(offset, data);
    }

    /// Changes whenever what [`read_config`](Self::read_config) reads has changed. Never waits for a request.
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.0.config.generation()
    }

    /// DRIVER_OK: starts serving `queue`, which the driver notifies through `notify`.
    ///
    /// The handler goes into an event manager, or its [`serve`](QueueHandler::serve) is called by hand.
    ///
    /// # Errors
    ///
    /// [`ActivateError`]; the transport should then set DEVICE_NEEDS_RESET.
    pub fn activate<M: GuestAddressSpace>(
        &self,
        memory: M,
        mut queue: Queue,
        notify: EventFd,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<QueueHandler<M>, ActivateError> {
        let features = self.0.acknowledged.load(Ordering::Relaxed);
        check_features(self.0.offered, features)?;
        if self.0.is_active() {
            return Err(ActivateError::AlreadyActive);
        }
        if !queue.is_valid(&*memory.memory()) {
            return Err(ActivateError::InvalidQueue);
        }
        let features = Features::from_bits_truncate(features);
        queue.set_event_idx(features.contains(Features::RING_EVENT_IDX));
        let epoch = self.0.start(interrupt);
        let device = Arc::clone(&self.0);
        Ok(QueueHandler::new(device, epoch, memory, queue, notify))
    }

    /// Device reset (status written 0). Blocks and their contents stay (D-13, D-14).
    ///
    /// After it returns the queue is not touched any more; a request that is running is finished first.
    pub fn reset(&self) {
        self.0.stop();
        self.0.acknowledged.store(0, Ordering::Relaxed);
    }
}

impl VirtioMem {
    /// System reset: stops serving the queue, as [`reset`](Self::reset) does, and unplugs every block (D-22)
    /// unless the device was built to [keep](Builder::keep_on_system_reset) them.
    ///
    /// A VMM whose guest merely wakes from suspend calls [`reset`](Self::reset) instead, which keeps them.
    ///
    /// # Errors
    ///
    /// [`ResetError`]; the blocks are then still plugged, and the guest's driver will find and unplug them
    /// (G-05).
    pub fn system_reset(&self) -> Result<(), ResetError> {
        self.reset();
        self.0.system_reset()
    }
}

fn check_features(offered: Features, accepted: u64) -> Result<(), FeatureError> {
    let missing = |feature: Features| accepted & feature.bits() == 0;
    match accepted & !offered.bits() {
        0 if missing(Features::VERSION_1) => Err(FeatureError::NoVersion1),
        0 if missing(Features::UNPLUGGED_INACCESSIBLE) => {
            Err(FeatureError::NoUnpluggedInaccessible)
        }
        0 => Ok(()),
        other => Err(FeatureError::NotOffered(other)),
    }
}

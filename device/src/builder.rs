//! Putting a device together; every wrong combination ends here.

use std::num::NonZero;
use std::sync::Arc;

use virtio_mem_wire::{Features, Geometry, GeometryError};
use vm_memory::GuestAddress;

use crate::VirtioMem;
use crate::backing::Backing;
use crate::device::{Device, Setup};
use crate::handle::{ResizeError, check_size};
use crate::observers::{ObserverError, Observers, PlugObserver};
use crate::slots::{NoSlots, SlotMapper, SlotTable};
use crate::state::{RestoreError, State};

/// The smallest slot made without being asked: a section of x86-64 guests.
const MIN_DEFAULT_SLOT_SIZE: u64 = 128 << 20;

/// The most slots a region is cut into without being asked: slots are a resource that a VMM shares among
/// devices, and with vhost-user backends that know no more than 509.
const DEFAULT_SLOT_COUNT: u64 = 256;

/// The memory block of most guests: x86-64 with less than 64 GiB of boot memory, arm64 with 4 KiB pages.
const DEFAULT_GUEST_MEMORY_BLOCK_SIZE: u64 = 128 << 20;

/// Options of a device, see [`VirtioMem::builder`].
#[derive(Debug)]
pub struct Builder {
    addr: GuestAddress,
    backing: Box<dyn Backing>,
    block_size: Option<u64>,
    slots: Box<dyn SlotMapper>,
    slot_size: Option<u64>,
    observers: Vec<Arc<dyn PlugObserver>>,
    guest_memory_block_size: u64,
    requested_size: u64,
    node_id: Option<u16>,
    persistent_suspend: bool,
    keep_on_system_reset: bool,
    populate_threads: Option<NonZero<usize>>,
    discard_threads: Option<NonZero<usize>>,
    state: Option<State>,
}

/// Options that do not go together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Address, size and block size do not fit.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Memory could not be given back in such blocks.
    #[error("block size {block_size:#x} is smaller than a page of the backing, {page_size:#x}")]
    BlockSmallerThanPage {
        /// Bytes per block.
        block_size: u64,
        /// Bytes per page of the backing.
        page_size: u64,
    },
    /// Memory could not be closed and given back in such blocks, though they are whole pages.
    #[error(
        "block size {block_size:#x} is too small for this backing, which needs {min_block_size:#x} or more"
    )]
    BlockTooSmall {
        /// Bytes per block.
        block_size: u64,
        /// The smallest that works, see [`Backing::min_block_size`].
        min_block_size: u64,
    },
    /// Slots must start and end at block borders.
    #[error("slot size {slot_size:#x} is not a multiple of the block size {block_size:#x}")]
    SlotSize {
        /// Bytes per slot.
        slot_size: u64,
        /// Bytes per block.
        block_size: u64,
    },
    /// The last plug would fail for want of a slot.
    #[error("the region needs {needed} memory slots, the hypervisor has {available}")]
    TooManySlots {
        /// With all blocks plugged.
        needed: u64,
        /// What is left for this device, see [`SlotMapper::max_count`].
        available: u64,
    },
    /// Linux cuts memory into blocks of a power of two.
    #[error("guest memory block size {0:#x} is not a power of two")]
    GuestMemoryBlockSize(u64),
    /// An observer could not follow every state of the region.
    #[error("observer")]
    Observer(#[from] ObserverError),
    /// The saved state is not one of this device.
    #[error("restoring")]
    Restore(#[from] RestoreError),
    /// The initial size.
    #[error("requested size")]
    RequestedSize(#[from] ResizeError),
}

impl Builder {
    pub(crate) fn new(addr: GuestAddress, backing: impl Backing + 'static) -> Self {
        Self {
            addr,
            backing: Box::new(backing),
            block_size: None,
            slots: Box::new(NoSlots),
            slot_size: None,
            observers: Vec::new(),
            guest_memory_block_size: DEFAULT_GUEST_MEMORY_BLOCK_SIZE,
            requested_size: 0,
            node_id: None,
            persistent_suspend: false,
            keep_on_system_reset: false,
            populate_threads: None,
            discard_threads: None,
            state: None,
        }
    }

    /// Bytes per block, a power of two, at least a page of the backing.
    ///
    /// The default is the backing's, or larger where a region of this size could not be plugged in every
    /// second block of that size: see [`Backing::max_open_runs`].
    #[must_use]
    pub fn block_size(mut self, bytes: u64) -> Self {
        self.block_size = Some(bytes);
        self
    }

    /// Where hypervisor memory slots are made. Without it none are.
    #[must_use]
    pub fn slots(mut self, slots: impl SlotMapper + 'static) -> Self {
        self.slots = Box::new(slots);
        self
    }

    /// Bytes per slot, a multiple of the block size. The default is 128 MiB, or a 256th of the region if
    /// that is more.
    #[must_use]
    pub fn slot_size(mut self, bytes: u64) -> Self {
        self.slot_size = Some(bytes);
        self
    }

    /// Somebody who keeps a map of the plugged memory, told in the order given here. Keep an [`Arc`] of it to
    /// reach it later.
    #[must_use]
    pub fn observer(mut self, observer: impl PlugObserver + 'static) -> Self {
        self.observers.push(Arc::new(observer));
        self
    }

    /// The unit in which the guest adds memory, a power of two; 128 MiB if not given.
    ///
    /// Linux adds whole memory blocks that lie inside the usable region, so the usable region is made two of
    /// them larger than the requested size. Guests with 64 GiB of boot memory or more, and arm64 guests with
    /// 64 KiB pages, have larger ones, and a usable region cut for smaller ones leaves them short.
    #[must_use]
    pub fn guest_memory_block_size(mut self, bytes: u64) -> Self {
        self.guest_memory_block_size = bytes;
        self
    }

    /// Bytes the driver finds requested when it comes; 0 if not given.
    #[must_use]
    pub fn requested_size(mut self, bytes: u64) -> Self {
        self.requested_size = bytes;
        self
    }

    /// The proximity domain of the memory. Offers `VIRTIO_MEM_F_ACPI_PXM`.
    #[must_use]
    pub fn node_id(mut self, node_id: u16) -> Self {
        self.node_id = Some(node_id);
        self
    }

    /// Says that the VMM keeps plugged blocks while the guest is suspended and when it wakes (D-15). Offers
    /// `VIRTIO_MEM_F_PERSISTENT_SUSPEND`, without which a guest with plugged blocks may not suspend.
    #[must_use]
    pub fn persistent_suspend(mut self) -> Self {
        self.persistent_suspend = true;
        self
    }

    /// Has the host give blocks their memory when they are plugged, on up to `threads` threads, and not as the
    /// guest touches them. A plug for which there is no memory is then answered BUSY.
    #[must_use]
    pub fn populate(mut self, threads: NonZero<usize>) -> Self {
        self.populate_threads = Some(threads);
        self
    }

    /// Gives large ranges back on up to `threads` threads; on the thread that serves the queue if not given.
    #[must_use]
    pub fn discard_threads(mut self, threads: NonZero<usize>) -> Self {
        self.discard_threads = Some(threads);
        self
    }

    /// Has [`VirtioMem::system_reset`] keep plugged blocks: for a VMM whose machine keeps memory across a reset.
    /// The driver finds them plugged and unplugs them itself (G-05).
    #[must_use]
    pub fn keep_on_system_reset(mut self) -> Self {
        self.keep_on_system_reset = true;
        self
    }

    /// Makes the device the one that was saved as `state`: its blocks are plugged, with contents yet to come,
    /// slots and observers have them, and its sizes and features are those the driver knows.
    ///
    /// The other options must be those of the saved device. The block size is that of `state` if none is given,
    /// the requested size always. [`VirtioMem::activate`] then takes the queue as it was saved.
    #[must_use]
    pub fn restore(mut self, state: State) -> Self {
        self.state = Some(state);
        self
    }

    /// The device, with all blocks unplugged unless it is [restored](Self::restore).
    ///
    /// # Errors
    ///
    /// [`BuildError`] for every combination of options that could not work.
    pub fn build(self) -> Result<VirtioMem, BuildError> {
        let region_size = self.backing.len();
        let saved_block_size = self.state.as_ref().map(|state| state.block_size);
        let block_size = self
            .block_size
            .or(saved_block_size)
            .unwrap_or_else(|| self.default_block_size());
        let geometry = Geometry::new(self.addr.0, region_size, block_size)?;
        let page_size = self.backing.page_size();
        if block_size < page_size {
            return Err(BuildError::BlockSmallerThanPage {
                block_size,
                page_size,
            });
        }
        let min_block_size = self.backing.min_block_size();
        if block_size < min_block_size {
            return Err(BuildError::BlockTooSmall {
                block_size,
                min_block_size,
            });
        }
        let slot_size = self.slot_size.unwrap_or_else(|| {
            (region_size / DEFAULT_SLOT_COUNT)
                .next_power_of_two()
                .max(MIN_DEFAULT_SLOT_SIZE)
                .max(block_size)
        });
        if slot_size == 0 || !geometry.is_aligned(slot_size) {
            return Err(BuildError::SlotSize {
                slot_size,
                block_size,
            });
        }
        let needed = region_size.div_ceil(slot_size);
        let available = self.slots.max_count();
        if needed > available {
            return Err(BuildError::TooManySlots { needed, available });
        }
        if !self.guest_memory_block_size.is_power_of_two() {
            return Err(BuildError::GuestMemoryBlockSize(
                self.guest_memory_block_size,
            ));
        }
        check_size(&geometry, self.requested_size)?;
        let mut observers = Observers::default();
        for observer in self.observers {
            observer.limits().check(&geometry)?;
            observers.add(observer);
        }
        let mut features = Features::VERSION_1
            | Features::RING_INDIRECT_DESC
            | Features::RING_EVENT_IDX
            | Features::UNPLUGGED_INACCESSIBLE;
        features.set(Features::ACPI_PXM, self.node_id.is_some());
        features.set(Features::PERSISTENT_SUSPEND, self.persistent_suspend);
        let host_address = self.backing.host_address().as_ptr() as u64;
        let usable_extent = self
            .guest_memory_block_size
            .max(block_size)
            .saturating_mul(2);
        let setup = Setup {
            geometry,
            node_id: self.node_id.unwrap_or(0),
            offered: features,
            backing: Arc::from(self.backing),
            slots: SlotTable::new(self.slots, geometry, host_address, slot_size),
            slot_size,
            populate_threads: self.populate_threads,
            discard_threads: self.discard_threads,
            observers,
            keep_on_system_reset: self.keep_on_system_reset,
            usable_extent,
            requested_size: self.requested_size,
        };
        let device = Arc::new_cyclic(|this| Device::new(setup, this.clone()));
        if let Some(state) = &self.state {
            device.restore(state)?;
        }
        Ok(VirtioMem(device))
    }

    fn default_block_size(&self) -> u64 {
        let mut block_size = self.backing.default_block_size();
        let region_size = self.backing.len();
        let most_runs = |block_size: u64| region_size / block_size.saturating_mul(2).max(1);
        while most_runs(block_size) > self.backing.max_open_runs() && block_size < region_size {
            block_size = block_size.saturating_mul(2);
        }
        block_size
    }
}

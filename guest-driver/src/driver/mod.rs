//! The virtio-mem driver: follows the device's target by plugging and unplugging parts of memory blocks.
//!
//! Sub-Block Mode as Linux has it: a *sub-block* is the larger of a device block and a pageblock, the least that
//! can be plugged into, or unplugged out of, an online memory block. Growing completes partly plugged memory
//! blocks before it adds new ones; shrinking empties partly plugged ones before it breaks up full ones, from
//! high addresses to low, and removes a memory block with its last sub-block.
//!
//! The driver never blocks and never spins: [`MemDriver::poll`] does one bounded step and says what it waits
//! for, one request is in flight at a time, and after a refusal it waits for a short while or for the device to
//! change its configuration. What the device says is checked; a device that breaks the rules ends in
//! [`Progress::Failed`] with the reason.
//!
//! Not here yet: Big-Block Mode (device blocks larger than a memory block are refused), several requests in
//! flight, re-adoption of plugged memory by STATE requests, suspend.
//!
//! Source: virtio 1.4, section 5.15; Linux `drivers/virtio/virtio_mem.c`.

use alloc::collections::BTreeSet;
use core::fmt;

use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};
use virtio_mem_wire::{BlockMap, BlockRange, Config, Features};

use crate::hotplug::{self, Hotplug, Isolation, OnlineType, PhysicalMemory};

mod config;
mod counters;
mod layout;
mod plan;
mod probe;
mod progress;
mod queue;
mod step;

pub use config::ConfigReadError;
pub use counters::Counters;
pub use layout::LayoutError;
pub use probe::ProbeError;
pub use progress::{Failure, Progress, Stall};

use layout::Layout;
use queue::RequestQueue;

/// What the kernel that embeds the driver may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How memory that was just added goes online, unless the hotplug core has seen to that; `None` leaves it offline
    /// until [`MemDriver::online_block`].
    pub auto_online: Option<OnlineType>,
}

impl Default for Policy {
    /// Added memory is used for movable pages, so that it can be unplugged again.
    fn default() -> Self {
        Self {
            auto_online: Some(OnlineType::Movable),
        }
    }
}

/// A request the device has not answered yet.
#[derive(Clone, Copy, Debug)]
enum InFlight {
    UnplugAll,
    Plug(BlockRange),
    Unplug {
        range: BlockRange,
        /// Its pages were taken from the allocator, which gets them back if the device is busy.
        taken: bool,
    },
}

/// A range that is being emptied before it is unplugged.
#[derive(Debug)]
struct Emptying {
    isolation: Isolation,
    range: BlockRange,
}

/// Why and until when there is nothing to do.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    reason: Stall,
    /// Time to try again; without one only a change of the configuration helps.
    retry_at_ms: Option<u64>,
}

/// What could not be emptied since the last wait.
#[derive(Debug)]
struct InUse {
    sub_blocks: BlockMap,
    memory_blocks: BTreeSet<u64>,
}

/// The driver of one memory device.
///
/// All memory it has added goes through the one [`Hotplug`] that is passed to [`poll`](Self::poll). When it is
/// dropped it resets the device, which keeps all blocks plugged (D-13).
pub struct MemDriver<H: Hal, T: Transport> {
    transport: T,
    queue: RequestQueue<H>,
    features: Features,
    policy: Policy,
    layout: Layout,
    /// As last read.
    config: Config,
    /// The configuration must be read again.
    config_changed: bool,
    /// Set by UNPLUG ALL, the one request that may shrink the usable region (D-08, D-43).
    usable_may_shrink: bool,
    /// The target at which the device refused to plug; the configuration is read once more because of it.
    refused_at: Option<u64>,
    /// Blocks are plugged that the driver knows nothing of (G-05).
    unplug_all: bool,
    plugged: BlockMap,
    /// Memory blocks the driver has added.
    added: BTreeSet<u64>,
    /// A memory block with plugged blocks that could not be added.
    orphan: Option<u64>,
    /// A memory block without plugged blocks could not be removed.
    removal_pending: bool,
    in_flight: Option<InFlight>,
    emptying: Option<Emptying>,
    in_use: InUse,
    waiting: Option<Waiting>,
    retry_delay_ms: u64,
    /// How often in a row there was nowhere to move pages to.
    starved: u8,
    failure: Option<Failure>,
    counters: Counters,
}

impl<H: Hal, T: Transport> fmt::Debug for MemDriver<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemDriver")
            .field("features", &self.features)
            .field("config", &self.config)
            .field("plugged_blocks", &self.plugged.count())
            .field("in_flight", &self.in_flight)
            .field("emptying", &self.emptying)
            .field("waiting", &self.waiting)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// To be called when the device has interrupted; spurious calls do no harm (D-11, V-13).
    ///
    /// Acknowledges the interrupt (M-06), and after a configuration change looks whether the device needs a
    /// reset (V-09). Everything else is left to [`poll`](Self::poll), which must be called soon.
    pub fn on_interrupt(&mut self) {
        let interrupt = self.transport.ack_interrupt();
        if interrupt.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT) {
            self.config_changed = true;
            if matches!(self.waiting, Some(w) if w.reason == Stall::ConfigUnstable) {
                self.waiting = None;
            }
            let status = self.transport.get_status();
            if status.contains(DeviceStatus::DEVICE_NEEDS_RESET) {
                self.fail(Failure::NeedsReset);
            }
        }
    }

    /// Ends a wait that has a time limit: what could not be done is tried again by the next
    /// [`poll`](Self::poll). To be called when memory has become free, for example.
    pub fn retry(&mut self) {
        if matches!(self.waiting, Some(w) if w.retry_at_ms.is_some()) {
            self.end_wait();
        }
    }

    /// Whether the next [`poll`](Self::poll) would only find that the device has not answered yet.
    pub fn awaits_device(&self) -> bool {
        self.failure.is_none() && self.in_flight.is_some() && !self.queue.has_answer()
    }

    /// Brings an offline memory block of the driver's online, but for its unplugged parts.
    ///
    /// # Errors
    ///
    /// [`hotplug::Error::Invalid`] if the driver did not add it, and those of [`Hotplug::online`].
    pub fn online_block<M: PhysicalMemory>(
        &self,
        hotplug: &mut Hotplug<M>,
        id: u64,
        online_type: OnlineType,
    ) -> Result<(), hotplug::Error> {
        if !self.added.contains(&id) {
            return Err(hotplug::Error::Invalid);
        }
        // G-06, G-10: pages of unplugged blocks are withheld, so they never reach the allocator.
        hotplug.online(id, online_type)
    }

    /// The feature bits in use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The device's configuration as last read. Its `plugged_size` is as old as that; see
    /// [`plugged_size`](Self::plugged_size).
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device blocks the driver believes plugged.
    pub fn plugged_map(&self) -> &BlockMap {
        &self.plugged
    }

    /// Bytes the driver believes plugged.
    pub fn plugged_size(&self) -> u64 {
        self.layout.geometry.bytes(self.plugged.count())
    }

    /// Bytes of the target that no whole sub-block of a whole memory block can reach (G-15): less than a
    /// sub-block, unless the usable region is too small or badly aligned.
    pub fn unreachable_size(&self) -> u64 {
        let reachable = self.target_sub_blocks() * self.layout.sub_block_size;
        self.config.mutable.requested_size - reachable
    }

    /// Requests and answers so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the driver works towards, in sub-blocks.
    fn target_sub_blocks(&self) -> u64 {
        let config = &self.config.mutable;
        let wanted = config.requested_size / self.layout.sub_block_size;
        wanted.min(self.layout.capacity(config.usable_region_size))
    }

    /// Gives up on the device, and tells it so.
    fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            log::error!("virtio-mem: {failure}");
            self.failure = Some(failure);
            let status = self.transport.get_status();
            self.transport.set_status(status | DeviceStatus::FAILED);
        }
    }

    fn end_wait(&mut self) {
        self.waiting = None;
        self.in_use.sub_blocks.clear();
        self.in_use.memory_blocks.clear();
    }
}

impl<H: Hal, T: Transport> Drop for MemDriver<H, T> {
    fn drop(&mut self) {
        // V-11: the queue's memory is the device's until it has stopped.
        if probe::reset(&mut self.transport) {
            self.queue.device_stopped();
        }
    }
}

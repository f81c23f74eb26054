//! The virtio-mem driver: follows the device's target by plugging and unplugging parts of its region.
//!
//! | module | what it decides or does |
//! |---|---|
//! | `probe`, `attach` | initialisation; the driver's resource, group and notifier in the hotplug core |
//! | `layout`, `maps`, `state` | sizes and ids; what is known of each device block; the state of a unit, derived |
//! | `plan` | what to plug or unplug next, in Linux's order or in the fewest requests: pure functions |
//! | `linux`; `direct`, `campaign` | the two strategies on top of that |
//! | `take`, `give` | memory out of the page allocator before it is unplugged, and into it after it was plugged |
//! | `queue`, `answers` | requests in flight and what their answers change |
//! | `rest`, `watch` | when there is nothing to do, and what ends that; who goes online and offline |
//! | `resync`, `suspend`, `dump` | STATE scans and resets; power management; crash dumps |
//!
//! ```text
//!  Linux's driver has two modes        Sub-Block Mode  a memory block holds several granules, and an online one
//!  (virtio 1.4 knows only blocks)                      may be plugged in part; the rest of it is withheld
//!                                      Big-Block Mode  a granule holds one or more memory blocks, and is plugged,
//!                                                      added, removed and unplugged as a whole
//! ```
//!
//! The driver never blocks and never spins: [`MemDriver::poll`] does one bounded step and says what it waits for.
//! After a refusal it waits for a short while, or for the device to change its configuration. What the device says
//! is checked; a device that breaks the rules is asked once more what it has plugged ([`Strategy::Direct`]), or
//! ends in [`Progress::Failed`] with the reason.
//!
//! Source: virtio 1.4, section 5.15; Linux `drivers/virtio/virtio_mem.c`.

use core::fmt;

use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};
use virtio_mem_wire::{BlockMap, Config, Features};

use crate::hotplug::{self, Hotplug, OnlineType, PhysicalMemory};

mod answers;
mod attach;
mod campaign;
mod config;
mod counters;
mod direct;
mod dump;
mod events;
mod give;
mod layout;
mod linux;
mod maps;
mod plan;
mod policy;
mod probe;
mod progress;
mod queue;
mod report;
mod rest;
mod resync;
mod state;
mod step;
mod suspend;
mod take;
mod watch;

pub use attach::Removed;
pub use config::ConfigReadError;
pub use counters::Counters;
pub use dump::DumpView;
pub use events::Event;
pub use layout::{Mode, Sizes};
pub use policy::{Policy, Strategy};
pub use probe::ProbeError;
pub use progress::{Failure, Progress, ResyncReason, Stall, Unreachable, UnreachableReason};
pub use state::UnitState;
pub use suspend::{Suspend, SuspendError};

use answers::InFlight;
use attach::{Attachment, owner};
use campaign::Campaign;
use events::Sink;
use layout::Layout;
use maps::Maps;
use plan::InUse;
use queue::{MAX_IN_FLIGHT, RequestQueue};
use rest::Rest;
use resync::Scan;
use state::{Presence, View};
use take::Emptying;
use watch::Seen;

/// Units without plugged blocks that have to be removed.
#[derive(Clone, Copy, Debug, Default)]
struct Removal {
    /// There may be some, with this id or a larger one.
    check: bool,
    from: u64,
    /// One could not be removed (H-10).
    refused: bool,
}

/// Whether the device may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// A suspend waits for what is in flight.
    Freezing,
    Suspended,
}

/// The driver of one memory device.
///
/// All memory it has added goes through the one [`Hotplug`] that is passed to [`probe`](Self::probe) and to
/// [`poll`](Self::poll). [`remove`](Self::remove) takes back what it has registered there. When it is only dropped it
/// resets the device, which keeps all blocks plugged (D-13), and its notifier stays behind and does nothing; a
/// range that was being emptied stays isolated until another driver is probed.
pub struct MemDriver<H: Hal, T: Transport> {
    transport: T,
    /// None while the device is suspended.
    queue: Option<RequestQueue<H>>,
    features: Features,
    policy: Policy,
    layout: Layout,
    attachment: Attachment,
    /// As last read.
    config: Config,
    node: u32,
    /// The configuration must be read again.
    config_changed: bool,
    /// Set by UNPLUG ALL, the one request that may shrink the usable region (D-08, D-43).
    usable_may_shrink: bool,
    /// The target at which the device refused to plug; the configuration is read once more because of it.
    refused_at: Option<u64>,
    /// V-09
    needs_reset: bool,
    /// Blocks are plugged that the driver knows nothing of (G-05).
    unplug_all: bool,
    in_flight: [Option<InFlight>; MAX_IN_FLIGHT],
    scan: Option<Scan>,
    /// How often the driver has started anew since it last reached its target.
    resyncs: u8,
    maps: Maps,
    removal: Removal,
    emptying: Option<Emptying>,
    campaign: Campaign,
    in_use: InUse,
    /// Direct: how often in a row there was nowhere to move pages to.
    starved: u8,
    /// Direct: since when there was something to do, without success so far.
    awake_since_ms: u64,
    /// Linux: why to wait once what could not be added is unplugged.
    pending_stall: Option<Stall>,
    /// Linux: memory was removed, which is a reason not to wait.
    removed_in_run: bool,
    rest: Rest,
    /// The reason to wait that the log has had last.
    said: Option<Stall>,
    /// What had gone online and offline when that was looked at last.
    seen: Seen,
    retry_delay_ms: u64,
    /// The time of this poll.
    now_ms: u64,
    phase: Phase,
    /// The last poll could only wait for the device.
    awaiting: bool,
    failure: Option<Failure>,
    counters: Counters,
    events: Sink,
    reported: report::Reported,
}

impl<H: Hal, T: Transport> fmt::Debug for MemDriver<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemDriver")
            .field("features", &self.features)
            .field("policy", &self.policy)
            .field("mode", &self.layout.mode)
            .field("config", &self.config)
            .field("plugged_blocks", &self.maps.plugged.count())
            .field("in_flight", &self.in_flight)
            .field("emptying", &self.emptying)
            .field("rest", &self.rest)
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
        if self.phase == Phase::Suspended {
            return;
        }
        let interrupt = self.transport.ack_interrupt();
        if interrupt.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT) {
            self.on_config_change();
        }
    }

    /// To be called when the device has sent the message for configuration changes, where there is one apart (MSI-X:
    /// the device need not set the bit that [`on_interrupt`](Self::on_interrupt) looks for). [`poll`](Self::poll) must
    /// be called soon.
    pub fn on_config_change(&mut self) {
        if self.phase == Phase::Suspended {
            return;
        }
        self.config_changed = true;
        if matches!(self.rest, Rest::Waiting(w) if w.reason == Stall::ConfigUnstable) {
            self.rest = Rest::None;
        }
        let status = self.transport.get_status();
        if status.contains(DeviceStatus::DEVICE_NEEDS_RESET) {
            self.needs_reset = true;
        }
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
        let unit = id / (self.layout.unit_size / self.layout.memory_block_size);
        let inside = self.layout.all_units().contains(&unit);
        if !inside || !Presence::of(hotplug, owner(), id).is_ours() {
            return Err(hotplug::Error::Invalid);
        }
        // G-06, G-10: pages of unplugged blocks are withheld, so they never reach the allocator.
        hotplug.online(id, online_type)
    }

    /// The feature bits in use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The policy in use.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Whether online memory is unplugged from now on. Under [`Strategy::Linux`] that shows with the next change of
    /// the configuration.
    pub fn set_unplug_online(&mut self, unplug_online: bool) {
        self.policy.unplug_online = unplug_online;
        if self.policy.strategy == Strategy::Direct {
            self.end_rest();
        }
    }

    /// How memory that is added from now on goes online.
    pub fn set_auto_online(&mut self, auto_online: Option<OnlineType>) {
        self.policy.auto_online = auto_online;
    }

    /// How device blocks and memory blocks go together.
    pub fn mode(&self) -> Mode {
        self.layout.mode
    }

    /// Bytes of a memory block, or in Big-Block Mode of a big block: what is added and removed at a time.
    pub fn unit_size(&self) -> u64 {
        self.layout.unit_size
    }

    /// Bytes of a sub-block, or in Big-Block Mode of a big block: the least that is plugged or unplugged.
    pub fn granule_size(&self) -> u64 {
        self.layout.granule_size
    }

    /// The device's configuration as last read. Its `plugged_size` is as old as that; see
    /// [`plugged_size`](Self::plugged_size).
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The node the memory is added to: that of the proximity domain the device names, where the machine knows it.
    pub fn node(&self) -> u32 {
        self.node
    }

    /// The device blocks the driver believes plugged.
    pub fn plugged_map(&self) -> &BlockMap {
        &self.maps.plugged
    }

    /// Bytes the driver believes plugged.
    pub fn plugged_size(&self) -> u64 {
        self.layout.geometry.bytes(self.maps.plugged.count())
    }

    /// Requests and answers so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What [`Strategy::Direct`] works towards, in granules.
    fn target_granules(&self) -> u64 {
        let config = &self.config.mutable;
        let wanted = self.layout.granules(config.requested_size);
        wanted.min(self.layout.capacity(config.usable_region_size))
    }

    /// Decides something from the state of the units.
    fn with_view<M, R>(&self, hotplug: &Hotplug<M>, decide: impl FnOnce(&View<'_>) -> R) -> R {
        decide(&View {
            layout: &self.layout,
            plugged: &self.maps.plugged,
            taken: &self.maps.taken,
            units: self.layout.units(self.config.mutable.usable_region_size),
            presence: &|id| Presence::of(hotplug, owner(), id),
        })
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
}

impl<H: Hal, T: Transport> Drop for MemDriver<H, T> {
    fn drop(&mut self) {
        // V-11: the queue's memory is the device's until it has stopped.
        if self.queue.is_some() && probe::reset(&mut self.transport) {
            self.stop_queue();
        }
    }
}

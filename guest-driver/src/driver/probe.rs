//! Initialisation (virtio 1.4, 3.1.1 and 5.15.5), every step of it.

use core::hint::spin_loop;

use alloc::vec::Vec;
use thiserror::Error;
use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_mem_wire::{Config, Features};

use super::attach::Attachment;
use super::campaign::Campaign;
use super::events::Sink;
use super::layout::Layout;
use super::maps::Maps;
use super::plan::InUse;
use super::queue::{MAX_IN_FLIGHT, RequestQueue};
use super::resync::Scan;
use super::{
    ConfigReadError, Counters, MemDriver, Phase, Policy, Removal, Rest, Strategy, config, rest,
};
use crate::hotplug::{self, Hotplug, PhysicalMemory};

/// The features this driver always knows what to do with (V-02).
pub(super) const SUPPORTED: Features = Features::VERSION_1
    .union(Features::UNPLUGGED_INACCESSIBLE)
    .union(Features::PERSISTENT_SUSPEND);

/// How often the status is read before a reset counts as failed. A read takes a device 0.1 to 100 µs.
const RESET_READS: usize = 100_000;

/// Maps of the region's blocks that exist at a time, those that steps make for themselves included.
const MAPS: usize = 14;

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProbeError {
    /// Nothing of the device was touched.
    #[error("not a memory device but {0:?}")]
    WrongDevice(DeviceType),
    /// The status does not become 0 (V-05).
    #[error("the device does not complete its reset")]
    ResetTimeout,
    /// There is no legacy memory device (V-04).
    #[error("the device does not offer VIRTIO_F_VERSION_1")]
    NoVersion1,
    /// FEATURES_OK did not stay set (V-01).
    #[error("the device refuses the features {0:?}")]
    FeaturesRefused(Features),
    /// The request queue is missing or too small, or there is no DMA memory for it.
    #[error("request queue: {0}")]
    Queue(#[from] virtio_drivers::Error),
    /// The configuration cannot be read or makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigReadError),
    /// There is no memory to keep track of so many blocks: the device has a very large region, or very small blocks.
    #[error("no memory to keep track of {blocks} blocks")]
    NoMemory {
        /// Blocks of the region.
        blocks: u64,
    },
    /// The region, or a memory group for it, cannot be had.
    #[error("region: {0}")]
    Region(hotplug::Error),
    /// Memory that an earlier driver has added is still there, which [`Strategy::Linux`] cannot take over (H-8).
    #[error("{bytes:#x} bytes of memory are still added")]
    MemoryAdded {
        /// How much.
        bytes: u64,
    },
}

/// A device that is ready but for DRIVER_OK.
pub(super) struct Ready<H: Hal> {
    pub(super) features: Features,
    pub(super) queue: RequestQueue<H>,
    pub(super) config: Config,
    bits: DeviceStatus,
}

impl<H: Hal> Ready<H> {
    /// From reset to a configuration that makes sense, with those of the `supported` features that the device has.
    ///
    /// # Errors
    ///
    /// See [`ProbeError`]. The device is told (status FAILED) and reset.
    pub(super) fn new(
        transport: &mut impl Transport,
        supported: Features,
    ) -> Result<Self, ProbeError> {
        if !reset(transport) {
            return Err(ProbeError::ResetTimeout);
        }
        let mut status = Status::new(transport);
        let features = match status.negotiate(supported) {
            Ok(features) => features,
            Err(error) => return Err(status.fail(error)),
        };
        let queue = match RequestQueue::<H>::new(status.transport) {
            Ok(queue) => queue,
            Err(error) => return Err(status.fail(error.into())),
        };
        let bits = status.bits;
        match config::read(transport, features) {
            Ok(config) => Ok(Self {
                features,
                queue,
                config,
                bits,
            }),
            Err(error) => Err(abandon(transport, queue, bits, error.into())),
        }
    }

    /// Sets DRIVER_OK: from now on the device works.
    pub(super) fn start(self, transport: &mut impl Transport) -> (Features, RequestQueue<H>) {
        transport.set_status(self.bits | DeviceStatus::DRIVER_OK);
        (self.features, self.queue)
    }

    fn abandon(self, transport: &mut impl Transport, error: ProbeError) -> ProbeError {
        abandon(transport, self.queue, self.bits, error)
    }
}

/// Tells the device and resets it, so that the queue's memory is free again (V-11).
fn abandon<H: Hal>(
    transport: &mut impl Transport,
    mut queue: RequestQueue<H>,
    bits: DeviceStatus,
    error: ProbeError,
) -> ProbeError {
    transport.set_status(bits | DeviceStatus::FAILED);
    if reset(transport) {
        queue.device_stopped();
    }
    error
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Takes over the device behind `transport`, for the machine whose memory `hotplug` is: its region becomes a
    /// resource, its memory a group, and the driver a notifier.
    ///
    /// Nothing is plugged or unplugged before the first [`poll`](Self::poll). What is still plugged from an earlier
    /// life is taken over under [`Strategy::Direct`], with the memory that is still added; under
    /// [`Strategy::Linux`] it is unplugged before anything else (G-05).
    ///
    /// # Errors
    ///
    /// See [`ProbeError`]. The device is told (status FAILED) and reset.
    pub fn probe<M: PhysicalMemory>(
        mut transport: T,
        hotplug: &mut Hotplug<M>,
        policy: Policy,
    ) -> Result<Self, ProbeError> {
        let device_type = transport.device_type();
        if device_type != DeviceType::Memory {
            return Err(ProbeError::WrongDevice(device_type));
        }
        // What a proximity domain is, only a machine with ACPI knows (G-03).
        let mut supported = SUPPORTED;
        supported.set(Features::ACPI_PXM, hotplug.has_proximity_domains());
        let ready = Ready::new(&mut transport, supported)?;
        let config = ready.config;
        let node = node(hotplug, &ready);
        let block_count = config.geometry.block_count();
        if !maps_fit(block_count) {
            let blocks = block_count;
            return Err(ready.abandon(&mut transport, ProbeError::NoMemory { blocks }));
        }
        let layout = Layout::new(config.geometry, hotplug.profile(), &policy);
        let attachment = match Attachment::new(hotplug, &layout, &policy, node) {
            Ok(attachment) => attachment,
            Err(error) => return Err(ready.abandon(&mut transport, error)),
        };
        let (features, queue) = ready.start(&mut transport);
        let plugged = config.mutable.plugged_size != 0;
        let adopt = policy.strategy == Strategy::Direct && (plugged || attachment.adopted);
        let usable_size = config.mutable.usable_region_size;
        let scan = adopt.then(|| Scan::new(&layout, usable_size));
        Ok(Self {
            transport,
            queue: Some(queue),
            features,
            policy,
            layout,
            config,
            node,
            seen: attachment.watch.seen(),
            attachment,
            // A target set after it was read above and before DRIVER_OK has raised no interrupt (V-10), so it is
            // read again now that every change raises one.
            config_changed: true,
            usable_may_shrink: false,
            refused_at: None,
            needs_reset: false,
            unplug_all: plugged && policy.strategy == Strategy::Linux,
            in_flight: [None; MAX_IN_FLIGHT],
            scan,
            resyncs: 0,
            maps: Maps::new(block_count),
            removal: Removal::default(),
            emptying: None,
            campaign: Campaign::default(),
            in_use: InUse::new(block_count),
            starved: 0,
            awake_since_ms: 0,
            pending_stall: None,
            removed_in_run: false,
            rest: Rest::None,
            said: None,
            retry_delay_ms: rest::delays(policy.strategy).0,
            now_ms: 0,
            phase: Phase::Running,
            awaiting: false,
            failure: None,
            counters: Counters::default(),
            events: Sink::default(),
            reported: super::report::Reported::default(),
        })
    }
}

/// The node of the memory: the one the device names, else the one of its address (Linux:
/// `virtio_mem_translate_node_id`, `memory_add_physaddr_to_nid`).
fn node<M: PhysicalMemory, H: Hal>(hotplug: &Hotplug<M>, ready: &Ready<H>) -> u32 {
    let Config {
        node_id, geometry, ..
    } = ready.config;
    let named = ready.features.contains(Features::ACPI_PXM);
    let node = named.then(|| hotplug.node_of_proximity_domain(node_id.into()));
    if node == Some(None) {
        log::warn!("virtio-mem: no node is known as proximity domain {node_id}");
    }
    let node = node.flatten();
    node.unwrap_or_else(|| hotplug.node_of_added(geometry.addr()))
}

/// Whether the heap has room for the maps of a region: how large they are is the device's choice, and a map that cannot
/// be allocated ends the kernel.
fn maps_fit(block_count: u64) -> bool {
    let words = usize::try_from(block_count.div_ceil(u64::BITS.into())).unwrap_or(usize::MAX);
    let mut maps = [const { Vec::<u64>::new() }; MAPS];
    maps.iter_mut()
        .all(|map| map.try_reserve_exact(words).is_ok())
}

/// Resets the device; `false` if it does not get there in a bounded number of reads (V-05).
pub(super) fn reset(transport: &mut impl Transport) -> bool {
    transport.set_status(DeviceStatus::empty());
    (0..RESET_READS).any(|_| {
        let done = transport.get_status().is_empty();
        if !done {
            spin_loop();
        }
        done
    })
}

/// The status bits the driver has set: bits are added, never taken back (V-05).
struct Status<'a, T> {
    transport: &'a mut T,
    bits: DeviceStatus,
}

impl<'a, T: Transport> Status<'a, T> {
    fn new(transport: &'a mut T) -> Self {
        Self {
            transport,
            bits: DeviceStatus::empty(),
        }
    }

    fn add(&mut self, bits: DeviceStatus) {
        self.bits |= bits;
        self.transport.set_status(self.bits);
    }

    fn fail(&mut self, error: ProbeError) -> ProbeError {
        self.add(DeviceStatus::FAILED);
        reset(self.transport);
        error
    }

    /// V-01, V-02, V-03: from ACKNOWLEDGE to an accepted FEATURES_OK.
    fn negotiate(&mut self, supported: Features) -> Result<Features, ProbeError> {
        self.add(DeviceStatus::ACKNOWLEDGE);
        self.add(DeviceStatus::DRIVER);
        let offered = Features::from_bits_truncate(self.transport.read_device_features());
        // G-04
        let accepted = offered & supported;
        if !accepted.contains(Features::VERSION_1) {
            return Err(ProbeError::NoVersion1);
        }
        self.transport.write_driver_features(accepted.bits());
        self.add(DeviceStatus::FEATURES_OK);
        let status = self.transport.get_status();
        if !status.contains(DeviceStatus::FEATURES_OK) {
            return Err(ProbeError::FeaturesRefused(accepted));
        }
        Ok(accepted)
    }
}

//! Initialisation (virtio 1.4, 3.1.1 and 5.15.5), every step of it.

use alloc::collections::BTreeSet;
use core::hint::spin_loop;

use thiserror::Error;
use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_mem_wire::{BlockMap, Config, Features};

use super::layout::Layout;
use super::queue::RequestQueue;
use super::step::RETRY_MIN_MS;
use super::{ConfigReadError, Counters, InUse, LayoutError, MemDriver, Policy, config};
use crate::hotplug::Profile;

/// The features this driver knows what to do with (V-02).
const SUPPORTED: Features = Features::VERSION_1.union(Features::UNPLUGGED_INACCESSIBLE);

/// How often the status is read before a reset counts as failed. A read takes a device 0.1 to 100 µs.
const RESET_READS: usize = 100_000;

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
    /// The block size does not fit the machine.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Takes over the device behind `transport`, for a machine with the sizes of `profile`.
    ///
    /// Nothing is plugged or unplugged before the first [`poll`](Self::poll). Blocks that are still plugged from
    /// an earlier life are unplugged then, before anything else (G-05).
    ///
    /// # Errors
    ///
    /// See [`ProbeError`]. The device is told (status FAILED) and reset.
    pub fn probe(mut transport: T, profile: &Profile, policy: Policy) -> Result<Self, ProbeError> {
        let device_type = transport.device_type();
        if device_type != DeviceType::Memory {
            return Err(ProbeError::WrongDevice(device_type));
        }
        if !reset(&mut transport) {
            return Err(ProbeError::ResetTimeout);
        }
        let mut status = Status::new(&mut transport);
        let negotiated = status.negotiate();
        let features = negotiated.map_err(|error| status.fail(error))?;
        let queue = RequestQueue::<H>::new(status.transport);
        let mut queue = queue.map_err(|error| status.fail(error.into()))?;
        match read_config(status.transport, profile) {
            Ok((config, layout)) => {
                status.add(DeviceStatus::DRIVER_OK);
                Ok(Self {
                    transport,
                    queue,
                    features,
                    policy,
                    layout,
                    config,
                    // A target set after it was read above and before DRIVER_OK has raised no interrupt
                    // (V-10), so it is read again now that every change raises one.
                    config_changed: true,
                    usable_may_shrink: false,
                    refused_at: None,
                    unplug_all: config.mutable.plugged_size != 0,
                    plugged: BlockMap::new(config.geometry.block_count()),
                    added: BTreeSet::new(),
                    orphan: None,
                    removal_pending: false,
                    in_flight: None,
                    emptying: None,
                    in_use: InUse {
                        sub_blocks: BlockMap::new(config.geometry.block_count()),
                        memory_blocks: BTreeSet::new(),
                    },
                    waiting: None,
                    retry_delay_ms: RETRY_MIN_MS,
                    starved: 0,
                    failure: None,
                    counters: Counters::default(),
                })
            }
            Err(error) => {
                let error = status.fail(error);
                if reset(&mut transport) {
                    queue.device_stopped();
                }
                Err(error)
            }
        }
    }
}

fn read_config(
    transport: &impl Transport,
    profile: &Profile,
) -> Result<(Config, Layout), ProbeError> {
    let config = config::read(transport)?;
    let layout = Layout::new(config.geometry, profile)?;
    Ok((config, layout))
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
        error
    }

    /// V-01, V-02, V-03: from ACKNOWLEDGE to an accepted FEATURES_OK.
    fn negotiate(&mut self) -> Result<Features, ProbeError> {
        self.add(DeviceStatus::ACKNOWLEDGE);
        self.add(DeviceStatus::DRIVER);
        let offered = Features::from_bits_truncate(self.transport.read_device_features());
        // G-04
        let accepted = offered & SUPPORTED;
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

//! How far the driver has got, and why no further.

use core::fmt;

use thiserror::Error;
use virtio_mem_wire::{Answer, Request, ResponseError};

use super::{ConfigReadError, ProbeError};
use crate::hotplug;

/// What a [`poll`](super::MemDriver::poll) has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do at once.
    Converging,
    /// Requests are with the device, which interrupts when it has answered. It should do so before
    /// [`deadline_ms`](super::MemDriver::deadline_ms).
    AwaitingDevice,
    /// The target is reached, but for what is [`unreachable`](super::MemDriver::unreachable); an interrupt
    /// announces the next one.
    Settled,
    /// Cannot get on for now.
    Stalled {
        /// What is in the way.
        reason: Stall,
        /// When the driver tries again, on the clock of the caller. Without it, only an interrupt, or memory that
        /// goes online or offline, helps.
        retry_at_ms: Option<u64>,
    },
    /// The device is at rest until [`resume`](super::MemDriver::resume).
    Suspended,
    /// The device is not used any more.
    Failed(Failure),
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Converging => f.write_str("converging"),
            Self::AwaitingDevice => f.write_str("waiting for the device"),
            Self::Settled => f.write_str("settled"),
            Self::Stalled {
                reason,
                retry_at_ms: Some(at),
            } => write!(f, "stalled until {at} ms: {reason}"),
            Self::Stalled {
                reason,
                retry_at_ms: None,
            } => write!(f, "stalled: {reason}"),
            Self::Suspended => f.write_str("suspended"),
            Self::Failed(failure) => write!(f, "failed: {failure}"),
        }
    }
}

/// What keeps the driver from its target for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Stall {
    /// The device has answered BUSY.
    #[error("the device is busy")]
    DeviceBusy,
    /// The device refuses to plug (NACK) though its target says it should.
    #[error("the device refuses to plug more memory")]
    Refused,
    /// No memory block is left for what is to be plugged.
    #[error("there is no memory block left to plug into")]
    NoSpace,
    /// Nothing that is still plugged could be emptied.
    #[error("the memory to be unplugged is in use")]
    MemoryInUse,
    /// There is no memory to account for more memory.
    #[error("no memory for the metadata of a memory block")]
    NoMemory,
    /// The hotplug core does not add memory that was plugged.
    #[error("memory cannot be added: {0}")]
    NotAdded(hotplug::Error),
    /// The hotplug core does not let go of memory of which nothing is plugged any more (H-10).
    #[error("memory without plugged blocks cannot be removed")]
    NotRemoved,
    /// Memory that was added is not brought online.
    #[error("too much memory is offline to add more")]
    OfflineThreshold,
    /// The device changes its configuration faster than it can be read.
    #[error("the configuration of the device does not come to rest")]
    ConfigUnstable,
}

/// What of the target is out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// Bytes between the target and what is plugged.
    pub bytes: u64,
    /// Why they are out of reach.
    pub reason: UnreachableReason,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x} bytes are out of reach: {}",
            self.bytes, self.reason
        )
    }
}

/// Why part of the target is out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UnreachableReason {
    /// H-9: it is less than can be plugged or unplugged at once.
    #[error("less than the {granule_size:#x} bytes that can be plugged or unplugged")]
    Remainder {
        /// Bytes of a sub-block or a big block.
        granule_size: u64,
    },
    /// H-9: no whole memory block, or big block, of the usable region is left.
    #[error("the usable region has no more whole units")]
    Capacity,
    /// The policy forbids to unplug online memory.
    #[error("only offline memory is unplugged")]
    OnlineMemory,
    /// For now; it is tried again.
    #[error(transparent)]
    Stalled(#[from] Stall),
}

/// Why the device is asked which blocks are plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ResyncReason {
    /// Memory was plugged, or added, when the driver was probed.
    #[error("memory from an earlier life")]
    Adoption,
    /// D-03, H-7: `plugged_size` is not what it should be.
    #[error("the plugged size does not match")]
    PluggedSize,
    /// The device has used a buffer it was not given.
    #[error("the virtqueue is broken")]
    Queue,
    /// An answer that made no sense.
    #[error("an impossible answer")]
    Answer,
    /// V-09: the device needed a reset.
    #[error("the device needed a reset")]
    NeedsReset,
    /// H-3: the device did not answer in time.
    #[error("the device did not answer")]
    AnswerTimeout,
}

/// Why the device is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// V-09
    #[error("the device needs a reset")]
    NeedsReset,
    /// H-3: a request has been with the device for too long.
    #[error("the device does not answer")]
    AnswerTimeout,
    /// The device cannot be used after a reset.
    #[error("after a reset: {0}")]
    Restart(ProbeError),
    /// The device has unplugged memory that was in use.
    #[error("{bytes:#x} bytes of memory in use are gone, the first at {address:#x}")]
    MemoryLost {
        /// Where the first of them is.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// Memory of an earlier life is in use in parts that this mode cannot tell apart.
    #[error("memory block {id} is in use in parts that cannot be taken over")]
    NotAdoptable {
        /// The memory block.
        id: u64,
    },
    /// The configuration cannot be read or makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigReadError),
    /// D-02
    #[error("the device has changed its block size, its region, or its node")]
    RegionChanged,
    /// D-08
    #[error("the usable region has shrunk from {from:#x} to {to:#x} bytes")]
    UsableShrunk {
        /// Bytes before.
        from: u64,
        /// Bytes now.
        to: u64,
    },
    /// D-03: the two halves do not agree on what is plugged.
    #[error("{device:#x} bytes are plugged says the device, {driver:#x} bytes says the driver")]
    OutOfSync {
        /// Bytes the device has plugged.
        device: u64,
        /// Bytes the driver has plugged.
        driver: u64,
    },
    /// An answer that a request of the driver's cannot deserve.
    #[error("{} {}", request.kind().name(), answer_text(*answer))]
    Answer {
        /// The request.
        request: Request,
        /// Its answer.
        answer: Answer,
    },
    /// V-14, or an answer that does not exist.
    #[error("bad answer: {0}")]
    Response(#[from] ResponseError),
    /// The device has used a buffer it was not given, or there is no descriptor left.
    #[error("virtqueue: {0}")]
    Queue(#[from] virtio_drivers::Error),
    /// The hotplug core refuses what it cannot refuse to this driver.
    #[error("{operation} of memory block {id}: {error}")]
    Hotplug {
        /// What was to be done.
        operation: &'static str,
        /// The memory block.
        id: u64,
        /// The core's answer.
        error: hotplug::Error,
    },
}

fn answer_text(answer: Answer) -> &'static str {
    match answer {
        Answer::Ack => "was answered ACK",
        Answer::Nack => "was answered NACK",
        Answer::Busy => "was answered BUSY",
        Answer::Error => "was answered ERROR",
    }
}

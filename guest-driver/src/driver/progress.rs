//! How far the driver has got, and why no further.

use thiserror::Error;
use virtio_mem_wire::{Answer, Request, ResponseError};

use super::ConfigReadError;
use crate::hotplug;

/// What a [`poll`](super::MemDriver::poll) has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do at once.
    Converging,
    /// A request is with the device, which interrupts when it has answered.
    AwaitingDevice,
    /// The target is reached, but for [`unreachable_size`](super::MemDriver::unreachable_size); an interrupt
    /// announces the next one.
    Settled,
    /// Cannot get on for now.
    Stalled {
        /// What is in the way.
        reason: Stall,
        /// When the driver tries again, on the clock of the caller. Without it, only an interrupt helps.
        retry_at_ms: Option<u64>,
    },
    /// The device is not used any more.
    Failed(Failure),
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
    /// The device changes its configuration faster than it can be read.
    #[error("the configuration of the device does not come to rest")]
    ConfigUnstable,
}

/// Why the device is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// V-09
    #[error("the device needs a reset")]
    NeedsReset,
    /// The configuration cannot be read or makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigReadError),
    /// D-02
    #[error("the device has changed its block size or its region")]
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

//! A host whose operations fail when they are told to.

use std::cmp::min;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_mem::{Anonymous, Backing, MappingLimits, PlugObserver, Run, Slot, SlotMapper};

/// What the host does for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStep {
    /// Memory is made accessible.
    Open,
    /// Memory is made inaccessible.
    Close,
    /// Memory is given back.
    Discard,
    /// A memory slot is made.
    MapSlot,
    /// A memory slot is removed.
    UnmapSlot,
    /// An observer is told of plugged memory.
    Plugged,
    /// An observer is told of memory that is about to go.
    Unplugging,
}

impl HostStep {
    /// All of them, with names.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::Open, "host: opening memory"),
        (Self::Close, "host: closing memory"),
        (Self::Discard, "host: discarding memory"),
        (Self::MapSlot, "host: mapping a slot"),
        (Self::UnmapSlot, "host: unmapping a slot"),
        (Self::Plugged, "host: an observer of plugged memory"),
        (Self::Unplugging, "host: an observer of unplugged memory"),
    ];
}

/// Which step fails how often from now on. One at a time: a step that fails while another is undone stops the device
/// for good.
#[derive(Clone, Debug, Default)]
pub struct HostFaults(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    armed: Mutex<Option<(HostStep, u64)>>,
    hits: AtomicU64,
}

impl HostFaults {
    /// `step` fails the next `times`.
    pub fn arm(&self, step: HostStep, times: u64) {
        *self.0.armed.lock().unwrap_or_else(PoisonError::into_inner) = Some((step, times));
    }

    /// Nothing fails any more. How often something has since this was called last.
    pub fn disarm(&self) -> u64 {
        *self.0.armed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.0.hits.swap(0, Ordering::Relaxed)
    }

    /// How often something has failed since [`disarm`](Self::disarm).
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.0.hits.load(Ordering::Relaxed)
    }

    fn reach(&self, step: HostStep) -> io::Result<()> {
        let mut armed = self.0.armed.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *armed {
            Some((wanted, times)) if *wanted == step && *times > 0 => {
                *times -= 1;
                self.0.hits.fetch_add(1, Ordering::Relaxed);
                Err(io::ErrorKind::OutOfMemory.into())
            }
            _ => Ok(()),
        }
    }
}

/// Anonymous memory with faults.
#[derive(Debug)]
pub struct FaultyBacking {
    /// The memory.
    pub memory: Anonymous,
    /// Its faults.
    pub faults: HostFaults,
}

// SAFETY: the mapping is that of the backing inside, which keeps the promise.
#[expect(unsafe_code, reason = "passes on the promise of the backing inside")]
unsafe impl Backing for FaultyBacking {
    fn host_address(&self) -> NonNull<u8> {
        self.memory.host_address()
    }

    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn page_size(&self) -> u64 {
        self.memory.page_size()
    }

    fn default_block_size(&self) -> u64 {
        self.memory.default_block_size()
    }

    fn max_open_runs(&self) -> u64 {
        self.memory.max_open_runs()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.faults.reach(HostStep::Open)?;
        self.memory.open(range)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        let result = self.faults.reach(HostStep::Close);
        // A host that fails may have got half-way.
        let half = range.start + (range.end - range.start) / 2 / 4096 * 4096;
        let end = if result.is_err() { half } else { range.end };
        self.memory.close(range.start..min(end, range.end))?;
        result
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.faults.reach(HostStep::Discard)?;
        self.memory.discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        self.memory.resident_bytes()
    }
}

/// Slots of a hypervisor that is not there, but for its faults.
#[derive(Debug)]
pub struct FaultySlots(pub HostFaults);

impl SlotMapper for FaultySlots {
    fn map(&self, _: &Slot) -> io::Result<()> {
        self.0.reach(HostStep::MapSlot)
    }

    fn unmap(&self, _: &Slot) -> io::Result<()> {
        self.0.reach(HostStep::UnmapSlot)
    }
}

/// An observer that does nothing but fail.
#[derive(Debug)]
pub struct FaultyObserver(pub HostFaults);

impl PlugObserver for FaultyObserver {
    fn limits(&self) -> MappingLimits {
        MappingLimits::NONE
    }

    fn plugged(&self, _: &Run) -> io::Result<()> {
        self.0.reach(HostStep::Plugged)
    }

    fn unplugging(&self, _: &Run) -> io::Result<()> {
        self.0.reach(HostStep::Unplugging)
    }
}

//! Faults of the host on request: what a VMM meets rarely, often.
//!
//! [`Faults`] are armed by whoever tests and strike in the backing and the slots of one device. Each strikes once: what
//! a device does to undo the step that failed succeeds, as long as no other is armed before it has counted the first
//! ([`Counters::host_failures`](virtio_mem::Counters::host_failures)).
#![expect(
    unsafe_code,
    reason = "`Backing` is an unsafe trait, and what it promises is promised by the backing inside"
)]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_mem::{Backing, Slot, SlotMapper};

/// Something the host may refuse a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostCall {
    /// Making memory accessible, on the way to a PLUG.
    Open,
    /// Giving memory back, the last step of an UNPLUG.
    Discard,
    /// Creating or removing a memory slot.
    Slot,
}

/// What is about to go wrong. Clones are the same; the default is that nothing ever does.
#[derive(Clone, Debug, Default)]
pub struct Faults(Option<Arc<State>>);

#[derive(Debug, Default)]
struct State {
    armed: Mutex<Option<HostCall>>,
    struck: AtomicU64,
}

impl State {
    fn armed(&self) -> MutexGuard<'_, Option<HostCall>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Faults {
    /// Faults that can be armed.
    #[must_use]
    pub fn new() -> Self {
        Self(Some(Arc::default()))
    }

    /// The next call of this kind fails.
    pub fn arm(&self, call: HostCall) {
        if let Some(state) = &self.0 {
            *state.armed() = Some(call);
        }
    }

    /// Nothing that has not struck will.
    pub fn disarm(&self) {
        if let Some(state) = &self.0 {
            *state.armed() = None;
        }
    }

    /// Calls that have failed so far.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.0
            .as_ref()
            .map_or(0, |state| state.struck.load(Ordering::Relaxed))
    }

    /// `backing`, whose calls can fail.
    #[must_use]
    pub fn backing(&self, backing: Box<dyn Backing>) -> Box<dyn Backing> {
        match &self.0 {
            None => backing,
            Some(_) => Box::new(FaultyBacking {
                inner: backing,
                faults: self.clone(),
            }),
        }
    }

    /// `slots`, whose calls can fail.
    #[must_use]
    pub fn slots<S: SlotMapper>(&self, slots: S) -> FaultySlots<S> {
        FaultySlots {
            inner: slots,
            faults: self.clone(),
        }
    }

    fn strike(&self, call: HostCall) -> io::Result<()> {
        let Some(state) = &self.0 else {
            return Ok(());
        };
        let mut armed = state.armed();
        if *armed != Some(call) {
            return Ok(());
        }
        *armed = None;
        state.struck.fetch_add(1, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }
}

#[derive(Debug)]
struct FaultyBacking {
    inner: Box<dyn Backing>,
    faults: Faults,
}

// SAFETY: the mapping is that of the backing inside, which keeps the promise.
unsafe impl Backing for FaultyBacking {
    fn host_address(&self) -> NonNull<u8> {
        self.inner.host_address()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn page_size(&self) -> u64 {
        self.inner.page_size()
    }

    fn min_block_size(&self) -> u64 {
        self.inner.min_block_size()
    }

    fn default_block_size(&self) -> u64 {
        self.inner.default_block_size()
    }

    fn max_open_runs(&self) -> u64 {
        self.inner.max_open_runs()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.faults.strike(HostCall::Open)?;
        self.inner.open(range)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.close(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.faults.strike(HostCall::Discard)?;
        self.inner.discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        self.inner.resident_bytes()
    }

    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        self.inner.resident_bytes_in(open)
    }
}

/// Slots whose calls can fail.
#[derive(Debug)]
pub struct FaultySlots<S> {
    inner: S,
    faults: Faults,
}

impl<S: SlotMapper> SlotMapper for FaultySlots<S> {
    fn max_count(&self) -> u64 {
        self.inner.max_count()
    }

    fn map(&self, slot: &Slot) -> io::Result<()> {
        self.faults.strike(HostCall::Slot)?;
        self.inner.map(slot)
    }

    fn unmap(&self, slot: &Slot) -> io::Result<()> {
        self.faults.strike(HostCall::Slot)?;
        self.inner.unmap(slot)
    }
}

#[cfg(test)]
mod tests {
    use virtio_mem::{Anonymous, NoSlots};

    use super::*;

    #[test]
    fn a_fault_strikes_the_next_call_of_its_kind_once() {
        let faults = Faults::new();
        let backing = faults.backing(Box::new(Anonymous::base_pages(1 << 21).unwrap()));
        let slots = faults.slots(NoSlots);
        let slot = Slot {
            index: 0,
            guest_address: 0,
            host_address: 0,
            len: 1 << 21,
        };
        let calls = || {
            [
                backing.open(0..1 << 21).is_ok(),
                slots.map(&slot).is_ok(),
                backing.discard(0..1 << 21).is_ok(),
                slots.unmap(&slot).is_ok(),
            ]
        };
        assert_eq!(calls(), [true; 4]);
        for (call, expected) in [
            (HostCall::Open, [false, true, true, true]),
            (HostCall::Slot, [true, false, true, true]),
            (HostCall::Discard, [true, true, false, true]),
        ] {
            faults.arm(call);
            assert_eq!(calls(), expected);
            assert_eq!(calls(), [true; 4]);
        }
        assert_eq!(faults.struck(), 3);
        faults.arm(HostCall::Open);
        faults.disarm();
        assert_eq!(calls(), [true; 4]);
    }

    #[test]
    fn by_default_nothing_fails() {
        let faults = Faults::default();
        faults.arm(HostCall::Slot);
        assert!(faults.strike(HostCall::Slot).is_ok());
        assert_eq!(faults.struck(), 0);
    }
}

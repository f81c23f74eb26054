//! Which blocks may be touched now, and who is touching them.

use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_mem_wire::{BlockMap, BlockRange, BlockState};

/// The plugged blocks, shared between the device, which changes them, and every user of guest memory in the
/// VMM, which must not lose a block under its hands.
///
/// A user takes a [`Pin`] on the blocks it touches; the device cannot take a pinned block away. Both happen
/// under one short lock, so that a pin is either there before the unplug or refused after it.
pub(crate) struct BlockAccess {
    state: Mutex<State>,
    on_unpinned: Box<dyn Fn() + Send + Sync>,
}

#[derive(Debug)]
struct State {
    plugged: BlockMap,
    pinned: Vec<BlockRange>,
    /// What could not be unplugged because of pins; whoever drops the last pin in it calls `on_unpinned`.
    wanted: Option<BlockRange>,
}

impl State {
    fn is_pinned(&self, range: BlockRange) -> bool {
        let overlaps = |pin: &BlockRange| pin.first < range.end() && range.first < pin.end();
        self.pinned.iter().any(overlaps)
    }
}

/// The smallest range that has both in it.
fn hull(one: BlockRange, other: BlockRange) -> BlockRange {
    let first = one.first.min(other.first);
    BlockRange {
        first,
        count: one.end().max(other.end()) - first,
    }
}

/// Keeps the blocks of a range plugged until it is dropped.
#[derive(Debug)]
pub(crate) struct Pin {
    access: Arc<BlockAccess>,
    range: BlockRange,
}

/// A block is pinned and cannot be taken away now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pinned;

impl BlockAccess {
    /// No block is plugged. `on_unpinned` is called when, after a refused [`revoke`](Self::revoke), no pin
    /// is left in what was refused.
    pub(crate) fn new(block_count: u64, on_unpinned: Box<dyn Fn() + Send + Sync>) -> Self {
        Self {
            state: Mutex::new(State {
                plugged: BlockMap::new(block_count),
                pinned: Vec::new(),
                wanted: None,
            }),
            on_unpinned,
        }
    }

    /// Pins the blocks of `range`; `None` if one of them is not plugged.
    pub(crate) fn pin(self: &Arc<Self>, range: BlockRange) -> Option<Pin> {
        let mut state = self.lock();
        if state.plugged.state(range) != BlockState::Plugged {
            return None;
        }
        state.pinned.push(range);
        Some(Pin {
            access: Arc::clone(self),
            range,
        })
    }

    /// Calls `f` with the map of plugged blocks.
    pub(crate) fn with_plugged<R>(&self, f: impl FnOnce(&BlockMap) -> R) -> R {
        f(&self.lock().plugged)
    }

    /// Lets users touch the blocks of `range`, which the backing has opened.
    pub(crate) fn grant(&self, range: BlockRange) {
        self.lock().plugged.insert(range);
    }

    /// Takes the blocks of `range` away from users, or none of them if one is pinned.
    pub(crate) fn revoke(&self, range: BlockRange) -> Result<(), Pinned> {
        let mut state = self.lock();
        if state.is_pinned(range) {
            state.wanted = Some(state.wanted.map_or(range, |wanted| hull(wanted, range)));
            return Err(Pinned);
        }
        state.plugged.remove(range);
        Ok(())
    }

    /// Whether an unplug was refused because of pins that are still there.
    pub(crate) fn is_wanted(&self) -> bool {
        self.lock().wanted.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing between lock and unlock can panic and leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.access.lock();
        if let Some(at) = state.pinned.iter().position(|pin| *pin == self.range) {
            state.pinned.swap_remove(at);
        }
        if state.wanted.is_some_and(|wanted| !state.is_pinned(wanted)) {
            state.wanted = None;
            drop(state);
            (self.access.on_unpinned)();
        }
    }
}

impl Debug for BlockAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BlockAccess").field(&self.state).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange { first, count }
    }

    #[test]
    fn pinned_blocks_stay_and_their_neighbours_go() {
        let unpinned = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&unpinned);
        let on_unpinned = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let access = Arc::new(BlockAccess::new(16, Box::new(on_unpinned)));
        access.grant(range(0, 8));
        let (pin, other) = (
            access.pin(range(3, 2)).unwrap(),
            access.pin(range(3, 2)).unwrap(),
        );
        assert_eq!(access.revoke(range(0, 4)), Err(Pinned));
        assert_eq!(access.revoke(range(5, 3)), Ok(()));
        drop(pin);
        assert_eq!(access.revoke(range(0, 4)), Err(Pinned));
        assert_eq!(unpinned.load(Ordering::Relaxed), 0);
        drop(other);
        assert_eq!(unpinned.load(Ordering::Relaxed), 1);
        assert_eq!(access.revoke(range(0, 5)), Ok(()));
    }

    #[test]
    fn unplugged_blocks_cannot_be_pinned() {
        let access = Arc::new(BlockAccess::new(16, Box::new(|| {})));
        access.grant(range(0, 2));
        assert!(access.pin(range(1, 2)).is_none());
        assert!(access.pin(range(20, 1)).is_none());
        assert!(access.pin(range(0, 2)).is_some());
    }
}

//! Handles: names of allocated pages that stay the same while the page is moved.

use alloc::vec::Vec;

use super::Error;
use super::page::Memmap;

/// Names an allocated page, wherever it is moved to, until it is freed.
///
/// A handle that outlives its page is recognised and refused, until the same slot was reused 2^32 times.
///
/// ```text
///             allocate              pin
///   no page ------------> held <------------> pinned       held: may be moved at any time, unless it is unmovable
///      ^                  |  |     unpin                   pinned, any number of times: stays, and cannot be freed
///      +------ free ------+  | hard_offline_page
///      |                     v
///      +------ free ------ lost                            the contents are gone: pinning it is `HwPoison`
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageHandle {
    index: u32,
    generation: u32,
}

/// Whether a page can be moved while it is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mobility {
    /// Its user reaches it through the handle, so it can be moved while it is not pinned.
    Movable,
    /// Its user remembers the address: it blocks offlining until it is freed.
    Unmovable,
}

impl PageHandle {
    pub(super) fn index(self) -> u32 {
        self.index
    }
}

/// What a handle names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// Page frame number, or [`Self::LOST`]; meaningless while `generation` is not current.
    pfn: u64,
    generation: u32,
    /// How many pins there are. A slot without a page has none.
    pins: u32,
    mobility: Mobility,
}

impl Held {
    /// No page frame has this number: the page broke.
    const LOST: u64 = u64::MAX;

    /// The page frame; `None` if the page and its contents are lost.
    pub(super) fn pfn(&self) -> Option<u64> {
        (self.pfn != Self::LOST).then_some(self.pfn)
    }

    pub(super) fn mobility(&self) -> Mobility {
        self.mobility
    }

    /// Whether somebody may have a pointer to it.
    pub(super) fn is_pinned(&self) -> bool {
        self.pins != 0
    }

    /// Whether it has to stay where it is for now.
    pub(super) fn is_fixed(&self) -> bool {
        self.is_pinned() || self.mobility == Mobility::Unmovable
    }
}

/// All handles.
#[derive(Debug, Default)]
pub(super) struct Handles {
    slots: Vec<Held>,
    vacant: Vec<u32>,
    lost: usize,
}

impl Handles {
    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Held>() + self.vacant.capacity() * size_of::<u32>()
    }

    /// Number of pages that have a handle.
    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.vacant.len() - self.lost
    }

    /// The page of the handle with this index, which is not pinned, is no more.
    pub(super) fn lose(&mut self, index: u32) {
        self.slots[index as usize].pfn = Held::LOST;
        self.lost += 1;
    }

    /// The index the next [`insert`](Self::insert) will use; after this that cannot fail.
    pub(super) fn reserve(&mut self) -> Result<u32, Error> {
        if let Some(index) = self.vacant.last() {
            return Ok(*index);
        }
        if self.slots.len() >= Memmap::MAX_HANDLES {
            return Err(Error::NoMemory);
        }
        self.slots.try_reserve(1).map_err(|_| Error::NoMemory)?;
        // Room to give every slot back, so that a handle is forgotten without the heap; its page may need a set's node.
        let slots = self.slots.len() + 1;
        self.vacant
            .try_reserve(slots)
            .map_err(|_| Error::NoMemory)?;
        Ok(self.slots.len() as u32)
    }

    /// Names the page `pfn` with the handle whose index [`reserve`](Self::reserve) returned.
    pub(super) fn insert(&mut self, pfn: u64, mobility: Mobility) -> PageHandle {
        let (index, generation) = match self.vacant.pop() {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                slot.pfn = pfn;
                slot.pins = 0;
                slot.mobility = mobility;
                (index, slot.generation)
            }
            None => {
                self.slots.push(Held {
                    pfn,
                    generation: 0,
                    pins: 0,
                    mobility,
                });
                (self.slots.len() as u32 - 1, 0)
            }
        };
        PageHandle { index, generation }
    }

    /// What `handle` names.
    pub(super) fn get(&self, handle: PageHandle) -> Result<Held, Error> {
        let held = self.slots.get(handle.index as usize);
        held.filter(|held| held.generation == handle.generation)
            .copied()
            .ok_or(Error::Invalid)
    }

    /// What the handle with this index names; the index comes from a held page.
    pub(super) fn by_index(&self, index: u32) -> Held {
        self.slots[index as usize]
    }

    /// The page frames that have to stay where they are for now. A slot without a page is not fixed.
    pub(super) fn fixed(&self) -> impl Iterator<Item = u64> + '_ {
        let fixed = self.slots.iter().filter(|held| held.is_fixed());
        fixed.filter_map(Held::pfn)
    }

    /// Lets the handle with this index name the page `pfn`.
    pub(super) fn move_to(&mut self, index: u32, pfn: u64) {
        self.slots[index as usize].pfn = pfn;
    }

    /// Forgets a handle that [`get`](Self::get) has just found.
    pub(super) fn remove(&mut self, handle: PageHandle) {
        let slot = &mut self.slots[handle.index as usize];
        self.lost -= usize::from(slot.pfn == Held::LOST);
        slot.generation = slot.generation.wrapping_add(1);
        slot.pins = 0;
        slot.mobility = Mobility::Movable;
        self.vacant.push(handle.index);
    }

    pub(super) fn pin(&mut self, handle: PageHandle) -> Result<u64, Error> {
        let held = self.get(handle)?;
        let pfn = held.pfn().ok_or(Error::HwPoison)?;
        let pins = held.pins.checked_add(1).ok_or(Error::Busy)?;
        self.slots[handle.index as usize].pins = pins;
        Ok(pfn)
    }

    pub(super) fn unpin(&mut self, handle: PageHandle) -> Result<(), Error> {
        let held = self.get(handle)?;
        let pins = held.pins.checked_sub(1).ok_or(Error::Invalid)?;
        self.slots[handle.index as usize].pins = pins;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handle_of_a_freed_page_is_refused_even_after_its_slot_is_reused() {
        let mut handles = Handles::default();
        handles.reserve().unwrap();
        let old = handles.insert(1, Mobility::Movable);
        handles.remove(old);
        assert!(handles.get(old).is_err());
        handles.reserve().unwrap();
        let new = handles.insert(2, Mobility::Movable);
        assert!(handles.get(old).is_err());
        assert_eq!(handles.get(new).unwrap().pfn(), Some(2));
    }

    #[test]
    fn unpin_without_a_pin_is_refused() {
        let mut handles = Handles::default();
        handles.reserve().unwrap();
        let handle = handles.insert(1, Mobility::Movable);
        assert_eq!(handles.unpin(handle), Err(Error::Invalid));
        handles.pin(handle).unwrap();
        assert!(handles.get(handle).unwrap().is_pinned());
        handles.unpin(handle).unwrap();
        assert!(!handles.get(handle).unwrap().is_pinned());
    }
}

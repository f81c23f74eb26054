//! Memory blocks: adding, onlining, offlining, removing.

use core::ops::Range;

use super::section::Section;
use super::{Error, Hotplug, Isolation, Migration, PhysicalMemory};

/// State of a memory block that has been added, as Linux's `memoryN/state` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Its pages are not in use, and their metadata means nothing.
    Offline,
    /// Its pages belong to the allocator, but for those withheld.
    Online,
    /// Being emptied, see [`Hotplug::isolate_block`].
    GoingOffline,
}

impl BlockState {
    /// The word Linux has for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Online => "online",
            Self::GoingOffline => "going-offline",
        }
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// Adds the memory blocks of `[start, start + size)`, offline.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if any part has been added already, [`Error::Invalid`] unless the range is made of
    /// whole memory blocks, [`Error::NoMemory`] if their metadata does not fit into the heap.
    pub fn add_memory(&mut self, start: u64, size: u64) -> Result<(), Error> {
        // Linux claims the resource first, so an overlap wins over a misalignment.
        if self.overlaps(start, size) {
            return Err(Error::Exists);
        }
        let blocks = self.units(start, size, self.profile.memory_block_shift)?;
        let sections = self.units(start, size, self.profile.section_shift)?;
        for number in sections.clone() {
            match Section::new(&self.profile) {
                Ok(section) => self.sections.insert(number, section),
                Err(error) => {
                    for undone in sections.start..number {
                        self.sections.remove(&undone);
                    }
                    return Err(error);
                }
            };
        }
        for id in blocks {
            self.blocks.insert(id, BlockState::Offline);
        }
        Ok(())
    }

    /// Removes the memory blocks of `[start, start + size)`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of memory blocks that were added, [`Error::Busy`] if one of
    /// them is not offline; nothing is removed then.
    pub fn remove_memory(&mut self, start: u64, size: u64) -> Result<(), Error> {
        let blocks = self.units(start, size, self.profile.memory_block_shift)?;
        let sections = self.units(start, size, self.profile.section_shift)?;
        let states = self.blocks.range(blocks.clone());
        if states.clone().count() as u64 != blocks.end - blocks.start {
            return Err(Error::Invalid);
        }
        if states.into_iter().any(|(_, s)| *s != BlockState::Offline) {
            return Err(Error::Busy);
        }
        for id in blocks {
            self.blocks.remove(&id);
        }
        for number in sections {
            self.sections.remove(&number);
        }
        Ok(())
    }

    /// The state of memory block `id` (physical address / memory block size); `None` if it was not added.
    pub fn block_state(&self, id: u64) -> Option<BlockState> {
        self.blocks.get(&id).copied()
    }

    /// All memory blocks, ascending: id and state.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, BlockState)> + '_ {
        self.blocks.iter().map(|(id, state)| (*id, *state))
    }

    /// Brings memory block `id` online.
    ///
    /// `online_page` is asked for each pageblock, by its bytes, whether its pages go to the allocator; those
    /// that do not stay withheld until [`fake_online`](Self::fake_online) (Linux: the `online_page` callback and
    /// `PageOffline`). The contents of fresh pages are undefined (G-12): whoever allocates one writes it first.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block or it is not offline.
    pub fn online(
        &mut self,
        id: u64,
        mut online_page: impl FnMut(Range<u64>) -> bool,
    ) -> Result<(), Error> {
        match self.blocks.get_mut(&id) {
            Some(state @ BlockState::Offline) => *state = BlockState::Online,
            _ => return Err(Error::Invalid),
        }
        for number in self.sections_of_block(id) {
            if let Some(section) = self.sections.get_mut(&number) {
                section.online = true;
            }
        }
        self.counts.present += self.block_pages();
        let shift = self.profile.pageblock_shift;
        for pageblock in self.pageblocks_of_block(id) {
            if online_page(pageblock << shift..(pageblock + 1) << shift) {
                self.release_pageblock(pageblock);
            }
        }
        Ok(())
    }

    /// Takes memory block `id` offline: everything in use is moved elsewhere. Withheld pages do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block or it is not online, [`Error::Busy`] if a page in it cannot
    /// be moved, [`Error::NoMemory`] if there is no page to move one to. The block is online as before then.
    pub fn offline(&mut self, id: u64) -> Result<(), Error> {
        let isolation = self.isolate_block(id)?;
        self.empty(isolation)
    }

    /// Works on `isolation` until it is committed, or cancelled on failure.
    pub(super) fn empty(&mut self, mut isolation: Isolation) -> Result<(), Error> {
        loop {
            match self.migrate(&mut isolation, u32::MAX) {
                Ok(Migration::More) => {}
                Ok(Migration::Done) => return self.commit(isolation),
                Err(error) => {
                    self.cancel(isolation);
                    return Err(error);
                }
            }
        }
    }

    pub(super) fn set_block_offline(&mut self, id: u64) {
        for number in self.sections_of_block(id) {
            if let Some(section) = self.sections.get_mut(&number) {
                section.online = false;
            }
        }
        self.counts.present -= self.block_pages();
        self.blocks.insert(id, BlockState::Offline);
    }

    pub(super) fn set_block_state(&mut self, id: u64, state: BlockState) {
        self.blocks.insert(id, state);
    }

    pub(super) fn pageblocks_of_block(&self, id: u64) -> Range<u64> {
        let shift = self.profile.memory_block_shift - self.profile.pageblock_shift;
        id << shift..(id + 1) << shift
    }

    pub(super) fn sections_of_block(&self, id: u64) -> Range<u64> {
        let shift = self.profile.memory_block_shift - self.profile.section_shift;
        id << shift..(id + 1) << shift
    }

    pub(super) fn block_pages(&self) -> u64 {
        1 << (self.profile.memory_block_shift - self.profile.page_shift)
    }

    /// Whether any byte of the range lies in a memory block that was added.
    fn overlaps(&self, start: u64, size: u64) -> bool {
        let Some(last_byte) = size.checked_sub(1).and_then(|n| start.checked_add(n)) else {
            return false;
        };
        let shift = self.profile.memory_block_shift;
        let touched = start >> shift..=last_byte >> shift;
        self.blocks.range(touched).next().is_some()
    }
}

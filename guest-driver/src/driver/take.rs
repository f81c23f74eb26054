//! Taking a range away from the page allocator before it is unplugged, and giving it back.

use core::ops::Range;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::BlockRange;

use super::MemDriver;
use super::layout::Layout;
use crate::hotplug::{BlockState, Error, Hotplug, Isolation, Migration, PhysicalMemory};

/// The most pages one step moves.
const PAGES_PER_STEP: u32 = 64;

/// A range of whole granules that is being taken, memory block by memory block from its end (Linux:
/// `virtio_mem_fake_offline`).
#[derive(Debug)]
pub(super) struct Emptying {
    pub(super) range: BlockRange,
    bytes: Range<u64>,
    /// What lies behind this address is withheld.
    rest_end: u64,
    /// The part that is being emptied.
    current: Option<(Isolation, Range<u64>)>,
}

/// How far that has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taking {
    /// There is more to do.
    More,
    /// G-11: all of it is out of reach of the page allocator.
    Taken(BlockRange),
    /// A page in it is in use; all of it is as it was.
    InUse(BlockRange, Error),
}

impl Emptying {
    pub(super) fn new(layout: &Layout, range: BlockRange) -> Self {
        let bytes = layout.bytes(range);
        Self {
            range,
            rest_end: bytes.end,
            bytes,
            current: None,
        }
    }

    /// Moves a few pages, or goes on to the next memory block. After an error [`undo`](Self::undo) is due.
    fn step<M: PhysicalMemory>(
        &mut self,
        layout: &Layout,
        hotplug: &mut Hotplug<M>,
    ) -> Result<Taking, Error> {
        if let Some((isolation, part)) = &self.current {
            if hotplug.migrate(isolation, PAGES_PER_STEP)? == Migration::More {
                return Ok(Taking::More);
            }
            let (isolation, start) = (*isolation, part.start);
            // It cancels what it does not commit.
            self.current = None;
            hotplug.commit(isolation)?;
            self.rest_end = start;
        } else if let Some((id, part)) = layout
            .by_memory_block(self.bytes.start..self.rest_end)
            .last()
        {
            let size = part.end - part.start;
            match hotplug.block_state(id) {
                // At once: it may go online while the request is under way (G-11).
                Some(BlockState::Offline) => {
                    hotplug.fake_offline(part.start, size)?;
                    self.rest_end = part.start;
                }
                _ => {
                    let isolation = hotplug.isolate(part.start, size)?;
                    self.current = Some((isolation, part));
                }
            }
        }
        Ok(match self.rest_end == self.bytes.start {
            true => Taking::Taken(self.range),
            false => Taking::More,
        })
    }

    /// Gives back what was taken so far.
    fn undo<M: PhysicalMemory>(self, layout: &Layout, hotplug: &mut Hotplug<M>) {
        if let Some((isolation, _)) = self.current {
            hotplug.cancel(isolation);
        }
        give_back(layout, hotplug, self.rest_end..self.bytes.end);
    }
}

/// Gives withheld memory to the hotplug core, memory block by memory block, as those may differ in their state.
pub(super) fn give_back<M: PhysicalMemory>(
    layout: &Layout,
    hotplug: &mut Hotplug<M>,
    bytes: Range<u64>,
) {
    for (id, part) in layout.by_memory_block(bytes) {
        if let Err(error) = hotplug.fake_online(part.start, part.end - part.start) {
            log::warn!("virtio-mem: part of memory block {id} stays out of use: {error}");
        }
    }
}

/// Withholds memory only if no page of it is in use; nothing of it is accessed. `false` if one is.
pub(super) fn withdraw_free<M: PhysicalMemory>(
    layout: &Layout,
    hotplug: &mut Hotplug<M>,
    bytes: Range<u64>,
) -> bool {
    for (id, part) in layout.by_memory_block(bytes.clone()) {
        let size = part.end - part.start;
        let done = match hotplug.block_state(id) {
            Some(BlockState::Offline) => hotplug.fake_offline(part.start, size),
            _ => withdraw_online(hotplug, part.start, size),
        };
        if done.is_err() {
            give_back(layout, hotplug, bytes.start..part.start);
            return false;
        }
    }
    true
}

fn withdraw_online<M: PhysicalMemory>(
    hotplug: &mut Hotplug<M>,
    start: u64,
    size: u64,
) -> Result<(), Error> {
    let isolation = hotplug.isolate(start, size)?;
    match hotplug.migrate(&isolation, 0) {
        Ok(Migration::Done) => hotplug.commit(isolation),
        _ => {
            hotplug.cancel(isolation);
            Err(Error::Busy)
        }
    }
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Works on the range that is being taken, if there is one.
    pub(super) fn take_some<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Option<Taking> {
        let mut emptying = self.emptying.take()?;
        match emptying.step(&self.layout, hotplug) {
            Ok(Taking::More) => {
                self.emptying = Some(emptying);
                Some(Taking::More)
            }
            Ok(done) => Some(done),
            Err(error) => {
                let range = emptying.range;
                emptying.undo(&self.layout, hotplug);
                Some(Taking::InUse(range, error))
            }
        }
    }

    /// The guest-physical addresses the driver is about to take out of use, or has begun to, so that they can be
    /// unplugged.
    pub fn emptying(&self) -> Option<Range<u64>> {
        self.emptying
            .as_ref()
            .map(|emptying| emptying.bytes.clone())
    }

    /// Lets go of the range that is being taken.
    pub(super) fn stop_emptying<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        if let Some(emptying) = self.emptying.take() {
            emptying.undo(&self.layout, hotplug);
        }
    }
}

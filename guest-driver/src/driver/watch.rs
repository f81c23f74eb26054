//! The driver's notifier: it hears of its memory going online and offline, and objects where that cannot be.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::layout::{Layout, Mode};
use crate::hotplug::{Error, Hotplug, MemoryAction, MemoryEvent, NotifierId, PhysicalMemory};

/// How often something has happened to memory in the region, since the driver was probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) onlined: u64,
    pub(super) offlined: u64,
}

/// What the driver and its notifier share.
#[derive(Debug, Default)]
struct Shared {
    onlined: AtomicU64,
    offlined: AtomicU64,
    /// The driver is being removed: nothing may change under it.
    removing: AtomicBool,
    /// The driver is gone.
    gone: AtomicBool,
}

/// The driver's end.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    id: NotifierId,
}

/// What the notifier needs to know, in pages.
struct Notifier {
    shared: Arc<Shared>,
    mode: Mode,
    region: Range<u64>,
    memory_block: u64,
    unit: u64,
}

impl Watch {
    /// Registers the notifier.
    pub(super) fn new<M: PhysicalMemory>(hotplug: &mut Hotplug<M>, layout: &Layout) -> Self {
        let shared = Arc::new(Shared::default());
        let shift = hotplug.profile().page_shift;
        let start = layout.geometry.addr();
        let notifier = Notifier {
            shared: Arc::clone(&shared),
            mode: layout.mode,
            region: start >> shift..(start + layout.geometry.region_size()) >> shift,
            memory_block: layout.memory_block_size >> shift,
            unit: layout.unit_size >> shift,
        };
        let notifier = move |event: &MemoryEvent| notifier.notify(event);
        Self {
            shared,
            id: hotplug.register_notifier(0, Box::new(notifier)),
        }
    }

    pub(super) fn seen(&self) -> Seen {
        Seen {
            onlined: self.shared.onlined.load(Ordering::Relaxed),
            offlined: self.shared.offlined.load(Ordering::Relaxed),
        }
    }

    /// From now on nothing may go online or offline, until [`unregister`](Self::unregister).
    pub(super) fn set_removing(&self, removing: bool) {
        self.shared.removing.store(removing, Ordering::Relaxed);
    }

    pub(super) fn unregister<M: PhysicalMemory>(&self, hotplug: &mut Hotplug<M>) {
        hotplug.unregister_notifier(self.id);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Relaxed);
    }
}

impl Notifier {
    /// Linux: `virtio_mem_memory_notifier_cb`.
    fn notify(&self, event: &MemoryEvent) -> Result<(), Error> {
        let pages = event.start_pfn..event.start_pfn.saturating_add(event.page_count);
        let touches = pages.start < self.region.end && self.region.start < pages.end;
        if !touches || self.shared.gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        match event.action {
            MemoryAction::GoingOnline | MemoryAction::GoingOffline => {
                if self.shared.removing.load(Ordering::Relaxed) {
                    return Err(Error::Busy);
                }
                if !self.fits(&pages) {
                    return Err(Error::Invalid);
                }
            }
            MemoryAction::Online => {
                self.shared.onlined.fetch_add(1, Ordering::Relaxed);
            }
            MemoryAction::Offline => {
                self.shared.offlined.fetch_add(1, Ordering::Relaxed);
            }
            MemoryAction::CancelOnline | MemoryAction::CancelOffline => {}
        }
        Ok(())
    }

    /// Exactly a memory block in Sub-Block Mode, and inside a big block in Big-Block Mode.
    fn fits(&self, pages: &Range<u64>) -> bool {
        let last = pages.end.saturating_sub(1);
        match self.mode {
            Mode::SubBlock => {
                pages.start.is_multiple_of(self.memory_block)
                    && pages.end - pages.start == self.memory_block
            }
            Mode::BigBlock => pages.start / self.unit == last / self.unit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory blocks of 8 pages, big blocks of 16, in a region of pages 64 to 128.
    fn notifier(mode: Mode) -> Notifier {
        Notifier {
            shared: Arc::new(Shared::default()),
            mode,
            region: 64..128,
            memory_block: 8,
            unit: if mode == Mode::SubBlock { 8 } else { 16 },
        }
    }

    fn event(action: MemoryAction, pages: Range<u64>) -> MemoryEvent {
        MemoryEvent {
            action,
            start_pfn: pages.start,
            page_count: pages.end - pages.start,
            nid: 0,
            early: false,
            node_changes: false,
        }
    }

    fn asked(notifier: &Notifier, pages: Range<u64>) -> [Result<(), Error>; 2] {
        [MemoryAction::GoingOnline, MemoryAction::GoingOffline]
            .map(|action| notifier.notify(&event(action, pages.clone())))
    }

    #[test]
    fn sub_block_mode_wants_exactly_a_memory_block() {
        let notifier = notifier(Mode::SubBlock);
        assert_eq!(asked(&notifier, 72..80), [Ok(()); 2]);
        // One that holds its own metadata, two, a shifted one.
        for pages in [73..80, 72..88, 68..76] {
            assert_eq!(asked(&notifier, pages), [Err(Error::Invalid); 2]);
        }
        assert_eq!(asked(&notifier, 57..62), [Ok(()); 2]);
    }

    #[test]
    fn big_block_mode_wants_ranges_inside_a_big_block() {
        let notifier = notifier(Mode::BigBlock);
        for pages in [72..80, 80..96, 81..83] {
            assert_eq!(asked(&notifier, pages), [Ok(()); 2]);
        }
        assert_eq!(asked(&notifier, 72..88), [Err(Error::Invalid); 2]);
    }

    #[test]
    fn nothing_changes_while_the_driver_is_removed_and_nobody_objects_after_it() {
        let notifier = notifier(Mode::SubBlock);
        notifier.shared.removing.store(true, Ordering::Relaxed);
        assert_eq!(asked(&notifier, 72..80), [Err(Error::Busy); 2]);
        assert_eq!(asked(&notifier, 0..8), [Ok(()); 2]);
        notifier.shared.gone.store(true, Ordering::Relaxed);
        assert_eq!(asked(&notifier, 72..80), [Ok(()); 2]);
    }

    #[test]
    fn what_has_happened_is_counted() {
        let notifier = notifier(Mode::SubBlock);
        for action in [
            MemoryAction::Online,
            MemoryAction::Offline,
            MemoryAction::CancelOnline,
            MemoryAction::CancelOffline,
        ] {
            for pages in [72..80, 0..8] {
                assert_eq!(notifier.notify(&event(action, pages)), Ok(()));
            }
        }
        assert_eq!(notifier.shared.onlined.load(Ordering::Relaxed), 1);
        assert_eq!(notifier.shared.offlined.load(Ordering::Relaxed), 1);
    }
}

//! The notifier chain: who hears of memory going online and offline, and may object. Memory that is added or removed is
//! not announced here, but by uevents.
//!
//! Linux: `memory_notify`, `register_memory_notifier`.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use super::{Error, Hotplug};

/// What happens to a range of memory.
///
/// ```text
///  online   GoingOnline ----> Online           offline  GoingOffline ----> Offline
///               | veto                                      | veto, or a page cannot be moved, or cancelled
///               v                                           v
///          CancelOnline                                CancelOffline
///
///  GoingOnline, GoingOffline   asked   priority 10 --> 5 --> 5 --> 0     the first error ends it
///  all others                  told    priority 10 --> 5 --> 5 --> 0     what they return is ignored
/// ```
///
/// From the highest priority to the lowest, those of one priority in the order they were registered. When the first has
/// objected, everybody hears of the cancellation, *also those behind it that never heard of the beginning*. A memory
/// block that cannot go to that zone, or cannot even be isolated, is not announced at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryAction {
    /// It will go online, unless somebody objects.
    GoingOnline,
    /// It does not go online after all.
    CancelOnline,
    /// It is online.
    Online,
    /// It will go offline, unless somebody objects or a page in it stays in use.
    GoingOffline,
    /// It stays online after all.
    CancelOffline,
    /// It is offline.
    Offline,
}

/// What a notifier is told (Linux: `struct memory_notify`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEvent {
    /// What happens.
    pub action: MemoryAction,
    /// The first page frame; metadata that the memory block holds itself is not part of the range.
    pub start_pfn: u64,
    /// Number of pages.
    pub page_count: u64,
    /// The node.
    pub nid: u32,
    /// Whether the node gets its first memory by this, or loses its last (Linux: `status_change_nid`).
    pub node_changes: bool,
    /// Whether part of it was there at boot.
    pub early: bool,
}

/// Hears of memory going online and offline.
pub trait MemoryNotifier: Send {
    /// Called for each event.
    ///
    /// # Errors
    ///
    /// Any, to object to `GoingOnline` or `GoingOffline`: it becomes the result of the operation.
    fn notify(&mut self, event: &MemoryEvent) -> Result<(), Error>;
}

impl<F: FnMut(&MemoryEvent) -> Result<(), Error> + Send> MemoryNotifier for F {
    fn notify(&mut self, event: &MemoryEvent) -> Result<(), Error> {
        self(event)
    }
}

/// Names a registered notifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotifierId(u64);

struct Entry {
    id: NotifierId,
    priority: i32,
    notifier: Box<dyn MemoryNotifier>,
}

/// The chain, highest priority first.
#[derive(Default)]
pub(super) struct Notifiers {
    chain: Vec<Entry>,
    next_id: u64,
}

impl fmt::Debug for Notifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.chain.iter().map(|entry| (entry.id, entry.priority)))
            .finish()
    }
}

impl Notifiers {
    /// Asks everybody; the first error is the answer, and whoever follows is not asked.
    pub(super) fn ask(&mut self, event: &MemoryEvent) -> Result<(), Error> {
        self.chain
            .iter_mut()
            .try_for_each(|entry| entry.notifier.notify(event))
    }

    /// Tells everybody, whatever they say.
    pub(super) fn tell(&mut self, event: &MemoryEvent) {
        for entry in &mut self.chain {
            let _ignored_as_linux_does = entry.notifier.notify(event);
        }
    }
}

impl<M> Hotplug<M> {
    /// Adds a notifier to the chain.
    pub fn register_notifier(
        &mut self,
        priority: i32,
        notifier: Box<dyn MemoryNotifier>,
    ) -> NotifierId {
        let Notifiers { chain, next_id } = &mut self.notifiers;
        let id = NotifierId(*next_id);
        *next_id += 1;
        let position = chain.partition_point(|entry| entry.priority >= priority);
        let entry = Entry {
            id,
            priority,
            notifier,
        };
        chain.insert(position, entry);
        id
    }

    /// Takes a notifier out of the chain and returns it.
    pub fn unregister_notifier(&mut self, id: NotifierId) -> Option<Box<dyn MemoryNotifier>> {
        let chain = &mut self.notifiers.chain;
        let position = chain.iter().position(|entry| entry.id == id)?;
        Some(chain.remove(position).notifier)
    }
}

/// Keeps memory that was there at boot from going offline: where the firmware's memory map cannot be changed, the
/// next kernel would believe in memory that is gone (Linux on arm64: `prevent_bootmem_remove_notifier`).
pub(super) fn prevent_boot_memory_removal(event: &MemoryEvent) -> Result<(), Error> {
    match event.action {
        MemoryAction::GoingOffline if event.early => Err(Error::NotPermitted),
        _ => Ok(()),
    }
}

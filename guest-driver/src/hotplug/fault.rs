//! Fault injection: any fallible step can be made to fail.

use alloc::vec::Vec;

use super::{Error, Hotplug};

/// A step of an operation that can fail, in the order in which adding, onlining, offlining and removing reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Claiming the resource (Linux: `register_memory_resource`).
    Resource,
    /// Bringing the structures of a node up (Linux: `__try_online_node`).
    Node,
    /// Mapping the memory (Linux: `arch_add_memory`, before its sections).
    Mapping,
    /// The metadata of a section, once for each (Linux: `section_activate`).
    Memmap,
    /// Registering a memory block, once for each (Linux: `create_memory_block_devices`).
    MemoryBlock,
    /// Preparing to go online (Linux: `MEM_PREPARE_ONLINE` and what `online_pages` checks).
    PrepareOnline,
    /// Isolating the pageblocks of a range (Linux: `start_isolate_page_range`).
    Isolate,
    /// Moving a page, once for each (Linux: `migrate_pages`). What has moved stays where it is.
    Migrate,
    /// Finding the range empty in the end (Linux: `test_pages_isolated`).
    Commit,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Resource,
        Self::Node,
        Self::Mapping,
        Self::Memmap,
        Self::MemoryBlock,
        Self::PrepareOnline,
        Self::Isolate,
        Self::Migrate,
        Self::Commit,
    ];
}

/// A failure to come, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What fails.
    pub step: Step,
    /// How many times it succeeds before that.
    pub skip: u32,
    /// How it fails.
    pub error: Error,
}

/// The failures to come.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// Fails if a fault was injected into this step.
    pub(super) fn reach(&mut self, step: Step) -> Result<(), Error> {
        let Some(index) = self.0.iter().position(|fault| fault.step == step) else {
            return Ok(());
        };
        match self.0[index].skip.checked_sub(1) {
            Some(left) => {
                self.0[index].skip = left;
                Ok(())
            }
            None => Err(self.0.remove(index).error),
        }
    }
}

impl<M> Hotplug<M> {
    /// Makes a step fail when it is reached next, or later; for tests and for replaying what happened elsewhere.
    /// Several faults of one step come one after the other.
    pub fn inject(&mut self, fault: Fault) {
        self.faults.0.push(fault);
    }

    /// Takes back the faults that have not come; returns how many.
    pub fn clear_faults(&mut self) -> usize {
        core::mem::take(&mut self.faults.0).len()
    }
}

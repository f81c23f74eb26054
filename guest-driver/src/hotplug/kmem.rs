//! Memory of a device as System RAM: persistent memory, and what firmware set aside as special purpose, such as CXL. It
//! is not moved, copied or brought online here: once it is added it is memory like any other.
//!
//! Linux: `dax/kmem`.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use super::add_remove::{AddMemory, Target};
use super::group::GroupId;
use super::resource::{Owner, ResourceFlags, copy};
use super::{Error, Hotplug, PhysicalMemory, Profile};

/// The name of such memory in the resources.
const RESOURCE_NAME: &str = "System RAM (kmem)";

/// A device whose memory is to become System RAM.
///
/// ```text
///  memory blocks   |          |          |          |          |
///  device               |================================|             ranges, at any alignment
///  added                      |##########|##########|                  whole memory blocks; the rest is lost
///
///  10c000000-13bffffff : Soft Reserved
///    110000000-137ffffff : dax0.0                   one for each range that was added
///      110000000-137ffffff : System RAM (kmem)      driver managed: the next kernel must ask the driver again
/// ```
///
/// What is lost depends on the memory block size alone; [`Kmem::lost_bytes`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KmemDevice<'a> {
    /// Its name, `dax0.0`.
    pub name: &'a str,
    /// Its bytes, at any alignment.
    pub ranges: &'a [Range<u64>],
    /// The node the memory is on; better one of its own, as the memory may be slower than others.
    pub nid: u32,
    /// The driver instance, who alone may remove the memory again.
    pub owner: Owner,
    /// Its metadata may live in itself, see [`AddMemory::memmap_on_memory`].
    pub memmap_on_memory: bool,
}

/// The memory of a device that is System RAM now; it has to be given back with [`Hotplug::remove_kmem`].
#[derive(Debug, PartialEq, Eq)]
pub struct Kmem {
    name: String,
    owner: Owner,
    group: GroupId,
    ranges: Vec<Range<u64>>,
    refused: Vec<(Range<u64>, Error)>,
    lost_bytes: u64,
}

impl Kmem {
    /// What was added, and is not removed yet.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// What could not be added, and why, after other memory of the device had been.
    #[must_use]
    pub fn refused(&self) -> &[(Range<u64>, Error)] {
        &self.refused
    }

    /// The bytes of the device that are in no whole memory block, and so never become System RAM.
    #[must_use]
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }

    /// The static group of all its memory.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// Adds the memory of a device, trimmed to whole memory blocks, as one static group (Linux:
    /// `dev_dax_kmem_probe`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the node is not possible, no range has a whole memory block in it, or there is more than
    /// can be counted. [`Error::Busy`] if somebody has the first range, and those of [`add_memory`](Self::add_memory):
    /// nothing has changed then. Once a range has been added, others that cannot be are [left out](Kmem::refused).
    pub fn add_kmem(&mut self, device: &KmemDevice<'_>) -> Result<Kmem, Error> {
        let profile = self.config.profile;
        let sum = |counted: fn(&Profile, &Range<u64>) -> u64| {
            let mut sizes = device.ranges.iter().map(|range| counted(&profile, range));
            let sum = sizes.try_fold(0, u64::checked_add);
            sum.ok_or(Error::Invalid)
        };
        let all = sum(|_, range| range_size(range))?;
        let total = sum(|profile, range| range_size(&profile.whole_memory_blocks(range.clone())))?;
        self.possible(device.nid)?;
        if total == 0 {
            return Err(Error::Invalid);
        }
        let mut kmem = Kmem {
            name: copy(device.name)?,
            owner: device.owner,
            group: self.register_static_group(device.nid, total >> profile.page_shift)?,
            ranges: Vec::new(),
            refused: Vec::new(),
            lost_bytes: all - total,
        };
        let done = self.add_kmem_ranges(device, &mut kmem);
        if let Err(error) = done {
            let undone = self.unregister_group(kmem.group);
            debug_assert!(undone.is_ok(), "nothing was added to it");
            return Err(error);
        }
        if kmem.lost_bytes > 0 {
            let lost = kmem.lost_bytes;
            log::warn!("{}: {lost} bytes are lost to alignment", device.name);
        }
        Ok(kmem)
    }

    /// Fails only while nothing has been added.
    fn add_kmem_ranges(&mut self, device: &KmemDevice<'_>, kmem: &mut Kmem) -> Result<(), Error> {
        let no_memory = |_| Error::NoMemory;
        let count = device.ranges.len();
        kmem.ranges.try_reserve_exact(count).map_err(no_memory)?;
        kmem.refused.try_reserve_exact(count).map_err(no_memory)?;
        for range in device.ranges {
            let range = self.config.profile.whole_memory_blocks(range.clone());
            if range.is_empty() {
                continue;
            }
            match self.add_kmem_range(device, kmem.group, &range) {
                Ok(()) => kmem.ranges.push(range),
                Err(error) if kmem.ranges.is_empty() => return Err(error),
                Err(error) => kmem.refused.push((range, error)),
            }
        }
        Ok(())
    }

    fn add_kmem_range(
        &mut self,
        device: &KmemDevice<'_>,
        group: GroupId,
        range: &Range<u64>,
    ) -> Result<(), Error> {
        let flags = ResourceFlags::RAM_REGION;
        self.claim_resource(range.clone(), device.name, flags)?;
        let added = self.add_memory(&AddMemory {
            target: Target::Group(group),
            owner: device.owner,
            resource_name: RESOURCE_NAME,
            memmap_on_memory: device.memmap_on_memory,
            ..AddMemory::new(range.start, range.end - range.start)
        });
        if added.is_err() {
            let released = self.release_resource(range.clone(), device.name);
            debug_assert!(released.is_ok(), "it has just been claimed");
        }
        added
    }

    /// Removes the memory of a device, as far as all memory blocks of a range are offline (Linux:
    /// `dev_dax_kmem_remove`, which has but one try).
    ///
    /// # Errors
    ///
    /// The first of those of [`remove_memory`](Self::remove_memory). What could be removed is gone nevertheless;
    /// `kmem` has the rest.
    pub fn remove_kmem(&mut self, kmem: &mut Kmem) -> Result<(), Error> {
        let mut first_error = None;
        let name = &kmem.name;
        kmem.ranges.retain(|range| {
            let size = range.end - range.start;
            match self.remove_memory(kmem.owner, range.start, size) {
                Ok(()) => {
                    let released = self.release_resource(range.clone(), name);
                    debug_assert!(released.is_ok(), "it was claimed with the range");
                    false
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                    true
                }
            }
        });
        match first_error {
            Some(error) => Err(error),
            None => self.unregister_group(kmem.group),
        }
    }
}

fn range_size(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

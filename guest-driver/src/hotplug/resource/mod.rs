//! I/O memory resources: which byte ranges are System RAM, what else is there, and who owns it. Whether memory is
//! online is not known here.
//!
//! All memory this needs is reserved before anything changes: an operation that fails for lack of it, or for any other
//! reason, has done nothing.
//!
//! Linux: `kernel/resource.c`, `register_memory_resource`, `firmware_map_add_hotplug`.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

mod entry;
mod owner;
mod range_map;
mod views;

pub use entry::{Resource, ResourceFlags};
pub use owner::Owner;
pub use views::Intersection;

use super::Error;
use range_map::RangeMap;

/// Name of memory that is System RAM without further conditions.
const SYSTEM_RAM: &str = "System RAM";

/// What becomes of boot memory in the firmware's memory map when it is removed.
///
/// ```text
///                      at boot        upper half removed     the next kernel finds
///  FollowsHotplug      |########|     |####|                 |####|
///  Fixed               |########|     |########|             |########|     but half of it is gone
///                                          ^^^^ stale_firmware_ranges
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirmwareMap {
    /// It leaves the map, as on x86, where firmware knows what is plugged.
    #[default]
    FollowsHotplug,
    /// It stays in the map, as on arm64: the next kernel would use memory that is gone.
    Fixed,
}

/// All I/O memory resources. [`Display`](core::fmt::Display) is the text of `/proc/iomem`.
///
/// A resource is a named range; those below it lie within it:
///
/// ```text
/// 00100000-3fffffff : System RAM                   boot memory: busy, nothing goes below it
/// 100000000-1ffffffff : virtio0                    device region: for RAM, not busy
///   100000000-10fffffff : System RAM (virtio_mem)
///   110000000-117ffffff : System RAM (virtio_mem)
/// 240000000-33fffffff : Soft Reserved              not RAM until a driver makes it so
///
///            |<-------- 100000000-10fffffff -------->|<- 110000000-117ffffff ->|
/// merge_ram  |<--------------------- 100000000-117ffffff --------------------->|
/// remove_ram |<- 100000000-107ffffff ->|             |<- 110000000-117ffffff ->|
/// ```
///
/// The last line is what removing 108000000-10fffffff leaves.
///
/// Memory is added below the innermost resource that is not busy and contains it. Ownership and the firmware's memory
/// map are kept beside the resources: adopting a part of boot memory changes neither the list nor the map.
#[derive(Debug)]
pub struct ResourceTree {
    /// Parent before children, siblings ascending: so the starts ascend, too.
    resources: Vec<Resource>,
    /// Who owns each byte of System RAM.
    owners: RangeMap<Owner>,
    firmware: FirmwareMap,
    /// What firmware said at boot, if that cannot be changed. Otherwise it is the plain System RAM.
    fixed_map: RangeMap<()>,
}

impl ResourceTree {
    /// No resources yet.
    #[must_use]
    pub const fn new(firmware: FirmwareMap) -> Self {
        Self {
            resources: Vec::new(),
            owners: RangeMap::new(),
            firmware,
            fixed_map: RangeMap::new(),
        }
    }

    /// Enters System RAM that firmware described at boot; it belongs to [`Owner::BOOT`].
    ///
    /// Special purpose memory is not that: it is [claimed](Self::claim) as [`ResourceFlags::RESERVED`], unless
    /// the kernel was told to take it for System RAM.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty, [`Error::Exists`] if it overlaps another resource that is busy
    /// or does not contain it, [`Error::NoMemory`] if the heap is exhausted.
    pub fn add_boot_ram(&mut self, range: Range<u64>) -> Result<(), Error> {
        if self.firmware == FirmwareMap::Fixed {
            self.fixed_map.reserve(1)?;
        }
        self.add_ram(range.clone(), SYSTEM_RAM, Owner::BOOT)?;
        if self.firmware == FirmwareMap::Fixed {
            self.fixed_map.set(range, Some(()));
        }
        Ok(())
    }

    /// Enters System RAM that is being added (Linux: `register_memory_resource`).
    ///
    /// With a name other than `System RAM` it is driver managed. Whether the range can be addressed is for the
    /// caller to check.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty, or the name neither `System RAM` nor `System RAM (…)`;
    /// [`Error::Exists`] if the range overlaps another resource that is busy or does not contain it;
    /// [`Error::NoMemory`] if the heap is exhausted.
    pub fn add_ram(&mut self, range: Range<u64>, name: &str, owner: Owner) -> Result<(), Error> {
        let driver_managed = is_driver_managed(name)?;
        let flags = ResourceFlags {
            driver_managed,
            system_ram: true,
            ..ResourceFlags::DEVICE
        };
        // One to add, and one so that removing it at once needs none.
        self.owners.reserve(2)?;
        self.request(range.clone(), name, flags)
            .map_err(|error| match error {
                Error::Busy => Error::Exists,
                other => other,
            })?;
        self.owners.set(range, Some(owner));
        Ok(())
    }

    /// Allows the System RAM that was added as `range` to be merged, and merges it with exact neighbours that
    /// allow it, too, and have the same name, flags, parent and owner (Linux: `MHP_MERGE_RESOURCE`).
    ///
    /// Apart from [`add_ram`](Self::add_ram) because it comes last in adding: until then removing the range is
    /// an exact undo that needs no memory.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless exactly this range is a resource of System RAM.
    pub fn merge_ram(&mut self, range: Range<u64>) -> Result<(), Error> {
        let is_wanted = |r: &Resource| r.is_ram() && r.range == range;
        let index = self.resources.iter().position(is_wanted);
        let index = index.ok_or(Error::Invalid)?;
        self.resources[index].flags.mergeable = true;
        self.merge_with_next(index);
        if let Some(previous) = index.checked_sub(1) {
            self.merge_with_next(previous);
        }
        Ok(())
    }

    /// Takes System RAM out, cutting the resources it lies in to size or in two (Linux:
    /// `release_mem_region_adjustable`, which knows one resource only and leaves several as they are).
    ///
    /// Whether the caller may do that is a question for [`owns`](Self::owns).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty or not System RAM throughout; [`Error::NoMemory`] if the heap is
    /// exhausted, which does not happen while undoing an [`add_ram`](Self::add_ram) that came last.
    pub fn remove_ram(&mut self, range: Range<u64>) -> Result<(), Error> {
        check(&range)?;
        if self.has_gaps(range.clone(), Resource::is_ram) {
            return Err(Error::Invalid);
        }
        self.owners.reserve(1)?;
        let is_cut_in_two =
            |r: &Resource| r.is_ram() && r.range.start < range.start && range.end < r.range.end;
        if let Some(index) = self.resources.iter().position(is_cut_in_two) {
            let resource = &self.resources[index];
            let upper = Resource {
                range: range.end..resource.range.end,
                name: copy(&resource.name)?,
                ..*resource
            };
            self.insert(index + 1, upper)?;
            self.resources[index].range.end = range.start;
        } else {
            self.resources.retain_mut(|r| {
                if r.is_ram() && r.range.start < range.end && range.start < r.range.end {
                    if r.range.start < range.start {
                        r.range.end = range.start;
                    } else {
                        r.range.start = range.end.min(r.range.end);
                    }
                }
                !r.range.is_empty()
            });
        }
        self.owners.set(range, None);
        Ok(())
    }

    /// Claims a range that is not System RAM, or not yet (Linux: `request_mem_region`).
    ///
    /// It goes below the innermost resource that is not busy and contains it, even one of the same range.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty, or what is claimed is RAM in use, which has to be
    /// [added](Self::add_ram); [`Error::Busy`] if the range overlaps another resource that is busy or does not
    /// contain it; [`Error::NoMemory`] if the heap is exhausted.
    pub fn claim(
        &mut self,
        range: Range<u64>,
        name: &str,
        flags: ResourceFlags,
    ) -> Result<(), Error> {
        match flags.busy && flags.system_ram {
            true => Err(Error::Invalid),
            false => self.request(range, name, flags),
        }
    }

    /// Gives up the innermost resource of exactly this range and name that was [claimed](Self::claim) (Linux:
    /// `release_resource`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is none, [`Error::Busy`] if there are resources below it.
    pub fn release(&mut self, range: Range<u64>, name: &str) -> Result<(), Error> {
        let is_wanted = |r: &Resource| !r.is_ram() && r.range == range && r.name == name;
        let index = self.resources.iter().rposition(is_wanted);
        let index = index.ok_or(Error::Invalid)?;
        let depth = self.resources[index].depth;
        let next = self.resources.get(index + 1);
        if next.is_some_and(|next| next.depth > depth) {
            return Err(Error::Busy);
        }
        self.resources.remove(index);
        Ok(())
    }

    /// Makes `owner` the owner of boot memory that lies on one of its devices (Linux: ACPI taking a DIMM
    /// that was there at boot for its own).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty or not System RAM throughout, [`Error::NotPermitted`] if part
    /// of it is not [`Owner::BOOT`]'s, [`Error::NoMemory`] if the heap is exhausted.
    pub fn adopt(&mut self, owner: Owner, range: Range<u64>) -> Result<(), Error> {
        self.owns(Owner::BOOT, range.clone())?;
        self.owners.reserve(2)?;
        self.owners.set(range, Some(owner));
        Ok(())
    }

    /// Enters a resource below the innermost one that is not busy and contains it (Linux: `__request_region`).
    fn request(
        &mut self,
        range: Range<u64>,
        name: &str,
        flags: ResourceFlags,
    ) -> Result<(), Error> {
        check(&range)?;
        let mut depth = 0;
        for other in self.overlapping(range.clone()) {
            if other.flags.busy || !other.contains(&range) {
                return Err(Error::Busy);
            }
            depth = other.depth + 1;
        }
        let index = self
            .resources
            .partition_point(|r| r.range.start < range.end);
        let name = copy(name)?;
        let new = Resource {
            range,
            name,
            flags,
            depth,
        };
        self.insert(index, new)
    }

    fn insert(&mut self, index: usize, resource: Resource) -> Result<(), Error> {
        self.resources.try_reserve(1).map_err(|_| Error::NoMemory)?;
        self.resources.insert(index, resource);
        Ok(())
    }

    /// Merges the resource at `index` with the one after it, if they are mergeable.
    fn merge_with_next(&mut self, index: usize) {
        let [resource, next, ..] = &self.resources[index..] else {
            return;
        };
        let border = resource.range.end;
        if resource.flags.mergeable
            && resource.continues_in(next)
            && self.owner(border - 1) == self.owner(border)
        {
            let next = self.resources.remove(index + 1);
            self.resources[index].range.end = next.range.end;
        }
    }
}

/// Whether memory of this name is driver managed.
///
/// # Errors
///
/// [`Error::Invalid`] unless the name is `System RAM` or `System RAM (…)`.
pub(super) fn is_driver_managed(name: &str) -> Result<bool, Error> {
    let by_a_driver = name.starts_with("System RAM (") && name.ends_with(')');
    match name == SYSTEM_RAM || by_a_driver {
        true => Ok(by_a_driver),
        false => Err(Error::Invalid),
    }
}

fn check(range: &Range<u64>) -> Result<(), Error> {
    match range.is_empty() {
        true => Err(Error::Invalid),
        false => Ok(()),
    }
}

/// A copy of `name`, or an error where `to_owned` would abort.
pub(super) fn copy(name: &str) -> Result<String, Error> {
    let mut copy = String::new();
    copy.try_reserve_exact(name.len())
        .map_err(|_| Error::NoMemory)?;
    copy.push_str(name);
    Ok(copy)
}

#[cfg(test)]
mod tests;

//! Device memory: page frames that are no RAM, at sub-section granularity. Nothing of it is a memory block, and nothing
//! of it comes online.
//!
//! Linux: `ZONE_DEVICE`, `memremap_pages`.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use super::memmap::memmap_pages;
use super::resource::{Intersection, ResourceFlags};
use super::section::{SubSections, sub_sections_by_section};
use super::{Error, Hotplug, PageHandle, PhysicalMemory, Step};

/// What device memory is for (Linux: `enum memory_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Persistent memory with a file system on it (Linux: `MEMORY_DEVICE_FS_DAX`).
    FsDax,
    /// Persistent memory as a character device (Linux: `MEMORY_DEVICE_GENERIC`).
    DevDax,
    /// Memory on another device's bus, for transfers between devices (Linux: `MEMORY_DEVICE_PCI_P2PDMA`).
    PeerToPeer,
    /// Memory only a device can reach: it has metadata, and no mapping (Linux: `MEMORY_DEVICE_PRIVATE`).
    Private,
}

/// A range of device memory.
///
/// ```text
///  one section of 128 MiB, early because of the RAM in it
///  |RRRRRRRRRRRR|........|AAAA|BBBBBBBBBBBB|....|CCCC|
///   System RAM    hole    ranges A, B, C: any 2 MiB boundaries, in any order, each removed alone
///
///  bytes.start                                          bytes.end
///  |<-- altmap -->|<------------- usable -------------->|
/// ```
///
/// RAM cannot be added at this granularity. What shares a section with boot memory uses the metadata the section has;
/// the rest has metadata of its own, in kernel memory or, where that would be too much, at the start of the range
/// itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRange {
    /// Its bytes, whole sub-sections.
    pub bytes: Range<u64>,
    /// The node whose kernel memory its metadata is charged to.
    pub nid: u32,
    /// What it is for.
    pub kind: DeviceKind,
    /// Bytes at its start, whole pages, set aside for its own metadata, so that kernel memory is not charged (Linux:
    /// `vmem_altmap`); with 0 it is.
    pub altmap: u64,
}

impl DeviceRange {
    /// A range of node 0 whose metadata is in kernel memory.
    #[must_use]
    pub const fn new(bytes: Range<u64>, kind: DeviceKind) -> Self {
        Self {
            bytes,
            nid: 0,
            kind,
            altmap: 0,
        }
    }

    /// The bytes that are left for its user.
    #[must_use]
    pub const fn usable(&self) -> Range<u64> {
        self.bytes.start.saturating_add(self.altmap)..self.bytes.end
    }

    /// Whether the kernel maps it.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.kind != DeviceKind::Private
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) range: DeviceRange,
    pub(super) name: Box<str>,
    charged: Vec<PageHandle>,
}

/// All device memory, by first byte.
#[derive(Debug, Default)]
pub(super) struct DeviceRanges(BTreeMap<u64, Entry>);

impl DeviceRanges {
    /// All of them, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.0.values()
    }

    /// Whether one of them has this resource.
    pub(super) fn have_claimed(&self, bytes: &Range<u64>, name: &str) -> bool {
        let entry = self.0.get(&bytes.start);
        entry.is_some_and(|entry| entry.range.bytes == *bytes && &*entry.name == name)
    }

    fn at(&self, address: u64) -> Option<&Entry> {
        let (_, entry) = self.0.range(..=address).next_back()?;
        entry.range.bytes.contains(&address).then_some(entry)
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// Gives a range of device memory metadata (Linux: `memremap_pages`).
    ///
    /// # Errors
    ///
    /// In Linux's order: [`Error::NoMemory`] if the first or the last page is device memory already,
    /// [`Error::NoAddress`] if any part is System RAM, [`Error::Invalid`] if the range is empty, cannot be addressed,
    /// or is not made of whole sub-sections, or the bytes set aside are not whole pages of it, or nobody could reach
    /// them; [`Error::Exists`] if a sub-section in between is taken, [`Error::Busy`] if the resource is,
    /// [`Error::NoMemory`] if the metadata fits neither into the heap nor to where it is to be. Nothing has changed
    /// then.
    pub fn add_device_memory(&mut self, range: DeviceRange, name: &str) -> Result<(), Error> {
        let bytes = range.bytes.clone();
        let size = bytes.end.checked_sub(bytes.start).ok_or(Error::Invalid)?;
        if size == 0 {
            return Err(Error::Invalid);
        }
        let taken = |address| self.device_ranges.at(address).is_some();
        if taken(bytes.start) || taken(bytes.end - 1) {
            return Err(Error::NoMemory);
        }
        if self.resources.intersects(bytes.clone()) != Intersection::Disjoint {
            return Err(Error::NoAddress);
        }
        let too_big_is_invalid_here = |_| Error::Invalid;
        self.addressable(bytes.start, size)
            .map_err(too_big_is_invalid_here)?;
        self.units(bytes.start, size, self.config.profile.sub_section_shift)?;
        self.possible(range.nid)?;
        let whole_pages = range.altmap.is_multiple_of(self.config.profile.page_size());
        let reachable = range.altmap == 0 || range.is_mapped();
        if range.altmap > size || !whole_pages || !reachable {
            return Err(Error::Invalid);
        }
        if range.is_mapped() {
            self.faults.reach(Step::Mapping)?;
        }
        self.check_inactive(&bytes)?;
        self.faults.reach(Step::Resource)?;
        self.resources
            .claim(bytes.clone(), name, ResourceFlags::DEVICE)?;
        match self.charge_device_range(&range) {
            Ok(charged) => {
                self.activate(&bytes);
                let name = name.into();
                let entry = Entry {
                    range,
                    name,
                    charged,
                };
                self.device_ranges.0.insert(bytes.start, entry);
                Ok(())
            }
            Err(error) => {
                let undone = self.resources.release(bytes, name);
                debug_assert!(undone.is_ok(), "it has just been claimed");
                Err(error)
            }
        }
    }

    /// Takes the metadata of a range of device memory back (Linux: `memunmap_pages`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless exactly this range was added.
    pub fn remove_device_memory(&mut self, bytes: Range<u64>) -> Result<(), Error> {
        let known = self.device_ranges.0.get(&bytes.start);
        if known.is_none_or(|entry| entry.range.bytes != bytes) {
            return Err(Error::Invalid);
        }
        let Some(entry) = self.device_ranges.0.remove(&bytes.start) else {
            return Err(Error::Invalid);
        };
        let released = self.resources.release(bytes.clone(), &entry.name);
        debug_assert!(released.is_ok(), "it was claimed with the range");
        for (number, range) in sub_sections_by_section(&self.config.profile, bytes) {
            if let Some(section) = self.sections.get_mut(&number) {
                let cleared = section.deactivate(range);
                debug_assert!(cleared.is_ok(), "they were active");
                if section.active.is_empty() {
                    self.sections.remove(&number);
                }
            }
        }
        self.refund_pages(entry.charged);
        Ok(())
    }

    /// The sub-sections of a range must not have memory (Linux: `section_activate` and `-EEXIST`).
    fn check_inactive(&mut self, bytes: &Range<u64>) -> Result<(), Error> {
        let sections = sub_sections_by_section(&self.config.profile, bytes.clone());
        for (number, range) in sections {
            self.faults.reach(Step::Memmap)?;
            if let Some(section) = self.sections.get(&number) {
                section.check_inactive(range)?;
            }
        }
        Ok(())
    }

    /// Nothing in here is refused; new sections get nodes from the heap.
    fn activate(&mut self, bytes: &Range<u64>) {
        let profile = &self.config.profile;
        let whole = SubSections::of(0..profile.sub_sections_per_section());
        for (number, range) in sub_sections_by_section(profile, bytes.clone()) {
            let section = self.sections.entry(number).or_default();
            section.active = section.active.union(range);
            // Nothing else can ever share a section it fills.
            section.device_taint |= range != whole;
        }
    }

    /// Charges the metadata of what lies in sections that have none of their own; what the range holds itself only has
    /// to fit.
    fn charge_device_range(&mut self, range: &DeviceRange) -> Result<Vec<PageHandle>, Error> {
        let profile = self.config.profile;
        let sections = sub_sections_by_section(&profile, range.bytes.clone());
        let without_metadata = sections.filter(|(number, _)| {
            let section = self.sections.get(number);
            section.is_none_or(|section| section.memmap.is_none())
        });
        let sub_sections: u64 = without_metadata
            .map(|(_, range)| u64::from(range.count()))
            .sum();
        let size = sub_sections << profile.sub_section_shift;
        if range.altmap == 0 {
            return self.charge_metadata(range.nid, size);
        }
        let needed = memmap_pages(&profile, self.config.self_hosted_page_size(), size);
        match needed <= range.altmap >> profile.page_shift {
            true => Ok(Vec::new()),
            false => Err(Error::NoMemory),
        }
    }
}

impl<M> Hotplug<M> {
    /// All device memory, by address.
    pub fn device_memory(&self) -> impl Iterator<Item = &DeviceRange> {
        self.device_ranges.0.values().map(|entry| &entry.range)
    }

    /// Whether an address is device memory (Linux: `get_dev_pagemap`).
    pub fn is_device_memory(&self, address: u64) -> bool {
        self.device_ranges.at(address).is_some()
    }
}

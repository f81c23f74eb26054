//! Sections and their sub-sections: which page frames have metadata, and which are online. What a page is used for is
//! not known here.
//!
//! Linux: `struct mem_section`, `section_activate`, `pfn_valid`, `pfn_to_online_page`.

use alloc::vec::Vec;
use core::ops::Range;

use super::page::Memmap;
use super::{Error, Hotplug, PageHandle, Profile};

/// A set of sub-sections of one section: one bit for each, 256 at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubSections([u64; 4]);

impl SubSections {
    pub(super) fn of(range: Range<u32>) -> Self {
        let mut bits = Self::default();
        for index in range {
            bits.0[(index / 64) as usize] |= 1 << (index % 64);
        }
        bits
    }

    /// Whether the sub-section with this number, counted from the start of its section, is one of them.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        let word = self.0.get((index / 64) as usize);
        word.is_some_and(|word| word & (1 << (index % 64)) != 0)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub(super) fn union(self, other: Self) -> Self {
        let mut union = self;
        union.insert(other);
        union
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    pub(super) fn intersects(&self, other: Self) -> bool {
        self.0.iter().zip(other.0).any(|(a, b)| a & b != 0)
    }

    pub(super) fn contains_all(&self, other: Self) -> bool {
        self.0.iter().zip(other.0).all(|(a, b)| a & b == b)
    }

    fn insert(&mut self, other: Self) {
        for (word, bits) in self.0.iter_mut().zip(other.0) {
            *word |= bits;
        }
    }

    fn remove(&mut self, other: Self) {
        for (word, bits) in self.0.iter_mut().zip(other.0) {
            *word &= !bits;
        }
    }
}

/// A section that is present; one that is not has no `Section`.
#[derive(Debug, Default)]
pub(super) struct Section {
    /// Its memory block is online (Linux: `SECTION_IS_ONLINE`).
    pub(super) online: bool,
    /// It was there at boot (Linux: `SECTION_IS_EARLY`).
    pub(super) early: bool,
    /// Has been shared with device memory, so that being online says nothing about a single page of it (Linux:
    /// `SECTION_TAINT_ZONE_DEVICE`).
    pub(super) device_taint: bool,
    /// The sub-sections that have memory.
    pub(super) active: SubSections,
    /// Metadata of System RAM; `None` if all of it is device memory.
    pub(super) memmap: Option<Memmap>,
    /// The pages charged for the metadata, see [`Config::struct_page_size`](super::Config::struct_page_size).
    pub(super) charged: Vec<PageHandle>,
}

impl Section {
    /// Marks sub-sections as having memory (Linux: `fill_subsection_map`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there are none, [`Error::Exists`] if one has memory already.
    pub(super) fn activate(&mut self, range: SubSections) -> Result<(), Error> {
        self.check_inactive(range)?;
        self.active.insert(range);
        Ok(())
    }

    /// Whether [`activate`](Self::activate) would work, and how it would not.
    pub(super) fn check_inactive(&self, range: SubSections) -> Result<(), Error> {
        if range.is_empty() {
            return Err(Error::Invalid);
        }
        match self.active.intersects(range) {
            true => Err(Error::Exists),
            false => Ok(()),
        }
    }

    /// The reverse (Linux: `clear_subsection_map`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless all of them have memory.
    pub(super) fn deactivate(&mut self, range: SubSections) -> Result<(), Error> {
        if range.is_empty() || !self.active.contains_all(range) {
            return Err(Error::Invalid);
        }
        self.active.remove(range);
        Ok(())
    }
}

/// What a section looks like from outside.
///
/// ```text
///              a section: one bit of `active` for each sub-section
///  early       |RRRRRRRRRRRRRRRRRR|.........|DDDDD|....|     there at boot: metadata for all of it, holes too
///               111111111111111111 000000000 11111 0000
///  hot         |RRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRR|     added later, always whole
///               111111111111111111111111111111111111111
///  device      |....|DDDDDDDDD|.............|DDDDD|....|     metadata where a bit is set; never online
///               0000 111111111 0000000000000 11111 0000      R System RAM  D device memory  . nothing
/// ```
///
/// | question | answer | Linux |
/// |---|---|---|
/// | has a page metadata? | the section has, and it is early or the sub-section's bit is set | `pfn_valid` |
/// | is it RAM to look at? | the section is online, the bit is set, it is not device memory | `pfn_to_online_page` |
///
/// Metadata of an early section stays when device memory beside the RAM comes and goes. Nobody can set or clear
/// `early`: a section that is removed and added again is not early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionInfo {
    /// Address / section size.
    pub number: u64,
    /// Its memory block is online.
    pub online: bool,
    /// It was there at boot.
    pub early: bool,
    /// Part of it is, or was, device memory. As in Linux that stays until the section goes: it is only a hint that
    /// [`pfn_is_online`](Hotplug::pfn_is_online) has to look twice.
    pub device_taint: bool,
    /// The sub-sections that have memory.
    pub active: SubSections,
}

impl<M> Hotplug<M> {
    /// The sections that are present, ascending.
    pub fn sections(&self) -> impl Iterator<Item = SectionInfo> + '_ {
        self.sections.iter().map(|(number, section)| SectionInfo {
            number: *number,
            online: section.online,
            early: section.early,
            device_taint: section.device_taint,
            active: section.active,
        })
    }

    /// Whether page frame `pfn` has metadata. That says nothing about whether there is memory behind it: every
    /// page of an early section has (Linux: `pfn_valid`).
    pub fn pfn_valid(&self, pfn: u64) -> bool {
        let (number, index) = self.sub_section_of_pfn(pfn);
        let section = self.sections.get(&number);
        section.is_some_and(|section| section.early || section.active.contains(index))
    }

    /// Whether page frame `pfn` is RAM that is online: what a walker of page frames must ask (Linux:
    /// `pfn_to_online_page`).
    pub fn pfn_is_online(&self, pfn: u64) -> bool {
        let (number, index) = self.sub_section_of_pfn(pfn);
        self.sections.get(&number).is_some_and(|section| {
            section.online
                && section.active.contains(index)
                && !(section.device_taint
                    && self.is_device_memory(pfn << self.config.profile.page_shift))
        })
    }

    /// The section and the sub-section in it that contain page frame `pfn`.
    pub(super) fn sub_section_of_pfn(&self, pfn: u64) -> (u64, u32) {
        let profile = &self.config.profile;
        let sub_section = pfn >> (profile.sub_section_shift - profile.page_shift);
        let shift = profile.section_shift - profile.sub_section_shift;
        (
            sub_section >> shift,
            (sub_section & ((1 << shift) - 1)) as u32,
        )
    }
}

/// Cuts the sub-sections of a byte range, made of whole ones, into sections.
pub(super) fn sub_sections_by_section(
    profile: &Profile,
    range: Range<u64>,
) -> impl Iterator<Item = (u64, SubSections)> {
    let shift = profile.section_shift - profile.sub_section_shift;
    let (first, end) = (
        range.start >> profile.sub_section_shift,
        range.end >> profile.sub_section_shift,
    );
    let sections = first >> shift..(end + (1 << shift) - 1) >> shift;
    sections.map(move |number| {
        let base = number << shift;
        let from = first.max(base) - base;
        let to = end.min(base + (1 << shift)) - base;
        (number, SubSections::of(from as u32..to as u32))
    })
}

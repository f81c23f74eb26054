//! Adding and removing memory blocks. Nothing comes online here, and only up to Linux 4.12 is it in a zone.
//!
//! Every step that can be refused comes before the first that changes anything, so that a refusal leaves no trace.
//!
//! Linux: `add_memory_resource`, `try_remove_memory`.

use alloc::vec::Vec;
use core::ops::Range;

use super::group::GroupId;
use super::memory_block::{BlockState, MemoryBlock};
use super::node::ZoneId;
use super::online_type::OnlineType;
use super::page::Memmap;
use super::resource::{Owner, is_driver_managed};
use super::section::{Section, sub_sections_by_section};
use super::uevent::UeventAction;
use super::zone::ZoneKind;
use super::zone_rules::{self, ZoneRules};
use super::{Error, Hotplug, Mobility, PageHandle, PhysicalMemory, Step, memmap};

/// Where memory is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A node.
    Node(u32),
    /// The node of a memory group, and the group (Linux: `MHP_NID_IS_MGID`).
    Group(GroupId),
}

/// A request to add memory (Linux: `add_memory`, `add_memory_driver_managed`).
#[derive(Clone, Debug)]
pub struct AddMemory<'a> {
    /// First byte.
    pub start: u64,
    /// Bytes: whole memory blocks.
    pub size: u64,
    /// Node or group.
    pub target: Target,
    /// Who may take it offline and remove it again.
    pub owner: Owner,
    /// `System RAM`, or `System RAM (driver)` for memory only that driver can find again.
    pub resource_name: &'a str,
    /// One resource for it and its neighbours (Linux: `MHP_MERGE_RESOURCE`).
    pub merge_resource: bool,
    /// Its metadata may live in itself (Linux: `MHP_MEMMAP_ON_MEMORY`): a hint, but under
    /// [`MemmapRule::SingleBlock`](super::MemmapRule::SingleBlock) an error where
    /// [`supports_memmap_on_memory`](Hotplug::supports_memmap_on_memory) says no. Not heard where part of the memory is
    /// withheld, as metadata always has to be there.
    pub memmap_on_memory: bool,
    /// The bytes of it, whole pageblocks, that are kept from the allocator when it goes online, see
    /// [`Hotplug::fake_offline`].
    pub withheld: Range<u64>,
}

impl AddMemory<'static> {
    /// Plain System RAM on node 0, as somebody would add it by hand.
    #[must_use]
    pub const fn new(start: u64, size: u64) -> Self {
        Self {
            start,
            size,
            target: Target::Node(0),
            owner: Owner::PROBE,
            resource_name: "System RAM",
            merge_resource: false,
            memmap_on_memory: false,
            withheld: 0..0,
        }
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// Adds the memory blocks of a range, offline; then brings them online, if that is the default, and does not care
    /// whether that works (Linux: `add_memory_resource`).
    ///
    /// # Errors
    ///
    /// In Linux's order: [`Error::Invalid`] for a wrong name or an empty range, [`Error::TooBig`] beyond what can be
    /// addressed, [`Error::Exists`] if any part is there already, [`Error::Invalid`] unless the range is made of whole
    /// memory blocks, and for an unknown group or node, [`Error::NoMemory`] if the metadata fits neither into the
    /// heap nor, where it is charged, into kernel memory.
    pub fn add_memory(&mut self, request: &AddMemory<'_>) -> Result<(), Error> {
        is_driver_managed(request.resource_name)?;
        let range = self.addressable(request.start, request.size)?;
        self.faults.reach(Step::Resource)?;
        self.resources
            .add_ram(range.clone(), request.resource_name, request.owner)?;
        if let Err(error) = self.add_blocks(request) {
            let undone = self.resources.remove_ram(range);
            debug_assert!(undone.is_ok(), "it has just been added");
            return Err(error);
        }
        if request.merge_resource {
            let merged = self.resources.merge_ram(range);
            debug_assert!(merged.is_ok(), "it has just been added");
        }
        let blocks = self.units(
            request.start,
            request.size,
            self.config.profile.memory_block_shift,
        )?;
        for id in blocks.clone() {
            self.emit(UeventAction::Add, id);
        }
        if let Some(online_type) = self.config.default_online_type {
            for id in blocks {
                if self.online(id, online_type).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// All of adding but the resource. Fails before it changes anything.
    fn add_blocks(&mut self, request: &AddMemory<'_>) -> Result<(), Error> {
        let profile = self.config.profile;
        let (start, size) = (request.start, request.size);
        let blocks = self.units(start, size, profile.memory_block_shift)?;
        let sections = self.units(start, size, profile.section_shift)?;
        let withheld = &request.withheld;
        let withheld = match withheld.is_empty() {
            true => 0..0,
            false if withheld.start < start || withheld.end > start + size => {
                return Err(Error::Invalid);
            }
            false => self.pageblocks(withheld.start, withheld.end - withheld.start)?,
        };
        let (nid, group) = match request.target {
            Target::Node(nid) => (nid, None),
            Target::Group(id) => (self.groups.get(id)?.nid, Some(id)),
        };
        self.possible(nid)?;
        self.faults.reach(Step::Node)?;
        self.faults.reach(Step::Mapping)?;
        let memmap_pages = match request.memmap_on_memory && withheld.is_empty() {
            true => memmap::self_hosted_pages(
                &profile,
                self.config.self_hosted_page_size(),
                self.config.memmap_on_memory,
                self.config.memmap_rule,
                size,
            )?,
            false => None,
        };
        let charge = memmap_pages.is_none();
        let mut staged = Vec::new();
        let done = sections.clone().try_for_each(|number| {
            let section = self.new_section(number, nid, charge)?;
            staged.push((number, section));
            Ok(())
        });
        let done = done.and_then(|()| {
            blocks
                .clone()
                .try_for_each(|_| self.faults.reach(Step::MemoryBlock))
        });
        if let Err(error) = done {
            for (_, section) in staged {
                self.refund(section);
            }
            return Err(error);
        }
        self.sections.extend(staged);
        let block = MemoryBlock {
            state: BlockState::Offline,
            nid,
            zone: None,
            joined: None,
            online_type: None,
            group,
            memmap_pages: memmap_pages.unwrap_or(0),
            ram_pages: self.config.profile.memory_block_pages(),
            poisoned: 0,
            early: false,
        };
        for id in blocks.clone() {
            let joined = self.join_zone(id, nid);
            self.blocks.insert(id, MemoryBlock { joined, ..block });
        }
        let count = blocks.end - blocks.start;
        self.nodes.get_mut(nid).block_count += count;
        if let Some(group) = group {
            for _ in 0..count {
                let counted = self.groups.block_added(group);
                debug_assert!(counted.is_ok(), "the group was looked up");
            }
        }
        for pageblock in withheld {
            self.modify(pageblock, |memmap, index| {
                memmap.pageblocks[index].withheld = true;
            });
        }
        Ok(())
    }

    /// A section of System RAM that is not there yet.
    fn new_section(&mut self, number: u64, nid: u32, charge: bool) -> Result<Section, Error> {
        self.faults.reach(Step::Memmap)?;
        let profile = self.config.profile;
        if self.sections.contains_key(&number) {
            return Err(Error::Exists);
        }
        let mut section = Section {
            memmap: Some(Memmap::new(&profile)?),
            ..Section::default()
        };
        let bytes = number << profile.section_shift..(number + 1) << profile.section_shift;
        for (_, all) in sub_sections_by_section(&profile, bytes) {
            section.activate(all)?;
        }
        if charge {
            section.charged = self.charge_metadata(nid, profile.section_size())?;
        }
        Ok(section)
    }

    /// Takes the pages that the metadata of `size` bytes costs from kernel memory, on `nid` if there are any.
    pub(super) fn charge_metadata(
        &mut self,
        nid: u32,
        size: u64,
    ) -> Result<Vec<PageHandle>, Error> {
        let needed = self.config.metadata_pages(size);
        let mut charged = Vec::new();
        for _ in 0..needed {
            match self.allocate_on(nid, Mobility::Unmovable) {
                Ok(page) => charged.push(page),
                Err(error) => {
                    self.refund_pages(charged);
                    return Err(error);
                }
            }
        }
        Ok(charged)
    }

    /// Gives back the pages that were charged for a section.
    fn refund(&mut self, section: Section) {
        self.refund_pages(section.charged);
    }

    pub(super) fn refund_pages(&mut self, pages: Vec<PageHandle>) {
        for page in pages {
            let freed = self.free(page);
            debug_assert!(freed.is_ok(), "nobody else has the handle");
        }
    }

    /// Where memory joins a zone as it is added: the zone, whose span now covers the block.
    fn join_zone(&mut self, id: u64, nid: u32) -> Option<ZoneKind> {
        if self.config.zone_rules != ZoneRules::UpTo4_12 {
            return None;
        }
        let pages = self.pages_of_block(id);
        let kind = zone_rules::zone_on_add(&self.nodes.spans(nid), &pages);
        self.nodes.zone_mut(ZoneId { nid, kind }).extend(&pages);
        Some(kind)
    }

    /// Removes the memory blocks of `[start, start + size)`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the range is made of memory blocks that were added, [`Error::NotPermitted`] if any of
    /// them is not `owner`'s, [`Error::Busy`] if one is not offline, or if memory cannot be removed at all; nothing is
    /// removed then.
    pub fn remove_memory(&mut self, owner: Owner, start: u64, size: u64) -> Result<(), Error> {
        let (blocks, sections) = self.removable(owner, start, size)?;
        let offline = |id: u64| self.block_state(id) == Some(BlockState::Offline);
        if !self.config.hot_remove || !blocks.clone().all(offline) {
            return Err(Error::Busy);
        }
        self.resources.remove_ram(start..start + size)?;
        for id in blocks {
            let Some(block) = self.blocks.remove(&id) else {
                continue;
            };
            self.nodes.get_mut(block.nid).block_count -= 1;
            if let Some(group) = block.group {
                let counted = self.groups.block_removed(group);
                debug_assert!(counted.is_ok(), "it was counted when it was added");
            }
            self.poisoned_pages -= u64::from(block.poisoned);
            if let Some(kind) = block.joined {
                let (nid, pages) = (block.nid, self.pages_of_block(id));
                self.shrink_span(ZoneId { nid, kind }, &pages);
            }
            self.emit(UeventAction::Remove, id);
        }
        for number in sections {
            if let Some(section) = self.sections.remove(&number) {
                self.refund(section);
            }
        }
        Ok(())
    }

    /// Takes the memory blocks of `[start, start + size)` offline, in order, and removes them.
    ///
    /// # Errors
    ///
    /// Those of [`remove_memory`](Self::remove_memory) and [`offline`](Self::offline). The blocks that had been taken
    /// offline by then are brought online again, each into the zone it came from.
    pub fn offline_and_remove_memory(
        &mut self,
        owner: Owner,
        start: u64,
        size: u64,
    ) -> Result<(), Error> {
        let (blocks, _) = self.removable(owner, start, size)?;
        let mut undo = Vec::new();
        undo.try_reserve_exact((blocks.end - blocks.start) as usize)
            .map_err(|_| Error::NoMemory)?;
        let offline = blocks.clone().try_for_each(|id| {
            let block = self.blocks.get(&id).copied().ok_or(Error::Invalid)?;
            if block.state != BlockState::Offline {
                self.offline(id)?;
                undo.push((id, block.zone));
            }
            Ok(())
        });
        let done = offline.and_then(|()| self.remove_memory(owner, start, size));
        if done.is_err() {
            for (id, zone) in undo {
                let online_type = match zone {
                    Some(ZoneKind::Movable) => OnlineType::Movable,
                    _ => OnlineType::Kernel,
                };
                if let Err(error) = self.online(id, online_type) {
                    log::warn!("memory block {id} stays offline: {error}");
                }
            }
        }
        done
    }

    /// The memory blocks and sections of a range `owner` may remove.
    fn removable(
        &self,
        owner: Owner,
        start: u64,
        size: u64,
    ) -> Result<(Range<u64>, Range<u64>), Error> {
        let blocks = self.units(start, size, self.config.profile.memory_block_shift)?;
        let sections = self.units(start, size, self.config.profile.section_shift)?;
        let known = self.blocks.range(blocks.clone()).count() as u64;
        if known != blocks.end - blocks.start {
            return Err(Error::Invalid);
        }
        self.resources.owns(owner, start..start + size)?;
        Ok((blocks, sections))
    }

    /// Lets `owner` take over memory that was there at boot, so that it may remove it: what firmware does with a
    /// memory module it finds plugged in, when adding it says that it exists (Linux: ACPI and `-EEXIST`).
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`] unless all of it was there at boot and nobody has taken it over.
    pub fn adopt(&mut self, owner: Owner, start: u64, size: u64) -> Result<(), Error> {
        let range = self.addressable(start, size)?;
        self.resources.adopt(owner, range)
    }
}

impl<M> Hotplug<M> {
    /// Whether memory of this size may hold its own metadata.
    pub fn supports_memmap_on_memory(&self, size: u64) -> bool {
        let config = &self.config;
        memmap::supported(
            &config.profile,
            config.self_hosted_page_size(),
            config.memmap_on_memory,
            config.memmap_rule,
            size,
        )
        .is_some()
    }
}

//! Memory blocks: adding, onlining, offlining, removing.
//!
//! ```text
//!            add_memory             online                   isolate_block
//!  (nothing) ---------> offline ------------> online <------------------+
//!      ^                 |  ^                    |                      | cancel
//!      |  remove_memory  |  |      commit        v                      |
//!      +-----------------+  +------------- going-offline ---------------+
//! ```
//!
//! Adding claims the resource, makes the sections and their metadata, and registers the memory blocks; nothing is in
//! a zone yet. Onlining chooses the zone. Every step that can fail comes before the first that changes anything, so
//! that a failure leaves no trace.

use alloc::vec::Vec;
use core::ops::Range;

use super::group::GroupId;
use super::node::ZoneId;
use super::notifier::{MemoryAction, MemoryEvent};
use super::online_type::OnlineType;
use super::page::{Memmap, Page};
use super::resource::{Owner, is_driver_managed};
use super::section::{Section, sub_sections_by_section};
use super::uevent::UeventAction;
use super::zone::ZoneKind;
use super::zone_rules::{self, ZoneRules};
use super::{Error, Hotplug, Isolation, Migration, Mobility, PhysicalMemory, Step, memmap};

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

/// A memory block.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryBlock {
    pub(super) state: BlockState,
    pub(super) nid: u32,
    /// Its zone while it is online; `None` for boot memory in several.
    pub(super) zone: Option<ZoneKind>,
    /// The zone it joined when it was added; only under [`ZoneRules::UpTo4_12`].
    pub(super) joined: Option<ZoneKind>,
    /// How it is to go online next, where that was asked for when it was online already.
    pub(super) online_type: Option<OnlineType>,
    pub(super) group: Option<GroupId>,
    /// Pages at its start that hold its own metadata.
    pub(super) memmap_pages: u64,
    /// Pages that are no holes.
    pub(super) ram_pages: u64,
    /// Pages the hardware cannot be trusted with, since it was added.
    pub(super) poisoned: u32,
    /// It was there at boot.
    pub(super) early: bool,
}

/// A memory block, as its files show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Physical address / memory block size.
    pub id: u64,
    /// Its state.
    pub state: BlockState,
    /// Its node; the last one, if it has boot memory of several.
    pub nid: u32,
    /// Its zone while it is online; `None` for boot memory in several.
    pub zone: Option<ZoneKind>,
    /// The group it was added to.
    pub group: Option<GroupId>,
    /// Pages at its start that hold its own metadata.
    pub memmap_pages: u64,
    /// Pages the hardware cannot be trusted with.
    pub poisoned_pages: u32,
    /// It was there at boot.
    pub early: bool,
}

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
            ram_pages: self.block_pages(),
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
    ) -> Result<Vec<super::PageHandle>, Error> {
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

    pub(super) fn refund_pages(&mut self, pages: Vec<super::PageHandle>) {
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

    /// Brings memory block `id` online (Linux: `memory_block_online`).
    ///
    /// The contents of fresh pages are undefined (G-12): whoever allocates one writes it first. Pages that are
    /// [withheld](Self::fake_offline) do not go to the allocator.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such block, it is not offline, or may not go to that zone;
    /// [`Error::HwPoison`] if a page of it is broken; and whatever a notifier objects with.
    pub fn online(&mut self, id: u64, online_type: OnlineType) -> Result<(), Error> {
        let block = self.blocks.get_mut(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Err(Error::Invalid);
        }
        // Any attempt uses the type up.
        block.online_type = None;
        let block = *block;
        if block.poisoned > 0 {
            return Err(Error::HwPoison);
        }
        let kind = self.zone_for(id, &block, online_type)?;
        self.faults.reach(Step::PrepareOnline)?;
        let mut event = self.event(id, &block, MemoryAction::GoingOnline);
        if let Err(veto) = self.notifiers.ask(&event) {
            event.action = MemoryAction::CancelOnline;
            self.notifiers.tell(&event);
            return Err(veto);
        }
        self.set_block_online(id, &block, kind);
        event.action = MemoryAction::Online;
        self.notifiers.tell(&event);
        self.emit(UeventAction::Online, id);
        Ok(())
    }

    /// Brings memory block `id` online without being told where to: as the file `online` and firmware do it. Returns
    /// whether there was anything to do (Linux: `device_online`).
    ///
    /// A type that was written to `state` while the block was online is used up by it; else the zone is chosen
    /// automatically.
    ///
    /// # Errors
    ///
    /// Those of [`online`](Self::online).
    pub fn device_online(&mut self, id: u64) -> Result<bool, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Ok(false);
        }
        let online_type = block.online_type.unwrap_or(OnlineType::Online);
        self.online(id, online_type).map(|()| true)
    }

    /// Takes memory block `id` offline; returns whether there was anything to do (Linux: `device_offline`).
    ///
    /// # Errors
    ///
    /// Those of [`offline`](Self::offline).
    pub fn device_offline(&mut self, id: u64) -> Result<bool, Error> {
        match self.block_state(id) {
            Some(BlockState::Offline) => Ok(false),
            _ => self.offline(id).map(|()| true),
        }
    }

    /// Works on `isolation` until it is committed, or cancelled on failure.
    pub(super) fn empty(&mut self, isolation: Isolation) -> Result<(), Error> {
        loop {
            match self.migrate(&isolation, u32::MAX) {
                Ok(Migration::More) => {}
                Ok(Migration::Done) => return self.commit(isolation),
                Err(error) => {
                    self.cancel(isolation);
                    return Err(error);
                }
            }
        }
    }

    /// Nothing in here can fail.
    fn set_block_online(&mut self, id: u64, block: &MemoryBlock, kind: ZoneKind) {
        let zone = ZoneId {
            nid: block.nid,
            kind,
        };
        let pages = self.pages_of_block(id);
        let mut joined = block.joined;
        if let Some(old) = block.joined.filter(|old| *old != kind) {
            joined = Some(kind);
            if let Some(block) = self.blocks.get_mut(&id) {
                block.joined = joined;
            }
            self.shrink_span(ZoneId { kind: old, ..zone }, &pages);
        }
        for number in self.sections_of_block(id) {
            if let Some(section) = self.sections.get_mut(&number) {
                section.online = true;
            }
        }
        self.nodes.zone_mut(zone).extend(&pages);
        let all = self.pageblocks_of_block(id);
        let first_free = self.pageblock_of(pages.start + block.memmap_pages);
        for pageblock in all {
            self.modify(pageblock, |memmap, index| {
                let state = match memmap.pageblocks[index].withheld {
                    _ if pageblock < first_free => Page::Memmap,
                    true => Page::Withheld,
                    false => Page::Free { next: None },
                };
                memmap.fill(index, state);
                memmap.pageblocks[index].zone = Some(zone);
            });
        }
        self.account_group(block.group, kind, self.block_pages().cast_signed());
        self.blocks.insert(
            id,
            MemoryBlock {
                state: BlockState::Online,
                zone: Some(kind),
                joined,
                online_type: None,
                ..*block
            },
        );
    }

    /// The block has been emptied. Nothing in here can fail.
    pub(super) fn set_block_offline(&mut self, id: u64) {
        let Some(block) = self.blocks.get(&id).copied() else {
            return;
        };
        for pageblock in self.pageblocks_of_block(id) {
            self.modify(pageblock, |memmap, index| {
                memmap.fill(index, Page::Withheld);
                memmap.pageblocks[index].isolated = false;
                memmap.pageblocks[index].zone = None;
            });
        }
        for number in self.sections_of_block(id) {
            if let Some(section) = self.sections.get_mut(&number) {
                section.online = false;
            }
        }
        self.blocks.insert(
            id,
            MemoryBlock {
                state: BlockState::Offline,
                zone: None,
                ..block
            },
        );
        if let Some(kind) = block.zone {
            let (nid, pages) = (block.nid, self.pages_of_block(id));
            // Where memory joins a zone as it is added, it stays there.
            if block.joined.is_none() {
                self.shrink_span(ZoneId { nid, kind }, &pages);
            }
            self.account_group(block.group, kind, -self.block_pages().cast_signed());
        }
        let event = self.event(id, &block, MemoryAction::Offline);
        self.notifiers.tell(&event);
        self.emit(UeventAction::Offline, id);
    }

    fn account_group(&mut self, group: Option<GroupId>, kind: ZoneKind, pages: i64) {
        if let Some(group) = group {
            let counted = self.groups.account(group, kind == ZoneKind::Movable, pages);
            debug_assert!(counted.is_ok(), "groups outlive their memory blocks");
        }
    }

    pub(super) fn set_block_state(&mut self, id: u64, state: BlockState) {
        if let Some(block) = self.blocks.get_mut(&id) {
            block.state = state;
        }
    }

    /// What notifiers are told of memory block `id` before it goes online, before it goes offline, and after.
    pub(super) fn event(&self, id: u64, block: &MemoryBlock, action: MemoryAction) -> MemoryEvent {
        let sections = self.sections_of_block(id);
        let early = sections
            .filter_map(|number| self.sections.get(&number))
            .any(|section| section.early);
        let present = self.nodes.present_pages(block.nid);
        let before_it_leaves = matches!(
            action,
            MemoryAction::GoingOffline | MemoryAction::CancelOffline
        );
        let leaving = if before_it_leaves { block.ram_pages } else { 0 };
        MemoryEvent {
            action,
            node_changes: present.saturating_sub(leaving) == 0,
            start_pfn: self.pages_of_block(id).start + block.memmap_pages,
            page_count: self.block_pages() - block.memmap_pages,
            nid: block.nid,
            early,
        }
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

    /// The state of memory block `id` (physical address / memory block size); `None` if it was not added.
    pub fn block_state(&self, id: u64) -> Option<BlockState> {
        self.blocks.get(&id).map(|block| block.state)
    }

    /// All memory blocks, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = BlockInfo> + '_ {
        self.blocks.iter().map(|(id, block)| BlockInfo {
            id: *id,
            state: block.state,
            nid: block.nid,
            zone: block.zone,
            group: block.group,
            memmap_pages: block.memmap_pages,
            poisoned_pages: block.poisoned,
            early: block.early,
        })
    }

    pub(super) fn pageblocks_of_block(&self, id: u64) -> Range<u64> {
        let profile = &self.config.profile;
        let shift = profile.memory_block_shift - profile.pageblock_shift;
        id << shift..(id + 1) << shift
    }

    pub(super) fn sections_of_block(&self, id: u64) -> Range<u64> {
        let profile = &self.config.profile;
        let shift = profile.memory_block_shift - profile.section_shift;
        id << shift..(id + 1) << shift
    }

    pub(super) fn pages_of_block(&self, id: u64) -> Range<u64> {
        let pages = self.block_pages();
        id * pages..(id + 1) * pages
    }

    pub(super) fn block_pages(&self) -> u64 {
        let profile = &self.config.profile;
        1 << (profile.memory_block_shift - profile.page_shift)
    }

    pub(super) fn block_of_pageblock(&self, pageblock: u64) -> u64 {
        let profile = &self.config.profile;
        pageblock >> (profile.memory_block_shift - profile.pageblock_shift)
    }

    pub(super) fn block_of_pfn(&self, pfn: u64) -> u64 {
        let profile = &self.config.profile;
        pfn >> (profile.memory_block_shift - profile.page_shift)
    }
}

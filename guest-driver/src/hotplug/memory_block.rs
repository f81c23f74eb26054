//! Memory blocks: their states, bringing them online and offline, and the numbers of what lies in them.
//!
//! Linux: `memory_block_online`, `online_pages`, and the end of `offline_pages`; its beginning is an isolation.

use core::ops::Range;

use super::group::GroupId;
use super::node::ZoneId;
use super::notifier::{MemoryAction, MemoryEvent};
use super::online_type::OnlineType;
use super::page::Page;
use super::uevent::UeventAction;
use super::zone::ZoneKind;
use super::{Error, Hotplug, Isolation, Migration, PhysicalMemory, Step};

/// State of a memory block that has been added, as Linux's `memoryN/state` shows it.
///
/// ```text
///              add_memory            online            isolate_block
///   no block --------------> Offline -------> Online ----------------> GoingOffline
///      ^                     |    ^              ^                       |    |
///      +---------------------+    |              +------- cancel --------+    |
///           remove_memory         +-------------------- commit ---------------+
/// ```
///
/// [`offline`](Hotplug::offline) is all from `isolate_block` to `commit`, or to `cancel` where it fails; so is a veto
/// of a notifier, and a `commit` that comes too early. Whatever else is refused leaves the state as it was. Memory of
/// boot begins as `Online`.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

impl MemoryBlock {
    fn info(&self, id: u64) -> BlockInfo {
        BlockInfo {
            id,
            state: self.state,
            nid: self.nid,
            zone: self.zone,
            group: self.group,
            memmap_pages: self.memmap_pages,
            poisoned_pages: self.poisoned,
            early: self.early,
        }
    }
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

impl<M: PhysicalMemory> Hotplug<M> {
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

    /// Nothing in here is refused; the allocator's sets get nodes from the heap.
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
        self.account_group(
            block.group,
            kind,
            self.config.profile.memory_block_pages().cast_signed(),
        );
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

    /// The block has been emptied. Nothing in here is refused, or needs the heap: pageblocks only leave sets.
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
            self.account_group(
                block.group,
                kind,
                -self.config.profile.memory_block_pages().cast_signed(),
            );
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
            page_count: self.config.profile.memory_block_pages() - block.memmap_pages,
            nid: block.nid,
            early,
        }
    }
}

impl<M> Hotplug<M> {
    /// The state of memory block `id` (physical address / memory block size); `None` if it was not added.
    pub fn block_state(&self, id: u64) -> Option<BlockState> {
        self.blocks.get(&id).map(|block| block.state)
    }

    /// All memory blocks, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = BlockInfo> + '_ {
        self.blocks.iter().map(|(id, block)| block.info(*id))
    }

    /// Memory block `id`; `None` if it was not added.
    pub fn block(&self, id: u64) -> Option<BlockInfo> {
        self.blocks.get(&id).map(|block| block.info(id))
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
        let pages = self.config.profile.memory_block_pages();
        id * pages..(id + 1) * pages
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

//! Memory hotplug: sections, memory blocks, zones, their pages, and how pages in use are moved out of the way.
//!
//! The bookkeeping a kernel needs to add, online, offline and remove memory, with Linux's words, order and errors. It
//! knows nothing of virtio. One [`Hotplug`] is the memory of one machine; each type explains one concept, most of them
//! with a picture:
//!
//! | concept | types | |
//! |---|---|---|
//! | resource, owner | [`ResourceTree`], [`Owner`], [`FirmwareMap`] | who has which addresses, who may remove them |
//! | section, sub-section | [`SectionInfo`], [`SubSections`] | which page frames have metadata |
//! | memory block | [`BlockState`], [`AddMemory`] | the unit of adding, onlining, offlining, removing |
//! | zone, node | [`ZoneInfo`], [`ZoneRules`], [`NodeInfo`] | where memory goes when it comes online |
//! | online type | [`OnlineType`], [`Config`], [`OnlinePolicy`] | what is asked for, by whom, what `online` means |
//! | memory group | [`GroupKind`] | memory of one device, and how much of it may be Movable |
//! | page, pageblock | [`PageHandle`], [`PageCounts`], [`Mobility`] | what is allocated, and who may move it |
//! | emptying a range | [`Isolation`], [`Obstacle`] | how, and why not |
//! | metadata | [`MemmapOnMemory`], [`MemmapRule`] | what it costs, and where it may live |
//! | notifier, uevent | [`MemoryAction`], [`Uevent`] | who hears of it, and who may object |
//! | sysfs | [`Hotplug::read`], [`Hotplug::write`] | who asks for it |
//! | memory of boot | [`Boot`] | what is there before anything is added |
//! | memory of a device as RAM | [`KmemDevice`] | trimmed to memory blocks, and found again only by its driver |
//! | device memory | [`DeviceRange`] | page frames beside RAM that never come online |
//! | broken memory | [`Hotplug::hard_offline_page`], [`Hotplug::soft_offline_page`] | |
//! | for tests | [`Fault`], [`Snapshot`], [`Hotplug::check_invariants`] | |
//!
//! ```text
//!  page 4 KiB  <  sub-section 2 MiB  <=  section 128 MiB  <=  memory block 128 MiB .. 2 GiB
//!                 pageblock 2 MiB        (sizes of x86-64; see Profile)
//! ```
//!
//! Pages are allocated lowest address first, because memory is unplugged from high to low. The user of a movable page
//! holds a [`PageHandle`] and pins it around each access; a page that is not pinned may be moved, with its contents, at
//! any other time.
//!
//! Emptying a range takes time, so it is an [`Isolation`] that is worked on in bounded steps:
//! [`isolate`](Hotplug::isolate), [`migrate`](Hotplug::migrate) until nothing is left, then
//! [`commit`](Hotplug::commit) or [`cancel`](Hotplug::cancel).
//!
//! # The heap
//!
//! The bookkeeping is on the heap of the kernel, and most calls that change something may need more of it:
//!
//! | call | takes from the heap |
//! |---|---|
//! | [`add_memory`](Hotplug::add_memory), [`boot`](Hotplug::boot) | metadata of sections, memory blocks, resources |
//! | [`online`](Hotplug::online) | nodes of the sets of pageblocks the allocator looks in |
//! | [`allocate`](Hotplug::allocate) | handles, set nodes |
//! | [`free`](Hotplug::free), [`cancel`](Hotplug::cancel), [`fake_online`](Hotplug::fake_online) | set nodes |
//! | [`migrate`](Hotplug::migrate), [`offline`](Hotplug::offline), and whatever else moves pages | set nodes |
//! | [`remove_memory`](Hotplug::remove_memory) | resources cut in two; set nodes, as metadata is given back |
//! | [`isolate`](Hotplug::isolate), [`isolate_block`](Hotplug::isolate_block) | the isolation |
//!
//! Where much is needed, for metadata, handles and resources, a heap that is exhausted is [`Error::NoMemory`]. Small
//! things, such as the nodes of maps and sets, have no such way out: the allocation fails as it does anywhere in
//! `alloc`, and that ends most kernels. So do not back this heap with the very memory it manages, unless a reserve is
//! kept: even freeing a page may need a node.
//!
//! # Locking
//!
//! There is no lock in here. Whatever changes something takes `&mut self`, pinning a page and making a step of an
//! isolation among it: a kernel puts [`Hotplug`] behind one lock, and bounds the time that is held by the `max_pages`
//! of [`migrate`](Hotplug::migrate). [Notifiers](MemoryNotifier) and the [sink of uevents](Hotplug::set_uevent_sink)
//! run inside the call, so under the lock, and cannot call back: what they want done they note, for the time after it.

use alloc::collections::BTreeMap;
use alloc::sync::Weak;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

mod add_remove;
mod allocator;
mod auto_movable;
mod boot;
mod config;
mod device_memory;
mod error;
mod fault;
mod group;
mod handle;
mod invariants;
mod isolation;
mod kmem;
mod memmap;
mod memory_block;
mod node;
mod notifier;
mod obstacle;
mod online_type;
mod page;
mod physical_memory;
mod poison;
mod profile;
mod resource;
mod section;
mod snapshot;
mod sysfs;
mod uevent;
mod zone;
mod zone_choice;
mod zone_rules;

pub use add_remove::{AddMemory, Target};
pub use boot::{Boot, BootRange};
pub use config::{Config, OnlinePolicy};
pub use device_memory::{DeviceKind, DeviceRange};
pub use error::Error;
pub use fault::{Fault, Step};
pub use group::{GroupId, GroupKind};
pub use handle::{Mobility, PageHandle};
pub use isolation::{Isolation, Migration};
pub use kmem::{Kmem, KmemDevice};
pub use memmap::{MemmapOnMemory, MemmapRule};
pub use memory_block::{BlockInfo, BlockState};
pub use node::{NodeInfo, ZoneInfo};
pub use notifier::{MemoryAction, MemoryEvent, MemoryNotifier, NotifierId};
pub use obstacle::Obstacle;
pub use online_type::OnlineType;
pub use physical_memory::PhysicalMemory;
pub use profile::Profile;
pub use resource::{FirmwareMap, Intersection, Owner, Resource, ResourceFlags, ResourceTree};
pub use section::{SectionInfo, SubSections};
pub use snapshot::Snapshot;
pub use uevent::{Uevent, UeventAction};
pub use zone::ZoneKind;
pub use zone_rules::ZoneRules;

use group::Groups;
use handle::Handles;
use memory_block::MemoryBlock;
use node::{Nodes, Share};
use page::Memmap;
use section::Section;

/// Pages by what the page allocator makes of them, over all zones.
///
/// ```text
///            fake_online          allocate
///  withheld ------------> free ------------> allocated       online: all are free, or withheld
///           <------------   |  <------------     |           offline: they count no more
///            fake_offline   |       free         |
///                           +----> poisoned <----+           until the memory block is removed
///
///                                       present   managed   free   allocatable
///  free                                    x         x        x         x
///  free, pageblock is being emptied        x         x        x
///  allocated, or poisoned                  x         x
///  withheld, reserved, or metadata         x
///  hole between memory of boot
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of online memory blocks.
    pub present: u64,
    /// Present pages the allocator works with: not those withheld because they are unplugged.
    pub managed: u64,
    /// Managed pages nobody has allocated.
    pub free: u64,
    /// Free pages that can be allocated: not in a pageblock that is being emptied.
    pub allocatable: u64,
}

/// What has been done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Pages moved to make room.
    pub pages_migrated: u64,
    /// Times a page could not be moved because it was pinned.
    pub pages_pinned: u64,
}

/// The memory of a machine, and its pages.
pub struct Hotplug<M> {
    config: Config,
    memory: M,
    resources: ResourceTree,
    /// Each section that is present, by number.
    sections: BTreeMap<u64, Section>,
    /// Each memory block, by id.
    blocks: BTreeMap<u64, MemoryBlock>,
    nodes: Nodes,
    /// The RAM of boot, in the order firmware had it: it says where memory added by hand goes.
    boot_ram: Vec<BootRange>,
    /// Other addresses whose node firmware named at boot.
    reserved_ranges: Vec<BootRange>,
    /// ACPI's name of each node.
    proximity_domains: Vec<u32>,
    /// Drivers of the regions of devices. A claimed resource outlives a driver that is dropped; this does not.
    drivers: Vec<(Range<u64>, Weak<()>)>,
    groups: Groups,
    device_ranges: device_memory::DeviceRanges,
    handles: Handles,
    isolations: isolation::Isolations,
    notifiers: notifier::Notifiers,
    uevents: Option<uevent::UeventSink>,
    faults: fault::Faults,
    poisoned_pages: u64,
    statistics: Statistics,
}

impl<M> fmt::Debug for Hotplug<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither pages nor handles: there are thousands.
        f.debug_struct("Hotplug")
            .field("config", &self.config)
            .field("blocks", &self.blocks)
            .field("counts", &self.counts())
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

impl<M: PhysicalMemory> Hotplug<M> {
    /// No memory yet, and Linux's defaults.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the sizes of `profile` do not fit into each other.
    pub fn new(profile: Profile, memory: M) -> Result<Self, Error> {
        Self::with_config(Config::new(profile), memory)
    }

    fn with_config(config: Config, memory: M) -> Result<Self, Error> {
        config.profile.check()?;
        let firmware_map = match config.profile.boot_memory_removable {
            true => FirmwareMap::FollowsHotplug,
            false => FirmwareMap::Fixed,
        };
        Ok(Self {
            config,
            memory,
            resources: ResourceTree::new(firmware_map),
            sections: BTreeMap::new(),
            blocks: BTreeMap::new(),
            nodes: Nodes::default(),
            boot_ram: Vec::new(),
            reserved_ranges: Vec::new(),
            proximity_domains: Vec::new(),
            drivers: Vec::new(),
            groups: Groups::default(),
            device_ranges: device_memory::DeviceRanges::default(),
            handles: Handles::default(),
            isolations: isolation::Isolations::default(),
            notifiers: notifier::Notifiers::default(),
            uevents: None,
            faults: fault::Faults::default(),
            poisoned_pages: 0,
            statistics: Statistics::default(),
        })
    }

    /// Registers the memory of a device that is added and removed in one go, `max_pages` at most (Linux:
    /// `memory_group_register_static`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the node is not possible or there is no page.
    pub fn register_static_group(&mut self, nid: u32, max_pages: u64) -> Result<GroupId, Error> {
        self.possible(nid)?;
        self.groups.register_static(nid, max_pages)
    }

    /// Registers the memory of a device that is added and removed in units (Linux:
    /// `memory_group_register_dynamic`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the node is not possible, or `unit_pages` is not a power of two or less than a memory
    /// block.
    pub fn register_dynamic_group(&mut self, nid: u32, unit_pages: u64) -> Result<GroupId, Error> {
        self.possible(nid)?;
        let profile = self.config.profile;
        self.groups.register_dynamic(nid, unit_pages, &profile)
    }

    /// Claims a range that is not System RAM, or not yet: the region of a device, below which its driver adds memory.
    ///
    /// # Errors
    ///
    /// Those of [`ResourceTree::claim`].
    pub fn claim_resource(
        &mut self,
        range: Range<u64>,
        name: &str,
        flags: ResourceFlags,
    ) -> Result<(), Error> {
        self.resources.claim(range, name, flags)
    }

    /// A driver takes charge of a region for as long as `alive` is.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if there is one in charge of a part of it.
    pub(crate) fn enter_driver(
        &mut self,
        region: Range<u64>,
        alive: Weak<()>,
    ) -> Result<(), Error> {
        self.drivers.retain(|(_, driver)| driver.strong_count() > 0);
        let overlaps = |known: &Range<u64>| known.start < region.end && region.start < known.end;
        if self.drivers.iter().any(|(known, _)| overlaps(known)) {
            return Err(Error::Busy);
        }
        self.drivers.push((region, alive));
        Ok(())
    }

    /// Gives a claimed range up.
    ///
    /// # Errors
    ///
    /// Those of [`ResourceTree::release`], and [`Error::Busy`] for device memory, which gives it up itself.
    pub fn release_resource(&mut self, range: Range<u64>, name: &str) -> Result<(), Error> {
        match self.device_ranges.have_claimed(&range, name) {
            true => Err(Error::Busy),
            false => self.resources.release(range, name),
        }
    }

    /// Forgets a group.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it is unknown, [`Error::Busy`] while it has memory blocks.
    pub fn unregister_group(&mut self, id: GroupId) -> Result<(), Error> {
        self.groups.unregister(id)
    }

    fn possible(&self, nid: u32) -> Result<(), Error> {
        (nid < self.config.possible_nodes)
            .then_some(())
            .ok_or(Error::Invalid)
    }

    /// Changes the share a pageblock that is present has in its zone, whatever `change` does to it.
    fn modify<R>(&mut self, pageblock: u64, change: impl FnOnce(&mut Memmap, usize) -> R) -> R {
        let (number, index) = self.locate(pageblock);
        let section = self.sections.get_mut(&number);
        let section = section.expect("the pageblock is present");
        let memmap = section.memmap.as_mut();
        let memmap = memmap.expect("only System RAM has pageblocks");
        let before = share(memmap, index);
        let result = change(memmap, index);
        let after = share(memmap, index);
        self.nodes.settle(pageblock, section.early, before, after);
        result
    }
}

/// What a pageblock adds to its zone.
fn share(memmap: &Memmap, index: usize) -> Option<Share> {
    let pageblock = &memmap.pageblocks[index];
    Some(Share {
        zone: pageblock.zone?,
        tally: pageblock.tally(memmap.pageblock_pages),
        shelf: pageblock.shelf(memmap.pageblock_pages),
    })
}

impl<M> Hotplug<M> {
    /// What the kernel was built and booted with, and what was set since.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The sizes in use.
    pub fn profile(&self) -> &Profile {
        &self.config.profile
    }

    /// Who has which addresses.
    pub fn resources(&self) -> &ResourceTree {
        &self.resources
    }

    /// Pages by what the allocator makes of them.
    pub fn counts(&self) -> PageCounts {
        let zones = self.nodes.zones();
        zones.fold(PageCounts::default(), |sum, (_, zone)| PageCounts {
            present: sum.present + zone.present,
            managed: sum.managed + zone.managed,
            free: sum.free + zone.free,
            allocatable: sum.allocatable + zone.allocatable,
        })
    }

    /// What has been done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Bytes of the heap that page metadata takes, with the handles of allocated pages; what it is charged in pages is
    /// not in it, nor are the allocator's sets of pageblocks.
    pub fn metadata_bytes(&self) -> usize {
        let memmaps = self.sections.values().filter_map(|s| s.memmap.as_ref());
        let charged = self.sections.values().map(|s| s.charged.capacity());
        memmaps.map(Memmap::heap_bytes).sum::<usize>()
            + charged.sum::<usize>() * size_of::<PageHandle>()
            + self.handles.heap_bytes()
            + self.sections.len() * size_of::<Section>()
            + self.blocks.len() * size_of::<MemoryBlock>()
    }

    /// A byte range that is not empty and can be addressed.
    fn addressable(&self, start: u64, size: u64) -> Result<Range<u64>, Error> {
        if size == 0 {
            return Err(Error::Invalid);
        }
        let end = start.checked_add(size).ok_or(Error::TooBig)?;
        let limit = 1u64.checked_shl(self.config.profile.physical_address_bits);
        match limit {
            Some(limit) if end > limit => Err(Error::TooBig),
            _ => Ok(start..end),
        }
    }

    /// The pageblocks of the byte range, which must be aligned to them and not empty.
    fn pageblocks(&self, start: u64, size: u64) -> Result<Range<u64>, Error> {
        self.units(start, size, self.config.profile.pageblock_shift)
    }

    /// The units of `1 << shift` bytes in a byte range made of whole ones.
    fn units(&self, start: u64, size: u64, shift: u32) -> Result<Range<u64>, Error> {
        let end = start.checked_add(size).ok_or(Error::Invalid)?;
        let aligned = (start | size).trailing_zeros() >= shift;
        (aligned && size > 0)
            .then_some(start >> shift..end >> shift)
            .ok_or(Error::Invalid)
    }

    /// The section a pageblock lies in, and the pageblock's index in it.
    fn locate(&self, pageblock: u64) -> (u64, usize) {
        let shift = self.config.profile.section_shift - self.config.profile.pageblock_shift;
        let index = pageblock & ((1 << shift) - 1);
        (pageblock >> shift, index as usize)
    }

    /// The section that contains a page frame, and the page's index in it.
    fn locate_page(&self, pfn: u64) -> (u64, u32) {
        let shift = self.config.profile.section_shift - self.config.profile.page_shift;
        let index = pfn & ((1 << shift) - 1);
        (pfn >> shift, index as u32)
    }

    fn pfn(&self, section: u64, page: u32) -> u64 {
        let shift = self.config.profile.section_shift - self.config.profile.page_shift;
        (section << shift) + u64::from(page)
    }

    fn pageblock_of(&self, pfn: u64) -> u64 {
        pfn >> (self.config.profile.pageblock_shift - self.config.profile.page_shift)
    }

    /// The metadata of a pageblock of System RAM that is known to be present, and the pageblock's index in it.
    fn present(&self, pageblock: u64) -> (&Memmap, usize) {
        let (number, index) = self.locate(pageblock);
        let memmap = self.sections.get(&number).and_then(|s| s.memmap.as_ref());
        (memmap.expect("the pageblock is present"), index)
    }
}

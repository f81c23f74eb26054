//! A comparable copy of the state, to see that a failure left no trace.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::group::{Group, GroupId};
use super::memory_block::MemoryBlock;
use super::page::Class;
use super::{Config, DeviceRange, Hotplug, NodeInfo, SectionInfo, ZoneInfo};

/// The state of everything from the pageblock upwards: two are equal if and only if the configuration, memory blocks,
/// sections, zones, nodes, groups, device memory and resources are, what each pageblock is set aside for, and the
/// number of allocated pages.
///
/// Not in it are where the allocated pages are and who pins them, how far isolations have got, statistics, notifiers,
/// and faults to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    config: Config,
    blocks: Vec<(u64, MemoryBlock)>,
    pageblocks: Vec<Special>,
    sections: Vec<SectionInfo>,
    zones: Vec<ZoneInfo>,
    nodes: Vec<NodeInfo>,
    groups: Vec<(GroupId, Group)>,
    devices: Vec<DeviceRange>,
    resources: String,
    handles: usize,
}

/// A pageblock the allocator cannot do with as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Special {
    number: u64,
    cma: bool,
    isolated: bool,
    withheld: bool,
    poisoned: u32,
}

impl<M> Hotplug<M> {
    /// A copy of the state, for tests. It looks at every pageblock.
    pub fn snapshot(&self) -> Snapshot {
        let blocks = self.blocks.iter().map(|(id, block)| (*id, *block));
        let groups = self.groups.iter().map(|(id, group)| (id, group.clone()));
        Snapshot {
            config: self.config,
            blocks: blocks.collect(),
            pageblocks: self.special_pageblocks().collect(),
            sections: self.sections().collect(),
            zones: self.zones().collect(),
            nodes: self.nodes().collect(),
            groups: groups.collect(),
            devices: self.device_memory().cloned().collect(),
            resources: format!("{:?}", self.resources),
            handles: self.handles.count(),
        }
    }

    fn special_pageblocks(&self) -> impl Iterator<Item = Special> + '_ {
        let shift = self.config.profile.section_shift - self.config.profile.pageblock_shift;
        let all = self.sections.iter().flat_map(move |(number, section)| {
            let pageblocks = section.memmap.iter().flat_map(|memmap| &memmap.pageblocks);
            ((number << shift)..).zip(pageblocks)
        });
        let described = all.map(|(number, pageblock)| Special {
            number,
            cma: pageblock.class == Class::Cma,
            isolated: pageblock.isolated,
            withheld: pageblock.withheld,
            poisoned: pageblock.poisoned,
        });
        described.filter(|p| p.cma || p.isolated || p.withheld || p.poisoned > 0)
    }
}

//! A comparable copy of the whole state, to see that a failure left no trace.

use alloc::string::String;
use alloc::vec::Vec;

use super::{BlockInfo, Hotplug, NodeInfo, PageCounts, SectionInfo, ZoneInfo};

/// The whole state but for the single pages: two are equal if and only if whatever can be asked of the core gets the same
/// answers, but for where pages are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    blocks: Vec<BlockInfo>,
    sections: Vec<SectionInfo>,
    zones: Vec<ZoneInfo>,
    nodes: Vec<NodeInfo>,
    groups: String,
    devices: String,
    resources: String,
    counts: PageCounts,
    handles: usize,
    poisoned_pages: u64,
    withheld: Vec<u64>,
}

impl<M> Hotplug<M> {
    /// A copy of the state, for tests. It looks at every pageblock.
    pub fn snapshot(&self) -> Snapshot {
        let profile = &self.config.profile;
        let shift = profile.section_shift - profile.pageblock_shift;
        let withheld = self.sections.iter().flat_map(|(number, section)| {
            let pageblocks = section.memmap.iter().flat_map(|memmap| &memmap.pageblocks);
            let numbered = ((number << shift)..).zip(pageblocks);
            numbered.filter_map(|(pageblock, counts)| counts.withheld.then_some(pageblock))
        });
        Snapshot {
            blocks: self.blocks().collect(),
            sections: self.sections().collect(),
            zones: self.zones().collect(),
            nodes: self.nodes().collect(),
            groups: self
                .groups
                .iter()
                .map(|group| alloc::format!("{group:?}\n"))
                .collect(),
            devices: self
                .device_memory()
                .map(|range| alloc::format!("{range:?}\n"))
                .collect(),
            resources: alloc::format!("{:?}", self.resources),
            counts: self.counts(),
            handles: self.handles.count(),
            poisoned_pages: self.poisoned_pages,
            withheld: withheld.collect(),
        }
    }
}

//! Nodes and their zones: spans, counters, and the free pages of each zone. Which zone a memory block goes to is not
//! decided here.
//!
//! Linux: `struct pglist_data`, `struct zone`, `resize_zone_range`, `shrink_zone_span`.

use alloc::collections::{BTreeMap, BTreeSet};
use core::ops::Range;

use super::page::{Shelf, Tally};
use super::zone::ZoneKind;
use super::zone_rules::Spans;
use super::{Hotplug, Mobility};

/// Names a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ZoneId {
    pub(super) nid: u32,
    pub(super) kind: ZoneKind,
}

/// A zone of a node.
#[derive(Debug, Default)]
pub(super) struct Zone {
    /// First to last page; `None` while it is empty.
    pub(super) span: Option<Range<u64>>,
    pub(super) present: u64,
    pub(super) present_early: u64,
    pub(super) managed: u64,
    pub(super) free: u64,
    pub(super) allocatable: u64,
    pub(super) cma: u64,
    pub(super) isolated: u64,
    /// Numbers of the pageblocks pages can be allocated from, by [`Shelf`].
    pub(super) shelves: [BTreeSet<u64>; Shelf::COUNT],
}

impl Zone {
    pub(super) fn shelf(&self, shelf: Shelf) -> &BTreeSet<u64> {
        &self.shelves[shelf as usize]
    }

    /// The pageblock to allocate from: the lowest that suits best.
    fn pick(&self, mobility: Mobility) -> Option<u64> {
        let lowest = |shelf| self.shelf(shelf).first().copied();
        match mobility {
            Mobility::Movable => match (lowest(Shelf::Whole), lowest(Shelf::Movable)) {
                (Some(whole), Some(part)) => Some(whole.min(part)),
                (one, other) => one.or(other),
            }
            .or_else(|| lowest(Shelf::Cma))
            .or_else(|| lowest(Shelf::Unmovable)),
            Mobility::Unmovable => lowest(Shelf::Unmovable)
                .or_else(|| lowest(Shelf::Whole))
                .or_else(|| lowest(Shelf::Movable)),
        }
    }

    /// Makes the span cover `pages` too (Linux: `resize_zone_range`).
    pub(super) fn extend(&mut self, pages: &Range<u64>) {
        self.span = Some(match self.span.take() {
            Some(span) => span.start.min(pages.start)..span.end.max(pages.end),
            None => pages.clone(),
        });
    }

    /// Counts a pageblock once more, for a recount.
    pub(super) fn count(&mut self, pageblock: u64, early: bool, share: Share) {
        self.add(&share.tally, early);
        if let Some(shelf) = share.shelf {
            self.shelves[shelf as usize].insert(pageblock);
        }
    }

    /// Whether all but the span are the same.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        let counters = |zone: &Self| {
            let Self {
                span: _,
                present,
                present_early,
                managed,
                free,
                allocatable,
                cma,
                isolated,
                shelves: _,
            } = *zone;
            [
                present,
                present_early,
                managed,
                free,
                allocatable,
                cma,
                isolated,
            ]
        };
        counters(self) == counters(other) && self.shelves == other.shelves
    }

    fn add(&mut self, tally: &Tally, early: bool) {
        self.change(tally, early, |counter, pages| *counter += u64::from(pages));
    }

    fn subtract(&mut self, tally: &Tally, early: bool) {
        self.change(tally, early, |counter, pages| *counter -= u64::from(pages));
    }

    fn change(&mut self, tally: &Tally, early: bool, change: impl Fn(&mut u64, u32)) {
        change(&mut self.present, tally.present);
        if early {
            change(&mut self.present_early, tally.present);
        }
        change(&mut self.managed, tally.managed);
        change(&mut self.free, tally.free);
        change(&mut self.allocatable, tally.allocatable);
        change(&mut self.cma, tally.cma);
        change(&mut self.isolated, tally.isolated);
    }
}

/// What a pageblock adds to its zone, and where it is to be found there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) zone: ZoneId,
    pub(super) tally: Tally,
    pub(super) shelf: Option<Shelf>,
}

/// A node.
#[derive(Debug, Default)]
pub(super) struct Node {
    /// Keeps it online without memory.
    pub(super) has_cpus: bool,
    /// Number of its memory blocks.
    pub(super) block_count: u64,
    zones: [Zone; ZoneKind::ALL.len()],
}

impl Node {
    pub(super) fn zone(&self, kind: ZoneKind) -> &Zone {
        &self.zones[kind as usize]
    }

    pub(super) fn zone_mut(&mut self, kind: ZoneKind) -> &mut Zone {
        &mut self.zones[kind as usize]
    }

    pub(super) fn spans(&self) -> Spans {
        Spans(self.zones.each_ref().map(|zone| zone.span.clone()))
    }

    fn is_online(&self) -> bool {
        self.has_cpus || self.block_count > 0
    }
}

/// All nodes that ever had something.
#[derive(Debug, Default)]
pub(super) struct Nodes(pub(super) BTreeMap<u32, Node>);

impl Nodes {
    pub(super) fn get_mut(&mut self, nid: u32) -> &mut Node {
        self.0.entry(nid).or_default()
    }

    pub(super) fn present_pages(&self, nid: u32) -> u64 {
        let zones = self.0.get(&nid).into_iter().flat_map(|node| &node.zones);
        zones.map(|zone| zone.present).sum()
    }

    pub(super) fn spans(&self, nid: u32) -> Spans {
        self.0.get(&nid).map(Node::spans).unwrap_or_default()
    }

    pub(super) fn zone_mut(&mut self, id: ZoneId) -> &mut Zone {
        self.get_mut(id.nid).zone_mut(id.kind)
    }

    pub(super) fn zones(&self) -> impl Iterator<Item = (ZoneId, &Zone)> {
        self.0.iter().flat_map(|(nid, node)| {
            ZoneKind::ALL.map(|kind| (ZoneId { nid: *nid, kind }, node.zone(kind)))
        })
    }

    /// A pageblock's share has changed.
    pub(super) fn settle(
        &mut self,
        pageblock: u64,
        early: bool,
        before: Option<Share>,
        after: Option<Share>,
    ) {
        if before == after {
            return;
        }
        if let Some(Share { zone, tally, shelf }) = before {
            let zone = self.zone_mut(zone);
            zone.subtract(&tally, early);
            if let Some(shelf) = shelf {
                zone.shelves[shelf as usize].remove(&pageblock);
            }
        }
        if let Some(Share { zone, tally, shelf }) = after {
            let zone = self.zone_mut(zone);
            zone.add(&tally, early);
            if let Some(shelf) = shelf {
                zone.shelves[shelf as usize].insert(pageblock);
            }
        }
    }

    /// The pageblock to allocate from: on node `nid`, else on any other, lowest first; there in the highest zone
    /// that will do (Linux: the zonelist).
    pub(super) fn pick(&self, nid: u32, mobility: Mobility) -> Option<u64> {
        let preferred = self.0.get(&nid).into_iter();
        let others = self.0.iter().filter(|(other, _)| **other != nid);
        preferred
            .chain(others.map(|(_, node)| node))
            .find_map(|node| Self::pick_in(node, mobility))
    }

    /// The pageblock to move a page of node `nid` to: on another node, else on the same.
    pub(super) fn pick_elsewhere(&self, nid: u32) -> Option<u64> {
        let others = self.0.iter().filter(|(other, _)| **other != nid);
        others
            .chain(self.0.get_key_value(&nid))
            .find_map(|(_, node)| Self::pick_in(node, Mobility::Movable))
    }

    fn pick_in(node: &Node, mobility: Mobility) -> Option<u64> {
        let kinds = ZoneKind::ALL.iter().rev();
        kinds
            .filter(|kind| mobility == Mobility::Movable || kind.is_kernel())
            .find_map(|kind| node.zone(*kind).pick(mobility))
    }
}

/// A zone, as `/proc/zoneinfo` shows it.
///
/// ```text
///  memory block   0 .. 7                   32        33        34        35        36
///                |DMA|  DMA32   |  hole  | Normal  | Normal  | Movable | Normal  | Movable |
///  span          |<->|<-------->|        |<-------- Normal --------------------->|
///                                                            |<-------- Movable ---------->|
/// ```
///
/// The zones of a node with 1 GiB at boot and five memory blocks more. A span reaches from the first to the last online
/// page; what is between may belong to others. It decides where a plain `online` puts a memory block, so it grows and
/// shrinks exactly as Linux's does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneInfo {
    /// Its node.
    pub nid: u32,
    /// Its kind.
    pub kind: ZoneKind,
    /// First page frame of the span; `None` while the zone is empty.
    pub start_pfn: Option<u64>,
    /// Pages from the first to the last, with whatever lies between.
    pub spanned_pages: u64,
    /// Pages of online memory blocks.
    pub present_pages: u64,
    /// Present pages that were there at boot.
    pub present_early_pages: u64,
    /// Present pages the allocator works with: not those withheld, reserved, or holding metadata.
    pub managed_pages: u64,
    /// Managed pages nobody has allocated.
    pub free_pages: u64,
    /// Pages for contiguous allocations.
    pub cma_pages: u64,
    /// Pageblocks being emptied.
    pub isolated_pageblocks: u64,
    /// Pageblocks all of whose pages are free: as many huge pages could be had at once.
    pub free_pageblocks: u64,
}

/// A node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its number.
    pub nid: u32,
    /// It has CPUs or memory blocks, online or not.
    pub online: bool,
    /// It has online memory (Linux: `N_MEMORY`).
    pub has_memory: bool,
    /// It has online memory in a kernel zone (Linux: `N_NORMAL_MEMORY`).
    pub has_normal_memory: bool,
    /// First page frame of the span, which is that of its zones together; `None` while they are empty.
    pub start_pfn: Option<u64>,
    /// Pages from the first to the last, with whatever lies between.
    pub spanned_pages: u64,
}

impl<M> Hotplug<M> {
    /// All zones of all nodes, but for device memory.
    pub fn zones(&self) -> impl Iterator<Item = ZoneInfo> + '_ {
        self.nodes.zones().map(|(id, zone)| ZoneInfo {
            nid: id.nid,
            kind: id.kind,
            start_pfn: zone.span.as_ref().map(|span| span.start),
            spanned_pages: zone.span.as_ref().map_or(0, |span| span.end - span.start),
            present_pages: zone.present,
            present_early_pages: zone.present_early,
            managed_pages: zone.managed,
            free_pages: zone.free,
            cma_pages: zone.cma,
            isolated_pageblocks: zone.isolated,
            free_pageblocks: zone.shelf(Shelf::Whole).len() as u64,
        })
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = NodeInfo> + '_ {
        self.nodes.0.iter().map(|(nid, node)| {
            let present = |kind: &ZoneKind| node.zone(*kind).present > 0;
            let spans = node.zones.iter().filter_map(|zone| zone.span.clone());
            let span = spans.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            NodeInfo {
                nid: *nid,
                online: node.is_online(),
                has_memory: ZoneKind::ALL.iter().any(present),
                has_normal_memory: ZoneKind::ALL
                    .iter()
                    .filter(|kind| kind.is_kernel())
                    .any(present),
                start_pfn: span.as_ref().map(|span| span.start),
                spanned_pages: span.map_or(0, |span| span.end - span.start),
            }
        })
    }

    /// Pages the allocator works with (Linux: `MemTotal`).
    pub fn total_pages(&self) -> u64 {
        self.nodes.zones().map(|(_, zone)| zone.managed).sum()
    }

    /// Shrinks the span of a zone that has just lost `pages` (Linux: `shrink_zone_span`): an edge of the span that
    /// lay there moves on to the next sub-section of the zone. Lost in the middle, they leave a hole.
    pub(super) fn shrink_span(&mut self, id: ZoneId, pages: &Range<u64>) {
        let Some(span) = self.nodes.zone_mut(id).span.clone() else {
            return;
        };
        let left = if span.start == pages.start {
            self.first_sub_section(id, pages.end..span.end)
                .map(|first| first.start..span.end)
        } else if span.end == pages.end {
            self.last_sub_section(id, span.start..pages.start)
                .map(|last| span.start..last.end)
        } else {
            Some(span)
        };
        self.nodes.zone_mut(id).span = left;
    }

    /// The first sub-section of the zone that starts in the range of page frames.
    fn first_sub_section(&self, id: ZoneId, pages: Range<u64>) -> Option<Range<u64>> {
        let mut candidates = self
            .section_numbers(&pages)
            .flat_map(|number| self.sub_sections_of(number));
        candidates.find(|sub_section| {
            sub_section.start >= pages.start
                && sub_section.start < pages.end
                && self.zone_of_sub_section(sub_section.start) == Some(id)
        })
    }

    /// The last sub-section of the zone that starts in the range of page frames.
    fn last_sub_section(&self, id: ZoneId, pages: Range<u64>) -> Option<Range<u64>> {
        let mut candidates = self
            .section_numbers(&pages)
            .rev()
            .flat_map(|number| self.sub_sections_of(number).rev());
        candidates.find(|sub_section| {
            // The zone may begin in the middle of its first one.
            sub_section.end > pages.start
                && sub_section.start < pages.end
                && self.zone_of_sub_section(sub_section.start) == Some(id)
        })
    }

    /// The sections that are present in the range of page frames. Absent ones cost nothing.
    fn section_numbers(&self, pages: &Range<u64>) -> impl DoubleEndedIterator<Item = u64> + '_ {
        let shift = self.config.profile.section_shift - self.config.profile.page_shift;
        let sections = pages.start >> shift..(pages.end + (1 << shift) - 1) >> shift;
        self.sections.range(sections).map(|(number, _)| *number)
    }

    /// The page frames of each sub-section of a section.
    fn sub_sections_of(&self, number: u64) -> impl DoubleEndedIterator<Item = Range<u64>> + use<M> {
        let profile = self.config.profile;
        let count = 1u64 << (profile.section_shift - profile.sub_section_shift);
        let pages = 1u64 << (profile.sub_section_shift - profile.page_shift);
        let first = number << (profile.section_shift - profile.page_shift);
        (0..count).map(move |index| first + index * pages..first + (index + 1) * pages)
    }

    /// The zone the sub-section that begins with page frame `pfn` is in.
    fn zone_of_sub_section(&self, pfn: u64) -> Option<ZoneId> {
        let (number, index) = self.sub_section_of_pfn(pfn);
        let section = self.sections.get(&number)?;
        // A memory block may have device memory in a hole, and a pageblock larger than a sub-section beside its RAM.
        let memmap = section.memmap.as_ref()?;
        let device = || self.is_device_memory(pfn << self.config.profile.page_shift);
        if !section.active.contains(index) || (section.device_taint && device()) {
            return None;
        }
        if section.online {
            // A pageblock may be smaller, and at the border of boot memory a hole.
            let last = pfn + u64::from(self.config.profile.pages_per_sub_section()) - 1;
            let mut pageblocks = self.pageblock_of(pfn)..=self.pageblock_of(last);
            return pageblocks.find_map(|pageblock| {
                let (_, index) = self.locate(pageblock);
                memmap.pageblocks[index].zone
            });
        }
        // Only where memory joins a zone when it is added.
        let block = self.blocks.get(&self.block_of_pfn(pfn))?;
        block.joined.map(|kind| ZoneId {
            nid: block.nid,
            kind,
        })
    }
}

//! What to plug or unplug next: pure decisions, in Linux's order.

use core::ops::Range;

use virtio_mem_wire::{BlockMap, BlockRange, BlockState};

use super::InUse;
use super::layout::Layout;

/// What the hotplug core has in the place of a memory block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing.
    Absent,
    /// Memory this driver leaves alone: somebody else has added it, or is taking it offline.
    Foreign,
    /// Memory of the driver's, offline.
    Offline,
    /// Memory of the driver's, online.
    Online,
}

/// What decisions are made from.
pub(super) struct Plan<'a, P> {
    pub(super) layout: &'a Layout,
    pub(super) plugged: &'a BlockMap,
    /// Ids of the memory blocks in the usable region.
    pub(super) memory_blocks: Range<u64>,
    pub(super) presence: P,
}

/// The next range to unplug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnplugChoice {
    pub(super) range: BlockRange,
    /// Its pages must be taken from the allocator first (G-11).
    pub(super) online: bool,
}

impl<P: Fn(u64) -> Presence> Plan<'_, P> {
    /// The next blocks to plug, at most `sub_blocks` sub-blocks: the lowest gap of the first partly plugged
    /// memory block, online ones first; else the start of the first memory block that is not there yet.
    pub(super) fn next_plug(&self, sub_blocks: u64) -> Option<BlockRange> {
        [Presence::Online, Presence::Offline]
            .iter()
            .find_map(|presence| self.lowest_gap(*presence))
            .or_else(|| self.first_absent())
            .map(|gap| BlockRange {
                count: gap.count.min(self.most_blocks(sub_blocks)),
                ..gap
            })
    }

    /// The next blocks to unplug, at most `sub_blocks` sub-blocks: offline memory before online, partly plugged
    /// memory blocks before full ones, high addresses before low; passing over what is `in_use`.
    pub(super) fn next_unplug(&self, sub_blocks: u64, in_use: &InUse) -> Option<UnplugChoice> {
        for presence in [Presence::Offline, Presence::Online] {
            for full in [false, true] {
                for id in self.memory_blocks.clone().rev() {
                    let blocks = self.layout.memory_block(id);
                    let count = self.plugged.count_in(blocks);
                    let eligible = count > 0
                        && (count == blocks.count) == full
                        && (self.presence)(id) == presence;
                    if !eligible {
                        continue;
                    }
                    let online = presence == Presence::Online;
                    let range = if online {
                        self.online_candidate(id, full, sub_blocks, in_use)
                    } else {
                        self.highest_run(blocks, sub_blocks)
                    };
                    if let Some(range) = range {
                        return Some(UnplugChoice { range, online });
                    }
                }
            }
        }
        None
    }

    fn lowest_gap(&self, presence: Presence) -> Option<BlockRange> {
        self.memory_blocks.clone().find_map(|id| {
            let blocks = self.layout.memory_block(id);
            let gap = self.plugged.runs_in(blocks, false).next()?;
            ((self.presence)(id) == presence).then_some(gap)
        })
    }

    fn first_absent(&self) -> Option<BlockRange> {
        self.memory_blocks.clone().find_map(|id| {
            let blocks = self.layout.memory_block(id);
            let unused = self.plugged.count_in(blocks) == 0;
            (unused && (self.presence)(id) == Presence::Absent).then_some(blocks)
        })
    }

    /// All of a full memory block if all of it must go, else its highest sub-block.
    fn online_candidate(
        &self,
        id: u64,
        full: bool,
        sub_blocks: u64,
        in_use: &InUse,
    ) -> Option<BlockRange> {
        let blocks = self.layout.memory_block(id);
        let whole = full
            && blocks.count <= self.most_blocks(sub_blocks)
            && !in_use.memory_blocks.contains(&id)
            && in_use.sub_blocks.count_in(blocks) == 0;
        if whole {
            return Some(blocks);
        }
        self.layout.sub_blocks(blocks).rev().find(|sub_block| {
            self.plugged.state(*sub_block) == BlockState::Plugged
                && !in_use.sub_blocks.contains(sub_block.first)
        })
    }

    /// The end of the last plugged run.
    fn highest_run(&self, blocks: BlockRange, sub_blocks: u64) -> Option<BlockRange> {
        let run = self.plugged.runs_in(blocks, true).last()?;
        let count = run.count.min(self.most_blocks(sub_blocks));
        Some(BlockRange {
            first: run.end() - count,
            count,
        })
    }

    fn most_blocks(&self, sub_blocks: u64) -> u64 {
        let blocks = sub_blocks.saturating_mul(self.layout.sub_block_blocks);
        blocks.min(self.layout.request_blocks)
    }
}

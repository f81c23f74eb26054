//! What the driver knows of each device block.
//!
//! ```text
//!  plugged     acknowledged by the device
//!    |- given      the rest: its memory is the hotplug core's
//!    |- fresh      not given to the hotplug core yet
//!    '- taken      kept from it: to be unplugged, or, `torn`, part of a granule of which not everything is plugged
//!  intended    plugged, plus what PLUG requests in flight will add, minus what UNPLUG requests in flight will remove
//! ```
//!
//! The hotplug core has whole granules or nothing of them, so a torn one is never its.

use virtio_mem_wire::{BlockMap, BlockRange, BlockState};

use super::layout::Layout;

/// Sets of device blocks.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) plugged: BlockMap,
    pub(super) intended: BlockMap,
    pub(super) taken: BlockMap,
    pub(super) fresh: BlockMap,
    pub(super) torn: BlockMap,
}

impl Maps {
    pub(super) fn new(len: u64) -> Self {
        let empty = || BlockMap::new(len);
        Self {
            plugged: empty(),
            intended: empty(),
            taken: empty(),
            fresh: empty(),
            torn: empty(),
        }
    }

    /// After a scan: `taken` is what the hotplug core does not have of `plugged`.
    pub(super) fn rebuild(layout: &Layout, plugged: BlockMap, taken: BlockMap) -> Self {
        let mut maps = Self::new(plugged.len());
        for run in plugged.runs() {
            maps.note_torn(layout, &plugged, run.first);
            maps.note_torn(layout, &plugged, run.end() - 1);
            for stray in strays(layout, run) {
                maps.torn.insert(stray);
            }
        }
        maps.taken = taken;
        for run in maps.torn.runs() {
            maps.taken.insert(run);
        }
        maps.intended = plugged.clone();
        maps.plugged = plugged;
        maps
    }

    /// Granules that will be plugged entirely once everything in flight is done.
    pub(super) fn intended_granules(&self, layout: &Layout) -> u64 {
        let torn = self.staying(&self.torn);
        self.intended.count().saturating_sub(torn) / layout.granule_blocks
    }

    /// Whole granules that are taken, and not being unplugged yet.
    pub(super) fn taken_granules(&self, layout: &Layout) -> u64 {
        let torn = self.staying(&self.torn);
        let resting = self.staying(&self.taken).saturating_sub(torn);
        resting / layout.granule_blocks
    }

    /// Blocks of `map`, which are plugged, that are not being unplugged.
    fn staying(&self, map: &BlockMap) -> u64 {
        map.runs().map(|run| self.intended.count_in(run)).sum()
    }

    /// The device has plugged `range`: whole granules, or part of one.
    pub(super) fn plug_done(&mut self, layout: &Layout, range: BlockRange) {
        self.plugged.insert(range);
        self.intended.insert(range);
        let granule = layout.granule_of(range.first);
        let whole = if range.end() > granule.end() {
            range
        } else {
            granule
        };
        if self.plugged.state(whole) == BlockState::Plugged {
            self.torn.remove(whole);
            self.taken.remove(whole);
            self.fresh.insert(whole);
        } else {
            self.torn.insert(range);
            self.taken.insert(range);
        }
    }

    /// The device has unplugged `range`.
    pub(super) fn unplug_done(&mut self, layout: &Layout, range: BlockRange) {
        for map in [
            &mut self.plugged,
            &mut self.intended,
            &mut self.taken,
            &mut self.fresh,
            &mut self.torn,
        ] {
            map.remove(range);
        }
        for block in [range.first, range.end() - 1] {
            let granule = layout.granule_of(block);
            if self.plugged.count_in(granule) > 0 {
                for run in self.plugged.runs_in(granule, true) {
                    self.torn.insert(run);
                    self.taken.insert(run);
                }
            }
        }
    }

    /// The device has unplugged everything.
    pub(super) fn unplug_all_done(&mut self) {
        *self = Self::new(self.plugged.len());
    }

    /// What is taken of `range`, and made of whole granules, is fresh again: to be given back.
    pub(super) fn release(&mut self, range: BlockRange) {
        let Self {
            taken, fresh, torn, ..
        } = self;
        for run in taken.runs_in(range, true) {
            for whole in torn.runs_in(run, false) {
                fresh.insert(whole);
            }
        }
        for run in fresh.runs_in(range, true) {
            taken.remove(run);
        }
    }

    /// Whatever is plugged of `range` stays plugged: it is somebody else's.
    pub(super) fn leave_alone(&mut self, range: BlockRange) {
        self.torn.remove(range);
        self.taken.remove(range);
    }

    fn note_torn(&mut self, layout: &Layout, plugged: &BlockMap, block: u64) {
        let granule = layout.granule_of(block);
        if plugged.state(granule) == BlockState::Mixed {
            for run in plugged.runs_in(granule, true) {
                self.torn.insert(run);
            }
        }
    }
}

/// The parts of `run` in no whole unit.
fn strays(layout: &Layout, run: BlockRange) -> [BlockRange; 2] {
    let units = layout.all_units();
    if units.is_empty() {
        return [
            run,
            BlockRange {
                first: run.end(),
                count: 0,
            },
        ];
    }
    let start = layout.unit(units.start).first;
    let end = layout.unit(units.end - 1).end();
    let part = |first: u64, end: u64| BlockRange {
        first,
        count: end.saturating_sub(first),
    };
    [
        part(run.first, run.end().min(start)),
        part(run.first.max(end), run.end()),
    ]
}

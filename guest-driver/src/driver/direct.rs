//! [`Strategy::Direct`](super::Strategy::Direct): the fewest requests, several at a time.
//!
//! Growing asks for whole gaps, across memory blocks. Shrinking is a campaign: it *chooses* as few runs as cover what
//! must go, *takes* their memory from the page allocator one memory block after the other, chooses others for what
//! is in use, and then unplugs each run of what it has taken with one request, or everything with one.

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{BlockMap, BlockRange};

use super::MemDriver;
use super::answers::Sent;
use super::campaign::Purpose;
use super::layout::Mode;
use super::plan::direct::{Candidates, Edge, choose};
use super::progress::{Failure, Progress, Stall};
use super::state::{Presence, UnitState, View, offline_threshold};
use super::step::Aim;
use super::take::{Emptying, Taking};
use crate::hotplug::{Error, Hotplug, PhysicalMemory};

/// How often the driver waits for memory to move pages to before it tries smaller ranges: 630 ms in all.
const STARVED_MAX: u8 = 6;

impl<H: Hal, T: Transport> MemDriver<H, T> {
    pub(super) fn advance_direct<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Result<Progress, Failure> {
        let aim = self.aim();
        let taken = self.maps.taken_granules(&self.layout);
        match aim {
            Aim::Shrink(granules) => return self.shrink(hotplug, granules),
            _ if taken > 0 || self.emptying.is_some() => {
                self.stop_emptying(hotplug);
                self.campaign.clear();
                self.release_resting();
                return Ok(Progress::Converging);
            }
            Aim::Grow(_) => {}
            Aim::Reached => self.campaign.clear(),
        }
        match aim {
            // Blocks that are leaving cannot be plugged again yet.
            Aim::Grow(_) if self.unplugging() || !self.can_send() => {
                return Ok(Progress::AwaitingDevice);
            }
            Aim::Grow(granules) => return self.grow(hotplug, granules),
            _ if self.requests_in_flight() > 0 => return Ok(Progress::AwaitingDevice),
            _ => self.settle(),
        }
        Ok(self.resting())
    }

    // ---- growing ----

    fn grow<M: PhysicalMemory>(
        &mut self,
        hotplug: &Hotplug<M>,
        granules: u64,
    ) -> Result<Progress, Failure> {
        let want = granules.saturating_mul(self.layout.granule_blocks);
        let most = self.layout.request_blocks;
        let budget = self.unit_budget(hotplug);
        let may_be_added = budget > 0;
        let purpose = Purpose::Plug { may_be_added };
        let mut campaign = core::mem::take(&mut self.campaign);
        let candidates = campaign.candidates(purpose, || {
            let gaps = self.with_view(hotplug, |view| self.gaps(view, may_be_added));
            Candidates::new(&gaps, Edge::Low)
        });
        let piece = candidates.take(want.min(most));
        // What is cut off is not lost: without a budget candidates are made anew.
        let piece = piece.map(|piece| self.with_view(hotplug, |view| trim(view, piece, budget)));
        self.campaign = campaign;
        match piece {
            Some(range) => {
                self.send(Sent::Plug(range))?;
                return Ok(Progress::Converging);
            }
            None if self.requests_in_flight() > 0 => return Ok(Progress::AwaitingDevice),
            None => {
                let kept_out = !may_be_added && self.with_view(hotplug, any_absent);
                self.give_up_for_now(match kept_out {
                    true => Stall::OfflineThreshold,
                    false => Stall::NoSpace,
                });
            }
        }
        Ok(self.resting())
    }

    /// What could be plugged: gaps in units that are there, and, if more `may_be_added`, units that are not.
    fn gaps(&self, view: &View<'_>, may_be_added: bool) -> BlockMap {
        let mut gaps = BlockMap::new(self.layout.geometry.block_count());
        for unit in view.units.clone() {
            let possible = match view.state(unit) {
                UnitState::Foreign => false,
                UnitState::Unused | UnitState::Plugged => may_be_added,
                _ => true,
            };
            if possible {
                for gap in self.maps.intended.runs_in(view.layout.unit(unit), false) {
                    gaps.insert(gap);
                }
            }
        }
        gaps
    }

    /// How many units may be added before somebody has to bring some online. As long as that happens by itself, all.
    fn unit_budget<M: PhysicalMemory>(&self, hotplug: &Hotplug<M>) -> u64 {
        let units = self.layout.all_units();
        let (offline, adding) = self.with_view(hotplug, |view| {
            let absent = |unit: &u64| {
                self.maps.intended.count_in(view.layout.unit(*unit)) > 0
                    && view.common(*unit) == Some(Presence::Absent)
            };
            let adding = units.clone().filter(absent).count() as u64;
            (view.offline_size(units.clone()), adding)
        });
        let unit = self.layout.unit_size;
        let online =
            self.policy.auto_online.is_some() || hotplug.config().default_online_type.is_some();
        let room = offline_threshold(&self.layout).saturating_sub(offline) / unit;
        match online {
            true if room > 0 => u64::MAX,
            _ => room.saturating_sub(adding),
        }
    }

    // ---- shrinking ----

    fn shrink<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        excess: u64,
    ) -> Result<Progress, Failure> {
        if self.requests_in_flight() > 0 && !self.unplugging() {
            return Ok(Progress::AwaitingDevice);
        }
        match self.take_some(hotplug) {
            Some(Taking::More) => return Ok(Progress::Converging),
            Some(Taking::Taken(range)) => {
                self.campaign.remove_end(range);
                self.awake_since_ms = self.now_ms;
                self.maps.taken.insert(range);
                return Ok(Progress::Converging);
            }
            Some(Taking::InUse(range, error)) => {
                self.give_up(range, error);
                return Ok(Progress::Converging);
            }
            None => {}
        }
        let taken = self.maps.taken_granules(&self.layout);
        if taken > excess {
            self.keep_taken(excess);
            return Ok(Progress::Converging);
        }
        let chosen = self.campaign.chosen_blocks() / self.layout.granule_blocks;
        let missing = excess - taken;
        if chosen != missing && self.choose_more(hotplug, missing, chosen) {
            return Ok(Progress::Converging);
        }
        if let Some(piece) = self.campaign.next() {
            let range = self.next_to_take(piece);
            self.emptying = Some(Emptying::new(&self.layout, range));
            return Ok(Progress::Converging);
        }
        self.unplug_taken()
    }

    /// Chooses what to take, so that it adds up to `missing` granules; whether that has changed anything.
    fn choose_more<M: PhysicalMemory>(
        &mut self,
        hotplug: &Hotplug<M>,
        missing: u64,
        chosen: u64,
    ) -> bool {
        let mut want = missing.saturating_sub(chosen);
        let mut campaign = core::mem::take(&mut self.campaign);
        if chosen > missing {
            campaign.clear();
            want = missing;
        }
        let candidates = campaign.candidates(Purpose::Take, || {
            let removable = self.with_view(hotplug, |view| self.removable(view));
            Candidates::new(&removable, Edge::High)
        });
        let blocks = want.saturating_mul(self.layout.granule_blocks);
        let most = self.layout.request_blocks.max(self.layout.granule_blocks);
        let pieces = candidates.choose(blocks, most);
        campaign.add(&pieces);
        self.campaign = campaign;
        chosen > missing || !pieces.is_empty()
    }

    /// Whole granules of units that are there, but for what is taken or in use. Nothing is chosen yet.
    fn removable(&self, view: &View<'_>) -> BlockMap {
        let mut map = BlockMap::new(self.layout.geometry.block_count());
        for unit in view.layout.all_units() {
            let blocks = view.layout.unit(unit);
            let eligible = match view.common(unit) {
                Some(Presence::Offline) => true,
                Some(Presence::Kernel | Presence::Movable) => self.policy.unplug_online,
                _ => false,
            };
            if eligible {
                for run in self.maps.plugged.runs_in(blocks, true) {
                    map.insert(run);
                }
            }
        }
        for other in [
            &self.maps.taken,
            &self.maps.torn,
            &self.maps.fresh,
            &self.in_use.granules,
        ] {
            for run in other.runs() {
                map.remove(run);
            }
        }
        map
    }

    /// What to take next of a run: its part in the highest memory block, or only its last granule if that memory
    /// block cannot be emptied as a whole; in Big-Block Mode a big block.
    fn next_to_take(&self, run: BlockRange) -> BlockRange {
        let unit = self.layout.unit_of(run.end() - 1);
        let part_first = run.first.max(self.layout.unit(unit).first);
        let single =
            self.layout.mode == Mode::BigBlock || self.in_use.memory_blocks.contains(&unit);
        let first = match single {
            true => run.end() - self.layout.granule_blocks,
            false => part_first,
        };
        BlockRange {
            first,
            count: run.end() - first,
        }
    }

    /// `range` could not be emptied.
    ///
    /// A page in use there makes the driver try another range. That there is nowhere to move pages to is true of
    /// every range: it waits then, for whoever has the memory to let go of some. After a few times in vain it looks
    /// for a range without pages, which smaller ones are likelier to be.
    fn give_up(&mut self, range: BlockRange, error: Error) {
        if error == Error::NoMemory && self.starved < STARVED_MAX {
            self.starved += 1;
            self.wait(Stall::MemoryInUse);
            return;
        }
        self.note_in_use(range);
        if range.count <= self.layout.granule_blocks {
            self.campaign.remove_end(range);
        }
    }

    /// More is taken than must go: keeps the fewest runs.
    fn keep_taken(&mut self, granules: u64) {
        let mut whole = self.resting_taken();
        let blocks = granules * self.layout.granule_blocks;
        let most = self.layout.request_blocks.max(self.layout.granule_blocks);
        for piece in choose(&whole, blocks, most, Edge::High) {
            whole.remove(piece);
        }
        let surplus: alloc::vec::Vec<_> = whole.runs().collect();
        for run in surplus {
            self.maps.release(run);
        }
    }

    fn release_resting(&mut self) {
        let resting: alloc::vec::Vec<_> = self.resting_taken().runs().collect();
        for run in resting {
            self.maps.release(run);
        }
    }

    /// What is taken, whole, and not being unplugged.
    fn resting_taken(&self) -> BlockMap {
        let mut map = BlockMap::new(self.maps.taken.len());
        for run in self.maps.taken.runs() {
            for resting in self.maps.intended.runs_in(run, true) {
                map.insert(resting);
            }
        }
        for run in self.maps.torn.runs() {
            map.remove(run);
        }
        map
    }

    /// Nothing more can be taken: one UNPLUG for each run, or one UNPLUG ALL.
    fn unplug_taken(&mut self) -> Result<Progress, Failure> {
        let in_flight = self.requests_in_flight();
        let everything = self.maps.taken.count() == self.maps.plugged.count();
        if everything && self.target_granules() == 0 && in_flight == 0 {
            self.send(Sent::UnplugAll)?;
            return Ok(Progress::AwaitingDevice);
        }
        if !self.can_send() {
            return Ok(Progress::AwaitingDevice);
        }
        let last = self.resting_taken_with_torn();
        match last {
            Some(run) => {
                let count = run.count.min(self.layout.request_blocks);
                let first = run.end() - count;
                self.send(Sent::Unplug(BlockRange { first, count }))?;
                Ok(Progress::Converging)
            }
            None if in_flight > 0 => Ok(Progress::AwaitingDevice),
            None => {
                match self.policy.unplug_online {
                    true => self.give_up_for_now(Stall::MemoryInUse),
                    false => self.settle(),
                }
                Ok(self.resting())
            }
        }
    }

    /// The highest run of what is taken and not being unplugged.
    fn resting_taken_with_torn(&self) -> Option<BlockRange> {
        let runs = self.maps.taken.runs();
        let resting = runs.flat_map(|run| self.maps.intended.runs_in(run, true));
        resting.last()
    }
}

/// Whether a unit of the usable region is not there.
fn any_absent(view: &View<'_>) -> bool {
    let absent = |unit| matches!(view.state(unit), UnitState::Unused | UnitState::Plugged);
    view.units.clone().any(absent)
}

/// Cuts a piece before the first unit that would exceed what may be added.
fn trim(view: &View<'_>, piece: BlockRange, budget: u64) -> BlockRange {
    let mut left = budget;
    let mut first = piece.first;
    while first < piece.end() {
        let unit = view.layout.unit_of(first);
        if matches!(view.state(unit), UnitState::Unused | UnitState::Plugged) {
            if left == 0 {
                break;
            }
            left -= 1;
        }
        first = view.layout.unit(unit).end();
    }
    BlockRange {
        first: piece.first,
        count: first.min(piece.end()) - piece.first,
    }
}

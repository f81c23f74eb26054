//! One step of the driver: take an answer, read the configuration, or do the next thing towards the target.

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{BlockRange, Config, RequestKind};

use super::answers::Sent;
use super::config::moved;
use super::progress::{Failure, Progress, ResyncReason, Stall};
use super::queue::RequestQueue;
use super::rest::{Rest, Waiting, delays};
use super::{ConfigReadError, MemDriver, Phase, Strategy, config};
use crate::hotplug::{Hotplug, PhysicalMemory};

/// How far the target is away, in granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// It is reached, as nearly as can be.
    Reached,
    /// So many more.
    Grow(u64),
    /// So many less.
    Shrink(u64),
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Does the next step towards the device's target, and says how things stand.
    ///
    /// A step handles one answer, sends one request, moves at most 64 pages, or adds or removes one memory
    /// block or big block. `now_ms` is any monotonic clock: after a refusal the driver waits 10 ms, and twice as long
    /// after each further one up to a second; after it has looked for memory in vain, nine times as long as it has
    /// looked, up to 30 s; under [`Strategy::Linux`] 50 s up to 300 s. `hotplug` must be the same one in every call.
    ///
    /// To be called after [`on_interrupt`](Self::on_interrupt), when [`deadline_ms`](Self::deadline_ms) has come,
    /// after memory of the region has gone online or offline, and after each call that changes the driver.
    pub fn poll<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, now_ms: u64) -> Progress {
        self.now_ms = now_ms;
        let result = match self.failure {
            Some(failure) => Err(failure),
            None => self.step(hotplug).or_else(|failure| {
                let recovered = self.recover(hotplug, failure);
                recovered.map(|()| Progress::Converging)
            }),
        };
        let progress = result.unwrap_or_else(|failure| {
            self.fail(failure);
            self.stop_emptying(hotplug);
            Progress::Failed(failure)
        });
        // What has gone online or offline meanwhile is the driver's own doing.
        self.seen = self.attachment.watch.seen();
        self.awaiting = progress == Progress::AwaitingDevice;
        self.report(hotplug, progress);
        progress
    }

    fn step<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) -> Result<Progress, Failure> {
        if self.phase == Phase::Suspended {
            return Ok(Progress::Suspended);
        }
        self.check_triggers(hotplug);
        if self.needs_reset {
            return Err(Failure::NeedsReset);
        }
        if self.receive(hotplug)? {
            return Ok(Progress::Converging);
        }
        if self.answer_overdue() {
            return Err(Failure::AnswerTimeout);
        }
        if self.maps.fresh.count() > 0 && self.scan.is_none() {
            self.give_one(hotplug)?;
            return Ok(Progress::Converging);
        }
        if self.phase == Phase::Freezing {
            self.stop_emptying(hotplug);
            return Ok(match self.requests_in_flight() {
                0 => Progress::Suspended,
                _ => Progress::AwaitingDevice,
            });
        }
        let unstable = matches!(self.rest, Rest::Waiting(w) if w.reason == Stall::ConfigUnstable);
        // Nothing new is sent until everything that is in flight has been answered: only then the sizes compare.
        if self.config_changed && !unstable {
            if self.requests_in_flight() > 0 {
                return Ok(Progress::AwaitingDevice);
            }
            self.refresh(hotplug)?;
            return Ok(Progress::Converging);
        }
        if self.rest != Rest::None {
            return Ok(self.resting());
        }
        if self.scan.is_some() {
            return self.scan_some(hotplug);
        }
        self.advance(hotplug)
    }

    /// There is no reason to wait.
    fn advance<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Result<Progress, Failure> {
        if self.unplug_all {
            // G-05
            if self.requests_in_flight() == 0 {
                self.send(Sent::UnplugAll)?;
            }
            return Ok(Progress::AwaitingDevice);
        }
        if self.remove_one(hotplug) {
            return Ok(Progress::Converging);
        }
        // Under Direct everything that is taken goes with one request, torn or not, if nothing shall stay.
        let all_goes = self.policy.strategy == Strategy::Direct
            && self.target_granules() == 0
            && matches!(self.aim(), Aim::Shrink(_));
        if self.maps.torn.count() > 0 && !all_goes {
            return self.mend(hotplug);
        }
        match self.policy.strategy {
            Strategy::Linux => self.advance_linux(hotplug),
            Strategy::Direct => self.advance_direct(hotplug),
        }
    }

    /// H-2: part of a granule is plugged. The rest follows if it is wanted, else the part goes again.
    fn mend<M: PhysicalMemory>(&mut self, hotplug: &Hotplug<M>) -> Result<Progress, Failure> {
        if self.requests_in_flight() > 0 {
            return Ok(Progress::AwaitingDevice);
        }
        let Some(first) = self.maps.torn.next(0, true) else {
            return Ok(Progress::Converging);
        };
        let granule = self.layout.granule_of(first);
        let unit = self.layout.unit_of(first);
        let usable = self.layout.units(self.config.mutable.usable_region_size);
        let possible = usable.contains(&unit)
            && self.with_view(hotplug, |view| {
                view.state(unit) != super::UnitState::Foreign
            });
        let most = self.layout.request_blocks;
        let wanted = matches!(self.aim(), Aim::Grow(_)) && possible;
        let gap = self.maps.plugged.runs_in(granule, false).next();
        let sent = match gap.filter(|_| wanted) {
            Some(gap) => Sent::Plug(BlockRange {
                count: gap.count.min(most),
                ..gap
            }),
            None => {
                let run = self.maps.torn.runs_in(granule, true).last();
                let run = run.unwrap_or(BlockRange { first, count: 1 });
                let count = run.count.min(most);
                Sent::Unplug(BlockRange {
                    first: run.end() - count,
                    count,
                })
            }
        };
        // It changes what there is to choose from.
        self.campaign.clear();
        self.send(sent)?;
        Ok(Progress::AwaitingDevice)
    }

    /// G-13: what is to be done about the target. Under [`Strategy::Linux`] what is less than a granule stays as it
    /// is, plugged or not; under [`Strategy::Direct`] it is not plugged.
    pub(super) fn aim(&self) -> Aim {
        let have = self.maps.intended_granules(&self.layout);
        let target = match self.policy.strategy {
            Strategy::Linux => {
                let requested = self.config.mutable.requested_size;
                let size = have.saturating_mul(self.layout.granule_size);
                let difference = self.layout.granules(requested.abs_diff(size));
                match requested > size {
                    true => have + difference,
                    false => have - difference,
                }
            }
            Strategy::Direct => self.target_granules(),
        };
        match target {
            target if target > have => Aim::Grow(target - have),
            target if target < have => Aim::Shrink(have - target),
            _ => Aim::Reached,
        }
    }

    // ---- the configuration ----

    /// Reads the configuration again, nothing being in flight.
    fn refresh<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) -> Result<(), Failure> {
        let config = match config::read(&self.transport, self.features) {
            Ok(config) => config,
            Err(ConfigReadError::Unstable) => {
                self.rest = Rest::None;
                self.wait(Stall::ConfigUnstable);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.check(&config)?;
        let old = core::mem::replace(&mut self.config, config).mutable;
        let requested_size = config.mutable.requested_size;
        let usable_region_size = config.mutable.usable_region_size;
        let changed =
            (old.requested_size, old.usable_region_size) != (requested_size, usable_region_size);
        if changed {
            // Decide anew what is to be emptied.
            self.stop_emptying(hotplug);
            self.pending_stall = None;
        }
        // Without a change the device says that what it has refused may be asked for again.
        if changed || self.rest != Rest::None {
            self.end_rest();
        }
        self.config_changed = false;
        self.usable_may_shrink = false;
        let refused = self.refused_at.take() == Some(requested_size);
        if refused {
            // H-1. Not for ever: the target may have been another when the device refused, and be this one
            // again by now, with all its interrupts taken already.
            self.wait(Stall::Refused);
        } else if self.policy.strategy == Strategy::Direct {
            self.retry_delay_ms = delays(Strategy::Direct).0;
            self.starved = 0;
        }
        // H-7
        let driver = self.plugged_size();
        let device = config.mutable.plugged_size;
        if device != driver && !self.unplug_all && self.scan.is_none() {
            let failure = Failure::OutOfSync { device, driver };
            self.resync(hotplug, ResyncReason::PluggedSize, failure)?;
        }
        Ok(())
    }

    fn check(&self, config: &Config) -> Result<(), Failure> {
        // D-02
        if moved(&self.config, config) {
            return Err(Failure::RegionChanged);
        }
        let (old, new) = (&self.config.mutable, &config.mutable);
        if new.usable_region_size < old.usable_region_size && !self.usable_may_shrink {
            return Err(Failure::UsableShrunk {
                from: old.usable_region_size,
                to: new.usable_region_size,
            });
        }
        Ok(())
    }

    /// The earliest time at which [`poll`](Self::poll) has something to do by itself, on the clock of the caller:
    /// to try again, or to find that the device does not answer.
    pub fn deadline_ms(&self) -> Option<u64> {
        if self.failure.is_some() || self.phase == Phase::Suspended {
            return None;
        }
        let retry = match self.rest {
            Rest::Waiting(Waiting { retry_at_ms, .. }) => retry_at_ms,
            _ => None,
        };
        [retry, self.answer_deadline_ms()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether the next [`poll`](Self::poll) would only find that the device has not answered yet.
    pub fn awaits_device(&self, now_ms: u64) -> bool {
        let answered = self.queue.as_ref().is_some_and(RequestQueue::has_answer);
        let overdue = self.deadline_ms().is_some_and(|at| now_ms >= at);
        self.awaiting && self.failure.is_none() && !self.needs_reset && !answered && !overdue
    }

    /// Whether UNPLUG requests are in flight.
    pub(super) fn unplugging(&self) -> bool {
        self.in_flight_of(RequestKind::Unplug) || self.in_flight_of(RequestKind::UnplugAll)
    }
}

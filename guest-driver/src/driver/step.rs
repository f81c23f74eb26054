//! One step of the driver: take an answer, read the configuration, or do the next thing towards the target.

use core::cmp::Ordering;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{Answer, BlockRange, Config, Request, Span};

use super::plan::{Plan, Presence, UnplugChoice};
use super::{
    ConfigReadError, Emptying, Failure, InFlight, MemDriver, Progress, Stall, Waiting, config,
};
use crate::hotplug::{
    self, AddMemory, BlockState, Error, Hotplug, Migration, Owner, PhysicalMemory,
};

/// The first wait after a refusal. It doubles with each refusal in a row.
pub(super) const RETRY_MIN_MS: u64 = 10;
/// The longest wait.
const RETRY_MAX_MS: u64 = 1000;

/// How often the driver waits for memory to move pages to before it tries smaller ranges: 630 ms in all.
const STARVED_MAX: u8 = 6;

/// The most pages one step moves.
const PAGES_PER_STEP: u32 = 64;

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Does the next step towards the device's target, and says how things stand.
    ///
    /// A step handles one answer, sends one request, moves at most 64 pages, or adds or removes one memory
    /// block. `now_ms` is any monotonic clock: after a refusal the driver waits 10 ms, and twice as long after
    /// each further one up to a second. `hotplug` must be the same one in every call.
    pub fn poll<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, now_ms: u64) -> Progress {
        let failure = match self.failure {
            Some(failure) => failure,
            None => match self.step(hotplug, now_ms) {
                Ok(progress) => return progress,
                Err(failure) => {
                    self.fail(failure);
                    failure
                }
            },
        };
        self.stop_emptying(hotplug);
        Progress::Failed(failure)
    }

    fn step<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        now_ms: u64,
    ) -> Result<Progress, Failure> {
        if let Some(in_flight) = self.in_flight {
            let Some(response) = self.queue.receive()? else {
                return Ok(Progress::AwaitingDevice);
            };
            self.in_flight = None;
            self.handle(hotplug, in_flight, response.answer(), now_ms)?;
            return Ok(Progress::Converging);
        }
        if matches!(self.waiting, Some(w) if w.retry_at_ms.is_some_and(|at| now_ms >= at)) {
            self.end_wait();
        }
        let unstable = matches!(self.waiting, Some(w) if w.reason == Stall::ConfigUnstable);
        if self.config_changed && !unstable {
            self.refresh(hotplug, now_ms)?;
            return Ok(Progress::Converging);
        }
        if let Some(Waiting {
            reason,
            retry_at_ms,
        }) = self.waiting
        {
            return Ok(Progress::Stalled {
                reason,
                retry_at_ms,
            });
        }
        self.advance(hotplug, now_ms)
    }

    /// Nothing is in flight and there is no reason to wait.
    fn advance<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        now_ms: u64,
    ) -> Result<Progress, Failure> {
        if self.unplug_all {
            // G-05
            return self.send(InFlight::UnplugAll);
        }
        if let Some(emptying) = self.emptying.take() {
            return self.go_on_emptying(hotplug, emptying, now_ms);
        }
        if let Some(id) = self.orphan {
            return self.unplug_orphan(id);
        }
        if self.removal_pending {
            self.removal_pending = false;
            self.remove_empty_blocks(hotplug);
            if self.removal_pending {
                self.wait(Stall::MemoryInUse, now_ms);
            }
            return Ok(Progress::Converging);
        }
        let plugged = self.plugged.count() / self.layout.sub_block_blocks;
        let target = self.target_sub_blocks();
        // G-13
        match target.cmp(&plugged) {
            Ordering::Equal => {
                self.retry_delay_ms = RETRY_MIN_MS;
                Ok(Progress::Settled)
            }
            Ordering::Greater => {
                let next = self.plan(hotplug).next_plug(target - plugged);
                if let Some(range) = next {
                    return self.send(InFlight::Plug(range));
                }
                self.wait(Stall::NoSpace, now_ms);
                Ok(Progress::Converging)
            }
            Ordering::Less => {
                let excess = plugged - target;
                let next = self.plan(hotplug).next_unplug(excess, &self.in_use);
                if let Some(choice) = next {
                    return self.start_unplug(hotplug, choice, now_ms);
                }
                self.wait(Stall::MemoryInUse, now_ms);
                Ok(Progress::Converging)
            }
        }
    }

    fn plan<M: PhysicalMemory>(&self, hotplug: &Hotplug<M>) -> Plan<'_, impl Fn(u64) -> Presence> {
        let usable_size = self.config.mutable.usable_region_size;
        Plan {
            layout: &self.layout,
            plugged: &self.plugged,
            memory_blocks: self.layout.memory_blocks(usable_size),
            presence: move |id| match hotplug.block_state(id) {
                None => Presence::Absent,
                Some(BlockState::Online) if self.added.contains(&id) => Presence::Online,
                Some(BlockState::Offline) if self.added.contains(&id) => Presence::Offline,
                Some(_) => Presence::Foreign,
            },
        }
    }

    // ---- requests ----

    fn send(&mut self, in_flight: InFlight) -> Result<Progress, Failure> {
        let request = self.request(in_flight);
        self.queue.send(request, &mut self.transport)?;
        self.counters.count_request(request.kind());
        self.in_flight = Some(in_flight);
        Ok(Progress::AwaitingDevice)
    }

    fn request(&self, in_flight: InFlight) -> Request {
        let span = |range: BlockRange| Span {
            addr: self.layout.geometry.address(range.first),
            // Plans keep to `Layout::request_blocks`.
            block_count: u16::try_from(range.count).unwrap_or(u16::MAX),
        };
        match in_flight {
            InFlight::UnplugAll => Request::UnplugAll,
            InFlight::Plug(range) => Request::Plug(span(range)),
            InFlight::Unplug { range, .. } => Request::Unplug(span(range)),
        }
    }

    /// Acts on the answer; of the response only its type is looked at (G-17, G-18, G-19).
    fn handle<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        in_flight: InFlight,
        answer: Answer,
        now_ms: u64,
    ) -> Result<(), Failure> {
        let request = self.request(in_flight);
        self.counters.count_answer(request.kind(), answer);
        log::debug!("virtio-mem: {request:x?}: {}", answer.name());
        match (in_flight, answer) {
            (_, Answer::Ack) => {
                let cleaning_up = self.orphan.is_some();
                match in_flight {
                    InFlight::UnplugAll => self.unplugged_all(),
                    InFlight::Plug(range) => self.plugged(hotplug, range, now_ms)?,
                    InFlight::Unplug { range, .. } => self.unplugged(hotplug, range),
                }
                // Plugging in vain and taking it back is no progress.
                if !cleaning_up && self.orphan.is_none() {
                    self.retry_delay_ms = RETRY_MIN_MS;
                    self.starved = 0;
                }
            }
            (InFlight::Unplug { range, taken: true }, Answer::Busy) => {
                let (start, size) = self.layout.bytes(range);
                let given_back = hotplug.fake_online(start, size);
                self.ensure("giving back", range, given_back)?;
                self.wait(Stall::DeviceBusy, now_ms);
            }
            (_, Answer::Busy) => self.wait(Stall::DeviceBusy, now_ms),
            (InFlight::Plug(_), Answer::Nack) => {
                // H-1: look once whether the target has changed, never simply again.
                self.refused_at = Some(self.config.mutable.requested_size);
                self.config_changed = true;
            }
            (_, Answer::Nack | Answer::Error) => return Err(Failure::Answer { request, answer }),
        }
        Ok(())
    }

    fn unplugged_all(&mut self) {
        self.unplug_all = false;
        // D-43, N-09: the usable region may be smaller now, and nothing announces it.
        self.usable_may_shrink = true;
        self.config_changed = true;
    }

    /// `range` is plugged: it becomes part of its memory block, which may be new.
    fn plugged<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        range: BlockRange,
        now_ms: u64,
    ) -> Result<(), Failure> {
        self.plugged.insert(range);
        let id = self.layout.memory_block_of(range.first);
        if self.added.contains(&id) {
            let (start, size) = self.layout.bytes(range);
            let done = hotplug.fake_online(start, size);
            return self.ensure("completing", range, done);
        }
        let size = self.layout.memory_block_size;
        // The first blocks plugged are those at its start.
        let (start, plugged) = self.layout.bytes(range);
        let request = AddMemory {
            owner: owner(),
            resource_name: "System RAM (virtio_mem)",
            merge_resource: true,
            withheld: start + plugged..(id + 1) * size,
            ..AddMemory::new(id * size, size)
        };
        match hotplug.add_memory(&request) {
            Ok(()) => {}
            // No memory for its bookkeeping; or somebody else has added it meanwhile.
            Err(Error::NoMemory | Error::Exists) => {
                self.orphan = Some(id);
                self.wait(Stall::NoMemory, now_ms);
                return Ok(());
            }
            error => return self.ensure("adding", range, error),
        }
        self.added.insert(id);
        let offline = hotplug.block_state(id) == Some(BlockState::Offline);
        if let Some(online_type) = self.policy.auto_online.filter(|_| offline)
            && let Err(error) = self.online_block(hotplug, id, online_type)
        {
            // Somebody may object; the memory is there all the same.
            log::warn!("virtio-mem: memory block {id} stays offline: {error}");
        }
        Ok(())
    }

    /// `range` is unplugged; a memory block that has nothing else is removed.
    fn unplugged<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, range: BlockRange) {
        self.plugged.remove(range);
        let id = self.layout.memory_block_of(range.first);
        if self.plugged.count_in(self.layout.memory_block(id)) > 0 {
            return;
        }
        if self.orphan == Some(id) {
            self.orphan = None;
        } else {
            self.remove_block(hotplug, id);
        }
    }

    /// What the hotplug core can only refuse if the two have come apart.
    fn ensure(
        &self,
        operation: &'static str,
        range: BlockRange,
        result: Result<(), hotplug::Error>,
    ) -> Result<(), Failure> {
        result.map_err(|error| Failure::Hotplug {
            operation,
            id: self.layout.memory_block_of(range.first),
            error,
        })
    }

    // ---- unplugging ----

    fn start_unplug<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        choice: UnplugChoice,
        now_ms: u64,
    ) -> Result<Progress, Failure> {
        let UnplugChoice { range, online } = choice;
        let (start, size) = self.layout.bytes(range);
        if !online {
            // Before the request: it may go online while that is under way (G-11).
            let taken = hotplug.fake_offline(start, size);
            self.ensure("taking", range, taken)?;
            return self.send(InFlight::Unplug { range, taken: true });
        }
        match hotplug.isolate(start, size) {
            Ok(isolation) => self.emptying = Some(Emptying { isolation, range }),
            Err(error @ (Error::Busy | Error::NoMemory)) => self.give_up(range, error, now_ms),
            error => self.ensure("isolating", range, error.map(|_| ()))?,
        }
        Ok(Progress::Converging)
    }

    /// G-11: the request is sent once the range is empty and its pages are out of reach.
    fn go_on_emptying<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        emptying: Emptying,
        now_ms: u64,
    ) -> Result<Progress, Failure> {
        let range = emptying.range;
        match hotplug.migrate(&emptying.isolation, PAGES_PER_STEP) {
            Ok(Migration::More) => self.emptying = Some(emptying),
            Ok(Migration::Done) => {
                let taken = hotplug.commit(emptying.isolation);
                self.ensure("taking", range, taken)?;
                return self.send(InFlight::Unplug { range, taken: true });
            }
            Err(error) => {
                hotplug.cancel(emptying.isolation);
                self.give_up(range, error, now_ms);
            }
        }
        Ok(Progress::Converging)
    }

    /// `range` could not be emptied.
    ///
    /// A page in use there makes the driver try another range. That there is nowhere to move pages to is true
    /// of every range: as Linux does, it waits then, for whoever has the memory to let go of some. After a few
    /// times in vain it looks for a range without pages, which smaller ones are likelier to be.
    fn give_up(&mut self, range: BlockRange, error: Error, now_ms: u64) {
        if error == Error::NoMemory && self.starved < STARVED_MAX {
            self.starved += 1;
            self.wait(Stall::MemoryInUse, now_ms);
        } else {
            self.pass_over(range);
        }
    }

    /// Notes that `range` cannot be emptied for now.
    fn pass_over(&mut self, range: BlockRange) {
        if range.count > self.layout.sub_block_blocks {
            let id = self.layout.memory_block_of(range.first);
            self.in_use.memory_blocks.insert(id);
        } else {
            self.in_use.sub_blocks.insert(range);
        }
    }

    fn stop_emptying<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        if let Some(emptying) = self.emptying.take() {
            hotplug.cancel(emptying.isolation);
        }
    }

    /// Unplugs what was plugged for a memory block that could not be added.
    fn unplug_orphan(&mut self, id: u64) -> Result<Progress, Failure> {
        let blocks = self.layout.memory_block(id);
        let run = self.plugged.runs_in(blocks, true).next();
        match run {
            Some(range) => self.send(InFlight::Unplug {
                range,
                taken: false,
            }),
            None => {
                self.orphan = None;
                Ok(Progress::Converging)
            }
        }
    }

    fn remove_empty_blocks<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        let empty: alloc::vec::Vec<u64> = self
            .added
            .iter()
            .copied()
            .filter(|id| self.plugged.count_in(self.layout.memory_block(*id)) == 0)
            .collect();
        for id in empty {
            self.remove_block(hotplug, id);
        }
    }

    /// Removes a memory block of which nothing is plugged. That can hardly fail, but if it does it is tried
    /// again (H-10).
    fn remove_block<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, id: u64) {
        let size = self.layout.memory_block_size;
        let offline = match hotplug.block_state(id) {
            Some(BlockState::Online) => hotplug.offline(id),
            _ => Ok(()),
        };
        match offline.and_then(|()| hotplug.remove_memory(owner(), id * size, size)) {
            Ok(()) => {
                self.added.remove(&id);
            }
            Err(error) => {
                log::warn!("virtio-mem: memory block {id} cannot be removed: {error}");
                self.removal_pending = true;
            }
        }
    }

    // ---- configuration and waiting ----

    /// Reads the configuration again, nothing being in flight.
    fn refresh<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        now_ms: u64,
    ) -> Result<(), Failure> {
        // The target may be another one: decide anew what is to be emptied.
        self.stop_emptying(hotplug);
        let config = match config::read(&self.transport) {
            Ok(config) => config,
            Err(ConfigReadError::Unstable) => {
                self.wait(Stall::ConfigUnstable, now_ms);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.check(&config)?;
        self.config = config;
        self.config_changed = false;
        self.usable_may_shrink = false;
        let refused = self.refused_at.take() == Some(config.mutable.requested_size);
        self.end_wait();
        if refused {
            // H-1. Not for ever: the target may have been another when the device refused, and be this one
            // again by now, with all its interrupts taken already.
            self.wait(Stall::Refused, now_ms);
        } else {
            self.retry_delay_ms = RETRY_MIN_MS;
            self.starved = 0;
        }
        Ok(())
    }

    fn check(&self, config: &Config) -> Result<(), Failure> {
        // D-02
        if config.geometry != self.config.geometry {
            return Err(Failure::RegionChanged);
        }
        let (old, new) = (&self.config.mutable, &config.mutable);
        if new.usable_region_size < old.usable_region_size && !self.usable_may_shrink {
            return Err(Failure::UsableShrunk {
                from: old.usable_region_size,
                to: new.usable_region_size,
            });
        }
        // H-7
        let driver = self.plugged_size();
        if new.plugged_size != driver && !self.unplug_all {
            return Err(Failure::OutOfSync {
                device: new.plugged_size,
                driver,
            });
        }
        Ok(())
    }

    fn wait(&mut self, reason: Stall, now_ms: u64) {
        log::info!(
            "virtio-mem: {reason}, next attempt in {} ms",
            self.retry_delay_ms
        );
        self.waiting = Some(Waiting {
            reason,
            retry_at_ms: Some(now_ms.saturating_add(self.retry_delay_ms)),
        });
        self.retry_delay_ms = (self.retry_delay_ms * 2).min(RETRY_MAX_MS);
    }
}

/// Whose memory it is: all virtio-mem devices', as they have regions of their own.
fn owner() -> Owner {
    Owner::driver(virtio_mem_wire::VIRTIO_ID_MEM as u16)
}

//! Who resizes a guest, through its lives.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use vmem_guest::abi::DriverState;

use super::blocks::Blocks;
use super::census::{Census, LeakError, no_mapping_leaked, no_slot_leaked};
use super::injector::Injector;
use super::observer::{Observer, Seen};
use super::pattern::{Move, Moves, Then};
use super::stop::Stop;
use super::{Shared, VmState, lock};
use crate::demo::checks::{self, Expected};
use crate::demo::{self, DemoError};
use crate::faults::Faults;
use crate::{Machine, Report, ReportError};

/// Resizes a guest lives for.
const LIFE: u64 = 500;

/// Most resizes a guest lives for that ends with an access to memory that is not plugged.
const ROGUE_LIFE: u64 = 20;

/// How long a guest may take for a report before it is asked whether the run is over.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// What is not too late for a report whatever was asked for: the threads of a guest wait for processors as others do.
const LATE: Duration = Duration::from_secs(10);

/// Resizes one guest.
#[derive(Debug)]
pub(super) struct Operator<'a> {
    shared: &'a Shared<'a>,
    vm: usize,
    moves: Moves,
    random: fastrand::Rng,
    target: u64,
}

impl<'a> Operator<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, vm: usize) -> Self {
        let options = shared.options;
        let plan = &shared.plan;
        let seed = options.guest.seed ^ (vm as u64) << 32;
        Self {
            shared,
            vm,
            moves: Moves::new(
                options.pattern,
                seed,
                plan.sizes.granule_size,
                plan.capacity(),
            ),
            random: fastrand::Rng::with_seed(!seed),
            target: 0,
        }
    }

    fn state(&self) -> &'a VmState {
        &self.shared.vms[self.vm]
    }

    /// Lets guests live until it is enough.
    pub(super) fn run(mut self) {
        while self.shared.goes_on() && !self.shared.is_enough() {
            let before = Census::take().map_err(DemoError::from);
            let lived = before.and_then(|before| self.life(before));
            if let Err(source) = lived {
                self.shared.fail(Some(self.vm), source);
            }
        }
    }

    fn life(&mut self, before: Census) -> Result<(), DemoError> {
        let shared = self.shared;
        let lives = lock(&self.state().summary).lives;
        let mut options = shared.options.guest.clone();
        options.seed = options.seed.wrapping_add(lives << 8 | self.vm as u64);
        let faults = match shared.options.faults.is_empty() {
            true => Faults::default(),
            false => Faults::new(),
        };
        let (config, device) = options.machine_for(&shared.plan, faults.clone())?;
        let machine = Machine::start(&config, device)?;
        *lock(&shared.backend) = machine.backend().to_string();
        self.target = 0;
        self.state().asked.store(0, Ordering::Relaxed);
        let Some(settled) = self.settle(&machine)? else {
            return self.end(machine).1;
        };
        checks::driver(&shared.plan, &settled)?;
        let injector = Injector::new(shared.options, options.seed, faults);
        let blocks = Arc::new(Blocks::new(machine.device().geometry().block_size()));
        let observed = machine.handle().add_observer(Arc::clone(&blocks));
        observed.map_err(io::Error::other)?;
        let earlier = {
            let mut live = lock(&self.state().live);
            live.lives += 1;
            *live
        };
        let observer = Observer {
            shared,
            vm: self.vm,
            machine: &machine,
            blocks: &blocks,
            before: earlier,
        };
        let (seen, ran) = self.attended(&machine, &observer, &injector);
        let handle = machine.handle();
        let (last, ended) = match ran {
            Ok(()) => self.end(machine),
            Err(error) => (machine.progress(), Err(error)),
        };
        let (plugged, unplugged) = blocks.counts();
        let mut summary = lock(&self.state().summary);
        summary.observations += seen.observations;
        for (reason, count) in &seen.reasons {
            summary.add_reason(*reason, *count);
        }
        summary.most_unmovable = summary.most_unmovable.max(seen.most_unmovable);
        summary.blocks_plugged += plugged;
        summary.blocks_unplugged += unplugged;
        summary.add_life(&last, &handle.latencies());
        for (fault, count) in injector.counts() {
            summary.add_fault(fault, count);
        }
        let mut live = lock(&self.state().live);
        live.blocks_plugged = summary.blocks_plugged;
        live.blocks_unplugged = summary.blocks_unplugged;
        live.pages_verified = summary.pages_verified;
        drop((summary, live, handle));
        ended?;
        self.alone(|| before.nothing_leaked())
    }

    /// Resizes a guest that is observed, and for which things go wrong meanwhile.
    fn attended(
        &mut self,
        machine: &Machine,
        observer: &Observer<'_>,
        injector: &Injector,
    ) -> (Seen, Result<(), DemoError>) {
        let over = Stop::default();
        let (shared, vm) = (self.shared, self.vm);
        let (observer_name, injector_name) = (
            format!("vmem-observer{}", self.vm),
            format!("vmem-injector{}", self.vm),
        );
        // Whoever finds something wrong says so at once: the operator may be waiting for what does not come.
        let tell = |result: Result<(), DemoError>| {
            if let Err(source) = result {
                shared.fail(Some(vm), source);
            }
        };
        let mut seen = Seen::default();
        let ran = thread::scope(|scope| {
            let observing =
                thread::Builder::new()
                    .name(observer_name)
                    .spawn_scoped(scope, || {
                        let _raises = shared.stop.by_panic();
                        tell(observer.run(&over, &mut seen));
                    })?;
            let injecting = thread::Builder::new()
                .name(injector_name)
                .spawn_scoped(scope, || {
                    let _raises = shared.stop.by_panic();
                    tell(injector.run(machine, &over));
                })
                .inspect_err(|_| over.raise())?;
            let operated = self.operate(machine, injector);
            over.raise();
            let joined = [
                ("injector", injecting.join()),
                ("observer", observing.join()),
            ];
            let panicked = joined.iter().find(|(_, joined)| joined.is_err());
            if let Some((thread, _)) = panicked {
                return Err(io::Error::other(format!("the {thread}'s thread has panicked")).into());
            }
            operated
        });
        (seen, ran)
    }

    /// Resizes until the life is over or it is enough, and comes to rest without memory.
    fn operate(&mut self, machine: &Machine, injector: &Injector) -> Result<(), DemoError> {
        let begun = Census::take()?;
        for _ in 0..self.life_len() {
            if !self.shared.goes_on() || !self.shared.next_resize() {
                break;
            }
            let Some(Move { target, then }) = self.moves.next() else {
                break;
            };
            lock(&self.state().live).resizes += 1;
            lock(&self.state().summary).resizes += 1;
            self.resize(machine, target)?;
            match then {
                Then::Rest => self.rest(machine, injector, begun)?,
                Then::Leave(after) => {
                    self.shared.stop.wait(after);
                }
            }
        }
        if !self.shared.goes_on() {
            return Ok(());
        }
        // A rogue guest needs something to reach for.
        let last = match self.shared.options.rogue {
            true => self.target / 2 / self.granule_size() * self.granule_size(),
            false => 0,
        };
        self.resize(machine, last)?;
        self.rest(machine, injector, begun)
    }

    fn resize(&mut self, machine: &Machine, target: u64) -> Result<(), DemoError> {
        let granule_size = self.granule_size();
        let target = self.shared.budget.grant(self.vm, target, granule_size);
        self.target = target;
        self.state().asked.store(target, Ordering::Relaxed);
        let asked = machine.handle().resize(target);
        asked.map_err(|error| DemoError::Options(error.to_string()))?;
        // From now on the device lets nothing be plugged beyond the target.
        let plugged = machine.handle().status().plugged_size;
        self.shared.budget.settle(self.vm, target.max(plugged));
        Ok(())
    }

    /// Waits until the guest has settled on the target. `None` if the run is to end before.
    fn settle(&self, machine: &Machine) -> Result<Option<Report>, DemoError> {
        let failed = |source| DemoError::Guest {
            target: demo::size(self.target),
            source,
        };
        let limit = self.shared.options.stuck_after.max(LATE);
        let mut answered = Instant::now();
        while self.shared.goes_on() {
            match machine.report(REPORT_INTERVAL) {
                Ok(report) => {
                    answered = Instant::now();
                    match report.driver_state {
                        Some(DriverState::Failed) => {
                            let message = report.message.unwrap_or_default();
                            return Err(failed(ReportError::DriverFailed(message)));
                        }
                        Some(DriverState::Settled) if report.requested_size == self.target => {
                            return Ok(Some(report));
                        }
                        _ => {}
                    }
                }
                Err(ReportError::Late(_)) if answered.elapsed() < limit => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(None)
    }

    /// Waits for the guest and checks everything.
    fn rest(&self, machine: &Machine, injector: &Injector, begun: Census) -> Result<(), DemoError> {
        if self.settle(machine)?.is_none() {
            return Ok(());
        }
        let _quiet = injector.quiet();
        // What went wrong just now may have led to something.
        let Some(report) = self.settle(machine)? else {
            return Ok(());
        };
        self.shared.budget.settle(self.vm, self.target);
        let expected = Expected {
            plan: &self.shared.plan,
            target: self.target,
            plugged: self.target,
            host_failures: injector.struck(),
        };
        // Whatever was plugged: what is not now has gone back to the host.
        checks::step(machine.device(), &expected, u64::MAX, &report)?;
        no_slot_leaked(machine.device(), machine.slots())?;
        no_mapping_leaked(machine.device())?;
        self.alone(|| begun.nothing_leaked_but_mappings())?;
        lock(&self.state().live).rests += 1;
        lock(&self.state().summary).rests += 1;
        Ok(())
    }

    /// Ends the guest; what it said last, and whether it ended as it should.
    fn end(&self, mut machine: Machine) -> (Report, Result<(), DemoError>) {
        if self.shared.stop.is_raised() {
            // Something is wrong already, and not to be covered by what follows from it.
            return (machine.progress(), Ok(()));
        }
        if self.shared.options.rogue && self.shared.goes_on() {
            let (handle, last) = (machine.handle(), machine.progress());
            let caught = demo::go_rogue(machine, &handle).map(|_| {
                lock(&self.state().summary).rogues += 1;
                self.shared.budget.settle(self.vm, 0);
            });
            return (last, caught);
        }
        let ended = demo::end(&mut machine).map(|_| ());
        (machine.progress(), ended)
    }

    fn granule_size(&self) -> u64 {
        self.shared.plan.sizes.granule_size
    }

    fn life_len(&mut self) -> u64 {
        match self.shared.options.rogue {
            true => self.random.u64(1..=ROGUE_LIFE),
            false => LIFE,
        }
    }

    /// Compares what the process holds with what it held before, if no other guest comes or goes at the same time.
    fn alone(&self, compare: impl FnOnce() -> Result<(), LeakError>) -> Result<(), DemoError> {
        match self.shared.options.vm_count {
            1 => Ok(compare()?),
            _ => Ok(()),
        }
    }
}

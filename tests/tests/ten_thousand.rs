//! Ten thousand resizes: our driver and our device in one thread, under load, with everything going wrong that can.
//!
//! After every resize the driver has converged, or says why not, and the reason is true; device, driver and hotplug
//! core agree about every block; every page in use has its tag; and nothing but plugged memory was touched on the way.
//! Each machine follows from its seed alone, so a failure can be had again.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use integration_tests::random::{Random, from_environment, seed};
use integration_tests::rig::bus::Hits;
use integration_tests::rig::host::HostStep;
use integration_tests::rig::load::Load;
use integration_tests::rig::{Case, Rig};
use virtio_mem_driver::driver::{
    Failure, Mode, Policy, ProbeError, Progress, Stall, Strategy, Suspend, SuspendError,
};
use virtio_mem_driver::hotplug::{
    BlockState, Error, Fault, MemmapOnMemory, MemoryAction, MemoryEvent, Mobility, OnlineType,
    Profile, Step,
};
use vmm_harness::layout::REGION_START;

const MIB: u64 = 1 << 20;

const RESIZES: u64 = 10_000;
const RESIZES_OF_A_MACHINE: u64 = 100;

/// After so many tries in which nothing has moved a driver may give up for now.
const TRIES_IN_VAIN: u32 = 16;

/// What has happened how often.
type Coverage = BTreeMap<String, u64>;

/// What goes wrong during a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// The device is frozen, and thaws in the middle of it or not.
    Freeze {
        thaw: bool,
    },
    /// Steps of the host fail.
    Host(HostStep, u64),
    /// The target is lower when PLUG requests arrive.
    Refuse(u64),
    /// Requests are damaged on the way.
    Damage(u64),
    /// A request is lost.
    Lose,
    /// The device needs a reset.
    Break,
    /// The configuration does not come to rest.
    Restless(u64),
    /// A step of the hotplug core fails.
    Core(Fault),
    /// Nothing may go offline.
    Veto,
    /// The target changes on the way.
    Retarget,
    /// The driver is removed on the way, and comes back.
    Reprobe,
}

impl Trouble {
    fn random(random: &mut Random) -> Self {
        let times = random.pick(&[1, 1, 2, 30]);
        match random.below(28) {
            0 => Self::Freeze { thaw: true },
            1 => Self::Freeze { thaw: false },
            2..=5 => Self::Host(random.pick(&HostStep::ALL).0, times),
            6 => Self::Refuse(times),
            7 => Self::Damage(1 + random.below(2)),
            8 if random.one_in(2) => Self::Lose,
            9 if random.one_in(2) => Self::Break,
            10 => Self::Restless(random.pick(&[3, 1 << 40])),
            11..=14 | 24..=26 => {
                let step = random.pick(&Step::ALL);
                Self::Core(Fault {
                    step,
                    skip: u32::try_from(random.below(4)).unwrap(),
                    error: match step {
                        Step::Isolate | Step::Commit | Step::PrepareOnline => Error::Busy,
                        Step::Resource => Error::Invalid,
                        Step::MemoryBlock => Error::Exists,
                        _ => Error::NoMemory,
                    },
                })
            }
            15 => Self::Veto,
            16 => Self::Retarget,
            17 | 27 => Self::Reprobe,
            _ => Self::Nothing,
        }
    }
}

/// A machine under load.
struct World {
    rig: Rig,
    rest: Rest,
}

/// All but the machine itself.
struct Rest {
    random: Random,
    load: Load,
    trouble: Trouble,
    veto: Arc<AtomicBool>,
    /// How often that was used.
    vetoes: Arc<AtomicBool>,
    /// What a driver recovers from a few times, since it last settled.
    damaged: u64,
    reset: u64,
    /// Nothing changes any more while the driver tries.
    calm: bool,
    coverage: Coverage,
    history: History,
}

/// Tells how to have a failure again.
struct History {
    case: Case,
    seed: u64,
    resizes: u64,
    last: VecDeque<String>,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for event in &self.last {
                eprintln!("  {event}");
            }
            eprintln!(
                "VMEM_SEED={} VMEM_OPERATIONS={} cargo test -p integration-tests --test ten_thousand resizes: {}",
                self.seed, self.resizes, self.case
            );
        }
    }
}

impl History {
    fn note(&mut self, event: String) {
        if self.last.len() == 30 {
            self.last.pop_front();
        }
        self.last.push_back(event);
    }
}

/// Profile, strategy and mode of each kind of machine.
fn kinds() -> Vec<((&'static str, Profile), Strategy, Mode)> {
    let mut kinds = Vec::new();
    for profile in Profile::ALL {
        for strategy in [Strategy::Linux, Strategy::Direct] {
            for mode in [Mode::SubBlock, Mode::BigBlock] {
                let sub_blocks = profile.1.memory_block_size() / profile.1.pageblock_size();
                if mode == Mode::BigBlock || sub_blocks > 1 {
                    kinds.push((profile, strategy, mode));
                }
            }
        }
    }
    kinds
}

fn kind_name((profile, _): (&str, Profile), strategy: Strategy, mode: Mode) -> String {
    format!("machine: {profile} {strategy:?} {mode:?}")
}

/// The machine of a seed: seeds in a row are machines of all kinds.
fn case(seed: u64, random: &mut Random) -> Case {
    let kinds = kinds();
    let (profile, strategy, mode) = kinds[usize::try_from(seed % kinds.len() as u64).unwrap()];
    let memory_block = profile.1.memory_block_size();
    let block_size = match mode {
        Mode::SubBlock => {
            let most = memory_block / 2;
            random
                .pick(&[MIB / 16, MIB, 2 * MIB, 4 * MIB, 64 * MIB])
                .min(most)
        }
        Mode::BigBlock => random.pick(&[MIB, 4 * MIB, memory_block, 2 * memory_block]),
    };
    let auto_online = random.pick(&[
        Some(OnlineType::Movable),
        Some(OnlineType::Movable),
        Some(OnlineType::Movable),
        Some(OnlineType::Kernel),
        Some(OnlineType::Online),
        None,
    ]);
    let memory_blocks = match auto_online {
        // More than may lie around offline.
        None => (1536 * MIB).div_ceil(memory_block) + 2,
        Some(_) => 2 * (1 + random.below(3)),
    };
    let policy = Policy {
        strategy,
        unplug_online: !random.one_in(12),
        force_bbm: mode == Mode::BigBlock,
        bbm_block_size: match mode {
            Mode::BigBlock if random.one_in(2) => 2 * memory_block,
            _ => 0,
        },
        auto_online,
    };
    let shift = match random.one_in(3) {
        true if block_size <= memory_block / 2 => memory_block / 2,
        _ => 0,
    };
    Case {
        profile,
        policy,
        block_size,
        region: (
            REGION_START + shift,
            (memory_blocks * memory_block).next_multiple_of(block_size),
        ),
        boot_ram: random.one_in(2),
        memmap_on_memory: random.pick(&[
            MemmapOnMemory::Off,
            MemmapOnMemory::On,
            MemmapOnMemory::Force,
        ]),
        unplugged_inaccessible: !random.one_in(3),
        persistent_suspend: random.one_in(2),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let case = case(seed, &mut random);
        let mut world = Self {
            rig: Rig::new(case),
            rest: Rest {
                random,
                load: Load::default(),
                trouble: Trouble::Nothing,
                veto: Arc::default(),
                vetoes: Arc::default(),
                damaged: 0,
                reset: 0,
                calm: false,
                coverage: Coverage::new(),
                history: History {
                    case,
                    seed,
                    resizes: 0,
                    last: VecDeque::new(),
                },
            },
        };
        world.rest.watch(&mut world.rig);
        let kind = kind_name(case.profile, case.policy.strategy, world.rig.mode());
        world.rest.count(&kind);
        world
    }

    /// One resize, to the end.
    fn resize(&mut self) {
        self.rest.history.resizes += 1;
        let Self { rig, rest } = self;
        rest.change_load(rig);
        rest.act_as_user_space(rig);
        if rig.handle.status().plugged_size == 0 && rest.random.one_in(8) {
            rest.reprobe(rig);
        }
        rest.trouble = Trouble::random(&mut rest.random);
        rig.bus.hold(rest.random.one_in(2));
        let target = rest.target(rig);
        rest.note(format!(
            "resize to {target:#x} from {:#x}, {:?}, {} pages in use",
            rig.handle.status().plugged_size,
            rest.trouble,
            rest.load.len()
        ));
        rest.arm(rig);
        drop(rig.handle.resize(target).unwrap());
        rest.suspend(rig);
        self.converge();
        // Once more, without what has gone wrong.
        if self.rest.trouble != Trouble::Nothing {
            self.rest.disarm(&mut self.rig);
            self.converge();
        }
    }

    /// Lets the driver get as far as it can, and checks that it is right about it.
    fn converge(&mut self) {
        self.rest.calm = false;
        let progress = self.try_converge();
        let Self { rig, rest } = self;
        rest.note(format!(
            "{progress:?} at {:#x}",
            rig.handle.status().plugged_size
        ));
        rig.check_quiet(progress);
        rest.load.verify(&mut rig.hotplug, &rig.shadow);
        if rest.random.one_in(8) {
            rig.check_resident();
        }
        match progress {
            Progress::Settled => {
                rest.damaged = 0;
                rest.reset = 0;
                rest.count("settled");
            }
            Progress::Stalled { reason, .. } => {
                rest.explain(rig, reason);
                rest.count("gave up for now");
            }
            Progress::Failed(failure) => {
                rest.explain_failure(rig, failure);
                rest.count(&format!("failed: {}", name_of(&failure)));
                rest.reboot(rig);
            }
            other => panic!("{other:?} is no end"),
        }
    }

    fn try_converge(&mut self) -> Progress {
        let mut before = None;
        let mut in_vain = 0;
        loop {
            let Self { rig, rest } = self;
            let progress = rig.run(|rig| rest.meanwhile(rig));
            let Progress::Stalled {
                reason,
                retry_at_ms,
            } = progress
            else {
                return progress;
            };
            rest.count(&format!("stall: {}", name_of(&reason)));
            // What goes wrong a few times only is over some time. A configuration may be restless for ever.
            let hits = Hits {
                restless: 0,
                ..rig.bus.hits()
            };
            let plugged_size = rig.driver().plugged_size();
            let now = (reason, plugged_size, hits, rig.host.hits());
            in_vain = match before.replace(now) == Some(now) {
                true => in_vain + 1,
                false => 0,
            };
            rest.calm |= in_vain > 0;
            match retry_at_ms {
                Some(at) if in_vain < TRIES_IN_VAIN => rig.now_ms = at,
                _ => return progress,
            }
        }
    }

    /// Everything goes, and nothing is left.
    fn end(mut self) -> Coverage {
        let Self { rig, rest } = &mut self;
        rest.load.clear(&mut rig.hotplug, &rig.shadow);
        rig.driver_and_memory().0.set_unplug_online(true);
        rig.case.policy.unplug_online = true;
        rest.calm = true;
        drop(rig.handle.resize(0).unwrap());
        let progress = self.try_converge();
        let Self { rig, rest } = &mut self;
        rig.check_quiet(progress);
        match progress {
            Progress::Settled => {
                assert_eq!(rig.handle.status().plugged_size, 0);
                rest.veto.store(false, Ordering::Relaxed);
                rig.check_nothing_is_left();
                rest.count("ended with nothing left");
            }
            Progress::Stalled { reason, .. } => {
                rest.explain(rig, reason);
                rest.count("ended with metadata in the way");
            }
            other => panic!("{other:?} is no end"),
        }
        self.rest.coverage
    }
}

impl Rest {
    fn count(&mut self, what: &str) {
        *self.coverage.entry(what.to_owned()).or_default() += 1;
    }

    fn note(&mut self, event: String) {
        self.history.note(event);
    }

    /// Somebody who may object to memory going offline.
    fn watch(&self, rig: &mut Rig) {
        let (veto, vetoes) = (Arc::clone(&self.veto), Arc::clone(&self.vetoes));
        let notifier = move |event: &MemoryEvent| {
            if event.action == MemoryAction::GoingOffline && veto.load(Ordering::Relaxed) {
                vetoes.store(true, Ordering::Relaxed);
                return Err(Error::Busy);
            }
            Ok(())
        };
        rig.hotplug.register_notifier(1, Box::new(notifier));
    }

    /// A size of whole blocks.
    fn target(&mut self, rig: &Rig) -> u64 {
        let geometry = rig.handle.geometry();
        match self.random.below(8) {
            0 => 0,
            1 => geometry.region_size(),
            2 => {
                // A little more or less.
                let now = rig.handle.status().plugged_size;
                let step = rig.driver().granule_size() * (1 + self.random.below(4));
                match self.random.one_in(2) {
                    true => (now + step).min(geometry.region_size()),
                    false => now.saturating_sub(step),
                }
            }
            _ => geometry.bytes(self.random.below(geometry.block_count() + 1)),
        }
    }

    fn change_load(&mut self, rig: &mut Rig) {
        if self.random.one_in(4) {
            self.load.unpin(&mut rig.hotplug);
        }
        let most = self.random.pick(&[0, 40, 400]);
        self.load
            .free(&mut rig.hotplug, &rig.shadow, most, &mut self.random);
        let count = self.random.below(300);
        self.allocate(rig, count, Mobility::Movable);
        if self.random.one_in(6) {
            self.allocate(rig, 1, Mobility::Unmovable);
        }
        if self.random.one_in(6) && self.load.pin(&mut rig.hotplug, &mut self.random) {
            self.count("pages pinned");
        }
    }

    fn allocate(&mut self, rig: &mut Rig, count: u64, mobility: Mobility) {
        let got = self
            .load
            .allocate(&mut rig.hotplug, &rig.shadow, count, mobility);
        *self
            .coverage
            .entry(format!("pages: {mobility:?}"))
            .or_default() += got;
    }

    /// A memory block goes online or offline by hand.
    fn act_as_user_space(&mut self, rig: &mut Rig) {
        if !self.random.one_in(4) {
            return;
        }
        let blocks: Vec<_> = rig.hotplug.blocks().filter(|block| !block.early).collect();
        if blocks.is_empty() {
            return;
        }
        let block = self.random.pick(&blocks);
        let online_type = self.random.pick(&[OnlineType::Kernel, OnlineType::Movable]);
        let result = match block.state {
            BlockState::Offline => rig.hotplug.online(block.id, online_type),
            _ => rig.hotplug.offline(block.id),
        };
        let what = match (block.state, result) {
            (_, Err(_)) => "by hand: refused",
            (BlockState::Offline, Ok(())) => "by hand: online",
            (_, Ok(())) => "by hand: offline",
        };
        self.count(what);
    }

    fn arm(&mut self, rig: &mut Rig) {
        match self.trouble {
            Trouble::Nothing | Trouble::Retarget | Trouble::Reprobe => {}
            Trouble::Freeze { .. } => rig.handle.freeze(),
            Trouble::Host(step, times) => rig.host.arm(step, times),
            Trouble::Refuse(times) => rig.bus.refuse(times),
            Trouble::Damage(times) => rig.bus.damage(times),
            Trouble::Lose => rig.bus.lose(1),
            Trouble::Break => {}
            Trouble::Restless(reads) => rig.bus.make_restless(reads),
            Trouble::Core(fault) => rig.hotplug.inject(fault),
            Trouble::Veto => self.veto.store(true, Ordering::Relaxed),
        }
    }

    /// Ends the trouble, and counts what came of it.
    fn disarm(&mut self, rig: &mut Rig) {
        match self.trouble {
            Trouble::Host(step, _) => {
                let (_, name) = HostStep::ALL.into_iter().find(|(s, _)| *s == step).unwrap();
                *self.coverage.entry(name.to_owned()).or_default() += rig.host.disarm();
            }
            Trouble::Core(fault) if rig.hotplug.clear_faults() == 0 => {
                self.count(&format!("core: {:?}", fault.step));
            }
            Trouble::Freeze { .. } => rig.handle.thaw(),
            Trouble::Veto => {
                self.veto.store(false, Ordering::Relaxed);
                if self.vetoes.swap(false, Ordering::Relaxed) {
                    self.count("vetoes");
                }
            }
            _ => {}
        }
        let Hits {
            lost,
            damaged,
            refused,
            restless,
            needed_reset,
        } = rig.bus.disarm();
        for (name, hits) in [
            ("requests lost", lost),
            ("requests damaged: ERROR", damaged),
            ("requests refused: NACK", refused),
            ("restless configurations", restless),
            ("resets needed", needed_reset),
        ] {
            *self.coverage.entry(name.to_owned()).or_default() += hits;
        }
        self.damaged += damaged;
        self.reset += lost + needed_reset;
        self.trouble = Trouble::Nothing;
    }

    /// Before each step of the driver.
    fn meanwhile(&mut self, rig: &mut Rig) {
        if self.calm || !self.random.one_in(30) {
            return;
        }
        match self.trouble {
            Trouble::Freeze { thaw: true } if self.random.one_in(2) => {
                if rig.handle.status().frozen {
                    rig.handle.thaw();
                    self.count("thawed on the way");
                }
            }
            Trouble::Break => {
                self.trouble = Trouble::Nothing;
                rig.bus.break_device();
            }
            Trouble::Retarget if self.random.one_in(2) => {
                let target = self.target(rig);
                self.note(format!("target {target:#x}"));
                drop(rig.handle.resize(target).unwrap());
                self.count("targets changed on the way");
            }
            Trouble::Reprobe => {
                self.trouble = Trouble::Nothing;
                self.reprobe(rig);
            }
            _ => match self.random.below(3) {
                0 => {
                    let count = self.random.below(20);
                    self.allocate(rig, count, Mobility::Movable);
                }
                1 => self
                    .load
                    .free(&mut rig.hotplug, &rig.shadow, 20, &mut self.random),
                _ => rig.driver_and_memory().0.on_interrupt(),
            },
        }
    }

    /// The driver goes and comes back.
    fn reprobe(&mut self, rig: &mut Rig) {
        let removed = rig.remove_driver().unwrap();
        self.note(format!("driver removed, {removed}"));
        match rig.probe() {
            Ok(()) => {
                let again = match removed.added_size {
                    0 => "probed again with nothing added",
                    _ => "probed again with memory added",
                };
                self.count(again);
            }
            Err(ProbeError::MemoryAdded { bytes }) => {
                assert_eq!(rig.strategy(), Strategy::Linux);
                assert_eq!(bytes, removed.added_size);
                self.count("probe refused with memory added");
                self.reboot(rig);
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Another guest comes, to a device that has kept its blocks or not.
    fn reboot(&mut self, rig: &mut Rig) {
        rig.handle.thaw();
        self.load.forget();
        let system_reset = self.random.one_in(2);
        let kept = !system_reset && rig.handle.status().plugged_size > 0;
        rig.reboot(system_reset);
        self.watch(rig);
        self.note(format!("rebooted, blocks kept: {kept}"));
        self.count(match kept {
            true => "rebooted with blocks plugged",
            false => "rebooted with nothing plugged",
        });
    }

    /// Sleeps now and then.
    fn suspend(&mut self, rig: &mut Rig) {
        // A driver that wakes up has to read the configuration.
        if matches!(self.trouble, Trouble::Restless(_)) || !self.random.one_in(12) {
            return;
        }
        let kind = self.random.pick(&[Suspend::Idle, Suspend::Ram]);
        let persistent = rig.case.persistent_suspend;
        let plugged_size = rig.handle.status().plugged_size;
        let now_ms = rig.now_ms;
        let (driver, hotplug) = rig.driver_and_memory();
        match driver.suspend(hotplug, kind) {
            Ok(()) => {
                assert_eq!(driver.poll(hotplug, now_ms), Progress::Suspended);
                driver.resume().unwrap();
                self.count("suspended");
            }
            Err(SuspendError::MemoryPlugged { .. }) => {
                assert!(kind == Suspend::Ram && !persistent && plugged_size > 0);
                self.count("suspend refused");
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// The reason for which the driver does not get on must be true.
    fn explain(&self, rig: &Rig, reason: Stall) {
        let (hits, status) = (rig.bus.hits(), rig.handle.status());
        let true_reason = match reason {
            Stall::DeviceBusy => status.frozen || rig.host.hits() > 0,
            Stall::Refused => hits.refused > 0,
            Stall::NoSpace => rig.strategy() == Strategy::Linux && rig.free_granules() == 0,
            Stall::MemoryInUse => self.memory_is_in_use(rig),
            Stall::NoMemory => rig.case.boot_ram,
            Stall::NotAdded(_) => false,
            Stall::NotRemoved => self.vetoes.load(Ordering::Relaxed),
            Stall::OfflineThreshold => rig.is_too_much_offline(),
            Stall::ConfigUnstable => rig.bus.is_armed() && hits.restless > 0,
        };
        let blocks: Vec<_> = rig.hotplug.blocks().collect();
        assert!(
            true_reason,
            "{reason}: that is not so\n{:?}\n{blocks:?}",
            rig.driver()
        );
    }

    /// Whether there can be memory that cannot be emptied.
    fn memory_is_in_use(&self, rig: &Rig) -> bool {
        let metadata = rig.case.boot_ram && rig.has_kernel_memory();
        let vetoed = self.vetoes.load(Ordering::Relaxed);
        match rig.strategy() {
            Strategy::Linux => !self.load.is_empty() || metadata || vetoed,
            Strategy::Direct => self.load.fixed() > 0 || metadata || self.no_room(rig),
        }
    }

    /// Whether what is to stay is too small for all pages in use.
    fn no_room(&self, rig: &Rig) -> bool {
        let granule = rig.driver().granule_size();
        let stays = rig.handle.status().requested_size / granule * granule;
        let pages = stays / rig.hotplug.profile().page_size();
        self.load.len() as u64 > pages
    }

    /// So must the reason for which it has given up.
    fn explain_failure(&self, rig: &Rig, failure: Failure) {
        let hits = rig.bus.hits();
        let damaged = self.damaged + hits.damaged;
        let reset = self.reset + hits.lost + hits.needed_reset;
        let core = matches!(self.trouble, Trouble::Core(..));
        let linux = rig.strategy() == Strategy::Linux;
        let true_reason = match failure {
            // Direct starts anew once, and after resets more often.
            Failure::Answer { .. } => damaged > 0 && (linux || damaged + reset > 1),
            Failure::NeedsReset => linux && self.history.last.iter().any(|e| e.contains("Break")),
            Failure::AnswerTimeout => linux && hits.lost > 0,
            Failure::Hotplug { .. } => linux && core,
            _ => false,
        };
        assert!(true_reason, "{failure}: that is not so");
    }
}

/// The name of a variant.
fn name_of(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find([' ', '(', '{']).unwrap_or(text.len());
    text[..end].to_owned()
}

fn run(seed: u64, resizes: u64) -> (Coverage, u64) {
    let mut world = World::new(seed);
    for _ in 0..resizes {
        world.resize();
    }
    let digest = world.rig.bus.digest();
    (world.end(), digest)
}

#[test]
fn resizes_converge_or_say_why_not() {
    let seed = seed();
    let mut left = from_environment("VMEM_OPERATIONS", RESIZES);
    let all = left >= RESIZES;
    let mut coverage = Coverage::new();
    for machine in 0.. {
        let resizes = left.min(RESIZES_OF_A_MACHINE);
        left -= resizes;
        if resizes == 0 {
            break;
        }
        let (counted, _) = run(seed.wrapping_add(machine), resizes);
        for (what, times) in counted {
            *coverage.entry(what).or_default() += times;
        }
    }
    for (what, times) in &coverage {
        println!("{times:>8} {what}");
    }
    if all {
        assert_covered(&coverage);
    }
}

/// Everything has happened.
fn assert_covered(coverage: &Coverage) {
    let mut expected: Vec<String> = kinds()
        .into_iter()
        .map(|(profile, strategy, mode)| kind_name(profile, strategy, mode))
        .collect();
    expected.extend(HostStep::ALL.map(|(_, name)| name.to_owned()));
    expected.extend(Step::ALL.map(|step| format!("core: {step:?}")));
    let stalls = [
        Stall::DeviceBusy,
        Stall::Refused,
        Stall::NoSpace,
        Stall::MemoryInUse,
        Stall::NoMemory,
        Stall::NotAdded(Error::Exists),
        Stall::NotRemoved,
        Stall::OfflineThreshold,
        Stall::ConfigUnstable,
    ];
    expected.extend(stalls.map(|stall| format!("stall: {}", name_of(&stall))));
    // The others need a device that breaks the rules.
    let failures = ["Answer", "NeedsReset", "AnswerTimeout", "Hotplug"];
    expected.extend(failures.map(|failure| format!("failed: {failure}")));
    expected.extend(
        [
            "requests lost",
            "requests damaged: ERROR",
            "requests refused: NACK",
            "restless configurations",
            "resets needed",
            "vetoes",
            "thawed on the way",
            "targets changed on the way",
            "probed again with nothing added",
            "probed again with memory added",
            "probe refused with memory added",
            "rebooted with blocks plugged",
            "rebooted with nothing plugged",
            "suspended",
            "suspend refused",
            "by hand: online",
            "by hand: offline",
            "pages: Movable",
            "pages: Unmovable",
            "pages pinned",
            "settled",
            "gave up for now",
            "ended with nothing left",
        ]
        .map(str::to_owned),
    );
    let missing: Vec<_> = expected
        .iter()
        .filter(|what| !coverage.contains_key(*what))
        .collect();
    assert!(missing.is_empty(), "never: {missing:?}");
    let zero: Vec<_> = expected
        .iter()
        .filter(|what| coverage[*what] == 0)
        .collect();
    assert!(zero.is_empty(), "never: {zero:?}");
}

#[test]
fn same_seed_is_the_same_run() {
    let seed = seed();
    for machine in 0..4 {
        let seed = seed.wrapping_add(machine * 7);
        let digests = [run(seed, 20), run(seed, 20)];
        assert_eq!(digests[0], digests[1]);
    }
    assert_ne!(run(seed, 20).1, run(seed + 26, 20).1);
}

//! Who makes things go wrong, at times that follow from the seed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;
use virtio_mem_wire::{Answer, RequestKind};

use super::stop::Stop;
use super::watch::WITH_A_REASON;
use super::{StressOptions, lock};
use crate::Machine;
use crate::demo::checks::check;
use crate::demo::{CheckFailed, DemoError};
use crate::faults::{Faults, HostCall};

/// Longest time between two faults.
const GAP: Duration = Duration::from_millis(60);

/// Most times requests are held off in a storm, and for how long each time at the most.
const STORM: (u64, Duration) = (8, Duration::from_millis(5));

/// Longest time a vCPU does not run.
const STALL: Duration = Duration::from_millis(40);

/// How long a host call that is to fail may not come.
const ARMED: Duration = Duration::from_millis(50);

/// Something to go wrong. Its name is that of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The host does not make memory accessible.
    Open,
    /// The host does not take memory back.
    Discard,
    /// The hypervisor does not create or remove a memory slot.
    Slot,
    /// Requests are held off in bursts.
    Busy,
    /// A vCPU does not run for some milliseconds; on KVM only.
    Stall,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Makes things go wrong in one life of a guest.
#[derive(Debug)]
pub(super) struct Injector {
    kinds: Vec<Fault>,
    faults: Faults,
    vcpu_count: usize,
    /// How long the device may take to undo something.
    limit: Duration,
    /// Locked while something is wrong.
    random: Mutex<fastrand::Rng>,
    /// Of each of the kinds.
    counts: Vec<AtomicU64>,
}

impl Injector {
    /// For a guest of `options` whose host fails by `faults`.
    pub(super) fn new(options: &StressOptions, seed: u64, faults: Faults) -> Self {
        Self {
            kinds: options.faults.clone(),
            faults,
            vcpu_count: options.guest.vcpu_count,
            limit: options.stuck_after.saturating_mul(WITH_A_REASON),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            counts: options.faults.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Injects until `over` is raised, and leaves nothing wrong.
    pub(super) fn run(&self, machine: &Machine, over: &Stop) -> Result<(), DemoError> {
        let gap = || below(&mut lock(&self.random), GAP);
        while !self.kinds.is_empty() && !over.wait(gap()) {
            let mut random = lock(&self.random);
            let index = random.usize(0..self.kinds.len());
            let fault = self.kinds[index];
            let struck = match fault {
                Fault::Open => self.host_call(machine, HostCall::Open, over)?,
                Fault::Discard => self.host_call(machine, HostCall::Discard, over)?,
                Fault::Slot => self.host_call(machine, HostCall::Slot, over)?,
                Fault::Busy => storm(machine, &mut random, over),
                Fault::Stall => {
                    let vcpu = random.usize(0..self.vcpu_count);
                    stall(machine, vcpu, below(&mut random, STALL), over)
                }
            };
            self.counts[index].fetch_add(u64::from(struck), Ordering::Relaxed);
            let failure = machine.handle().status().failure;
            check("device-has-not-failed", failure.is_none(), || {
                format!("after {fault}: {failure:?}")
            })?;
        }
        Ok(())
    }

    /// While this is held nothing goes wrong.
    pub(super) fn quiet(&self) -> MutexGuard<'_, fastrand::Rng> {
        lock(&self.random)
    }

    /// Host calls that have failed.
    pub(super) fn struck(&self) -> u64 {
        self.faults.struck()
    }

    /// How often each fault has occurred.
    pub(super) fn counts(&self) -> impl Iterator<Item = (Fault, u64)> {
        let counts = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        self.kinds
            .iter()
            .copied()
            .zip(counts)
            .filter(|(_, n)| *n > 0)
    }

    /// Lets the next call of the host fail; whether one came. The device has then undone it, and the driver hears that
    /// it may try again.
    fn host_call(
        &self,
        machine: &Machine,
        call: HostCall,
        over: &Stop,
    ) -> Result<bool, CheckFailed> {
        let handle = machine.handle();
        let before = self.faults.struck();
        self.faults.arm(call);
        let mut waited = Duration::ZERO;
        let pause = Duration::from_millis(1);
        while self.faults.struck() == before && waited < ARMED && !over.wait(pause) {
            waited += pause;
        }
        self.faults.disarm();
        let struck = self.faults.struck();
        // Until the device has counted it, it may be undoing what came before: that is not to fail as well.
        let waiting = Instant::now();
        while handle.counters().host_failures < struck && !over.wait(pause) {
            check(
                "host-failures-are-counted",
                waiting.elapsed() <= self.limit,
                || format!("{struck} calls have failed: {:?}", handle.counters()),
            )?;
        }
        handle.retry();
        Ok(struck > before)
    }
}

fn below(random: &mut fastrand::Rng, duration: Duration) -> Duration {
    Duration::from_micros(random.u64(0..duration.as_micros() as u64))
}

/// Whether a request has come into it.
fn storm(machine: &Machine, random: &mut fastrand::Rng, over: &Stop) -> bool {
    let handle = machine.handle();
    let held_off = || -> u64 {
        let counters = handle.counters();
        let busy = RequestKind::ALL.map(|kind| counters.requests(kind, Answer::Busy));
        busy.iter().sum()
    };
    let before = held_off();
    for _ in 0..random.u64(1..=STORM.0) {
        handle.freeze();
        over.wait(below(random, STORM.1));
        handle.thaw();
        over.wait(below(random, STORM.1));
    }
    held_off() > before
}

fn stall(machine: &Machine, vcpu: usize, duration: Duration, over: &Stop) -> bool {
    let held = machine.hold(vcpu);
    over.wait(duration);
    machine.release(vcpu);
    held
}

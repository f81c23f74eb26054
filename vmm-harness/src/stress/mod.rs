//! `vmem stress`: guests that work in their memory while it is resized all the time, checked all the time.
//!
//! Each guest has three threads on the host's side besides its own:
//!
//! | thread | does | file |
//! |---|---|---|
//! | operator | resizes by a pattern, and checks everything where that lets the guest settle | `operator.rs`, `pattern.rs` |
//! | observer | samples, and checks what must hold at any time | `observer.rs`, `watch.rs` |
//! | injector | makes things go wrong, if asked to | `injector.rs`, [`faults`](crate::faults) |
//!
//! A guest lives for some hundred resizes and is then ended, all its pages verified; what the process holds then is
//! compared with what it held before.
//!
//! Sizes, waits and faults, and the moments these are tried at, follow from the seed, and so does what the guest
//! chooses. What does not is the timing of threads: where a resize is when the next one comes, which request a fault
//! hits, which pages a worker has when blocks go, and what is granted to whom under a budget.

mod blocks;
mod budget;
mod census;
mod injector;
mod observer;
mod operator;
mod pattern;
mod record;
mod series;
mod stop;
mod summary;
mod watch;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

pub use self::injector::Fault;
pub use self::pattern::Pattern;
pub(crate) use self::series::RECENT;
pub use self::summary::{FaultCount, Latency, ReasonCount, Summary};

use self::budget::Budget;
use self::census::Census;
use self::operator::Operator;
use self::record::Recorder;
use self::stop::Stop;
use crate::demo::options::Plan;
use crate::demo::{DemoError, DemoOptions, check_pool};
use crate::{GuestKind, open_kvm, report, signals};

/// How often whoever waits for a run hears of it.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// When a run has done enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// After so long.
    Duration(Duration),
    /// After so many resizes of all guests together.
    Resizes(u64),
}

/// What to run.
#[derive(Clone, Debug)]
pub struct StressOptions {
    /// A guest, and the seed of everything chosen at random.
    pub guest: DemoOptions,
    /// How the target moves.
    pub pattern: Pattern,
    /// Whether each life of a guest ends with an access to memory that is not plugged.
    pub rogue: bool,
    /// What goes wrong now and then.
    pub faults: Vec<Fault>,
    /// Bytes all guests together may have requested or plugged; by default what they can have.
    pub budget: Option<u64>,
    /// When it is enough.
    pub limit: Limit,
    /// How many guests there are at a time.
    pub vm_count: usize,
    /// How long a resize may take without progress or reason.
    pub stuck_after: Duration,
}

/// A check failed, or something could not be done: the end of a run.
#[derive(Debug, Error)]
#[error("{}", match vm {
    Some(vm) => format!("guest {vm}, resize {resize} to {target} bytes"),
    None => format!("after {resize} resizes and the end of all guests"),
})]
pub struct Failure {
    /// Which guest, from 0, if one can be named.
    pub vm: Option<usize>,
    /// Which of its resizes, from 1; 0 before the first. How many there were, if no guest is named.
    pub resize: u64,
    /// The size that was asked for last.
    pub target: u64,
    /// When it was found, since the run began.
    pub after: Duration,
    /// What happened.
    #[source]
    pub source: DemoError,
}

impl Failure {
    /// What happened and what led to it, in a line.
    #[must_use]
    pub fn text(&self) -> String {
        let errors = std::iter::successors(Some(self as &dyn std::error::Error), |e| e.source());
        let texts: Vec<_> = errors.map(ToString::to_string).collect();
        texts.join(": ")
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Run {
    /// What was done.
    pub summary: Summary,
    /// What was measured, for each guest.
    pub vms: Vec<report::Vm>,
    /// What all guests held of the budget over time.
    pub held: Vec<report::Held>,
    /// What the guests ran on.
    pub backend: String,
    /// The first failure.
    pub failure: Option<Arc<Failure>>,
    /// Whether it was told to end early.
    pub interrupted: bool,
}

/// What those who wait for a run see of it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Since the run began.
    pub elapsed: Duration,
    /// Sizes asked for.
    pub resizes: u64,
    /// Blocks plugged and unplugged.
    pub blocks_moved: u64,
    /// Pages read back and found right.
    pub pages_verified: u64,
    /// What has failed. The run ends as soon as it can, which is never if the host does not answer.
    pub failure: Option<Arc<Failure>>,
}

/// What all threads of a run share.
#[derive(Debug)]
struct Shared<'a> {
    options: &'a StressOptions,
    plan: Plan,
    began: Instant,
    interrupted: &'a AtomicBool,
    /// Resizes begun.
    resizes: AtomicU64,
    /// Raised by the first failure.
    stop: Stop,
    failure: Mutex<Option<Arc<Failure>>>,
    vms: Vec<VmState>,
    budget: Budget,
    backend: Mutex<String>,
    /// What the process held before the first guest.
    census: Census,
}

/// What is known of one guest.
#[derive(Debug)]
struct VmState {
    recorder: Mutex<Recorder>,
    /// Of lives that are over.
    summary: Mutex<Summary>,
    /// Of this life.
    live: Mutex<report::Sample>,
    /// The size that was asked for last.
    asked: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared<'_> {
    /// Whether nothing has failed, and nobody wants it to end.
    fn goes_on(&self) -> bool {
        !self.stop.is_raised() && !self.interrupted.load(Ordering::Relaxed)
    }

    /// Whether there is time, or are resizes, left.
    fn is_enough(&self) -> bool {
        match self.options.limit {
            Limit::Duration(duration) => self.began.elapsed() >= duration,
            Limit::Resizes(count) => self.resizes.load(Ordering::Relaxed) >= count,
        }
    }

    /// Takes the next resize, if there is one to be done.
    fn next_resize(&self) -> bool {
        let most = match self.options.limit {
            Limit::Duration(_) if self.is_enough() => return false,
            Limit::Duration(_) => u64::MAX,
            Limit::Resizes(count) => count,
        };
        let taken = self
            .resizes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |resizes| {
                (resizes < most).then_some(resizes + 1)
            });
        taken.is_ok()
    }

    /// Notes what was found wrong, with guest `vm` if it can be told, and ends the run. What is found later may follow
    /// from the first, or from ending.
    fn fail(&self, vm: Option<usize>, source: DemoError) {
        let of = vm.and_then(|vm| self.vms.get(vm));
        let resize = of.map(|vm| lock(&vm.live).resizes);
        let resize = resize.unwrap_or_else(|| self.resizes.load(Ordering::Relaxed));
        let target = of.map_or(0, |vm| vm.asked.load(Ordering::Relaxed));
        lock(&self.failure).get_or_insert_with(|| {
            Arc::new(Failure {
                vm,
                resize,
                target,
                after: self.began.elapsed(),
                source,
            })
        });
        self.stop.raise();
    }

    fn progress(&self) -> Progress {
        let mut progress = Progress {
            elapsed: self.began.elapsed(),
            resizes: self.resizes.load(Ordering::Relaxed),
            failure: lock(&self.failure).clone(),
            ..Progress::default()
        };
        for vm in &self.vms {
            let live = lock(&vm.live);
            progress.blocks_moved += live.blocks_plugged + live.blocks_unplugged;
            progress.pages_verified += live.pages_verified;
        }
        progress
    }
}

/// What SIGINT and SIGTERM set from now on, for [`run`]. A second one ends the process at once.
///
/// # Errors
///
/// If a handler cannot be set.
pub fn interrupted_by_signals() -> io::Result<Arc<AtomicBool>> {
    signals::catch()
}

/// Runs until the limit is reached, the first check fails or `interrupted` is set; tells `progress` now and then.
///
/// # Errors
///
/// If the options do not go together or the process cannot look at itself. Everything later is a [`Failure`].
pub fn run(
    options: &StressOptions,
    interrupted: &AtomicBool,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Run, DemoError> {
    let plan = Plan::new(&options.guest)?;
    options.guest.check()?;
    let nothing_to_do = match options.limit {
        Limit::Duration(duration) => duration.is_zero(),
        Limit::Resizes(count) => count == 0,
    };
    if options.vm_count == 0 || nothing_to_do {
        return Err(DemoError::Options("no guest is to run".into()));
    }
    if options
        .budget
        .is_some_and(|budget| budget < plan.sizes.granule_size)
    {
        let reason = "the budget is less than one guest can plug";
        return Err(DemoError::Options(reason.into()));
    }
    let stalls = options.faults.contains(&Fault::Stall);
    let on_kvm = match options.guest.guest {
        GuestKind::InProcess => false,
        GuestKind::Auto => open_kvm().is_ok(),
        GuestKind::Kvm => true,
    };
    if stalls && !on_kvm {
        let reason = "a vCPU can be stalled on KVM only; leave `stall` out of the faults";
        return Err(DemoError::Options(reason.into()));
    }
    let capacity = plan.capacity().saturating_mul(options.vm_count as u64);
    let most = options.budget.unwrap_or(capacity);
    check_pool(options.guest.backing, most.min(capacity))?;
    let began = Instant::now();
    let budget = Budget::new(options.vm_count, most, began);
    let state = || VmState {
        recorder: Mutex::new(Recorder::new()),
        summary: Mutex::default(),
        live: Mutex::default(),
        asked: AtomicU64::new(0),
    };
    let shared = Shared {
        options,
        plan,
        began,
        interrupted,
        resizes: AtomicU64::new(0),
        stop: Stop::default(),
        failure: Mutex::default(),
        vms: (0..options.vm_count).map(|_| state()).collect(),
        budget,
        backend: Mutex::new("no guest has started".to_owned()),
        census: Census::take()?,
    };
    thread::scope(|scope| -> io::Result<()> {
        let mut operators = Vec::new();
        for vm in 0..options.vm_count {
            let operator = Operator::new(&shared, vm);
            let thread = thread::Builder::new()
                .name(format!("vmem-operator{vm}"))
                .spawn_scoped(scope, move || operator.run())
                // Those that run already need not go on.
                .inspect_err(|_| shared.stop.raise())?;
            operators.push(thread);
        }
        while !operators.iter().all(thread::ScopedJoinHandle::is_finished) {
            progress(&shared.progress());
            thread::sleep(PROGRESS_INTERVAL);
        }
        Ok(())
    })?;
    if lock(&shared.failure).is_none()
        && let Err(leak) = shared.census.nothing_leaked()
    {
        shared.fail(None, leak.into());
    }
    progress(&shared.progress());
    let mut summary = Summary::default();
    for vm in &shared.vms {
        summary.add(&lock(&vm.summary));
    }
    summary.seconds = shared.began.elapsed().as_secs_f64();
    let unwrap =
        |mutex: Mutex<Recorder>| mutex.into_inner().unwrap_or_else(PoisonError::into_inner);
    let vms = shared.vms.into_iter();
    Ok(Run {
        summary,
        vms: vms.map(|vm| unwrap(vm.recorder).into_vm()).collect(),
        held: shared.budget.into_history(),
        backend: lock(&shared.backend).clone(),
        failure: lock(&shared.failure).take(),
        interrupted: interrupted.load(Ordering::Relaxed),
    })
}

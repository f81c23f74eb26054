//! The host's side: a platform of threads, and what a harness does with the mailbox.
#![expect(unsafe_code, reason = "a mailbox is made of zeroes")]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use virtio_mem_driver::driver::{Policy, Strategy};
use virtio_mem_driver::hotplug::{OnlineType, Profile};
use virtio_mem_wire::{BlockMap, BlockRange};
use vmem_guest::abi::{DriverReport, DriverState, MAX_DEVICES, Mailbox, command, map};
use vmem_guest::{Guest, Parameters, Platform};

use crate::support::device::{Device, FakeTransport};
use crate::support::dma::FakeHal;
use crate::support::memory::PluggedMemory;

pub(crate) const PARAMETERS: Parameters = Parameters {
    vcpu_count: 2,
    worker_pages: 4096,
    mixed_zones: false,
    seed: 0x5eed,
    profile: Profile::X86_64,
    policy: Policy {
        strategy: Strategy::Direct,
        auto_online: Some(OnlineType::Movable),
        ..Policy::linux()
    },
    domains: [None; MAX_DEVICES],
};

/// Far more than anything here takes: only a guest that hangs gets there.
const PATIENCE: Duration = Duration::from_secs(120);

thread_local! {
    static VCPU: Cell<usize> = const { Cell::new(usize::MAX) };
    /// The wake-up this vCPU has last returned from waiting for.
    static SEEN: Cell<u64> = const { Cell::new(0) };
}

/// Who sleeps; changes are announced, and so is everything a sleeper may wait for.
#[derive(Debug, Default)]
struct Sleepers {
    state: Mutex<SleepState>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct SleepState {
    /// How many vCPUs sleep.
    count: usize,
    /// Raised with every wake-up: one vCPU takes the interrupt, but what it announces may concern all of them.
    wakes: u64,
}

impl Sleepers {
    fn wake(&self) {
        self.state.lock().unwrap().wakes += 1;
        self.wake.notify_all();
    }
}

pub(crate) struct TestPlatform {
    device: Arc<Device>,
    mailbox: Arc<Mailbox>,
    view: Vec<AtomicU64>,
    sleepers: Arc<Sleepers>,
    touched: Mutex<Vec<(usize, u64)>>,
    start: Instant,
    /// Milliseconds of the guest's clock in one of ours.
    clock_rate: u64,
}

impl TestPlatform {
    pub(crate) fn new(device: &Arc<Device>, view_words: usize, clock_rate: u64) -> Self {
        Self {
            device: Arc::clone(device),
            // SAFETY: A mailbox is made of atomic integers.
            mailbox: unsafe { Arc::new_zeroed().assume_init() },
            view: (0..view_words).map(|_| AtomicU64::new(0)).collect(),
            sleepers: Arc::default(),
            touched: Mutex::default(),
            start: Instant::now(),
            clock_rate,
        }
    }

    pub(crate) fn message(&self) -> String {
        let len = self.mailbox.message_len.load(Ordering::Acquire) as usize;
        let bytes = self.mailbox.message.iter().take(len);
        String::from_utf8(bytes.map(|byte| byte.load(Ordering::Relaxed)).collect()).unwrap()
    }

    pub(crate) fn driver_state(&self) -> DriverState {
        DriverState::from_value(self.mailbox.drivers[0].state.load(Ordering::Acquire)).unwrap()
    }

    fn wake(&self) {
        self.sleepers.wake();
    }
}

impl Platform for &TestPlatform {
    type Hal = FakeHal;
    type Transport = FakeTransport;
    type Memory = PluggedMemory;

    fn memory(&self) -> PluggedMemory {
        PluggedMemory(Arc::clone(&self.device))
    }

    fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    fn view(&self, _: usize) -> &[AtomicU64] {
        &self.view
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap() * self.clock_rate
    }

    fn wait(&self, deadline_ms: Option<u64>) {
        let mailbox = &self.mailbox;
        let mut state = self.sleepers.state.lock().unwrap();
        state.count += 1;
        loop {
            let pending = mailbox.interrupt.load(Ordering::Acquire) != 0
                || mailbox.command.load(Ordering::Acquire) != 0
                || mailbox.report_request.load(Ordering::Acquire)
                    != mailbox.report_done.load(Ordering::Acquire);
            let rest = deadline_ms.map(|deadline| deadline.saturating_sub(self.now_ms()));
            if pending || SEEN.get() != state.wakes || rest == Some(0) {
                break;
            }
            let ours = rest.and_then(|rest| rest.checked_div(self.clock_rate));
            // A little more, for what the division has lost.
            let rest = ours.map_or(PATIENCE, |rest| Duration::from_millis(rest + 1));
            state = self.sleepers.wake.wait_timeout(state, rest).unwrap().0;
        }
        SEEN.set(state.wakes);
        state.count -= 1;
    }

    fn relax(&self) {
        thread::yield_now();
    }

    fn touch(&self, address: u64) {
        self.touched.lock().unwrap().push((VCPU.get(), address));
    }
}

/// A running guest.
pub(crate) struct Host<'a> {
    pub(crate) device: &'a Arc<Device>,
    platform: &'a TestPlatform,
}

impl<'a> Host<'a> {
    /// Runs a guest while `test` deals with it, stops it, and checks what its workers have found.
    pub(crate) fn run(
        device: &'a Arc<Device>,
        parameters: Parameters,
        test: impl FnOnce(&Host<'_>),
    ) {
        Self::run_with_clock(device, parameters, 1, test);
    }

    /// As [`run`](Self::run), with a clock that goes `clock_rate` times as fast, or not at all.
    pub(crate) fn run_with_clock(
        device: &'a Arc<Device>,
        parameters: Parameters,
        clock_rate: u64,
        test: impl FnOnce(&Host<'_>),
    ) {
        let words = device.state().plugged.len().div_ceil(64) as usize * map::COUNT;
        let platform = TestPlatform::new(device, words, clock_rate);
        let transport = FakeTransport(Arc::clone(device));
        let guest = Guest::boot(&platform, vec![transport], parameters).unwrap();
        let host = Host {
            device,
            platform: &platform,
        };
        // Interrupts reach the guest through the mailbox.
        let sleepers = Arc::clone(&platform.sleepers);
        let mailbox = Arc::clone(&platform.mailbox);
        device.state().interrupt_line = Some(Box::new(move || {
            mailbox.interrupt.store(1, Ordering::Release);
            sleepers.wake();
        }));
        let result = thread::scope(|scope| {
            for vcpu in 0..parameters.vcpu_count {
                let guest = &guest;
                scope.spawn(move || {
                    VCPU.set(vcpu);
                    guest.run_vcpu(vcpu);
                });
            }
            // Stopped even if the test fails, or its threads would never end.
            let result = catch_unwind(AssertUnwindSafe(|| test(&host)));
            host.command(command::STOP);
            result
        });
        device.state().interrupt_line = None;
        if let Err(panic) = result {
            resume_unwind(panic);
        }
        for worker in &platform.mailbox.workers {
            assert_eq!(worker.pages_wrong.load(Ordering::Relaxed), 0);
            assert_eq!(worker.pages_held.load(Ordering::Relaxed), 0);
        }
    }

    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.platform.mailbox
    }

    /// What the driver says of itself.
    pub(crate) fn driver(&self) -> &DriverReport {
        &self.mailbox().drivers[0]
    }

    /// Waits until `done`.
    pub(crate) fn until(&self, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "the guest hangs");
            thread::yield_now();
        }
    }

    pub(crate) fn command(&self, bits: u32) {
        self.mailbox().command.fetch_or(bits, Ordering::AcqRel);
        self.platform.wake();
    }

    /// Asks for a report, and returns the state it shows.
    pub(crate) fn report(&self) -> DriverState {
        let mailbox = self.mailbox();
        let request = mailbox.report_request.fetch_add(1, Ordering::AcqRel) + 1;
        self.platform.wake();
        self.until(|| mailbox.report_done.load(Ordering::Acquire) == request);
        self.platform.driver_state()
    }

    /// Sets the target and waits until the guest is there.
    pub(crate) fn resize(&self, size: u64) {
        self.device.request(size);
        self.until(|| {
            self.report() == DriverState::Settled
                && self.driver().requested_size.load(Ordering::Relaxed) == size
                && self.driver().plugged_size.load(Ordering::Relaxed) == size
        });
    }

    /// One of the [`map`]s of the last report.
    pub(crate) fn view(&self, map_index: usize) -> BlockMap {
        let words = self.platform.view.len() / map::COUNT;
        let mut map = BlockMap::new(self.device.state().plugged.len());
        let view = self.platform.view.chunks_exact(words).nth(map_index);
        for (index, word) in view.into_iter().flatten().enumerate() {
            let word = word.load(Ordering::Relaxed);
            for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                map.insert(BlockRange {
                    first: index as u64 * 64 + bit,
                    count: 1,
                });
            }
        }
        map
    }

    /// Waits until each worker has verified a hundred more pages.
    pub(crate) fn await_work(&self) {
        let verified = || {
            let workers = self.mailbox().workers[..PARAMETERS.vcpu_count].iter();
            workers.map(|worker| worker.pages_verified.load(Ordering::Relaxed))
        };
        let before: Vec<u64> = verified().collect();
        self.until(|| verified().zip(&before).all(|(now, then)| now >= then + 100));
    }

    /// Waits until `count` vCPUs sleep.
    pub(crate) fn await_sleepers(&self, count: usize) {
        self.until(|| self.platform.sleepers.state.lock().unwrap().count == count);
    }

    /// Who has touched which address.
    pub(crate) fn touched(&self) -> MutexGuard<'_, Vec<(usize, u64)>> {
        self.platform.touched.lock().unwrap()
    }

    pub(crate) fn message(&self) -> String {
        self.platform.message()
    }

    /// The state of the last report, or of a failure since.
    pub(crate) fn driver_state(&self) -> DriverState {
        self.platform.driver_state()
    }
}

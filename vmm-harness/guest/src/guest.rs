//! The guest program: booting it, and what each vCPU does.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use thiserror::Error;
use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_driver::driver::{
    MemDriver, Mode, Policy, ProbeError, Progress, Stall, Strategy, Unreachable, UnreachableReason,
};
use virtio_mem_driver::hotplug::{self, Boot, Config, Hotplug, OnlinePolicy, OnlineType, Profile};
use virtio_mem_wire::{BlockMap, BlockRange, BlockState};

use crate::abi::{
    self, BootInfo, DriverReport, DriverState, MAX_DEVICES, MAX_VCPUS, Mailbox, Shortfall,
    Workload, command, map,
};
use crate::block_use;
use crate::lock::SpinLock;
use crate::message::write_message;
use crate::platform::Platform;
use crate::worker::{Allowance, Worker};

/// What the guest program can be told.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// Number of vCPUs that run it, 1 to [`MAX_VCPUS`].
    pub vcpu_count: usize,
    /// Most pages one worker keeps allocated.
    pub worker_pages: u64,
    /// Seed of everything that is chosen at random.
    pub seed: u64,
    /// Sizes of the machine.
    pub profile: Profile,
    /// What the driver may choose.
    pub policy: Policy,
    /// Whether added memory goes to kernel zones as well as to Movable.
    pub mixed_zones: bool,
    /// The proximity domain of each memory device that is in one.
    pub domains: [Option<u32>; MAX_DEVICES],
}

impl From<&BootInfo> for Parameters {
    fn from(boot: &BootInfo) -> Self {
        Self {
            // Too many are refused by `Guest::boot`.
            vcpu_count: usize::try_from(boot.vcpu_count).unwrap_or(usize::MAX),
            worker_pages: boot.worker_pages,
            seed: boot.seed,
            profile: Profile::X86_64,
            policy: policy(boot),
            mixed_zones: boot.driver & abi::driver::MIXED_ZONES != 0,
            domains: boot.devices.map(|device| device.domain.try_into().ok()),
        }
    }
}

fn policy(boot: &BootInfo) -> Policy {
    let chosen = match boot.driver & abi::driver::LINUX {
        0 => Policy::default(),
        _ => Policy::linux(),
    };
    Policy {
        force_bbm: boot.driver & abi::driver::BIG_BLOCK != 0,
        bbm_block_size: boot.bbm_block_size,
        ..chosen
    }
}

/// Why the guest program cannot start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BootError {
    /// None at all, or more than the mailbox has room for.
    #[error("{0} vCPUs")]
    VcpuCount(usize),
    /// None at all, or more than the mailbox has room for.
    #[error("{0} memory devices")]
    DeviceCount(usize),
    /// The maps of its blocks do not fit where they are to be published.
    #[error("a view of {have} words, {need} needed")]
    ViewTooSmall {
        /// Words there are.
        have: usize,
        /// Words the map has.
        need: u64,
    },
    /// The sizes of the machine make no sense.
    #[error("sizes of the machine: {0}")]
    Profile(#[from] hotplug::Error),
    /// The device cannot be used.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

type Probed<P> = (Hotplug<<P as Platform>::Memory>, Vec<Driver<P>>);

/// The guest program. All vCPUs share one.
pub struct Guest<P: Platform> {
    platform: P,
    parameters: Parameters,
    hotplug: SpinLock<Hotplug<P::Memory>>,
    /// One for each memory device. vCPU 0 holds this for as long as it runs.
    drivers: SpinLock<Vec<Driver<P>>>,
    /// The nodes that may have memory.
    node_count: u32,
    /// Whether there may be memory soon: the other vCPUs stay awake.
    converging: AtomicBool,
    /// Bytes of memory there will be for sure, which the workers keep to.
    lasting_size: AtomicU64,
    /// Whether memory is to go: nobody is to keep it in its place.
    shrinking: AtomicBool,
}

/// The driver of one memory device.
struct Driver<P: Platform> {
    index: usize,
    /// Where its memory is.
    node: u32,
    driver: MemDriver<P::Hal, P::Transport>,
    progress: Progress,
}

impl<P: Platform> fmt::Debug for Guest<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest")
            .field("parameters", &self.parameters)
            .finish_non_exhaustive()
    }
}

impl<P: Platform> Guest<P> {
    /// Takes over the memory devices. Once, before any vCPU [runs](Self::run_vcpu).
    ///
    /// # Errors
    ///
    /// See [`BootError`]; the mailbox says [`DriverState::Failed`] and why, too.
    pub fn boot(
        platform: P,
        transports: Vec<P::Transport>,
        parameters: Parameters,
    ) -> Result<Self, BootError> {
        match Self::probe(&platform, transports, &parameters) {
            Ok((hotplug, drivers)) => Ok(Self {
                platform,
                parameters,
                node_count: hotplug.config().possible_nodes,
                hotplug: SpinLock::new(hotplug),
                drivers: SpinLock::new(drivers),
                converging: AtomicBool::new(true),
                lasting_size: AtomicU64::new(0),
                shrinking: AtomicBool::new(false),
            }),
            Err(error) => {
                for driver in &platform.mailbox().drivers {
                    publish_failure(platform.mailbox(), driver, error);
                }
                Err(error)
            }
        }
    }

    fn probe(
        platform: &P,
        transports: Vec<P::Transport>,
        parameters: &Parameters,
    ) -> Result<Probed<P>, BootError> {
        let vcpu_count = parameters.vcpu_count;
        if !(1..=MAX_VCPUS).contains(&vcpu_count) {
            return Err(BootError::VcpuCount(vcpu_count));
        }
        if !(1..=MAX_DEVICES).contains(&transports.len()) {
            return Err(BootError::DeviceCount(transports.len()));
        }
        let mut policy = parameters.policy;
        let mut config = Config::new(parameters.profile);
        if parameters.mixed_zones {
            // Boot memory is not the core's, so the first memory block is a kernel's, and one for each three after it.
            policy.auto_online = None;
            config.default_online_type = Some(OnlineType::Online);
            config.online_policy = OnlinePolicy::AutoMovable;
        } else if policy.auto_online.is_none() {
            // Linux's driver leaves it to the core, and its users boot with `memhp_default_state=online_movable`.
            config.default_online_type = Some(OnlineType::Movable);
        }
        // Nodes are numbered in the order of their domains, which is how firmware usually lists them.
        let domains: BTreeSet<u32> = parameters.domains.into_iter().flatten().collect();
        config.possible_nodes = config.possible_nodes.max(domains.len() as u32);
        // Boot memory is the program's own, the core has none of it.
        let boot = Boot {
            proximity_domains: domains.into_iter().collect(),
            ..Boot::default()
        };
        let mut hotplug = Hotplug::boot(config, &boot, platform.memory())?;
        let mut drivers = Vec::new();
        for (index, transport) in transports.into_iter().enumerate() {
            let driver = MemDriver::probe(transport, &mut hotplug, policy)?;
            let map_words = driver.plugged_map().len().div_ceil(u64::from(u64::BITS));
            let need = map_words * map::COUNT as u64;
            let have = platform.view(index).len();
            if need > have as u64 {
                return Err(BootError::ViewTooSmall { have, need });
            }
            drivers.push(Driver {
                index,
                node: driver.node(),
                driver,
                progress: Progress::Converging,
            });
        }
        Ok((hotplug, drivers))
    }

    /// Runs vCPU `index` until the host says [`command::STOP`]; by then its worker has verified and freed all
    /// its pages. Each vCPU is run once, at the same time as the others.
    pub fn run_vcpu(&self, index: usize) {
        match index {
            0 => self.run_driver(),
            _ => self.run_worker(index),
        }
    }

    /// vCPU 0: the drivers, and a worker in between.
    fn run_driver(&self) {
        let mailbox = self.platform.mailbox();
        let mut drivers = self.drivers.lock(|| self.platform.relax());
        let mut worker = self.worker(0);
        let mut in_use_since = None;
        while !self.take_command(0) {
            if mailbox.interrupt.load(Ordering::Relaxed) != 0 {
                // Before the interrupt is taken: a vCPU that sees none then sees that there is work.
                self.converging.store(true, Ordering::Release);
                mailbox.interrupt.swap(0, Ordering::AcqRel);
                mailbox.interrupts.fetch_add(1, Ordering::Relaxed);
                // All share the line.
                for driver in drivers.iter_mut() {
                    driver.driver.on_interrupt();
                }
            }
            self.poll(&mut drivers);
            self.report(&drivers);
            let in_use = drivers.iter().any(Driver::memory_in_use);
            let worked = worker.slice(self.allowance());
            if in_use {
                let slices = *in_use_since.get_or_insert_with(|| self.slices());
                if self.workers_let_go(&slices) {
                    // As a kernel does that has reclaimed memory: it would be a pity to wait for so long.
                    for driver in drivers.iter_mut().filter(|driver| driver.memory_in_use()) {
                        driver.driver.retry();
                    }
                    in_use_since = None;
                }
            } else {
                in_use_since = None;
            }
            let at_work = |driver: &Driver<P>| driver.progress == Progress::Converging;
            if !worked && !drivers.iter().any(at_work) {
                match in_use {
                    true => self.platform.relax(),
                    // For the time of a retry, or for a device that does not answer.
                    false => {
                        let deadlines = drivers.iter().filter_map(|d| d.driver.deadline_ms());
                        self.platform.wait(deadlines.min());
                    }
                }
            }
        }
        worker.finish();
    }

    /// One step of each driver.
    fn poll(&self, drivers: &mut [Driver<P>]) {
        let mut polled = false;
        for driver in drivers.iter_mut() {
            if driver.driver.awaits_device(self.platform.now_ms()) {
                driver.progress = Progress::AwaitingDevice;
                continue;
            }
            polled = true;
            let mut hotplug = self.hotplug.lock(|| self.platform.relax());
            driver.progress = driver.driver.poll(&mut hotplug, self.platform.now_ms());
            drop(hotplug);
            if let Progress::Failed(failure) = driver.progress {
                let mailbox = self.platform.mailbox();
                let report = &mailbox.drivers[driver.index];
                if report.state.load(Ordering::Relaxed) != DriverState::Failed as u32 {
                    publish_failure(mailbox, report, failure);
                }
            }
        }
        if !polled {
            return;
        }
        let lasting_size = drivers.iter().map(Driver::lasting_size).sum();
        self.lasting_size.store(lasting_size, Ordering::Relaxed);
        let shrinking = |driver: &Driver<P>| {
            driver.driver.config().mutable.requested_size < driver.driver.plugged_size()
        };
        self.shrinking
            .store(drivers.iter().any(shrinking), Ordering::Relaxed);
        let converging = |driver: &Driver<P>| state_of(driver.progress) == DriverState::Converging;
        let converging = drivers.iter().any(converging);
        self.converging.store(converging, Ordering::Release);
    }

    /// Any other vCPU: a worker, which waits where there is no memory to work with.
    fn run_worker(&self, index: usize) {
        let mailbox = self.platform.mailbox();
        let mut worker = self.worker(index);
        while !self.take_command(index) {
            if worker.slice(self.allowance()) {
                continue;
            }
            // In this order, see `run_driver`. Should the interrupt come after this, the answers to the
            // driver's requests still wake us before there is memory.
            let interrupt = mailbox.interrupt.load(Ordering::Acquire) != 0;
            if interrupt || self.converging.load(Ordering::Acquire) {
                self.platform.relax();
            } else {
                self.platform.wait(None);
            }
        }
        worker.finish();
    }

    fn worker(&self, index: usize) -> Worker<'_, P::Memory, impl Fn() + '_> {
        Worker::new(
            &self.hotplug,
            &self.platform.mailbox().workers[index],
            || self.platform.relax(),
            self.parameters.seed,
            index as u64,
            self.node_count,
        )
    }

    /// Pages a worker may hold: all workers together half of the memory that will be left, or there would be
    /// nowhere to move pages to. While memory is to go, none more that cannot be moved, or it might never.
    fn allowance(&self) -> Allowance {
        let lasting_size = self.lasting_size.load(Ordering::Relaxed);
        let pages = lasting_size / 2 / self.parameters.profile.page_size();
        let share = pages / self.parameters.vcpu_count as u64;
        let workload = self.platform.mailbox().workload.load(Ordering::Relaxed);
        Allowance {
            pages: share.min(self.parameters.worker_pages),
            unmovable_one_in: match self.shrinking.load(Ordering::Relaxed) {
                true => None,
                false => Workload::from_value(workload).unmovable_one_in(),
            },
        }
    }

    /// What each worker has got done.
    fn slices(&self) -> [u64; MAX_VCPUS] {
        let workers = &self.platform.mailbox().workers;
        core::array::from_fn(|index| workers[index].slices.load(Ordering::Relaxed))
    }

    /// Whether no worker holds more than it may, nor a page that cannot be moved, nor the page it had in hand when it
    /// had got `slices` done.
    fn workers_let_go(&self, slices: &[u64; MAX_VCPUS]) -> bool {
        let workers = &self.platform.mailbox().workers;
        let allowance = self.allowance().pages;
        workers.iter().zip(slices).all(|(worker, slices)| {
            let held = worker.pages_held.load(Ordering::Relaxed);
            let unmovable = worker.pages_unmovable.load(Ordering::Relaxed);
            let moved_on = worker.slices.load(Ordering::Relaxed) != *slices;
            held == 0 || held <= allowance && unmovable == 0 && moved_on
        })
    }

    /// Does what the host has told vCPU `index` to do; `true` if that is to stop.
    fn take_command(&self, index: usize) -> bool {
        let mailbox = self.platform.mailbox();
        let bits = mailbox.command.load(Ordering::Acquire);
        if bits & command::ROGUE != 0 && index == self.parameters.vcpu_count - 1 {
            // Once for each time it is told.
            mailbox.command.fetch_and(!command::ROGUE, Ordering::AcqRel);
            self.platform
                .touch(mailbox.rogue_address.load(Ordering::Relaxed));
        }
        bits & command::STOP != 0
    }

    /// Answers the host if it has asked: everything is from one moment, and that is after every interrupt the
    /// host has raised before it asked.
    fn report(&self, drivers: &[Driver<P>]) {
        let mailbox = self.platform.mailbox();
        let request = mailbox.report_request.load(Ordering::Acquire);
        let answered = request == mailbox.report_done.load(Ordering::Relaxed);
        if answered || mailbox.interrupt.load(Ordering::Acquire) != 0 {
            return;
        }
        let hotplug = self.hotplug.lock(|| self.platform.relax());
        let pages_moved = hotplug.statistics().pages_migrated;
        mailbox.pages_moved.store(pages_moved, Ordering::Relaxed);
        // It looks at each block and each page in use, which is too much for every report.
        let with_use = mailbox.use_request.swap(0, Ordering::AcqRel) != 0;
        for driver in drivers {
            let of_node = hotplug.zones().filter(|zone| zone.nid == driver.node);
            let pages: u64 = of_node.map(|zone| zone.managed_pages).sum();
            let online_size = pages * self.parameters.profile.page_size();
            let view = self.platform.view(driver.index);
            driver.report(&mailbox.drivers[driver.index], view, online_size);
            if with_use {
                let geometry = &driver.driver.config().geometry;
                block_use::publish(&hotplug, driver.driver.plugged_map(), geometry, view);
            }
        }
        drop(hotplug);
        mailbox.report_done.store(request, Ordering::Release);
    }
}

impl<P: Platform> Driver<P> {
    fn memory_in_use(&self) -> bool {
        matches!(
            self.progress,
            Progress::Stalled {
                reason: Stall::MemoryInUse,
                ..
            }
        )
    }

    /// Bytes there will be for sure.
    fn lasting_size(&self) -> u64 {
        match self.progress {
            Progress::Settled => self.driver.plugged_size(),
            // What no driver can split is lost or won at the end.
            _ => {
                let granules =
                    self.driver.config().mutable.requested_size / self.driver.granule_size();
                granules * self.driver.granule_size()
            }
        }
    }

    fn report(&self, report: &DriverReport, view: &[AtomicU64], online_size: u64) {
        let driver = &self.driver;
        for (cell, word) in view.iter().zip(words(driver.plugged_map())) {
            cell.store(word, Ordering::Relaxed);
        }
        let unreachable = driver.unreachable();
        for (field, value) in [
            (
                &report.requested_size,
                driver.config().mutable.requested_size,
            ),
            (&report.plugged_size, driver.plugged_size()),
            (&report.node, self.node.into()),
            (&report.online_size, online_size),
            (&report.requests, driver.counters().total_requests()),
            (&report.driver, driver_bits(driver)),
            (&report.granule_size, driver.granule_size()),
            (&report.unreachable, unreachable.map_or(0, |u| u.bytes)),
        ] {
            field.store(value, Ordering::Relaxed);
        }
        let reason = shortfall(unreachable) as u32;
        report.unreachable_reason.store(reason, Ordering::Relaxed);
        let state = state_of(self.progress) as u32;
        report.state.store(state, Ordering::Relaxed);
    }
}

fn state_of(progress: Progress) -> DriverState {
    match progress {
        Progress::Converging | Progress::AwaitingDevice => DriverState::Converging,
        // Without a time for the next attempt only a new target helps: nobody but the driver brings memory online
        // or offline here.
        Progress::Settled
        | Progress::Suspended
        | Progress::Stalled {
            retry_at_ms: None, ..
        } => DriverState::Settled,
        Progress::Stalled { .. } => DriverState::Stalled,
        Progress::Failed(_) => DriverState::Failed,
    }
}

fn driver_bits<H: Hal, T: Transport>(driver: &MemDriver<H, T>) -> u64 {
    let linux = match driver.policy().strategy {
        Strategy::Linux => abi::driver::LINUX,
        Strategy::Direct => 0,
    };
    let big_block = match driver.mode() {
        Mode::BigBlock => abi::driver::BIG_BLOCK,
        Mode::SubBlock => 0,
    };
    linux | big_block
}

fn shortfall(unreachable: Option<Unreachable>) -> Shortfall {
    let Some(Unreachable { reason, .. }) = unreachable else {
        return Shortfall::None;
    };
    match reason {
        UnreachableReason::Remainder { .. } => Shortfall::Remainder,
        UnreachableReason::Capacity => Shortfall::Capacity,
        UnreachableReason::OnlineMemory => Shortfall::OnlineMemory,
        UnreachableReason::Stalled(stall) => match stall {
            Stall::DeviceBusy => Shortfall::DeviceBusy,
            Stall::Refused => Shortfall::Refused,
            Stall::NoSpace => Shortfall::Capacity,
            Stall::MemoryInUse => Shortfall::MemoryInUse,
            Stall::NoMemory => Shortfall::NoMetadata,
            Stall::NotAdded(_) => Shortfall::NotAdded,
            Stall::NotRemoved => Shortfall::NotRemoved,
            Stall::OfflineThreshold => Shortfall::OfflineThreshold,
            Stall::ConfigUnstable => Shortfall::ConfigUnstable,
        },
    }
}

/// Tells the host at once, it may not think of asking. The first reason stays.
fn publish_failure(mailbox: &Mailbox, driver: &DriverReport, reason: impl fmt::Display) {
    if mailbox.message_len.load(Ordering::Relaxed) == 0 {
        write_message(mailbox, reason);
    }
    let state = DriverState::Failed as u32;
    driver.state.store(state, Ordering::Release);
}

/// The map as 64-bit words, the first block being bit 0 of the first.
fn words(map: &BlockMap) -> impl Iterator<Item = u64> + '_ {
    let bits = u64::from(u64::BITS);
    (0..map.len())
        .step_by(u64::BITS as usize)
        .map(move |first| {
            let count = bits.min(map.len() - first);
            match map.state(BlockRange { first, count }) {
                BlockState::Unplugged => 0,
                BlockState::Plugged => u64::MAX >> (bits - count),
                BlockState::Mixed => (0..count)
                    .filter(|bit| map.contains(first + bit))
                    .fold(0, |word, bit| word | 1 << bit),
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_map_have_the_first_block_in_bit_0() {
        let mut map = BlockMap::new(200);
        for (first, count) in [(0, 1), (63, 66), (199, 1)] {
            map.insert(BlockRange { first, count });
        }
        let expected = [1 | 1 << 63, u64::MAX, 1, 1 << 7];
        assert_eq!(words(&map).collect::<Vec<_>>(), expected);
        map.insert(BlockRange {
            first: 0,
            count: 200,
        });
        assert_eq!(words(&map).last(), Some(0xff));
    }
}

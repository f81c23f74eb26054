//! A guest with memory devices, on KVM or in this process: what `vmem` and its tests work with.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;
use virtio_mem::{BuildError, Builder, Handle, KvmSlots, NoSlots, VirtioMem};
use virtio_mem_driver::driver::Policy;
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryError};
use vmem_guest::abi::{DriverState, Workload, command};

use crate::backend::{Backend, KvmError, kvm_module, open_kvm};
use crate::boot::{self, BootError, GuestParameters};
use crate::bus::Bus;
use crate::events::{EventLoop, EventLoopError};
use crate::faults::Faults;
use crate::in_process::{self, InProcess, InProcessError};
use crate::layout::{IMAGE_START, Layout, LayoutError};
use crate::lifecycle::{Lifecycle, NotDone};
use crate::mailbox::{BlockUse, Report, SharedMailbox};
use crate::outcome::Outcome;
use crate::port::Port;
use crate::slots::RevocableSlots;
use crate::transport::{InterruptCounts, InterruptLine, MmioTransport};
use crate::vcpu::ExitCounts;
use crate::vm::{FIRST_FREE_SLOT, RunningVm, Vm, VmError, VmParts};
use crate::{BootMemory, GUEST_IMAGE};

/// Where the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// On KVM if it can be used, else in this process.
    #[default]
    Auto,
    /// On KVM or not at all.
    Kvm,
    /// In this process.
    InProcess,
}

impl fmt::Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A guest to start.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Bytes of memory the guest has from the start, a multiple of 2 MiB.
    pub boot_memory: u64,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`](vmem_guest::abi::MAX_VCPUS).
    pub vcpu_count: usize,
    /// Where it runs.
    pub guest: GuestKind,
    /// Seed of everything the guest chooses at random.
    pub seed: u64,
    /// Most pages one worker of the guest keeps allocated.
    pub worker_pages: u64,
    /// What the workers do with their memory.
    pub workload: Workload,
    /// Strategy and big blocks of the guest's driver. Added memory goes to zone Movable, unless some of it cannot be
    /// moved by its [`workload`](Self::workload): then some goes to a kernel zone.
    pub policy: Policy,
    /// What goes wrong with its slots. With its memory, who makes the device sees to that.
    pub faults: Faults,
    /// The program, a static ELF file linked to [`IMAGE_START`]. Used on KVM only: in this process the guest
    /// program is part of it.
    pub image: &'static [u8],
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            boot_memory: 256 << 20,
            vcpu_count: 2,
            guest: GuestKind::Auto,
            seed: 0,
            worker_pages: 1024,
            workload: Workload::Alloc,
            policy: Policy::default(),
            faults: Faults::default(),
            image: GUEST_IMAGE,
        }
    }
}

/// A machine could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// KVM was asked for and cannot be used.
    #[error("KVM cannot be used")]
    Kvm(#[from] KvmError),
    /// The sizes do not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The options of the device do not go together.
    #[error("memory device")]
    Device(#[from] BuildError),
    /// The host has no such memory.
    #[error("the host has no {0} bytes for boot memory")]
    Memory(u64, #[source] FromRangesError),
    /// Boot memory is not where it should be.
    #[error("boot memory")]
    MemoryAccess(#[from] GuestMemoryError),
    /// Boot memory could not be filled.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The event loop does not run.
    #[error(transparent)]
    Events(#[from] EventLoopError),
    /// No eventfd for the queue.
    #[error("eventfd of the queue")]
    Notify(#[source] std::io::Error),
    /// The virtual machine.
    #[error("virtual machine")]
    Vm(#[from] VmError),
    /// The guest in this process.
    #[error("guest in this process")]
    InProcess(#[from] InProcessError),
}

/// The guest has not reported.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ReportError {
    /// It does not run any more.
    #[error("no report: {0}")]
    Ended(Outcome),
    /// Its driver cannot go on, and has nothing more to report.
    #[error("the guest's driver failed: {0}")]
    DriverFailed(String),
    /// Not within the time given.
    #[error("the guest has not reported, or not settled, within {0:?}")]
    Late(Duration),
}

impl ReportError {
    fn new(reason: NotDone, timeout: Duration) -> Self {
        match reason {
            NotDone::Ended(outcome) => Self::Ended(outcome),
            NotDone::Late => Self::Late(timeout),
        }
    }
}

/// A running guest and its memory devices, up to [`MAX_DEVICES`](vmem_guest::abi::MAX_DEVICES). What is said of "the
/// device" is about the first.
///
/// [`stop`](Self::stop) ends it and says how it went; dropping it ends it too. Either way every thread is
/// joined.
#[derive(Debug)]
pub struct Machine {
    // Dropped in this order: the vCPUs, the loop that serves their devices, the devices.
    guest: RunningGuest,
    events: EventLoop,
    bus: Arc<Bus>,
    backend: Backend,
    mailbox: SharedMailbox,
    lifecycle: Arc<Lifecycle>,
    reports: AtomicU64,
    vcpu_count: usize,
}

#[derive(Debug)]
enum RunningGuest {
    Kvm(RunningVm, Vec<RevocableSlots>),
    InProcess(InProcess),
}

impl Machine {
    /// Starts a guest with a device made from `device`, whose slots are the machine's business.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left running then.
    pub fn start(config: &MachineConfig, device: Builder) -> Result<Self, StartError> {
        Self::start_with(config, vec![device])
    }

    /// As [`start`](Self::start), with several devices, in the order of their addresses.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left running then.
    pub fn start_with(config: &MachineConfig, devices: Vec<Builder>) -> Result<Self, StartError> {
        let (backend, kvm) = match config.guest {
            GuestKind::InProcess => (Backend::InProcess { reason: None }, None),
            kind => match open_kvm() {
                Ok(kvm) => (
                    Backend::Kvm {
                        module: kvm_module(),
                    },
                    Some(kvm),
                ),
                Err(reason) if kind == GuestKind::Auto => {
                    let reason = Some(reason);
                    (Backend::InProcess { reason }, None)
                }
                Err(reason) => return Err(reason.into()),
            },
        };
        let memory = boot_memory(config.boot_memory)?;
        match kvm {
            Some(kvm) => {
                let loaded = boot::load_image(&memory, config.image)?;
                let vm = Vm::new(kvm, Arc::clone(&memory))?;
                let mut slots = Vec::new();
                let mut built = Vec::new();
                let mut first_slot = FIRST_FREE_SLOT;
                for device in devices {
                    let kvm = KvmSlots::new(Arc::clone(vm.fd()), first_slot);
                    let revocable = RevocableSlots::new(kvm);
                    let faulty = config.faults.slots(revocable.clone());
                    let device = device.slots(faulty).build()?;
                    // No more than KVM has, or it would not have been built.
                    let count = u32::try_from(device.max_slot_count()).unwrap_or(u32::MAX);
                    first_slot = first_slot.saturating_add(count);
                    slots.push(revocable);
                    built.push(device);
                }
                let parts = Parts::new(config, memory, built, loaded.end)?;
                boot::build_page_tables(&parts.memory, &parts.layout)?;
                boot::write_boot_info(&parts.memory, &parts.layout, &parts.parameters)?;
                let revoked = slots.clone();
                let vm_parts = VmParts {
                    bus: Arc::clone(&parts.bus),
                    lifecycle: Arc::clone(&parts.lifecycle),
                    mailbox: parts.mailbox.clone(),
                    revoke_slots: Arc::new(move || {
                        revoked.iter().try_for_each(RevocableSlots::revoke)
                    }),
                };
                let running = vm.start(&vm_parts, &parts.layout, loaded.entry)?;
                Ok(parts.into_machine(backend, RunningGuest::Kvm(running, slots)))
            }
            None => {
                let slots = || config.faults.slots(NoSlots);
                let built = devices
                    .into_iter()
                    .map(|device| device.slots(slots()).build());
                let built = built.collect::<Result<_, _>>()?;
                let parts = Parts::new(config, memory, built, IMAGE_START)?;
                let info = boot::write_boot_info(&parts.memory, &parts.layout, &parts.parameters)?;
                let guest = in_process::Parts {
                    info,
                    mailbox: parts.mailbox.clone(),
                    bus: Arc::clone(&parts.bus),
                    lifecycle: Arc::clone(&parts.lifecycle),
                };
                let running = InProcess::start(guest, &parts.memory, &parts.layout)?;
                Ok(parts.into_machine(backend, RunningGuest::InProcess(running)))
            }
        }
    }

    /// What the guest runs on.
    #[must_use]
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The memory device.
    #[must_use]
    pub fn device(&self) -> &VirtioMem {
        self.first().device()
    }

    /// The memory devices, in the order of their addresses.
    pub fn devices(&self) -> impl Iterator<Item = &VirtioMem> {
        self.bus
            .transports
            .iter()
            .map(|transport| transport.device())
    }

    fn first(&self) -> &MmioTransport {
        // A layout has at least one.
        &self.bus.transports[0]
    }

    /// The operator's end of the memory device.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.device().handle()
    }

    /// What the guest last wrote about itself, without asking it to: its last report, with what the workers
    /// have done since. While it writes one the parts may be from two.
    #[must_use]
    pub fn progress(&self) -> Report {
        self.progress_of(0, self.device())
    }

    /// As [`progress`](Self::progress), of each device.
    #[must_use]
    pub fn progresses(&self) -> Vec<Report> {
        let devices = self.devices().enumerate();
        devices
            .map(|(index, device)| self.progress_of(index, device))
            .collect()
    }

    fn progress_of(&self, index: usize, device: &VirtioMem) -> Report {
        let block_count = device.geometry().block_count();
        self.mailbox.report(index, self.vcpu_count, block_count)
    }

    /// Asks the guest for a report and waits for it. Everything in it but the workers' counters, which go on, is
    /// from one moment, and that is after every interrupt raised before this is called.
    ///
    /// # Errors
    ///
    /// [`ReportError`] if the guest has ended or does not answer in time.
    pub fn report(&self, timeout: Duration) -> Result<Report, ReportError> {
        self.report_until(deadline(timeout))
            .map_err(|reason| ReportError::new(reason, timeout))?;
        Ok(self.progress())
    }

    /// As [`report`](Self::report), of each device.
    ///
    /// # Errors
    ///
    /// [`ReportError`] if the guest has ended or does not answer in time.
    pub fn reports(&self, timeout: Duration) -> Result<Vec<Report>, ReportError> {
        self.report_until(deadline(timeout))
            .map_err(|reason| ReportError::new(reason, timeout))?;
        Ok(self.progresses())
    }

    /// What the guest does with the blocks of device `index`, with a report that is asked for as
    /// [`report`](Self::report) does; what was known last if the guest does not answer in time.
    /// `None` if there is no such device.
    #[must_use]
    pub fn block_use(&self, index: usize, timeout: Duration) -> Option<BlockUse> {
        let block_count = self.devices().nth(index)?.geometry().block_count();
        // Before the request: whichever report takes it, it is not older than this.
        self.mailbox.use_request.store(1, Ordering::Release);
        // As in `report`, but there is no other answer to be had.
        let _ = self.report_until(deadline(timeout));
        Some(self.mailbox.block_use(index, block_count))
    }

    /// Waits until the driver has settled on a target of `requested_size` bytes, and reports then.
    ///
    /// The device knows sooner that blocks are plugged than the guest that asked for it: what the two believe
    /// can only be compared once the guest has come to rest.
    ///
    /// # Errors
    ///
    /// [`ReportError`] if the guest has ended or has not settled in time.
    pub fn settled(&self, requested_size: u64, timeout: Duration) -> Result<Report, ReportError> {
        let deadline = deadline(timeout);
        loop {
            self.report_until(deadline)
                .map_err(|reason| ReportError::new(reason, timeout))?;
            let report = self.progress();
            match report.driver_state {
                Some(DriverState::Failed) => {
                    return Err(ReportError::DriverFailed(
                        report.message.unwrap_or_default(),
                    ));
                }
                Some(DriverState::Settled) if report.requested_size == requested_size => {
                    return Ok(report);
                }
                _ => {}
            }
        }
    }

    fn report_until(&self, deadline: Instant) -> Result<(), NotDone> {
        // Counted here: what the guest makes of the number in the mailbox is its own business.
        let request = self.reports.fetch_add(1, Ordering::Relaxed) + 1;
        // The larger of two that ask at the same time; one answer is for both.
        self.mailbox
            .report_request
            .fetch_max(request, Ordering::AcqRel);
        self.bus.port.wake();
        let done = || self.mailbox.report_done.load(Ordering::Acquire) >= request;
        self.lifecycle.wait_for(deadline, done)
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn interrupts(&self) -> InterruptCounts {
        self.first().interrupt().counts()
    }

    /// Exits to the VMM so far; `None` without KVM.
    #[must_use]
    pub fn exits(&self) -> Option<ExitCounts> {
        match &self.guest {
            RunningGuest::Kvm(vm, _) => Some(vm.exits()),
            RunningGuest::InProcess(_) => None,
        }
    }

    /// KVM memory slots all devices have now; `None` without KVM.
    #[must_use]
    pub fn slots(&self) -> Option<u64> {
        match &self.guest {
            RunningGuest::Kvm(_, slots) => Some(slots.iter().map(RevocableSlots::count).sum()),
            RunningGuest::InProcess(_) => None,
        }
    }

    /// Keeps `vcpu` from running guest code until [`release`](Self::release); `false` in this process, where that
    /// cannot be done.
    pub fn hold(&self, vcpu: usize) -> bool {
        match &self.guest {
            RunningGuest::Kvm(vm, _) => vm.hold(vcpu),
            RunningGuest::InProcess(_) => false,
        }
    }

    /// Ends [`hold`](Self::hold).
    pub fn release(&self, vcpu: usize) {
        if let RunningGuest::Kvm(vm, _) = &self.guest {
            vm.release(vcpu);
        }
    }

    /// Tells the guest to touch guest-physical `address`, whether that is plugged or not.
    pub fn rogue(&self, address: u64) {
        self.mailbox.rogue_address.store(address, Ordering::Release);
        self.command(command::ROGUE);
    }

    /// How the guest has ended; `None` while it runs.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.lifecycle.outcome()
    }

    /// Calls `listener` once when the guest ends, on a thread of the machine's; at once if it has ended already.
    pub fn on_end(&self, listener: impl FnOnce(&Outcome) + Send + 'static) {
        self.lifecycle.on_end(listener);
    }

    /// Waits for the guest's end; `None` if it still runs after `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Outcome> {
        self.lifecycle.wait(deadline(timeout))
    }

    /// Asks the guest to come to its end, ends it after `grace` if it has not, joins every thread and says how
    /// it went. The device stays usable as long as somebody has a [`Handle`] of it.
    ///
    /// A guest in this process cannot be ended against its will: it is waited for.
    #[must_use]
    pub fn stop(mut self, grace: Duration) -> Outcome {
        self.finish(grace)
    }

    /// As [`stop`](Self::stop), and keeps what can be read of the machine: what the workers found when they
    /// verified all their pages for the last time is in [`progress`](Self::progress).
    #[must_use]
    pub fn finish(&mut self, grace: Duration) -> Outcome {
        self.command(command::STOP);
        if self.lifecycle.wait(deadline(grace)).is_none() {
            self.lifecycle.finish(Outcome::Stopped);
        }
        match &mut self.guest {
            RunningGuest::Kvm(vm, _) => {
                vm.halt();
                vm.join();
            }
            RunningGuest::InProcess(guest) => guest.join(),
        }
        self.events.stop();
        // Always there: either the guest has ended or it was `Stopped` above.
        self.lifecycle.outcome().unwrap_or(Outcome::Stopped)
    }

    fn command(&self, bit: u32) {
        self.mailbox.command.fetch_or(bit, Ordering::AcqRel);
        self.bus.port.wake();
    }
}

/// `timeout` from now; a time beyond the clock's end becomes one that nobody lives to see.
fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout)
        .unwrap_or_else(|| now + Duration::from_secs(u64::from(u32::MAX)))
}

fn boot_memory(bytes: u64) -> Result<Arc<BootMemory>, StartError> {
    // A size that is no usize is refused as any other that cannot be had.
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    let memory = BootMemory::from_ranges(&[(GuestAddress(0), len)]);
    Ok(Arc::new(
        memory.map_err(|error| StartError::Memory(bytes, error))?,
    ))
}

/// Everything but what runs the guest.
struct Parts {
    memory: Arc<BootMemory>,
    layout: Layout,
    parameters: GuestParameters,
    mailbox: SharedMailbox,
    bus: Arc<Bus>,
    lifecycle: Arc<Lifecycle>,
    events: EventLoop,
}

impl Parts {
    fn new(
        config: &MachineConfig,
        memory: Arc<BootMemory>,
        devices: Vec<VirtioMem>,
        image_end: u64,
    ) -> Result<Self, StartError> {
        let geometries: Vec<_> = devices.iter().map(VirtioMem::geometry).collect();
        let layout = Layout::new(
            config.boot_memory,
            image_end,
            &geometries,
            config.vcpu_count,
        )?;
        let domains = devices.iter().map(VirtioMem::node_id).collect();
        let mailbox = SharedMailbox::new(&memory, &layout)?;
        let workload = config.workload as u32;
        mailbox.workload.store(workload, Ordering::Relaxed);
        let port = Arc::new(Port::new(mailbox.clone()));
        let events = EventLoop::start()?;
        let transport = |device| {
            let port = Arc::clone(&port);
            let interrupt = InterruptLine::new(move || port.interrupt());
            let remote = events.remote().clone();
            let transport = MmioTransport::new(device, Arc::clone(&memory), remote, interrupt);
            Ok(Arc::new(transport.map_err(StartError::Notify)?))
        };
        let transports: Result<_, StartError> = devices.into_iter().map(transport).collect();
        let bus = Bus {
            transports: transports?,
            port,
        };
        Ok(Self {
            memory,
            layout,
            parameters: GuestParameters {
                seed: config.seed,
                worker_pages: config.worker_pages,
                policy: config.policy,
                mixed_zones: config.workload != Workload::Alloc,
                domains,
            },
            mailbox,
            bus: Arc::new(bus),
            lifecycle: Arc::new(Lifecycle::new(config.vcpu_count)),
            events,
        })
    }

    fn into_machine(self, backend: Backend, guest: RunningGuest) -> Machine {
        Machine {
            guest,
            events: self.events,
            bus: self.bus,
            backend,
            mailbox: self.mailbox,
            lifecycle: self.lifecycle,
            reports: AtomicU64::new(0),
            vcpu_count: self.layout.vcpu_count,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use virtio_mem::{Anonymous, Slot, SlotMapper};

    use super::*;
    use crate::layout::REGION_START;
    use crate::outcome::UnpluggedAccess;

    /// `resources/guest-image/src/bin/probe.rs`
    static PROBE: &[u8] = include_bytes!(env!("VMEM_PROBE_IMAGE"));
    const READ: u64 = 2;
    const WRITE: u64 = 3;
    const OTHERS_SPIN: u64 = 0x100;

    /// Generous: nothing here depends on how fast the machine is.
    const LONG: Duration = Duration::from_secs(60);

    /// A guest that touches `address`, with slots over a region in which every block is closed.
    fn start_touching(behaviour: u64, address: u64) -> Option<Machine> {
        let kvm = match open_kvm() {
            Ok(kvm) => kvm,
            Err(reason) => {
                assert!(std::env::var_os("VMEM_REQUIRE_KVM").is_none(), "{reason}");
                // Past the harness, which hides what passing tests print.
                let mut stderr = std::io::stderr().lock();
                writeln!(stderr, "SKIPPED closed block inside a slot: {reason}").unwrap();
                return None;
            }
        };
        let config = MachineConfig {
            boot_memory: 32 << 20,
            seed: behaviour | OTHERS_SPIN,
            worker_pages: address,
            ..MachineConfig::default()
        };
        let memory = boot_memory(config.boot_memory).unwrap();
        let loaded = boot::load_image(&memory, PROBE).unwrap();
        let vm = Vm::new(kvm, Arc::clone(&memory)).unwrap();
        let backing = Anonymous::base_pages(64 << 20).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION_START), backing)
            .build()
            .unwrap();
        let slots = RevocableSlots::new(KvmSlots::new(Arc::clone(vm.fd()), FIRST_FREE_SLOT));
        for index in 0..2u32 {
            let offset = u64::from(index) * (32 << 20);
            let slot = Slot {
                index,
                guest_address: REGION_START + offset,
                host_address: device.backing().host_address().as_ptr() as u64 + offset,
                len: 32 << 20,
            };
            slots.map(&slot).unwrap();
        }
        let parts = Parts::new(&config, memory, vec![device], loaded.end).unwrap();
        boot::build_page_tables(&parts.memory, &parts.layout).unwrap();
        boot::write_boot_info(&parts.memory, &parts.layout, &parts.parameters).unwrap();
        let vm_parts = VmParts {
            bus: Arc::clone(&parts.bus),
            lifecycle: Arc::clone(&parts.lifecycle),
            mailbox: parts.mailbox.clone(),
            revoke_slots: Arc::new({
                let slots = slots.clone();
                move || slots.revoke()
            }),
        };
        let running = vm.start(&vm_parts, &parts.layout, loaded.entry).unwrap();
        let backend = Backend::Kvm { module: None };
        Some(parts.into_machine(backend, RunningGuest::Kvm(running, vec![slots])))
    }

    #[test]
    fn touching_a_closed_block_inside_a_slot_reports_address_and_vcpu() {
        for (behaviour, write) in [(READ, false), (WRITE, true)] {
            let address = REGION_START + (33 << 20) + 0x128;
            let Some(machine) = start_touching(behaviour, address) else {
                return;
            };
            let access = UnpluggedAccess {
                vcpu: 1,
                address,
                write,
                len: 8,
            };
            assert_eq!(machine.wait(LONG), Some(Outcome::UnpluggedAccess(access)));
            // Once for the address nobody knew, and as an MMIO exit that has it.
            assert_eq!(machine.exits().unwrap().faults, 1);
            assert_eq!(machine.handle().resident_bytes().unwrap(), 0);
            assert_eq!(machine.stop(LONG), Outcome::UnpluggedAccess(access));
        }
    }
}

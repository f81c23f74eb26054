//! Driver and device in one thread: the guest driver and its hotplug core on one side, the real device on the other,
//! virtqueues in shared memory between them, and a clock that jumps.
//!
//! ```text
//!  Load ---> Hotplug <--- MemDriver ---> LoopbackTransport ---> Bus ---> MmioTransport ---> VirtioMem
//!              |  pages                        requests are held,          served by hand     |  memory, slots, observers
//!              v                               lost, damaged                                  v  that fail
//!         GuestMemory ------------------- Shadow: what may be touched <------------------ HostFaults
//! ```
//!
//! Nothing in here depends on time, threads or addresses of the process: the same case with the same seed sends the
//! same requests.

pub mod bus;
mod check;
pub mod host;
pub mod load;
pub mod memory;

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use virtio_mem::wire::BlockMap;
use virtio_mem::{Anonymous, Builder, Handle, State, VirtioMem};
use virtio_mem_driver::driver::{MemDriver, Mode, Policy, ProbeError, Progress, Removed, Strategy};
use virtio_mem_driver::hotplug::{
    Boot, BootRange, Config, Hotplug, MemmapOnMemory, Profile, Snapshot,
};
use vm_memory::GuestAddress;
use vmm_harness::BootMemory;
use vmm_harness::in_process::{Arena, ArenaHal, HostMemory, LoopbackTransport, Shadow};
use vmm_harness::layout::REGION_START;

use bus::Bus;
use host::{FaultyBacking, FaultyObserver, FaultySlots, HostFaults};
use memory::{BOOT_RAM, DMA, GuestMemory};

/// The driver of the rig.
pub type Driver = MemDriver<ArenaHal, LoopbackTransport<Rc<Bus>>>;

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name and sizes of the architecture.
    pub profile: (&'static str, Profile),
    /// How the driver works.
    pub policy: Policy,
    /// Bytes of a device block.
    pub block_size: u64,
    /// Where the region is, and how many bytes it has.
    pub region: (u64, u64),
    /// Whether there is memory of boot, which metadata is taken from.
    pub boot_ram: bool,
    /// Whether memory may hold its own metadata.
    pub memmap_on_memory: MemmapOnMemory,
    /// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`, as the driver sees it.
    pub unplugged_inaccessible: bool,
    /// `VIRTIO_MEM_F_PERSISTENT_SUSPEND`
    pub persistent_suspend: bool,
}

impl Case {
    /// `blocks` blocks of 2 MiB at 4 GiB, on x86-64.
    #[must_use]
    pub fn plain(policy: Policy, blocks: u64) -> Self {
        Self {
            profile: ("x86-64", Profile::X86_64),
            policy,
            block_size: 2 << 20,
            region: (REGION_START, blocks << 21),
            boot_ram: false,
            memmap_on_memory: MemmapOnMemory::Off,
            unplugged_inaccessible: true,
            persistent_suspend: false,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "profile {}, strategy {:?}, {}, block size {:#x}, region {:#x} bytes at {:#x}, boot RAM {}, online {:?}, \
             big blocks {:#x}, {:?}, unplugged inaccessible {}, persistent suspend {}",
            self.profile.0,
            self.policy.strategy,
            match self.policy.force_bbm {
                true => "Big-Block Mode",
                false => "Sub-Block Mode if possible",
            },
            self.block_size,
            self.region.1,
            self.region.0,
            self.boot_ram,
            self.policy.auto_online,
            self.policy.bbm_block_size,
            self.memmap_on_memory,
            self.unplugged_inaccessible,
            self.persistent_suspend,
        )
    }
}

/// A machine with a device, and the driver of it.
#[derive(Debug)]
pub struct Rig {
    /// What it is made of.
    pub case: Case,
    /// Between driver and device.
    pub bus: Rc<Bus>,
    /// The host behind the device.
    pub host: HostFaults,
    /// The operator's end of the device.
    pub handle: Handle,
    /// What may be touched.
    pub shadow: Arc<Shadow>,
    /// The guest's memory and its pages.
    pub hotplug: Hotplug<GuestMemory>,
    /// The clock.
    pub now_ms: u64,
    driver: Option<Driver>,
    /// The driver has found blocks plugged that it will not use (G-05).
    leftovers: bool,
    /// The guest before there was a driver.
    fresh: Snapshot,
    boot: Arc<BootMemory>,
    arena: Arc<Arena>,
    /// What pages were last checked at.
    checked_at: Option<check::Stamp>,
}

impl Rig {
    /// A machine that has just started, with its driver.
    ///
    /// # Panics
    ///
    /// If the device cannot be built, or the driver does not come.
    #[must_use]
    pub fn new(case: Case) -> Self {
        Self::with(case, |builder| builder)
    }

    /// The same with these blocks plugged, and asked for, by nobody: a driver finds them.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new), and if the region has another number of blocks.
    #[must_use]
    pub fn with_plugged(case: Case, plugged: &BlockMap) -> Self {
        let mut empty = Self::new(case);
        empty.driver = None;
        let size = plugged.count() * case.block_size;
        let state = State {
            requested_size: size,
            usable_region_size: case.region.1,
            plugged_size: size,
            plugged: plugged.words().to_vec(),
            ..empty.handle.save().expect("no driver is served")
        };
        Self::with(case, |builder| builder.restore(state))
    }

    fn with(case: Case, options: impl FnOnce(Builder) -> Builder) -> Self {
        let host = HostFaults::default();
        let device = options(builder(&case, &host)).build();
        let device = device.expect("options that go together");
        let shadow = Arc::new(Shadow::new(device.geometry(), case.unplugged_inaccessible));
        let handle = device.handle();
        handle
            .add_observer(Arc::clone(&shadow))
            .expect("an observer without limits");
        let ranges = [DMA, BOOT_RAM].map(|range| {
            let len = usize::try_from(range.end - range.start).expect("a small range");
            (GuestAddress(range.start), len)
        });
        let boot = Arc::new(BootMemory::from_ranges(&ranges).expect("memory of boot"));
        let arena = Arc::new(Arena::new(&boot, DMA).expect("DMA memory"));
        let bus = Bus::new(
            device,
            Arc::clone(&boot),
            Arc::clone(&shadow),
            case.unplugged_inaccessible,
        );
        let hotplug = start(&case, &bus, &boot, &shadow);
        let mut rig = Self {
            case,
            bus,
            host,
            handle,
            shadow,
            fresh: hotplug.snapshot(),
            hotplug,
            now_ms: 0,
            driver: None,
            leftovers: false,
            boot,
            arena,
            checked_at: None,
        };
        rig.probe().expect("the driver comes");
        rig
    }

    /// The driver.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    pub fn driver(&self) -> &Driver {
        self.driver.as_ref().expect("a driver")
    }

    /// The driver, to be changed, and the memory it works on.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn driver_and_memory(&mut self) -> (&mut Driver, &mut Hotplug<GuestMemory>) {
        // There may be other machines in this thread.
        self.arena.enter();
        (self.driver.as_mut().expect("a driver"), &mut self.hotplug)
    }

    /// Mode of the driver.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.driver().mode()
    }

    /// Strategy of the driver.
    #[must_use]
    pub fn strategy(&self) -> Strategy {
        self.case.policy.strategy
    }

    /// A driver for the device.
    ///
    /// # Errors
    ///
    /// Those of [`MemDriver::probe`].
    pub fn probe(&mut self) -> Result<(), ProbeError> {
        self.arena.enter();
        let plugged = self.handle.status().plugged_size > 0;
        self.leftovers = plugged && self.strategy() == Strategy::Linux;
        let transport = LoopbackTransport::new(Rc::clone(&self.bus));
        let driver = Driver::probe(transport, &mut self.hotplug, self.case.policy)?;
        self.driver = Some(driver);
        Ok(())
    }

    /// Removes the driver.
    ///
    /// # Panics
    ///
    /// If it keeps DMA memory.
    pub fn remove_driver(&mut self) -> Option<Removed> {
        self.arena.enter();
        let driver = self.driver.take()?;
        let removed = driver.remove(&mut self.hotplug);
        assert_eq!(self.arena.pages_taken(), 0, "DMA memory is leaked");
        Some(removed)
    }

    /// Starts the guest anew: what it had in memory is gone. The device keeps its blocks, as when a kernel starts
    /// another one, or takes them back, as when the machine is reset.
    ///
    /// # Panics
    ///
    /// If the machine cannot be reset, or the driver does not come.
    pub fn reboot(&mut self, system_reset: bool) {
        self.arena.enter();
        self.driver = None;
        assert_eq!(self.arena.pages_taken(), 0, "DMA memory is leaked");
        if system_reset {
            let reset = self.bus.device().system_reset();
            reset.expect("a device that is not frozen resets");
            assert_eq!(self.handle.status().plugged_size, 0);
        }
        self.hotplug = start(&self.case, &self.bus, &self.boot, &self.shadow);
        self.probe().expect("the driver of a fresh guest comes");
    }

    /// One step, interrupts taken before; what may be touched is checked after it.
    ///
    /// # Panics
    ///
    /// If memory that is not plugged is touched, or may be by whoever allocates it.
    pub fn step(&mut self) -> Progress {
        let interrupted = self.bus.interrupts();
        let now_ms = self.now_ms;
        let (driver, hotplug) = self.driver_and_memory();
        if interrupted {
            driver.on_interrupt();
        }
        let progress = driver.poll(hotplug, now_ms);
        self.check_exposed();
        progress
    }

    /// Steps until the driver rests: [`Settled`](Progress::Settled), [`Stalled`](Progress::Stalled),
    /// [`Suspended`](Progress::Suspended) or [`Failed`](Progress::Failed). Requests that were held back are served when
    /// it waits for them, and time passes if they never will be. `before` is called before each step.
    ///
    /// # Panics
    ///
    /// If it does not come to rest.
    pub fn run(&mut self, mut before: impl FnMut(&mut Self)) -> Progress {
        const MOST_STEPS: u32 = 200_000;
        let mut steps = 0;
        loop {
            steps += 1;
            assert!(steps < MOST_STEPS, "no rest: {:?}", self.driver());
            before(self);
            match self.step() {
                Progress::Converging => {}
                _ if self.bus.has_waiting() => self.bus.serve(),
                progress @ Progress::Failed(_) => return progress,
                _ if self.bus.interrupts() => {}
                Progress::AwaitingDevice if self.driver().awaits_device(self.now_ms) => {
                    let deadline = self.driver().deadline_ms();
                    self.now_ms = deadline.expect("nobody waits for ever");
                }
                Progress::AwaitingDevice => {}
                progress => return progress,
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.arena.enter();
        self.driver = None;
    }
}

fn builder(case: &Case, host: &HostFaults) -> Builder {
    let (addr, size) = case.region;
    let backing = FaultyBacking {
        memory: Anonymous::base_pages(size).expect("address space for the region"),
        faults: host.clone(),
    };
    let mut builder = VirtioMem::builder(GuestAddress(addr), backing)
        .block_size(case.block_size)
        .guest_memory_block_size(case.profile.1.memory_block_size())
        .slots(FaultySlots(host.clone()))
        .observer(FaultyObserver(host.clone()));
    if case.persistent_suspend {
        builder = builder.persistent_suspend();
    }
    builder
}

/// A guest without a driver.
fn start(
    case: &Case,
    bus: &Bus,
    boot: &Arc<BootMemory>,
    shadow: &Arc<Shadow>,
) -> Hotplug<GuestMemory> {
    let (_, profile) = case.profile;
    let config = Config {
        memmap_on_memory: case.memmap_on_memory,
        struct_page_size: if case.boot_ram { 64 } else { 0 },
        ..Config::new(profile)
    };
    let ram = case.boot_ram.then_some(BootRange {
        bytes: BOOT_RAM,
        nid: 0,
    });
    let ranges = Boot {
        ram: ram.into_iter().collect(),
        cpu_nodes: vec![0],
        ..Boot::default()
    };
    let memory = GuestMemory {
        boot: Arc::clone(boot),
        region: HostMemory::new(profile.page_size()).with(bus.device(), Arc::clone(shadow)),
    };
    Hotplug::boot(config, &ranges, memory).expect("a guest that starts")
}

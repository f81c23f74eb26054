//! A driver, its memory, and a device that can be told to misbehave.

pub(crate) mod device;
pub(crate) mod dma;
pub(crate) mod memory;

use std::sync::Arc;

use virtio_mem_driver::driver::{MemDriver, Policy, ProbeError, Progress};
use virtio_mem_driver::hotplug::{
    Error, Fault, Hotplug, Mobility, OnlineType, PageHandle, Profile, Step,
};

use device::{Device, FakeTransport};
use dma::FakeHal;
use memory::PluggedMemory;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// More steps than any test takes.
const POLLS_MAX: u64 = 1_000_000;

/// No memory for the metadata of the next section.
pub(crate) const NO_METADATA: Fault = Fault {
    step: Step::Memmap,
    skip: 0,
    error: Error::NoMemory,
};

/// Linux's policy, but that memory goes online in Movable.
pub(crate) const LINUX: Policy = Policy {
    auto_online: Some(OnlineType::Movable),
    ..Policy::linux()
};

pub(crate) type Driver = MemDriver<FakeHal, FakeTransport>;

pub(crate) fn probe(device: &Arc<Device>) -> Result<Driver, ProbeError> {
    let memory = PluggedMemory(Arc::clone(device));
    let mut hotplug = Hotplug::new(Profile::X86_64, memory).unwrap();
    let transport = FakeTransport(Arc::clone(device));
    MemDriver::probe(transport, &mut hotplug, Policy::default())
}

/// A driver at work on a device of `region_size` bytes at 4 GiB, in blocks of 2 MiB.
pub(crate) struct Rig {
    pub(crate) device: Arc<Device>,
    pub(crate) driver: Driver,
    pub(crate) hotplug: Hotplug<PluggedMemory>,
    pub(crate) now_ms: u64,
    /// Steps so far.
    pub(crate) polls: u64,
}

impl Rig {
    pub(crate) fn new(region_size: u64) -> Self {
        Self::on(
            Device::new(4 * GIB, region_size, 2 * MIB),
            Policy::default(),
        )
    }

    /// The same under Linux's policy, memory going online in Movable.
    pub(crate) fn linux(region_size: u64) -> Self {
        Self::on(Device::new(4 * GIB, region_size, 2 * MIB), LINUX)
    }

    pub(crate) fn on(device: Arc<Device>, policy: Policy) -> Self {
        Self::with_profile(device, policy, Profile::X86_64)
    }

    pub(crate) fn with_profile(device: Arc<Device>, policy: Policy, profile: Profile) -> Self {
        let transport = FakeTransport(Arc::clone(&device));
        let memory = PluggedMemory(Arc::clone(&device));
        let mut hotplug = Hotplug::new(profile, memory).unwrap();
        Self {
            driver: MemDriver::probe(transport, &mut hotplug, policy).unwrap(),
            hotplug,
            device,
            now_ms: 0,
            polls: 0,
        }
    }

    /// Replaces the driver by one that is probed anew.
    pub(crate) fn probe_again(self, policy: Policy) -> Result<Self, ProbeError> {
        let Self {
            device,
            driver,
            hotplug,
            now_ms,
            ..
        } = self;
        drop(driver);
        Self::again(device, hotplug, policy, now_ms)
    }

    /// A driver for a device and memory that another one has left.
    pub(crate) fn again(
        device: Arc<Device>,
        mut hotplug: Hotplug<PluggedMemory>,
        policy: Policy,
        now_ms: u64,
    ) -> Result<Self, ProbeError> {
        let transport = FakeTransport(Arc::clone(&device));
        let driver = MemDriver::probe(transport, &mut hotplug, policy)?;
        Ok(Self {
            device,
            driver,
            hotplug,
            now_ms,
            polls: 0,
        })
    }

    /// One step, interrupts taken before.
    pub(crate) fn step(&mut self) -> Progress {
        if !self.device.state().interrupt.is_empty() {
            self.driver.on_interrupt();
        }
        self.polls += 1;
        assert!(self.polls < POLLS_MAX, "the driver never comes to rest");
        self.driver.poll(&mut self.hotplug, self.now_ms)
    }

    /// Steps until there is nothing to do at once.
    pub(crate) fn run(&mut self) -> Progress {
        for _ in 0..100_000 {
            match self.step() {
                Progress::Converging => {}
                Progress::AwaitingDevice if !self.driver.awaits_device(self.now_ms) => {}
                // An interrupt came with the answer that ended this run.
                _ if !self.device.state().interrupt.is_empty() => {}
                progress => return progress,
            }
        }
        panic!("the driver does not come to rest");
    }

    /// Asks for `size`, lets the driver get as far as it can, and returns the requests that took, in
    /// `(name, first block, blocks)`.
    pub(crate) fn requests_for(&mut self, size: u64) -> Vec<(String, u64, u64)> {
        self.device.request(size);
        self.run();
        self.check();
        self.device.state().take_requests()
    }

    /// Brings a memory block online, as user space would, and returns the requests that follow.
    pub(crate) fn requests_after_online(
        &mut self,
        id: u64,
        online_type: OnlineType,
    ) -> Vec<(String, u64, u64)> {
        self.hotplug.online(id, online_type).unwrap();
        self.run();
        self.check();
        self.device.state().take_requests()
    }

    /// Asks for `size` and checks that both halves get there.
    pub(crate) fn resize(&mut self, size: u64) {
        self.device.request(size);
        assert_eq!(self.run(), Progress::Settled, "target {size:#x}");
        self.check();
        assert_eq!(self.driver.plugged_size(), size);
    }

    /// Checks what must hold at rest.
    pub(crate) fn check(&self) {
        self.hotplug.check_invariants().unwrap();
        let state = self.device.state();
        assert_eq!(self.driver.plugged_map(), &state.plugged);
        assert_eq!(
            self.driver.plugged_size(),
            state.config.mutable.plugged_size
        );
        let page_size = self.hotplug.profile().page_size();
        let managed = self.hotplug.counts().managed * page_size;
        assert!(managed <= self.driver.plugged_size());
    }

    /// Allocates `count` pages and writes a tag into each.
    pub(crate) fn allocate(&mut self, count: u64, mobility: Mobility) -> Vec<PageHandle> {
        (0..count)
            .map(|tag| {
                let handle = self.hotplug.allocate(mobility).unwrap();
                tagged::write(&mut self.hotplug, handle, tag);
                handle
            })
            .collect()
    }

    /// Checks that the pages allocated last still have their tags.
    pub(crate) fn verify(&mut self, handles: &[PageHandle]) {
        for (tag, handle) in handles.iter().enumerate() {
            assert_eq!(tagged::read(&mut self.hotplug, *handle), tag as u64);
        }
    }
}

/// Tags in pages: the first and the last word.
pub(crate) mod tagged {
    #![expect(unsafe_code, reason = "pages are raw memory")]

    use virtio_mem_driver::hotplug::{Hotplug, PageHandle, PhysicalMemory};

    pub(crate) fn write<M: PhysicalMemory>(hotplug: &mut Hotplug<M>, page: PageHandle, tag: u64) {
        let pointer = hotplug.pin(page).unwrap().cast::<[u64; 512]>();
        // SAFETY: The page is pinned and ours.
        unsafe { pointer.write([tag; 512]) };
        hotplug.unpin(page).unwrap();
    }

    pub(crate) fn read<M: PhysicalMemory>(hotplug: &mut Hotplug<M>, page: PageHandle) -> u64 {
        let pointer = hotplug.pin(page).unwrap().cast::<[u64; 512]>();
        // SAFETY: The page is pinned and ours.
        let words = unsafe { pointer.read() };
        hotplug.unpin(page).unwrap();
        assert!(words.iter().all(|word| *word == words[0]), "a page is torn");
        words[0]
    }
}

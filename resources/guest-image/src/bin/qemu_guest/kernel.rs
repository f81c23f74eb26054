//! The kernel: hotplug core, driver, and pages in use.

use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_drivers::transport::pci::PciTransport;
use virtio_mem_driver::driver::{MemDriver, Policy, Progress};
use virtio_mem_driver::hotplug::{
    self, Boot, Config, Hotplug, Mobility, OnlineType, PageHandle, Profile,
};
use vmem_guest::Pattern;
use vmem_guest_image::identity::{HeapHal, IdentityMapped};

use crate::clock::Clock;
use crate::{pci, println};

const PAGE_SIZE: u64 = 4096;

/// A running kernel.
pub(crate) struct Kernel {
    hotplug: Hotplug<IdentityMapped>,
    driver: Option<MemDriver<HeapHal, PciTransport>>,
    policy: Policy,
    clock: Clock,
    progress: Option<Progress>,
    /// Bytes the page allocator had at boot.
    boot_memory: u64,
    /// Memory blocks there were at boot.
    boot_blocks: usize,
    /// Page `i` holds pattern `i`.
    pages: Vec<PageHandle>,
    pinned: Option<PageHandle>,
}

/// What becomes of a command. What it has to say it has said.
pub(crate) enum Answer {
    Done,
    Failed(String),
    Prompt,
    Restart,
    Quit,
}

impl<E: fmt::Display> From<Result<(), E>> for Answer {
    fn from(result: Result<(), E>) -> Self {
        match result {
            Ok(()) => Self::Done,
            Err(error) => Self::Failed(error.to_string()),
        }
    }
}

impl Kernel {
    /// Memory as the VMM describes it, then the device.
    pub(crate) fn boot(memory: &Boot, policy: Policy, clock: Clock) -> Result<Self, String> {
        let mut config = Config::new(Profile::X86_64);
        if policy.auto_online.is_none() {
            // Linux's driver leaves it to the core, and its users boot with `memhp_default_state=online_movable`.
            config.default_online_type = Some(OnlineType::Movable);
        }
        let hotplug = Hotplug::boot(config, memory, IdentityMapped);
        let hotplug = hotplug.map_err(|error| error.to_string())?;
        let mut kernel = Self {
            boot_memory: hotplug.counts().managed * PAGE_SIZE,
            boot_blocks: hotplug.blocks().count(),
            hotplug,
            driver: None,
            policy,
            clock,
            progress: None,
            pages: Vec::new(),
            pinned: None,
        };
        kernel.probe()?;
        Ok(kernel)
    }

    fn probe(&mut self) -> Result<(), String> {
        if self.driver.is_some() {
            return Err("there is a driver".into());
        }
        let transport = pci::memory_device().map_err(|error| error.to_string())?;
        let driver = MemDriver::probe(transport, &mut self.hotplug, self.policy);
        self.driver = Some(driver.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// A step of the driver. There are no interrupts, so it is asked each time whether there would be one.
    pub(crate) fn poll(&mut self) {
        if let Some(driver) = &mut self.driver {
            driver.on_interrupt();
            self.progress = Some(driver.poll(&mut self.hotplug, self.clock.now_ms()));
        }
    }

    pub(crate) fn execute(&mut self, command: &str) -> Answer {
        let words: Vec<_> = command.split_ascii_whitespace().collect();
        match words[..] {
            ["status"] => self.status().into(),
            ["load", count] => match count.parse() {
                Ok(count) => self.load(count).into(),
                Err(error) => Answer::Failed(format!("{count:?}: {error}")),
            },
            ["verify"] => self.verify().into(),
            ["free"] => self.free().into(),
            ["pin"] => self.pin().into(),
            ["unpin"] => self.unpin().into(),
            ["obstacles"] => self.obstacles().into(),
            ["retry"] => self.driver().map(MemDriver::retry).into(),
            ["remove"] => self.remove().into(),
            ["probe"] => self.probe().into(),
            ["prompt"] => Answer::Prompt,
            [] => Answer::Done,
            ["restart"] => Answer::Restart,
            ["quit"] => Answer::Quit,
            _ => Answer::Failed(format!("no command {command:?}")),
        }
    }

    fn driver(&mut self) -> Result<&mut MemDriver<HeapHal, PciTransport>, &'static str> {
        self.driver.as_mut().ok_or("there is no driver")
    }

    fn status(&mut self) -> Result<(), &'static str> {
        let hotplugged = self.hotplug.counts().managed * PAGE_SIZE - self.boot_memory;
        let blocks = self.hotplug.blocks().count() - self.boot_blocks;
        let moved = self.hotplug.statistics().pages_migrated;
        let (pages, progress) = (self.pages.len(), self.progress);
        let driver = self.driver()?;
        let (config, region) = (driver.config(), region(driver));
        let progress = progress.map_or(String::new(), |progress| progress.to_string());
        let unreachable = driver
            .unreachable()
            .map_or(0, |unreachable| unreachable.bytes);
        println!(
            "{{\"progress\": \"{progress}\", \"unreachable\": {unreachable}, \"mode\": \"{:?}\", \"granule\": {}, \
             \"block_size\": {}, \"region\": [{}, {}], \"usable\": {}, \"requested\": {}, \
             \"plugged\": {}, \"hotplugged\": {hotplugged}, \"memory_blocks\": {blocks}, \"pages\": {pages}, \
             \"moved\": {moved}, \"requests\": {}, \"features\": {}}}",
            driver.mode(),
            driver.granule_size(),
            config.geometry.block_size(),
            region.start,
            region.end,
            config.mutable.usable_region_size,
            config.mutable.requested_size,
            driver.plugged_size(),
            driver.counters().total_requests(),
            driver.features().bits(),
        );
        Ok(())
    }

    fn load(&mut self, count: usize) -> Result<(), hotplug::Error> {
        for _ in 0..count {
            let page = self.hotplug.allocate(Mobility::Movable)?;
            let pattern = pattern(self.pages.len());
            self.pages.push(page);
            self.with_page(page, |memory| fill(pattern, memory))?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<(), String> {
        for index in 0..self.pages.len() {
            let page = self.pages[index];
            let intact = self.with_page(page, |memory| matches(pattern(index), memory));
            if !intact.map_err(|error| error.to_string())? {
                let address = self
                    .hotplug
                    .address(page)
                    .map_err(|error| error.to_string())?;
                return Err(format!("page {index} at {address:#x} has lost its content"));
            }
        }
        println!("{}", self.pages.len());
        Ok(())
    }

    /// A page may move whenever it is not pinned; then its handle is all that stays.
    fn with_page<R>(
        &mut self,
        page: PageHandle,
        work: impl FnOnce(NonNull<u8>) -> R,
    ) -> Result<R, hotplug::Error> {
        let memory = self.hotplug.pin(page)?;
        let result = work(memory);
        self.hotplug.unpin(page)?;
        Ok(result)
    }

    fn free(&mut self) -> Result<(), hotplug::Error> {
        while let Some(page) = self.pages.pop() {
            self.hotplug.free(page)?;
        }
        Ok(())
    }

    fn pin(&mut self) -> Result<(), String> {
        let region = region(self.driver()?);
        let hotplugged = |page: &&PageHandle| {
            let address = self.hotplug.address(**page);
            address.is_ok_and(|address| region.contains(&address))
        };
        let page = self.pages.iter().find(hotplugged);
        let page = *page.ok_or("no page is in hotplugged memory")?;
        if self.pinned.is_some() {
            return Err("there is a pinned page".into());
        }
        self.hotplug.pin(page).map_err(|error| error.to_string())?;
        self.pinned = Some(page);
        let address = self
            .hotplug
            .address(page)
            .map_err(|error| error.to_string())?;
        println!("{address}");
        Ok(())
    }

    fn unpin(&mut self) -> Result<(), String> {
        let page = self.pinned.take().ok_or("no page is pinned")?;
        self.hotplug.unpin(page).map_err(|error| error.to_string())
    }

    fn obstacles(&mut self) -> Result<(), String> {
        let size = self.hotplug.profile().memory_block_size();
        let region = region(self.driver()?);
        for block in region.start / size..region.end.div_ceil(size) {
            if let Ok(Some((address, obstacle))) = self.hotplug.obstacle(block) {
                println!("{block} {address} {obstacle:?}");
            }
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), &'static str> {
        let driver = self.driver.take().ok_or("there is no driver")?;
        self.progress = None;
        println!("{}", driver.remove(&mut self.hotplug).added_size);
        Ok(())
    }
}

/// Addresses of the device-managed region.
fn region(driver: &MemDriver<HeapHal, PciTransport>) -> Range<u64> {
    let geometry = &driver.config().geometry;
    geometry.addr()..geometry.addr() + geometry.region_size()
}

fn pattern(index: usize) -> Pattern {
    Pattern::new(0, 0, index as u64)
}

#[expect(unsafe_code, reason = "pages are raw memory")]
fn fill(pattern: Pattern, memory: NonNull<u8>) {
    // SAFETY: a whole page, pinned, and there is one processor.
    unsafe { pattern.fill(memory) };
}

#[expect(unsafe_code, reason = "pages are raw memory")]
fn matches(pattern: Pattern, memory: NonNull<u8>) -> bool {
    // SAFETY: as above.
    unsafe { pattern.matches(memory) }
}

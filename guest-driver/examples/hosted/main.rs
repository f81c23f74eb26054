//! A kernel in a process: what one has to bring to use this crate, and what it gets for it.
//!
//! The device is the real one, and so is the memory; only the bus is missing. `docs/embedding.md` walks through this.
//!
//! ```text
//! cargo run -p virtio-mem-driver --example hosted
//! ```
#![expect(unsafe_code, reason = "`PhysicalMemory` is an unsafe trait")]

mod machine;

use std::error::Error;
use std::ptr::NonNull;

use log::{LevelFilter, Log, Metadata, Record};
use machine::{BOOT_SIZE, Dma, KERNEL_SIZE, Loopback, Machine};
use virtio_mem_driver::driver::{MemDriver, Policy, Progress, Suspend};
use virtio_mem_driver::hotplug::{
    Boot, BootRange, Config, Hotplug, Mobility, PageHandle, PhysicalMemory, Profile,
};

const MIB: u64 = 1 << 20;

// ---- what a kernel brings: begin ------------------------------------------------------------------------

/// Access to physical memory.
struct Mapped<'a>(&'a Machine);

// SAFETY: pages the bookkeeping asks for are online, so they are boot memory or plugged, and mapped at one place for
// as long as the machine exists.
unsafe impl PhysicalMemory for Mapped<'_> {
    fn page(&self, address: u64) -> NonNull<u8> {
        self.0.page(address)
    }
}

/// The kernel's log.
struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            println!("    [{}] {}", record.level(), record.args());
        }
    }

    fn flush(&self) {}
}

struct Kernel<'a, I> {
    hotplug: Hotplug<Mapped<'a>>,
    driver: MemDriver<Dma, Loopback>,
    interrupt_pending: I,
    /// The clock jumps to the next deadline instead of waiting for it.
    now_ms: u64,
}

/// Memory as the firmware describes it, all of it online; then the device.
fn boot(machine: &Machine) -> Result<Kernel<'_, impl Fn() -> bool>, Box<dyn Error>> {
    let boot = Boot {
        ram: vec![BootRange {
            bytes: 0..BOOT_SIZE,
            nid: 0,
        }],
        reserved: std::iter::once(0..KERNEL_SIZE).collect(),
        ..Boot::default()
    };
    let config = Config::new(Profile::X86_64);
    let mut hotplug = Hotplug::boot(config, &boot, Mapped(machine))?;
    hotplug.set_uevent_sink(Box::new(|uevent| println!("    uevent: {uevent}")));
    let transport = machine.transport();
    let interrupt_pending = transport.interrupt_line();
    let mut driver = MemDriver::probe(transport, &mut hotplug, Policy::default())?;
    driver.set_event_sink(Box::new(|event| println!("    event: {event}")));
    Ok(Kernel {
        hotplug,
        driver,
        interrupt_pending,
        now_ms: 0,
    })
}

impl<I: Fn() -> bool> Kernel<'_, I> {
    /// The driver's loop: until there is nothing to do but to wait, for an interrupt or a deadline.
    fn run(&mut self) -> Progress {
        loop {
            if (self.interrupt_pending)() {
                self.driver.on_interrupt();
            }
            let progress = self.driver.poll(&mut self.hotplug, self.now_ms);
            let waits = match progress {
                Progress::Converging => false,
                Progress::AwaitingDevice => self.driver.awaits_device(self.now_ms),
                _ => true,
            };
            if waits && !(self.interrupt_pending)() {
                return progress;
            }
        }
    }
}

// ---- what a kernel brings: end --------------------------------------------------------------------------

impl<I: Fn() -> bool> Kernel<'_, I> {
    /// Runs, and waits for deadlines too, until the driver has said the same for the fourth time.
    fn run_patiently(&mut self) -> Progress {
        let mut progress = self.run();
        for _ in 0..3 {
            if let Some(deadline_ms) = self.driver.deadline_ms() {
                self.now_ms = deadline_ms;
                progress = self.run();
            }
        }
        progress
    }

    /// A page may move whenever it is not pinned; then its handle is all that stays.
    fn with_page<R>(
        &mut self,
        page: PageHandle,
        work: impl FnOnce(NonNull<u8>) -> R,
    ) -> Result<R, Box<dyn Error>> {
        let memory = self.hotplug.pin(page)?;
        let result = work(memory);
        self.hotplug.unpin(page)?;
        Ok(result)
    }

    fn report(&self, what: &str, progress: Progress) {
        let counts = self.hotplug.counts();
        println!(
            "{what}: {progress}; plugged {} MiB, usable pages {}, pages moved {}",
            self.driver.plugged_size() / MIB,
            counts.managed,
            self.hotplug.statistics().pages_migrated,
        );
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    log::set_logger(&Console).map_err(|error| error.to_string())?;
    log::set_max_level(LevelFilter::Info);
    let machine = Machine::new()?;
    let operator = machine.handle();
    let mut kernel = boot(&machine)?;

    operator.resize(192 * MIB)?;
    let progress = kernel.run();
    kernel.report("grown", progress);

    // Pages that can be moved, with something in them, and one that cannot.
    let pages: Vec<_> = (0..40_000)
        .map(|_| kernel.hotplug.allocate(Mobility::Movable))
        .collect::<Result<_, _>>()?;
    for (index, page) in pages.iter().enumerate() {
        // SAFETY: the page is pinned meanwhile, and this kernel has one thread.
        kernel.with_page(*page, |memory| unsafe {
            memory.cast().write(content(index));
        })?;
    }
    let device_page = *pages.last().expect("there are 40,000");
    kernel.hotplug.pin(device_page)?;

    operator.resize(0)?;
    let progress = kernel.run_patiently();
    kernel.report("shrunk as far as can be", progress);
    let block = kernel.hotplug.address(device_page)? / kernel.hotplug.profile().memory_block_size();
    if let Some((address, obstacle)) = kernel.hotplug.obstacle(block)? {
        println!(
            "memory block {block} cannot go because of the page at {address:#x}: {obstacle:?}"
        );
    }

    kernel.hotplug.unpin(device_page)?;
    kernel.driver.retry();
    let progress = kernel.run();
    kernel.report("shrunk", progress);
    for (index, page) in pages.iter().enumerate() {
        // SAFETY: as above.
        let found: u64 = kernel.with_page(*page, |memory| unsafe { memory.cast().read() })?;
        if found != content(index) {
            return Err(format!("page {index} has lost its content").into());
        }
    }
    println!("all {} pages have kept their content", pages.len());

    // The driver is replaced while its memory is in use.
    operator.resize(130 * MIB)?;
    let progress = kernel.run();
    kernel.report("grown again", progress);
    let Kernel {
        mut hotplug,
        driver,
        now_ms,
        ..
    } = kernel;
    println!("driver removed: {}", driver.remove(&mut hotplug));
    let transport = machine.transport();
    let interrupt_pending = transport.interrupt_line();
    let mut driver = MemDriver::probe(transport, &mut hotplug, Policy::default())?;
    driver.set_event_sink(Box::new(|event| println!("    event: {event}")));
    let mut kernel = Kernel {
        hotplug,
        driver,
        interrupt_pending,
        now_ms,
    };
    let progress = kernel.run();
    kernel.report("taken over", progress);

    // Suspend to RAM: this device does not promise to keep what is plugged.
    match kernel.driver.suspend(&mut kernel.hotplug, Suspend::Ram) {
        Err(refusal) => println!("no suspend to RAM: {refusal}"),
        Ok(()) => return Err("memory would have been lost".into()),
    }
    kernel.driver.suspend(&mut kernel.hotplug, Suspend::Idle)?;
    kernel.driver.resume()?;
    let progress = kernel.run();
    kernel.report("suspended to idle and resumed", progress);
    Ok(())
}

/// What page `index` holds.
fn content(index: usize) -> u64 {
    (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

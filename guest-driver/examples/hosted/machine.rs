//! What stands in for hardware: RAM, a real memory device, and the registers and wires between it and the kernel.
#![expect(
    unsafe_code,
    reason = "`Hal` is an unsafe trait, and RAM is raw memory"
)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use virtio_mem::{Anonymous, Handle, Interrupt, MemoryRegion, QueueHandler, Served, VirtioMem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Boot memory: the kernel is thought to lie in its first part, with the DMA memory behind.
pub(crate) const BOOT_SIZE: u64 = 256 << 20;
pub(crate) const KERNEL_SIZE: u64 = 16 << 20;
const DMA_START: u64 = KERNEL_SIZE / 2;

/// Where the device-managed region begins, and its size.
pub(crate) const REGION: GuestAddress = GuestAddress(4 << 30);
const REGION_SIZE: u64 = 1 << 30;

type Memory = Arc<GuestRegionCollection<MemoryRegion>>;
type AnyError = Box<dyn std::error::Error>;

/// The machine, as its VMM sees it.
pub(crate) struct Machine {
    device: VirtioMem,
    memory: Memory,
}

impl Machine {
    pub(crate) fn new() -> Result<Self, AnyError> {
        let ram = GuestRegionMmap::from_range(GuestAddress(0), BOOT_SIZE as usize, None)?;
        let boot_memory = ram.get_host_address(MemoryRegionAddress(0))?;
        DMA.set(Dma::new(boot_memory))
            .map_err(|_| "one machine at a time")?;
        let device = VirtioMem::builder(REGION, Anonymous::base_pages(REGION_SIZE)?).build()?;
        let regions = vec![MemoryRegion::Ram(ram), device.region(())];
        let memory = Arc::new(GuestRegionCollection::from_regions(regions)?);
        Ok(Self { device, memory })
    }

    /// For the operator, who sets the target.
    pub(crate) fn handle(&self) -> Handle {
        self.device.handle()
    }

    /// Where the kernel has a page: the two mappings a real kernel would find in its page tables.
    pub(crate) fn page(&self, address: u64) -> NonNull<u8> {
        let (base, offset) = match self.device.geometry().block_at(address) {
            Some(_) => (self.device.backing().host_address(), address - REGION.0),
            None => (
                DMA.get().expect("set when the machine was made").ram(),
                address,
            ),
        };
        // SAFETY: the kernel asks for pages of its memory, so the offset lies inside the mapping.
        unsafe { base.add(offset as usize) }
    }

    /// The device's registers. They outlive any one driver.
    pub(crate) fn transport(&self) -> Loopback {
        Loopback {
            device: self.device.clone(),
            memory: Arc::clone(&self.memory),
            interrupts: Arc::default(),
            status: DeviceStatus::empty(),
            queue: None,
            handler: None,
        }
    }
}

/// Interrupts that were raised and not acknowledged.
#[derive(Default)]
struct Interrupts(AtomicU32);

impl Interrupt for Interrupts {
    fn used_buffer(&self) {
        let bit = InterruptStatus::QUEUE_INTERRUPT.bits();
        self.0.fetch_or(bit, Ordering::AcqRel);
    }

    fn config_change(&self) {
        let bit = InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT.bits();
        self.0.fetch_or(bit, Ordering::AcqRel);
    }
}

/// A transport without a bus: the device is called, and has served the queue when `notify` returns. A kernel has
/// `MmioTransport` or `PciTransport` of virtio-drivers here.
pub(crate) struct Loopback {
    device: VirtioMem,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    status: DeviceStatus,
    queue: Option<Queue>,
    handler: Option<QueueHandler<Memory>>,
}

impl Loopback {
    /// What the interrupt controller would call the handler for.
    pub(crate) fn interrupt_line(&self) -> impl Fn() -> bool + use<> {
        let interrupts = Arc::clone(&self.interrupts);
        move || interrupts.0.load(Ordering::Acquire) != 0
    }

    /// DRIVER_OK: a device that cannot work says that it needs a reset.
    fn activate(&mut self) {
        let queue = self.queue.take();
        let notify = EventFd::new(EFD_NONBLOCK).ok();
        let interrupt = Arc::clone(&self.interrupts);
        self.handler = queue.zip(notify).and_then(|(queue, notify)| {
            let memory = Arc::clone(&self.memory);
            self.device.activate(memory, queue, notify, interrupt).ok()
        });
        if self.handler.is_none() {
            self.status |= DeviceStatus::DEVICE_NEEDS_RESET;
        }
    }
}

/// A queue of the driver's; `None` if it has given impossible numbers.
fn set_up(size: u32, [descriptors, driver_area, device_area]: [PhysAddr; 3]) -> Option<Queue> {
    let mut queue = Queue::new(VirtioMem::QUEUE_MAX_SIZE).ok()?;
    queue.try_set_size(size.try_into().ok()?).ok()?;
    queue
        .try_set_desc_table_address(GuestAddress(descriptors))
        .ok()?;
    queue
        .try_set_avail_ring_address(GuestAddress(driver_area))
        .ok()?;
    queue
        .try_set_used_ring_address(GuestAddress(device_area))
        .ok()?;
    queue.set_ready(true);
    Some(queue)
}

impl Transport for Loopback {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn read_device_features(&mut self) -> u64 {
        self.device.device_features().bits()
    }

    fn write_driver_features(&mut self, features: u64) {
        // The driver finds FEATURES_OK missing if the device does not agree.
        let agreed = self.device.acknowledge_features(features).is_ok();
        self.status.set(DeviceStatus::FEATURES_OK, agreed);
    }

    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        VirtioMem::QUEUE_MAX_SIZE.into()
    }

    fn notify(&mut self, _queue: u16) {
        if let Some(handler) = &mut self.handler {
            while handler.serve() == Served::More {}
        }
    }

    fn get_status(&self) -> DeviceStatus {
        self.status
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if status.is_empty() {
            self.device.reset();
            self.handler = None;
            self.queue = None;
            self.interrupts.0.store(0, Ordering::Release);
            self.status = status;
            return;
        }
        let agreed = self.status & DeviceStatus::FEATURES_OK;
        let started = status.contains(DeviceStatus::DRIVER_OK) && self.handler.is_none();
        self.status = (status - DeviceStatus::FEATURES_OK) | agreed;
        if started {
            self.activate();
        }
    }

    fn set_guest_page_size(&mut self, _size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _queue: u16,
        size: u32,
        descriptors: u64,
        driver_area: u64,
        device_area: u64,
    ) {
        self.queue = set_up(size, [descriptors, driver_area, device_area]);
    }

    fn queue_unset(&mut self, _queue: u16) {
        self.queue = None;
    }

    fn queue_used(&mut self, _queue: u16) -> bool {
        self.queue.is_some() || self.handler.is_some()
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.interrupts.0.swap(0, Ordering::AcqRel))
    }

    fn read_config_generation(&self) -> u32 {
        self.device.config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        self.device.read_config(offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> Result<(), Error> {
        Err(Error::Unsupported)
    }
}

/// The kernel's DMA memory, which is a part of boot memory that its page allocator does not have.
pub(crate) struct Dma {
    ram: NonNull<u8>,
    /// Pages that were given back, and how many were ever taken.
    pages: Mutex<(Vec<u64>, u64)>,
}

// SAFETY: the address is that of a mapping which the machine keeps; pages are handed out one by one under the lock.
unsafe impl Send for Dma {}
// SAFETY: as above.
unsafe impl Sync for Dma {}

/// virtio-drivers asks for DMA memory without saying of whom.
static DMA: OnceLock<Dma> = OnceLock::new();

impl Dma {
    fn new(ram: *mut u8) -> Self {
        Self {
            ram: NonNull::new(ram).expect("mappings are never at 0"),
            pages: Mutex::default(),
        }
    }

    fn ram(&self) -> NonNull<u8> {
        self.ram
    }

    fn get() -> &'static Self {
        DMA.get().expect("set when the machine was made")
    }

    /// `count` pages in a row, zeroed.
    fn allocate(&self, count: usize) -> Option<(PhysAddr, NonNull<u8>)> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let (free, taken) = &mut *pages;
        let address = match free.pop() {
            Some(address) if count == 1 => address,
            other => {
                free.extend(other);
                let address = DMA_START + *taken * PAGE_SIZE as u64;
                *taken += count as u64;
                address
            }
        };
        let end = address + (count * PAGE_SIZE) as u64;
        if end > KERNEL_SIZE {
            return None;
        }
        // SAFETY: the pages lie inside boot memory.
        let memory = unsafe { self.ram.add(address as usize) };
        // SAFETY: as above, and nobody else has them.
        unsafe { memory.write_bytes(0, count * PAGE_SIZE) };
        Some((address, memory))
    }
}

// SAFETY: `dma_alloc` hands out zeroed whole pages of boot memory, or address 0 where there are none.
unsafe impl Hal for Dma {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Self::get()
            .allocate(count)
            .unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, count: usize) -> i32 {
        let mut pages = Self::get()
            .pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        pages
            .0
            .extend((0..count).map(|i| address + (i * PAGE_SIZE) as u64));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only PCI transports ask for this")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        // What the driver shares is DMA memory (G-08), so it lies in boot memory.
        (buffer.addr().get() - Self::get().ram.addr().get()) as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

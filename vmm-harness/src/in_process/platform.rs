//! What the guest program finds in this process.
#![expect(
    unsafe_code,
    reason = "`PhysicalMemory` is an unsafe trait: it turns addresses into pointers"
)]

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use virtio_mem::{Backing, VirtioMem};
use virtio_mem_driver::hotplug::PhysicalMemory;
use virtio_mem_wire::Geometry;
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use vmem_guest::Platform;
use vmem_guest::abi::Mailbox;

use super::Parts;
use super::arena::ArenaHal;
use super::shadow::{Access, Shadow};
use super::transport::LoopbackTransport;
use crate::outcome::{Outcome, UnpluggedAccess};

thread_local! {
    /// The vCPU the current thread stands for.
    static VCPU: Cell<usize> = const { Cell::new(0) };
}

/// This process, as the guest program's place.
#[derive(Debug)]
pub(super) struct HostPlatform {
    pub(super) parts: Arc<Parts>,
    pub(super) started: Instant,
    pub(super) memory: HostMemory,
}

impl HostPlatform {
    /// Makes the current thread vCPU `index`.
    pub(super) fn enter_vcpu(index: usize) {
        VCPU.set(index);
    }
}

impl Platform for HostPlatform {
    type Hal = ArenaHal;
    type Transport = LoopbackTransport;
    type Memory = HostMemory;

    fn memory(&self) -> HostMemory {
        self.memory.clone()
    }

    fn mailbox(&self) -> &Mailbox {
        &self.parts.mailbox
    }

    fn view(&self, index: usize) -> &[AtomicU64] {
        self.parts.mailbox.view(index)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wait(&self, deadline_ms: Option<u64>) {
        let timeout = deadline_ms.map(|at| Duration::from_millis(at.saturating_sub(self.now_ms())));
        self.parts.bus.port.wait(VCPU.get(), timeout);
    }

    fn relax(&self) {
        // The other vCPU is a thread that may have to be scheduled first.
        std::thread::yield_now();
    }

    /// Asks the device's region, which refuses unplugged blocks, instead of running into them.
    fn touch(&self, address: u64) {
        // Where no region is, nobody answers.
        let Some(device) = self.parts.bus.device_at(address) else {
            return;
        };
        let region = device.region(());
        let offset = MemoryRegionAddress(address.wrapping_sub(region.start_addr().0));
        let read = region.read_obj::<u64>(offset);
        let touched = read.and_then(|value| region.write_obj(value, offset));
        if touched.is_err() {
            self.parts.fail(Outcome::UnpluggedAccess(UnpluggedAccess {
                vcpu: VCPU.get(),
                address,
                write: false,
                len: size_of::<u64>(),
            }));
        }
    }
}

/// Hotplugged memory where the devices' backings have it. An access to what is not plugged panics (G-06, G-10).
#[derive(Clone, Debug)]
pub struct HostMemory {
    regions: Vec<Region>,
    page_size: u64,
}

#[derive(Clone, Debug)]
struct Region {
    geometry: Geometry,
    backing: Arc<dyn Backing>,
    shadow: Arc<Shadow>,
}

impl HostMemory {
    /// No memory yet, in pages of `page_size` bytes.
    #[must_use]
    pub fn new(page_size: u64) -> Self {
        Self {
            regions: Vec::new(),
            page_size,
        }
    }

    /// The memory of `device` besides, as far as `shadow` allows, which is an observer of it.
    #[must_use]
    pub fn with(mut self, device: &VirtioMem, shadow: Arc<Shadow>) -> Self {
        self.regions.push(Region {
            geometry: device.geometry(),
            backing: device.backing(),
            shadow,
        });
        self
    }
}

// SAFETY: pages that are online lie in plugged blocks, which the backing keeps open, at one place for as long
// as it lives; it is mapped once, different addresses are at different offsets, and regions do not overlap.
unsafe impl PhysicalMemory for HostMemory {
    fn page(&self, address: u64) -> NonNull<u8> {
        let mut regions = self.regions.iter();
        let region = regions.find(|region| region.geometry.block_at(address).is_some());
        let region = region.expect("pages that are online are pages of a region");
        let touched =
            region
                .shadow
                .check("the page allocator", Access::Write, address, self.page_size);
        touched.expect("only plugged memory is touched");
        let offset = usize::try_from(address - region.geometry.addr());
        let offset = offset.expect("the region is mapped, so offsets into it fit");
        // SAFETY: inside the region, so inside the backing's mapping.
        unsafe { region.backing.host_address().add(offset) }
    }
}

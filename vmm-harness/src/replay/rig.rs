//! The recorded device, played by the device crate in this process, and a tap on its queue.
//!
//! The driver talks to the same registers and rings as on a bus. What it asks and what it is answered is read off the
//! ring once the answer is there.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result as VirtioResult};
use virtio_mem::{Anonymous, BuildError, Handle, VirtioMem};
use virtio_mem_wire::{Request, Response};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::requests::{Exchange, RecordedDevice};
use crate::in_process::{Arena, ArenaHal, LoopbackTransport};
use crate::{BootMemory, EventLoop, EventLoopError, InterruptLine, MmioTransport};

/// Bytes of the memory that rings and requests lie in. Its first page is left out: address 0 is no address.
const MEMORY: u64 = 1 << 20;

/// After so long a device that has not answered will not. It takes microseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// The driver, as it is here.
pub(super) type Driver = virtio_mem_driver::driver::MemDriver<ArenaHal, Tap>;

/// The device cannot be played.
#[derive(Debug, Error)]
pub(super) enum RigError {
    /// No address space for the region, or no file descriptors.
    #[error("device: {0}")]
    Io(#[from] io::Error),
    /// There is no such device.
    #[error("device: {0}")]
    Device(#[from] BuildError),
    /// Its thread.
    #[error(transparent)]
    Events(#[from] EventLoopError),
    /// Memory for the rings.
    #[error("rings: {0}")]
    Rings(String),
}

/// The device and everything that is between it and the driver.
pub(super) struct Rig {
    registers: Arc<MmioTransport>,
    memory: Arc<BootMemory>,
    interrupts: Receiver<()>,
    queue: Followed,
    arena: Arc<Arena>,
    _events: EventLoop,
}

/// The queue, followed by somebody who does not serve it.
type Followed = Arc<Mutex<Option<Queue>>>;

impl Rig {
    pub(super) fn new(recorded: &RecordedDevice, memory_block_size: u64) -> Result<Self, RigError> {
        // Address space only: nobody touches the region.
        let backing = Anonymous::base_pages(recorded.region_size)?;
        let device = VirtioMem::builder(GuestAddress(recorded.addr), backing)
            .block_size(recorded.block_size)
            .guest_memory_block_size(memory_block_size)
            .requested_size(recorded.requested_size)
            .node_id(recorded.node)
            .build()?;
        let ranges = [(GuestAddress(0), MEMORY as usize)];
        let memory =
            BootMemory::from_ranges(&ranges).map_err(|error| RigError::Rings(error.to_string()))?;
        let memory = Arc::new(memory);
        let rings = |error: GuestMemoryError| RigError::Rings(error.to_string());
        let arena = Arc::new(Arena::new(&memory, crate::layout::PAGE..MEMORY).map_err(rings)?);
        let (sender, interrupts) = channel();
        // Once nobody receives them any more they do not matter.
        let interrupt = InterruptLine::new(move || sender.send(()).unwrap_or(()));
        let events = EventLoop::start()?;
        let remote = events.remote().clone();
        let registers = MmioTransport::new(device, Arc::clone(&memory), remote, interrupt)?;
        Ok(Self {
            registers: Arc::new(registers),
            memory,
            interrupts,
            queue: Followed::default(),
            arena,
            _events: events,
        })
    }

    /// For the operator.
    pub(super) fn handle(&self) -> Handle {
        self.registers.device().handle()
    }

    /// A driver's transport. The driver's memory, in this thread, is this rig's from now on.
    pub(super) fn transport(&self) -> Tap {
        self.arena.enter();
        Tap {
            inner: LoopbackTransport::new(Arc::clone(&self.registers)),
            queue: Arc::clone(&self.queue),
        }
    }

    /// Waits for an interrupt.
    pub(super) fn wait(&self) -> Result<(), String> {
        match self.interrupts.recv_timeout(PATIENCE) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err("the device does not answer".to_owned())
            }
        }
    }

    /// The requests since the last call, with their answers. All must have been answered, and the driver must not have
    /// taken notice of that: the next request may overwrite them.
    pub(super) fn exchanges(&self) -> Result<Vec<Exchange>, String> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = &mut *queue else {
            return Ok(Vec::new());
        };
        let chains = queue
            .iter(&*self.memory)
            .map_err(|error| error.to_string())?;
        chains.map(|chain| self.exchange(&chain)).collect()
    }

    fn exchange(&self, chain: &DescriptorChain<&BootMemory>) -> Result<Exchange, String> {
        let memory = &*self.memory;
        let mut request = [0; Request::LEN];
        let mut reader = chain
            .clone()
            .reader(memory)
            .map_err(|error| error.to_string())?;
        reader
            .read_exact(&mut request)
            .map_err(|error| error.to_string())?;
        let request = Request::parse(&request).map_err(|error| error.to_string())?;
        // The part for the answer, which the device alone writes to.
        let answered = chain
            .clone()
            .writable()
            .next()
            .ok_or("no room for an answer")?;
        let mut answer = [0; Response::LEN];
        let read = memory.read_slice(&mut answer, answered.addr());
        read.map_err(|error| error.to_string())?;
        let response =
            Response::parse(request.kind(), &answer).map_err(|error| error.to_string())?;
        Ok(Exchange {
            request,
            answer: response.answer(),
        })
    }
}

/// The driver's transport; it tells where the queue is.
pub(super) struct Tap {
    inner: LoopbackTransport,
    queue: Followed,
}

impl Transport for Tap {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.inner.write_driver_features(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.inner.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let ring = u16::try_from(size).ok().and_then(|size| {
            let mut ring = Queue::new(size).ok()?;
            ring.try_set_desc_table_address(GuestAddress(descriptors))
                .ok()?;
            ring.try_set_avail_ring_address(GuestAddress(driver_area))
                .ok()?;
            ring.try_set_used_ring_address(GuestAddress(device_area))
                .ok()?;
            ring.set_ready(true);
            Some(ring)
        });
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = ring;
        self.inner
            .queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> VirtioResult<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> VirtioResult<()> {
        self.inner.write_config_space(offset, value)
    }
}

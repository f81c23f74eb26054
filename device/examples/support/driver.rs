//! The driver's end of the queue, written by the host into guest memory.

use std::error::Error;
use std::sync::Arc;

use virtio_mem::wire::{Request, Response};
use virtio_mem::{MemoryRegion, VirtioMem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionCollection};

const QUEUE_SIZE: u16 = 8;
const DESC_TABLE: u64 = 0x1000;
const AVAIL_RING: u64 = 0x2000;
const USED_RING: u64 = 0x3000;
const REQUEST: u64 = 0x4000;
const RESPONSE: u64 = 0x4100;

/// Sends one request at a time, always with the same two descriptors. It takes turns with the device on one
/// thread, so it does without the barriers of a real driver.
pub(crate) struct Driver {
    memory: Arc<GuestRegionCollection<MemoryRegion>>,
    sent: u16,
}

impl Driver {
    pub(crate) fn new(memory: Arc<GuestRegionCollection<MemoryRegion>>) -> Self {
        Self { memory, sent: 0 }
    }

    /// The queue as a transport makes it of what the driver has written to the queue registers.
    pub(crate) fn queue() -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(VirtioMem::QUEUE_MAX_SIZE)?;
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(DESC_TABLE as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL_RING as u32), Some(0));
        queue.set_used_ring_address(Some(USED_RING as u32), Some(0));
        queue.set_ready(true);
        Ok(queue)
    }

    /// Makes `request` available (virtio 1.4, 2.7.5 and 2.7.6).
    pub(crate) fn submit(&mut self, request: Request) -> Result<(), Box<dyn Error>> {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        self.write(REQUEST, &request.emit())?;
        self.write_descriptor(0, REQUEST, Request::LEN, NEXT)?;
        self.write_descriptor(1, RESPONSE, Response::LEN, WRITE)?;
        let entry = u64::from(self.sent % QUEUE_SIZE);
        self.write(AVAIL_RING + 4 + 2 * entry, &0u16.to_le_bytes())?;
        self.sent = self.sent.wrapping_add(1);
        self.write(AVAIL_RING + 2, &self.sent.to_le_bytes())
    }

    /// The answer to `request`, the last one sent.
    pub(crate) fn response(&self, request: Request) -> Result<Response, Box<dyn Error>> {
        let used: u16 = self.memory.read_obj(GuestAddress(USED_RING + 2))?;
        if u16::from_le(used) != self.sent {
            return Err("the request is not answered".into());
        }
        let mut bytes = [0; Response::LEN];
        self.memory.read_slice(&mut bytes, GuestAddress(RESPONSE))?;
        Ok(Response::parse(request.kind(), &bytes)?)
    }

    fn write_descriptor(
        &self,
        index: u16,
        address: u64,
        len: usize,
        flags: u16,
    ) -> Result<(), Box<dyn Error>> {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::try_from(len)?.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&(index + 1).to_le_bytes());
        self.write(DESC_TABLE + 16 * u64::from(index), &bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
        Ok(self.memory.write_slice(bytes, GuestAddress(address))?)
    }
}

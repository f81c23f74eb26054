//! A driver's side of the device, by hand: rings and buffers in guest memory, framed at will.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "each test binary uses a part of the rig"
)]

pub mod backings;

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use virtio_mem::wire::{Config, Features, Request, RequestKind, Response, Span};
use virtio_mem::{
    Anonymous, Backing, Builder, Handle, Interrupt, MemoryRegion, QueueHandler, Served, Slot,
    SlotMapper, VirtioMem,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionCollection, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Device blocks of the rig unless a test says otherwise.
pub const BLOCK: u64 = 2 * MIB;
/// Where the region of the rig starts.
pub const REGION: u64 = 4 * GIB;

pub const QUEUE_SIZE: u16 = 16;
pub const DESC_TABLE: u64 = 0x1000;
pub const AVAIL_RING: u64 = 0x2000;
pub const USED_RING: u64 = 0x3000;
/// Where buffers may go, 1 MiB less this.
pub const BUFFERS: u64 = 0x10000;
pub const RAM_SIZE: u64 = MIB;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
pub const DESC_F_INDIRECT: u16 = 4;

pub type Memory = Arc<GuestRegionCollection<MemoryRegion>>;

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

pub fn readable(addr: u64, len: usize) -> Buffer {
    Buffer {
        addr,
        len: len as u32,
        flags: 0,
    }
}

pub fn writable(addr: u64, len: usize) -> Buffer {
    Buffer {
        addr,
        len: len as u32,
        flags: DESC_F_WRITE,
    }
}

/// Counts what the device tells the driver.
#[derive(Debug, Default)]
pub struct Notifications {
    pub used: AtomicUsize,
    pub config: AtomicUsize,
}

impl Notifications {
    pub fn config(&self) -> usize {
        self.config.load(Ordering::Relaxed)
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

impl Interrupt for Notifications {
    fn used_buffer(&self) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    fn config_change(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// Which host calls are to fail: each field is the number of calls that still succeed before one fails.
#[derive(Debug)]
pub struct Faults {
    pub open: Fault,
    pub close: Fault,
    pub discard: Fault,
    pub map: Fault,
    pub unmap: Fault,
    /// Closing does the first half and fails, once.
    pub close_half: AtomicBool,
    /// The next slot to be removed panics.
    pub panic_in_unmap: AtomicBool,
    /// What the backing says of itself.
    pub max_open_runs: AtomicU64,
    /// The ranges of each measurement that was not of everything.
    pub measured: Mutex<Vec<Vec<Range<u64>>>>,
    /// Slots now mapped, and how often each of `map` and `unmap` was called.
    pub slots: Mutex<Vec<u32>>,
    pub slot_calls: AtomicU32,
}

/// Fails calls on demand.
#[derive(Debug, Default)]
pub struct Fault(Mutex<Vec<bool>>);

impl Fault {
    /// The next calls succeed (`true`) or fail in this order, later ones succeed.
    pub fn script(&self, outcomes: &[bool]) {
        *self.0.lock().unwrap() = outcomes.iter().rev().copied().collect();
    }

    pub fn check(&self) -> io::Result<()> {
        match self.0.lock().unwrap().pop() {
            Some(false) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            _ => Ok(()),
        }
    }
}

impl Faults {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            open: Fault::default(),
            close: Fault::default(),
            discard: Fault::default(),
            map: Fault::default(),
            unmap: Fault::default(),
            close_half: AtomicBool::new(false),
            panic_in_unmap: AtomicBool::new(false),
            max_open_runs: AtomicU64::new(u64::MAX),
            measured: Mutex::default(),
            slots: Mutex::default(),
            slot_calls: AtomicU32::new(0),
        })
    }

    pub fn mapped_slots(&self) -> Vec<u32> {
        let mut slots = self.slots.lock().unwrap().clone();
        slots.sort_unstable();
        slots
    }
}

/// A backing whose calls fail when told so.
#[derive(Debug)]
pub struct FaultyBacking<B>(pub B, pub Arc<Faults>);

// SAFETY: the memory is the inner backing's, which keeps the promise.
#[expect(unsafe_code, reason = "passes on the promise of the backing inside")]
unsafe impl<B: Backing> Backing for FaultyBacking<B> {
    fn host_address(&self) -> NonNull<u8> {
        self.0.host_address()
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn page_size(&self) -> u64 {
        self.0.page_size()
    }

    fn min_block_size(&self) -> u64 {
        self.0.min_block_size()
    }

    fn default_block_size(&self) -> u64 {
        self.0.default_block_size()
    }

    fn max_open_runs(&self) -> u64 {
        let limit = self.1.max_open_runs.load(Ordering::Relaxed);
        self.0.max_open_runs().min(limit)
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.1.open.check()?;
        self.0.open(range)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.1.close.check()?;
        if self.1.close_half.swap(false, Ordering::Relaxed) {
            let half = range.start + (range.end - range.start) / 2;
            self.0.close(range.start..half)?;
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.0.close(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.1.discard.check()?;
        self.0.discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        self.0.resident_bytes()
    }

    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        self.1.measured.lock().unwrap().push(open.to_vec());
        self.0.resident_bytes_in(open)
    }
}

/// A hypervisor that only remembers its slots, and refuses when told so.
#[derive(Debug)]
pub struct RecordingSlots(pub Arc<Faults>);

impl SlotMapper for RecordingSlots {
    fn map(&self, slot: &Slot) -> io::Result<()> {
        self.0.slot_calls.fetch_add(1, Ordering::Relaxed);
        self.0.map.check()?;
        let mut slots = self.0.slots.lock().unwrap();
        assert!(
            !slots.contains(&slot.index),
            "slot {} mapped twice",
            slot.index
        );
        slots.push(slot.index);
        Ok(())
    }

    fn unmap(&self, slot: &Slot) -> io::Result<()> {
        self.0.slot_calls.fetch_add(1, Ordering::Relaxed);
        assert!(
            !self.0.panic_in_unmap.swap(false, Ordering::Relaxed),
            "as told"
        );
        self.0.unmap.check()?;
        let mut slots = self.0.slots.lock().unwrap();
        let at = slots.iter().position(|index| *index == slot.index);
        slots.swap_remove(at.expect("only mapped slots are unmapped"));
        Ok(())
    }
}

/// A device with a driver's rings beside it.
pub struct Rig {
    pub device: VirtioMem,
    pub handle: Handle,
    pub memory: Memory,
    pub notifications: Arc<Notifications>,
    pub faults: Arc<Faults>,
    pub handler: Option<QueueHandler<Memory>>,
    pub event_idx: bool,
    avail_idx: u16,
    used_idx: u16,
    next_desc: u16,
}

/// Everything a driver accepts that the device offers, less EVENT_IDX.
pub fn driver_features() -> u64 {
    (Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE | Features::RING_INDIRECT_DESC).bits()
}

impl Rig {
    /// 4 GiB in 2 MiB blocks, 1 GiB requested, slots of 128 MiB.
    pub fn new() -> Self {
        Self::with(4 * GIB, |builder| builder.requested_size(GIB))
    }

    pub fn with(region_size: u64, options: impl FnOnce(Builder) -> Builder) -> Self {
        Self::with_backing(Anonymous::base_pages(region_size).unwrap(), options)
    }

    pub fn with_backing(
        backing: impl Backing + 'static,
        options: impl FnOnce(Builder) -> Builder,
    ) -> Self {
        let faults = Faults::new();
        let backing = FaultyBacking(backing, Arc::clone(&faults));
        let builder = VirtioMem::builder(GuestAddress(REGION), backing)
            .block_size(BLOCK)
            .slot_size(128 * MIB)
            .slots(RecordingSlots(Arc::clone(&faults)));
        let device = options(builder).build().unwrap();
        let ram = GuestRegionMmap::from_range(GuestAddress(0), RAM_SIZE as usize, None).unwrap();
        let regions = vec![MemoryRegion::Ram(ram), device.region(())];
        let mut rig = Self {
            handle: device.handle(),
            device,
            memory: Arc::new(GuestRegionCollection::from_regions(regions).unwrap()),
            notifications: Arc::default(),
            faults,
            handler: None,
            event_idx: false,
            avail_idx: 0,
            used_idx: 0,
            next_desc: 0,
        };
        rig.activate(driver_features());
        rig
    }

    /// Initialises the device as a driver does, with empty rings.
    pub fn activate(&mut self, features: u64) {
        self.device.acknowledge_features(features).unwrap();
        self.memory
            .write_slice(&[0; 0x3000], GuestAddress(DESC_TABLE))
            .unwrap();
        (self.avail_idx, self.used_idx, self.next_desc) = (0, 0, 0);
        let notify = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = queue_at(DESC_TABLE, AVAIL_RING, USED_RING);
        let interrupt = Arc::clone(&self.notifications) as Arc<dyn Interrupt>;
        let handler = self
            .device
            .activate(Arc::clone(&self.memory), queue, notify, interrupt);
        self.handler = Some(handler.unwrap());
    }

    /// Makes a chain of `buffers` available; its head.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = (head + i as u16) % QUEUE_SIZE;
            let next = (index + 1) % QUEUE_SIZE;
            let more = if i + 1 < buffers.len() {
                DESC_F_NEXT
            } else {
                0
            };
            self.write_descriptor(DESC_TABLE, index, buffer, more, next);
        }
        self.next_desc = (head + buffers.len() as u16) % QUEUE_SIZE;
        self.make_available(head);
        head
    }

    pub fn write_descriptor(&self, table: u64, index: u16, buffer: &Buffer, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&buffer.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&(buffer.flags | flags).to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % QUEUE_SIZE);
        self.write(AVAIL_RING + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.write(AVAIL_RING + 2, &self.avail_idx.to_le_bytes());
    }

    /// Lets the device serve its queue until it has nothing left.
    pub fn serve(&mut self) -> Served {
        let handler = self.handler.as_mut().unwrap();
        loop {
            match handler.serve() {
                Served::More => {}
                done => return done,
            }
        }
    }

    /// The used elements since the last call: head and length.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let mut idx = [0; 2];
        self.read(USED_RING + 2, &mut idx);
        let idx = u16::from_le_bytes(idx);
        let mut elements = Vec::new();
        while self.used_idx != idx {
            let mut element = [0; 8];
            self.read(
                USED_RING + 4 + 8 * u64::from(self.used_idx % QUEUE_SIZE),
                &mut element,
            );
            elements.push((
                u32::from_le_bytes(element[0..4].try_into().unwrap()),
                u32::from_le_bytes(element[4..8].try_into().unwrap()),
            ));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        elements
    }

    /// Sends `bytes` as a request in the usual framing; the used length and the ten bytes behind it.
    pub fn send(&mut self, bytes: &[u8]) -> (u32, [u8; 10]) {
        let answer = BUFFERS + 0x100;
        self.write(BUFFERS, bytes);
        self.write(answer, &[0xee; 10]);
        let head = self.submit(&[readable(BUFFERS, bytes.len()), writable(answer, 10)]);
        self.serve();
        let used = self.used();
        assert_eq!(used.len(), 1, "one request, one used element");
        assert_eq!(used[0].0, u32::from(head));
        let mut response = [0; 10];
        self.read(answer, &mut response);
        (used[0].1, response)
    }

    pub fn request(&mut self, request: Request) -> Response {
        let (len, bytes) = self.send(&request.emit());
        assert_eq!(len as usize, Response::LEN);
        Response::parse(request.kind(), &bytes).unwrap()
    }

    /// Sends a request whose every ignored byte is junk.
    pub fn junk_request(&mut self, request: Request) -> Response {
        let mut bytes = request.emit().to_vec();
        bytes[2..8].fill(0xa5);
        bytes[18..24].fill(0x5a);
        if request.kind() == RequestKind::UnplugAll {
            bytes[8..18].fill(0xff);
        }
        bytes.extend([0xc3; 40]);
        let (len, bytes) = self.send(&bytes);
        assert_eq!(len as usize, Response::LEN);
        Response::parse(request.kind(), &bytes).unwrap()
    }

    pub fn plug(&mut self, first: u64, count: u16) -> Response {
        self.request(Request::Plug(blocks(first, count)))
    }

    pub fn unplug(&mut self, first: u64, count: u16) -> Response {
        self.request(Request::Unplug(blocks(first, count)))
    }

    pub fn unplug_all(&mut self) -> Response {
        self.request(Request::UnplugAll)
    }

    pub fn state(&mut self, first: u64, count: u16) -> Response {
        self.request(Request::State(blocks(first, count)))
    }

    /// The configuration space as a driver reads it.
    pub fn config(&self) -> Config {
        let mut bytes = [0; Config::LEN];
        self.device.read_config(0, &mut bytes);
        Config::parse(&bytes).unwrap()
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, bytes: &mut [u8]) {
        self.memory.read_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// Fills a block with bytes of a tag, as a guest would.
    pub fn fill(&self, block: u64, tag: u8) {
        self.write(REGION + block * BLOCK, &vec![tag; BLOCK as usize]);
    }

    pub fn holds(&self, block: u64, tag: u8) -> bool {
        let mut bytes = vec![0; BLOCK as usize];
        self.read(REGION + block * BLOCK, &mut bytes);
        bytes.iter().all(|byte| *byte == tag)
    }
}

/// Blocks of the rig's region as a request names them.
pub fn blocks(first: u64, count: u16) -> Span {
    Span {
        addr: REGION + first * BLOCK,
        block_count: count,
    }
}

pub fn queue_at(desc_table: u64, avail_ring: u64, used_ring: u64) -> Queue {
    let halves = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
    let mut queue = Queue::new(VirtioMem::QUEUE_MAX_SIZE).unwrap();
    queue.set_size(QUEUE_SIZE);
    let (low, high) = halves(desc_table);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(avail_ring);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(used_ring);
    queue.set_used_ring_address(low, high);
    queue.set_ready(true);
    queue
}

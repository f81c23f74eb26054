//! A memory device to the letter of the specification, that can be told to misbehave.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_drivers::PhysAddr;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_mem_wire::{
    Answer, BlockMap, BlockRange, BlockState, Config, Features, Field, Geometry, MutableConfig,
    Request, Response,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::dma;
use super::memory::Region;

/// What the driver has done to the device's registers, repetitions left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Status(u32),
    ReadFeatures,
    WriteFeatures(u64),
    QueueSet(u32),
    ReadConfig,
    Notify,
}

/// What to do with the next request instead of what is right.
#[derive(Clone, Debug)]
pub(crate) enum Misbehave {
    /// Answer this and do nothing.
    Answer(Answer),
    /// Write these bytes and say that so many were written.
    Raw(Vec<u8>, u32),
    /// Do what is right, and say that so many bytes were written.
    Length(u32),
    /// Use a buffer that is not in flight.
    WrongBuffer,
    /// Use the buffer with this number.
    UsedId(u32),
    /// Do what is right, and use the buffer twice.
    Twice,
    /// Do what is right, and claim to have used so many buffers more.
    Ahead(u16),
    /// Do what is right, or nothing, and never say so.
    Lost { done: bool },
    /// The same, and need a reset.
    NeedsReset { done: bool },
}

type ConfigHook = Box<dyn FnMut(&mut State, usize) + Send>;
type InterruptLine = Box<dyn Fn() + Send>;

/// The registers and what is behind them. Tests reach in.
pub(crate) struct State {
    pub(crate) device_type: DeviceType,
    pub(crate) offered: u64,
    pub(crate) config: Config,
    /// Shown instead of what the configuration has at these offsets.
    pub(crate) forged: Vec<(usize, u64)>,
    pub(crate) generation: u32,
    /// Each byte that the driver must ignore, in configuration and answers.
    pub(crate) junk: u8,
    /// What blocks hold that the driver has no business with, and those it has just plugged.
    pub(crate) scribble_with: u8,
    pub(crate) plugged: BlockMap,
    pub(crate) status: DeviceStatus,
    /// Status reads after a reset that still show the old status.
    pub(crate) reset_reads: u32,
    pub(crate) refuse_features: bool,
    pub(crate) queue_max: u32,
    /// Requests stay in the queue.
    pub(crate) hold: bool,
    pub(crate) misbehave: VecDeque<Misbehave>,
    /// Called before each read of a configuration register, with its offset.
    pub(crate) on_config_read: Option<ConfigHook>,
    pub(crate) events: Vec<Event>,
    pub(crate) requests: Vec<(Request, Answer)>,
    pub(crate) interrupt: InterruptStatus,
    /// Called with each interrupt, for guests that wait for one.
    pub(crate) interrupt_line: Option<InterruptLine>,
    queue: Option<[PhysAddr; 3]>,
    queue_size: u16,
    next_avail: u16,
    next_used: u16,
    stale_status: DeviceStatus,
    stale_reads: u32,
}

pub(crate) struct Device {
    pub(crate) region: Region,
    state: Mutex<State>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Device")
    }
}

impl Device {
    /// All of the region usable, nothing plugged or requested.
    pub(crate) fn new(addr: u64, region_size: u64, block_size: u64) -> Arc<Self> {
        let geometry = Geometry::new(addr, region_size, block_size).unwrap();
        let state = State {
            device_type: DeviceType::Memory,
            offered: (Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE).bits(),
            config: Config {
                geometry,
                node_id: 0xabcd,
                mutable: MutableConfig {
                    usable_region_size: region_size,
                    ..MutableConfig::default()
                },
            },
            forged: Vec::new(),
            generation: 7,
            junk: 0xff,
            scribble_with: 0xdb,
            plugged: BlockMap::new(geometry.block_count()),
            status: DeviceStatus::empty(),
            reset_reads: 0,
            refuse_features: false,
            queue_max: 128,
            hold: false,
            misbehave: VecDeque::new(),
            on_config_read: None,
            events: Vec::new(),
            requests: Vec::new(),
            interrupt: InterruptStatus::empty(),
            interrupt_line: None,
            queue: None,
            queue_size: 0,
            next_avail: 0,
            next_used: 0,
            stale_status: DeviceStatus::empty(),
            stale_reads: 0,
        };
        Arc::new(Self {
            region: Region::new(addr, region_size),
            state: Mutex::new(state),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A test that fails while it looks at the state must not make everything else fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_plugged(&self, address: u64) -> bool {
        let state = self.state();
        let block = state.config.geometry.block_at(address);
        block.is_some_and(|block| state.plugged.contains(block))
    }

    /// Sets the target, and says so (D-09).
    pub(crate) fn request(&self, requested_size: u64) {
        let mut state = self.state();
        state.config.mutable.requested_size = requested_size;
        state.change_config();
    }

    /// Overwrites all blocks that are not plugged, as a device may at any time (D-17).
    pub(crate) fn scribble(&self) {
        let state = self.state();
        let geometry = state.config.geometry;
        let all = BlockRange {
            first: 0,
            count: geometry.block_count(),
        };
        for range in state.plugged.runs_in(all, false) {
            let with = state.scribble_with;
            self.region.scribble(range, geometry.block_size(), with);
        }
    }

    /// Whether they are as [`scribble`](Self::scribble) leaves them.
    pub(crate) fn is_scribbled(&self) -> bool {
        let state = self.state();
        let geometry = state.config.geometry;
        let all = BlockRange {
            first: 0,
            count: geometry.block_count(),
        };
        let (size, with) = (geometry.block_size(), state.scribble_with);
        let mut unplugged = state.plugged.runs_in(all, false);
        unplugged.all(|range| self.region.is_scribbled(range, size, with))
    }

    /// The requests in the queue, the oldest first.
    pub(crate) fn pending(&self) -> Vec<Request> {
        let state = self.state();
        let Some([_, avail, _]) = state.queue else {
            return Vec::new();
        };
        let end = u16_at(avail + 2);
        let count = end.wrapping_sub(state.next_avail);
        (0..count)
            .filter_map(|i| state.chain(state.next_avail.wrapping_add(i)))
            .map(|chain| chain.request)
            .collect()
    }

    /// Answers the oldest request in the queue, if there is one.
    pub(crate) fn answer(&self) {
        let mut state = self.state();
        let Some([_, avail, _]) = state.queue else {
            return;
        };
        if u16_at(avail + 2) == state.next_avail {
            return;
        }
        let chain = state.chain(state.next_avail).unwrap();
        state.next_avail = state.next_avail.wrapping_add(1);
        let Chain {
            head,
            next,
            request,
            answer_address,
            ..
        } = chain;
        let (whole, id) = (Response::LEN as u32, u32::from(head));
        let (bytes, len, id) = match state.misbehave.pop_front() {
            None => (state.obey(request, &self.region), whole, id),
            Some(Misbehave::Answer(answer)) => {
                state.requests.push((request, answer));
                // G-17 … G-19: the rest of the answer is junk.
                let mut bytes = vec![state.junk; Response::LEN];
                bytes[0..2].copy_from_slice(&(answer as u16).to_le_bytes());
                (bytes, whole, id)
            }
            Some(Misbehave::Raw(bytes, len)) => (bytes, len, id),
            Some(Misbehave::Length(len)) => (state.obey(request, &self.region), len, id),
            Some(Misbehave::WrongBuffer) => (Vec::new(), 0, u32::from(next)),
            Some(Misbehave::UsedId(id)) => (Vec::new(), 0, id),
            Some(Misbehave::Twice) => {
                let bytes = state.obey(request, &self.region);
                dma::write(answer_address, &bytes);
                state.put_used(id, whole);
                (bytes, whole, id)
            }
            Some(Misbehave::Ahead(count)) => {
                let bytes = state.obey(request, &self.region);
                dma::write(answer_address, &bytes);
                state.put_used(id, whole);
                state.skip_used(count);
                state.raise(InterruptStatus::QUEUE_INTERRUPT);
                return;
            }
            Some(Misbehave::Lost { done }) => {
                state.obey_silently(request, &self.region, done);
                return;
            }
            Some(Misbehave::NeedsReset { done }) => {
                state.obey_silently(request, &self.region, done);
                state.need_reset();
                return;
            }
        };
        dma::write(answer_address, &bytes);
        state.put_used(id, len);
        state.raise(InterruptStatus::QUEUE_INTERRUPT);
    }
}

/// A request where the driver has put it.
struct Chain {
    head: u16,
    next: u16,
    request: Request,
    request_address: PhysAddr,
    answer_address: PhysAddr,
}

fn u16_at(address: PhysAddr) -> u16 {
    u16::from_le_bytes(dma::read(address))
}

impl State {
    /// Where the driver has put its descriptors.
    pub(crate) fn queue_address(&self) -> Option<PhysAddr> {
        self.queue.map(|[descriptors, ..]| descriptors)
    }

    /// Everything the driver has pointed the device to: the rings, and request and answer of what is in the queue.
    pub(crate) fn dma_addresses(&self) -> Vec<PhysAddr> {
        let Some(rings) = self.queue else {
            return Vec::new();
        };
        let [_, avail, _] = rings;
        let count = u16_at(avail + 2).wrapping_sub(self.next_avail);
        let chains = (0..count).filter_map(|i| self.chain(self.next_avail.wrapping_add(i)));
        let buffers = chains.flat_map(|chain| [chain.request_address, chain.answer_address]);
        rings.into_iter().chain(buffers).collect()
    }

    /// A new configuration, with the interrupt that announces it.
    pub(crate) fn change_config(&mut self) {
        self.generation += 1;
        self.raise(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT);
    }

    /// Something went wrong, and the driver is told (V-09).
    pub(crate) fn need_reset(&mut self) {
        self.status |= DeviceStatus::DEVICE_NEEDS_RESET;
        self.change_config();
    }

    /// The request the driver has made available as its `index`th.
    fn chain(&self, index: u16) -> Option<Chain> {
        let [descriptors, avail, _] = self.queue?;
        let slot = u64::from(index % self.queue_size);
        let head = u16_at(avail + 4 + 2 * slot);
        let descriptor = |index: u16| {
            let bytes: [u8; 16] = dma::read(descriptors + 16 * u64::from(index));
            let address = u64::from_le_bytes(bytes[0..8].try_into().unwrap());
            let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
            let next = u16::from_le_bytes(bytes[14..16].try_into().unwrap());
            (address, len, flags, next)
        };
        let (request_address, request_len, flags, next) = descriptor(head);
        assert_eq!((request_len as usize, flags), (Request::LEN, 1));
        let (answer_address, answer_len, flags, _) = descriptor(next);
        assert_eq!((answer_len as usize, flags), (Response::LEN, 2));
        Some(Chain {
            head,
            next,
            request: Request::parse(&dma::read(request_address)).unwrap(),
            request_address,
            answer_address,
        })
    }

    fn put_used(&mut self, id: u32, len: u32) {
        let Some([_, _, used]) = self.queue else {
            return;
        };
        let slot = u64::from(self.next_used % self.queue_size);
        let mut element = [0; 8];
        element[0..4].copy_from_slice(&id.to_le_bytes());
        element[4..8].copy_from_slice(&len.to_le_bytes());
        dma::write(used + 4 + 8 * slot, &element);
        self.skip_used(1);
    }

    fn skip_used(&mut self, count: u16) {
        let Some([_, _, used]) = self.queue else {
            return;
        };
        self.next_used = self.next_used.wrapping_add(count);
        dma::write(used + 2, &self.next_used.to_le_bytes());
    }

    /// Does what is asked for. G-17 … G-20: what the driver must ignore of the answer is junk.
    fn obey(&mut self, request: Request, region: &Region) -> Vec<u8> {
        let response = self.execute(request, region);
        self.requests.push((request, response.answer()));
        let mut bytes = response.emit();
        bytes[2..8].fill(self.junk);
        if !matches!(response, Response::AckState(_)) {
            bytes[8..10].fill(self.junk);
        }
        bytes.to_vec()
    }

    fn obey_silently(&mut self, request: Request, region: &Region, done: bool) {
        if done {
            self.obey(request, region);
        }
    }

    fn raise(&mut self, interrupt: InterruptStatus) {
        self.interrupt |= interrupt;
        if let Some(line) = &self.interrupt_line {
            line();
        }
    }

    /// The requests so far as `(name, first block, blocks)`; those that were not acknowledged have their
    /// answer in the name.
    pub(crate) fn take_requests(&mut self) -> Vec<(String, u64, u64)> {
        let geometry = self.config.geometry;
        std::mem::take(&mut self.requests)
            .into_iter()
            .map(|(request, answer)| {
                let name = match answer {
                    Answer::Ack => request.kind().name().to_owned(),
                    other => format!("{} {}", request.kind().name(), other.name()),
                };
                let (first, count) = request.span().map_or((0, 0), |span| {
                    let first = geometry.block_at(span.addr).unwrap();
                    (first, u64::from(span.block_count))
                });
                (name, first, count)
            })
            .collect()
    }

    fn execute(&mut self, request: Request, region: &Region) -> Response {
        let geometry = self.config.geometry;
        let mutable = &mut self.config.mutable;
        let Some(span) = request.span() else {
            for range in self.plugged.runs() {
                region.scribble(range, geometry.block_size(), self.scribble_with);
            }
            self.plugged.clear();
            mutable.plugged_size = 0;
            return Response::Ack;
        };
        let Ok(range) = geometry.locate(span, mutable.usable_region_size) else {
            return Response::Error;
        };
        let state = self.plugged.state(range);
        if let Request::State(_) = request {
            return Response::AckState(state);
        }
        let size = geometry.bytes(range.count);
        match request {
            Request::Plug(_) if state == BlockState::Unplugged => {
                if mutable.plugged_size + size > mutable.requested_size {
                    return Response::Nack;
                }
                self.plugged.insert(range);
                mutable.plugged_size += size;
            }
            Request::Unplug(_) if state == BlockState::Plugged => {
                self.plugged.remove(range);
                mutable.plugged_size -= size;
            }
            _ => return Response::Error,
        }
        region.scribble(range, geometry.block_size(), self.scribble_with);
        Response::Ack
    }
}

/// The registers of a [`Device`].
#[derive(Clone, Debug)]
pub(crate) struct FakeTransport(pub(crate) Arc<Device>);

impl FakeTransport {
    fn log(&self, event: Event) {
        let mut state = self.0.state();
        if state.events.last() != Some(&event) {
            state.events.push(event);
        }
    }
}

impl Transport for FakeTransport {
    fn device_type(&self) -> DeviceType {
        self.0.state().device_type
    }

    fn read_device_features(&mut self) -> u64 {
        self.log(Event::ReadFeatures);
        self.0.state().offered
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.log(Event::WriteFeatures(driver_features));
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if queue == 0 {
            self.0.state().queue_max
        } else {
            0
        }
    }

    fn notify(&mut self, queue: u16) {
        assert_eq!(queue, 0);
        self.log(Event::Notify);
        let state = self.0.state();
        assert!(state.status.contains(DeviceStatus::DRIVER_OK), "v_10");
        let hold = state.hold;
        drop(state);
        if !hold {
            self.0.answer();
        }
    }

    fn get_status(&self) -> DeviceStatus {
        let mut state = self.0.state();
        if state.stale_reads > 0 {
            state.stale_reads -= 1;
            return state.stale_status;
        }
        state.status
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.log(Event::Status(status.bits()));
        let mut state = self.0.state();
        if status.is_empty() {
            state.stale_status = state.status | DeviceStatus::ACKNOWLEDGE;
            state.stale_reads = state.reset_reads;
            state.queue = None;
            state.next_avail = 0;
            state.next_used = 0;
            state.interrupt = InterruptStatus::empty();
        }
        assert!(
            status.is_empty() || status.contains(state.status),
            "v_05: a status bit was taken back"
        );
        state.status = status;
        if state.refuse_features {
            state.status.remove(DeviceStatus::FEATURES_OK);
        }
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {
        unreachable!("legacy")
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.log(Event::QueueSet(size));
        let mut state = self.0.state();
        state.queue = Some([descriptors, driver_area, device_area]);
        state.queue_size = u16::try_from(size).unwrap();
    }

    fn queue_unset(&mut self, _queue: u16) {
        self.0.state().queue = None;
    }

    fn queue_used(&mut self, _queue: u16) -> bool {
        self.0.state().queue.is_some()
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        std::mem::take(&mut self.0.state().interrupt)
    }

    fn read_config_generation(&self) -> u32 {
        self.0.state().generation
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        // M-05
        let width = size_of::<T>();
        let expected = match offset == Field::NodeId.offset() {
            true => 2,
            false => 4,
        };
        assert_eq!((width, offset % width), (expected, 0), "m_05");
        self.log(Event::ReadConfig);
        let mut state = self.0.state();
        if let Some(mut hook) = state.on_config_read.take() {
            hook(&mut state, offset);
            state.on_config_read = Some(hook);
        }
        let mut bytes = state.config.emit();
        // G-02
        bytes[10..16].fill(state.junk);
        for (at, value) in &state.forged {
            bytes[*at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Ok(T::read_from_bytes(&bytes[offset..offset + width]).unwrap())
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> virtio_drivers::Result<()> {
        panic!("g_01: the configuration space is written")
    }
}

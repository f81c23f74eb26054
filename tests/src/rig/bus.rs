//! What lies between driver and device: every request is seen here before the device sees it, and may be held back,
//! lost, or damaged.
//!
//! Where that is possible the device is not impersonated but led to the answer: it says NACK because its target was
//! lowered behind the driver's back, and ERROR because the request has become one it does not know. Nothing of such a
//! request is carried out.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_STATUS,
};
use virtio_mem::wire::{BlockRange, Features, Request};
use virtio_mem::{Handle, VirtioMem};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_harness::in_process::{Access, Registers, Shadow};
use vmm_harness::{BootMemory, InterruptLine, MmioTransport};

/// Driver, bus, device: a bus of one device.
#[derive(Debug)]
pub struct Bus {
    registers: MmioTransport,
    memory: Arc<BootMemory>,
    shadow: Arc<Shadow>,
    handle: Handle,
    /// Whether the driver sees `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`. The device always does.
    unplugged_inaccessible: bool,
    select: [Cell<u32>; 2],
    /// Requests are not served before [`serve`](Self::serve).
    hold: Cell<bool>,
    /// Requests that were not served.
    waiting: Cell<bool>,
    plug_waits: Cell<bool>,
    /// How many of the requests to come are lost, damaged, or find another target.
    lose: Cell<u64>,
    damage: Cell<u64>,
    refuse: Cell<u64>,
    /// Reads of the generation to come that find another one each.
    restless: Cell<u64>,
    /// A request was lost: nothing is answered before the next reset.
    lost: Cell<bool>,
    needs_reset: Cell<bool>,
    config_interrupt: Cell<bool>,
    next_available: Cell<u16>,
    hits: Cell<Hits>,
    requests: RefCell<Vec<Request>>,
    digest: Cell<u64>,
}

/// How often what was asked for has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Requests that were lost.
    pub lost: u64,
    /// Requests that were damaged: ERROR.
    pub damaged: u64,
    /// PLUG requests that found a lower target: NACK.
    pub refused: u64,
    /// Reads of a generation that had changed again.
    pub restless: u64,
    /// Resets of a device that needed one, or drivers that gave up on it.
    pub needed_reset: u64,
}

impl Bus {
    /// A bus with `device` on it, whose queue lies in `memory`.
    ///
    /// # Panics
    ///
    /// If the host has no descriptor left.
    #[must_use]
    pub fn new(
        device: VirtioMem,
        memory: Arc<BootMemory>,
        shadow: Arc<Shadow>,
        unplugged_inaccessible: bool,
    ) -> Rc<Self> {
        let handle = device.handle();
        let interrupt = InterruptLine::new(|| {});
        let registers = MmioTransport::by_hand(device, Arc::clone(&memory), interrupt);
        Rc::new(Self {
            registers: registers.expect("a descriptor"),
            memory,
            shadow,
            handle,
            unplugged_inaccessible,
            select: Default::default(),
            hold: Cell::default(),
            waiting: Cell::default(),
            plug_waits: Cell::default(),
            lose: Cell::default(),
            damage: Cell::default(),
            refuse: Cell::default(),
            restless: Cell::default(),
            lost: Cell::default(),
            needs_reset: Cell::default(),
            config_interrupt: Cell::default(),
            next_available: Cell::default(),
            hits: Cell::default(),
            requests: RefCell::default(),
            digest: Cell::default(),
        })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &VirtioMem {
        self.registers.device()
    }

    // ---- what is to happen ----

    /// From now on requests wait for [`serve`](Self::serve), or do not.
    pub fn hold(&self, hold: bool) {
        self.hold.set(hold);
    }

    /// So many requests to come are never answered.
    pub fn lose(&self, times: u64) {
        self.lose.set(times);
    }

    /// So many requests to come are damaged on the way.
    pub fn damage(&self, times: u64) {
        self.damage.set(times);
    }

    /// So many PLUG requests to come find a target that was lowered, and is as before when they are answered.
    pub fn refuse(&self, times: u64) {
        self.refuse.set(times);
    }

    /// The configuration changes under so many reads to come.
    pub fn make_restless(&self, reads: u64) {
        self.restless.set(reads);
    }

    /// Whether any of the above is still to come.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        [&self.lose, &self.damage, &self.refuse, &self.restless]
            .iter()
            .any(|fault| fault.get() > 0)
    }

    /// The device needs a reset, and says so (V-09). Until then it answers nothing.
    pub fn break_device(&self) {
        self.needs_reset.set(true);
        self.config_interrupt.set(true);
    }

    /// Nothing more happens; what has, since this was called last.
    pub fn disarm(&self) -> Hits {
        for fault in [&self.lose, &self.damage, &self.refuse, &self.restless] {
            fault.set(0);
        }
        self.hits.take()
    }

    // ---- what has happened ----

    /// What has happened since [`disarm`](Self::disarm).
    #[must_use]
    pub fn hits(&self) -> Hits {
        self.hits.get()
    }

    /// Whether there is an interrupt the driver has not acknowledged.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        let mut status = [0; 4];
        self.read(u64::from(VIRTIO_MMIO_INTERRUPT_STATUS), &mut status);
        status != [0; 4]
    }

    /// Whether requests wait for [`serve`](Self::serve).
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.waiting.get() && !self.is_dead()
    }

    /// The requests since the last time this was asked.
    #[must_use]
    pub fn take_requests(&self) -> Vec<Request> {
        self.requests.take()
    }

    /// All that was sent, as one number.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest.get()
    }

    fn is_dead(&self) -> bool {
        self.lost.get() || self.needs_reset.get()
    }

    fn hit(&self, count: impl FnOnce(&mut Hits)) {
        let mut hits = self.hits.get();
        count(&mut hits);
        self.hits.set(hits);
    }

    // ---- requests ----

    /// The driver has put something into the queue.
    fn notified(&self) {
        let Some(state) = self.registers.queue() else {
            return;
        };
        // G-08: rings that are not in memory of boot the transport has refused; buffers it does not know.
        let mut queue = Queue::try_from(state).expect("the device's queue");
        queue.set_next_avail(self.next_available.get());
        while let Some(chain) = queue.iter(&*self.memory).expect("a ring").next() {
            let request_at = chain.clone().next().expect("a descriptor").addr();
            for descriptor in chain {
                let access = match descriptor.is_write_only() {
                    true => Access::Write,
                    false => Access::Read,
                };
                let (address, len) = (descriptor.addr().0, u64::from(descriptor.len()));
                self.expect_plugged("a descriptor", access, address, len);
            }
            self.sent(request_at);
        }
        self.next_available.set(queue.next_avail());
        if !self.hold.get() {
            self.serve();
        }
    }

    fn expect_plugged(&self, who: &'static str, access: Access, address: u64, len: u64) {
        let touched = self.shadow.check(who, access, address, len);
        touched.expect("only plugged memory is touched");
    }

    fn sent(&self, request_at: GuestAddress) {
        let mut bytes = [0; Request::LEN];
        self.memory
            .read_slice(&mut bytes, request_at)
            .expect("a request in boot memory");
        let request = Request::parse(&bytes).expect("a request");
        for byte in bytes {
            // FNV-1a
            let digest = (self.digest.get() ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            self.digest.set(digest);
        }
        let geometry = self.handle.geometry();
        match request {
            Request::Unplug(span) => {
                let usable = self.handle.status().usable_region_size;
                let range = geometry.locate(span, usable);
                self.shadow
                    .leave(range.expect("blocks of the usable region"));
            }
            Request::UnplugAll => self.shadow.leave(BlockRange {
                first: 0,
                count: geometry.block_count(),
            }),
            Request::Plug(_) => self.plug_waits.set(true),
            Request::State(_) => {}
        }
        self.requests.borrow_mut().push(request);
        self.waiting.set(true);
        let happens = |fault: &Cell<u64>| {
            let armed = fault.get() > 0;
            fault.set(fault.get().saturating_sub(1));
            armed
        };
        if happens(&self.lose) {
            self.lost.set(true);
            self.hit(|hits| hits.lost += 1);
        } else if happens(&self.damage) {
            const NO_REQUEST: u16 = 0xffff;
            self.memory
                .write_obj(NO_REQUEST, request_at)
                .expect("a request in boot memory");
            self.hit(|hits| hits.damaged += 1);
        }
    }

    /// The device answers what is in the queue.
    pub fn serve(&self) {
        if self.is_dead() {
            return;
        }
        let refused = self.plug_waits.take() && self.refuse.get() > 0;
        let target = self.handle.status().requested_size;
        if refused {
            self.refuse.set(self.refuse.get() - 1);
            self.hit(|hits| hits.refused += 1);
            self.request(self.handle.status().plugged_size.min(target));
        }
        self.registers.serve();
        if refused {
            self.request(target);
        }
        self.shadow.settle();
        self.waiting.set(false);
    }

    fn request(&self, size: u64) {
        let resize = self.handle.resize(size);
        drop(resize.expect("a size the device had"));
    }

    fn reset(&self) {
        if self.needs_reset.take() {
            self.hit(|hits| hits.needed_reset += 1);
        }
        self.lost.set(false);
        self.config_interrupt.set(false);
        self.next_available.set(0);
        self.waiting.set(false);
        self.plug_waits.set(false);
    }
}

impl Bus {
    fn hidden(&self, select: usize) -> u32 {
        let hidden = Features::UNPLUGGED_INACCESSIBLE.bits();
        match self.select[select].get() {
            0 if !self.unplugged_inaccessible => u32::try_from(hidden).expect("a low bit"),
            _ => 0,
        }
    }
}

impl Registers for Bus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
        let (Ok(register), Ok(bytes)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data))
        else {
            return;
        };
        let mut value = u32::from_le_bytes(*bytes);
        match register {
            VIRTIO_MMIO_STATUS if self.needs_reset.get() => value |= VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_INTERRUPT_STATUS if self.config_interrupt.get() => {
                value |= VIRTIO_MMIO_INT_CONFIG;
            }
            VIRTIO_MMIO_DEVICE_FEATURES => value &= !self.hidden(0),
            VIRTIO_MMIO_CONFIG_GENERATION if self.restless.get() > 0 => {
                let left = self.restless.get() - 1;
                self.restless.set(left);
                value = value.wrapping_add(1 << 16).wrapping_add(left as u32);
                self.hit(|hits| hits.restless += 1);
            }
            _ => {}
        }
        *bytes = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(register), Ok(bytes)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return self.registers.write(offset, data);
        };
        let mut value = u32::from_le_bytes(bytes);
        match register {
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notified(),
            VIRTIO_MMIO_STATUS if value == 0 => self.reset(),
            VIRTIO_MMIO_INTERRUPT_ACK => self.config_interrupt.set(false),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.select[0].set(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.select[1].set(value),
            VIRTIO_MMIO_DRIVER_FEATURES => value |= self.hidden(1),
            _ => {}
        }
        self.registers.write(offset, &value.to_le_bytes());
        if register == VIRTIO_MMIO_STATUS && value == 0 {
            // Only now: up to here the device might have answered.
            self.shadow.settle();
        }
    }
}

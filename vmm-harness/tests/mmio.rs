//! The virtio-mmio registers, with the real device behind them and the test as driver.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/ring.rs"]
mod ring;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_mmio::*;
use virtio_mem::wire::{Features, Request, Span};
use virtio_mem::{Anonymous, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::REGION_START;
use vmm_harness::{BootMemory, EventLoop, InterruptLine, MmioTransport};

const MIB: u64 = 1 << 20;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const READY_TO_RUN: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
const RUNNING: u32 = READY_TO_RUN | DRIVER_OK;

/// Interrupts come from the thread of the event loop.
const LONG: Duration = Duration::from_secs(60);

struct Rig {
    transport: MmioTransport,
    memory: Arc<BootMemory>,
    interrupts: Receiver<()>,
    events: EventLoop,
}

impl Rig {
    /// Interrupts are noted, to be received.
    fn new() -> Self {
        let (sender, interrupts) = channel();
        Self::raising(move || sender.send(()).unwrap_or(()), interrupts)
    }

    fn raising(raise: impl Fn() + Send + Sync + 'static, interrupts: Receiver<()>) -> Self {
        let backing = Anonymous::base_pages(64 * MIB).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION_START), backing)
            .block_size(2 * MIB)
            .requested_size(16 * MIB)
            .build()
            .unwrap();
        let memory = Arc::new(BootMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let interrupt = InterruptLine::new(raise);
        let events = EventLoop::start().unwrap();
        let remote = events.remote().clone();
        let transport = MmioTransport::new(device, Arc::clone(&memory), remote, interrupt).unwrap();
        Self {
            transport,
            memory,
            interrupts,
            events,
        }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0xa5; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn offered(&self) -> u64 {
        let word = |sel| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    fn accept(&self, features: u64) {
        for (sel, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, word);
        }
    }

    /// Up to and with FEATURES_OK.
    fn negotiate(&self) {
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        self.accept((Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE).bits());
        self.write(VIRTIO_MMIO_STATUS, READY_TO_RUN);
        assert_eq!(self.status(), READY_TO_RUN);
    }

    fn set_up_queue(&self) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, ring::SIZE.into());
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, ring::DESCRIPTORS as u32);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring::AVAILABLE as u32);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, ring::USED as u32);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn run(&self) {
        self.negotiate();
        self.set_up_queue();
        assert_eq!(self.read(VIRTIO_MMIO_QUEUE_READY), 1);
        self.write(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(self.status(), RUNNING);
    }

    /// Puts a request for the first `block_count` blocks into the ring as number `index`.
    fn add_plug(&self, index: u16, block_count: u16) {
        let span = Span {
            addr: REGION_START,
            block_count,
        };
        ring::add(&self.memory, index, Request::Plug(span));
    }

    fn used_index(&self) -> u16 {
        ring::used_index(&self.memory)
    }

    fn plugged_size(&self) -> u64 {
        self.transport.device().handle().status().plugged_size
    }
}

#[test]
fn m_01_registers_identify_a_modern_memory_device() {
    let rig = Rig::new();
    assert_eq!(
        rig.read(VIRTIO_MMIO_MAGIC_VALUE),
        u32::from_le_bytes(*b"virt")
    );
    assert_eq!(rig.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(rig.read(VIRTIO_MMIO_DEVICE_ID), 24);
    assert_eq!(
        rig.read(VIRTIO_MMIO_VENDOR_ID),
        u32::from_le_bytes(*b"vmem")
    );
}

#[test]
fn m_02_feature_words_are_selected() {
    let rig = Rig::new();
    assert_eq!(
        rig.offered(),
        rig.transport.device().device_features().bits()
    );
    rig.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(rig.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn m_03_there_is_one_queue_of_128_and_it_is_not_ready() {
    let rig = Rig::new();
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 128);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0);
    rig.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn m_03_queue_that_cannot_be_used_does_not_become_ready() {
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 256),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0008),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 8),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 1),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 2),
    ] {
        let rig = Rig::new();
        rig.negotiate();
        rig.write(register, value);
        rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(
            rig.read(VIRTIO_MMIO_QUEUE_READY),
            0,
            "{register:#x} = {value:#x}"
        );
        // Put right, it does.
        rig.set_up_queue();
        assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 1);
    }
}

#[test]
fn m_04_registers_of_a_ready_queue_cannot_be_changed() {
    let rig = Rig::new();
    rig.negotiate();
    rig.set_up_queue();
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ] {
        rig.write(register, 3);
    }
    rig.write(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(rig.status(), RUNNING);
    rig.add_plug(0, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();
    assert_eq!(rig.used_index(), 1);
}

#[test]
fn m_05_configuration_is_read_in_any_aligned_width() {
    let rig = Rig::new();
    let mut block_size = [0xa5; 8];
    rig.transport.read(0x100, &mut block_size);
    assert_eq!(u64::from_le_bytes(block_size), 2 * MIB);
    assert_eq!(rig.read(0x100), 2 << 20);
    assert_eq!(rig.read(0x104), 0);
    let mut byte = [0xa5];
    rig.transport.read(0x102, &mut byte);
    assert_eq!(byte, [0x20]);
    let mut half = [0xa5; 2];
    rig.transport.read(0x102, &mut half);
    assert_eq!(half, [0x20, 0]);
}

#[test]
fn m_06_interrupt_status_says_why_and_acknowledging_clears_those_bits_only() {
    let rig = Rig::new();
    rig.run();
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    rig.interrupts.recv_timeout(LONG).unwrap();
    rig.add_plug(0, 2);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();
    assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    rig.write(VIRTIO_MMIO_INTERRUPT_ACK, 2);
    assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    rig.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let counts = rig.transport.interrupt().counts();
    assert_eq!((counts.used_buffer, counts.config_change), (1, 1));
}

#[test]
fn m_07_queue_reset_is_not_offered() {
    let rig = Rig::new();
    assert_eq!(rig.offered() & 1 << 40, 0);
    rig.run();
    rig.write(0x0c0, 1);
    assert_eq!(rig.read(0x0c0), 0);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn m_08_generation_changes_with_the_configuration() {
    let rig = Rig::new();
    let before = rig.read(VIRTIO_MMIO_CONFIG_GENERATION);
    rig.transport.device().handle().resize(32 * MIB).unwrap();
    assert_ne!(rig.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

#[test]
fn m_08_reset_clears_everything_but_the_plugged_blocks() {
    let rig = Rig::new();
    rig.run();
    rig.add_plug(0, 3);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();
    rig.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(rig.plugged_size(), 6 * MIB);

    // And the device works again afterwards, from index 0 of new rings.
    ring::clear(&rig.memory);
    rig.run();
    rig.add_plug(0, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();
    assert_eq!(
        ring::response(&rig.memory).0,
        3,
        "the block is plugged already: ERROR"
    );
}

#[test]
fn m_08_queue_is_not_touched_once_it_is_not_ready() {
    let rig = Rig::new();
    rig.run();
    rig.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0);
    rig.add_plug(0, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    // Without queue reset only a device reset brings it back.
    rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!((rig.used_index(), rig.plugged_size()), (0, 0));
}

#[test]
fn v_01_status_bits_are_set_in_order() {
    let rig = Rig::new();
    for out_of_order in [
        DRIVER,
        FEATURES_OK,
        DRIVER_OK,
        ACKNOWLEDGE | FEATURES_OK,
        READY_TO_RUN | DRIVER_OK,
    ] {
        rig.write(VIRTIO_MMIO_STATUS, out_of_order);
        assert_eq!(rig.status(), 0, "{out_of_order:#x}");
    }
    // Two steps in one write are what virtio-drivers does.
    rig.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER);
    rig.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn v_02_features_the_device_needs_or_does_not_know_keep_features_ok_clear() {
    let good = Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE;
    for wrong in [
        0,
        Features::VERSION_1.bits(),
        good.bits() | 1 << 34,
        good.bits() | 1 << 5,
    ] {
        let rig = Rig::new();
        rig.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        rig.accept(wrong);
        rig.write(VIRTIO_MMIO_STATUS, READY_TO_RUN);
        assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER, "{wrong:#x}");
    }
}

#[test]
fn v_02_features_are_settled_by_features_ok() {
    let rig = Rig::new();
    rig.negotiate();
    rig.accept(u64::MAX);
    rig.set_up_queue();
    rig.write(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(rig.status(), RUNNING);
}

#[test]
fn v_05_status_bits_are_not_taken_away_and_failed_needs_a_reset() {
    let rig = Rig::new();
    rig.run();
    rig.write(VIRTIO_MMIO_STATUS, READY_TO_RUN);
    assert_eq!(rig.status(), RUNNING);
    rig.write(VIRTIO_MMIO_STATUS, RUNNING | FAILED);
    assert_eq!(rig.status(), RUNNING | FAILED);
    rig.write(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(rig.status(), RUNNING | FAILED);
    rig.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(rig.status(), 0);
}

#[test]
fn v_09_device_that_cannot_start_needs_a_reset_and_says_so() {
    // No queue, and a queue outside guest memory.
    for descriptors in [None, Some(0x4000_0000)] {
        let rig = Rig::new();
        rig.negotiate();
        if let Some(descriptors) = descriptors {
            rig.write(VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors);
            rig.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        rig.write(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(rig.status(), RUNNING | NEEDS_RESET);
        assert_eq!(rig.interrupts.try_recv(), Ok(()));
        assert_eq!(rig.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        rig.write(VIRTIO_MMIO_STATUS, 0);
        rig.run();
    }
}

#[test]
fn v_10_buffers_are_not_consumed_before_driver_ok() {
    let rig = Rig::new();
    rig.negotiate();
    rig.set_up_queue();
    rig.add_plug(0, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    assert_eq!(
        (rig.used_index(), rig.read(VIRTIO_MMIO_INTERRUPT_STATUS)),
        (0, 0)
    );
    rig.write(VIRTIO_MMIO_STATUS, RUNNING);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();
    assert_eq!((rig.used_index(), rig.plugged_size()), (1, 2 * MIB));
}

#[test]
fn v_13_spurious_notifications_change_nothing() {
    let rig = Rig::new();
    rig.run();
    for value in [0, 1, u32::MAX] {
        rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, value);
    }
    // The handler has been called by then.
    rig.events.remote().barrier().unwrap();
    rig.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((rig.used_index(), rig.plugged_size()), (0, 0));
}

#[test]
fn g_01_configuration_is_read_only() {
    let rig = Rig::new();
    rig.write(0x100, 0);
    rig.write(0x130, u32::MAX);
    assert_eq!(rig.read(0x100), 2 << 20);
    assert_eq!(rig.read(0x130), 16 << 20);
}

#[test]
fn odd_accesses_read_zero_and_write_nothing() {
    let rig = Rig::new();
    rig.run();
    for offset in (0..0x1000).chain([u64::from(u32::MAX), u64::MAX - 7, u64::MAX]) {
        for len in 0..=9usize {
            let aligned = len.is_power_of_two() && offset % len as u64 == 0;
            let mut data = vec![0xa5; len];
            rig.transport.read(offset, &mut data);
            if offset < 0x100 && (len != 4 || offset % 4 != 0) || offset >= 0x100 && !aligned {
                assert_eq!(data, vec![0; len], "{len} bytes at {offset:#x}");
            }
            // Also a whole register, where it neither is one nor, as Status, would stop the device.
            let register = len == 4 && offset % 4 == 0 && offset < 0x100;
            if !register {
                rig.transport.write(offset, &data);
            }
        }
    }
    assert_eq!(rig.status(), RUNNING);
    assert_eq!(rig.read(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn looking_does_not_wait_for_a_request_that_runs() {
    let (entered, interrupts) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let hold = move || {
        entered.send(()).unwrap_or(());
        released.lock().unwrap().recv().unwrap_or(());
    };
    let rig = Rig::raising(hold, interrupts);
    rig.run();
    rig.add_plug(0, 1);
    rig.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    rig.interrupts.recv_timeout(LONG).unwrap();

    let begun = &AtomicBool::new(false);
    // The request is not over, and a reset by another vCPU has to wait for it. Were there a lock in the way
    // of these reads they would wait as well, for ever.
    thread::scope(|scope| {
        let registers = &rig.transport;
        let status = u64::from(VIRTIO_MMIO_STATUS);
        scope.spawn(move || {
            begun.store(true, Ordering::Release);
            registers.write(status, &[0; 4]);
        });
        while !begun.load(Ordering::Acquire) {
            thread::yield_now();
        }
        for _ in 0..1000 {
            assert_eq!(rig.read(0x100), 2 << 20);
            rig.read(VIRTIO_MMIO_CONFIG_GENERATION);
            rig.read(VIRTIO_MMIO_STATUS);
            rig.read(VIRTIO_MMIO_INTERRUPT_STATUS);
            rig.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
            thread::yield_now();
        }
        release.send(()).unwrap();
    });
    assert_eq!(rig.status(), 0);
}

#[test]
fn any_sequence_of_writes_leaves_a_transport_that_resets_and_runs() {
    let mut random = fastrand::Rng::with_seed(0);
    let rig = Rig::new();
    for _ in 0..200_000 {
        let register = 4 * random.u32(..0x40);
        // Mostly small numbers and addresses inside memory, or no write would ever get far.
        let value = random.u32(..) >> random.u32(..32);
        rig.write(register, value);
        rig.read(register);
    }
    rig.write(VIRTIO_MMIO_STATUS, 0);
    ring::clear(&rig.memory);
    rig.run();
}

//! The registers of virtio-pci (virtio 1.4, 4.1), with the real device behind them and the test as driver.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/ring.rs"]
mod ring;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_mem::wire::{Features, Request, Span};
use virtio_mem::{Anonymous, VirtioMem};
use vm_memory::GuestAddress;
use vmm_harness::layout::REGION_START;
use vmm_harness::transport::pci::{
    CONFIG_SPACE_SIZE, MSIX_BAR_SIZE, NO_VECTOR, PciInterrupt, PciSignals, PciTransport,
    REGISTER_BAR_SIZE,
};
use vmm_harness::{BootMemory, EventLoop};

const MIB: u64 = 1 << 20;
const READY_TO_RUN: u8 = 1 | 2 | 8;
const RUNNING: u8 = READY_TO_RUN | 4;
const NEEDS_RESET: u8 = 64;

/// `struct virtio_pci_common_cfg`: offset and width of each field.
const DEVICE_FEATURE_SELECT: (u64, usize) = (0x00, 4);
const DEVICE_FEATURE: (u64, usize) = (0x04, 4);
const DRIVER_FEATURE_SELECT: (u64, usize) = (0x08, 4);
const DRIVER_FEATURE: (u64, usize) = (0x0c, 4);
const CONFIG_MSIX_VECTOR: (u64, usize) = (0x10, 2);
const NUM_QUEUES: (u64, usize) = (0x12, 2);
const DEVICE_STATUS: (u64, usize) = (0x14, 1);
const CONFIG_GENERATION: (u64, usize) = (0x15, 1);
const QUEUE_SELECT: (u64, usize) = (0x16, 2);
const QUEUE_SIZE: (u64, usize) = (0x18, 2);
const QUEUE_MSIX_VECTOR: (u64, usize) = (0x1a, 2);
const QUEUE_ENABLE: (u64, usize) = (0x1c, 2);
const QUEUE_NOTIFY_OFF: (u64, usize) = (0x1e, 2);
const QUEUE_DESC: (u64, usize) = (0x20, 8);
const QUEUE_DRIVER: (u64, usize) = (0x28, 8);
const QUEUE_DEVICE: (u64, usize) = (0x30, 8);
const QUEUE_NOTIF_CONFIG_DATA: (u64, usize) = (0x38, 2);
const QUEUE_RESET: (u64, usize) = (0x3a, 2);
const ADMIN_QUEUE_INDEX: (u64, usize) = (0x3c, 2);
const ADMIN_QUEUE_NUM: (u64, usize) = (0x3e, 2);

const FIELDS: [(u64, usize); 20] = [
    DEVICE_FEATURE_SELECT,
    DEVICE_FEATURE,
    DRIVER_FEATURE_SELECT,
    DRIVER_FEATURE,
    CONFIG_MSIX_VECTOR,
    NUM_QUEUES,
    DEVICE_STATUS,
    CONFIG_GENERATION,
    QUEUE_SELECT,
    QUEUE_SIZE,
    QUEUE_MSIX_VECTOR,
    QUEUE_ENABLE,
    QUEUE_NOTIFY_OFF,
    QUEUE_DESC,
    QUEUE_DRIVER,
    QUEUE_DEVICE,
    QUEUE_NOTIF_CONFIG_DATA,
    QUEUE_RESET,
    ADMIN_QUEUE_INDEX,
    ADMIN_QUEUE_NUM,
];

/// What a vector field reads as without a vector.
const NONE: u64 = NO_VECTOR as u64;

/// Interrupts come from the thread of the event loop.
const LONG: Duration = Duration::from_secs(60);

/// What the function signals, as a machine would see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Message(u16),
    Line,
}

struct Signals {
    msix: AtomicBool,
    sender: Mutex<Sender<Signal>>,
}

impl Signals {
    fn send(&self, signal: Signal) {
        self.sender.lock().unwrap().send(signal).unwrap_or(());
    }
}

impl PciSignals for Signals {
    fn msix_is_enabled(&self) -> bool {
        self.msix.load(Ordering::Relaxed)
    }

    fn send_message(&self, vector: u16) {
        self.send(Signal::Message(vector));
    }

    fn assert_line(&self) {
        self.send(Signal::Line);
    }
}

/// A virtio capability as a driver finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capability {
    at: u64,
    bar: u8,
    offset: u64,
    len: u64,
}

struct Rig {
    transport: PciTransport<Arc<BootMemory>>,
    memory: Arc<BootMemory>,
    signals: Arc<Signals>,
    received: Receiver<Signal>,
    events: EventLoop,
}

impl Rig {
    fn new() -> Self {
        let (sender, received) = channel();
        let signals = Arc::new(Signals {
            msix: AtomicBool::new(false),
            sender: Mutex::new(sender),
        });
        let backing = Anonymous::base_pages(64 * MIB).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION_START), backing)
            .block_size(2 * MIB)
            .requested_size(16 * MIB)
            .build()
            .unwrap();
        let memory = Arc::new(BootMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let interrupt = PciInterrupt::new(Arc::<Signals>::clone(&signals));
        let events = EventLoop::start().unwrap();
        let remote = events.remote().clone();
        let transport = PciTransport::new(device, Arc::clone(&memory), remote, interrupt).unwrap();
        Self {
            transport,
            memory,
            signals,
            received,
            events,
        }
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xa5; N];
        self.transport.read_config_space(offset, &mut data);
        data
    }

    fn config_u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.config(offset))
    }

    fn config_u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.config(offset))
    }

    /// The virtio capability of type `cfg_type`, found as a driver does (4.1.4).
    fn capability(&self, cfg_type: u8) -> Capability {
        let [mut at] = self.config(0x34);
        loop {
            assert_ne!(at, 0, "no capability of type {cfg_type}");
            let [id, next, _, found, bar] = self.config(at.into());
            if (id, found) == (0x09, cfg_type) {
                let at = u64::from(at);
                return Capability {
                    at,
                    bar,
                    offset: self.config_u32(at + 8).into(),
                    len: self.config_u32(at + 12).into(),
                };
            }
            at = next;
        }
    }

    fn read_at(&self, area: Capability, offset: u64, width: usize) -> u64 {
        let mut data = vec![0xa5; width];
        self.transport
            .read_bar(area.bar, area.offset + offset, &mut data);
        data.resize(8, 0);
        u64::from_le_bytes(data.try_into().unwrap())
    }

    fn write_at(&self, area: Capability, offset: u64, width: usize, value: u64) {
        self.transport.write_bar(
            area.bar,
            area.offset + offset,
            &value.to_le_bytes()[..width],
        );
    }

    fn read(&self, (offset, width): (u64, usize)) -> u64 {
        self.read_at(self.capability(1), offset, width)
    }

    fn write(&self, (offset, width): (u64, usize), value: u64) {
        self.write_at(self.capability(1), offset, width, value);
    }

    fn notify(&self, index: u16) {
        self.write_at(self.capability(2), 0, 2, index.into());
    }

    fn isr(&self) -> u64 {
        self.read_at(self.capability(3), 0, 1)
    }

    fn status(&self) -> u8 {
        self.read(DEVICE_STATUS) as u8
    }

    fn set_status(&self, status: u8) {
        self.write(DEVICE_STATUS, status.into());
    }

    fn accept(&self, features: u64) {
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(DRIVER_FEATURE_SELECT, select);
            self.write(DRIVER_FEATURE, word);
        }
    }

    /// Up to and with FEATURES_OK.
    fn negotiate(&self) {
        self.set_status(1);
        self.set_status(1 | 2);
        self.accept((Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE).bits());
        self.set_status(READY_TO_RUN);
        assert_eq!(self.status(), READY_TO_RUN);
    }

    fn set_up_queue(&self) {
        self.write(QUEUE_SELECT, 0);
        self.write(QUEUE_SIZE, ring::SIZE.into());
        self.write(QUEUE_DESC, ring::DESCRIPTORS);
        // As two words, as drivers on 32-bit machines do.
        self.write((QUEUE_DRIVER.0, 4), ring::AVAILABLE);
        self.write((QUEUE_DRIVER.0 + 4, 4), 0);
        self.write(QUEUE_DEVICE, ring::USED);
        self.write(QUEUE_ENABLE, 1);
    }

    fn run(&self) {
        self.negotiate();
        self.set_up_queue();
        assert_eq!(self.read(QUEUE_ENABLE), 1);
        self.set_status(RUNNING);
        assert_eq!(self.status(), RUNNING);
    }

    fn enable_msix(&self) {
        self.signals.msix.store(true, Ordering::Relaxed);
        self.write(CONFIG_MSIX_VECTOR, 0);
        self.write(QUEUE_SELECT, 0);
        self.write(QUEUE_MSIX_VECTOR, 1);
    }

    /// Asks for the first `block_count` blocks, as request number `index`.
    fn plug(&self, index: u16, block_count: u16) {
        let span = Span {
            addr: REGION_START,
            block_count,
        };
        ring::add(&self.memory, index, Request::Plug(span));
        self.notify(0);
    }

    fn plugged_size(&self) -> u64 {
        self.transport.device().handle().status().plugged_size
    }
}

#[test]
fn header_identifies_a_modern_memory_device() {
    let rig = Rig::new();
    assert_eq!(rig.config_u16(0x00), 0x1af4);
    assert_eq!(rig.config_u16(0x02), 0x1058, "0x1040 and the virtio id");
    assert!(rig.config::<1>(0x08) >= [1], "4.1.2.1: revision");
    assert_eq!(rig.config::<1>(0x0e), [0], "type 0, one function");
    assert!(rig.config_u16(0x2e) >= 0x40, "4.1.2.1: subsystem device");
    assert_eq!(rig.config::<1>(0x3d), [1], "INTA#");
    assert_eq!(rig.config_u16(0x06) & 0x10, 0x10, "capability list");
}

#[test]
fn each_structure_lies_inside_its_bar_and_overlaps_no_other() {
    let rig = Rig::new();
    let mut areas: Vec<_> = (1..=4).map(|cfg_type| rig.capability(cfg_type)).collect();
    areas.sort_by_key(|area| area.offset);
    for area in &areas {
        assert_eq!(area.bar, 0);
        assert!(area.offset.is_multiple_of(4) && area.len > 0);
        assert!(area.offset + area.len <= u64::from(REGISTER_BAR_SIZE));
    }
    for pair in areas.windows(2) {
        assert!(pair[0].offset + pair[0].len <= pair[1].offset);
    }
    // 4.1.4.3, 4.1.4.4.1, 4.1.4.5, 5.15.4.
    assert_eq!(rig.capability(1).len, 0x40);
    let notify = rig.capability(2);
    let multiplier = rig.config_u32(notify.at + 16);
    assert!(multiplier == 0 || multiplier.is_power_of_two() && multiplier >= 2);
    assert!(notify.len >= u64::from(multiplier) * rig.read(QUEUE_NOTIFY_OFF) + 2);
    assert!(rig.capability(3).len >= 1);
    assert_eq!(rig.capability(4).len, 56);
}

#[test]
fn msix_capability_has_two_vectors_in_a_bar_of_their_own() {
    let rig = Rig::new();
    let [mut at] = rig.config(0x34);
    while rig.config::<1>(at.into()) != [0x11] {
        [at] = rig.config(u64::from(at) + 1);
        assert_ne!(at, 0, "no MSI-X");
    }
    let at = u64::from(at);
    assert_eq!(rig.config_u16(at + 2), 1, "table size less one, disabled");
    let (table, pending) = (rig.config_u32(at + 4), rig.config_u32(at + 8));
    assert_eq!((table & 7, pending & 7), (1, 1));
    assert!((table & !7) + 2 * 16 <= pending & !7);
    assert!((pending & !7) + 8 <= MSIX_BAR_SIZE);
    // Enable and Function Mask are the driver's, the size is not.
    rig.transport.write_config_space(at + 2, &[0xff; 2]);
    assert_eq!(rig.config_u16(at + 2), 0xc001);
}

#[test]
fn bars_tell_their_size_and_keep_an_address() {
    let rig = Rig::new();
    for (bar, size) in [(0, REGISTER_BAR_SIZE), (1, MSIX_BAR_SIZE)] {
        let at = 0x10 + bar * 4;
        assert_eq!(rig.config_u32(at), 0);
        rig.transport.write_config_space(at, &[0xff; 4]);
        assert_eq!(rig.config_u32(at), !(size - 1), "32-bit memory");
        rig.transport
            .write_config_space(at, &0xfebf_c000u32.to_le_bytes());
        assert_eq!(rig.config_u32(at), 0xfebf_c000);
    }
    for absent in 2..6 {
        rig.transport
            .write_config_space(0x10 + absent * 4, &[0xff; 4]);
        assert_eq!(rig.config_u32(0x10 + absent * 4), 0);
    }
}

#[test]
fn configuration_space_changes_in_writable_bits_only() {
    let rig = Rig::new();
    let before: [u8; CONFIG_SPACE_SIZE as usize] = rig.config(0);
    for offset in 0..CONFIG_SPACE_SIZE {
        rig.transport
            .write_config_space(offset, &[!before[offset as usize]]);
    }
    let after: [u8; CONFIG_SPACE_SIZE as usize] = rig.config(0);
    let window = rig.capability(5).at as usize;
    for (offset, (before, after)) in before.into_iter().zip(after).enumerate() {
        let writable = match offset {
            0x04 => 0x06,
            0x05 => 0x04,
            0x0c | 0x3c => 0xff,
            0x11 => 0xc0,
            0x15 => 0xf0,
            0x12 | 0x13 | 0x16 | 0x17 => 0xff,
            _ if offset == window + 4 || (window + 8..window + 20).contains(&offset) => 0xff,
            0x87 => 0xc0,
            _ => 0,
        };
        assert_eq!(before ^ after, writable, "{offset:#x}");
    }
    rig.transport.reset();
    assert_eq!(rig.config::<{ CONFIG_SPACE_SIZE as usize }>(0), before);
}

#[test]
fn bars_can_be_reached_through_configuration_space() {
    let rig = Rig::new();
    let window = rig.capability(5).at;
    let select = |offset: u64, len: u32| {
        rig.transport.write_config_space(window + 4, &[0]);
        let offset = (rig.capability(1).offset + offset) as u32;
        rig.transport
            .write_config_space(window + 8, &offset.to_le_bytes());
        rig.transport
            .write_config_space(window + 12, &len.to_le_bytes());
    };
    select(NUM_QUEUES.0, 2);
    assert_eq!(rig.config_u16(window + 16), 1);
    select(DEVICE_STATUS.0, 1);
    rig.transport.write_config_space(window + 16, &[1]);
    assert_eq!(rig.status(), 1);
    assert_eq!(rig.config::<1>(window + 16), [1]);
    // Widths and alignments that are no access do nothing (4.1.4.9.2).
    for (offset, len) in [
        (DEVICE_STATUS.0, 3),
        (DEVICE_STATUS.0, 0),
        (DEVICE_STATUS.0 + 1, 4),
    ] {
        select(offset, len);
        rig.transport.write_config_space(window + 16, &[0; 4]);
        assert_eq!(rig.status(), 1);
    }
    // Who reads the whole space does not read the ISR status on the way.
    rig.set_status(0);
    rig.run();
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    let isr = (rig.capability(3).offset - rig.capability(1).offset, 1);
    select(isr.0, isr.1);
    rig.config::<{ CONFIG_SPACE_SIZE as usize }>(0);
    assert_eq!(rig.config::<1>(window + 16), [2]);
    assert_eq!(rig.isr(), 0, "read by way of the window");
}

#[test]
fn common_configuration_is_as_a_new_device_has_it() {
    let rig = Rig::new();
    let expected = [
        (DEVICE_FEATURE_SELECT, 0),
        (DRIVER_FEATURE_SELECT, 0),
        (DRIVER_FEATURE, 0),
        (CONFIG_MSIX_VECTOR, NONE),
        (NUM_QUEUES, 1),
        (DEVICE_STATUS, 0),
        (QUEUE_SELECT, 0),
        (QUEUE_SIZE, 128),
        (QUEUE_MSIX_VECTOR, NONE),
        (QUEUE_ENABLE, 0),
        (QUEUE_NOTIFY_OFF, 0),
        (QUEUE_DESC, 0),
        (QUEUE_DRIVER, 0),
        (QUEUE_DEVICE, 0),
        (QUEUE_NOTIF_CONFIG_DATA, 0),
        (QUEUE_RESET, 0),
        (ADMIN_QUEUE_INDEX, 0),
        (ADMIN_QUEUE_NUM, 0),
    ];
    let check = || {
        for (field, value) in expected {
            assert_eq!(rig.read(field), value, "{field:x?}");
        }
    };
    check();
    // And so it is after a reset, whatever was written.
    rig.run();
    rig.enable_msix();
    rig.write(DEVICE_FEATURE_SELECT, 1);
    rig.write(QUEUE_SELECT, 9);
    rig.set_status(0);
    check();
}

#[test]
fn features_are_read_and_accepted_by_words() {
    let rig = Rig::new();
    let offered = rig.transport.device().device_features().bits();
    for (select, word) in [
        (0, offered & 0xffff_ffff),
        (1, offered >> 32),
        (2, 0),
        (0xffff_ffff, 0),
    ] {
        rig.write(DEVICE_FEATURE_SELECT, select);
        assert_eq!(rig.read(DEVICE_FEATURE_SELECT), select);
        assert_eq!(rig.read(DEVICE_FEATURE), word);
    }
    rig.set_status(1);
    rig.set_status(3);
    rig.accept(offered);
    // 4.1.4.3.1: what the driver has written can be read, whatever word is selected.
    for (select, word) in [(0, offered & 0xffff_ffff), (1, offered >> 32), (2, 0)] {
        rig.write(DRIVER_FEATURE_SELECT, select);
        assert_eq!(rig.read(DRIVER_FEATURE_SELECT), select);
        assert_eq!(rig.read(DRIVER_FEATURE), word);
    }
}

#[test]
fn v_02_features_are_settled_by_features_ok() {
    let rig = Rig::new();
    rig.set_status(1);
    rig.set_status(3);
    rig.accept(Features::VERSION_1.bits());
    rig.set_status(READY_TO_RUN);
    assert_eq!(rig.status(), 3, "UNPLUGGED_INACCESSIBLE is missing");
    rig.accept((Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE).bits());
    rig.set_status(READY_TO_RUN);
    assert_eq!(rig.status(), READY_TO_RUN);
    rig.accept(u64::MAX);
    rig.write(DRIVER_FEATURE_SELECT, 1);
    assert_eq!(rig.read(DRIVER_FEATURE), 1);
}

#[test]
fn queues_that_are_not_there_have_size_0_and_take_nothing() {
    let rig = Rig::new();
    rig.negotiate();
    for index in [1, 2, 0x100, 0xffff] {
        rig.write(QUEUE_SELECT, index);
        assert_eq!(rig.read(QUEUE_SELECT), index);
        for field in [
            QUEUE_SIZE,
            QUEUE_DESC,
            QUEUE_DRIVER,
            QUEUE_DEVICE,
            QUEUE_ENABLE,
        ] {
            rig.write(field, 1);
            assert_eq!(rig.read(field), 0, "{field:x?} of queue {index}");
        }
        rig.write(QUEUE_MSIX_VECTOR, 1);
        assert_eq!(rig.read(QUEUE_MSIX_VECTOR), NONE);
    }
    rig.write(QUEUE_SELECT, 0);
    assert_eq!((rig.read(QUEUE_SIZE), rig.read(QUEUE_DESC)), (128, 0));
    assert_eq!(rig.read(QUEUE_MSIX_VECTOR), NONE);
}

#[test]
fn queue_fields_are_read_back_and_fixed_once_the_queue_is_enabled() {
    let rig = Rig::new();
    rig.negotiate();
    let high = 0x12_0000_0000;
    for field in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE] {
        rig.write(field, high | 0x34_5670);
        assert_eq!(rig.read(field), high | 0x34_5670);
        assert_eq!(rig.read((field.0, 4)), 0x34_5670);
        assert_eq!(rig.read((field.0 + 4, 4)), 0x12);
        rig.write((field.0 + 4, 4), 0);
        assert_eq!(rig.read(field), 0x34_5670);
    }
    rig.set_up_queue();
    for (field, value) in [
        (QUEUE_SIZE, 8),
        (QUEUE_DESC, ring::DESCRIPTORS),
        (QUEUE_DRIVER, ring::AVAILABLE),
        (QUEUE_DEVICE, ring::USED),
        // 0 is never written; there is no way back but a reset.
        (QUEUE_ENABLE, 1),
    ] {
        rig.write(field, 0);
        assert_eq!(rig.read(field), value, "{field:x?}");
    }
}

#[test]
fn queue_that_cannot_be_used_is_not_enabled() {
    for (field, value) in [
        (QUEUE_SIZE, 0),
        (QUEUE_SIZE, 3),
        (QUEUE_SIZE, 256),
        (QUEUE_DESC, 8),
        (QUEUE_DRIVER, 1),
        (QUEUE_DEVICE, 2),
    ] {
        let rig = Rig::new();
        rig.negotiate();
        rig.write(field, value);
        rig.write(QUEUE_ENABLE, 1);
        assert_eq!(rig.read(QUEUE_ENABLE), 0, "{field:x?} = {value:#x}");
    }
    let rig = Rig::new();
    rig.set_up_queue();
    assert_eq!(rig.read(QUEUE_ENABLE), 0, "before FEATURES_OK");
    rig.negotiate();
    rig.set_up_queue();
    assert_eq!(rig.read(QUEUE_ENABLE), 1);
}

#[test]
fn queue_reset_is_not_offered() {
    let rig = Rig::new();
    rig.write(DEVICE_FEATURE_SELECT, 1);
    assert_eq!(rig.read(DEVICE_FEATURE) & 1 << (40 - 32), 0);
    rig.run();
    rig.write(QUEUE_RESET, 1);
    assert_eq!((rig.read(QUEUE_RESET), rig.read(QUEUE_ENABLE)), (0, 1));
}

#[test]
fn read_only_fields_are_read_only() {
    let rig = Rig::new();
    rig.run();
    for field in [
        DEVICE_FEATURE,
        NUM_QUEUES,
        CONFIG_GENERATION,
        QUEUE_NOTIFY_OFF,
        QUEUE_NOTIF_CONFIG_DATA,
        ADMIN_QUEUE_INDEX,
        ADMIN_QUEUE_NUM,
    ] {
        let before = rig.read(field);
        rig.write(field, !before);
        assert_eq!(rig.read(field), before, "{field:x?}");
    }
    for offset in 0..56 {
        let before = rig.read_at(rig.capability(4), offset, 1);
        rig.write_at(rig.capability(4), offset, 1, !before);
        assert_eq!(rig.read_at(rig.capability(4), offset, 1), before, "G-01");
    }
}

#[test]
fn accesses_of_another_width_read_zero_and_write_nothing() {
    let rig = Rig::new();
    rig.run();
    rig.enable_msix();
    let values: Vec<_> = FIELDS.iter().map(|field| rig.read(*field)).collect();
    let regular = |offset, len| {
        let word = |field: &(u64, usize)| {
            field.1 == 8 && len == 4 && (offset == field.0 || offset == field.0 + 4)
        };
        FIELDS
            .iter()
            .any(|field| *field == (offset, len) || word(field))
    };
    let common = rig.capability(1);
    for offset in 0..0x1000 {
        for len in 0..=9 {
            if regular(offset, len) {
                continue;
            }
            let mut data = vec![0xa5; len];
            rig.transport.read_bar(0, common.offset + offset, &mut data);
            assert_eq!(data, vec![0; len], "{len} bytes at {offset:#x}");
            rig.transport.write_bar(0, common.offset + offset, &data);
        }
    }
    for (field, value) in FIELDS.iter().zip(values) {
        assert_eq!(rig.read(*field), value, "{field:x?}");
    }
    for bar in 1..=6 {
        rig.transport.write_bar(bar, DEVICE_STATUS.0, &[0]);
        let mut data = [0xa5];
        rig.transport.read_bar(bar, DEVICE_STATUS.0, &mut data);
        assert_eq!(data, [0]);
    }
    let mut data = [0xa5; 4];
    rig.transport.read_bar(0, u64::MAX - 1, &mut data);
    assert_eq!((data, rig.status()), ([0; 4], RUNNING));
}

#[test]
fn device_configuration_is_read_in_any_aligned_width() {
    let rig = Rig::new();
    let device = rig.capability(4);
    assert_eq!(rig.read_at(device, 0x00, 8), 2 * MIB);
    assert_eq!(rig.read_at(device, 0x30, 8), 16 * MIB);
    assert_eq!(rig.read_at(device, 0x30, 4), 16 << 20);
    assert_eq!(rig.read_at(device, 0x34, 4), 0);
    assert_eq!(rig.read_at(device, 0x02, 2), 0x20);
    assert_eq!(rig.read_at(device, 0x02, 1), 0x20);
    assert_eq!(rig.read_at(device, 0x02, 4), 0, "misaligned");
    assert_eq!(rig.read_at(device, 0x38, 4), 0, "beyond its end");
}

#[test]
fn generation_changes_with_the_configuration_and_never_comes_round() {
    let rig = Rig::new();
    let resize = |blocks: u64| {
        rig.transport
            .device()
            .handle()
            .resize(blocks * 2 * MIB)
            .unwrap()
    };
    let mut before = rig.read(CONFIG_GENERATION);
    assert_eq!(rig.read(CONFIG_GENERATION), before);
    // Whatever the number of changes between two looks, 256 not least.
    for changes in (1..=600).step_by(5).chain([256, 512]) {
        for change in 0..changes {
            resize(change % 2);
        }
        let after = rig.read(CONFIG_GENERATION);
        assert_ne!(after, before, "{changes} changes");
        before = after;
    }
}

#[test]
fn vectors_that_do_not_exist_read_back_as_no_vector() {
    let rig = Rig::new();
    for field in [CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR] {
        for (vector, read) in [
            (0, 0),
            (1, 1),
            (2, 0xffff),
            (1, 1),
            (0x7fff, 0xffff),
            (0xffff, 0xffff),
        ] {
            rig.write(field, vector);
            assert_eq!(rig.read(field), read, "4.1.5.1.2.1");
        }
    }
}

#[test]
fn each_event_has_its_vector_and_none_without_one() {
    let rig = Rig::new();
    rig.enable_msix();
    rig.run();
    rig.plug(0, 1);
    assert_eq!(rig.received.recv_timeout(LONG), Ok(Signal::Message(1)));
    assert_eq!(rig.isr(), 0, "the queue bit is for the line");
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    assert_eq!(rig.received.try_recv(), Ok(Signal::Message(0)));
    assert_eq!(
        rig.config_u16(0x06) & 8,
        0,
        "Interrupt Status is for the line"
    );
    assert_eq!(rig.isr(), 2, "4.1.4.5.1: also with MSI-X");

    rig.write(CONFIG_MSIX_VECTOR, NONE);
    rig.transport.device().handle().resize(6 * MIB).unwrap();
    rig.write(CONFIG_MSIX_VECTOR, 1);
    rig.transport.device().handle().resize(4 * MIB).unwrap();
    assert_eq!(rig.received.try_recv(), Ok(Signal::Message(1)));
    assert!(rig.received.try_recv().is_err());
    let counts = rig.transport.interrupt().counts();
    assert_eq!((counts.used_buffer, counts.config_change), (1, 3));
}

#[test]
fn line_is_asserted_until_the_isr_status_is_read() {
    let rig = Rig::new();
    rig.run();
    assert_eq!(rig.isr(), 0);
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    assert_eq!(rig.received.try_recv(), Ok(Signal::Line));
    rig.plug(0, 1);
    assert_eq!(rig.received.recv_timeout(LONG), Ok(Signal::Line));
    assert_eq!(rig.config_u16(0x06) & 8, 8, "Interrupt Status");
    // A carrier that has masked the line asserts it again while there is a reason to.
    rig.transport.interrupt().refresh_line();
    assert_eq!(rig.received.try_recv(), Ok(Signal::Line));
    assert_eq!(rig.isr(), 3);
    assert_eq!(rig.isr(), 0, "reading clears it");
    assert_eq!(rig.config_u16(0x06) & 8, 0);
    rig.transport.interrupt().refresh_line();
    assert!(rig.received.try_recv().is_err());
}

#[test]
fn interrupt_disable_holds_the_line_back() {
    let rig = Rig::new();
    rig.run();
    rig.transport.write_config_space(0x04, &[0x06, 0x04]);
    rig.transport.device().handle().resize(8 * MIB).unwrap();
    assert!(rig.received.try_recv().is_err());
    assert_eq!(rig.config_u16(0x06) & 8, 8, "pending all the same");
    rig.transport.write_config_space(0x04, &[0x06, 0x00]);
    assert_eq!(rig.received.try_recv(), Ok(Signal::Line));
}

#[test]
fn notifications_are_the_index_of_the_queue_in_16_bits() {
    let rig = Rig::new();
    rig.run();
    let notify = rig.capability(2);
    let span = Span {
        addr: REGION_START,
        block_count: 1,
    };
    ring::add(&rig.memory, 0, Request::Plug(span));
    for (offset, width, value) in [(0, 4, 0), (0, 1, 0), (2, 2, 0), (0, 2, 1)] {
        rig.write_at(notify, offset, width, value);
    }
    // The handler was not called, or it would have answered by now.
    rig.events.remote().barrier().unwrap();
    rig.set_status(0);
    assert_eq!(ring::used_index(&rig.memory), 0);
    rig.run();
    rig.notify(0);
    assert_eq!(rig.received.recv_timeout(LONG), Ok(Signal::Line));
    assert_eq!(
        (ring::used_index(&rig.memory), ring::response(&rig.memory).0),
        (1, 0)
    );
}

#[test]
fn device_reset_keeps_blocks_and_forgets_the_rest() {
    let rig = Rig::new();
    rig.enable_msix();
    rig.run();
    rig.plug(0, 3);
    assert_eq!(rig.received.recv_timeout(LONG), Ok(Signal::Message(1)));
    let resets: [&dyn Fn(&Rig); 2] = [&|rig| rig.set_status(0), &|rig| rig.transport.reset()];
    for reset in resets {
        reset(&rig);
        assert_eq!((rig.status(), rig.isr()), (0, 0));
        assert_eq!(rig.read(QUEUE_ENABLE), 0, "4.1.4.3.1");
        assert_eq!(rig.read(CONFIG_MSIX_VECTOR), NONE);
        assert_eq!(rig.read(QUEUE_MSIX_VECTOR), NONE);
        assert_eq!(rig.plugged_size(), 6 * MIB, "D-13");
        ring::clear(&rig.memory);
        rig.enable_msix();
        rig.run();
        rig.plug(0, 1);
        assert_eq!(rig.received.recv_timeout(LONG), Ok(Signal::Message(1)));
        assert_eq!(ring::response(&rig.memory).0, 3, "plugged already: ERROR");
    }
}

#[test]
fn v_09_device_that_cannot_start_needs_a_reset_and_says_so() {
    let rig = Rig::new();
    rig.negotiate();
    rig.set_status(RUNNING);
    assert_eq!(rig.status(), RUNNING | NEEDS_RESET);
    assert_eq!(rig.received.try_recv(), Ok(Signal::Line));
    rig.set_status(0);
    rig.run();
}

#[test]
fn any_sequence_of_accesses_leaves_a_function_that_resets_and_runs() {
    let mut random = fastrand::Rng::with_seed(0);
    let rig = Rig::new();
    for _ in 0..200_000 {
        let width = 1 << random.u32(..4);
        // Mostly small numbers and addresses inside memory, or no write would ever get far.
        let value = random.u64(..) >> random.u32(32..64);
        let data = &value.to_le_bytes()[..width];
        let mut read = vec![0; width];
        match random.u32(..4) {
            0 => {
                let offset = random.u64(..0x100);
                rig.transport.write_config_space(offset, data);
                rig.transport.read_config_space(offset, &mut read);
            }
            1 => rig.transport.write_bar(0, random.u64(..0x4000), data),
            _ => {
                let (offset, width) = FIELDS[random.usize(..FIELDS.len())];
                rig.write((offset, width), value);
                rig.read((offset, width));
            }
        }
    }
    rig.transport.reset();
    ring::clear(&rig.memory);
    rig.run();
}

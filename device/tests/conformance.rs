//! One test for each device rule of virtio 1.4, section 5.15, and the corners of the specification.
//!
//! The ids are ours: D-01 … D-50 are the device's normative statements in the order of the specification. Of
//! D-16 (device memory has the properties of comparable RAM) only what a VMM can see is tested; that the
//! guest's CPUs see the same follows from the memory being an ordinary mapping in an ordinary slot.

mod rig;

use std::sync::atomic::Ordering;

use rig::{BLOCK, GIB, MIB, REGION, Rig, blocks, driver_features};
use virtio_mem::wire::{BlockState, Config, Features, GeometryError, Request, Response, Span};
use virtio_mem::{Anonymous, BuildError, FeatureError, VirtioMem};
use vm_memory::{Bytes, GuestAddress};

fn builder(addr: u64, len: u64) -> virtio_mem::Builder {
    VirtioMem::builder(
        GuestAddress(addr),
        Anonymous::base_pages(len).expect("address space for the region"),
    )
}

// Configuration layout

#[test]
fn d_01_usable_and_requested_size_change_at_run_time() {
    let rig = Rig::with(4 * GIB, |b| b);
    assert_eq!(rig.config().mutable.usable_region_size, 0);
    rig.handle.resize(GIB).unwrap();
    let config = rig.config().mutable;
    assert_eq!(config.requested_size, GIB);
    assert_eq!(config.usable_region_size, GIB + 256 * MIB);
}

#[test]
fn d_02_fixed_fields_stay_whatever_happens() {
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(GIB).node_id(5));
    let fixed = |config: Config| (config.geometry, config.node_id);
    let before = fixed(rig.config());
    rig.plug(0, 100);
    rig.handle.resize(2 * GIB).unwrap();
    rig.unplug_all();
    rig.device.reset();
    assert_eq!(fixed(rig.config()), before);
}

#[test]
fn d_03_plugged_size_is_the_size_of_the_plugged_blocks() {
    let mut rig = Rig::new();
    for (first, count) in [(0, 1), (7, 30), (200, 64)] {
        rig.plug(first, count);
        assert_eq!(
            rig.config().mutable.plugged_size,
            rig.handle.plugged().count() * BLOCK
        );
    }
    rig.unplug(10, 5);
    assert_eq!(rig.config().mutable.plugged_size, 90 * BLOCK);
    assert_eq!(rig.handle.plugged().count(), 90);
}

#[test]
fn d_04_usable_region_is_never_smaller_than_requested() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    for size in [2 * MIB, 4 * GIB, 4 * GIB - BLOCK, 0, GIB] {
        rig.handle.resize(size).unwrap();
        rig.unplug_all();
        let config = rig.config().mutable;
        assert!(config.usable_region_size >= config.requested_size);
        assert!(config.usable_region_size <= 4 * GIB);
    }
}

#[test]
fn d_05_block_size_must_be_a_power_of_two() {
    let error = builder(REGION, 12 * MIB)
        .block_size(3 * MIB)
        .build()
        .unwrap_err();
    assert!(matches!(
        error,
        BuildError::Geometry(GeometryError::BlockSizeNotPowerOfTwo(bytes)) if bytes == 3 * MIB
    ));
}

#[test]
fn d_06_all_sizes_are_multiples_of_the_block_size() {
    let misaligned = builder(REGION + MIB, 4 * MIB).block_size(BLOCK).build();
    assert!(matches!(
        misaligned,
        Err(BuildError::Geometry(
            GeometryError::AddressMisaligned { .. }
        ))
    ));
    let misaligned = builder(REGION, 3 * MIB).block_size(BLOCK).build();
    assert!(matches!(
        misaligned,
        Err(BuildError::Geometry(GeometryError::SizeMisaligned { .. }))
    ));
    let misaligned = builder(REGION, 4 * MIB)
        .block_size(BLOCK)
        .requested_size(MIB)
        .build();
    assert!(matches!(misaligned, Err(BuildError::RequestedSize(_))));
    let rig = Rig::new();
    assert!(rig.handle.resize(GIB + MIB).is_err());
    assert_eq!(rig.config().mutable.requested_size, GIB);
    // `Config::parse` in `config` has checked the rest of the fields.
}

#[test]
fn d_07_region_may_be_empty() {
    let mut rig = Rig::with(0, |b| b);
    assert_eq!(rig.config().geometry.region_size(), 0);
    assert_eq!(rig.plug(0, 1), Response::Error);
    assert_eq!(rig.state(0, 1), Response::Error);
    assert_eq!(rig.unplug_all(), Response::Ack);
}

#[test]
fn d_08_usable_region_shrinks_with_unplug_all_and_system_reset_only() {
    let mut rig = Rig::new();
    let usable = |rig: &Rig| rig.config().mutable.usable_region_size;
    let before = usable(&rig);
    rig.plug(0, 8);
    rig.handle.resize(8 * BLOCK).unwrap();
    rig.unplug(0, 4);
    rig.device.reset();
    rig.activate(driver_features());
    assert_eq!(usable(&rig), before);
    assert_eq!(rig.unplug_all(), Response::Ack);
    assert_eq!(usable(&rig), 8 * BLOCK + 256 * MIB);
    rig.handle.resize(BLOCK).unwrap();
    rig.device.system_reset().unwrap();
    assert_eq!(usable(&rig), BLOCK + 256 * MIB);
}

#[test]
fn d_09_resize_notifies_and_unplug_all_does_not() {
    let mut rig = Rig::new();
    rig.handle.resize(2 * GIB).unwrap();
    rig.handle.resize(GIB).unwrap();
    assert_eq!(rig.notifications.config(), 2);
    let usable = rig.config().mutable.usable_region_size;
    assert_eq!(rig.unplug_all(), Response::Ack);
    assert!(rig.config().mutable.usable_region_size < usable);
    assert_eq!(rig.notifications.config(), 2);
    assert_eq!(rig.handle.counters().config_notifications, 2);
}

#[test]
fn d_10_plugged_size_changes_without_notification() {
    let mut rig = Rig::new();
    rig.plug(0, 16);
    rig.unplug(3, 2);
    assert_eq!(rig.notifications.config(), 0);
}

#[test]
fn d_11_resize_to_the_same_size_notifies_again_and_changes_nothing() {
    let rig = Rig::new();
    let (config, generation) = (rig.config(), rig.device.config_generation());
    rig.handle.resize(GIB).unwrap();
    assert_eq!(rig.notifications.config(), 1);
    assert_eq!(
        (rig.config(), rig.device.config_generation()),
        (config, generation)
    );
}

// Initialisation

#[test]
fn d_12_driver_that_would_read_unplugged_blocks_is_refused() {
    let device = builder(REGION, GIB).build().unwrap();
    assert!(
        device
            .device_features()
            .contains(Features::UNPLUGGED_INACCESSIBLE)
    );
    assert_eq!(
        device.acknowledge_features(Features::VERSION_1.bits()),
        Err(FeatureError::NoUnpluggedInaccessible)
    );
}

#[test]
fn d_13_device_reset_keeps_blocks_plugged() {
    let mut rig = Rig::new();
    rig.plug(3, 40);
    let before = rig.handle.plugged();
    rig.device.reset();
    assert_eq!(rig.handle.plugged(), before);
    rig.activate(driver_features());
    assert_eq!(rig.handle.plugged(), before);
    assert_eq!(rig.config().mutable.plugged_size, 40 * BLOCK);
    assert_eq!(rig.state(3, 40), Response::AckState(BlockState::Plugged));
}

#[test]
fn d_14_device_reset_keeps_contents() {
    let mut rig = Rig::new();
    rig.plug(3, 2);
    rig.fill(4, 0x5c);
    rig.device.reset();
    rig.activate(driver_features());
    assert!(rig.holds(4, 0x5c));
}

#[test]
fn d_15_persistent_suspend_is_offered_where_the_vmm_keeps_memory() {
    let plain = builder(REGION, GIB).build().unwrap();
    assert!(
        !plain
            .device_features()
            .contains(Features::PERSISTENT_SUSPEND)
    );
    let keeping = builder(REGION, GIB).persistent_suspend().build().unwrap();
    assert!(
        keeping
            .device_features()
            .contains(Features::PERSISTENT_SUSPEND)
    );
}

// Operation in general

#[test]
fn d_16_plugged_memory_is_ordinary_memory_at_any_width_and_alignment() {
    let mut rig = Rig::new();
    rig.plug(0, 2);
    // Across the border of two blocks, unaligned.
    let across = REGION + BLOCK - 3;
    rig.write(across, b"ordinary");
    let mut back = [0; 8];
    rig.read(across, &mut back);
    assert_eq!(&back, b"ordinary");
    let at = GuestAddress(REGION + 64);
    rig.memory
        .store(0x1122_3344_5566_7788u64, at, Ordering::Release)
        .unwrap();
    assert_eq!(
        rig.memory.load::<u64>(at, Ordering::Acquire).unwrap(),
        0x1122_3344_5566_7788
    );
}

#[test]
fn d_17_contents_of_unplugged_blocks_are_gone() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    rig.fill(0, 0xff);
    rig.unplug(0, 1);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
    rig.plug(0, 1);
    assert!(!rig.holds(0, 0xff));
}

#[test]
fn d_18_plugged_blocks_are_never_modified() {
    let mut rig = Rig::new();
    rig.plug(0, 5);
    for block in 0..5 {
        rig.fill(block, block as u8 + 1);
    }
    rig.plug(5, 3);
    rig.unplug(1, 1);
    rig.unplug(3, 1);
    rig.plug(3, 1);
    rig.handle.resize(2 * GIB).unwrap();
    for block in [0, 2, 4] {
        assert!(rig.holds(block, block as u8 + 1));
    }
}

#[test]
fn d_19_plugged_blocks_can_be_read_and_written() {
    let mut rig = Rig::new();
    rig.plug(9, 1);
    rig.fill(9, 1);
    assert!(rig.holds(9, 1));
    rig.fill(9, 2);
    assert!(rig.holds(9, 2));
}

#[test]
fn d_20_no_driver_that_may_read_unplugged_blocks_is_ever_active() {
    // The rule binds devices without UNPLUGGED_INACCESSIBLE only. This one always has it negotiated.
    let mut rig = Rig::new();
    rig.device.reset();
    let legacy = driver_features() & !Features::UNPLUGGED_INACCESSIBLE.bits();
    assert!(rig.device.acknowledge_features(legacy).is_err());
    let queue = rig::queue_at(rig::DESC_TABLE, rig::AVAIL_RING, rig::USED_RING);
    let notify = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let interrupt = std::sync::Arc::clone(&rig.notifications);
    let memory = std::sync::Arc::clone(&rig.memory);
    assert!(
        rig.device
            .activate(memory, queue, notify, interrupt)
            .is_err()
    );
    rig.activate(driver_features());
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

#[test]
fn d_21_blocks_change_state_on_system_reset_and_not_when_it_is_refused() {
    let mut rig = Rig::new();
    rig.plug(0, 4);
    rig.handle.freeze();
    assert!(rig.device.system_reset().is_err());
    assert_eq!(rig.handle.plugged().count(), 4);
    rig.handle.thaw();
    rig.device.system_reset().unwrap();
    assert_eq!(rig.handle.plugged().count(), 0);
}

#[test]
fn d_22_system_reset_unplugs_all_blocks() {
    let mut rig = Rig::new();
    rig.plug(0, 4);
    rig.plug(100, 4);
    rig.fill(101, 7);
    rig.device.system_reset().unwrap();
    assert_eq!(rig.config().mutable.plugged_size, 0);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
    assert!(rig.faults.mapped_slots().is_empty());
}

#[test]
fn d_22_system_reset_keeps_blocks_where_the_vmm_has_said_so() {
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(GIB).keep_on_system_reset());
    rig.plug(0, 4);
    rig.fill(1, 7);
    rig.device.system_reset().unwrap();
    assert_eq!(rig.handle.plugged().count(), 4);
    rig.activate(driver_features());
    assert!(rig.holds(1, 7));
}

#[test]
fn d_23_suspend_and_wake_keep_blocks_and_contents() {
    // A driver resets the device when it suspends and initialises it again when it wakes.
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(GIB).persistent_suspend());
    let features = driver_features() | Features::PERSISTENT_SUSPEND.bits();
    rig.device.reset();
    rig.activate(features);
    rig.plug(0, 3);
    rig.fill(1, 0x42);
    rig.device.reset();
    rig.activate(features);
    assert_eq!(rig.state(0, 3), Response::AckState(BlockState::Plugged));
    assert!(rig.holds(1, 0x42));
}

// PLUG

#[test]
fn d_24_plug_ignores_what_follows_the_request() {
    let mut rig = Rig::new();
    assert_eq!(rig.junk_request(Request::Plug(blocks(2, 3))), Response::Ack);
    assert_eq!(rig.state(2, 3), Response::AckState(BlockState::Plugged));
    assert_eq!(rig.handle.plugged().count(), 3);
}

#[test]
fn d_25_plug_ignores_padding() {
    let mut rig = Rig::new();
    for padding in [0x00, 0x01, 0xff] {
        let mut bytes = Request::Plug(blocks(2, 3)).emit();
        bytes[2..8].fill(padding);
        bytes[18..24].fill(padding);
        assert_eq!(rig.send(&bytes).1[0..2], [0, 0]);
        rig.unplug_all();
    }
}

#[test]
fn d_26_plug_of_a_misaligned_range_is_an_error() {
    let mut rig = Rig::new();
    for addr in [REGION + 1, REGION + MIB, REGION - 1] {
        let span = Span {
            addr,
            block_count: 1,
        };
        assert_eq!(rig.request(Request::Plug(span)), Response::Error);
    }
}

#[test]
fn d_26_plug_of_no_blocks_is_an_error() {
    let mut rig = Rig::new();
    assert_eq!(rig.plug(0, 0), Response::Error);
}

#[test]
fn d_26_plug_outside_the_usable_region_is_an_error() {
    let mut rig = Rig::new();
    let usable = (GIB + 256 * MIB) / BLOCK;
    for (addr, block_count) in [
        (REGION - BLOCK, 1),
        (REGION - BLOCK, 2),
        (REGION + usable * BLOCK, 1),
        (REGION + (usable - 1) * BLOCK, 2),
        (0, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ] {
        let span = Span { addr, block_count };
        assert_eq!(
            rig.request(Request::Plug(span)),
            Response::Error,
            "{span:x?}"
        );
    }
    assert_eq!(rig.plug(usable - 1, 1), Response::Ack);
}

#[test]
fn d_26_bad_range_is_an_error_even_if_it_is_also_too_large() {
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(BLOCK));
    assert_eq!(rig.plug(0, u16::MAX), Response::Error);
}

#[test]
fn d_27_plug_of_a_plugged_block_is_an_error_and_plugs_nothing() {
    let mut rig = Rig::new();
    rig.plug(5, 1);
    assert_eq!(rig.plug(3, 5), Response::Error);
    assert_eq!(rig.handle.plugged().count(), 1);
    assert_eq!(rig.config().mutable.plugged_size, BLOCK);
    assert_eq!(rig.plug(5, 1), Response::Error);
}

#[test]
fn d_28_plug_is_busy_while_frozen() {
    let mut rig = Rig::new();
    rig.handle.freeze();
    assert_eq!(rig.plug(0, 1), Response::Busy);
    rig.handle.thaw();
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

#[test]
fn d_29_plug_is_acknowledged_when_all_blocks_are_plugged() {
    let mut rig = Rig::new();
    assert_eq!(rig.plug(17, 100), Response::Ack);
    assert_eq!(rig.state(17, 100), Response::AckState(BlockState::Plugged));
}

#[test]
fn d_30_plug_shows_in_plugged_size() {
    let mut rig = Rig::new();
    let generation = rig.device.config_generation();
    rig.plug(17, 100);
    assert_eq!(rig.config().mutable.plugged_size, 100 * BLOCK);
    assert_ne!(rig.device.config_generation(), generation);
}

#[test]
fn n_02_plug_beyond_the_requested_size_is_nacked() {
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(10 * BLOCK));
    assert_eq!(rig.plug(0, 11), Response::Nack);
    assert_eq!(rig.plug(0, 10), Response::Ack);
    assert_eq!(rig.plug(10, 1), Response::Nack);
    assert_eq!(rig.handle.plugged().count(), 10);
}

// UNPLUG

#[test]
fn d_31_unplug_ignores_what_follows_the_request() {
    let mut rig = Rig::new();
    rig.plug(0, 8);
    assert_eq!(
        rig.junk_request(Request::Unplug(blocks(2, 3))),
        Response::Ack
    );
    assert_eq!(rig.handle.plugged().count(), 5);
}

#[test]
fn d_32_unplug_ignores_padding() {
    let mut rig = Rig::new();
    for padding in [0x00, 0x01, 0xff] {
        rig.plug(2, 3);
        let mut bytes = Request::Unplug(blocks(2, 3)).emit();
        bytes[2..8].fill(padding);
        bytes[18..24].fill(padding);
        assert_eq!(rig.send(&bytes).1[0..2], [0, 0]);
    }
}

#[test]
fn d_33_unplug_of_a_bad_range_is_an_error() {
    let mut rig = Rig::new();
    rig.plug(0, 8);
    for (addr, block_count) in [
        (REGION + MIB, 1),
        (REGION, 0),
        (REGION - BLOCK, 2),
        (REGION + 4 * GIB, 1),
        (u64::MAX - BLOCK + 1, 2),
    ] {
        let span = Span { addr, block_count };
        assert_eq!(
            rig.request(Request::Unplug(span)),
            Response::Error,
            "{span:x?}"
        );
    }
    assert_eq!(rig.handle.plugged().count(), 8);
}

#[test]
fn d_34_unplug_of_an_unplugged_block_is_an_error_and_unplugs_nothing() {
    let mut rig = Rig::new();
    rig.plug(0, 4);
    rig.fill(0, 9);
    assert_eq!(rig.unplug(0, 5), Response::Error);
    assert_eq!(rig.unplug(4, 1), Response::Error);
    assert_eq!(rig.handle.plugged().count(), 4);
    assert!(rig.holds(0, 9));
}

#[test]
fn d_35_unplug_is_busy_while_frozen_and_nothing_is_lost() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    rig.fill(0, 0x77);
    rig.handle.freeze();
    assert_eq!(rig.unplug(0, 1), Response::Busy);
    assert!(rig.holds(0, 0x77));
    rig.handle.thaw();
    assert_eq!(rig.unplug(0, 1), Response::Ack);
}

#[test]
fn d_36_unplug_is_acknowledged_when_all_blocks_are_unplugged() {
    let mut rig = Rig::new();
    rig.plug(0, 100);
    // Far below the requested size, which is none of UNPLUG's business.
    assert_eq!(rig.unplug(0, 100), Response::Ack);
    assert_eq!(rig.state(0, 100), Response::AckState(BlockState::Unplugged));
}

#[test]
fn d_37_unplug_shows_in_plugged_size() {
    let mut rig = Rig::new();
    rig.plug(0, 100);
    rig.unplug(50, 7);
    assert_eq!(rig.config().mutable.plugged_size, 93 * BLOCK);
}

// UNPLUG ALL

#[test]
fn d_38_unplug_all_ignores_everything_but_its_type() {
    let mut rig = Rig::new();
    rig.plug(0, 8);
    assert_eq!(rig.junk_request(Request::UnplugAll), Response::Ack);
    assert_eq!(rig.handle.plugged().count(), 0);
}

#[test]
fn d_39_unplug_all_ignores_padding() {
    let mut rig = Rig::new();
    rig.plug(0, 8);
    let mut bytes = [0xff; 24];
    bytes[0..2].copy_from_slice(&[2, 0]);
    assert_eq!(rig.send(&bytes).1[0..2], [0, 0]);
    assert_eq!(rig.handle.plugged().count(), 0);
}

#[test]
fn d_40_unplug_all_is_busy_while_frozen_and_nothing_is_lost() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    rig.fill(0, 0x77);
    rig.handle.freeze();
    assert_eq!(rig.unplug_all(), Response::Busy);
    assert!(rig.holds(0, 0x77));
    rig.handle.thaw();
    assert_eq!(rig.unplug_all(), Response::Ack);
}

#[test]
fn d_41_unplug_all_is_acknowledged_when_all_blocks_are_unplugged() {
    let mut rig = Rig::new();
    for first in (0..500).step_by(7) {
        assert_eq!(rig.plug(first, 3), Response::Ack);
    }
    rig.fill(7, 1);
    assert_eq!(rig.unplug_all(), Response::Ack);
    assert_eq!(rig.handle.plugged().count(), 0);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
    assert!(rig.faults.mapped_slots().is_empty());
}

#[test]
fn d_42_unplug_all_sets_plugged_size_to_zero() {
    let mut rig = Rig::new();
    rig.plug(0, 33);
    rig.unplug_all();
    assert_eq!(rig.config().mutable.plugged_size, 0);
}

#[test]
fn d_43_unplug_all_recomputes_the_usable_region_before_its_answer() {
    let mut rig = Rig::new();
    rig.handle.resize(4 * BLOCK).unwrap();
    assert_eq!(rig.unplug_all(), Response::Ack);
    // Not to zero: what is requested must still be reachable (D-04).
    assert_eq!(
        rig.config().mutable.usable_region_size,
        4 * BLOCK + 256 * MIB
    );
    assert_eq!(rig.plug(0, 4), Response::Ack);
}

// STATE

#[test]
fn d_44_state_ignores_what_follows_the_request() {
    let mut rig = Rig::new();
    rig.plug(0, 8);
    assert_eq!(
        rig.junk_request(Request::State(blocks(0, 8))),
        Response::AckState(BlockState::Plugged)
    );
}

#[test]
fn d_45_state_ignores_padding() {
    let mut rig = Rig::new();
    for padding in [0x00, 0x01, 0xff] {
        let mut bytes = Request::State(blocks(2, 3)).emit();
        bytes[2..8].fill(padding);
        bytes[18..24].fill(padding);
        assert_eq!(rig.send(&bytes).1, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}

#[test]
fn d_46_state_of_a_bad_range_is_an_error() {
    let mut rig = Rig::new();
    for (addr, block_count) in [
        (REGION + MIB, 1),
        (REGION, 0),
        (REGION - BLOCK, 1),
        (0, 1),
        (REGION + GIB + 256 * MIB - BLOCK, 2),
        (u64::MAX - BLOCK + 1, 2),
    ] {
        let span = Span { addr, block_count };
        let response = rig.request(Request::State(span));
        assert_eq!(response, Response::Error, "{span:x?}");
    }
}

#[test]
fn d_47_state_is_answered_even_while_frozen() {
    let mut rig = Rig::new();
    rig.handle.freeze();
    assert_eq!(rig.state(0, 1), Response::AckState(BlockState::Unplugged));
}

#[test]
fn d_48_state_of_plugged_blocks_is_plugged() {
    let mut rig = Rig::new();
    rig.plug(10, 80);
    assert_eq!(rig.state(10, 80), Response::AckState(BlockState::Plugged));
    assert_eq!(rig.state(60, 1), Response::AckState(BlockState::Plugged));
}

#[test]
fn d_49_state_of_unplugged_blocks_is_unplugged() {
    let mut rig = Rig::new();
    rig.plug(10, 80);
    assert_eq!(rig.state(0, 10), Response::AckState(BlockState::Unplugged));
    assert_eq!(
        rig.state(90, 500),
        Response::AckState(BlockState::Unplugged)
    );
}

#[test]
fn d_50_state_of_some_of_each_is_mixed() {
    let mut rig = Rig::new();
    rig.plug(10, 80);
    assert_eq!(rig.state(9, 2), Response::AckState(BlockState::Mixed));
    assert_eq!(rig.state(89, 2), Response::AckState(BlockState::Mixed));
    rig.unplug(50, 1);
    assert_eq!(rig.state(10, 80), Response::AckState(BlockState::Mixed));
}

// Corners

#[test]
fn unknown_request_type_is_an_error() {
    let mut rig = Rig::new();
    let mut bytes = Request::Plug(blocks(0, 1)).emit();
    for unknown in [4u16, 5, 0x0100, u16::MAX] {
        bytes[0..2].copy_from_slice(&unknown.to_le_bytes());
        assert_eq!(rig.send(&bytes), (10, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    }
    assert_eq!(rig.handle.plugged().count(), 0);
    assert_eq!(rig.handle.counters().unknown_requests, 4);
}

#[test]
fn largest_request_plugs_65535_blocks() {
    let mut rig = Rig::with(256 * GIB, |b| b.requested_size(256 * GIB));
    assert_eq!(rig.plug(1, u16::MAX), Response::Ack);
    assert_eq!(rig.config().mutable.plugged_size, 65535 * BLOCK);
    assert_eq!(rig.unplug(1, u16::MAX), Response::Ack);
    assert_eq!(rig.config().mutable.plugged_size, 0);
}

#[test]
fn size_lowered_between_two_plugs_is_a_nack_and_unplug_goes_on() {
    let mut rig = Rig::new();
    rig.plug(0, 64);
    rig.handle.resize(32 * BLOCK).unwrap();
    assert_eq!(rig.plug(64, 1), Response::Nack);
    assert_eq!(rig.unplug(32, 32), Response::Ack);
    assert_eq!(rig.plug(64, 1), Response::Nack);
}

#[test]
fn resize_before_a_driver_is_there_is_found_by_it() {
    let mut rig = Rig::with(4 * GIB, |b| b);
    rig.device.reset();
    rig.handle.resize(GIB).unwrap();
    assert_eq!(rig.notifications.config(), 0);
    rig.activate(driver_features());
    assert_eq!(rig.config().mutable.requested_size, GIB);
    assert_eq!(rig.plug(0, 512), Response::Ack);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let device = builder(REGION, GIB).build().unwrap();
    let acpi = driver_features() | Features::ACPI_PXM.bits();
    assert_eq!(
        device.acknowledge_features(acpi),
        Err(FeatureError::NotOffered(1))
    );
    let legacy = driver_features() & !Features::VERSION_1.bits();
    assert_eq!(
        device.acknowledge_features(legacy),
        Err(FeatureError::NoVersion1)
    );
    assert_eq!(device.acknowledge_features(driver_features()), Ok(()));
}

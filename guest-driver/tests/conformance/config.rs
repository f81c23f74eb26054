//! The layout of the configuration space: G-01 … G-03, and configurations no device may show.

use std::sync::Arc;

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{
    ConfigReadError, Failure, MemDriver, ProbeError, Progress, Stall, Strategy, Suspend,
};
use virtio_mem_driver::hotplug::{Hotplug, Mobility, Profile};
use virtio_mem_wire::{ConfigError, Features, Field, GeometryError};

use crate::setup::{FIELDS, Run, SETUPS, Setup, UNIT, WAITS, run, works};
use crate::support::device::{Device, Event, FakeTransport};
use crate::support::memory::PluggedMemory;
use crate::support::{Driver, GIB, MIB, Rig, probe};

/// A whole life, and the requests it took.
fn life(setup: Setup, prepare: impl FnOnce(&Device)) -> Vec<(String, u64, u64)> {
    let mut rig = setup.prepared(prepare);
    works(&mut rig, &[]);
    rig.driver.suspend(&mut rig.hotplug, Suspend::Ram).unwrap();
    rig.driver.resume().unwrap();
    works(&mut rig, &[]);
    let Rig {
        device,
        driver,
        mut hotplug,
        ..
    } = rig;
    driver.remove(&mut hotplug);
    device.state().take_requests()
}

/// The transport panics at a write.
#[test]
fn g_01_configuration_is_only_read() {
    for setup in SETUPS {
        assert!(!life(setup, |_| {}).is_empty());
        let mut rig = setup.with_plugged(UNIT);
        assert!(rig.device.state().events.contains(&Event::ReadConfig));
        rig.device.state().need_reset();
        let last = run(&mut rig);
        match setup.strategy {
            Strategy::Linux => assert_eq!(last.failure(&mut rig), Failure::NeedsReset),
            Strategy::Direct => last.settled(&rig),
        }
    }
}

#[test]
fn g_02_padding_is_ignored() {
    for setup in SETUPS {
        let clean = life(setup, |device| device.state().junk = 0);
        for junk in [1, 2, 3, 0x80, 0xff] {
            let requests = life(setup, |device| device.state().junk = junk);
            assert_eq!(requests, clean, "{junk:#x}");
        }
    }
}

#[test]
fn g_03_node_means_nothing_as_its_feature_is_not_accepted() {
    for setup in SETUPS {
        let plain = life(setup, |device| device.state().config.node_id = 0);
        for node_id in [1, 0x7fff, 0xffff] {
            let requests = life(setup, |device| {
                let mut state = device.state();
                state.config.node_id = node_id;
                state.offered |= Features::ACPI_PXM.bits();
            });
            assert_eq!(requests, plain);
        }
        // D-02 forbids that it changes; who does not look does not mind.
        let mut rig = setup.prepared(|device| {
            device.state().offered |= Features::ACPI_PXM.bits();
        });
        rig.resize(UNIT);
        assert!(!rig.driver.features().contains(Features::ACPI_PXM));
        rig.device.state().config.node_id = 99;
        rig.device.request(2 * UNIT);
        run(&mut rig).settled(&rig);
    }
}

/// Values that make the configuration of 1 GiB at 4 GiB in blocks of 2 MiB impossible.
fn impossible() -> Vec<(Vec<(Field, u64)>, ConfigError)> {
    use Field::*;
    use GeometryError::*;
    let misaligned = |name, size| ConfigError::Misaligned { name, size };
    let exceeds = |name, size, limit_name| ConfigError::Exceeds {
        name,
        size,
        limit_name,
        limit: GIB,
    };
    let block_size = 2 * MIB;
    let usable = "usable_region_size";
    vec![
        (vec![(BlockSize, 0)], BlockSizeNotPowerOfTwo(0).into()),
        (
            vec![(BlockSize, 3 * MIB)],
            BlockSizeNotPowerOfTwo(3 * MIB).into(),
        ),
        (
            vec![(BlockSize, u64::MAX)],
            BlockSizeNotPowerOfTwo(u64::MAX).into(),
        ),
        (
            vec![(BlockSize, 1 << 63)],
            AddressMisaligned {
                addr: 4 * GIB,
                block_size: 1 << 63,
            }
            .into(),
        ),
        (
            vec![(Addr, 4 * GIB + MIB)],
            AddressMisaligned {
                addr: 4 * GIB + MIB,
                block_size,
            }
            .into(),
        ),
        (
            vec![(RegionSize, GIB + 4096)],
            SizeMisaligned {
                region_size: GIB + 4096,
                block_size,
            }
            .into(),
        ),
        (
            vec![(Addr, block_size.wrapping_neg())],
            Wraps {
                addr: block_size.wrapping_neg(),
                region_size: GIB,
            }
            .into(),
        ),
        (
            vec![(RegionSize, block_size.wrapping_neg())],
            Wraps {
                addr: 4 * GIB,
                region_size: block_size.wrapping_neg(),
            }
            .into(),
        ),
        (
            vec![(UsableRegionSize, GIB + block_size)],
            exceeds(usable, GIB + block_size, "region_size"),
        ),
        (
            vec![(UsableRegionSize, GIB - 1)],
            misaligned(usable, GIB - 1),
        ),
        (
            vec![(PluggedSize, GIB + block_size)],
            exceeds("plugged_size", GIB + block_size, usable),
        ),
        (vec![(PluggedSize, 1)], misaligned("plugged_size", 1)),
        (
            vec![(RequestedSize, 1 << 63)],
            exceeds("requested_size", 1 << 63, usable),
        ),
        (
            vec![(RequestedSize, MIB)],
            misaligned("requested_size", MIB),
        ),
        // A bus from which there is no answer.
        (
            FIELDS.map(|field| (field, u64::MAX)).to_vec(),
            BlockSizeNotPowerOfTwo(u64::MAX).into(),
        ),
    ]
}

fn forge(device: &Device, fields: &[(Field, u64)]) {
    let forged = fields.iter().map(|(field, value)| (field.offset(), *value));
    device.state().forged = forged.collect();
}

#[test]
fn d_04_to_d_07_impossible_configuration_is_refused_by_the_probe() {
    for (fields, error) in impossible() {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        forge(&device, &fields);
        let refused = ProbeError::Config(ConfigReadError::Invalid(error));
        assert_eq!(probe(&device).unwrap_err(), refused);
        let state = device.state();
        let told = |event: &Event| matches!(event, Event::Status(bits) if bits & 128 != 0);
        assert!(state.events.iter().any(told));
        assert_eq!(state.status, DeviceStatus::empty());
        assert_eq!(state.requests, []);
    }
}

#[test]
fn d_04_to_d_07_impossible_configuration_at_run_time_ends_the_driver() {
    for setup in SETUPS {
        for (fields, error) in impossible() {
            let mut rig = setup.with_plugged(UNIT);
            let tags = rig.allocate(100, Mobility::Movable);
            forge(&rig.device, &fields);
            rig.device.state().change_config();
            assert_eq!(
                run(&mut rig).failure(&mut rig),
                Failure::Config(ConfigReadError::Invalid(error))
            );
            rig.verify(&tags);
        }
    }
}

#[test]
fn d_02_fixed_field_that_changes_ends_the_driver() {
    let changes = [
        (Field::BlockSize, 4 * MIB),
        (Field::Addr, 8 * GIB),
        (Field::RegionSize, 2 * GIB),
    ];
    for setup in SETUPS {
        for change in changes {
            let mut rig = setup.with_plugged(UNIT);
            forge(&rig.device, &[change]);
            rig.device.state().change_config();
            assert_eq!(run(&mut rig).failure(&mut rig), Failure::RegionChanged);
        }
    }
}

#[test]
fn d_07_region_without_blocks_or_without_usable_ones_is_legal() {
    for setup in SETUPS {
        for (region_size, usable) in [(0, 0), (GIB, 0), (GIB, UNIT - 2 * MIB), (2 * MIB, 2 * MIB)] {
            let device = Device::new(4 * GIB, region_size, 2 * MIB);
            device.state().config.mutable.usable_region_size = usable;
            device.state().config.mutable.requested_size = usable;
            let mut rig = Rig::on(device, setup.policy());
            let last = run(&mut rig);
            match setup.strategy {
                // Nowhere to plug what is asked for.
                Strategy::Linux if usable >= rig.driver.granule_size() => {
                    assert!(matches!(
                        last.last,
                        Progress::Stalled {
                            reason: Stall::NoSpace,
                            retry_at_ms: None
                        }
                    ));
                }
                _ => last.settled(&rig),
            }
            assert_eq!(rig.device.state().requests, []);
        }
    }
}

/// Only memory of whole pageblocks is plugged, however small the device's blocks are.
#[test]
fn d_05_blocks_smaller_than_a_page_are_legal() {
    for setup in SETUPS {
        for block_size in [1024, 2048] {
            let device = Device::new(4 * GIB, 2 * UNIT, block_size);
            let mut rig = Rig::on(device, setup.policy());
            for size in [2 * UNIT, UNIT, 0] {
                rig.device.request(size);
                run(&mut rig).settled(&rig);
                assert_eq!(rig.driver.plugged_size(), size);
                assert_eq!(rig.hotplug.counts().managed, size / 4096);
            }
        }
    }
}

/// Region sizes and addresses that are legal, and that no machine has.
#[test]
fn region_beyond_all_memory_is_refused_or_left_alone() {
    let everything = [
        (Field::Addr, 0),
        (Field::RegionSize, 1 << 63),
        (Field::UsableRegionSize, 1 << 63),
    ];
    for setup in SETUPS {
        // Maps of more than the address space.
        for block_size in [1, 4096] {
            let device = Device::new(4 * GIB, GIB, 2 * MIB);
            let block_size = [(Field::BlockSize, block_size)];
            forge(&device, &[&everything[..], &block_size].concat());
            let error = try_probe(setup, &device).unwrap_err();
            assert!(matches!(error, ProbeError::NoMemory { .. }), "{error}");
        }
        // Few blocks, but room for very many memory blocks.
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        let block_size = [(Field::BlockSize, 1 << 40)];
        forge(&device, &[&everything[..], &block_size].concat());
        let mut rig = Rig::on(device, setup.policy());
        assert_eq!(run(&mut rig).last, Progress::Settled);

        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        forge(&device, &[(Field::Addr, 1 << 62)]);
        device.state().config.mutable.requested_size = GIB;
        let mut rig = Rig::on(device, setup.policy());
        let last = run(&mut rig).last;
        assert!(matches!(last, Progress::Settled | Progress::Stalled { .. }));
        assert_eq!(rig.device.state().requests, []);
    }
}

fn try_probe(setup: Setup, device: &Arc<Device>) -> Result<Driver, ProbeError> {
    let memory = PluggedMemory(Arc::clone(device));
    let mut hotplug = Hotplug::new(Profile::X86_64, memory).unwrap();
    let transport = FakeTransport(Arc::clone(device));
    MemDriver::probe(transport, &mut hotplug, setup.policy())
}

/// The registers of the 64-bit fields, in the order in which the driver may read them.
const REGISTERS: usize = 12;

/// Changes the sizes before the `index`th register is read; once.
fn tear(device: &Device, index: usize) {
    let mut reads = 0;
    device.state().on_config_read = Some(Box::new(move |state, _| {
        if reads == index {
            // Half of the old and half of the new value are a legal size, too: 8 GiB - 2 MiB.
            state.config.mutable.requested_size = 4 * GIB;
            state.generation += 1;
        }
        reads += 1;
    }));
}

#[test]
fn v_06_v_07_sizes_that_change_between_any_two_registers_are_read_again() {
    for index in 0..REGISTERS {
        let device = Device::new(4 * GIB, 8 * GIB, 2 * MIB);
        device.state().config.mutable.requested_size = 4 * GIB - 2 * MIB;
        tear(&device, index);
        let driver = probe(&device).unwrap();
        assert_eq!(driver.config().mutable.requested_size, 4 * GIB, "{index}");
    }
    for setup in SETUPS {
        for index in 0..REGISTERS {
            let mut rig = Rig::on(Device::new(4 * GIB, 8 * GIB, 2 * MIB), setup.policy());
            rig.run();
            rig.device.state().hold = true;
            rig.device.request(4 * GIB - 2 * MIB);
            tear(&rig.device, index);
            rig.run();
            let requested_size = rig.driver.config().mutable.requested_size;
            assert_eq!(requested_size, 4 * GIB, "{index}");
        }
    }
}

#[test]
fn v_07_configuration_that_never_rests_is_tried_again_later_and_nothing_is_sent() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(UNIT);
        rig.device.state().on_config_read = Some(Box::new(|state, _| state.generation += 1));
        rig.device.request(2 * UNIT);
        let Run { stalls, last } = run(&mut rig);
        assert!(
            stalls.iter().all(|stall| *stall == Stall::ConfigUnstable),
            "{last:?}"
        );
        assert_eq!(stalls.len(), WAITS);
        assert_eq!(rig.device.state().requests, []);
        rig.device.state().on_config_read = None;
        run(&mut rig).settled(&rig);
        assert_eq!(rig.driver.plugged_size(), 2 * UNIT);
    }
}

/// Values that change without a new generation: whatever is read is followed.
#[test]
fn target_that_is_another_at_each_read_is_followed_in_a_bounded_number_of_steps() {
    for setup in SETUPS {
        let mut rig = setup.rig();
        let mut flip = false;
        rig.device.state().on_config_read = Some(Box::new(move |state, offset| {
            if offset == Field::RequestedSize.offset() {
                flip = !flip;
                state.config.mutable.requested_size = if flip { 3 * UNIT } else { UNIT };
            }
        }));
        for _ in 0..4 {
            rig.device.state().change_config();
            let last = run(&mut rig);
            assert!(matches!(
                last.last,
                Progress::Settled | Progress::Stalled { .. }
            ));
            rig.check();
        }
        rig.device.state().on_config_read = None;
        rig.device.request(0);
        run(&mut rig).settled(&rig);
    }
}

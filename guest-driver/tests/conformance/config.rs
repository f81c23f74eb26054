//! The layout of the configuration space: G-01 … G-03, and configurations no device may show.

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{ConfigReadError, Failure, ProbeError, Stall, Strategy, Suspend};
use virtio_mem_wire::{ConfigError, Features, Field, GeometryError};

use crate::setup::{SETUPS, Setup, UNIT, run, works};
use crate::support::device::{Device, Event};
use crate::support::{GIB, MIB, Rig, probe};

/// A whole life, and the requests it took.
fn life(setup: Setup, prepare: impl FnOnce(&Device)) -> Vec<(String, u64, u64)> {
    let mut rig = setup.prepared(prepare);
    works(&mut rig);
    rig.driver.suspend(&mut rig.hotplug, Suspend::Ram).unwrap();
    rig.driver.resume().unwrap();
    works(&mut rig);
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
        let mut rig = setup.with_plugged(UNIT);
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
            [
                BlockSize,
                Addr,
                RegionSize,
                UsableRegionSize,
                PluggedSize,
                RequestedSize,
            ]
            .map(|field| (field, u64::MAX))
            .to_vec(),
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
            let tags = rig.allocate(100, virtio_mem_driver::hotplug::Mobility::Movable);
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

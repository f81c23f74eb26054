//! Initialisation: the order of steps, and everything that ends it.

use std::sync::Arc;

use virtio_drivers::transport::{DeviceStatus, DeviceType};
use virtio_mem_driver::driver::{ConfigReadError, Failure, Policy, ProbeError, Progress};
use virtio_mem_driver::hotplug::{Boot, BootRange, Config, Hotplug, Profile};
use virtio_mem_wire::{BlockRange, Features};

use crate::support::device::{Device, Event};
use crate::support::memory::PluggedMemory;
use crate::support::{GIB, LINUX, MIB, Rig, dma, probe};

const ACCEPTED: u64 = (1 << 32) | (1 << 1);

fn device() -> std::sync::Arc<Device> {
    Device::new(4 * GIB, GIB, 2 * MIB)
}

/// The status bits at the moment the driver gave up.
fn failed_status(device: &Device) -> Option<u32> {
    let state = device.state();
    state.events.iter().rev().find_map(|event| match event {
        Event::Status(bits) if bits & DeviceStatus::FAILED.bits() != 0 => Some(*bits),
        _ => None,
    })
}

#[test]
fn v_01_steps_are_taken_in_order() {
    let device = device();
    let driver = probe(&device).unwrap();
    assert_eq!(
        device.state().events,
        [
            Event::Status(0),
            Event::Status(1),
            Event::Status(3),
            Event::ReadFeatures,
            Event::WriteFeatures(ACCEPTED),
            Event::Status(11),
            Event::QueueSet(16),
            Event::ReadConfig,
            Event::Status(15),
        ]
    );
    assert_eq!(driver.features().bits(), ACCEPTED);
}

#[test]
fn v_04_device_without_version_1_is_refused() {
    let device = device();
    device.state().offered = Features::UNPLUGGED_INACCESSIBLE.bits();
    assert_eq!(probe(&device).unwrap_err(), ProbeError::NoVersion1);
    assert_eq!(failed_status(&device), Some(128 | 3));
}

#[test]
fn v_05_reset_is_waited_for() {
    let device = device();
    device.state().reset_reads = 1000;
    assert!(probe(&device).is_ok());
}

#[test]
fn v_05_reset_that_never_ends_is_given_up() {
    let device = device();
    device.state().reset_reads = u32::MAX;
    assert_eq!(probe(&device).unwrap_err(), ProbeError::ResetTimeout);
    assert_eq!(device.state().events, [Event::Status(0)]);
}

#[test]
fn v_01_features_ok_that_does_not_stay_is_noticed() {
    let device = device();
    device.state().refuse_features = true;
    assert!(matches!(
        probe(&device),
        Err(ProbeError::FeaturesRefused(features)) if features.bits() == ACCEPTED
    ));
    assert_eq!(failed_status(&device), Some(128 | 11));
}

#[test]
fn other_devices_are_not_touched() {
    let device = device();
    device.state().device_type = DeviceType::Block;
    assert_eq!(
        probe(&device).unwrap_err(),
        ProbeError::WrongDevice(DeviceType::Block)
    );
    assert_eq!(device.state().events, []);
}

#[test]
fn v_07_configuration_that_never_rests_is_given_up() {
    let device = device();
    device.state().on_config_read = Some(Box::new(|state, _| state.generation += 1));
    assert_eq!(
        probe(&device).unwrap_err(),
        ProbeError::Config(ConfigReadError::Unstable)
    );
    assert!(failed_status(&device).is_some());
}

#[test]
fn d_43_n_09_usable_region_may_shrink_with_unplug_all_and_is_read_again() {
    let device = device();
    {
        let mut state = device.state();
        state.plugged.insert(BlockRange { first: 0, count: 1 });
        state.config.mutable.plugged_size = 2 * MIB;
        state.hold = true;
    }
    let mut rig = Rig::on(device, LINUX);
    rig.step();
    assert_eq!(rig.step(), Progress::AwaitingDevice);
    rig.device.state().config.mutable.usable_region_size = 256 * MIB;
    rig.device.answer();
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.config().mutable.usable_region_size, 256 * MIB);
}

/// Regression: a target set while the driver initialises, after it has read the configuration and before
/// DRIVER_OK lets the device interrupt, was not noticed until the next change.
#[test]
fn target_set_before_the_device_may_interrupt_is_not_missed() {
    let mut rig = Rig::new(GIB);
    {
        let mut state = rig.device.state();
        state.config.mutable.requested_size = 4 * MIB;
        state.generation += 1;
    }
    assert_eq!(rig.run(), Progress::Settled);
    assert_eq!(rig.driver.plugged_size(), 4 * MIB);
}

#[test]
fn v_11_memory_of_the_queue_is_freed_after_a_reset_and_kept_without_one() {
    for (reset_reads, freed) in [(0, true), (u32::MAX, false)] {
        let device = device();
        let driver = probe(&device).unwrap();
        let queue = device.state().queue_address().unwrap();
        device.state().reset_reads = reset_reads;
        drop(driver);
        assert_eq!(dma::is_allocated(queue), !freed);
    }
}

/// G-03: the node is read only where the device and the machine know what a proximity domain is; else memory goes to
/// the node of its address (Linux: `virtio_mem_translate_node_id`).
#[test]
fn g_03_node_is_the_proximity_domains_or_the_addresses() {
    let boot = |proximity_domains: &[u32]| Boot {
        ram: vec![
            BootRange {
                bytes: 0..GIB,
                nid: 1,
            },
            BootRange {
                bytes: GIB..2 * GIB,
                nid: 0,
            },
        ],
        proximity_domains: proximity_domains.to_vec(),
        ..Boot::default()
    };
    // Offered, what the machine calls its nodes, the device's node, and where the memory goes.
    for (offered, domains, node_id, nid) in [
        (true, &[7, 5, 9][..], 9, 2),
        (true, &[7, 5, 9], 7, 0),
        (true, &[7, 5, 9], 0xabcd, 1),
        (true, &[], 2, 1),
        (false, &[7, 5, 9], 9, 1),
    ] {
        let device = device();
        device.state().offered |= u64::from(offered);
        device.state().config.node_id = node_id;
        let mut config = Config::new(Profile::X86_64);
        config.possible_nodes = 3;
        let memory = PluggedMemory(Arc::clone(&device));
        let hotplug = Hotplug::boot(config, &boot(domains), memory).unwrap();
        let mut rig = Rig::again(device, hotplug, Policy::default(), 0).unwrap();
        rig.device.request(128 * MIB);
        assert_eq!(rig.run(), Progress::Settled);
        let block = rig.hotplug.block(32).unwrap();
        assert_eq!(block.nid, nid, "{offered} {domains:?} {node_id}");
        let accepted = rig.driver.features().contains(Features::ACPI_PXM);
        assert_eq!(accepted, offered && !domains.is_empty());
        // D-02 holds for the node as for the region, where it means something.
        rig.device.state().config.node_id ^= 1;
        rig.device.request(256 * MIB);
        let expected = match accepted {
            true => Progress::Failed(Failure::RegionChanged),
            false => Progress::Settled,
        };
        assert_eq!(rig.run(), expected);
    }
}

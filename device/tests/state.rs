//! A device is saved and built again: the same to its driver, or refused with the field that is wrong.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "fixtures may fail as tests do"
)]

mod rig;

use std::io;
use std::sync::Arc;

use proptest::prelude::*;
use rig::{BLOCK, Faults, FaultyBacking, MIB, REGION, RecordingSlots, Rig, driver_features};
use virtio_mem::wire::{Features, Response};
use virtio_mem::{
    Anonymous, BuildError, Builder, MappingLimits, PlugObserver, RestoreError, Run, SaveError,
    State, VirtioMem,
};
use vm_memory::GuestAddress;

/// What the rig's device is built like.
fn builder(len: u64) -> Builder {
    VirtioMem::builder(
        GuestAddress(REGION),
        Anonymous::base_pages(len).expect("address space for the region"),
    )
}

/// A state with blocks 0..10 and 20 of 65 plugged.
fn saved() -> State {
    let mut rig = Rig::with(65 * BLOCK, |b| b.requested_size(30 * BLOCK));
    rig.plug(0, 10);
    rig.plug(20, 1);
    rig.handle.freeze();
    rig.handle.save().unwrap()
}

fn restore(state: State) -> Result<VirtioMem, RestoreError> {
    match builder(65 * BLOCK).block_size(BLOCK).restore(state).build() {
        Ok(device) => Ok(device),
        Err(BuildError::Restore(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

/// The error of a state after `spoil` has been at it.
fn spoilt(spoil: impl FnOnce(&mut State)) -> RestoreError {
    let mut state = saved();
    restore(state.clone()).unwrap();
    spoil(&mut state);
    restore(state).unwrap_err()
}

#[test]
fn device_is_saved_only_while_nothing_can_change() {
    let mut rig = Rig::new();
    assert!(matches!(rig.handle.save(), Err(SaveError::Running)));
    rig.handle.freeze();
    rig.handle.save().unwrap();
    rig.handle.thaw();
    assert!(matches!(rig.handle.save(), Err(SaveError::Running)));
    rig.device.reset();
    rig.handle.save().unwrap();

    rig.activate(driver_features());
    rig.plug(0, 1);
    rig.faults.discard.script(&[false]);
    rig.faults.open.script(&[false]);
    rig.unplug(0, 1);
    rig.handle.freeze();
    assert!(matches!(rig.handle.save(), Err(SaveError::Failed(_))));
}

#[test]
fn restored_device_opens_blocks_maps_slots_and_tells_observers() {
    #[derive(Debug, Default)]
    struct Told(std::sync::Mutex<Vec<Run>>);

    impl PlugObserver for Told {
        fn limits(&self) -> MappingLimits {
            MappingLimits::NONE
        }

        fn plugged(&self, run: &Run) -> io::Result<()> {
            self.0.lock().unwrap().push(*run);
            Ok(())
        }

        fn unplugging(&self, _: &Run) -> io::Result<()> {
            Ok(())
        }
    }

    let told = Arc::new(Told::default());
    let mut rig = Rig::with(65 * BLOCK, |b| {
        b.observer(Arc::clone(&told)).restore(saved())
    });
    assert_eq!(rig.faults.mapped_slots(), [0]);
    assert_eq!(*told.0.lock().unwrap(), rig.handle.plugged_runs());
    let runs: Vec<_> = rig
        .handle
        .plugged_runs()
        .iter()
        .map(Run::guest_range)
        .collect();
    assert_eq!(
        runs,
        [
            REGION..REGION + 10 * BLOCK,
            REGION + 20 * BLOCK..REGION + 21 * BLOCK
        ]
    );
    // The RAM stream fills it, the driver goes on where it was.
    rig.fill(20, 0x5a);
    assert!(rig.holds(20, 0x5a));
    assert_eq!(rig.plug(20, 1), Response::Error, "it is plugged");
    assert_eq!(rig.plug(21, 19), Response::Ack);
    assert_eq!(rig.plug(50, 1), Response::Nack);
    assert_eq!(
        rig.handle.resize(0).unwrap().progress().plugged_size,
        30 * BLOCK
    );
}

#[test]
fn features_are_those_the_driver_accepted() {
    let device = restore(saved()).unwrap();
    let rig = Rig::new();
    let queue = rig::queue_at(rig::DESC_TABLE, rig::AVAIL_RING, rig::USED_RING);
    let notify = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let interrupt = Arc::clone(&rig.notifications) as Arc<dyn virtio_mem::Interrupt>;
    // Without another FEATURES_OK: the driver does not know that anything happened.
    device
        .activate(Arc::clone(&rig.memory), queue, notify, interrupt)
        .unwrap();
}

#[test]
fn driver_that_was_busy_where_it_was_saved_is_told_where_it_is_restored() {
    let mut rig = Rig::with(65 * BLOCK, |b| b.requested_size(BLOCK));
    rig.handle.freeze();
    assert_eq!(rig.plug(0, 1), Response::Busy);
    let state = rig.handle.save().unwrap();
    assert!(state.busy);
    let rig = Rig::with(65 * BLOCK, |b| b.restore(state));
    assert_eq!(rig.notifications.config(), 1);
}

/// The guest's driver runs already and does not probe again: it must hear of what was set meanwhile.
#[test]
fn driver_of_a_restored_device_is_told_of_what_was_set_before_it_is_served() {
    let device = builder(65 * BLOCK).restore(saved()).build().unwrap();
    device.handle().resize(0).unwrap();
    device.handle().freeze();
    device.handle().thaw();
    let state = saved();
    let rig = Rig::with(65 * BLOCK, |b| b.restore(state));
    assert_eq!(rig.notifications.config(), 1, "once, whatever it was");
}

#[test]
fn block_size_of_the_state_is_the_default() {
    let mut state = saved();
    let device = builder(65 * BLOCK).restore(state.clone()).build().unwrap();
    assert_eq!(device.geometry().block_size(), BLOCK);
    state.block_size = 3 * MIB;
    let error = builder(65 * BLOCK).restore(state).build().unwrap_err();
    assert!(matches!(error, BuildError::Geometry(_)));
}

#[test]
fn state_of_another_version_is_refused() {
    let error = spoilt(|state| state.version += 1);
    assert!(matches!(error, RestoreError::Version(2)));
}

#[test]
fn state_of_another_address_is_refused() {
    let error = spoilt(|state| state.addr += BLOCK);
    assert!(matches!(error, RestoreError::Address { .. }));
}

#[test]
fn state_of_another_region_size_is_refused() {
    let error = spoilt(|state| state.region_size += BLOCK);
    assert!(matches!(error, RestoreError::RegionSize { .. }));
}

#[test]
fn state_of_another_block_size_is_refused() {
    let error = spoilt(|state| state.block_size *= 2);
    assert!(matches!(error, RestoreError::BlockSize { .. }));
}

#[test]
fn state_of_another_node_is_refused() {
    let error = spoilt(|state| state.node_id = 3);
    assert!(matches!(error, RestoreError::NodeId { saved: 3, built: 0 }));
}

#[test]
fn state_of_a_device_with_other_features_is_refused() {
    let error = spoilt(|state| state.offered_features |= Features::PERSISTENT_SUSPEND.bits());
    assert!(matches!(error, RestoreError::OfferedFeatures { .. }));
}

#[test]
fn features_nobody_can_have_accepted_are_refused() {
    for features in [1 << 63, Features::VERSION_1.bits()] {
        let error = spoilt(|state| state.acknowledged_features = features);
        assert!(matches!(error, RestoreError::AcknowledgedFeatures(f) if f == features));
    }
}

#[test]
fn misaligned_requested_size_is_refused() {
    let error = spoilt(|state| state.requested_size += MIB);
    assert!(matches!(error, RestoreError::RequestedMisaligned(_)));
}

#[test]
fn misaligned_usable_region_is_refused() {
    let error = spoilt(|state| state.usable_region_size -= MIB);
    assert!(matches!(error, RestoreError::UsableMisaligned(_)));
}

#[test]
fn usable_region_larger_than_the_region_is_refused() {
    let error = spoilt(|state| state.usable_region_size = 66 * BLOCK);
    assert!(matches!(error, RestoreError::UsableExceedsRegion(_)));
}

#[test]
fn requested_size_beyond_the_usable_region_is_refused() {
    let error = spoilt(|state| state.usable_region_size = 29 * BLOCK);
    assert!(matches!(error, RestoreError::RequestedExceedsUsable { .. }));
}

#[test]
fn bitmap_of_another_length_is_refused() {
    let error = spoilt(|state| state.plugged.truncate(1));
    assert!(matches!(
        error,
        RestoreError::BitmapLength {
            words: 1,
            expected: 2
        }
    ));
}

#[test]
fn bits_behind_the_last_block_are_refused() {
    let error = spoilt(|state| state.plugged[1] |= 0b10);
    assert!(matches!(error, RestoreError::TrailingBits(0b10)));
}

#[test]
fn plugged_size_that_is_not_that_of_the_bitmap_is_refused() {
    let error = spoilt(|state| state.plugged_size += BLOCK);
    assert!(matches!(error, RestoreError::PluggedSize { .. }));
}

#[test]
fn plugged_block_outside_the_usable_region_is_refused() {
    let error = spoilt(|state| {
        state.requested_size = 0;
        state.usable_region_size = 20 * BLOCK;
    });
    assert!(matches!(error, RestoreError::PluggedOutsideUsable(20)));
}

/// Builds from the saved state on a host that refuses.
fn refused_by(prepare: impl FnOnce(&Faults)) -> RestoreError {
    let faults = Faults::new();
    prepare(&faults);
    let inner = Anonymous::base_pages(65 * BLOCK).unwrap();
    let backing = FaultyBacking(inner, Arc::clone(&faults));
    let built = VirtioMem::builder(GuestAddress(REGION), backing)
        .slot_size(10 * BLOCK)
        .slots(RecordingSlots(Arc::clone(&faults)))
        .restore(saved())
        .build();
    let Err(BuildError::Restore(error)) = built else {
        panic!("it was restored");
    };
    assert!(faults.mapped_slots().is_empty(), "nothing stays");
    error
}

#[test]
fn more_runs_than_the_backing_can_hold_are_refused() {
    let error = refused_by(|faults| {
        let limit = &faults.max_open_runs;
        limit.store(1, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(matches!(
        error,
        RestoreError::TooManyRuns { runs: 2, limit: 1 }
    ));
}

#[test]
fn host_that_refuses_a_run_ends_the_restore_and_leaves_nothing() {
    let error = refused_by(|faults| faults.open.script(&[true, false]));
    assert!(matches!(error, RestoreError::Host { .. }));
    let error = refused_by(|faults| faults.map.script(&[true, false]));
    assert!(matches!(error, RestoreError::Host { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// At every point of random traffic the device can be saved and restored, and is the same.
    #[test]
    fn state_makes_the_round_trip_at_every_point(
        ops in proptest::collection::vec((0u8..10, 0u64..300, 1u16..80), 1..15),
    ) {
        let mut rig = Rig::with(300 * BLOCK, |b| b.requested_size(200 * BLOCK).node_id(2));
        for (op, block, count) in ops {
            match op {
                0..5 => drop(rig.plug(block, count)),
                5..7 => drop(rig.unplug(block, count)),
                7 => drop(rig.unplug_all()),
                _ => drop(rig.handle.resize(block * BLOCK)),
            }
            rig.handle.freeze();
            let state = rig.handle.save().unwrap();
            rig.handle.thaw();
            let state = through_json(state);
            let mut again = Rig::with(300 * BLOCK, |b| b.node_id(2).restore(state.clone()));
            prop_assert_eq!(again.config(), rig.config());
            prop_assert_eq!(again.handle.plugged(), rig.handle.plugged());
            prop_assert_eq!(again.faults.mapped_slots(), rig.faults.mapped_slots());
            prop_assert_eq!(again.state(block, 1), rig.state(block, 1));
            again.handle.freeze();
            prop_assert_eq!(again.handle.save().unwrap(), state);
        }
    }
}

#[cfg(feature = "serde")]
fn through_json(state: State) -> State {
    let json = serde_json::to_string(&state).unwrap();
    serde_json::from_str(&json).unwrap()
}

#[cfg(not(feature = "serde"))]
fn through_json(state: State) -> State {
    state
}

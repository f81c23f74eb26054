//! The host refuses in the middle of a request: everything is undone, the guest hears BUSY, nothing is lost.

mod rig;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rig::{BLOCK, Faults, FaultyBacking, GIB, MIB, Rig};
use virtio_mem::wire::Response;
use virtio_mem::{Anonymous, ResetError, VirtioMem};
use vm_memory::GuestAddress;

/// Blocks per slot of the rig.
const SLOT: u64 = 64;

/// Everything a guest or an operator can see of the blocks.
fn picture(rig: &Rig) -> (u64, Vec<u32>, Vec<(u64, u64)>) {
    let runs = rig
        .handle
        .plugged()
        .runs()
        .map(|run| (run.first, run.count))
        .collect();
    (
        rig.config().mutable.plugged_size,
        rig.faults.mapped_slots(),
        runs,
    )
}

#[test]
fn plug_is_busy_and_undone_when_memory_cannot_be_opened() {
    let mut rig = Rig::new();
    let before = picture(&rig);
    rig.faults.open.script(&[false]);
    assert_eq!(rig.plug(0, 10), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert_eq!(rig.handle.counters().host_failures, 1);
    assert_eq!(rig.plug(0, 10), Response::Ack);
}

#[test]
fn plug_over_three_slots_is_undone_when_the_last_cannot_be_mapped() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    let before = picture(&rig);
    rig.faults.map.script(&[true, false]);
    // Slot 0 is there, slot 1 is mapped, slot 2 is refused.
    assert_eq!(rig.plug(1, 150), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert_eq!(rig.plug(1, 150), Response::Ack);
    assert_eq!(rig.faults.mapped_slots(), [0, 1, 2]);
}

#[test]
fn unplug_is_busy_and_loses_nothing_when_memory_cannot_be_closed() {
    let mut rig = Rig::new();
    rig.plug(0, 10);
    rig.fill(5, 0xab);
    let before = picture(&rig);
    rig.faults.close.script(&[false]);
    assert_eq!(rig.unplug(5, 1), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert!(rig.holds(5, 0xab));
}

/// The kernel closes one mapping after the other, and may stop in between.
#[test]
fn memory_that_could_be_closed_in_part_only_is_opened_again() {
    let mut rig = Rig::new();
    rig.plug(0, 10);
    for block in 0..10 {
        rig.fill(block, block as u8 + 1);
    }
    rig.faults.close_half.store(true, Ordering::Relaxed);
    assert_eq!(rig.unplug(0, 10), Response::Busy);
    for block in 0..10 {
        assert!(
            rig.holds(block, block as u8 + 1),
            "reading it would have been a fault"
        );
    }
    assert_eq!(rig.unplug(0, 10), Response::Ack);
}

#[test]
fn part_of_the_vmm_that_panics_stops_the_device() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    rig.faults.panic_in_unmap.store(true, Ordering::Relaxed);
    let handle = rig.handle.clone();
    let waits = std::thread::spawn(move || {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        handle.wait_until(deadline, |status| status.failure.is_some())
    });
    let unplug = std::panic::AssertUnwindSafe(|| rig.unplug(0, 1));
    assert!(std::panic::catch_unwind(unplug).is_err());
    assert!(waits.join().unwrap().is_ok());
    let failure = rig.handle.status().failure.expect("the device has failed");
    assert_eq!(failure.to_string(), "a part of the VMM panicked");
    assert_eq!(rig.handle.status().serving, None);
    // For good.
    assert_eq!(rig.plug(1, 1), Response::Busy);
    assert!(rig.handle.status().failure.is_some());
}

#[test]
fn unplug_is_busy_and_loses_nothing_when_memory_cannot_be_given_back() {
    let mut rig = Rig::new();
    rig.plug(0, SLOT as u16);
    rig.fill(5, 0xab);
    let before = picture(&rig);
    rig.faults.discard.script(&[false]);
    // The whole slot: it was removed before the discard and has to come back.
    assert_eq!(rig.unplug(0, SLOT as u16), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert!(rig.holds(5, 0xab));
    assert_eq!(rig.unplug(0, SLOT as u16), Response::Ack);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
}

#[test]
fn unplug_over_three_slots_is_undone_when_the_last_cannot_be_removed() {
    let mut rig = Rig::new();
    rig.plug(0, 3 * SLOT as u16);
    rig.fill(SLOT, 0xcd);
    let before = picture(&rig);
    rig.faults.unmap.script(&[true, true, false]);
    assert_eq!(rig.unplug(0, 3 * SLOT as u16), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert!(rig.holds(SLOT, 0xcd));
}

#[test]
fn unplug_all_is_all_or_nothing() {
    let mut rig = Rig::new();
    for (first, count) in [(0, 4), (100, 4), (200, 4)] {
        rig.plug(first, count);
        rig.fill(first, first as u8 + 1);
    }
    let before = picture(&rig);
    for fault in [&rig.faults.close, &rig.faults.discard] {
        fault.script(&[false]);
    }
    assert_eq!(rig.unplug_all(), Response::Busy);
    assert_eq!(rig.unplug_all(), Response::Busy);
    rig.faults.unmap.script(&[true, true, false]);
    assert_eq!(rig.unplug_all(), Response::Busy);
    assert_eq!(picture(&rig), before);
    for first in [0, 100, 200] {
        assert!(rig.holds(first, first as u8 + 1));
    }
    assert_eq!(rig.unplug_all(), Response::Ack);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
}

#[test]
fn memory_is_given_back_on_several_threads_all_or_nothing() {
    let threads = std::num::NonZero::new(3).unwrap();
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(GIB).discard_threads(threads));
    rig.plug(0, 128);
    for block in 0..128 {
        rig.fill(block, block as u8 + 1);
    }
    let before = picture(&rig);
    // Refused at once: everything is still there.
    rig.faults.discard.script(&[false]);
    assert_eq!(rig.unplug(0, 128), Response::Busy);
    assert_eq!(picture(&rig), before);
    assert!((0..128).all(|block| rig.holds(block, block as u8 + 1)));
    // Refused in the middle: the guest's blocks are gone, and the second try gives all of it back.
    rig.faults.discard.script(&[true, true, false]);
    assert_eq!(rig.unplug(0, 128), Response::Ack);
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
    rig.plug(0, 1);
    rig.fill(0, 1);
    assert_eq!(rig.unplug(0, 1), Response::Ack, "small ranges, too");
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
}

#[test]
fn failure_that_cannot_be_undone_stops_the_device_and_tells_the_operator() {
    let mut rig = Rig::new();
    rig.plug(0, 2);
    rig.faults.discard.script(&[false]);
    rig.faults.open.script(&[false]);
    assert_eq!(rig.unplug(0, 1), Response::Busy);
    assert!(rig.handle.status().failure.is_some());
    assert_eq!(rig.plug(10, 1), Response::Busy);
    assert_eq!(rig.unplug_all(), Response::Busy);
    assert!(matches!(rig.device.system_reset(), Err(ResetError::InUse)));
    let faults = std::sync::Arc::clone(&rig.faults);
    assert_eq!(faults.mapped_slots(), [0]);
    drop(rig);
    assert!(
        faults.mapped_slots().is_empty(),
        "no slot outlives its memory"
    );
}

#[test]
fn busy_is_followed_by_one_config_notification_when_its_cause_is_gone() {
    let mut rig = Rig::new();
    rig.handle.freeze();
    rig.handle.thaw();
    assert_eq!(rig.notifications.config(), 0, "nobody was told BUSY");
    rig.handle.freeze();
    assert_eq!(rig.plug(0, 1), Response::Busy);
    assert_eq!(rig.plug(1, 1), Response::Busy);
    assert_eq!(rig.notifications.config(), 0);
    rig.handle.thaw();
    assert_eq!(rig.notifications.config(), 1);
    rig.handle.thaw();
    assert_eq!(rig.notifications.config(), 1);
}

#[test]
fn slots_live_from_their_first_block_to_their_last() {
    let mut rig = Rig::new();
    assert!(rig.faults.mapped_slots().is_empty());
    rig.plug(SLOT - 1, 2);
    assert_eq!(rig.faults.mapped_slots(), [0, 1]);
    let calls = || rig.faults.slot_calls.load(Ordering::Relaxed);
    assert_eq!(calls(), 2);
    let mut rig = rig;
    rig.plug(0, 60);
    rig.unplug(10, 40);
    assert_eq!(
        rig.faults.slot_calls.load(Ordering::Relaxed),
        2,
        "none in a live slot"
    );
    rig.unplug(SLOT, 1);
    assert_eq!(rig.faults.mapped_slots(), [0]);
    assert_eq!(rig.handle.status().slot_count, 1);
    rig.unplug_all();
    assert!(rig.faults.mapped_slots().is_empty());
}

#[test]
fn last_slot_of_a_region_may_be_short() {
    let mut rig = Rig::with(130 * MIB, |b| b.requested_size(130 * MIB));
    assert_eq!(rig.plug(0, 65), Response::Ack);
    assert_eq!(rig.faults.mapped_slots(), [0, 1]);
}

#[test]
fn dropped_device_leaves_no_slot_behind() {
    let mut rig = Rig::new();
    rig.plug(0, 200);
    let faults = std::sync::Arc::clone(&rig.faults);
    drop(rig);
    assert!(faults.mapped_slots().is_empty());
}

/// A checkerboard needs a mapping for each block. The device refuses in time, and what joins runs still works.
#[test]
fn too_many_separate_runs_are_busy_before_the_host_runs_out_of_mappings() {
    let mut rig = Rig::new();
    rig.faults.max_open_runs.store(2, Ordering::Relaxed);
    rig.plug(0, 1);
    rig.plug(2, 3);
    assert_eq!(rig.plug(6, 1), Response::Busy);
    assert_eq!(
        rig.unplug(3, 1),
        Response::Busy,
        "it would cut a run in two"
    );
    assert_eq!(rig.plug(1, 1), Response::Ack, "it joins two runs");
    assert_eq!(rig.plug(6, 1), Response::Ack);
    assert_eq!(rig.unplug_all(), Response::Ack);
}

#[test]
fn default_block_size_grows_until_a_checkerboard_fits() {
    let faults = Faults::new();
    faults.max_open_runs.store(2, Ordering::Relaxed);
    let backing = FaultyBacking(Anonymous::base_pages(GIB).unwrap(), faults);
    let device = VirtioMem::builder(GuestAddress(0), backing)
        .build()
        .unwrap();
    assert_eq!(device.geometry().block_size(), 256 * MIB);
}

#[test]
fn waiting_for_a_size_ends_at_the_deadline_or_when_it_is_there() {
    let mut rig = Rig::new();
    let handle = rig.handle.clone();
    let past = Instant::now();
    let late = handle.wait_until(past, |status| status.plugged_size == BLOCK);
    assert_eq!(late.unwrap_err().plugged_size, 0);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_secs(60);
            handle.wait_until(deadline, |status| status.plugged_size == BLOCK)
        });
        rig.plug(0, 1);
        assert!(waiter.join().unwrap().is_ok());
    });
}

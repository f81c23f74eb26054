//! A thread of its own: served, stopped in the middle of a request, and never in the way of a vCPU.
#![expect(clippy::unwrap_used, reason = "fixtures may fail as tests do")]

mod rig;

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rig::{
    AVAIL_RING, BUFFERS, DESC_TABLE, GIB, Memory, REGION, Rig, USED_RING, blocks, driver_features,
    queue_at, readable, writable,
};
use virtio_mem::wire::{Answer, Request, RequestKind};
use virtio_mem::{Interrupt, QueueHandler, ResizeState, Served, Slot, SlotMapper, WorkerDied};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a test that fails takes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A hypervisor that makes no slot until it is let, and says when it is asked.
#[derive(Debug)]
struct StuckSlots {
    entered: Sender<()>,
    leave: Mutex<Receiver<()>>,
}

impl SlotMapper for StuckSlots {
    fn map(&self, _: &Slot) -> io::Result<()> {
        self.entered.send(()).unwrap();
        self.leave.lock().unwrap().recv().unwrap();
        Ok(())
    }

    fn unmap(&self, _: &Slot) -> io::Result<()> {
        Ok(())
    }
}

/// Says when an answer is there.
struct Answers(Mutex<Sender<()>>);

impl Interrupt for Answers {
    fn used_buffer(&self) {
        // Nobody may be listening any more.
        let _ = self.0.lock().unwrap().send(());
    }

    fn config_change(&self) {}
}

/// A rig whose requests get stuck, with the two ends of its lock.
fn stuck_rig() -> (Rig, Receiver<()>, Sender<()>) {
    let (entered, is_stuck) = channel();
    let (release, leave) = channel();
    let slots = StuckSlots {
        entered,
        leave: Mutex::new(leave),
    };
    let rig = Rig::with(4 * GIB, |b| b.requested_size(GIB).slots(slots));
    (rig, is_stuck, release)
}

/// Activates the rig's device anew; its handler, its notification, and where its answers are announced.
fn activate(rig: &Rig) -> (QueueHandler<Memory>, EventFd, Receiver<()>) {
    rig.device.reset();
    rig.device.acknowledge_features(driver_features()).unwrap();
    let notify = EventFd::new(EFD_NONBLOCK).unwrap();
    let (sender, answers) = channel();
    let handler = rig.device.activate(
        Arc::clone(&rig.memory),
        queue_at(DESC_TABLE, AVAIL_RING, USED_RING),
        notify.try_clone().unwrap(),
        Arc::new(Answers(Mutex::new(sender))),
    );
    (handler.unwrap(), notify, answers)
}

/// Makes PLUG of one block available; two blocks of different slots get stuck twice.
fn submit_plug(rig: &mut Rig, block: u64) {
    let at = BUFFERS + block * 64;
    rig.write(at, &Request::Plug(blocks(block, 1)).emit());
    rig.submit(&[readable(at, 24), writable(at + 32, 10)]);
}

#[test]
fn thread_serves_notifications_until_it_is_stopped_and_can_be_started_again() {
    let mut rig = Rig::new();
    let (mut handler, notify, answers) = activate(&rig);
    for block in 0..3 {
        let worker = handler.spawn("memory").unwrap();
        submit_plug(&mut rig, block);
        notify.write(1).unwrap();
        answers.recv().unwrap();
        assert_eq!(rig.used().len(), 1);
        handler = worker.stop().unwrap();
    }
    assert_eq!(rig.handle.plugged().count(), 3);
    assert_eq!(handler.queue().next_avail(), 3);
}

#[test]
fn stop_in_the_middle_of_a_request_finishes_that_request_and_leaves_the_rest() {
    let (mut rig, is_stuck, release) = stuck_rig();
    let (handler, notify, answers) = activate(&rig);
    submit_plug(&mut rig, 0);
    submit_plug(&mut rig, 64);
    let worker = handler.spawn("memory").unwrap();
    notify.write(1).unwrap();
    is_stuck.recv().unwrap();
    worker.ask_to_stop();
    release.send(()).unwrap();
    let handler = worker.stop().unwrap();
    answers.recv().unwrap();
    assert_eq!(rig.used().len(), 1);
    assert_eq!(rig.handle.plugged().count(), 1);
    // The second is still in the queue, and its notification is not lost.
    release.send(()).unwrap();
    let worker = handler.spawn("memory").unwrap();
    answers.recv().unwrap();
    assert_eq!(rig.used().len(), 1);
    assert_eq!(rig.handle.plugged().count(), 2);
    drop(worker);
}

#[test]
fn thread_of_a_reset_device_only_waits_to_be_stopped() {
    let mut rig = Rig::new();
    let (handler, notify, _answers) = activate(&rig);
    let worker = handler.spawn("memory").unwrap();
    rig.device.reset();
    submit_plug(&mut rig, 0);
    notify.write(1).unwrap();
    let mut handler = worker.stop().unwrap();
    assert_eq!(handler.serve(), Served::Stopped);
    assert_eq!(rig.handle.plugged().count(), 0);
}

#[test]
fn panic_of_a_trait_of_the_vmm_is_an_error_of_stop() {
    let (mut rig, is_stuck, release) = stuck_rig();
    let (handler, notify, _answers) = activate(&rig);
    submit_plug(&mut rig, 0);
    let worker = handler.spawn("memory").unwrap();
    notify.write(1).unwrap();
    is_stuck.recv().unwrap();
    drop(release);
    assert_eq!(worker.stop().unwrap_err(), WorkerDied);
    assert_eq!(rig.config().mutable.plugged_size, 0, "still answered");
}

#[test]
fn looking_at_the_device_does_not_wait_for_a_request_that_is_stuck() {
    let (mut rig, is_stuck, release) = stuck_rig();
    let (handler, notify, answers) = activate(&rig);
    let mut events = rig.handle.size_events().unwrap();
    let resize = rig.handle.resize(GIB).unwrap();
    let before = rig.handle.status();
    assert_eq!(before.serving, None);
    let handle = rig.handle.clone();
    let begins = thread::spawn(move || {
        handle.wait_until(Instant::now() + TIMEOUT, |status| status.serving.is_some())
    });
    submit_plug(&mut rig, 0);
    let worker = handler.spawn("memory").unwrap();
    notify.write(1).unwrap();
    is_stuck.recv().unwrap();
    // None of these would return: the request ends only after them.
    let generation = rig.device.config_generation();
    assert_eq!(rig.config().mutable.requested_size, GIB);
    assert_eq!(rig.handle.plugged().count(), 0);
    assert_eq!(rig.handle.counters().host_failures, 0);
    assert_eq!(rig.handle.latencies(), virtio_mem::Latencies::default());
    assert_eq!(events.take(), None);
    assert!(begins.join().unwrap().is_ok());
    let during = rig.handle.status();
    let (request, since) = during.serving.unwrap();
    assert_eq!(request, RequestKind::Plug);
    assert_eq!(
        (during.plugged_size, during.slot_count, during.last_answer),
        (0, before.slot_count, None)
    );
    assert_eq!(resize.progress().state, ResizeState::Converging);
    let now = Instant::now();
    assert!(since <= now);
    assert!(resize.wait(now).is_err() && rig.handle.wait_until(now, |_| false).is_err());
    let served = rig.handle.clone();
    let waits = thread::spawn(move || {
        served.wait_until(Instant::now() + TIMEOUT, |status| status.serving.is_none())
    });
    release.send(()).unwrap();
    answers.recv().unwrap();
    assert_ne!(rig.device.config_generation(), generation);
    assert_eq!(events.take(), Some(rig.config().mutable));
    let after = waits.join().unwrap().unwrap();
    assert_eq!(after.plugged_size, rig.handle.status().plugged_size);
    assert!(after.plugged_size > 0 && after.last_answer.is_some_and(|(_, when)| when >= since));
    drop(worker);
}

/// A device of the VMM that lets go of guest memory neither waits for a running request nor is forgotten.
#[test]
fn pin_that_ends_does_not_wait_for_a_request_that_is_stuck() {
    let (mut rig, is_stuck, release) = stuck_rig();
    let (handler, notify, answers) = activate(&rig);
    let worker = handler.spawn("memory").unwrap();
    submit_plug(&mut rig, 0);
    release.send(()).unwrap();
    notify.write(1).unwrap();
    answers.recv().unwrap();
    is_stuck.recv().unwrap();

    let memory = Arc::clone(&rig.memory);
    let slice = memory.get_slice(GuestAddress(REGION), 64).unwrap();
    rig.write(BUFFERS, &Request::Unplug(blocks(0, 1)).emit());
    rig.submit(&[readable(BUFFERS, 24), writable(BUFFERS + 32, 10)]);
    notify.write(1).unwrap();
    answers.recv().unwrap();
    let counters = rig.handle.counters();
    assert_eq!(counters.requests(RequestKind::Unplug, Answer::Busy), 1);

    submit_plug(&mut rig, 64);
    notify.write(1).unwrap();
    is_stuck.recv().unwrap();
    drop(slice);
    assert_eq!(rig.handle.counters().config_notifications, 1);
    release.send(()).unwrap();
    answers.recv().unwrap();
    drop(worker);
}

//! Chains and rings as hostile input: a defined answer, a counter, and the device lives on.

mod rig;

use std::sync::Arc;

use rig::{
    AVAIL_RING, BLOCK, BUFFERS, Buffer, DESC_F_INDIRECT, DESC_TABLE, GIB, QUEUE_SIZE, REGION, Rig,
    USED_RING, blocks, driver_features, queue_at, readable, writable,
};
use virtio_mem::wire::{Answer, BlockState, Features, Request, RequestKind, Response};
use virtio_mem::{ActivateError, Interrupt, Served};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ANSWER: u64 = BUFFERS + 0x8000;

/// Sends PLUG of block 0 framed as `buffers`, the request bytes lying at `BUFFERS`; used length and answer.
fn plug_framed(rig: &mut Rig, buffers: &[Buffer]) -> (u32, [u8; 10]) {
    rig.write(BUFFERS, &Request::Plug(blocks(0, 1)).emit());
    rig.write(ANSWER, &[0xee; 16]);
    rig.submit(buffers);
    rig.serve();
    let used = rig.used();
    assert_eq!(used.len(), 1);
    let mut answer = [0; 10];
    rig.read(ANSWER, &mut answer);
    (used[0].1, answer)
}

#[test]
fn s_03_request_and_answer_may_be_cut_into_any_pieces() {
    let framings: [&[Buffer]; 5] = [
        &[readable(BUFFERS, 24), writable(ANSWER, 10)],
        &[
            readable(BUFFERS, 1),
            readable(BUFFERS + 1, 23),
            writable(ANSWER, 10),
        ],
        &[
            readable(BUFFERS, 24),
            writable(ANSWER, 3),
            writable(ANSWER + 3, 7),
        ],
        &[
            readable(BUFFERS, 8),
            readable(BUFFERS + 8, 8),
            readable(BUFFERS + 16, 8),
            writable(ANSWER, 9),
            writable(ANSWER + 9, 1),
        ],
        &[readable(BUFFERS, 200), writable(ANSWER, 200)],
    ];
    for framing in framings {
        let mut rig = Rig::new();
        assert_eq!(plug_framed(&mut rig, framing), (10, [0; 10]), "{framing:?}");
        assert_eq!(rig.handle.plugged().count(), 1);
    }
}

#[test]
fn s_08_request_in_an_indirect_table_is_served() {
    let mut rig = Rig::new();
    let table = BUFFERS + 0x4000;
    rig.write_descriptor(table, 0, &readable(BUFFERS, 24), 1, 1);
    rig.write_descriptor(table, 1, &writable(ANSWER, 10), 0, 0);
    let indirect = Buffer {
        addr: table,
        len: 32,
        flags: DESC_F_INDIRECT,
    };
    assert_eq!(plug_framed(&mut rig, &[indirect]), (10, [0; 10]));
    assert_eq!(rig.handle.plugged().count(), 1);
}

#[test]
fn chain_that_cannot_carry_request_and_answer_is_given_back_empty() {
    let unusable: [&[Buffer]; 9] = [
        &[readable(BUFFERS, 24)],
        &[writable(ANSWER, 10)],
        &[readable(BUFFERS, 23), writable(ANSWER, 10)],
        &[readable(BUFFERS, 24), writable(ANSWER, 9)],
        &[readable(BUFFERS, 0), writable(ANSWER, 0)],
        // Outside guest memory, and over its end.
        &[readable(BUFFERS, 24), writable(0x9000_0000, 10)],
        &[readable(rig::RAM_SIZE - 8, 24), writable(ANSWER, 10)],
        &[readable(u64::MAX - 4, 24), writable(ANSWER, 10)],
        // In a block that is not plugged.
        &[readable(BUFFERS, 24), writable(REGION, 10)],
    ];
    for chain in unusable {
        let mut rig = Rig::new();
        let (len, answer) = plug_framed(&mut rig, chain);
        assert_eq!((len, answer), (0, [0xee; 10]), "{chain:x?}");
        assert_eq!(
            rig.handle.plugged().count(),
            0,
            "nothing is done without an answer: {chain:x?}"
        );
        assert_eq!(rig.handle.counters().unusable_chains, 1);
        assert_eq!(rig.plug(0, 1), Response::Ack, "the device is alive");
    }
}

#[test]
fn descriptor_loop_ends() {
    let mut rig = Rig::new();
    rig.write_descriptor(DESC_TABLE, 0, &readable(BUFFERS, 1), 1, 1);
    rig.write_descriptor(DESC_TABLE, 1, &readable(BUFFERS, 1), 1, 0);
    rig.make_available(0);
    rig.serve();
    assert_eq!(rig.used(), [(0, 0)]);
    assert_eq!(rig.handle.counters().unusable_chains, 1);
}

#[test]
fn unusable_chain_does_not_disturb_the_rest_of_the_batch() {
    let mut rig = Rig::new();
    for block in 0..3u64 {
        rig.write(
            BUFFERS + 32 * block,
            &Request::Plug(blocks(block, 1)).emit(),
        );
    }
    rig.submit(&[readable(BUFFERS, 24), writable(ANSWER, 10)]);
    rig.submit(&[readable(BUFFERS + 32, 5), writable(ANSWER, 10)]);
    rig.submit(&[readable(BUFFERS + 64, 24), writable(ANSWER, 10)]);
    rig.serve();
    assert_eq!(rig.used(), [(0, 10), (2, 0), (4, 10)]);
    assert_eq!(rig.handle.plugged().count(), 2);
    assert_eq!(
        rig.notifications.used(),
        1,
        "one notification for the batch"
    );
}

#[test]
fn head_outside_the_descriptor_table_is_an_error_of_the_queue() {
    let mut rig = Rig::new();
    rig.make_available(QUEUE_SIZE + 3);
    rig.serve();
    assert!(rig.used().is_empty());
    assert_eq!(rig.handle.counters().queue_errors, 1);
    assert_eq!(rig.plug(0, 1), Response::Ack, "the device is alive");
}

/// The chains behind a head that does not exist are not to blame, and the driver is not left to notify a device
/// that has told it not to.
#[test]
fn bad_head_disturbs_neither_the_batch_nor_notifications() {
    for features in [0, Features::RING_EVENT_IDX.bits()] {
        let mut rig = Rig::new();
        rig.device.reset();
        rig.activate(driver_features() | features);
        rig.write(BUFFERS, &Request::Plug(blocks(0, 1)).emit());
        rig.make_available(QUEUE_SIZE + 3);
        rig.submit(&[readable(BUFFERS, 24), writable(ANSWER, 10)]);
        rig.serve();
        assert_eq!(rig.used(), [(0, 10)]);
        assert_eq!(rig.notifications.used(), 1);
        let mut flags = [0; 2];
        rig.read(USED_RING, &mut flags);
        assert_eq!(flags, [0, 0], "the driver is to notify");
        let mut event = [0; 2];
        rig.read(USED_RING + 4 + 8 * u64::from(QUEUE_SIZE), &mut event);
        assert!(features == 0 || event == [2, 0], "of the next request");
    }
}

#[test]
fn available_index_that_runs_away_is_an_error_of_the_queue() {
    let mut rig = Rig::new();
    rig.write(AVAIL_RING + 2, &(QUEUE_SIZE + 1).to_le_bytes());
    assert_eq!(rig.serve(), Served::All);
    assert!(rig.used().is_empty());
    assert_eq!(rig.handle.counters().queue_errors, 1);
    rig.write(AVAIL_RING + 2, &0u16.to_le_bytes());
    assert_eq!(rig.plug(0, 1), Response::Ack, "the device is alive");
}

#[test]
fn spurious_notification_does_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.serve(), Served::All);
    assert_eq!(rig.serve(), Served::All);
    assert_eq!(rig.handle.counters().queue_errors, 0);
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

/// A queue inside device memory: the device refuses it while the memory is unplugged, works with it while it
/// is plugged, and survives the guest unplugging it.
#[test]
fn queue_in_device_memory_never_takes_the_device_down() {
    let mut rig = Rig::new();
    let in_region = || queue_at(REGION, REGION + 0x1000, REGION + 0x2000);
    let activate = |rig: &Rig| {
        let notify = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::clone(&rig.notifications) as Arc<dyn Interrupt>;
        rig.device
            .activate(Arc::clone(&rig.memory), in_region(), notify, interrupt)
    };
    rig.device.reset();
    rig.device.acknowledge_features(driver_features()).unwrap();
    assert!(matches!(activate(&rig), Err(ActivateError::InvalidQueue)));

    rig.activate(driver_features());
    assert_eq!(rig.plug(0, 1), Response::Ack);
    rig.device.reset();
    rig.device.acknowledge_features(driver_features()).unwrap();
    let mut handler = activate(&rig).unwrap();

    // The guest unplugs the block its own rings are in. The request is read before the rings are gone, the
    // answer can be written, its used element cannot.
    rig.write(BUFFERS, &Request::UnplugAll.emit());
    rig.write_descriptor(REGION, 0, &readable(BUFFERS, 24), 1, 1);
    rig.write_descriptor(REGION, 1, &writable(ANSWER, 10), 0, 0);
    rig.write(REGION + 0x1000 + 2, &1u16.to_le_bytes());
    handler.serve();
    assert_eq!(rig.handle.plugged().count(), 0);
    assert!(rig.handle.counters().queue_errors >= 1);
    assert_eq!(
        handler.serve(),
        Served::All,
        "nothing to serve, nothing broken"
    );

    rig.device.reset();
    rig.activate(driver_features());
    assert_eq!(rig.plug(0, 1), Response::Ack, "the device is alive");
}

#[test]
fn unplugging_the_buffer_of_the_answer_is_busy() {
    let mut rig = Rig::new();
    rig.plug(0, 2);
    rig.write(BUFFERS, &Request::Unplug(blocks(1, 1)).emit());
    let answer = REGION + BLOCK + 64;
    rig.submit(&[readable(BUFFERS, 24), writable(answer, 10)]);
    rig.serve();
    assert_eq!(rig.used().len(), 1);
    let mut bytes = [0; 10];
    rig.read(answer, &mut bytes);
    assert_eq!(
        Response::parse(RequestKind::Unplug, &bytes),
        Ok(Response::Busy)
    );
    assert_eq!(
        rig.notifications.config(),
        1,
        "the cause is gone with the answer"
    );
    assert_eq!(rig.unplug(1, 1), Response::Ack);
}

#[test]
fn handler_of_a_reset_device_stops_and_touches_nothing() {
    let mut rig = Rig::new();
    rig.write(BUFFERS, &Request::Plug(blocks(0, 1)).emit());
    rig.submit(&[readable(BUFFERS, 24), writable(ANSWER, 10)]);
    rig.device.reset();
    assert_eq!(rig.serve(), Served::Stopped);
    assert!(rig.used().is_empty());
    let mut stale = rig.handler.take().unwrap();
    rig.activate(driver_features());
    assert_eq!(
        stale.serve(),
        Served::Stopped,
        "even when the device is active again"
    );
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

#[test]
fn second_activation_is_refused() {
    let rig = Rig::new();
    let notify = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Arc::clone(&rig.notifications) as Arc<dyn Interrupt>;
    let queue = queue_at(DESC_TABLE, AVAIL_RING, USED_RING);
    let again = rig
        .device
        .activate(Arc::clone(&rig.memory), queue, notify, interrupt);
    assert!(matches!(again, Err(ActivateError::AlreadyActive)));
}

#[test]
fn driver_that_wants_no_interrupts_gets_none() {
    let mut rig = Rig::new();
    rig.write(AVAIL_RING, &1u16.to_le_bytes());
    rig.plug(0, 1);
    assert_eq!(rig.notifications.used(), 0);
    rig.write(AVAIL_RING, &0u16.to_le_bytes());
    rig.plug(1, 1);
    assert_eq!(rig.notifications.used(), 1);
}

#[test]
fn s_07_event_idx_interrupts_when_the_driver_asked_and_asks_for_the_next_request() {
    let mut rig = Rig::new();
    rig.device.reset();
    rig.activate(driver_features() | Features::RING_EVENT_IDX.bits());
    let used_event = AVAIL_RING + 4 + 2 * u64::from(QUEUE_SIZE);
    let avail_event = USED_RING + 4 + 8 * u64::from(QUEUE_SIZE);
    // An interrupt when the third answer is there, and not before.
    rig.write(used_event, &2u16.to_le_bytes());
    for block in 0..3 {
        rig.plug(block, 1);
        assert_eq!(
            rig.notifications.used(),
            usize::from(block == 2),
            "after answer {}",
            block + 1
        );
        let mut event = [0; 2];
        rig.read(avail_event, &mut event);
        assert_eq!(u64::from(u16::from_le_bytes(event)), block + 1);
    }
}

#[test]
fn ring_indexes_wrap() {
    let mut rig = Rig::new();
    for round in 0..70_000u32 {
        let response = rig.state(u64::from(round % 512), 1);
        assert_eq!(response, Response::AckState(BlockState::Unplugged));
    }
    assert_eq!(
        rig.handle
            .counters()
            .requests(RequestKind::State, Answer::Ack),
        70_000
    );
}

#[test]
fn guest_that_keeps_the_queue_full_cannot_keep_the_thread() {
    let mut rig = Rig::new();
    rig.write(BUFFERS, &Request::State(blocks(0, 1)).emit());
    for _ in 0..QUEUE_SIZE / 2 {
        rig.submit(&[readable(BUFFERS, 24), writable(ANSWER, 10)]);
    }
    // Twice as many entries as there are chains: each is served again and again.
    for _ in 0..QUEUE_SIZE / 2 {
        rig.make_available(0);
    }
    let handler = rig.handler.as_mut().unwrap();
    assert_eq!(handler.serve(), Served::More);
    assert_eq!(handler.serve(), Served::All);
}

#[test]
fn requests_are_counted_by_kind_and_answer() {
    let mut rig = Rig::with(4 * GIB, |b| b.requested_size(4 * BLOCK));
    rig.plug(0, 4);
    rig.plug(4, 1);
    rig.plug(0, 1);
    rig.unplug(0, 1);
    rig.unplug(0, 1);
    rig.state(0, 2);
    rig.unplug_all();
    let counters = rig.handle.counters();
    let count = |kind, answer| counters.requests(kind, answer);
    assert_eq!(count(RequestKind::Plug, Answer::Ack), 1);
    assert_eq!(count(RequestKind::Plug, Answer::Nack), 1);
    assert_eq!(count(RequestKind::Plug, Answer::Error), 1);
    assert_eq!(count(RequestKind::Unplug, Answer::Ack), 1);
    assert_eq!(count(RequestKind::Unplug, Answer::Error), 1);
    assert_eq!(count(RequestKind::State, Answer::Ack), 1);
    assert_eq!(count(RequestKind::UnplugAll, Answer::Ack), 1);
    assert_eq!(counters.requests.iter().flatten().sum::<u64>(), 7);
    assert_eq!(counters.used_notifications, 7);
}

#[test]
fn latencies_are_counted_by_kind_and_answer() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    rig.plug(0, 1);
    rig.state(0, 1);
    rig.state(0, 1);
    let latencies = rig.handle.latencies();
    assert_eq!(latencies.of(RequestKind::Plug, Answer::Ack).count(), 1);
    assert_eq!(latencies.of(RequestKind::Plug, Answer::Error).count(), 1);
    let state = latencies.of(RequestKind::State, Answer::Ack);
    assert_eq!(state.count(), 2);
    assert!(state.max <= state.total);
    assert!(state.percentile(50) <= state.max);
}

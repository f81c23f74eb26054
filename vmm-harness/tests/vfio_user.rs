//! `vmem serve`, with a VMM that behaves and with clients that do not. The server is a process of its own, so that what
//! it holds can be counted.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/ring.rs"]
mod ring;
#[path = "common/served.rs"]
mod served;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use virtio_mem::wire::Request;
use vmm_harness::layout::REGION_START;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use served::{
    BLOCK, CONNECT, DEVICE, Guest, ISR, MIB, RAM, REGION, Served, eventfd, is_signalled, refused,
    signalled, socket_path, span,
};

const ACK: u16 = 0;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const PLUGGED: u16 = 0;
const MIXED: u16 = 2;

// What a VMM that behaves gets.

#[test]
fn blocks_are_the_clients_memory_and_unplugged_ones_holes_in_it() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(guest.plug(2, 4), ACK);
    assert_eq!(served.plugged(), 4 * BLOCK);
    let before = guest.memory.allocated();
    guest.fill(2, 4);
    assert_eq!(guest.memory.allocated(), before + 4 * BLOCK);
    assert_eq!(served.command("status")["resident_size"], 4 * BLOCK);
    assert_eq!(guest.request(Request::State(span(2, 4))), (ACK, PLUGGED));
    assert_eq!(guest.request(Request::State(span(1, 4))), (ACK, MIXED));
    assert_eq!(guest.plug(5, 1), ERROR, "plugged already");

    assert_eq!(guest.unplug(3, 2), ACK);
    assert_eq!(guest.memory.allocated(), before + 2 * BLOCK);
    assert_eq!((guest.mark(3), guest.mark(4)), (0, 0));
    assert!(guest.mark(2) != 0 && guest.mark(5) != 0);
    assert_eq!(guest.request(Request::UnplugAll).0, ACK);
    assert_eq!(guest.memory.allocated(), before);
    assert_eq!(served.plugged(), 0);
}

#[test]
fn region_may_be_several_maps_of_several_places() {
    let served = Served::start();
    let mut guest = Guest::without_memory(&served);
    // RAM and the low part of the region in one map would do as well, were they neighbours.
    guest.map(0, 0, RAM);
    let half = REGION / 2;
    guest.map(RAM, REGION_START + half, half);
    guest.map(RAM + half, REGION_START, half);
    guest.start_driver();
    // Four blocks about the border: the last two of the second map, the first two of the first.
    let border = half / BLOCK;
    assert_eq!(guest.plug(0, 1), ACK);
    guest.client.dma_unmap(REGION_START, REGION).unwrap();
    guest.map(RAM, REGION_START, half);
    guest.map(RAM + half, REGION_START + half, half);
    assert_eq!(guest.plug(border - 2, 4), ACK);
    guest.fill(0, REGION / BLOCK);
    let before = guest.memory.allocated();
    assert_eq!(guest.unplug(border - 2, 4), ACK);
    assert_eq!(guest.memory.allocated(), before - 4 * BLOCK);
    for block in 0..REGION / BLOCK {
        let hole = (border - 2..border + 2).contains(&block);
        assert_eq!(guest.mark(block) == 0, hole, "block {block}");
    }
}

#[test]
fn holes_are_punched_where_the_blocks_lie_in_the_file() {
    let mut served = Served::start();
    let mut guest = Guest::without_memory(&served);
    guest.map(0, 0, RAM);
    // The halves of the region lie in the file the other way round.
    let half = REGION / 2;
    guest.map(RAM, REGION_START + half, half);
    guest.map(RAM + half, REGION_START, half);
    guest.start_driver();
    guest.fill(0, REGION / BLOCK);
    let border = half / BLOCK;
    assert_eq!(guest.plug(border, 1), ACK);
    assert_eq!(guest.plug(1, 1), ACK);
    assert_eq!(guest.unplug(border, 1), ACK);
    let holes = |guest: &Guest| -> Vec<_> {
        (0..REGION / BLOCK)
            .filter(|block| guest.mark(*block) == 0)
            .collect()
    };
    assert_eq!(holes(&guest), [0], "as the client sees its file");
    assert_eq!(guest.unplug(1, 1), ACK);
    assert_eq!(holes(&guest), [0, border + 1]);
    assert_eq!(served.plugged(), 0);
}

#[test]
fn resize_interrupts_the_driver_which_finds_the_size() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert!(!is_signalled(&guest.vectors[0]));
    let answer = served.command("resize 8M");
    assert_eq!(answer["requested_size"], 8 * MIB);
    assert!(is_signalled(&guest.vectors[0]));
    assert_eq!(u64::from_le_bytes(guest.read(DEVICE, 0x30)), 8 * MIB);
    for (line, error) in [
        ("resize 3M", "not a multiple"),
        ("resize 1G", "exceed"),
        ("bigger", "unknown command"),
    ] {
        let answer = served.command(line);
        assert!(
            answer["error"].as_str().unwrap().contains(error),
            "{answer}"
        );
    }
    assert!(!is_signalled(&guest.vectors[0]));
}

#[test]
fn frozen_device_is_busy_and_says_when_it_is_not() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(served.command("freeze")["frozen"], true);
    assert_eq!(guest.plug(0, 1), BUSY);
    assert!(!is_signalled(&guest.vectors[0]));
    assert_eq!(served.command("thaw")["frozen"], false);
    assert!(is_signalled(&guest.vectors[0]));
    assert_eq!(guest.plug(0, 1), ACK);
}

#[test]
fn system_reset_unplugs_and_a_reset_by_the_driver_does_not() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    let before = guest.memory.allocated();
    assert_eq!(guest.plug(0, 3), ACK);
    guest.fill(0, 3);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    assert_eq!(served.plugged(), 3 * BLOCK);
    guest.start_driver();
    assert_eq!(guest.request(Request::State(span(0, 3))), (ACK, PLUGGED));
    assert_eq!(guest.memory.allocated(), before + 3 * BLOCK);

    guest.client.reset().unwrap();
    assert_eq!(guest.status(), 0);
    assert_eq!(served.plugged(), 0);
    assert_eq!(guest.memory.allocated(), before);
    // Memory and eventfds are still there: a reset is not their end.
    guest.start_driver();
    assert_eq!(guest.plug(0, 1), ACK);
}

#[test]
fn interrupt_line_is_masked_with_each_signal_until_the_client_has_seen_to_it() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    let line = eventfd();
    let none = VFIO_IRQ_SET_DATA_NONE;
    let (trigger, unmask) = (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK);
    let (intx, msix) = (VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX);
    let client = &mut guest.client;
    client.set_irqs(msix, none | trigger, 0, 0, &[]).unwrap();
    client
        .set_irqs(intx, CONNECT, 0, 1, &[line.as_raw_fd()])
        .unwrap();
    guest.start_driver();
    served.command("resize 8M");
    assert!(is_signalled(&line));
    served.command("resize 6M");
    assert!(!is_signalled(&line), "masked");
    // Seen to without a look at the ISR status: the line is still asserted.
    guest
        .client
        .set_irqs(intx, none | unmask, 0, 1, &[])
        .unwrap();
    assert!(is_signalled(&line));
    assert_eq!(guest.read(ISR, 0), [2]);
    guest
        .client
        .set_irqs(intx, none | unmask, 0, 1, &[])
        .unwrap();
    assert!(!is_signalled(&line));
    assert!(!is_signalled(&guest.vectors[0]));
}

/// As a VMM has it whose KVM injects the line and unmasks it: there no message tells of either.
#[test]
fn interrupt_line_is_unmasked_by_an_eventfd() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    let mut guest = Guest::connect(&served);
    let (line, unmask, other) = (eventfd(), eventfd(), eventfd());
    let (intx, msix) = (VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX);
    let disable = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    let unmask_by = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    let set = |guest: &mut Guest, index, flags, count, fds: &[&File]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        guest.client.set_irqs(index, flags, 0, count, &fds).unwrap();
    };
    set(&mut guest, msix, disable, 0, &[]);
    set(&mut guest, intx, CONNECT, 1, &[&line]);
    set(&mut guest, intx, unmask_by, 1, &[&unmask]);
    guest.start_driver();
    served.command("resize 8M");
    assert!(is_signalled(&line));
    // As often as it is needed, though nobody empties the eventfd; not seen to, the line is asserted again.
    for _ in 0..3 {
        served.command("resize 6M");
        served.command("resize 8M");
        assert!(!is_signalled(&line), "masked");
        (&unmask).write_all(&1u64.to_ne_bytes()).unwrap();
        assert!(signalled(&line));
    }
    assert_eq!(guest.read(ISR, 0), [2]);
    (&unmask).write_all(&1u64.to_ne_bytes()).unwrap();
    guest.send(Request::Plug(span(0, 1)));
    assert!(signalled(&line));
    assert_eq!(guest.read(ISR, 0), [1]);
    assert!(!is_signalled(&line));

    // Another one in its place, then none; each time the one before is let go.
    set(&mut guest, intx, unmask_by, 1, &[&other]);
    served.command("resize 6M");
    (&other).write_all(&1u64.to_ne_bytes()).unwrap();
    assert!(signalled(&line));
    let (connected, _) = served.descriptors();
    set(&mut guest, intx, unmask_by, 1, &[]);
    assert_eq!(served.descriptors().0, connected - 1);
    set(&mut guest, intx, unmask_by, 1, &[&other]);
    assert_eq!(served.descriptors().0, connected);
    // The line itself goes, and what unmasks it.
    set(&mut guest, intx, disable, 0, &[]);
    assert_eq!(served.descriptors().0, connected - 2);
    drop(guest);
    assert_eq!(served.holdings(), before);
}

#[test]
fn clients_come_one_after_another_and_leave_nothing() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    for _ in 0..5 {
        let mut guest = Guest::connect(&served);
        assert_eq!(u64::from_le_bytes(guest.read(DEVICE, 0x28)), 0);
        guest.start_driver();
        let allocated = guest.memory.allocated();
        assert_eq!(guest.plug(0, 4), ACK);
        guest.fill(0, 4);
        let Guest { client, memory, .. } = guest;
        drop(client);
        assert_eq!(served.holdings(), before);
        assert_eq!(served.plugged(), 0);
        // The guest may run on without the device: its memory is not the server's to clear.
        assert_eq!(memory.allocated(), allocated + 4 * BLOCK);
    }
}

/// Regression: the next client found blocks plugged that were another one's.
#[test]
fn freeze_ends_with_the_client_it_was_for() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(guest.plug(0, 4), ACK);
    assert_eq!(served.command("freeze")["frozen"], true);
    // Nothing is unplugged while it lasts, which this client is told and does not tell.
    guest.client.reset().unwrap();
    assert_eq!(served.plugged(), 4 * BLOCK);
    drop(guest);
    let before = served.holdings();
    assert_eq!(served.plugged(), 0);
    assert_eq!(served.command("status")["frozen"], false);
    works(&mut served);
    assert_eq!(served.holdings(), before);
}

/// Regression: that could not be undone, and stopped the device for every client after it.
#[test]
fn memory_that_cannot_be_given_back_is_the_business_of_its_client_alone() {
    let mut served = Served::start();
    let mut guest = Guest::without_memory(&served);
    guest.map(0, 0, RAM);
    let half = REGION / 2;
    guest.map(RAM, REGION_START, half);
    guest.map(RAM + half, REGION_START + half, half);
    guest.start_driver();
    assert_eq!(guest.plug(0, 2), ACK);
    assert_eq!(guest.plug(half / BLOCK, 2), ACK);
    guest.client.dma_unmap(REGION_START, half).unwrap();
    // No hole can be punched any more.
    guest.memory.seal();
    assert_eq!(guest.request(Request::UnplugAll).0, BUSY);
    guest.client.reset().unwrap();
    assert_eq!(served.plugged(), 4 * BLOCK);
    drop(guest);
    // Once there is a next client, the one before is gone.
    works(&mut served);
    assert_eq!(served.plugged(), 0);
}

#[test]
fn what_clients_give_is_not_for_children_of_the_server() {
    let mut served = Served::start();
    let (own, inherited) = served.descriptors();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(guest.plug(0, 1), ACK);
    let (with_client, inherited_with_client) = served.descriptors();
    // The connection, two eventfds, and the files of RAM and region at least.
    assert!(with_client >= own + 5, "{own} {with_client}");
    assert_eq!(inherited_with_client, inherited);
    assert_eq!(served.plugged(), BLOCK);
}

// What a VMM with its memory elsewhere gets.

#[test]
fn plug_without_memory_is_busy_until_there_is_some() {
    let mut served = Served::start();
    let mut guest = Guest::without_memory(&served);
    guest.map(0, 0, RAM);
    guest.start_driver();
    assert_eq!(guest.plug(0, 1), BUSY);
    // Half a region is none, for blocks in the other half.
    let half = REGION / 2;
    guest.map(RAM, REGION_START, half);
    assert!(is_signalled(&guest.vectors[0]), "worth another try");
    assert_eq!(guest.plug(half / BLOCK, 1), BUSY);
    assert_eq!(guest.plug(half / BLOCK - 1, 2), BUSY);
    assert_eq!(guest.plug(half / BLOCK - 1, 1), ACK);
    guest.map(RAM + half, REGION_START + half, half);
    assert!(is_signalled(&guest.vectors[0]));
    assert_eq!(guest.plug(half / BLOCK, 1), ACK);
    assert_eq!(served.plugged(), 2 * BLOCK);
}

#[test]
fn memory_that_is_no_file_or_read_only_cannot_be_plugged() {
    let mut served = Served::start();
    let mut raw = Raw::connect(&served);
    let memory = served::GuestMemory::new();
    let fd = memory.file.as_raw_fd();
    // Without a file, and with one that may only be read: both are taken, for a guest has such memory too.
    assert_eq!(raw.dma_map(3, 0, REGION_START, REGION, &[]), OK);
    assert_eq!(raw.dma_map(1, 0, 0, RAM, &[fd]), OK);
    // A map that is there already, whatever it is.
    assert_eq!(raw.dma_map(3, RAM, REGION_START, BLOCK, &[fd]), FAILED);
    drop(raw);
    let mut guest = Guest::without_memory(&served);
    guest.start_driver_without_memory();
    assert_eq!(
        guest.status() & 64,
        64,
        "the queue is in no memory: DEVICE_NEEDS_RESET"
    );
    assert!(signalled(&guest.vectors[0]));
    assert_eq!(served.plugged(), 0);
}

#[test]
fn memory_that_is_taken_away_is_not_touched_and_comes_back() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(guest.plug(0, 2), ACK);
    guest.fill(0, 2);
    let before = guest.memory.allocated();
    guest.client.dma_unmap(REGION_START, REGION).unwrap();
    assert_eq!(guest.plug(4, 1), BUSY);
    assert_eq!(served.command("status")["resident_size"], 0);
    // Not ours any more, so not ours to give back.
    assert_eq!(guest.unplug(0, 1), ACK);
    assert_eq!(guest.memory.allocated(), before);
    guest.map(RAM, REGION_START, REGION);
    assert!(is_signalled(&guest.vectors[0]));
    assert_eq!(guest.unplug(1, 1), ACK);
    assert_eq!(guest.memory.allocated(), before - BLOCK);
    assert_eq!(guest.mark(1), 0);

    // The memory of the queue itself.
    guest.client.dma_unmap(0, RAM).unwrap();
    guest.send(Request::Plug(span(0, 1)));
    // Mapped again before it is looked for, the queue would be there, and the request answered.
    served.until_said("the guest-request queue cannot be used");
    guest.map(0, 0, RAM);
    guest.start_driver();
    assert!(!is_signalled(&guest.vectors[1]));
    assert_eq!(guest.plug(0, 1), ACK);
    assert_eq!(served.plugged(), BLOCK);
}

#[test]
fn queue_reaches_plugged_blocks_while_the_region_is_there() {
    let mut served = Served::start();
    let mut guest = Guest::connect(&served);
    guest.start_driver();
    assert_eq!(guest.plug(0, 1), ACK);
    let answer = u64::from(ERROR);
    let request = Request::Plug(span(0, 1));
    assert_eq!(guest.request_answered_in(request, 0), (10, answer));
    assert_eq!(guest.request_answered_in(request, 1), (0, 0), "not plugged");
    // The block stays plugged; without its memory an answer there would be the end of the server.
    guest.client.dma_unmap(REGION_START, REGION).unwrap();
    assert_eq!(guest.request_answered_in(request, 0), (0, answer));
    guest.map(RAM, REGION_START, REGION / 2);
    assert_eq!(guest.request_answered_in(request, 0), (0, answer));
    guest.map(RAM + REGION / 2, REGION_START + REGION / 2, REGION / 2);
    guest.fill(0, 1);
    assert_ne!(guest.mark(0), answer);
    assert_eq!(guest.request_answered_in(request, 0).0, 10);
    assert_eq!(served.plugged(), BLOCK);
}

// What clients get that do not behave.

#[test]
fn client_that_goes_in_mid_request_leaves_nothing() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    for _ in 0..10 {
        // With a request the device is at.
        let mut guest = Guest::connect(&served);
        guest.start_driver();
        guest.send(Request::Plug(span(0, 8)));
        drop(guest.client);
        assert_eq!(served.holdings(), before);
        assert_eq!(served.plugged(), 0);
    }
    // With a message that has only begun, at every length it can have.
    let write = region_write(0, 0x14, &[0]);
    for length in 0..write.len() {
        let mut raw = Raw::connect(&served);
        raw.stream.write_all(&write[..length]).unwrap();
        drop(raw);
        assert_eq!(served.holdings(), before, "{length} bytes");
    }
    works(&mut served);
}

#[test]
fn garbage_is_an_error_or_the_end_of_the_connection() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    // Versions the crate panics over.
    let version = [0, 0, 1, 0];
    let with = |data: &[u8]| message(1, &[&version, data].concat());
    let mut short = with(b"");
    short[4..8].copy_from_slice(&3u32.to_le_bytes());
    let garbage = [
        short,
        with(b""),
        with(b"{}"),
        with(b"{\0}\0"),
        with(b"[]\0"),
        with(b"\xff\xff\0"),
        message(0, b""),
        message(99, b""),
        message(9, &[0xff; 16]),
        vec![0; 16],
        vec![0xff; 64],
        vec![0xff; 1 << 16],
    ];
    for bytes in &garbage {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        // The server may close the connection before it has read all.
        let _ = stream.write_all(bytes);
        drop(stream);
        assert_eq!(served.holdings(), before, "{bytes:x?}");
    }
    let mut random = fastrand::Rng::with_seed(seed());
    for _ in 0..300 {
        let mut raw = Raw::connect(&served);
        for _ in 0..random.u32(..8) {
            // Messages of every kind, right in their header and wrong in the rest, so that they get far.
            let payload: Vec<u8> = (0..random.u32(..40)).map(|_| random.u8(..8)).collect();
            let _ = raw.stream.write_all(&message(random.u16(..16), &payload));
        }
        drop(raw);
    }
    assert_eq!(served.holdings(), before);
    works(&mut served);
}

#[test]
fn maps_that_cannot_be_are_refused_one_by_one() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    let mut raw = Raw::connect(&served);
    let memory = served::GuestMemory::new();
    let fd = memory.file.as_raw_fd();
    let len = RAM + REGION;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let event = eventfd();
    let read_only = File::open(format!("/proc/self/fd/{fd}")).unwrap();
    for (offset, address, size, fd) in [
        (0, 0, 0, fd),
        (0, 0, 100, fd),
        (0, 1, 4096, fd),
        (1, 0, 4096, fd),
        (0, 0, len + 4096, fd),
        (len, 0, 4096, fd),
        (u64::MAX - 4095, 0, 4096, fd),
        (0, u64::MAX - 4095, 8192, fd),
        (0, 0, u64::MAX - 4095, fd),
        (0, REGION_START, len * 2, fd),
        (RAM + 512, REGION_START, BLOCK, fd),
        (0, 0, 4096, null.as_raw_fd()),
        (0, REGION_START, BLOCK, null.as_raw_fd()),
        (0, REGION_START, BLOCK, event.as_raw_fd()),
        (RAM, REGION_START, BLOCK, read_only.as_raw_fd()),
        (0, 0, RAM, read_only.as_raw_fd()),
    ] {
        let answer = raw.dma_map(3, offset, address, size, &[fd]);
        assert_eq!(answer, FAILED, "{offset:#x} {address:#x} {size:#x}");
    }
    assert_eq!(raw.dma_map(3, 0, 0, RAM, &[fd, fd]), FAILED, "two files");
    // What is there cannot be mapped again, nor unmapped in part.
    assert_eq!(raw.dma_map(3, 0, 0, RAM, &[fd]), OK);
    assert_eq!(raw.dma_map(3, 0, RAM - 4096, RAM, &[fd]), FAILED);
    assert_eq!(raw.dma_unmap(0, 0, RAM / 2), FAILED);
    assert_eq!(raw.dma_unmap(0, RAM / 2, RAM), FAILED);
    assert_eq!(raw.dma_unmap(0, RAM * 16, RAM), OK, "nothing to unmap");
    assert_eq!(raw.dma_unmap(0, 0, RAM), OK);
    // A map that reaches beyond the region on both sides: three parts.
    let lead = REGION_START - RAM / 2;
    assert_eq!(raw.dma_map(3, 0, lead, len, &[fd]), OK);
    assert_eq!(raw.dma_unmap(4, 0, 0), OK, "all");
    assert_eq!(raw.dma_map(3, 0, lead, len, &[fd]), OK);
    drop(raw);
    assert_eq!(served.holdings(), before);
    works(&mut served);
}

#[test]
fn interrupts_that_cannot_be_are_refused_and_odd_ones_do_not_block() {
    let mut served = Served::start();
    works(&mut served);
    let before = served.holdings();
    let mut raw = Raw::connect(&served);
    let event = eventfd();
    let fd = event.as_raw_fd();
    let (trigger, none) = (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_NONE);
    let (eventfds, unmask) = (VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_UNMASK);
    let (reader, writer) = std::io::pipe().unwrap();
    for (index, flags, start, count, fds) in [
        (2, eventfds | trigger, 2, 1, vec![fd]),
        (2, eventfds | trigger, 0, 3, vec![fd; 3]),
        (2, eventfds | trigger, 0, 2, vec![fd]),
        (2, eventfds | trigger, u32::MAX, 1, vec![fd]),
        (2, eventfds | trigger, 0, 0, vec![]),
        (1, eventfds | trigger, 0, 1, vec![fd]),
        (0, eventfds | trigger, 1, 1, vec![fd]),
        (9, eventfds | trigger, 0, 1, vec![fd]),
        (2, 0, 0, 1, vec![]),
        (2, u32::MAX, 0, 1, vec![fd]),
        (4, none | trigger, 0, 0, vec![]),
        (2, none | VFIO_IRQ_SET_ACTION_UNMASK, 0, 1, vec![]),
        // What waits for whoever writes to it, or for whoever reads.
        (2, eventfds | trigger, 0, 1, vec![writer.as_raw_fd()]),
        (0, eventfds | unmask, 0, 1, vec![fd]),
    ] {
        let answer = raw.set_irqs(index, flags, start, count, &fds);
        assert_eq!(answer, FAILED, "{index} {flags:#x} {start} {count}");
    }
    // Triggered by the client itself, to see that it works.
    assert_eq!(raw.set_irqs(2, eventfds | trigger, 0, 2, &[fd, fd]), OK);
    assert_eq!(raw.set_irqs(2, none | trigger, 1, 1, &[]), OK);
    assert!(is_signalled(&event));
    drop(raw);
    assert_eq!(served.holdings(), before);

    // Unmasking by an eventfd is for a line that is connected.
    let mut raw = Raw::connect(&served);
    assert_eq!(raw.set_irqs(0, eventfds | trigger, 0, 1, &[fd]), OK);
    let reader = reader.as_raw_fd();
    for (index, start, count, fds) in [
        (0, 0, 1, vec![reader]),
        (0, 0, 1, vec![fd, fd]),
        (0, 0, 2, vec![fd]),
        (0, 1, 1, vec![fd]),
        (0, 0, 0, vec![]),
        (2, 0, 1, vec![fd]),
    ] {
        let answer = raw.set_irqs(index, eventfds | unmask, start, count, &fds);
        assert_eq!(answer, FAILED, "{index} {start} {count}");
    }
    assert_eq!(raw.set_irqs(0, eventfds | unmask, 0, 1, &[fd]), OK);
    drop(raw);
    assert_eq!(served.holdings(), before);

    // An eventfd that is full: whoever writes to it waits.
    let mut guest = Guest::connect(&served);
    let full = eventfd();
    (&full).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    let index = VFIO_PCI_MSIX_IRQ_INDEX;
    let fds = [full.as_raw_fd()];
    guest.client.set_irqs(index, CONNECT, 0, 1, &fds).unwrap();
    // The flag is the file's, and the file is the client's as well.
    rustix::fs::fcntl_setfl(&full, rustix::fs::OFlags::RDWR).unwrap();
    guest.start_driver();
    assert_eq!(served.command("resize 8M")["requested_size"], 8 * MIB);
    assert_eq!(guest.plug(0, 1), ACK);
    drop(guest);
    assert_eq!(served.holdings(), before);
}

#[test]
fn accesses_outside_the_regions_are_refused() {
    let served = Served::start();
    let mut raw = Raw::connect(&served);
    for (region, offset, len) in [
        (0, 0x4000, 1),
        (0, 0x3fff, 2),
        (0, u64::MAX, 1),
        (0, 0, u32::MAX),
        (2, 0, 4),
        (7, 256, 1),
        (7, 0, 257),
        (8, 0, 1),
        (9, 0, 1),
    ] {
        assert_eq!(
            raw.region_read(region, offset, len),
            FAILED,
            "{region} {offset:#x} {len}"
        );
        // A length that is not there would be waited for.
        if len < 1024 {
            let data = vec![0; len as usize];
            let write = region_write(region, offset, &data);
            raw.stream.write_all(&write).unwrap();
            let answer = raw.answer();
            // A region nobody knows is refused before its data is read, which then is taken for messages.
            if region < 9 {
                assert_eq!(answer, FAILED);
            }
        }
        if region == 9 {
            break;
        }
    }
}

// The process.

#[test]
fn second_server_at_a_live_socket_says_so_and_leaves_it_alone() {
    let mut served = Served::start();
    let (code, error) = refused(&served.socket, &[]);
    assert_eq!(code, Some(1));
    let holder = format!("is in use: process {} answers there", served.pid());
    assert!(error.contains(&holder), "{error}");
    works(&mut served);
}

#[test]
fn signals_and_quit_end_it_and_remove_the_socket() {
    let ends: [&dyn Fn(&mut Served); 3] = [
        &|served| served.signal(Signal::TERM),
        &|served| served.signal(Signal::INT),
        &|served| assert_eq!(served.command("quit")["plugged_size"], 0),
    ];
    for end in ends {
        let mut served = Served::start();
        // Also with a client there, and nobody at the controls.
        let _guest = Guest::connect(&served);
        end(&mut served);
        assert_eq!(served.wait().code(), Some(0));
        assert!(!served.socket.exists() && !served.lock().exists());
    }
    let mut served = Served::start();
    served.close_input();
    drop(Guest::connect(&served));
    served.signal(Signal::TERM);
    assert_eq!(served.wait().code(), Some(0));
}

#[test]
fn socket_of_a_server_that_was_killed_is_replaced() {
    let socket = socket_path();
    let mut killed = Served::start_at(&socket);
    killed.signal(Signal::KILL);
    killed.wait();
    assert!(socket.exists());
    let mut served = Served::start_at(&socket);
    works(&mut served);
}

#[test]
fn wrong_options_are_told_before_there_is_a_socket() {
    for (args, error) in [
        (["--block-size", "3M"], "block"),
        (["--region-start", "1M"], "memory device"),
        (["--size", "3G"], "exceed"),
        (["--region-size", "1M"], "memory device"),
    ] {
        let socket = socket_path();
        let (code, said) = refused(&socket, &args);
        assert_eq!(code, Some(2), "{args:?}");
        assert!(said.contains(error), "{said}");
        assert!(!socket.exists());
    }
}

/// A whole round with a client that behaves. Each thread of the server has done something afterwards.
fn works(served: &mut Served) {
    let mut guest = Guest::connect(served);
    guest.start_driver();
    assert_eq!(guest.plug(0, 1), ACK);
    assert_eq!(served.plugged(), BLOCK);
    assert_eq!(guest.unplug(0, 1), ACK);
}

fn seed() -> u64 {
    let given = std::env::var("VMEM_SEED").ok();
    let seed = given.map_or(0, |seed| seed.parse().unwrap());
    println!("VMEM_SEED={seed}");
    seed
}

/// A client that sends what it likes.
struct Raw {
    stream: UnixStream,
}

/// Error bit of a reply.
type Failed = bool;
const OK: Failed = false;
const FAILED: Failed = true;

fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + payload.len() as u32).to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(payload);
    bytes
}

fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn region_write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let region_and_count = u64::from(region) | (data.len() as u64) << 32;
    message(10, &[&words(&[offset, region_and_count]), data].concat())
}

impl Raw {
    /// Up to and with the version.
    fn connect(served: &Served) -> Self {
        let stream = UnixStream::connect(&served.socket).unwrap();
        let mut raw = Self { stream };
        let version = b"\0\0\x01\0{\"capabilities\":{}}\0";
        assert_eq!(raw.send(&message(1, version), &[]), OK);
        raw
    }

    fn send(&mut self, message: &[u8], fds: &[RawFd]) -> Failed {
        match fds {
            [] => self.stream.write_all(message).unwrap(),
            _ => assert_eq!(
                self.stream.send_with_fds(&[message], fds).unwrap(),
                message.len()
            ),
        }
        self.answer()
    }

    fn answer(&mut self) -> Failed {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        word(8) & 1 << 5 != 0
    }

    fn dma_map(
        &mut self,
        flags: u64,
        offset: u64,
        address: u64,
        size: u64,
        fds: &[RawFd],
    ) -> Failed {
        let payload = words(&[32 | flags << 32, offset, address, size]);
        self.send(&message(2, &payload), fds)
    }

    fn dma_unmap(&mut self, flags: u64, address: u64, size: u64) -> Failed {
        let payload = words(&[24 | flags << 32, address, size]);
        self.send(&message(3, &payload), &[])
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: &[RawFd],
    ) -> Failed {
        let mut payload = Vec::new();
        for word in [20, flags, index, start, count] {
            payload.extend(word.to_le_bytes());
        }
        self.send(&message(8, &payload), fds)
    }

    fn region_read(&mut self, region: u32, offset: u64, count: u32) -> Failed {
        let payload = words(&[offset, u64::from(region) | u64::from(count) << 32]);
        self.send(&message(9, &payload), &[])
    }
}

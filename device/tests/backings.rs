//! What becomes of the host's memory, on every kind of backing: reclaim is measured, not assumed.
#![allow(
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "a test fails where it stands"
)]

mod rig;

use std::fs::File;
use std::num::NonZero;

use rig::backings::{BLOCKS, HugePages, KINDS, Kind, SNAPSHOT_TAG, plug, rig_of, skip, unplug};
use rig::{BLOCK, GIB, MIB, REGION, Rig};
use virtio_mem::wire::Response;
use virtio_mem::{
    Anonymous, Backing, BuildError, Hugetlb, Memfd, NoSlots, PrivateFile, Slot, SlotMapper,
    VirtioMem,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

const TAG: u8 = 0xa7;

/// Runs `test` on each kind of backing, with pages in the pool for `plugged` blocks.
fn on_every_backing(test_name: &str, plugged: u64, test: impl Fn(&Kind, Rig)) {
    for kind in &KINDS {
        match kind.pages(plugged) {
            Ok(_pages) => test(kind, rig_of(kind, |builder| builder)),
            Err(reason) => skip(&format!("{test_name} on {}", kind.name), &reason),
        }
    }
}

/// All there is, which is behind plugged blocks.
fn resident(rig: &Rig) -> u64 {
    let resident = rig.handle.resident_bytes().unwrap();
    assert_eq!(rig.handle.plugged_resident_bytes().unwrap(), resident);
    resident
}

/// Writes to each page of a block, as a guest does.
fn fill(rig: &Rig, kind: &Kind, block: u64) {
    let at = REGION + block * kind.block_size;
    for page in (at..at + kind.block_size).step_by(4096) {
        rig.write(page, &[TAG; 64]);
    }
}

/// The byte at the start and the byte in the last page of a block.
fn samples(rig: &Rig, kind: &Kind, block: u64) -> [u8; 2] {
    let at = REGION + block * kind.block_size;
    [at, at + kind.block_size - 4096].map(|addr| {
        let mut byte = [0];
        rig.read(addr, &mut byte);
        byte[0]
    })
}

#[test]
fn unplugged_memory_goes_back_to_the_host() {
    on_every_backing("reclaim", 2, |kind, mut rig| {
        assert_eq!(resident(&rig), 0);
        assert_eq!(plug(&mut rig, kind, 3, 2), Response::Ack);
        fill(&rig, kind, 3);
        fill(&rig, kind, 4);
        let before = resident(&rig);
        assert_eq!(before, 2 * kind.block_size, "{}", kind.name);
        assert_eq!(unplug(&mut rig, kind, 3, 1), Response::Ack);
        let half = resident(&rig);
        assert_eq!(half, kind.block_size, "{}", kind.name);
        assert_eq!(
            samples(&rig, kind, 4),
            [TAG; 2],
            "the neighbour keeps its contents"
        );
        assert_eq!(unplug(&mut rig, kind, 4, 1), Response::Ack);
        let after = resident(&rig);
        println!(
            "{}: resident {} KiB plugged and filled, {} KiB half unplugged, {} KiB unplugged",
            kind.name,
            before >> 10,
            half >> 10,
            after >> 10
        );
        assert_eq!(after, 0, "{}", kind.name);
    });
}

#[test]
fn block_plugged_again_is_empty_whatever_it_held() {
    on_every_backing("plug again", 2, |kind, mut rig| {
        for _ in 0..3 {
            assert_eq!(plug(&mut rig, kind, 0, 2), Response::Ack);
            fill(&rig, kind, 0);
            fill(&rig, kind, 1);
            assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Ack);
            assert_eq!(plug(&mut rig, kind, 0, 2), Response::Ack);
            assert_eq!(samples(&rig, kind, 0), [0; 2], "{}", kind.name);
            assert_eq!(samples(&rig, kind, 1), [0; 2], "{}", kind.name);
            assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Ack);
        }
    });
}

#[test]
fn unplug_all_and_system_reset_leave_nothing_resident() {
    on_every_backing("unplug all", 2, |kind, mut rig| {
        for block in [0, 7] {
            assert_eq!(plug(&mut rig, kind, block, 1), Response::Ack);
            fill(&rig, kind, block);
        }
        assert_eq!(resident(&rig), 2 * kind.block_size, "{}", kind.name);
        assert_eq!(rig.unplug_all(), Response::Ack);
        assert_eq!(resident(&rig), 0, "{}", kind.name);
        assert_eq!(plug(&mut rig, kind, 1, 1), Response::Ack);
        fill(&rig, kind, 1);
        rig.device.system_reset().unwrap();
        assert_eq!(resident(&rig), 0, "{}", kind.name);
    });
}

/// The VMM's other devices, told by a rogue guest to write to the whole region.
#[test]
fn devices_that_are_sent_over_the_whole_region_make_no_more_resident_than_is_plugged() {
    on_every_backing("rogue device access", 2, |kind, mut rig| {
        for block in [1, 5] {
            assert_eq!(plug(&mut rig, kind, block, 1), Response::Ack);
        }
        let pages = BLOCKS * kind.block_size / 4096;
        let written = (0..pages)
            .filter(|page| {
                let at = GuestAddress(REGION + page * 4096);
                rig.memory.write_slice(&[TAG], at).is_ok()
            })
            .count() as u64;
        assert_eq!(written * 4096, 2 * kind.block_size, "{}", kind.name);
        let plugged = rig.handle.status().plugged_size;
        println!(
            "{}: resident {} KiB of {} KiB plugged",
            kind.name,
            resident(&rig) >> 10,
            plugged >> 10
        );
        assert!(resident(&rig) <= plugged, "{}", kind.name);
    });
}

/// Memory the VMM still holds cannot go, and refusing it loses nothing.
#[test]
fn refused_unplug_keeps_the_contents() {
    on_every_backing("refused unplug", 2, |kind, mut rig| {
        assert_eq!(plug(&mut rig, kind, 0, 2), Response::Ack);
        fill(&rig, kind, 0);
        fill(&rig, kind, 1);
        // Once before anything happened, once after the blocks were closed, once after their slot was removed.
        let memory = std::sync::Arc::clone(&rig.memory);
        let held = memory
            .get_slices(GuestAddress(REGION), 64, Permissions::ReadWrite)
            .unwrap()
            .collect::<Vec<_>>();
        assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Busy);
        drop(held);
        rig.faults.unmap.script(&[false]);
        assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Busy);
        rig.faults.discard.script(&[false]);
        assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Busy);
        assert_eq!(samples(&rig, kind, 0), [TAG; 2], "{}", kind.name);
        assert_eq!(samples(&rig, kind, 1), [TAG; 2], "{}", kind.name);
        assert_eq!(unplug(&mut rig, kind, 0, 2), Response::Ack);
    });
}

#[test]
fn populated_blocks_are_resident_when_the_plug_is_answered() {
    for kind in &KINDS {
        let _pages = match kind.pages(2) {
            Ok(pages) => pages,
            Err(reason) => {
                skip(&format!("populate on {}", kind.name), &reason);
                continue;
            }
        };
        let threads = NonZero::new(2).unwrap();
        let mut rig = rig_of(kind, |builder| builder.populate(threads));
        assert_eq!(plug(&mut rig, kind, 2, 2), Response::Ack);
        assert_eq!(resident(&rig), 2 * kind.block_size, "{}", kind.name);
        assert_eq!(unplug(&mut rig, kind, 2, 2), Response::Ack);
        assert_eq!(resident(&rig), 0, "{}", kind.name);
    }
}

#[test]
fn plug_that_cannot_be_populated_is_busy_and_leaves_nothing_resident() {
    // The second half of the region lies behind the end of its file, so that populating fails in the middle.
    let fd = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(128 * MIB).unwrap();
    let backing = PrivateFile::new(&file, 0, 128 * MIB).unwrap();
    let mut rig = Rig::with_backing(backing, |builder| {
        builder
            .requested_size(128 * MIB)
            .populate(NonZero::new(2).unwrap())
    });
    file.set_len(64 * MIB).unwrap();
    assert_eq!(rig.plug(0, 40), Response::Busy);
    assert_eq!(resident(&rig), 0);
    assert_eq!(rig.handle.status().plugged_size, 0);
    assert_eq!(rig.handle.counters().host_failures, 1);
    // What was discarded in undoing it is anonymous memory now.
    assert_eq!(rig.plug(0, 40), Response::Ack);
    assert_eq!(resident(&rig), 80 * MIB);
}

#[test]
fn plug_that_finds_no_pages_in_the_pool_is_busy_and_takes_none() {
    let kind = KINDS
        .iter()
        .find(|kind| kind.pool == Some(2 * MIB))
        .unwrap();
    let pages = match HugePages::reserve(2 * MIB, 3) {
        Ok(pages) => pages,
        Err(reason) => return skip("empty pool", &reason),
    };
    let mut rig = rig_of(kind, |builder| builder);
    let free = pages.free();
    assert_eq!(plug(&mut rig, kind, 0, 1), Response::Ack);
    fill(&rig, kind, 0);
    let more = free as u16;
    assert_eq!(plug(&mut rig, kind, 1, more), Response::Busy);
    assert_eq!(resident(&rig), kind.block_size);
    assert_eq!(samples(&rig, kind, 0), [TAG; 2]);
    assert_eq!(
        plug(&mut rig, kind, 1, more - 1),
        Response::Ack,
        "what there is"
    );
    for block in 1..u64::from(more) {
        fill(&rig, kind, block);
    }
    assert_eq!(rig.unplug_all(), Response::Ack);
    assert_eq!(resident(&rig), 0);
    assert_eq!(pages.free(), free);
}

#[test]
fn restored_block_shows_the_snapshot_until_it_is_unplugged() {
    let kind = KINDS
        .iter()
        .find(|kind| kind.name == "private file")
        .unwrap();
    let mut rig = rig_of(kind, |builder| builder);
    plug(&mut rig, kind, 0, 2);
    assert_eq!(samples(&rig, kind, 1), [SNAPSHOT_TAG; 2]);
    unplug(&mut rig, kind, 1, 1);
    plug(&mut rig, kind, 1, 1);
    assert_eq!(samples(&rig, kind, 1), [0; 2]);
    assert_eq!(samples(&rig, kind, 0), [SNAPSHOT_TAG; 2]);
}

#[test]
fn default_block_size_follows_from_the_backing() {
    for kind in &KINDS {
        let backing = (kind.make)(4 * kind.block_size).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION), backing);
        let geometry = device.build().unwrap().geometry();
        assert_eq!(geometry.block_size(), kind.block_size, "{}", kind.name);
    }
}

#[test]
fn blocks_the_backing_cannot_give_back_one_by_one_are_refused() {
    let build = |backing: Box<dyn Backing>, block_size| {
        let builder = VirtioMem::builder(GuestAddress(REGION), backing);
        builder
            .block_size(block_size)
            .build()
            .unwrap_err()
            .to_string()
    };
    let refusals = [
        build(Box::new(Hugetlb::pages_2m(GIB).unwrap()), MIB),
        build(Box::new(Hugetlb::pages_1g(GIB).unwrap()), 2 * MIB),
        build(Box::new(Anonymous::base_pages(GIB).unwrap()), 2048),
        build(Box::new(Memfd::new(GIB).unwrap()), 2048),
        // A part of a transparent huge page stays with the guest until the host is short of memory.
        build(Box::new(Anonymous::thp(GIB).unwrap()), MIB),
        // Half a million mappings that never merge.
        build(Box::new(Hugetlb::pages_2m(1 << 40).unwrap()), 2 * MIB),
    ];
    for refusal in refusals {
        println!("{refusal}");
        assert!(refusal.contains("block size"), "{refusal}");
    }
}

/// A hypervisor with no more than a given number of slots.
#[derive(Debug)]
struct FewSlots(u64);

impl SlotMapper for FewSlots {
    fn max_count(&self) -> u64 {
        self.0
    }

    fn map(&self, slot: &Slot) -> std::io::Result<()> {
        NoSlots.map(slot)
    }

    fn unmap(&self, slot: &Slot) -> std::io::Result<()> {
        NoSlots.unmap(slot)
    }
}

#[test]
fn default_slots_of_a_large_region_are_few_and_cover_it() {
    let of = |len| {
        let backing = Anonymous::base_pages(len).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION), backing);
        let device = device.build().unwrap();
        (device.slot_size(), device.max_slot_count())
    };
    assert_eq!(of(1 << 40), (4 * GIB, 256));
    assert_eq!(of(3 << 40), (16 * GIB, 192));
    assert_eq!(of(8 * GIB), (128 * MIB, 64));
    assert_eq!(of(200 * MIB), (128 * MIB, 2));
}

#[test]
fn region_that_may_need_more_slots_than_there_are_is_not_built() {
    let build = |available| {
        let backing = Anonymous::base_pages(GIB).unwrap();
        VirtioMem::builder(GuestAddress(REGION), backing)
            .slots(FewSlots(available))
            .build()
    };
    assert!(matches!(
        build(7),
        Err(BuildError::TooManySlots {
            needed: 8,
            available: 7
        })
    ));
    assert!(build(8).is_ok());
}

#[test]
fn what_is_measured_is_the_plugged_runs_or_all_as_asked() {
    let mut rig = Rig::with(1 << 40, |builder| builder.requested_size(8 * BLOCK));
    rig.plug(1, 2);
    rig.plug(7, 1);
    rig.fill(7, 1);
    assert_eq!(rig.handle.plugged_resident_bytes().unwrap(), BLOCK);
    let runs = vec![BLOCK..3 * BLOCK, 7 * BLOCK..8 * BLOCK];
    assert_eq!(*rig.faults.measured.lock().unwrap(), [runs]);
}

//! RAM streams: the dirty bitmap stays right when blocks come and go under it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "fixtures may fail as tests do"
)]

mod rig;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use rig::{BLOCK, GIB, Rig};
use virtio_mem::MemoryRegion;
use virtio_mem::wire::Response;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

const PAGE: usize = 4096;

/// Pages that are dirty, and forgets them.
fn harvest(region: &MemoryRegion<AtomicBitmap>) -> Vec<u64> {
    let MemoryRegion::Device(region) = region else {
        panic!("the region of a device");
    };
    let words = region.dirty_bitmap().get_and_reset();
    let bits = |(i, word): (usize, &u64)| {
        let word = *word;
        (0..64).filter_map(move |bit| (word >> bit & 1 != 0).then_some(i as u64 * 64 + bit))
    };
    words.iter().enumerate().flat_map(bits).collect()
}

/// The other side of a migration: what it has of each page of the region.
fn stream_round(
    source: &Rig,
    region: &MemoryRegion<AtomicBitmap>,
    destination: &mut BTreeMap<u64, Vec<u8>>,
) {
    for page in harvest(region) {
        let at = page * PAGE as u64;
        match source.handle.plugged().contains(at / BLOCK) {
            true => {
                let mut contents = vec![0; PAGE];
                region
                    .read_slice(&mut contents, MemoryRegionAddress(at))
                    .unwrap();
                destination.insert(page, contents);
            }
            false => drop(destination.remove(&page)),
        }
    }
}

#[test]
fn plug_and_discard_dirty_the_whole_block_and_refusals_do_not() {
    let mut rig = Rig::new();
    let pages = NonZeroUsize::new(PAGE).unwrap();
    let region = rig
        .device
        .region(AtomicBitmap::new((4 * GIB) as usize, pages));
    let of = |first: u64, count: u64| (first * 512..(first + count) * 512).collect::<Vec<_>>();
    rig.plug(0, 2);
    assert_eq!(harvest(&region), of(0, 2));
    region
        .write_obj(7u32, MemoryRegionAddress(PAGE as u64))
        .unwrap();
    assert_eq!(harvest(&region), [1]);
    rig.faults.discard.script(&[false]);
    assert_eq!(rig.unplug(0, 1), Response::Busy);
    rig.faults.map.script(&[false]);
    assert_eq!(rig.plug(64, 1), Response::Busy);
    assert!(harvest(&region).is_empty());
    rig.unplug(0, 1);
    assert_eq!(harvest(&region), of(0, 1));
    rig.plug(4, 1);
    harvest(&region);
    rig.unplug_all();
    assert_eq!(
        harvest(&region),
        [of(1, 1), of(4, 1)].concat(),
        "what lies between has not changed"
    );
    assert_eq!(region.len(), 4 * GIB);
}

/// A stream that follows the dirty bitmap never leaves the other side with contents of a block that was
/// discarded, not even if the block is plugged again.
#[test]
fn stream_across_discards_ends_with_the_contents_of_the_source() {
    let mut rig = Rig::new();
    let pages = NonZeroUsize::new(PAGE).unwrap();
    let region = rig
        .device
        .region(AtomicBitmap::new((4 * GIB) as usize, pages));
    let write = |byte: u8, block: u64| {
        let contents = vec![byte; BLOCK as usize];
        region
            .write_slice(&contents, MemoryRegionAddress(block * BLOCK))
            .unwrap();
    };
    let mut destination = BTreeMap::new();
    rig.plug(0, 3);
    (0..3).for_each(|block| write(block as u8 + 1, block));
    stream_round(&rig, &region, &mut destination);
    assert_eq!(destination.len(), 3 * 512);
    rig.unplug(0, 2);
    rig.plug(1, 1);
    write(9, 2);
    stream_round(&rig, &region, &mut destination);
    rig.handle.freeze();
    assert_eq!(rig.unplug(2, 1), Response::Busy);
    stream_round(&rig, &region, &mut destination);
    assert_eq!(destination.len(), 2 * 512, "block 0 is gone");
    for (page, contents) in &destination {
        let mut here = vec![0; PAGE];
        let at = MemoryRegionAddress(page * PAGE as u64);
        region.read_slice(&mut here, at).unwrap();
        assert_eq!(contents, &here, "page {page}");
    }
    assert!(
        destination[&512].iter().all(|byte| *byte == 0),
        "not 2, which was discarded"
    );
}

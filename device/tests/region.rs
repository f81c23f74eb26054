//! The region as the VMM's other devices see it.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rig::{BLOCK, REGION, Rig};
use virtio_mem::MemoryRegion;
use virtio_mem::wire::Response;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
    Permissions,
};

/// The region of the rig's device.
fn region(rig: &Rig) -> &MemoryRegion {
    rig.memory
        .find_region(GuestAddress(REGION))
        .expect("the region of the rig")
}

#[test]
fn every_kind_of_access_to_an_unplugged_block_is_an_error() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    let at = MemoryRegionAddress(BLOCK);
    let region = region(&rig);
    let mut buffer = [0; 4];
    assert!(region.write(&buffer, at).is_err());
    assert!(region.read(&mut buffer, at).is_err());
    assert!(region.write_slice(&buffer, at).is_err());
    assert!(region.read_slice(&mut buffer, at).is_err());
    assert!(region.store(0u32, at, Ordering::Relaxed).is_err());
    assert!(region.load::<u32>(at, Ordering::Relaxed).is_err());
    assert!(
        region
            .read_volatile_from(at, &mut [0u8; 4].as_slice(), 4)
            .is_err()
    );
    assert!(
        region
            .read_exact_volatile_from(at, &mut [0u8; 4].as_slice(), 4)
            .is_err()
    );
    assert!(
        region
            .write_volatile_to(at, &mut [0u8; 4].as_mut_slice(), 4)
            .is_err()
    );
    assert!(
        region
            .write_all_volatile_to(at, &mut [0u8; 4].as_mut_slice(), 4)
            .is_err()
    );
    assert!(region.get_slice(at, 1).is_err());
    assert!(
        region.get_host_address(MemoryRegionAddress(0)).is_err(),
        "nothing would pin the block"
    );
    // And by way of the collection, as other devices do it.
    assert!(!GuestMemory::check_range(
        &*rig.memory,
        GuestAddress(REGION + BLOCK),
        4,
        Permissions::Write
    ));
    assert!(
        rig.memory
            .write_obj(1u32, GuestAddress(REGION + BLOCK - 2))
            .is_err()
    );
    assert!(
        rig.memory
            .write_obj(1u32, GuestAddress(REGION + BLOCK - 4))
            .is_ok()
    );
}

#[test]
fn every_kind_of_access_to_a_plugged_block_works() {
    let mut rig = Rig::new();
    rig.plug(1, 1);
    let at = MemoryRegionAddress(BLOCK);
    let region = region(&rig);
    assert_eq!(region.write(b"abcd", at).unwrap(), 4);
    let mut buffer = [0; 4];
    assert_eq!(region.read(&mut buffer, at).unwrap(), 4);
    assert_eq!(&buffer, b"abcd");
    region.write_slice(b"efgh", at).unwrap();
    region.read_slice(&mut buffer, at).unwrap();
    assert_eq!(&buffer, b"efgh");
    region.store(7u32, at, Ordering::Relaxed).unwrap();
    assert_eq!(region.load::<u32>(at, Ordering::Relaxed).unwrap(), 7);
    assert_eq!(
        region
            .read_volatile_from(at, &mut b"ijkl".as_slice(), 4)
            .unwrap(),
        4
    );
    region
        .read_exact_volatile_from(at, &mut b"mnop".as_slice(), 4)
        .unwrap();
    assert_eq!(
        region
            .write_volatile_to(at, &mut buffer.as_mut_slice(), 4)
            .unwrap(),
        4
    );
    region
        .write_all_volatile_to(at, &mut buffer.as_mut_slice(), 4)
        .unwrap();
    assert_eq!(&buffer, b"mnop");
    assert!(region.file_offset().is_none());
}

#[test]
fn accesses_outside_the_region_are_errors() {
    let mut rig = Rig::new();
    rig.plug(0, 1);
    let region = region(&rig);
    for offset in [region.len(), region.len() - 1, u64::MAX] {
        assert!(region.get_slice(MemoryRegionAddress(offset), 2).is_err());
    }
    assert!(
        region
            .get_slice(MemoryRegionAddress(0), 0)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn ordinary_memory_beside_the_region_is_as_ever() {
    let rig = Rig::new();
    let ram = rig.memory.find_region(GuestAddress(0)).unwrap();
    assert!(ram.get_host_address(MemoryRegionAddress(0)).is_ok());
    ram.write_slice(b"ram", MemoryRegionAddress(100)).unwrap();
    assert_eq!(
        ram.load::<u8>(MemoryRegionAddress(100), Ordering::Relaxed)
            .unwrap(),
        b'r'
    );
    assert!(!ram.bitmap().dirty_at(0));
}

/// What another device holds a slice of cannot be unplugged under it.
#[test]
fn slice_in_use_keeps_its_block_plugged_and_its_end_is_told() {
    let mut rig = Rig::new();
    rig.plug(0, 4);
    let memory = Arc::clone(&rig.memory);
    let slice = memory
        .get_slice(GuestAddress(REGION + BLOCK + 100), 64)
        .unwrap();
    let part = slice.subslice(8, 8).unwrap();
    drop(slice);
    assert_eq!(
        rig.unplug(1, 1),
        Response::Busy,
        "a part of it is still there"
    );
    assert_eq!(rig.unplug(2, 2), Response::Ack);
    assert_eq!(rig.notifications.config(), 0);
    part.write_slice(b"held", 0).unwrap();
    drop(part);
    assert_eq!(rig.notifications.config(), 1);
    assert_eq!(rig.unplug(1, 1), Response::Ack);
}

/// The end of a pin is told although other blocks are pinned all the time.
#[test]
fn end_of_a_pin_is_told_whatever_else_is_pinned() {
    let mut rig = Rig::new();
    rig.plug(0, 4);
    let memory = Arc::clone(&rig.memory);
    let slice = |block| {
        memory
            .get_slice(GuestAddress(REGION + block * BLOCK), 64)
            .unwrap()
    };
    let (held, busy) = (slice(3), slice(1));
    assert_eq!(rig.unplug(1, 1), Response::Busy);
    drop(busy);
    assert_eq!(rig.notifications.config(), 1);
    assert_eq!(rig.unplug(1, 1), Response::Ack);
    drop(held);
    assert_eq!(rig.notifications.config(), 1);
}

/// Another device writes to guest memory as fast as it can while blocks come and go: each access works or is
/// refused, none faults, and nothing is left behind.
#[test]
fn dma_that_races_plug_and_unplug_is_served_or_refused() {
    let mut rig = Rig::new();
    let memory = Arc::clone(&rig.memory);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| {
            let (mut served, mut refused) = (0u64, 0u64);
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) || served == 0 || refused == 0 {
                at = (at + 4096) % (8 * BLOCK);
                match memory.write_obj(at, GuestAddress(REGION + at)) {
                    Ok(()) => served += 1,
                    Err(_) => refused += 1,
                }
            }
            (served, refused)
        });
        for _ in 0..300 {
            while rig.plug(0, 4) != Response::Ack {}
            while rig.unplug(0, 4) != Response::Ack {}
        }
        rig.plug(0, 4);
        stop.store(true, Ordering::Relaxed);
        let (served, refused) = dma.join().unwrap();
        assert!(served > 0 && refused > 0);
    });
    while rig.unplug_all() != Response::Ack {}
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
}

//! What the guest does with each of its plugged blocks, for who looks at it from outside.

use core::sync::atomic::{AtomicU64, Ordering};

use virtio_mem_driver::hotplug::{BlockState, Hotplug, PhysicalMemory, ZoneKind};
use virtio_mem_wire::{BlockMap, Geometry};

use crate::abi::map;

/// Publishes which blocks of `plugged` are in use, and how, in all maps of `view` but the first.
pub(crate) fn publish<M: PhysicalMemory>(
    hotplug: &Hotplug<M>,
    plugged: &BlockMap,
    geometry: &Geometry,
    view: &[AtomicU64],
) {
    let words = view.len() / map::COUNT;
    for cell in &view[words..] {
        cell.store(0, Ordering::Relaxed);
    }
    let place = |map: usize, block: u64| {
        let word = map * words + (block / u64::from(u64::BITS)) as usize;
        (&view[word], 1 << (block % u64::from(u64::BITS)))
    };
    let set = |map: usize, block: u64| {
        let (cell, bit) = place(map, block);
        cell.fetch_or(bit, Ordering::Relaxed);
    };
    let is_online = |block: u64| {
        let (cell, bit) = place(map::ONLINE, block);
        cell.load(Ordering::Relaxed) & bit != 0
    };
    for block in plugged.runs().flat_map(|run| run.first..run.end()) {
        if let Some(zone) = zone_of(hotplug, geometry, block) {
            set(map::ONLINE, block);
            if zone == ZoneKind::Movable {
                set(map::MOVABLE, block);
            }
        }
    }
    for page in hotplug.fixed_pages() {
        let offset = page.checked_sub(geometry.addr());
        let block = offset.map(|offset| offset / geometry.block_size());
        if let Some(block) = block.filter(|block| *block < plugged.len() && is_online(*block)) {
            set(map::PINNED, block);
        }
    }
}

/// The zone of a device block that the page allocator works with; of several, one that is not Movable.
fn zone_of<M: PhysicalMemory>(
    hotplug: &Hotplug<M>,
    geometry: &Geometry,
    block: u64,
) -> Option<ZoneKind> {
    let profile = hotplug.profile();
    let start = geometry.addr() + block * geometry.block_size();
    let end = start + geometry.block_size();
    // Withheld are whole pageblocks, which a device block may be less than.
    let first = start / profile.pageblock_size() * profile.pageblock_size();
    let size = end.next_multiple_of(profile.pageblock_size()) - first;
    if hotplug.withheld(first, size) != Ok(Some(false)) {
        return None;
    }
    let ids = profile.memory_block_id(start)..=profile.memory_block_id(end - 1);
    let mut found = None;
    for id in ids {
        let memory_block = hotplug.block(id)?;
        let online = memory_block.state != BlockState::Offline;
        let zone = memory_block.zone.filter(|_| online)?;
        found = found
            .filter(|zone| *zone != ZoneKind::Movable)
            .or(Some(zone));
    }
    found
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "pages are raw memory")]

    use alloc::boxed::Box;
    use core::array;
    use core::cell::UnsafeCell;
    use core::ptr::NonNull;

    use virtio_mem_driver::hotplug::{AddMemory, Mobility, OnlineType, Profile};
    use virtio_mem_wire::BlockRange;

    use super::*;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;
    const START: u64 = 4 << 30;

    /// One page for all addresses: nobody looks at contents here.
    struct OnePage(Box<UnsafeCell<[u64; 512]>>);

    // SAFETY: The page lives as long as this; it has no contents anybody relies on.
    unsafe impl PhysicalMemory for OnePage {
        fn page(&self, _: u64) -> NonNull<u8> {
            NonNull::new(self.0.get()).unwrap().cast()
        }
    }

    /// Four memory blocks: in Movable, in Normal, offline, not added. Device blocks of `block_size`.
    fn guest(block_size: u64) -> (Hotplug<OnePage>, Geometry) {
        let memory = OnePage(Box::new(UnsafeCell::new([0; 512])));
        let mut hotplug = Hotplug::new(Profile::X86_64, memory).unwrap();
        let memory = AddMemory::new(START, 3 * BLOCK);
        hotplug.add_memory(&memory).unwrap();
        hotplug.online(32, OnlineType::Movable).unwrap();
        hotplug.online(33, OnlineType::Kernel).unwrap();
        let geometry = Geometry::new(START, 4 * BLOCK, block_size).unwrap();
        (hotplug, geometry)
    }

    /// Online, movable and pinned blocks.
    fn maps(hotplug: &Hotplug<OnePage>, geometry: &Geometry) -> [Vec<u64>; 3] {
        let count = geometry.block_count();
        let words = count.div_ceil(64) as usize;
        // What was there before is gone.
        let view: Vec<_> = (0..map::COUNT * words)
            .map(|_| AtomicU64::new(u64::MAX))
            .collect();
        let mut plugged = BlockMap::new(count);
        plugged.insert(BlockRange { first: 0, count });
        publish(hotplug, &plugged, geometry, &view);
        let bit = |map: usize, block: u64| {
            let word = &view[map * words + block as usize / 64];
            word.load(Ordering::Relaxed) >> (block % 64) & 1 != 0
        };
        assert!(
            (0..count).all(|block| bit(map::PLUGGED, block)),
            "not its map"
        );
        array::from_fn(|map| (0..count).filter(|block| bit(map + 1, *block)).collect())
    }

    #[test]
    fn blocks_are_online_and_movable_as_their_memory_block_is() {
        let all = |range: core::ops::Range<u64>| range.collect::<Vec<_>>();
        let (mut hotplug, geometry) = guest(2 * MIB);
        assert_eq!(
            maps(&hotplug, &geometry),
            [all(0..128), all(0..64), all(0..0)]
        );
        hotplug.fake_offline(START + 4 * MIB, 2 * MIB).unwrap();
        let online: Vec<_> = (0..128).filter(|block| *block != 2).collect();
        assert_eq!(maps(&hotplug, &geometry)[0], online);
        // Blocks of half a pageblock, and of two memory blocks in different zones.
        let (hotplug, geometry) = guest(MIB);
        assert_eq!(
            maps(&hotplug, &geometry),
            [all(0..256), all(0..128), all(0..0)]
        );
        let (hotplug, geometry) = guest(2 * BLOCK);
        assert_eq!(maps(&hotplug, &geometry), [all(0..1), all(0..0), all(0..0)]);
    }

    #[test]
    fn blocks_are_pinned_while_a_page_of_theirs_cannot_be_moved() {
        let (mut hotplug, geometry) = guest(2 * MIB);
        let block_of = |address: u64| (address - START) / (2 * MIB);
        let movable = hotplug.allocate(Mobility::Movable).unwrap();
        assert_eq!(maps(&hotplug, &geometry)[2], []);
        hotplug.pin(movable).unwrap();
        let pinned = block_of(hotplug.address(movable).unwrap());
        assert_eq!(maps(&hotplug, &geometry)[2], [pinned]);
        let kernel = hotplug.allocate(Mobility::Unmovable).unwrap();
        let unmovable = block_of(hotplug.address(kernel).unwrap());
        assert!(unmovable >= 64);
        assert_eq!(maps(&hotplug, &geometry)[2], [pinned, unmovable]);
        hotplug.unpin(movable).unwrap();
        hotplug.free(kernel).unwrap();
        assert_eq!(maps(&hotplug, &geometry)[2], []);
    }
}

//! The hotplug core by itself: what each operation refuses, and what holds whatever is done.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod memory;
mod random;

use proptest::prelude::*;
use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Boot, BootRange, Config, Error, Fault, Hotplug, Migration, Mobility,
    Obstacle, OnlineType, Owner, Profile, Step,
};

use memory::{BLOCK, BLOCK_COUNT, HostMemory, PAGE, PAGEBLOCK, SMALL, START, read, write};

/// `count` memory blocks at [`START`], added and online.
fn online(count: u64) -> Hotplug<HostMemory> {
    let mut hotplug = Hotplug::new(SMALL, HostMemory::new()).unwrap();
    hotplug
        .add_memory(&AddMemory::new(START, count * BLOCK))
        .unwrap();
    for id in START / BLOCK..START / BLOCK + count {
        hotplug.online(id, OnlineType::Kernel).unwrap();
    }
    hotplug
}

const FIRST: u64 = START / BLOCK;
const BLOCK_PAGES: u64 = BLOCK / PAGE;

#[test]
fn profile_whose_units_do_not_fit_into_each_other_is_refused() {
    for wrong in [
        Profile {
            pageblock_shift: 28,
            ..Profile::X86_64
        },
        Profile {
            section_shift: 28,
            ..Profile::X86_64
        },
        Profile {
            sub_section_shift: 12,
            ..Profile::X86_64
        },
        Profile {
            memory_block_shift: 64,
            ..Profile::X86_64
        },
    ] {
        assert_eq!(
            Hotplug::new(wrong, HostMemory::new()).unwrap_err(),
            Error::Invalid
        );
    }
}

#[test]
fn memory_is_added_in_whole_memory_blocks_and_once() {
    let mut hotplug = Hotplug::new(SMALL, HostMemory::new()).unwrap();
    for (start, size) in [(START, 0), (START + PAGEBLOCK, BLOCK), (START, PAGEBLOCK)] {
        assert_eq!(
            hotplug.add_memory(&AddMemory::new(start, size)),
            Err(Error::Invalid)
        );
    }
    for (start, size) in [
        (u64::MAX - BLOCK + 1, BLOCK),
        (START, u64::MAX),
        (1 << 46, BLOCK),
    ] {
        assert_eq!(
            hotplug.add_memory(&AddMemory::new(start, size)),
            Err(Error::TooBig)
        );
    }
    hotplug
        .add_memory(&AddMemory::new(START + BLOCK, BLOCK))
        .unwrap();
    for (start, size) in [
        (START + BLOCK, BLOCK),
        (START, 3 * BLOCK),
        (START + BLOCK + PAGE, PAGE),
    ] {
        assert_eq!(
            hotplug.add_memory(&AddMemory::new(start, size)),
            Err(Error::Exists)
        );
    }
    assert_eq!(
        hotplug
            .blocks()
            .map(|b| (b.id, b.state))
            .collect::<Vec<_>>(),
        [(FIRST + 1, BlockState::Offline)]
    );
    hotplug.check_invariants().unwrap();
}

#[test]
fn memory_is_removed_when_all_of_it_is_offline() {
    let mut hotplug = online(2);
    assert_eq!(
        hotplug.remove_memory(Owner::PROBE, START, BLOCK),
        Err(Error::Busy)
    );
    hotplug.offline(FIRST).unwrap();
    assert_eq!(
        hotplug.remove_memory(Owner::PROBE, START, 2 * BLOCK),
        Err(Error::Busy)
    );
    assert_eq!(
        hotplug.remove_memory(Owner::PROBE, START, 3 * BLOCK),
        Err(Error::Invalid)
    );
    assert_eq!(
        hotplug.remove_memory(Owner::PROBE, START, PAGEBLOCK),
        Err(Error::Invalid)
    );
    hotplug.remove_memory(Owner::PROBE, START, BLOCK).unwrap();
    assert_eq!(hotplug.block_state(FIRST), None);
    assert_eq!(hotplug.offline(FIRST), Err(Error::Invalid));
    hotplug.check_invariants().unwrap();
}

#[test]
fn online_and_offline_need_the_other_state() {
    let mut hotplug = online(1);
    assert_eq!(
        hotplug.online(FIRST, OnlineType::Kernel),
        Err(Error::Invalid)
    );
    hotplug.offline(FIRST).unwrap();
    assert_eq!(hotplug.offline(FIRST), Err(Error::Invalid));
    assert_eq!(
        hotplug.online(FIRST + 1, OnlineType::Kernel),
        Err(Error::Invalid)
    );
    assert_eq!(hotplug.counts(), Default::default());
}

#[test]
fn withheld_pages_are_present_but_not_managed() {
    let mut hotplug = Hotplug::new(SMALL, HostMemory::new()).unwrap();
    hotplug.add_memory(&AddMemory::new(START, BLOCK)).unwrap();
    hotplug
        .fake_offline(START + PAGEBLOCK, BLOCK - PAGEBLOCK)
        .unwrap();
    hotplug.online(FIRST, OnlineType::Kernel).unwrap();
    let counts = hotplug.counts();
    assert_eq!((counts.present, counts.managed), (BLOCK_PAGES, 4));
    // What is withheld already cannot be taken, what is not cannot be given back.
    assert_eq!(
        hotplug.fake_offline(START + PAGEBLOCK, PAGEBLOCK),
        Err(Error::Busy)
    );
    assert_eq!(hotplug.fake_online(START, PAGEBLOCK), Err(Error::Invalid));
    assert_eq!(
        hotplug.fake_online(START, 2 * PAGEBLOCK),
        Err(Error::Invalid)
    );
    hotplug
        .fake_online(START + PAGEBLOCK, BLOCK - PAGEBLOCK)
        .unwrap();
    assert_eq!(hotplug.counts().managed, BLOCK_PAGES);
    hotplug.check_invariants().unwrap();
}

#[test]
fn pages_are_allocated_from_the_lowest_address() {
    let mut hotplug = online(2);
    let handles: Vec<_> = (0..6)
        .map(|_| hotplug.allocate(Mobility::Movable).unwrap())
        .collect();
    for (index, handle) in handles.iter().enumerate() {
        assert_eq!(hotplug.address(*handle), Ok(START + index as u64 * PAGE));
    }
    hotplug.free(handles[1]).unwrap();
    let again = hotplug.allocate(Mobility::Movable).unwrap();
    assert_eq!(hotplug.address(again), Ok(START + PAGE));
    assert_eq!(hotplug.free(handles[1]), Err(Error::Invalid));
    assert_eq!(hotplug.pin(handles[1]), Err(Error::Invalid));
}

#[test]
fn offlining_moves_pages_with_their_contents() {
    let mut hotplug = online(2);
    let handles: Vec<_> = (0..BLOCK_PAGES)
        .map(|tag| {
            let handle = hotplug.allocate(Mobility::Movable).unwrap();
            write(&mut hotplug, handle, tag);
            handle
        })
        .collect();
    hotplug.offline(FIRST).unwrap();
    for (tag, handle) in handles.iter().enumerate() {
        assert!(hotplug.address(*handle).unwrap() >= START + BLOCK);
        assert_eq!(read(&mut hotplug, *handle), tag as u64);
    }
    assert_eq!(hotplug.statistics().pages_migrated, BLOCK_PAGES);
    hotplug.check_invariants().unwrap();
    // Now there is no room for them anywhere else.
    assert_eq!(hotplug.offline(FIRST + 1), Err(Error::NoMemory));
    assert_eq!(hotplug.block_state(FIRST + 1), Some(BlockState::Online));
    hotplug.check_invariants().unwrap();
}

#[test]
fn nothing_is_moved_where_not_everything_can_be() {
    let mut hotplug = online(2);
    for _ in 0..BLOCK_PAGES + BLOCK_PAGES / 2 {
        hotplug.allocate(Mobility::Movable).unwrap();
    }
    assert_eq!(hotplug.offline(FIRST), Err(Error::NoMemory));
    assert_eq!(hotplug.statistics().pages_migrated, 0);
    hotplug.check_invariants().unwrap();
}

#[test]
fn pinned_page_makes_its_range_busy_and_everything_is_undone() {
    let mut hotplug = online(2);
    let pages: Vec<_> = (0..8)
        .map(|_| hotplug.allocate(Mobility::Movable).unwrap())
        .collect();
    hotplug.pin(pages[5]).unwrap();
    let counts = hotplug.counts();
    assert_eq!(hotplug.offline(FIRST), Err(Error::Busy));
    assert_eq!(hotplug.fake_offline(START, BLOCK), Err(Error::Busy));
    assert_eq!(hotplug.counts(), counts);
    assert_eq!(hotplug.address(pages[5]), Ok(START + 5 * PAGE));
    assert_eq!(hotplug.free(pages[5]), Err(Error::Busy));
    hotplug.check_invariants().unwrap();
    // Around it everything can be emptied.
    hotplug.fake_offline(START, PAGEBLOCK).unwrap();
    hotplug.unpin(pages[5]).unwrap();
    hotplug.fake_offline(START + PAGEBLOCK, PAGEBLOCK).unwrap();
    hotplug.check_invariants().unwrap();
}

#[test]
fn unmovable_page_is_noticed_before_anything_is_moved() {
    let mut hotplug = online(2);
    hotplug.allocate(Mobility::Movable).unwrap();
    let unmovable = hotplug.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(hotplug.offline(FIRST), Err(Error::Busy));
    assert_eq!(hotplug.statistics().pages_migrated, 0);
    hotplug.free(unmovable).unwrap();
    hotplug.offline(FIRST).unwrap();
    hotplug.check_invariants().unwrap();
}

#[test]
fn isolated_pages_are_not_allocated_and_isolation_is_exclusive() {
    let mut hotplug = online(1);
    let page = hotplug.allocate(Mobility::Movable).unwrap();
    let isolation = hotplug.isolate(START, PAGEBLOCK).unwrap();
    assert!(matches!(
        hotplug.isolate(START, 2 * PAGEBLOCK),
        Err(Error::Busy)
    ));
    assert!(matches!(hotplug.isolate_block(FIRST), Err(Error::Busy)));
    // Freed into the isolated range, it stays there.
    hotplug.free(page).unwrap();
    let next = hotplug.allocate(Mobility::Movable).unwrap();
    assert_eq!(hotplug.address(next), Ok(START + PAGEBLOCK));
    hotplug.check_invariants().unwrap();
    hotplug.cancel(isolation);
    let lowest = hotplug.allocate(Mobility::Movable).unwrap();
    assert_eq!(hotplug.address(lowest), Ok(START));
    hotplug.check_invariants().unwrap();
}

#[test]
fn block_being_emptied_is_going_offline_and_can_come_back() {
    let mut hotplug = online(2);
    for _ in 0..3 {
        hotplug.allocate(Mobility::Movable).unwrap();
    }
    let isolation = hotplug.isolate_block(FIRST).unwrap();
    assert_eq!(hotplug.block_state(FIRST), Some(BlockState::GoingOffline));
    assert_eq!(
        hotplug.online(FIRST, OnlineType::Kernel),
        Err(Error::Invalid)
    );
    assert_eq!(
        hotplug.remove_memory(Owner::PROBE, START, BLOCK),
        Err(Error::Busy)
    );
    // Two pages a step, and three to move.
    assert_eq!(hotplug.migrate(&isolation, 2), Ok(Migration::More));
    hotplug.check_invariants().unwrap();
    assert_eq!(hotplug.statistics().pages_migrated, 2);
    assert_eq!(hotplug.migrate(&isolation, 2), Ok(Migration::Done));
    hotplug.cancel(isolation);
    assert_eq!(hotplug.block_state(FIRST), Some(BlockState::Online));
    hotplug.check_invariants().unwrap();
}

#[test]
fn commit_before_the_range_is_empty_undoes_everything() {
    let mut hotplug = online(2);
    hotplug.allocate(Mobility::Movable).unwrap();
    let isolation = hotplug.isolate_block(FIRST).unwrap();
    assert_eq!(hotplug.commit(isolation), Err(Error::Busy));
    assert_eq!(hotplug.block_state(FIRST), Some(BlockState::Online));
    hotplug.check_invariants().unwrap();
}

#[test]
fn errors_have_the_names_linux_gives_them() {
    let names =
        [Error::Invalid, Error::Exists, Error::Busy, Error::NoMemory].map(Error::errno_name);
    assert_eq!(names, ["EINVAL", "EEXIST", "EBUSY", "ENOMEM"]);
}

#[test]
fn pinned_page_is_not_freed_even_if_it_can_never_be_moved() {
    let mut hotplug = online(2);
    let page = hotplug.allocate(Mobility::Unmovable).unwrap();
    hotplug.pin(page).unwrap();
    assert_eq!(hotplug.free(page), Err(Error::Busy));
    hotplug.unpin(page).unwrap();
    assert_eq!(hotplug.unpin(page), Err(Error::Invalid));
    hotplug.free(page).unwrap();
    hotplug.check_invariants().unwrap();
}

#[test]
fn isolation_of_another_machine_or_one_that_is_over_is_refused() {
    let mut hotplug = online(2);
    let mut other = online(2);
    let isolation = hotplug.isolate(START, PAGEBLOCK).unwrap();
    assert_eq!(other.migrate(&isolation, 1), Err(Error::Invalid));
    assert_eq!(other.commit(isolation), Err(Error::Invalid));
    other.cancel(isolation);
    hotplug.commit(isolation).unwrap();
    assert_eq!(hotplug.migrate(&isolation, 1), Err(Error::Invalid));
    assert_eq!(hotplug.commit(isolation), Err(Error::Invalid));
    hotplug.cancel(isolation);
    assert_eq!(hotplug.counts().managed, 2 * BLOCK_PAGES - 4);
    hotplug.check_invariants().unwrap();
}

#[test]
fn isolation_that_was_lost_can_be_cancelled() {
    let mut hotplug = online(2);
    let _lost = hotplug.isolate_block(FIRST).unwrap();
    let found: Vec<_> = hotplug.isolations().collect();
    assert_eq!(found.len(), 1);
    hotplug.cancel(found[0]);
    assert_eq!(hotplug.block_state(FIRST), Some(BlockState::Online));
    assert_eq!(hotplug.isolations().count(), 0);
}

#[test]
fn block_is_going_offline_until_there_is_room_for_what_is_in_it() {
    let mut hotplug = online(2);
    let pages: Vec<_> = (0..BLOCK_PAGES * 3 / 2)
        .map(|_| hotplug.allocate(Mobility::Movable).unwrap())
        .collect();
    assert_eq!(hotplug.offline(FIRST), Err(Error::NoMemory));
    let isolation = hotplug.isolate_block(FIRST).unwrap();
    assert_eq!(hotplug.migrate(&isolation, u32::MAX), Err(Error::NoMemory));
    assert_eq!(hotplug.block_state(FIRST), Some(BlockState::GoingOffline));
    for page in pages.iter().rev().take(BLOCK_PAGES as usize / 2) {
        hotplug.free(*page).unwrap();
    }
    assert_eq!(hotplug.migrate(&isolation, u32::MAX), Ok(Migration::Done));
    hotplug.commit(isolation).unwrap();
    hotplug.check_invariants().unwrap();
}

#[test]
fn page_that_cannot_be_moved_for_a_moment_is_moved_in_a_later_pass() {
    let mut hotplug = online(2);
    hotplug.allocate(Mobility::Movable).unwrap();
    for _ in 0..4 {
        hotplug.inject(Fault {
            step: Step::Migrate,
            skip: 0,
            error: Error::Busy,
        });
    }
    hotplug.offline(FIRST).unwrap();
    assert_eq!(hotplug.clear_faults(), 0);
    assert_eq!(hotplug.statistics().pages_migrated, 1);
}

#[test]
fn memory_that_was_added_in_parts_is_removed_in_one_go() {
    let mut hotplug = Hotplug::new(SMALL, HostMemory::new()).unwrap();
    for block in 0..3 {
        hotplug
            .add_memory(&AddMemory::new(START + block * BLOCK, BLOCK))
            .unwrap();
    }
    hotplug
        .remove_memory(Owner::PROBE, START, 2 * BLOCK)
        .unwrap();
    assert_eq!(hotplug.blocks().count(), 1);
    hotplug.check_invariants().unwrap();
}

#[test]
fn withheld_part_lies_in_the_memory_that_is_added() {
    let mut hotplug = Hotplug::new(SMALL, HostMemory::new()).unwrap();
    for withheld in [0..1 << 40, START + BLOCK..START + 2 * BLOCK] {
        let request = AddMemory {
            withheld,
            ..AddMemory::new(START, BLOCK)
        };
        assert_eq!(hotplug.add_memory(&request), Err(Error::Invalid));
    }
    assert_eq!(hotplug.blocks().count(), 0);
}

/// Memory blocks that were there at boot, with whatever may be in the way of one, and one that was added.
fn any_machine() -> impl Strategy<Value = Hotplug<HostMemory>> {
    let pages = BLOCK_PAGES * (BLOCK_COUNT - 1);
    let pageblock = || 0..pages * PAGE / PAGEBLOCK;
    let boot = (
        prop::bool::weighted(0.9),
        prop::option::weighted(0.3, 1..pages),
        prop::option::weighted(0.3, pageblock()),
        prop::option::weighted(0.3, (0..pages, 1..6u64)),
        prop::option::weighted(0.3, pageblock()),
    );
    let pages = prop::collection::vec(
        (prop::bool::weighted(0.05), prop::bool::weighted(0.05)),
        0..80,
    );
    let isolated = prop::option::weighted(0.3, pageblock());
    let left = prop::option::weighted(0.3, 0..BLOCK_COUNT);
    (boot, pages, isolated, left).prop_map(|(boot, pages, isolated, left)| {
        let (hot_remove, hole, cma, reserved, movable_from) = boot;
        let end = START + (BLOCK_COUNT - 1) * BLOCK;
        let hole = hole.map_or(end..end, |page| {
            START + page * PAGE..START + (page + 1) * PAGE
        });
        let range = |bytes| BootRange { bytes, nid: 0 };
        let mut boot = Boot {
            ram: vec![range(START..hole.start), range(hole.end..end)],
            movable_from: movable_from
                .map(|index| (0, START + index * PAGEBLOCK))
                .into_iter()
                .collect(),
            ..Boot::default()
        };
        boot.ram.retain(|range| !range.bytes.is_empty());
        // Not in the hole, which is refused.
        let inside = |start: u64, size: u64| hole.end <= start || start + size <= hole.start;
        boot.cma = (cma.map(|index| START + index * PAGEBLOCK).into_iter())
            .filter(|start| inside(*start, PAGEBLOCK))
            .map(|start| start..start + PAGEBLOCK)
            .collect();
        boot.reserved = (reserved.into_iter())
            .map(|(page, count)| (START + page * PAGE, count * PAGE))
            .filter(|(start, size)| inside(*start, *size) && start + size <= end)
            .map(|(start, size)| start..start + size)
            .collect();
        let config = Config {
            hot_remove,
            ..Config::new(SMALL)
        };
        let mut hotplug = Hotplug::boot(config, &boot, HostMemory::new()).unwrap();
        hotplug.add_memory(&AddMemory::new(end, BLOCK)).unwrap();
        let added = FIRST + BLOCK_COUNT - 1;
        hotplug.online(added, OnlineType::Movable).unwrap();
        for (unmovable, pinned) in pages {
            let mobility = match unmovable {
                true => Mobility::Unmovable,
                false => Mobility::Movable,
            };
            if let Ok(page) = hotplug.allocate(mobility)
                && pinned
            {
                hotplug.pin(page).unwrap();
            }
        }
        if let Some(block) = left {
            let _refused_if_something_is_in_the_way = hotplug.offline(FIRST + block);
        }
        if let Some(index) = isolated {
            let _lost_and_still_there = hotplug.isolate(START + index * PAGEBLOCK, PAGEBLOCK);
        }
        hotplug
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn there_is_an_obstacle_exactly_where_offlining_is_refused(
        mut hotplug in any_machine(),
        going in prop::option::weighted(0.2, 0..BLOCK_COUNT),
    ) {
        if let Some(block) = going {
            let _lost_and_still_there = hotplug.isolate_block(FIRST + block);
        }
        for id in FIRST..FIRST + BLOCK_COUNT {
            let obstacle = hotplug.obstacle(id).unwrap();
            let block = hotplug.block_state(id);
            let expected = match hotplug.offline(id) {
                // Room is not looked at.
                Err(Error::NoMemory) => continue,
                done => done.is_err(),
            };
            prop_assert_eq!(obstacle.is_some(), expected, "memory block {}: {:?}", id, obstacle);
            if let Some((address, obstacle)) = obstacle {
                prop_assert_eq!(address / BLOCK, id);
                let not_online = block != Some(BlockState::Online);
                let supported = hotplug.config().hot_remove;
                prop_assert_eq!(obstacle == Obstacle::NotSupported, !supported);
                prop_assert_eq!(obstacle == Obstacle::NotOnline, not_online && supported);
            }
        }
        hotplug.check_invariants().unwrap();
    }
}

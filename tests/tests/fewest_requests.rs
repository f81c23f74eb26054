//! Our driver sends our device as few requests as there can be, counted by trying all ways where that is possible.

use std::collections::BTreeSet;

use integration_tests::random::{Random, seed};
use integration_tests::rig::{Case, Rig};
use virtio_mem::wire::{BlockMap, BlockRange, RequestKind};
use virtio_mem_driver::driver::{Policy, Progress};

const MIB: u64 = 1 << 20;

/// Blocks of a region that is small enough to try all ways. Two make up a memory block.
const SMALL: u64 = 12;

fn small() -> Case {
    Case {
        block_size: 64 * MIB,
        region: (4 << 30, SMALL * 64 * MIB),
        ..Case::plain(Policy::default(), 0)
    }
}

/// A driver that has taken these blocks over.
fn rig_with(case: Case, plugged: &BlockMap) -> Rig {
    let mut rig = Rig::with_plugged(case, plugged);
    settle(&mut rig);
    assert_eq!(rig.handle.plugged(), *plugged);
    let requests = rig.bus.take_requests();
    let only_asked = requests
        .iter()
        .all(|request| request.kind() == RequestKind::State);
    assert!(only_asked, "{requests:?}");
    rig
}

fn settle(rig: &mut Rig) {
    let progress = rig.run(|_| {});
    assert_eq!(progress, Progress::Settled);
    rig.check_quiet(progress);
}

/// Requests it takes to get to `target` blocks.
fn requests_to(rig: &mut Rig, target: u64) -> usize {
    drop(
        rig.handle
            .resize(target * rig.case.block_size)
            .expect("a size"),
    );
    settle(rig);
    assert_eq!(rig.handle.plugged().count(), target);
    let requests = rig.bus.take_requests();
    let changes = requests
        .iter()
        .all(|request| request.kind() != RequestKind::State);
    assert!(changes, "{requests:?}");
    requests.len()
}

/// The fewest requests from `map` to `target` blocks, one bit each, by trying all ways. Memory that shall stay is not
/// unplugged to be plugged again.
fn fewest(map: u64, target: u32) -> usize {
    let plugged = map.count_ones();
    if target == 0 {
        // UNPLUG ALL
        return usize::from(plugged > 0);
    }
    let grows = target > plugged;
    // The blocks a request may name, all of which change sides.
    let movable = |map: u64| if grows { !map } else { map };
    let mut reached = BTreeSet::from([map]);
    let mut requests = 0;
    while reached.iter().all(|map| map.count_ones() != target) {
        let mut next = BTreeSet::new();
        for map in &reached {
            for first in 0..SMALL {
                let mut run = 0;
                for block in first..SMALL {
                    run |= 1 << block;
                    let then = map ^ run;
                    let overshoots =
                        (then.count_ones() > target) == grows && then.count_ones() != target;
                    if movable(*map) & run != run || overshoots {
                        break;
                    }
                    next.insert(then);
                }
            }
        }
        reached = next;
        requests += 1;
    }
    requests
}

fn bits(map: &BlockMap) -> u64 {
    map.words()[0]
}

fn every_second(blocks: u64) -> BlockMap {
    let mut map = BlockMap::new(blocks);
    for first in (0..blocks).step_by(2) {
        map.insert(BlockRange { first, count: 1 });
    }
    map
}

#[test]
fn requests_are_as_few_as_there_can_be() {
    let mut random = Random::new(seed());
    let mut most = 0;
    for _ in 0..200 {
        let mut map = BlockMap::new(SMALL);
        for first in 0..SMALL {
            if random.one_in(2) {
                map.insert(BlockRange { first, count: 1 });
            }
        }
        let mut rig = rig_with(small(), &map);
        for _ in 0..3 {
            let target = random.below(SMALL + 1);
            let before = bits(&rig.handle.plugged());
            let expected = fewest(before, u32::try_from(target).expect("a small number"));
            assert_eq!(
                requests_to(&mut rig, target),
                expected,
                "{before:#b} to {target}"
            );
            most = most.max(expected);
        }
    }
    // Else there was nothing to get wrong.
    assert!(most >= 3, "{most}");
}

#[test]
fn growing_shrinking_and_everything_takes_one_request_each() {
    let mut rig = rig_with(Case::plain(Policy::default(), 256), &BlockMap::new(256));
    for target in [256, 1, 200, 130, 131, 0, 77, 0] {
        assert_eq!(requests_to(&mut rig, target), 1, "{target}");
    }
    rig.check_nothing_is_left();
}

#[test]
fn checkerboard_takes_a_request_for_each_square_unless_everything_goes() {
    let case = Case::plain(Policy::default(), 256);
    let mut rig = rig_with(case, &every_second(256));
    assert_eq!(requests_to(&mut rig, 256), 128);
    assert_eq!(requests_to(&mut rig, 100), 1);
    let mut rig = rig_with(case, &every_second(256));
    assert_eq!(requests_to(&mut rig, 100), 28);
    assert_eq!(requests_to(&mut rig, 0), 1);
}

#[test]
fn request_names_no_more_than_65535_blocks() {
    // A request names whole sub-blocks of 512 of these blocks, but no more than 65,535 of them.
    let blocks: u64 = (1 << 30) / 4096;
    let case = Case {
        block_size: 4096,
        region: (4 << 30, 1 << 30),
        ..Case::plain(Policy::default(), 0)
    };
    let mut rig = rig_with(case, &BlockMap::new(blocks));
    let fewest = usize::try_from(blocks.div_ceil(65535)).expect("a small number");
    assert_eq!(requests_to(&mut rig, blocks), fewest);
    assert_eq!(requests_to(&mut rig, 512), fewest);
    assert_eq!(requests_to(&mut rig, 0), 1);
}

//! Operation: G-06 … G-16, what the driver does with memory, and what not.
//!
//! What the guest accesses is watched by the support module, which panics. Here the device also overwrites all
//! unplugged blocks, so that it shows if something were kept there.

use virtio_mem_driver::driver::{
    Mode, Policy, Progress, Stall, Suspend, SuspendError, UnreachableReason,
};
use virtio_mem_driver::hotplug::{AddMemory, BlockState, Mobility, OnlineType, PageHandle};
use virtio_mem_wire::{BlockRange, Features, Request, Span};

use crate::setup::{SETUPS, Setup, UNIT, WAITS, run, works};
use crate::support::device::Device;
use crate::support::{GIB, MIB, Rig, dma, tagged};

/// Grows and shrinks around pages in use, while the device overwrites before each step what is not plugged. `watch` is
/// called before each step.
fn life_over_scribbles(rig: &mut Rig, watch: impl Fn(&Rig)) {
    let mut pages = Vec::new();
    let partly = UNIT + 3 * rig.driver.granule_size();
    for size in [UNIT, 3 * UNIT, UNIT, partly, 2 * UNIT, partly] {
        rig.device.request(size);
        loop {
            watch(rig);
            rig.device.scribble();
            match rig.step() {
                Progress::Settled if rig.device.state().interrupt.is_empty() => break,
                Progress::Settled | Progress::Converging | Progress::AwaitingDevice => {}
                other => panic!("{other:?}"),
            }
        }
        rig.check();
        if pages.is_empty() {
            pages = rig.allocate(2000, Mobility::Movable);
        }
        rig.verify(&pages);
    }
    works(rig, &pages);
}

#[test]
fn g_06_unplugged_blocks_are_not_written() {
    for setup in SETUPS {
        let mut rig = setup.rig();
        // What was scribbled last is still there before it is scribbled again.
        let scribbled = std::cell::Cell::new(false);
        life_over_scribbles(&mut rig, |rig| {
            if scribbled.replace(true) {
                assert!(rig.device.is_scribbled());
            }
        });
        assert!(rig.device.is_scribbled());
    }
}

/// Nor do they reach who allocates pages.
#[test]
fn g_06_unplugged_parts_of_an_online_memory_block_are_not_allocated() {
    for setup in SETUPS
        .into_iter()
        .filter(|setup| setup.mode == Mode::SubBlock)
    {
        let mut rig = setup.with_plugged(6 * MIB);
        let counts = rig.hotplug.counts();
        assert_eq!(counts.present, UNIT / 4096);
        assert_eq!((counts.managed, counts.free), (3 * 512, 3 * 512));
        let pages = rig.allocate(3 * 512, Mobility::Movable);
        assert!(rig.hotplug.allocate(Mobility::Movable).is_err());
        works(&mut rig, &pages);
    }
}

/// Neither memory nor requests, STATE included, reach beyond the usable region.
#[test]
fn g_07_blocks_outside_the_usable_region_are_not_touched() {
    for setup in SETUPS {
        let usable = 4 * UNIT;
        let mut rig = setup.prepared(|device| {
            device.state().config.mutable.usable_region_size = usable;
        });
        life_over_scribbles(&mut rig, |_| {});
        rig.device.request(usable);
        run(&mut rig).settled(&rig);
        assert_eq!(rig.driver.plugged_size(), usable);
        rig.device.state().need_reset();
        run(&mut rig);
        let requests = rig.device.state().requests.clone();
        assert!(requests.len() > 4);
        for (request, _) in requests {
            if let Some(span) = request.span() {
                let end = span.addr + u64::from(span.block_count) * 2 * MIB;
                assert!(end <= 4 * GIB + usable, "{request:x?}");
            }
        }
    }
}

/// [`FakeHal`](crate::support::dma::FakeHal) panics if anything else is shared, the device if it is pointed elsewhere.
#[test]
fn g_08_rings_and_buffers_lie_in_dma_memory() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(UNIT);
        rig.device.state().hold = true;
        rig.device.request(4 * UNIT);
        assert_eq!(rig.run(), Progress::AwaitingDevice);
        assert!(!rig.device.pending().is_empty());
        let state = rig.device.state();
        let addresses = state.dma_addresses();
        assert!(addresses.len() >= 3 + 2);
        for address in addresses {
            assert!(dma::is_inside(address), "{address:#x}");
            assert_eq!(state.config.geometry.block_at(address), None);
        }
    }
}

#[test]
fn g_09_unplugged_blocks_are_not_even_read_where_that_is_allowed() {
    for setup in SETUPS {
        let mut rig = setup.prepared(|device| {
            device.state().offered = Features::VERSION_1.bits();
        });
        let features = rig.driver.features();
        assert!(!features.contains(Features::UNPLUGGED_INACCESSIBLE));
        life_over_scribbles(&mut rig, |_| {});
    }
}

#[test]
fn g_10_unplugged_blocks_are_not_read() {
    for setup in SETUPS {
        let mut rig = setup.rig();
        let features = rig.driver.features();
        assert!(features.contains(Features::UNPLUGGED_INACCESSIBLE));
        life_over_scribbles(&mut rig, |_| {});
    }
}

/// Whether no page of the memory can be in use: it was removed, or is kept from the allocator.
fn is_out_of_use(rig: &Rig, start: u64, size: u64) -> bool {
    (start..start + size).step_by((2 * MIB) as usize).all(|at| {
        rig.hotplug.block_state(at / UNIT).is_none()
            || rig.hotplug.withheld(at, 2 * MIB) == Ok(Some(true))
    })
}

#[test]
fn g_11_memory_is_out_of_use_before_its_unplug_is_requested() {
    for setup in SETUPS {
        for size in [3 * UNIT, 2 * UNIT, 0] {
            let mut rig = setup.with_plugged(4 * UNIT);
            let mut pages = rig.allocate(2000, Mobility::Movable);
            if size == 0 {
                for page in pages.drain(..) {
                    rig.hotplug.free(page).unwrap();
                }
            }
            rig.device.state().hold = true;
            rig.device.request(size);
            let mut unplugs = 0;
            loop {
                let progress = rig.step();
                for request in rig.device.pending() {
                    let (start, size) = match request {
                        Request::Unplug(Span { addr, block_count }) => {
                            (addr, u64::from(block_count) * 2 * MIB)
                        }
                        Request::UnplugAll => (4 * GIB, GIB),
                        other => panic!("{other:?}"),
                    };
                    assert!(is_out_of_use(&rig, start, size), "{request:x?}");
                    unplugs += 1;
                }
                match progress {
                    Progress::AwaitingDevice if !rig.device.pending().is_empty() => {
                        rig.device.answer();
                    }
                    Progress::Settled => break,
                    _ => {}
                }
            }
            assert!(unplugs > 0);
            rig.device.state().hold = false;
            works(&mut rig, &pages);
        }
    }
}

/// The driver initialises nothing, and nothing of it or of the hotplug core depends on what a fresh block holds: who
/// allocates a page writes it first.
#[test]
fn g_12_contents_of_fresh_blocks_do_not_matter() {
    for setup in SETUPS {
        let requests = [0, 0xdb, 0xff].map(|contents| {
            let device = Device::new(4 * GIB, GIB, 2 * MIB);
            device.state().scribble_with = contents;
            let mut rig = Rig::on(device, setup.policy());
            life_over_scribbles(&mut rig, |_| {});
            rig.device.state().take_requests()
        });
        assert_eq!(requests[0], requests[1]);
        assert_eq!(requests[0], requests[2]);
    }
}

#[test]
fn g_13_each_change_of_the_target_is_followed() {
    for setup in SETUPS {
        let mut rig = setup.rig();
        for units in [1, 8, 3, 4, 0, 8, 0, 2, 2, 7] {
            rig.resize(units * UNIT);
        }
        // In the middle of following another.
        for (units, next) in [(8, 1), (1, 6), (6, 0), (0, 3)] {
            rig.device.request(units * UNIT);
            for _ in 0..5 {
                rig.step();
            }
            rig.resize(next * UNIT);
        }
    }
}

/// The usable region begins and ends inside a unit, and one unit in it is somebody else's.
#[test]
fn g_14_only_blocks_of_whole_units_that_are_free_are_plugged() {
    for setup in SETUPS {
        let region = 4 * GIB + 64 * MIB;
        let device = Device::new(region, 8 * UNIT, 2 * MIB);
        let usable = 6 * UNIT;
        device.state().config.mutable.usable_region_size = usable;
        let mut rig = Rig::on(device, setup.policy());
        // Units 33 … 37 lie in the usable region entirely.
        let foreign = AddMemory::new(35 * UNIT, UNIT);
        rig.hotplug.add_memory(&foreign).unwrap();
        rig.device.request(usable);
        let ended = run(&mut rig);
        rig.check();
        assert!(
            matches!(
                ended.last,
                Progress::Settled
                    | Progress::Stalled {
                        reason: Stall::NoSpace,
                        ..
                    }
            ),
            "{ended:?}"
        );
        let plugged: Vec<_> = rig.driver.plugged_map().runs().collect();
        let units = |first: u64, count: u64| BlockRange {
            first: (first * UNIT - region) / (2 * MIB),
            count: count * UNIT / (2 * MIB),
        };
        assert_eq!(plugged, [units(33, 2), units(36, 2)]);
        assert_eq!(rig.driver.unreachable().unwrap().bytes, 2 * UNIT);
        for (request, _) in &rig.device.state().requests {
            assert!(matches!(request, Request::Plug(_)));
        }
    }
}

/// Two pages in two units, pinned: what could move from one to the other does not.
fn pin_two(rig: &mut Rig) -> [PageHandle; 2] {
    let allocate = |_| rig.hotplug.allocate(Mobility::Movable).unwrap();
    let mut pages: Vec<_> = (0..UNIT / 4096 + 1).map(allocate).collect();
    let two = [pages.remove(0), pages.pop().unwrap()];
    for page in pages {
        rig.hotplug.free(page).unwrap();
    }
    let units = two.map(|page| rig.hotplug.address(page).unwrap() / UNIT);
    assert_ne!(units[0], units[1]);
    for (tag, page) in (0..).zip(two) {
        tagged::write(&mut rig.hotplug, page, tag);
        rig.hotplug.pin(page).unwrap();
    }
    two
}

/// Their granules stay, everything else goes; and the driver goes on.
#[test]
fn g_15_pages_that_cannot_move_keep_their_granules_until_they_are_gone() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(4 * UNIT);
        let pinned = pin_two(&mut rig);
        let addresses = pinned.map(|page| rig.hotplug.address(page));
        rig.device.request(0);
        let ended = run(&mut rig);
        assert_eq!(ended.stalls, [Stall::MemoryInUse; WAITS]);
        let left = 2 * rig.driver.granule_size();
        assert_eq!(rig.driver.plugged_size(), left);
        let unreachable = rig.driver.unreachable().unwrap();
        let reason = UnreachableReason::Stalled(Stall::MemoryInUse);
        assert_eq!((unreachable.bytes, unreachable.reason), (left, reason));
        assert_eq!(pinned.map(|page| rig.hotplug.address(page)), addresses);
        // Up again, and then all the way down.
        rig.device.request(3 * UNIT);
        run(&mut rig).settled(&rig);
        rig.verify(&pinned);
        for page in pinned {
            rig.hotplug.unpin(page).unwrap();
            rig.hotplug.free(page).unwrap();
        }
        rig.device.request(0);
        run(&mut rig).settled(&rig);
    }
}

fn suspend(rig: &mut Rig, kind: Suspend) -> Result<(), SuspendError> {
    rig.driver.suspend(&mut rig.hotplug, kind)
}

#[test]
fn g_16_machine_does_not_sleep_while_memory_is_plugged() {
    for setup in SETUPS {
        let mut rig = setup.with_plugged(UNIT);
        let pages = rig.allocate(100, Mobility::Movable);
        let plugged_size = UNIT;
        assert_eq!(
            suspend(&mut rig, Suspend::Ram),
            Err(SuspendError::MemoryPlugged { plugged_size })
        );
        assert_eq!(
            suspend(&mut rig, Suspend::Disk),
            Err(SuspendError::NotPermitted)
        );
        // Idle is not a sleep: memory stays as it is. The target changes meanwhile.
        assert_eq!(suspend(&mut rig, Suspend::Idle), Ok(()));
        assert_eq!(rig.step(), Progress::Suspended);
        assert!(rig.device.state().status.is_empty());
        rig.device.state().config.mutable.requested_size = 2 * UNIT;
        rig.driver.resume().unwrap();
        run(&mut rig).settled(&rig);
        assert_eq!(rig.driver.plugged_size(), 2 * UNIT);
        works(&mut rig, &pages);
        // Regression: the size read before the last blocks were unplugged was taken for what is plugged.
        assert_eq!(suspend(&mut rig, Suspend::Ram), Ok(()));
        rig.driver.resume().unwrap();
        works(&mut rig, &[]);
    }
}

/// What an earlier life has plugged counts, before anybody has looked where it is.
#[test]
fn g_16_leftovers_keep_the_machine_awake() {
    for setup in SETUPS {
        let mut rig = leftovers(setup, Features::empty());
        let plugged_size = UNIT;
        assert_eq!(
            suspend(&mut rig, Suspend::Ram),
            Err(SuspendError::MemoryPlugged { plugged_size })
        );
    }
}

#[test]
fn g_16_machine_may_sleep_where_plugged_memory_persists() {
    for setup in SETUPS {
        let mut rig = leftovers(setup, Features::PERSISTENT_SUSPEND);
        run(&mut rig).settled(&rig);
        rig.resize(2 * UNIT);
        let pages = rig.allocate(100, Mobility::Movable);
        assert_eq!(suspend(&mut rig, Suspend::Ram), Ok(()));
        rig.driver.resume().unwrap();
        run(&mut rig).settled(&rig);
        works(&mut rig, &pages);
    }
}

fn leftovers(setup: Setup, features: Features) -> Rig {
    setup.prepared(|device| {
        let mut state = device.state();
        state.offered |= features.bits();
        let range = BlockRange {
            first: 64,
            count: 64,
        };
        state.plugged.insert(range);
        state.config.mutable.plugged_size = UNIT;
        state.config.mutable.requested_size = UNIT;
    })
}

/// Offline memory may go online while its unplug is under way: none of what leaves gets to the allocator.
#[test]
fn g_11_offline_memory_stays_out_of_use_once_its_unplug_is_requested() {
    for setup in SETUPS {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        let policy = Policy {
            auto_online: None,
            ..setup.policy()
        };
        let mut rig = Rig::on(device, policy);
        rig.resize(4 * UNIT);
        assert_eq!(rig.hotplug.counts().managed, 0);
        rig.device.state().hold = true;
        rig.device.request(UNIT);
        let mut unplugs = 0;
        while rig.driver.plugged_size() > UNIT {
            rig.step();
            for request in rig.device.pending() {
                let span = request.span().unwrap();
                let size = u64::from(span.block_count) * 2 * MIB;
                let last = (span.addr + size - 1) / UNIT;
                if rig.hotplug.block_state(last) == Some(BlockState::Offline) {
                    rig.hotplug.online(last, OnlineType::Movable).unwrap();
                }
                assert!(is_out_of_use(&rig, span.addr, size), "{request:x?}");
                unplugs += 1;
            }
            rig.device.answer();
        }
        assert!(unplugs > 0);
    }
}

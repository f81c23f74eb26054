//! DMA users keep their maps in step with the plugged blocks, whatever is refused on the way.
#![expect(clippy::unwrap_used, reason = "fixtures may fail as tests do")]

mod rig;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rig::{BLOCK, Fault, GIB, MIB, REGION, Rig};
use virtio_mem::wire::Response;
use virtio_mem::{
    Anonymous, BuildError, Granularity, MappingLimits, ObserverError, PlugObserver, Run, VirtioMem,
};
use vm_memory::GuestAddress;

/// An IOMMU map as VFIO type 1 keeps it: a mapping for each block, since a mapping can only be removed whole,
/// and an error for everything that VFIO refuses.
#[derive(Debug)]
struct DmaMap {
    max_mappings: u64,
    /// Host address and length by guest address.
    mappings: Mutex<BTreeMap<u64, (u64, u64)>>,
    /// What it was told, in order: plugged or not, and the run.
    calls: Mutex<Vec<(bool, Run)>>,
    map: Fault,
    unmap: Fault,
    /// Blocks to unmap that were not mapped.
    strangers: AtomicU64,
}

impl DmaMap {
    fn new() -> Arc<Self> {
        Self::with_limit(65_535)
    }

    fn with_limit(max_mappings: u64) -> Arc<Self> {
        Arc::new(Self {
            max_mappings,
            mappings: Mutex::default(),
            calls: Mutex::default(),
            map: Fault::default(),
            unmap: Fault::default(),
            strangers: AtomicU64::new(0),
        })
    }

    /// The mapped blocks.
    fn blocks(&self) -> Vec<u64> {
        let mappings = self.mappings.lock().unwrap();
        mappings.keys().map(|at| (at - REGION) / BLOCK).collect()
    }

    /// What it was told since the last call: plugged or not, first block, number of blocks.
    fn calls(&self) -> Vec<(bool, u64, u64)> {
        let calls = std::mem::take(&mut *self.calls.lock().unwrap());
        calls
            .iter()
            .map(|(plugged, run)| (*plugged, run.offset / BLOCK, run.len / BLOCK))
            .collect()
    }
}

impl PlugObserver for DmaMap {
    fn limits(&self) -> MappingLimits {
        MappingLimits {
            max_mappings: self.max_mappings,
            granularity: Granularity::Block,
        }
    }

    fn plugged(&self, run: &Run) -> io::Result<()> {
        self.map.check()?;
        self.calls.lock().unwrap().push((true, *run));
        let mut mappings = self.mappings.lock().unwrap();
        for offset in (0..run.len).step_by(BLOCK as usize) {
            let mapping = (run.host_address + offset, BLOCK);
            let there = mappings.insert(run.guest_address + offset, mapping);
            assert!(there.is_none(), "VFIO would answer EEXIST");
        }
        assert!(mappings.len() as u64 <= self.max_mappings);
        Ok(())
    }

    fn unplugging(&self, run: &Run) -> io::Result<()> {
        self.unmap.check()?;
        self.calls.lock().unwrap().push((false, *run));
        let mut mappings = self.mappings.lock().unwrap();
        for at in run.guest_range().step_by(BLOCK as usize) {
            if mappings.remove(&at).is_none() {
                self.strangers.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

fn plugged(rig: &Rig) -> Vec<u64> {
    let plugged = rig.handle.plugged();
    plugged
        .runs()
        .flat_map(|run| run.first..run.end())
        .collect()
}

fn rig_with(observers: &[&Arc<DmaMap>]) -> Rig {
    Rig::with(4 * GIB, |builder| {
        observers
            .iter()
            .fold(builder.requested_size(GIB), |builder, observer| {
                builder.observer(Arc::clone(observer))
            })
    })
}

#[test]
fn observers_are_told_once_for_each_contiguous_run() {
    let dma = DmaMap::new();
    let mut rig = rig_with(&[&dma]);
    rig.plug(0, 100);
    rig.plug(200, 1);
    assert_eq!(dma.calls(), [(true, 0, 100), (true, 200, 1)]);
    let at = dma.mappings.lock().unwrap()[&(REGION + 200 * BLOCK)].0;
    let host = rig.device.backing().host_address().as_ptr() as u64;
    assert_eq!(at, host + 200 * BLOCK);
    rig.unplug(10, 20);
    assert_eq!(dma.calls(), [(false, 10, 20)]);
    rig.unplug_all();
    assert_eq!(
        dma.calls(),
        [(false, 0, 10), (false, 30, 70), (false, 200, 1)]
    );
    assert!(dma.blocks().is_empty());
}

#[test]
fn refused_plug_is_busy_and_undone_for_all_that_were_told() {
    let (first, second) = (DmaMap::new(), DmaMap::new());
    let mut rig = rig_with(&[&first, &second]);
    second.map.script(&[false]);
    assert_eq!(rig.plug(0, 10), Response::Busy);
    assert_eq!(first.calls(), [(true, 0, 10), (false, 0, 10)]);
    assert!(second.calls().is_empty());
    assert_eq!(rig.config().mutable.plugged_size, 0);
    assert!(rig.faults.mapped_slots().is_empty());
    assert_eq!(rig.handle.resident_bytes().unwrap(), 0);
    assert_eq!(rig.plug(0, 10), Response::Ack);
    assert_eq!(first.blocks(), second.blocks());
}

#[test]
fn refused_unplug_is_busy_and_those_told_before_are_told_again() {
    let (first, second) = (DmaMap::new(), DmaMap::new());
    let mut rig = rig_with(&[&first, &second]);
    rig.plug(0, 4);
    rig.plug(8, 4);
    rig.fill(1, 0xab);
    first.calls();
    // The second run of two: both observers have let go of the first already.
    second.unmap.script(&[true, false]);
    assert_eq!(rig.unplug_all(), Response::Busy);
    assert_eq!(
        first.calls(),
        [(false, 0, 4), (false, 8, 4), (true, 8, 4), (true, 0, 4)]
    );
    assert_eq!(plugged(&rig), first.blocks());
    assert_eq!(plugged(&rig), second.blocks());
    assert!(rig.holds(1, 0xab));
}

#[test]
fn observers_are_told_that_memory_stays_when_a_later_step_of_unplug_fails() {
    let dma = DmaMap::new();
    let mut rig = rig_with(&[&dma]);
    rig.plug(0, 64);
    rig.fill(3, 0xcd);
    let faults = Arc::clone(&rig.faults);
    for fault in [&faults.close, &faults.unmap, &faults.discard] {
        dma.calls();
        fault.script(&[false]);
        assert_eq!(rig.unplug(0, 64), Response::Busy);
        assert_eq!(dma.calls(), [(false, 0, 64), (true, 0, 64)]);
        assert_eq!(dma.blocks(), plugged(&rig));
    }
    assert!(rig.holds(3, 0xcd));
    assert_eq!(rig.unplug(0, 64), Response::Ack);
}

#[test]
fn observer_that_cannot_be_told_again_stops_the_device() {
    let dma = DmaMap::new();
    let mut rig = rig_with(&[&dma]);
    rig.plug(0, 4);
    rig.faults.close.script(&[false]);
    dma.map.script(&[false]);
    assert_eq!(rig.unplug(0, 4), Response::Busy);
    assert!(rig.handle.status().failure.is_some());
    drop(rig);
    assert!(dma.blocks().is_empty());
    let (first, second) = (DmaMap::new(), DmaMap::new());
    let mut rig = rig_with(&[&first, &second]);
    first.unmap.script(&[false]);
    second.map.script(&[false]);
    assert_eq!(rig.plug(0, 4), Response::Busy);
    assert!(rig.handle.status().failure.is_some());
}

#[test]
fn late_observer_is_told_of_every_plugged_run_and_can_leave() {
    let mut rig = rig_with(&[]);
    rig.plug(0, 4);
    rig.plug(8, 2);
    let dma = DmaMap::new();
    let id = rig.handle.add_observer(Arc::clone(&dma)).unwrap();
    assert_eq!(dma.calls(), [(true, 0, 4), (true, 8, 2)]);
    rig.plug(4, 4);
    assert_eq!(dma.calls(), [(true, 4, 4)]);

    dma.unmap.script(&[false]);
    let refused = rig.handle.remove_observer(id);
    assert!(matches!(refused, Err(ObserverError::Refused(_))));
    rig.unplug(4, 1);
    assert_eq!(dma.blocks(), plugged(&rig), "it is still told");

    rig.handle.remove_observer(id).unwrap();
    assert!(dma.blocks().is_empty());
    rig.plug(4, 1);
    assert!(dma.blocks().is_empty());
    let unknown = rig.handle.remove_observer(id);
    assert!(matches!(unknown, Err(ObserverError::Unknown)));
}

#[test]
fn late_observer_that_refuses_a_run_has_nothing_mapped_and_hears_no_more() {
    let mut rig = rig_with(&[]);
    rig.plug(0, 1);
    rig.plug(2, 1);
    let dma = DmaMap::new();
    dma.map.script(&[true, false]);
    let refused = rig.handle.add_observer(Arc::clone(&dma));
    assert!(matches!(refused, Err(ObserverError::Refused(_))));
    assert!(dma.blocks().is_empty());
    dma.calls();
    rig.plug(4, 1);
    assert!(dma.calls().is_empty());
}

#[test]
fn limits_that_some_state_of_the_region_exceeds_are_an_error_at_build_time() {
    let build = |observer| {
        VirtioMem::builder(GuestAddress(0), Anonymous::base_pages(256 * MIB).unwrap())
            .block_size(BLOCK)
            .observer(observer)
            .build()
    };
    let limits = |max_mappings, granularity| MappingLimits {
        max_mappings,
        granularity,
    };
    let fits = [
        limits(128, Granularity::Block),
        limits(64, Granularity::Run),
        limits(256, Granularity::Bytes(MIB)),
        MappingLimits::NONE,
    ];
    for limits in fits {
        build(Limits(limits)).unwrap();
    }
    let too_few = [
        (limits(127, Granularity::Block), 128),
        (limits(63, Granularity::Run), 64),
        (limits(255, Granularity::Bytes(MIB)), 256),
    ];
    for (limits, expected) in too_few {
        let error = build(Limits(limits)).unwrap_err();
        assert!(matches!(
            error,
            BuildError::Observer(ObserverError::TooManyMappings { needed, .. }) if needed == expected
        ));
    }
    for bytes in [0, 3 * MIB / 2, 4 * MIB] {
        let error = build(Limits(limits(u64::MAX, Granularity::Bytes(bytes)))).unwrap_err();
        assert!(matches!(
            error,
            BuildError::Observer(ObserverError::Granularity { .. })
        ));
    }
    // And the same for one who comes late: 4 GiB are 2,048 blocks.
    let rig = rig_with(&[]);
    let late = rig.handle.add_observer(DmaMap::with_limit(2047));
    assert!(matches!(late, Err(ObserverError::TooManyMappings { .. })));
}

/// Has limits and maps nothing.
#[derive(Debug)]
struct Limits(MappingLimits);

impl PlugObserver for Limits {
    fn limits(&self) -> MappingLimits {
        self.0
    }

    fn plugged(&self, _: &Run) -> io::Result<()> {
        Ok(())
    }

    fn unplugging(&self, _: &Run) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn dropped_device_leaves_nothing_mapped() {
    let dma = DmaMap::new();
    let mut rig = rig_with(&[&dma]);
    rig.plug(0, 10);
    drop(rig);
    assert!(dma.blocks().is_empty());
}

#[test]
fn busy_of_an_observer_ends_with_a_retry_of_the_vmm() {
    let dma = DmaMap::new();
    let mut rig = rig_with(&[&dma]);
    rig.handle.retry();
    assert_eq!(rig.notifications.config(), 0, "nobody was told BUSY");
    dma.map.script(&[false]);
    assert_eq!(rig.plug(0, 10), Response::Busy);
    rig.handle.retry();
    rig.handle.retry();
    assert_eq!(rig.notifications.config(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Requests at random, with one call of host or observers failing in most of them: after each, both maps
    /// are the bitmap.
    #[test]
    fn maps_stay_in_step_with_the_bitmap_whatever_fails(
        ops in proptest::collection::vec((0u8..8, 0u64..200, 1u16..70, 0usize..9, 0usize..3), 1..40),
    ) {
        let (first, second) = (DmaMap::new(), DmaMap::new());
        let mut rig = rig_with(&[&first, &second]);
        let faults = Arc::clone(&rig.faults);
        for (op, block, count, culprit, successes) in ops {
            let candidates = [
                &faults.open, &faults.close, &faults.discard, &faults.map, &faults.unmap,
                &first.map, &first.unmap, &second.map, &second.unmap,
            ];
            let mut script = vec![true; successes];
            script.push(false);
            candidates[culprit].script(&script);
            let before = plugged(&rig);
            let response = match op {
                0..4 => rig.plug(block, count),
                4..7 => rig.unplug(block, count),
                _ => rig.unplug_all(),
            };
            for fault in candidates {
                fault.script(&[]);
            }
            prop_assert!(rig.handle.status().failure.is_none());
            let blocks = plugged(&rig);
            if response != Response::Ack {
                prop_assert_eq!(&blocks, &before);
            }
            prop_assert_eq!(first.strangers.load(Ordering::Relaxed), 0);
            prop_assert_eq!(second.strangers.load(Ordering::Relaxed), 0);
            prop_assert_eq!(&first.blocks(), &blocks);
            prop_assert_eq!(&second.blocks(), &blocks);
            let slots: std::collections::BTreeSet<_> = blocks.iter().map(|b| (b / 64) as u32).collect();
            prop_assert_eq!(rig.faults.mapped_slots(), slots.into_iter().collect::<Vec<_>>());
        }
    }
}

//! What must hold.

use virtio_mem::wire::{Answer, BlockRange, BlockState as Plugged, RequestKind};
use virtio_mem_driver::driver::{
    Failure, Progress, Stall, Strategy, Unreachable, UnreachableReason,
};
use virtio_mem_driver::hotplug::{BlockState, PageCounts, Resource, ZoneKind};
use vmm_harness::in_process::Access;

use super::Rig;

/// What may be allocated has not changed while this has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    counts: PageCounts,
    blocks: usize,
    digest: u64,
    plugged_size: u64,
}

impl Rig {
    /// G-06, G-10: whatever the core has, allocated or not, is plugged, or withheld from everybody.
    pub(super) fn check_exposed(&mut self) {
        let stamp = Stamp {
            counts: self.hotplug.counts(),
            blocks: self.hotplug.blocks().count(),
            digest: self.bus.digest(),
            plugged_size: self.handle.status().plugged_size,
        };
        if self.checked_at.replace(stamp) == Some(stamp) {
            return;
        }
        let profile = self.hotplug.profile();
        let (size, pageblock) = (profile.memory_block_size(), profile.pageblock_size());
        let page_size = profile.page_size();
        let expect_plugged = |who, address, len| {
            let exposed = self.shadow.check(who, Access::Write, address, len);
            exposed.expect("only plugged memory can be touched");
        };
        for block in self.hotplug.blocks().filter(|block| !block.early) {
            let start = block.id * size;
            let own = block.memmap_pages * page_size;
            expect_plugged("metadata in the memory itself", start, own);
            for address in (start..start + size).step_by(pageblock as usize) {
                if self.hotplug.withheld(address, pageblock) != Ok(Some(true)) {
                    expect_plugged("the page allocator, some time", address, pageblock);
                }
            }
        }
    }

    /// What must hold when the driver rests.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn check_quiet(&mut self, progress: Progress) {
        self.hotplug
            .check_invariants()
            .expect("the core's invariants");
        assert_eq!(self.hotplug.isolations().count(), 0, "leaked isolations");
        let status = self.handle.status();
        let plugged = self.handle.plugged();
        let geometry = self.handle.geometry();
        assert_eq!(status.plugged_size, geometry.bytes(plugged.count()));
        assert!(status.failure.is_none(), "{:?}", status.failure);
        if let Progress::Failed(failure) = progress {
            // What was in flight may have been done or not.
            let unknown = match failure {
                Failure::NeedsReset | Failure::AnswerTimeout => true,
                // Other requests may have been in flight.
                _ => self.strategy() == Strategy::Direct || self.leftovers_stay(),
            };
            assert!(
                unknown || self.driver().plugged_map() == &plugged,
                "{failure}"
            );
            return;
        }
        if self.leftovers_stay() {
            assert!(matches!(progress, Progress::Stalled { .. }), "{progress:?}");
            assert_eq!(self.driver().plugged_size(), 0);
            assert!(self.hotplug.blocks().all(|block| block.early));
            return;
        }
        assert_eq!(self.driver().plugged_map(), &plugged, "driver and device");
        self.check_blocks(progress);
        self.check_resources();
        let unstable = Stall::ConfigUnstable;
        if !matches!(progress, Progress::Stalled { reason, .. } if reason == unstable) {
            let config = self.driver().config().mutable;
            assert_eq!(config.requested_size, status.requested_size);
            self.check_reason(progress);
        }
    }

    /// G-05: what an earlier guest has left plugged could not be unplugged yet, and nothing else is done before that.
    fn leftovers_stay(&self) -> bool {
        let counters = self.driver().counters();
        self.leftovers && counters.answers(RequestKind::UnplugAll, Answer::Ack) == 0
    }

    /// Memory blocks = plugged blocks. While the driver is stalled, plugged memory may not be added yet, or any more.
    fn check_blocks(&self, progress: Progress) {
        let geometry = self.handle.geometry();
        let plugged = self.handle.plugged();
        let profile = self.hotplug.profile();
        let (size, pageblock) = (profile.memory_block_size(), profile.pageblock_size());
        let (start, end) = (geometry.addr(), geometry.addr() + geometry.region_size());
        let settled = progress == Progress::Settled;
        // What Direct has taken it keeps while it waits; Linux gives it back.
        let may_keep = !settled && self.strategy() == Strategy::Direct;
        let unit = self.driver().unit_size();
        for id in start.div_ceil(size)..end / size {
            let bytes = id * size..(id + 1) * size;
            let of = |address, len| {
                let range = geometry.blocks_touching(address, len);
                range.map_or(BlockRange { first: 0, count: 0 }, |range| range)
            };
            let block = self.hotplug.block(id);
            let unit_start = bytes.start / unit * unit;
            let in_unit = match unit_start >= start && unit_start + unit <= end {
                true => plugged.count_in(of(unit_start, unit)),
                false => plugged.count_in(of(bytes.start, size)),
            };
            if settled {
                assert_eq!(
                    block.is_some(),
                    in_unit > 0,
                    "memory block {id} is added if and only if its unit is plugged"
                );
            }
            let Some(block) = block else { continue };
            for address in bytes.step_by(pageblock as usize) {
                let withheld = self.hotplug.withheld(address, pageblock);
                match plugged.state(of(address, pageblock)) {
                    Plugged::Plugged if may_keep => {}
                    Plugged::Plugged => assert_eq!(
                        withheld,
                        Ok(Some(false)),
                        "{address:#x} of {block:?} is plugged, and not used"
                    ),
                    _ => assert_eq!(
                        withheld,
                        Ok(Some(true)),
                        "{address:#x} of {block:?} is not plugged, and not withheld"
                    ),
                }
            }
        }
    }

    /// The region is one resource, and all memory of the driver's is in it.
    fn check_resources(&self) {
        let geometry = self.handle.geometry();
        let region = geometry.addr()..geometry.addr() + geometry.region_size();
        let resources = || self.hotplug.resources().iomem();
        let regions = resources().filter(|r| r.name() == "virtio_mem");
        let regions: Vec<_> = regions.map(Resource::range).collect();
        assert_eq!(regions, [region]);
        let ram = resources().filter(|r| r.name() == "System RAM (virtio_mem)");
        let bytes: u64 = ram.map(|r| r.range().end - r.range().start).sum();
        let ours = self.hotplug.blocks().filter(|block| !block.early);
        let added = ours.count() as u64 * self.hotplug.profile().memory_block_size();
        assert_eq!(bytes, added, "resources and memory blocks");
    }

    /// G-15: a driver that is not where it should be says how far off it is, and why.
    fn check_reason(&self, progress: Progress) {
        let status = self.handle.status();
        let bytes = status.requested_size.abs_diff(status.plugged_size);
        let unreachable = self.driver().unreachable();
        let Some(Unreachable {
            bytes: said,
            reason,
        }) = unreachable
        else {
            assert_eq!(bytes, 0, "{progress:?} says nothing");
            return;
        };
        assert_eq!(said, bytes);
        match (progress, reason) {
            (Progress::Settled, UnreachableReason::Remainder { granule_size }) => {
                assert_eq!(granule_size, self.driver().granule_size());
                assert!(bytes < granule_size);
            }
            (Progress::Settled, UnreachableReason::Capacity) => {
                assert!(status.requested_size > status.plugged_size);
                assert_eq!(self.free_granules(), 0, "there is room");
            }
            (Progress::Settled, UnreachableReason::OnlineMemory) => {
                assert!(!self.case.policy.unplug_online);
            }
            (Progress::Stalled { reason: stall, .. }, UnreachableReason::Stalled(said)) => {
                assert_eq!(stall, said);
            }
            (progress, reason) => unreachable!("{progress:?}, but {reason:?}"),
        }
    }

    /// Granules of whole units of the usable region of which nothing is plugged.
    #[must_use]
    pub fn free_granules(&self) -> u64 {
        let geometry = self.handle.geometry();
        let (unit, granule) = (self.driver().unit_size(), self.driver().granule_size());
        let start = geometry.addr().next_multiple_of(unit);
        let end = geometry.addr() + self.handle.status().usable_region_size;
        let end = end / unit * unit;
        let plugged = self.handle.plugged();
        let free = (start..end.max(start))
            .step_by(granule as usize)
            .filter(|address| {
                let blocks = geometry.blocks_touching(*address, granule);
                blocks.is_some_and(|blocks| plugged.state(blocks) == Plugged::Unplugged)
            });
        free.count() as u64
    }

    /// Whether so much memory is offline that a unit more would be too much.
    #[must_use]
    pub fn is_too_much_offline(&self) -> bool {
        let memory_block = self.hotplug.profile().memory_block_size();
        let unit = self.driver().unit_size();
        let blocks = self.hotplug.blocks();
        let offline = blocks
            .filter(|block| block.state == BlockState::Offline)
            .count() as u64;
        // At least 1 GiB, and two of whatever is added.
        offline * memory_block + unit > (1 << 30).max(2 * memory_block).max(2 * unit)
    }

    /// Whether any memory of the region is in a kernel zone, where pages without a user's handle may be.
    #[must_use]
    pub fn has_kernel_memory(&self) -> bool {
        let mut ours = self.hotplug.blocks().filter(|block| !block.early);
        ours.any(|block| block.zone.is_some_and(|zone| zone != ZoneKind::Movable))
    }

    /// Memory is resident only where it is plugged.
    ///
    /// # Panics
    ///
    /// If there is more.
    pub fn check_resident(&self) {
        let resident = self.handle.resident_bytes().expect("measured");
        let plugged_size = self.handle.status().plugged_size;
        assert!(
            resident <= plugged_size,
            "{resident:#x} resident, {plugged_size:#x} plugged"
        );
    }

    /// The driver goes, and leaves nothing: the guest is as it was before it came.
    ///
    /// # Panics
    ///
    /// If something is left.
    pub fn check_nothing_is_left(&mut self) {
        let removed = self.remove_driver().expect("a driver");
        assert_eq!(removed.added_size, 0);
        assert_eq!(
            self.hotplug.snapshot(),
            self.fresh,
            "something is left behind"
        );
        assert_eq!(self.handle.resident_bytes().expect("measured"), 0);
    }
}

//! The online policy `auto-movable`: as much memory becomes movable as a ratio to kernel memory allows.
//!
//! Kernel memory is what boot gave. Memory added later may leave again, so it licenses no movable memory of
//! others; only within one dynamic group it does.

use super::group::{Group, GroupKind};

/// Pages of the zones that count: those of the whole system, or of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ZoneTotals {
    /// Present pages of boot in kernel zones, CMA included.
    pub(super) kernel_early_pages: u64,
    /// Present pages of Movable.
    pub(super) movable_pages: u64,
    /// Pages of CMA areas, which behave like Movable.
    pub(super) cma_pages: u64,
}

/// Whether `pages` more in Movable keep movable memory within `ratio` percent of kernel memory
/// (`auto_movable_can_online_movable`). With a ratio of 0 nothing fits.
///
/// `own` is the group the pages belong to, `others` are the dynamic groups besides it, of the same node if
/// `totals` are those of a node.
pub(super) fn fits<'a>(
    ratio: u32,
    totals: ZoneTotals,
    own: Option<&Group>,
    others: impl Iterator<Item = &'a Group>,
    pages: u64,
) -> bool {
    // 128 bits hold every sum and product here, whatever the counters say.
    let ratio = u128::from(ratio);
    if ratio == 0 {
        return false;
    }
    let mut kernel = u128::from(totals.kernel_early_pages.saturating_sub(totals.cma_pages));
    let mut movable = u128::from(totals.movable_pages) + u128::from(totals.cma_pages);
    // Boot memory that licenses what is movable in other groups is taken, and counts no more.
    let mut taken = 0;
    for group in others {
        let group_movable = u128::from(group.present_movable_pages);
        taken += (group_movable * 100 / ratio).saturating_sub(group.present_kernel_pages.into());
        movable = movable.saturating_sub(group_movable);
    }
    if kernel <= taken {
        return false;
    }
    kernel -= taken;
    if let Some(group) = own.filter(|group| group.is_dynamic()) {
        kernel += u128::from(group.present_kernel_pages);
    }
    movable + u128::from(pages) <= ratio * kernel / 100
}

/// Pages that have to fit for a memory block of `block_pages` to become movable; `None` if it cannot
/// (`auto_movable_zone_for_pfn`).
///
/// Memory that came together stays together: the rest of a static group or of a unit of a dynamic one must fit
/// too, and nothing of it may be in a kernel zone already. `unit_online` tells of the unit the block lies in
/// whether any of it is online in a kernel zone, and how many of its pages are online.
pub(super) fn remaining_pages(
    group: Option<&Group>,
    block_pages: u64,
    unit_online: impl FnOnce() -> (bool, u64),
) -> Option<u64> {
    let Some(group) = group else {
        return Some(block_pages);
    };
    let (kernel, whole, online) = match group.kind {
        GroupKind::Static { max_pages } => (
            group.present_kernel_pages > 0,
            max_pages,
            group.present_movable_pages,
        ),
        GroupKind::Dynamic { unit_pages } if unit_pages == block_pages => (false, unit_pages, 0),
        GroupKind::Dynamic { unit_pages } => {
            let (kernel, online) = unit_online();
            (kernel, unit_pages, online)
        }
    };
    (!kernel).then_some(whole.saturating_sub(online))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hotplug::Profile;
    use crate::hotplug::group::{GroupId, Groups};
    use alloc::vec::Vec;
    use core::iter;

    const BLOCK: u64 = Profile::X86_64.memory_block_pages();
    const GIB: u64 = 1 << 18;
    /// Pages of boot memory of a guest with 1 GiB.
    const BOOT: u64 = 3998 + 258_016;

    /// One node whose hotplugged memory is brought online by the policy.
    struct Node {
        ratio: u32,
        totals: ZoneTotals,
        groups: Groups,
    }

    impl Node {
        fn new(ratio: u32, kernel_early_pages: u64) -> Self {
            Self {
                ratio,
                totals: ZoneTotals {
                    kernel_early_pages,
                    ..ZoneTotals::default()
                },
                groups: Groups::default(),
            }
        }

        /// Brings one block online; true if it went to Movable.
        fn online(&mut self, id: GroupId, unit_online: (bool, u64)) -> bool {
            let own = self.groups.get(id).unwrap();
            let others = self.groups.other_dynamic(None, Some(id));
            let movable = remaining_pages(Some(own), BLOCK, || unit_online)
                .is_some_and(|pages| fits(self.ratio, self.totals, Some(own), others, pages));
            self.groups
                .account(id, movable, BLOCK.cast_signed())
                .unwrap();
            if movable {
                self.totals.movable_pages += BLOCK;
            }
            movable
        }

        /// Brings a DIMM online, block by block; number of movable blocks.
        fn online_dimm(&mut self, blocks: u64) -> usize {
            let id = self.groups.register_static(0, blocks * BLOCK).unwrap();
            (0..blocks).filter(|_| self.online(id, (false, 0))).count()
        }
    }

    #[test]
    fn three_times_boot_memory_can_be_movable_at_301() {
        let mut node = Node::new(301, 8 * GIB);
        assert_eq!(node.online_dimm(24 * 8), 24 * 8);
        assert_eq!(node.online_dimm(8), 0);
    }

    #[test]
    fn ratio_is_kept_to_the_block_by_whole_dimms() {
        assert_eq!(Node::new(301, BOOT).online_dimm(24), 24);
        let mut node = Node::new(301, BOOT);
        assert_eq!(node.online_dimm(25), 0);
        // The next one that is small enough fits again, and kernel memory of the first one is no help.
        assert_eq!(node.online_dimm(24), 24);
        assert_eq!(node.online_dimm(1), 0);
    }

    #[test]
    fn blocks_without_a_group_are_looked_at_one_by_one() {
        let pages = remaining_pages(None, BLOCK, || unreachable!("no unit"));
        assert_eq!(pages, Some(BLOCK));
        let totals = |movable_pages| ZoneTotals {
            kernel_early_pages: BOOT,
            movable_pages,
            cma_pages: 0,
        };
        assert!(fits(301, totals(23 * BLOCK), None, iter::empty(), BLOCK));
        assert!(!fits(301, totals(24 * BLOCK), None, iter::empty(), BLOCK));
    }

    #[test]
    fn dynamic_group_alternates_by_units_as_its_kernel_memory_licenses_more() {
        let mut node = Node::new(150, BOOT);
        let id = node.groups.register_dynamic(0, 2 * BLOCK, &Profile::X86_64);
        let id = id.unwrap();
        let mut unit = (false, 0);
        for block in 32..56 {
            if block % 2 == 0 {
                unit = (false, 0);
            }
            let movable = node.online(id, unit);
            unit = (unit.0 || !movable, unit.1 + BLOCK);
            let kernel = matches!(block, 42..=43 | 48..=49 | 52..=53);
            assert_eq!(movable, !kernel, "memory{block}");
        }
    }

    #[test]
    fn kernel_memory_of_one_dynamic_group_is_no_help_to_another() {
        let mut node = Node::new(100, 4 * BLOCK);
        let mut register = || node.groups.register_dynamic(0, BLOCK, &Profile::X86_64);
        let (first, second) = (register().unwrap(), register().unwrap());
        node.groups
            .account(first, false, (8 * BLOCK).cast_signed())
            .unwrap();
        let movable = (0..13).filter(|_| node.online(first, (false, 0))).count();
        assert_eq!(movable, 12);
        // Of 12 movable blocks the first group licenses 9 itself, so boot memory has one left to license.
        let movable: Vec<_> = (0..4).map(|_| node.online(second, (false, 0))).collect();
        assert_eq!(movable, [true, false, true, false]);
    }

    #[test]
    fn cma_counts_as_movable() {
        let totals = ZoneTotals {
            kernel_early_pages: 300,
            movable_pages: 50,
            cma_pages: 100,
        };
        assert!(fits(100, totals, None, iter::empty(), 50));
        assert!(!fits(100, totals, None, iter::empty(), 51));
    }

    #[test]
    fn unit_with_kernel_memory_stays_kernel_memory() {
        let mut groups = Groups::default();
        let id = groups.register_dynamic(0, 4 * BLOCK, &Profile::X86_64);
        let group = groups.get(id.unwrap()).unwrap();
        let rest = |online| remaining_pages(Some(group), BLOCK, || online);
        assert_eq!(rest((false, 0)), Some(4 * BLOCK));
        assert_eq!(rest((false, 3 * BLOCK)), Some(BLOCK));
        assert_eq!(rest((true, BLOCK)), None);
    }

    #[test]
    fn no_ratio_and_no_counter_is_too_large_and_0_is_always_kernel() {
        let most = ZoneTotals {
            kernel_early_pages: u64::MAX,
            movable_pages: u64::MAX,
            cma_pages: u64::MAX,
        };
        let mut groups = Groups::default();
        let id = groups
            .register_dynamic(0, 1 << 63, &Profile::X86_64)
            .unwrap();
        for movable in [false, true] {
            groups.account(id, movable, i64::MAX).unwrap();
            groups.account(id, movable, i64::MAX).unwrap();
        }
        let group = groups.get(id).unwrap();
        for ratio in [0, 1, u32::MAX] {
            for cma_pages in [0, u64::MAX] {
                let totals = ZoneTotals { cma_pages, ..most };
                let others = || iter::repeat_n(group, 3);
                fits(ratio, totals, Some(group), others(), u64::MAX);
            }
        }
        assert!(!fits(0, most, None, iter::empty(), 0));
        assert_eq!(
            remaining_pages(Some(group), 1, || (false, u64::MAX)),
            Some(0)
        );
    }
}

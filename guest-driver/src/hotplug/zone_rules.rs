//! Which zone a memory block may join, by the spans of its node's zones. The online policy `auto-movable` is beside
//! this.
//!
//! Linux: `zone_can_shift`, `allow_online_pfn_range`, `zone_for_pfn_range`, one after the other.

use alloc::vec::Vec;
use core::ops::Range;

use super::{Error, OnlineType, ZoneKind};

/// Which kernel's rules choose the zone of a memory block.
///
/// ```text
///  memory block                       32       33       34
///  all offline            UpTo4_12    N        N        N M        N    may go to Normal
///                         V4_13       N M      N M      N M        M    may go to Movable
///                         Since4_14   N M      N M      N M        [ ]  is online there
///  32 as movable memory   UpTo4_12    refused
///                         V4_13       [M]      M        M
///                         Since4_14   [M]      N M      N M
///  34 as movable memory   UpTo4_12    N        N M      [M]
///                         V4_13       N M      N M      [M]
///                         Since4_14   N M      N M      [M]
/// ```
///
/// All the memory of a node, added block by block: what the files `valid_zones` show, but for the edge of a zone that
/// an online block could still shift from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZoneRules {
    /// Up to Linux 4.12: memory joins a zone when it is added. When it comes online it may shift to another
    /// one only from the edge of its zone (`zone_can_shift`), so zones never overlap, and of memory just added
    /// only the last block can become movable.
    UpTo4_12,
    /// Linux 4.13: memory joins a zone when it comes online; kernel zones stay below Movable
    /// (`allow_online_pfn_range`).
    V4_13,
    /// Since Linux 4.14: as 4.13, but in any order, and zones may overlap (`zone_for_pfn_range`).
    #[default]
    Since4_14,
}

/// The page frames from the first to the last of each zone of one node, holes included; `None` if a zone is
/// empty.
///
/// Since 4.13 a span covers what is online. Up to 4.12 it covers what has been added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Spans(pub(super) [Option<Range<u64>>; ZoneKind::ALL.len()]);

impl Spans {
    /// Span of a zone.
    pub(super) fn get(&self, kind: ZoneKind) -> Option<&Range<u64>> {
        self.iter()
            .find(|(each, _)| *each == kind)
            .map(|(_, span)| span)
    }

    /// The zones that are not empty, from the lowest to the highest.
    fn iter(&self) -> impl Iterator<Item = (ZoneKind, &Range<u64>)> {
        let spans = ZoneKind::ALL.into_iter().zip(&self.0);
        spans.filter_map(|(kind, span)| Some((kind, span.as_ref()?)))
    }

    fn intersects(&self, kind: ZoneKind, block: &Range<u64>) -> bool {
        self.get(kind)
            .is_some_and(|span| span.start < block.end && block.start < span.end)
    }
}

/// The kernel zone for the page frames of a block: the lowest one whose span it meets, otherwise Normal
/// (`default_kernel_zone_for_pfn`).
pub(super) fn kernel_zone(spans: &Spans, block: &Range<u64>) -> ZoneKind {
    ZoneKind::ALL
        .into_iter()
        .find(|&kind| kind.is_kernel() && spans.intersects(kind, block))
        .unwrap_or(ZoneKind::Normal)
}

/// The zone a block joins when it is added, up to 4.12: Movable from its start on, otherwise Normal
/// (`zone_for_memory`).
pub(super) fn zone_on_add(spans: &Spans, block: &Range<u64>) -> ZoneKind {
    match spans.get(ZoneKind::Movable) {
        Some(movable) if movable.start <= block.start => ZoneKind::Movable,
        _ => ZoneKind::Normal,
    }
}

/// The zone an offline block joins when it comes online. `joined` is the zone it is in already, which only the
/// rules up to 4.12 ask for; `movable_node` is the parameter of that name on the kernel command line.
///
/// # Errors
///
/// [`Error::Invalid`] if the rules do not allow that type there.
pub(super) fn zone_for(
    rules: ZoneRules,
    spans: &Spans,
    block: &Range<u64>,
    joined: Option<ZoneKind>,
    online_type: OnlineType,
    movable_node: bool,
) -> Result<ZoneKind, Error> {
    match rules {
        ZoneRules::UpTo4_12 => {
            let current = joined.unwrap_or_else(|| zone_on_add(spans, block));
            let target = match online_type {
                OnlineType::Online => current,
                OnlineType::Kernel => ZoneKind::Normal,
                OnlineType::Movable => ZoneKind::Movable,
            };
            let allowed = can_shift(spans, block, current, target);
            allowed.then_some(target).ok_or(Error::Invalid)
        }
        ZoneRules::V4_13 => {
            let kernel = kernel_zone(spans, block);
            match online_type {
                OnlineType::Online if kernel_allowed(spans, block) => Ok(kernel),
                OnlineType::Online => Ok(ZoneKind::Movable),
                OnlineType::Kernel if kernel_allowed(spans, block) => Ok(kernel),
                OnlineType::Movable if movable_allowed(spans, block) => Ok(ZoneKind::Movable),
                OnlineType::Kernel | OnlineType::Movable => Err(Error::Invalid),
            }
        }
        ZoneRules::Since4_14 => {
            let kernel = kernel_zone(spans, block);
            let in_kernel = spans.intersects(kernel, block);
            let in_movable = spans.intersects(ZoneKind::Movable, block);
            let movable = match online_type {
                OnlineType::Kernel => false,
                OnlineType::Movable => true,
                OnlineType::Online if in_kernel != in_movable => in_movable,
                OnlineType::Online => movable_node,
            };
            Ok(if movable { ZoneKind::Movable } else { kernel })
        }
    }
}

/// The zones `valid_zones` of a block lists, in its order. Up to 4.12 there may be several for a block that is
/// online; in 4.13 there may be none for one that is not.
///
/// `online` is the zone of a block that is online, `joined` is as for [`zone_for`], and `default` is the zone
/// [`OnlineType::Online`] leads to now, by these rules or by the online policy.
pub(super) fn valid_zones(
    rules: ZoneRules,
    spans: &Spans,
    block: &Range<u64>,
    online: Option<ZoneKind>,
    joined: Option<ZoneKind>,
    default: ZoneKind,
) -> Vec<ZoneKind> {
    let kernel = kernel_zone(spans, block);
    let (candidates, allowed): ([ZoneKind; 3], [bool; 3]) = match (rules, online) {
        (ZoneRules::UpTo4_12, _) => {
            let current = online.or(joined).unwrap_or(default);
            let to = |target| can_shift(spans, block, current, target);
            (
                [current, ZoneKind::Normal, ZoneKind::Movable],
                [true, to(ZoneKind::Normal), to(ZoneKind::Movable)],
            )
        }
        (_, Some(zone)) => ([zone; 3], [true; 3]),
        (ZoneRules::V4_13, None) => (
            [kernel, kernel, ZoneKind::Movable],
            [
                kernel_allowed(spans, block),
                false,
                movable_allowed(spans, block),
            ],
        ),
        (ZoneRules::Since4_14, None) => ([default, kernel, ZoneKind::Movable], [true; 3]),
    };
    let mut zones = Vec::with_capacity(candidates.len());
    for (kind, allowed) in candidates.into_iter().zip(allowed) {
        if allowed && !zones.contains(&kind) {
            zones.push(kind);
        }
    }
    zones
}

/// Up to 4.12: whether a block may go from zone `current` to zone `target`. It must lie at the edge of its
/// zone that faces the other one, with no zone in use between them.
fn can_shift(spans: &Spans, block: &Range<u64>, current: ZoneKind, target: ZoneKind) -> bool {
    let at_edge = match spans.get(current) {
        _ if current == target => return true,
        Some(span) if current < target => span.end == block.end,
        Some(span) => span.start == block.start,
        None => false,
    };
    let between = |kind| current.min(target) < kind && kind < current.max(target);
    at_edge && !spans.iter().any(|(kind, _)| between(kind))
}

/// 4.13: kernel memory ends where Movable starts, or before.
fn kernel_allowed(spans: &Spans, block: &Range<u64>) -> bool {
    spans
        .get(ZoneKind::Movable)
        .is_none_or(|movable| block.end <= movable.start)
}

/// 4.13: movable memory starts where the kernel zone it would otherwise join ends, or later.
fn movable_allowed(spans: &Spans, block: &Range<u64>) -> bool {
    spans
        .get(kernel_zone(spans, block))
        .is_none_or(|kernel| kernel.end <= block.start)
}

#[cfg(test)]
mod tests {
    use super::ZoneRules::{Since4_14, UpTo4_12, V4_13};
    use super::*;
    use alloc::string::String;

    const PAGES: u64 = 32_768;

    fn pages(id: u64) -> Range<u64> {
        id * PAGES..(id + 1) * PAGES
    }

    /// A node without memory below 4 GiB, and its memory blocks from 32 on: the zone each is in, and whether it
    /// is online.
    #[derive(Clone, Default)]
    struct Node {
        rules: ZoneRules,
        blocks: Vec<(Option<ZoneKind>, bool)>,
    }

    impl Node {
        fn new(rules: ZoneRules) -> Self {
            let blocks = Vec::new();
            Self { rules, blocks }
        }

        fn ids(&self) -> impl Iterator<Item = u64> {
            (32..).take(self.blocks.len())
        }

        fn spans(&self) -> Spans {
            let span = |kind| {
                let mut ids = self.ids().zip(&self.blocks).filter(|b| b.1.0 == Some(kind));
                let first = ids.next()?.0;
                let last = ids.last().map_or(first, |b| b.0);
                Some(pages(first).start..pages(last).end)
            };
            Spans(ZoneKind::ALL.map(span))
        }

        fn probe(&mut self) {
            let id = 32 + self.blocks.len() as u64;
            let joined = zone_on_add(&self.spans(), &pages(id));
            let joined = (self.rules == UpTo4_12).then_some(joined);
            self.blocks.push((joined, false));
        }

        fn zone_for(&self, id: u64, online_type: OnlineType) -> Result<ZoneKind, Error> {
            let joined = self.blocks[id as usize - 32].0;
            let (spans, block) = (self.spans(), pages(id));
            zone_for(self.rules, &spans, &block, joined, online_type, false)
        }

        fn online(&mut self, id: u64, online_type: OnlineType) -> Result<ZoneKind, Error> {
            let zone = self.zone_for(id, online_type)?;
            self.blocks[id as usize - 32] = (Some(zone), true);
            Ok(zone)
        }

        /// `valid_zones` of every block.
        fn show(&self) -> Vec<String> {
            let show = |(id, &(zone, online)): (u64, &(Option<ZoneKind>, bool))| {
                let default = self.zone_for(id, OnlineType::Online).unwrap();
                let (spans, block, is) = (self.spans(), pages(id), zone.filter(|_| online));
                let zones = valid_zones(self.rules, &spans, &block, is, zone, default);
                let names: Vec<_> = zones.into_iter().map(ZoneKind::name).collect();
                names.join(" ")
            };
            self.ids().zip(&self.blocks).map(show).collect()
        }
    }

    /// Three blocks probed from 4 GiB on, one by one, and what `valid_zones` shows each time.
    fn three_probes(rules: ZoneRules, expected: [&[&str]; 3]) -> Node {
        let mut node = Node::new(rules);
        for zones in expected {
            node.probe();
            assert_eq!(node.show(), zones, "{rules:?}");
        }
        node
    }

    const BOTH: &str = "Normal Movable";

    #[test]
    fn up_to_4_12_only_the_last_block_can_become_movable() {
        let probes: [&[&str]; 3] = [&[BOTH], &["Normal", BOTH], &["Normal", "Normal", BOTH]];
        let mut node = three_probes(UpTo4_12, probes);
        assert_eq!(node.online(32, OnlineType::Movable), Err(Error::Invalid));
        assert_eq!(node.online(34, OnlineType::Movable), Ok(ZoneKind::Movable));
        assert_eq!(node.show(), ["Normal", BOTH, "Movable Normal"]);
    }

    #[test]
    fn up_to_4_12_a_block_added_above_movable_memory_is_movable() {
        let mut node = Node::new(UpTo4_12);
        node.probe();
        node.online(32, OnlineType::Movable).unwrap();
        node.probe();
        assert_eq!(node.show(), ["Movable Normal", "Movable"]);
        assert_eq!(node.online(33, OnlineType::Kernel), Err(Error::Invalid));
        assert_eq!(node.online(33, OnlineType::Online), Ok(ZoneKind::Movable));
    }

    #[test]
    fn up_to_4_12_no_shift_goes_across_a_zone_in_use() {
        let (boot, block) = (pages(0), pages(0));
        let shift = |normal| {
            let spans = Spans([None, Some(boot.clone()), normal, None]);
            let joined = Some(ZoneKind::Dma32);
            zone_for(UpTo4_12, &spans, &block, joined, OnlineType::Movable, false)
        };
        assert_eq!(shift(None), Ok(ZoneKind::Movable));
        assert_eq!(shift(Some(pages(32))), Err(Error::Invalid));
    }

    #[test]
    fn v4_13_movable_can_start_at_any_block_but_kernel_memory_stays_below_it() {
        let probes: [&[&str]; 3] = [&[BOTH], &[BOTH, BOTH], &[BOTH, BOTH, BOTH]];
        let mut node = three_probes(V4_13, probes);
        let mut other = node.clone();
        assert_eq!(node.online(34, OnlineType::Movable), Ok(ZoneKind::Movable));
        assert_eq!(node.show(), [BOTH, BOTH, "Movable"]);
        assert_eq!(other.online(32, OnlineType::Movable), Ok(ZoneKind::Movable));
        assert_eq!(other.show(), ["Movable"; 3]);
        assert_eq!(other.online(33, OnlineType::Kernel), Err(Error::Invalid));
        assert_eq!(other.online(33, OnlineType::Online), Ok(ZoneKind::Movable));
    }

    #[test]
    fn since_4_14_every_block_can_join_either_zone() {
        let probes: [&[&str]; 3] = [&[BOTH], &[BOTH, BOTH], &[BOTH, BOTH, BOTH]];
        let mut node = three_probes(Since4_14, probes);
        let mut other = node.clone();
        assert_eq!(node.online(34, OnlineType::Movable), Ok(ZoneKind::Movable));
        assert_eq!(node.show(), [BOTH, BOTH, "Movable"]);
        assert_eq!(other.online(32, OnlineType::Movable), Ok(ZoneKind::Movable));
        assert_eq!(other.show(), ["Movable", BOTH, BOTH]);
    }

    #[test]
    fn blocks_brought_online_in_the_order_they_were_added_become_movable_only_without_the_edge_rule()
     {
        for rules in [UpTo4_12, V4_13, Since4_14] {
            let mut node = Node::new(rules);
            (0..8).for_each(|_| node.probe());
            for id in 32..40 {
                let possible = rules != UpTo4_12 || id == 39;
                let result = node.online(id, OnlineType::Movable);
                assert_eq!(result.is_ok(), possible, "{rules:?}: memory{id}");
            }
        }
    }

    #[test]
    fn since_4_14_a_plain_online_follows_the_one_zone_around_it() {
        let (normal, movable) = (Some(pages(32)), Some(pages(33)));
        let plain = |spans: [Option<Range<u64>>; 2], movable_node| {
            let [normal, movable] = spans;
            let spans = Spans([None, None, normal, movable]);
            let block = pages(32).start..pages(33).end;
            zone_for(
                Since4_14,
                &spans,
                &block,
                None,
                OnlineType::Online,
                movable_node,
            )
        };
        for movable_node in [false, true] {
            let only_normal = plain([normal.clone(), None], movable_node);
            assert_eq!(only_normal, Ok(ZoneKind::Normal));
            let only_movable = plain([None, movable.clone()], movable_node);
            assert_eq!(only_movable, Ok(ZoneKind::Movable));
        }
        for spans in [[None, None], [normal, movable]] {
            assert_eq!(plain(spans.clone(), false), Ok(ZoneKind::Normal));
            assert_eq!(plain(spans, true), Ok(ZoneKind::Movable));
        }
    }

    #[test]
    fn kernel_memory_joins_the_lowest_zone_it_meets() {
        let spans = Spans([Some(0..4096), Some(4096..PAGES), None, None]);
        assert_eq!(kernel_zone(&spans, &pages(0)), ZoneKind::Dma);
        assert_eq!(kernel_zone(&spans, &(8192..PAGES)), ZoneKind::Dma32);
        assert_eq!(kernel_zone(&spans, &pages(1)), ZoneKind::Normal);
        let zones = valid_zones(Since4_14, &spans, &pages(0), None, None, ZoneKind::Movable);
        assert_eq!(zones, [ZoneKind::Movable, ZoneKind::Dma]);
    }

    /// What 4.13 promises, said without spans: no kernel block lies above a movable one.
    fn ordered(blocks: &[(Option<ZoneKind>, bool)]) -> bool {
        let zones: Vec<_> = blocks.iter().filter_map(|block| block.0).collect();
        zones.is_sorted()
    }

    #[test]
    fn v4_13_allows_exactly_what_keeps_kernel_memory_below_movable_memory() {
        const COUNT: u32 = 6;
        let states = [None, Some(ZoneKind::Normal), Some(ZoneKind::Movable)];
        for number in 0..3_usize.pow(COUNT) {
            let state = |block| states[number / 3_usize.pow(block) % 3];
            let mut node = Node::new(V4_13);
            node.blocks = (0..COUNT).map(|b| (state(b), state(b).is_some())).collect();
            if !ordered(&node.blocks) {
                continue;
            }
            let offline: Vec<_> = node.ids().zip(&node.blocks).filter(|b| !b.1.1).collect();
            for id in offline.into_iter().map(|block| block.0) {
                let with = |zone| {
                    let mut after = node.blocks.clone();
                    after[id as usize - 32] = (Some(zone), true);
                    ordered(&after).then_some(zone).ok_or(Error::Invalid)
                };
                let (kernel, movable) = (with(ZoneKind::Normal), with(ZoneKind::Movable));
                assert_eq!(node.zone_for(id, OnlineType::Kernel), kernel);
                assert_eq!(node.zone_for(id, OnlineType::Movable), movable);
                assert_eq!(node.zone_for(id, OnlineType::Online), kernel.or(movable));
            }
        }
    }
}

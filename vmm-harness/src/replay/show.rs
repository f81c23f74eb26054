//! The state of memory as people read it: a map of blocks and zones.
//!
//! ```text
//!            0        32
//! node 0     *KKKKKKK ~ MM.K
//!   DMA      =
//!   DMA32    ========
//!   Normal                 =
//!   Movable             ==
//! ```
//!
//! One column is one memory block, and gaps are one `~`. `K`, `M` and `D` are online in a kernel zone, in Movable, in
//! Device; `*` is online in several zones; `.` is offline; `!` is going offline.

use std::fmt::Write;

use super::snapshot::Snapshot;

/// Draws the map.
pub(super) fn render(snapshot: &Snapshot, block_pages: u64) -> String {
    let mut columns: Vec<Option<u64>> = Vec::new();
    let mut ruler = String::new();
    for id in snapshot.blocks.keys() {
        let last = columns.last().copied().flatten();
        if last.is_some_and(|last| last + 1 != *id) {
            columns.push(None);
        }
        if last.is_none_or(|last| last + 1 != *id) {
            let gap = columns.len().saturating_sub(ruler.len());
            // A run too short for the number of the one before it: keep them apart.
            let gap = if ruler.is_empty() { gap } else { gap.max(1) };
            ruler.push_str(&" ".repeat(gap));
            let _infallible = write!(ruler, "{id}");
        }
        columns.push(Some(*id));
    }
    let mut nodes: Vec<u32> = snapshot.blocks.values().map(|block| block.node).collect();
    nodes.extend(
        snapshot
            .zones
            .iter()
            .filter(|zone| zone.start_pfn.is_some())
            .map(|z| z.node),
    );
    nodes.sort_unstable();
    nodes.dedup();

    let mut map = String::new();
    let mut line = |head: &str, cells: String| {
        let text = format!("  {head:<11}{cells}");
        map.push_str(text.trim_end());
        map.push('\n');
    };
    line("", ruler);
    for node in nodes {
        let cells = columns.iter().map(|column| match column {
            None => '~',
            Some(id) => match &snapshot.blocks[id] {
                block if block.node == node => symbol(
                    &block.state,
                    block.valid_zones.as_deref().unwrap_or_default(),
                ),
                _ => ' ',
            },
        });
        line(&format!("node {node}"), cells.collect());
        for zone in snapshot.zones.iter().filter(|zone| zone.node == node) {
            let Some(span) = zone.span() else { continue };
            let cells = columns.iter().enumerate().map(|(index, column)| {
                // A gap is spanned if what is before it and what is behind it is.
                let covered =
                    |id: u64| id * block_pages < span.end && span.start < (id + 1) * block_pages;
                let beside = |index: Option<usize>| {
                    index
                        .and_then(|index| columns.get(index).copied().flatten())
                        .is_some_and(covered)
                };
                match column {
                    Some(id) if covered(*id) => '=',
                    None if beside(index.checked_sub(1)) && beside(Some(index + 1)) => '=',
                    _ => ' ',
                }
            });
            line(&format!("  {}", zone.zone), cells.collect());
        }
    }
    map
}

fn symbol(state: &str, valid_zones: &str) -> char {
    match (state, valid_zones) {
        ("online", "Movable") => 'M',
        ("online", "Device") => 'D',
        ("online", "none") => '*',
        ("online", _) => 'K',
        ("going-offline", _) => '!',
        _ => '.',
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::{BlockRow, ZoneRow};
    use super::*;

    fn block(state: &str, valid_zones: &str, node: u32) -> BlockRow {
        BlockRow {
            state: state.into(),
            valid_zones: Some(valid_zones.into()),
            node,
        }
    }

    fn zone(node: u32, zone: &str, start_pfn: u64, spanned: u64) -> ZoneRow {
        ZoneRow {
            node,
            zone: zone.into(),
            start_pfn: Some(start_pfn),
            spanned,
            present: spanned,
            managed: spanned,
        }
    }

    #[test]
    fn map_has_one_column_for_a_block_and_one_for_a_gap() {
        let blocks = [
            (0, block("online", "none", 0)),
            (1, block("online", "DMA32", 0)),
            (32, block("online", "Movable", 0)),
            (33, block("going-offline", "Movable Normal", 1)),
            (34, block("offline", "Normal Movable", 0)),
        ];
        let snapshot = Snapshot {
            blocks: blocks.into(),
            zones: vec![
                zone(0, "DMA", 1, 4095),
                zone(0, "DMA32", 4096, 2 * 32768 - 4096),
                zone(0, "Movable", 32768, 32 * 32768),
                zone(1, "Movable", 33 * 32768, 32768),
            ],
            ..Snapshot::default()
        };
        let expected = "
             0  32
  node 0     *K~M .
    DMA      =
    DMA32    ==
    Movable   ===
  node 1       ~ !
    Movable      =
";
        assert_eq!(render(&snapshot, 32768), expected[1..]);
    }
}

//! temp
use super::{Error, OnlineType, ZoneKind};
use alloc::vec::Vec;
use core::ops::Range;
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZoneRules {
    UpTo4_12,
    V4_13,
    #[default]
    Since4_14,
}
#[derive(Clone, Debug, Default)]
pub(super) struct Spans(pub(super) [Option<Range<u64>>; 4]);
fn hits(s: &Option<Range<u64>>, b: &Range<u64>) -> bool {
    s.as_ref()
        .is_some_and(|s| s.start < b.end && b.start < s.end)
}
pub(super) fn kernel_zone(s: &Spans, b: Range<u64>) -> ZoneKind {
    [ZoneKind::Dma, ZoneKind::Dma32]
        .into_iter()
        .find(|k| hits(&s.0[*k as usize], &b))
        .unwrap_or(ZoneKind::Normal)
}
pub(super) fn zone_on_add(_: &Spans, _: Range<u64>) -> ZoneKind {
    ZoneKind::Normal
}
pub(super) fn zone_for(
    _: ZoneRules,
    s: &Spans,
    b: Range<u64>,
    _: Option<ZoneKind>,
    t: OnlineType,
    movable_node: bool,
) -> Result<ZoneKind, Error> {
    let k = kernel_zone(s, b.clone());
    Ok(match t {
        OnlineType::Kernel => k,
        OnlineType::Movable => ZoneKind::Movable,
        OnlineType::Online => match (hits(&s.0[k as usize], &b), hits(&s.0[3], &b)) {
            (true, false) => k,
            (false, true) => ZoneKind::Movable,
            _ if movable_node => ZoneKind::Movable,
            _ => k,
        },
    })
}
pub(super) fn valid_zones(
    _: ZoneRules,
    s: &Spans,
    b: Range<u64>,
    online: Option<ZoneKind>,
    _j: Option<ZoneKind>,
    default: Option<ZoneKind>,
    _: bool,
) -> Vec<ZoneKind> {
    if let Some(z) = online {
        return alloc::vec![z];
    }
    let mut v = Vec::new();
    v.extend(default);
    for z in [kernel_zone(s, b), ZoneKind::Movable] {
        if !v.contains(&z) {
            v.push(z)
        }
    }
    v
}

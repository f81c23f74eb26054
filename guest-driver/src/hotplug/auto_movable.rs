//! temp
use super::group::Group;
#[derive(Default)]
pub(super) struct UnitState {
    pub any_kernel: bool,
    pub online_pages: u64,
}
#[derive(Default)]
pub(super) struct ZoneTotals {
    pub kernel_early_pages: u64,
    pub movable_pages: u64,
    pub cma_pages: u64,
}
pub(super) fn remaining_pages(
    own: Option<&Group>,
    block: u64,
    unit: impl Fn(u64) -> UnitState,
) -> Option<u64> {
    match own {
        Some(g) if g.max_pages.is_some() => {
            if g.present_kernel_pages > 0 {
                return None;
            }
            Some(g.max_pages? - g.present_movable_pages)
        }
        Some(g) if g.unit_pages != block => {
            let s = unit(g.unit_pages);
            if s.any_kernel {
                None
            } else {
                Some(g.unit_pages - s.online_pages)
            }
        }
        _ => Some(block),
    }
}
pub(super) fn fits<'a>(
    ratio: u32,
    t: ZoneTotals,
    own: Option<&Group>,
    others: impl Iterator<Item = &'a Group>,
    pages: u64,
) -> bool {
    if ratio == 0 {
        return false;
    }
    let mut k = t.kernel_early_pages - t.cma_pages;
    let mut m = t.movable_pages + t.cma_pages;
    let mut need = 0;
    for g in others {
        need += (g.present_movable_pages * 100 / u64::from(ratio))
            .saturating_sub(g.present_kernel_pages);
        m -= g.present_movable_pages;
    }
    if k <= need {
        return false;
    }
    k -= need;
    if let Some(g) = own
        && g.max_pages.is_none()
    {
        k += g.present_kernel_pages
    }
    m + pages <= u64::from(ratio) * k / 100
}

//! Linux's order: one request at a time, inside one unit.

use virtio_mem_wire::{BlockRange, BlockState};

use super::super::layout::Mode;
use super::super::state::{Presence, UnitState, View};
use super::{InUse, NextPlug, NoRoom};

/// The order in which partly plugged memory blocks are completed (`virtio_mem_sbm_plug_request`).
const PLUG_ORDER: [UnitState; 3] = [
    UnitState::KernelPartial,
    UnitState::MovablePartial,
    UnitState::OfflinePartial,
];

/// The order in which memory blocks are unplugged: the offline ones, then the partly plugged ones, so that whole
/// memory blocks become free; Movable before kernel zones (`virtio_mem_sbm_unplug_request`).
const UNPLUG_ORDER: [UnitState; 6] = [
    UnitState::OfflinePartial,
    UnitState::Offline,
    UnitState::MovablePartial,
    UnitState::KernelPartial,
    UnitState::Movable,
    UnitState::Kernel,
];

/// How many of those are offline.
const UNPLUG_OFFLINE: usize = 2;

/// The next blocks to plug, at most `granules`: the lowest gap of a partly plugged memory block, else the start of
/// the first unit that is not there yet, if one more `may_be_added`.
pub(in super::super) fn next_plug(view: &View<'_>, granules: u64, may_be_added: bool) -> NextPlug {
    let gap = match view.layout.mode {
        Mode::SubBlock => PLUG_ORDER.iter().find_map(|state| lowest_gap(view, *state)),
        Mode::BigBlock => None,
    };
    let gap = match gap {
        Some(gap) => gap,
        None => {
            let unused = |unit: &u64| view.state(*unit) == UnitState::Unused;
            let unit = view.units.clone().find(unused).ok_or(NoRoom::NoSpace)?;
            if !may_be_added {
                return Err(NoRoom::OfflineThreshold);
            }
            view.layout.unit(unit)
        }
    };
    Ok(BlockRange {
        count: gap.count.min(most_blocks(view, granules)),
        ..gap
    })
}

fn lowest_gap(view: &View<'_>, state: UnitState) -> Option<BlockRange> {
    let mut units = view.units.clone().filter(|unit| view.state(*unit) == state);
    units.find_map(|unit| {
        let blocks = view.layout.unit(unit);
        view.plugged.runs_in(blocks, false).next()
    })
}

/// The next blocks to unplug, at most `granules`, passing over what is `in_use`.
pub(in super::super) fn next_unplug(
    view: &View<'_>,
    granules: u64,
    in_use: &InUse,
    unplug_online: bool,
) -> Option<BlockRange> {
    match view.layout.mode {
        Mode::SubBlock => {
            let count = if unplug_online {
                UNPLUG_ORDER.len()
            } else {
                UNPLUG_OFFLINE
            };
            let mut states = UNPLUG_ORDER[..count].iter();
            states.find_map(|state| {
                let units = view.units.clone().rev();
                let mut units = units.filter(|unit| view.state(*unit) == *state);
                units.find_map(|unit| in_memory_block(view, unit, *state, granules, in_use))
            })
        }
        Mode::BigBlock => big_block(view, in_use, unplug_online),
    }
}

/// What to unplug of a memory block: of an offline one the highest run, of an online one everything if everything
/// must go, else its highest granule.
fn in_memory_block(
    view: &View<'_>,
    unit: u64,
    state: UnitState,
    granules: u64,
    in_use: &InUse,
) -> Option<BlockRange> {
    let blocks = view.layout.unit(unit);
    if matches!(state, UnitState::Offline | UnitState::OfflinePartial) {
        let run = view.plugged.runs_in(blocks, true).last()?;
        let count = run.count.min(most_blocks(view, granules));
        return (in_use.granules.count_in(run) == 0).then_some(BlockRange {
            first: run.end() - count,
            count,
        });
    }
    let whole = matches!(state, UnitState::Kernel | UnitState::Movable)
        && blocks.count <= most_blocks(view, granules)
        && !in_use.memory_blocks.contains(&unit)
        && in_use.granules.count_in(blocks) == 0;
    if whole {
        return Some(blocks);
    }
    view.layout.granules_in(blocks).rev().find(|granule| {
        view.plugged.state(*granule) == BlockState::Plugged
            && in_use.granules.count_in(*granule) == 0
    })
}

/// The highest big block: of those that are offline, then of those without kernel memory, then of all
/// (`virtio_mem_bbm_unplug_request`).
fn big_block(view: &View<'_>, in_use: &InUse, unplug_online: bool) -> Option<BlockRange> {
    let passes: [&[Presence]; 3] = [
        &[Presence::Offline],
        &[Presence::Offline, Presence::Movable],
        &[Presence::Offline, Presence::Movable, Presence::Kernel],
    ];
    let count = if unplug_online { passes.len() } else { 1 };
    passes[..count].iter().find_map(|pass| {
        let mut units = view.units.clone().rev();
        units.find_map(|unit| {
            let blocks = view.layout.unit(unit);
            let eligible = view.state(unit) == UnitState::Added
                && view
                    .common(unit)
                    .is_some_and(|common| pass.contains(&common))
                && in_use.granules.count_in(blocks) == 0;
            eligible.then_some(blocks)
        })
    })
}

/// A request names at most so many granules' blocks.
fn most_blocks(view: &View<'_>, granules: u64) -> u64 {
    let blocks = granules.saturating_mul(view.layout.granule_blocks);
    blocks.min(view.layout.request_blocks)
}

//! The state of a unit, derived from what is plugged and what the hotplug core has there: never stored.

use core::ops::Range;

use virtio_mem_wire::{BlockMap, BlockState as Plugged};

use super::layout::{Layout, Mode};
use crate::hotplug::{BlockState, Hotplug, Owner, ZoneKind};

/// What the hotplug core has in the place of a memory block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing.
    Absent,
    /// Memory somebody else has added.
    Foreign,
    /// Memory of the driver's that somebody is taking offline.
    GoingOffline,
    /// Memory of the driver's, offline.
    Offline,
    /// Memory of the driver's, online in a kernel zone.
    Kernel,
    /// Memory of the driver's, online in Movable.
    Movable,
}

impl Presence {
    pub(super) fn of<M>(hotplug: &Hotplug<M>, owner: Owner, id: u64) -> Self {
        let Some(block) = hotplug.block(id) else {
            return Self::Absent;
        };
        let address = id << hotplug.profile().memory_block_shift;
        match block.state {
            _ if hotplug.resources().owner(address) != Some(owner) => Self::Foreign,
            BlockState::GoingOffline => Self::GoingOffline,
            BlockState::Offline => Self::Offline,
            BlockState::Online if block.zone == Some(ZoneKind::Movable) => Self::Movable,
            BlockState::Online => Self::Kernel,
        }
    }

    /// Added by the driver, and nobody is working on it.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Offline | Self::Kernel | Self::Movable)
    }
}

/// The state of a unit: a memory block in Sub-Block Mode, a big block in Big-Block Mode. Linux's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitState {
    /// Nothing is plugged or added.
    Unused,
    /// Something is plugged, but it could not be added.
    Plugged,
    /// Sub-Block Mode: added, offline, plugged entirely.
    Offline,
    /// Sub-Block Mode: added, offline, plugged in part.
    OfflinePartial,
    /// Sub-Block Mode: online in a kernel zone, plugged entirely.
    Kernel,
    /// Sub-Block Mode: online in a kernel zone, plugged in part.
    KernelPartial,
    /// Sub-Block Mode: online in Movable, plugged entirely.
    Movable,
    /// Sub-Block Mode: online in Movable, plugged in part.
    MovablePartial,
    /// Big-Block Mode: plugged and added. Its memory blocks may be online or offline.
    Added,
    /// Big-Block Mode: added, but its memory is kept from the page allocator, to be unplugged.
    FakeOffline,
    /// Left alone: somebody else has added it, or is taking it offline.
    Foreign,
}

/// What decisions are made from.
pub(super) struct View<'a> {
    pub(super) layout: &'a Layout,
    pub(super) plugged: &'a BlockMap,
    pub(super) taken: &'a BlockMap,
    /// Ids of the units in the usable region.
    pub(super) units: Range<u64>,
    /// What there is in the place of a memory block.
    pub(super) presence: &'a dyn Fn(u64) -> Presence,
}

impl View<'_> {
    pub(super) fn state(&self, unit: u64) -> UnitState {
        let blocks = self.layout.unit(unit);
        let plugged = self.plugged.state(blocks);
        let partial = plugged != Plugged::Plugged;
        match (self.common(unit), self.layout.mode) {
            (Some(Presence::Absent), _) => match plugged {
                Plugged::Unplugged => UnitState::Unused,
                _ => UnitState::Plugged,
            },
            (None | Some(Presence::Foreign | Presence::GoingOffline), _) => UnitState::Foreign,
            (Some(_), Mode::BigBlock) => match self.taken.count_in(blocks) {
                0 if !partial => UnitState::Added,
                _ => UnitState::FakeOffline,
            },
            (Some(Presence::Offline), _) if partial => UnitState::OfflinePartial,
            (Some(Presence::Offline), _) => UnitState::Offline,
            (Some(Presence::Kernel), _) if partial => UnitState::KernelPartial,
            (Some(Presence::Kernel), _) => UnitState::Kernel,
            (Some(Presence::Movable), _) if partial => UnitState::MovablePartial,
            (Some(Presence::Movable), _) => UnitState::Movable,
        }
    }

    /// What the memory blocks of a unit have in common: the one least easy to empty stands for all that are the
    /// driver's. `None` if some are and some are not.
    pub(super) fn common(&self, unit: u64) -> Option<Presence> {
        let mut ids = self.layout.memory_blocks(unit).map(self.presence);
        let first = ids.next()?;
        ids.try_fold(first, |sum, next| match (sum, next) {
            _ if sum == next => Some(sum),
            (sum, next) if sum.is_ours() && next.is_ours() => {
                let either = |presence| sum == presence || next == presence;
                Some(match () {
                    () if either(Presence::Kernel) => Presence::Kernel,
                    () if either(Presence::Movable) => Presence::Movable,
                    () => Presence::Offline,
                })
            }
            _ => None,
        })
    }

    /// Bytes of the driver's memory that is offline.
    pub(super) fn offline_size(&self, all_units: Range<u64>) -> u64 {
        let ids = all_units.flat_map(|unit| self.layout.memory_blocks(unit));
        let offline = ids.filter(|id| (self.presence)(*id) == Presence::Offline);
        offline.count() as u64 * self.layout.memory_block_size
    }
}

/// The most memory that may lie around offline before no more is added: its metadata takes memory too, and somebody
/// must be willing to bring it online (Linux: `offline_threshold`).
pub(super) fn offline_threshold(layout: &Layout) -> u64 {
    const LEAST: u64 = 1 << 30;
    LEAST
        .max(2 * layout.memory_block_size)
        .max(layout.unit_size.saturating_mul(2))
}

//! Which zone a memory block goes to: what the rules of the zones, the online policy and the block's group come to.

use alloc::string::String;
use alloc::vec::Vec;

use super::auto_movable::{self, ZoneTotals};
use super::group::{Group, GroupKind};
use super::memory_block::{BlockState, MemoryBlock};
use super::online_type::OnlineType;
use super::zone::ZoneKind;
use super::zone_rules;
use super::{Error, Hotplug, OnlinePolicy};

impl<M> Hotplug<M> {
    /// The text of `valid_zones`: of an online block its zone, or `none` if it has several; of any other the zone a
    /// plain `online` would choose now, then the others it may go to.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is no such block.
    pub fn valid_zones(&self, id: u64) -> Result<String, Error> {
        let block = self.blocks.get(&id).ok_or(Error::NotFound)?;
        let online = (block.state == BlockState::Online).then_some(block.zone);
        if online == Some(None) {
            return Ok("none".into());
        }
        let default = self.zone_for(id, block, OnlineType::Online);
        let zones = zone_rules::valid_zones(
            self.config.zone_rules,
            &self.nodes.spans(block.nid),
            &self.pages_of_block(id),
            online.flatten(),
            block.joined,
            default?,
        );
        let names: Vec<&str> = zones.into_iter().map(ZoneKind::name).collect();
        Ok(names.join(" "))
    }

    /// The zone memory block `id` goes to (Linux: `zone_for_pfn_range`).
    pub(super) fn zone_for(
        &self,
        id: u64,
        block: &MemoryBlock,
        online_type: OnlineType,
    ) -> Result<ZoneKind, Error> {
        let spans = self.nodes.spans(block.nid);
        let pages = self.pages_of_block(id);
        if online_type == OnlineType::Online
            && self.config.online_policy == OnlinePolicy::AutoMovable
        {
            return Ok(match self.fits_movable(id, block) {
                true => ZoneKind::Movable,
                false => zone_rules::kernel_zone(&spans, &pages),
            });
        }
        zone_rules::zone_for(
            self.config.zone_rules,
            &spans,
            &pages,
            block.joined,
            online_type,
            self.config.movable_node,
        )
    }

    /// Whether the block and what is expected to follow it may all be Movable (Linux: `auto_movable_zone_for_pfn`).
    fn fits_movable(&self, id: u64, block: &MemoryBlock) -> bool {
        let own = block.group.and_then(|group| self.groups.get(group).ok());
        let unit = || self.unit_state(id, own);
        let Some(pages) =
            auto_movable::remaining_pages(own, self.config.profile.memory_block_pages(), unit)
        else {
            return false;
        };
        let fits = |nid: Option<u32>| {
            auto_movable::fits(
                self.config.auto_movable_ratio,
                self.zone_totals(nid),
                own,
                self.groups.other_dynamic(nid, block.group),
                pages,
            )
        };
        fits(None) && (!self.config.auto_movable_numa_aware || fits(Some(block.nid)))
    }

    /// Whether any of the unit that memory block `id` is part of is online in a kernel zone, and how many pages of it
    /// are online.
    fn unit_state(&self, id: u64, group: Option<&Group>) -> (bool, u64) {
        let unit_pages = match group.map(|group| group.kind) {
            Some(GroupKind::Dynamic { unit_pages }) => unit_pages,
            _ => self.config.profile.memory_block_pages(),
        };
        let blocks = (unit_pages / self.config.profile.memory_block_pages()).max(1);
        let first = id / blocks * blocks;
        let (mut any_kernel, mut online_pages) = (false, 0);
        for (_, block) in self.blocks.range(first..first.saturating_add(blocks)) {
            // Whatever is going offline is still online.
            if block.state != BlockState::Offline {
                any_kernel |= block.zone != Some(ZoneKind::Movable);
                online_pages += self.config.profile.memory_block_pages();
            }
        }
        (any_kernel, online_pages)
    }

    /// The zones of a node, or of all, by what counts for the ratio.
    fn zone_totals(&self, nid: Option<u32>) -> ZoneTotals {
        let mut totals = ZoneTotals::default();
        for (id, zone) in self.nodes.zones() {
            if nid.is_some_and(|nid| nid != id.nid) {
                continue;
            }
            if id.kind == ZoneKind::Movable {
                totals.movable_pages += zone.present;
            } else {
                totals.kernel_early_pages += zone.present_early;
                totals.cma_pages += zone.cma;
            }
        }
        totals
    }
}

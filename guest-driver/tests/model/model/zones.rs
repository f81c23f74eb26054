//! Which zone a memory block goes to, in three eras.

use super::*;

impl Model {
    pub(super) fn spans_meet(&self, nid: u32, kind: ZoneKind, pages: &Range<u64>) -> bool {
        self.span(nid, kind).is_some_and(|span| meet(&span, pages))
    }

    pub(super) fn kernel_zone(&self, nid: u32, pages: &Range<u64>) -> ZoneKind {
        [ZoneKind::Dma, ZoneKind::Dma32]
            .into_iter()
            .find(|kind| self.spans_meet(nid, *kind, pages))
            .unwrap_or(ZoneKind::Normal)
    }

    /// Up to 4.12: from the end of its zone upwards, or from the start of it downwards, over nothing in between.
    pub(super) fn can_shift(
        &self,
        nid: u32,
        pages: &Range<u64>,
        from: ZoneKind,
        to: ZoneKind,
    ) -> bool {
        let (from_index, to_index) = (from as usize, to as usize);
        let span = self.span(nid, from);
        let at_edge = match from_index.cmp(&to_index) {
            std::cmp::Ordering::Equal => return true,
            std::cmp::Ordering::Less => span.is_some_and(|span| span.end == pages.end),
            std::cmp::Ordering::Greater => span.is_some_and(|span| span.start == pages.start),
        };
        let between = from_index.min(to_index) + 1..from_index.max(to_index);
        at_edge
            && between
                .into_iter()
                .all(|index| self.span(nid, KINDS[index]).is_none())
    }

    pub(super) fn kernel_allowed_4_13(&self, nid: u32, pages: &Range<u64>) -> bool {
        self.span(nid, ZoneKind::Movable)
            .is_none_or(|movable| movable.start >= pages.end)
    }

    pub(super) fn movable_allowed_4_13(&self, nid: u32, pages: &Range<u64>) -> bool {
        let kernel = self.kernel_zone(nid, pages);
        self.span(nid, kernel)
            .is_none_or(|kernel| kernel.end <= pages.start)
    }

    pub(super) fn zone_for(&self, id: u64, online_type: OnlineType) -> Result<ZoneKind, Error> {
        let block = &self.blocks[&id];
        let (nid, pages) = (block.nid, self.pages_of(id));
        let kernel = self.kernel_zone(nid, &pages);
        if online_type == OnlineType::Online
            && self.config.online_policy == OnlinePolicy::AutoMovable
        {
            return Ok(if self.fits_movable(id) {
                ZoneKind::Movable
            } else {
                kernel
            });
        }
        match self.config.zone_rules {
            ZoneRules::UpTo4_12 => {
                let current = block.joined.expect("everything has joined a zone then");
                let target = match online_type {
                    OnlineType::Online => return Ok(current),
                    OnlineType::Kernel => ZoneKind::Normal,
                    OnlineType::Movable => ZoneKind::Movable,
                };
                self.can_shift(nid, &pages, current, target)
                    .then_some(target)
                    .ok_or(Error::Invalid)
            }
            ZoneRules::V4_13 => match online_type {
                OnlineType::Online if self.kernel_allowed_4_13(nid, &pages) => Ok(kernel),
                OnlineType::Online => Ok(ZoneKind::Movable),
                OnlineType::Kernel if self.kernel_allowed_4_13(nid, &pages) => Ok(kernel),
                OnlineType::Movable if self.movable_allowed_4_13(nid, &pages) => {
                    Ok(ZoneKind::Movable)
                }
                _ => Err(Error::Invalid),
            },
            ZoneRules::Since4_14 => Ok(match online_type {
                OnlineType::Kernel => kernel,
                OnlineType::Movable => ZoneKind::Movable,
                OnlineType::Online => {
                    let in_kernel = self.spans_meet(nid, kernel, &pages);
                    let in_movable = self.spans_meet(nid, ZoneKind::Movable, &pages);
                    match (in_kernel, in_movable) {
                        (true, false) => kernel,
                        (false, true) => ZoneKind::Movable,
                        _ if self.config.movable_node => ZoneKind::Movable,
                        _ => kernel,
                    }
                }
            }),
        }
    }

    pub(super) fn pages_of_group(&self, group: usize, kernel: bool) -> u64 {
        let online = self.blocks.values().filter(|block| {
            block.group == Some(group) && block.zone.is_some_and(|zone| is_kernel(zone) == kernel)
        });
        online.count() as u64 * (self.block_size() / self.page())
    }

    /// Whether what is left of the device fits into Movable.
    pub(super) fn fits_movable(&self, id: u64) -> bool {
        let block = &self.blocks[&id];
        let block_pages = self.block_size() / self.page();
        let pages = match block.group.map(|group| (group, self.groups[group].kind)) {
            Some((group, GroupKind::Static(max))) => {
                if self.pages_of_group(group, true) > 0 {
                    return false;
                }
                max.saturating_sub(self.pages_of_group(group, false))
            }
            Some((_, GroupKind::Dynamic(unit))) if unit != block_pages => {
                let blocks = unit / block_pages;
                let first = id / blocks * blocks;
                let unit_blocks = first..first + blocks;
                let online: Vec<_> = self
                    .blocks
                    .iter()
                    .filter(|(id, block)| {
                        unit_blocks.contains(id) && block.state != BlockState::Offline
                    })
                    .collect();
                if online
                    .iter()
                    .any(|(_, block)| block.zone != Some(ZoneKind::Movable))
                {
                    return false;
                }
                unit - online.len() as u64 * block_pages
            }
            _ => block_pages,
        };
        self.ratio_allows(None, block.group, pages)
            && (!self.config.auto_movable_numa_aware
                || self.ratio_allows(Some(block.nid), block.group, pages))
    }

    pub(super) fn ratio_allows(&self, nid: Option<u32>, own: Option<usize>, pages: u64) -> bool {
        let ratio = i128::from(self.config.auto_movable_ratio);
        if ratio == 0 {
            return false;
        }
        let (mut kernel, mut movable) = (0i128, 0i128);
        for ((node, kind), counts) in self.zones() {
            if nid.is_some_and(|nid| nid != node) {
                continue;
            }
            if KINDS[kind] == ZoneKind::Movable {
                movable += i128::from(counts.present);
            } else {
                kernel += i128::from(counts.early) - i128::from(counts.cma);
                movable += i128::from(counts.cma);
            }
        }
        let mut needed = 0;
        for (index, group) in self.groups.iter().enumerate() {
            let elsewhere = nid.is_some_and(|nid| nid != group.nid);
            if !group.live
                || elsewhere
                || Some(index) == own
                || !matches!(group.kind, GroupKind::Dynamic(_))
            {
                continue;
            }
            let group_movable = i128::from(self.pages_of_group(index, false));
            let group_kernel = i128::from(self.pages_of_group(index, true));
            needed += (group_movable * 100 / ratio - group_kernel).max(0);
            movable -= group_movable;
        }
        if needed >= kernel {
            return false;
        }
        kernel -= needed;
        if let Some(own) = own
            && matches!(self.groups[own].kind, GroupKind::Dynamic(_))
        {
            kernel += i128::from(self.pages_of_group(own, true));
        }
        movable + i128::from(pages) <= ratio * kernel / 100
    }

    pub(crate) fn valid_zones(&self, id: u64) -> String {
        let block = &self.blocks[&id];
        let (nid, pages) = (block.nid, self.pages_of(id));
        let online = (block.state == BlockState::Online).then_some(block.zone);
        if online == Some(None) {
            return "none".into();
        }
        let mut zones = Vec::new();
        let normal_then_movable = [ZoneKind::Normal, ZoneKind::Movable];
        match (self.config.zone_rules, online.flatten()) {
            (ZoneRules::UpTo4_12, online) => {
                let current = online
                    .or(block.joined)
                    .expect("everything has joined a zone then");
                zones.push(current);
                zones.extend(
                    normal_then_movable
                        .into_iter()
                        .filter(|to| self.can_shift(nid, &pages, current, *to)),
                );
            }
            (_, Some(zone)) => zones.push(zone),
            (ZoneRules::V4_13, None) => {
                if self.kernel_allowed_4_13(nid, &pages) {
                    zones.push(self.kernel_zone(nid, &pages));
                }
                if self.movable_allowed_4_13(nid, &pages) {
                    zones.push(ZoneKind::Movable);
                }
            }
            (ZoneRules::Since4_14, None) => {
                zones.extend(self.zone_for(id, OnlineType::Online));
                zones.extend([self.kernel_zone(nid, &pages), ZoneKind::Movable]);
            }
        }
        let mut names: Vec<&str> = Vec::new();
        for zone in zones {
            if !names.contains(&name(zone)) {
                names.push(name(zone));
            }
        }
        names.join(" ")
    }
}

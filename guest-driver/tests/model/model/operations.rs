//! What each operation comes to.

use super::*;

impl Model {
    /// Charges the metadata of `bytes` to kernel memory; all or nothing.
    pub(super) fn charge(
        &self,
        nid: u32,
        bytes: u64,
        room: &mut BTreeMap<(u32, usize), u64>,
    ) -> Result<Vec<(Zone, u64)>, Error> {
        let struct_page = u64::from(self.config.struct_page_size);
        let mut needed = (bytes / self.page() * struct_page).div_ceil(self.page());
        let mut charges = Vec::new();
        for zone in self.zones_in_order(nid, false) {
            let Some(room) = room.get_mut(&(zone.0, zone.1 as usize)) else {
                continue;
            };
            let taken = needed.min(*room);
            *room -= taken;
            needed -= taken;
            if taken > 0 {
                charges.push((zone, taken));
            }
        }
        if needed > 0 {
            Err(Error::NoMemory)
        } else {
            Ok(charges)
        }
    }

    pub(super) fn general_room(&self) -> BTreeMap<(u32, usize), u64> {
        self.zones()
            .into_iter()
            .map(|(zone, counts)| (zone, counts.general))
            .collect()
    }

    /// The zones pages are taken from: first those of the node, the highest first.
    pub(super) fn zones_in_order(&self, nid: u32, movable: bool) -> Vec<Zone> {
        let mut nodes = vec![nid];
        nodes.extend((0..self.config.possible_nodes).filter(|node| *node != nid));
        let kinds = KINDS
            .into_iter()
            .rev()
            .filter(|kind| movable || is_kernel(*kind));
        let kinds: Vec<_> = kinds.collect();
        nodes
            .into_iter()
            .flat_map(|nid| {
                kinds
                    .iter()
                    .map(move |kind| (nid, *kind))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    pub(super) fn addressable(&self, bytes: &Range<u64>) -> bool {
        bytes.end <= 1 << self.profile.physical_address_bits
    }

    pub(super) fn add(&mut self, add: &Add, trail: &mut Trail) -> Outcome {
        let plain = add.name == "System RAM";
        let managed = add.name.starts_with("System RAM (") && add.name.ends_with(')');
        if !plain && !managed {
            return Err(Error::Invalid);
        }
        if add.size == 0 {
            return Err(Error::Invalid);
        }
        let Some(end) = add.start.checked_add(add.size) else {
            return Err(Error::TooBig);
        };
        let bytes = add.start..end;
        if !self.addressable(&bytes) {
            return Err(Error::TooBig);
        }
        trail.reach(Step::Resource)?;
        if !self.is_vacant(&bytes) {
            return Err(Error::Exists);
        }
        if !bytes.start.is_multiple_of(self.block_size())
            || !bytes.end.is_multiple_of(self.block_size())
        {
            return Err(Error::Invalid);
        }
        let per = self.profile.pageblock_size();
        let withheld = &add.withheld;
        if !withheld.is_empty()
            && (!withheld.start.is_multiple_of(per) || !withheld.end.is_multiple_of(per))
        {
            return Err(Error::Invalid);
        }
        let (nid, group) = match add.target {
            Target::Node(nid) => (nid, None),
            Target::Group(index) => match self.groups.get(index).filter(|group| group.live) {
                Some(group) => (group.nid, Some(index)),
                None => return Err(Error::Invalid),
            },
        };
        if nid >= self.config.possible_nodes {
            return Err(Error::Invalid);
        }
        trail.reach(Step::Node)?;
        trail.reach(Step::Mapping)?;
        let memmap_pages = if add.memmap && withheld.is_empty() {
            self.self_hosted(add.size)?
        } else {
            None
        };
        let ids = bytes.start / self.block_size()..bytes.end / self.block_size();
        let sections = self.block_size() / self.profile.section_size();
        let mut charges = Vec::new();
        let mut room = if memmap_pages.is_none() {
            self.general_room()
        } else {
            BTreeMap::new()
        };
        for _ in ids.clone() {
            let mut of_block = Vec::new();
            for _ in 0..sections {
                trail.reach(Step::Memmap)?;
                if memmap_pages.is_none() {
                    of_block.extend(self.charge(nid, self.profile.section_size(), &mut room)?);
                }
            }
            charges.push(of_block);
        }
        for _ in ids.clone() {
            trail.reach(Step::MemoryBlock)?;
        }
        self.ram.push(Ram {
            bytes: bytes.clone(),
            name: add.name.into(),
            mergeable: false,
        });
        let sub = self.profile.sub_section_size();
        self.owners
            .extend((bytes.start / sub..bytes.end / sub).map(|number| (number, add.owner)));
        if add.merge {
            self.merge(&bytes);
        }
        for (id, charges) in ids.clone().zip(charges) {
            let pages = self.pages_of(id);
            let joined = (self.config.zone_rules == ZoneRules::UpTo4_12).then(|| {
                let movable = self.span(nid, ZoneKind::Movable);
                match movable.is_some_and(|movable| movable.start <= pages.start) {
                    true => ZoneKind::Movable,
                    false => ZoneKind::Normal,
                }
            });
            if let Some(kind) = joined {
                self.extend((nid, kind), &pages);
            }
            let memmap_pages = memmap_pages.unwrap_or(0);
            self.blocks.insert(
                id,
                Block {
                    state: BlockState::Offline,
                    nid,
                    zone: None,
                    joined,
                    sticky: None,
                    group,
                    memmap_pages,
                    poisoned: 0,
                    early: false,
                    charges,
                },
            );
            let first_free = self.pageblocks_of(id).start + memmap_pages / self.pageblock_pages();
            for pageblock in self.pageblocks_of(id) {
                let memmap = pageblock < first_free;
                let record = Pageblock {
                    ram: self.pageblock_pages(),
                    withheld: !memmap && withheld.contains(&(pageblock * per)),
                    memmap,
                    ..Pageblock::default()
                };
                self.pageblocks.insert(pageblock, record);
            }
            trail.uevents.push(format!("add memory{id}"));
        }
        if let Some(online_type) = self.config.default_online_type {
            for id in ids {
                if self.online(id, online_type, trail).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Pages of each block that hold its metadata.
    pub(super) fn self_hosted(&self, size: u64) -> Result<Option<u64>, Error> {
        let (mode, rule) = (self.config.memmap_on_memory, self.config.memmap_rule);
        let per_pageblock = self.pageblock_pages();
        let bytes = self.block_size() / self.page() * 64;
        let mut pages = bytes / self.page();
        if mode == MemmapOnMemory::Force && rule == MemmapRule::PerBlock {
            pages = pages.div_ceil(per_pageblock) * per_pageblock;
        }
        let possible = mode != MemmapOnMemory::Off
            && bytes.is_multiple_of(self.page())
            && bytes.is_multiple_of(1 << self.profile.pmd_shift)
            && pages.is_multiple_of(per_pageblock)
            && pages < self.block_size() / self.page()
            && (rule == MemmapRule::PerBlock || size == self.block_size());
        match (possible, rule) {
            (true, _) => Ok(Some(pages)),
            (false, MemmapRule::PerBlock) => Ok(None),
            (false, MemmapRule::SingleBlock) => Err(Error::Invalid),
        }
    }

    pub(super) fn removable(&self, owner: Owner, bytes: &Range<u64>) -> Result<Range<u64>, Error> {
        let size = self.block_size();
        if bytes.is_empty() || !bytes.start.is_multiple_of(size) || !bytes.end.is_multiple_of(size)
        {
            return Err(Error::Invalid);
        }
        let ids = bytes.start / size..bytes.end / size;
        if !ids.clone().all(|id| self.blocks.contains_key(&id)) {
            return Err(Error::Invalid);
        }
        self.owns(owner, bytes)?;
        Ok(ids)
    }

    pub(super) fn remove(
        &mut self,
        owner: Owner,
        bytes: &Range<u64>,
        trail: &mut Trail,
    ) -> Outcome {
        let ids = self.removable(owner, bytes)?;
        if !self.config.hot_remove
            || !ids
                .clone()
                .all(|id| self.blocks[&id].state == BlockState::Offline)
        {
            return Err(Error::Busy);
        }
        let touched = |ram: &Ram| meet(&ram.bytes, bytes);
        let (cut, mut left): (Vec<_>, Vec<_>) = self.ram.drain(..).partition(touched);
        for whole in cut {
            for rest in [whole.bytes.start..bytes.start, bytes.end..whole.bytes.end] {
                if !rest.is_empty() {
                    left.push(Ram {
                        bytes: rest,
                        ..whole.clone()
                    });
                }
            }
        }
        self.ram = left;
        let sub = self.profile.sub_section_size();
        for number in bytes.start / sub..bytes.end / sub {
            self.owners.remove(&number);
        }
        for id in ids {
            let block = self.blocks.remove(&id).expect("it was looked up");
            let pages = self.pages_of(id);
            if let Some(kind) = block.joined {
                self.shrink((block.nid, kind), &pages);
            }
            for pageblock in self.pageblocks_of(id) {
                self.pageblocks.remove(&pageblock);
            }
            let section = self.profile.section_size();
            for number in id * self.block_size() / section..(id + 1) * self.block_size() / section {
                self.tainted.remove(&number);
            }
            trail.uevents.push(format!("remove memory{id}"));
        }
        Ok(())
    }

    pub(super) fn online(
        &mut self,
        id: u64,
        online_type: OnlineType,
        trail: &mut Trail,
    ) -> Outcome {
        let block = self.blocks.get_mut(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Err(Error::Invalid);
        }
        block.sticky = None;
        if block.poisoned > 0 {
            return Err(Error::HwPoison);
        }
        let kind = self.zone_for(id, online_type)?;
        trail.reach(Step::PrepareOnline)?;
        if let Err(veto) = self.notify(id, MemoryAction::GoingOnline, trail) {
            let _told = self.notify(id, MemoryAction::CancelOnline, trail);
            return Err(veto);
        }
        let pages = self.pages_of(id);
        let block = self.blocks.get_mut(&id).expect("it was looked up");
        let nid = block.nid;
        block.state = BlockState::Online;
        block.zone = Some(kind);
        let left = block.joined.filter(|old| *old != kind);
        if block.joined.is_some() {
            block.joined = Some(kind);
        }
        for pageblock in self.pageblocks_of(id) {
            let record = self
                .pageblocks
                .get_mut(&pageblock)
                .expect("blocks that were offline are whole");
            record.zone = Some((nid, kind));
        }
        if let Some(old) = left {
            self.shrink((nid, old), &pages);
        }
        self.extend((nid, kind), &pages);
        let _told = self.notify(id, MemoryAction::Online, trail);
        trail.uevents.push(format!("online memory{id}"));
        Ok(())
    }

    pub(super) fn device_online(&mut self, id: u64, trail: &mut Trail) -> Result<bool, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        if block.state != BlockState::Offline {
            return Ok(false);
        }
        let online_type = block.sticky.unwrap_or(OnlineType::Online);
        self.online(id, online_type, trail).map(|()| true)
    }

    pub(super) fn device_offline(
        &mut self,
        id: u64,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Result<bool, Error> {
        match self.blocks.get(&id).map(|block| block.state) {
            Some(BlockState::Offline) => Ok(false),
            _ => self.offline(id, hint, trail).map(|()| true),
        }
    }

    /// The bytes as whole pageblocks.
    pub(super) fn whole_pageblocks(&self, bytes: &Range<u64>) -> Result<Range<u64>, Error> {
        let size = self.profile.pageblock_size();
        let whole =
            !bytes.is_empty() && bytes.start.is_multiple_of(size) && bytes.end.is_multiple_of(size);
        whole
            .then_some(bytes.start / size..bytes.end / size)
            .ok_or(Error::Invalid)
    }

    pub(super) fn start_isolation(
        &mut self,
        pageblocks: Range<u64>,
        block: Option<u64>,
        wants_room: bool,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Result<Isolation, Error> {
        trail.reach(Step::Isolate)?;
        let zones = self.zones();
        let uses = self.uses();
        let per = self.pageblock_pages();
        let (mut capacity, mut passes_left, mut may_be_busy) = (0, 5, false);
        let mut check = |pageblock: u64| {
            let record = self.pageblocks.get(&pageblock).ok_or(Error::Invalid)?;
            let (nid, kind) = record.zone.ok_or(Error::Invalid)?;
            let uses = uses.get(&pageblock).copied().unwrap_or_default();
            let stuck = uses.unmovable > 0 || uses.reserved > 0 || record.ram < per;
            let wrong = match block {
                Some(_) => record.cma,
                None => record.withheld || record.memmap || uses.poisoned > 0,
            };
            if record.isolated || stuck || wrong {
                return Err(Error::Busy);
            }
            // Metadata may be anywhere in the zone it is charged to.
            may_be_busy |=
                zones[&(nid, kind as usize)].charged > 0 && !record.withheld && !record.cma;
            if kind != ZoneKind::Movable && block.is_none() {
                passes_left = 1;
            }
            capacity += Self::managed(record, &uses) - uses.poisoned;
            Ok(())
        };
        let checked = pageblocks.clone().try_for_each(&mut check);
        if may_be_busy
            && hint.result == Err(Error::Busy)
            && !hint.pinned
            && hint.offlined == trail.offlined
        {
            return Err(Error::Busy);
        }
        checked?;
        let allocatable: u64 = zones.values().map(|counts| counts.allocatable).sum();
        // Pages that were in a block this operation took offline are somewhere else by now.
        let displaced = self
            .held
            .iter()
            .filter_map(|page| page.pfn)
            .filter(|pfn| self.pageblocks[&(pfn / per)].zone.is_none());
        if wants_room && capacity > allocatable - displaced.count() as u64 {
            return Err(Error::NoMemory);
        }
        for pageblock in pageblocks.clone() {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was looked up")
                .isolated = true;
        }
        Ok(Isolation {
            pageblocks,
            block,
            passes_left,
            blocked: false,
        })
    }

    pub(super) fn isolate_block(
        &mut self,
        id: u64,
        wants_room: bool,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Result<Isolation, Error> {
        let block = self.blocks.get(&id).ok_or(Error::Invalid)?;
        let whole = !block.early
            || self.pageblocks_of(id).all(|pageblock| {
                self.pageblocks
                    .get(&pageblock)
                    .is_some_and(|record| record.ram == self.pageblock_pages())
            });
        if block.state != BlockState::Online
            || !self.config.hot_remove
            || block.zone.is_none()
            || !whole
        {
            return Err(Error::Invalid);
        }
        let mut pageblocks = self.pageblocks_of(id);
        pageblocks.start += block.memmap_pages / self.pageblock_pages();
        let isolation = self.start_isolation(pageblocks, Some(id), wants_room, hint, trail)?;
        self.blocks.get_mut(&id).expect("it was looked up").state = BlockState::GoingOffline;
        if let Err(veto) = self.notify(id, MemoryAction::GoingOffline, trail) {
            self.cancel(isolation, trail);
            return Err(veto);
        }
        Ok(isolation)
    }

    pub(super) fn cancel(&mut self, isolation: Isolation, trail: &mut Trail) {
        for pageblock in isolation.pageblocks {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was isolated")
                .isolated = false;
        }
        if let Some(id) = isolation.block {
            self.blocks
                .get_mut(&id)
                .expect("it was going offline")
                .state = BlockState::Online;
            let _told = self.notify(id, MemoryAction::CancelOffline, trail);
        }
    }

    pub(super) fn uses_of(&self, pageblocks: &Range<u64>) -> Uses {
        let mut sum = Uses::default();
        for (pageblock, uses) in self.uses() {
            if pageblocks.contains(&pageblock) {
                sum.held += uses.held;
                sum.pinned += uses.pinned;
                sum.poisoned += uses.poisoned;
            }
        }
        sum
    }

    /// Moves everything out, then takes the pages; or undoes everything.
    pub(super) fn empty(
        &mut self,
        isolation: Isolation,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        trail.emptied.push(isolation.pageblocks.clone());
        let uses = self.uses_of(&isolation.pageblocks);
        let mut done = Ok(());
        if let Some(fault) = trail.fault
            && fault.step == Step::Migrate
        {
            // Where nothing has moved yet in this operation, it is known how many pages are to be moved.
            let must_come = u64::from(fault.skip) < uses.held - uses.pinned;
            if trail.offlined == 0 && (must_come || hint.offlined == 0) {
                assert_eq!(
                    hint.fault_hit, must_come,
                    "whether a fault comes in migration"
                );
            }
            if hint.fault_hit && hint.offlined == trail.offlined {
                trail.fault = None;
                trail.fault_came = true;
                done = Err(fault.error);
            }
        }
        if done.is_ok() && uses.pinned > 0 {
            done = Err(Error::Busy);
        }
        if let Err(error) = done {
            self.cancel(isolation, trail);
            return Err(error);
        }
        self.finish(isolation, trail)
    }

    pub(super) fn commit(&mut self, isolation: Isolation, trail: &mut Trail) -> Outcome {
        let uses = self.uses_of(&isolation.pageblocks);
        let left = uses.held > 0 || (isolation.block.is_none() && uses.poisoned > 0);
        let done = trail
            .reach(Step::Commit)
            .and(if left { Err(Error::Busy) } else { Ok(()) });
        match done {
            Ok(()) => self.take(isolation, trail),
            Err(_) => self.cancel(isolation, trail),
        }
        done
    }

    /// Like [`commit`](Self::commit), but everything has been moved out before.
    pub(super) fn finish(&mut self, isolation: Isolation, trail: &mut Trail) -> Outcome {
        let done = trail.reach(Step::Commit);
        match done {
            Ok(()) => self.take(isolation, trail),
            Err(_) => self.cancel(isolation, trail),
        }
        done
    }

    pub(super) fn take(&mut self, isolation: Isolation, trail: &mut Trail) {
        let Some(id) = isolation.block else {
            for pageblock in isolation.pageblocks {
                let record = self
                    .pageblocks
                    .get_mut(&pageblock)
                    .expect("it was isolated");
                record.withheld = true;
                record.isolated = false;
            }
            return;
        };
        let pages = self.pages_of(id);
        for pageblock in self.pageblocks_of(id) {
            let record = self
                .pageblocks
                .get_mut(&pageblock)
                .expect("it was isolated");
            record.isolated = false;
            record.zone = None;
        }
        self.unusual.retain(|pfn, _| !pages.contains(pfn));
        let block = self.blocks.get_mut(&id).expect("it was going offline");
        let (nid, joined, kind) = (block.nid, block.joined, block.zone.take());
        block.state = BlockState::Offline;
        if let (None, Some(kind)) = (joined, kind) {
            self.shrink((nid, kind), &pages);
        }
        let _told = self.notify(id, MemoryAction::Offline, trail);
        trail.uevents.push(format!("offline memory{id}"));
        trail.offlined += 1;
    }

    pub(super) fn offline(&mut self, id: u64, hint: &Hint, trail: &mut Trail) -> Outcome {
        let isolation = self.isolate_block(id, true, hint, trail)?;
        self.empty(isolation, hint, trail)
    }

    pub(super) fn offline_and_remove(
        &mut self,
        owner: Owner,
        bytes: &Range<u64>,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let ids = self.removable(owner, bytes)?;
        let mut undo = Vec::new();
        let offline = || {
            for id in ids {
                if self.blocks[&id].state != BlockState::Offline {
                    let zone = self.blocks[&id].zone;
                    self.offline(id, hint, trail)?;
                    undo.push((id, zone));
                }
            }
            Ok(())
        };
        let done = offline();
        let done = done.and_then(|()| self.remove(owner, bytes, trail));
        if done.is_err() {
            for (id, zone) in undo {
                let online_type = match zone {
                    Some(ZoneKind::Movable) => OnlineType::Movable,
                    _ => OnlineType::Kernel,
                };
                let _warned = self.online(id, online_type, trail);
            }
        }
        done
    }

    pub(super) fn fake_offline(
        &mut self,
        bytes: &Range<u64>,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let pageblocks = self.whole_pageblocks(bytes)?;
        if self.common_state(&pageblocks)? == BlockState::Offline {
            let records = || {
                pageblocks
                    .clone()
                    .map(|pageblock| &self.pageblocks[&pageblock])
            };
            if records().any(|record| record.withheld || record.memmap) {
                return Err(Error::Busy);
            }
            for pageblock in pageblocks {
                self.pageblocks
                    .get_mut(&pageblock)
                    .expect("it was looked up")
                    .withheld = true;
            }
            return Ok(());
        }
        let isolation = self.start_isolation(pageblocks, None, true, hint, trail)?;
        self.empty(isolation, hint, trail)
    }

    pub(super) fn fake_online(&mut self, bytes: &Range<u64>) -> Outcome {
        let pageblocks = self.whole_pageblocks(bytes)?;
        self.common_state(&pageblocks)?;
        let withheld = |pageblock| {
            self.pageblocks
                .get(&pageblock)
                .is_some_and(|record| record.withheld)
        };
        if !pageblocks.clone().all(withheld) {
            return Err(Error::Invalid);
        }
        for pageblock in pageblocks {
            self.pageblocks
                .get_mut(&pageblock)
                .expect("it was looked up")
                .withheld = false;
        }
        Ok(())
    }

    pub(super) fn common_state(&self, pageblocks: &Range<u64>) -> Result<BlockState, Error> {
        let per = self.block_size() / self.profile.pageblock_size();
        let states: Option<Vec<_>> = (pageblocks.start / per..(pageblocks.end - 1) / per + 1)
            .map(|id| self.blocks.get(&id).map(|block| block.state))
            .collect();
        let states = states.ok_or(Error::Invalid)?;
        let same = states.iter().all(|state| *state == states[0]);
        same.then_some(states[0]).ok_or(Error::Invalid)
    }

    pub(super) fn migrate(
        &mut self,
        index: usize,
        budget: u32,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let uses = self.uses_of(&self.isolations[index].pageblocks);
        let isolation = self.isolations[index].clone();
        trail.emptied.push(isolation.pageblocks.clone());
        assert!(
            hint.moved <= u64::from(budget),
            "more pages moved than asked for"
        );
        let all_moved = hint.moved == uses.held;
        if let Some(fault) = trail.fault
            && fault.step == Step::Migrate
            && hint.fault_hit
        {
            trail.fault = None;
            trail.fault_came = true;
            return Err(fault.error);
        }
        let allocatable: u64 = self.zones().values().map(|counts| counts.allocatable).sum();
        let movable = uses.held - uses.pinned;
        match hint.result {
            Err(Error::NoMemory) => {
                assert_eq!(
                    hint.moved, allocatable,
                    "gave up although there was room, or went on although there was none"
                );
                assert!(
                    hint.moved < movable,
                    "no memory, but nothing was left to move"
                );
            }
            Err(Error::Busy) => {
                assert!(
                    uses.pinned > 0 || isolation.blocked,
                    "busy, but nothing is pinned"
                );
                assert!(isolation.passes_left <= 1, "gave up too early");
            }
            Ok(()) => {
                assert!(hint.moved <= allocatable);
                match hint.migration {
                    Some(Migration::Done) => assert!(all_moved, "done, but pages are left"),
                    _ => assert!(
                        movable > hint.moved
                            || hint.moved == u64::from(budget)
                            || uses.pinned > 0
                            || isolation.blocked,
                        "nothing was left to do"
                    ),
                }
            }
            // Compared with the result by the caller.
            Err(_) => return Ok(()),
        }
        let isolation = &mut self.isolations[index];
        isolation.blocked |= uses.pinned > 0;
        // Whether this ended a pass depends on where the pinned pages are.
        if hint.result.is_ok() && hint.migration == Some(Migration::More) && isolation.blocked {
            isolation.passes_left = isolation.passes_left.saturating_sub(1);
        }
        hint.result
    }

    pub(super) fn allocate(
        &mut self,
        nid: u32,
        mobility: Mobility,
        count: usize,
        hint: &Hint,
    ) -> Outcome {
        let movable = mobility == Mobility::Movable;
        let zones = self.zones();
        let mut room: BTreeMap<(u32, usize), u64> = zones
            .iter()
            .map(|(zone, counts)| {
                (
                    *zone,
                    if movable {
                        counts.allocatable
                    } else {
                        counts.general
                    },
                )
            })
            .collect();
        let order = self.zones_in_order(nid, movable);
        let mut pages = hint.allocated.iter();
        for _ in 0..count {
            let zone = order.iter().find(|zone| {
                room.get(&(zone.0, zone.1 as usize))
                    .is_some_and(|room| *room > 0)
            });
            let Some(zone) = zone else {
                assert_eq!(pages.next(), None, "a page out of nowhere");
                return Err(Error::NoMemory);
            };
            let Some((handle, pfn)) = pages.next() else {
                return Ok(());
            };
            let record = &self.pageblocks[&(pfn / self.pageblock_pages())];
            assert_eq!(record.zone, Some(*zone), "the zone of an allocated page");
            *room
                .get_mut(&(zone.0, zone.1 as usize))
                .expect("it was looked up") -= 1;
            self.held.push(Held {
                handle: *handle,
                tag: self.next_tag,
                pins: 0,
                unmovable: !movable,
                pfn: Some(*pfn),
            });
            self.next_tag += 1;
        }
        Ok(())
    }

    pub(super) fn pin(&mut self, index: usize) -> Outcome {
        let page = &mut self.held[index];
        page.pfn.ok_or(Error::HwPoison)?;
        page.pins += 1;
        Ok(())
    }

    pub(super) fn pin_long_term(&mut self, index: usize, trail: &mut Trail) -> Outcome {
        let pfn = self.held[index].pfn.ok_or(Error::HwPoison)?;
        let pageblock = pfn / self.pageblock_pages();
        let record = &self.pageblocks[&pageblock];
        let (_, kind) = record.zone.expect("pages are in zones");
        if kind == ZoneKind::Movable || record.cma {
            if self.held[index].pins > 0 {
                return Err(Error::Busy);
            }
            if self
                .general_room()
                .iter()
                .all(|((_, kind), room)| !is_kernel(KINDS[*kind]) || *room == 0)
            {
                return Err(Error::NoMemory);
            }
            trail.emptied.push(pageblock..pageblock + 1);
        }
        self.pin(index)
    }

    pub(super) fn unpin(&mut self, index: usize) -> Outcome {
        let page = &mut self.held[index];
        page.pins = page.pins.checked_sub(1).ok_or(Error::Invalid)?;
        Ok(())
    }

    pub(super) fn poison(
        &mut self,
        address: u64,
        soft: bool,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let pfn = address / self.page();
        // What a page that cannot be handled is, and one that was handled before.
        let (unhandled, again) = match soft {
            true => (Error::Io, Ok(())),
            false => (Error::Busy, Err(Error::HwPoison)),
        };
        if soft && self.pfn_valid(pfn) && !self.pfn_is_online(pfn) {
            return Err(Error::Io);
        }
        if !self.pfn_is_online(pfn) || !self.is_ram(pfn) {
            return Err(Error::NoAddress);
        }
        let pageblock = pfn / self.pageblock_pages();
        let record = &self.pageblocks[&pageblock];
        match self.unusual.get(&pfn) {
            Some(Unusual::Poisoned) => return again,
            Some(Unusual::Reserved) => return Err(unhandled),
            None if record.withheld || record.memmap => return Err(unhandled),
            None => {}
        }
        let (nid, kind) = record.zone.expect("online pages are in zones");
        if let Some(index) = self.held.iter().position(|page| page.pfn == Some(pfn)) {
            if self.held[index].unmovable {
                return Err(unhandled);
            }
            if self.held[index].pins > 0 {
                return Err(Error::Busy);
            }
            if soft {
                trail.reach(Step::Migrate)?;
                if self.zones().values().all(|counts| counts.allocatable == 0) {
                    return Err(Error::NoMemory);
                }
                trail.emptied.push(pageblock..pageblock + 1);
            } else {
                self.held[index].pfn = None;
            }
        } else {
            let charged = self.zones()[&(nid, kind as usize)].charged;
            if charged > 0 && !record.isolated && !record.cma && hint.result == Err(unhandled) {
                return Err(unhandled);
            }
        }
        self.unusual.insert(pfn, Unusual::Poisoned);
        let id = address / self.block_size();
        self.blocks.get_mut(&id).expect("it is online").poisoned += 1;
        Ok(())
    }

    pub(super) fn add_device(
        &mut self,
        bytes: &Range<u64>,
        nid: u32,
        kind: DeviceKind,
        trail: &mut Trail,
    ) -> Outcome {
        if bytes.start >= bytes.end {
            return Err(Error::Invalid);
        }
        if self.device_at(bytes.start).is_some() || self.device_at(bytes.end - 1).is_some() {
            return Err(Error::NoMemory);
        }
        if self.ram.iter().any(|ram| meet(&ram.bytes, bytes)) {
            return Err(Error::NoAddress);
        }
        let size = self.profile.sub_section_size();
        let misplaced = !bytes.start.is_multiple_of(size)
            || !bytes.end.is_multiple_of(size)
            || nid >= self.config.possible_nodes;
        if misplaced || !self.addressable(bytes) {
            return Err(Error::Invalid);
        }
        if kind != DeviceKind::Private {
            trail.reach(Step::Mapping)?;
        }
        let section = self.profile.section_size();
        let numbers = bytes.start / section..(bytes.end - 1) / section + 1;
        let part = |number: u64| {
            (number * section).max(bytes.start) / size
                ..((number + 1) * section).min(bytes.end) / size
        };
        for number in numbers.clone() {
            trail.reach(Step::Memmap)?;
            if part(number).any(|sub| self.sub_section_is_active(sub)) {
                return Err(Error::Exists);
            }
        }
        trail.reach(Step::Resource)?;
        if !self.is_vacant(bytes) {
            return Err(Error::Busy);
        }
        let per_section = section / self.profile.pageblock_size();
        let own = numbers
            .clone()
            .filter(|number| !self.pageblocks.contains_key(&(number * per_section)));
        let own: u64 = own.map(|number| part(number).count() as u64).sum();
        let charges = self.charge(nid, own * size, &mut self.general_room())?;
        // Only what is shared, or can be.
        let whole = section / size;
        self.tainted
            .extend(numbers.filter(|number| part(*number).count() as u64 != whole));
        self.devices.push(Device {
            bytes: bytes.clone(),
            nid,
            kind,
            charges,
        });
        Ok(())
    }

    pub(super) fn remove_device(&mut self, bytes: &Range<u64>) -> Outcome {
        let index = self
            .devices
            .iter()
            .position(|device| device.bytes == *bytes)
            .ok_or(Error::Invalid)?;
        self.devices.remove(index);
        let left: BTreeSet<u64> = self
            .sections()
            .into_iter()
            .map(|(number, ..)| number)
            .collect();
        self.tainted.retain(|number| left.contains(number));
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        file: &str,
        text: &str,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let word = |text: &str| match text {
            "offline" => Ok(None),
            "online" => Ok(Some(OnlineType::Online)),
            "online_kernel" => Ok(Some(OnlineType::Kernel)),
            "online_movable" => Ok(Some(OnlineType::Movable)),
            _ => Err(Error::Invalid),
        };
        let truth = |text: &str| match text {
            "1" | "y" | "Y" | "on" | "yes" => Ok(true),
            "0" | "n" | "N" | "off" | "no" => Ok(false),
            _ => Err(Error::Invalid),
        };
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).map_err(|_| Error::Invalid),
            None => text.parse().map_err(|_| Error::Invalid),
        };
        if let Some((block, name)) = file
            .split_once('/')
            .filter(|(folder, _)| folder.starts_with("memory"))
        {
            let id: u64 = block["memory".len()..]
                .parse()
                .map_err(|_| Error::NotFound)?;
            let block = self.blocks.get_mut(&id).ok_or(Error::NotFound)?;
            return match name {
                "state" | "online" if text.is_empty() => Ok(()),
                "state" => {
                    let changed = match word(line)? {
                        None => self.device_offline(id, hint, trail)?,
                        Some(online_type) => {
                            block.sticky = Some(online_type);
                            self.device_online(id, trail)?
                        }
                    };
                    changed.then_some(()).ok_or(Error::Invalid)
                }
                "online" => match truth(line)? {
                    true => self.device_online(id, trail).map(|_| ()),
                    false => self.device_offline(id, hint, trail).map(|_| ()),
                },
                "valid_zones" if self.config.hot_remove => Err(Error::AccessDenied),
                "phys_index" | "removable" | "node" | "phys_device" => Err(Error::AccessDenied),
                _ => Err(Error::NotFound),
            };
        }
        match file {
            "parameters/online_policy"
            | "parameters/auto_movable_ratio"
            | "parameters/auto_movable_numa_aware"
                if text.is_empty() => {}
            "parameters/online_policy" => {
                self.config.online_policy = match line {
                    "contig-zones" => OnlinePolicy::ContigZones,
                    "auto-movable" => OnlinePolicy::AutoMovable,
                    _ => return Err(Error::Invalid),
                };
            }
            "parameters/auto_movable_ratio" => {
                self.config.auto_movable_ratio =
                    number(line)?.try_into().map_err(|_| Error::OutOfRange)?;
            }
            "parameters/auto_movable_numa_aware" => {
                self.config.auto_movable_numa_aware = truth(line)?;
            }
            "parameters/memmap_on_memory" | "block_size_bytes" | "crash_hotplug" => {
                return Err(Error::AccessDenied);
            }
            "auto_online_blocks" | "probe" | "hard_offline_page" | "soft_offline_page"
                if text.is_empty() => {}
            "auto_online_blocks" => self.config.default_online_type = word(line)?,
            "hard_offline_page" => return self.poison(number(line)?, false, hint, trail),
            "soft_offline_page" => return self.poison(number(line)?, true, hint, trail),
            "probe" => {
                let start = number(line)?;
                if !start.is_multiple_of(self.block_size()) {
                    return Err(Error::Invalid);
                }
                let ranges = &self.node_ranges;
                // Holes in the RAM of one node are that node's, too.
                let hull = |a: &BootRange, b: &BootRange| {
                    a.bytes.start.min(b.bytes.start)..a.bytes.end.max(b.bytes.end)
                };
                let around = ranges.iter().find(|a| {
                    ranges.iter().filter(|b| a.nid == b.nid).any(|b| {
                        let hull = hull(a, b);
                        let foreign = |c: &&BootRange| {
                            c.nid != a.nid && c.bytes.start < hull.end && hull.start < c.bytes.end
                        };
                        hull.contains(&start) && ranges.iter().find(foreign).is_none()
                    })
                });
                let nid = around.or(ranges.first()).map_or(0, |range| range.nid);
                let add = Add {
                    start,
                    size: self.block_size(),
                    target: Target::Node(nid),
                    owner: Owner::PROBE,
                    name: "System RAM",
                    merge: false,
                    memmap: false,
                    withheld: 0..0,
                };
                return self.add(&add, trail);
            }
            _ => return Err(Error::NotFound),
        }
        Ok(())
    }

    /// What an operation comes to. Where that depends on which page is where, `hint` tells what the core did.
    pub(crate) fn play(
        &mut self,
        operation: &Operation,
        hint: &Hint,
        trail: &mut Trail,
    ) -> Outcome {
        match operation {
            Operation::Add(add) => self.add(add, trail),
            Operation::Remove(owner, bytes) => self.remove(*owner, bytes, trail),
            Operation::OfflineAndRemove(owner, bytes) => {
                self.offline_and_remove(*owner, bytes, hint, trail)
            }
            Operation::Adopt(owner, bytes) => {
                if bytes.is_empty() {
                    return Err(Error::Invalid);
                }
                if !self.addressable(bytes) {
                    return Err(Error::TooBig);
                }
                self.owns(Owner::BOOT, bytes)?;
                let sub = self.profile.sub_section_size();
                self.owners
                    .extend((bytes.start / sub..bytes.end / sub).map(|number| (number, *owner)));
                Ok(())
            }
            Operation::Online(id, online_type) => self.online(*id, *online_type, trail),
            Operation::DeviceOnline(id) => self.device_online(*id, trail).map(|_| ()),
            Operation::DeviceOffline(id) => self.device_offline(*id, hint, trail).map(|_| ()),
            Operation::Offline(id) => self.offline(*id, hint, trail),
            Operation::Write(file, text) => self.write(file, text, hint, trail),
            Operation::Isolate(bytes) => {
                let pageblocks = self.whole_pageblocks(bytes)?;
                let isolation = self.start_isolation(pageblocks, None, true, hint, trail)?;
                self.isolations.push(isolation);
                Ok(())
            }
            Operation::IsolateBlock(id) => {
                let isolation = self.isolate_block(*id, false, hint, trail)?;
                self.isolations.push(isolation);
                Ok(())
            }
            Operation::Migrate(index, budget) => self.migrate(*index, *budget, hint, trail),
            Operation::Commit(index) => {
                let isolation = self.isolations.swap_remove(*index);
                self.commit(isolation, trail)
            }
            Operation::Cancel(index) => {
                let isolation = self.isolations.swap_remove(*index);
                self.cancel(isolation, trail);
                Ok(())
            }
            Operation::FakeOffline(bytes) => self.fake_offline(bytes, hint, trail),
            Operation::FakeOnline(bytes) => self.fake_online(bytes),
            Operation::Allocate(nid, mobility, count) => {
                self.allocate(*nid, *mobility, *count, hint)
            }
            Operation::Free(index, count) => {
                for _ in 0..*count {
                    if *index >= self.held.len() {
                        break;
                    }
                    if self.held[*index].pins > 0 {
                        return Err(Error::Busy);
                    }
                    self.held.swap_remove(*index);
                }
                Ok(())
            }
            Operation::Pin(index) => self.pin(*index),
            Operation::Unpin(index) => self.unpin(*index),
            Operation::PinLongTerm(index) => self.pin_long_term(*index, trail),
            Operation::UseFreedPage => Err(Error::Invalid),
            Operation::HardOffline(address) => self.poison(*address, false, hint, trail),
            Operation::SoftOffline(address) => self.poison(*address, true, hint, trail),
            Operation::AddDevice(bytes, nid, kind) => self.add_device(bytes, *nid, *kind, trail),
            Operation::RemoveDevice(bytes) => self.remove_device(bytes),
            Operation::RegisterStatic(nid, pages) => {
                let valid = *nid < self.config.possible_nodes && *pages > 0;
                self.register(valid, *nid, GroupKind::Static(*pages), hint)
            }
            Operation::RegisterDynamic(nid, pages) => {
                let block_pages = self.block_size() / self.page();
                let valid = *nid < self.config.possible_nodes
                    && pages.is_power_of_two()
                    && *pages >= block_pages;
                self.register(valid, *nid, GroupKind::Dynamic(*pages), hint)
            }
            Operation::Unregister(index) => {
                if !self.groups[*index].live {
                    return Err(Error::Invalid);
                }
                if self
                    .blocks
                    .values()
                    .any(|block| block.group == Some(*index))
                {
                    return Err(Error::Busy);
                }
                self.groups[*index].live = false;
                Ok(())
            }
            Operation::RegisterNotifier(priority) => {
                let position = self
                    .chain
                    .iter()
                    .take_while(|other| other.priority >= *priority)
                    .count();
                let number = Some(self.notifiers);
                self.chain.insert(
                    position,
                    Notifier {
                        priority: *priority,
                        number,
                    },
                );
                self.notifiers += 1;
                Ok(())
            }
            Operation::UnregisterNotifier(number) => {
                self.chain
                    .retain(|notifier| notifier.number != Some(*number));
                Ok(())
            }
        }
    }

    pub(super) fn register(
        &mut self,
        valid: bool,
        nid: u32,
        kind: GroupKind,
        hint: &Hint,
    ) -> Outcome {
        if !valid {
            return Err(Error::Invalid);
        }
        let Some(id) = hint.group else { return Ok(()) };
        // Ids are used again.
        self.groups
            .iter()
            .for_each(|group| assert!(!group.live || group.id != id, "a group id is given twice"));
        self.groups.push(Group {
            id,
            live: true,
            nid,
            kind,
        });
        Ok(())
    }

    /// Whether a registered id names this group and no other.
    pub(crate) fn group_is_live(&self, index: usize) -> bool {
        self.groups[index].live
    }

    /// Notifiers that are registered.
    pub(crate) fn registered_notifiers(&self) -> Vec<usize> {
        self.chain
            .iter()
            .filter_map(|notifier| notifier.number)
            .collect()
    }

    /// The page `index` is at `pfn` now.
    pub(crate) fn page_is_at(&mut self, index: usize, pfn: u64, emptied: &[Range<u64>]) {
        let per = self.pageblock_pages();
        let page = &mut self.held[index];
        let old = page.pfn.replace(pfn).expect("it is not lost");
        assert!(!page.unmovable, "an unmovable page was moved");
        let from = old / per;
        assert!(
            emptied.iter().any(|range| range.contains(&from)),
            "page {old:#x} was moved for no reason"
        );
    }

    /// Every allocated page is where one may be.
    pub(crate) fn check_places(&self) {
        let mut places = BTreeSet::new();
        let per = self.pageblock_pages();
        for page in &self.held {
            let Some(pfn) = page.pfn else { continue };
            assert!(places.insert(pfn), "two handles name page {pfn:#x}");
            assert!(self.is_ram(pfn), "page {pfn:#x} is no RAM");
            assert_eq!(
                self.unusual.get(&pfn),
                None,
                "page {pfn:#x} cannot be allocated"
            );
            let record = &self.pageblocks[&(pfn / per)];
            let (_, kind) = record.zone.expect("an allocated page is offline");
            assert!(
                !record.withheld && !record.memmap,
                "page {pfn:#x} is withheld"
            );
            assert!(
                !page.unmovable || (is_kernel(kind) && !record.cma),
                "an unmovable page among movable ones"
            );
        }
    }

    pub(crate) fn is_in_kernel_memory(&self, pfn: u64) -> bool {
        let record = &self.pageblocks[&(pfn / self.pageblock_pages())];
        record.zone.is_some_and(|(_, kind)| is_kernel(kind)) && !record.cma
    }

    pub(crate) fn poisoned(&self) -> u64 {
        self.blocks
            .values()
            .map(|block| u64::from(block.poisoned))
            .sum()
    }

    /// Node, online, has memory, has normal memory.
    pub(crate) fn nodes(&self) -> Vec<(u32, bool, bool, bool)> {
        let zones = self.zones();
        let describe = |nid: u32| {
            let present = |kernel_only: bool| {
                zones.iter().any(|((node, kind), counts)| {
                    *node == nid && counts.present > 0 && (!kernel_only || is_kernel(KINDS[*kind]))
                })
            };
            let online =
                self.cpu_nodes.contains(&nid) || self.blocks.values().any(|block| block.nid == nid);
            (nid, online, present(false), present(true))
        };
        (0..self.config.possible_nodes).map(describe).collect()
    }
}

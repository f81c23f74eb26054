//! Memory groups: memory blocks that belong to one device, and what of it is online where. The policy that looks at
//! them is not here.
//!
//! Linux: `struct memory_group`.

use alloc::collections::BTreeMap;

use super::{Error, Profile};

/// A registered memory group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(u32);

/// How the memory of a group comes and goes.
///
/// ```text
///  Static     |<------------- max_pages ------------->|      a DIMM: all of it may be Movable, or none of it is
///             |   M   |   M   |   M   |   M   |   M   |
///  Dynamic    |<---- unit --->|     |<---- unit --->|        virtio-mem: each unit by itself; what is in kernel
///             |   M   |   M   |     |   K   |   K   |        zones allows more of the same group to be Movable
/// ```
///
/// M and K are memory blocks that the policy [`AutoMovable`](super::OnlinePolicy::AutoMovable) has put into Movable and
/// into a kernel zone. Only within the ratio to kernel memory of boot, see [`Config`](super::Config).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// In one go, at most so many pages: a DIMM, a device of its own.
    Static {
        /// Pages of the whole device.
        max_pages: u64,
    },
    /// In units of so many pages, a power of two and at least a memory block: virtio-mem.
    Dynamic {
        /// Pages of a unit, which is aligned to its size.
        unit_pages: u64,
    },
}

/// A memory group, with its share of what is online.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) nid: u32,
    pub(super) kind: GroupKind,
    /// Pages of its memory blocks that are online in a kernel zone.
    pub(super) present_kernel_pages: u64,
    /// Pages of its memory blocks that are online in Movable.
    pub(super) present_movable_pages: u64,
    /// Its memory blocks, online or not.
    pub(super) block_count: u64,
}

impl Group {
    pub(super) fn is_dynamic(&self) -> bool {
        matches!(self.kind, GroupKind::Dynamic { .. })
    }
}

/// All memory groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Groups {
    groups: BTreeMap<GroupId, Group>,
    /// How many there ever were: an id that outlives its group must not name another.
    registered: u32,
}

impl Groups {
    /// Registers a device whose memory, at most `max_pages`, is added in one go
    /// (`memory_group_register_static`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it has no pages.
    pub(super) fn register_static(&mut self, nid: u32, max_pages: u64) -> Result<GroupId, Error> {
        if max_pages == 0 {
            return Err(Error::Invalid);
        }
        self.register(nid, GroupKind::Static { max_pages })
    }

    /// Registers a device whose memory is added unit by unit (`memory_group_register_dynamic`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `unit_pages` is a power of two and at least a memory block.
    pub(super) fn register_dynamic(
        &mut self,
        nid: u32,
        unit_pages: u64,
        profile: &Profile,
    ) -> Result<GroupId, Error> {
        if !unit_pages.is_power_of_two() || unit_pages < profile.memory_block_pages() {
            return Err(Error::Invalid);
        }
        self.register(nid, GroupKind::Dynamic { unit_pages })
    }

    fn register(&mut self, nid: u32, kind: GroupKind) -> Result<GroupId, Error> {
        let id = GroupId(self.registered);
        self.registered = self.registered.checked_add(1).ok_or(Error::Busy)?;
        let group = Group {
            nid,
            kind,
            present_kernel_pages: 0,
            present_movable_pages: 0,
            block_count: 0,
        };
        self.groups.insert(id, group);
        Ok(id)
    }

    /// Forgets a group (`memory_group_unregister`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such group, [`Error::Busy`] while it has memory blocks.
    pub(super) fn unregister(&mut self, id: GroupId) -> Result<(), Error> {
        if self.get(id)?.block_count > 0 {
            return Err(Error::Busy);
        }
        self.groups.remove(&id);
        Ok(())
    }

    /// A group by its id (`memory_group_find_by_id`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such group.
    pub(super) fn get(&self, id: GroupId) -> Result<&Group, Error> {
        self.groups.get(&id).ok_or(Error::Invalid)
    }

    /// All groups.
    pub(super) fn iter(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.groups.iter().map(|(id, group)| (*id, group))
    }

    fn get_mut(&mut self, id: GroupId) -> Result<&mut Group, Error> {
        self.groups.get_mut(&id).ok_or(Error::Invalid)
    }

    /// The dynamic groups, of one node or of all, other than `own`: those that share with it what boot memory
    /// licenses (`walk_dynamic_memory_groups`).
    pub(super) fn other_dynamic(
        &self,
        nid: Option<u32>,
        own: Option<GroupId>,
    ) -> impl Iterator<Item = &Group> {
        let others = self.groups.iter().filter(move |(id, _)| Some(**id) != own);
        let groups = others.map(|(_, group)| group);
        groups.filter(move |group| group.is_dynamic() && nid.is_none_or(|nid| nid == group.nid))
    }

    /// Notes that a memory block of the group was added.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such group.
    pub(super) fn block_added(&mut self, id: GroupId) -> Result<(), Error> {
        let count = &mut self.get_mut(id)?.block_count;
        *count = count.checked_add(1).ok_or(Error::Invalid)?;
        Ok(())
    }

    /// Notes that a memory block of the group was removed.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such group, or it has no memory block.
    pub(super) fn block_removed(&mut self, id: GroupId) -> Result<(), Error> {
        let count = &mut self.get_mut(id)?.block_count;
        *count = count.checked_sub(1).ok_or(Error::Invalid)?;
        Ok(())
    }

    /// Notes that pages of the group came online, or with a negative number went offline, in Movable or in a
    /// kernel zone (`adjust_present_page_count`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such group, or fewer pages than that are online.
    pub(super) fn account(&mut self, id: GroupId, movable: bool, pages: i64) -> Result<(), Error> {
        let group = self.get_mut(id)?;
        let count = if movable {
            &mut group.present_movable_pages
        } else {
            &mut group.present_kernel_pages
        };
        *count = count.checked_add_signed(pages).ok_or(Error::Invalid)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: Profile = Profile::X86_64;
    const BLOCK: u64 = PROFILE.memory_block_pages();

    #[test]
    fn groups_without_pages_and_units_that_are_no_power_of_two_or_too_small_are_refused() {
        let mut groups = Groups::default();
        assert_eq!(groups.register_static(0, 0), Err(Error::Invalid));
        for unit in [0, 1, BLOCK / 2, BLOCK + 1, 3 * BLOCK, u64::MAX] {
            let result = groups.register_dynamic(0, unit, &PROFILE);
            assert_eq!(result, Err(Error::Invalid), "{unit}");
        }
        assert_eq!(groups, Groups::default());
        assert!(groups.register_static(0, 1).is_ok());
        assert!(groups.register_dynamic(0, BLOCK, &PROFILE).is_ok());
        assert!(groups.register_dynamic(0, 1 << 63, &PROFILE).is_ok());
    }

    #[test]
    fn group_stays_while_it_has_memory_blocks_and_its_id_is_never_used_again() {
        let mut groups = Groups::default();
        let first = groups.register_static(0, BLOCK).unwrap();
        let second = groups.register_static(0, BLOCK).unwrap();
        assert_ne!(first, second);
        groups.block_added(first).unwrap();
        assert_eq!(groups.unregister(first), Err(Error::Busy));
        groups.block_removed(first).unwrap();
        assert_eq!(groups.block_removed(first), Err(Error::Invalid));
        assert_eq!(groups.unregister(first), Ok(()));
        assert_eq!(groups.unregister(first), Err(Error::Invalid));
        assert_eq!(groups.block_added(first), Err(Error::Invalid));
        assert_eq!(groups.account(first, true, 0), Err(Error::Invalid));
        assert_ne!(groups.register_static(1, BLOCK), Ok(first));
        assert_eq!(groups.get(first), Err(Error::Invalid));
    }

    #[test]
    fn pages_are_counted_by_zone_and_never_below_zero() {
        let mut groups = Groups::default();
        let id = groups.register_static(0, 2 * BLOCK).unwrap();
        groups.account(id, true, 512).unwrap();
        groups.account(id, false, 256).unwrap();
        groups.account(id, true, -500).unwrap();
        for (movable, pages) in [(true, -13), (false, -257), (false, i64::MIN)] {
            assert_eq!(groups.account(id, movable, pages), Err(Error::Invalid));
        }
        let group = groups.get(id).unwrap();
        let present = (group.present_movable_pages, group.present_kernel_pages);
        assert_eq!(present, (12, 256));
    }

    #[test]
    fn other_dynamic_groups_are_found_by_node() {
        let mut groups = Groups::default();
        let own = groups.register_dynamic(0, BLOCK, &PROFILE).unwrap();
        groups.register_dynamic(0, BLOCK, &PROFILE).unwrap();
        groups.register_dynamic(1, BLOCK, &PROFILE).unwrap();
        groups.register_static(0, BLOCK).unwrap();
        assert_eq!(groups.other_dynamic(None, None).count(), 3);
        assert_eq!(groups.other_dynamic(None, Some(own)).count(), 2);
        assert_eq!(groups.other_dynamic(Some(0), Some(own)).count(), 1);
        assert_eq!(groups.other_dynamic(Some(2), None).count(), 0);
    }
}

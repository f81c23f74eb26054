//! temp
use super::{Error, Profile};
use alloc::collections::BTreeMap;
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupId(u32);
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub nid: u32,
    pub max_pages: Option<u64>,
    pub unit_pages: u64,
    pub block_count: u64,
    pub present_kernel_pages: u64,
    pub present_movable_pages: u64,
}
#[derive(Debug, Default)]
pub(super) struct Groups {
    map: BTreeMap<GroupId, Group>,
    next: u32,
}
impl Groups {
    fn reg(&mut self, g: Group) -> GroupId {
        let id = GroupId(self.next);
        self.next += 1;
        self.map.insert(id, g);
        id
    }
    pub(super) fn register_static(&mut self, nid: u32, max: u64) -> Result<GroupId, Error> {
        Ok(self.reg(Group {
            nid,
            max_pages: Some(max),
            unit_pages: 0,
            block_count: 0,
            present_kernel_pages: 0,
            present_movable_pages: 0,
        }))
    }
    pub(super) fn register_dynamic(
        &mut self,
        nid: u32,
        unit: u64,
        _: &Profile,
    ) -> Result<GroupId, Error> {
        Ok(self.reg(Group {
            nid,
            max_pages: None,
            unit_pages: unit,
            block_count: 0,
            present_kernel_pages: 0,
            present_movable_pages: 0,
        }))
    }
    pub(super) fn unregister(&mut self, id: GroupId) -> Result<(), Error> {
        if self.get(id)?.block_count > 0 {
            return Err(Error::Busy);
        }
        self.map.remove(&id);
        Ok(())
    }
    pub(super) fn get(&self, id: GroupId) -> Result<&Group, Error> {
        self.map.get(&id).ok_or(Error::Invalid)
    }
    pub(super) fn blocks_added(&mut self, id: GroupId, n: u64) {
        if let Some(g) = self.map.get_mut(&id) {
            g.block_count += n
        }
    }
    pub(super) fn blocks_removed(&mut self, id: GroupId, n: u64) {
        if let Some(g) = self.map.get_mut(&id) {
            g.block_count -= n
        }
    }
    pub(super) fn account(&mut self, id: GroupId, movable: bool, pages: i64) {
        if let Some(g) = self.map.get_mut(&id) {
            let c = if movable {
                &mut g.present_movable_pages
            } else {
                &mut g.present_kernel_pages
            };
            *c = c.wrapping_add_signed(pages)
        }
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.map.iter().map(|(i, g)| (*i, g))
    }
    pub(super) fn other_dynamic(
        &self,
        own: Option<GroupId>,
        nid: Option<u32>,
    ) -> impl Iterator<Item = &Group> {
        self.map
            .iter()
            .filter(move |(i, g)| {
                Some(**i) != own && g.max_pages.is_none() && nid.is_none_or(|n| n == g.nid)
            })
            .map(|(_, g)| g)
    }
}

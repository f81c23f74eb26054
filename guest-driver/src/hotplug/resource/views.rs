//! What can be read off the resources.

use alloc::vec::Vec;
use core::fmt;
use core::iter;
use core::ops::Range;

use super::range_map::intersection;
use super::{Owner, Resource, ResourceTree, check};
use crate::hotplug::Error;

/// How a range relates to System RAM. Bytes without any resource do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intersection {
    /// No System RAM.
    Disjoint,
    /// System RAM and no other resource.
    Intersects,
    /// System RAM and another resource.
    Mixed,
}

impl ResourceTree {
    /// All resources, each before those below it, otherwise ascending: the lines of `/proc/iomem`.
    pub fn iomem(&self) -> impl Iterator<Item = &Resource> {
        self.resources.iter()
    }

    /// How `range` relates to System RAM, including [regions](super::ResourceFlags::RAM_REGION) for it (Linux:
    /// `region_intersects`). Device memory can be mapped only where this is [`Intersection::Disjoint`].
    #[must_use]
    pub fn intersects(&self, range: Range<u64>) -> Intersection {
        let is_ram = |r: &Resource| r.flags.system_ram;
        let is_other = |r: &Resource| self.has_gaps(intersection(&r.range, &range), is_ram);
        let found = || self.overlapping(range.clone());
        match (found().any(is_ram), found().any(is_other)) {
            (false, _) => Intersection::Disjoint,
            (true, false) => Intersection::Intersects,
            (true, true) => Intersection::Mixed,
        }
    }

    /// The owner of the System RAM at `address`; `None` if there is none.
    #[must_use]
    pub fn owner(&self, address: u64) -> Option<Owner> {
        let at = address..address.checked_add(1)?;
        self.owners.overlapping(at).next().map(|(_, owner)| owner)
    }

    /// Whether all of `range` is `owner`'s, who alone may take it offline and remove it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is empty or not System RAM throughout, [`Error::NotPermitted`] if part
    /// of it belongs to somebody else.
    pub fn owns(&self, owner: Owner, range: Range<u64>) -> Result<(), Error> {
        check(&range)?;
        if self.has_gaps(range.clone(), Resource::is_ram) {
            return Err(Error::Invalid);
        }
        match self.owners.overlapping(range).all(|(_, of)| of == owner) {
            true => Ok(()),
            false => Err(Error::NotPermitted),
        }
    }

    /// What firmware, or whoever takes its place at kexec, describes as RAM, ascending and disjoint (Linux:
    /// `/sys/firmware/memmap`): System RAM that is not driver managed, and
    /// [memory that is gone](Self::stale_firmware_ranges) if the map cannot be corrected.
    ///
    /// Linux corrects it only where the memory that is removed makes up a whole entry.
    pub fn firmware_map(&self) -> impl Iterator<Item = Range<u64>> {
        let mut plain = self.kexec_destinations().peekable();
        let mut stale = self.stale_firmware_ranges().peekable();
        iter::from_fn(move || match (plain.peek(), stale.peek()) {
            (Some(first), Some(second)) if second.start < first.start => stale.next(),
            (None, _) => stale.next(),
            _ => plain.next(),
        })
    }

    /// Where kexec may put the next kernel, ascending: System RAM that is not driver managed.
    pub fn kexec_destinations(&self) -> impl Iterator<Item = Range<u64>> {
        let plain = self.resources.iter().filter(|r| r.is_plain_ram());
        plain.map(Resource::range)
    }

    /// What the firmware map calls RAM, but is not, or only as long as its driver says so; ascending.
    ///
    /// A kernel that boots with such a map crashes. Hence boot memory must not be removed where there is a
    /// [fixed map](super::FirmwareMap::Fixed).
    pub fn stale_firmware_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let described = self.fixed_map.iter();
        described.flat_map(|(range, ())| self.gaps(range, Resource::is_plain_ram))
    }

    /// The boot memory the next kernel finds: the firmware map, neighbours joined. Driver-managed memory is not
    /// in it; its driver has to add it again.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`] if the heap is exhausted.
    pub fn reboot(&self) -> Result<Vec<Range<u64>>, Error> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for range in self.firmware_map() {
            match found.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => {
                    found.try_reserve(1).map_err(|_| Error::NoMemory)?;
                    found.push(range);
                }
            }
        }
        Ok(found)
    }

    /// The resources that have bytes in `range`, in order.
    pub(super) fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = &Resource> {
        let end = self
            .resources
            .partition_point(|r| r.range.start < range.end);
        let before = self.resources[..end].iter();
        before.filter(move |r| !intersection(&r.range, &range).is_empty())
    }

    /// The parts of `range` that no resource covers of which `counts` is true, ascending.
    fn gaps(
        &self,
        range: Range<u64>,
        counts: impl Fn(&Resource) -> bool,
    ) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start;
        let covered = self.overlapping(range.clone()).filter(move |r| counts(r));
        let covered = covered.map(Resource::range);
        // What would come next ends the last gap.
        let mut covered = covered.chain(iter::once(range.end..range.end));
        iter::from_fn(move || {
            loop {
                let next = covered.next()?;
                let gap = at..next.start;
                at = at.max(next.end);
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
        })
    }

    pub(super) fn has_gaps(&self, range: Range<u64>, counts: impl Fn(&Resource) -> bool) -> bool {
        self.gaps(range, counts).next().is_some()
    }
}

impl fmt::Display for ResourceTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.resources.iter().try_for_each(|r| writeln!(f, "{r}"))
    }
}

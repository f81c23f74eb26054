//! Who has which addresses.

use super::*;

impl Model {
    pub(super) fn region_of(&self, bytes: &Range<u64>) -> Option<usize> {
        self.regions
            .iter()
            .position(|region| contains(region, bytes))
    }

    /// Whether a busy resource may be put there.
    pub(super) fn is_vacant(&self, bytes: &Range<u64>) -> bool {
        let taken = self
            .ram
            .iter()
            .map(|ram| &ram.bytes)
            .chain(self.devices.iter().map(|device| &device.bytes));
        !taken.into_iter().any(|other| meet(other, bytes))
            && !self
                .regions
                .iter()
                .any(|region| meet(region, bytes) && !contains(region, bytes))
    }

    pub(crate) fn iomem(&self) -> String {
        let mut lines: Vec<(Range<u64>, usize, &str)> = self
            .regions
            .iter()
            .map(|region| (region.clone(), 0, "Soft Reserved"))
            .collect();
        let depth = |bytes: &Range<u64>| usize::from(self.region_of(bytes).is_some());
        lines.extend(
            self.ram
                .iter()
                .map(|ram| (ram.bytes.clone(), depth(&ram.bytes), ram.name.as_str())),
        );
        lines.extend(
            self.devices
                .iter()
                .map(|device| (device.bytes.clone(), depth(&device.bytes), "namespace")),
        );
        lines.sort_by_key(|(bytes, depth, _)| (bytes.start, *depth));
        let line = |(bytes, depth, name): (Range<u64>, usize, &str)| {
            format!(
                "{}{:08x}-{:08x} : {name}\n",
                "  ".repeat(depth),
                bytes.start,
                bytes.end - 1
            )
        };
        lines.into_iter().map(line).collect()
    }

    pub(crate) fn kexec_destinations(&self) -> Vec<Range<u64>> {
        let plain = self.ram.iter().filter(|ram| ram.name == "System RAM");
        let mut ranges: Vec<_> = plain.map(|ram| ram.bytes.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    pub(crate) fn owner(&self, address: u64) -> Option<Owner> {
        self.ram.iter().find(|ram| ram.bytes.contains(&address))?;
        let sub = address / self.profile.sub_section_size();
        Some(self.owners.get(&sub).copied().unwrap_or(Owner::BOOT))
    }

    pub(super) fn is_all_ram(&self, bytes: &Range<u64>) -> bool {
        let covered: u64 = self
            .ram
            .iter()
            .map(|ram| {
                ram.bytes
                    .end
                    .min(bytes.end)
                    .saturating_sub(ram.bytes.start.max(bytes.start))
            })
            .sum();
        covered == bytes.end - bytes.start
    }

    pub(super) fn owns(&self, owner: Owner, bytes: &Range<u64>) -> Outcome {
        if bytes.is_empty() || !self.is_all_ram(bytes) {
            return Err(Error::Invalid);
        }
        let size = self.profile.sub_section_size();
        let mut subs = bytes.start / size..(bytes.end - 1) / size + 1;
        let own = subs.all(|sub| self.owners.get(&sub).copied().unwrap_or(Owner::BOOT) == owner);
        own.then_some(()).ok_or(Error::NotPermitted)
    }

    pub(super) fn merge(&mut self, bytes: &Range<u64>) {
        let index = self
            .ram
            .iter()
            .position(|ram| ram.bytes == *bytes)
            .expect("it has just been added");
        self.ram[index].mergeable = true;
        loop {
            let found = self.ram.iter().enumerate().find_map(|(low, a)| {
                let high = self.ram.iter().position(|b| {
                    (meet(&a.bytes, bytes) || meet(&b.bytes, bytes))
                        && a.bytes.end == b.bytes.start
                        && a.mergeable
                        && b.mergeable
                        && a.name == b.name
                        && self.region_of(&a.bytes) == self.region_of(&b.bytes)
                        && self.owner(a.bytes.end - 1) == self.owner(a.bytes.end)
                })?;
                Some((low, high))
            });
            let Some((low, high)) = found else { return };
            self.ram[low].bytes.end = self.ram[high].bytes.end;
            self.ram.remove(high);
        }
    }
}

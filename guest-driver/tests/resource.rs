//! Random operations on the resource tree, checked after each one against an array of units.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::ops::Range;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use virtio_mem_driver::hotplug::{
    Error, FirmwareMap, Intersection, Owner, ResourceFlags, ResourceTree,
};

const UNIT: u64 = 2 << 20;
const UNIT_COUNT: u64 = 24;
const NAMES: [&str; 3] = ["System RAM", "System RAM (virtio_mem)", "System RAM [x]"];

/// First unit and number of units; what sticks out at the end is cut off.
type Units = (u64, u64);

/// Where an operation is tried.
#[derive(Clone, Debug)]
enum Place {
    Anywhere(Units),
    /// All of a resource.
    Whole(usize),
    /// A part of a resource.
    Part(usize, Units),
}

fn place() -> impl Strategy<Value = Place> {
    let units = || (0..UNIT_COUNT, 0..9u64);
    prop_oneof![
        units().prop_map(Place::Anywhere),
        any::<usize>().prop_map(Place::Whole),
        (any::<usize>(), units()).prop_map(|(resource, units)| Place::Part(resource, units)),
    ]
}

#[derive(Clone, Debug)]
enum Operation {
    AddBootRam(Units),
    AddRam {
        units: Units,
        name: usize,
        owner: Owner,
        merge: bool,
    },
    Merge(Place),
    Remove(Place),
    Claim {
        place: Place,
        flags: ResourceFlags,
    },
    Release(usize),
    Adopt {
        place: Place,
        owner: Owner,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let units = || (0..UNIT_COUNT, 0..9u64);
    let owner = || {
        prop::sample::select(vec![
            Owner::PROBE,
            Owner::ACPI,
            Owner::driver(0),
            Owner::driver(1),
        ])
    };
    let flags = prop::sample::select(vec![
        ResourceFlags::RESERVED,
        ResourceFlags::DEVICE,
        ResourceFlags::RAM_REGION,
        ResourceFlags::VIRTIO_MEM_REGION,
    ]);
    // Mostly one name and one owner, or little would be merged.
    let name = prop_oneof![4 => Just(1usize), 2 => Just(0), 1 => Just(2)];
    let adder = prop_oneof![2 => Just(Owner::driver(0)), 1 => owner()];
    prop_oneof![
        2 => units().prop_map(AddBootRam),
        8 => (0..UNIT_COUNT, 0..4u64, name, adder, prop::bool::weighted(0.8)).prop_map(
            |(first, count, name, owner, merge)| {
                AddRam { units: (first, count), name, owner, merge }
            }
        ),
        1 => place().prop_map(Merge),
        5 => place().prop_map(Remove),
        3 => (place(), flags).prop_map(|(place, flags)| Claim { place, flags }),
        1 => any::<usize>().prop_map(Release),
        3 => (place(), owner()).prop_map(|(place, owner)| Adopt { place, owner }),
    ]
}

/// A resource as one of its units sees it. Those of one resource have one `id`.
#[derive(Clone, Debug, PartialEq)]
struct Layer {
    id: u64,
    name: String,
    flags: ResourceFlags,
}

impl Layer {
    fn is_ram(&self) -> bool {
        self.flags.busy && self.flags.system_ram
    }
}

/// A piece of address space: the resources it lies in, outermost first.
#[derive(Clone, Default)]
struct Unit {
    layers: Vec<Layer>,
    owner: Option<Owner>,
    described_by_firmware: bool,
}

impl Unit {
    fn is_plain_ram(&self) -> bool {
        let top = self.layers.last();
        top.is_some_and(|layer| layer.is_ram() && !layer.flags.driver_managed)
    }
}

struct Model {
    units: Vec<Unit>,
    fixed_map: bool,
    next_id: u64,
}

impl Model {
    fn has(&self, unit: usize, id: u64) -> bool {
        let mut layers = self.units[unit].layers.iter();
        layers.any(|layer| layer.id == id)
    }

    /// The units of resource `id`, which are contiguous.
    fn extent(&self, id: u64) -> Range<usize> {
        let mut units = (0..self.units.len()).filter(|unit| self.has(*unit, id));
        let first = units.next().unwrap();
        first..units.next_back().unwrap_or(first) + 1
    }

    /// The resource of System RAM at `unit`.
    fn ram(&self, unit: usize) -> Option<&Layer> {
        self.units[unit].layers.last().filter(|top| top.is_ram())
    }

    fn resolve(&self, place: &Place) -> Range<usize> {
        let resources = self.resources();
        let extent = |index: usize| match index.checked_rem(resources.len()) {
            Some(index) => self.extent(resources[index].2.id),
            None => 0..1,
        };
        match place {
            Place::Anywhere(units) => clip(*units),
            Place::Whole(resource) => extent(*resource),
            Place::Part(resource, (skip, count)) => {
                let extent = extent(*resource);
                let start = extent.start + *skip as usize % extent.len();
                start..(start + *count as usize).min(extent.end)
            }
        }
    }

    fn request(
        &mut self,
        range: Range<usize>,
        name: &str,
        flags: ResourceFlags,
    ) -> Result<(), Error> {
        if range.is_empty() {
            return Err(Error::Invalid);
        }
        let mut layers = self.units[range.clone()].iter().flat_map(|u| &u.layers);
        if layers.any(|l| l.flags.busy || !range.clone().all(|unit| self.has(unit, l.id))) {
            return Err(Error::Busy);
        }
        self.next_id += 1;
        for unit in &mut self.units[range] {
            unit.layers.push(Layer {
                id: self.next_id,
                name: name.to_owned(),
                flags,
            });
        }
        Ok(())
    }

    fn add_ram(&mut self, range: Range<usize>, name: &str, owner: Owner) -> Result<(), Error> {
        if name == NAMES[2] {
            return Err(Error::Invalid);
        }
        let flags = ResourceFlags {
            system_ram: true,
            driver_managed: name != NAMES[0],
            ..ResourceFlags::DEVICE
        };
        match self.request(range.clone(), name, flags) {
            Err(Error::Busy) => return Err(Error::Exists),
            other => other?,
        }
        for unit in &mut self.units[range] {
            unit.owner = Some(owner);
        }
        Ok(())
    }

    fn merge(&mut self, range: Range<usize>) -> Result<(), Error> {
        let id = self.ram_within(&range).ok_or(Error::Invalid)?;
        if self.extent(id) != range {
            return Err(Error::Invalid);
        }
        for unit in range.clone() {
            self.units[unit].layers.last_mut().unwrap().flags.mergeable = true;
        }
        for border in [range.end, range.start] {
            if border > 0 && border < self.units.len() {
                self.merge_at(border);
            }
        }
        Ok(())
    }

    fn merge_at(&mut self, border: usize) {
        let (left, right) = (&self.units[border - 1], &self.units[border]);
        let Some((of_right, right_parents)) = right.layers.split_last() else {
            return;
        };
        let Some((of_left, left_parents)) = left.layers.split_last() else {
            return;
        };
        let same = of_left.flags == of_right.flags && of_left.name == of_right.name;
        let is_mergeable = of_left.is_ram() && of_left.flags.mergeable;
        if same && is_mergeable && left_parents == right_parents && left.owner == right.owner {
            let id = of_left.id;
            for unit in self.extent(of_right.id) {
                self.units[unit].layers.last_mut().unwrap().id = id;
            }
        }
    }

    /// The resource of System RAM that all of `range` lies in.
    fn ram_within(&self, range: &Range<usize>) -> Option<u64> {
        let id = self.ram(range.clone().next()?)?.id;
        range.clone().all(|unit| self.has(unit, id)).then_some(id)
    }

    fn remove(&mut self, range: Range<usize>) -> Result<(), Error> {
        if range.is_empty() {
            return Err(Error::Invalid);
        }
        let is_ram = |unit: &Unit| unit.layers.last().is_some_and(Layer::is_ram);
        if !self.units[range.clone()].iter().all(is_ram) {
            return Err(Error::Invalid);
        }
        // What is left above the range of the resource it ends in is a resource of its own.
        let last = self.units[range.end - 1].layers.last().unwrap().id;
        let extent = self.extent(last);
        self.next_id += 1;
        for unit in range.end..extent.end {
            self.units[unit].layers.last_mut().unwrap().id = self.next_id;
        }
        for unit in range {
            self.units[unit].layers.pop();
            self.units[unit].owner = None;
        }
        Ok(())
    }

    fn release(&mut self, id: u64) -> Result<(), Error> {
        let extent = self.extent(id);
        let units = &mut self.units[extent];
        if units
            .iter()
            .any(|unit| unit.layers.last().unwrap().id != id)
        {
            return Err(Error::Busy);
        }
        for unit in units {
            unit.layers.pop();
        }
        Ok(())
    }

    fn owns(&self, owner: Owner, range: Range<usize>) -> Result<(), Error> {
        let units = &self.units[range];
        if units.is_empty() || units.iter().any(|unit| unit.owner.is_none()) {
            return Err(Error::Invalid);
        }
        match units.iter().all(|unit| unit.owner == Some(owner)) {
            true => Ok(()),
            false => Err(Error::NotPermitted),
        }
    }

    fn intersects(&self, range: Range<usize>) -> Intersection {
        let used = self.units[range].iter().filter(|u| !u.layers.is_empty());
        let (ram, other): (Vec<_>, Vec<_>) =
            used.partition(|unit| unit.layers.iter().any(|layer| layer.flags.system_ram));
        match (ram.is_empty(), other.is_empty()) {
            (true, _) => Intersection::Disjoint,
            (false, true) => Intersection::Intersects,
            (false, false) => Intersection::Mixed,
        }
    }

    /// Every resource with its first unit and depth, in the order of the list.
    fn resources(&self) -> Vec<(usize, usize, &Layer)> {
        let mut found: Vec<(usize, usize, &Layer)> = Vec::new();
        for (number, unit) in self.units.iter().enumerate() {
            for (depth, layer) in unit.layers.iter().enumerate() {
                if !found.iter().any(|(_, _, known)| known.id == layer.id) {
                    found.push((number, depth, layer));
                }
            }
        }
        found
    }

    fn list(&self) -> String {
        let line = |(_, depth, layer): (usize, usize, &Layer)| {
            let bytes = bytes(self.extent(layer.id));
            let indent = "  ".repeat(depth);
            let (start, last_byte, name) = (bytes.start, bytes.end - 1, &layer.name);
            format!("{indent}{start:08x}-{last_byte:08x} : {name}\n")
        };
        self.resources().into_iter().map(line).collect()
    }
}

fn clip((first, count): Units) -> Range<usize> {
    first as usize..(first + count).min(UNIT_COUNT) as usize
}

fn bytes(units: Range<usize>) -> Range<u64> {
    units.start as u64 * UNIT..units.end as u64 * UNIT
}

/// Applies `operation` to both and compares the results.
fn apply(tree: &mut ResourceTree, model: &mut Model, operation: &Operation) {
    let (got, expected) = match operation {
        Operation::AddBootRam(units) => {
            let range = clip(*units);
            let expected = model.add_ram(range.clone(), NAMES[0], Owner::BOOT);
            if expected.is_ok() {
                for unit in &mut model.units[range.clone()] {
                    unit.described_by_firmware = model.fixed_map;
                }
            }
            (tree.add_boot_ram(bytes(range)), expected)
        }
        Operation::AddRam {
            units,
            name,
            owner,
            merge,
        } => {
            let (range, name) = (clip(*units), NAMES[*name]);
            let mut got = tree.add_ram(bytes(range.clone()), name, *owner);
            let mut expected = model.add_ram(range.clone(), name, *owner);
            if *merge && expected.is_ok() {
                got = got.and_then(|()| tree.merge_ram(bytes(range.clone())));
                expected = model.merge(range);
            }
            (got, expected)
        }
        Operation::Merge(place) => {
            let range = model.resolve(place);
            (tree.merge_ram(bytes(range.clone())), model.merge(range))
        }
        Operation::Remove(place) => {
            let range = model.resolve(place);
            (tree.remove_ram(bytes(range.clone())), model.remove(range))
        }
        Operation::Claim { place, flags } => {
            let range = model.resolve(place);
            let name = format!("device{}", model.next_id);
            let got = tree.claim(bytes(range.clone()), &name, *flags);
            (got, model.request(range, &name, *flags))
        }
        Operation::Release(resource) => {
            let resources = model.resources();
            let claimed: Vec<_> = resources.iter().filter(|r| !r.2.is_ram()).collect();
            let Some(index) = resource.checked_rem(claimed.len()) else {
                return;
            };
            let Layer { id, name, .. } = claimed[index].2.clone();
            let range = bytes(model.extent(id));
            (tree.release(range, &name), model.release(id))
        }
        Operation::Adopt { place, owner } => {
            let range = model.resolve(place);
            let expected = model.owns(Owner::BOOT, range.clone());
            if expected.is_ok() {
                for unit in &mut model.units[range.clone()] {
                    unit.owner = Some(*owner);
                }
            }
            (tree.adopt(*owner, bytes(range)), expected)
        }
    };
    assert_eq!(got, expected, "{operation:?}");
}

/// Everything that can be seen of the tree is what the model says, also after a refusal, which leaves the
/// model as it was.
fn check(tree: &ResourceTree, model: &Model, (first, count): Units) {
    assert_eq!(tree.to_string(), model.list());
    for (resource, (_, depth, layer)) in tree.iomem().zip(model.resources()) {
        assert_eq!(resource.flags(), layer.flags);
        assert_eq!(resource.depth(), depth);
    }
    let within = |mut ranges: Vec<Range<u64>>, at: u64| {
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        ranges.retain(|range| range.contains(&at));
        !ranges.is_empty()
    };
    for (number, unit) in model.units.iter().enumerate() {
        let at = number as u64 * UNIT;
        let (plain, described) = (unit.is_plain_ram(), unit.described_by_firmware);
        assert_eq!(tree.owner(at), unit.owner);
        assert_eq!(within(tree.kexec_destinations().collect(), at), plain);
        assert_eq!(
            within(tree.stale_firmware_ranges().collect(), at),
            described && !plain
        );
        assert_eq!(
            within(tree.firmware_map().collect(), at),
            described || plain
        );
        assert_eq!(within(tree.reboot().unwrap(), at), described || plain);
    }
    let range = clip((first, count));
    assert_eq!(
        tree.intersects(bytes(range.clone())),
        model.intersects(range.clone())
    );
    for owner in [Owner::BOOT, Owner::ACPI, Owner::driver(0)] {
        let expected = model.owns(owner, range.clone());
        assert_eq!(tree.owns(owner, bytes(range.clone())), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "tests/proptest-regressions/resource.txt",
        ))),
        ..ProptestConfig::default()
    })]
    #[test]
    fn resources_are_those_of_a_model_unit_by_unit(
        fixed_map: bool,
        operations in prop::collection::vec((operation(), (0..UNIT_COUNT, 0..9u64)), 40..80),
    ) {
        let firmware = match fixed_map {
            true => FirmwareMap::Fixed,
            false => FirmwareMap::FollowsHotplug,
        };
        let mut tree = ResourceTree::new(firmware);
        let mut model = Model {
            units: vec![Unit::default(); UNIT_COUNT as usize],
            fixed_map,
            next_id: 0,
        };
        for (operation, seen) in operations {
            apply(&mut tree, &mut model, &operation);
            check(&tree, &model, seen);
        }
    }
}

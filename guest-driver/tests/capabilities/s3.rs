//! Sub-sections are for device memory: how small they are everywhere, what collides, and that RAM has no way to them.

use std::collections::BTreeMap;
use std::ops::Range;

use virtio_mem_driver::hotplug::{
    AddMemory, Config, DeviceKind, DeviceRange, Error, Hotplug, Intersection, Owner, Profile,
    ResourceFlags, Target,
};

use crate::s0::{add_namespace, bases, boot_with_persistent_memory, namespaces_at};
use crate::support::{GIB, MIB, Machine, SparseMemory, bare, booted};

/// S3-1.
#[test]
fn s3_01_ram_is_added_in_whole_memory_blocks_within_the_address_space() {
    let end = 1 << 46;
    let block = 128 * MIB;
    for (start, size, expected) in [
        (4 * GIB, 0, Err(Error::Invalid)),
        (4 * GIB, 1, Err(Error::Invalid)),
        (4 * GIB, 2 * MIB, Err(Error::Invalid)),
        (4 * GIB, block - 1, Err(Error::Invalid)),
        (4 * GIB, block + 1, Err(Error::Invalid)),
        (4 * GIB + 1, block, Err(Error::Invalid)),
        (4 * GIB + 2 * MIB, block, Err(Error::Invalid)),
        (4 * GIB - 2 * MIB, block, Err(Error::Invalid)),
        (4 * GIB + 64 * MIB, 64 * MIB, Err(Error::Invalid)),
        (4 * GIB, block, Ok(())),
        (4 * GIB, 3 * block, Ok(())),
        (0, block, Ok(())),
        (end - block, block, Ok(())),
        (end - block, 2 * block, Err(Error::TooBig)),
        (end, block, Err(Error::TooBig)),
        (end - 1, 2, Err(Error::TooBig)),
        (u64::MAX - block + 1, block, Err(Error::TooBig)),
        (u64::MAX, u64::MAX, Err(Error::TooBig)),
        (end, 0, Err(Error::Invalid)),
    ] {
        let mut machine = bare(Profile::X86_64);
        let before = machine.snapshot();
        let added = machine.add_memory(&AddMemory::new(start, size));
        assert_eq!(added, expected, "{size:x} at {start:x}");
        match expected {
            Ok(()) => assert_eq!(machine.blocks().count() as u64, size / block),
            Err(_) => assert_eq!(machine.snapshot(), before),
        }
        machine.check_invariants().unwrap();
    }
    // That something is there is noticed before how it is aligned.
    let mut machine = booted(Config::new(Profile::X86_64), &[(0, GIB, 0)]);
    assert_eq!(
        machine.add_memory(&AddMemory::new(MIB, MIB)),
        Err(Error::Exists)
    );
    let multiple = machine.profile().with_memory_block_size(2 * GIB).unwrap();
    assert_eq!(
        bare(multiple).add_memory(&AddMemory::new(4 * GIB, GIB)),
        Err(Error::Invalid)
    );
}

/// S3-2: the very range of the warning "devm_memremap_pages attempted on mixed region".
#[test]
fn s3_02_device_memory_over_ram_is_refused_as_mixed() {
    let attempted = 0x2_0000_0000..0x2_fc00_0000;
    let ram_end = 0x2_4000_0000;
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(0, 2 * GIB, 0), (4 * GIB, ram_end, 0)],
    );
    machine
        .claim_resource(
            ram_end..attempted.end,
            "Persistent Memory",
            ResourceFlags::RESERVED,
        )
        .unwrap();
    let before = machine.snapshot();
    let intersects = |machine: &Machine, bytes: Range<u64>| machine.resources().intersects(bytes);
    assert_eq!(intersects(&machine, attempted.clone()), Intersection::Mixed);
    let refused = add_namespace(&mut machine, attempted.clone());
    assert_eq!(refused.unwrap_err().errno_name(), "ENXIO");

    // All RAM is no better, one sub-section of it no less; and none is fine.
    assert_eq!(
        intersects(&machine, attempted.start..ram_end),
        Intersection::Intersects
    );
    for bytes in [
        attempted.start..ram_end,
        ram_end - 2 * MIB..ram_end,
        ram_end - 2 * MIB..attempted.end,
    ] {
        assert_eq!(add_namespace(&mut machine, bytes), Err(Error::NoAddress));
    }
    assert_eq!(machine.snapshot(), before);
    assert_eq!(
        intersects(&machine, ram_end..attempted.end),
        Intersection::Disjoint
    );
    add_namespace(&mut machine, ram_end..attempted.end).unwrap();
    machine.check_invariants().unwrap();

    // A place for RAM counts as RAM, also while there is none.
    let region = 16 * GIB..17 * GIB;
    machine
        .claim_resource(region.clone(), "virtio0", ResourceFlags::VIRTIO_MEM_REGION)
        .unwrap();
    assert_eq!(
        add_namespace(&mut machine, region.start..region.start + 2 * MIB),
        Err(Error::NoAddress)
    );
    // Somebody else's device is not RAM, but taken.
    machine
        .claim_resource(20 * GIB..21 * GIB, "0000:00:02.0", ResourceFlags::DEVICE)
        .unwrap();
    assert_eq!(
        add_namespace(&mut machine, 20 * GIB..20 * GIB + 2 * MIB),
        Err(Error::Busy)
    );
    machine.check_invariants().unwrap();
}

/// S3-3: what is on the medium, offset and size of each namespace, holds at whatever address a boot finds the medium.
#[test]
fn s3_03_namespaces_keep_offset_and_size_from_boot_to_boot() {
    let labels: Vec<(u64, u64)> = namespaces_at(0)
        .iter()
        .map(|n| (n.start, n.end - n.start))
        .collect();
    for base in bases() {
        let mut machine = boot_with_persistent_memory(Profile::X86_64, base);
        for (offset, size) in &labels {
            add_namespace(&mut machine, base + offset..base + offset + size).unwrap();
        }
        let found = machine.device_memory().map(|range| {
            let usable = range.usable();
            (usable.start - base, usable.end - usable.start)
        });
        assert_eq!(found.collect::<Vec<_>>(), labels);
        machine.check_invariants().unwrap();
    }
    // Metadata on the medium is a part of it: it moves along.
    for base in bases() {
        let mut machine = boot_with_persistent_memory(Profile::X86_64, base);
        let range = DeviceRange {
            altmap: 2 * MIB,
            ..DeviceRange::new(base..base + 66 * MIB, DeviceKind::FsDax)
        };
        machine.add_device_memory(range, "namespace").unwrap();
        let usable = machine.device_memory().next().unwrap().usable();
        assert_eq!(
            (usable.start - base, usable.end - base),
            (2 * MIB, 66 * MIB)
        );
    }
}

/// S3-4.
#[test]
fn s3_04_sub_section_is_2_mib_everywhere_and_a_section_has_8_to_256() {
    let ppc64 = Profile {
        page_shift: 16,
        pageblock_shift: 24,
        section_shift: 24,
        memory_block_shift: 24,
        ..Profile::X86_64
    };
    let expected = [64, 64, 64, 256, 64, 128, 64, 8];
    let profiles = Profile::ALL.into_iter().chain([("ppc64", ppc64)]);
    for ((name, profile), count) in profiles.zip(expected) {
        let mut machine = bare(profile);
        let start = 8 * GIB;
        let number = start / profile.section_size();
        for index in 0..count {
            let bytes = start + index * 2 * MIB..start + (index + 1) * 2 * MIB;
            let half = bytes.start..bytes.start + MIB;
            assert_eq!(
                add_namespace(&mut machine, half),
                Err(Error::Invalid),
                "{name}"
            );
            add_namespace(&mut machine, bytes.clone()).unwrap();
            assert_eq!(
                add_namespace(&mut machine, bytes),
                Err(Error::NoMemory),
                "{name}"
            );
            let section = machine.sections().next().unwrap();
            assert_eq!(
                (section.number, u64::from(section.active.count())),
                (number, index + 1),
                "{name}"
            );
            assert!(
                section.active.contains(index as u32) && !section.active.contains(index as u32 + 1)
            );
        }
        assert_eq!(machine.sections().count(), 1, "{name}");
        // The next one is the next section's first, and the first to go takes its own bit only.
        add_namespace(
            &mut machine,
            start + count * 2 * MIB..start + count * 2 * MIB + 2 * MIB,
        )
        .unwrap();
        assert_eq!(machine.sections().count(), 2, "{name}");
        machine
            .remove_device_memory(start..start + 2 * MIB)
            .unwrap();
        let section = machine.sections().next().unwrap();
        assert_eq!(u64::from(section.active.count()), count - 1, "{name}");
        assert!(!section.active.contains(0), "{name}");
        let page = |address: u64| address / profile.page_size();
        assert!(
            !machine.pfn_valid(page(start)) && machine.pfn_valid(page(start + 2 * MIB)),
            "{name}"
        );
        machine.check_invariants().unwrap();
    }
    let too_many = Profile {
        section_shift: 30,
        memory_block_shift: 30,
        ..Profile::X86_64
    };
    let refused = Hotplug::new(too_many, SparseMemory::default());
    assert_eq!(refused.err(), Some(Error::Invalid), "512 bits");
}

/// A file system on a namespace, in so far as it needs metadata for each page it touches.
struct Mounted {
    bytes: Range<u64>,
    contents: BTreeMap<u64, u64>,
}

impl Mounted {
    fn format(machine: &mut Machine, bytes: Range<u64>) -> Self {
        add_namespace(machine, bytes.clone()).unwrap();
        let size = bytes.end - bytes.start;
        let pages = (0..size).step_by(4096);
        Self {
            contents: pages.map(|offset| (offset, bytes.start ^ offset)).collect(),
            bytes,
        }
    }

    /// Reads everything through the metadata of its page.
    fn check(&self, machine: &Machine) {
        for (offset, content) in &self.contents {
            let address = self.bytes.start + offset;
            assert!(machine.pfn_valid(address >> 12) && machine.is_device_memory(address));
            assert!(!machine.pfn_is_online(address >> 12));
            assert_eq!(*content, self.bytes.start ^ offset);
        }
    }
}

/// S3-5.
#[test]
fn s3_05_several_namespaces_of_one_section_live_and_go_independently() {
    let section = 4 * GIB..4 * GIB + 128 * MIB;
    let config = Config {
        struct_page_size: 64,
        ..Config::new(Profile::X86_64)
    };
    for destroyed in 0..4 {
        let mut machine = booted(config, &[(0, GIB, 0)]);
        machine
            .claim_resource(
                section.clone(),
                "Persistent Memory",
                ResourceFlags::RESERVED,
            )
            .unwrap();
        let empty = machine.snapshot();
        let free = machine.counts().free;
        let mut mounted: Vec<Mounted> = (0..4)
            .map(|index| {
                let start = section.start + index * 32 * MIB;
                Mounted::format(&mut machine, start..start + 32 * MIB)
            })
            .collect();
        mounted.iter().for_each(|fs| fs.check(&machine));
        assert_eq!(free - machine.counts().free, 4 * 128);
        assert_eq!(
            machine.sections().filter(|section| !section.early).count(),
            1
        );

        let gone = mounted.remove(destroyed);
        machine.remove_device_memory(gone.bytes.clone()).unwrap();
        machine.check_invariants().unwrap();
        mounted.iter().for_each(|fs| fs.check(&machine));
        assert_eq!(
            free - machine.counts().free,
            3 * 128,
            "its metadata has gone with it"
        );
        assert!(!machine.pfn_valid(gone.bytes.start >> 12));
        assert!(!machine.pfn_valid((gone.bytes.end - 1) >> 12));
        assert_eq!(
            machine.remove_device_memory(gone.bytes.clone()),
            Err(Error::Invalid)
        );
        // Part of one that is in use is nobody's to destroy, nor the parent resource to give up.
        let part = mounted[0].bytes.start..mounted[0].bytes.start + 2 * MIB;
        assert_eq!(machine.remove_device_memory(part), Err(Error::Invalid));
        let parent = machine.release_resource(section.clone(), "Persistent Memory");
        assert_eq!(parent, Err(Error::Busy));
        let own = machine.release_resource(mounted[0].bytes.clone(), "namespace");
        assert_eq!(own, Err(Error::Busy));

        // Two smaller ones take its place.
        let middle = gone.bytes.start + 10 * MIB;
        mounted.push(Mounted::format(&mut machine, gone.bytes.start..middle));
        mounted.push(Mounted::format(&mut machine, middle..gone.bytes.end));
        machine.check_invariants().unwrap();
        mounted.iter().for_each(|fs| fs.check(&machine));
        for fs in mounted {
            machine.remove_device_memory(fs.bytes).unwrap();
            machine.check_invariants().unwrap();
        }
        assert_eq!(
            machine.snapshot(),
            empty,
            "the section has gone with the last"
        );
        machine
            .release_resource(section.clone(), "Persistent Memory")
            .unwrap();
    }
}

/// S3-6.
#[test]
fn s3_06_no_way_of_adding_ram_takes_less_than_a_memory_block() {
    let mut machine = booted(Config::new(Profile::X86_64), &[(0, GIB, 0)]);
    let group = machine.register_static_group(0, 32768).unwrap();
    let region = 4 * GIB..8 * GIB;
    machine
        .claim_resource(region, "dax0.0", ResourceFlags::RAM_REGION)
        .unwrap();
    let before = machine.snapshot();
    for (start, size) in [
        (4 * GIB, 2 * MIB),
        (4 * GIB + 2 * MIB, 128 * MIB),
        (4 * GIB, 130 * MIB),
    ] {
        let plain = AddMemory::new(start, size);
        let driver_managed = AddMemory {
            owner: Owner::driver(0),
            resource_name: "System RAM (kmem)",
            merge_resource: true,
            ..plain.clone()
        };
        let every_request = [
            AddMemory {
                target: Target::Group(group),
                ..driver_managed.clone()
            },
            AddMemory {
                memmap_on_memory: true,
                ..driver_managed.clone()
            },
            AddMemory {
                withheld: start..start + 2 * MIB,
                ..driver_managed.clone()
            },
            driver_managed,
            AddMemory {
                owner: Owner::ACPI,
                ..plain.clone()
            },
            plain,
        ];
        for request in every_request {
            assert_eq!(
                machine.add_memory(&request),
                Err(Error::Invalid),
                "{request:?}"
            );
        }
    }
    for address in ["0x100200000", "0x100001000", "1"] {
        assert_eq!(machine.write("probe", address), Err(Error::Invalid));
    }
    assert_eq!(machine.snapshot(), before);

    // Nor is there a way to give back less, or as device memory.
    machine.write("probe", "0x100000000").unwrap();
    let before = machine.snapshot();
    for (start, size) in [
        (4 * GIB, 2 * MIB),
        (4 * GIB + 126 * MIB, 2 * MIB),
        (4 * GIB, 130 * MIB),
        (4 * GIB, 0),
    ] {
        assert_eq!(
            machine.remove_memory(Owner::PROBE, start, size),
            Err(Error::Invalid)
        );
        assert_eq!(
            machine.offline_and_remove_memory(Owner::PROBE, start, size),
            Err(Error::Invalid)
        );
        assert_eq!(
            machine.remove_device_memory(start..start + size),
            Err(Error::Invalid)
        );
    }
    assert_eq!(machine.snapshot(), before);
    // And what is device memory is not removed as RAM.
    add_namespace(&mut machine, 16 * GIB..16 * GIB + 128 * MIB).unwrap();
    assert_eq!(
        machine.remove_memory(Owner::PROBE, 16 * GIB, 128 * MIB),
        Err(Error::Invalid)
    );
    machine.check_invariants().unwrap();
}

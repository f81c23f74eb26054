use alloc::string::ToString;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const VIRTIO_MEM: &str = "System RAM (virtio_mem)";

fn driver() -> Owner {
    Owner::driver(0)
}

/// 1 GiB of boot memory below 4 GiB, the region of a virtio-mem device from 4 GiB to 8 GiB.
fn machine(firmware: FirmwareMap) -> ResourceTree {
    let mut tree = ResourceTree::new(firmware);
    tree.add_boot_ram(0x1000..GIB).unwrap();
    let region = ResourceFlags::VIRTIO_MEM_REGION;
    tree.claim(4 * GIB..8 * GIB, "virtio0", region).unwrap();
    tree
}

/// The 128 MiB memory blocks from 4 GiB on.
fn blocks(first: u64, count: u64) -> Range<u64> {
    let start = 4 * GIB + first * 128 * MIB;
    start..start + count * 128 * MIB
}

fn add_merged(tree: &mut ResourceTree, range: Range<u64>, owner: Owner) {
    tree.add_ram(range.clone(), VIRTIO_MEM, owner).unwrap();
    tree.merge_ram(range).unwrap();
}

/// A single range; the literal array of it looks like a mistake.
fn only(range: Range<u64>) -> Vec<Range<u64>> {
    core::iter::once(range).collect()
}

/// The resources below the device region.
fn below_region(tree: &ResourceTree) -> Vec<Range<u64>> {
    let children = tree.iomem().filter(|r| r.depth() == 1);
    children.map(Resource::range).collect()
}

#[test]
fn list_reads_as_in_linux() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    add_merged(&mut tree, blocks(0, 1), driver());
    tree.add_ram(blocks(4, 1), VIRTIO_MEM, driver()).unwrap();
    assert_eq!(
        tree.to_string(),
        "00001000-3fffffff : System RAM\n\
         100000000-1ffffffff : virtio0\n\
        \x20 100000000-107ffffff : System RAM (virtio_mem)\n\
        \x20 120000000-127ffffff : System RAM (virtio_mem)\n"
    );
}

#[test]
fn name_decides_whether_memory_is_driver_managed() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    for name in ["", "RAM", "System RAM ", "System RAM (x", "System RAM(x)"] {
        let result = tree.add_ram(blocks(0, 1), name, driver());
        assert_eq!(result, Err(Error::Invalid), "{name:?}");
    }
    tree.add_ram(blocks(0, 1), "System RAM", driver()).unwrap();
    tree.add_ram(blocks(1, 1), "System RAM (x)", driver())
        .unwrap();
    let managed: Vec<_> = tree
        .iomem()
        .filter(|r| r.depth() == 1)
        .map(|r| r.flags().driver_managed)
        .collect();
    assert_eq!(managed, [false, true]);
}

#[test]
fn memory_is_added_once_and_wholly_inside_or_outside_a_region() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    tree.add_ram(blocks(2, 2), VIRTIO_MEM, driver()).unwrap();
    let before = tree.to_string();
    for (range, error) in [
        (blocks(0, 0), Error::Invalid),
        (blocks(2, 2), Error::Exists),
        (blocks(3, 2), Error::Exists),
        (blocks(1, 4), Error::Exists),
        (2 * GIB..5 * GIB, Error::Exists),
        (7 * GIB..9 * GIB, Error::Exists),
        (2 * GIB..9 * GIB, Error::Exists),
        (0..0x1001, Error::Exists),
    ] {
        let result = tree.add_ram(range.clone(), VIRTIO_MEM, driver());
        assert_eq!(result, Err(error), "{range:x?}");
        assert_eq!(tree.to_string(), before);
    }
    tree.add_ram(8 * GIB..9 * GIB, "System RAM", Owner::PROBE)
        .unwrap();
}

#[test]
fn region_cannot_be_claimed_over_memory_of_an_earlier_life() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    add_merged(&mut tree, blocks(0, 1), driver());
    let region = 4 * GIB..8 * GIB;
    let flags = ResourceFlags::VIRTIO_MEM_REGION;
    assert_eq!(
        tree.claim(region.clone(), "virtio0", flags),
        Err(Error::Busy)
    );
    assert_eq!(tree.release(region.clone(), "virtio0"), Err(Error::Busy));
    tree.remove_ram(blocks(0, 1)).unwrap();
    tree.release(region.clone(), "virtio0").unwrap();
    assert_eq!(tree.release(region.clone(), "virtio0"), Err(Error::Invalid));
    tree.claim(region, "virtio0", flags).unwrap();
}

#[test]
fn innermost_of_equal_regions_is_released_first() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    let region = 4 * GIB..8 * GIB;
    for flags in [ResourceFlags::RESERVED, ResourceFlags::RAM_REGION] {
        tree.claim(region.clone(), "virtio0", flags).unwrap();
    }
    for expected in [2, 1, 0] {
        assert_eq!(tree.iomem().last().unwrap().depth(), expected);
        tree.release(region.clone(), "virtio0").unwrap();
    }
    assert_eq!(tree.iomem().count(), 1);
}

#[test]
fn memory_in_use_is_added_not_claimed() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    let flags = ResourceFlags {
        system_ram: true,
        ..ResourceFlags::DEVICE
    };
    let result = tree.claim(blocks(0, 1), "System RAM", flags);
    assert_eq!(result, Err(Error::Invalid));
}

#[test]
fn exact_neighbours_of_one_kind_are_merged() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    add_merged(&mut tree, blocks(0, 1), driver());
    add_merged(&mut tree, blocks(2, 1), driver());
    add_merged(&mut tree, blocks(1, 1), driver());
    assert_eq!(below_region(&tree), [blocks(0, 3)]);
    // Did not ask for it; is somebody else's; has another name.
    tree.add_ram(blocks(3, 1), VIRTIO_MEM, driver()).unwrap();
    add_merged(&mut tree, blocks(4, 1), driver());
    add_merged(&mut tree, blocks(5, 1), Owner::driver(1));
    tree.add_ram(blocks(6, 1), "System RAM", Owner::driver(1))
        .unwrap();
    tree.merge_ram(blocks(6, 1)).unwrap();
    let apart = [blocks(0, 3), blocks(3, 1), blocks(4, 1), blocks(5, 1)];
    assert_eq!(below_region(&tree)[..4], apart);
    assert_eq!(tree.merge_ram(blocks(0, 1)), Err(Error::Invalid));
    tree.merge_ram(blocks(3, 1)).unwrap();
    assert_eq!(below_region(&tree)[0], blocks(0, 5));
}

#[test]
fn regions_keep_their_memory_apart() {
    let mut tree = ResourceTree::new(FirmwareMap::FollowsHotplug);
    let flags = ResourceFlags::RAM_REGION;
    for range in [0..GIB, GIB..2 * GIB] {
        tree.claim(range.clone(), "dax0.0", flags).unwrap();
        add_merged(&mut tree, range, driver());
    }
    assert_eq!(below_region(&tree), [0..GIB, GIB..2 * GIB]);
}

#[test]
fn removal_cuts_a_resource_at_the_front_at_the_back_and_in_two() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    add_merged(&mut tree, blocks(0, 8), driver());
    tree.remove_ram(blocks(0, 1)).unwrap();
    assert_eq!(below_region(&tree), [blocks(1, 7)]);
    tree.remove_ram(blocks(7, 1)).unwrap();
    assert_eq!(below_region(&tree), [blocks(1, 6)]);
    tree.remove_ram(blocks(3, 1)).unwrap();
    assert_eq!(below_region(&tree), [blocks(1, 2), blocks(4, 3)]);
    // Not in one resource, not there, not RAM.
    for range in [blocks(2, 3), blocks(1, 6), blocks(3, 1), blocks(1, 0)] {
        assert_eq!(tree.remove_ram(range), Err(Error::Invalid));
    }
    assert_eq!(below_region(&tree), [blocks(1, 2), blocks(4, 3)]);
    add_merged(&mut tree, blocks(3, 1), driver());
    assert_eq!(below_region(&tree), [blocks(1, 6)]);
    tree.remove_ram(blocks(1, 6)).unwrap();
    assert_eq!(below_region(&tree), []);
}

#[test]
fn removal_takes_neighbours_that_make_up_the_range() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    for block in [0, 1] {
        tree.add_ram(blocks(block, 1), VIRTIO_MEM, driver())
            .unwrap();
    }
    tree.add_ram(blocks(2, 2), VIRTIO_MEM, driver()).unwrap();
    assert_eq!(tree.remove_ram(blocks(0, 5)), Err(Error::Invalid));
    tree.remove_ram(blocks(0, 3)).unwrap();
    assert_eq!(below_region(&tree), [blocks(3, 1)]);
}

#[test]
fn memory_is_owned_by_who_added_it() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    tree.add_ram(blocks(0, 2), VIRTIO_MEM, driver()).unwrap();
    tree.add_ram(blocks(2, 1), VIRTIO_MEM, Owner::driver(1))
        .unwrap();
    assert_eq!(tree.owns(driver(), blocks(0, 2)), Ok(()));
    assert_eq!(tree.owns(driver(), blocks(1, 2)), Err(Error::NotPermitted));
    assert_eq!(
        tree.owns(Owner::PROBE, blocks(0, 1)),
        Err(Error::NotPermitted)
    );
    assert_eq!(
        tree.owns(driver(), 0x1000..0x2000),
        Err(Error::NotPermitted)
    );
    // Partly, or wholly, nothing is there.
    for range in [blocks(2, 2), blocks(3, 1), blocks(0, 0)] {
        assert_eq!(tree.owns(driver(), range), Err(Error::Invalid));
    }
    assert_eq!(tree.owner(0x1000), Some(Owner::BOOT));
    assert_eq!(tree.owner(0xfff), None);
    assert_eq!(tree.owner(u64::MAX), None);
}

#[test]
fn acpi_adopts_boot_memory_in_part_and_only_once() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    let before = tree.to_string();
    let dimm = GIB / 2..GIB;
    tree.adopt(Owner::ACPI, dimm.clone()).unwrap();
    assert_eq!(tree.owns(Owner::ACPI, dimm.clone()), Ok(()));
    assert_eq!(tree.owns(Owner::BOOT, 0x1000..GIB / 2), Ok(()));
    for (range, error) in [
        (dimm.clone(), Error::NotPermitted),
        (0x1000..GIB, Error::NotPermitted),
        (0..GIB / 2, Error::Invalid),
    ] {
        assert_eq!(tree.adopt(Owner::driver(7), range), Err(error));
    }
    // Neither the list nor the map shows owners.
    assert_eq!(tree.to_string(), before);
    assert_eq!(tree.firmware_map().collect::<Vec<_>>(), only(0x1000..GIB));
    tree.remove_ram(dimm.clone()).unwrap();
    assert_eq!(tree.owns(Owner::ACPI, dimm), Err(Error::Invalid));
}

#[test]
fn special_purpose_memory_is_no_ram_until_a_driver_adds_it() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    let special = 16 * GIB..20 * GIB;
    tree.claim(special.clone(), "Soft Reserved", ResourceFlags::RESERVED)
        .unwrap();
    assert_eq!(tree.intersects(special.clone()), Intersection::Disjoint);
    tree.claim(special.clone(), "dax0.0", ResourceFlags::RAM_REGION)
        .unwrap();
    tree.add_ram(special.clone(), "System RAM (kmem)", driver())
        .unwrap();
    assert!(tree.to_string().ends_with(
        "400000000-4ffffffff : Soft Reserved\n\
        \x20 400000000-4ffffffff : dax0.0\n\
        \x20   400000000-4ffffffff : System RAM (kmem)\n"
    ));
    assert_eq!(tree.intersects(special), Intersection::Intersects);
    assert_eq!(tree.reboot().unwrap(), only(0x1000..GIB));
}

#[test]
fn device_memory_beside_ram_makes_a_range_mixed() {
    let mut tree = ResourceTree::new(FirmwareMap::FollowsHotplug);
    tree.add_boot_ram(4 * GIB..9 * GIB).unwrap();
    let wanted = 0x2_0000_0000..0x2_fc00_0000;
    // RAM and nothing: not mixed, in Linux either.
    assert_eq!(tree.intersects(wanted.clone()), Intersection::Intersects);
    let persistent = 9 * GIB..16 * GIB;
    tree.claim(
        persistent.clone(),
        "Persistent Memory",
        ResourceFlags::RESERVED,
    )
    .unwrap();
    assert_eq!(tree.intersects(wanted.clone()), Intersection::Mixed);
    assert_eq!(tree.intersects(persistent.clone()), Intersection::Disjoint);
    tree.claim(9 * GIB..12 * GIB, "namespace0.0", ResourceFlags::DEVICE)
        .unwrap();
    assert_eq!(tree.intersects(wanted), Intersection::Mixed);
    assert_eq!(tree.intersects(9 * GIB..12 * GIB), Intersection::Disjoint);
    assert_eq!(
        tree.add_ram(10 * GIB..11 * GIB, "System RAM", Owner::PROBE),
        Err(Error::Exists)
    );
    assert_eq!(tree.intersects(20 * GIB..21 * GIB), Intersection::Disjoint);
    assert_eq!(tree.intersects(5 * GIB..5 * GIB), Intersection::Disjoint);
}

#[test]
fn resource_partly_covered_by_ram_below_it_is_mixed() {
    let mut tree = ResourceTree::new(FirmwareMap::FollowsHotplug);
    tree.claim(0..4 * GIB, "Soft Reserved", ResourceFlags::RESERVED)
        .unwrap();
    for gib in [0, 1, 3] {
        tree.add_ram(gib * GIB..(gib + 1) * GIB, "System RAM (kmem)", driver())
            .unwrap();
    }
    assert_eq!(tree.intersects(0..2 * GIB), Intersection::Intersects);
    assert_eq!(tree.intersects(0..3 * GIB), Intersection::Mixed);
    assert_eq!(tree.intersects(2 * GIB..3 * GIB), Intersection::Disjoint);
    assert_eq!(tree.intersects(3 * GIB..9 * GIB), Intersection::Intersects);
}

#[test]
fn firmware_map_and_kexec_know_plain_memory_only() {
    let mut tree = machine(FirmwareMap::FollowsHotplug);
    add_merged(&mut tree, blocks(0, 4), driver());
    let dimm = 8 * GIB..9 * GIB;
    tree.add_ram(dimm.clone(), "System RAM", Owner::ACPI)
        .unwrap();
    let plain = [0x1000..GIB, dimm.clone()];
    assert_eq!(tree.firmware_map().collect::<Vec<_>>(), plain);
    assert_eq!(tree.kexec_destinations().collect::<Vec<_>>(), plain);
    assert_eq!(tree.reboot().unwrap(), plain);
    tree.remove_ram(dimm).unwrap();
    assert_eq!(tree.reboot().unwrap(), only(0x1000..GIB));
    assert_eq!(tree.stale_firmware_ranges().next(), None);
}

#[test]
fn removed_boot_memory_stays_in_a_fixed_firmware_map() {
    let removed = 512 * MIB..768 * MIB;
    let mut x86 = machine(FirmwareMap::FollowsHotplug);
    x86.remove_ram(removed.clone()).unwrap();
    assert_eq!(x86.reboot().unwrap(), [0x1000..512 * MIB, 768 * MIB..GIB]);

    let mut arm64 = machine(FirmwareMap::Fixed);
    let stale = |tree: &ResourceTree| tree.stale_firmware_ranges().collect::<Vec<_>>();
    assert_eq!(stale(&arm64), []);
    arm64.remove_ram(removed.clone()).unwrap();
    assert_eq!(stale(&arm64), only(removed.clone()));
    assert_eq!(arm64.reboot().unwrap(), only(0x1000..GIB));
    assert_eq!(arm64.kexec_destinations().count(), 2);
    // Driver-managed memory there is as wrong in the map as none.
    add_merged(&mut arm64, removed.clone(), driver());
    assert_eq!(stale(&arm64), only(removed.clone()));
    arm64.remove_ram(removed.clone()).unwrap();
    arm64.add_ram(removed, "System RAM", Owner::PROBE).unwrap();
    assert_eq!(stale(&arm64), []);
}

//! The access checker finds a guest that does what no driver may: each test is a driver that is wrong in one way.

use std::panic::{AssertUnwindSafe, catch_unwind};

use integration_tests::rig::{Case, Rig};
use virtio_mem_driver::driver::{Policy, Progress};
use virtio_mem_driver::hotplug::{AddMemory, MemmapOnMemory, Mobility, OnlineType, Owner};
use vmm_harness::in_process::Access;

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;

/// 2 MiB of the 4 memory blocks of 128 MiB are plugged.
fn rig() -> Rig {
    let case = Case {
        memmap_on_memory: MemmapOnMemory::On,
        ..Case::plain(Policy::default(), 256)
    };
    let mut rig = Rig::new(case);
    drop(rig.handle.resize(2 * MIB).expect("a size"));
    assert_eq!(rig.run(|_| {}), Progress::Settled);
    rig
}

/// What the checker says of the next step.
fn found(rig: &mut Rig) -> Option<String> {
    let step = catch_unwind(AssertUnwindSafe(|| rig.step()));
    let message =
        |panic: Box<dyn std::any::Any + Send>| *panic.downcast::<String>().expect("a text");
    step.err().map(message)
}

fn assert_found(rig: &mut Rig, who: &str, address: u64, len: u64) {
    let found = found(rig).expect("a violation");
    for part in [
        format!("who: \"{who}\""),
        format!("address: {address}"),
        format!("len: {len} "),
    ] {
        assert!(found.contains(&part), "{part} in {found}");
    }
}

/// Memory block `block` of the region, as the driver adds it.
fn memory_block(block: u64) -> AddMemory<'static> {
    AddMemory {
        owner: Owner::driver(24),
        resource_name: "System RAM (virtio_mem)",
        ..AddMemory::new(START + block * 128 * MIB, 128 * MIB)
    }
}

#[test]
fn driver_that_is_right_is_left_alone() {
    let mut rig = rig();
    assert_eq!(found(&mut rig), None);
}

#[test]
fn g_10_memory_given_out_before_it_is_plugged_is_found() {
    let mut rig = rig();
    rig.bus.hold(true);
    drop(rig.handle.resize(130 * MIB).expect("a size"));
    while !rig.bus.has_waiting() {
        assert_eq!(found(&mut rig), None);
    }
    // All of the first memory block is asked for; nothing is answered yet.
    let second = START + 2 * MIB;
    rig.hotplug.fake_online(second, 2 * MIB).expect("withheld");
    assert_found(&mut rig, "the page allocator, some time", second, 2 * MIB);
}

#[test]
fn g_06_one_pageblock_too_many_is_found_before_anybody_allocates_it() {
    let mut rig = rig();
    rig.hotplug
        .fake_online(START + 126 * MIB, 2 * MIB)
        .expect("withheld");
    assert_found(
        &mut rig,
        "the page allocator, some time",
        START + 126 * MIB,
        2 * MIB,
    );
}

#[test]
fn g_06_page_of_unplugged_memory_that_is_allocated_is_found_at_its_first_access() {
    let mut rig = rig();
    rig.hotplug.add_memory(&memory_block(2)).expect("added");
    rig.hotplug
        .online(START / (128 * MIB) + 2, OnlineType::Kernel)
        .expect("online");
    let page = rig.hotplug.allocate(Mobility::Unmovable).expect("a page");
    assert_eq!(rig.hotplug.address(page), Ok(START + 256 * MIB));
    let pinned = catch_unwind(AssertUnwindSafe(|| rig.hotplug.pin(page)));
    let found = *pinned
        .expect_err("a violation")
        .downcast::<String>()
        .expect("a text");
    assert!(found.contains("the page allocator"), "{found}");
}

#[test]
fn metadata_in_unplugged_memory_is_found() {
    let mut rig = rig();
    let request = AddMemory {
        memmap_on_memory: true,
        ..memory_block(1)
    };
    rig.hotplug.add_memory(&request).expect("added");
    let start = START + 128 * MIB;
    assert_found(&mut rig, "metadata in the memory itself", start, 2 * MIB);
}

#[test]
fn g_11_memory_kept_while_it_is_being_unplugged_is_found() {
    let mut rig = rig();
    rig.bus.hold(true);
    drop(rig.handle.resize(0).expect("a size"));
    while !rig.bus.has_waiting() {
        assert_eq!(found(&mut rig), None);
    }
    // Plugged still, but asked to go.
    assert_eq!(rig.handle.status().plugged_size, 2 * MIB);
    let written = rig
        .shadow
        .check("a user of memory", Access::Write, START, 8);
    assert!(written.is_err());
    rig.hotplug.fake_online(START, 2 * MIB).expect("withheld");
    assert_found(&mut rig, "the page allocator, some time", START, 2 * MIB);
}

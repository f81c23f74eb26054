//! Options that do not go together are refused before there is a device, with the reason.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use virtio_mem::{Anonymous, BuildError, Builder, VirtioMem};
use vm_memory::GuestAddress;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn builder(len: u64) -> Builder {
    VirtioMem::builder(GuestAddress(4 * GIB), Anonymous::base_pages(len).unwrap())
}

#[test]
fn block_size_follows_from_the_backing() {
    let device = builder(GIB).build().unwrap();
    assert_eq!(device.geometry().block_size(), 2 * MIB);
}

#[test]
fn block_smaller_than_a_page_is_refused() {
    let error = builder(GIB).block_size(1024).build().unwrap_err();
    assert!(matches!(
        error,
        BuildError::BlockSmallerThanPage {
            block_size: 1024,
            ..
        }
    ));
    assert_eq!(
        error.to_string(),
        "block size 0x400 is smaller than a page of the backing, 0x1000"
    );
}

#[test]
fn slot_that_is_not_made_of_whole_blocks_is_refused() {
    for slot_size in [0, 3 * MIB] {
        let error = builder(GIB)
            .block_size(2 * MIB)
            .slot_size(slot_size)
            .build()
            .unwrap_err();
        assert!(matches!(error, BuildError::SlotSize { .. }), "{error}");
    }
}

#[test]
fn guest_memory_block_that_is_no_power_of_two_is_refused() {
    for size in [0, 3 * MIB] {
        let error = builder(GIB)
            .guest_memory_block_size(size)
            .build()
            .unwrap_err();
        assert!(
            matches!(error, BuildError::GuestMemoryBlockSize(_)),
            "{error}"
        );
    }
}

/// A guest with 64 GiB of boot memory adds memory in blocks of 2 GiB. Of a usable region cut for blocks of
/// 128 MiB it could not use a byte.
#[test]
fn usable_region_has_room_for_two_memory_blocks_of_the_guest() {
    let device = builder(16 * GIB)
        .block_size(2 * MIB)
        .guest_memory_block_size(2 * GIB)
        .requested_size(2 * MIB)
        .build()
        .unwrap();
    assert_eq!(
        device.handle().status().usable_region_size,
        2 * MIB + 4 * GIB
    );
}

#[test]
fn size_beyond_the_region_is_refused() {
    let error = builder(GIB).requested_size(2 * GIB).build().unwrap_err();
    assert!(matches!(error, BuildError::RequestedSize(_)), "{error}");
    assert!(
        builder(GIB)
            .build()
            .unwrap()
            .handle()
            .resize(2 * GIB)
            .is_err()
    );
}

//! A driver's end of the guest-request queue, at fixed addresses of boot memory.

use virtio_mem::wire::{Request, Response};
use vm_memory::{Bytes, GuestAddress};
use vmm_harness::BootMemory;

pub(crate) const SIZE: u16 = 8;
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
const REQUEST: u64 = 0x4000;
const RESPONSE: u64 = 0x5000;

/// Puts `request` into the ring as number `index`, for an answer at a place of its own.
pub(crate) fn add(memory: &BootMemory, index: u16, request: Request) {
    memory
        .write_slice(&request.emit(), GuestAddress(REQUEST))
        .unwrap();
    let descriptor = |at: u64, address: u64, len: usize, flags: u16| {
        let flags_and_next = u32::from(flags) | 1 << 16;
        let words = [address, len as u64 | u64::from(flags_and_next) << 32];
        for (i, word) in words.into_iter().enumerate() {
            let slot = GuestAddress(DESCRIPTORS + at * 16 + i as u64 * 8);
            memory.write_obj(word, slot).unwrap();
        }
    };
    descriptor(0, REQUEST, Request::LEN, 1);
    descriptor(1, RESPONSE, Response::LEN, 2);
    let slot = AVAILABLE + 4 + u64::from(index % SIZE) * 2;
    memory.write_obj(0u16, GuestAddress(slot)).unwrap();
    memory
        .write_obj(index.wrapping_add(1), GuestAddress(AVAILABLE + 2))
        .unwrap();
}

/// Number of answers so far.
pub(crate) fn used_index(memory: &BootMemory) -> u16 {
    memory.read_obj(GuestAddress(USED + 2)).unwrap()
}

/// The last answer: its type, and the state if it was to a STATE request.
pub(crate) fn response(memory: &BootMemory) -> (u16, u16) {
    let at = |offset| memory.read_obj(GuestAddress(RESPONSE + offset)).unwrap();
    (at(0), at(8))
}

/// Rings as they are before the first request.
pub(crate) fn clear(memory: &BootMemory) {
    for ring in [AVAILABLE, USED] {
        memory.write_obj(0u64, GuestAddress(ring)).unwrap();
    }
}

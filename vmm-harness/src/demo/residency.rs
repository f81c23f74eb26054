//! What the host holds behind blocks that are not plugged: the kernel's word, not the device's.
#![expect(unsafe_code, reason = "mincore takes an address")]

use std::io;

use virtio_mem::{Backing, VirtioMem};
use virtio_mem_wire::BlockRange;

/// Bytes of host memory behind unplugged blocks.
///
/// The device's own [`resident_bytes`](virtio_mem::Handle::resident_bytes) counts the region as a whole. This
/// asks the kernel block by block, and knows nothing of how the device gives memory back.
pub(super) fn unplugged_resident(device: &VirtioMem) -> io::Result<u64> {
    let geometry = device.geometry();
    let backing = device.backing();
    let all = BlockRange {
        first: 0,
        count: geometry.block_count(),
    };
    let plugged = device.handle().plugged();
    let mut resident = 0;
    for run in plugged.runs_in(all, false) {
        resident += resident_in(
            &*backing,
            geometry.bytes(run.first),
            geometry.bytes(run.count),
        )?;
    }
    Ok(resident)
}

fn resident_in(backing: &dyn Backing, offset: u64, len: u64) -> io::Result<u64> {
    const PAGE: usize = 4096;
    // One byte of answer a page: 64 KiB for 256 MiB at a time.
    const PIECE: usize = 256 << 20;
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = usize::try_from(offset).map_err(too_large)?;
    let len = usize::try_from(len).map_err(too_large)?;
    let start = backing.host_address().as_ptr().wrapping_byte_add(offset);
    let mut pages = vec![0u8; PIECE / PAGE];
    let mut resident = 0;
    for done in (0..len).step_by(PIECE) {
        let piece = PIECE.min(len - done);
        let at = start.wrapping_byte_add(done).cast();
        // SAFETY: the piece is inside the backing's mapping, which `backing` keeps; it is only asked about,
        // and `pages` has a byte for each of its pages.
        let result = unsafe { libc::mincore(at, piece, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let present = pages
            .iter()
            .take(piece.div_ceil(PAGE))
            .filter(|page| **page & 1 != 0);
        resident += present.count() as u64 * PAGE as u64;
    }
    Ok(resident)
}

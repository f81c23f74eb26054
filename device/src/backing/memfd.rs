//! Shared memory in base pages, for VMMs whose device processes (vhost-user) map guest memory too.
#![expect(
    unsafe_code,
    reason = "`Backing` promises a stable mapping, which the owned `Mapping` is"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::Backing;
use super::mapping::{HUGE_PAGE_SIZE, Mapping, max_open_runs};

/// Memory of an unnamed file, which others may map by its descriptor ([`AsFd`]).
///
/// A closed block is closed to this process and its guest. Another process that has the file mapped can still
/// write there, and then holds memory that is not plugged, until the block is plugged and unplugged again.
#[derive(Debug)]
pub struct Memfd {
    file: OwnedFd,
    mapping: Mapping,
}

impl Memfd {
    /// An empty file of `len` bytes, mapped here.
    ///
    /// # Errors
    ///
    /// If the host has no such address space or file.
    pub fn new(len: u64) -> io::Result<Self> {
        // Huge pages, should the host use them here, need equal offsets on both sides.
        Self::create(len, HUGE_PAGE_SIZE, MemfdFlags::empty())
    }

    pub(super) fn create(len: u64, align: u64, flags: MemfdFlags) -> io::Result<Self> {
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("virtio-mem", flags)?;
        rustix::fs::ftruncate(&file, len)?;
        // Whoever else gets the file must not be able to cut it short under our feet: that would be SIGBUS.
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let mapping = Mapping::reserve(len, align)?;
        mapping.map_file(0..len, file.as_fd(), 0, true)?;
        Ok(Self { file, mapping })
    }

    /// Gives pages to what has none in `range`; the others keep their contents.
    pub(super) fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.fallocate(FallocateFlags::KEEP_SIZE, range)
    }

    fn fallocate(&self, mode: FallocateFlags, range: Range<u64>) -> io::Result<()> {
        self.mapping.check(&range)?;
        let len = range.end - range.start;
        // A signal interrupts it between two pages; what is done already is skipped the next time.
        let call = || rustix::fs::fallocate(&self.file, mode, range.start, len);
        Ok(rustix::io::retry_on_intr(call)?)
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

// SAFETY: `mapping` is owned, lives as long as the backing, and is never moved or unmapped in between; the file
// is sealed against becoming shorter.
unsafe impl Backing for Memfd {
    fn host_address(&self) -> NonNull<u8> {
        self.mapping.start()
    }

    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn page_size(&self) -> u64 {
        rustix::param::page_size() as u64
    }

    fn default_block_size(&self) -> u64 {
        HUGE_PAGE_SIZE.max(self.page_size())
    }

    fn max_open_runs(&self) -> u64 {
        // Pieces of one shared file mapping merge again, like those of anonymous memory.
        max_open_runs()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, true)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, false)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        // The pages belong to the file: MADV_DONTNEED would only unmap them here. This unmaps them everywhere.
        self.fallocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            range,
        )
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        // The only count that is right for both kinds of file. `mincore` misses huge pages that nobody has
        // touched through this mapping; it and SEEK_DATA miss base pages that were allocated but not yet
        // written, and SEEK_DATA takes all of a hugetlb file for data. Pages in swap count here as well.
        let blocks = rustix::fs::fstat(&self.file)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::{exchange, mapping_count, touch};
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn discard_gives_memory_back_and_close_alone_does_not() {
        let backing = Memfd::new(8 * MIB).unwrap();
        backing.open(0..4 * MIB).unwrap();
        for page in 0..1024 {
            touch(&backing, page * 4096);
        }
        assert_eq!(backing.resident_bytes().unwrap(), 4 * MIB);
        backing.close(0..2 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 4 * MIB);
        backing.discard(0..2 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 2 * MIB);
        backing.open(0..2 * MIB).unwrap();
        assert_eq!(exchange(&backing, MIB, 1), 0);
    }

    #[test]
    fn pages_count_as_resident_before_anybody_has_touched_them() {
        let backing = Memfd::new(8 * MIB).unwrap();
        backing.allocate(0..2 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 2 * MIB);
        assert_eq!(backing.mapping.resident_bytes().unwrap(), 0, "mincore");
    }

    #[test]
    fn mappings_merge_again_whatever_the_order_of_opening_and_touching() {
        let backing = Memfd::new(64 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), 1);
        let blocks = || (0..32).step_by(2).chain((1..32).step_by(2));
        for (done, block) in (1..).zip(blocks()) {
            backing
                .open(block * 2 * MIB..(block + 1) * 2 * MIB)
                .unwrap();
            touch(&backing, block * 2 * MIB);
            if done == 16 {
                assert_eq!(mapping_count(&backing), 32);
            }
        }
        assert_eq!(mapping_count(&backing), 1);
        for block in blocks() {
            backing
                .close(block * 2 * MIB..(block + 1) * 2 * MIB)
                .unwrap();
            backing
                .discard(block * 2 * MIB..(block + 1) * 2 * MIB)
                .unwrap();
        }
        assert_eq!(mapping_count(&backing), 1);
    }

    #[test]
    fn file_cannot_be_cut_short_by_whoever_shares_it() {
        let backing = Memfd::new(4 * MIB).unwrap();
        assert!(rustix::fs::ftruncate(backing.as_fd(), 0).is_err());
    }

    #[test]
    fn ranges_outside_the_region_are_refused() {
        let backing = Memfd::new(4 * MIB).unwrap();
        for range in [0..5 * MIB, 4 * MIB..6 * MIB, u64::MAX - 1..u64::MAX] {
            assert!(backing.open(range.clone()).is_err());
            assert!(backing.discard(range).is_err());
        }
    }
}

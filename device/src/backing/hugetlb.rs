//! Shared memory in huge pages of the host's pool (hugetlb).
#![expect(
    unsafe_code,
    reason = "`Backing` promises a stable mapping, which the memfd inside has"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::fs::MemfdFlags;

use super::mapping::min_unmergeable_block_size;
use super::{Backing, Memfd};

/// Memory of an unnamed file in huge pages, which others may map by its descriptor ([`AsFd`]).
///
/// Pages are taken from the pool when a block is opened, and only then: an empty pool makes a plug fail, where
/// pages taken on first touch would kill the guest with SIGBUS.
#[derive(Debug)]
pub struct Hugetlb {
    memfd: Memfd,
    page_size: u64,
}

impl Hugetlb {
    /// An empty file of `len` bytes in pages of 2 MiB, mapped here.
    ///
    /// # Errors
    ///
    /// If `len` is no multiple of the page, or the host has no such pages, address space or file. Pages may
    /// be missing from the pool; they are wanted later.
    pub fn pages_2m(len: u64) -> io::Result<Self> {
        Self::new(len, 2 << 20, MemfdFlags::HUGE_2MB)
    }

    /// As [`pages_2m`](Self::pages_2m), in pages of 1 GiB.
    ///
    /// # Errors
    ///
    /// As [`pages_2m`](Self::pages_2m).
    pub fn pages_1g(len: u64) -> io::Result<Self> {
        Self::new(len, 1 << 30, MemfdFlags::HUGE_1GB)
    }

    fn new(len: u64, page_size: u64, flags: MemfdFlags) -> io::Result<Self> {
        let memfd = Memfd::create(len, page_size, flags | MemfdFlags::HUGETLB)?;
        Ok(Self { memfd, page_size })
    }
}

impl AsFd for Hugetlb {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

// SAFETY: the mapping is the memfd's, which keeps the promise.
unsafe impl Backing for Hugetlb {
    fn host_address(&self) -> NonNull<u8> {
        self.memfd.host_address()
    }

    fn len(&self) -> u64 {
        self.memfd.len()
    }

    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn min_block_size(&self) -> u64 {
        // The kernel never merges mappings of huge pages, so each block may end up with one of its own.
        min_unmergeable_block_size(self.len(), self.page_size)
    }

    fn default_block_size(&self) -> u64 {
        self.min_block_size()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.memfd.open(range.clone())?;
        if let Err(error) = self.memfd.allocate(range.clone()) {
            // Never after a mere close: all pages are still there then, and none is wanted of the pool.
            self.memfd.close(range.clone())?;
            self.memfd.discard(range)?;
            return Err(error);
        }
        Ok(())
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.memfd.close(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.memfd.discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        self.memfd.resident_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::mapping_count;
    use super::*;

    const MIB: u64 = 1 << 20;
    const TIB: u64 = 1 << 40;

    /// Needs no page of the pool: opening fails after the mapping was split, which is all that is looked at.
    #[test]
    fn mappings_never_merge_so_there_may_be_one_for_each_block() {
        let backing = Hugetlb::pages_2m(32 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), 1);
        for block in 0..16 {
            let range = block * 2 * MIB..(block + 1) * 2 * MIB;
            backing.memfd.open(range.clone()).unwrap();
            backing.close(range).unwrap();
        }
        assert_eq!(mapping_count(&backing), 16);
    }

    #[test]
    fn smallest_block_of_a_large_region_is_what_the_host_can_map_one_by_one() {
        let backing = Hugetlb::pages_2m(TIB).unwrap();
        let block_size = backing.min_block_size();
        assert!(block_size > backing.page_size());
        assert!(TIB / block_size <= super::super::mapping::max_mappings());
        assert_eq!(
            Hugetlb::pages_2m(1 << 30).unwrap().min_block_size(),
            2 * MIB
        );
    }

    #[test]
    fn length_must_be_whole_pages() {
        assert!(Hugetlb::pages_2m(3 * MIB).is_err());
    }
}

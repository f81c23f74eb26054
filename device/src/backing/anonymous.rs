//! Private anonymous memory, in base pages or transparent huge pages.
#![expect(
    unsafe_code,
    reason = "`Backing` promises a stable mapping, which the owned `Mapping` is"
)]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::mm::Advice;

use super::Backing;
use super::mapping::{HUGE_PAGE_SIZE, Mapping, max_open_runs};

/// Private anonymous memory of the VMM process.
#[derive(Debug)]
pub struct Anonymous {
    mapping: Mapping,
    huge: bool,
}

impl Anonymous {
    /// Reserves `len` bytes of address space, filled with base pages as the guest touches them.
    ///
    /// # Errors
    ///
    /// If the host has no such address space.
    pub fn base_pages(len: u64) -> io::Result<Self> {
        Self::with_advice(len, Advice::LinuxNoHugepage)
    }

    /// As [`base_pages`](Self::base_pages), filled with 2 MiB pages where the host has them to spare.
    ///
    /// # Errors
    ///
    /// If the host has no such address space or no transparent huge pages.
    pub fn thp(len: u64) -> io::Result<Self> {
        Self::with_advice(len, Advice::LinuxHugepage)
    }

    fn with_advice(len: u64, advice: Advice) -> io::Result<Self> {
        // Huge pages, of the host as of the hypervisor's tables, need equal offsets on both sides.
        let mapping = Mapping::reserve(len, HUGE_PAGE_SIZE)?;
        if len > 0 {
            match mapping.advise(0..len, advice) {
                // A kernel without transparent huge pages does not know the advice to avoid them either.
                Err(error) if advice == Advice::LinuxHugepage => return Err(error),
                _ => {}
            }
        }
        Ok(Self {
            mapping,
            huge: advice == Advice::LinuxHugepage,
        })
    }
}

// SAFETY: `mapping` is owned, lives as long as the backing, and is never moved or unmapped in between.
unsafe impl Backing for Anonymous {
    fn host_address(&self) -> NonNull<u8> {
        self.mapping.start()
    }

    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn page_size(&self) -> u64 {
        rustix::param::page_size() as u64
    }

    fn min_block_size(&self) -> u64 {
        match self.huge {
            // A huge page of which a part is discarded stays whole in the host until memory runs short.
            true => HUGE_PAGE_SIZE.max(self.page_size()),
            false => self.page_size(),
        }
    }

    fn default_block_size(&self) -> u64 {
        // Smaller blocks would split huge pages, in the host and in the hypervisor's tables.
        HUGE_PAGE_SIZE.max(self.page_size())
    }

    fn max_open_runs(&self) -> u64 {
        max_open_runs()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, true)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, false)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        self.mapping.resident_bytes()
    }

    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        let sizes = open.iter().cloned();
        sizes
            .map(|range| self.mapping.resident_bytes_in(range))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::{mapping_count, touch};
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn discard_gives_memory_back_and_close_alone_does_not() {
        let backing = Anonymous::base_pages(16 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 0);
        backing.open(2 * MIB..6 * MIB).unwrap();
        for page in 0..1024 {
            touch(&backing, 2 * MIB + page * 4096);
        }
        assert_eq!(backing.resident_bytes().unwrap(), 4 * MIB);
        for (ranges, resident) in [
            (&[0..4 * MIB, 4 * MIB..16 * MIB][..], 4 * MIB),
            (&[0..2 * MIB, 5 * MIB..6 * MIB], MIB),
            (&[], 0),
        ] {
            assert_eq!(backing.resident_bytes_in(ranges).unwrap(), resident);
        }
        backing.close(2 * MIB..4 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 4 * MIB);
        backing.discard(2 * MIB..4 * MIB).unwrap();
        assert_eq!(backing.resident_bytes().unwrap(), 2 * MIB);
    }

    #[test]
    fn mappings_merge_again_whatever_the_order_of_opening_and_touching() {
        let backing = Anonymous::base_pages(64 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), 1);
        for block in (0..32).step_by(2) {
            backing
                .open(block * 2 * MIB..(block + 1) * 2 * MIB)
                .unwrap();
            touch(&backing, block * 2 * MIB);
        }
        assert_eq!(mapping_count(&backing), 32);
        for block in (1..32).step_by(2) {
            backing
                .open(block * 2 * MIB..(block + 1) * 2 * MIB)
                .unwrap();
            touch(&backing, block * 2 * MIB);
        }
        assert_eq!(mapping_count(&backing), 1);
        backing.close(0..64 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), 1);
    }

    #[test]
    fn ranges_outside_the_region_are_refused() {
        let backing = Anonymous::base_pages(4 * MIB).unwrap();
        for range in [0..5 * MIB, 4 * MIB..6 * MIB, u64::MAX - 1..u64::MAX] {
            assert!(backing.open(range.clone()).is_err());
            assert!(backing.discard(range).is_err());
        }
    }

    #[test]
    fn empty_region_is_legal() {
        let backing = Anonymous::thp(0).unwrap();
        assert!(backing.is_empty());
        assert_eq!(backing.resident_bytes().unwrap(), 0);
    }
}

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
use super::mapping::Mapping;

/// The huge page of x86-64 and of arm64 and riscv64 with 4 KiB pages.
const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Private anonymous memory of the VMM process.
#[derive(Debug)]
pub struct Anonymous {
    mapping: Mapping,
    /// What the kernel allows in one process, shared with all its other mappings.
    max_mappings: u64,
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
            max_mappings: max_map_count(),
        })
    }
}

/// `vm.max_map_count`, or the kernel's default where it cannot be read.
fn max_map_count() -> u64 {
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(65_530)
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

    fn default_block_size(&self) -> u64 {
        // Smaller blocks would split huge pages, in the host and in the hypervisor's tables.
        HUGE_PAGE_SIZE.max(self.page_size())
    }

    fn max_open_runs(&self) -> u64 {
        // Each open run is a mapping, and so is each closed one between two; an eighth is for the others.
        (self.max_mappings - self.max_mappings / 8) / 2
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

    fn resident_bytes(&self, range: Range<u64>) -> io::Result<u64> {
        self.mapping.resident_bytes(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Lines of /proc/self/maps inside the backing's region.
    fn mapping_count(backing: &Anonymous) -> usize {
        let start = backing.host_address().as_ptr() as u64;
        let inside = start..start + backing.len();
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .filter(|line| {
                let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                let from = u64::from_str_radix(from, 16).unwrap().max(inside.start);
                let to = u64::from_str_radix(to, 16).unwrap().min(inside.end);
                from < to
            })
            .count()
    }

    fn touch(backing: &Anonymous, offset: u64) {
        let at = backing
            .host_address()
            .as_ptr()
            .wrapping_byte_add(offset as usize);
        // SAFETY: the tests touch only what they have opened.
        unsafe { at.write_volatile(1) };
    }

    #[test]
    fn discard_gives_memory_back_and_close_alone_does_not() {
        let backing = Anonymous::base_pages(16 * MIB).unwrap();
        assert_eq!(backing.resident_bytes(0..16 * MIB).unwrap(), 0);
        backing.open(2 * MIB..6 * MIB).unwrap();
        for page in 0..1024 {
            touch(&backing, 2 * MIB + page * 4096);
        }
        assert_eq!(backing.resident_bytes(0..16 * MIB).unwrap(), 4 * MIB);
        backing.close(2 * MIB..4 * MIB).unwrap();
        assert_eq!(backing.resident_bytes(0..16 * MIB).unwrap(), 4 * MIB);
        backing.discard(2 * MIB..4 * MIB).unwrap();
        assert_eq!(backing.resident_bytes(0..16 * MIB).unwrap(), 2 * MIB);
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
        assert_eq!(backing.resident_bytes(0..0).unwrap(), 0);
    }
}

//! A private view of a file: the memory of a restored snapshot.
#![expect(
    unsafe_code,
    reason = "`Backing` promises a stable mapping, which the owned `Mapping` is"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use rustix::mm::Advice;

use super::Backing;
use super::mapping::{HUGE_PAGE_SIZE, Mapping, min_unmergeable_block_size};

/// Memory that starts with the contents of a file, read page by page as the guest touches it. What the guest
/// writes never reaches the file.
///
/// A block shows the file until it is discarded for the first time; from then on it is anonymous memory. So a
/// VMM that restores a snapshot discards what was not plugged in it, or leaves holes there in the file.
#[derive(Debug)]
pub struct PrivateFile {
    mapping: Mapping,
}

impl PrivateFile {
    /// Maps `len` bytes of `file` from `offset`, a multiple of the page size. The descriptor is not kept.
    ///
    /// Whoever may write to the file changes memory that the guest has not written to yet; one that is cut
    /// short ends in SIGBUS.
    ///
    /// # Errors
    ///
    /// If the file is shorter, the offset no multiple of the page size, or there is no such address space.
    pub fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "snapshot file is too short");
        let end = offset.checked_add(len).ok_or_else(short)?;
        if file.metadata()?.len() < end {
            return Err(short());
        }
        let mapping = Mapping::reserve(len, HUGE_PAGE_SIZE)?;
        mapping.map_file(0..len, file.as_fd(), offset, false)?;
        Ok(Self { mapping })
    }
}

// SAFETY: `mapping` is owned, lives as long as the backing, and is never moved or unmapped in between; pieces
// of it are replaced at one stroke. That the file is left alone is the caller's part, as `new` says.
unsafe impl Backing for PrivateFile {
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
        // File and anonymous pieces do not merge, nor do anonymous ones that were touched before they met.
        min_unmergeable_block_size(self.len(), self.page_size())
    }

    fn default_block_size(&self) -> u64 {
        self.min_block_size().max(HUGE_PAGE_SIZE)
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, true)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.mapping.protect(range, false)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        // MADV_DONTNEED would bring the file's old contents back. The replacement is closed from the start,
        // so at no time can a guest that races this fault a page in; it splits at block borders only, for
        // which there is room by the choice of the block size, so it does not fail.
        self.mapping.replace(range.clone())?;
        // The new mapping knows none of the old one's advice: base pages, as the file has. The pages are gone
        // at this point, and kernels without huge pages do not know the advice either.
        if let Err(error) = self.mapping.advise(range, Advice::LinuxNoHugepage) {
            log::debug!("replaced memory may get huge pages: {error}");
        }
        Ok(())
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        let all = 0..self.len();
        self.resident_bytes_in(std::slice::from_ref(&all))
    }

    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        // What belongs to this process: written file pages and anonymous ones, present or in swap. Unwritten
        // file pages are the page cache's, shared with whoever else maps the file, and stay there when they
        // are unmapped; `mincore` counts them, mapped here or not.
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE_OR_SHARED: u64 = 1 << 61;
        const ENTRIES: u64 = 1 << 16;
        let pagemap = File::open("/proc/self/pagemap")?;
        let page_size = self.page_size();
        let base = self.host_address().as_ptr().addr() as u64 / page_size;
        let mut entries = vec![0; (ENTRIES.min(self.len().div_ceil(page_size)) * 8) as usize];
        let mut pages = 0;
        for range in open {
            self.mapping.check(range)?;
            let (first, end) = (
                base + range.start / page_size,
                base + range.end.div_ceil(page_size),
            );
            for at in (first..end).step_by(ENTRIES as usize) {
                let bytes = &mut entries[..((end - at).min(ENTRIES) * 8) as usize];
                pagemap.read_exact_at(bytes, at * 8)?;
                let own =
                    |entry: &u64| entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0;
                let (chunks, _) = bytes.as_chunks();
                let found = chunks.iter().map(|entry| u64::from_ne_bytes(*entry));
                pages += found.filter(own).count() as u64;
            }
        }
        Ok(pages * page_size)
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::{exchange, mapping_count, touch};
    use super::*;

    const MIB: u64 = 1 << 20;

    /// An unnamed file of `len` bytes, all `tag`.
    fn file_of(len: u64, tag: u8) -> File {
        use std::io::Write;
        let fd = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&vec![tag; len as usize]).unwrap();
        file
    }

    #[test]
    fn shows_the_file_until_discarded_and_zeroes_from_then_on() {
        let file = file_of(8 * MIB, 0xaa);
        let backing = PrivateFile::new(&file, 4096, 6 * MIB).unwrap();
        backing.open(0..6 * MIB).unwrap();
        for block in 0..3 {
            assert_eq!(exchange(&backing, block * 2 * MIB, 0xbb), 0xaa);
        }
        assert_eq!(backing.resident_bytes().unwrap(), 3 * 4096);
        let ranges = [0..2 * MIB, 4 * MIB + 4096..6 * MIB];
        assert_eq!(backing.resident_bytes_in(&ranges).unwrap(), 4096);
        backing.close(0..4 * MIB).unwrap();
        backing.discard(2 * MIB..4 * MIB).unwrap();
        backing.open(0..4 * MIB).unwrap();
        assert_eq!(exchange(&backing, 2 * MIB, 0xcc), 0);
        assert_eq!(exchange(&backing, 0, 0xcc), 0xbb, "closed is not discarded");
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4096).unwrap();
        assert_eq!(byte, [0xaa], "the file is as it was");
    }

    #[test]
    fn reading_costs_this_process_nothing() {
        let file = file_of(2 * MIB, 0xaa);
        let backing = PrivateFile::new(&file, 0, 2 * MIB).unwrap();
        backing.open(0..2 * MIB).unwrap();
        let at = backing.host_address();
        // SAFETY: open.
        assert_eq!(unsafe { at.read_volatile() }, 0xaa);
        assert_eq!(backing.resident_bytes().unwrap(), 0);
    }

    #[test]
    fn discarded_memory_is_closed() {
        let file = file_of(4 * MIB, 0xaa);
        let backing = PrivateFile::new(&file, 0, 4 * MIB).unwrap();
        backing.discard(0..2 * MIB).unwrap();
        let start = backing.host_address().as_ptr() as u64;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps
            .lines()
            .find(|line| {
                let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                let from = u64::from_str_radix(from, 16).unwrap();
                (from..u64::from_str_radix(to, 16).unwrap()).contains(&start)
            })
            .unwrap();
        assert!(line.contains(" ---p "), "{line}");
    }

    #[test]
    fn no_order_of_calls_makes_more_mappings_than_blocks() {
        let file = file_of(32 * MIB, 0xaa);
        let backing = PrivateFile::new(&file, 0, 32 * MIB).unwrap();
        for block in (0..16).step_by(3).chain(0..16) {
            let range = block * 2 * MIB..(block + 1) * 2 * MIB;
            backing.open(range.clone()).unwrap();
            touch(&backing, block * 2 * MIB);
            backing.close(range.clone()).unwrap();
            backing.discard(range.clone()).unwrap();
            backing.open(range).unwrap();
            touch(&backing, block * 2 * MIB);
            assert!(mapping_count(&backing) <= 16);
        }
    }

    #[test]
    fn file_that_is_too_short_is_refused() {
        let file = file_of(2 * MIB, 0);
        assert!(PrivateFile::new(&file, 0, 2 * MIB + 1).is_err());
        assert!(PrivateFile::new(&file, 4096, 2 * MIB).is_err());
        assert!(PrivateFile::new(&file, u64::MAX, 2).is_err());
    }
}

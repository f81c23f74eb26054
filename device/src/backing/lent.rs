//! Memory that another process lends, piece by piece: the guest memory of a vfio-user or vhost-user client.
#![expect(
    unsafe_code,
    reason = "`Backing` promises a stable mapping, which the owned `Mapping` is"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;

use super::Backing;
use super::mapping::{HUGE_PAGE_SIZE, Mapping, file_page_size};

/// A region whose memory is that of files somebody else has made, and may take away again. Clones are the same
/// region: one is for the device, another for whoever hears from the lender.
///
/// The lender maps the files for itself and its guest, and nothing here can close them there. So a closed range
/// stays as it is, and what makes an unplugged block hold no memory is the hole punched into its file; a guest
/// that touches it nevertheless gets zeroes and holds memory that is not plugged, until the block is plugged and
/// unplugged again. Nor is a range closed to this process: that the VMM's devices do not reach it is up to the
/// device's [`MemoryRegion`](crate::MemoryRegion).
///
/// Blocks of which a part is not lent cannot be opened, so a PLUG of them is BUSY.
#[derive(Clone, Debug)]
pub struct LentFiles(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mapping: Mapping,
    /// Ascending, disjoint.
    pieces: Mutex<Vec<Piece>>,
}

#[derive(Debug)]
struct Piece {
    /// Bytes of the region.
    range: Range<u64>,
    file: File,
    /// Where in `file` it begins.
    offset: u64,
}

impl LentFiles {
    /// A region of `len` bytes of which nothing is lent yet.
    ///
    /// # Errors
    ///
    /// If the host has no such address space.
    pub fn new(len: u64) -> io::Result<Self> {
        // Huge pages, should the lender's files have them, need equal offsets on both sides.
        let mapping = Mapping::reserve(len, HUGE_PAGE_SIZE)?;
        Ok(Self(Arc::new(Inner {
            mapping,
            pieces: Mutex::default(),
        })))
    }

    /// Bytes in a page of `file`: what is lent of it is made of whole ones.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    pub fn page_size_of(file: &File) -> io::Result<u64> {
        file_page_size(file.as_fd())
    }

    /// From now on the memory of `range`, bytes of the region, is that of `file` from `offset` on.
    ///
    /// Whoever could make the file shorter could end this process by it (SIGBUS): a lender that is not trusted
    /// that far must seal it.
    ///
    /// # Errors
    ///
    /// If the range is not whole pages of the file, is lent in part already, or lies beyond the file's end, or if the
    /// file cannot be mapped shared and writable. Nothing has changed then.
    pub fn lend(&self, range: Range<u64>, file: File, offset: u64) -> io::Result<()> {
        let mut pieces = self.pieces();
        let end = range.end.checked_sub(range.start);
        let end = end.and_then(|len| offset.checked_add(len));
        if end.is_none_or(|end| end > file.metadata().map_or(0, |metadata| metadata.len())) {
            let error = "memory lent beyond the end of its file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        if pieces.iter().any(|piece| overlap(&piece.range, &range)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mapping = &self.0.mapping;
        mapping.map_file(range.clone(), file.as_fd(), offset, true)?;
        if let Err(error) = mapping.protect(range.clone(), true) {
            mapping.replace(range)?;
            return Err(error);
        }
        let at = pieces.partition_point(|piece| piece.range.start < range.start);
        let piece = Piece {
            range,
            file,
            offset,
        };
        pieces.insert(at, piece);
        Ok(())
    }

    /// The pieces that lie in `range` are lent no longer; nothing is left of them in this process. Their contents are
    /// the lender's.
    ///
    /// Blocks of theirs stay plugged, and stay so until they are unplugged; whoever reads or writes them still finds
    /// zeroes of this process's own, and loses what it writes.
    ///
    /// # Errors
    ///
    /// If a piece lies in `range` only in part; nothing has changed then. Or if the host refuses; then some of them are
    /// still lent.
    pub fn take_back(&self, range: Range<u64>) -> io::Result<()> {
        let mut pieces = self.pieces();
        let inside =
            |piece: &Piece| range.start <= piece.range.start && piece.range.end <= range.end;
        if pieces
            .iter()
            .any(|piece| overlap(&piece.range, &range) && !inside(piece))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while let Some(index) = pieces.iter().position(inside) {
            let range = pieces[index].range.clone();
            self.0.mapping.replace(range.clone())?;
            pieces.remove(index);
            self.0.mapping.protect(range, true)?;
        }
        Ok(())
    }

    /// Whether all of the region is lent.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        is_lent(&self.pieces(), &(0..self.0.mapping.len()))
    }

    fn pieces(&self) -> MutexGuard<'_, Vec<Piece>> {
        // One step changes it.
        self.0.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Whether `pieces` leave no gap in `range`.
fn is_lent(pieces: &[Piece], range: &Range<u64>) -> bool {
    let end = pieces
        .iter()
        .fold(range.start, |end, piece| match piece.range.contains(&end) {
            true => piece.range.end,
            false => end,
        });
    end >= range.end
}

// SAFETY: `mapping` is owned, lives as long as the backing, and is never moved or unmapped in between. What lies in
// a range that is lent is shared memory, as guest memory is.
unsafe impl Backing for LentFiles {
    fn host_address(&self) -> NonNull<u8> {
        self.0.mapping.start()
    }

    fn len(&self) -> u64 {
        self.0.mapping.len()
    }

    fn page_size(&self) -> u64 {
        rustix::param::page_size() as u64
    }

    fn default_block_size(&self) -> u64 {
        HUGE_PAGE_SIZE.max(self.page_size())
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        self.0.mapping.check(&range)?;
        match is_lent(&self.pieces(), &range) {
            true => Ok(()),
            false => Err(io::Error::other("memory of the range is not lent")),
        }
    }

    /// It was never closed, whatever has been taken back meanwhile.
    fn reopen(&self, range: Range<u64>) -> io::Result<()> {
        self.0.mapping.check(&range)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        self.0.mapping.check(&range)
    }

    /// What is not lent any more is the lender's to give back.
    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.0.mapping.check(&range)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for piece in self.pieces().iter() {
            let start = range.start.max(piece.range.start);
            let end = range.end.min(piece.range.end);
            if start < end {
                let offset = piece.offset + (start - piece.range.start);
                // A signal interrupts it between two pages; what is done already is skipped the next time.
                let punch = || rustix::fs::fallocate(&piece.file, flags, offset, end - start);
                rustix::io::retry_on_intr(punch)?;
            }
        }
        Ok(())
    }

    /// What of the files is in memory, or, on disk files, in the page cache; not what was swapped out, and of files of
    /// huge pages not what only others have touched.
    fn resident_bytes(&self) -> io::Result<u64> {
        // Not under the lock: it takes a while, and a range that is taken back meanwhile is still mapped.
        let ranges: Vec<_> = self
            .pieces()
            .iter()
            .map(|piece| piece.range.clone())
            .collect();
        let sizes = ranges
            .into_iter()
            .map(|range| self.0.mapping.resident_bytes_in(range));
        sizes.sum()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::MemfdFlags;

    use super::super::mapping::tests::{exchange, mapping_count, touch};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory(len: u64) -> File {
        let fd = rustix::fs::memfd_create("lender", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    fn allocated(file: &File) -> u64 {
        let blocks = rustix::fs::fstat(file).unwrap().st_blocks;
        u64::try_from(blocks).unwrap() * 512
    }

    #[test]
    fn discard_punches_each_file_where_the_piece_lies_and_nowhere_else() {
        let backing = LentFiles::new(8 * MIB).unwrap();
        let (low, high) = (memory(16 * MIB), memory(4 * MIB));
        backing
            .lend(4 * MIB..8 * MIB, high.try_clone().unwrap(), 0)
            .unwrap();
        backing
            .lend(0..4 * MIB, low.try_clone().unwrap(), 6 * MIB)
            .unwrap();
        assert!(backing.is_whole());
        backing.open(0..8 * MIB).unwrap();
        for page in 0..2048 {
            touch(&backing, page * 4096);
        }
        assert_eq!((allocated(&low), allocated(&high)), (4 * MIB, 4 * MIB));
        assert_eq!(backing.resident_bytes().unwrap(), 8 * MIB);
        backing.close(2 * MIB..6 * MIB).unwrap();
        assert_eq!(
            backing.resident_bytes().unwrap(),
            8 * MIB,
            "closed is not discarded"
        );
        backing.discard(2 * MIB..6 * MIB).unwrap();
        assert_eq!((allocated(&low), allocated(&high)), (2 * MIB, 2 * MIB));
        assert_eq!(backing.resident_bytes().unwrap(), 4 * MIB);
        // The right halves: the first of one, the last of the other.
        assert_eq!(exchange(&backing, 2 * MIB - 1, 1), 0);
        assert_eq!(exchange(&backing, 2 * MIB - 4096, 1), 1);
        assert_eq!(exchange(&backing, 6 * MIB, 1), 1);
        let mut byte = [0];
        low.read_exact_at(&mut byte, 6 * MIB).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn what_is_not_lent_cannot_be_opened_and_can_be_closed_and_discarded() {
        let backing = LentFiles::new(8 * MIB).unwrap();
        assert!(!backing.is_whole());
        assert!(backing.open(0..2 * MIB).is_err());
        let file = memory(8 * MIB);
        backing.lend(2 * MIB..6 * MIB, file, 0).unwrap();
        for (range, ok) in [
            (2 * MIB..6 * MIB, true),
            (3 * MIB..4 * MIB, true),
            (0..4 * MIB, false),
            (4 * MIB..8 * MIB, false),
            (0..8 * MIB, false),
        ] {
            assert_eq!(backing.open(range.clone()).is_ok(), ok, "{range:?}");
        }
        backing.close(0..8 * MIB).unwrap();
        backing.discard(0..8 * MIB).unwrap();
        assert!(LentFiles::new(0).unwrap().is_whole());
    }

    /// Regression: the kernel maps whole huge pages, over what lies behind a range that has only a part of one.
    #[test]
    fn part_of_a_huge_page_cannot_be_lent() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = match rustix::fs::memfd_create("lender", flags) {
            Ok(fd) => File::from(fd),
            Err(error) => {
                let name = "part_of_a_huge_page_cannot_be_lent";
                writeln!(std::io::stderr(), "SKIPPED {name}: no hugetlb: {error}").unwrap();
                return;
            }
        };
        // Nothing touches it, so no pool is needed.
        file.set_len(4 * MIB).unwrap();
        let backing = LentFiles::new(4 * MIB).unwrap();
        let before = mapping_count(&backing);
        for (range, offset) in [
            (0..4096, 0),
            (0..2 * MIB - 4096, 0),
            (4096..2 * MIB + 4096, 0),
            (0..2 * MIB, 4096),
            (0..3 * MIB, 0),
        ] {
            let lent = backing.lend(range.clone(), file.try_clone().unwrap(), offset);
            assert!(lent.is_err(), "{range:?} {offset}");
            assert_eq!(mapping_count(&backing), before, "{range:?} {offset}");
        }
        backing.lend(0..4 * MIB, file, 0).unwrap();
        assert!(backing.is_whole());
        backing.take_back(0..4 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), before);
    }

    #[test]
    fn taking_back_leaves_no_mapping_and_no_descriptor() {
        let backing = LentFiles::new(8 * MIB).unwrap();
        let before = mapping_count(&backing);
        let file = memory(8 * MIB);
        for half in [0..4 * MIB, 4 * MIB..8 * MIB] {
            let offset = half.start;
            backing
                .lend(half, file.try_clone().unwrap(), offset)
                .unwrap();
        }
        assert!(backing.take_back(0..6 * MIB).is_err(), "half a piece");
        assert!(backing.is_whole());
        backing.take_back(0..4 * MIB).unwrap();
        assert!(backing.open(0..2 * MIB).is_err());
        backing.open(4 * MIB..8 * MIB).unwrap();
        backing.take_back(0..8 * MIB).unwrap();
        assert_eq!(mapping_count(&backing), before);
        assert_eq!(backing.resident_bytes().unwrap(), 0);
    }

    #[test]
    fn loans_that_cannot_be_are_refused_and_change_nothing() {
        let backing = LentFiles::new(8 * MIB).unwrap();
        let file = memory(8 * MIB);
        let lend = |range, offset| backing.lend(range, file.try_clone().unwrap(), offset);
        assert!(lend(0..4 * MIB, 6 * MIB).is_err(), "beyond the file");
        assert!(lend(0..4 * MIB, u64::MAX - MIB).is_err(), "wraps");
        assert!(lend(4 * MIB..12 * MIB, 0).is_err(), "beyond the region");
        #[expect(clippy::reversed_empty_ranges, reason = "nonsense is what is tested")]
        let backwards = 4 * MIB..0;
        assert!(lend(backwards, 0).is_err());
        assert!(lend(0..4 * MIB, 512).is_err(), "offset is not a page");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let read_only = File::open(path).unwrap();
        assert!(backing.lend(0..4 * MIB, read_only, 0).is_err());
        assert_eq!(mapping_count(&backing), 1);
        lend(0..4 * MIB, 0).unwrap();
        assert!(lend(2 * MIB..6 * MIB, 0).is_err(), "lent in part already");
        backing.open(0..4 * MIB).unwrap();
        assert!(backing.open(4 * MIB..6 * MIB).is_err());
    }
}

//! A reserved piece of address space and the memory-management calls on it.
#![expect(
    unsafe_code,
    reason = "mmap, mprotect, madvise and mincore take raw addresses; this module is the only caller"
)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

/// The huge page of x86-64 and of arm64 and riscv64 with 4 KiB pages.
pub(super) const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// The most mappings a region may be split into: what the kernel allows a process, less an eighth for the
/// others.
pub(super) fn max_mappings() -> u64 {
    let allowed = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(65_530);
    allowed - allowed / 8
}

/// The most open runs of a region whose mappings merge again: each is a mapping, and so is each closed run
/// between two.
pub(super) fn max_open_runs() -> u64 {
    max_mappings() / 2
}

/// The smallest block size, `page_size` or more, in which a region of `len` bytes can have one mapping for each
/// block: for mappings that do not merge again once they were split.
pub(super) fn min_unmergeable_block_size(len: u64, page_size: u64) -> u64 {
    let blocks = max_mappings().max(1);
    len.div_ceil(blocks).max(page_size).next_power_of_two()
}

/// Anonymous private address space that belongs to nobody else until it is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Where `mmap` put it, before alignment.
    reserved: *mut c_void,
    reserved_len: usize,
}

// SAFETY: the mapping is memory of the process, not of a thread, and no method keeps a reference into it.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent calls on it are serialised by the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes at a multiple of `align`, all closed.
    ///
    /// The kernel keeps the mapping in as few pieces as there are runs of equal protection only if all
    /// pieces share one `anon_vma`. They do if the mapping has one before it is first split, so one page is
    /// touched and given back while the mapping is still whole. A host that accounts strictly may refuse a
    /// writable mapping of this size; the mapping is then made closed, and neighbours may fail to merge.
    pub(super) fn reserve(len: u64, align: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(too_large)?;
        let align = usize::try_from(align).map_err(too_large)?;
        if len == 0 {
            return Ok(Self {
                start: NonNull::without_provenance(
                    std::num::NonZero::new(align).ok_or(io::ErrorKind::InvalidInput)?,
                ),
                len,
                reserved: std::ptr::null_mut(),
                reserved_len: 0,
            });
        }
        let reserved_len = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice, which touches nothing there is.
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), reserved_len, prot, flags) }
        };
        let (reserved, whole) = match map(ProtFlags::READ | ProtFlags::WRITE) {
            Ok(reserved) => (reserved, true),
            Err(_) => (map(ProtFlags::empty())?, false),
        };
        let padding = reserved.addr().wrapping_neg() & (align - 1);
        let start = reserved.wrapping_byte_add(padding).cast();
        let mapping = Self {
            start: NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?,
            len,
            reserved,
            reserved_len,
        };
        if whole {
            // SAFETY: the byte is inside the mapping just made, which is writable and known to nobody else.
            unsafe { mapping.start.write_volatile(1) };
            mapping.discard(0..len as u64)?;
            // SAFETY: the whole mapping just made, known to nobody else.
            unsafe { rustix::mm::mprotect(reserved, reserved_len, MprotectFlags::empty()) }?;
        }
        Ok(mapping)
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Makes `range` readable and writable, or neither.
    ///
    /// The kernel does one piece of the mapping after the other and leaves what it has done where it fails. A
    /// range that could not be opened is closed again; one that could not be closed may be closed in part.
    pub(super) fn protect(&self, range: Range<u64>, open: bool) -> io::Result<()> {
        let (start, len) = self.slice(range)?;
        let protect = |flags| {
            // SAFETY: `slice` has checked that the range lies inside this mapping, which nobody else owns. No
            // Rust reference points into it; volatile accesses through a region go to open blocks only.
            unsafe { rustix::mm::mprotect(start, len, flags) }
        };
        let closed = MprotectFlags::empty();
        match open {
            false => Ok(protect(closed)?),
            true => protect(MprotectFlags::READ | MprotectFlags::WRITE).map_err(|error| {
                if let Err(error) = protect(closed) {
                    log::error!("memory that could not be opened could not be closed: {error}");
                }
                error.into()
            }),
        }
    }

    /// Maps `file` from `offset` over `range`, closed. `shared` or private.
    ///
    /// # Errors
    ///
    /// If the range or the offset is not made of whole pages of the file, which may be huge ones; or what the host says.
    pub(super) fn map_file(
        &self,
        range: Range<u64>,
        file: BorrowedFd<'_>,
        offset: u64,
        shared: bool,
    ) -> io::Result<()> {
        let (start, len) = self.slice(range)?;
        if len == 0 {
            return Ok(());
        }
        // The kernel would round a range of huge pages up, over whatever lies behind it.
        let page_size = file_page_size(file)?;
        let whole = |value: u64| value.is_multiple_of(page_size);
        if ![start.addr() as u64, len as u64, offset]
            .into_iter()
            .all(whole)
        {
            let error = "not made of whole pages of the file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let sharing = match shared {
            true => MapFlags::SHARED,
            false => MapFlags::PRIVATE,
        };
        // Without NORESERVE the kernel would want the whole region at once from the pool of huge pages.
        let flags = MapFlags::FIXED | MapFlags::NORESERVE | sharing;
        // SAFETY: `slice` has checked that the range lies inside this mapping, which nobody else owns, and
        // whose contents are guest memory that Rust makes no assumptions about.
        unsafe { rustix::mm::mmap(start, len, ProtFlags::empty(), flags, file, offset) }?;
        Ok(())
    }

    /// Replaces what is mapped in `range` by fresh anonymous memory, closed.
    pub(super) fn replace(&self, range: Range<u64>) -> io::Result<()> {
        let (start, len) = self.slice(range)?;
        let flags = MapFlags::FIXED | MapFlags::NORESERVE | MapFlags::PRIVATE;
        // SAFETY: `slice` has checked that the range lies inside this mapping, which nobody else owns, and
        // whose contents are guest memory that Rust makes no assumptions about.
        unsafe { rustix::mm::mmap_anonymous(start, len, ProtFlags::empty(), flags) }?;
        Ok(())
    }

    /// Gives the pages of `range` back; the next access sees zeroes.
    pub(super) fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, Advice::LinuxDontNeed)
    }

    /// Tells the kernel how `range` will be used.
    pub(super) fn advise(&self, range: Range<u64>, advice: Advice) -> io::Result<()> {
        let (start, len) = self.slice(range)?;
        // SAFETY: `slice` has checked that the range lies inside this mapping, which nobody else owns, and
        // whose contents are guest memory that Rust makes no assumptions about.
        Ok(unsafe { rustix::mm::madvise(start, len, advice) }?)
    }

    /// Bytes that have a page behind them, by `mincore`. The truth for anonymous memory only: of a file it
    /// counts what is in the page cache, of huge pages what this process has touched.
    pub(super) fn resident_bytes(&self) -> io::Result<u64> {
        self.resident_bytes_in(0..self.len())
    }

    /// As [`resident_bytes`](Self::resident_bytes), of `range`.
    pub(super) fn resident_bytes_in(&self, range: Range<u64>) -> io::Result<u64> {
        let (start, len) = self.slice(range)?;
        // One byte of answer a page, so a large region is asked for in pieces.
        const PAGES: usize = 1 << 16;
        let page_size = rustix::param::page_size();
        let mut answer = vec![0u8; PAGES.min(len.div_ceil(page_size))];
        let mut resident = 0;
        for offset in (0..len).step_by(PAGES * page_size) {
            let piece = (len - offset).min(PAGES * page_size);
            let at = start.wrapping_byte_add(offset);
            // SAFETY: the piece lies inside this mapping and `answer` has a byte for each of its pages.
            let result = unsafe { libc::mincore(at, piece, answer.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            let pages = answer.iter().take(piece.div_ceil(page_size));
            resident += pages.filter(|byte| **byte & 1 != 0).count() as u64;
        }
        Ok(resident * page_size as u64)
    }

    /// Refuses a range that is not inside this mapping.
    pub(super) fn check(&self, range: &Range<u64>) -> io::Result<()> {
        self.slice(range.clone()).map(|_| ())
    }

    fn slice(&self, range: Range<u64>) -> io::Result<(*mut c_void, usize)> {
        let outside = io::ErrorKind::InvalidInput;
        let start = usize::try_from(range.start).map_err(|_| outside)?;
        let end = usize::try_from(range.end).map_err(|_| outside)?;
        if start > end || end > self.len {
            return Err(outside.into());
        }
        let at = self.start.as_ptr().wrapping_byte_add(start).cast();
        Ok((at, end - start))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.reserved_len > 0 {
            // SAFETY: exactly what `reserve` mapped; whoever could still reach it holds the backing alive.
            let result = unsafe { rustix::mm::munmap(self.reserved, self.reserved_len) };
            if let Err(error) = result {
                log::error!(
                    "cannot unmap {} bytes of device memory: {error}",
                    self.reserved_len
                );
            }
        }
    }
}

/// Bytes in a page of `file`: more than a page of the host's where it is on hugetlbfs.
pub(super) fn file_page_size(file: BorrowedFd<'_>) -> io::Result<u64> {
    /// Linux: `HUGETLBFS_MAGIC`.
    const HUGETLBFS: u32 = 0x9584_58f6;
    let system = rustix::fs::fstatfs(file)?;
    // Its width depends on the architecture; the number has 32 bits.
    Ok(match u32::try_from(system.f_type) == Ok(HUGETLBFS) {
        true => u64::try_from(system.f_bsize).map_err(io::Error::other)?,
        false => rustix::param::page_size() as u64,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Backing;

    /// Lines of /proc/self/maps inside the backing's region.
    pub(crate) fn mapping_count(backing: &dyn Backing) -> usize {
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

    /// Reads a byte of the backing and writes `value` in its place.
    pub(crate) fn exchange(backing: &dyn Backing, offset: u64, value: u8) -> u8 {
        let at = backing
            .host_address()
            .as_ptr()
            .wrapping_byte_add(offset as usize);
        // SAFETY: the tests touch only what they have opened.
        let old = unsafe { at.read_volatile() };
        // SAFETY: as above.
        unsafe { at.write_volatile(value) };
        old
    }

    pub(crate) fn touch(backing: &dyn Backing, offset: u64) {
        exchange(backing, offset, 1);
    }
}

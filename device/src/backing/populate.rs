//! Giving memory to a range before the guest asks for it.
#![expect(
    unsafe_code,
    reason = "madvise takes raw addresses, and kernels that do not know the advice need a touch of each page"
)]

use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::Advice;

use super::Backing;
use super::pieces::in_pieces;

/// Makes all of an open range resident, its contents unchanged, on up to `threads` threads.
///
/// On an error some of it is.
pub(crate) fn populate(
    backing: &dyn Backing,
    range: Range<u64>,
    threads: NonZero<usize>,
) -> io::Result<()> {
    in_pieces(backing, range, threads, populate_piece)
}

fn populate_piece(backing: &dyn Backing, range: Range<u64>) -> io::Result<()> {
    let start = backing
        .host_address()
        .as_ptr()
        .wrapping_byte_add(range.start as usize);
    let len = (range.end - range.start) as usize;
    // SAFETY: the range lies in the backing's mapping and is open; the advice changes no contents.
    match unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxPopulateWrite) } {
        // Before Linux 5.14.
        Err(rustix::io::Errno::INVAL) => {
            touch(start, len);
            Ok(())
        }
        result => Ok(result?),
    }
}

/// Writes to each page what is there. Atomically, because the slot may be the guest's already.
fn touch(start: *mut u8, len: usize) {
    for offset in (0..len).step_by(rustix::param::page_size()) {
        let at = start.wrapping_byte_add(offset);
        // SAFETY: the caller's range is open memory of a backing, shared with the guest at the most.
        let byte = unsafe { AtomicU8::from_ptr(at) };
        // Not an addition of zero, which the compiler makes nothing of. If it fails, the guest was faster.
        let value = byte.load(Ordering::Relaxed);
        let _ = byte.compare_exchange(value, value, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::exchange;
    use super::super::{Anonymous, PrivateFile};
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn all_of_a_range_becomes_resident_and_keeps_its_contents() {
        for threads in [1, 2, 5] {
            let backing = Anonymous::base_pages(160 * MIB).unwrap();
            backing.open(2 * MIB..150 * MIB).unwrap();
            exchange(&backing, 40 * MIB, 7);
            let threads = NonZero::new(threads).unwrap();
            populate(&backing, 2 * MIB..150 * MIB, threads).unwrap();
            assert_eq!(backing.resident_bytes().unwrap(), 148 * MIB);
            assert_eq!(exchange(&backing, 40 * MIB, 7), 7);
        }
    }

    #[test]
    fn touching_does_the_same_where_the_kernel_does_not_know_the_advice() {
        let backing = Anonymous::base_pages(4 * MIB).unwrap();
        backing.open(0..2 * MIB).unwrap();
        exchange(&backing, 4096, 7);
        touch(backing.host_address().as_ptr(), 2 << 20);
        assert_eq!(backing.resident_bytes().unwrap(), 2 * MIB);
        assert_eq!(exchange(&backing, 4096, 7), 7);
    }

    /// A page behind the end of its file cannot be had, whichever thread comes to it.
    #[test]
    fn error_of_any_thread_is_the_error_of_the_whole() {
        let fd = rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(128 * MIB).unwrap();
        let backing = PrivateFile::new(&file, 0, 128 * MIB).unwrap();
        backing.open(0..128 * MIB).unwrap();
        file.set_len(126 * MIB).unwrap();
        for threads in [1, 2, 4] {
            let threads = NonZero::new(threads).unwrap();
            assert!(populate(&backing, 0..128 * MIB, threads).is_err());
        }
    }
}

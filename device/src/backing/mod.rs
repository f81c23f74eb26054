//! Host memory of the device-managed region.

mod anonymous;
mod hugetlb;
mod lent;
mod mapping;
mod memfd;
mod pieces;
mod populate;
mod private_file;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

pub use anonymous::Anonymous;
pub use hugetlb::Hugetlb;
pub use lent::LentFiles;
pub use memfd::Memfd;
pub(crate) use pieces::discard;
pub(crate) use populate::populate;
pub use private_file::PrivateFile;

/// The host memory behind the device-managed region, and how it is opened, closed and given back.
///
/// Ranges are byte offsets into the region. The device calls with whole blocks only, one call for each
/// contiguous run or, to take everything back, one for all of them, and never two calls at a time.
///
/// A range is *open* if the VMM and, through memory slots, the guest can access it, else *closed*. All of a
/// new backing is closed and holds no memory.
///
/// # Safety
///
/// `host_address() .. + len()` must stay one mapping of this process, with nothing else in it, for as long
/// as the backing lives; reads and writes of open ranges must be sound as accesses to guest memory are.
#[expect(
    unsafe_code,
    reason = "the device and its regions rely on the mapping, see Safety"
)]
pub unsafe trait Backing: Debug + Send + Sync {
    /// Where the region starts in the VMM's address space.
    fn host_address(&self) -> NonNull<u8>;

    /// Bytes in the region.
    fn len(&self) -> u64;

    /// Whether there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The smallest number of bytes that [`discard`](Self::discard) can give back: the smallest block size.
    fn page_size(&self) -> u64;

    /// The smallest block size a region of this length works with, a page or more.
    ///
    /// More where smaller blocks could not be closed one by one: a mapping that never merges again, once it is
    /// split, may come to have one piece for each block, and the host limits the pieces.
    fn min_block_size(&self) -> u64 {
        self.page_size()
    }

    /// The block size to use where nobody asked for one. At least [`min_block_size`](Self::min_block_size).
    fn default_block_size(&self) -> u64;

    /// The most separate open runs this backing can hold, where the host sets such a limit.
    ///
    /// The device answers BUSY before it is exceeded, so that closing a range never fails half-way.
    fn max_open_runs(&self) -> u64 {
        u64::MAX
    }

    /// Opens a closed range. Its contents are undefined, or, if it was only closed and not discarded, what
    /// they were.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the range is then closed still.
    fn open(&self, range: Range<u64>) -> io::Result<()>;

    /// Opens again what was [closed](Self::close) and not discarded, because it cannot go after all. Should not fail: a
    /// device whose blocks are plugged and closed is of no use any more.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the range is then closed still.
    fn reopen(&self, range: Range<u64>) -> io::Result<()> {
        self.open(range)
    }

    /// Closes a range. Parts of it may be closed already. The contents stay until
    /// [`discard`](Self::discard), so that [`open`](Self::open) can undo this.
    ///
    /// # Errors
    ///
    /// Whatever the host says. Part of the range may be closed then; the device opens again what it needs.
    fn close(&self, range: Range<u64>) -> io::Result<()>;

    /// Gives the memory of a closed range back to the host. Parts of it may have none.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the contents are then still there.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Bytes of host memory the region occupies now, as the host counts them.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    fn resident_bytes(&self) -> io::Result<u64>;

    /// As [`resident_bytes`](Self::resident_bytes), for who knows that only `open` can have any: ranges in order, none
    /// of which overlap. A backing whose host is asked page by page need not ask about the others.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        let _ = open;
        self.resident_bytes()
    }
}

// SAFETY: the mapping is that of the backing inside, which keeps the promise; moving the box does not move it.
#[expect(unsafe_code, reason = "passes on the promise of the backing inside")]
unsafe impl<B: Backing + ?Sized> Backing for Box<B> {
    fn host_address(&self) -> NonNull<u8> {
        (**self).host_address()
    }

    fn len(&self) -> u64 {
        (**self).len()
    }

    fn page_size(&self) -> u64 {
        (**self).page_size()
    }

    fn min_block_size(&self) -> u64 {
        (**self).min_block_size()
    }

    fn default_block_size(&self) -> u64 {
        (**self).default_block_size()
    }

    fn max_open_runs(&self) -> u64 {
        (**self).max_open_runs()
    }

    fn open(&self, range: Range<u64>) -> io::Result<()> {
        (**self).open(range)
    }

    fn reopen(&self, range: Range<u64>) -> io::Result<()> {
        (**self).reopen(range)
    }

    fn close(&self, range: Range<u64>) -> io::Result<()> {
        (**self).close(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        (**self).discard(range)
    }

    fn resident_bytes(&self) -> io::Result<u64> {
        (**self).resident_bytes()
    }

    fn resident_bytes_in(&self, open: &[Range<u64>]) -> io::Result<u64> {
        (**self).resident_bytes_in(open)
    }
}

//! Host memory of the device-managed region.

mod anonymous;
mod mapping;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

pub use anonymous::Anonymous;

/// The host memory behind the device-managed region, and how it is opened, closed and given back.
///
/// Ranges are byte offsets into the region. The device calls with whole blocks only, one call for each
/// contiguous run, and never two calls at a time.
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

    /// The block size to use where nobody asked for one. At least [`page_size`](Self::page_size).
    fn default_block_size(&self) -> u64;

    /// The most separate open runs this backing can hold, where the host sets such a limit.
    ///
    /// The device answers BUSY before it is exceeded, so that closing a range never fails half-way.
    fn max_open_runs(&self) -> u64 {
        u64::MAX
    }

    /// Opens a closed range. Its contents are undefined.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the range is then closed still.
    fn open(&self, range: Range<u64>) -> io::Result<()>;

    /// Closes a range. The contents stay until [`discard`](Self::discard), so that [`open`](Self::open) can
    /// undo this.
    ///
    /// # Errors
    ///
    /// Whatever the host says; what was open in the range is then open still.
    fn close(&self, range: Range<u64>) -> io::Result<()>;

    /// Gives the memory of a closed range back to the host.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the contents are then still there.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Bytes of host memory the range occupies now.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    fn resident_bytes(&self, range: Range<u64>) -> io::Result<u64>;
}

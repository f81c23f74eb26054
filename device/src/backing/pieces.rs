//! One call for a large range, on several threads.

use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::thread;

use super::Backing;

/// What one thread takes at least: filling it or giving it back takes milliseconds, starting a thread a tenth
/// of one.
const MIN_PIECE: u64 = 32 << 20;

/// Calls `each` for pieces of `range`, which is made of blocks, on up to `threads` threads. The first error of all.
pub(super) fn in_pieces(
    backing: &dyn Backing,
    range: Range<u64>,
    threads: NonZero<usize>,
    each: impl Fn(&dyn Backing, Range<u64>) -> io::Result<()> + Copy + Send,
) -> io::Result<()> {
    let len = range.end - range.start;
    let piece = len
        .div_ceil(threads.get() as u64)
        .next_multiple_of(MIN_PIECE.max(backing.min_block_size()));
    let first = range.start..range.end.min(range.start.saturating_add(piece));
    thread::scope(|scope| {
        let mut workers = Vec::new();
        let mut rest = first.end..range.end;
        while !rest.is_empty() {
            let part = rest.start..rest.end.min(rest.start.saturating_add(piece));
            rest.start = part.end;
            let worker = thread::Builder::new().name("virtio-mem-piece".into());
            workers.push(worker.spawn_scoped(scope, move || each(backing, part))?);
        }
        let mut result = each(backing, first);
        for worker in workers {
            let died = |_| Err(io::Error::other("a thread of the device panicked"));
            result = result.and(worker.join().unwrap_or_else(died));
        }
        result
    })
}

/// Gives the memory of a closed range back, on up to `threads` threads.
///
/// An error means that all contents are still there, as [`Backing::discard`] promises of one call. So the
/// first piece that can go goes alone, and once it is gone there is no way back: what fails then is tried again in one
/// call, and what that leaves behind stays with the host, out of reach of everybody, until its blocks are
/// plugged and unplugged again. No kernel is known to refuse the rest of what it has begun to take.
pub(crate) fn discard(
    backing: &dyn Backing,
    range: Range<u64>,
    threads: NonZero<usize>,
) -> io::Result<()> {
    let begun = range
        .end
        .min(range.start.saturating_add(backing.min_block_size()));
    backing.discard(range.start..begun)?;
    let rest = begun..range.end;
    if rest.is_empty() {
        return Ok(());
    }
    let call = |backing: &dyn Backing, piece| backing.discard(piece);
    if let Err(error) = in_pieces(backing, rest.clone(), threads, call) {
        log::warn!("giving memory back in pieces: {error}; trying again in one");
        if let Err(error) = backing.discard(rest) {
            log::error!("unplugged memory stays with the host: {error}");
        }
    }
    Ok(())
}

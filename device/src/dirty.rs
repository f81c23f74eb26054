//! Dirty bitmaps of the regions, kept right when blocks come and go.
//!
//! A VMM that streams guest memory sends what is dirty, again and again. Discarding a block changes all of
//! it, and plugging a block makes memory whose contents the other side does not have. So either marks the
//! whole block dirty, and a stream knows what to do with each dirty page by one more look: plugged, its
//! contents are sent; unplugged, the other side discards it.

use std::ops::Range;
use std::sync::{Mutex, PoisonError, Weak};

use vm_memory::bitmap::Bitmap;

/// A dirty bitmap, whatever its type.
pub(crate) trait MarkDirty: Send + Sync {
    fn mark(&self, bytes: Range<usize>);
}

impl<B: Bitmap + Send + Sync> MarkDirty for B {
    fn mark(&self, bytes: Range<usize>) {
        self.mark_dirty(bytes.start, bytes.len());
    }
}

/// The dirty bitmaps of all regions made of one device.
#[derive(Default)]
pub(crate) struct DirtyBitmaps(Mutex<Vec<Weak<dyn MarkDirty>>>);

impl DirtyBitmaps {
    pub(crate) fn add(&self, bitmap: Weak<dyn MarkDirty>) {
        let mut bitmaps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bitmaps.retain(|bitmap| bitmap.strong_count() > 0);
        bitmaps.push(bitmap);
    }

    /// Marks `bytes`, offsets into the region, in all of them.
    pub(crate) fn mark(&self, bytes: Range<u64>) {
        // The region is mapped, so its offsets fit.
        let fit = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = fit(bytes.start)..fit(bytes.end);
        let bitmaps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for bitmap in bitmaps.iter().filter_map(Weak::upgrade) {
            bitmap.mark(bytes.clone());
        }
    }
}

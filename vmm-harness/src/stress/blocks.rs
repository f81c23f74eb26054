//! What comes and goes between two looks at a guest.

use std::io;
use std::sync::Mutex;

use virtio_mem::{MappingLimits, PlugObserver, Run};

use super::lock;

/// Counts the blocks that come and go, and knows how much there was at the most.
#[derive(Debug)]
pub(super) struct Blocks {
    block_size: u64,
    moved: Mutex<Moved>,
}

/// In bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Moved {
    plugged: u64,
    unplugged: u64,
    /// Most at a time since [`Blocks::most`] was told.
    most: u64,
}

impl Moved {
    fn now(&self) -> u64 {
        self.plugged - self.unplugged
    }
}

impl Blocks {
    pub(super) fn new(block_size: u64) -> Self {
        Self {
            block_size,
            moved: Mutex::default(),
        }
    }

    /// Blocks plugged and blocks unplugged so far.
    pub(super) fn counts(&self) -> (u64, u64) {
        let moved = *lock(&self.moved);
        (
            moved.plugged / self.block_size,
            moved.unplugged / self.block_size,
        )
    }

    /// Bytes plugged now, and bytes plugged so far, whatever became of them.
    pub(super) fn plugged_bytes(&self) -> (u64, u64) {
        let moved = lock(&self.moved);
        (moved.now(), moved.plugged)
    }

    /// Most bytes plugged at a time since the last call.
    pub(super) fn take_most(&self) -> u64 {
        let mut moved = lock(&self.moved);
        let most = moved.most;
        moved.most = moved.now();
        most
    }
}

impl PlugObserver for Blocks {
    fn limits(&self) -> MappingLimits {
        MappingLimits::NONE
    }

    fn plugged(&self, run: &Run) -> io::Result<()> {
        let mut moved = lock(&self.moved);
        moved.plugged += run.len;
        moved.most = moved.most.max(moved.now());
        Ok(())
    }

    fn unplugging(&self, run: &Run) -> io::Result<()> {
        lock(&self.moved).unplugged += run.len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_of_the_time_since_it_was_asked_for() {
        let blocks = Blocks::new(10);
        let run = |len| Run {
            offset: 0,
            guest_address: 0,
            host_address: 0,
            len,
        };
        blocks.plugged(&run(50)).unwrap();
        blocks.unplugging(&run(30)).unwrap();
        assert_eq!((blocks.counts(), blocks.take_most()), ((5, 3), 50));
        blocks.unplugging(&run(10)).unwrap();
        // It was there at the beginning.
        assert_eq!(blocks.take_most(), 20);
        assert_eq!(blocks.take_most(), 10);
    }
}

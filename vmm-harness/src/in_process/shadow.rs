//! Which memory of the region the guest may touch, kept beside the device and asked before each access.
//!
//! ```text
//!            PLUG: ACK                    UNPLUG is sent
//!  unplugged ---------> plugged, may be touched ---------> leaving ---> unplugged
//!                                ^                            |  ACK
//!                                +----------------------------+
//!                                         NACK, BUSY, ERROR
//! ```
//!
//! Source: virtio 1.4, 5.15.6: rules G-06 … G-11.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_mem::{MappingLimits, PlugObserver, Run};
use virtio_mem_wire::{BlockMap, BlockRange, BlockState, Geometry};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It only reads.
    Read,
    /// It writes, or may.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "written",
        })
    }
}

/// An access to memory that is not the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{len:#x} bytes at {address:#x} are {access} by {who}, not all of them plugged")]
pub struct Violation {
    /// Who does it.
    pub who: &'static str,
    /// What it does.
    pub access: Access,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Which memory of the region may be touched: what the device has plugged, and the driver has not asked it to unplug.
///
/// The device tells it what it plugs and unplugs ([`PlugObserver`]); that the driver has asked is told by whoever sees
/// the queue ([`leave`](Self::leave)).
#[derive(Debug)]
pub struct Shadow {
    geometry: Geometry,
    /// Without `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` unplugged memory may be read (G-07).
    reads_allowed: bool,
    blocks: Mutex<Blocks>,
}

#[derive(Debug)]
struct Blocks {
    plugged: BlockMap,
    leaving: BlockMap,
}

impl Shadow {
    /// Nothing is plugged. `unplugged_inaccessible` is the feature the driver sees.
    #[must_use]
    pub fn new(geometry: Geometry, unplugged_inaccessible: bool) -> Self {
        let none = BlockMap::new(geometry.block_count());
        Self {
            geometry,
            reads_allowed: !unplugged_inaccessible,
            blocks: Mutex::new(Blocks {
                plugged: none.clone(),
                leaving: none,
            }),
        }
    }

    /// The driver has sent a request to unplug `range`: it does not touch that any more (G-11).
    pub fn leave(&self, range: BlockRange) {
        self.blocks().leaving.insert(range);
    }

    /// All requests were answered, or the device was reset and answers none: what is plugged now stays.
    pub fn settle(&self) {
        self.blocks().leaving.clear();
    }

    /// Whether the `len` bytes at `address` may be accessed now. What does not lie in the region may.
    ///
    /// # Errors
    ///
    /// The access, if it may not be.
    pub fn check(
        &self,
        who: &'static str,
        access: Access,
        address: u64,
        len: u64,
    ) -> Result<(), Violation> {
        let region_end = self.geometry.addr() + self.geometry.region_size();
        let start = address.max(self.geometry.addr());
        let end = address.saturating_add(len).min(region_end);
        let inside = end.saturating_sub(start);
        let Some(range) = self.geometry.blocks_touching(start, inside) else {
            return Ok(());
        };
        let blocks = self.blocks();
        let plugged = blocks.plugged.state(range) == BlockState::Plugged;
        let stays = blocks.leaving.count_in(range) == 0;
        if (plugged && stays) || (access == Access::Read && self.reads_allowed) {
            return Ok(());
        }
        Err(Violation {
            who,
            access,
            address,
            len,
        })
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        // Each change is one call.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, run: &Run) -> BlockRange {
        let block_size = self.geometry.block_size();
        BlockRange {
            first: run.offset / block_size,
            count: run.len / block_size,
        }
    }
}

impl PlugObserver for Shadow {
    fn limits(&self) -> MappingLimits {
        MappingLimits::NONE
    }

    fn plugged(&self, run: &Run) -> io::Result<()> {
        self.blocks().plugged.insert(self.range(run));
        Ok(())
    }

    fn unplugging(&self, run: &Run) -> io::Result<()> {
        self.blocks().plugged.remove(self.range(run));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const START: u64 = 4 << 30;

    /// Blocks 2 and 3 of 16, 1 MiB each, are plugged.
    fn shadow(unplugged_inaccessible: bool) -> Shadow {
        let geometry = Geometry::new(START, 16 * MIB, MIB).unwrap();
        let shadow = Shadow::new(geometry, unplugged_inaccessible);
        shadow.plugged(&run(2, 2)).unwrap();
        shadow
    }

    fn run(first: u64, count: u64) -> Run {
        Run {
            offset: first * MIB,
            guest_address: START + first * MIB,
            host_address: 0,
            len: count * MIB,
        }
    }

    fn write(shadow: &Shadow, offset: u64, len: u64) -> bool {
        let written = shadow.check("test", Access::Write, START + offset, len);
        written.is_ok()
    }

    #[test]
    fn only_plugged_bytes_may_be_written() {
        let shadow = shadow(true);
        assert!(write(&shadow, 2 * MIB, 2 * MIB));
        for (offset, len) in [
            (2 * MIB - 1, 1),
            (2 * MIB - 1, 2),
            (4 * MIB - 1, 2),
            (0, 16 * MIB),
        ] {
            assert!(!write(&shadow, offset, len), "{offset:#x} {len:#x}");
        }
        assert_eq!(
            shadow.check("ring", Access::Read, START + 8, 16),
            Err(Violation {
                who: "ring",
                access: Access::Read,
                address: START + 8,
                len: 16,
            })
        );
    }

    #[test]
    fn memory_beside_the_region_is_not_the_devices() {
        let shadow = shadow(true);
        for (address, len) in [
            (0, 4096),
            (START - 8, 8),
            (START + 16 * MIB, 8),
            (u64::MAX, 1),
        ] {
            assert_eq!(shadow.check("test", Access::Write, address, len), Ok(()));
        }
        let across = shadow.check("test", Access::Write, START - 8, 9);
        assert!(across.is_err());
        let beyond = shadow.check("test", Access::Write, START + 16 * MIB - 1, u64::MAX);
        assert!(beyond.is_err());
    }

    #[test]
    fn g_11_memory_that_was_asked_to_be_unplugged_is_given_up_before_it_is() {
        let shadow = shadow(true);
        shadow.leave(BlockRange { first: 3, count: 1 });
        assert!(write(&shadow, 2 * MIB, MIB));
        assert!(!write(&shadow, 3 * MIB, 1));
        // Refused.
        shadow.settle();
        assert!(write(&shadow, 3 * MIB, 1));
        shadow.leave(BlockRange { first: 3, count: 1 });
        shadow.unplugging(&run(3, 1)).unwrap();
        shadow.settle();
        assert!(!write(&shadow, 3 * MIB, 1));
    }

    #[test]
    fn g_07_unplugged_memory_may_be_read_unless_it_is_inaccessible() {
        for inaccessible in [false, true] {
            let shadow = shadow(inaccessible);
            let read = shadow.check("test", Access::Read, START, 8);
            assert_eq!(read.is_err(), inaccessible);
            assert!(!write(&shadow, 0, 8));
        }
    }
}

//! The configuration space a driver reads, without ever waiting for a request.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use virtio_mem_wire::{Config, Geometry, MutableConfig};

/// The configuration space (virtio 1.4, 5.15.4) with its generation (2.5.1).
///
/// Two copies of the changing fields, and the generation says by its lowest bit which one holds. A writer
/// fills the other copy and then publishes it by raising the generation, so there is no moment at which a
/// driver that compares generations could put old and new halves together (D-03, V-07, M-08), and a vCPU
/// reads without a lock while a request runs.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    geometry: Geometry,
    node_id: u16,
    copies: [Copy; 2],
    generation: AtomicU32,
}

#[derive(Debug, Default)]
struct Copy {
    usable_region_size: AtomicU64,
    plugged_size: AtomicU64,
    requested_size: AtomicU64,
}

impl Copy {
    fn load(&self) -> MutableConfig {
        MutableConfig {
            usable_region_size: self.usable_region_size.load(Ordering::Relaxed),
            plugged_size: self.plugged_size.load(Ordering::Relaxed),
            requested_size: self.requested_size.load(Ordering::Relaxed),
        }
    }
}

impl ConfigSpace {
    pub(crate) fn new(geometry: Geometry, node_id: u16) -> Self {
        Self {
            geometry,
            node_id,
            copies: Default::default(),
            generation: AtomicU32::new(0),
        }
    }

    /// Makes `new` what drivers read. One caller at a time; a value that is there already changes nothing.
    pub(crate) fn publish(&self, new: MutableConfig) {
        let generation = self.generation.load(Ordering::Relaxed);
        if self.copy(generation).load() == new {
            return;
        }
        let next = generation.wrapping_add(1);
        // A reader that is two generations late and sees part of this must see the new generation, too.
        fence(Ordering::Release);
        let copy = self.copy(next);
        copy.usable_region_size
            .store(new.usable_region_size, Ordering::Relaxed);
        copy.plugged_size.store(new.plugged_size, Ordering::Relaxed);
        copy.requested_size
            .store(new.requested_size, Ordering::Relaxed);
        self.generation.store(next, Ordering::Release);
    }

    pub(crate) fn node_id(&self) -> u16 {
        self.node_id
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The three sizes as they were at one moment.
    pub(crate) fn load(&self) -> MutableConfig {
        loop {
            let generation = self.generation();
            let config = self.copy(generation).load();
            fence(Ordering::Acquire);
            // Not the same any more: what was read may be a mixture of two publications.
            if self.generation.load(Ordering::Relaxed) == generation {
                return config;
            }
        }
    }

    /// Fills `data` from `offset` of the configuration space; zero beyond its end.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = Config {
            geometry: self.geometry,
            node_id: self.node_id,
            mutable: self.load(),
        }
        .emit();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut rest = bytes.iter().skip(from);
        data.fill_with(|| rest.next().copied().unwrap_or(0));
    }

    fn copy(&self, generation: u32) -> &Copy {
        &self.copies[usize::from(generation & 1 == 1)]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use virtio_mem_wire::Field;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Geometry::new(4 << 30, 4 << 30, 2 * MIB).unwrap(), 7)
    }

    #[test]
    fn reads_are_cut_at_the_end_and_never_panic() {
        let space = space();
        let mut data = [0xaa; 8];
        space.read(52, &mut data);
        assert_eq!(data, [0; 8]);
        space.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
        let mut data = [0xaa; 4];
        space.read(8, &mut data);
        assert_eq!(data, [7, 0, 0, 0]);
    }

    #[test]
    fn generation_changes_with_the_values_only() {
        let space = space();
        let config = MutableConfig {
            requested_size: 2 * MIB,
            usable_region_size: 4 * MIB,
            plugged_size: 0,
        };
        space.publish(config);
        space.publish(config);
        assert_eq!(space.generation(), 1);
        space.publish(MutableConfig {
            plugged_size: 2 * MIB,
            ..config
        });
        assert_eq!(space.generation(), 2);
    }

    /// A driver that reads a 64-bit field as two halves inside a generation loop never sees a value that was
    /// not published, however the halves fall.
    #[test]
    fn generation_loop_of_a_driver_never_sees_a_torn_value() {
        let space = space();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..200_000u64 {
                    // Both halves of every field carry the same number.
                    let value = i << 32 | i;
                    space.publish(MutableConfig {
                        usable_region_size: value,
                        plugged_size: value,
                        requested_size: value,
                    });
                }
                done.store(true, Ordering::Release);
            });
            let half = |offset: usize| {
                let mut data = [0; 4];
                space.read(offset as u64, &mut data);
                u32::from_le_bytes(data)
            };
            let mut seen = 0u64;
            while !done.load(Ordering::Acquire) || seen == 0 {
                let before = space.generation();
                let low = half(Field::RequestedSize.offset());
                let high = half(Field::RequestedSize.offset() + 4);
                let plugged = half(Field::PluggedSize.offset());
                if space.generation() == before {
                    assert_eq!(low, high);
                    assert_eq!(low, plugged);
                    seen += 1;
                }
            }
            assert!(seen > 0);
        });
    }
}

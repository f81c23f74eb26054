//! The common configuration structure (virtio 1.4, 4.1.4.3).
//!
//! Each field is accessed in its own width, 64-bit fields also as two words.

use vm_memory::GuestAddressSpace;

use super::PciTransport;
use super::interrupt::{NO_VECTOR, VECTOR_COUNT};
use crate::transport::core::{QueueSetup, half, set_half};

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
/// Read-only and 0, like everything from `queue_notif_config_data` at 0x38 on: one queue, and no feature that
/// would make these fields mean something.
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const QUEUE_COUNT: u64 = 1;

/// The address of a part of the queue at `offset`, and the word of it that `width` bytes there are; `None` for
/// both.
fn ring(offset: u64, width: usize) -> Option<(Ring, Option<u32>)> {
    let word = match (offset % 8, width) {
        (0, 8) => None,
        (0, 4) => Some(0),
        (4, 4) => Some(1),
        _ => return None,
    };
    let ring: Ring = match offset & !7 {
        QUEUE_DESC => |queue| &mut queue.descriptors,
        QUEUE_DRIVER => |queue| &mut queue.available,
        QUEUE_DEVICE => |queue| &mut queue.used,
        _ => return None,
    };
    Some((ring, word))
}

type Ring = fn(&mut QueueSetup) -> &mut u64;

impl<M> PciTransport<M>
where
    M: GuestAddressSpace + Clone + Send + 'static,
{
    /// The field of `width` bytes at `offset`, if there is one.
    pub(super) fn read_common(&self, offset: u64, width: usize) -> Option<u64> {
        let core = &self.core;
        let value = match (offset, width) {
            (DEVICE_FEATURE_SELECT, 4) => core.device_feature_select().into(),
            (DEVICE_FEATURE, 4) => core.device_features().into(),
            (DRIVER_FEATURE_SELECT, 4) => core.driver_feature_select().into(),
            (DRIVER_FEATURE, 4) => core.driver_features().into(),
            (CONFIG_MSIX_VECTOR, 2) => self.interrupt().config_vector().into(),
            (NUM_QUEUES, 2) => QUEUE_COUNT,
            (DEVICE_STATUS, 1) => core.status().into(),
            (CONFIG_GENERATION, 1) => self.generation().into(),
            (QUEUE_SELECT, 2) => core.queue_select().into(),
            // 0 for a queue that is not there (4.1.4.3.1), as are its other fields but the vector.
            (QUEUE_SIZE, 2) => core.queue().map_or(0, |queue| queue.size.into()),
            (QUEUE_MSIX_VECTOR, 2) => match core.queue() {
                Some(_) => self.interrupt().queue_vector().into(),
                None => NO_VECTOR.into(),
            },
            (QUEUE_ENABLE, 2) => core.queue().map_or(0, |queue| queue.is_ready().into()),
            (QUEUE_NOTIFY_OFF, 2) => 0,
            _ => {
                let (ring, word) = ring(offset, width)?;
                let address = core.queue().map_or(0, |mut queue| *ring(&mut queue));
                word.map_or(address, |word| half(address, word).into())
            }
        };
        Some(value)
    }

    /// Writes the field of `width` bytes at `offset`, if there is one that the driver may write.
    pub(super) fn write_common(&self, offset: u64, width: usize, value: u64) {
        let core = &self.core;
        // No more than `width` bytes are set, so that nothing is cut off where the field is as wide.
        let (half_word, word) = (value as u16, value as u32);
        match (offset, width) {
            (DEVICE_FEATURE_SELECT, 4) => core.select_device_features(word),
            (DRIVER_FEATURE_SELECT, 4) => core.select_driver_features(word),
            (DRIVER_FEATURE, 4) => core.set_driver_features(word),
            (CONFIG_MSIX_VECTOR, 2) => self.interrupt().set_config_vector(half_word),
            (DEVICE_STATUS, 1) => core.write_status(word),
            (QUEUE_SELECT, 2) => core.select_queue(word),
            (QUEUE_SIZE, 2) => core.set_up_queue(|queue| queue.size = word),
            (QUEUE_MSIX_VECTOR, 2) if core.queue().is_some() => {
                self.interrupt().set_queue_vector(half_word);
            }
            // A driver never writes 0 here (4.1.4.3.2).
            (QUEUE_ENABLE, 2) if word == 1 => core.enable_queue(),
            _ => {
                if let Some((ring, part)) = ring(offset, width) {
                    core.set_up_queue(|queue| match part {
                        None => *ring(queue) = value,
                        Some(part) => set_half(ring(queue), part, word),
                    });
                }
            }
        }
    }
}

const _: () = assert!(VECTOR_COUNT < NO_VECTOR);

//! One size for several devices, such as one for each NUMA node.

use crate::handle::{Handle, ResizeError};
use crate::resize::Resize;
use crate::wire::Geometry;

/// How a total is distributed over devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// One for each device, in their order.
    pub shares: Vec<Share>,
    /// Bytes for which no device had room: they are less than a block of every device that is not full.
    pub rest: u64,
}

/// What one device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Bytes, a multiple of the device's block size, no more than its region.
    pub size: u64,
    /// Why it is not the same as an equal part of the total, if it is not.
    pub deviation: Option<Deviation>,
}

/// Why a device does not get an equal part of the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deviation {
    /// The region is smaller than the part.
    RegionLimit,
    /// The part is not a multiple of the block size, and has been rounded down or up.
    BlockSize,
    /// It takes what did not fit elsewhere.
    Overflow,
}

/// Distributes `total` bytes evenly, as far as regions and block sizes let it.
///
/// What one device cannot take the others get. Apply the result with [`Split::resize`].
#[must_use]
pub fn split(total: u64, devices: &[Handle]) -> Split {
    let geometries: Vec<_> = devices.iter().map(Handle::geometry).collect();
    Split::new(total, &geometries)
}

impl Split {
    /// As [`split`], from the geometries alone.
    #[must_use]
    pub fn new(total: u64, devices: &[Geometry]) -> Self {
        let mut sizes = vec![0; devices.len()];
        let mut rest = total;
        loop {
            let room =
                |(size, device): (&u64, &Geometry)| device.region_size().saturating_sub(*size);
            let open = sizes.iter().zip(devices).map(room).filter(|room| *room > 0);
            let Some(part) = rest.checked_div(open.count() as u64) else {
                break;
            };
            let before = rest;
            for (size, device) in sizes.iter_mut().zip(devices) {
                let more = round_down(part, device).min(device.region_size() - *size);
                *size += more;
                rest -= more;
            }
            if rest < before {
                continue;
            }
            // Less than a block for each: a block each, as long as there are any.
            for (size, device) in sizes.iter_mut().zip(devices) {
                let block_size = device.block_size();
                if *size < device.region_size() && block_size <= rest {
                    *size += block_size;
                    rest -= block_size;
                }
            }
            if rest == before {
                break;
            }
        }
        let part = total.checked_div(devices.len() as u64).unwrap_or(0);
        let shares = sizes.iter().zip(devices).map(|(size, device)| Share {
            size: *size,
            deviation: match *size {
                size if size == part => None,
                size if size < part && size == device.region_size() => Some(Deviation::RegionLimit),
                size if size.abs_diff(part) < device.block_size() => Some(Deviation::BlockSize),
                _ => Some(Deviation::Overflow),
            },
        });
        Self {
            shares: shares.collect(),
            rest,
        }
    }

    /// Resizes `devices`, which are those of the split, to their shares.
    ///
    /// # Errors
    ///
    /// [`ResizeError`] of the first device that refuses; those before it are resized.
    pub fn resize(&self, devices: &[Handle]) -> Result<Vec<Resize>, ResizeError> {
        let shares = self.shares.iter().zip(devices);
        shares
            .map(|(share, device)| device.resize(share.size))
            .collect()
    }
}

fn round_down(bytes: u64, device: &Geometry) -> u64 {
    bytes & !(device.block_size() - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn device(region_size: u64, block_size: u64) -> Geometry {
        Geometry::new(0, region_size, block_size).unwrap()
    }

    fn shares(split: &Split) -> Vec<(u64, Option<Deviation>)> {
        split.shares.iter().map(|s| (s.size, s.deviation)).collect()
    }

    #[test]
    fn equal_parts_where_they_fit() {
        let split = Split::new(4 * GIB, &[device(8 * GIB, 2 * MIB); 2]);
        assert_eq!(shares(&split), [(2 * GIB, None); 2]);
        assert_eq!(split.rest, 0);
    }

    #[test]
    fn small_region_passes_on_what_it_cannot_take() {
        let devices = [device(GIB, 2 * MIB), device(8 * GIB, 2 * MIB)];
        let split = Split::new(4 * GIB, &devices);
        assert_eq!(
            shares(&split),
            [
                (GIB, Some(Deviation::RegionLimit)),
                (3 * GIB, Some(Deviation::Overflow))
            ]
        );
        assert_eq!(Split::new(10 * GIB, &devices).rest, GIB);
    }

    #[test]
    fn blocks_that_cannot_be_halved_are_said_to_be_so() {
        let split = Split::new(3 * GIB, &[device(8 * GIB, GIB); 2]);
        assert_eq!(
            shares(&split),
            [
                (2 * GIB, Some(Deviation::BlockSize)),
                (GIB, Some(Deviation::BlockSize))
            ]
        );
        assert_eq!(Split::new(MIB, &[device(8 * GIB, GIB)]).rest, MIB);
    }

    #[test]
    fn no_devices_take_nothing() {
        assert_eq!(Split::new(GIB, &[]).rest, GIB);
        assert_eq!(Split::new(GIB, &[device(0, MIB)]).rest, GIB);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_is_left_that_would_fit(
            total: u64,
            small in 0u64..(1 << 36),
            devices in proptest::collection::vec((0u64..5000, 20u32..31), 0..6),
        ) {
            let devices: Vec<_> = devices
                .into_iter()
                .map(|(blocks, shift)| device(blocks << shift, 1 << shift))
                .collect();
            for total in [total, small] {
                let split = Split::new(total, &devices);
                let placed: u64 = split.shares.iter().map(|share| share.size).sum();
                prop_assert_eq!(placed + split.rest, total);
                for (share, device) in split.shares.iter().zip(&devices) {
                    prop_assert!(device.is_aligned(share.size));
                    prop_assert!(share.size <= device.region_size());
                    let full = share.size == device.region_size();
                    prop_assert!(full || split.rest < device.block_size());
                }
            }
        }
    }
}

//! Device configuration space, 56 bytes, read-only to the driver (virtio 1.4, 5.15.4).

use core::mem::{offset_of, size_of};

use thiserror::Error;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute};

use crate::{Geometry, GeometryError};

/// `struct virtio_mem_config`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawConfig {
    block_size: U64,
    node_id: U16,
    padding: [u8; 6],
    addr: U64,
    region_size: U64,
    usable_region_size: U64,
    plugged_size: U64,
    requested_size: U64,
}

const _: () = {
    assert!(size_of::<RawConfig>() == Config::LEN);
    assert!(offset_of!(RawConfig, node_id) == Field::NodeId.offset());
    assert!(offset_of!(RawConfig, addr) == Field::Addr.offset());
    assert!(offset_of!(RawConfig, region_size) == Field::RegionSize.offset());
    assert!(offset_of!(RawConfig, usable_region_size) == Field::UsableRegionSize.offset());
    assert!(offset_of!(RawConfig, plugged_size) == Field::PluggedSize.offset());
    assert!(offset_of!(RawConfig, requested_size) == Field::RequestedSize.offset());
};

/// A field of the configuration space, by where it lies.
///
/// Drivers read each 64-bit field as two 32-bit registers (M-05), so they need offsets, not only the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// le64, bytes per block
    BlockSize = 0x00,
    /// le16, valid with [`ACPI_PXM`](crate::Features::ACPI_PXM) only
    NodeId = 0x08,
    /// le64, guest-physical start of the region
    Addr = 0x10,
    /// le64, bytes
    RegionSize = 0x18,
    /// le64, bytes; may change at run time
    UsableRegionSize = 0x20,
    /// le64, bytes; changes with every acknowledged request
    PluggedSize = 0x28,
    /// le64, bytes; may change at run time
    RequestedSize = 0x30,
}

impl Field {
    /// Bytes from the start of the configuration space.
    #[must_use]
    pub const fn offset(self) -> usize {
        self as usize
    }
}

/// The fields that change while the device runs (D-01, D-03).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MutableConfig {
    /// Bytes of the region, from its start, in which blocks may be plugged.
    pub usable_region_size: u64,
    /// Bytes in plugged blocks.
    pub plugged_size: u64,
    /// Bytes the device asks the driver to have plugged.
    pub requested_size: u64,
}

/// The configuration space with its meaning checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Block size, address and size of the region; fixed until system reset (D-02).
    pub geometry: Geometry,
    /// Proximity domain, meaningful with [`ACPI_PXM`](crate::Features::ACPI_PXM) only (G-03).
    pub node_id: u16,
    /// What changes at run time.
    pub mutable: MutableConfig,
}

/// A configuration no device may show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The region itself is wrong.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// D-06
    #[error("{name} {size:#x} is not a multiple of the block size")]
    Misaligned {
        /// The field's name.
        name: &'static str,
        /// Its value in bytes.
        size: u64,
    },
    /// The usable region or the plugged blocks do not fit where they must.
    #[error("{name} {size:#x} exceeds {limit_name} {limit:#x}")]
    Exceeds {
        /// The field's name.
        name: &'static str,
        /// Its value in bytes.
        size: u64,
        /// Name of the field that bounds it.
        limit_name: &'static str,
        /// The bound in bytes.
        limit: u64,
    },
}

impl MutableConfig {
    /// Checks the sizes against `geometry` and each other (D-04, D-06).
    ///
    /// # Errors
    ///
    /// [`ConfigError::Misaligned`] or [`ConfigError::Exceeds`].
    pub fn check(&self, geometry: &Geometry) -> Result<(), ConfigError> {
        let usable = ("usable_region_size", self.usable_region_size);
        let plugged = ("plugged_size", self.plugged_size);
        let requested = ("requested_size", self.requested_size);
        for (name, size) in [usable, plugged, requested] {
            if !geometry.is_aligned(size) {
                return Err(ConfigError::Misaligned { name, size });
            }
        }
        let region = ("region_size", geometry.region_size());
        for ((name, size), (limit_name, limit)) in
            [(usable, region), (plugged, usable), (requested, usable)]
        {
            if size > limit {
                return Err(ConfigError::Exceeds {
                    name,
                    size,
                    limit_name,
                    limit,
                });
            }
        }
        Ok(())
    }
}

impl Config {
    /// Bytes of the configuration space. A device's may be longer; the rest is ignored (V-08).
    pub const LEN: usize = 56;

    /// The meaning of a configuration space, checked.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`]; the rules are D-04 … D-07.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, ConfigError> {
        let raw: RawConfig = transmute!(*bytes);
        let config = Self {
            geometry: Geometry::new(raw.addr.get(), raw.region_size.get(), raw.block_size.get())?,
            node_id: raw.node_id.get(),
            mutable: MutableConfig {
                usable_region_size: raw.usable_region_size.get(),
                plugged_size: raw.plugged_size.get(),
                requested_size: raw.requested_size.get(),
            },
        };
        config.mutable.check(&config.geometry)?;
        Ok(config)
    }

    /// The configuration space as the driver reads it, padding zero.
    #[must_use]
    pub fn emit(&self) -> [u8; Self::LEN] {
        transmute!(RawConfig {
            block_size: self.geometry.block_size().into(),
            node_id: self.node_id.into(),
            padding: [0; 6],
            addr: self.geometry.addr().into(),
            region_size: self.geometry.region_size().into(),
            usable_region_size: self.mutable.usable_region_size.into(),
            plugged_size: self.mutable.plugged_size.into(),
            requested_size: self.mutable.requested_size.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn example() -> Config {
        Config {
            geometry: Geometry::new(4 << 30, 4 << 30, 2 * MIB).unwrap(),
            node_id: 3,
            mutable: MutableConfig {
                usable_region_size: 1 << 30,
                plugged_size: 6 * MIB,
                requested_size: 130 * MIB,
            },
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = example().emit();
        let le64 = |field: Field| {
            u64::from_le_bytes(
                bytes[field.offset()..field.offset() + 8]
                    .try_into()
                    .unwrap(),
            )
        };
        assert_eq!(le64(Field::BlockSize), 2 * MIB);
        assert_eq!(bytes[8..16], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(le64(Field::Addr), 4 << 30);
        assert_eq!(le64(Field::RegionSize), 4 << 30);
        assert_eq!(le64(Field::UsableRegionSize), 1 << 30);
        assert_eq!(le64(Field::PluggedSize), 6 * MIB);
        assert_eq!(le64(Field::RequestedSize), 130 * MIB);
    }

    #[test]
    fn d_04_usable_region_smaller_than_requested_is_refused() {
        let mut config = example();
        config.mutable.usable_region_size = 128 * MIB;
        assert_eq!(
            Config::parse(&config.emit()),
            Err(ConfigError::Exceeds {
                name: "requested_size",
                size: 130 * MIB,
                limit_name: "usable_region_size",
                limit: 128 * MIB,
            })
        );
    }

    #[test]
    fn d_06_sizes_that_are_not_whole_blocks_are_refused() {
        let mut config = example();
        config.mutable.plugged_size = 3 * MIB;
        assert_eq!(
            Config::parse(&config.emit()),
            Err(ConfigError::Misaligned {
                name: "plugged_size",
                size: 3 * MIB
            })
        );
    }

    #[test]
    fn usable_region_larger_than_the_region_is_refused() {
        let mut config = example();
        config.mutable.usable_region_size = 8 << 30;
        assert!(matches!(
            Config::parse(&config.emit()),
            Err(ConfigError::Exceeds {
                name: "usable_region_size",
                ..
            })
        ));
    }

    #[test]
    fn g_02_padding_is_ignored() {
        let mut bytes = example().emit();
        bytes[10..16].fill(0xff);
        assert_eq!(Config::parse(&bytes), Ok(example()));
    }

    proptest! {
        #[test]
        fn what_parses_emits_the_same_again(bytes in proptest::collection::vec(any::<u8>(), 56)) {
            let mut bytes: [u8; 56] = bytes.try_into().unwrap();
            if let Ok(config) = Config::parse(&bytes) {
                bytes[10..16].fill(0);
                prop_assert_eq!(config.emit(), bytes);
            }
        }
    }
}

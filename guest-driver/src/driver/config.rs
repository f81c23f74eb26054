//! Reading the configuration space: in aligned 32-bit pieces, until it holds still.

use thiserror::Error;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{Config, ConfigError, Features, Field};

/// How often the configuration may change under the driver before it gives up for now.
const ATTEMPTS: usize = 16;

/// A configuration that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConfigReadError {
    /// The generation was another one after each attempt to read.
    #[error("the configuration changes faster than it can be read")]
    Unstable,
    /// The configuration space is missing or too short.
    #[error("the configuration cannot be read: {0}")]
    Transport(#[from] virtio_drivers::Error),
    /// The device shows what no device may show.
    #[error("the configuration is wrong: {0}")]
    Invalid(#[from] ConfigError),
}

/// Whether the device has changed what it must not (D-02).
pub(super) fn moved(old: &Config, new: &Config) -> bool {
    (old.geometry, old.node_id) != (new.geometry, new.node_id)
}

/// The configuration, from one generation (V-07).
pub(super) fn read(
    transport: &impl Transport,
    features: Features,
) -> Result<Config, ConfigReadError> {
    for _ in 0..ATTEMPTS {
        let before = transport.read_config_generation();
        let bytes = read_fields(transport, features)?;
        if transport.read_config_generation() == before {
            // G-02: padding is not even read.
            return Ok(Config::parse(&bytes)?);
        }
    }
    Err(ConfigReadError::Unstable)
}

/// Each 64-bit field as two 32-bit registers (V-06, M-05), as they lie in memory; the node only where it means
/// something (G-03).
fn read_fields(
    transport: &impl Transport,
    features: Features,
) -> Result<[u8; Config::LEN], virtio_drivers::Error> {
    let mut bytes = [0; Config::LEN];
    if features.contains(Features::ACPI_PXM) {
        let offset = Field::NodeId.offset();
        let register: u16 = transport.read_config_space(offset)?;
        bytes[offset..offset + 2].copy_from_slice(&register.to_ne_bytes());
    }
    for field in [
        Field::BlockSize,
        Field::Addr,
        Field::RegionSize,
        Field::UsableRegionSize,
        Field::PluggedSize,
        Field::RequestedSize,
    ] {
        for offset in [field.offset(), field.offset() + 4] {
            let register: u32 = transport.read_config_space(offset)?;
            bytes[offset..offset + 4].copy_from_slice(&register.to_ne_bytes());
        }
    }
    Ok(bytes)
}

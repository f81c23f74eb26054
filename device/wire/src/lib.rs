//! Wire format and block geometry of the virtio memory device.
//!
//! Everything the two halves of virtio-mem must agree on, written once: the layouts and constants of
//! virtio 1.4, section 5.15, typed requests and responses, the arithmetic of device blocks, and (feature
//! `alloc`) the map of plugged blocks.
//!
//! Nothing in this crate panics on any input: `parse` returns a typed meaning or an error, `emit` cannot
//! fail, and all arithmetic on numbers from the other side is checked.
//!
//! | concept | here | virtio 1.4 |
//! |---|---|---|
//! | feature bits | [`Features`] | 5.15.3 |
//! | configuration space | [`Config`] | 5.15.4 |
//! | requests | [`Request`], [`Span`] | 5.15.6 |
//! | responses | [`Response`], [`BlockState`] | 5.15.6 |
//! | blocks | [`Geometry`], [`BlockRange`] | 5.15.1 |
#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    not(test),
    warn(clippy::cast_possible_truncation, clippy::arithmetic_side_effects)
)]

#[cfg(any(test, feature = "alloc"))]
extern crate alloc;

#[cfg(any(test, feature = "alloc"))]
mod block_map;
mod config;
mod features;
mod geometry;
mod request;
mod response;

#[cfg(any(test, feature = "alloc"))]
pub use block_map::{BlockMap, BlockMapError};
pub use config::{Config, ConfigError, Field, MutableConfig};
pub use features::Features;
pub use geometry::{BlockRange, Geometry, GeometryError, RangeError, Spans};
pub use request::{MAX_BLOCKS_PER_REQUEST, Request, RequestKind, Span, UnknownRequest};
pub use response::{Answer, BlockState, Response, ResponseError};

/// Virtio device id of the memory device (virtio 1.4, section 5).
pub const VIRTIO_ID_MEM: u32 = 24;

/// The one virtqueue of the device, `guest-request` (virtio 1.4, 5.15.2).
pub const GUEST_REQUEST_QUEUE: u16 = 0;

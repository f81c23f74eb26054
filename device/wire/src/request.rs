//! Requests, driver to device (virtio 1.4, 5.15.6).

use core::mem::{offset_of, size_of};

use thiserror::Error;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute};

/// `struct virtio_mem_req`. PLUG, UNPLUG and STATE share the body; UNPLUG ALL has none but the same length.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    request_type: U16,
    padding: [U16; 3],
    addr: U64,
    nb_blocks: U16,
    body_padding: [U16; 3],
}

const _: () = {
    assert!(size_of::<RawRequest>() == Request::LEN);
    assert!(offset_of!(RawRequest, addr) == 8);
    assert!(offset_of!(RawRequest, nb_blocks) == 16);
};

const VIRTIO_MEM_REQ_PLUG: u16 = 0;
const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;

/// The most blocks one request can name: `nb_blocks` has 16 bits, a longer run must be split.
pub const MAX_BLOCKS_PER_REQUEST: u16 = u16::MAX;

/// A run of device blocks as a request names it: not checked against any device yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest-physical address of the first block, in bytes.
    pub addr: u64,
    /// Number of blocks (`nb_blocks`).
    pub block_count: u16,
}

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Plug all blocks of the span.
    Plug(Span),
    /// Unplug all blocks of the span.
    Unplug(Span),
    /// Unplug every block of the device.
    UnplugAll,
    /// Tell whether the blocks of the span are plugged.
    State(Span),
}

/// The type of a request, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// [`Request::Plug`]
    Plug,
    /// [`Request::Unplug`]
    Unplug,
    /// [`Request::UnplugAll`]
    UnplugAll,
    /// [`Request::State`]
    State,
}

impl RequestKind {
    /// All kinds, in wire order: `ALL[kind as usize] == kind`.
    pub const ALL: [Self; 4] = [Self::Plug, Self::Unplug, Self::UnplugAll, Self::State];

    /// Name for people: `plug`, `unplug`, `unplug_all`, `state`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plug => "plug",
            Self::Unplug => "unplug",
            Self::UnplugAll => "unplug_all",
            Self::State => "state",
        }
    }
}

/// A request type no version of the specification defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("unknown request type {0}")]
pub struct UnknownRequest(pub u16);

impl Request {
    /// Bytes of a request on the wire. A driver's buffer may be longer; the rest is ignored (D-24).
    pub const LEN: usize = 24;

    /// The meaning of the first [`LEN`](Self::LEN) bytes of a request buffer.
    ///
    /// Padding is ignored (D-25, D-32, D-39, D-45), and so is the body of UNPLUG ALL (D-38).
    ///
    /// # Errors
    ///
    /// [`UnknownRequest`] with the type, if no request has it.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, UnknownRequest> {
        let raw: RawRequest = transmute!(*bytes);
        let span = Span {
            addr: raw.addr.get(),
            block_count: raw.nb_blocks.get(),
        };
        match raw.request_type.get() {
            VIRTIO_MEM_REQ_PLUG => Ok(Self::Plug(span)),
            VIRTIO_MEM_REQ_UNPLUG => Ok(Self::Unplug(span)),
            VIRTIO_MEM_REQ_UNPLUG_ALL => Ok(Self::UnplugAll),
            VIRTIO_MEM_REQ_STATE => Ok(Self::State(span)),
            other => Err(UnknownRequest(other)),
        }
    }

    /// The request as it goes over the wire, padding zero.
    #[must_use]
    pub fn emit(&self) -> [u8; Self::LEN] {
        let (request_type, span) = match *self {
            Self::Plug(span) => (VIRTIO_MEM_REQ_PLUG, Some(span)),
            Self::Unplug(span) => (VIRTIO_MEM_REQ_UNPLUG, Some(span)),
            Self::UnplugAll => (VIRTIO_MEM_REQ_UNPLUG_ALL, None),
            Self::State(span) => (VIRTIO_MEM_REQ_STATE, Some(span)),
        };
        transmute!(RawRequest {
            request_type: request_type.into(),
            padding: [U16::ZERO; 3],
            addr: span.map_or(0, |s| s.addr).into(),
            nb_blocks: span.map_or(0, |s| s.block_count).into(),
            body_padding: [U16::ZERO; 3],
        })
    }

    /// The type of the request.
    #[must_use]
    pub const fn kind(&self) -> RequestKind {
        match self {
            Self::Plug(_) => RequestKind::Plug,
            Self::Unplug(_) => RequestKind::Unplug,
            Self::UnplugAll => RequestKind::UnplugAll,
            Self::State(_) => RequestKind::State,
        }
    }

    /// The blocks the request names; `None` for UNPLUG ALL.
    #[must_use]
    pub const fn span(&self) -> Option<Span> {
        match *self {
            Self::Plug(span) | Self::Unplug(span) | Self::State(span) => Some(span),
            Self::UnplugAll => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plug_has_the_layout_of_the_specification() {
        let request = Request::Plug(Span {
            addr: 0x1_0020_0000,
            block_count: 0x0304,
        });
        let mut expected = [0; 24];
        expected[8..16].copy_from_slice(&[0, 0, 0x20, 0, 1, 0, 0, 0]);
        expected[16..18].copy_from_slice(&[4, 3]);
        assert_eq!(request.emit(), expected);
    }

    #[test]
    fn unplug_all_ignores_everything_but_its_type() {
        let mut bytes = [0xff; 24];
        bytes[0..2].copy_from_slice(&2u16.to_le_bytes());
        assert_eq!(Request::parse(&bytes), Ok(Request::UnplugAll));
    }

    proptest! {
        #[test]
        fn what_parses_is_what_was_emitted_whatever_the_padding(
            kind in 0u16..6, addr: u64, block_count: u16, junk: [u8; 24],
        ) {
            let mut bytes = junk;
            bytes[0..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&addr.to_le_bytes());
            bytes[16..18].copy_from_slice(&block_count.to_le_bytes());
            let span = Span { addr, block_count };
            let expected = match kind {
                0 => Ok(Request::Plug(span)),
                1 => Ok(Request::Unplug(span)),
                2 => Ok(Request::UnplugAll),
                3 => Ok(Request::State(span)),
                other => Err(UnknownRequest(other)),
            };
            let parsed = Request::parse(&bytes);
            prop_assert_eq!(parsed, expected);
            if let Ok(request) = parsed {
                prop_assert_eq!(Request::parse(&request.emit()), Ok(request));
                prop_assert_eq!(RequestKind::ALL[request.kind() as usize], request.kind());
            }
        }
    }
}

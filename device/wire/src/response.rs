//! Responses, device to driver (virtio 1.4, 5.15.6).

use core::mem::{offset_of, size_of};

use thiserror::Error;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute};

use crate::RequestKind;

/// `struct virtio_mem_resp`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawResponse {
    response_type: U16,
    padding: [U16; 3],
    state: U16,
}

const _: () = {
    assert!(size_of::<RawResponse>() == Response::LEN);
    assert!(offset_of!(RawResponse, state) == 8);
};

const VIRTIO_MEM_RESP_ACK: u16 = 0;
const VIRTIO_MEM_RESP_NACK: u16 = 1;
const VIRTIO_MEM_RESP_BUSY: u16 = 2;
const VIRTIO_MEM_RESP_ERROR: u16 = 3;

const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

/// What a STATE request found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Every block of the span is plugged (D-48).
    Plugged,
    /// Every block of the span is unplugged (D-49).
    Unplugged,
    /// Some are, some are not (D-50).
    Mixed,
}

/// The type of a response, without what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Refused: plugging would exceed `requested_size`.
    Nack,
    /// Cannot be done now; try again later.
    Busy,
    /// The request itself is wrong.
    Error,
}

impl Answer {
    /// All answers, in wire order: `ALL[answer as usize] == answer`.
    pub const ALL: [Self; 4] = [Self::Ack, Self::Nack, Self::Busy, Self::Error];

    /// Name for people: `ack`, `nack`, `busy`, `error`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Nack => "nack",
            Self::Busy => "busy",
            Self::Error => "error",
        }
    }
}

/// A response of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// PLUG, UNPLUG or UNPLUG ALL was done.
    Ack,
    /// The state a STATE request asked for.
    AckState(BlockState),
    /// [`Answer::Nack`]
    Nack,
    /// [`Answer::Busy`]
    Busy,
    /// [`Answer::Error`]
    Error,
}

/// A response buffer that holds no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ResponseError {
    /// The device wrote fewer bytes than the response needs (V-14).
    #[error("response of {have} bytes, {need} needed")]
    TooShort {
        /// Bytes the device wrote.
        have: usize,
        /// Bytes the response needs.
        need: usize,
    },
    /// A response type no version of the specification defines.
    #[error("unknown response type {0}")]
    UnknownType(u16),
    /// A block state no version of the specification defines.
    #[error("unknown block state {0}")]
    UnknownState(u16),
}

impl Response {
    /// Bytes of a response on the wire.
    pub const LEN: usize = 10;

    /// Bytes of a response that carry the type; all a driver needs unless it asked for STATE.
    pub const TYPE_LEN: usize = offset_of!(RawResponse, state);

    /// The meaning of `bytes`, what the device wrote in answer to a request of `kind`.
    ///
    /// The state is looked at only in an ACK to STATE (G-17 … G-21).
    ///
    /// # Errors
    ///
    /// See [`ResponseError`].
    pub fn parse(kind: RequestKind, bytes: &[u8]) -> Result<Self, ResponseError> {
        let mut buffer = [0; Self::LEN];
        let have = bytes.len();
        for (to, from) in buffer.iter_mut().zip(bytes) {
            *to = *from;
        }
        let need = |need: usize| match have < need {
            true => Err(ResponseError::TooShort { have, need }),
            false => Ok(()),
        };
        let raw: RawResponse = transmute!(buffer);
        need(Self::TYPE_LEN)?;
        match raw.response_type.get() {
            VIRTIO_MEM_RESP_ACK if kind == RequestKind::State => {
                need(Self::LEN)?;
                Ok(Self::AckState(match raw.state.get() {
                    VIRTIO_MEM_STATE_PLUGGED => BlockState::Plugged,
                    VIRTIO_MEM_STATE_UNPLUGGED => BlockState::Unplugged,
                    VIRTIO_MEM_STATE_MIXED => BlockState::Mixed,
                    other => return Err(ResponseError::UnknownState(other)),
                }))
            }
            VIRTIO_MEM_RESP_ACK => Ok(Self::Ack),
            VIRTIO_MEM_RESP_NACK => Ok(Self::Nack),
            VIRTIO_MEM_RESP_BUSY => Ok(Self::Busy),
            VIRTIO_MEM_RESP_ERROR => Ok(Self::Error),
            other => Err(ResponseError::UnknownType(other)),
        }
    }

    /// The response as it goes over the wire, unused bytes zero.
    #[must_use]
    pub fn emit(&self) -> [u8; Self::LEN] {
        let response_type = match self.answer() {
            Answer::Ack => VIRTIO_MEM_RESP_ACK,
            Answer::Nack => VIRTIO_MEM_RESP_NACK,
            Answer::Busy => VIRTIO_MEM_RESP_BUSY,
            Answer::Error => VIRTIO_MEM_RESP_ERROR,
        };
        let state = match self {
            Self::AckState(BlockState::Unplugged) => VIRTIO_MEM_STATE_UNPLUGGED,
            Self::AckState(BlockState::Mixed) => VIRTIO_MEM_STATE_MIXED,
            _ => VIRTIO_MEM_STATE_PLUGGED,
        };
        transmute!(RawResponse {
            response_type: response_type.into(),
            padding: [U16::ZERO; 3],
            state: state.into(),
        })
    }

    /// The type of the response.
    #[must_use]
    pub const fn answer(&self) -> Answer {
        match self {
            Self::Ack | Self::AckState(_) => Answer::Ack,
            Self::Nack => Answer::Nack,
            Self::Busy => Answer::Busy,
            Self::Error => Answer::Error,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn state_answer_has_the_layout_of_the_specification() {
        assert_eq!(
            Response::AckState(BlockState::Mixed).emit(),
            [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
        );
        assert_eq!(Response::Error.emit(), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn g_21_state_field_of_an_error_is_not_believed() {
        let plugged_but_error = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(
            Response::parse(RequestKind::State, &plugged_but_error),
            Ok(Response::Error)
        );
    }

    #[test]
    fn short_responses_are_refused_where_a_byte_is_missed() {
        let ack = Response::Ack.emit();
        for have in 0..8 {
            assert_eq!(
                Response::parse(RequestKind::Plug, &ack[..have]),
                Err(ResponseError::TooShort { have, need: 8 })
            );
        }
        assert_eq!(
            Response::parse(RequestKind::Plug, &ack[..8]),
            Ok(Response::Ack)
        );
        assert_eq!(
            Response::parse(RequestKind::State, &ack[..9]),
            Err(ResponseError::TooShort { have: 9, need: 10 })
        );
    }

    proptest! {
        #[test]
        fn junk_never_panics_and_padding_never_matters(
            bytes in proptest::collection::vec(any::<u8>(), 0..32), kind in 0usize..4, junk: [u8; 6],
        ) {
            let kind = RequestKind::ALL[kind];
            let first = Response::parse(kind, &bytes);
            let mut padded = bytes.clone();
            for (to, from) in padded.iter_mut().skip(2).take(6).zip(junk) {
                *to = from;
            }
            prop_assert_eq!(first, Response::parse(kind, &padded));
            if let Ok(response) = first {
                prop_assert_eq!(Response::parse(kind, &response.emit()), Ok(response));
                prop_assert_eq!(Answer::ALL[response.answer() as usize], response.answer());
            }
        }
    }
}

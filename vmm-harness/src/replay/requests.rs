//! Recorded requests of the virtio-mem driver, and the device they were sent to.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use virtio_mem_wire::{Answer, Request, RequestKind, Span};

/// Longest recording: the driver's clock must not reach its end.
const LONGEST: Duration = Duration::from_secs(1 << 32);

/// The device of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct RecordedDevice {
    /// Physical address of its region.
    pub(super) addr: u64,
    /// Bytes of its region.
    pub(super) region_size: u64,
    /// Bytes of a device block.
    pub(super) block_size: u64,
    /// Bytes requested when the machine was started.
    #[serde(skip)]
    pub(super) requested_size: u64,
    /// Its proximity domain, which is the node's number on this kind of machine.
    #[serde(skip)]
    pub(super) node: u16,
}

/// A request and what the device said to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exchange {
    pub(super) request: Request,
    pub(super) answer: Answer,
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.request.kind().name())?;
        if let Some(Span { addr, block_count }) = self.request.span() {
            write!(f, " {addr:#x} blocks {block_count}")?;
        }
        write!(f, " {}", self.answer.name())
    }
}

/// A recorded request, and when it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) exchange: Exchange,
    /// Milliseconds since the machine was started.
    pub(super) at_ms: u64,
}

/// As it lies on disk. What the machine did by itself has its own types and no address.
#[derive(Deserialize)]
struct RawRequest {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    addr: u64,
    #[serde(default)]
    nb_blocks: u64,
    response: Option<String>,
    #[serde(default)]
    t: f64,
}

impl Recorded {
    /// Reads an entry of `requests`; nothing if it is an event of the machine, not a request.
    pub(super) fn read(value: &Value) -> Result<Option<Self>, String> {
        let raw =
            RawRequest::deserialize(value).map_err(|error| format!("request {value}: {error}"))?;
        if ["resized_usable_region", "unplugged_all"].contains(&raw.kind.as_str()) {
            return Ok(None);
        }
        let wrong = |what: &str| format!("request {value}: {what}");
        let kind = RequestKind::ALL
            .into_iter()
            .find(|kind| kind.name() == raw.kind);
        let span = Span {
            addr: raw.addr,
            block_count: u16::try_from(raw.nb_blocks)
                .map_err(|_| wrong("no request has so many blocks"))?,
        };
        let request = match kind.ok_or_else(|| wrong("there is no such request"))? {
            RequestKind::Plug => Request::Plug(span),
            RequestKind::Unplug => Request::Unplug(span),
            RequestKind::UnplugAll => Request::UnplugAll,
            RequestKind::State => Request::State(span),
        };
        let response = raw.response.unwrap_or_default().to_ascii_lowercase();
        let answer = Answer::ALL
            .into_iter()
            .find(|answer| answer.name() == response);
        let at = Duration::try_from_secs_f64(raw.t)
            .ok()
            .filter(|at| *at <= LONGEST);
        let at = at.ok_or_else(|| wrong("no recording takes so long"))?;
        Ok(Some(Self {
            exchange: Exchange {
                request,
                answer: answer.ok_or_else(|| wrong("there is no such response"))?,
            },
            at_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
        }))
    }
}

//! Which request gets which answer. Knows nothing of connections.

use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use virtio_mem::State;
use virtio_mem::wire::{BlockMap, BlockRange, BlockState};

use super::metrics;
use crate::Size;
use crate::control::{ControlError, Controller, Instance, InstanceError, Operation};

/// The longest a request may wait for the end of an operation.
const MAX_WAIT: Duration = Duration::from_secs(3600);

const MIB: u64 = 1 << 20;

/// Why a request was not done.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// For [`StatusCode::METHOD_NOT_ALLOWED`].
    pub(super) allow: Option<String>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl ToString) -> Self {
        Self {
            status,
            message: message.to_string(),
            allow: None,
        }
    }

    pub(super) fn bad_request(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn body(&self) -> Value {
        json!({ "fault_message": self.message })
    }
}

impl From<InstanceError> for ApiError {
    fn from(error: InstanceError) -> Self {
        let status = match &error {
            InstanceError::Control(ControlError::UnknownOperation(_)) => StatusCode::NOT_FOUND,
            InstanceError::Control(ControlError::Ended(_) | ControlError::Save(_)) => {
                StatusCode::CONFLICT
            }
            InstanceError::Control(ControlError::Resident(_)) | InstanceError::Host(_) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
            // Also for what comes at the wrong time, as Firecracker does.
            InstanceError::NotStarted
            | InstanceError::Started
            | InstanceError::Ended
            | InstanceError::Guest(_)
            | InstanceError::Control(ControlError::Resize(_)) => StatusCode::BAD_REQUEST,
        };
        Self::new(status, format!("{:#}", anyhow::Error::from(error)))
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        InstanceError::from(error).into()
    }
}

/// An answer that is no error.
#[derive(Debug)]
pub(super) enum Answer {
    /// 204, with the number of the operation it has begun.
    Done(Option<u64>),
    /// 200
    Json(Value),
    /// 201, and where it is.
    Created(u64, Value),
    /// 200
    Metrics(String),
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resource {
    Root,
    Actions,
    Memory,
    Blocks,
    Freeze,
    Thaw,
    State,
    Operations,
    Operation(u64),
    Events,
    Metrics,
}

impl Resource {
    pub(super) fn at(path: &str) -> Result<Self, ApiError> {
        Ok(match path {
            "/" => Self::Root,
            "/actions" => Self::Actions,
            "/hotplug/memory" => Self::Memory,
            "/hotplug/memory/blocks" => Self::Blocks,
            "/hotplug/memory/freeze" => Self::Freeze,
            "/hotplug/memory/thaw" => Self::Thaw,
            "/hotplug/memory/state" => Self::State,
            "/operations" => Self::Operations,
            "/events" => Self::Events,
            "/metrics" => Self::Metrics,
            path => {
                let id = path.strip_prefix("/operations/");
                match id.and_then(|id| id.parse().ok()) {
                    Some(id) => Self::Operation(id),
                    None => {
                        let message = format!("there is nothing at {path:?}");
                        return Err(ApiError::new(StatusCode::NOT_FOUND, message));
                    }
                }
            }
        })
    }

    fn methods(self) -> &'static [Method] {
        match self {
            Self::Root | Self::Blocks | Self::Events | Self::Metrics => &[Method::GET],
            Self::Actions | Self::Freeze | Self::Thaw => &[Method::PUT],
            Self::Memory => &[Method::GET, Method::PUT, Method::PATCH],
            Self::State => &[Method::GET, Method::PUT],
            Self::Operations => &[Method::GET, Method::POST],
            Self::Operation(_) => &[Method::GET, Method::DELETE],
        }
    }

    /// Whether there is such a method here.
    pub(super) fn check_method(self, method: &Method) -> Result<(), ApiError> {
        let methods = self.methods();
        if methods.contains(method) {
            return Ok(());
        }
        let allow: Vec<_> = methods.iter().map(Method::as_str).collect();
        let allow = allow.join(", ");
        Err(ApiError {
            allow: Some(allow.clone()),
            ..ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{method} is not for this path, {allow} is"),
            )
        })
    }

    /// The longest to wait for the end of an operation, from a query; only an operation has one.
    pub(super) fn wait(self, method: &Method, query: Option<&str>) -> Result<Duration, ApiError> {
        let Some(query) = query.filter(|query| !query.is_empty()) else {
            return Ok(Duration::ZERO);
        };
        let wait = match (self, query.strip_prefix("wait=")) {
            (Self::Operation(_), Some(wait)) if method == Method::GET => wait,
            _ => {
                let message = format!("query {query:?} is not understood");
                return Err(ApiError::bad_request(message));
            }
        };
        match humantime::parse_duration(wait) {
            Ok(wait) if wait <= MAX_WAIT => Ok(wait),
            Ok(_) => Err(ApiError::bad_request("wait is an hour at the most")),
            Err(error) => Err(ApiError::bad_request(format!("wait={wait}: {error}"))),
        }
    }

    /// Does what is asked for. Blocks for as long as the guest takes to say how it is.
    pub(super) fn answer(
        self,
        method: &Method,
        body: &Bytes,
        instance: &Instance,
    ) -> Result<Answer, ApiError> {
        let is = |other: Method| *method == other;
        if is(Method::GET) || is(Method::DELETE) || matches!(self, Self::Freeze | Self::Thaw) {
            no_body(body)?;
        }
        Ok(match self {
            Self::Root => Answer::Json(json!({
                "app_name": "vmem",
                "vmm_version": env!("CARGO_PKG_VERSION"),
                "state": instance.state(),
                "backend": instance.backend(),
            })),
            Self::Actions => {
                let Action::InstanceStart = read::<ActionBody>(body)?.action_type;
                instance.start(None)?;
                Answer::Done(None)
            }
            Self::Memory if is(Method::PUT) => {
                let config: MemoryConfig = read(body)?;
                instance.configure(|options| config.apply(options))?;
                Answer::Done(None)
            }
            Self::Memory if is(Method::PATCH) => {
                let operation = resize(body, instance)?;
                Answer::Done(Some(operation.id))
            }
            Self::Memory => Answer::Json(json!(instance.memory()?)),
            Self::Blocks => Answer::Json(blocks(instance)?),
            Self::Freeze => {
                instance.with(Controller::freeze)?;
                Answer::Done(None)
            }
            Self::Thaw => {
                instance.with(Controller::thaw)?;
                Answer::Done(None)
            }
            Self::State if is(Method::PUT) => {
                instance.start(Some(read::<State>(body)?))?;
                Answer::Done(None)
            }
            Self::State => {
                let state = instance.with(Controller::save)??;
                Answer::Json(json!(state))
            }
            Self::Operations if is(Method::POST) => {
                let operation = resize(body, instance)?;
                Answer::Created(operation.id, described(&operation, instance)?)
            }
            Self::Operations => {
                let operations = instance.with(Controller::operations)?;
                Answer::Json(json!({ "operations": operations }))
            }
            Self::Operation(id) if is(Method::DELETE) => {
                let operation = instance.with(|device| device.cancel(id))??;
                Answer::Json(described(&operation, instance)?)
            }
            Self::Operation(id) => {
                let operation = instance.with(|device| device.operation(id))??;
                Answer::Json(described(&operation, instance)?)
            }
            Self::Metrics => Answer::Metrics(metrics::render(instance)),
            // The server's business: it has no end.
            Self::Events => Answer::Done(None),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: Action,
}

#[derive(Deserialize)]
enum Action {
    InstanceStart,
}

/// The body of `PUT /hotplug/memory`; without a size in it, the device chooses.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryConfig {
    total_size_mib: u32,
    block_size_mib: Option<u32>,
    slot_size_mib: Option<u32>,
}

impl MemoryConfig {
    fn apply(&self, options: &mut crate::demo::DemoOptions) {
        options.region = bytes(self.total_size_mib);
        options.block_size = self.block_size_mib.map_or(2 * MIB, bytes);
        options.slot_size = self.slot_size_mib.map(bytes);
    }
}

fn bytes(mib: u32) -> u64 {
    u64::from(mib) * MIB
}

/// The body of `PATCH /hotplug/memory` and `POST /operations`: an object with one of these.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum SizeUpdate {
    RequestedSizeMib(u32),
    RequestedSize(Size),
}

fn resize(body: &Bytes, instance: &Instance) -> Result<Operation, ApiError> {
    let size = match read(body)? {
        SizeUpdate::RequestedSizeMib(mib) => bytes(mib),
        SizeUpdate::RequestedSize(Size(bytes)) => bytes,
    };
    Ok(instance.with(|device| device.resize(size))??)
}

/// An operation, and what keeps it from its end.
fn described(operation: &Operation, instance: &Instance) -> Result<Value, ApiError> {
    let mut value = json!(operation);
    let reason = match operation.state.is_final() {
        true => None,
        false => instance.reason()?,
    };
    value["reason"] = json!(reason);
    Ok(value)
}

fn blocks(instance: &Instance) -> Result<Value, ApiError> {
    let (geometry, plugged, guest) = instance.blocks()?;
    Ok(json!({
        "address": geometry.addr(),
        "block_size": geometry.block_size(),
        "block_count": geometry.block_count(),
        "blocks": letters(&plugged, &guest.plugged),
        "plugged": runs(&plugged),
        "guest_plugged": runs(&guest.plugged),
        "guest_online": runs(&guest.online),
        "guest_movable": runs(&guest.movable),
        "guest_pinned": runs(&guest.pinned),
    }))
}

/// One letter for each block: `#` plugged, `.` unplugged, `+` and `-` where the guest's driver does not know yet.
fn letters(plugged: &BlockMap, guest: &BlockMap) -> String {
    let is_in =
        |map: &BlockMap, first| map.state(BlockRange { first, count: 1 }) == BlockState::Plugged;
    (0..plugged.len())
        .map(|block| match (is_in(plugged, block), is_in(guest, block)) {
            (true, true) => '#',
            (true, false) => '+',
            (false, true) => '-',
            (false, false) => '.',
        })
        .collect()
}

fn runs(map: &BlockMap) -> Value {
    map.runs()
        .map(|run| json!({ "first": run.first, "count": run.count }))
        .collect()
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(ApiError::bad_request)
}

fn no_body(body: &Bytes) -> Result<(), ApiError> {
    match body.is_empty() {
        true => Ok(()),
        false => Err(ApiError::bad_request("this takes no body")),
    }
}

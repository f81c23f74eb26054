//! Which request gets which answer. Knows nothing of connections.

use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use virtio_mem::wire::{BlockMap, BlockRange, BlockState};

use super::metrics;
use crate::Size;
use crate::control::{
    ControlError, Controller, DeviceOptions, FIRST_DEVICE, Instance, InstanceError, Operation,
};

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
            InstanceError::UnknownDevice(_)
            | InstanceError::Control(ControlError::UnknownOperation(_)) => StatusCode::NOT_FOUND,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Resource {
    Root,
    Actions,
    /// A device by its name, the first without one.
    Memory(String, Part),
    Operations,
    Operation(u64),
    Events,
    Metrics,
}

/// What there is of a memory device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    Blocks,
    Freeze,
    Thaw,
    State,
}

impl Part {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "blocks" => Self::Blocks,
            "freeze" => Self::Freeze,
            "thaw" => Self::Thaw,
            "state" => Self::State,
            _ => return None,
        })
    }

    fn methods(self) -> &'static [Method] {
        match self {
            Self::Whole => &[Method::GET, Method::PUT, Method::PATCH],
            Self::Blocks => &[Method::GET],
            Self::Freeze | Self::Thaw => &[Method::PUT],
            Self::State => &[Method::GET, Method::PUT],
        }
    }
}

/// What is after `/hotplug/memory`.
fn memory(path: &str) -> Option<Resource> {
    let first = || FIRST_DEVICE.to_owned();
    let names: Vec<_> = path.split('/').collect();
    Some(match names.as_slice() {
        [""] => Resource::Memory(first(), Part::Whole),
        ["", ""] | ["", "", _] => return None,
        ["", name] => match Part::named(name) {
            Some(part) => Resource::Memory(first(), part),
            None => Resource::Memory((*name).into(), Part::Whole),
        },
        ["", id, part] => Resource::Memory((*id).into(), Part::named(part)?),
        _ => return None,
    })
}

/// A number as it is written in answers, and not in any other way.
pub(super) fn number(text: &str) -> Option<u64> {
    let number = text.parse::<u64>().ok()?;
    (number.to_string() == text).then_some(number)
}

impl Resource {
    pub(super) fn at(path: &str) -> Result<Self, ApiError> {
        Ok(match path {
            "/" => Self::Root,
            "/actions" => Self::Actions,
            "/operations" => Self::Operations,
            "/events" => Self::Events,
            "/metrics" => Self::Metrics,
            path => {
                let device = path.strip_prefix("/hotplug/memory").and_then(memory);
                let id = path.strip_prefix("/operations/");
                let operation = id.and_then(number).map(Self::Operation);
                match device.or(operation) {
                    Some(resource) => resource,
                    None => {
                        let message = format!("there is nothing at {path:?}");
                        return Err(ApiError::new(StatusCode::NOT_FOUND, message));
                    }
                }
            }
        })
    }

    fn methods(&self) -> &'static [Method] {
        match self {
            Self::Root | Self::Events | Self::Metrics => &[Method::GET],
            Self::Actions => &[Method::PUT],
            Self::Memory(_, part) => part.methods(),
            Self::Operations => &[Method::GET, Method::POST],
            Self::Operation(_) => &[Method::GET, Method::DELETE],
        }
    }

    /// Whether there is such a method here.
    pub(super) fn check_method(&self, method: &Method) -> Result<(), ApiError> {
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
    pub(super) fn wait(&self, method: &Method, query: Option<&str>) -> Result<Duration, ApiError> {
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

    /// Bytes a body may well have that is as it must be.
    pub(super) fn body_limit(&self, instance: &Instance) -> usize {
        /// Of a number, and what is between two of them.
        const WORD: u64 = 22;
        /// For all fields of a state but the blocks, names included.
        const FIELDS: u64 = 1024;
        match self {
            Self::Memory(id, Part::State) => {
                let words = instance.block_count(id).unwrap_or(0).div_ceil(64);
                usize::try_from(words.saturating_mul(WORD).saturating_add(FIELDS))
                    .unwrap_or(usize::MAX)
            }
            _ => 0,
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
        let switch = matches!(self, Self::Memory(_, Part::Freeze | Part::Thaw));
        if is(Method::GET) || is(Method::DELETE) || switch {
            no_body(body)?;
        }
        Ok(match self {
            Self::Root => Answer::Json(json!({
                "app_name": "vmem",
                "vmm_version": env!("CARGO_PKG_VERSION"),
                "state": instance.state(),
                "backend": instance.backend(),
                "devices": instance.devices(),
            })),
            Self::Actions => {
                match read::<ActionBody>(body)?.action_type.as_str() {
                    "InstanceStart" => instance.start()?,
                    other => {
                        let message = format!("{other:?} is no action; InstanceStart is");
                        return Err(ApiError::bad_request(message));
                    }
                }
                Answer::Done(None)
            }
            Self::Memory(id, part) => part.answer(method, body, instance, &id)?,
            Self::Operations if is(Method::POST) => {
                let OperationRequest { device, update } = read(body)?;
                let id = device.as_deref().unwrap_or(FIRST_DEVICE);
                let operation = update.resize(instance, id)?;
                Answer::Created(operation.id, described(&operation, instance)?)
            }
            Self::Operations => {
                let operations = instance.operations()?;
                Answer::Json(json!({ "operations": operations }))
            }
            Self::Operation(id) if is(Method::DELETE) => {
                let operation = instance.with_operation(id, |device| device.cancel(id))?;
                Answer::Json(described(&operation, instance)?)
            }
            Self::Operation(id) => {
                let operation = instance.with_operation(id, |device| device.operation(id))?;
                Answer::Json(described(&operation, instance)?)
            }
            Self::Metrics => Answer::Metrics(metrics::render(instance)),
            // The server's business: it has no end.
            Self::Events => Answer::Done(None),
        })
    }
}

impl Part {
    fn answer(
        self,
        method: &Method,
        body: &Bytes,
        instance: &Instance,
        id: &str,
    ) -> Result<Answer, ApiError> {
        let put = *method == Method::PUT;
        Ok(match self {
            Self::Whole if put => {
                let config: MemoryConfig = read(body)?;
                instance.configure(id, |options| config.apply(options))?;
                Answer::Done(None)
            }
            Self::Whole if *method == Method::PATCH => {
                let operation = read::<SizeUpdate>(body)?.resize(instance, id)?;
                Answer::Done(Some(operation.id))
            }
            Self::Whole => Answer::Json(json!(instance.memory(id)?)),
            Self::Blocks => Answer::Json(blocks(instance, id)?),
            Self::Freeze => {
                instance.with(id, Controller::freeze)?;
                Answer::Done(None)
            }
            Self::Thaw => {
                instance.with(id, Controller::thaw)?;
                Answer::Done(None)
            }
            Self::State if put => {
                instance.restore(id, read(body)?)?;
                Answer::Done(None)
            }
            Self::State => Answer::Json(json!(instance.with(id, Controller::save)??)),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    // An enum would be taken from an object as well.
    action_type: String,
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
    fn apply(&self, options: &mut DeviceOptions) {
        options.region = bytes(self.total_size_mib);
        options.block_size = self.block_size_mib.map_or(2 * MIB, bytes);
        options.slot_size = self.slot_size_mib.map(bytes);
    }
}

fn bytes(mib: u32) -> u64 {
    u64::from(mib) * MIB
}

/// The body of `PATCH /hotplug/memory`: an object with one of these.
#[derive(Deserialize)]
#[serde(try_from = "SizeFields")]
enum SizeUpdate {
    Mib(u32),
    Bytes(Size),
}

/// The body of `POST /operations`: besides, the device, if it is not the first.
#[derive(Deserialize)]
#[serde(try_from = "OperationFields")]
struct OperationRequest {
    device: Option<String>,
    update: SizeUpdate,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeFields {
    requested_size_mib: Option<u32>,
    requested_size: Option<Size>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OperationFields {
    device: Option<String>,
    requested_size_mib: Option<u32>,
    requested_size: Option<Size>,
}

impl TryFrom<SizeFields> for SizeUpdate {
    type Error = &'static str;

    fn try_from(fields: SizeFields) -> Result<Self, Self::Error> {
        match (fields.requested_size_mib, fields.requested_size) {
            (Some(mib), None) => Ok(Self::Mib(mib)),
            (None, Some(size)) => Ok(Self::Bytes(size)),
            _ => Err("one of requested_size_mib and requested_size is needed"),
        }
    }
}

impl TryFrom<OperationFields> for OperationRequest {
    type Error = &'static str;

    fn try_from(fields: OperationFields) -> Result<Self, Self::Error> {
        let size = SizeFields {
            requested_size_mib: fields.requested_size_mib,
            requested_size: fields.requested_size,
        };
        Ok(Self {
            device: fields.device,
            update: size.try_into()?,
        })
    }
}

impl SizeUpdate {
    fn resize(&self, instance: &Instance, id: &str) -> Result<Operation, ApiError> {
        let size = match *self {
            Self::Mib(mib) => bytes(mib),
            Self::Bytes(Size(bytes)) => bytes,
        };
        Ok(instance.with(id, |device| device.resize(size))??)
    }
}

/// An operation, and what keeps it from its end.
fn described(operation: &Operation, instance: &Instance) -> Result<Value, ApiError> {
    let mut value = json!(operation);
    let reason = match operation.state.is_final() {
        true => None,
        false => instance.reason(&operation.device)?,
    };
    value["reason"] = json!(reason);
    Ok(value)
}

fn blocks(instance: &Instance, id: &str) -> Result<Value, ApiError> {
    let (geometry, plugged, guest) = instance.blocks(id)?;
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
    // Read in two steps: fields would be taken from an array as well, by their order.
    let fields: serde_json::Map<String, Value> =
        serde_json::from_slice(body).map_err(ApiError::bad_request)?;
    T::deserialize(Value::Object(fields)).map_err(ApiError::bad_request)
}

fn no_body(body: &Bytes) -> Result<(), ApiError> {
    match body.is_empty() {
        true => Ok(()),
        false => Err(ApiError::bad_request("this takes no body")),
    }
}

//! What the commands of `vmem` send to the API.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::text::clean;

/// How long an answer may take, if nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Before another attempt to connect.
const QUEUE_FULL: Duration = Duration::from_millis(10);

/// Before another look for a server.
const NOT_THERE: Duration = Duration::from_millis(50);

/// Bytes of an event at the most.
const MAX_LINE: usize = 1 << 20;

/// A request was not done.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves there.
    #[error("{}: nobody serves the control API there", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    /// The connection broke.
    #[error("control API")]
    Http(#[from] hyper::Error),
    /// There is no answer.
    #[error("control API: no answer in {0:?}")]
    Late(Duration),
    /// The server has refused. Fit to be shown.
    #[error("{message}")]
    Refused {
        /// The status code.
        status: u16,
        /// Why.
        message: String,
    },
    /// Not what the API says.
    #[error("the server does not speak the control API: {0}")]
    Protocol(String),
    /// The host lacks something.
    #[error("control API")]
    Host(#[from] io::Error),
}

/// Sends one request to the API at `socket` and waits for the answer, for `patience` at the most; `Null` if that has no
/// body.
///
/// # Errors
///
/// [`ClientError`].
pub fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
    patience: Duration,
) -> Result<Value, ClientError> {
    on_runtime(patience, call(socket, method, path, body))
}

/// Waits until somebody listens at `socket`, for `patience` at the most. That nobody does is for the next request to
/// find out.
///
/// # Errors
///
/// If the host lacks something.
pub fn await_server(socket: &Path, patience: Duration) -> Result<(), ClientError> {
    let listens = async {
        while let Err(ClientError::Connect(_, error)) = connect(socket).await
            && matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            )
        {
            sleep(NOT_THERE).await;
        }
        Ok(())
    };
    match on_runtime(patience, listens) {
        Err(ClientError::Late(_)) => Ok(()),
        listens => listens,
    }
}

/// As [`request`], in a program that has a runtime, for however long it takes.
///
/// # Errors
///
/// [`ClientError`].
pub async fn call(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, ClientError> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(Bytes::from(body))
        .map_err(protocol)?;
    let (head, body) = send(socket, request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    let value = match body.is_empty() {
        true => Value::Null,
        false => json(&body)?,
    };
    match head.status.is_success() {
        true => Ok(value),
        false => Err(refused(head.status, &value)),
    }
}

/// Tells `on_event` what happens after the event with the number `after`, or from now on without it, and its number,
/// until there will be no more. Of events that were lost to us it is told without one.
///
/// # Errors
///
/// [`ClientError`].
pub async fn events(
    socket: &Path,
    after: Option<u64>,
    mut on_event: impl FnMut(Option<u64>, Value),
) -> Result<(), ClientError> {
    let mut request = Request::builder().uri("/events");
    if let Some(after) = after {
        request = request.header("last-event-id", after);
    }
    let request = request.body(Bytes::new()).map_err(protocol)?;
    let (head, mut body) = send(socket, request).await?.into_parts();
    if !head.status.is_success() {
        let value: Value = json(&body.collect().await?.to_bytes()).unwrap_or_default();
        return Err(refused(head.status, &value));
    }
    let mut text = Vec::new();
    let mut id = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            if text.len() + line.len() > MAX_LINE {
                return Err(protocol("an event without an end"));
            }
            text.extend_from_slice(line);
            if text.last() == Some(&b'\n') {
                // An event is a number and then what it is, each in a line of its own.
                if let Some(number) = text.strip_prefix(b"id: ") {
                    id = Some(json(number)?);
                } else if let Some(data) = text.strip_prefix(b"data: ") {
                    on_event(id.take(), json(data)?);
                }
                text.clear();
            }
        }
    }
    Ok(())
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(protocol)
}

/// What a server says may be anything.
fn protocol(error: impl ToString) -> ClientError {
    ClientError::Protocol(clean(&error.to_string()))
}

fn refused(status: StatusCode, body: &Value) -> ClientError {
    let message = body["fault_message"].as_str().unwrap_or("no reason given");
    ClientError::Refused {
        status: status.as_u16(),
        message: clean(message),
    }
}

/// Sends one request, on a connection of its own, and waits for the whole answer, whatever that is, for two minutes at
/// the most.
///
/// # Errors
///
/// [`ClientError`] if there is none.
pub fn exchange(socket: &Path, request: Request<Bytes>) -> Result<Response<Bytes>, ClientError> {
    on_runtime(PATIENCE, async {
        let (head, body) = send(socket, request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    })
}

fn on_runtime<T>(
    patience: Duration,
    exchange: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let answer = timeout(patience, exchange).await;
        answer.unwrap_or(Err(ClientError::Late(patience)))
    })
}

async fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    let connected = loop {
        match UnixStream::connect(socket).await {
            // More clients wait than the kernel has room for.
            Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(QUEUE_FULL).await,
            connected => break connected,
        }
    };
    connected.map_err(|error| ClientError::Connect(socket.to_owned(), error))
}

/// Sends one request, on a connection of its own.
async fn send(socket: &Path, request: Request<Bytes>) -> Result<Response<Incoming>, ClientError> {
    let stream = connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer's body, or with an error that the request gets too.
    tokio::spawn(connection);
    let (mut head, body) = request.into_parts();
    let host = HeaderValue::from_static("localhost");
    head.headers.entry(HOST).or_insert(host);
    let request = Request::from_parts(head, Full::new(body));
    Ok(sender.send_request(request).await?)
}

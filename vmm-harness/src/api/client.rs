//! What the commands of `vmem` send to the API.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;

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
    /// The server has refused.
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

/// Sends one request to the API at `socket` and waits for the answer; `Null` if that has no body.
///
/// # Errors
///
/// [`ClientError`].
pub fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, ClientError> {
    on_runtime(call(socket, method, path, body))
}

/// As [`request`], in a program that has a runtime.
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
        .map_err(|error| ClientError::Protocol(error.to_string()))?;
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

/// Tells `on_event` what happens from now on, first `Null` when the server has begun to listen, until there will be no
/// more.
///
/// # Errors
///
/// [`ClientError`].
pub async fn events(socket: &Path, mut on_event: impl FnMut(Value)) -> Result<(), ClientError> {
    let request = Request::builder()
        .uri("/events")
        .body(Bytes::new())
        .map_err(|error| ClientError::Protocol(error.to_string()))?;
    let (head, mut body) = send(socket, request).await?.into_parts();
    if !head.status.is_success() {
        let value = json(&body.collect().await?.to_bytes()).unwrap_or_default();
        return Err(refused(head.status, &value));
    }
    on_event(Value::Null);
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            if text.len() + line.len() > MAX_LINE {
                return Err(ClientError::Protocol("an event without an end".into()));
            }
            text.extend_from_slice(line);
            if text.last() == Some(&b'\n') {
                if let Some(data) = text.strip_prefix(b"data: ") {
                    on_event(json(data)?);
                }
                text.clear();
            }
        }
    }
    Ok(())
}

fn json(body: &[u8]) -> Result<Value, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Protocol(error.to_string()))
}

fn refused(status: StatusCode, body: &Value) -> ClientError {
    let message = body["fault_message"].as_str().unwrap_or("no reason given");
    ClientError::Refused {
        status: status.as_u16(),
        message: message.to_owned(),
    }
}

/// Sends one request, on a connection of its own, and waits for the whole answer, whatever that is.
///
/// # Errors
///
/// [`ClientError`] if there is none.
pub fn exchange(socket: &Path, request: Request<Bytes>) -> Result<Response<Bytes>, ClientError> {
    on_runtime(async {
        let (head, body) = send(socket, request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    })
}

fn on_runtime<T>(exchange: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(exchange)
}

/// Sends one request, on a connection of its own.
async fn send(socket: &Path, request: Request<Bytes>) -> Result<Response<Incoming>, ClientError> {
    let connected = UnixStream::connect(socket).await;
    let stream = connected.map_err(|error| ClientError::Connect(socket.to_owned(), error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer's body, or with an error that the request gets too.
    tokio::spawn(connection);
    let (mut head, body) = request.into_parts();
    let host = HeaderValue::from_static("localhost");
    head.headers.entry(HOST).or_insert(host);
    let request = Request::from_parts(head, Full::new(body));
    Ok(sender.send_request(request).await?)
}

//! What the commands of `vmem` send to the API.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// Longer than the commands ask the server to wait.
const PATIENCE: Duration = Duration::from_secs(120);

/// Before another attempt to connect.
const QUEUE_FULL: Duration = Duration::from_millis(10);

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
    #[error("control API: no answer in {} s", PATIENCE.as_secs())]
    Late,
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
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(Bytes::from(body))
        .map_err(|error| ClientError::Protocol(error.to_string()))?;
    let (head, body) = exchange(socket, request)?.into_parts();
    let value = match body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&body)
            .map_err(|error| ClientError::Protocol(error.to_string()))?,
    };
    if head.status.is_success() {
        return Ok(value);
    }
    let message = value["fault_message"].as_str().unwrap_or("no reason given");
    Err(ClientError::Refused {
        status: head.status.as_u16(),
        message: message.to_owned(),
    })
}

/// Sends one request, on a connection of its own, and waits for the whole answer, whatever that is, for two minutes at the
/// most.
///
/// # Errors
///
/// [`ClientError`] if there is none.
pub fn exchange(socket: &Path, request: Request<Bytes>) -> Result<Response<Bytes>, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let exchange = async {
        let connected = loop {
            match UnixStream::connect(socket).await {
                // More clients wait than the kernel has room for.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(QUEUE_FULL).await,
                connected => break connected,
            }
        };
        let stream = connected.map_err(|error| ClientError::Connect(socket.to_owned(), error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with `sender`, or with an error that the request gets too.
        tokio::spawn(connection);
        let (mut head, body) = request.into_parts();
        let host = HeaderValue::from_static("localhost");
        head.headers.entry(HOST).or_insert(host);
        let request = Request::from_parts(head, Full::new(body));
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    };
    runtime.block_on(async {
        let answer = timeout(PATIENCE, exchange).await;
        answer.unwrap_or(Err(ClientError::Late))
    })
}

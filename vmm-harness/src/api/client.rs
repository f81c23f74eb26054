//! What the commands of `vmem` send to the API.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;

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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| ClientError::Protocol(error.to_string()))?;
    runtime.block_on(send(socket, request))
}

async fn send(socket: &Path, request: Request<Full<Bytes>>) -> Result<Value, ClientError> {
    let connected = UnixStream::connect(socket).await;
    let stream = connected.map_err(|error| ClientError::Connect(socket.to_owned(), error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with `sender`, or with an error that the request gets too.
    tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
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

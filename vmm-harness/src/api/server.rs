//! Connections, limits and time-outs.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::pin::pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, interval, timeout, timeout_at};
use tokio_io_timeout::TimeoutWriter;

use super::metrics;
use super::peer::Peer;
use super::routes::{Answer, ApiError, Resource, number};
use super::stream::{EventStream, Source};
use crate::control::{Instance, InstanceError};
use crate::socket::ServerSocket;

/// How often metrics are put in order.
const UPKEEP: Duration = Duration::from_secs(5);

/// How long a wait sleeps before it looks again, whatever it has heard.
const WAIT_INTERVAL: Duration = Duration::from_secs(1);

/// What a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; others wait to be accepted.
    pub connections: usize,
    /// Event streams at a time; another is answered 429.
    pub streams: usize,
    /// Bytes of a body, or, if that is more, of the largest state the device can have; a larger one is answered 413.
    pub body: usize,
    /// For the head of a request, and between two requests; then the connection is closed.
    pub head_time: Duration,
    /// For the body of a request; then it is answered 408.
    pub body_time: Duration,
    /// For a client to read some of what it is sent; then the connection is closed.
    pub read_time: Duration,
    /// For all clients to read what they are sent when the server stops.
    pub stop_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            streams: 8,
            body: 1 << 20,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(10),
            read_time: Duration::from_secs(10),
            stop_time: Duration::from_secs(1),
        }
    }
}

/// Serves the API of one instance until it is stopped or dropped.
#[derive(Debug)]
pub struct ApiServer {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _socket: ServerSocket,
}

struct Api {
    instance: Arc<Instance>,
    limits: Limits,
    connections: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

type Body = Either<Full<Bytes>, EventStream>;

impl ApiServer {
    /// Serves `instance` at `socket`, on a thread of its own.
    ///
    /// # Errors
    ///
    /// Where the host lacks something.
    pub fn start(
        socket: ServerSocket,
        instance: Arc<Instance>,
        limits: Limits,
    ) -> io::Result<Self> {
        metrics::recorder();
        let listener = StdListener::from(socket.listener()?);
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // A connection has one request at a time, so that none waits for what another is about.
            .max_blocking_threads(limits.connections)
            .build()?;
        let (stop, stopped) = watch::channel(false);
        let api = Arc::new(Api {
            instance,
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            streams: Arc::new(Semaphore::new(limits.streams)),
            stopped,
        });
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    end = accept(listener, &api) => if let Err(error) = end {
                        log::error!("control API: {error}");
                    },
                    () = api.stopped() => {}
                }
                // Until nobody is connected any more.
                let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
                if timeout(limits.stop_time, api.connections.acquire_many(all))
                    .await
                    .is_err()
                {
                    log::debug!("control API: clients do not read their answers");
                }
            });
        };
        Ok(Self {
            stop,
            thread: Some(
                thread::Builder::new()
                    .name("vmem-api".into())
                    .spawn(serve)?,
            ),
            _socket: socket,
        })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the control API panicked");
        }
    }
}

async fn accept(listener: StdListener, api: &Arc<Api>) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    tokio::spawn(async {
        let mut ticks = interval(UPKEEP);
        loop {
            ticks.tick().await;
            if let Some(recorder) = metrics::recorder() {
                recorder.run_upkeep();
            }
        }
    });
    loop {
        let permit = Arc::clone(&api.connections).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Of the one client, or for want of descriptors, which may come back.
            Err(error) => {
                log::warn!("control API: {error}");
                tokio::time::sleep(WAIT_INTERVAL).await;
                continue;
            }
        };
        let api = Arc::clone(api);
        tokio::spawn(async move {
            if let Err(error) = serve_connection(stream, api).await {
                log::debug!("control API: {error}");
            }
            drop(permit);
        });
    }
}

async fn serve_connection(stream: UnixStream, api: Arc<Api>) -> Result<(), Box<dyn Error>> {
    let peer = Arc::new(Peer::of(&stream)?);
    // Who reads nothing would keep its place, and events, for ever.
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(api.limits.read_time));
    let service = service_fn(|request| {
        let (api, peer) = (Arc::clone(&api), Arc::clone(&peer));
        async move { Ok::<_, Infallible>(api.respond(request, peer).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(api.limits.head_time)
        .max_buf_size(16 << 10)
        // `nc -N` and the like.
        .half_close(true)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let mut served = pin!(served);
    tokio::select! {
        served = &mut served => return Ok(served?),
        () = api.stopped() => served.as_mut().graceful_shutdown(),
    }
    Ok(served.await?)
}

impl Api {
    async fn stopped(&self) {
        // An error is that the server is gone.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    async fn respond(&self, request: Request<Incoming>, peer: Arc<Peer>) -> Response<Body> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let response = self.answer(request, peer).await.unwrap_or_else(|error| {
            let mut response = json(error.status, &error.body());
            if let Some(allow) = &error.allow {
                header(&mut response, ALLOW, allow);
            }
            response
        });
        log::debug!("{method} {uri}: {}", response.status());
        response
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: Arc<Peer>,
    ) -> Result<Response<Body>, ApiError> {
        let (head, body) = request.into_parts();
        let resource = Resource::at(head.uri.path())?;
        resource.check_method(&head.method)?;
        let wait = resource.wait(&head.method, head.uri.query())?;
        let limit = resource.body_limit(&self.instance).max(self.limits.body);
        let body = self.read(body, limit).await?;
        if resource == Resource::Events {
            return self.events(&head.headers, &body, peer);
        }
        if let Resource::Operation(id) = &resource
            && !wait.is_zero()
        {
            tokio::select! {
                waited = self.wait(*id, wait) => waited?,
                // Who has gone is answered, too: that is how the connection ends.
                () = peer.gone() => {}
                () = self.stopped() => {}
            }
        }
        let instance = Arc::clone(&self.instance);
        let answer = spawn_blocking(move || resource.answer(&head.method, &body, &instance)).await;
        let answer = answer.map_err(|error| {
            let message = format!("the server has a bug: {error}");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
        })??;
        Ok(respond(answer))
    }

    async fn read(&self, body: Incoming, limit: usize) -> Result<Bytes, ApiError> {
        let too_large = || {
            let message = format!("a body of more than {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        };
        // What it says itself; not a byte of it need come.
        if body.size_hint().lower() > limit as u64 {
            return too_large();
        }
        let whole = Limited::new(body, limit).collect();
        match timeout(self.limits.body_time, whole).await {
            Ok(Ok(whole)) => Ok(whole.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => too_large(),
            Ok(Err(error)) => Err(ApiError::bad_request(error)),
            Err(_) => {
                let message = "the body did not come in time";
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }

    /// Until the operation has ended, or for as long as it says.
    async fn wait(&self, id: u64, wait: Duration) -> Result<(), ApiError> {
        let deadline = Instant::now() + wait;
        let mut events = self.instance.events().listen(None);
        loop {
            let operation = self
                .instance
                .with_operation(id, |device| device.operation(id));
            if operation?.state.is_final() || Instant::now() >= deadline {
                return Ok(());
            }
            // What the event says does not matter, nor that some were lost: each is worth a look.
            let look = deadline.min(Instant::now() + WAIT_INTERVAL);
            if let Ok(None) = timeout_at(look, events.next()).await {
                return Err(InstanceError::Ended.into());
            }
        }
    }

    fn events(
        &self,
        headers: &HeaderMap,
        body: &Bytes,
        peer: Arc<Peer>,
    ) -> Result<Response<Body>, ApiError> {
        let after = headers.get("last-event-id");
        let after = after.map(|after| number(after.to_str().ok()?));
        let after = match after {
            Some(None) => return Err(ApiError::bad_request("Last-Event-ID is none of ours")),
            after => after.flatten(),
        };
        if !body.is_empty() {
            return Err(ApiError::bad_request("this takes no body"));
        }
        let permit = Arc::clone(&self.streams).try_acquire_owned();
        let permit = permit.map_err(|_| {
            let message = format!("there are {} event streams already", self.limits.streams);
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
        })?;
        let stream = EventStream::new(Source {
            events: self.instance.events().listen(after),
            peer,
            stopped: self.stopped.clone(),
            _permit: permit,
        });
        let mut response = Response::new(Either::Right(stream));
        header(&mut response, CONTENT_TYPE, "text/event-stream");
        header(&mut response, CACHE_CONTROL, "no-store");
        Ok(response)
    }
}

fn respond(answer: Answer) -> Response<Body> {
    let location = |response: &mut Response<Body>, id: u64| {
        header(response, LOCATION, &format!("/operations/{id}"));
    };
    match answer {
        Answer::Done(operation) => {
            let mut response = Response::new(Either::Left(Full::default()));
            *response.status_mut() = StatusCode::NO_CONTENT;
            if let Some(id) = operation {
                location(&mut response, id);
            }
            response
        }
        Answer::Json(value) => json(StatusCode::OK, &value),
        Answer::Created(id, value) => {
            let mut response = json(StatusCode::CREATED, &value);
            location(&mut response, id);
            response
        }
        Answer::Metrics(text) => {
            let mut response = Response::new(Either::Left(Full::from(text)));
            header(&mut response, CONTENT_TYPE, "text/plain; version=0.0.4");
            response
        }
    }
}

fn json(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::from(format!("{value}\n"))));
    *response.status_mut() = status;
    header(&mut response, CONTENT_TYPE, "application/json");
    response
}

fn header(response: &mut Response<Body>, name: hyper::header::HeaderName, value: &str) {
    // Made here, of visible characters.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

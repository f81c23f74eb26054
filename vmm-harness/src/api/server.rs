//! Connections, limits, time-outs and event streams.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, interval, timeout, timeout_at};
use tokio_io_timeout::TimeoutWriter;

use super::metrics;
use super::routes::{Answer, ApiError, Resource};
use crate::control::{Instance, InstanceError, Listener};
use crate::socket::ServerSocket;

/// How often a stream without events says that it is still there, and metrics are put in order.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a wait sleeps before it looks again, whatever it has heard.
const WAIT_INTERVAL: Duration = Duration::from_secs(1);

/// What a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; others wait to be accepted.
    pub connections: usize,
    /// Event streams at a time; another is answered 429.
    pub streams: usize,
    /// Bytes of a body; a larger one is answered 413.
    pub body: usize,
    /// For the head of a request, and between two requests; then the connection is closed.
    pub head_time: Duration,
    /// For the body of a request; then it is answered 408.
    pub body_time: Duration,
    /// For a client to read some of what it is sent; then the connection is closed.
    pub read_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            streams: 8,
            // The state of a TiB in blocks of 2 MiB is a fifth of it.
            body: 1 << 20,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(10),
            read_time: Duration::from_secs(10),
        }
    }
}

/// Serves the API of one instance until it is stopped or dropped.
#[derive(Debug)]
pub struct ApiServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _socket: ServerSocket,
}

struct Api {
    instance: Arc<Instance>,
    limits: Limits,
    connections: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

type Body = Either<Full<Bytes>, Channel<Bytes>>;

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
            // What they do takes a quarter of a second at the most.
            .max_blocking_threads(4)
            .build()?;
        let api = Arc::new(Api {
            instance,
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            streams: Arc::new(Semaphore::new(limits.streams)),
        });
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            let end = runtime.block_on(async {
                tokio::select! {
                    end = accept(listener, api) => end,
                    _ = stopped => Ok(()),
                }
            });
            if let Err(error) = end {
                log::error!("control API: {error}");
            }
        };
        Ok(Self {
            stop: Some(stop),
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
        // An error is that it has ended.
        let _ = self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the control API panicked");
        }
    }
}

async fn accept(listener: StdListener, api: Arc<Api>) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    tokio::spawn(async {
        let mut ticks = interval(HEARTBEAT);
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
        let api = Arc::clone(&api);
        tokio::spawn(async move {
            serve_connection(stream, api).await;
            drop(permit);
        });
    }
}

async fn serve_connection(stream: UnixStream, api: Arc<Api>) {
    let head_time = api.limits.head_time;
    // Who reads nothing would keep its place, and events, for ever.
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(api.limits.read_time));
    let service = service_fn(move |request| {
        let api = Arc::clone(&api);
        async move { Ok::<_, Infallible>(api.respond(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_time)
        .max_buf_size(16 << 10)
        // `nc -N` and the like.
        .half_close(true)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
        .await;
    if let Err(error) = served {
        log::debug!("control API: {error}");
    }
}

impl Api {
    async fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let response = self.answer(request).await.unwrap_or_else(|error| {
            let mut response = json(error.status, &error.body());
            if let Some(allow) = &error.allow {
                header(&mut response, ALLOW, allow);
            }
            response
        });
        log::debug!("{method} {uri}: {}", response.status());
        response
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
        let (head, body) = request.into_parts();
        let resource = Resource::at(head.uri.path())?;
        resource.check_method(&head.method)?;
        let wait = resource.wait(&head.method, head.uri.query())?;
        let body = self.read(body).await?;
        if resource == Resource::Events {
            return self.events(&head.headers, &body);
        }
        if let Resource::Operation(id) = &resource
            && !wait.is_zero()
        {
            self.wait(*id, wait).await?;
        }
        let instance = Arc::clone(&self.instance);
        let answer = spawn_blocking(move || resource.answer(&head.method, &body, &instance)).await;
        let answer = answer.map_err(|error| {
            let message = format!("the server has a bug: {error}");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
        })??;
        Ok(respond(answer))
    }

    async fn read(&self, body: Incoming) -> Result<Bytes, ApiError> {
        let whole = Limited::new(body, self.limits.body).collect();
        match timeout(self.limits.body_time, whole).await {
            Ok(Ok(whole)) => Ok(whole.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("a body of more than {} bytes", self.limits.body);
                Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
            }
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

    fn events(&self, headers: &HeaderMap, body: &Bytes) -> Result<Response<Body>, ApiError> {
        let after = headers.get("last-event-id");
        let after = after.map(|after| after.to_str().ok()?.parse().ok());
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
        let (sender, channel) = Channel::new(16);
        let events = self.instance.events().listen(after);
        tokio::spawn(async move {
            stream_events(sender, events).await;
            drop(permit);
        });
        let mut response = Response::new(Either::Right(channel));
        header(&mut response, CONTENT_TYPE, "text/event-stream");
        header(&mut response, CACHE_CONTROL, "no-store");
        Ok(response)
    }
}

/// Sends events until nobody reads them or there will be no more.
async fn stream_events(mut sender: Sender<Bytes>, mut events: Listener) {
    // At once, so that a client knows from when on it misses nothing.
    let mut text = String::from(": connected\n\n");
    while sender.send_data(Bytes::from(text)).await.is_ok() {
        text = match timeout(HEARTBEAT, events.next()).await {
            Ok(Some((lost, id, event))) => {
                // Without a number of its own: who comes back asks for what is after the last event it has.
                let missed = match lost {
                    0 => String::new(),
                    lost => format!("data: {{\"event\":\"missed\",\"count\":{lost}}}\n\n"),
                };
                // Fields, strings and numbers: there is nothing that could fail.
                let data = serde_json::to_string(&event).unwrap_or_default();
                format!("{missed}id: {id}\ndata: {data}\n\n")
            }
            Ok(None) => return,
            Err(_) => String::from(": nothing new\n\n"),
        };
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

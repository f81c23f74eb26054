//! A server with a guest in the test's process, and what is asked of both.

use std::io::{BufRead, BufReader, ErrorKind, Lines, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use hyper::{Method, Request, Response};
use serde_json::{Value, json};
use vmm_harness::api::client::exchange;
use vmm_harness::api::{ApiServer, Limits};
use vmm_harness::control::{DeviceOptions, GuestOptions, Instance};
use vmm_harness::demo::DemoOptions;
use vmm_harness::vfio_user::ServerSocket;
use vmm_harness::{GuestKind, open_kvm};

pub(crate) const MIB: u64 = 1 << 20;

/// Bytes of a body the servers here take.
pub(crate) const BODY_LIMIT: usize = 32 << 10;

/// For a server that is broken; nothing here depends on how fast the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Times are short only where a test waits for them to be over.
pub(crate) const LIMITS: Limits = Limits {
    connections: 32,
    streams: 2,
    body: BODY_LIMIT,
    head_time: PATIENCE,
    body_time: PATIENCE,
    read_time: PATIENCE,
    stop_time: PATIENCE,
};

/// A server, and the guest it controls.
pub(crate) struct Rig {
    pub(crate) socket: PathBuf,
    pub(crate) instance: Arc<Instance>,
    pub(crate) server: Option<ApiServer>,
}

impl Rig {
    /// A guest of 256 MiB that can have 512 MiB more, and has no work to do unless told so.
    pub(crate) fn new(guest: GuestKind, worker_pages: u64) -> Self {
        Self::with(guest, worker_pages, &[])
    }

    /// As [`new`](Self::new), with a second device, mem1, that is on node 1.
    pub(crate) fn with_two(guest: GuestKind, worker_pages: u64) -> Self {
        let second = DeviceOptions {
            region: 512 * MIB,
            node_id: Some(1),
            ..DeviceOptions::new("mem1")
        };
        Self::with(guest, worker_pages, &[second])
    }

    pub(crate) fn with(guest: GuestKind, worker_pages: u64, others: &[DeviceOptions]) -> Self {
        Self::limited(guest, worker_pages, others, LIMITS)
    }

    pub(crate) fn limited(
        guest: GuestKind,
        worker_pages: u64,
        others: &[DeviceOptions],
        limits: Limits,
    ) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmem-api-{}-{number}.sock", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let options = DemoOptions {
            region: 512 * MIB,
            node_id: (!others.is_empty()).then_some(0),
            targets: Some(vec![0]),
            guest,
            worker_pages,
            ..DemoOptions::default()
        };
        let instance =
            Arc::new(Instance::new(GuestOptions::new(options, others.to_vec())).unwrap());
        let listener = ServerSocket::bind(&socket).unwrap();
        let server = ApiServer::start(listener, Arc::clone(&instance), limits).unwrap();
        Self {
            socket,
            instance,
            server: Some(server),
        }
    }

    pub(crate) fn started(guest: GuestKind, worker_pages: u64) -> Self {
        let rig = Self::new(guest, worker_pages);
        rig.instance.start().unwrap();
        rig
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Response<Bytes> {
        let request = Request::builder()
            .method(Method::from_bytes(method.as_bytes()).unwrap())
            .uri(path)
            .body(body.into())
            .unwrap();
        let answer = exchange(&self.socket, request);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Status and body of an answer in JSON.
    pub(crate) fn json(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let answer = self.send(method, path, body);
        let value = serde_json::from_slice(answer.body()).unwrap_or(Value::Null);
        (answer.status().as_u16(), value)
    }

    /// Status of an answer to a `PUT` without a body.
    pub(crate) fn put(&self, path: &str) -> u16 {
        self.json("PUT", path, &Value::Null).0
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, value) = self.json("GET", path, &Value::Null);
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    /// Asks for a size, and waits until it is there.
    pub(crate) fn resize(&self, bytes: u64) {
        self.resize_device("mem0", bytes);
    }

    pub(crate) fn resize_device(&self, device: &str, bytes: u64) {
        let body = json!({"device": device, "requested_size": bytes});
        let (status, operation) = self.json("POST", "/operations", &body);
        assert_eq!(status, 201, "{operation}");
        let ended = self.get(&format!("/operations/{}?wait=1m", operation["id"]));
        assert_eq!(ended["state"], "settled", "{ended}");
    }

    /// Bytes as they are, and then no more, on a connection of their own; everything that comes back until the server
    /// closes it.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that has refused the beginning need not read the rest.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        read_all(&mut stream)
    }

    /// A connection on which no read lasts forever.
    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The lines of an event stream, from its beginning on: nothing is missed.
    pub(crate) fn events(&self, last_id: Option<u64>) -> Lines<BufReader<UnixStream>> {
        let mut stream = self.connect();
        let last_id = last_id.map(|id| format!("Last-Event-ID: {id}\r\n"));
        let head = last_id.unwrap_or_default();
        write!(stream, "GET /events HTTP/1.1\r\nHost: vmem\r\n{head}\r\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        let begin = lines.by_ref().map(Result::unwrap);
        let head: Vec<_> = begin.take_while(|line| line != ": connected").collect();
        assert!(head[0].starts_with("HTTP/1.1 200"), "{head:?}");
        let content_type = "content-type: text/event-stream";
        assert!(
            head.iter()
                .any(|line| line.eq_ignore_ascii_case(content_type)),
            "{head:?}"
        );
        lines
    }

    /// The status of a device once the guest's driver is at rest, and has said so: until then each look is another.
    pub(crate) fn at_rest(&self, id: &str) -> Value {
        until(|| {
            let status = self.get(&format!("/hotplug/memory/{id}"));
            let guest = &status["guest"];
            let knows = guest["plugged_size"] == status["plugged_size"];
            (guest["driver_state"] == "settled" && knows).then_some(status)
        })
    }

    /// All there is to know of a guest that is at rest or has not started, but for what it counts while it runs.
    pub(crate) fn state(&self) -> Value {
        let devices = self.instance.devices();
        if self.get("/")["state"] == "Running" {
            devices.iter().for_each(|id| drop(self.at_rest(id)));
        }
        let blocks = match self.json("GET", "/hotplug/memory/blocks", &Value::Null) {
            (200, blocks) => blocks,
            (status, _) => json!(status),
        };
        let operations = self.json("GET", "/operations", &Value::Null);
        let devices = devices
            .iter()
            .map(|id| self.get(&format!("/hotplug/memory/{id}")));
        json!([
            self.get("/"),
            devices.collect::<Vec<_>>(),
            blocks,
            operations.1
        ])
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.instance.stop();
    }
}

/// What comes until the server closes the connection, however it does that.
pub(crate) fn read_all(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        let late = error.kind() == ErrorKind::WouldBlock;
        assert!(!late, "neither answered nor closed: {answer:?}");
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Runs `test` on a guest in this process, and on KVM where there is KVM.
pub(crate) fn on_both(name: &str, test: fn(GuestKind)) {
    test(GuestKind::InProcess);
    match open_kvm() {
        Ok(_) => test(GuestKind::Kvm),
        Err(reason) => {
            assert!(std::env::var_os("VMEM_REQUIRE_KVM").is_none(), "{reason}");
            // Past the harness, which hides what passing tests print.
            let mut stderr = std::io::stderr().lock();
            writeln!(stderr, "SKIPPED {name} on KVM: {reason}").unwrap();
        }
    }
}

/// Asks again until there is an answer.
pub(crate) fn until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it does not come"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

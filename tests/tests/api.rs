//! The control API: server and document are one, bad requests do no harm, and what it says of a guest is so.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Lines, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, Request, Response};
use integration_tests::openapi::{Document, Endpoint};
use integration_tests::random::{Random, seed};
use serde_json::{Value, json};
use vmm_harness::api::client::exchange;
use vmm_harness::api::{ApiServer, Limits};
use vmm_harness::control::{DeviceOptions, GuestOptions, Instance};
use vmm_harness::demo::DemoOptions;
use vmm_harness::vfio_user::ServerSocket;
use vmm_harness::{GuestKind, open_kvm};

const MIB: u64 = 1 << 20;

/// Bytes of a body the servers here take.
const BODY_LIMIT: usize = 32 << 10;

/// For a server that is broken; nothing here depends on how fast the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Signs of life an event may take.
const HEARTBEATS: usize = 12;

/// Times are short only where a test waits for them to be over.
const LIMITS: Limits = Limits {
    connections: 32,
    streams: 2,
    body: BODY_LIMIT,
    head_time: PATIENCE,
    body_time: PATIENCE,
    read_time: PATIENCE,
    stop_time: PATIENCE,
};

/// A server, and the guest it controls.
struct Rig {
    socket: PathBuf,
    instance: Arc<Instance>,
    server: Option<ApiServer>,
}

impl Rig {
    /// A guest of 256 MiB that can have 512 MiB more, and has no work to do unless told so.
    fn new(guest: GuestKind, worker_pages: u64) -> Self {
        Self::with(guest, worker_pages, &[])
    }

    /// As [`new`](Self::new), with a second device, mem1, that is on node 1.
    fn with_two(guest: GuestKind, worker_pages: u64) -> Self {
        let second = DeviceOptions {
            region: 512 * MIB,
            node_id: Some(1),
            ..DeviceOptions::new("mem1")
        };
        Self::with(guest, worker_pages, &[second])
    }

    fn with(guest: GuestKind, worker_pages: u64, others: &[DeviceOptions]) -> Self {
        Self::limited(guest, worker_pages, others, LIMITS)
    }

    fn limited(
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

    fn started(guest: GuestKind, worker_pages: u64) -> Self {
        let rig = Self::new(guest, worker_pages);
        rig.instance.start().unwrap();
        rig
    }

    fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Response<Bytes> {
        let request = Request::builder()
            .method(Method::from_bytes(method.as_bytes()).unwrap())
            .uri(path)
            .body(body.into())
            .unwrap();
        let answer = exchange(&self.socket, request);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Status and body of an answer in JSON.
    fn json(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let answer = self.send(method, path, body);
        let value = serde_json::from_slice(answer.body()).unwrap_or(Value::Null);
        (answer.status().as_u16(), value)
    }

    /// Status of an answer to a `PUT` without a body.
    fn put(&self, path: &str) -> u16 {
        self.json("PUT", path, &Value::Null).0
    }

    fn get(&self, path: &str) -> Value {
        let (status, value) = self.json("GET", path, &Value::Null);
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    /// Asks for a size, and waits until it is there.
    fn resize(&self, bytes: u64) {
        self.resize_device("mem0", bytes);
    }

    fn resize_device(&self, device: &str, bytes: u64) {
        let body = json!({"device": device, "requested_size": bytes});
        let (status, operation) = self.json("POST", "/operations", &body);
        assert_eq!(status, 201, "{operation}");
        let ended = self.get(&format!("/operations/{}?wait=1m", operation["id"]));
        assert_eq!(ended["state"], "settled", "{ended}");
    }

    /// Bytes as they are, and then no more, on a connection of their own; everything that comes back until the server
    /// closes it.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that has refused the beginning need not read the rest.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        read_all(&mut stream)
    }

    /// A connection on which no read lasts forever.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The lines of an event stream, from its beginning on: nothing is missed.
    fn events(&self, last_id: Option<u64>) -> Lines<BufReader<UnixStream>> {
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
    fn at_rest(&self, id: &str) -> Value {
        until(|| {
            let status = self.get(&format!("/hotplug/memory/{id}"));
            let guest = &status["guest"];
            let knows = guest["plugged_size"] == status["plugged_size"];
            (guest["driver_state"] == "settled" && knows).then_some(status)
        })
    }

    /// All there is to know of a guest that is at rest or has not started, but for what it counts while it runs.
    fn state(&self) -> Value {
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

/// What comes until the server closes the connection, however it does that.
fn read_all(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        let late = error.kind() == ErrorKind::WouldBlock;
        assert!(!late, "neither answered nor closed: {answer:?}");
    }
    String::from_utf8_lossy(&answer).into_owned()
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.instance.stop();
    }
}

/// Runs `test` on a guest in this process, and on KVM where there is KVM.
fn on_both(name: &str, test: fn(GuestKind)) {
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

/// Checks answers against the document, and notes which were seen.
struct Conformance {
    document: Document,
    seen: BTreeSet<(Endpoint, u16)>,
}

impl Conformance {
    fn check(
        &mut self,
        rig: &Rig,
        endpoint: &Endpoint,
        target: &str,
        body: &str,
    ) -> Response<Bytes> {
        let answer = rig.send(&endpoint.method, target, body.to_owned());
        let headers = answer.headers();
        let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap());
        self.check_parts(endpoint, answer.status().as_u16(), &header, answer.body());
        answer
    }

    fn check_parts<'a>(
        &mut self,
        endpoint: &Endpoint,
        status: u16,
        header: &dyn Fn(&str) -> Option<&'a str>,
        body: &[u8],
    ) {
        let document = &self.document;
        let text = String::from_utf8_lossy(body);
        let what = format!("{endpoint:?}: {status} {text}");
        assert!(
            document.statuses(endpoint).contains(&status),
            "undocumented: {what}"
        );
        for name in document.headers(endpoint, status) {
            assert!(header(&name).is_some(), "no {name}: {what}");
        }
        match document.response(endpoint, status) {
            None => assert!(body.is_empty(), "{what}"),
            Some((content_type, schema)) => {
                assert_eq!(header("content-type"), Some(content_type), "{what}");
                if content_type == "application/json" {
                    let value: Value = serde_json::from_slice(body).unwrap();
                    let checked = document
                        .validator(schema)
                        .validate(&value)
                        .map_err(|error| error.to_string());
                    assert_eq!(checked, Ok(()), "{what}");
                }
            }
        }
        self.seen.insert((endpoint.clone(), status));
    }
}

fn endpoint(method: &str, path: &str) -> Endpoint {
    Endpoint {
        path: path.into(),
        method: method.into(),
    }
}

/// Every status of every method of every path in the document is given, with the body and the headers it says.
#[test]
fn server_answers_as_the_document_says() {
    let mut conformance = Conformance {
        document: Document::new(),
        seen: BTreeSet::new(),
    };
    let limits = Limits {
        body_time: Duration::from_millis(200),
        ..LIMITS
    };
    let rig = Rig::limited(GuestKind::InProcess, 64, &[], limits);
    let mut ok =
        |rig: &Rig, method: &str, path: &str, id: &str, query: &str, body: &Value, status: u16| {
            let path_of = path.replace("{id}", id).replace("{device}", id);
            let target = format!("{path_of}{query}");
            let body = match body {
                Value::Null => String::new(),
                body => body.to_string(),
            };
            let answer = conformance.check(rig, &endpoint(method, path), &target, &body);
            assert_eq!(
                answer.status().as_u16(),
                status,
                "{method} {target}: {:?}",
                answer.body()
            );
            serde_json::from_slice(answer.body()).unwrap_or(Value::Null)
        };
    let none = &Value::Null;
    let memory = "/hotplug/memory";
    ok(&rig, "GET", "/", "", "", none, 200);
    assert_eq!(
        ok(&rig, "GET", memory, "", "", none, 200)["state"],
        "Not started"
    );
    let config = json!({"total_size_mib": 1024, "block_size_mib": 4, "slot_size_mib": 256});
    ok(&rig, "PUT", memory, "", "", &config, 204);
    let status = ok(&rig, "GET", memory, "", "", none, 200);
    for (field, value) in config.as_object().unwrap() {
        assert_eq!(&status[field], value, "{field}");
    }
    ok(
        &rig,
        "PUT",
        "/actions",
        "",
        "",
        &json!({"action_type": "InstanceStart"}),
        204,
    );
    assert_eq!(ok(&rig, "GET", "/", "", "", none, 200)["state"], "Running");
    // What Firecracker's clients send, and what they look at.
    ok(
        &rig,
        "PATCH",
        memory,
        "",
        "",
        &json!({"requested_size_mib": 512}),
        204,
    );
    let ended = ok(&rig, "GET", "/operations/{id}", "1", "?wait=60s", none, 200);
    assert_eq!(ended["state"], "settled");
    let status = ok(&rig, "GET", memory, "", "", none, 200);
    assert_eq!(
        (&status["plugged_size_mib"], &status["requested_size_mib"]),
        (&json!(512), &json!(512))
    );
    // The guest knows a moment later than the device.
    until(|| {
        let blocks = ok(&rig, "GET", "/hotplug/memory/blocks", "", "", none, 200);
        let letters = blocks["blocks"].as_str().unwrap();
        ((letters.matches('#').count(), letters.len()) == (128, 256)).then_some(())
    });
    ok(&rig, "GET", "/hotplug/memory/state", "", "", none, 409);
    ok(&rig, "PUT", "/hotplug/memory/freeze", "", "", none, 204);
    let state = ok(&rig, "GET", "/hotplug/memory/state", "", "", none, 200);
    assert_eq!(state["plugged_size"], 512 * MIB);
    // Frozen, it cannot get on, and so can be given up.
    let operation = ok(
        &rig,
        "POST",
        "/operations",
        "",
        "",
        &json!({"requested_size": "1G"}),
        201,
    );
    assert_eq!(operation["reason"], "frozen");
    let cancelled = ok(&rig, "DELETE", "/operations/{id}", "2", "", none, 200);
    assert_eq!(cancelled["state"], "cancelled");
    ok(&rig, "DELETE", "/operations/{id}", "2", "", none, 409);
    ok(&rig, "PUT", "/hotplug/memory/thaw", "", "", none, 204);
    for method in ["GET", "DELETE"] {
        ok(&rig, method, "/operations/{id}", "77", "", none, 404);
    }
    let all = ok(&rig, "GET", "/operations", "", "", none, 200);
    assert_eq!(all["operations"].as_array().unwrap().len(), 2);
    ok(&rig, "GET", "/metrics", "", "", none, 200);
    // In a new instance with the same options.
    let other = Rig::new(GuestKind::InProcess, 64);
    ok(&other, "PUT", memory, "", "", &config, 204);
    ok(&other, "PUT", "/hotplug/memory/state", "", "", &state, 204);
    assert_eq!(
        ok(&other, "GET", memory, "", "", none, 200)["requested_size_mib"],
        512
    );

    let device = "/hotplug/memory/{device}";
    let two = Rig::with_two(GuestKind::InProcess, 0);
    let no = "nobody";
    let size = json!({"requested_size": "64M"});
    let start = json!({"action_type": "InstanceStart"});
    let part = |part: &str| format!("{device}/{part}");
    ok(&two, "PUT", device, "mem1", "", &config, 204);
    ok(&two, "PUT", device, no, "", &config, 404);
    ok(&two, "PUT", &part("state"), no, "", &state, 404);
    ok(&two, "PUT", "/actions", "", "", &start, 204);
    ok(&two, "PATCH", device, "mem1", "", &size, 204);
    ok(&two, "PATCH", device, no, "", &size, 404);
    // Then its driver is there, which might have requests in flight.
    ok(&two, "GET", "/operations/{id}", "1", "?wait=60s", none, 200);
    ok(&two, "GET", &part("state"), "mem1", "", none, 409);
    for (method, name, status) in [
        ("PUT", "freeze", 204),
        ("GET", "state", 200),
        ("PUT", "thaw", 204),
        ("GET", "blocks", 200),
    ] {
        ok(&two, method, &part(name), "mem1", "", none, status);
        ok(&two, method, &part(name), no, "", none, 404);
    }
    let status = ok(&two, "GET", device, "mem1", "", none, 200);
    assert_eq!(
        (&status["id"], &status["node_id"]),
        (&json!("mem1"), &json!(1))
    );
    assert_eq!(status["total_size_mib"], 1024);
    ok(&two, "GET", device, no, "", none, 404);
    let body = json!({"device": no, "requested_size": "64M"});
    ok(&two, "POST", "/operations", "", "", &body, 404);
    // Whatever its name, a device begins as it was saved.
    let other = Rig::new(GuestKind::InProcess, 0);
    ok(&other, "PUT", device, "mem0", "", &config, 204);
    ok(&other, "PUT", &part("state"), "mem0", "", &state, 204);

    // The stream has no end; its head is enough here, and while two are open there is no place for another.
    let _streams = [(); 2].map(|()| rig.events(None));
    let events = endpoint("GET", "/events");
    conformance.seen.insert((events.clone(), 200));
    let answer = conformance.check(&rig, &events, "/events", "");
    assert_eq!(answer.status().as_u16(), 429);

    for endpoint in conformance.document.endpoints() {
        let target = endpoint
            .path
            .replace("{id}", "1")
            .replace("{device}", "mem0");
        conformance.check(&rig, &endpoint, &format!("{target}?no=query"), "");
        let large = " ".repeat(BODY_LIMIT + 1);
        if conformance.document.statuses(&endpoint).contains(&413) {
            conformance.check(&rig, &endpoint, &target, &large);
        }
        if conformance.document.statuses(&endpoint).contains(&408) {
            let method = &endpoint.method;
            let head =
                format!("{method} {target} HTTP/1.1\r\nHost: vmem\r\nContent-Length: 9\r\n\r\n");
            let mut stream = rig.connect();
            stream.write_all(head.as_bytes()).unwrap();
            let answer = read_all(&mut stream);
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let status = head[9..12].parse().unwrap();
            let header = |name: &str| {
                let mut lines = head.lines().filter_map(|line| line.split_once(": "));
                lines
                    .find(|(line, _)| line.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value)
            };
            conformance.check_parts(&endpoint, status, &header, body.as_bytes());
        }
    }
    let documented: BTreeSet<_> = conformance
        .document
        .endpoints()
        .into_iter()
        .flat_map(|endpoint| {
            let statuses = conformance.document.statuses(&endpoint);
            statuses
                .into_iter()
                .map(move |status| (endpoint.clone(), status))
        })
        .collect();
    let never: Vec<_> = documented.difference(&conformance.seen).collect();
    assert!(never.is_empty(), "documented and never answered: {never:?}");
}

/// A request that must be refused.
#[derive(Debug)]
enum Bad {
    Http {
        method: String,
        target: String,
        body: Vec<u8>,
    },
    /// Not HTTP.
    Bytes(Vec<u8>),
}

/// Makes a bad request out of the document.
fn bad_request(document: &Document, random: &mut Random) -> Bad {
    const METHODS: [&str; 9] = [
        "GET", "PUT", "PATCH", "POST", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW",
    ];
    let endpoints = document.endpoints();
    // Most can be wrong in more ways with a body.
    let mut candidates = endpoints.clone();
    if random.one_in(2) {
        candidates.retain(|endpoint| document.request(endpoint).is_some());
    }
    let endpoint = &candidates[random.index(candidates.len())];
    let device = ["mem0", "mem1", "nobody"][random.index(3)];
    let id = random.below(4).to_string();
    let target = endpoint
        .path
        .replace("{id}", &id)
        .replace("{device}", device);
    let http = |method: &str, target: String, body: Vec<u8>| Bad::Http {
        method: method.into(),
        target,
        body,
    };
    let schema = document.request(endpoint);
    match random.below(8) {
        0 => {
            let documented = |method: &&str| {
                endpoints
                    .iter()
                    .any(|other| other.path == endpoint.path && other.method == **method)
            };
            let others: Vec<_> = METHODS
                .into_iter()
                .filter(|method| !documented(method))
                .collect();
            http(others[random.index(others.len())], target, Vec::new())
        }
        1 => {
            let suffix = ["/", "/x", "%00", "/../", "//", ";a=b"][random.index(6)];
            // "/" and "/" are "//"; "/operations/" names no operation.
            http(&endpoint.method, format!("{target}{suffix}"), Vec::new())
        }
        2 => {
            let query = [
                "wait",
                "wait=",
                "wait=-1s",
                "wait=2h",
                "wait=1",
                "x=y",
                "wait=1s&x=y",
            ][random.index(7)];
            let body = schema.map_or(String::new(), |schema| {
                document.example(schema, random).to_string()
            });
            http(
                &endpoint.method,
                format!("{target}?{query}"),
                body.into_bytes(),
            )
        }
        3 => Bad::Bytes(broken_http(random)),
        4 if random.one_in(4) => http(&endpoint.method, target, vec![b' '; BODY_LIMIT + 1]),
        _ => match schema {
            None => http(&endpoint.method, target, b"{}".to_vec()),
            Some(schema) => http(&endpoint.method, target, bad_body(document, schema, random)),
        },
    }
}

fn broken_http(random: &mut Random) -> Vec<u8> {
    let text = match random.below(9) {
        0 => "GET /hotplug/memory\r\n\r\n".into(),
        1 => "GET /hotplug/memory HTTP/9.9\r\n\r\n".into(),
        2 => "PATCH /hotplug/memory HTTP/1.1\r\nContent-Length: many\r\n\r\n".into(),
        3 => "PATCH /hotplug/memory HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n".into(),
        4 => "PATCH /hotplug/memory HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 30\r\n\r\n{}"
            .into(),
        5 => format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 16)),
        6 => format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(200)),
        7 => "GET / HTTP/1.1\r\nno colon\r\n\r\n".into(),
        _ => {
            let length = 1 + random.below(200);
            // Not a letter, so not a method that is waited for.
            let bytes: Vec<_> = (0..length)
                .map(|_| 0x80 | random.below(128) as u8)
                .collect();
            return bytes;
        }
    };
    text.into_bytes()
}

/// A body that `schema` does not allow, or that is no JSON.
fn bad_body(document: &Document, schema: &Value, random: &mut Random) -> Vec<u8> {
    let validator = document.validator(schema);
    loop {
        let mut value = document.example(schema, random);
        let fields = value.as_object_mut().unwrap();
        let names: Vec<_> = fields.keys().cloned().collect();
        let name = &names[random.index(names.len())];
        let junk = [
            json!("much"),
            json!(-1),
            json!(1.5),
            json!(true),
            json!({}),
            json!([]),
            json!([null]),
            json!(1e300),
            json!(u64::MAX),
            json!(""),
            json!("1G "),
            Value::Null,
        ];
        match random.below(7) {
            // What a reader of formats without names might take for the same: fields by their order, whatever that is,
            // and a choice as a field of its own.
            5 => {
                let mut values: Vec<_> = fields.values().cloned().collect();
                values.extend((0..random.below(3)).map(|_| Value::Null));
                for left in (1..values.len()).rev() {
                    values.swap(left, random.index(left + 1));
                }
                value = Value::Array(values);
            }
            6 => {
                let field = &mut fields[name];
                let choice = field.as_str().unwrap_or("None").to_owned();
                *field = json!({ choice: Value::Null });
            }
            0 => drop(fields.remove(name)),
            1 => drop(fields.insert("unknown".into(), json!(1))),
            2 => value = junk[random.index(junk.len())].clone(),
            3 => {
                let text = value.to_string();
                return text[..1 + random.index(text.len() - 1)].into();
            }
            _ => drop(fields.insert(name.clone(), junk[random.index(junk.len())].clone())),
        }
        if !validator.is_valid(&value) {
            return value.to_string().into_bytes();
        }
    }
}

#[test]
fn thousand_bad_requests_are_refused_and_change_nothing() {
    let mut random = Random::new(seed());
    let document = Document::new();
    let fault = document.validator(&document.schema("Fault"));
    let fresh = Rig::with_two(GuestKind::InProcess, 0);
    let running = Rig::with_two(GuestKind::InProcess, 0);
    running.instance.start().unwrap();
    running.resize(128 * MIB);
    running.resize_device("mem1", 64 * MIB);
    for rig in [&fresh, &running] {
        let before = rig.state();
        for number in 0..500 {
            let bad = bad_request(&document, &mut random);
            match &bad {
                Bad::Bytes(bytes) => {
                    let answer = rig.raw(bytes);
                    // hyper's own answer, which has no body; to what is no HTTP at all it gives none.
                    let refused = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
                    assert!(refused, "{number}: {bad:?}: {answer}");
                }
                Bad::Http {
                    method,
                    target,
                    body,
                } => {
                    let answer = rig.send(method, target, body.clone());
                    let what = format!("{number}: {bad:?}: {answer:?}");
                    assert!(answer.status().is_client_error(), "{what}");
                    if method != "HEAD" {
                        let reason = serde_json::from_slice(answer.body()).expect(&what);
                        assert!(fault.is_valid(&reason), "{what}");
                    }
                }
            }
            if number % 100 == 99 {
                assert_eq!(rig.state(), before, "by request {number}");
            }
        }
    }
}

/// Structures and enums are read from more than the document says unless that is seen to.
#[test]
fn fields_by_their_order_and_choices_as_maps_are_refused() {
    let saved = Rig::started(GuestKind::InProcess, 0);
    assert_eq!(saved.put("/hotplug/memory/freeze"), 204);
    let state = saved.get("/hotplug/memory/state");
    let fields = [
        "version",
        "addr",
        "region_size",
        "block_size",
        "node_id",
        "offered_features",
        "acknowledged_features",
        "requested_size",
        "usable_region_size",
        "plugged_size",
        "plugged",
        "busy",
    ];
    let state: Vec<_> = fields.iter().map(|field| state[field].clone()).collect();
    let fresh = Rig::new(GuestKind::InProcess, 0);
    let running = Rig::started(GuestKind::InProcess, 0);
    for (rig, method, path, body) in [
        (&fresh, "PUT", "/hotplug/memory", json!([1024, 4, null])),
        (&fresh, "PUT", "/hotplug/memory/state", json!(state)),
        (&fresh, "PUT", "/actions", json!(["InstanceStart"])),
        (
            &fresh,
            "PUT",
            "/actions",
            json!({"action_type": {"InstanceStart": null}}),
        ),
        (&running, "PATCH", "/hotplug/memory", json!([512, null])),
        (&running, "PATCH", "/hotplug/memory", json!([null, "64M"])),
        (&running, "POST", "/operations", json!(["mem0", 64, null])),
        (&running, "POST", "/operations", json!([null, null, "64M"])),
    ] {
        let before = rig.state();
        let (status, fault) = rig.json(method, path, &body);
        assert_eq!(status, 400, "{method} {path} {body}: {fault}");
        assert_eq!(rig.state(), before, "{method} {path} {body}");
    }
}

#[test]
fn sizes_the_device_cannot_have_are_refused_with_the_reason() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    let before = rig.state();
    for (body, reason) in [
        (
            json!({"requested_size": 1}),
            "not a multiple of the block size",
        ),
        (json!({"requested_size": "1G"}), "exceed the region"),
        (
            json!({"requested_size_mib": 1}),
            "not a multiple of the block size",
        ),
        (
            json!({"requested_size_mib": u32::MAX}),
            "not a multiple of the block size",
        ),
        (json!({"requested_size": 2, "requested_size_mib": 2}), ""),
    ] {
        for (method, path) in [("PATCH", "/hotplug/memory"), ("POST", "/operations")] {
            let (status, fault) = rig.json(method, path, &body);
            assert_eq!(status, 400, "{body}");
            let message = fault["fault_message"].as_str().unwrap();
            assert!(message.contains(reason), "{body}: {message}");
        }
    }
    assert_eq!(rig.state(), before);
    let fresh = Rig::new(GuestKind::InProcess, 0);
    for config in [
        json!({"total_size_mib": 3, "block_size_mib": 2}),
        json!({"total_size_mib": 512, "block_size_mib": 3}),
        json!({"total_size_mib": 512, "slot_size_mib": 3}),
        json!({"total_size_mib": 0}),
    ] {
        let (status, fault) = fresh.json("PUT", "/hotplug/memory", &config);
        assert_eq!(status, 400, "{config}: {fault}");
    }
    assert_eq!(fresh.get("/hotplug/memory")["total_size_mib"], 512);
}

/// Events of a stream until one that is `last`, all of them as the document says.
fn events_until(
    stream: &mut Lines<BufReader<UnixStream>>,
    last: impl Fn(&Value) -> bool,
) -> Vec<Value> {
    let document = Document::new();
    let schema = document.validator(&document.schema("Event"));
    let mut events = Vec::new();
    let mut heartbeats = 0;
    for line in stream.map(Result::unwrap) {
        let Some(data) = line.strip_prefix("data: ") else {
            heartbeats += usize::from(line.starts_with(':'));
            assert!(heartbeats < HEARTBEATS, "it does not come: {events:?}");
            continue;
        };
        let event: Value = serde_json::from_str(data).unwrap();
        assert!(schema.is_valid(&event), "{event}");
        let done = last(&event);
        events.push(event);
        heartbeats = 0;
        if done {
            return events;
        }
    }
    panic!("the stream ended: {events:?}");
}

#[test]
fn operations_are_numbered_waited_for_superseded_and_told_of() {
    on_both("operations", |guest| {
        let rig = Rig::started(guest, 64);
        let mut stream = rig.events(None);
        rig.resize(256 * MIB);
        assert_eq!(
            rig.json("PUT", "/hotplug/memory/freeze", &Value::Null).0,
            204
        );
        let (_, second) = rig.json("POST", "/operations", &json!({"requested_size_mib": 64}));
        assert_eq!(second["id"], 2);
        // It cannot be done, and so the wait ends with its time.
        let waited = rig.get("/operations/2?wait=50ms");
        assert_eq!(waited["reason"], "frozen", "{waited}");
        assert_eq!(waited["plugged_size"], 256 * MIB);
        let (_, third) = rig.json("POST", "/operations", &json!({"requested_size": "128M"}));
        let superseded = rig.get("/operations/2?wait=1m");
        assert_eq!(
            (&superseded["state"], &superseded["superseded_by"]),
            (&json!("superseded"), &json!(128 * MIB))
        );
        assert_eq!(rig.json("PUT", "/hotplug/memory/thaw", &Value::Null).0, 204);
        let ended = rig.get(&format!("/operations/{}?wait=1m", third["id"]));
        assert_eq!(
            (&ended["state"], &ended["reason"]),
            (&json!("settled"), &Value::Null)
        );
        let memory = rig.get("/hotplug/memory");
        assert_eq!(
            (&memory["plugged_size_mib"], &memory["reason"]),
            (&json!(128), &Value::Null)
        );

        let events = events_until(&mut stream, |event| {
            event["id"] == 3 && event["state"] == "settled"
        });
        let ends: Vec<_> = events
            .iter()
            .filter(|event| event["event"] == "operation")
            .filter(|event| !["converging", "stalled"].contains(&event["state"].as_str().unwrap()))
            .map(|event| {
                (
                    event["id"].as_u64().unwrap(),
                    event["state"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(ends, [(1, "settled"), (2, "superseded"), (3, "settled")]);
        for kind in ["frozen", "thawed", "sizes"] {
            assert!(
                events.iter().any(|event| event["event"] == kind),
                "no {kind}: {events:?}"
            );
        }
        let (_, status) = rig.instance.stop().unwrap();
        assert_eq!(status.pages_wrong, 0);
        assert!(status.pages_verified > 0);
        let end = events_until(&mut stream, |event| event["event"] == "ended");
        assert_eq!(end.last().unwrap()["outcome"], "the guest is done");
    });
}

/// The number of each event of a stream is its own, so that a client that comes back hears the rest.
#[test]
fn stream_goes_on_after_the_last_event_a_client_has() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    let mut stream = rig.events(None);
    let frozen = |frozen: &str| {
        let path = format!("/hotplug/memory/{frozen}");
        assert_eq!(rig.json("PUT", &path, &Value::Null).0, 204);
    };
    frozen("freeze");
    let ids = |lines: &mut Lines<BufReader<UnixStream>>, last: &str| -> Vec<u64> {
        let mut ids = Vec::new();
        let mut found = false;
        for line in lines.map(Result::unwrap) {
            if let Some(id) = line.strip_prefix("id: ") {
                ids.push(id.parse().unwrap());
            }
            found |= line.contains(last);
            if found && line.is_empty() {
                break;
            }
        }
        ids
    };
    let first = ids(&mut stream, "frozen");
    drop(stream);
    frozen("thaw");
    let last = first.last().unwrap();
    let mut back = rig.events(Some(*last));
    assert_eq!(ids(&mut back, "thawed"), [last + 1]);
    let answer = rig
        .raw(b"GET /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nLast-Event-ID: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

/// The body is right but for a field nobody knows: without that, it is taken.
#[test]
fn fields_nobody_knows_are_refused_by_name() {
    let saved = Rig::started(GuestKind::InProcess, 0);
    let _ = saved.json("PUT", "/hotplug/memory/freeze", &Value::Null);
    let state = saved.get("/hotplug/memory/state");
    let fresh = || Rig::new(GuestKind::InProcess, 0);
    let started = || Rig::started(GuestKind::InProcess, 0);
    let config = json!({"total_size_mib": 1024, "block_size_mib": 2});
    let start = json!({"action_type": "InstanceStart"});
    let resize = json!({"requested_size": "64M"});
    let cases: [(fn() -> Rig, _, _, _); 5] = [
        (fresh, "PUT", "/hotplug/memory", config),
        (fresh, "PUT", "/actions", start),
        (fresh, "PUT", "/hotplug/memory/state", state),
        (started, "PATCH", "/hotplug/memory", resize.clone()),
        (started, "POST", "/operations", resize),
    ];
    for (rig, method, path, body) in cases {
        let rig = rig();
        let mut unknown = body.clone();
        unknown["sise"] = json!(1);
        let (status, fault) = rig.json(method, path, &unknown);
        assert_eq!(status, 400, "{method} {path}: {fault}");
        let (status, answer) = rig.json(method, path, &body);
        assert!([201, 204].contains(&status), "{method} {path}: {answer}");
    }
}

#[test]
fn restored_device_has_the_blocks_of_the_saved_one_and_its_guest_settles() {
    on_both("restore", |guest| {
        let saved = Rig::started(guest, 64);
        saved.resize(192 * MIB);
        let _ = saved.json("PUT", "/hotplug/memory/freeze", &Value::Null);
        let state = saved.get("/hotplug/memory/state");
        let count = |state: &Value| -> u32 {
            let words = state["plugged"].as_array().unwrap().iter();
            words.map(|word| word.as_u64().unwrap().count_ones()).sum()
        };
        assert_eq!(count(&state), 96);
        let restored = Rig::new(guest, 64);
        let damaged = {
            let mut state = state.clone();
            state["plugged_size"] = json!(64 * MIB);
            state
        };
        let (status, fault) = restored.json("PUT", "/hotplug/memory/state", &damaged);
        assert_eq!(status, 400, "{fault}");
        assert_eq!(restored.json("PUT", "/hotplug/memory/state", &state).0, 204);
        // What the guest makes of blocks from an earlier life, it comes to what is requested.
        restored.resize(192 * MIB);
        restored.resize(0);
        assert_eq!(restored.json("PUT", "/hotplug/memory/state", &state).0, 400);
        let (_, guest) = restored.instance.stop().unwrap();
        assert_eq!(guest.pages_wrong, 0);
    });
}

/// At rest the guest works with all that is plugged, all of it in Movable; each request was counted.
#[test]
fn blocks_in_use_and_requests_are_told_of() {
    on_both("blocks_in_use_and_requests_are_told_of", |kind| {
        let rig = Rig::started(kind, 64);
        assert_eq!(rig.get("/hotplug/memory")["requests"], json!([]));
        rig.resize(256 * MIB);
        rig.resize(128 * MIB);
        let plugged = json!([{"first": 0, "count": 64}]);
        // Its driver may know a moment later than the device.
        let blocks = until(|| {
            let blocks = rig.get("/hotplug/memory/blocks");
            (blocks["guest_online"] == plugged).then_some(blocks)
        });
        assert_eq!(blocks["plugged"], plugged);
        assert_eq!(blocks["guest_plugged"], plugged);
        assert_eq!(blocks["guest_movable"], plugged);
        // A worker has one page in its hands at the most.
        let pinned = blocks["guest_pinned"].as_array().unwrap().iter();
        let pinned: u64 = pinned.map(|run| run["count"].as_u64().unwrap()).sum();
        assert!(pinned <= 2, "{blocks}");
        let status = rig.get("/hotplug/memory");
        let acks = |request: &str| {
            let requests = status["requests"].as_array().unwrap().iter();
            let mut of_it = requests.filter(|r| r["request"] == request && r["answer"] == "ack");
            let found = of_it.next().cloned().unwrap();
            assert!(of_it.next().is_none(), "{status}");
            found
        };
        for request in ["plug", "unplug"] {
            let found = acks(request);
            let number = |field: &str| found[field].as_u64().unwrap();
            assert!(number("count") > 0 && number("p50_ns") > 0, "{found}");
            assert!(number("p50_ns") <= number("p99_ns"), "{found}");
            assert!(number("p99_ns") <= number("max_ns"), "{found}");
            assert!(number("max_ns") <= number("total_ns"), "{found}");
        }
    });
}

/// Asks again until there is an answer.
fn until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let start = std::time::Instant::now();
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

#[test]
fn devices_are_resized_frozen_and_saved_each_on_its_own_and_their_nodes_are_told_apart() {
    on_both("two devices", |guest| {
        let rig = Rig::with_two(guest, 64);
        rig.instance.start().unwrap();
        assert_eq!(rig.get("/")["devices"], json!(["mem0", "mem1"]));
        let mut stream = rig.events(None);
        // Node and plugged MiB, once the guest has come to rest: then as much of the node is online.
        let sizes = |id: &str| {
            let status = rig.at_rest(id);
            let guest = &status["guest"];
            assert_eq!(guest["online_size"], status["plugged_size"], "{status}");
            let number = |value: &Value| value.as_u64().unwrap();
            (number(&guest["node"]), number(&status["plugged_size_mib"]))
        };
        rig.resize_device("mem1", 256 * MIB);
        assert_eq!((sizes("mem0"), sizes("mem1")), ((0, 0), (1, 256)));
        rig.resize_device("mem0", 130 * MIB);
        assert_eq!((sizes("mem0"), sizes("mem1")), ((0, 130), (1, 256)));
        assert_eq!(rig.get("/hotplug/memory")["id"], "mem0");

        // Frozen, one does not hold up the other.
        let freeze = rig.json("PUT", "/hotplug/memory/mem1/freeze", &Value::Null);
        assert_eq!(freeze.0, 204);
        let patch = json!({"requested_size_mib": 0});
        assert_eq!(rig.json("PATCH", "/hotplug/memory/mem1", &patch).0, 204);
        rig.resize(64 * MIB);
        let operations = rig.get("/operations");
        let told: Vec<_> = operations["operations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|operation| (&operation["id"], &operation["device"]))
            .collect();
        let expected = [(1, "mem1"), (2, "mem0"), (3, "mem1"), (4, "mem0")];
        let expected = expected.map(|(id, device)| (json!(id), json!(device)));
        assert_eq!(told, expected.each_ref().map(|(id, device)| (id, device)));
        assert_eq!(rig.get("/operations/3")["reason"], "frozen");
        assert_eq!(sizes("mem0"), (0, 64));
        assert_eq!(rig.get("/hotplug/memory/mem1")["plugged_size_mib"], 256);
        let events = events_until(&mut stream, |event| {
            event["id"] == 4 && event["state"] == "settled"
        });
        let frozen = events.iter().find(|event| event["event"] == "frozen");
        assert_eq!(frozen.unwrap()["device"], "mem1");

        let metrics = rig.send("GET", "/metrics", "");
        let metrics = String::from_utf8(metrics.body().to_vec()).unwrap();
        for line in [
            "vmem_frozen{device=\"mem1\"} ",
            "vmem_guest_online_bytes{device=\"mem0\"} ",
        ] {
            assert!(metrics.contains(line), "{line}: {metrics}");
        }

        // A guest starts when it has the state of both.
        let freeze = rig.json("PUT", "/hotplug/memory/freeze", &Value::Null);
        assert_eq!(freeze.0, 204);
        let restored = Rig::with_two(guest, 64);
        let mut damaged = rig.get("/hotplug/memory/mem1/state");
        damaged["plugged_size"] = json!(2 * MIB);
        let (status, fault) = restored.json("PUT", "/hotplug/memory/mem1/state", &damaged);
        assert_eq!(status, 400, "{fault}");
        for (id, state) in [("mem1", "Not started"), ("mem0", "Running")] {
            let path = format!("/hotplug/memory/{id}/state");
            assert_eq!(restored.json("PUT", &path, &rig.get(&path)).0, 204);
            assert_eq!(restored.get("/")["state"], state);
        }
        restored.resize(0);
        restored.resize_device("mem1", 512 * MIB);
        for rig in [rig, restored] {
            let (_, guest) = rig.instance.stop().unwrap();
            assert_eq!(guest.pages_wrong, 0);
            assert!(guest.pages_verified > 0);
        }
    });
}

/// Every series, by its name and labels, and its value.
fn metrics(rig: &Rig) -> BTreeMap<String, f64> {
    let answer = rig.send("GET", "/metrics", "");
    let text = String::from_utf8(answer.body().to_vec()).unwrap();
    assert!(
        text.contains("# TYPE virtio_mem_request_seconds histogram"),
        "{text}"
    );
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let series = lines.filter_map(|line| line.rsplit_once(' '));
    series
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

/// The recorder is the process': name and region of this device are no other test's.
#[test]
fn metrics_follow_the_device() {
    const REGION: &str = "region=\"0x1c0000000\"";
    let second = DeviceOptions {
        region: 512 * MIB,
        ..DeviceOptions::new("counted")
    };
    let rig = Rig::with(GuestKind::InProcess, 64, &[second]);
    let config = json!({"total_size_mib": 3072, "block_size_mib": 2});
    assert_eq!(rig.json("PUT", "/hotplug/memory", &config).0, 204);
    rig.instance.start().unwrap();
    let of_region = |name: &str, labels: &str| format!("{name}{{{REGION}{labels}}}");
    let of_device = |name: &str| format!("{name}{{device=\"counted\"}}");
    let path = "/hotplug/memory/counted";
    let before = metrics(&rig);
    assert!(!before.keys().any(|series| {
        series.starts_with("virtio_mem_requests_total") && series.contains(REGION)
    }));
    let info = format!("vmem_device_info{{device=\"counted\",{REGION}}}");
    assert_eq!(before[&info], 1.0, "{before:?}");
    assert_eq!(before[&of_device("vmem_frozen")], 0.0);
    assert_eq!(before[&of_device("vmem_slots")], 0.0);

    let mut total = 0.0;
    for size in [256 * MIB, 6 * MIB] {
        rig.resize_device("counted", size);
        // At rest: then no more requests come.
        let status = rig.at_rest("counted");
        let after = metrics(&rig);
        for (series, value) in [
            (of_region("virtio_mem_requested_bytes", ""), size),
            (of_region("virtio_mem_plugged_bytes", ""), size),
            (of_device("vmem_guest_plugged_bytes"), size),
            (
                of_device("vmem_guest_online_bytes"),
                status["guest"]["online_size"].as_u64().unwrap(),
            ),
            (
                of_device("vmem_slots"),
                status["slot_count"].as_u64().unwrap(),
            ),
        ] {
            assert_eq!(after[&series], value as f64, "{series}");
        }
        assert!(after[&of_device("vmem_slots")] > 0.0);
        // As many as the device has counted, and no others.
        let requests = status["requests"].as_array().unwrap();
        for request in requests {
            let text = |field: &str| request[field].as_str().unwrap();
            let labels = format!(
                ",request=\"{}\",answer=\"{}\"",
                text("request"),
                text("answer")
            );
            let count = request["count"].as_u64().unwrap() as f64;
            for name in [
                "virtio_mem_requests_total",
                "virtio_mem_request_seconds_count",
            ] {
                assert_eq!(after[&of_region(name, &labels)], count, "{name}{labels}");
            }
        }
        let counted = after.iter().filter(|(series, _)| {
            series.starts_with("virtio_mem_requests_total") && series.contains(REGION)
        });
        assert_eq!(counted.clone().count(), requests.len());
        let sum = counted.map(|(_, count)| count).sum::<f64>();
        assert!(sum > total, "the second resize has requests of its own");
        total = sum;
        // The guest works in it sooner or later.
        until(|| {
            let resident = metrics(&rig)[&of_region("virtio_mem_resident_bytes", "")];
            assert!(resident <= size as f64, "{resident} of {size}");
            (resident > 0.0).then_some(())
        });
    }
    assert_eq!(rig.put(&format!("{path}/freeze")), 204);
    assert_eq!(metrics(&rig)[&of_device("vmem_frozen")], 1.0);
    until(|| (rig.get(path)["guest"]["pages_verified"].as_u64() > Some(0)).then_some(()));
    assert_eq!(rig.get(path)["guest"]["pages_wrong"], 0);
    // These have no labels: they are of all guests of the process, and so of all tests that run.
    assert_eq!(metrics(&rig)["vmem_guest_pages_wrong_total"], 0.0);
    assert!(metrics(&rig)["vmem_guest_pages_verified_total"] > 0.0);
}

#[test]
fn silent_connections_are_closed_and_the_socket_is_its_users_only() {
    use std::os::unix::fs::PermissionsExt;
    let limits = Limits {
        head_time: Duration::from_secs(1),
        ..LIMITS
    };
    let rig = Rig::limited(GuestKind::InProcess, 0, &[], limits);
    let mode = fs::metadata(&rig.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // More than are served at a time: those that say nothing lose their place.
    let silent: Vec<_> = (0..LIMITS.connections).map(|_| rig.connect()).collect();
    assert_eq!(rig.get("/")["state"], "Not started");
    for mut stream in silent {
        assert_eq!(read_all(&mut stream), "");
    }
}

/// Requests that a client sends and does not read the answers of: more than the sockets have room for.
const UNREAD: usize = 4096;

#[test]
fn clients_that_read_nothing_lose_their_places() {
    // One that is read from before it has lost its place is answered, and then has nothing more to say.
    let limits = Limits {
        read_time: Duration::from_secs(1),
        head_time: Duration::from_secs(5),
        ..LIMITS
    };
    let rig = Rig::limited(GuestKind::InProcess, 0, &[], limits);
    let deaf: Vec<_> = (0..LIMITS.connections)
        .map(|_| {
            let mut stream = rig.connect();
            stream.set_nonblocking(true).unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nHost: vmem\r\n\r\n";
            // Until the server takes no more, which is what keeps it.
            let sent = (0..UNREAD).map_while(|_| stream.write(request).ok());
            assert!(sent.count() > 1);
            stream.set_nonblocking(false).unwrap();
            stream
        })
        .collect();
    assert_eq!(rig.get("/")["state"], "Not started");
    for mut stream in deaf {
        // What was on its way, and then the end.
        let answers = read_all(&mut stream).matches("HTTP/1.1 200").count();
        assert!((1..UNREAD).contains(&answers), "{answers}");
    }
}

/// `nc -N` and the like have nothing more to say before they are answered.
#[test]
fn client_that_has_said_all_is_answered() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    let mut stream = rig.connect();
    write!(stream, "GET / HTTP/1.1\r\nHost: vmem\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let answer = read_all(&mut stream);
    assert!(answer.contains("\"state\":\"Running\""), "{answer}");

    // Also if it has to wait for that.
    assert_eq!(rig.put("/hotplug/memory/freeze"), 204);
    let body = json!({"requested_size": "64M"});
    assert_eq!(rig.json("POST", "/operations", &body).0, 201);
    let mut waiting = rig.connect();
    let head = "GET /operations/1?wait=1h HTTP/1.1\r\nHost: vmem\r\n\r\n";
    waiting.write_all(head.as_bytes()).unwrap();
    waiting.shutdown(Shutdown::Write).unwrap();
    // Whoever comes later has been heard: so has that one.
    rig.get("/");
    assert_eq!(rig.put("/hotplug/memory/thaw"), 204);
    let answer = read_all(&mut waiting);
    assert!(answer.contains("\"state\":\"settled\""), "{answer}");
}

/// Before the guest is started there is no memory to look for. What was measured is in the metrics, by the address of
/// the region, and no other test has one there.
#[test]
fn region_of_a_guest_that_is_not_started_is_not_measured() {
    let rig = Rig::with_two(GuestKind::InProcess, 0);
    let config = json!({"total_size_mib": 1 << 26, "block_size_mib": 2});
    assert_eq!(rig.json("PUT", "/hotplug/memory", &config).0, 204);
    let mib = 1 << 20;
    let config = json!({"total_size_mib": mib, "block_size_mib": 2});
    assert_eq!(rig.json("PUT", "/hotplug/memory/mem1", &config).0, 204);
    for (id, size) in [("mem0", 1_u64 << 46), ("mem1", 1 << 40)] {
        let status = rig.get(&format!("/hotplug/memory/{id}"));
        let found = (&status["total_size"], &status["resident_size"]);
        assert_eq!(found, (&json!(size), &json!(0)));
    }
    let metrics = rig.send("GET", "/metrics", "");
    let metrics = String::from_utf8(metrics.body().to_vec()).unwrap();
    let measured = "virtio_mem_resident_bytes{region=\"0x400100000000\"}";
    assert!(!metrics.contains(measured), "{metrics}");
}

#[test]
fn clients_that_have_gone_give_their_places_back() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    assert_eq!(rig.put("/hotplug/memory/freeze"), 204);
    let body = json!({"requested_size": "64M"});
    assert_eq!(rig.json("POST", "/operations", &body).0, 201);
    // Once all places were taken by who is gone, nobody would be served; the next request is begun and never ended.
    for _ in 0..2 * LIMITS.connections {
        let mut waiting = rig.connect();
        let head = b"GET /operations/1?wait=1h HTTP/1.1\r\nHost: vmem\r\n\r\nG";
        waiting.write_all(head).unwrap();
        drop(waiting);
    }
    assert_eq!(rig.get("/operations/1")["reason"], "frozen");
    // What they have asked for is done.
    let mut hasty = rig.connect();
    let patch = b"PATCH /hotplug/memory HTTP/1.1\r\nHost: vmem\r\nContent-Length: 27\r\n\r\n{\"requested_size_mib\": 32 }";
    hasty.write_all(patch).unwrap();
    drop(hasty);
    until(|| (rig.get("/hotplug/memory")["requested_size_mib"] == 32).then_some(()));
    // And of two streams one is always free.
    for _ in 0..20 {
        drop(rig.events(None));
    }
}

#[test]
fn answers_come_to_their_end_when_the_server_stops() {
    let mut rig = Rig::started(GuestKind::InProcess, 0);
    let mut stream = rig.connect();
    stream
        .write_all(b"GET /events HTTP/1.1\r\nHost: vmem\r\n\r\n")
        .unwrap();
    // It has been accepted before.
    rig.get("/");
    let _ = rig.instance.stop();
    drop(rig.server.take());
    let answer = read_all(&mut stream);
    assert!(answer.contains("\"event\":\"ended\""), "{answer}");
    assert!(answer.ends_with("\r\n0\r\n\r\n"), "{answer}");
}

#[test]
fn body_that_says_it_is_too_large_is_refused_before_it_comes() {
    let rig = Rig::new(GuestKind::InProcess, 0);
    let head =
        "PATCH /hotplug/memory HTTP/1.1\r\nHost: vmem\r\nContent-Length: 99999999999\r\n\r\n";
    let answer = rig.raw(head.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(answer.contains("fault_message"), "{answer}");
}

#[test]
fn numbers_are_written_in_one_way() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    rig.resize(64 * MIB);
    rig.get("/operations/1");
    for id in ["+1", "01", "1.0", "-1", "", "%31", "18446744073709551616"] {
        let (status, fault) = rig.json("GET", &format!("/operations/{id}"), &Value::Null);
        assert_eq!(status, 404, "{id}: {fault}");
        assert!(fault["fault_message"].is_string(), "{id}: {fault}");
    }
    let answer = rig
        .raw(b"GET /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nLast-Event-ID: +1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

/// A state is as large as its device makes it, and so is the limit.
#[test]
fn state_of_a_large_device_is_taken_and_a_larger_one_is_not() {
    // Blocks of 2 MiB, one word for 64 of them.
    const WORDS: u64 = 2048;
    let config = json!({"total_size_mib": WORDS * 128, "block_size_mib": 2});
    let saved = Rig::with_two(GuestKind::InProcess, 0);
    assert_eq!(saved.json("PUT", "/hotplug/memory/mem1", &config).0, 204);
    saved.instance.start().unwrap();
    saved.resize_device("mem1", 2 * MIB);
    assert_eq!(saved.put("/hotplug/memory/mem1/freeze"), 204);
    let mut state = saved.get("/hotplug/memory/mem1/state");
    state["plugged"] = json!(vec![u64::MAX; WORDS as usize]);
    for field in ["plugged_size", "requested_size", "usable_region_size"] {
        state[field] = json!(WORDS * 128 * MIB);
    }
    assert!(state.to_string().len() > BODY_LIMIT);
    let other = Rig::with_two(GuestKind::InProcess, 0);
    let put = |state: &Value| other.json("PUT", "/hotplug/memory/mem1/state", state);
    let (status, fault) = put(&state);
    assert_eq!(status, 413, "it is not that large yet: {fault}");
    assert_eq!(other.json("PUT", "/hotplug/memory/mem1", &config).0, 204);
    // Mem0 has none, so nothing is started.
    let (status, fault) = put(&state);
    assert_eq!(status, 204, "{fault}");
    state["plugged"] = json!(vec![u64::MAX; 2 * WORDS as usize]);
    assert_eq!(put(&state).0, 413);
}

/// Each cause is told once, and what to do about it.
#[test]
fn reasons_say_nothing_twice() {
    let rig = Rig::started(GuestKind::InProcess, 0);
    // Before its driver is there, a device can be saved.
    rig.resize(64 * MIB);
    let (_, fault) = rig.json("GET", "/hotplug/memory/state", &Value::Null);
    let mut messages = vec![fault];
    assert_eq!(rig.put("/hotplug/memory/freeze"), 204);
    let state = rig.get("/hotplug/memory/state");
    let fresh = Rig::new(GuestKind::InProcess, 0);
    for (field, value) in [
        ("addr", json!(1_u64 << 40)),
        ("version", json!(7)),
        ("plugged_size", json!(2 * MIB)),
        ("requested_size", json!(1)),
    ] {
        let mut wrong = state.clone();
        wrong[field] = value;
        messages.push(fresh.json("PUT", "/hotplug/memory/state", &wrong).1);
    }
    messages.push(
        rig.json("PATCH", "/hotplug/memory", &json!({"requested_size": 1}))
            .1,
    );
    for fault in messages {
        let message = fault["fault_message"].as_str().unwrap();
        let mut parts: Vec<_> = message.split([':', ';']).map(str::trim).collect();
        let count = parts.len();
        parts.sort_unstable();
        parts.dedup();
        assert_eq!(parts.len(), count, "{message}");
    }
}

//! Bad requests are refused with a reason and change nothing.

use integration_tests::openapi::Document;
use integration_tests::random::{Random, seed};
use serde_json::{Value, json};
use vmm_harness::GuestKind;

use crate::rig::{BODY_LIMIT, MIB, Rig};

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

#[test]
fn body_that_says_it_is_too_large_is_refused_before_it_comes() {
    let rig = Rig::new(GuestKind::InProcess, 0);
    let head =
        "PATCH /hotplug/memory HTTP/1.1\r\nHost: vmem\r\nContent-Length: 99999999999\r\n\r\n";
    let answer = rig.raw(head.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(answer.contains("fault_message"), "{answer}");
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

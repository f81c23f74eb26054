//! Server and document are one.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use hyper::Response;
use hyper::body::Bytes;
use integration_tests::openapi::{Document, Endpoint};
use serde_json::{Value, json};
use vmm_harness::GuestKind;
use vmm_harness::api::Limits;

use crate::rig::{BODY_LIMIT, LIMITS, MIB, Rig, read_all, until};

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

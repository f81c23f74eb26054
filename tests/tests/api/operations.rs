//! Resizing: operations, and the events that tell of them.

use std::io::{BufReader, Lines};
use std::os::unix::net::UnixStream;

use integration_tests::openapi::Document;
use serde_json::{Value, json};
use vmm_harness::GuestKind;

use crate::rig::{MIB, Rig, on_both};

/// Signs of life an event may take.
const HEARTBEATS: usize = 12;

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

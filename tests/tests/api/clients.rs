//! Clients that say nothing, read nothing or go.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

use serde_json::json;
use vmm_harness::GuestKind;
use vmm_harness::api::Limits;

use crate::rig::{LIMITS, Rig, read_all, until};

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

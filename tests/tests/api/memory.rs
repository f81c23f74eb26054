//! What is said of the memory of a device, saved and restored, is so.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use vmm_harness::GuestKind;
use vmm_harness::control::DeviceOptions;

use crate::rig::{BODY_LIMIT, MIB, Rig, on_both, until};

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

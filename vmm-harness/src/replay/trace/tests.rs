//! What is read, and what is refused.

use serde_json::{Value, json};

use super::*;
use crate::replay::check::parse_node_list;

fn zone_row() -> Value {
    json!({ "node": 0, "zone": "DMA32", "start_pfn": 4096, "spanned": 28672, "present": 28672, "managed": 28000 })
}

/// The smallest trace that has everything.
fn trace() -> Value {
    let zone = zone_row();
    json!({
        "kernel": "6.12.117+deb12-cloud-amd64",
        "scenario": "S1-test",
        "boot": {
            "cmdline": "quiet", "ram_bytes": 134_217_728, "block_size": 134_217_728,
            "auto_online_blocks": "offline", "memory_hotplug_params": { "auto_movable_ratio": "301" },
            "machine_args": [], "zones": [zone], "memtotal_kib": 112_000,
            "blocks": { "0": { "state": "online", "valid_zones": "DMA32" } },
            "iomem": ["01000000-07ffffff : System RAM"],
        },
        "dimms": [{ "id": "dimm0", "addr": 4_294_967_296u64, "size": 134_217_728, "node": null }],
        "steps": [
            { "op": "add_dimm", "target": "dimm0", "result": 0, "blocks": {}, "zoneinfo": [], "memtotal_kib": 112_000,
              "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null } },
            { "op": "write_state", "target": 32, "arg": "online", "result": "EINVAL",
              "blocks": {}, "zoneinfo": [], "memtotal_kib": 112_000 },
        ],
    })
}

/// The error of the trace above with one value replaced.
fn error_with(pointer: &str, value: Value) -> String {
    let mut trace = trace();
    *trace.pointer_mut(pointer).expect("there is such a value") = value;
    Trace::parse(trace.to_string().as_bytes())
        .unwrap_err()
        .to_string()
}

#[test]
fn trace_with_everything_is_read() {
    let trace = Trace::parse(trace().to_string().as_bytes()).unwrap();
    assert_eq!(trace.steps.len(), 2);
    assert_eq!(trace.steps[1].label, "write_state 32 online");
}

#[test]
fn truncated_file_is_refused_with_its_position_wherever_it_ends() {
    let text = serde_json::to_string_pretty(&trace()).unwrap();
    for length in 0..text.len() {
        let error = Trace::parse(&text.as_bytes()[..length])
            .unwrap_err()
            .to_string();
        assert!(error.contains("at line "), "{length}: {error}");
    }
}

#[test]
fn wrong_types_and_numbers_are_refused_with_their_position() {
    for (pointer, value) in [
        ("/boot/block_size", json!("128M")),
        ("/boot/block_size", json!(-1)),
        ("/boot/ram_bytes", json!(1e30)),
        ("/boot/blocks/0/state", json!(1)),
        ("/boot/zones/0/spanned", json!(-5)),
        ("/dimms/0/addr", json!("4G")),
        ("/dimms/0/node", json!(4_294_967_296u64)),
        ("/steps/0/result", json!(1)),
        ("/steps/0/result", json!([])),
    ] {
        let error = error_with(pointer, value.clone());
        assert!(
            error.contains("at line 1 column "),
            "{pointer} {value}: {error}"
        );
    }
    let text = trace()
        .to_string()
        .replace(r#""blocks":{"0""#, r#""blocks":{"memory0""#);
    let error = Trace::parse(text.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("at line 1 column "), "{error}");
}

#[test]
fn wrong_steps_are_named() {
    for (pointer, value, expected) in [
        (
            "/steps/1/op",
            json!("frobnicate"),
            "step 1: unknown operation \"frobnicate\"",
        ),
        ("/steps/1/op", json!("write_"), "step 1: unknown operation"),
        (
            "/steps/1/target",
            json!("x"),
            "step 1: target of write_state: not a memory block",
        ),
        (
            "/steps/1/target",
            json!(-1),
            "step 1: target of write_state",
        ),
        (
            "/steps/1/arg",
            json!({}),
            "step 1: arg of write_state: expected text",
        ),
        ("/steps/0/arg", json!(null), "step 0: arg of add_dimm"),
        (
            "/steps/0/blocks",
            json!(null),
            "steps[0]: there is no blocks",
        ),
        (
            "/steps/1/zoneinfo",
            json!(null),
            "steps[1]: there is no zoneinfo",
        ),
        (
            "/steps/1/memtotal_kib",
            json!(null),
            "steps[1]: there is no memtotal_kib",
        ),
        (
            "/steps/1/zoneinfo",
            json!(vec![zone_row(); 4097]),
            "steps[1]: more than 4096",
        ),
        (
            "/steps/0/arg/size",
            json!(-4096),
            "step 0: arg of add_dimm: invalid value",
        ),
        (
            "/steps/0/op",
            json!("device_del"),
            "steps[0]: device_del has no outcome",
        ),
        (
            "/steps/0/result",
            json!(null),
            "steps[0]: there is no result",
        ),
    ] {
        let error = error_with(pointer, value);
        assert!(error.contains(expected), "{pointer}: {error}");
    }
}

#[test]
fn what_no_machine_can_have_is_refused_by_name() {
    for (pointer, value, place) in [
        ("/boot/block_size", json!(0), "boot.block_size"),
        ("/boot/block_size", json!(1u64 << 63), "boot.block_size"),
        ("/boot/ram_bytes", json!(u64::MAX), "boot.ram_bytes"),
        ("/boot/iomem", json!([]), "boot.iomem"),
        ("/boot/iomem/0", json!("garbage"), "boot.iomem[0]"),
        ("/boot/iomem/0", json!("5-3 : System RAM"), "boot.iomem[0]"),
        (
            "/boot/iomem/0",
            json!("0-ffffffffffffffff : System RAM"),
            "boot.iomem[0]",
        ),
        (
            "/boot/iomem/0",
            json!("0-fffffffffffffff : System RAM"),
            "boot.iomem[0]",
        ),
        (
            "/boot/iomem/0",
            json!("0-3fffffffffff : System RAM"),
            "boot.iomem[0]",
        ),
        ("/boot/zones/0/zone", json!("HighMem"), "boot.zones[0]"),
        ("/boot/zones/0/start_pfn", json!(u64::MAX), "boot.zones[0]"),
        ("/boot/zones/0/managed", json!(28_673), "boot.zones[0]"),
        ("/boot/zones/0/node", json!(1024), "boot.zones[0]"),
        ("/dimms/0/addr", json!(4_294_967_297u64), "dimms.dimm0"),
        ("/dimms/0/size", json!(0), "dimms.dimm0"),
        ("/steps/0/arg/size", json!(1u64 << 46), "steps[0].arg"),
        (
            "/steps/0/arg/addr",
            json!(u64::MAX - (128 << 20) + 1),
            "steps[0].arg",
        ),
        ("/steps/0/arg/node", json!(5000), "steps[0].arg"),
    ] {
        let error = error_with(pointer, value);
        assert!(
            error.contains(&format!("is not a trace: {place}: ")),
            "{pointer}: {error}"
        );
    }
}

#[test]
fn memory_device_and_its_requests_are_checked() {
    let device = json!({ "addr": 4_294_967_296u64, "region_size": 4_294_967_296u64, "block_size": 2_097_152 });
    let request = json!({ "type": "plug", "t": 1.5, "addr": 4_294_967_296u64, "nb_blocks": 64, "response": "ACK" });
    let mut good = trace();
    good["device"] = device;
    good["boot"]["machine_args"] = json!(["-device", "virtio-mem-pci,id=vmem0,requested-size=64M"]);
    let event = json!({ "type": "resized_usable_region", "t": 0.0, "args": "" });
    for step in 0..2 {
        good["steps"][step]["plugged_size"] = json!(0);
        good["steps"][step]["requests"] = json!([event, request]);
    }
    let parsed = Trace::parse(good.to_string().as_bytes()).unwrap();
    assert_eq!(parsed.device.unwrap().requested_size, 64 << 20);
    assert_eq!(parsed.steps[0].requests.len(), 1);
    assert_eq!(parsed.steps[0].requests[0].at_ms, 1500);
    for (pointer, value, expected) in [
        (
            "/device",
            json!(null),
            "steps[0]: there are requests but no device",
        ),
        ("/device/block_size", json!(3), "device: "),
        ("/device/addr", json!(u64::MAX), "device: "),
        ("/device/addr", json!(1u64 << 46), "device: beyond"),
        (
            "/device/region_size",
            json!(1u64 << 40),
            "device: larger than what can be replayed",
        ),
        (
            "/device/block_size",
            json!(4096),
            "device: larger than what can be replayed",
        ),
        (
            "/steps/1/plugged_size",
            json!(null),
            "steps[1]: there is no plugged_size",
        ),
        (
            "/steps/1/requests/1/type",
            json!("grow"),
            "there is no such request",
        ),
        (
            "/steps/1/requests/1/response",
            json!("MAYBE"),
            "there is no such response",
        ),
        (
            "/steps/1/requests/1/nb_blocks",
            json!(65_536),
            "no request has so many blocks",
        ),
        (
            "/steps/1/requests/1/t",
            json!(-1.0),
            "no recording takes so long",
        ),
        (
            "/steps/1/requests/1/t",
            json!(1e18),
            "no recording takes so long",
        ),
        ("/steps/1/requests/1/addr", json!(-1), "step 1: request "),
    ] {
        let mut changed = good.clone();
        *changed.pointer_mut(pointer).expect("there is such a value") = value;
        let error = Trace::parse(changed.to_string().as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
}

#[test]
fn result_may_be_missing_where_the_recording_was_cut_short() {
    let mut cut = trace();
    cut["incomplete"] = json!(true);
    cut["steps"][1]["result"] = json!(null);
    assert!(Trace::parse(cut.to_string().as_bytes()).is_ok());
}

#[test]
fn null_is_as_good_as_missing() {
    for pointer in [
        "/boot/memory_hotplug_params",
        "/boot/blocks/0/valid_zones",
        "/boot/blocks/0/node",
        "/dimms",
        "/params_at_end",
        "/incomplete",
    ] {
        for missing in [false, true] {
            let mut changed = trace();
            let (parent, key) = pointer.rsplit_once('/').expect("it has one");
            let parent = changed
                .pointer_mut(parent)
                .unwrap()
                .as_object_mut()
                .unwrap();
            parent.insert(key.to_owned(), Value::Null);
            if missing {
                parent.remove(key);
            }
            let parsed = Trace::parse(changed.to_string().as_bytes());
            assert!(parsed.is_ok(), "{pointer}: {parsed:?}");
        }
    }
    let mut number = trace();
    number["boot"]["memory_hotplug_params"]["auto_movable_ratio"] = json!(301);
    let params = Trace::parse(number.to_string().as_bytes())
        .unwrap()
        .boot
        .memory_hotplug_params;
    assert_eq!(params["auto_movable_ratio"], Parameter("301".into()));
}

#[test]
fn eject_without_outcome_was_cut_short_or_never_asked_for() {
    let mut cut = trace();
    cut["steps"][1] = json!({ "op": "device_del", "target": "dimm0", "result": 0 });
    cut["incomplete"] = json!(true);
    assert!(Trace::parse(cut.to_string().as_bytes()).is_ok());
    let mut refused = trace();
    refused["steps"][1]["op"] = json!("device_del");
    refused["steps"][1]["target"] = json!("dimm0");
    assert!(Trace::parse(refused.to_string().as_bytes()).is_ok());
}

#[test]
fn results_that_are_not_compared_may_be_anything() {
    for op in ["shell", "read", "wait", "checksum"] {
        for result in [json!(1), json!(-1), json!("EIO")] {
            let mut other = trace();
            other["steps"][1]["op"] = json!(op);
            other["steps"][1]["result"] = result.clone();
            let parsed = Trace::parse(other.to_string().as_bytes());
            assert!(parsed.is_ok(), "{op} {result}: {parsed:?}");
        }
    }
}

#[test]
fn lists_of_nodes_are_read() {
    assert_eq!(parse_node_list("0-1,3"), Some(vec![0, 1, 3]));
    assert_eq!(parse_node_list(""), Some(vec![]));
    for wrong in ["a", "1-", "0-4294967295"] {
        assert_eq!(parse_node_list(wrong), None, "{wrong}");
    }
}

//! Recorded traces of real kernels against the model of memory hotplug. And that the comparison can fail: a trace with
//! one value changed must be told apart from the model, at that value.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use vmm_harness::replay::{Difference, Inputs, ReplayError, Summary, Trace, replay};

fn recorded(name: &str) -> Value {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "traces", name]
        .iter()
        .collect();
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn try_replay(trace: &Value) -> Result<Summary, ReplayError> {
    let trace = Trace::parse(trace.to_string().as_bytes())?;
    replay(&trace, &mut |_| {})
}

/// The difference after `change` was made to the trace.
fn difference(name: &str, change: impl FnOnce(&mut Value)) -> Difference {
    let mut trace = recorded(name);
    change(&mut trace);
    let summary = try_replay(&trace).unwrap();
    summary.difference.expect("the change is seen")
}

fn replace(pointer: &str, value: Value) -> impl FnOnce(&mut Value) {
    move |trace| *trace.pointer_mut(pointer).expect("there is such a value") = value
}

#[test]
fn every_trace_replays_without_a_difference() {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "traces"].iter().collect();
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let trace = recorded(&name);
        let summary = try_replay(&trace).unwrap();
        assert_eq!(summary.difference, None, "{name}");
        assert_eq!(
            summary.steps,
            trace["steps"].as_array().unwrap().len(),
            "{name}"
        );
        count += 1;
    }
    assert_eq!(count, 14);
}

#[test]
fn placement_is_taken_from_the_trace_and_counted() {
    let inputs = |name: &str| try_replay(&recorded(name)).unwrap().inputs;
    // Two passes of an eject that find the last block busy.
    let rollback = Inputs {
        busy: 2,
        ..Inputs::default()
    };
    assert_eq!(inputs("s4-6.12-rollback-zone-2.json"), rollback);
    let endless = Inputs {
        endless: 1,
        ..Inputs::default()
    };
    assert_eq!(inputs("s4-6.12-tmpfs-full.json"), endless);
    // Vetoes and poison follow from what the shell was told.
    assert_eq!(inputs("s1d-6.12-notifier_inject.json"), Inputs::default());
    assert_eq!(inputs("s1d-6.12-hwpoison.json"), Inputs::default());
}

/// An attempt that goes on beyond its step may still fail, and the eject goes on with the next block.
#[test]
fn eject_that_gives_a_block_up_comes_back_to_it_in_its_second_pass() {
    let mut trace = recorded("s4-6.12-tmpfs-full.json");
    trace["steps"][9]["blocks"]["33"] = json!({ "state": "online", "valid_zones": "Movable" });
    trace["steps"][9]["blocks"]["34"] =
        json!({ "state": "going-offline", "valid_zones": "Movable Normal" });
    let uevents = trace["steps"][10]["uevents"].as_array_mut().unwrap();
    uevents.swap(0, 1);
    uevents.swap(1, 2);
    assert_eq!(
        uevents[..3],
        ["offline memory34", "offline memory35", "offline memory33"]
    );
    let summary = try_replay(&trace).unwrap();
    assert_eq!(summary.difference, None);
    assert_eq!((summary.inputs.busy, summary.inputs.endless), (1, 2));
}

#[test]
fn nobody_else_takes_a_block_offline_while_an_eject_goes_on() {
    let mut trace = recorded("s4-6.12-tmpfs-full.json");
    let write = json!({ "op": "write_state", "target": 35, "arg": "offline", "result": "EINTR", "timed_out": true });
    trace["steps"].as_array_mut().unwrap().insert(9, write);
    let summary = try_replay(&trace).unwrap();
    assert_eq!(summary.difference, None);
    assert_eq!((summary.inputs.interrupted, summary.inputs.endless), (1, 1));
}

#[test]
fn eject_is_refused_by_a_notifier_without_help_from_the_trace() {
    let mut trace = recorded("s4-6.12-rollback-zone-2.json");
    let before = trace["steps"][5].clone();
    let steps = trace["steps"].as_array_mut().unwrap();
    for step in &mut steps[6..8] {
        for field in ["blocks", "zoneinfo", "memtotal_kib"] {
            step[field] = before[field].clone();
        }
        step["uevents"] = json!([]);
    }
    let script = "cd /sys; echo -1 > /sys/kernel/debug/notifier-error-inject/memory/actions/MEM_GOING_OFFLINE/error";
    let veto = json!({ "op": "shell", "target": null, "arg": script, "result": 0, "out": "" });
    steps.insert(6, veto);
    let summary = try_replay(&trace).unwrap();
    assert_eq!(
        (summary.difference, summary.inputs),
        (None, Inputs::default())
    );
}

/// Steps of which only results, uevents and what was read is recorded, after the boot of a trace.
fn replay_steps(name: &str, steps: Value) -> Result<Summary, ReplayError> {
    let mut trace = recorded(name);
    trace["steps"] = steps;
    try_replay(&trace)
}

#[test]
fn parameters_are_written_and_read_back() {
    let write = |target: &str, arg: &str, result: Value, value_after: &str| json!({ "op": "write_param", "target": target, "arg": arg, "result": result, "value_after": value_after });
    let steps = json!([
        write("online_policy", "bogus", json!("EINVAL"), "contig-zones"),
        write("online_policy", "auto-movable", json!(0), "auto-movable"),
        write("auto_movable_ratio", "-5", json!("EINVAL"), "301"),
        write("/sys/module/memory_hotplug/parameters/auto_movable_ratio", "100", json!(0), "100"),
        write("auto_movable_numa_aware", "0", json!(0), "N"),
        write("memmap_on_memory", "1", json!("EACCES"), "N"),
        { "op": "write_auto_online_blocks", "target": null, "arg": "online_movable", "result": 0 },
        { "op": "add_dimm", "target": "d", "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null },
          "result": 0, "uevents": ["add memory32", "online memory32"] },
        write("auto_movable_ratio", "200", json!(0), "201"),
    ]);
    let summary = replay_steps("s1d-6.12-sticky_type.json", steps).unwrap();
    assert_eq!(
        summary.difference.unwrap().to_string(),
        "step 8 (write_param auto_movable_ratio 200): auto_movable_ratio value_after: expected 201, got 200"
    );
}

#[test]
fn poison_leaves_with_the_dimm() {
    let add = json!({ "op": "add_dimm", "target": "d", "result": 0, "uevents": ["add memory32"],
        "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null } });
    let online = |result: Value, uevents: Value| json!({ "op": "write_state", "target": 32, "arg": "online", "result": result, "uevents": uevents });
    let shell = |script: &str, kib: u32| {
        let out = format!("HardwareCorrupted: {kib} kB\n");
        json!({ "op": "shell", "target": null, "arg": script, "result": 0, "out": out })
    };
    let steps = json!([
        add,
        online(json!(0), json!(["online memory32"])),
        shell("echo 0x100400000 > /sys/devices/system/memory/hard_offline_page", 4),
        { "op": "write_online", "target": 32, "arg": "0", "result": 0, "uevents": ["offline memory32"] },
        online(json!("EHWPOISON"), json!([])),
        { "op": "device_del", "target": "d", "arg": null, "result": 0, "outcome": "deleted",
          "uevents": ["remove memory32"] },
        shell("", 0),
        add,
        online(json!(0), json!(["online memory32"])),
    ]);
    let summary = replay_steps("s1d-6.12-sticky_type.json", steps).unwrap();
    assert_eq!(
        (summary.difference, summary.inputs),
        (None, Inputs::default())
    );
}

/// Each field that is compared, changed once: `(trace, pointer, value, subject, field)`.
#[test]
fn one_changed_value_is_found_where_it_is() {
    let sticky = "s1d-6.12-sticky_type.json";
    let node = "s1d-6.12-empty_node_hotplug.json";
    let remove = "s3-6.12-on-remove.json";
    let cases = [
        (
            sticky,
            "/boot/blocks/3/valid_zones",
            json!("Normal"),
            "memory3",
            "valid_zones",
        ),
        (sticky, "/boot/memtotal_kib", json!(1), "MemTotal", "kib"),
        (
            sticky,
            "/boot/memory_hotplug_params/auto_movable_ratio",
            json!("x"),
            "auto_movable_ratio",
            "value",
        ),
        (
            sticky,
            "/steps/2/blocks/33/state",
            json!("going-offline"),
            "memory33",
            "state",
        ),
        (
            sticky,
            "/steps/2/blocks/33/valid_zones",
            json!("DMA"),
            "memory33",
            "valid_zones",
        ),
        (sticky, "/steps/2/memtotal_kib", json!(0), "MemTotal", "kib"),
        (
            sticky,
            "/steps/2/zoneinfo/1/managed",
            json!(0),
            "node 0 zone DMA32",
            "managed",
        ),
        (
            sticky,
            "/steps/2/zoneinfo/1/present",
            json!(258_015),
            "node 0 zone DMA32",
            "present",
        ),
        (
            sticky,
            "/steps/2/zoneinfo/1/spanned",
            json!(258_017),
            "node 0 zone DMA32",
            "spanned",
        ),
        (
            sticky,
            "/steps/2/zoneinfo/1/start_pfn",
            json!(4097),
            "node 0 zone DMA32",
            "start_pfn",
        ),
        (
            sticky,
            "/steps/1/uevents/0",
            json!("online memory33"),
            "uevent 0",
            "text",
        ),
        (sticky, "/steps/1/uevents", json!([]), "uevent 0", "text"),
        (sticky, "/steps/2/result", json!("EPERM"), "result", ""),
        (node, "/steps/0/nodes/online", json!("0"), "nodes", "online"),
        (
            node,
            "/steps/1/nodes/has_memory",
            json!("0"),
            "nodes",
            "has_memory",
        ),
        (
            node,
            "/steps/2/nodes/has_normal_memory",
            json!("0"),
            "nodes",
            "has_normal_memory",
        ),
        (
            node,
            "/steps/1/blocks/33/node",
            json!(0),
            "memory33",
            "node",
        ),
        (
            remove,
            "/steps/0/iomem/0",
            json!("100000000-10fffffff : System RAM"),
            "iomem line 0",
            "text",
        ),
        (
            remove,
            "/params_at_end/memmap_on_memory",
            json!("N"),
            "memmap_on_memory",
            "value",
        ),
        (
            "s1d-6.12-hwpoison.json",
            "/steps/4/out",
            json!("rc 0\nrc 0\nHardwareCorrupted: 4 kB"),
            "meminfo",
            "HardwareCorrupted",
        ),
        (
            "s1d-6.12-hwpoison.json",
            "/steps/4/out",
            json!("rc 0\nrc 1\n"),
            "shell",
            "output",
        ),
    ];
    for (name, pointer, value, subject, field) in cases {
        let found = difference(name, replace(pointer, value));
        assert_eq!(
            (found.subject.as_str(), found.field.as_str()),
            (subject, field),
            "{pointer}: {found}"
        );
        let step = pointer
            .strip_prefix("/steps/")
            .and_then(|rest| rest.split('/').next()?.parse().ok());
        assert_eq!(found.step, step, "{pointer}: {found}");
    }
}

#[test]
fn block_that_is_not_there_is_missed() {
    let found = difference("s1d-6.12-sticky_type.json", |trace| {
        trace["steps"][0]["blocks"]
            .as_object_mut()
            .unwrap()
            .remove("35");
    });
    assert_eq!(
        found.to_string(),
        "step 0 (add_dimm dimm0): memory35 state: expected no such block, got offline"
    );
}

#[test]
fn errors_the_model_does_not_come_to_are_not_believed() {
    // An attempt to bring a block online finds no page in the way.
    let found = difference(
        "s1d-6.12-sticky_type.json",
        replace("/steps/1/result", json!("EBUSY")),
    );
    assert_eq!(
        (
            found.subject.as_str(),
            found.expected.as_str(),
            found.got.as_str()
        ),
        ("result", "EBUSY", "success")
    );
}

#[test]
fn operation_that_cannot_be_done_is_an_error_that_names_the_step() {
    let mut trace = recorded("s3-6.12-on-remove.json");
    trace["steps"][6]["target"] = json!("dimm9");
    let error = try_replay(&trace).unwrap_err().to_string();
    assert_eq!(error, "step 6 (device_del dimm9): there is no dimm9");

    let mut trace = recorded("s3-6.12-on-remove.json");
    trace["steps"][1]["arg"] = trace["steps"][0]["arg"].clone();
    let error = try_replay(&trace).unwrap_err().to_string();
    assert!(
        error.contains("dimm1 overlaps memory that is there"),
        "{error}"
    );

    let mut trace = recorded("s1d-6.12-hwpoison.json");
    trace["steps"][4]["arg"] = json!("for p in 1; do echo");
    let error = try_replay(&trace).unwrap_err().to_string();
    assert!(error.contains("a loop is not closed"), "{error}");
}

/// Random bytes of a trace changed: an error or a difference perhaps, but nothing worse.
#[test]
fn damaged_files_never_panic() {
    let path: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "traces",
        "s4-6.12-rollback-zone-2.json",
    ]
    .iter()
    .collect();
    let original = fs::read(path).unwrap();
    let mut random = 1_u64;
    for _ in 0..400 {
        let mut damaged = original.clone();
        for _ in 0..3 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let position = (random >> 33) as usize % damaged.len();
            // Digits stay digits, so that most files still parse.
            match &mut damaged[position] {
                digit @ b'0'..=b'9' => *digit = b'0' + (random >> 40) as u8 % 10,
                other => *other ^= (random >> 40) as u8 & 1,
            }
        }
        if let Ok(trace) = Trace::parse(&damaged) {
            let _either_way = replay(&trace, &mut |_| {});
        }
    }
}

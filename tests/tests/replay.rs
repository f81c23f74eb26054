//! Recorded traces of real kernels against the model of memory hotplug. And that the comparison can fail: a trace with
//! one value changed must be told apart from the model, at that value.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;

use integration_tests::traces::{recorded, try_replay};
use serde_json::{Value, json};
use vmm_harness::replay::{Difference, Inputs, ReplayError, Summary, Trace, replay};

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
    assert_eq!(count, 26);
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
    trace["incomplete"] = json!(true);
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
    trace["incomplete"] = json!(true);
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
    trace["incomplete"] = json!(true);
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
    let mut random = 1_u64;
    for round in 0..600 {
        let name = ["s4-6.12-rollback-zone-2.json", "s5-6.12-rebind-empty.json"][round % 2];
        let mut damaged = recorded(name).to_string().into_bytes();
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
            let _either_way = replay(&trace, None);
        }
    }
}

/// The outcome of an eject is the model's own, whatever the recording says.
#[test]
fn eject_that_ends_another_way_is_told_apart() {
    for (name, outcomes) in [
        ("s3-6.12-on-remove.json", ["guest_error", "timeout"]),
        (
            "s4-6.12-rollback-autoonline-movable.json",
            ["deleted", "timeout"],
        ),
        ("s4-6.12-tmpfs-full.json", ["deleted", "guest_error"]),
    ] {
        for outcome in outcomes {
            let found = difference(name, |trace| {
                let steps = trace["steps"].as_array_mut().unwrap();
                let eject = steps.iter_mut().find(|step| step["op"] == "device_del");
                eject.unwrap()["outcome"] = json!(outcome);
            });
            assert!(
                found.operation.starts_with("device_del"),
                "{name} {outcome}: {found}"
            );
        }
    }
    let found = difference("s3-6.12-on-remove.json", |trace| {
        let steps = trace["steps"].as_array_mut().unwrap();
        let eject = steps.iter_mut().find(|step| step["op"] == "device_del");
        eject.unwrap()["outcome"] = json!("guest_error");
    });
    assert_eq!(
        (
            found.field.as_str(),
            found.expected.as_str(),
            found.got.as_str()
        ),
        ("outcome", "guest_error", "deleted")
    );
}

/// The step of a trace that has a pending eject, after which the machine hears its end.
fn with_messages(messages: Value) -> Option<Difference> {
    let mut trace = recorded("s4-6.12-tmpfs-full.json");
    let steps = trace["steps"].as_array_mut().unwrap();
    let waiting = steps.iter().position(|step| step["op"] == "device_del");
    steps[waiting.unwrap()]["qmp_events"]
        .as_array_mut()
        .unwrap()
        .extend(messages.as_array().unwrap().iter().cloned());
    try_replay(&trace).unwrap().difference
}

#[test]
fn messages_end_the_eject_of_their_own_dimm_only() {
    let ost = |fields: Value| {
        let mut info = json!({ "source": 3, "slot-type": "DIMM" });
        let info_fields = info.as_object_mut().unwrap();
        info_fields.extend(fields.as_object().unwrap().clone());
        json!({ "event": "ACPI_DEVICE_OST", "info": info })
    };
    for others in [
        json!([{ "event": "DEVICE_DELETED", "device": "dimm7" }]),
        json!([ost(
            json!({ "device": "dimm7", "slot": "7", "status": 130 })
        )]),
        json!([ost(json!({ "slot": "7", "status": 0 }))]),
        json!([ost(json!({ "slot": "0", "status": 132 }))]),
    ] {
        assert_eq!(with_messages(others.clone()), None, "{others}");
    }
    for own in [
        json!([{ "event": "DEVICE_DELETED", "device": "dimm0" }]),
        json!([ost(
            json!({ "device": "dimm0", "slot": "0", "status": 131 })
        )]),
        json!([ost(json!({ "slot": "0", "status": 0 }))]),
    ] {
        assert!(with_messages(own.clone()).is_some(), "{own}");
    }
}

#[test]
fn operations_are_read_in_every_form_they_were_recorded_in() {
    let ratio = |target: Value, arg: Value, value_after: Value| json!({ "op": "write_param", "target": target, "arg": arg, "result": 0, "value_after": value_after });
    let state = |target: Value, arg: Value| json!({ "op": "write_state", "target": target, "arg": arg, "result": 0 });
    let steps = json!([
        ratio(json!("auto_movable_ratio"), json!(100), json!("100")),
        ratio(json!("/sys/module/memory_hotplug/parameters/auto_movable_ratio"), json!("101"), json!(101)),
        ratio(json!(null), json!("auto_movable_ratio=102"), json!("102")),
        ratio(json!(null), json!({ "name": "auto_movable_ratio", "value": 103 }), json!("103")),
        ratio(json!(null), json!(["auto_movable_ratio", "104"]), json!("104")),
        ratio(json!("auto_movable_numa_aware"), json!(false), json!(false)),
        ratio(json!("auto_movable_numa_aware"), json!("Y"), json!(true)),
        { "op": "add_dimm", "target": "d", "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null },
          "result": 0, "uevents": ["add memory32", "change memory32", "bind memory32"] },
        state(json!("memory32"), json!(null)),
        state(json!("32"), json!("")),
        { "op": "write_online", "target": "memory32", "arg": true, "result": 0, "uevents": ["online memory32"] },
        { "op": "shell", "target": null, "arg": "grep nothing /proc/meminfo", "result": 1, "out": "" },
    ]);
    let summary = replay_steps("s1d-6.12-sticky_type.json", steps).unwrap();
    assert_eq!((summary.steps, summary.difference), (12, None));
}

#[test]
fn states_and_uevents_of_a_pending_eject_may_lag() {
    // Memory block 33 goes offline in step 9, and the eject goes on.
    let mut trace = recorded("s4-6.12-tmpfs-full.json");
    let step = &mut trace["steps"][9];
    step["memtotal_kib"] = json!(step["memtotal_kib"].as_u64().unwrap() - 131_072);
    let zones = step["zoneinfo"].as_array_mut().unwrap();
    let movable = zones.iter_mut().find(|zone| zone["zone"] == "Movable");
    let movable = movable.unwrap();
    for (field, change) in [
        ("start_pfn", 32_768),
        ("spanned", -32_768),
        ("present", -32_768),
        ("managed", -32_768),
    ] {
        movable[field] = json!(movable[field].as_i64().unwrap() + change);
    }
    let inputs = |trace: &Value| {
        let summary = try_replay(trace).unwrap();
        assert_eq!(summary.difference, None);
        (summary.inputs.early_states, summary.inputs.late_uevents)
    };

    // The state was read before, the uevent after.
    let mut early = trace.clone();
    early["steps"][9]["uevents"] = json!(["offline memory33"]);
    early["steps"][10]["uevents"]
        .as_array_mut()
        .unwrap()
        .remove(0);
    assert_eq!(inputs(&early), (1, 0));

    // The state was read after, and the uevent comes with the next step.
    let mut late = trace.clone();
    late["steps"][9]["blocks"]["33"] =
        json!({ "state": "offline", "valid_zones": "Normal Movable" });
    assert_eq!(inputs(&late), (0, 1));
    // But it has to come.
    late["steps"][10]["uevents"]
        .as_array_mut()
        .unwrap()
        .remove(0);
    assert!(try_replay(&late).unwrap().difference.is_some());
}

/// A script that poisons a page which the kernel may have in use.
#[test]
fn page_in_use_is_not_poisoned_if_the_trace_says_so() {
    let add = json!({ "op": "add_dimm", "target": "d", "result": 0, "uevents": ["add memory32"],
        "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null } });
    let poison = |zone: &str, file: &str, out: &str| {
        let script = format!(
            "echo 0x100400000 > /sys/devices/system/memory/{file}; echo rc $?; grep -i Hardware /proc/meminfo"
        );
        let steps = json!([
            add,
            { "op": "write_state", "target": 32, "arg": zone, "result": 0, "uevents": ["online memory32"] },
            { "op": "shell", "target": null, "arg": script, "result": 0, "out": out },
        ]);
        let summary = replay_steps("s1d-6.12-sticky_type.json", steps).unwrap();
        (summary.difference.is_none(), summary.inputs.in_use)
    };
    let (soft, hard) = ("soft_offline_page", "hard_offline_page");
    let (failed, counted) = (
        "rc 1\nHardwareCorrupted: 0 kB\n",
        "rc 1\nHardwareCorrupted: 4 kB\n",
    );
    assert_eq!(poison("online_kernel", soft, failed), (true, 1));
    assert_eq!(poison("online_kernel", hard, counted), (true, 1));
    assert_eq!(poison("online_movable", soft, failed), (false, 0));
}

#[test]
fn veto_with_an_unknown_errno_is_an_error() {
    let script = "echo -4000 > /sys/kernel/debug/notifier-error-inject/memory/actions/MEM_GOING_ONLINE/error";
    let steps = json!([{ "op": "shell", "target": null, "arg": script, "result": 0, "out": "" }]);
    let error = replay_steps("s1d-6.12-sticky_type.json", steps).unwrap_err();
    assert!(error.to_string().contains("no errno 4000"), "{error}");
}

#[test]
fn command_line_is_understood_before_init_sets_parameters() {
    let name = "s1d-6.12-sticky_type.json";
    let pointer = "/boot/memory_hotplug_params/auto_movable_ratio";
    let mut set = recorded(name);
    *set.pointer_mut(pointer).unwrap() = json!(77);
    let summary = try_replay(&set).unwrap();
    assert_eq!((summary.difference, summary.inputs.parameters), (None, 1));
    let cmdline = set["boot"]["cmdline"].as_str().unwrap();
    set["boot"]["cmdline"] = json!(format!("{cmdline} memory_hotplug.auto_movable_ratio=78"));
    let found = try_replay(&set).unwrap().difference.unwrap();
    assert_eq!(
        (
            found.subject.as_str(),
            found.expected.as_str(),
            found.got.as_str()
        ),
        ("auto_movable_ratio", "77", "78")
    );
}

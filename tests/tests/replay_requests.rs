//! Recorded requests of real virtio-mem drivers against ours. And that the comparison can fail: a recording with one
//! request changed must be told apart, where it was changed.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration_tests::traces::{recorded, try_replay};
use serde_json::{Value, json};
use vmm_harness::replay::Inputs;

/// Sub-blocks, offline memory up to the threshold, blocks online in every zone, kernel pages in the way.
const SUB_BLOCKS: &str = "s5-6.12-offline-2m.json";
/// Big blocks, one of them with a kernel zone in it.
const BIG_BLOCKS: &str = "s5-6.12-bbm-256m-offline.json";
/// The driver leaves and comes back.
const REBIND: &str = "s5-6.12-rebind-empty.json";

/// What is said of the first difference.
fn difference(trace: &Value) -> String {
    let summary = try_replay(trace).unwrap();
    let difference = summary.difference.map(|difference| difference.to_string());
    difference.unwrap_or_else(|| {
        format!(
            "none: {} requests, taken: {}",
            summary.requests, summary.inputs
        )
    })
}

fn requests(trace: &mut Value, step: usize) -> &mut Vec<Value> {
    trace["steps"][step]["requests"].as_array_mut().unwrap()
}

/// Where the requests are: step and index, without the events of the machine.
fn places(trace: &Value) -> Vec<(usize, usize)> {
    let steps = trace["steps"].as_array().unwrap().iter().enumerate();
    let all = steps.flat_map(|(step, value)| {
        let requests = value["requests"].as_array().unwrap().iter().enumerate();
        requests
            .filter(|(_, request)| request["addr"].is_u64())
            .map(move |(index, _)| (step, index))
    });
    all.collect()
}

fn add(request: &mut Value, field: &str, difference: i64) {
    let value = request[field].as_i64().unwrap() + difference;
    request[field] = json!(value);
}

/// One change to a request; `false` if it cannot be made here.
type Change = fn(&mut Vec<Value>, usize, i64) -> bool;

const CHANGES: [(&str, Change); 9] = [
    ("address + 1", |requests, at, block_size| {
        add(&mut requests[at], "addr", block_size);
        true
    }),
    ("address - 1", |requests, at, block_size| {
        add(&mut requests[at], "addr", -block_size);
        true
    }),
    ("count + 1", |requests, at, _| {
        add(&mut requests[at], "nb_blocks", 1);
        true
    }),
    ("count - 1", |requests, at, _| {
        add(&mut requests[at], "nb_blocks", -1);
        true
    }),
    ("type", |requests, at, _| {
        let plug = requests[at]["type"] == "plug";
        requests[at]["type"] = json!(if plug { "unplug" } else { "plug" });
        true
    }),
    ("response", |requests, at, _| {
        requests[at]["response"] = json!("BUSY");
        true
    }),
    ("missing", |requests, at, _| {
        requests.remove(at);
        true
    }),
    ("extra", |requests, at, _| {
        requests.insert(at, requests[at].clone());
        true
    }),
    ("order", |requests, at, _| {
        let next = requests
            .get(at + 1)
            .is_some_and(|next| next["addr"].is_u64());
        if next {
            requests.swap(at, at + 1);
        }
        next
    }),
];

#[test]
fn request_that_was_changed_is_found_whichever_it_is() {
    let (mut changes, mut missed) = (0, Vec::new());
    // Of many requests that are much alike a few will do.
    for (name, every) in [(BIG_BLOCKS, 1), (REBIND, 1), (SUB_BLOCKS, 11)] {
        let original = recorded(name);
        let block_size = original["device"]["block_size"].as_i64().unwrap();
        for (step, index) in places(&original).into_iter().step_by(every) {
            for (what, change) in CHANGES {
                let mut trace = original.clone();
                if !change(requests(&mut trace, step), index, block_size) {
                    continue;
                }
                changes += 1;
                let found = difference(&trace);
                if found.starts_with("none") {
                    missed.push(format!("{name} step {step} request {index} {what}"));
                }
            }
        }
    }
    // The last sub-block of a kernel's memory block that was unplugged. Had it been the one below, those two that were
    // left would have been others, and of what is left a recording shows how much it is, not where.
    assert_eq!(
        missed,
        ["s5-6.12-offline-2m.json step 16 request 84 address - 1"]
    );
    assert!(changes > 250, "{changes}");
}

#[test]
fn differences_say_what_was_recorded_and_what_was_asked() {
    let changed = |step: usize, change: &dyn Fn(&mut Vec<Value>)| {
        let mut trace = recorded(SUB_BLOCKS);
        change(requests(&mut trace, step));
        difference(&trace)
    };
    // Of step 1 the first entry is an event of the machine.
    assert_eq!(
        changed(1, &|requests| requests.swap(2, 3)),
        "step 1 (resize 2147483648): request 1: expected plug 0x110000000 blocks 64 ack, \
         got plug 0x108000000 blocks 64 ack"
    );
    assert_eq!(
        changed(5, &|requests| requests[0]["response"] = json!("NACK")),
        "step 5 (write_state 36 online_movable): request 0: expected plug 0x140000000 blocks 64 nack, \
         got plug 0x140000000 blocks 64 ack"
    );
    assert_eq!(
        changed(7, &|requests| requests.clear()),
        "step 7 (resize 1677721600): request 0: expected none, got plug 0x160000000 blocks 32 ack"
    );
    assert_eq!(
        changed(8, &|requests| requests.push(requests[0].clone())),
        "step 8 (resize 1675624448): request 1: expected unplug 0x163e00000 blocks 1 ack, \
         got none: the driver rests, all is done"
    );
    assert_eq!(
        changed(15, &|requests| requests.swap(1, 2)),
        "step 15 (resize 314572800): request 2: expected unplug 0x107e00000 blocks 1 ack, \
         got unplug 0x107a00000 blocks 1 ack"
    );
    // What was online could have been in use: then there is more left than was recorded.
    assert_eq!(
        changed(14, &|requests| requests.clear()),
        "step 14 (resize 536870912): device plugged_size: expected 536870912, got 671088640"
    );
}

#[test]
fn parameters_of_the_module_are_the_drivers() {
    let changed = |name: &str, from: &str, to: &str| {
        let mut trace = recorded(name);
        let out = trace["steps"][0]["out"].as_str().unwrap().replace(from, to);
        trace["steps"][0]["out"] = json!(out);
        difference(&trace)
    };
    assert_eq!(
        changed(SUB_BLOCKS, "force_bbm N", "force_bbm Y"),
        "step 0 (probe): driver subblock size: expected 200000, got none"
    );
    assert_eq!(
        changed(
            "s5-6.12-bbm-size-512m.json",
            "bbm_block_size 536870912",
            "bbm_block_size 0"
        ),
        "step 0 (probe): driver big block size: expected 20000000, got 8000000"
    );
    // A driver that may unplug what is online does not wait for somebody to take it offline.
    let name = "s5-6.12-unplug-online-off-2m.json";
    assert_eq!(
        changed(name, "unplug_online N", "unplug_online Y"),
        "step 3 (write_state 35 offline): request 0: expected unplug 0x118000000 blocks 64 ack, \
         got none: the driver rests, the memory to be unplugged is in use"
    );
    // Nobody knows what that would be.
    let mut trace = recorded(SUB_BLOCKS);
    trace["steps"][0]["out"] = json!("/sys/module/virtio_mem/parameters/force_bbm perhaps");
    let error = try_replay(&trace).unwrap_err().to_string();
    assert_eq!(
        error,
        "step 0 (probe): \"perhaps\" is no value of force_bbm"
    );
}

#[test]
fn requested_size_is_the_devices() {
    let mut trace = recorded(REBIND);
    trace["steps"][4]["requested_size"] = json!(0);
    assert_eq!(
        difference(&trace),
        "step 4 (resize 268435456): device requested_size: expected 0, got 268435456"
    );
    // A device refuses what is no multiple of its blocks, whatever the machine calls that.
    let mut trace = recorded(REBIND);
    trace["steps"][4]["arg"] = json!(268_435_457);
    let found = difference(&trace);
    assert!(
        found.starts_with("step 4 (resize 268435457): result: expected success, got "),
        "{found}"
    );
}

#[test]
fn driver_that_does_not_come_back_asks_for_nothing() {
    let mut trace = recorded(REBIND);
    trace["steps"][5]["arg"] = json!("echo rc 0");
    assert_eq!(
        difference(&trace),
        "step 5 (shell echo rc 0): request 0: expected plug 0x100000000 blocks 64 ack, \
         got none: the driver rests, the driver is not bound"
    );
    // Memory it has left behind keeps it out.
    let mut trace = recorded("s5-6.12-rebind-plugged.json");
    trace["steps"][3]["out"] = json!("rc 0\n");
    let found = difference(&trace);
    assert!(found.contains("shell output"), "{found}");
}

#[test]
fn kernel_pages_are_taken_from_the_recording_and_counted() {
    for (name, requests, busy_places, given_up) in [
        (SUB_BLOCKS, 155, 2, 1),
        (BIG_BLOCKS, 11, 0, 1),
        ("s5-6.12-plug-order-2m.json", 97, 2, 0),
        ("s5-6.1-rand01.json", 170, 2, 1),
        ("s5-6.12-unplug-online-off-2m.json", 71, 0, 0),
    ] {
        let summary = try_replay(&recorded(name)).unwrap();
        let inputs = Inputs {
            busy_places,
            given_up,
            // Results of programs that took blocks offline.
            busy: summary.inputs.busy,
            ..Inputs::default()
        };
        assert_eq!(
            (summary.difference, summary.requests, summary.inputs),
            (None, requests, inputs),
            "{name}"
        );
    }
}

#[test]
fn recording_that_claims_too_many_busy_places_is_not_believed() {
    // The first 23 requests of the last step take Movable memory; the others a kernel's memory block, bit by bit. Of
    // these only each `keep`th is left, as if the kernel had used what is between them.
    let thinned = |keep: usize| {
        let mut trace = recorded(SUB_BLOCKS);
        trace["incomplete"] = json!(true);
        let last = trace["steps"].as_array_mut().unwrap().last_mut().unwrap();
        for seen in [
            "plugged_size",
            "blocks",
            "zoneinfo",
            "memtotal_kib",
            "iomem",
        ] {
            last[seen] = Value::Null;
        }
        let requests = last["requests"].as_array_mut().unwrap();
        let mut index = 0;
        requests.retain(|_| {
            index += 1;
            index <= 23 || index % keep == 0
        });
        difference(&trace)
    };
    assert_eq!(
        thinned(8),
        "requests: taken from the recording: expected at most 20 busy places and one input for each of 101 requests, \
         got 50 busy places, 1 given up"
    );
    // All of them is what the kernel really did not get.
    assert_eq!(
        thinned(1),
        "none: 155 requests, taken: 0 EBUSY, 0 EINTR, 0 endless, 2 busy places, 1 given up"
    );
}

/// After the last step of [`SUB_BLOCKS`], where two sub-blocks were left, comes another one, so many seconds later.
fn after_the_last(
    seconds: f64,
    op: &str,
    arg: u64,
    requests: &[(&str, u64, u64)],
    uevents: &[&str],
) -> Value {
    let mut trace = recorded(SUB_BLOCKS);
    trace["incomplete"] = json!(true);
    let steps = trace["steps"].as_array_mut().unwrap();
    let t = steps.last().unwrap()["requests"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()["t"]
        .as_f64()
        .unwrap();
    let requests: Vec<Value> = requests
        .iter()
        .map(|(kind, addr, blocks)| {
            json!({ "type": kind, "addr": addr, "nb_blocks": blocks, "response": "ACK", "t": t + seconds })
        })
        .collect();
    steps.push(json!({ "op": op, "target": null, "arg": arg, "result": 0, "requests": requests, "uevents": uevents }));
    trace
}

const LEFT: [(&str, u64, u64); 2] = [("unplug", 0x1_08c0_0000, 1), ("unplug", 0x1_0800_0000, 1)];
const GONE: [&str; 2] = ["offline memory33", "remove memory33"];

#[test]
fn driver_tries_again_when_its_time_has_come_and_not_before() {
    let trace = after_the_last(60.0, "wait", 60, &LEFT, &GONE);
    let summary = try_replay(&trace).unwrap();
    assert_eq!((summary.difference, summary.inputs.retries), (None, 1));
    let early = after_the_last(40.0, "wait", 60, &LEFT, &GONE);
    assert_eq!(
        difference(&early),
        "step 17 (wait 60): request 0: expected unplug 0x108c00000 blocks 1 ack, \
         got none: the driver rests, the memory to be unplugged is in use"
    );
}

#[test]
fn driver_that_tries_again_before_an_operation_works_towards_the_old_target() {
    let requests = [LEFT[0], LEFT[1], ("plug", 0x1_0000_0000, 64)];
    let uevents = [GONE[0], GONE[1], "add memory32"];
    let trace = after_the_last(60.0, "resize", 128 << 20, &requests, &uevents);
    let summary = try_replay(&trace).unwrap();
    assert_eq!((summary.difference, summary.inputs.retries), (None, 1));
}

#[test]
fn recorder_that_did_not_wait_shows_the_rest_in_the_next_step() {
    let mut trace = recorded(SUB_BLOCKS);
    trace["incomplete"] = json!(true);
    let steps = trace["steps"].as_array_mut().unwrap();
    steps.truncate(14);
    let mut rest = steps[13].clone();
    rest["op"] = json!("wait");
    let early = rest["requests"].as_array_mut().unwrap().remove(0);
    let first = &mut steps[13];
    first["requests"] = json!([early]);
    first["settle_timeout"] = json!(true);
    first["plugged_size"] = json!(896 << 20);
    for seen in ["blocks", "zoneinfo", "memtotal_kib", "iomem"] {
        first[seen] = Value::Null;
    }
    first["uevents"] = json!([]);
    steps.push(rest);
    assert_eq!(try_replay(&trace).unwrap().difference, None);
    trace["steps"][13]["settle_timeout"] = json!(null);
    assert_eq!(
        difference(&trace),
        "step 13 (resize 671088640): request 1: expected none, got unplug 0x130000000 blocks 64 ack"
    );
}

/// The memory is on the node the device names.
#[test]
fn device_on_another_node_is_found() {
    let mut trace = recorded(REBIND);
    let arguments = trace["boot"]["machine_args"].as_array_mut().unwrap();
    let device = arguments.iter_mut().find(|argument| {
        argument
            .as_str()
            .is_some_and(|a| a.starts_with("virtio-mem-pci,"))
    });
    let device = device.unwrap();
    *device = json!(format!("{},node=1", device.as_str().unwrap()));
    let found = difference(&trace);
    assert!(found.contains("node"), "{found}");
}

/// What is in Movable can be moved: a driver that begins elsewhere is wrong, and not the kernel's pages in its way.
#[test]
fn movable_memory_is_not_believed_to_be_in_use_where_the_recording_goes_on_elsewhere() {
    let mut trace = recorded("s5-6.12-force-bbm-2m.json");
    let unplugs = |requests: &Vec<Value>| {
        let unplug = |request: &Value| request["type"] == json!("unplug");
        requests.iter().filter(|request| unplug(request)).count()
    };
    let steps = trace["steps"].as_array_mut().unwrap().iter_mut();
    let requests = steps.map(|step| step["requests"].as_array_mut().unwrap());
    let last = requests
        .filter(|requests| unplugs(requests) > 1)
        .last()
        .unwrap();
    let at = last
        .iter()
        .position(|request| request["type"] == json!("unplug"))
        .unwrap();
    last.swap(at, at + 1);
    let found = difference(&trace);
    assert!(found.contains("expected unplug"), "{found}");
}

//! Stress runs, short ones: every pattern, workload and fault, on KVM and in this process. Each is a process of its
//! own: what it holds, which a run checks, is then nobody else's.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "a stress run makes its own devices")]
mod common;
#[expect(dead_code, reason = "a stress run leaves most of a terminal alone")]
#[path = "common/terminal.rs"]
mod pty;

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::kvm_or_skip;
use pty::Terminal;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PATTERNS: [&str; 4] = ["sawtooth", "random", "thrash", "burst"];

/// `vmem stress`, after `shell` has been done in the same process.
fn vmem(shell: &str, args: &str) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("{shell} exec \"$0\" stress {args}"))
        .arg(env!("CARGO_BIN_EXE_vmem"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a run of so many resizes says, which must hold every check.
fn run(guest: &str, resizes: u64, args: &str) -> Value {
    let args = format!("--guest {guest} --region 1G --resizes {resizes} --json {args}");
    let run = vmem("", &args);
    assert_eq!(run.status.code(), Some(0), "{args}: {}", text(&run.stderr));
    let json: Value = serde_json::from_slice(&run.stdout).unwrap();
    let count = |name: &str| json["summary"][name].as_u64().unwrap();
    let lives = count("lives");
    assert_eq!(count("resizes"), resizes, "{json}");
    assert!(count("rests") >= lives && lives >= 1, "{json}");
    assert!(
        count("observations") > 0 && count("pages_verified") > 0,
        "{json}"
    );
    assert!(count("blocks_plugged") > 0, "{json}");
    json
}

fn every_pattern_and_workload(guest: &str) {
    for (pattern, workload, policy) in [
        ("sawtooth", "alloc", "direct"),
        ("random", "pin", "direct"),
        ("thrash", "mixed", "linux"),
        ("burst", "pin", "linux"),
    ] {
        let args = format!("--pattern {pattern} --workload {workload} --policy {policy}");
        let summary = &run(guest, 40, &args)["summary"];
        assert_eq!(summary["blocks_plugged"], summary["blocks_unplugged"]);
        let unmovable = summary["most_unmovable"].as_u64().unwrap();
        match workload {
            "alloc" => assert_eq!(unmovable, 0),
            "pin" => assert!(unmovable > 0),
            // There may have been too little time for one.
            _ => {}
        }
    }
}

#[test]
fn every_pattern_and_workload_holds_in_this_process() {
    every_pattern_and_workload("in-process");
}

#[test]
fn every_pattern_and_workload_holds_on_kvm() {
    if kvm_or_skip() {
        every_pattern_and_workload("kvm");
    }
}

/// With each fault in turn until it has occurred: when depends on threads.
fn every_fault(guest: &str, faults: &[&str]) {
    for fault in faults {
        let injected = (0..20).any(|_| {
            let json = run(guest, 40, &format!("--pattern thrash --faults {fault}"));
            let summary = &json["summary"];
            let has = |list: &str, key: &str, value: &str| {
                let list = summary[list].as_array().unwrap();
                list.iter().any(|entry| entry[key] == value)
            };
            let occurred = has("faults", "fault", fault);
            // What the host refuses is answered BUSY, and so is what a device is asked that is frozen.
            let refused = *fault != "stall" && occurred;
            assert!(!refused || has("requests", "answer", "busy"), "{json}");
            occurred
        });
        assert!(injected, "{fault} never occurred");
    }
}

#[test]
fn faults_of_the_host_are_survived_in_this_process() {
    every_fault("in-process", &["open", "discard", "slot", "busy"]);
}

#[test]
fn faults_of_the_host_are_survived_on_kvm() {
    if kvm_or_skip() {
        every_fault("kvm", &["open", "discard", "slot", "busy", "stall"]);
    }
}

#[test]
fn rogues_are_caught_and_others_take_their_place() {
    for guest in ["in-process", "auto"] {
        let summary = &run(guest, 40, "--workload rogue")["summary"];
        assert_eq!(summary["rogues"], summary["lives"]);
        assert!(summary["rogues"].as_u64().unwrap() >= 2, "{summary}");
    }
}

#[test]
fn guests_share_a_budget() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().display();
    run(
        "auto",
        90,
        &format!("--vms 3 --budget 1G --report {report}"),
    );
    let json = fs::read(dir.path().join("report.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let vms = json["vms"].as_array().unwrap();
    assert_eq!(vms.len(), 3);
    let most = |vm: &Value| {
        let samples = vm["samples"].as_array().unwrap();
        let plugged = samples
            .iter()
            .map(|sample| sample["plugged"].as_u64().unwrap());
        plugged.max().unwrap()
    };
    let most: Vec<u64> = vms.iter().map(most).collect();
    // Each had some, and what one had others had at other times.
    assert!(most.iter().all(|bytes| *bytes > 0), "{most:?}");
    assert!(most.iter().sum::<u64>() > 1 << 30, "{most:?}");
    for vm in vms {
        for total in ["seconds", "resizes", "blocks_plugged", "pages_verified"] {
            let samples = vm["samples"].as_array().unwrap();
            assert!(samples.is_sorted_by_key(|sample| sample[total].as_f64().unwrap()));
        }
    }
}

#[test]
fn a_guest_that_does_not_get_on_ends_the_run() {
    // Pinned pages are in the way of an unplug for longer than no time.
    let args = "--guest in-process --region 1G --duration 1h --workload pin --pattern sawtooth --stuck-after 0s";
    let run = vmem("", args);
    let err = text(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{err}");
    assert!(err.contains("check `no-resize-is-stuck` failed"), "{err}");
}

#[test]
fn a_failure_is_told_with_its_seed_and_the_line_that_repeats_it() {
    // Too few descriptors for a guest.
    let args = "--guest in-process --region 256M --resizes 5 --pattern sawtooth";
    let run = vmem("unset VMEM_SEED; ulimit -n 5;", args);
    let (out, err) = (text(&run.stdout), text(&run.stderr));
    assert_eq!(run.status.code(), Some(1), "{err}");
    assert!(out.contains("1 failure, which has ended the run"), "{out}");
    let repeats = err
        .lines()
        .find(|line| line.starts_with("VMEM_SEED="))
        .unwrap();
    let seed = repeats
        .strip_prefix("VMEM_SEED=")
        .unwrap()
        .split(';')
        .next()
        .unwrap();
    let expected = format!("VMEM_SEED={seed}; to repeat: vmem stress {args} --seed {seed}");
    assert_eq!(repeats, expected);
    assert!(
        err.contains("vmem: guest 0, resize 0 to 0 bytes: "),
        "{err}"
    );
}

#[test]
fn the_first_failure_of_several_guests_is_told() {
    for _ in 0..3 {
        let args = "--vms 4 --guest in-process --region 1G --duration 1h --workload pin --pattern sawtooth";
        let run = vmem("", &format!("{args} --stuck-after 1ms"));
        let err = text(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{err}");
        // Guests that are ended for it, in the middle of something, have not failed.
        assert!(err.contains("check `no-resize-is-stuck` failed"), "{err}");
        assert_eq!(err.matches("vmem: guest ").count(), 1, "{err}");
    }
}

#[test]
fn a_failure_is_told_whatever_becomes_of_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("index.html");
    std::os::unix::fs::symlink("/dev/full", &page).unwrap();
    let args = "--guest in-process --region 1G --duration 1h --workload pin --pattern sawtooth --stuck-after 0s";
    let report = dir.path().display();
    let run = vmem("", &format!("{args} --seed 4 --report {report} >/dev/full"));
    let err = text(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{err}");
    assert!(err.contains("check `no-resize-is-stuck` failed"), "{err}");
    let repeats = format!("VMEM_SEED=4; to repeat: vmem stress {args} --seed 4\n");
    assert!(err.contains(&repeats), "{err}");
    assert!(
        err.ends_with("No space left on device (os error 28)\n"),
        "{err}"
    );

    // What cannot be written from the beginning is found there.
    fs::remove_file(&page).unwrap();
    fs::create_dir(&page).unwrap();
    let run = vmem("", &format!("--duration 1h --report {report}"));
    let err = text(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{err}");
    assert!(err.contains("Is a directory"), "{err}");
}

#[test]
fn numbers_beyond_reason_do_not_end_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let most = u64::MAX;
    let args = format!(
        "--guest in-process --region 256M --resizes 3 --vms 2 --budget {most} --stuck-after {most}s --report {}",
        dir.path().display()
    );
    let run = vmem("", &args);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let json = fs::read(dir.path().join("report.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    // More than they have is no limit.
    assert_eq!(json["run"]["options"]["budget"], Value::Null);
    let run = vmem(
        "export VMEM_SEED=$(printf '\\377');",
        "--resizes 1 --guest in-process",
    );
    assert_eq!(run.status.code(), Some(2), "{}", text(&run.stdout));
}

#[test]
fn what_was_measured_of_a_guest_goes_together() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().display();
    for guest in ["in-process", "auto"] {
        run(guest, 300, &format!("--pattern thrash --report {report}"));
        let json = fs::read(dir.path().join("report.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        let samples = json["vms"][0]["samples"].as_array().unwrap();
        assert!(!samples.is_empty());
        for sample in samples {
            let size = |name: &str| sample[name].as_u64().unwrap();
            let most = size("most_plugged");
            for part in ["plugged", "online", "resident"] {
                assert!(most >= size(part), "{part}: {sample}");
            }
        }
        // Of one look each: a map that has nothing is of a sample that has nothing.
        let mut compared = 0;
        for map in json["vms"][0]["maps"].as_array().unwrap() {
            let of = |sample: &&Value| sample["seconds"] == map["seconds"];
            let Some(sample) = samples.iter().find(of) else {
                continue;
            };
            let shares = map["shares"].as_str().unwrap();
            let has_some = shares.chars().any(|share| share != '0');
            assert_eq!(sample["plugged"] != 0, has_some, "{sample} {shares}");
            compared += 1;
        }
        assert!(compared > 0);
    }
}

#[test]
fn the_summary_and_its_json_say_what_was_done() {
    let args = "--guest in-process --region 256M --resizes 5";
    let run = vmem("", &format!("{args} --seed 3"));
    let out = text(&run.stdout);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(out.ends_with("0 failures\n"), "{out}");
    assert!(
        out.starts_with("in-process, as asked, seed 3\n") && out.contains(" 5 resizes\n"),
        "{out}"
    );
    let run = vmem("export VMEM_SEED=9;", &format!("{args} --json"));
    let json: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["outcome"], "passed");
    assert_eq!(json["run"]["seed"], 9);
    assert_eq!(json["summary"]["resizes"], 5);
    assert!(json["summary"]["requests"][0]["count"].as_u64().unwrap() > 0);
    assert!(json.get("vms").is_none());
}

/// Waits for the threads of a guest: signals are waited for by then.
fn await_guest(run: &mut Child) {
    let threads = format!("/proc/{}/task", run.id());
    while fs::read_dir(&threads).unwrap().count() < 4 {
        assert_eq!(run.try_wait().unwrap(), None);
        thread::yield_now();
    }
}

#[test]
fn a_signal_ends_a_run_in_order() {
    for pattern in PATTERNS {
        let mut run = Command::new(env!("CARGO_BIN_EXE_vmem"))
            .args(["stress", "--guest", "in-process", "--region", "256M"])
            .args(["--duration", "1h", "--pattern", pattern])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        await_guest(&mut run);
        kill_process(Pid::from_child(&run), Signal::INT).unwrap();
        let mut out = String::new();
        let mut stdout = run.stdout.take().unwrap();
        stdout.read_to_string(&mut out).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(4), "{pattern}: {out}");
        assert!(
            out.ends_with("0 failures until it was ended early\n"),
            "{out}"
        );
    }
}

#[test]
fn a_second_signal_ends_a_run_that_cannot_end() {
    // Nobody reads what it says in the end.
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_vmem"))
        .args([
            "stress",
            "--guest",
            "in-process",
            "--region",
            "256M",
            "--duration",
            "1h",
        ])
        .stdout(writer)
        .spawn()
        .unwrap();
    await_guest(&mut run);
    let begun = Instant::now();
    let code = loop {
        assert!(begun.elapsed() < Duration::from_secs(60));
        kill_process(Pid::from_child(&run), Signal::INT).unwrap();
        thread::sleep(Duration::from_millis(100));
        if let Some(status) = run.try_wait().unwrap() {
            break status.code();
        }
    };
    assert_eq!(code, Some(130));
    drop(reader);
}

#[test]
fn progress_is_a_bar_on_a_terminal_and_ctrl_c_ends_the_run() {
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmem"));
        command.args(["stress", "--guest", "in-process", "--region", "256M"]);
        command.args(args);
        Terminal::new(command, 120, 24)
    };
    let mut many = run(&["--resizes", "1000000", "--pattern", "thrash"]);
    many.until_shown("/1000000 ");
    many.press(b"\x03");
    assert_eq!(many.end().0, Some(4));

    let mut endless = run(&["--duration", "1h", "--pattern", "thrash"]);
    // How far, how fast, and how long still.
    endless.until("the bar", |rows| {
        let parts = ["░", "  0% ", "/s), ", " blocks moved, ", "m left"];
        let is_bar = |row: &String| parts.iter().all(|part| row.contains(part));
        rows.iter().any(is_bar)
    });
    endless.press(b"\x03");
    let (code, contents) = endless.end();
    assert_eq!(code, Some(4), "{contents}");
    let last = "0 failures until it was ended early";
    assert!(contents.contains(last), "{contents}");

    let short = run(&["--resizes", "100", "--pattern", "thrash"]);
    let (code, contents) = short.end();
    assert_eq!(code, Some(0), "{contents}");
    let rest = contents.lines().nth(1).unwrap();
    assert!(
        rest.starts_with("in-process, "),
        "the bar is still there: {contents}"
    );
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    for args in [
        "--faults stall",
        "--faults nonsense",
        "--vms 0",
        "--vms 4000000000000000000",
        "--vcpus 0",
        "--vcpus 1000",
        "--duration 0s",
        "--resizes 0",
        "--budget 0",
        "--budget 1M",
        "--region 1M",
        "--duration 1s --resizes 1",
        "--duration soon",
    ] {
        let run = vmem("", &format!("--guest in-process {args}"));
        assert_eq!(run.status.code(), Some(2), "{args}: {}", text(&run.stderr));
    }
}

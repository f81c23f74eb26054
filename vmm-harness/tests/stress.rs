//! Stress runs, short ones: every pattern, workload and fault, on KVM and in this process.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[expect(dead_code, reason = "a stress run makes its own devices")]
mod common;

use std::io::Read;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{LONG, kvm_or_skip};
use virtio_mem_driver::driver::Strategy;
use vmm_harness::demo::DemoOptions;
use vmm_harness::report::{Recording, Sample};
use vmm_harness::stress::{self, Fault, Limit, Pattern, Run, StressOptions};
use vmm_harness::{GuestKind, Workload};

const ALL_PATTERNS: [Pattern; 4] = [
    Pattern::Sawtooth,
    Pattern::Random,
    Pattern::Thrash,
    Pattern::Burst,
];

/// What a run checks of its process is not to be another test's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seed() -> u64 {
    let given = std::env::var("VMEM_SEED")
        .ok()
        .map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(vmm_harness::linux::new_seed);
    eprintln!("VMEM_SEED={seed}");
    seed
}

fn options(guest: GuestKind) -> StressOptions {
    StressOptions {
        guest: DemoOptions {
            region: 1 << 30,
            worker_pages: 4096,
            guest,
            seed: seed(),
            ..DemoOptions::default()
        },
        pattern: Pattern::Random,
        limit: Limit::Resizes(40),
        rogue: false,
        faults: Vec::new(),
        budget: None,
        vm_count: 1,
        stuck_after: LONG,
    }
}

fn run(options: &StressOptions) -> Run {
    let run = stress::run(options, &AtomicBool::new(false), &mut |_| ()).unwrap();
    if let Some(failure) = run.failure {
        panic!("{options:?}: {failure}: {}", failure.source);
    }
    let summary = &run.summary;
    let Limit::Resizes(resizes) = options.limit else {
        panic!("a number of resizes");
    };
    // Each life ends with one more.
    let lives = summary.lives;
    assert!((resizes + 1..=resizes + lives + options.vm_count as u64).contains(&summary.resizes));
    assert!(summary.rests >= lives && lives >= options.vm_count as u64);
    assert!(summary.pages_verified > 0 && summary.pages_written > 0);
    if !options.rogue {
        assert_eq!(summary.blocks_plugged, summary.blocks_unplugged);
    }
    assert!(summary.blocks_plugged > 0);
    for vm in &run.vms {
        assert!(vm.samples.is_sorted_by_key(|sample| sample.resizes));
        assert!(vm.samples.is_sorted_by_key(|sample| sample.pages_verified));
        assert!(vm.samples.is_sorted_by(|a, b| a.seconds <= b.seconds));
    }
    run
}

fn every_pattern_and_workload(guest: GuestKind) {
    for (pattern, workload, strategy) in [
        (Pattern::Sawtooth, Workload::Alloc, Strategy::Direct),
        (Pattern::Random, Workload::Pin, Strategy::Direct),
        (Pattern::Thrash, Workload::Mixed, Strategy::Linux),
        (Pattern::Burst, Workload::Pin, Strategy::Linux),
    ] {
        let mut options = options(guest);
        options.pattern = pattern;
        options.guest.workload = workload;
        options.guest.strategy = strategy;
        let summary = run(&options).summary;
        match workload {
            Workload::Alloc => assert_eq!(summary.most_unmovable, 0),
            Workload::Pin => assert!(summary.most_unmovable > 0),
            // There may have been too little time for one.
            Workload::Mixed => {}
        }
    }
}

#[test]
fn every_pattern_and_workload_holds_in_this_process() {
    let _alone = alone();
    every_pattern_and_workload(GuestKind::InProcess);
}

#[test]
fn every_pattern_and_workload_holds_on_kvm() {
    let _alone = alone();
    if kvm_or_skip() {
        every_pattern_and_workload(GuestKind::Kvm);
    }
}

/// With each fault in turn until it has occurred often enough: when depends on threads.
fn every_fault(guest: GuestKind, faults: &[Fault]) {
    for fault in faults {
        let mut options = options(guest);
        options.faults = vec![*fault];
        options.pattern = Pattern::Thrash;
        let injected = (0..20).any(|round| {
            options.guest.seed += round;
            let run = run(&options);
            let count = run
                .summary
                .faults
                .iter()
                .find(|count| count.fault == fault.name());
            let busy = run
                .summary
                .requests
                .iter()
                .any(|latency| latency.answer == "busy");
            // A fault of the host is answered BUSY.
            let host = !matches!(fault, Fault::Busy | Fault::Stall);
            assert!(!host || count.is_none() || busy, "{:?}", run.summary);
            count.is_some_and(|count| count.count > 0)
        });
        assert!(injected, "{fault:?} never occurred");
    }
}

#[test]
fn faults_of_the_host_are_survived_in_this_process() {
    let _alone = alone();
    let faults = [Fault::Open, Fault::Discard, Fault::Slot, Fault::Busy];
    every_fault(GuestKind::InProcess, &faults);
}

#[test]
fn faults_of_the_host_are_survived_on_kvm() {
    let _alone = alone();
    if kvm_or_skip() {
        every_fault(GuestKind::Kvm, &Fault::ALL);
    }
}

#[test]
fn vcpus_cannot_be_stalled_in_this_process() {
    let _alone = alone();
    let mut options = options(GuestKind::InProcess);
    options.faults = vec![Fault::Stall];
    let error = stress::run(&options, &AtomicBool::new(false), &mut |_| ()).unwrap_err();
    assert!(error.is_usage(), "{error}");
}

#[test]
fn rogues_are_caught_and_others_take_their_place() {
    let _alone = alone();
    for guest in [GuestKind::InProcess, GuestKind::Auto] {
        let mut options = options(guest);
        options.rogue = true;
        let summary = run(&options).summary;
        assert_eq!(summary.rogues, summary.lives);
        assert!(summary.rogues >= 2);
    }
}

#[test]
fn guests_share_a_budget() {
    let _alone = alone();
    let mut options = options(GuestKind::Auto);
    options.vm_count = 3;
    options.budget = Some(1 << 30);
    options.pattern = Pattern::Random;
    options.limit = Limit::Resizes(90);
    let run = run(&options);
    let most = |value: fn(&Sample) -> u64| {
        let of_vm = |vm: &vmm_harness::report::Vm| vm.samples.iter().map(value).max().unwrap();
        run.vms.iter().map(of_vm).collect::<Vec<_>>()
    };
    // Each had some, and what one had was more than its share.
    let most = most(|sample| sample.plugged);
    assert!(most.iter().all(|bytes| *bytes > 0), "{most:?}");
    assert!(most.iter().sum::<u64>() > 1 << 30, "{most:?}");
}

#[test]
fn the_first_failure_ends_a_run_and_is_told() {
    let _alone = alone();
    let mut options = options(GuestKind::InProcess);
    // No driver is as fast.
    options.stuck_after = std::time::Duration::ZERO;
    options.guest.strategy = Strategy::Linux;
    options.guest.worker_pages = 0;
    options.pattern = Pattern::Thrash;
    options.faults = vec![Fault::Busy];
    options.limit = Limit::Resizes(u64::MAX);
    let run = stress::run(&options, &AtomicBool::new(false), &mut |_| ()).unwrap();
    let recording = Recording::new(&options, run, "vmem stress".into(), String::new());
    let failure = recording.failure.unwrap();
    assert!(failure.contains("no-resize-is-stuck"), "{failure}");
    assert!(recording.summary.resizes > 0);
}

#[test]
fn every_pattern_comes_to_an_end_when_it_is_interrupted() {
    let _alone = alone();
    for pattern in ALL_PATTERNS {
        let mut options = options(GuestKind::InProcess);
        options.pattern = pattern;
        options.limit = Limit::Resizes(u64::MAX);
        let interrupted = AtomicBool::new(false);
        let run = stress::run(&options, &interrupted, &mut |progress| {
            if progress.resizes >= 3 {
                interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        let run = run.unwrap();
        assert!(run.interrupted && run.failure.is_none());
        assert!(run.summary.resizes >= 3);
    }
}

fn vmem(shell: &str, args: &str) -> std::process::Output {
    std::process::Command::new("sh")
        .arg("-c")
        .arg(format!(
            "{shell} exec \"$0\" stress --guest in-process --region 256M {args}"
        ))
        .arg(env!("CARGO_BIN_EXE_vmem"))
        .env_remove("VMEM_SEED")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_failure_is_told_with_its_seed_and_the_line_that_repeats_it() {
    let _alone = alone();
    // Too few descriptors for a guest.
    let run = vmem("ulimit -n 8;", "--resizes 5 --pattern sawtooth");
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
    let command = "vmem stress --guest in-process --region 256M --resizes 5 --pattern sawtooth";
    let expected = format!("VMEM_SEED={seed}; to repeat: {command} --seed {seed}");
    assert_eq!(repeats, expected);
    assert!(
        err.contains("vmem: guest 0, resize 0 to 0 bytes: "),
        "{err}"
    );
}

#[test]
fn the_summary_and_its_json_say_what_was_done() {
    let _alone = alone();
    let run = vmem("", "--resizes 5 --seed 3");
    let out = text(&run.stdout);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(out.ends_with("0 failures\n"), "{out}");
    assert!(
        out.contains("in-process, as asked, seed 3\n6 resizes in "),
        "{out}"
    );
    let run = vmem("VMEM_SEED=9; export VMEM_SEED;", "--resizes 5 --json");
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["outcome"], "passed");
    assert_eq!(json["run"]["seed"], 9);
    assert_eq!(json["summary"]["resizes"], 6);
    assert!(json["summary"]["requests"][0]["count"].as_u64().unwrap() > 0);
    assert!(json.get("vms").is_none());
}

#[test]
fn a_signal_ends_a_run_in_order() {
    let _alone = alone();
    let mut run = std::process::Command::new(env!("CARGO_BIN_EXE_vmem"))
        .args([
            "stress",
            "--guest",
            "in-process",
            "--region",
            "256M",
            "--duration",
            "1h",
        ])
        .args(["--pattern", "burst"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Its threads are there once it has a guest: signals are waited for by then.
    let threads = format!("/proc/{}/task", run.id());
    while std::fs::read_dir(&threads).unwrap().count() < 4 {
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut out = String::new();
    run.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(4), "{out}");
    assert!(
        out.ends_with("0 failures until it was ended early\n"),
        "{out}"
    );
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let _alone = alone();
    for args in [
        "--faults stall",
        "--faults nonsense",
        "--vms 0",
        "--region 1M",
        "--duration 1s --resizes 1",
        "--duration soon",
    ] {
        let run = vmem("", args);
        assert_eq!(run.status.code(), Some(2), "{args}: {}", text(&run.stderr));
    }
}

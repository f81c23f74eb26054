//! The `vmem` command as its users see it: output, exit codes, errors.

#[expect(
    dead_code,
    clippy::unwrap_used,
    reason = "this file needs no device of its own; a test that cannot start may panic"
)]
mod common;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use common::kvm_or_skip;
use serde_json::Value;

/// Runs `vmem`; its exit code, standard output and standard error.
fn vmem(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmem"))
        .args(args)
        .output()
        .expect("vmem runs");
    let text = |bytes| String::from_utf8(bytes).expect("vmem writes text");
    let code = output.status.code().expect("vmem ends by itself");
    (code, text(output.stdout), text(output.stderr))
}

/// The rows of the table: everything before the list of requests, split at white space.
fn rows(stdout: &str) -> Vec<Vec<&str>> {
    stdout
        .lines()
        .filter(|line| line.contains(" ms  "))
        .map(|line| line.split_whitespace().collect())
        .collect()
}

fn assert_demo(stdout: &str) {
    let reached: Vec<_> = rows(stdout).iter().map(|row| row[..4].join(" ")).collect();
    assert_eq!(
        reached,
        [
            "1 GiB 1 GiB",
            "130 MiB 130 MiB",
            "2 GiB 2 GiB",
            "6 MiB 6 MiB",
            "0 B 0 B"
        ],
        "{stdout}"
    );
    assert!(
        stdout.contains("ok: 5 steps, every check held at each"),
        "{stdout}"
    );
}

#[test]
fn plain_vmem_is_the_demo_on_kvm() {
    if !kvm_or_skip() {
        return;
    }
    let (code, stdout, stderr) = vmem(&[]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.starts_with("backend: KVM"), "{stdout}");
    assert_demo(&stdout);
}

#[test]
fn demo_runs_in_process_as_asked() {
    let (code, stdout, stderr) = vmem(&["demo", "--guest", "in-process"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout.starts_with("backend: in-process, as asked"),
        "{stdout}"
    );
    assert_demo(&stdout);
}

#[test]
fn rogue_guest_is_reported_with_address_and_vcpu_and_exit_code_3() {
    for guest in ["kvm", "in-process"] {
        if guest == "kvm" && !kvm_or_skip() {
            continue;
        }
        let (code, stdout, stderr) = vmem(&["demo", "--rogue", "--guest", guest]);
        assert_eq!(code, 3, "{stdout}{stderr}");
        assert!(
            stdout.contains("rogue guest: vCPU 1 tried to read from 0x1"),
            "{stdout}"
        );
        assert!(
            stdout.contains("resident behind unplugged blocks: 0 B before, 0 B after"),
            "{stdout}"
        );
    }
}

#[test]
fn json_has_what_the_table_has() {
    let args = [
        "demo",
        "--guest",
        "in-process",
        "--json",
        "--targets",
        "64M,6M,0",
        "--seed",
        "7",
    ];
    let (code, stdout, stderr) = vmem(&args);
    assert_eq!(code, 0, "{stderr}");
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    let steps = summary["steps"].as_array().unwrap();
    let plugged: Vec<_> = steps
        .iter()
        .map(|step| step["plugged"].as_u64().unwrap())
        .collect();
    assert_eq!(plugged, [64 << 20, 6 << 20, 0]);
    assert_eq!(summary["driver"]["policy"], "direct");
    assert_eq!(summary["driver"]["mode"], "sbm");
    assert_eq!(summary["driver"]["granule_size"], 2 << 20);
    assert_eq!(steps[0]["unreachable"], Value::Null);
    assert_eq!(steps[0]["requests"][0]["request"], "plug");
    assert_eq!(steps[0]["requests"][0]["answer"], "ack");
    assert!(summary["pages_verified"].as_u64().unwrap() > 0);
    assert_eq!(summary["rogue"], Value::Null);
}

#[test]
fn options_can_be_given_without_naming_the_demo() {
    let args = [
        "--guest",
        "in-process",
        "--targets",
        "4M",
        "--region",
        "1G",
        "--vcpus",
        "1",
    ];
    let (code, stdout, stderr) = vmem(&args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(rows(&stdout)[0][..4].join(" "), "4 MiB 4 MiB");
}

#[test]
fn bad_options_are_clear_errors_with_exit_code_2() {
    let cases: [(&[&str], &str); 23] = [
        (&["--block-size", "3M"], "not a power of two"),
        (&["--block-size", "0"], "not a power of two"),
        (&["--block-size", "1K"], "smaller than a page"),
        (&["--region", "4097M"], "not a multiple of the block size"),
        (
            &["--targets", "8G"],
            "target 8 GiB exceeds the region of 4 GiB",
        ),
        (
            &["--targets", "1G,3M"],
            "target 3 MiB is not a multiple of the block size 2 MiB",
        ),
        (&["--targets", "1G,x"], "invalid value 'x'"),
        (&["--targets=-1"], "invalid value '-1'"),
        (&["--guest", "xen"], "invalid value 'xen'"),
        (&["--backing", "paper"], "invalid value 'paper'"),
        (&["--vcpus", "0"], "0 vCPUs are not 1 to 16"),
        (&["--vcpus", "17"], "17 vCPUs are not 1 to 16"),
        (
            &["--boot-memory", "1M"],
            "boot memory of 1 MiB does not hold the guest program",
        ),
        (&["--boot-memory", "99999999999999999999G"], "invalid value"),
        (&["--boot-memory", "268435457"], "not a multiple of 2 MiB"),
        (
            &["--block-size", "256M", "--mode", "sbm"],
            "Sub-Block Mode needs at least two device blocks in a memory block of the guest, which has 128 MiB: \
             a block size of 256 MiB is too large, 64 MiB is the largest",
        ),
        (&["--policy", "windows"], "invalid value 'windows'"),
        (&["--mode", "huge"], "invalid value 'huge'"),
        (
            &["--bbm-block-size", "256M"],
            "ask for that with --mode bbm",
        ),
        (
            &["--mode", "bbm", "--bbm-block-size", "192M"],
            "big blocks of 192 MiB are not possible, only powers of two from 128 MiB",
        ),
        (
            &["--mode", "bbm", "--bbm-block-size", "16G"],
            "the region of 4 GiB at 4 GiB holds no whole big block of 16 GiB",
        ),
        (
            &["--targets", "4G", "--rogue"],
            "none is left for the rogue guest",
        ),
        (
            &["--backing", "thp", "--block-size", "1M"],
            "too small for this backing",
        ),
    ];
    for (args, reason) in cases {
        for subcommand in [&["demo"] as &[&str], &[]] {
            let args = [subcommand, args].concat();
            let (code, stdout, stderr) = vmem(&args);
            assert_eq!(code, 2, "{args:?}: {stdout}{stderr}");
            assert!(stderr.contains(reason), "{args:?}: {stderr}");
            assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
        }
    }
}

/// Less than the driver can plug: it settles short of the target, and says so.
#[test]
fn what_cannot_be_reached_is_in_the_table() {
    let args = [
        "--guest",
        "in-process",
        "--block-size",
        "1M",
        "--targets",
        "1M",
    ];
    let (code, stdout, stderr) = vmem(&args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout.contains(
            "driver: policy direct; Sub-Block Mode: memory blocks of 128 MiB, granules of 2 MiB\n"
        ),
        "{stdout}"
    );
    assert_eq!(rows(&stdout)[0][..4].join(" "), "1 MiB 0 B");
    assert!(
        stdout.contains("  none; 1 MiB unreachable: less than a granule\n"),
        "{stdout}"
    );
}

#[test]
fn policy_and_mode_are_as_asked() {
    let args = [
        "--guest",
        "in-process",
        "--policy",
        "linux",
        "--mode",
        "bbm",
        "--bbm-block-size",
        "256M",
        "--targets",
        "1G",
    ];
    let (code, stdout, stderr) = vmem(&args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout
            .contains("driver: policy linux; Big-Block Mode: granules are big blocks of 256 MiB\n"),
        "{stdout}"
    );
    assert!(stdout.contains("  4 plug ack\n"), "{stdout}");
    assert!(
        stdout.contains("ok: 1 steps, every check held at each; 4 requests;"),
        "{stdout}"
    );
}

#[test]
fn what_the_host_cannot_do_is_named_with_exit_code_1() {
    // No process has so much address space in one piece.
    let (code, stdout, stderr) = vmem(&["--guest", "in-process", "--region", "126T"]);
    assert_eq!(code, 1, "{stdout}{stderr}");
    assert!(
        stderr.contains("host memory for a region of 126 TiB"),
        "{stderr}"
    );
}

#[test]
fn help_says_what_there_is() {
    let (code, stdout, _) = vmem(&["--help"]);
    assert_eq!(code, 0);
    for word in [
        "demo",
        "replay",
        "--targets",
        "--rogue",
        "--guest",
        "--policy",
        "--mode",
        "--bbm-block-size",
        "--json",
        "Exit codes:",
    ] {
        assert!(stdout.contains(word), "{word} in {stdout}");
    }
}

#[test]
fn help_of_replay_says_what_is_taken_from_a_recording() {
    let (code, stdout, _) = vmem(&["replay", "--help"]);
    assert_eq!(code, 0);
    for word in ["busy places", "given up", "retries", "EBUSY", "Exit codes:"] {
        assert!(stdout.contains(word), "{word} in {stdout}");
    }
}

fn trace(name: &str) -> String {
    format!("{}/../tests/traces/{name}.json", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn replay_that_agrees_is_exit_code_0() {
    let (a, b) = (
        trace("s1d-6.1-oracleA_kernel_last"),
        trace("s4-6.12-boot-dimm"),
    );
    let (code, stdout, stderr) = vmem(&["replay", &a, &b]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout.contains("oracleA_kernel_last.json: agrees: 6 steps"),
        "{stdout}"
    );
    let last = stdout.lines().last().unwrap_or_default();
    assert!(last.starts_with("2 of 2 files agree: 9 steps"), "{stdout}");

    // With requests, and with what was taken from the recording for them.
    let requests = trace("s5-6.12-auto-movable-256m");
    let (code, stdout, stderr) = vmem(&["replay", &requests]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout.contains("agrees: 7 steps, 23 requests, ") && stdout.contains(", 1 given up"),
        "{stdout}"
    );
    let (_, stdout, _) = vmem(&["replay", "--json", &requests]);
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(report[0]["summary"]["requests"], 23);
    assert_eq!(report[0]["summary"]["inputs"]["given_up"], 1);
}

#[test]
fn replay_shows_a_map_of_blocks_and_zones() {
    let file = trace("s1d-6.1-oracleA_kernel_last");
    let (code, stdout, stderr) = vmem(&["replay", "--show", &file]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let map = "step 4: write_state 32 online_movable
             0        32
  node 0     *KKKKKKK~M.K
    DMA      =
    DMA32    ========
    Normal              =
    Movable           =
";
    assert!(stdout.contains(map), "{stdout}");
}

#[test]
fn replay_reports_difference_and_damage_with_exit_code_1() {
    let file = trace("s1d-6.1-oracleA_kernel_last");
    let text = std::fs::read_to_string(&file).expect("the trace is there");
    let folder = std::env::temp_dir().join(format!("vmem-replay-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for files");
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("the file is written");
        path.to_string_lossy().into_owned()
    };
    let changed = write(
        "changed.json",
        &text.replace("online memory34", "online memory33"),
    );
    let cut = write("cut.json", &text[..text.len() / 2]);
    let missing = folder.join("missing.json").to_string_lossy().into_owned();
    let device = text.replacen("\"seed\"", "\"device\": {}, \"seed\"", 1);
    let device = write("device.json", &device);

    let (code, stdout, _) = vmem(&["replay", &changed, &file]);
    assert_eq!(code, 1, "{stdout}");
    assert!(
        stdout.contains(
            "changed.json: step 3 (write_state 34 online_kernel): uevent 0 text: \
             expected online memory33, got online memory34"
        ),
        "{stdout}"
    );
    // The others are replayed all the same.
    assert!(stdout.contains("1 of 2 files agree"), "{stdout}");
    for (file, reason) in [
        (&cut, "is not a trace: "),
        (&cut, " at line "),
        (&missing, "cannot be read: "),
        (&"/dev/zero".to_owned(), "is longer than a trace can be"),
        (&device, "missing field `addr`"),
    ] {
        let (code, stdout, stderr) = vmem(&["replay", file]);
        assert_eq!(code, 1, "{stdout}{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
        let (code, stdout, _) = vmem(&["replay", "--json", file]);
        assert_eq!(code, 1, "{stdout}");
        let report: Value = serde_json::from_str(&stdout).expect("JSON");
        let error = report[0]["error"].as_str().unwrap_or_default();
        assert!(error.contains(reason), "{stdout}");
    }
    std::fs::remove_dir_all(folder).expect("the folder goes");
    assert_eq!(vmem(&["replay"]).0, 2, "a file is needed");
}

#[test]
fn limits_that_leave_nothing_to_do_are_refused() {
    let folder = tempfile::tempdir().expect("a folder for the socket");
    let socket = folder.path().join("vm.sock").to_string_lossy().into_owned();
    for (command, option, value) in [
        ("stress", "--duration", "0s"),
        ("stress", "--resizes", "0"),
        ("stress", "--budget", "0"),
        ("stress", "--vms", "0"),
        ("stress", "--vms", "4000000000000000000"),
        ("run", "--vcpus", "0"),
        ("run", "--region", "0"),
        ("run", "--block-size", "0"),
        ("run", "--boot-memory", "0"),
    ] {
        let mut args = vec![command, "--guest", "in-process", option, value];
        if command == "run" {
            args.extend(["--api-sock", &socket]);
        }
        let (code, stdout, stderr) = vmem(&args);
        assert_eq!(code, 2, "{args:?}: {stdout}{stderr}");
    }
}

/// Paths may be any bytes; all else is text.
#[test]
fn arguments_that_are_no_text_are_paths_or_refused() {
    let folder = tempfile::tempdir().expect("a folder for files");
    let report = folder.path().join(OsStr::from_bytes(b"\xff"));
    let run = |args: &[&OsStr]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmem"))
            .args(args)
            .output()
            .expect("vmem runs");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), stderr)
    };
    let args = [
        "stress",
        "--guest",
        "in-process",
        "--resizes",
        "1",
        "--report",
    ];
    let args: Vec<_> = args
        .map(OsStr::new)
        .into_iter()
        .chain([report.as_os_str()])
        .collect();
    let (code, stderr) = run(&args);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(report.join("index.html").exists());
    let wrong = OsStr::from_bytes(b"\xff");
    for before in [
        &["resize"][..],
        &["stress", "--seed"],
        &["status", "--device"],
    ] {
        let args: Vec<_> = before.iter().map(OsStr::new).chain([wrong]).collect();
        let (code, stderr) = run(&args);
        assert_eq!(code, Some(2), "{args:?}: {stderr}");
    }
}

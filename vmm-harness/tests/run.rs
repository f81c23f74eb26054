//! `vmem run` and its clients, as their users see them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/running.rs"]
mod running;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use running::{Running, output};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    (folder, socket)
}

fn status(socket: &str) -> Value {
    let (code, stdout, stderr) = output(&["status", "--json", "--api-sock", socket]);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn signals_end_it_cleanly() {
    for signal in [Signal::INT, Signal::TERM] {
        let (_folder, socket) = folder();
        let running = Running::start(&socket, &["--size", "64M"]);
        running.signal(signal);
        let (code, said) = running.end();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("the guest is done"), "{said}");
        assert!(said.contains("wrong: 0"), "{said}");
        assert!(!socket.exists());
    }
}

#[test]
fn workloads_that_pin_have_pages_that_cannot_be_moved() {
    for workload in ["pin", "mixed"] {
        let (_folder, socket) = folder();
        let path = socket.to_str().unwrap();
        let running = Running::start(&socket, &["--size", "256M", "--workload", workload]);
        let begun = Instant::now();
        // Each is pinned for a while.
        while status(path)["guest"]["pages_unmovable"] == 0 {
            assert!(begun.elapsed() < PATIENCE, "{workload}");
        }
        // For a while only: all is unplugged in the end.
        let resize = ["resize", "0", "--wait", "--api-sock", path];
        let (code, _, stderr) = output(&resize);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(status(path)["plugged_size"], 0);
        // A worker says so when the slice is over in which it let go.
        let begun = Instant::now();
        while status(path)["guest"]["pages_unmovable"] != 0 {
            assert!(begun.elapsed() < PATIENCE, "{workload}");
        }
        running.signal(Signal::TERM);
        assert_eq!(running.end().0, Some(0));
    }
}

#[test]
fn live_socket_names_its_holder_and_a_stale_one_is_replaced() {
    let (_folder, socket) = folder();
    let path = socket.to_str().unwrap();
    let running = Running::start(&socket, &[]);
    let (code, _, stderr) = output(&["run", "--api-sock", path]);
    assert_eq!(code, 1);
    let holder = format!("in use: process {} answers", running.child.id());
    assert!(stderr.contains(&holder), "{stderr}");
    assert_eq!(status(path)["state"], "Running");
    running.signal(Signal::KILL);
    assert_eq!(running.end().0, None);
    assert!(socket.exists(), "nobody was left to remove it");
    let (code, _, stderr) = output(&["status", "--api-sock", path]);
    assert_eq!(code, 1);
    assert!(stderr.contains("nobody serves"), "{stderr}");
    let running = Running::start(&socket, &[]);
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn options_win_over_the_file_and_samples_are_files() {
    let (folder, socket) = folder();
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources");
    let file = samples.join("two-nodes.toml");
    let running = Running::start(&socket, &["--config", file.to_str().unwrap()]);
    for (device, node) in [("mem0", 0), ("mem1", 1)] {
        let path = socket.to_str().unwrap();
        let (code, stdout, stderr) =
            output(&["status", "--json", "--device", device, "--api-sock", path]);
        assert_eq!(code, 0, "{stderr}");
        let status: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(
            (&status["id"], &status["node_id"]),
            (&device.into(), &node.into())
        );
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
    for name in ["run.toml", "run.json"] {
        let file = samples.join(name);
        let args = [
            "--config",
            file.to_str().unwrap(),
            "--region",
            "1G",
            "--size",
            "128M",
        ];
        let running = Running::start(&socket, &args);
        let status = status(socket.to_str().unwrap());
        assert_eq!(status["total_size_mib"], 1024, "an option");
        assert_eq!(status["requested_size_mib"], 128, "an option");
        assert_eq!(status["block_size_mib"], 2, "of the file");
        running.signal(Signal::TERM);
        assert_eq!(running.end().0, Some(0));
    }
    let file = folder.path().join("wrong.toml");
    for (text, reason) in [
        ("sise = \"1G\"", "unknown field `sise`"),
        ("size = \"much\"", "a size"),
        ("[machine]\nvcpus = \"two\"", "vcpus"),
        ("[machine]\nblock-size = \"3M\"", "power of two"),
    ] {
        fs::write(&file, text).unwrap();
        let args = [
            "run",
            "--config",
            file.to_str().unwrap(),
            "--api-sock",
            socket.to_str().unwrap(),
        ];
        let (code, _, stderr) = output(&args);
        assert_eq!(code, 2, "{text}: {stderr}");
        assert!(stderr.contains(reason), "{text}: {stderr}");
    }
    let (code, _, stderr) = output(&["run"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--api-sock"), "{stderr}");
}

#[test]
fn resize_freeze_snapshot_and_restore_have_their_exit_codes() {
    let (folder, socket) = folder();
    let api = ["--api-sock", socket.to_str().unwrap()];
    let with = |args: &[&str], api: [&str; 2]| output(&[args, &api].concat());
    let run = |args: &[&str]| with(args, api);
    let running = Running::start(&socket, &[]);
    let (code, stdout, stderr) = run(&["resize", "1G", "--wait"]);
    assert_eq!(
        (code, stdout.as_str()),
        (0, "1 GiB of 1 GiB plugged\n"),
        "{stderr}"
    );
    // As long as a number of seconds can be.
    let forever = [
        "resize",
        "1G",
        "--wait",
        "--deadline",
        "18446744073709551615s",
    ];
    let (code, _, stderr) = run(&forever);
    assert_eq!(code, 0, "{stderr}");
    let file = folder.path().join("device.json");
    let file = file.to_str().unwrap();
    let (code, _, stderr) = run(&["snapshot", file]);
    assert_eq!(code, 1);
    assert!(
        stderr.ends_with("nor stopped: freeze it first\n"),
        "{stderr}"
    );
    assert_eq!(run(&["freeze"]).0, 0);
    let hopeless = ["resize", "256M", "--wait", "--deadline", "100ms"];
    let begun = Instant::now();
    let (code, stderr) = loop {
        let (code, _, stderr) = run(&hopeless);
        assert!(begun.elapsed() < PATIENCE, "{stderr}");
        // A machine that has no time for the server; asked again, it is the same request.
        if !stderr.contains("the server does not answer") {
            break (code, stderr);
        }
    };
    assert_eq!(code, 4, "{stderr}");
    assert!(
        stderr.contains("1 GiB of 256 MiB plugged: the device is frozen"),
        "{stderr}"
    );
    let (_, stdout, _) = run(&["status"]);
    assert!(
        stdout.contains("state      the device is frozen"),
        "{stdout}"
    );
    assert!(!stdout.contains('\u{1b}'), "colours are for terminals");
    assert_eq!(run(&["snapshot", file]).0, 0);
    assert_eq!(run(&["thaw"]).0, 0);
    assert_eq!(run(&["resize", "256M", "--wait"]).0, 0);
    let (code, _, stderr) = run(&["resize", "1"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("block size"), "{stderr}");
    assert_eq!(run(&["restore", file]).0, 1, "it runs already");
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));

    let other = folder.path().join("other.sock");
    let other_api = ["--api-sock", other.to_str().unwrap()];
    let running = Running::start(&other, &["--no-start"]);
    assert_eq!(with(&["resize", "1G"], other_api).0, 1, "there is no guest");
    let (code, _, stderr) = with(&["restore", file], other_api);
    assert_eq!(code, 0, "{stderr}");
    // Asked for before it was saved, and done by the guest that found it restored.
    assert_eq!(with(&["resize", "256M", "--wait"], other_api).0, 0);
    running.signal(Signal::TERM);
    let (code, said) = running.end();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn devices_are_named_on_the_command_line() {
    let (_folder, socket) = folder();
    let api = ["--device", "mem1", "--api-sock", socket.to_str().unwrap()];
    let run = |args: &[&str]| output(&[args, &api].concat());
    let fields = "id=mem1,region=1G,node=3,size=64M";
    let running = Running::start(&socket, &["--node", "1", "--device", fields]);
    let (code, stdout, stderr) = run(&["resize", "256M", "--wait"]);
    let said = (0, "256 MiB of 256 MiB plugged\n");
    assert_eq!((code, stdout.as_str()), said, "{stderr}");
    // Its driver brings online what is plugged.
    let begun = Instant::now();
    let stdout = loop {
        let (_, stdout, _) = run(&["status"]);
        if stdout.contains(" settled, 256 MiB online on node 1,") {
            break stdout;
        }
        assert!(begun.elapsed() < PATIENCE, "{stdout}");
    };
    assert!(stdout.starts_with("device     mem1\n"), "{stdout}");
    let (_, all, _) = output(&["status", "--api-sock", api[3]]);
    let heads = all.lines().filter(|line| line.starts_with("device"));
    let heads: Vec<_> = heads.collect();
    assert_eq!(heads, ["device     mem0", "device     mem1"]);
    assert_eq!(run(&["freeze"]).0, 0);
    assert_eq!(
        status(socket.to_str().unwrap())["frozen"],
        false,
        "the first"
    );
    assert_eq!(run(&["thaw"]).0, 0);
    let nobody = ["status", "--device", "no", "--api-sock", api[3]];
    let (code, _, stderr) = output(&nobody);
    assert_eq!(code, 1);
    assert!(stderr.contains("no memory device \"no\""), "{stderr}");
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
    for (fields, reason) in [
        ("region=1G", "missing field `id`"),
        ("id=mem1,sise=1G", "unknown field `sise`"),
        ("id=mem1,node=x", "node"),
        ("id=mem1,id=mem2", "id is given twice"),
        ("mem1", "no NAME=VALUE"),
        ("id=mem0", "name of a device"),
        ("id=mem1,block-size=3M", "power of two"),
    ] {
        let (code, _, stderr) = output(&["run", "--api-sock", api[3], "--device", fields]);
        assert_eq!(code, 2, "{fields}: {stderr}");
        assert!(stderr.contains(reason), "{fields}: {stderr}");
    }
}

#[test]
fn command_lines_that_make_no_sense_are_usage_errors() {
    for args in [
        &["resize"][..],
        &["resize", "1G"],
        &["status"],
        &["resize", "1G", "--deadline", "30s", "--api-sock", "x"],
        &[
            "resize",
            "1G",
            "--wait",
            "--deadline",
            "soon",
            "--api-sock",
            "x",
        ],
        &["resize", "/nowhere.sock", "1G", "--wait"],
        &["resize", "1G", "2G", "--api-sock", "x"],
        // No socket without a slash, and no size either.
        &["resize", "1GX", "--api-sock", "x"],
        &["resize", "linux.sock", "1G"],
        &["completions", "tcsh"],
    ] {
        assert_eq!(output(args).0, 2, "{args:?}");
    }
    assert_eq!(
        output(&["resize", "1G", "--api-sock", "/nowhere.sock"]).0,
        1
    );
}

/// Which of the two a word is, it says itself: what is connected to is what the error names.
#[test]
fn resize_is_of_the_api_or_of_a_socket_with_a_slash() {
    let (code, _, stderr) = output(&["resize", "./linux.sock", "1G", "--api-sock", "api.sock"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("./linux.sock"), "{stderr}");
    let (code, _, stderr) = output(&["resize", "1G", "--api-sock", "./api.sock"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("./api.sock: nobody serves"), "{stderr}");
    let (_, _, stderr) = output(&["resize", "linux.sock"]);
    assert!(stderr.contains("has a slash: ./linux.sock"), "{stderr}");

    // A prompt of `vmem linux`, as far as it is spoken to.
    let (_folder, socket) = folder();
    let prompt = UnixListener::bind(&socket).unwrap();
    let heard = thread::spawn(move || {
        let mut lines = Vec::new();
        for _ in 0..2 {
            let (stream, _) = prompt.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            let sizes = r#"{"requested_size":1073741824,"plugged_size":2097152,"resident_size":0,"frozen":false}"#;
            writeln!(stream.get_mut(), "{sizes}").unwrap();
            lines.push(line);
        }
        lines
    });
    let socket = socket.to_str().unwrap();
    for args in [&["resize", socket, "1G"][..], &["resize", socket]] {
        let said = "requested 1 GiB, plugged 2 MiB\n".to_owned();
        assert_eq!(output(args), (0, said, String::new()));
    }
    assert_eq!(heard.join().unwrap(), ["resize 1073741824\n", "status\n"]);

    let (_, help, _) = output(&["resize", "--help"]);
    for usage in [
        "vmem resize [OPTIONS] <SIZE>\n",
        "vmem resize <SOCKET> [SIZE]\n",
    ] {
        assert!(help.contains(usage), "{help}");
    }
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = output(&["completions", shell]);
        assert_eq!(code, 0);
        for word in ["resize", "snapshot", "api-sock"] {
            assert!(stdout.contains(word), "{shell}: no {word}");
        }
    }
}

/// Who accepts nobody answers nobody.
#[test]
fn resize_ends_at_its_deadline_whatever_the_server_does() {
    let (_folder, socket) = folder();
    let _blocked = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap();
    let args = [
        "resize",
        "1G",
        "--wait",
        "--deadline",
        "100ms",
        "--api-sock",
        path,
    ];
    let (code, stdout, stderr) = output(&args);
    assert_eq!(code, 4, "{stdout}{stderr}");
    assert!(stderr.contains("the server does not answer"), "{stderr}");
}

/// Answers of a server that is up to no good, to each request one.
fn hostile_server(socket: &Path, answer: fn(&str) -> (u16, Value)) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream: UnixStream = stream.unwrap();
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() > 0 {
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            let (status, body) = answer(head.split(' ').nth(1).unwrap());
            let (body, len) = (body.to_string(), body.to_string().len());
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: {len}\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).unwrap();
            // What of the request was not read would take the answer away.
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
}

/// A title, a cleared screen, an eight-bit control and a direction.
const HOSTILE: &str = "a\u{1b}]0;x\u{7}\u{1b}[2J\r\u{9b}2J\u{202e}b";

#[test]
fn nothing_a_server_says_controls_the_terminal() {
    let (folder, socket) = folder();
    let refusing = folder.path().join("refusing.sock");
    hostile_server(&refusing, |_| (400, json!({"fault_message": HOSTILE})));
    hostile_server(&socket, |path| match path {
        "/" => (200, json!({"devices": ["mem0"]})),
        "/operations" => (
            201,
            json!({"id": HOSTILE, "state": HOSTILE, "reason": HOSTILE}),
        ),
        _ => {
            let guest = json!({"driver_state": HOSTILE, "node": HOSTILE, "pages_moved": [HOSTILE],
                "pages_held": HOSTILE, "pages_verified": HOSTILE, "pages_wrong": HOSTILE});
            (
                200,
                json!({"id": HOSTILE, "state": HOSTILE, "reason": HOSTILE, "guest": guest}),
            )
        }
    });
    let file = folder.path().join("state.json");
    fs::write(&file, "{}").unwrap();
    let file = file.to_str().unwrap();
    let mut seen = 0;
    for socket in [&refusing, &socket] {
        for args in [
            &["status"][..],
            &["status", "--device", "mem0"],
            &["status", "--json"],
            &["resize", "1G"],
            &["resize", "1G", "--wait"],
            &["freeze"],
            &["thaw"],
            &["restore", file],
        ] {
            let api = ["--api-sock", socket.to_str().unwrap()];
            let (_, stdout, stderr) = output(&[args, &api].concat());
            let said = format!("{stdout}{stderr}");
            let controls = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
            assert!(!said.contains(controls), "{args:?}: {said:?}");
            seen += usize::from(said.contains("]0;x"));
            if args.contains(&"--json") && !stdout.is_empty() {
                let status: Value = serde_json::from_str(&stdout).unwrap();
                assert_eq!(status["state"], HOSTILE, "it says the same");
            }
        }
    }
    // Of each refusal, and of each answer that has words in it.
    assert_eq!(seen, 8 + 5);
}

/// The lines of a command's help that can be typed.
fn examples(command: &str) -> Vec<String> {
    let (code, help, _) = output(&[command, "--help"]);
    assert_eq!(code, 0, "{command}");
    let (_, examples) = help.split_once("Examples:\n").unwrap();
    let lines = examples.lines().take_while(|line| !line.is_empty());
    lines.map(|line| line.trim().to_owned()).collect()
}

#[test]
fn help_has_examples_of_its_command() {
    for command in [
        "run",
        "resize",
        "status",
        "watch",
        "freeze",
        "thaw",
        "snapshot",
        "restore",
        "stress",
        "completions",
    ] {
        let named = format!("vmem {command}");
        let examples = examples(command);
        assert!(
            examples.iter().any(|line| line.contains(&named)),
            "{command}: {examples:?}"
        );
    }
    let (_, help, _) = output(&["run", "--help"]);
    assert!(!help.contains("stress run"), "{help}");
}

#[test]
fn examples_of_snapshot_and_restore_work_as_they_are_typed() {
    let (folder, _) = folder();
    let running = Running::start(&folder.path().join("a.sock"), &["--size", "64M"]);
    // What a killed server has left there.
    let killed = Running::start(&folder.path().join("b.sock"), &[]);
    killed.signal(Signal::KILL);
    killed.end();
    let script = format!(
        "set -e\ntrap 'kill $!' EXIT\n{}\nvmem resize 128M --wait --api-sock b.sock\nkill -TERM $!\nwait $!\ntrap - EXIT",
        examples("restore").join("\n")
    );
    let binary = Path::new(env!("CARGO_BIN_EXE_vmem")).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let done = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder.path())
        .env("PATH", path)
        .env_remove("VMEM_API_SOCK")
        .output()
        .unwrap();
    assert!(done.status.success(), "{script}: {done:?}");
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

/// No byte may be written into a file: what was there stays, and nothing is left behind.
#[test]
fn snapshot_replaces_a_file_whole_or_not_at_all() {
    let (folder, socket) = folder();
    let running = Running::start(&socket, &[]);
    let api = ["--api-sock", socket.to_str().unwrap()];
    assert_eq!(output(&[&["freeze"][..], &api].concat()).0, 0);
    let files = folder.path().join("files");
    fs::create_dir(&files).unwrap();
    let file = files.join("device.json");
    fs::write(&file, "the one before").unwrap();
    let snapshot = |prelude: &str, file: &Path| {
        let script = format!("{prelude} exec \"$0\" snapshot \"$1\" --api-sock \"$2\"");
        let done = std::process::Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_vmem")])
            .args([file, &socket])
            .output()
            .unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    let full = "trap '' XFSZ; ulimit -f 0;";
    assert_eq!(snapshot(full, &file).0, Some(1));
    assert_eq!(fs::read_to_string(&file).unwrap(), "the one before");
    assert_eq!(fs::read_dir(&files).unwrap().count(), 1);
    assert_eq!(snapshot("", &file).0, Some(0));
    let state: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(state["version"], 1);
    assert_eq!(fs::read_dir(&files).unwrap().count(), 1);
    // What is no file is written to.
    let (code, stdout) = snapshot("", Path::new("/dev/stdout"));
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), state);
    running.signal(Signal::TERM);
    assert_eq!(running.end().0, Some(0));
}

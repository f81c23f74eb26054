//! The commands that are clients of the control API.

use std::fs;
use std::io::{self, IsTerminal, StdoutLock, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use clap::builder::styling::{AnsiColor, Style};
use hyper::Method;
use serde_json::{Value, json};
use vmm_harness::api::client::request;
use vmm_harness::control::explain;
use vmm_harness::demo::size as size_text;
use vmm_harness::serve::control::Command;
use vmm_harness::{linux, parse_size};

use super::UsageError;

pub(crate) const RESIZE_USAGE: &str = "\
vmem resize [OPTIONS] <SIZE>
       vmem resize <SOCKET> [SIZE]";

pub(crate) const RESIZE_HELP: &str = "\
A guest of vmem run is named by --api-sock, and one of several memory devices by --device. One of vmem linux is named by
the socket its prompt has named, which is told from a size by its slash; without a size its sizes are printed. A deadline
that passes ends the waiting only: the size stays requested.

Examples:
  vmem resize 2G --api-sock vm.sock
  vmem resize 512M --api-sock vm.sock --wait --deadline 30s
  vmem resize 1G --device mem1 --api-sock vm.sock
  vmem resize /tmp/vmem-linux.sock 1G

Exit codes:
  0  the size is requested; with --wait, it is there
  1  it cannot be had, was superseded or cancelled, or nobody serves there; the error says which
  2  the options are wrong
  4  the deadline has passed; the error says what keeps the size from being there";

pub(crate) const HELP: &str = "\
Examples:
  vmem status --api-sock vm.sock
  VMEM_API_SOCK=vm.sock vmem status --json --device mem1

Exit codes:
  0  done
  1  refused, or nobody serves there; the error says which
  2  the options are wrong";

pub(crate) const SNAPSHOT_HELP: &str = "\
The state is the device's: which blocks are plugged, which sizes and features its driver knows. Contents of memory and the
guest itself are not in it; a guest that starts with a restored device finds blocks plugged from an earlier life.

Examples:
  vmem freeze --api-sock a.sock && vmem snapshot device.json --api-sock a.sock
  vmem run --api-sock b.sock --no-start &
  vmem restore device.json --api-sock b.sock

Exit codes:
  0  done
  1  refused, or nobody serves there; the error says which
  2  the options are wrong";

/// The exit code for a deadline that has passed.
const DEADLINE_PASSED: u8 = 4;

/// One request waits no longer than this; another follows.
const WAIT_STEP: Duration = Duration::from_secs(60);

/// Where the API is.
#[derive(Args, Clone)]
pub(crate) struct Api {
    /// Where `vmem run` serves its control API
    #[arg(long, value_name = "PATH", env = "VMEM_API_SOCK")]
    api_sock: Option<PathBuf>,
    /// The memory device; the first if none is named
    #[arg(long, value_name = "ID")]
    pub(super) device: Option<String>,
}

impl Api {
    /// The path of the device, and what is below that.
    fn memory(&self, part: &str) -> String {
        match &self.device {
            Some(id) => format!("/hotplug/memory/{id}{part}"),
            None => format!("/hotplug/memory{part}"),
        }
    }

    pub(super) fn socket(&self) -> Result<&Path, UsageError> {
        self.api_sock.as_deref().ok_or_else(|| {
            UsageError("name the socket of a `vmem run` with --api-sock or VMEM_API_SOCK".into())
        })
    }

    fn request(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        Ok(request(self.socket()?, method, path, body)?)
    }
}

#[derive(Args)]
pub(crate) struct ResizeArgs {
    /// The new size; or the socket the prompt of vmem linux has named
    #[arg(value_name = "SIZE|SOCKET")]
    what: String,
    /// After a socket, the new size; without it, the state is printed
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    #[command(flatten)]
    api: Api,
    /// Wait until the size is there
    #[arg(long)]
    wait: bool,
    /// How long to wait at the most
    #[arg(long, value_name = "TIME", requires = "wait", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
}

#[derive(Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    api: Api,
    /// Print what the API answers
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct FileArgs {
    /// A state, JSON
    file: PathBuf,
    #[command(flatten)]
    api: Api,
}

pub(crate) fn resize(args: &ResizeArgs) -> anyhow::Result<ExitCode> {
    let usage = |error: String| Err(UsageError(error).into());
    if args.what.contains('/') {
        return match args.wait {
            true => usage("a guest of vmem linux is not waited for".into()),
            false => resize_linux(args.what.as_ref(), args.size),
        };
    }
    match (parse_size(&args.what), args.size) {
        (Ok(size), None) => resize_running(args, size),
        (Ok(_), Some(_)) => usage("one size at a time".into()),
        (Err(_), _) => usage(format!(
            "{0:?} is not a size; the socket of a vmem linux has a slash: ./{0}",
            args.what
        )),
    }
}

fn resize_linux(socket: &Path, size: Option<u64>) -> anyhow::Result<ExitCode> {
    let command = size.map_or(Command::Status, Command::Resize);
    let report = linux::execute_at(socket, command)?;
    println!(
        "requested {}, plugged {}",
        size_text(report.requested_size),
        size_text(report.plugged_size)
    );
    Ok(ExitCode::SUCCESS)
}

fn resize_running(args: &ResizeArgs, size: u64) -> anyhow::Result<ExitCode> {
    // One that nobody lives to see is none.
    let deadline = args
        .deadline
        .and_then(|deadline| Instant::now().checked_add(deadline));
    let mut body = json!({ "requested_size": size });
    if let Some(id) = &args.api.device {
        body["device"] = json!(id);
    }
    let mut operation = args.api.request(Method::POST, "/operations", Some(&body))?;
    let path = format!("/operations/{}", operation["id"]);
    let left = || deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let is_under_way =
        |operation: &Value| matches!(operation["state"].as_str(), Some("converging" | "stalled"));
    while args.wait && is_under_way(&operation) && left() != Some(Duration::ZERO) {
        let wait = left().map_or(WAIT_STEP, |left| left.min(WAIT_STEP));
        let path = format!("{path}?wait={}ms", wait.as_millis().max(1));
        operation = args.api.request(Method::GET, &path, None)?;
    }
    let bytes = |field: &str| size_text(operation[field].as_u64().unwrap_or(0));
    let state = operation["state"].as_str().unwrap_or("unknown");
    let plugged = format!(
        "{} of {} plugged",
        bytes("plugged_size"),
        bytes("requested_size")
    );
    match state {
        "settled" => println!("{plugged}"),
        "converging" | "stalled" if args.wait => {
            let reason = operation["reason"].as_str().unwrap_or("converging");
            eprintln!("vmem: deadline passed: {plugged}: {}", explain(reason));
            return Ok(ExitCode::from(DEADLINE_PASSED));
        }
        "converging" | "stalled" => println!("{plugged}, operation {}", operation["id"]),
        state => anyhow::bail!("operation {} was {state}: {plugged}", operation["id"]),
    }
    Ok(ExitCode::SUCCESS)
}

/// One device in JSON, the first if none is named; in words all of them.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let get = |path: &str| args.api.request(Method::GET, path, None);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &get(&args.api.memory(""))?)?;
        writeln!(out)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.api.device.is_some() {
        write_status(&mut out, &get(&args.api.memory(""))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let devices = get("/")?["devices"].take();
    let ids = devices.as_array().into_iter().flatten();
    for (index, id) in ids.filter_map(Value::as_str).enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        write_status(&mut out, &get(&format!("/hotplug/memory/{id}"))?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write_status(out: &mut StdoutLock<'_>, status: &Value) -> io::Result<()> {
    let colours = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint = |text: &str, colour: AnsiColor| match colours {
        true => {
            let style = Style::new().fg_color(Some(colour.into()));
            format!("{style}{text}{style:#}")
        }
        false => text.to_owned(),
    };
    let bytes = |value: &Value| size_text(value.as_u64().unwrap_or(0));
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let state = text(&status["state"]).to_lowercase();
    let reason = match (status["reason"].as_str(), status["frozen"].as_bool()) {
        (Some(reason), _) => paint(explain(reason), AnsiColor::Yellow),
        (None, Some(true)) => paint("the size is there; frozen", AnsiColor::Yellow),
        (None, _) => paint("the size is there", AnsiColor::Green),
    };
    writeln!(out, "device     {}", text(&status["id"]))?;
    writeln!(out, "guest      {state}")?;
    writeln!(out, "requested  {}", bytes(&status["requested_size"]))?;
    writeln!(out, "plugged    {}", bytes(&status["plugged_size"]))?;
    writeln!(out, "state      {reason}")?;
    writeln!(out, "resident   {}", bytes(&status["resident_size"]))?;
    writeln!(
        out,
        "region     {} in blocks of {}, slots of {}",
        bytes(&status["total_size"]),
        bytes(&status["block_size"]),
        bytes(&status["slot_size"])
    )?;
    if let guest @ Value::Object(_) = &status["guest"] {
        writeln!(
            out,
            "driver     {}, {} online on node {}, {} pages moved",
            text(&guest["driver_state"]),
            bytes(&guest["online_size"]),
            guest["node"],
            guest["pages_moved"]
        )?;
        writeln!(
            out,
            "workload   {} pages held, {} verified, {} wrong",
            guest["pages_held"], guest["pages_verified"], guest["pages_wrong"]
        )?;
    }
    Ok(())
}

pub(crate) fn freeze(api: &Api) -> anyhow::Result<ExitCode> {
    api.request(Method::PUT, &api.memory("/freeze"), None)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn thaw(api: &Api) -> anyhow::Result<ExitCode> {
    api.request(Method::PUT, &api.memory("/thaw"), None)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn snapshot(args: &FileArgs) -> anyhow::Result<ExitCode> {
    let state = args
        .api
        .request(Method::GET, &args.api.memory("/state"), None)?;
    let file = || args.file.display().to_string();
    fs::write(&args.file, format!("{state}\n")).with_context(file)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn restore(args: &FileArgs) -> anyhow::Result<ExitCode> {
    let file = || args.file.display().to_string();
    let text = fs::read_to_string(&args.file).with_context(file)?;
    let state = serde_json::from_str(&text).with_context(file)?;
    args.api
        .request(Method::PUT, &args.api.memory("/state"), Some(&state))?;
    Ok(ExitCode::SUCCESS)
}

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
use tempfile::NamedTempFile;
use vmm_harness::api::client::{ClientError, PATIENCE, await_server, request};
use vmm_harness::control::explain;
use vmm_harness::demo::size as size_text;
use vmm_harness::serve::control::Command;
use vmm_harness::text::{clean, clean_json};
use vmm_harness::{linux, parse_size};

use super::UsageError;

pub(crate) const RESIZE_USAGE: &str = "\
vmem resize [OPTIONS] <SIZE>
       vmem resize <SOCKET> [SIZE]";

pub(crate) const RESIZE_HELP: &str = "\
A guest of vmem run is named by --api-sock, and one of several memory devices by --device. One of vmem linux is named by
the socket its prompt has named, which is told from a size by its slash; without a size its sizes are printed. A deadline
that passes ends the waiting only: the size stays requested. The server has another two seconds to say why it is not there.

Examples:
  vmem resize 2G --api-sock vm.sock
  vmem resize 512M --api-sock vm.sock --wait --deadline 30s
  vmem resize 1G --device mem1 --api-sock vm.sock
  vmem resize /tmp/vmem-linux.sock 1G

Exit codes:
  0  the size is requested; with --wait, it is there
  1  it cannot be had, was superseded or cancelled, or nobody serves there; the error says which
  2  the options are wrong
  4  the deadline has passed; the error says what keeps the size from being there, or that the server does not answer";

pub(crate) const STATUS_HELP: &str = "\
Examples:
  vmem status --api-sock vm.sock
  VMEM_API_SOCK=vm.sock vmem status --json --device mem1

Exit codes:
  0  done
  1  refused, or nobody serves there; the error says which
  2  the options are wrong";

pub(crate) const FREEZE_HELP: &str = "\
A frozen device answers BUSY to every PLUG and UNPLUG; thawed, it tells the driver that trying again is worth it.

Examples:
  vmem freeze --api-sock vm.sock
  vmem thaw --api-sock vm.sock
  vmem freeze --device mem1 --api-sock vm.sock

Exit codes:
  0  done
  1  refused, or nobody serves there; the error says which
  2  the options are wrong";

pub(crate) const SNAPSHOT_HELP: &str = "\
The state is the device's: which blocks are plugged, which sizes and features its driver knows. Contents of memory and the
guest itself are not in it; a guest that starts with a restored device finds blocks plugged from an earlier life. A file that
is there is replaced as a whole or not at all.

Examples:
  vmem freeze --api-sock a.sock && vmem snapshot device.json --api-sock a.sock
  vmem run --api-sock b.sock --no-start &
  vmem restore device.json --api-sock b.sock --connect-timeout 10s

Exit codes:
  0  done
  1  refused, or nobody serves there; the error says which
  2  the options are wrong";

/// The exit code for a deadline that has passed.
const DEADLINE_PASSED: u8 = 4;

/// One request waits no longer than this; another follows.
const WAIT_STEP: Duration = Duration::from_secs(60);

/// For an answer, beyond a deadline, to say why the size is not there.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where the API is.
#[derive(Args, Clone)]
pub(crate) struct Api {
    /// Where `vmem run` serves its control API
    #[arg(long, value_name = "PATH", env = "VMEM_API_SOCK")]
    api_sock: Option<PathBuf>,
    /// The memory device; the first if none is named
    #[arg(long, value_name = "ID")]
    pub(super) device: Option<String>,
    /// How long to wait for a server that is not there yet [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    connect_timeout: Option<Duration>,
}

impl Api {
    /// The path of the device, and what is below that.
    fn memory(&self, part: &str) -> String {
        match &self.device {
            Some(id) => format!("/hotplug/memory/{id}{part}"),
            None => format!("/hotplug/memory{part}"),
        }
    }

    /// The socket, where somebody listens by now if that was to be waited for.
    pub(super) fn socket(&self) -> anyhow::Result<&Path> {
        let socket = self.api_sock.as_deref().ok_or_else(|| {
            UsageError("name the socket of a `vmem run` with --api-sock or VMEM_API_SOCK".into())
        })?;
        if let Some(patience) = self.connect_timeout {
            await_server(socket, patience)?;
        }
        Ok(socket)
    }

    fn request(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        Ok(request(self.socket()?, method, path, body, PATIENCE)?)
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
    let socket = args.api.socket()?;
    // One that nobody lives to see is none.
    let deadline = args
        .deadline
        .and_then(|deadline| Instant::now().checked_add(deadline));
    let left = || deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    match resize_until(args, socket, size, &left) {
        Err(ClientError::Late(_)) if deadline.is_some() => {
            eprintln!("vmem: deadline passed: the server does not answer");
            Ok(ExitCode::from(DEADLINE_PASSED))
        }
        operation => print_resize(args, &operation?),
    }
}

/// The operation, as it is when it has ended, or when nothing is left of the time.
fn resize_until(
    args: &ResizeArgs,
    socket: &Path,
    size: u64,
    left: &dyn Fn() -> Option<Duration>,
) -> Result<Value, ClientError> {
    let ask = |method, path: &str, body: Option<&Value>| {
        let patience = left().map_or(PATIENCE, |left| left.min(WAIT_STEP) + LAST_WORDS);
        request(socket, method, path, body, patience)
    };
    let mut body = json!({ "requested_size": size });
    if let Some(id) = &args.api.device {
        body["device"] = json!(id);
    }
    let mut operation = ask(Method::POST, "/operations", Some(&body))?;
    let path = format!("/operations/{}", operation["id"]);
    let is_under_way =
        |operation: &Value| matches!(operation["state"].as_str(), Some("converging" | "stalled"));
    while args.wait && is_under_way(&operation) && left() != Some(Duration::ZERO) {
        let wait = left().map_or(WAIT_STEP, |left| left.min(WAIT_STEP));
        let path = format!("{path}?wait={}ms", wait.as_millis().max(1));
        operation = ask(Method::GET, &path, None)?;
    }
    Ok(operation)
}

fn print_resize(args: &ResizeArgs, operation: &Value) -> anyhow::Result<ExitCode> {
    let bytes = |field: &str| size_text(operation[field].as_u64().unwrap_or(0));
    let plugged = format!(
        "{} of {} plugged",
        bytes("plugged_size"),
        bytes("requested_size")
    );
    let id = text(&operation["id"]);
    match operation["state"].as_str().unwrap_or("unknown") {
        "settled" => println!("{plugged}"),
        "converging" | "stalled" if args.wait => {
            let reason = operation["reason"].as_str().unwrap_or("converging");
            let reason = clean(explain(reason));
            eprintln!("vmem: deadline passed: {plugged}: {reason}");
            return Ok(ExitCode::from(DEADLINE_PASSED));
        }
        "converging" | "stalled" => println!("{plugged}, operation {id}"),
        state => anyhow::bail!("operation {id} was {}: {plugged}", clean(state)),
    }
    Ok(ExitCode::SUCCESS)
}

/// What a server says, which may be anything, fit to be shown.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => clean(text),
        Value::Null => "unknown".into(),
        value => clean(&value.to_string()),
    }
}

/// One device in JSON, the first if none is named; in words all of them.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let get = |path: &str| args.api.request(Method::GET, path, None);
    let mut out = io::stdout().lock();
    if args.json {
        let status = serde_json::to_string_pretty(&get(&args.api.memory(""))?)?;
        writeln!(out, "{}", clean_json(&status))?;
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

/// Milliseconds after which people wonder.
const SLOW: u64 = 1000;

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
    let state = text(&status["state"]).to_lowercase();
    let reason = match (status["reason"].as_str(), status["frozen"].as_bool()) {
        (Some(reason), _) => paint(&clean(explain(reason)), AnsiColor::Yellow),
        (None, Some(true)) => paint("the size is there; frozen", AnsiColor::Yellow),
        (None, _) => paint("the size is there", AnsiColor::Green),
    };
    writeln!(out, "device     {}", text(&status["id"]))?;
    writeln!(out, "guest      {state}")?;
    writeln!(out, "requested  {}", bytes(&status["requested_size"]))?;
    writeln!(out, "plugged    {}", bytes(&status["plugged_size"]))?;
    writeln!(out, "state      {reason}")?;
    if let Some(milliseconds) = status["serving"]["milliseconds"].as_u64()
        && milliseconds >= SLOW
    {
        let request = text(&status["serving"]["request"]);
        let seconds = milliseconds as f64 / 1e3;
        writeln!(out, "host       at {request} for {seconds:.1} s")?;
    }
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
            text(&guest["node"]),
            text(&guest["pages_moved"])
        )?;
        writeln!(
            out,
            "workload   {} pages held, {} verified, {} wrong",
            text(&guest["pages_held"]),
            text(&guest["pages_verified"]),
            text(&guest["pages_wrong"])
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
    replace(&args.file, &format!("{state}\n")).with_context(file)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a file as a whole or not at all. What is there and no file, as a pipe, is written to.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&path).is_ok_and(|there| !there.is_file()) {
        return fs::write(&path, text);
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut file = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

pub(crate) fn restore(args: &FileArgs) -> anyhow::Result<ExitCode> {
    let file = || args.file.display().to_string();
    let text = fs::read_to_string(&args.file).with_context(file)?;
    let state = serde_json::from_str(&text).with_context(file)?;
    args.api
        .request(Method::PUT, &args.api.memory("/state"), Some(&state))?;
    Ok(ExitCode::SUCCESS)
}

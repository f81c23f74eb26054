//! `vmem run`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Deserialize;
use vmm_harness::Size;
use vmm_harness::control::{DeviceOptions, GuestOptions};
use vmm_harness::demo::DemoOptions;
use vmm_harness::run::{self, RunOptions};

use super::UsageError;
use super::device::DeviceArgs;
use super::machine::MachineArgs;

pub(crate) const HELP: &str = "\
A file has the same options by the same names, those of the guest and its first memory device, mem0, in a table
\"machine\", further devices in tables \"device\"; an option on the command line wins. A guest has four devices at the most. Sizes are bytes, or have a binary unit: 6M, 130MiB, 4G.

Examples:
  vmem run --api-sock vm.sock --size 1G
  vmem run --config resources/run.toml --vcpus 4
  vmem run --api-sock vm.sock --node 0 --device id=mem1,region=2G,node=1,size=512M
  vmem run --api-sock vm.sock --no-start
  curl --unix-socket vm.sock http://localhost/hotplug/memory

Exit codes:
  0  told to end by SIGINT or SIGTERM, and the guest's memory was as it should
  1  the socket is in use, the guest ended by itself or found wrong memory; the error says which
  2  the options are wrong";

#[derive(Args)]
pub(crate) struct RunArgs {
    /// A file with options, TOML, or JSON if its name ends so
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// What can be given on the command line and in a file.
#[derive(Args, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Options {
    /// Where the control API is served; for its user only. A socket nobody listens to any more is replaced
    #[arg(long, value_name = "PATH", env = "VMEM_API_SOCK")]
    api_sock: Option<PathBuf>,
    /// Size to ask the driver for at the start [default: 0]
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
    /// What the guest does with its memory [default: churn]
    #[arg(long, value_enum)]
    workload: Option<Workload>,
    /// Do not start the guest: that, its memory, and a state to begin with come through the API
    #[arg(long)]
    no_start: bool,
    /// A further memory device, NAME=VALUE,…: id, and perhaps region, block-size, slot-size, node, backing, size
    #[arg(long, value_name = "FIELDS")]
    device: Vec<DeviceArgs>,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Clone, Copy, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Workload {
    /// Nothing
    Idle,
    /// Allocates, fills, verifies and frees pages all the time, in up to half of the memory
    #[value(alias = "alloc")]
    #[serde(alias = "alloc")]
    Churn,
    /// The same, and many pages are pinned or otherwise cannot be moved for a while
    Pin,
    /// The same with few such pages
    Mixed,
}

impl Options {
    fn or(self, others: Self) -> Self {
        Self {
            api_sock: self.api_sock.or(others.api_sock),
            size: self.size.or(others.size),
            workload: self.workload.or(others.workload),
            no_start: self.no_start || others.no_start,
            device: match self.device.is_empty() {
                true => others.device,
                false => self.device,
            },
            machine: self.machine.or(others.machine),
        }
    }
}

pub(crate) fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let options = match &args.config {
        Some(file) => args.options.or(read(file)?),
        None => args.options,
    };
    let missing = || UsageError("name the socket of the control API with --api-sock".into());
    let guest = options.machine.options();
    let guest = DemoOptions {
        targets: Some(vec![options.size.map_or(0, |Size(bytes)| bytes)]),
        worker_pages: match options.workload {
            Some(Workload::Idle) => 0,
            Some(Workload::Churn | Workload::Pin | Workload::Mixed) | None => guest.worker_pages,
        },
        workload: match options.workload {
            Some(Workload::Pin) => vmm_harness::Workload::Pin,
            Some(Workload::Mixed) => vmm_harness::Workload::Mixed,
            Some(Workload::Idle | Workload::Churn) | None => vmm_harness::Workload::Alloc,
        },
        ..guest
    };
    let devices = options.device.into_iter().map(DeviceOptions::from);
    let options = RunOptions {
        guest: GuestOptions::new(guest, devices.collect()),
        api_sock: options.api_sock.ok_or_else(missing)?,
        start: !options.no_start,
    };
    run::run(&options, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> anyhow::Result<Options> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let options = match file
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        true => serde_json::from_str(&text).map_err(|error| error.to_string()),
        false => toml::from_str(&text).map_err(|error| error.to_string()),
    };
    options.map_err(|error| UsageError(format!("{}: {error}", file.display())).into())
}

//! `vmem watch`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use vmm_harness::watch::{self, WatchOptions};

use super::client::Api;

pub(crate) const HELP: &str = "\
Sizes over time, the map of blocks, requests with their rates of the last seconds and latencies since the start, and what
happens. A terminal of 80x24 has room for all of it; a smaller one shows less, one below 40x10 nothing.

Keys:
  q, Ctrl-C  end
  r          ask for another size

Of blocks that share a cell and are not alike, the cell is % or, if one of them is pinned, p. What is online, movable and
pinned the guest says itself. A server that goes away is looked for once a second.

Examples:
  vmem watch --api-sock vm.sock
  VMEM_API_SOCK=vm.sock vmem watch --interval 100ms
  NO_COLOR=1 vmem watch --api-sock vm.sock

Exit codes:
  0  told to end, by a key, SIGINT or SIGTERM
  1  nobody serves there, at the start or when it is told to end; or the terminal failed
  2  the options are wrong, or this is not a terminal";

#[derive(Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    api: Api,
    /// Time between two looks, 50ms to 1h
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match (Duration::from_millis(50)..=Duration::from_secs(3600)).contains(&interval) {
        true => Ok(interval),
        false => Err("not between 50ms and 1h".to_owned()),
    }
}

pub(crate) fn run(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    watch::run(&WatchOptions {
        socket: args.api.socket()?.to_owned(),
        device: args.api.device.clone(),
        interval: args.interval,
        colours: std::env::var_os("NO_COLOR").is_none(),
    })?;
    Ok(ExitCode::SUCCESS)
}

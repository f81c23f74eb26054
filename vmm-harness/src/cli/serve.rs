//! `vmem serve`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use vmm_harness::parse_size;
use vmm_harness::serve::{self, ServeOptions};

pub(crate) const HELP: &str = "\
Standard input takes lines, each answered by a line of JSON on standard output:
  resize SIZE     ask the driver to have SIZE plugged
  status          sizes only, as the other answers have them as well
  freeze, thaw    hold requests off for a while
  quit            end, as SIGINT and SIGTERM do

The guest memory of the client must be shared and cover the region; a guest that is to leave the region to the device
must not know it as RAM.

Exit codes:
  0  told to end
  1  the socket is in use, or something could not be done; the error names it
  2  the options are wrong";

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Where clients connect; its user only. A socket nobody listens to any more is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Guest-physical address of the device-managed region
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    region_start: u64,
    /// Size of the region
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_size)]
    region_size: u64,
    /// Size of a device block, a power of two; 2M if not given
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    block_size: Option<u64>,
    /// Proximity domain of the memory
    #[arg(long, value_name = "N")]
    node: Option<u16>,
    /// Size to ask the driver for at the start
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    size: u64,
}

pub(crate) fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let options = ServeOptions {
        socket: args.socket,
        region_start: args.region_start,
        region_size: args.region_size,
        block_size: args.block_size,
        node_id: args.node,
        requested_size: args.size,
    };
    serve::run(&options, io::stdin(), &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

//! `vmem demo`.

use std::io;
use std::process::ExitCode;

use clap::Args;
use vmm_harness::demo::{self, DemoOptions};
use vmm_harness::parse_size;

use super::machine::MachineArgs;

pub(crate) const HELP: &str = "\
Sizes are bytes, or have a binary unit: 6M, 130MiB, 4G.
RUST_LOG=debug shows what device and harness say on the way.

Exit codes:
  0  each size was reached as far as the driver can, and every check held
  1  a check failed, or something could not be done; the error names it
  2  the options are wrong
  3  the rogue guest was caught, as asked for with --rogue";

#[derive(Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Sizes to ask for, one after another; by default 1G,130M,2G,6M,0, rounded up to what the driver can do
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = parse_size)]
    targets: Option<Vec<u64>>,
    /// Let the guest touch an unplugged block at last
    #[arg(long)]
    rogue: bool,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let options = DemoOptions {
        targets: args.targets.clone(),
        rogue: args.rogue,
        ..args.machine.options()
    };
    let summary = match args.json {
        true => {
            let summary = demo::run(&options, &mut io::sink())?;
            serde_json::to_writer_pretty(io::stdout().lock(), &summary)?;
            println!();
            summary
        }
        false => demo::run(&options, &mut io::stdout())?,
    };
    Ok(ExitCode::from(if summary.rogue.is_some() { 3 } else { 0 }))
}

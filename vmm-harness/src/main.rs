//! `vmem`: resize the memory of a running guest, and see that it works.

mod cli;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use vmm_harness::demo::DemoError;
use vmm_harness::run::RunError;
use vmm_harness::serve::ServeError;
use vmm_harness::watch::WatchError;

use crate::cli::{client, demo, linux, replay, run, serve, stress, watch};

/// Resizes the memory of a running guest through a virtio memory device.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, after_help = demo::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    demo: demo::DemoArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Grows and shrinks a working guest step by step and checks each step. The default.
    #[command(after_help = demo::HELP)]
    Demo(demo::DemoArgs),
    /// Runs recorded traces of real kernels through the model of memory hotplug and the driver, and reports the first
    /// difference.
    #[command(after_help = replay::HELP)]
    Replay(replay::ReplayArgs),
    /// Boots a stock Linux kernel in QEMU with a memory device, for a prompt or a script.
    #[command(after_help = linux::HELP)]
    Linux(linux::LinuxArgs),
    /// Keeps a guest alive, to be resized, watched, frozen and saved through a control API.
    #[command(after_help = run::HELP)]
    Run(run::RunArgs),
    /// Resizes a guest of `vmem run`, or one of `vmem linux`.
    #[command(after_help = client::RESIZE_HELP, override_usage = client::RESIZE_USAGE)]
    Resize(client::ResizeArgs),
    /// Says how the memory of a guest of `vmem run` is.
    #[command(after_help = client::STATUS_HELP)]
    Status(client::StatusArgs),
    /// Shows a guest of `vmem run` live: sizes, blocks, requests, events.
    #[command(after_help = watch::HELP)]
    Watch(watch::WatchArgs),
    /// Holds requests of the guest's driver off.
    #[command(after_help = client::FREEZE_HELP)]
    Freeze(client::Api),
    /// Ends that.
    #[command(after_help = client::FREEZE_HELP)]
    Thaw(client::Api),
    /// Writes the state of a frozen device into a file.
    #[command(after_help = client::SNAPSHOT_HELP)]
    Snapshot(client::FileArgs),
    /// Starts a guest of `vmem run --no-start` with a device that is as it was saved.
    #[command(after_help = client::SNAPSHOT_HELP)]
    Restore(client::FileArgs),
    /// Prints what a shell needs to complete options.
    #[command(after_help = COMPLETIONS_HELP)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Resizes working guests all the time, with faults if asked for, and checks them all the time.
    #[command(after_help = stress::HELP, mut_arg("seed", |seed| seed.help(STRESS_SEED)))]
    Stress(stress::StressArgs),
    /// Serves a memory device to VMMs that speak vfio-user, and resizes it as told on standard input.
    #[command(after_help = serve::HELP)]
    Serve(serve::ServeArgs),
}

/// The option is shared.
const STRESS_SEED: &str = "Seed of everything chosen at random [default: a new one each time]";

const COMPLETIONS_HELP: &str = "\
Examples:
  vmem completions bash > ~/.local/share/bash-completion/completions/vmem
  vmem completions zsh > \"${fpath[1]}/_vmem\"
  vmem completions fish > ~/.config/fish/completions/vmem.fish";

fn main() -> ExitCode {
    // Warnings are for whoever runs it: what a client or a guest does wrong is told nowhere else.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Replay(args)) => replay::run(&args),
        Some(Command::Linux(args)) => linux::run(&args),
        Some(Command::Run(args)) => run::run(args),
        Some(Command::Resize(args)) => client::resize(&args),
        Some(Command::Status(args)) => client::status(&args),
        Some(Command::Watch(args)) => watch::run(&args),
        Some(Command::Freeze(api)) => client::freeze(&api),
        Some(Command::Thaw(api)) => client::thaw(&api),
        Some(Command::Snapshot(args)) => client::snapshot(&args),
        Some(Command::Restore(args)) => client::restore(&args),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "vmem", &mut io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Stress(args)) => stress::run(&args),
        Some(Command::Serve(args)) => serve::run(args),
        None => demo::run(&cli.demo),
    };
    result.unwrap_or_else(|error| {
        let usage = error.downcast_ref().is_some_and(DemoError::is_usage)
            || error.downcast_ref().is_some_and(ServeError::is_usage)
            || error.downcast_ref().is_some_and(RunError::is_usage)
            || error.downcast_ref().is_some_and(WatchError::is_usage)
            || error.is::<cli::UsageError>();
        eprintln!("vmem: {error:#}");
        ExitCode::from(if usage { 2 } else { 1 })
    })
}

//! `vmem run`, and the commands that are clients of it.

pub(crate) mod client;
mod machine;
mod run;
mod stress;

pub(crate) use client::{ResizeArgs, StatusArgs, resize, status};
pub(crate) use machine::MachineArgs;
pub(crate) use run::{RunArgs, run};
pub(crate) use stress::{STRESS_HELP, StressArgs, stress};

/// The command line is wrong in a way its parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

pub(crate) const RUN_HELP: &str = "\
A file has the same options by the same names, those of the guest in a table \"machine\"; an option on the command line
wins. Sizes are bytes, or have a binary unit: 6M, 130MiB, 4G.

Examples:
  vmem run --api-sock vm.sock --size 1G
  vmem run --config resources/run.toml --vcpus 4
  vmem run --api-sock vm.sock --no-start
  curl --unix-socket vm.sock http://localhost/hotplug/memory

Exit codes:
  0  told to end by SIGINT or SIGTERM, and the guest's memory was as it should
  1  the socket is in use, the guest ended by itself or found wrong memory; the error says which
  2  the options are wrong";

pub(crate) const RESIZE_HELP: &str = "\
A guest of `vmem run` is named by --api-sock, one of `vmem linux` by the socket its prompt has named.
A deadline that passes ends the waiting only: the size stays requested.

Examples:
  vmem resize 2G --api-sock vm.sock
  vmem resize 512M --api-sock vm.sock --wait --deadline 30s
  vmem resize /tmp/vmem-linux.sock 1G

Exit codes:
  0  the size is requested; with --wait, it is there
  1  it cannot be had, was superseded or cancelled, or nobody serves there; the error says which
  2  the options are wrong
  4  the deadline has passed; the error says what keeps the size from being there";

pub(crate) const CLIENT_HELP: &str = "\
Examples:
  vmem status --api-sock vm.sock
  VMEM_API_SOCK=vm.sock vmem status --json

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

pub(crate) const COMPLETIONS_HELP: &str = "\
Examples:
  vmem completions bash > ~/.local/share/bash-completion/completions/vmem
  vmem completions zsh > \"${fpath[1]}/_vmem\"
  vmem completions fish > ~/.config/fish/completions/vmem.fish";

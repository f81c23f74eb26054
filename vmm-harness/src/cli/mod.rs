//! The commands of `vmem`: options, help, what is printed.

pub(crate) mod client;
pub(crate) mod demo;
mod device;
pub(crate) mod linux;
mod machine;
pub(crate) mod replay;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod stress;
pub(crate) mod watch;

/// The command line is wrong in a way its parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

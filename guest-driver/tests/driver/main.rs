//! The driver against a device that follows the specification, and sometimes does not.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

mod direct;
mod faults;
mod init;
mod lifecycle;
mod linux;
mod random;
mod recovery;
mod resize;
#[expect(dead_code, reason = "the target `conformance` uses the rest")]
mod support;
mod torn;

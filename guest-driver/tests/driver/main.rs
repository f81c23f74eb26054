//! The driver against a device that follows the specification, and sometimes does not.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

mod faults;
mod init;
mod random;
mod resize;
mod support;

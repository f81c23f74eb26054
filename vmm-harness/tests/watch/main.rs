//! `vmem watch`: what it draws, exactly, and what it does to a terminal.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod pictures;
#[path = "../common/terminal.rs"]
mod pty;
#[path = "../common/running.rs"]
mod running;
mod svg;
mod terminal;

//! The control API: server and document are one, bad requests do no harm, and what it says of a guest is so.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod clients;
mod document;
mod memory;
mod operations;
mod refusals;
mod rig;

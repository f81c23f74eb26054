//! HTTP and JSON on a Unix socket: the control API of `vmem run`, and its client.
//!
//! `GET`, `PUT` and `PATCH` of `/hotplug/memory` are Firecracker's, fields, status codes and `fault_message` included;
//! `docs/openapi.json` describes all of it. HTTP itself is hyper's, on one thread of its own: a dozen paths need no
//! router, and a router's crate would be the larger part of it.
//!
//! | to find | look at |
//! |---|---|
//! | which request gets which answer | `routes.rs` |
//! | connections, limits, time-outs | `server.rs` |
//! | event streams | `stream.rs` |
//! | whether a client is still there | `peer.rs` |
//! | what the commands of `vmem` send | [`client`] |

pub mod client;
mod metrics;
mod peer;
mod routes;
mod server;
mod stream;

pub use server::{ApiServer, Limits};

/// The description of the API, OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.json");

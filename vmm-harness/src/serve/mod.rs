//! `vmem serve`: a memory device for VMMs that speak vfio-user, resized by lines on standard input.

pub mod control;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use thiserror::Error;
use virtio_mem::{BuildError, LentFiles, VirtioMem};
use vm_memory::GuestAddress;

use crate::signals;
use crate::vfio_user::{Server, ServerError, ServerSocket, SocketError};

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The socket clients connect to.
    pub socket: PathBuf,
    /// Guest-physical address of the device-managed region.
    pub region_start: u64,
    /// Bytes of the region.
    pub region_size: u64,
    /// Bytes per block; 2 MiB if not given.
    pub block_size: Option<u64>,
    /// Proximity domain of the memory.
    pub node_id: Option<u16>,
    /// Bytes the first driver finds requested.
    pub requested_size: u64,
}

/// Serving ended with an error, or did not begin.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The options of the device do not go together.
    #[error("memory device")]
    Device(#[from] BuildError),
    /// The server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The host lacks something.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    /// Nobody reads the answers.
    #[error("standard output")]
    Output(#[source] io::Error),
}

impl ServeError {
    /// Whether the options are to blame.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Device(_))
    }
}

/// What the main thread waits for.
enum Event {
    Line(String),
    Signal,
    Failed(ServerError),
}

/// Serves until it is told to quit, by a line of `input` or by SIGINT or SIGTERM. Says on `output` that it listens,
/// and answers each line of `input` there. The end of `input` is not the end.
///
/// For a process that has nothing else to do: its threads go with the process, and what a client has lent goes with
/// them. The socket's file is gone when this returns. Blocks are not unplugged at the end, for the client's guest may
/// run on without its device.
///
/// # Errors
///
/// [`ServeError`].
pub fn run(
    options: &ServeOptions,
    input: impl Read + Send + 'static,
    output: &mut dyn Write,
) -> Result<(), ServeError> {
    let host = |what| move |error| ServeError::Host(what, error);
    let lent = LentFiles::new(options.region_size);
    let lent = lent.map_err(host("address space for the region"))?;
    let mut device = VirtioMem::builder(GuestAddress(options.region_start), lent.clone())
        .requested_size(options.requested_size);
    if let Some(block_size) = options.block_size {
        device = device.block_size(block_size);
    }
    if let Some(node_id) = options.node_id {
        device = device.node_id(node_id);
    }
    let device = device.build()?;
    let handle = device.handle();
    // Before there is a file to leave behind.
    let (events, received) = channel();
    let signalled = events.clone();
    let tell = move || {
        // An error is that nobody waits any more.
        let _ = signalled.send(Event::Signal);
    };
    signals::on_termination(tell).map_err(host("signals"))?;
    let socket = ServerSocket::bind(&options.socket)?;
    let mut server = Server::new(&socket, device, lent)?;

    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        let thread = thread::Builder::new().name(name.into());
        thread.spawn(body).map_err(host("thread"))
    };
    let failures = events.clone();
    let serve = move || {
        let forever = AssertUnwindSafe(|| {
            loop {
                if let Err(error) = server.serve_client() {
                    break error;
                }
            }
        });
        // A process that serves nobody any more must not keep clients waiting.
        let error = catch_unwind(forever).unwrap_or(ServerError::Panicked);
        // If nobody receives it the process is at its end.
        let _ = failures.send(Event::Failed(error));
    };
    spawn("vmem-serve", Box::new(serve))?;
    spawn("vmem-control", Box::new(move || read_lines(input, &events)))?;

    let mut say = |answer: &serde_json::Value| {
        writeln!(output, "{answer}")
            .and_then(|()| output.flush())
            .map_err(ServeError::Output)
    };
    say(&serde_json::json!({ "listening": options.socket }))?;
    for event in received {
        let line = match event {
            Event::Line(line) => line,
            Event::Signal => break,
            Event::Failed(error) => return Err(error.into()),
        };
        let (answer, quit) = control::answer(&line, |command| command.execute(&handle));
        say(&answer)?;
        if quit {
            break;
        }
    }
    Ok(())
}

fn read_lines(input: impl Read, events: &Sender<Event>) {
    for line in BufReader::new(input).lines() {
        match line {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                if events.send(Event::Line(line)).is_err() {
                    return;
                }
            }
            Err(error) => return log::warn!("standard input: {error}"),
        }
    }
}

//! `vmem run`: a guest that lives until it is told to end, controlled through [`api`](crate::api).

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use thiserror::Error;

use crate::api::{ApiServer, Limits};
use crate::control::{GuestOptions, Instance, InstanceError};
use crate::demo::DemoError;
use crate::socket::{ServerSocket, SocketError};
use crate::{Outcome, signals};

/// What to run, and where it is controlled.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The guest and its memory devices.
    pub guest: GuestOptions,
    /// The socket of the API.
    pub api_sock: PathBuf,
    /// Whether the guest is started at once, or through the API.
    pub start: bool,
}

/// The guest was not started, or did not end as it should.
#[derive(Debug, Error)]
pub enum RunError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The guest.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The guest was not told to end, and did.
    #[error("{0}")]
    Ended(Outcome),
    /// The guest found memory that is not what it wrote.
    #[error("{0} pages were not what the guest had written")]
    WrongPages(u64),
    /// The host lacks something, or nobody reads the output.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

impl RunError {
    /// Whether the options are to blame.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Instance(InstanceError::Guest(error)) if DemoError::is_usage(error))
    }
}

/// Runs until SIGINT or SIGTERM, or until the guest ends by itself. Says on `output` where it listens and how the guest
/// has ended. The socket's file is gone when this returns.
///
/// # Errors
///
/// [`RunError`].
pub fn run(options: &RunOptions, output: &mut dyn Write) -> Result<(), RunError> {
    let host = |what| move |error| RunError::Host(what, error);
    // Before there is a file to leave behind.
    let (signal, woken) = channel();
    let ended = signal.clone();
    let tell = move || {
        // An error is that nobody waits any more.
        let _ = signal.send(());
    };
    signals::on_termination(tell).map_err(host("signals"))?;
    let instance = Arc::new(Instance::new(options.guest.clone())?.telling(ended));
    let socket = ServerSocket::bind(&options.api_sock)?;
    if options.start {
        instance.start()?;
    }
    let server = ApiServer::start(socket, Arc::clone(&instance), Limits::default());
    let server = server.map_err(host("control API"))?;
    let mut say = |line: &str| {
        writeln!(output, "{line}")
            .and_then(|()| output.flush())
            .map_err(host("standard output"))
    };
    let guest = match instance.backend() {
        Some(backend) => format!("guest on {backend}"),
        None => "guest not started".to_owned(),
    };
    let path = options.api_sock.display();
    say(&format!(
        "{guest}; control API at {path}, process {}",
        std::process::id()
    ))?;
    // By a signal, or by the guest; the instance has a sender, so there is no error.
    let _ = woken.recv();
    let ended = instance.outcome();
    let stopped = instance.stop();
    // Only now, so that who listens to events may hear of the end.
    drop(server);
    let Some((outcome, guest)) = stopped else {
        return Ok(());
    };
    say(&format!(
        "{outcome}; pages verified: {}, wrong: {}",
        guest.pages_verified, guest.pages_wrong
    ))?;
    if guest.pages_wrong > 0 {
        return Err(RunError::WrongPages(guest.pages_wrong));
    }
    match (ended, outcome) {
        (Some(outcome), _) => Err(RunError::Ended(outcome)),
        // On this process' request, at once or after a while.
        (None, Outcome::Exited | Outcome::Stopped) => Ok(()),
        (None, outcome) => Err(RunError::Ended(outcome)),
    }
}

//! What `vmem watch` shows: a guest of `vmem run`, live, on a terminal.
//!
//! | to find | look at |
//! |---|---|
//! | what is known, and what an answer of the server or a key changes about it | [`View`] |
//! | how that looks, at any size of the terminal | [`draw`] |
//! | how blocks become cells | [`BlockMap`] |
//! | who asks the server, on a thread of its own | `feed.rs` |
//! | how the terminal is taken and given back | [`with_screen`] |
//!
//! [`View`] and [`draw`] know neither time nor terminal nor socket, so that a picture follows from what was told.

mod blocks;
mod draw;
mod feed;
mod screen;
mod text;
mod view;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event;
use thiserror::Error;

pub use crate::text::clean;
pub use blocks::{BlockKind, BlockMap, Blocks, Cell, Run};
pub use draw::draw;
pub use screen::with_screen;
pub use view::{Action, Guest, Memory, Requests, Update, View};

use crate::api::client::ClientError;
use feed::Feed;

/// How long a key may wait for its effect, and news from the server.
const TICK: Duration = Duration::from_millis(50);

/// What is watched.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The socket of the control API.
    pub socket: PathBuf,
    /// The memory device; the first if none is named.
    pub device: Option<String>,
    /// Between two looks.
    pub interval: Duration,
    /// Whether to use colours.
    pub colours: bool,
}

/// Watching could not begin, or not go on.
#[derive(Debug, Error)]
pub enum WatchError {
    /// It takes keys and draws.
    #[error("standard input and output must be a terminal; `vmem status` is for all else")]
    NotATerminal,
    /// Nobody to watch.
    #[error(transparent)]
    Server(#[from] ClientError),
    /// It was ended after the server had gone.
    #[error("{}: the server is gone: {reason}", .socket.display())]
    Gone {
        /// Where it was.
        socket: PathBuf,
        /// What the last look said.
        reason: String,
    },
    /// The terminal does not do what it must, or the host lacks something.
    #[error("terminal")]
    Terminal(#[from] io::Error),
    /// The thread that asks the server is no more.
    #[error("the thread that asks the server has ended")]
    Feed,
}

impl WatchError {
    /// Whether it was called in a wrong way.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotATerminal)
    }
}

/// Shows the guest until it is told to end, by a key or by SIGINT or SIGTERM. The terminal is then as it was.
///
/// # Errors
///
/// [`WatchError`]; if the terminal was taken, it is given back first.
pub fn run(options: &WatchOptions) -> Result<(), WatchError> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(WatchError::NotATerminal);
    }
    // While there is a plain terminal to say so on.
    let feed = Feed::start(options)?;
    let told_to_end = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&told_to_end);
    crate::signals::on_termination(move || end.store(true, Ordering::Release))?;
    let name = options.socket.display().to_string();
    let mut view = View::new(&name, options.colours);
    with_screen(|terminal| show(terminal, &mut view, &feed, &told_to_end))?;
    match view.lost() {
        Some(reason) => Err(gone(&options.socket, reason)),
        None => Ok(()),
    }
}

fn gone(socket: &Path, reason: &str) -> WatchError {
    WatchError::Gone {
        socket: socket.to_owned(),
        reason: reason.to_owned(),
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    view: &mut View,
    feed: &Feed,
    told_to_end: &AtomicBool,
) -> Result<(), WatchError> {
    let start = Instant::now();
    let mut changed = true;
    while !told_to_end.load(Ordering::Acquire) {
        if changed {
            terminal.draw(|frame| draw(frame, view))?;
        }
        changed = event::poll(TICK)?;
        if changed {
            match view.input(&event::read()?) {
                Some(Action::End) => break,
                Some(Action::Resize(size)) => feed.resize(size),
                None => {}
            }
        }
        loop {
            match feed.updates.try_recv() {
                Ok(update) => view.apply(start.elapsed(), update),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(WatchError::Feed),
            }
            changed = true;
        }
    }
    Ok(())
}

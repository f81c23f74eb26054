//! What a person who waits wants to know: what is done now, and how long it took.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// One line for each phase on standard error; a line that moves while it lasts if that is a terminal.
#[derive(Debug)]
pub struct Progress {
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Silent,
    Lines,
    Live,
}

impl Progress {
    /// To standard error.
    #[must_use]
    pub fn stderr() -> Self {
        let live = io::stderr().is_terminal();
        let mode = if live { Mode::Live } else { Mode::Lines };
        Self { mode }
    }

    /// The same for one of several who work at the same time: lines that stay where they are.
    pub(super) fn beside_others(&self) -> Self {
        let mode = match self.mode {
            Mode::Silent => Mode::Silent,
            Mode::Lines | Mode::Live => Mode::Lines,
        };
        Self { mode }
    }

    /// To nobody.
    #[must_use]
    pub fn silent() -> Self {
        Self { mode: Mode::Silent }
    }

    /// One line.
    pub fn note(&mut self, text: &str) {
        if self.mode != Mode::Silent {
            // Nobody is left to tell if standard error is gone.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Begins a phase.
    pub fn phase(&mut self, name: impl Into<String>) -> Phase<'_> {
        let mut phase = Phase {
            progress: self,
            name: name.into(),
            begun: Instant::now(),
            shown: false,
        };
        phase.tick("");
        phase
    }
}

/// Something that takes a while.
#[derive(Debug)]
pub struct Phase<'a> {
    progress: &'a mut Progress,
    name: String,
    begun: Instant,
    shown: bool,
}

impl Phase<'_> {
    /// Shows how far it is, where that can be taken back.
    pub fn tick(&mut self, detail: &str) {
        if self.progress.mode == Mode::Live {
            self.shown = true;
            let mut err = io::stderr();
            let _ = write!(
                err,
                "\r\x1b[K{}: {detail} {:.0} s",
                self.name,
                self.begun.elapsed().as_secs_f64()
            );
            let _ = err.flush();
        }
    }

    /// The phase is over.
    pub fn done(mut self, detail: &str) -> Duration {
        let took = self.begun.elapsed();
        self.clear();
        self.progress.note(&format!(
            "{}: {detail}{:.1} s",
            self.name,
            took.as_secs_f64()
        ));
        took
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

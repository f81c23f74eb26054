//! The guest's serial console: commands, their answers, and what it said last when it says nothing more.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::LinuxError;
use crate::signals;

/// Lines of the console shown when something went wrong.
const REMEMBERED: usize = 30;

/// How often a signal is looked for while waiting.
const LOOK: Duration = Duration::from_millis(100);

/// What the kernel says before it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// A console with a shell behind it that answers to tokens, see [`super::initramfs`].
pub(super) struct Console {
    input: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    /// What has come of the line that is not complete.
    partial: Vec<u8>,
    recent: VecDeque<String>,
    commands: u64,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("recent", &self.recent)
            .finish_non_exhaustive()
    }
}

impl Console {
    /// What is written to `input` reaches the guest, whose answers are read from `output` on a thread of their own.
    pub(super) fn new(
        input: impl Write + Send + 'static,
        mut output: impl Read + Send + 'static,
    ) -> Self {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // It ends with QEMU, or when nobody listens any more.
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            input: Box::new(input),
            output: receiver,
            partial: Vec::new(),
            recent: VecDeque::new(),
            commands: 0,
        }
    }

    /// Waits for a line; `tick` is called while waiting.
    pub(super) fn wait_for(
        &mut self,
        line: &str,
        patience: Duration,
        mut tick: impl FnMut(),
    ) -> Result<(), LinuxError> {
        let deadline = Instant::now() + patience;
        while self.line(deadline, &format!("waiting for {line:?}"), &mut tick)? != line {}
        Ok(())
    }

    /// Runs a command that must succeed, for what it prints.
    pub(super) fn run(&mut self, command: &str, patience: Duration) -> Result<String, LinuxError> {
        match self.try_run(command, patience)? {
            (0, text) => Ok(text),
            (status, text) => {
                Err(self.error(format!("{command:?} failed with status {status}: {text}")))
            }
        }
    }

    /// Runs a command, for its exit status and what it prints.
    pub(super) fn try_run(
        &mut self,
        command: &str,
        patience: Duration,
    ) -> Result<(i32, String), LinuxError> {
        self.commands += 1;
        let token = format!("vmem-{}", self.commands);
        let deadline = Instant::now() + patience;
        self.send(format!("{token} {command}\n").as_bytes())?;
        let mut lines: Vec<String> = Vec::new();
        loop {
            let line = self.line(deadline, &format!("running {command:?}"), &mut || {})?;
            let status = line
                .strip_prefix(&token)
                .and_then(|rest| rest.strip_prefix(' '));
            if let Some(status) = status.and_then(|status| status.parse().ok()) {
                // The token begins on a new line, whether the answer ended in one or not.
                if lines.last().is_some_and(String::is_empty) {
                    lines.pop();
                }
                return Ok((status, lines.join("\n")));
            }
            lines.push(line);
        }
    }

    /// Bytes for the guest as they are.
    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), LinuxError> {
        let sent = self
            .input
            .write_all(bytes)
            .and_then(|()| self.input.flush());
        sent.map_err(|_| self.ended("writing"))
    }

    /// Bytes from the guest as they are, after what was read of a line.
    pub(super) fn receive(&mut self, patience: Duration) -> Result<Vec<u8>, RecvTimeoutError> {
        match self.partial.is_empty() {
            true => self.output.recv_timeout(patience),
            false => Ok(std::mem::take(&mut self.partial)),
        }
    }

    /// The next line, without its end.
    fn line(
        &mut self,
        deadline: Instant,
        doing: &str,
        tick: &mut impl FnMut(),
    ) -> Result<String, LinuxError> {
        loop {
            if let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
                let rest = self.partial.split_off(end + 1);
                let line = std::mem::replace(&mut self.partial, rest);
                let line = String::from_utf8_lossy(&line)
                    .trim_end_matches(['\r', '\n'])
                    .to_owned();
                if self.recent.len() == REMEMBERED {
                    self.recent.pop_front();
                }
                self.recent.push_back(line.clone());
                if line.contains(PANIC) {
                    return Err(self.error(format!("the guest panicked, {doing}")));
                }
                return Ok(line);
            }
            if signals::interrupted() {
                return Err(LinuxError::Interrupted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.error(format!("the guest does not answer, {doing}")));
            }
            match self.output.recv_timeout(left.min(LOOK)) {
                Ok(bytes) => self.partial.extend(bytes),
                Err(RecvTimeoutError::Timeout) => tick(),
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended(doing)),
            }
        }
    }

    fn ended(&self, doing: &str) -> LinuxError {
        // A signal from the terminal reaches QEMU, too.
        if signals::interrupted() {
            return LinuxError::Interrupted;
        }
        self.error(format!("QEMU has ended, {doing}"))
    }

    /// An error with what the console said last.
    pub(super) fn error(&self, what: String) -> LinuxError {
        let mut lines: Vec<_> = self.recent.iter().map(|line| format!("  {line}")).collect();
        if !self.partial.is_empty() {
            lines.push(format!("  {}", String::from_utf8_lossy(&self.partial)));
        }
        LinuxError::Guest {
            what,
            console: lines.join("\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A console whose guest answers each line by `answer`, with the line's token put for `@`.
    fn guest(answer: impl Fn(&str) -> Option<String> + Send + 'static) -> Console {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            for line in BufReader::new(theirs).lines() {
                let line = line.unwrap();
                let (token, command) = line.split_once(' ').unwrap();
                let Some(answer) = answer(command) else { break };
                // The guest may have been given up.
                let _ = out.write_all(answer.replace('@', token).as_bytes());
            }
        });
        Console::new(ours.try_clone().unwrap(), ours)
    }

    #[test]
    fn an_answer_ends_with_its_own_token() {
        let mut console = guest(|command| {
            Some(match command {
                "old" => "vmem-0 0\nvmem-11 0\n@0 0\n@ x\r\ntext\n\n@ 0\n".into(),
                "none" => "\n@ 0\n".into(),
                _ => "no end\n@ 3\n".into(),
            })
        });
        let (status, text) = console.try_run("old", LONG).unwrap();
        assert_eq!(
            (status, text.as_str()),
            (0, "vmem-0 0\nvmem-11 0\nvmem-10 0\nvmem-1 x\ntext")
        );
        assert_eq!(console.run("none", LONG).unwrap(), "");
        assert_eq!(
            console.try_run("third", LONG).unwrap(),
            (3, "no end".into())
        );
        let error = console.run("fourth", LONG).unwrap_err().to_string();
        assert!(
            error.starts_with("\"fourth\" failed with status 3: no end"),
            "{error}"
        );
    }

    #[test]
    fn silence_panic_and_the_end_are_told_apart_with_the_last_lines() {
        let mut console = guest(|command| match command {
            "a" => Some(String::new()),
            _ => Some("before\nhalf".into()),
        });
        // Said before the time is taken in which there is no answer.
        console.send(b"x y\n").unwrap();
        while !console.partial.ends_with(b"half") {
            let bytes = console.output.recv_timeout(LONG).unwrap();
            console.partial.extend(bytes);
        }
        let error = console
            .run("a", Duration::from_millis(10))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("the guest does not answer, running \"a\""),
            "{error}"
        );
        assert!(error.ends_with("  before\n  half"), "{error}");

        let mut console =
            guest(|_| Some("[ 1.0] Kernel panic - not syncing: out of luck\n".into()));
        let error = console.run("a", LONG).unwrap_err().to_string();
        assert!(error.starts_with("the guest panicked"), "{error}");
        assert!(error.ends_with("out of luck"), "{error}");

        let mut console = Console::new(io::sink(), io::Cursor::new(b"last words\n"));
        let error = console
            .wait_for("ready", LONG, || ())
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "QEMU has ended, waiting for \"ready\"; last on the console:\n  last words"
        );
    }

    #[test]
    fn only_the_last_lines_are_remembered() {
        let text: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let mut console = Console::new(io::sink(), io::Cursor::new(text.into_bytes()));
        let error = console
            .wait_for("ready", LONG, || ())
            .unwrap_err()
            .to_string();
        assert!(
            !error.contains("line 69\n")
                && error.contains("line 70\n")
                && error.ends_with("line 99"),
            "{error}"
        );
    }
}

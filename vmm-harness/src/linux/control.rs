//! Resizing from another terminal: a Unix socket that takes lines as [`crate::serve`] does, and answers each as it
//! does.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::LinuxError;
use crate::serve::control::{self, Command, Report};
use crate::text::clean;

/// Who connects speaks at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
}

impl Control {
    /// Listens at `path`, which must not exist. Whoever made the folder removes it.
    pub(super) fn listen(path: &Path) -> Result<Self, LinuxError> {
        let listener = UnixListener::bind(path).map_err(LinuxError::file(path))?;
        listener
            .set_nonblocking(true)
            .map_err(LinuxError::file(path))?;
        Ok(Self { listener })
    }

    /// Does what whoever has connected says, one line after another; whether to quit.
    ///
    /// What goes wrong on the socket is the other side's to see.
    pub(super) fn serve(&self, execute: impl FnMut(Command) -> Result<Report, LinuxError>) -> bool {
        match self.listener.accept() {
            // If nobody reads the answer, nobody misses it.
            Ok((stream, _)) => serve(stream, execute).unwrap_or(false),
            Err(_) => false,
        }
    }
}

fn serve(
    stream: UnixStream,
    mut execute: impl FnMut(Command) -> Result<Report, LinuxError>,
) -> io::Result<bool> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        let (answer, quit) = control::answer(&line, &mut execute);
        writeln!(stream.get_mut(), "{answer}")?;
        if quit {
            return Ok(true);
        }
        line.clear();
    }
    Ok(false)
}

/// Has a command done by the guest behind a socket; its device afterwards.
///
/// # Errors
///
/// If nobody listens there, or it cannot be done.
pub fn execute_at(socket: &Path, command: Command) -> Result<Report, LinuxError> {
    let mut stream = UnixStream::connect(socket).map_err(LinuxError::file(socket))?;
    writeln!(stream, "{command}").map_err(LinuxError::file(socket))?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .map_err(LinuxError::file(socket))?;
    let answer: Value = serde_json::from_str(&line).unwrap_or_default();
    let error = match &answer["error"] {
        Value::String(error) => clean(error),
        _ => format!("{} gives no answer: {}", socket.display(), clean(&line)),
    };
    serde_json::from_value(answer).map_err(|_| LinuxError::Unsupported(error))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const REPORT: Report = Report {
        requested_size: 1,
        plugged_size: 2 << 20,
        usable_region_size: None,
        resident_size: 4096,
        frozen: false,
    };

    /// Serves a device that has `REPORT` until `client` has an answer.
    fn served<T: Send>(client: impl FnOnce(&Path) -> T + Send) -> (T, bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let control = Control::listen(&path).unwrap();
        thread::scope(|scope| {
            let client = scope.spawn(|| client(&path));
            let mut quit = false;
            while !client.is_finished() {
                quit |= control.serve(|command| match command {
                    Command::Resize(7) => Err(LinuxError::Qemu("not aligned".into())),
                    Command::Resize(requested_size) => Ok(Report {
                        requested_size,
                        ..REPORT
                    }),
                    _ => Ok(REPORT),
                });
                thread::sleep(Duration::from_millis(1));
            }
            (client.join().unwrap(), quit)
        })
    }

    #[test]
    fn commands_reports_and_errors_cross_the_socket() {
        let ask = |command| served(move |path| execute_at(path, command));
        let (report, quit) = ask(Command::Resize(4 << 20));
        assert_eq!((report.unwrap().requested_size, quit), (4 << 20, false));
        assert_eq!(ask(Command::Status).0.unwrap(), REPORT);
        assert!(ask(Command::Quit).1);
        let (error, quit) = ask(Command::Resize(7));
        assert_eq!(error.unwrap_err().to_string(), "QEMU: not aligned");
        assert!(!quit);
        let nobody = execute_at(Path::new("/nonexistent/control"), Command::Status);
        assert!(matches!(nobody, Err(LinuxError::File { .. })));
    }

    #[test]
    fn each_line_has_its_answer_and_one_that_is_no_command_an_error() {
        let lines = |path: &Path| {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(b"status\nwhat\nfreeze\n").unwrap();
            let stream = BufReader::new(stream);
            stream.lines().take(3).collect::<Result<Vec<_>, _>>()
        };
        let (answers, quit) = served(lines);
        let answers = answers.unwrap();
        let report = serde_json::json!(REPORT).to_string();
        assert_eq!((answers.len(), quit), (3, false));
        assert_eq!([&answers[0], &answers[2]], [&report; 2]);
        assert!(answers[1].starts_with("{\"error\":\"unknown command"));
    }
}

//! Resizing from another terminal: a Unix socket that takes one line and answers with one.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::LinuxError;
use super::device::DeviceStatus;
use crate::demo::size;

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

    /// Answers whoever has connected: `answer` gets a size to ask for, or none if only the state is wanted.
    ///
    /// What goes wrong on the socket is the other side's to see.
    pub(super) fn serve(
        &self,
        answer: impl FnOnce(Option<u64>) -> Result<DeviceStatus, LinuxError>,
    ) {
        let Ok((stream, _)) = self.listener.accept() else {
            return;
        };
        // If nobody reads the answer, nobody misses it.
        let _ = serve(stream, answer);
    }
}

fn serve(
    stream: UnixStream,
    answer: impl FnOnce(Option<u64>) -> Result<DeviceStatus, LinuxError>,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let answer = match line.trim() {
        "" => answer(None).map_err(|error| error.to_string()),
        text => match text.parse() {
            Ok(bytes) => answer(Some(bytes)).map_err(|error| error.to_string()),
            Err(error) => Err(format!("{text:?}: {error}")),
        },
    };
    match answer {
        Ok(DeviceStatus { requested, plugged }) => {
            writeln!(
                stream.get_mut(),
                "requested {}, plugged {}",
                size(requested),
                size(plugged)
            )
        }
        Err(error) => writeln!(stream.get_mut(), "error: {error}"),
    }
}

/// Asks the guest behind a socket for `bytes` of memory, or only how much it has; the answer, for people.
///
/// # Errors
///
/// If nobody listens there.
pub fn resize_at(socket: &Path, bytes: Option<u64>) -> Result<String, LinuxError> {
    let mut stream = UnixStream::connect(socket).map_err(LinuxError::file(socket))?;
    writeln!(
        stream,
        "{}",
        bytes.map_or_else(String::new, |bytes| bytes.to_string())
    )
    .map_err(LinuxError::file(socket))?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .map_err(LinuxError::file(socket))?;
    match line.trim().strip_prefix("error: ") {
        Some(error) => Err(LinuxError::Unsupported(error.to_owned())),
        None => Ok(line.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn sizes_and_errors_cross_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let control = Control::listen(&path).unwrap();
        let ask = |bytes| {
            thread::scope(|scope| {
                let asker = scope.spawn(|| resize_at(&path, bytes));
                while !asker.is_finished() {
                    control.serve(|bytes| match bytes {
                        Some(7) => Err(LinuxError::Qemu("not aligned".into())),
                        bytes => Ok(DeviceStatus {
                            requested: bytes.unwrap_or(1),
                            plugged: 2 << 20,
                        }),
                    });
                    thread::sleep(Duration::from_millis(1));
                }
                asker.join().unwrap()
            })
        };
        assert_eq!(
            ask(Some(4 << 20)).unwrap(),
            "requested 4 MiB, plugged 2 MiB"
        );
        assert_eq!(ask(None).unwrap(), "requested 1 B, plugged 2 MiB");
        assert_eq!(ask(Some(7)).unwrap_err().to_string(), "QEMU: not aligned");
        assert!(resize_at(&dir.path().join("nobody"), None).is_err());
    }
}

//! Whether a client is still there, while it is not its turn to say something.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;

use tokio::io::Interest;
use tokio::net::UnixStream;

/// The other end of a connection.
#[derive(Debug)]
pub(super) struct Peer(UnixStream);

impl Peer {
    /// # Errors
    ///
    /// If there are no descriptors left.
    pub(super) fn of(stream: &UnixStream) -> io::Result<Self> {
        // With a readiness of its own, to be taken back without anybody who writes missing it.
        let socket = stream.as_fd().try_clone_to_owned()?;
        UnixStream::from_std(StdStream::from(socket)).map(Self)
    }

    /// Until the client has closed the connection. One that will only send no more is not gone: it waits for its
    /// answer.
    pub(super) async fn gone(&self) {
        while let Ok(ready) = self.0.ready(Interest::WRITABLE).await {
            // Both directions: EPOLLHUP, and not EPOLLRDHUP.
            if ready.is_write_closed() {
                return;
            }
            // It can be written to, which is no news.
            let blocked = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = self.0.try_io(Interest::WRITABLE, blocked);
        }
    }
}

//! The Unix socket a server listens on, and whose it is.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

/// The socket cannot be made.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{} is in use: process {pid} answers there", .path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Who listens there, or is about to; 0 if that is not known.
        pid: i32,
    },
    /// It is not ours to replace.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The host refuses.
    #[error("socket {}", .0.display())]
    Host(PathBuf, #[source] io::Error),
}

/// A listening socket that only its user may connect to, and its file, which goes away with it.
#[derive(Debug)]
pub struct ServerSocket {
    listener: OwnedFd,
    path: PathBuf,
    /// Device and inode: a file that somebody else has put there since stays.
    file: (u64, u64),
    // Last: the path is ours until the socket's file is gone.
    _lock: Lock,
}

impl ServerSocket {
    /// Listens at `path`. A socket that nobody listens to any more is replaced. Beside it a lock file, `path` with
    /// `.lock` at its end, says as long as the socket lives that it is in use, and by which process.
    ///
    /// # Errors
    ///
    /// [`SocketError`]; whatever is at `path` is still there then.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Host(path.to_owned(), error);
        let lock = Lock::take(path)?;
        let listener = match listen(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let metadata = fs::symlink_metadata(path).map_err(failed)?;
                if !metadata.file_type().is_socket() {
                    return Err(SocketError::NotASocket(path.to_owned()));
                }
                // Others listen at sockets as well, and take no lock for it.
                if let Some(pid) = listening_process(path).map_err(failed)? {
                    let path = path.to_owned();
                    return Err(SocketError::InUse { path, pid });
                }
                fs::remove_file(path).map_err(failed)?;
                listen(path)
            }
            result => result,
        };
        let listener = listener.map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: identity(&fs::symlink_metadata(path).map_err(failed)?),
            _lock: lock,
        })
    }

    /// Another descriptor of the listening socket.
    pub(crate) fn listener(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone()
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        remove(&self.path, self.file);
    }
}

/// The lock file of a socket, locked. It is removed before it is unlocked, so what is locked counts only while it is
/// still the file of that name.
#[derive(Debug)]
struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |error| SocketError::Host(path.clone(), error);
        loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).mode(0o600);
            // Whoever may put a link there must not choose which file is written to.
            options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
            let mut file = options.open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    file.read_to_string(&mut holder).map_err(failed)?;
                    return Err(SocketError::InUse {
                        path: socket.to_owned(),
                        // It may not have come to write it.
                        pid: holder.trim().parse().unwrap_or(0),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            let locked = identity(&file.metadata().map_err(failed)?);
            if fs::symlink_metadata(&path).is_ok_and(|there| identity(&there) == locked) {
                file.set_len(0).map_err(failed)?;
                writeln!(file, "{}", std::process::id()).map_err(failed)?;
                return Ok(Self { file, path });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Ok(metadata) = self.file.metadata() {
            remove(&self.path, identity(&metadata));
        }
    }
}

/// Removes the file at `path` if it is that one.
fn remove(path: &Path, file: (u64, u64)) {
    if fs::symlink_metadata(path).is_ok_and(|there| identity(&there) == file)
        && let Err(error) = fs::remove_file(path)
    {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it has a name, so that it never has one with the modes of the umask alone.
    rustix::fs::fchmod(socket.as_fd(), Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // As many as the host lets wait.
    rustix::net::listen(&socket, libc::SOMAXCONN)?;
    Ok(socket)
}

/// The process that listens at a socket, 0 if it does not say; nothing if nobody does.
fn listening_process(path: &Path) -> io::Result<Option<i32>> {
    // One that has as many clients waiting as it lets would have this one wait as well.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(None),
        Err(Errno::AGAIN) => Ok(Some(0)),
        Err(error) => Err(error.into()),
        Ok(()) => {
            // Those of the socket that listens are of whoever called listen(2).
            let peer = rustix::net::sockopt::socket_peercred(&probe);
            Ok(Some(peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get())))
        }
    }
}

/// Device and inode.
fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vmem-{}-{name}.sock", std::process::id()))
    }

    fn lock(path: &Path) -> PathBuf {
        path.with_extension("sock.lock")
    }

    fn holder(result: Result<ServerSocket, SocketError>) -> i32 {
        match result.unwrap_err() {
            SocketError::InUse { pid, .. } => pid,
            error => unreachable!("{error}"),
        }
    }

    /// Leaves what a killed server does. It never listened: a child that another test is about to start may have a
    /// descriptor of it for a moment, and would be taken for a server.
    fn leave_stale(path: &Path) {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    }

    #[test]
    fn file_is_its_users_only_and_goes_away_with_the_socket() {
        let path = path("mode");
        let socket = ServerSocket::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(lock(&path).exists());
        drop(socket);
        assert!(!path.exists() && !lock(&path).exists());
    }

    #[test]
    fn many_clients_may_wait_to_be_accepted() {
        let path = path("waiting");
        let _socket = ServerSocket::bind(&path).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let waiting: Vec<_> = (0..100)
            .map(|_| {
                let client =
                    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                        .unwrap();
                rustix::net::connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
                client
            })
            .collect();
        drop(waiting);
    }

    #[test]
    fn live_socket_is_an_error_and_a_stale_one_is_replaced() {
        let path = path("stale");
        let live = ServerSocket::bind(&path).unwrap();
        let own_pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(holder(ServerSocket::bind(&path)), own_pid);
        assert!(path.exists());
        drop(live);
        // What a server leaves that was killed.
        leave_stale(&path);
        fs::write(lock(&path), "1\n").unwrap();
        let socket = ServerSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
    }

    #[test]
    fn file_that_is_no_socket_is_left_alone() {
        let path = path("file");
        fs::write(&path, "kept").unwrap();
        let error = ServerSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        fs::remove_file(&path).unwrap();
        let socket = ServerSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(socket);
        assert!(path.exists(), "not the file this socket had");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn socket_of_somebody_without_a_lock_is_in_use_as_well() {
        let path = path("other");
        let other = UnixListener::bind(&path).unwrap();
        let own_pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(holder(ServerSocket::bind(&path)), own_pid);
        // As many clients as it takes, none of which it ever looks at.
        rustix::net::listen(&other, 0).unwrap();
        while holder(ServerSocket::bind(&path)) != 0 {}
        assert!(path.exists() && !lock(&path).exists());
        // Also that of a child about to be started.
        rustix::net::shutdown(&other, rustix::net::Shutdown::Both).unwrap();
        drop(other);
        drop(ServerSocket::bind(&path).unwrap());
    }

    #[test]
    fn of_servers_that_start_together_one_has_the_socket() {
        let path = path("race");
        for _ in 0..200 {
            // What each of them has to replace.
            leave_stale(&path);
            let (tried, bound) = (AtomicU32::new(0), AtomicU32::new(0));
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let result = ServerSocket::bind(&path);
                        tried.fetch_add(1, Ordering::Relaxed);
                        match result {
                            Ok(_socket) => {
                                bound.fetch_add(1, Ordering::Relaxed);
                                while tried.load(Ordering::Relaxed) < 4 {
                                    thread::yield_now();
                                }
                                UnixStream::connect(&path).unwrap();
                            }
                            Err(error) => {
                                assert!(matches!(error, SocketError::InUse { .. }), "{error:?}");
                            }
                        }
                    });
                }
            });
            assert_eq!(bound.into_inner(), 1);
        }
        assert!(!path.exists() && !lock(&path).exists());
    }

    #[test]
    fn lock_file_that_is_a_link_is_not_followed() {
        let (path, target) = (path("link"), path("target"));
        fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, lock(&path)).unwrap();
        assert!(ServerSocket::bind(&path).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"kept");
        fs::remove_file(lock(&path)).unwrap();
        fs::remove_file(&target).unwrap();
    }
}

//! The Unix sockets `vmem` listens on: vfio-user's, and the control API's.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
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
        /// Who listens, as the kernel says; 0 if that is a process this one cannot see.
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
}

impl ServerSocket {
    /// Listens at `path`. A socket that nobody listens to any more is replaced.
    ///
    /// # Errors
    ///
    /// [`SocketError`]; whatever is at `path` is still there then.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Host(path.to_owned(), error);
        let listener = match listen(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let metadata = fs::symlink_metadata(path).map_err(failed)?;
                if !metadata.file_type().is_socket() {
                    return Err(SocketError::NotASocket(path.to_owned()));
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Ok(holder) => {
                        // Of the socket that listens, the credentials are those of whoever called listen(2).
                        let peer = rustix::net::sockopt::socket_peercred(&holder);
                        return Err(SocketError::InUse {
                            path: path.to_owned(),
                            pid: peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get()),
                        });
                    }
                    Err(error) => return Err(failed(error)),
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
            file: identity(path).map_err(failed)?,
        })
    }

    /// Another descriptor of the listening socket.
    pub(crate) fn listener(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone()
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it has a name, so that it never has one with the modes of the umask alone.
    rustix::fs::fchmod(socket.as_fd(), Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    const WAITING_CLIENTS: i32 = 8;
    rustix::net::listen(&socket, WAITING_CLIENTS)?;
    Ok(socket)
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vmem-{}-{name}.sock", std::process::id()))
    }

    #[test]
    fn file_is_its_users_only_and_goes_away_with_the_socket() {
        let path = path("mode");
        let socket = ServerSocket::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn live_socket_is_an_error_and_a_stale_one_is_replaced() {
        let path = path("stale");
        let live = ServerSocket::bind(&path).unwrap();
        let error = ServerSocket::bind(&path).unwrap_err();
        let own_pid = i32::try_from(std::process::id()).unwrap();
        assert!(
            matches!(error, SocketError::InUse { pid, .. } if pid == own_pid),
            "{error}"
        );
        assert!(path.exists());
        drop(live);
        // What a server leaves that was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
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
}

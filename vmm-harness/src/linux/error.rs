//! What can go wrong between a package mirror and a check in the guest, and what to do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::serve::control::LineError;

/// Why a Linux guest could not be provided, run or held to what it should do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// The packages exist for another machine.
    #[error("this machine is {0}; the kernels and QEMU are Debian packages for amd64")]
    Architecture(String),
    /// One of Debian's package tools is missing.
    #[error(
        "{program} cannot be run ({source}): Debian's package tools fill the cache; \
         without them, use a cache that was filled elsewhere (--cache)"
    )]
    Tool {
        /// The program.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The machine's apt knows no Debian mirror.
    #[error(
        "no source for Debian's suite {suite} in apt's configuration ({files}); \
         add one, or set APT_CONFIG to a configuration that has one"
    )]
    NoMirror {
        /// The suite looked for.
        suite: String,
        /// Where.
        files: String,
    },
    /// A package tool failed.
    #[error("{what} failed; is the package mirror reachable?\n{said}")]
    Packages {
        /// What was being done.
        what: String,
        /// The last lines the tool wrote.
        said: String,
    },
    /// The suites do not carry what is asked for.
    #[error("no package {wanted} in {suites}; there are: {found}")]
    NoPackage {
        /// Name with a placeholder for what is open.
        wanted: String,
        /// The suites looked into.
        suites: String,
        /// What comes closest.
        found: String,
    },
    /// A package is not built as expected.
    #[error("{file} is not in the package {package}")]
    NotInPackage {
        /// The file.
        file: String,
        /// The package.
        package: String,
    },
    /// A file or folder of ours.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// QEMU did not start, or speaks a protocol we do not.
    #[error("QEMU: {0}")]
    Qemu(String),
    /// Our device cannot be made, served or resized.
    #[error("memory device: {0}")]
    Device(String),
    /// A line of the control socket is no command, or its device cannot do it.
    #[error(transparent)]
    Control(#[from] LineError),
    /// The guest did not get as far as it should.
    #[error("{what}; last on the console:\n{console}")]
    Guest {
        /// What happened.
        what: String,
        /// Last lines of the console.
        console: String,
    },
    /// The guest, the device or the host is not as it should be.
    #[error("check failed: {0}")]
    Check(String),
    /// The device in use cannot do this.
    #[error("{0}")]
    Unsupported(String),
    /// Ctrl-C, or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

impl LinuxError {
    /// Whether kernel, QEMU and shell are not to be had here.
    #[must_use]
    pub fn is_about_packages(&self) -> bool {
        matches!(
            self,
            Self::Architecture(_)
                | Self::Tool { .. }
                | Self::NoMirror { .. }
                | Self::Packages { .. }
                | Self::NoPackage { .. }
                | Self::NotInPackage { .. }
        )
    }

    /// Names the file in an error about it.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::File { path, source }
    }
}

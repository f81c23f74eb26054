//! Why a hotplug operation was refused.

use thiserror::Error;

/// Why a hotplug operation was refused. Whatever the reason, nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// Misaligned or empty range, unknown memory block or page, or an operation its state does not allow.
    #[error("invalid argument")]
    Invalid,
    /// The range overlaps memory that has been added already.
    #[error("memory exists already")]
    Exists,
    /// A page in the range is in use and cannot be moved, or someone else is working on the range.
    #[error("memory is in use")]
    Busy,
    /// No page to allocate or to move a page to, or no memory for the bookkeeping.
    #[error("out of memory")]
    NoMemory,
}

impl Error {
    /// The name Linux has for it, as its logs and traces show it.
    #[must_use]
    pub const fn errno_name(self) -> &'static str {
        match self {
            Self::Invalid => "EINVAL",
            Self::Exists => "EEXIST",
            Self::Busy => "EBUSY",
            Self::NoMemory => "ENOMEM",
        }
    }
}

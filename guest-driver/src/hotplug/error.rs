//! Why a hotplug operation was refused.

use thiserror::Error;

/// Declares [`Error`] and its three ways to Linux's names and numbers from one table.
macro_rules! errors {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $number:literal, $message:literal;)+) => {
        /// Why a hotplug operation was refused. Whatever the reason, no memory block, zone or resource is in another
        /// state than before; where pages were to be moved, some may have been, and an attempt to bring a memory block
        /// online uses up the type that was written for it.
        ///
        /// Where Linux refuses the same operation, the reason is the one Linux has.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
        #[non_exhaustive]
        pub enum Error {
            $($(#[$doc])* #[error($message)] $variant,)+
        }

        impl Error {
            /// The name Linux has for it, as its logs and traces show it.
            #[must_use]
            pub const fn errno_name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The error with this name, `"EBUSY"`; `None` for one this crate does not know.
            #[must_use]
            pub fn from_errno_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }

            /// The error with this number, 16 for `EBUSY`; `None` for one this crate does not know.
            #[must_use]
            pub const fn from_errno(number: i32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

errors! {
    /// Not the owner of the memory, or a notifier's plain veto.
    NotPermitted, "EPERM", 1, "operation not permitted";
    /// There is no such file, or no such memory.
    NotFound, "ENOENT", 2, "not found";
    /// A signal ended the operation.
    Interrupted, "EINTR", 4, "interrupted";
    /// Input or output failed.
    Io, "EIO", 5, "input/output error";
    /// Device memory where there is System RAM.
    NoAddress, "ENXIO", 6, "no such device or address";
    /// Beyond the addresses memory can be mapped at.
    TooBig, "E2BIG", 7, "out of the pluggable range";
    /// The condition passes: try again.
    Again, "EAGAIN", 11, "try again";
    /// No page to allocate or to move a page to, or no memory for the bookkeeping.
    NoMemory, "ENOMEM", 12, "out of memory";
    /// The file cannot be read, or cannot be written.
    AccessDenied, "EACCES", 13, "permission denied";
    /// A page in the range is in use and cannot be moved, or someone else is working on the range.
    Busy, "EBUSY", 16, "memory is in use";
    /// The range overlaps memory that has been added already.
    Exists, "EEXIST", 17, "memory exists already";
    /// Misaligned or empty range, unknown memory block or page, or an operation its state does not allow.
    Invalid, "EINVAL", 22, "invalid argument";
    /// Nothing is left to plug.
    NoSpace, "ENOSPC", 28, "no space left";
    /// A number too large for its parameter.
    OutOfRange, "ERANGE", 34, "number out of range";
    /// The memory has a page the hardware cannot be trusted with.
    HwPoison, "EHWPOISON", 133, "hardware poisoned page";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_lead_back_to_the_same_error() {
        let mut known = 0;
        for number in 0..256 {
            if let Some(error) = Error::from_errno(number) {
                assert_eq!(Error::from_errno_name(error.errno_name()), Some(error));
                known += 1;
            }
        }
        assert_eq!(known, 15);
        assert_eq!(Error::from_errno(-16), None);
        assert_eq!(Error::from_errno_name("EFOO"), None);
    }
}

//! What an operator can ask of a device that is served, as lines of text.
//!
//! A line is answered by a JSON object on one line: the sizes after the command, or `{"error": …}`. The commands
//! themselves know nothing of lines.

use serde::Serialize;
use thiserror::Error;
use virtio_mem::{Handle, ResizeError};

use crate::parse_size;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ask the driver to have this many bytes plugged.
    Resize(u64),
    /// Nothing but the answer.
    Status,
    /// Hold requests off, see [`Handle::freeze`].
    Freeze,
    /// End that.
    Thaw,
    /// End the process.
    Quit,
}

/// The device after a command. All sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the driver is asked to have plugged.
    pub requested_size: u64,
    /// What is plugged.
    pub plugged_size: u64,
    /// From the region's start, where blocks may be plugged.
    pub usable_region_size: u64,
    /// Host memory behind the region.
    pub resident_size: u64,
    /// Whether requests are held off.
    pub frozen: bool,
}

/// Why a command was not done.
#[derive(Debug, Error)]
pub enum ControlError {
    /// There is no such command.
    #[error("unknown command {0:?}: resize SIZE, status, freeze, thaw and quit are known")]
    Unknown(String),
    /// The size is none.
    #[error("{0:?} is not a size")]
    Size(String),
    /// The device cannot have it.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The host does not say how much memory there is.
    #[error("memory behind the region")]
    Resident(#[source] std::io::Error),
}

impl std::str::FromStr for Command {
    type Err = ControlError;

    fn from_str(line: &str) -> Result<Self, ControlError> {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["resize", size] => match parse_size(size) {
                Ok(size) => Ok(Self::Resize(size)),
                Err(_) => Err(ControlError::Size((*size).to_owned())),
            },
            ["status"] => Ok(Self::Status),
            ["freeze"] => Ok(Self::Freeze),
            ["thaw"] => Ok(Self::Thaw),
            ["quit"] => Ok(Self::Quit),
            _ => Err(ControlError::Unknown(line.trim().to_owned())),
        }
    }
}

impl Command {
    /// Does it; the device afterwards. To quit is up to the caller.
    ///
    /// # Errors
    ///
    /// [`ControlError`]; nothing has changed then.
    pub fn execute(self, device: &Handle) -> Result<Report, ControlError> {
        match self {
            Self::Resize(size) => drop(device.resize(size)?),
            Self::Freeze => device.freeze(),
            Self::Thaw => device.thaw(),
            Self::Status | Self::Quit => {}
        }
        let status = device.status();
        Ok(Report {
            requested_size: status.requested_size,
            plugged_size: status.plugged_size,
            usable_region_size: status.usable_region_size,
            resident_size: device.resident_bytes().map_err(ControlError::Resident)?,
            frozen: status.frozen,
        })
    }
}

#[cfg(test)]
mod tests {
    use virtio_mem::{Anonymous, VirtioMem};
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn lines_are_commands_or_say_what_is_wrong() {
        for (line, command) in [
            ("resize 512M\n", Command::Resize(512 << 20)),
            ("  resize   0 ", Command::Resize(0)),
            ("status", Command::Status),
            ("freeze", Command::Freeze),
            ("thaw", Command::Thaw),
            ("quit", Command::Quit),
        ] {
            assert_eq!(line.parse::<Command>().unwrap(), command);
        }
        for (line, error) in [
            ("", "unknown command \"\""),
            ("resize", "unknown command \"resize\""),
            ("resize 1 2", "unknown command"),
            ("resize much", "\"much\" is not a size"),
            ("Status", "unknown command"),
        ] {
            let said = line.parse::<Command>().unwrap_err().to_string();
            assert!(said.starts_with(error), "{said}");
        }
    }

    #[test]
    fn commands_change_the_device_and_report_it() {
        let backing = Anonymous::base_pages(64 << 20).unwrap();
        let device = VirtioMem::builder(GuestAddress(1 << 32), backing);
        let handle = device.block_size(2 << 20).build().unwrap().handle();
        let report = Command::Resize(16 << 20).execute(&handle).unwrap();
        assert_eq!((report.requested_size, report.plugged_size), (16 << 20, 0));
        assert_eq!(
            (report.usable_region_size, report.resident_size),
            (64 << 20, 0)
        );
        assert!(Command::Freeze.execute(&handle).unwrap().frozen);
        assert!(!Command::Thaw.execute(&handle).unwrap().frozen);
        for size in [1, 128 << 20] {
            let error = Command::Resize(size).execute(&handle).unwrap_err();
            assert!(matches!(error, ControlError::Resize(_)), "{error}");
        }
        assert_eq!(Command::Status.execute(&handle).unwrap(), report);
    }
}

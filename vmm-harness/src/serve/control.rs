//! What an operator can ask of a device that is served, as lines of text.
//!
//! A line is answered by a JSON object on one line: the sizes after the command, or `{"error": …}`, see [`answer`]. What
//! a command does is [`crate::control`]'s business.

use std::fmt;

use thiserror::Error;
use virtio_mem::Handle;

pub use crate::control::Sizes as Report;
use crate::control::{ControlError, Controller};
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
    /// End what serves the device.
    Quit,
}

/// Why a command was not done.
#[derive(Debug, Error)]
pub enum LineError {
    /// There is no such command.
    #[error("unknown command {0:?}: resize SIZE, status, freeze, thaw and quit are known")]
    Unknown(String),
    /// The size is none.
    #[error("{0:?} is not a size")]
    Size(String),
    /// It cannot be done.
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl std::str::FromStr for Command {
    type Err = LineError;

    fn from_str(line: &str) -> Result<Self, LineError> {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["resize", size] => match parse_size(size) {
                Ok(size) => Ok(Self::Resize(size)),
                Err(_) => Err(LineError::Size((*size).to_owned())),
            },
            ["status"] => Ok(Self::Status),
            ["freeze"] => Ok(Self::Freeze),
            ["thaw"] => Ok(Self::Thaw),
            ["quit"] => Ok(Self::Quit),
            _ => Err(LineError::Unknown(line.trim().to_owned())),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resize(size) => write!(f, "resize {size}"),
            Self::Status => f.write_str("status"),
            Self::Freeze => f.write_str("freeze"),
            Self::Thaw => f.write_str("thaw"),
            Self::Quit => f.write_str("quit"),
        }
    }
}

/// Does what a line says by `execute`: the answer, and whether to quit after it has been given.
pub fn answer<E: From<LineError> + fmt::Display>(
    line: &str,
    execute: impl FnOnce(Command) -> Result<Report, E>,
) -> (serde_json::Value, bool) {
    let command = line.parse::<Command>();
    let quit = matches!(command, Ok(Command::Quit));
    let answer = match command.map_err(E::from).and_then(execute) {
        Ok(report) => serde_json::json!(report),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    };
    (answer, quit)
}

impl Command {
    /// Does it; the device afterwards. To quit is up to the caller.
    ///
    /// # Errors
    ///
    /// [`LineError::Control`]; nothing has changed then.
    pub fn execute(self, device: &Handle) -> Result<Report, LineError> {
        let controller = Controller::new(device.clone());
        match self {
            Self::Resize(size) => {
                controller.resize(size)?;
            }
            Self::Freeze => controller.freeze(),
            Self::Thaw => controller.thaw(),
            Self::Status | Self::Quit => {}
        }
        Ok(controller.sizes()?)
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
            assert_eq!(command.to_string().parse::<Command>().unwrap(), command);
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
        let device = device.block_size(2 << 20).build().unwrap();
        let handle = device.handle();
        let report = Command::Resize(16 << 20).execute(&handle).unwrap();
        assert_eq!((report.requested_size, report.plugged_size), (16 << 20, 0));
        assert_eq!(
            (report.usable_region_size, report.resident_size),
            (Some(64 << 20), 0)
        );
        assert!(Command::Freeze.execute(&handle).unwrap().frozen);
        assert!(!Command::Thaw.execute(&handle).unwrap().frozen);
        for size in [1, 128 << 20] {
            let error = Command::Resize(size).execute(&handle).unwrap_err();
            assert!(
                matches!(error, LineError::Control(ControlError::Resize(_))),
                "{error}"
            );
        }
        assert_eq!(Command::Status.execute(&handle).unwrap(), report);
    }
}

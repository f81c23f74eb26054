//! How the terminal is taken and given back.

use std::io;

use ratatui::DefaultTerminal;

/// Gives the terminal back however it is left: at the end, with an error, or with a panic that unwinds. A panic that is
/// printed before has given it back already, so that it can be read.
struct Taken;

impl Drop for Taken {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Lets `show` draw on the terminal of standard output, in raw mode and on the alternate screen.
///
/// # Errors
///
/// If the terminal cannot do that; otherwise those of `show`. The terminal has been given back by then.
pub fn with_screen<T, E: From<io::Error>>(
    show: impl FnOnce(&mut DefaultTerminal) -> Result<T, E>,
) -> Result<T, E> {
    let _taken = Taken;
    let mut terminal = ratatui::try_init()?;
    show(&mut terminal)
}

//! Ctrl-C and SIGTERM end a run in order: QEMU is ended and its files are removed.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on the signals are noticed; a second one ends the process at once. May be repeated.
///
/// # Errors
///
/// If a handler cannot be set.
pub(super) fn catch() -> io::Result<()> {
    let mut first = false;
    let interrupted = INTERRUPTED.get_or_init(|| {
        first = true;
        Arc::default()
    });
    // With each action twice, the first signal would find the flag set, by its own first action.
    if !first {
        return Ok(());
    }
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag clear, the second one set.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(interrupted))?;
        flag::register(signal, Arc::clone(interrupted))?;
    }
    Ok(())
}

/// Whether a signal has come.
pub(super) fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
}

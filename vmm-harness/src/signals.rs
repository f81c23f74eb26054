//! SIGINT and SIGTERM as an end the process comes to itself: files are removed, children are ended.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::pipe;

const TERMINATION: [i32; 2] = [SIGINT, SIGTERM];

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on the signals are noticed, by [`interrupted`] and by what is returned; a second one ends the process at
/// once. May be repeated.
///
/// # Errors
///
/// If a handler cannot be set.
pub(crate) fn catch() -> io::Result<Arc<AtomicBool>> {
    let mut first = false;
    let interrupted = INTERRUPTED.get_or_init(|| {
        first = true;
        Arc::default()
    });
    // With each action twice, the first signal would find the flag set, by its own first action.
    if first {
        die_of_the_second(interrupted)?;
    }
    Ok(Arc::clone(interrupted))
}

/// The first signal sets `interrupted`. Whatever hangs then, a second one ends the process.
fn die_of_the_second(interrupted: &Arc<AtomicBool>) -> io::Result<()> {
    for signal in TERMINATION {
        // In this order: the first signal finds the flag clear, the second one set.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(interrupted))?;
        flag::register(signal, Arc::clone(interrupted))?;
    }
    Ok(())
}

/// Whether a signal has come since [`catch`].
pub(crate) fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Calls `tell` once, on a thread of its own, for the first of the signals; a second one ends the process at once.
///
/// # Errors
///
/// If a handler cannot be set, or there is no thread.
pub(crate) fn on_termination(tell: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (mut signalled, handler) = UnixStream::pair()?;
    die_of_the_second(&Arc::default())?;
    for signal in TERMINATION {
        pipe::register(signal, handler.try_clone()?)?;
    }
    let wait = move || {
        if let Err(error) = io::Read::read_exact(&mut signalled, &mut [0]) {
            log::error!("signals cannot be waited for: {error}");
        }
        tell();
    };
    thread::Builder::new()
        .name("vmem-signals".into())
        .spawn(wait)?;
    Ok(())
}

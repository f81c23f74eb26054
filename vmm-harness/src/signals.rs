//! SIGINT and SIGTERM as an end the process comes to itself.

use std::io;
use std::sync::OnceLock;
use std::thread;

use libc::{SIGINT, SIGTERM, c_int, c_void, siginfo_t};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};
use vmm_sys_util::signal::register_signal_handler;

/// Written by the signal handler, which may do little more than that.
static SIGNALLED: OnceLock<EventFd> = OnceLock::new();

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    if let Some(signalled) = SIGNALLED.get() {
        // If it fails its counter is full, and the signal known.
        let _ = signalled.write(1);
    }
}

/// Calls `tell` once, on a thread of its own, for the first SIGINT or SIGTERM, instead of dying of it. Once in a process.
pub(crate) fn on_termination(tell: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let eventfd = EventFd::new(EFD_CLOEXEC)?;
    let signalled = SIGNALLED.get_or_init(|| eventfd);
    for signal in [SIGINT, SIGTERM] {
        register_signal_handler(signal, on_signal)?;
    }
    let wait = move || {
        let result = loop {
            match signalled.read() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        if let Err(error) = result {
            log::error!("signals cannot be waited for: {error}");
        }
        tell();
    };
    thread::Builder::new()
        .name("vmem-signals".into())
        .spawn(wait)?;
    Ok(())
}

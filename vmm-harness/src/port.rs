//! The port registers: where a guest waits, and where it says that it is done.
//!
//! | offset | read | write |
//! |---|---|---|
//! | [`WAIT`](port::WAIT) | blocks until there is something to do | the same, for at most so many milliseconds |
//! | [`EXIT`](port::EXIT) | ones | the vCPU is done |
//! | [`PANIC`](port::PANIC) | ones | the guest panicked, its message is in the mailbox |

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmem_guest::abi::port;

use crate::mailbox::SharedMailbox;

/// The port device of one guest.
#[derive(Debug)]
pub(crate) struct Port {
    mailbox: SharedMailbox,
    /// Nobody waits any more.
    closed: Mutex<bool>,
    changed: Condvar,
}

/// What a write to the port means for the vCPU that wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortWrite {
    Continue,
    Exit,
    Panic,
}

impl Port {
    pub(crate) fn new(mailbox: SharedMailbox) -> Self {
        Self {
            mailbox,
            closed: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == port::WAIT {
            self.wait(None);
        }
        data.fill(0xff);
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> PortWrite {
        match offset {
            port::WAIT => {
                let mut milliseconds = [0; 8];
                let len = data.len().min(8);
                milliseconds[..len].copy_from_slice(&data[..len]);
                self.wait(Some(Duration::from_millis(u64::from_le_bytes(
                    milliseconds,
                ))));
                PortWrite::Continue
            }
            port::EXIT => PortWrite::Exit,
            port::PANIC => PortWrite::Panic,
            _ => PortWrite::Continue,
        }
    }

    /// Blocks until the mailbox has something for the guest, or nobody waits any more.
    ///
    /// Whoever changes the mailbox calls [`wake`](Self::wake) afterwards, and that takes the lock: the change
    /// is either seen here or the wake-up finds this thread waiting.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        while !*closed && !self.has_news() {
            closed = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self
                    .changed
                    .wait(closed)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return,
                Some(left) => {
                    let waited = self.changed.wait_timeout(closed, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn has_news(&self) -> bool {
        let mailbox = &*self.mailbox;
        mailbox.interrupt.load(Ordering::Acquire) != 0
            || mailbox.command.load(Ordering::Acquire) != 0
            || mailbox.report_request.load(Ordering::Acquire)
                != mailbox.report_done.load(Ordering::Acquire)
    }

    /// Tells waiting vCPUs to look at the mailbox.
    pub(crate) fn wake(&self) {
        drop(self.closed.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// The device has something to say: interrupts the guest.
    pub(crate) fn interrupt(&self) {
        self.mailbox.interrupt.store(1, Ordering::Release);
        self.wake();
    }

    /// From now on nobody waits.
    pub(crate) fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

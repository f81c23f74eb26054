//! The port registers: where a guest waits, and where it says that it is done.
//!
//! | offset | read | write |
//! |---|---|---|
//! | [`WAIT`](port::WAIT) | blocks until there is something to do | the same, for at most so many milliseconds |
//! | [`EXIT`](port::EXIT) | ones | the vCPU is done |
//! | [`PANIC`](port::PANIC) | ones | the guest panicked, its message is in the mailbox |

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmem_guest::abi::{MAX_VCPUS, port};

use crate::mailbox::SharedMailbox;

/// The port device of one guest.
#[derive(Debug)]
pub(crate) struct Port {
    mailbox: SharedMailbox,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Nobody waits any more.
    closed: bool,
    /// Raised with every wake-up.
    wakes: u64,
    /// The wake-up each vCPU has last returned from waiting for.
    seen: [u64; MAX_VCPUS],
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
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn read(&self, vcpu: usize, offset: u64, data: &mut [u8]) {
        if offset == port::WAIT {
            self.wait(vcpu, None);
        }
        data.fill(0xff);
    }

    pub(crate) fn write(&self, vcpu: usize, offset: u64, data: &[u8]) -> PortWrite {
        match offset {
            port::WAIT => {
                let mut milliseconds = [0; 8];
                let len = data.len().min(8);
                milliseconds[..len].copy_from_slice(&data[..len]);
                let timeout = Duration::from_millis(u64::from_le_bytes(milliseconds));
                self.wait(vcpu, Some(timeout));
                PortWrite::Continue
            }
            port::EXIT => PortWrite::Exit,
            port::PANIC => PortWrite::Panic,
            _ => PortWrite::Continue,
        }
    }

    /// Blocks `vcpu` until the mailbox has something for the guest, or had since this vCPU last waited, or
    /// nobody waits any more.
    ///
    /// Whoever changes the mailbox calls [`wake`](Self::wake) afterwards, and that takes the lock: the change
    /// is either seen here or the wake-up finds this thread waiting. One vCPU takes the interrupt, but what
    /// it announces may concern all of them: so each returns once for every wake-up, also for one that came
    /// before it waited.
    pub(crate) fn wait(&self, vcpu: usize, timeout: Option<Duration>) {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        let news = |state: &State| state.seen.get(vcpu).is_none_or(|seen| *seen != state.wakes);
        while !state.closed && !news(&state) && !self.has_news() {
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return,
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        let wakes = state.wakes;
        if let Some(seen) = state.seen.get_mut(vcpu) {
            *seen = wakes;
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
        let mut state = self.lock();
        state.wakes = state.wakes.wrapping_add(1);
        drop(state);
        self.changed.notify_all();
    }

    /// The device has something to say: interrupts the guest.
    pub(crate) fn interrupt(&self) {
        self.mailbox.interrupt.store(1, Ordering::Release);
        self.wake();
    }

    /// From now on nobody waits.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

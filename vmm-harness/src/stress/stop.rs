//! A flag that wakes those who wait.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

#[derive(Debug, Default)]
pub(super) struct Stop {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(super) fn raise(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    pub(super) fn is_raised(&self) -> bool {
        *self.lock()
    }

    /// Waits for `duration`, or until it is raised; whether it is.
    pub(super) fn wait(&self, duration: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), duration, |raised| !*raised);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Something that raises it when it is dropped by a panic.
    pub(super) fn by_panic(&self) -> ByPanic<'_> {
        ByPanic(self)
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct ByPanic<'a>(&'a Stop);

impl Drop for ByPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_raises_it_and_an_ordinary_end_does_not() {
        let stop = Stop::default();
        drop(stop.by_panic());
        assert!(!stop.is_raised());
        let panics = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _raises = stop.by_panic();
                panic!("on purpose");
            });
            thread.join().is_err()
        });
        assert!(panics && stop.is_raised());
    }
}

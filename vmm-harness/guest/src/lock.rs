//! A spin lock: there is nothing to sleep on at ring 3.
#![expect(unsafe_code, reason = "a lock is made of an UnsafeCell")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

/// Something one vCPU at a time works with, for a few microseconds.
#[derive(Debug)]
pub(crate) struct SpinLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: The lock lets one thread at a time reach the value, which may be sent between threads.
unsafe impl<T: Send> Sync for SpinLock<T> {}

/// Access to what is locked; unlocks when dropped.
pub(crate) struct Guard<'a, T> {
    lock: &'a SpinLock<T>,
}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock, calling `relax` in between.
    pub(crate) fn lock(&self, relax: impl Fn()) -> Guard<'_, T> {
        let (free, taken) = (false, true);
        while self
            .locked
            .compare_exchange_weak(free, taken, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            // Wait on a read, so that the cache line can be shared meanwhile.
            while self.locked.load(Ordering::Relaxed) {
                relax();
            }
        }
        Guard { lock: self }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The lock is taken and this guard is the only one.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As above, and the guard is borrowed exclusively.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.locked.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_increment_is_lost_between_threads() {
        let lock = SpinLock::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| *lock.lock(std::thread::yield_now) += 1));
            }
        });
        assert_eq!(*lock.lock(|| ()), 40_000);
    }
}

//! From the first vCPU that runs to the outcome.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::outcome::Outcome;

/// A guest's store into memory raises no event, so whoever waits for one looks this often.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    running: usize,
    outcome: Option<Outcome>,
}

impl Lifecycle {
    pub(crate) fn new(vcpu_count: usize) -> Self {
        Self {
            state: Mutex::new(State {
                running: vcpu_count,
                outcome: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// A vCPU is done; with the last one the guest is.
    pub(crate) fn vcpu_exited(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        if state.running == 0 {
            state.outcome.get_or_insert(Outcome::Exited);
        }
        self.changed.notify_all();
    }

    /// The guest ends like this, unless it has ended already.
    pub(crate) fn finish(&self, outcome: Outcome) {
        self.lock().outcome.get_or_insert(outcome);
        self.changed.notify_all();
    }

    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// Waits for the end until `deadline`.
    pub(crate) fn wait(&self, deadline: Instant) -> Option<Outcome> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), left, |state| state.outcome.is_none());
        waited
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .outcome
            .clone()
    }

    /// Waits until `done`, which looks at memory the guest writes.
    pub(crate) fn wait_for(
        &self,
        deadline: Instant,
        done: impl Fn() -> bool,
    ) -> Result<(), NotDone> {
        let mut state = self.lock();
        loop {
            if done() {
                return Ok(());
            }
            if let Some(outcome) = &state.outcome {
                return Err(NotDone::Ended(outcome.clone()));
            }
            if Instant::now() >= deadline {
                return Err(NotDone::Late);
            }
            let waited = self.changed.wait_timeout(state, POLL_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock leaves a valid state at each step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why something the guest was to do has not been done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotDone {
    Ended(Outcome),
    Late,
}

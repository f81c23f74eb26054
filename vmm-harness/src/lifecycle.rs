//! From the first vCPU that runs to the outcome.

use std::fmt;
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

struct State {
    running: usize,
    outcome: Option<Outcome>,
    /// Who is to hear of the outcome, while there is none.
    listeners: Vec<Listener>,
}

type Listener = Box<dyn FnOnce(&Outcome) + Send>;

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("running", &self.running)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

impl Lifecycle {
    pub(crate) fn new(vcpu_count: usize) -> Self {
        Self {
            state: Mutex::new(State {
                running: vcpu_count,
                outcome: None,
                listeners: Vec::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// A vCPU is done; with the last one the guest is.
    pub(crate) fn vcpu_exited(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        if state.running == 0 {
            drop(state);
            self.finish(Outcome::Exited);
        }
    }

    /// The guest ends like this, unless it has ended already.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let mut state = self.lock();
        let outcome = state.outcome.get_or_insert(outcome).clone();
        let listeners = std::mem::take(&mut state.listeners);
        drop(state);
        self.changed.notify_all();
        for listener in listeners {
            listener(&outcome);
        }
    }

    /// Calls `listener` once, at the end, on the thread that finds it; at once if the guest has ended already.
    pub(crate) fn on_end(&self, listener: impl FnOnce(&Outcome) + Send + 'static) {
        let mut state = self.lock();
        match state.outcome.clone() {
            None => state.listeners.push(Box::new(listener)),
            Some(outcome) => {
                drop(state);
                listener(&outcome);
            }
        }
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn who_listens_hears_of_the_first_outcome_once_and_who_comes_late_at_once() {
        let lifecycle = Lifecycle::new(2);
        let (told, heard) = channel();
        let listener = |told: &std::sync::mpsc::Sender<Outcome>| {
            let told = told.clone();
            move |outcome: &Outcome| told.send(outcome.clone()).unwrap()
        };
        lifecycle.on_end(listener(&told));
        lifecycle.vcpu_exited();
        assert!(heard.try_recv().is_err());
        lifecycle.vcpu_exited();
        lifecycle.finish(Outcome::Stopped);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Outcome::Exited]);
        lifecycle.on_end(listener(&told));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Outcome::Exited]);
    }
}

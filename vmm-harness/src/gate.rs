//! Who may run guest code.
//!
//! A vCPU thread enters the gate before each `KVM_RUN` and leaves it after. Closing the gate, or keeping all
//! but one vCPU out, brings those inside out by a signal ([`crate::kick`]).
//!
//! No kick is lost: a thread disarms the last kick *before* it enters; the gate changes and kicks under the
//! lock that entering takes. So either the thread sees the change when it enters, or it is inside when it is
//! kicked, and then `KVM_RUN` returns, even if it has yet to be called.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::kick::RunningThread;

#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    admitted: Admitted,
    /// The thread of each vCPU that is inside.
    inside: Vec<Option<RunningThread>>,
    /// vCPUs that wait, as if the host had no time for them.
    held: Vec<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admitted {
    All,
    Only(usize),
    None,
}

/// A vCPU is inside until this is dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    gate: &'a Gate,
    vcpu: usize,
}

impl Gate {
    pub(crate) fn new(vcpu_count: usize) -> Self {
        Self {
            state: Mutex::new(State {
                admitted: Admitted::All,
                inside: vec![None; vcpu_count],
                held: vec![false; vcpu_count],
            }),
            changed: Condvar::new(),
        }
    }

    /// Waits until `vcpu` may run, on this thread; `None` if it never will again.
    pub(crate) fn enter(&self, vcpu: usize) -> Option<Inside<'_>> {
        let mut state = self.lock();
        loop {
            match state.admitted {
                Admitted::None => return None,
                Admitted::Only(other) if other != vcpu => state = self.wait(state),
                Admitted::All if state.held[vcpu] => state = self.wait(state),
                Admitted::All | Admitted::Only(_) => break,
            }
        }
        state.inside[vcpu] = Some(RunningThread::current());
        Some(Inside { gate: self, vcpu })
    }

    /// Brings `vcpu` out and keeps it out until it is [released](Self::release), but not from what only it is to do
    /// ([`isolate`](Self::isolate)); `false` if there is no such vCPU.
    pub(crate) fn hold(&self, vcpu: usize) -> bool {
        let mut state = self.lock();
        let Some(held) = state.held.get_mut(vcpu) else {
            return false;
        };
        *held = true;
        state.inside[vcpu].iter().for_each(RunningThread::kick);
        true
    }

    pub(crate) fn release(&self, vcpu: usize) {
        if let Some(held) = self.lock().held.get_mut(vcpu) {
            *held = false;
        }
        self.changed.notify_all();
    }

    /// Admits nobody any more and brings out who is inside.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.admitted = Admitted::None;
        state.kick_all();
        self.changed.notify_all();
    }

    /// Admits only `vcpu`, which is outside, and waits until nobody is inside. False if somebody else was
    /// first or the gate is closed.
    pub(crate) fn isolate(&self, vcpu: usize) -> bool {
        let mut state = self.lock();
        if state.admitted != Admitted::All {
            return false;
        }
        state.admitted = Admitted::Only(vcpu);
        state.kick_all();
        while state.inside.iter().any(Option::is_some) {
            state = self.wait(state);
        }
        state.admitted == Admitted::Only(vcpu)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is a single store.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn kick_all(&self) {
        self.inside.iter().flatten().for_each(RunningThread::kick);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.lock().inside[self.vcpu] = None;
        self.gate.changed.notify_all();
    }
}

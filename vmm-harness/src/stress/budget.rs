//! What all guests of a host may have together.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::lock;
use super::series::{Series, keep_extremes};
use crate::demo::CheckFailed;
use crate::demo::checks::check;
use crate::report::Held;

/// Bytes that move between guests: what one has given back another may request.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: u64,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What each guest may come to have plugged: the larger of what is requested and what is plugged.
    held: Vec<u64>,
    /// What was held from when on.
    history: Series<Held>,
}

impl State {
    fn set(&mut self, vm: usize, bytes: u64, began: Instant) {
        if self.held[vm] == bytes {
            return;
        }
        self.held[vm] = bytes;
        self.history.push(Held {
            seconds: began.elapsed().as_secs_f64(),
            bytes: self.held.clone(),
        });
    }
}

impl Budget {
    /// For a run that has begun at `began`.
    pub(super) fn new(vm_count: usize, bytes: u64, began: Instant) -> Self {
        Self {
            bytes,
            began,
            state: Mutex::new(State {
                held: vec![0; vm_count],
                history: Series::new(|held| keep_extremes(held, &[Held::sum])),
            }),
        }
    }

    /// As much of `wanted` as there is for guest `vm`, in whole units of `granule_size`. It keeps what it had before,
    /// until it is [settled](Self::settle).
    pub(super) fn grant(&self, vm: usize, wanted: u64, granule_size: u64) -> u64 {
        let mut state = lock(&self.state);
        let has = state.held[vm];
        let others = state.held.iter().sum::<u64>() - has;
        let left = self.bytes.saturating_sub(others);
        let granted = wanted.min(left - left % granule_size);
        state.set(vm, has.max(granted), self.began);
        granted
    }

    /// Guest `vm` will not have more than `most` bytes plugged: what it held beyond that is free.
    pub(super) fn settle(&self, vm: usize, most: u64) {
        lock(&self.state).set(vm, most, self.began);
    }

    /// What the guests held, each time at one moment.
    pub(super) fn into_history(self) -> Vec<Held> {
        let state = self.state.into_inner();
        state
            .unwrap_or_else(PoisonError::into_inner)
            .history
            .into_kept()
    }

    /// Fails if guest `vm` has more plugged than it may, or all together hold more than there is.
    pub(super) fn check(
        &self,
        vm: usize,
        plugged: impl FnOnce() -> u64,
    ) -> Result<(), CheckFailed> {
        let state = lock(&self.state);
        let held = &state.held;
        // Read while nobody can give it back.
        let plugged = plugged();
        let within = plugged <= held[vm] && held.iter().sum::<u64>() <= self.bytes;
        check("within-the-budget", within, || {
            format!(
                "guest {vm} has {plugged} bytes; held: {held:?} of {}",
                self.bytes
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_gives_back_another_gets_and_never_more_than_there_is() {
        let budget = Budget::new(2, 10, Instant::now());
        assert_eq!(budget.grant(0, 8, 2), 8);
        assert_eq!(budget.grant(1, 8, 2), 2);
        assert!(budget.check(0, || 8).is_ok() && budget.check(1, || 2).is_ok());
        assert_eq!(budget.check(1, || 3).unwrap_err().name, "within-the-budget");
        // Asked to give back is not given back.
        assert_eq!(budget.grant(0, 2, 2), 2);
        assert_eq!(budget.grant(1, 8, 2), 2);
        budget.settle(0, 2);
        assert_eq!(budget.grant(1, 10, 2), 8);
        // Whole units only.
        budget.settle(1, 3);
        assert_eq!(budget.grant(0, 10, 4), 4);
        assert!(budget.check(0, || 4).is_ok());
        let history = budget.into_history();
        let held: Vec<_> = history.iter().map(|held| held.bytes.as_slice()).collect();
        // Each change, and what did not change anything is not there.
        assert_eq!(held, [[8, 0], [8, 2], [2, 2], [2, 8], [2, 3], [4, 3]]);
        assert!(history.iter().all(|held| held.sum() <= 10));
        assert!(history.is_sorted_by_key(|held| held.seconds));
    }

    #[test]
    fn a_grant_that_exceeds_the_budget_is_found() {
        let budget = Budget::new(2, 10, Instant::now());
        budget.settle(0, 6);
        budget.settle(1, 6);
        assert_eq!(budget.check(0, || 6).unwrap_err().name, "within-the-budget");
    }
}

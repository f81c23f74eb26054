//! What all guests of a host may have together.

use std::sync::Mutex;

use super::lock;
use crate::demo::CheckFailed;
use crate::demo::checks::check;

/// Bytes that move between guests: what one has given back another may request.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: u64,
    /// What each guest may come to have plugged: the larger of what is requested and what is plugged.
    held: Mutex<Vec<u64>>,
}

impl Budget {
    pub(super) fn new(vm_count: usize, bytes: u64) -> Self {
        Self {
            bytes,
            held: Mutex::new(vec![0; vm_count]),
        }
    }

    /// As much of `wanted` as there is for guest `vm`, in whole units of `granule_size`. It keeps what it had before,
    /// until it is [settled](Self::settle).
    pub(super) fn grant(&self, vm: usize, wanted: u64, granule_size: u64) -> u64 {
        let mut held = lock(&self.held);
        let others = held.iter().sum::<u64>() - held[vm];
        let left = self.bytes.saturating_sub(others);
        let granted = wanted.min(left - left % granule_size);
        held[vm] = held[vm].max(granted);
        granted
    }

    /// Guest `vm` will not have more than `most` bytes plugged: what it held beyond that is free.
    pub(super) fn settle(&self, vm: usize, most: u64) {
        lock(&self.held)[vm] = most;
    }

    /// Fails if guest `vm` has more plugged than it may, or all together hold more than there is.
    pub(super) fn check(
        &self,
        vm: usize,
        plugged: impl FnOnce() -> u64,
    ) -> Result<(), CheckFailed> {
        let held = lock(&self.held);
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
        let budget = Budget::new(2, 10);
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
    }

    #[test]
    fn a_grant_that_exceeds_the_budget_is_found() {
        let budget = Budget::new(2, 10);
        budget.settle(0, 6);
        budget.settle(1, 6);
        assert_eq!(budget.check(0, || 6).unwrap_err().name, "within-the-budget");
    }
}

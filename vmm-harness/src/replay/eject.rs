//! How ACPI ejects a DIMM: the order of its attempts, whatever comes of each.
//!
//! ```text
//!  first pass: every block, going on after failures
//!      | all offline                       | some are not
//!      v                                   v
//!    remove <-- all offline -- second pass: those again, up to the first failure
//!                                          | failure
//!                                          v
//!                          bring back, without a type, what was taken offline
//! ```
//!
//! Linux: `acpi_scan_try_to_offline`. This is not `offline_and_remove_memory`, which stops at the first failure and
//! remembers the types.

use std::collections::BTreeSet;
use std::ops::Range;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Take a memory block offline.
    Offline(u64),
    /// Bring a memory block online, without a type.
    Online(u64),
    /// Remove the memory: the eject has succeeded.
    Remove,
    /// Nothing: the eject has been refused.
    Refuse,
}

/// What came of an attempt to take a memory block offline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// It went offline.
    Succeeded,
    /// It was offline before, and stays so whatever happens.
    WasOffline,
    /// It did not.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    First { failed: bool },
    Second,
    BringBack,
}

/// An eject that is going on.
#[derive(Debug)]
pub(super) struct Eject {
    /// Ids of the memory blocks.
    blocks: Range<u64>,
    phase: Phase,
    /// The block to look at next.
    cursor: u64,
    taken: BTreeSet<u64>,
}

impl Eject {
    pub(super) fn new(blocks: Range<u64>) -> Self {
        Self {
            phase: Phase::First { failed: false },
            cursor: blocks.start,
            blocks,
            taken: BTreeSet::new(),
        }
    }

    /// Ids of the memory blocks.
    pub(super) fn blocks(&self) -> &Range<u64> {
        &self.blocks
    }

    /// What is to be done next; the same until [`attempted`](Self::attempted) or
    /// [`brought_back`](Self::brought_back) is called.
    pub(super) fn next(&mut self) -> Action {
        if self.phase == Phase::Second {
            while self.taken.contains(&self.cursor) {
                self.cursor += 1;
            }
        }
        match self.phase {
            Phase::BringBack => self
                .taken
                .first()
                .map_or(Action::Refuse, |id| Action::Online(*id)),
            _ if self.cursor < self.blocks.end => Action::Offline(self.cursor),
            Phase::First { failed: true } => {
                self.phase = Phase::Second;
                self.cursor = self.blocks.start;
                self.next()
            }
            Phase::First { failed: false } | Phase::Second => Action::Remove,
        }
    }

    /// The block of [`Action::Offline`] was tried.
    pub(super) fn attempted(&mut self, attempt: Attempt) {
        match (attempt, &mut self.phase) {
            (Attempt::Succeeded, _) => {
                self.taken.insert(self.cursor);
            }
            (Attempt::WasOffline, _) => {}
            (Attempt::Failed, Phase::First { failed }) => *failed = true,
            (Attempt::Failed, phase) => *phase = Phase::BringBack,
        }
        self.cursor += 1;
    }

    /// The block of [`Action::Online`] was tried; what came of it does not matter.
    pub(super) fn brought_back(&mut self) {
        self.taken.pop_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ejects blocks 32 to 35 with the attempts' results, and says what was done.
    fn eject(mut attempts: &[Attempt]) -> Vec<Action> {
        let mut eject = Eject::new(32..36);
        let mut actions = Vec::new();
        loop {
            let action = eject.next();
            actions.push(action);
            match action {
                Action::Offline(_) => {
                    let (attempt, rest) = attempts.split_first().expect("no more attempts");
                    eject.attempted(*attempt);
                    attempts = rest;
                }
                Action::Online(_) => eject.brought_back(),
                Action::Remove | Action::Refuse => {
                    assert!(attempts.is_empty());
                    return actions;
                }
            }
        }
    }

    use Action::{Offline, Online, Refuse, Remove};
    use Attempt::{Failed, Succeeded, WasOffline};

    #[test]
    fn one_pass_is_enough_if_nothing_fails() {
        let actions = eject(&[Succeeded, WasOffline, Succeeded, Succeeded]);
        assert_eq!(
            actions,
            [Offline(32), Offline(33), Offline(34), Offline(35), Remove]
        );
    }

    #[test]
    fn second_pass_tries_only_what_is_not_offline_yet() {
        let actions = eject(&[Failed, Succeeded, Failed, Succeeded, Succeeded, Succeeded]);
        assert_eq!(actions[4..], [Offline(32), Offline(34), Remove]);
    }

    #[test]
    fn second_pass_ends_at_its_first_failure_and_all_that_was_taken_comes_back() {
        let actions = eject(&[Succeeded, Failed, Succeeded, Failed, Failed]);
        assert_eq!(actions[4..], [Offline(33), Online(32), Online(34), Refuse]);
    }

    #[test]
    fn what_was_offline_before_stays_offline() {
        let actions = eject(&[
            WasOffline, Succeeded, WasOffline, Failed, WasOffline, WasOffline, Failed,
        ]);
        assert_eq!(
            actions[4..],
            [Offline(32), Offline(34), Offline(35), Online(33), Refuse]
        );
    }
}

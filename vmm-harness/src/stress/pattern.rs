//! Which sizes are asked for, one after another, and whether each is waited for.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// How the target moves. Its name is that of the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Up in steps, each waited for, then down at once.
    Sawtooth,
    /// Anything; about half of the sizes are left before they are reached.
    #[default]
    Random,
    /// Far up and far down in turns, hardly ever waited for.
    Thrash,
    /// Many sizes within no time, then one that is waited for, then a pause.
    Burst,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What follows a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The guest settles, and everything is checked.
    Rest,
    /// The next target comes after this long, wherever the guest is by then.
    Leave(Duration),
}

/// One move of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    /// Bytes.
    pub(super) target: u64,
    pub(super) then: Then,
}

/// The endless sequence of moves that follows from a seed.
#[derive(Debug)]
pub(super) struct Moves {
    pattern: Pattern,
    random: fastrand::Rng,
    granule_size: u64,
    /// Granules there can be.
    capacity: u64,
    /// What a phase of the pattern has left: steps of a tooth, moves up to a rest.
    left: u64,
    /// The last target and, of a tooth, the way up to it, in granules.
    at: u64,
    rise: u64,
}

impl Moves {
    /// Targets are multiples of `granule_size` up to `capacity`, in bytes: such as a driver reaches exactly.
    pub(super) fn new(pattern: Pattern, seed: u64, granule_size: u64, capacity: u64) -> Self {
        Self {
            pattern,
            random: fastrand::Rng::with_seed(seed),
            granule_size,
            capacity: capacity / granule_size,
            left: 0,
            at: 0,
            rise: 0,
        }
    }

    fn below(&mut self, duration: Duration) -> Duration {
        Duration::from_micros(self.random.u64(0..duration.as_micros() as u64))
    }

    fn sawtooth(&mut self) -> Then {
        if self.left == 0 {
            let low = self.random.u64(0..=self.capacity / 4);
            let peak = self.random.u64(low..=self.capacity);
            let steps = self.random.u64(2..=12);
            self.rise = (peak - low).div_ceil(steps);
            self.left = steps;
            self.at = low;
        } else {
            self.left -= 1;
            self.at = (self.at + self.rise).min(self.capacity);
        }
        Then::Rest
    }

    fn random(&mut self) -> Then {
        self.at = self.random.u64(0..=self.capacity);
        match self.random.bool() {
            true => Then::Rest,
            false => Then::Leave(self.below(Duration::from_millis(100))),
        }
    }

    fn thrash(&mut self) -> Then {
        let quarter = self.capacity / 4;
        let high = self.at <= self.capacity / 2;
        let low_end = if high { self.capacity - quarter } else { 0 };
        self.at = low_end + self.random.u64(0..=quarter);
        self.left = self.left.checked_sub(1).unwrap_or(self.random.u64(4..=32));
        match self.left {
            0 => Then::Rest,
            _ => Then::Leave(self.below(Duration::from_millis(20))),
        }
    }

    fn burst(&mut self) -> Then {
        let Some(left) = self.left.checked_sub(1) else {
            self.left = self.random.u64(8..=32);
            // The same size again: a pause in which the guest has the memory to itself.
            return Then::Leave(self.below(Duration::from_millis(250)));
        };
        self.left = left;
        let spread = self.capacity / 8;
        let end = (self.at + spread).min(self.capacity);
        self.at = self.random.u64(self.at.saturating_sub(spread)..=end);
        match left {
            0 => Then::Rest,
            _ => Then::Leave(Duration::ZERO),
        }
    }
}

impl Iterator for Moves {
    type Item = Move;

    fn next(&mut self) -> Option<Move> {
        let then = match self.pattern {
            Pattern::Sawtooth => self.sawtooth(),
            Pattern::Random => self.random(),
            Pattern::Thrash => self.thrash(),
            Pattern::Burst => self.burst(),
        };
        let target = self.at * self.granule_size;
        Some(Move { target, then })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: u64 = 2 << 20;
    const CAPACITY: u64 = 512 * GRANULE;
    const ALL: [Pattern; 4] = [
        Pattern::Sawtooth,
        Pattern::Random,
        Pattern::Thrash,
        Pattern::Burst,
    ];

    fn moves(pattern: Pattern, seed: u64) -> Vec<Move> {
        Moves::new(pattern, seed, GRANULE, CAPACITY + GRANULE / 2)
            .take(2000)
            .collect()
    }

    #[test]
    fn a_seed_is_a_sequence() {
        for pattern in ALL {
            assert_eq!(moves(pattern, 1), moves(pattern, 1));
            assert_ne!(moves(pattern, 1), moves(pattern, 2));
        }
    }

    #[test]
    fn targets_are_within_reach_use_the_region_and_come_to_rest() {
        for pattern in ALL {
            let moves = moves(pattern, 3);
            assert!(
                moves
                    .iter()
                    .all(|m| m.target.is_multiple_of(GRANULE) && m.target <= CAPACITY)
            );
            let targets = || moves.iter().map(|m| m.target);
            assert!(targets().max() > Some(CAPACITY * 3 / 4), "{pattern:?}");
            assert!(targets().min() < Some(CAPACITY / 4), "{pattern:?}");
            let rests = moves.iter().filter(|m| m.then == Then::Rest).count();
            let expected = match pattern {
                Pattern::Sawtooth => 2000..=2000,
                Pattern::Random => 900..=1100,
                Pattern::Thrash | Pattern::Burst => 50..=300,
            };
            assert!(expected.contains(&rests), "{pattern:?} {rests}");
        }
    }

    #[test]
    fn a_tooth_rises_in_steps_and_falls_at_once() {
        let targets: Vec<u64> = moves(Pattern::Sawtooth, 5)
            .iter()
            .map(|m| m.target)
            .collect();
        let rises = targets.windows(2).filter(|pair| pair[1] >= pair[0]).count();
        let falls = targets.len() - 1 - rises;
        assert!(falls > 100 && rises > 2 * falls, "{rises} {falls}");
    }

    #[test]
    fn a_region_of_one_granule_is_enough() {
        for pattern in ALL {
            let moves = Moves::new(pattern, 1, GRANULE, GRANULE).take(500);
            let targets: std::collections::HashSet<u64> = moves.map(|m| m.target).collect();
            assert!(targets.is_subset(&[0, GRANULE].into()), "{targets:?}");
        }
    }
}

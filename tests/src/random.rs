//! Randomness that can be had again.

use std::env;
use std::time::SystemTime;

/// A small generator, seeded: the same seed is the same test.
#[derive(Debug)]
pub struct Random(fastrand::Rng);

impl Random {
    /// The numbers that belong to `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// A number less than `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound)
    }

    /// True once in `times` times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// An index of a slice of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        self.0.usize(..len)
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }
}

/// A number from the environment; `default` if it is not there.
///
/// # Panics
///
/// If it is there and is no number.
#[must_use]
pub fn from_environment(name: &str, default: u64) -> u64 {
    let given = env::var(name).ok();
    given.map_or(default, |text| text.parse().expect("a number"))
}

/// `VMEM_SEED`; seconds since the epoch if it is not set. Printed.
#[must_use]
pub fn seed() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    let seed = from_environment("VMEM_SEED", now.map_or(0, |time| time.as_secs()));
    println!("VMEM_SEED={seed}");
    seed
}

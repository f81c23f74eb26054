//! What this process holds, by the kernel's word: descriptors, threads, mappings.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use virtio_mem::VirtioMem;

use crate::demo::CheckFailed;
use crate::demo::checks::check;

/// How long a descriptor or thread may take to be gone for good: others look at /proc as well, and a thread that was
/// joined is still listed for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the allocator reserves for a thread at the most; larger is guest memory.
const LARGE: u64 = 64 << 20;

/// Descriptors, threads, and bytes of large mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Census {
    descriptors: usize,
    threads: usize,
    large_mappings: u64,
}

impl Census {
    pub(super) fn take() -> io::Result<Self> {
        let large = mappings()?.into_iter().map(|m| m.end - m.start);
        Ok(Self {
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            threads: fs::read_dir("/proc/self/task")?.count(),
            large_mappings: large.filter(|len| *len > LARGE).sum(),
        })
    }

    /// Whether there is no more of anything than there was.
    fn within(self, before: Self) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.large_mappings <= before.large_mappings
    }

    /// Fails if there is more now than `self`, taken before.
    pub(super) fn nothing_leaked(self) -> Result<(), LeakError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::take()?;
            if now.within(self) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(
                    CheckFailed::new("nothing-leaked", format!("{self:?} became {now:?}")).into(),
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// As [`nothing_leaked`](Self::nothing_leaked), of a guest that runs: mappings come and go with its blocks.
    pub(super) fn nothing_leaked_but_mappings(self) -> Result<(), LeakError> {
        Self {
            large_mappings: u64::MAX,
            ..self
        }
        .nothing_leaked()
    }
}

/// A leak, or what kept from looking.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeakError {
    #[error(transparent)]
    Check(#[from] CheckFailed),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<LeakError> for crate::demo::DemoError {
    fn from(error: LeakError) -> Self {
        match error {
            LeakError::Check(failed) => failed.into(),
            LeakError::Io(error) => error.into(),
        }
    }
}

/// Slots there are, by the device's count and by that of who makes them, if somebody does, against slots there must be,
/// by what is plugged.
pub(super) fn no_slot_leaked(device: &VirtioMem, made: Option<u64>) -> Result<(), CheckFailed> {
    let handle = device.handle();
    let per_slot = device.slot_size() / device.geometry().block_size();
    let plugged = handle.plugged();
    let needed: BTreeSet<u64> = plugged
        .runs()
        .flat_map(|run| run.first / per_slot..=(run.end() - 1) / per_slot)
        .collect();
    let needed = needed.len() as u64;
    let counted = handle.status().slot_count;
    let made = made.unwrap_or(counted);
    check(
        "no-slot-leaked",
        (made, counted) == (needed, needed),
        || {
            format!(
                "{needed} slots have plugged blocks; {made} were made, the device counts {counted}"
            )
        },
    )
}

/// Each run of plugged blocks is a mapping and so is what lies between two.
pub(super) fn no_mapping_leaked(device: &VirtioMem) -> Result<(), LeakError> {
    let runs = device.handle().plugged().run_count();
    let backing = device.backing();
    let start = backing.host_address().as_ptr().addr() as u64;
    let mappings = mappings_in(&(start..start + backing.len()))?;
    let most = 2 * runs as usize + 1;
    Ok(check("no-mapping-leaked", mappings <= most, || {
        format!("the region is {mappings} mappings with {runs} runs of plugged blocks")
    })?)
}

/// The number of mappings in `range`.
fn mappings_in(range: &Range<u64>) -> io::Result<usize> {
    let inside = |m: &Range<u64>| m.start < range.end && range.start < m.end;
    Ok(mappings()?.into_iter().filter(inside).count())
}

fn mappings() -> io::Result<Vec<Range<u64>>> {
    let text = fs::read_to_string("/proc/self/maps")?;
    let parse = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let number = |hex| u64::from_str_radix(hex, 16).ok();
        Some(number(start)?..number(end)?)
    };
    Ok(text.lines().filter_map(parse).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};

    use virtio_mem::{Anonymous, Backing};
    use vm_memory::GuestAddress;

    use super::super::lock;
    use super::*;

    #[test]
    fn what_is_held_is_counted() {
        const MANY: usize = 40;
        let files = [(); MANY].map(|()| fs::File::open("/dev/null").unwrap());
        let (end, ended) = channel::<()>();
        let ended = Arc::new(Mutex::new(ended));
        let threads = [(); MANY].map(|()| {
            let ended = Arc::clone(&ended);
            thread::spawn(move || {
                // Nothing is sent; the end is the end.
                let _ = lock(&ended).recv();
            })
        });
        let backing = Anonymous::base_pages(1 << 40).unwrap();
        let start = backing.host_address().as_ptr().addr() as u64;
        let region = start..start + (1 << 40);
        // Other tests hold something as well, or no longer do.
        let census = Census::take().unwrap();
        assert!(
            census.descriptors > MANY && census.threads > MANY,
            "{census:?}"
        );
        assert!(census.large_mappings >= 1 << 40, "{census:?}");
        assert_eq!(mappings_in(&region).unwrap(), 1);
        backing.open(4096..8192).unwrap();
        assert_eq!(mappings_in(&region).unwrap(), 3);
        drop((files, backing, end));
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn slots_and_mappings_that_nobody_needs_are_found() {
        let backing = Anonymous::base_pages(1 << 30).unwrap();
        let builder = VirtioMem::builder(GuestAddress(4 << 30), backing).block_size(2 << 20);
        let device = builder.build().unwrap();
        assert_eq!(no_slot_leaked(&device, None), Ok(()));
        assert_eq!(no_slot_leaked(&device, Some(0)), Ok(()));
        let leaked = no_slot_leaked(&device, Some(1)).unwrap_err();
        assert_eq!(leaked.name, "no-slot-leaked");
        no_mapping_leaked(&device).unwrap();
        // Without the device.
        device.backing().open(2 << 20..4 << 20).unwrap();
        match no_mapping_leaked(&device).unwrap_err() {
            LeakError::Check(leaked) => assert_eq!(leaked.name, "no-mapping-leaked"),
            LeakError::Io(error) => panic!("{error}"),
        }
    }

    #[test]
    fn more_of_any_kind_is_a_leak() {
        let before = Census {
            descriptors: 5,
            threads: 3,
            large_mappings: 1 << 30,
        };
        assert!(before.within(before));
        for more in [
            Census {
                descriptors: 6,
                ..before
            },
            Census {
                threads: 4,
                ..before
            },
            Census {
                large_mappings: 2 << 30,
                ..before
            },
        ] {
            assert!(before.within(more) && !more.within(before));
        }
    }
}

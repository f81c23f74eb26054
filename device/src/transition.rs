//! Blocks change hands: what plugging and unplugging do to the host, in which order, and how each is undone.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio_mem_wire::BlockRange;

use crate::backing::{discard, populate};
use crate::busy::BusyCause;
use crate::device::{Core, Device, Refusal};
use crate::observers::{ObserverError, ObserverId, PlugObserver, Run, all_or_none};

/// One step of several was refused.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub(crate) struct StepError {
    pub(crate) source: io::Error,
    /// Whether everything is as before.
    pub(crate) undone: bool,
}

impl Device {
    /// Plugs the unplugged blocks of `range` for host, guest, observers and users in the VMM, or nothing.
    pub(crate) fn give(&self, core: &mut Core, range: BlockRange) -> Result<(), Refusal> {
        let bytes = self.bytes_of(range);
        self.backing
            .open(bytes.clone())
            .map_err(|error| Refusal::Host("opening memory", error))?;
        // A slot that was there before has shown the guest the open blocks: nothing may stay of them.
        let take_back = || {
            self.backing.close(bytes.clone())?;
            self.backing.discard(bytes.clone())
        };
        if let Some(threads) = self.populate_threads
            && let Err(source) = populate(&*self.backing, bytes.clone(), threads)
        {
            let error = source.into();
            return Err(refuse(
                core,
                "populating memory",
                error,
                take_back(),
                &[range],
            ));
        }
        if let Err(error) = core.slots.add(range) {
            return Err(refuse(core, "mapping a slot", error, take_back(), &[range]));
        }
        if let Err(error) = core.observers.plugged(&self.run(range)) {
            let closed = self.backing.close(bytes.clone());
            let emptied = closed
                .and_then(|()| core.slots.remove(range).map_err(|error| error.source))
                .and_then(|()| self.backing.discard(bytes));
            return Err(refuse(
                core,
                "telling an observer",
                error,
                emptied,
                &[range],
            ));
        }
        self.dirty.mark(self.bytes_of(range));
        self.access.grant(range);
        core.sizes.plugged_size = core
            .sizes
            .plugged_size
            .saturating_add(self.geometry.bytes(range.count));
        Ok(())
    }

    /// Unplugs the plugged `runs`, which lie in `hull`, from users, guest and host, or nothing of them.
    ///
    /// Closing comes first and giving back last: a vCPU that races this cannot fault pages back in, and
    /// nothing that can fail is left to do once contents are gone.
    pub(crate) fn take_away(
        &self,
        core: &mut Core,
        hull: BlockRange,
        runs: &[BlockRange],
    ) -> Result<(), Refusal> {
        let bytes = self.bytes_of(hull);
        self.access
            .revoke(hull)
            .map_err(|_pinned| Refusal::Busy(BusyCause::Pinned))?;
        for (done, run) in runs.iter().enumerate() {
            if let Err(error) = core.observers.unplugging(&self.run(*run)) {
                let told = self.tell_again(core, &runs[..done]);
                self.grant_all(runs);
                return Err(refuse(core, "telling an observer", error, told, runs));
            }
        }
        if let Err(source) = self.backing.close(bytes.clone()) {
            // Part of it may be closed.
            let restored = self.give_again(core, &[], runs);
            return Err(refuse(
                core,
                "closing memory",
                source.into(),
                restored,
                runs,
            ));
        }
        for (done, run) in runs.iter().enumerate() {
            if let Err(error) = core.slots.remove(*run) {
                let restored = self.give_again(core, &runs[..done], runs);
                return Err(refuse(core, "removing a slot", error, restored, runs));
            }
        }
        let discarded = match self.discard_threads {
            Some(threads) => discard(&*self.backing, bytes, threads),
            None => self.backing.discard(bytes),
        };
        if let Err(source) = discarded {
            let restored = self.give_again(core, runs, runs);
            return Err(refuse(
                core,
                "giving memory back",
                source.into(),
                restored,
                runs,
            ));
        }
        for run in runs {
            self.dirty.mark(self.bytes_of(*run));
        }
        let blocks = runs.iter().map(|run| run.count).sum();
        core.sizes.plugged_size = core
            .sizes
            .plugged_size
            .saturating_sub(self.geometry.bytes(blocks));
        Ok(())
    }

    /// Undoes `take_away` after it has closed all `runs` and removed the slots of the first of them.
    fn give_again(
        &self,
        core: &mut Core,
        without_slots: &[BlockRange],
        runs: &[BlockRange],
    ) -> io::Result<()> {
        for run in runs {
            self.backing.reopen(self.bytes_of(*run))?;
        }
        for run in without_slots {
            core.slots.add(*run).map_err(|error| error.source)?;
        }
        self.tell_again(core, runs)?;
        self.grant_all(runs);
        Ok(())
    }

    /// Tells the observers that `runs`, which they have let go of, stay.
    fn tell_again(&self, core: &Core, runs: &[BlockRange]) -> io::Result<()> {
        for run in runs {
            core.observers
                .plugged(&self.run(*run))
                .map_err(|error| error.source)?;
        }
        Ok(())
    }

    fn grant_all(&self, runs: &[BlockRange]) {
        for run in runs {
            self.access.grant(*run);
        }
    }

    /// Adds an observer and tells it of everything that is plugged.
    pub(crate) fn add_observer(
        &self,
        observer: Arc<dyn PlugObserver>,
    ) -> Result<ObserverId, ObserverError> {
        observer.limits().check(&self.geometry)?;
        let mut core = self.lock();
        let told = all_or_none(
            &self.runs(),
            |run| observer.plugged(run),
            |run| observer.unplugging(run),
        );
        told.map_err(|error| ObserverError::Refused(error.source))?;
        Ok(core.observers.add(observer))
    }

    /// Tells an observer that everything goes, and forgets it.
    pub(crate) fn remove_observer(&self, id: ObserverId) -> Result<(), ObserverError> {
        let mut core = self.lock();
        let observer = core.observers.get(id).ok_or(ObserverError::Unknown)?;
        let told = all_or_none(
            &self.runs(),
            |run| observer.unplugging(run),
            |run| observer.plugged(run),
        );
        told.map_err(|error| ObserverError::Refused(error.source))?;
        core.observers.remove(id);
        Ok(())
    }

    /// The plugged runs, ascending. A caller that needs them to stay holds the lock.
    pub(crate) fn runs(&self) -> Vec<Run> {
        self.access
            .with_plugged(|plugged| plugged.runs().map(|run| self.run(run)).collect())
    }

    pub(crate) fn run(&self, range: BlockRange) -> Run {
        let offset = self.geometry.bytes(range.first);
        let host_address = self.backing.host_address().as_ptr() as u64;
        Run {
            offset,
            guest_address: self.geometry.address(range.first),
            // Inside the backing's mapping, so it does not wrap.
            host_address: host_address.wrapping_add(offset),
            len: self.geometry.bytes(range.count),
        }
    }

    fn bytes_of(&self, range: BlockRange) -> Range<u64> {
        self.geometry.bytes(range.first)..self.geometry.bytes(range.end())
    }
}

impl From<io::Error> for StepError {
    /// A call that does all or nothing.
    fn from(source: io::Error) -> Self {
        Self {
            source,
            undone: true,
        }
    }
}

/// A refusal because of `error`; if undoing what came before it failed, the device takes no more requests.
fn refuse(
    core: &mut Core,
    what: &'static str,
    error: StepError,
    restored: io::Result<()>,
    runs: &[BlockRange],
) -> Refusal {
    let failure = match restored {
        Err(error) => Some(error),
        Ok(()) if !error.undone => Some(io::Error::other("a step could not be undone")),
        Ok(()) => None,
    };
    if let Some(failure) = failure {
        log::error!("{what} failed and could not be undone, the device stops: {failure}");
        core.failure = Some(Arc::new(failure));
        core.suspect.extend_from_slice(runs);
    }
    Refusal::Host(what, error.source)
}

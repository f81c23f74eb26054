//! The device proper: which request gets which answer, and what happens on the way.

use std::fmt::{self, Debug};
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use virtio_mem_wire::{
    Answer, BlockRange, BlockState, Features, Geometry, MutableConfig, Request, Response, Span,
    UnknownRequest,
};

use crate::access::BlockAccess;
use crate::backing::{Backing, populate};
use crate::config_space::ConfigSpace;
use crate::counters::{Counters, Totals};
use crate::slots::{SlotError, SlotTable};

/// How the device tells the driver that something happened. The transport implements it.
///
/// Called from whatever thread serves the queue, resizes, or lets go of guest memory, and never after
/// [`reset`](crate::VirtioMem::reset) has returned. So that this can be promised, `reset` waits for a call
/// that is running: an implementation sets a bit and signals an event, and takes no lock under which the
/// transport calls the device.
pub trait Interrupt: Send + Sync {
    /// Used-buffer notification: the driver has answers to read.
    fn used_buffer(&self);

    /// Configuration-change notification: the driver should read the configuration space.
    fn config_change(&self);
}

/// The state of one device, shared by its queue handler, its handles and its regions.
pub(crate) struct Device {
    pub(crate) geometry: Geometry,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) access: Arc<BlockAccess>,
    pub(crate) config: ConfigSpace,
    pub(crate) offered: Features,
    pub(crate) acknowledged: AtomicU64,
    pub(crate) totals: Totals,
    pub(crate) slot_size: u64,
    populate_threads: Option<NonZero<usize>>,
    /// How far the usable region reaches beyond the requested size.
    usable_extent: u64,
    core: Mutex<Core>,
    changed: Condvar,
    /// The epoch of the queue handler that may touch the queue. Held while it does.
    active: Mutex<Option<u64>>,
    epochs: AtomicU64,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

/// What changes with requests and resizes, under one lock: the device does one thing at a time.
#[derive(Debug)]
struct Core {
    slots: SlotTable,
    sizes: MutableConfig,
    frozen: bool,
    /// The last answer to the driver and when it was given.
    last_answer: Option<(Answer, Instant)>,
    /// BUSY was answered and the driver has not been told that trying again is worth it.
    busy: bool,
    failure: Option<Arc<io::Error>>,
}

/// What an operator sees of a device, all at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Bytes the device asks the driver to have plugged.
    pub requested_size: u64,
    /// Bytes plugged.
    pub plugged_size: u64,
    /// Bytes of the region, from its start, in which blocks may be plugged.
    pub usable_region_size: u64,
    /// Hypervisor memory slots in use.
    pub slot_count: u64,
    /// Whether requests are held off, see [`Handle::freeze`](crate::Handle::freeze).
    pub frozen: bool,
    /// The last answer to PLUG, UNPLUG or UNPLUG ALL, and when it was given.
    pub last_answer: Option<(Answer, Instant)>,
    /// A host failure that could not be undone. The device answers BUSY from then on.
    pub failure: Option<Arc<io::Error>>,
}

/// System reset left the blocks as they were.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// Between [`freeze`](crate::Handle::freeze) and [`thaw`](crate::Handle::thaw).
    #[error("the device is frozen")]
    Frozen,
    /// Another device of the VMM holds memory of a plugged block, or an earlier failure stopped the device.
    #[error("device memory is in use by the VMM")]
    InUse,
    /// The host refused.
    #[error("device memory could not be taken back")]
    Host(#[source] io::Error),
}

/// Why a request was not carried out.
#[derive(Debug)]
enum Refusal {
    /// The guest is told so and nothing else happens.
    Answer(Response),
    /// The host could not do it; everything was undone, or `failure` of the core says what was not.
    Host(&'static str, io::Error),
}

impl From<Response> for Refusal {
    fn from(response: Response) -> Self {
        Self::Answer(response)
    }
}

/// What the builder has checked.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) geometry: Geometry,
    pub(crate) node_id: u16,
    pub(crate) offered: Features,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) slots: SlotTable,
    pub(crate) slot_size: u64,
    pub(crate) populate_threads: Option<NonZero<usize>>,
    pub(crate) usable_extent: u64,
    pub(crate) requested_size: u64,
}

impl Device {
    pub(crate) fn new(setup: Setup, this: Weak<Self>) -> Self {
        let geometry = setup.geometry;
        let on_unpinned = move || {
            if let Some(device) = this.upgrade() {
                device.notify_if_was_busy();
            }
        };
        let access = BlockAccess::new(geometry.block_count(), Box::new(on_unpinned));
        let device = Self {
            geometry,
            access: Arc::new(access),
            config: ConfigSpace::new(geometry, setup.node_id),
            backing: setup.backing,
            offered: setup.offered,
            acknowledged: AtomicU64::new(0),
            totals: Totals::default(),
            slot_size: setup.slot_size,
            populate_threads: setup.populate_threads,
            usable_extent: setup.usable_extent,
            core: Mutex::new(Core {
                slots: setup.slots,
                sizes: MutableConfig::default(),
                frozen: false,
                last_answer: None,
                busy: false,
                failure: None,
            }),
            changed: Condvar::new(),
            active: Mutex::new(None),
            epochs: AtomicU64::new(0),
            interrupt: Mutex::new(None),
        };
        device.set_requested(&mut device.lock(), setup.requested_size);
        device
    }

    /// Answers one request (virtio 1.4, 5.15.6.1 … 5.15.6.4). First match wins, in the order written here.
    pub(crate) fn process(&self, request: Result<Request, UnknownRequest>) -> Response {
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                if self.totals.unknown_requests.count() {
                    log::debug!("{error}");
                }
                return Response::Error;
            }
        };
        let mut core = self.lock();
        let result = match request {
            Request::Plug(span) => self.plug(&mut core, span),
            Request::Unplug(span) => self.unplug(&mut core, span),
            Request::UnplugAll => self.unplug_all(&mut core),
            Request::State(span) => self.state(&core, span),
        };
        let response = result.unwrap_or_else(|refusal| match refusal {
            Refusal::Answer(response) => response,
            Refusal::Host(what, error) => {
                if self.totals.host_failures.count() {
                    log::warn!("{request:?}: {what}: {error}");
                }
                Response::Busy
            }
        });
        let answer = response.answer();
        self.totals.count_request(request.kind(), answer);
        if !matches!(request, Request::State(_)) {
            core.last_answer = Some((answer, Instant::now()));
            core.busy |= answer == Answer::Busy;
            self.config.publish(core.sizes);
            self.changed.notify_all();
        }
        response
    }

    /// System reset: all blocks are unplugged (D-22), and the usable region is cut to what is requested.
    pub(crate) fn system_reset(&self) -> Result<(), ResetError> {
        let mut core = self.lock();
        let result = self.unplug_all(&mut core);
        self.config.publish(core.sizes);
        self.changed.notify_all();
        match result {
            Ok(_) => Ok(()),
            Err(Refusal::Host(_, error)) => Err(ResetError::Host(error)),
            Err(Refusal::Answer(_)) if core.frozen => Err(ResetError::Frozen),
            Err(Refusal::Answer(_)) => Err(ResetError::InUse),
        }
    }

    fn plug(&self, core: &mut Core, span: Span) -> Result<Response, Refusal> {
        let range = self.locate(core, span, BlockState::Unplugged)?;
        let plugged_size = core
            .sizes
            .plugged_size
            .saturating_add(self.geometry.bytes(range.count));
        if plugged_size > core.sizes.requested_size {
            return Err(Response::Nack.into());
        }
        self.check_available(core)?;
        self.check_runs(range, true)?;
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
            && let Err(error) = populate(&*self.backing, bytes.clone(), threads)
        {
            return Err(self.refuse(core, "populating memory", error, true, take_back()));
        }
        if let Err(error) = core.slots.add(range) {
            let SlotError { source, undone } = error;
            return Err(self.refuse(core, "mapping a slot", source, undone, take_back()));
        }
        self.access.grant(range);
        core.sizes.plugged_size = plugged_size;
        Ok(Response::Ack)
    }

    fn unplug(&self, core: &mut Core, span: Span) -> Result<Response, Refusal> {
        let range = self.locate(core, span, BlockState::Plugged)?;
        self.check_available(core)?;
        self.check_runs(range, false)?;
        self.take_away(core, range, &[range])?;
        Ok(Response::Ack)
    }

    fn unplug_all(&self, core: &mut Core) -> Result<Response, Refusal> {
        self.check_available(core)?;
        let runs: Vec<_> = self.access.with_plugged(|plugged| plugged.runs().collect());
        if let (Some(first), Some(last)) = (runs.first(), runs.last()) {
            // One call over everything: what lies between the runs is closed and empty already.
            let hull = BlockRange {
                first: first.first,
                count: last.end() - first.first,
            };
            self.take_away(core, hull, &runs)?;
        }
        // D-43; no notification is due (D-09).
        core.sizes.usable_region_size = self.usable_for(core.sizes.requested_size);
        Ok(Response::Ack)
    }

    fn state(&self, core: &Core, span: Span) -> Result<Response, Refusal> {
        let range = self.locate_any(core, span)?;
        let state = self.access.with_plugged(|plugged| plugged.state(range));
        Ok(Response::AckState(state))
    }

    /// Unplugs the plugged `runs`, which lie in `hull`, from users, guest and host, or nothing of them.
    ///
    /// Closing comes first and giving back last: a vCPU that races this cannot fault pages back in, and
    /// nothing that can fail is left to do once contents are gone.
    fn take_away(
        &self,
        core: &mut Core,
        hull: BlockRange,
        runs: &[BlockRange],
    ) -> Result<(), Refusal> {
        let bytes = self.bytes_of(hull);
        self.access.revoke(hull).map_err(|_pinned| Response::Busy)?;
        if let Err(error) = self.backing.close(bytes.clone()) {
            self.grant_all(runs);
            return Err(Refusal::Host("closing memory", error));
        }
        for (done, run) in runs.iter().enumerate() {
            if let Err(error) = core.slots.remove(*run) {
                let restored = self.give_again(core, &runs[..done], runs);
                return Err(self.refuse(
                    core,
                    "removing a slot",
                    error.source,
                    error.undone,
                    restored,
                ));
            }
        }
        if let Err(error) = self.backing.discard(bytes) {
            let restored = self.give_again(core, runs, runs);
            return Err(self.refuse(core, "giving memory back", error, true, restored));
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
            self.backing.open(self.bytes_of(*run))?;
        }
        for run in without_slots {
            core.slots.add(*run).map_err(|error| error.source)?;
        }
        self.grant_all(runs);
        Ok(())
    }

    fn grant_all(&self, runs: &[BlockRange]) {
        for run in runs {
            self.access.grant(*run);
        }
    }

    /// A refusal for `error`; if undoing what came before it failed, the device takes no more requests.
    fn refuse(
        &self,
        core: &mut Core,
        what: &'static str,
        error: io::Error,
        undone: bool,
        restored: io::Result<()>,
    ) -> Refusal {
        let failure = match restored {
            Err(error) => Some(error),
            Ok(()) if !undone => Some(io::Error::other("a memory slot could not be restored")),
            Ok(()) => None,
        };
        if let Some(failure) = failure {
            log::error!("{what} failed and could not be undone, the device stops: {failure}");
            core.failure = Some(Arc::new(failure));
        }
        Refusal::Host(what, error)
    }

    /// The blocks of `span`, all of which must be in state `wanted` (D-26, D-27, D-33, D-34).
    fn locate(&self, core: &Core, span: Span, wanted: BlockState) -> Result<BlockRange, Refusal> {
        let range = self.locate_any(core, span)?;
        match self.access.with_plugged(|plugged| plugged.state(range)) {
            state if state == wanted => Ok(range),
            _ => Err(Response::Error.into()),
        }
    }

    /// The blocks of `span`, if it names whole blocks of the usable region (D-26, D-33, D-46).
    fn locate_any(&self, core: &Core, span: Span) -> Result<BlockRange, Refusal> {
        self.geometry
            .locate(span, core.sizes.usable_region_size)
            .map_err(|_| Response::Error.into())
    }

    fn check_available(&self, core: &Core) -> Result<(), Refusal> {
        match core.frozen || core.failure.is_some() {
            true => Err(Response::Busy.into()),
            false => Ok(()),
        }
    }

    /// Keeps the number of open runs in the backing's limit, so that protecting memory cannot fail half-way.
    fn check_runs(&self, range: BlockRange, insert: bool) -> Result<(), Refusal> {
        let runs = self
            .access
            .with_plugged(|plugged| plugged.run_count_after(range, insert));
        match runs > self.backing.max_open_runs() {
            true => Err(Refusal::Host(
                "too many separate runs of plugged blocks",
                io::ErrorKind::OutOfMemory.into(),
            )),
            false => Ok(()),
        }
    }

    fn bytes_of(&self, range: BlockRange) -> Range<u64> {
        self.geometry.bytes(range.first)..self.geometry.bytes(range.end())
    }

    /// The usable region for a requested size (D-04, N-04): room for whole memory blocks of the guest
    /// around the requested size, so that the driver is free where to plug.
    fn usable_for(&self, requested_size: u64) -> u64 {
        match requested_size {
            0 => 0,
            _ => requested_size
                .saturating_add(self.usable_extent)
                .min(self.geometry.region_size()),
        }
    }

    fn set_requested(&self, core: &mut Core, requested_size: u64) {
        core.sizes.requested_size = requested_size;
        // Grows at once, shrinks with UNPLUG ALL only (D-08).
        let usable = self.usable_for(requested_size);
        core.sizes.usable_region_size = core.sizes.usable_region_size.max(usable);
        self.config.publish(core.sizes);
        self.changed.notify_all();
    }

    /// Sets the requested size, which the caller has checked, and tells the driver (D-09).
    pub(crate) fn resize(&self, requested_size: u64) {
        self.set_requested(&mut self.lock(), requested_size);
        self.notify_config();
    }

    pub(crate) fn set_frozen(&self, frozen: bool) {
        self.lock().frozen = frozen;
        if !frozen {
            self.notify_if_was_busy();
        }
    }

    /// One config-change notification after BUSY, once its cause is gone: Linux tries again at once then,
    /// and after 50 to 300 s else.
    pub(crate) fn notify_if_was_busy(&self) {
        let was_busy = std::mem::take(&mut self.lock().busy);
        if was_busy {
            self.notify_config();
        }
    }

    pub(crate) fn notify_config(&self) {
        if let Some(interrupt) = &*self.lock_interrupt() {
            self.totals.config_notifications.count();
            interrupt.config_change();
        }
    }

    pub(crate) fn status(&self) -> Status {
        Self::status_of(&self.lock())
    }

    /// Waits until `done` says so of the status, or until `deadline`; the status then, and whether it is done.
    pub(crate) fn wait(&self, deadline: Instant, done: impl Fn(&Status) -> bool) -> (Status, bool) {
        let mut core = self.lock();
        loop {
            let status = Self::status_of(&core);
            let left = deadline.saturating_duration_since(Instant::now());
            if done(&status) {
                return (status, true);
            }
            if left.is_zero() {
                return (status, false);
            }
            core = match self.changed.wait_timeout(core, left) {
                Ok((core, _)) => core,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn status_of(core: &Core) -> Status {
        Status {
            requested_size: core.sizes.requested_size,
            plugged_size: core.sizes.plugged_size,
            usable_region_size: core.sizes.usable_region_size,
            slot_count: core.slots.mapped_count(),
            frozen: core.frozen,
            last_answer: core.last_answer,
            failure: core.failure.clone(),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        self.totals.snapshot()
    }

    /// Makes a new queue handler the only one; its epoch.
    pub(crate) fn start(&self, interrupt: Arc<dyn Interrupt>) -> u64 {
        let epoch = self.epochs.fetch_add(1, Ordering::Relaxed);
        *self.lock_active() = Some(epoch);
        *self.lock_interrupt() = Some(interrupt);
        epoch
    }

    /// After this no queue handler touches a queue.
    pub(crate) fn stop(&self) {
        *self.lock_active() = None;
        *self.lock_interrupt() = None;
    }

    pub(crate) fn is_active(&self) -> bool {
        self.lock_active().is_some()
    }

    /// Runs `f` if the queue handler of `epoch` may touch its queue; `None` if it may not any more.
    pub(crate) fn while_active<R>(&self, epoch: u64, f: impl FnOnce() -> R) -> Option<R> {
        let active = self.lock_active();
        (*active == Some(epoch)).then(f)
    }

    pub(crate) fn used_buffer(&self) {
        if let Some(interrupt) = &*self.lock_interrupt() {
            self.totals.used_notifications.count();
            interrupt.used_buffer();
        }
    }

    // None of these locks is held across anything that panics on what a guest does; should a trait of the
    // VMM panic, what it left is still consistent, because each step is complete before the next.
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_active(&self) -> MutexGuard<'_, Option<u64>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let runs: Vec<_> = self.access.with_plugged(|plugged| plugged.runs().collect());
        let mut core = self.lock();
        for run in runs {
            // The backing goes away with the device, so the guest may not see it any longer.
            if let Err(error) = core.slots.remove(run) {
                log::error!("cannot remove a memory slot of a dropped device: {error}");
            }
        }
    }
}

impl Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("geometry", &self.geometry)
            .field("sizes", &self.config.load())
            .finish_non_exhaustive()
    }
}

//! The device proper: which request gets which answer, and what happens on the way.

use std::fmt::{self, Debug};
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use virtio_mem_wire::{
    Answer, BlockMap, BlockRange, BlockState, Features, Geometry, MutableConfig, Request,
    RequestKind, Response, Span, UnknownRequest,
};

use crate::access::BlockAccess;
use crate::backing::Backing;
use crate::busy::{Busy, BusyCause};
use crate::config_space::ConfigSpace;
use crate::counters::{Counters, Total, Totals};
use crate::dirty::DirtyBitmaps;
use crate::events::SizeListeners;
use crate::latency::Latencies;
use crate::observers::Observers;
use crate::resize::Operation;
use crate::slots::SlotTable;
use crate::view::{View, Views};

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
    pub(crate) populate_threads: Option<NonZero<usize>>,
    pub(crate) discard_threads: Option<NonZero<usize>>,
    pub(crate) latencies: Mutex<Latencies>,
    pub(crate) dirty: DirtyBitmaps,
    pub(crate) size_listeners: SizeListeners,
    /// Whether system reset leaves blocks as they are (D-22 is a SHOULD).
    keep_on_system_reset: bool,
    /// How far the usable region reaches beyond the requested size.
    usable_extent: u64,
    core: Mutex<Core>,
    pub(crate) busy: Mutex<Busy>,
    views: Views,
    /// The epoch of the queue handler that may touch the queue. Held while it does.
    active: Mutex<Option<u64>>,
    epochs: AtomicU64,
    /// Whether there is such a handler, for those who cannot wait until it lets go of `active`.
    ready: AtomicBool,
    /// Whether the next driver to be served is to be told to look at the configuration.
    pub(crate) owed: AtomicBool,
    /// How many want the queue handler to let go of the queue after the request it is at.
    pausing: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

/// What changes with requests and resizes, under one lock: the device does one thing at a time.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) slots: SlotTable,
    pub(crate) observers: Observers,
    pub(crate) sizes: MutableConfig,
    pub(crate) frozen: bool,
    pub(crate) removed: bool,
    /// The resize that asks for `sizes.requested_size`.
    pub(crate) operation: Arc<Operation>,
    /// When `sizes.plugged_size` last changed.
    pub(crate) last_change: Instant,
    /// The last answer to the driver and when it was given.
    pub(crate) last_answer: Option<(Answer, Instant)>,
    /// When the driver was first refused since the last ACK or resize.
    pub(crate) refused_since: Option<Instant>,
    pub(crate) failure: Option<Arc<io::Error>>,
    /// Runs of which nobody knows any more who has them, after a failure that could not be undone.
    pub(crate) suspect: Vec<BlockRange>,
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
    /// The PLUG, UNPLUG or UNPLUG ALL that is being carried out, and since when. All else is as it was before.
    pub serving: Option<(RequestKind, Instant)>,
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
pub(crate) enum Refusal {
    /// The guest is told so and nothing else happens.
    Answer(Response),
    /// It could be done at another time.
    Busy(BusyCause),
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
    pub(crate) discard_threads: Option<NonZero<usize>>,
    pub(crate) observers: Observers,
    pub(crate) keep_on_system_reset: bool,
    pub(crate) usable_extent: u64,
    pub(crate) requested_size: u64,
}

impl Device {
    pub(crate) fn new(setup: Setup, this: Weak<Self>) -> Self {
        let geometry = setup.geometry;
        let on_unpinned = move || {
            if let Some(device) = this.upgrade() {
                device.end_busy(BusyCause::Pinned);
            }
        };
        let access = BlockAccess::new(geometry.block_count(), Box::new(on_unpinned));
        let core = Core {
            slots: setup.slots,
            observers: setup.observers,
            sizes: MutableConfig::default(),
            frozen: false,
            removed: false,
            operation: Operation::new(setup.requested_size),
            last_change: Instant::now(),
            last_answer: None,
            refused_since: None,
            failure: None,
            suspect: Vec::new(),
        };
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
            discard_threads: setup.discard_threads,
            latencies: Mutex::default(),
            dirty: DirtyBitmaps::default(),
            size_listeners: SizeListeners::default(),
            keep_on_system_reset: setup.keep_on_system_reset,
            usable_extent: setup.usable_extent,
            views: Views::new(View::of(&core)),
            core: Mutex::new(core),
            busy: Mutex::default(),
            active: Mutex::new(None),
            epochs: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            owed: AtomicBool::new(false),
            pausing: AtomicU32::new(0),
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
                if self.count_event(&self.totals.unknown_requests, "unknown_request") {
                    log::debug!("{error}");
                }
                return Response::Error;
            }
        };
        let started = Instant::now();
        // Dropped after the lock, for those who wait already.
        let _shows_panic = ShowsPanic(self);
        let mut core = self.lock();
        if !matches!(request, Request::State(_)) {
            self.views.begin(request.kind(), started);
        }
        let held_before = self.holdings(&core);
        let result = match request {
            Request::Plug(span) => self.plug(&mut core, span),
            Request::Unplug(span) => self.unplug(&mut core, span),
            Request::UnplugAll => self.unplug_all(&mut core),
            Request::State(span) => self.state(&core, span),
        };
        let response = result.unwrap_or_else(|refusal| match refusal {
            Refusal::Answer(response) => response,
            Refusal::Busy(cause) => {
                self.begin_busy(cause);
                Response::Busy
            }
            Refusal::Host(what, error) => {
                if self.count_event(&self.totals.host_failures, "host_failure") {
                    log::warn!("{request:?}: {what}: {error}");
                }
                self.begin_busy(BusyCause::Host);
                Response::Busy
            }
        });
        let answer = response.answer();
        if !matches!(request, Request::State(_)) {
            let now = Instant::now();
            core.last_answer = Some((answer, now));
            core.refused_since = match answer {
                Answer::Ack => None,
                Answer::Nack | Answer::Busy | Answer::Error => core.refused_since.or(Some(now)),
            };
            self.publish(&mut core);
        }
        let gave_back = held_before
            .iter()
            .zip(self.holdings(&core))
            .any(|(before, after)| after < *before);
        drop(core);
        self.count(request.kind(), answer, started.elapsed());
        if gave_back {
            self.end_busy(BusyCause::Host);
        }
        if !self.access.is_wanted() {
            // The last pin may have gone between the refusal and `begin_busy`.
            self.end_busy(BusyCause::Pinned);
        }
        response
    }

    /// What the device holds of the host's: bytes, slots, and mappings.
    fn holdings(&self, core: &Core) -> [u64; 3] {
        [
            core.sizes.plugged_size,
            core.slots.mapped_count(),
            self.access.with_plugged(BlockMap::run_count),
        ]
    }

    /// System reset: all blocks are unplugged (D-22), and the usable region is cut to what is requested.
    pub(crate) fn system_reset(&self) -> Result<(), ResetError> {
        if self.keep_on_system_reset {
            return Ok(());
        }
        let mut core = self.lock();
        let result = self.unplug_all(&mut core);
        self.publish(&mut core);
        match result {
            Ok(_) => Ok(()),
            Err(Refusal::Host(_, error)) => Err(ResetError::Host(error)),
            Err(Refusal::Busy(BusyCause::Frozen)) => Err(ResetError::Frozen),
            Err(Refusal::Busy(_) | Refusal::Answer(_)) => Err(ResetError::InUse),
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
        self.give(core, range)?;
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
        match core.frozen {
            true => Err(Refusal::Busy(BusyCause::Frozen)),
            false if core.failure.is_some() => Err(Refusal::Busy(BusyCause::Failed)),
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

    /// Sets the requested size, which the caller has checked; the driver is to be told without the lock.
    pub(crate) fn set_requested(&self, core: &mut Core, requested_size: u64) {
        core.sizes.requested_size = requested_size;
        core.refused_since = None;
        // Grows at once, shrinks with UNPLUG ALL only (D-08).
        let usable = self.usable_for(requested_size);
        core.sizes.usable_region_size = core.sizes.usable_region_size.max(usable);
        self.publish(core);
    }

    /// Lets everybody see the sizes as they are now: driver, waiters, listeners, and the resize under way.
    pub(crate) fn publish(&self, core: &mut Core) {
        let before = self.config.load();
        if core.sizes.plugged_size != before.plugged_size {
            core.last_change = Instant::now();
        }
        self.config.publish(core.sizes);
        self.views.show(core);
        if core.sizes != before {
            self.size_listeners.signal();
            self.publish_gauges(&core.sizes);
        }
    }

    pub(crate) fn notify_config(&self) {
        if let Some(interrupt) = &*self.lock_interrupt() {
            self.count_event(&self.totals.config_notifications, "config_notification");
            interrupt.config_change();
        }
    }

    /// What everybody may see, without waiting for a request.
    pub(crate) fn views(&self) -> &Views {
        self.show_panic();
        &self.views
    }

    /// Lets everybody see `core`.
    pub(crate) fn show(&self, core: &Core) {
        self.views.show(core);
    }

    /// Lets everybody see that a part of the VMM has panicked under the lock, which could not show it itself.
    fn show_panic(&self) {
        if self.core.is_poisoned() {
            drop(self.lock());
        }
    }

    /// Counts one in `total`, and as `event` for the `metrics` facade; whether to log it, see [`Total::count`].
    pub(crate) fn count_event(&self, total: &Total, event: &'static str) -> bool {
        self.publish_event(event);
        total.count()
    }

    pub(crate) fn counters(&self) -> Counters {
        self.totals.snapshot()
    }

    /// Makes a new queue handler the only one; its epoch.
    pub(crate) fn start(&self, interrupt: Arc<dyn Interrupt>) -> u64 {
        let epoch = self.epochs.fetch_add(1, Ordering::Relaxed);
        *self.lock_active() = Some(epoch);
        *self.lock_interrupt() = Some(interrupt);
        self.ready.store(true, Ordering::Release);
        self.publish_gauges(&self.config.load());
        // The driver of a restored device runs already and does not probe again: what was set since it was
        // saved, and the end of a BUSY it was told there, it hears of here.
        match self.owed.swap(false, Ordering::Relaxed) {
            true => {
                self.forget_busy();
                self.notify_config();
            }
            false => self.end_busy(BusyCause::Frozen),
        }
        epoch
    }

    /// After this no queue handler touches a queue; it finishes the request it is at.
    pub(crate) fn stop(&self) {
        self.pause();
        *self.lock_active() = None;
        self.resume();
        self.ready.store(false, Ordering::Release);
        *self.lock_interrupt() = None;
        self.forget_busy();
        // What this driver was answered is not the next one's business.
        let mut core = self.lock();
        core.last_answer = None;
        core.refused_since = None;
        self.views.show(&core);
    }

    /// From here to [`resume`](Self::resume) the queue handler begins no other request.
    pub(crate) fn pause(&self) {
        self.pausing.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn resume(&self) {
        self.pausing.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::Relaxed) > 0
    }

    /// Whether a driver is being served. Never waits.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
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
            self.count_event(&self.totals.used_notifications, "used_notification");
            interrupt.used_buffer();
        }
    }

    /// A trait of the VMM that panics leaves a request half done: the device takes no more then.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned| {
            let mut core = poisoned.into_inner();
            let panicked = || Arc::new(io::Error::other("a part of the VMM panicked"));
            core.failure.get_or_insert_with(panicked);
            self.core.clear_poison();
            self.views.show(&core);
            core
        })
    }

    // Nothing is left half done under these two.
    fn lock_active(&self) -> MutexGuard<'_, Option<u64>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is served when a part of the VMM panics has failed for everybody to see.
struct ShowsPanic<'a>(&'a Device);

impl Drop for ShowsPanic<'_> {
    fn drop(&mut self) {
        self.0.show_panic();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut core = self.lock();
        let suspect = std::mem::take(&mut core.suspect);
        let suspect = suspect.into_iter().map(|range| self.run(range));
        for run in self.runs().into_iter().chain(suspect) {
            // The backing goes away with the device, so nobody may see it any longer.
            if let Err(error) = core.observers.unplugging(&run) {
                log::error!("an observer keeps memory of a dropped device: {error}");
            }
        }
        if let Err(error) = core.slots.unmap_all() {
            log::error!("the guest keeps memory of a dropped device, which is leaked: {error}");
            std::mem::forget(Arc::clone(&self.backing));
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

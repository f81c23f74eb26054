//! A guest with memory devices, before and after it is started.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;
use virtio_mem::wire::{Answer, BlockMap, Geometry, RequestKind};
use virtio_mem::{Latencies, State, VirtioMem};
use vmem_guest::abi::DriverState;

use super::{
    ControlError, Controller, DeviceOptions, Event, Events, GuestOptions, Operation, Reason,
};
use crate::demo::DemoError;
use crate::{BlockUse, Machine, Outcome, Report, StartError};

/// How long a guest may take to say how it is before what it said last has to do.
const REPORT_TIMEOUT: Duration = Duration::from_millis(250);

/// How long a guest may take to verify its pages at its end.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// What cannot be done to an instance.
#[derive(Debug, Error)]
pub enum InstanceError {
    /// The guest must run for this.
    #[error("not possible before the guest is started")]
    NotStarted,
    /// The guest must not run yet for this.
    #[error("not possible after the guest was started")]
    Started,
    /// There is no such device.
    #[error("there is no memory device {0:?}")]
    UnknownDevice(String),
    /// The guest is gone.
    #[error("not possible after the guest has ended")]
    Ended,
    /// The options do not go together, or the guest does not start with them.
    #[error(transparent)]
    Guest(#[from] DemoError),
    /// See [`ControlError`].
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host lacks something.
    #[error("thread")]
    Host(#[from] io::Error),
}

impl From<StartError> for InstanceError {
    fn from(error: StartError) -> Self {
        Self::Guest(error.into())
    }
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum RunState {
    /// The guest can still be configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The guest runs.
    Running,
    /// The guest has come to its end, whatever that was.
    Ended,
}

/// What there is to know about a memory device: sizes are bytes, or MiB rounded down where the name says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryStatus {
    /// The device's name.
    pub id: String,
    /// The proximity domain the device names.
    pub node_id: Option<u16>,
    /// The region.
    pub total_size_mib: u64,
    /// A device block.
    pub block_size_mib: u64,
    /// A hypervisor memory slot.
    pub slot_size_mib: u64,
    /// What is plugged.
    pub plugged_size_mib: u64,
    /// What the driver is asked to have plugged.
    pub requested_size_mib: u64,
    /// The region.
    pub total_size: u64,
    /// A device block.
    pub block_size: u64,
    /// A hypervisor memory slot.
    pub slot_size: u64,
    /// What is plugged.
    pub plugged_size: u64,
    /// What the driver is asked to have plugged.
    pub requested_size: u64,
    /// From the region's start, where blocks may be plugged.
    pub usable_region_size: u64,
    /// Host memory behind the region.
    pub resident_size: u64,
    /// Hypervisor memory slots in use.
    pub slot_count: u64,
    /// What the device has answered since it was made, by request and answer; what there was none of is left out.
    pub requests: Vec<RequestStatus>,
    /// The request the host is carrying out; sizes are as they were before.
    pub serving: Option<Serving>,
    /// Whether requests are held off.
    pub frozen: bool,
    /// Where the guest is in its life.
    pub state: RunState,
    /// Why what is plugged is not what is requested, if it is not.
    pub reason: Option<Reason>,
    /// What the guest says, once it runs.
    pub guest: Option<GuestStatus>,
}

impl MemoryStatus {
    /// What a device says of itself; what its guest has to do with is left out.
    ///
    /// Host memory is for the caller to look for: that takes a while in a large region, and there may be none yet.
    fn of(id: &str, device: &VirtioMem, state: RunState, resident_size: u64) -> Self {
        let geometry = device.geometry();
        let handle = device.handle();
        let status = handle.status();
        Self {
            id: id.into(),
            node_id: device.node_id(),
            total_size_mib: geometry.region_size() >> 20,
            block_size_mib: geometry.block_size() >> 20,
            slot_size_mib: device.slot_size() >> 20,
            plugged_size_mib: status.plugged_size >> 20,
            requested_size_mib: status.requested_size >> 20,
            total_size: geometry.region_size(),
            block_size: geometry.block_size(),
            slot_size: device.slot_size(),
            plugged_size: status.plugged_size,
            requested_size: status.requested_size,
            usable_region_size: status.usable_region_size,
            resident_size,
            slot_count: status.slot_count,
            requests: RequestStatus::list(&handle.latencies()),
            serving: status.serving.map(|(request, since)| Serving {
                request: request.name(),
                milliseconds: millis(since.elapsed()),
            }),
            frozen: status.frozen,
            state,
            reason: None,
            guest: None,
        }
    }
}

/// A request that is being carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Serving {
    /// Its type.
    pub request: &'static str,
    /// For how long already.
    pub milliseconds: u64,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Requests of one type with one answer, and how long they took: nanoseconds, percentiles at most twice too large.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestStatus {
    /// The type.
    pub request: &'static str,
    /// The answer.
    pub answer: &'static str,
    /// Number of them.
    pub count: u64,
    /// All of them together.
    pub total_ns: u64,
    /// Half of them took no longer.
    pub p50_ns: u64,
    /// All but one in a hundred took no longer.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl RequestStatus {
    fn list(latencies: &Latencies) -> Vec<Self> {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let pairs = RequestKind::ALL
            .into_iter()
            .flat_map(|kind| Answer::ALL.map(|answer| (kind, answer)));
        let described = pairs.map(|(kind, answer)| {
            let histogram = latencies.of(kind, answer);
            Self {
                request: kind.name(),
                answer: answer.name(),
                count: histogram.count(),
                total_ns: nanos(histogram.total),
                p50_ns: nanos(histogram.percentile(50)),
                p99_ns: nanos(histogram.percentile(99)),
                max_ns: nanos(histogram.max),
            }
        });
        described.filter(|requests| requests.count > 0).collect()
    }
}

/// What the guest says of itself and a device. Not to be relied on: a guest writes what it likes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GuestStatus {
    /// What its driver makes of the target; `None` if it says nonsense.
    pub driver_state: Option<&'static str>,
    /// Bytes its driver believes plugged.
    pub plugged_size: u64,
    /// The node the device's memory is on.
    pub node: u64,
    /// Bytes of hotplugged memory of that node that its page allocator works with.
    pub online_size: u64,
    /// Bytes between the target and what is plugged that its driver calls out of reach.
    pub unreachable_size: u64,
    /// Pages it has moved out of memory that was being unplugged.
    pub pages_moved: u64,
    /// Pages its workers hold now.
    pub pages_held: u64,
    /// Pages of those that cannot be moved for now.
    pub pages_unmovable: u64,
    /// Pages read back and found right.
    pub pages_verified: u64,
    /// Pages read back and found wrong.
    pub pages_wrong: u64,
    /// Why its driver failed, or it panicked, if so.
    pub message: Option<String>,
}

impl From<&Report> for GuestStatus {
    fn from(report: &Report) -> Self {
        let sum = |of: fn(&crate::WorkerReport) -> u64| report.workers.iter().map(of).sum();
        Self {
            driver_state: report.driver_state.map(|state| match state {
                DriverState::Booting => "booting",
                DriverState::Converging => "converging",
                DriverState::Settled => "settled",
                DriverState::Stalled => "stalled",
                DriverState::Failed => "failed",
            }),
            plugged_size: report.plugged_size,
            node: report.node,
            online_size: report.online_size,
            unreachable_size: report.unreachable,
            pages_moved: report.pages_moved,
            pages_held: sum(|worker| worker.pages_held),
            pages_unmovable: sum(|worker| worker.pages_unmovable),
            pages_verified: sum(|worker| worker.pages_verified),
            pages_wrong: sum(|worker| worker.pages_wrong),
            message: report.message.clone(),
        }
    }
}

/// A guest, started or not. All methods may be called from any thread.
#[derive(Debug)]
pub struct Instance {
    phase: RwLock<Phase>,
    events: Events,
    ended: Option<Sender<()>>,
}

#[derive(Debug)]
enum Phase {
    NotStarted(Box<NotStarted>),
    Started(Box<Started>),
    /// The machine is gone.
    Stopped,
}

#[derive(Clone, Debug)]
struct NotStarted {
    options: GuestOptions,
    /// What each device is to begin with.
    states: Vec<Option<State>>,
}

#[derive(Debug)]
struct Started {
    // Dropped first: their threads use the devices.
    controllers: Vec<Controller>,
    machine: Machine,
}

impl Started {
    /// Of each device.
    fn reports(&self) -> Vec<Report> {
        let reports = self.machine.reports(REPORT_TIMEOUT);
        reports.unwrap_or_else(|_| self.machine.progresses())
    }

    fn controller(&self, id: &str) -> Result<(usize, &Controller), InstanceError> {
        let mut controllers = self.controllers.iter().enumerate();
        let found = controllers.find(|(_, controller)| controller.id() == id);
        found.ok_or_else(|| InstanceError::UnknownDevice(id.into()))
    }

    fn reason(&self, controller: &Controller, report: &Report) -> Option<Reason> {
        let status = controller.device().status();
        Reason::of(&status, Some(report), self.machine.outcome().as_ref())
    }
}

impl Instance {
    /// A guest that is not started yet.
    ///
    /// # Errors
    ///
    /// [`InstanceError::Guest`] if the options do not go together.
    pub fn new(options: impl Into<GuestOptions>) -> Result<Self, InstanceError> {
        let options = options.into();
        options.with_each()?;
        let states = vec![None; options.devices().len()];
        let phase = NotStarted { options, states };
        Ok(Self {
            phase: RwLock::new(Phase::NotStarted(Box::new(phase))),
            events: Events::default(),
            ended: None,
        })
    }

    /// With somebody who is told when the guest ends.
    #[must_use]
    pub fn telling(self, ended: Sender<()>) -> Self {
        Self {
            ended: Some(ended),
            ..self
        }
    }

    /// What happens to the guest and its devices.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The names of the devices; none once the guest is gone.
    #[must_use]
    pub fn devices(&self) -> Vec<String> {
        match &*self.read() {
            Phase::NotStarted(phase) => {
                let devices = phase.options.devices().iter();
                devices.map(|device| device.id.clone()).collect()
            }
            Phase::Started(started) => {
                let controllers = started.controllers.iter();
                controllers.map(|device| device.id().to_owned()).collect()
            }
            Phase::Stopped => Vec::new(),
        }
    }

    /// Changes options of a device of a guest that is not started, which takes back a state it was given.
    ///
    /// # Errors
    ///
    /// [`InstanceError`]; nothing has changed then.
    pub fn configure(
        &self,
        id: &str,
        change: impl FnOnce(&mut DeviceOptions),
    ) -> Result<(), InstanceError> {
        let mut phase = self.write();
        let (phase, index) = not_started(&mut phase, id)?;
        let mut changed = phase.options.clone();
        change(&mut changed.devices_mut()[index]);
        changed.with_each()?;
        phase.options = changed;
        // It was of a device as it was.
        phase.states[index] = None;
        Ok(())
    }

    /// Starts the guest, with devices as their states say, if they have been given some.
    ///
    /// # Errors
    ///
    /// [`InstanceError`]; the guest can be started otherwise then.
    pub fn start(&self) -> Result<(), InstanceError> {
        let mut phase = self.write();
        let Phase::NotStarted(not_started) = &*phase else {
            return Err(InstanceError::Started);
        };
        *phase = Phase::Started(Box::new(self.started(not_started)?));
        self.begin(&phase);
        Ok(())
    }

    /// Has a device begin as `state` says; with the last one that is given a state, the guest is started.
    ///
    /// # Errors
    ///
    /// [`InstanceError`]; the device can be given another state then.
    pub fn restore(&self, id: &str, state: State) -> Result<(), InstanceError> {
        let mut phase = self.write();
        let (given, index) = not_started(&mut phase, id)?;
        // What is wrong with it is for who gives it to know, and at once.
        let (_, device) = given.options.with_each()?[index].machine()?;
        let device = device.restore(state.clone()).build();
        drop(device.map_err(StartError::from)?);
        let mut with_state = given.clone();
        with_state.states[index] = Some(state);
        if with_state.states.iter().any(Option::is_none) {
            *given = with_state;
            return Ok(());
        }
        *phase = Phase::Started(Box::new(self.started(&with_state)?));
        self.begin(&phase);
        Ok(())
    }

    fn started(&self, not_started: &NotStarted) -> Result<Started, InstanceError> {
        let NotStarted { options, states } = not_started;
        let mut config = None;
        let mut builders = Vec::new();
        for (options, state) in options.with_each()?.iter().zip(states) {
            let (machine, device) = options.machine()?;
            builders.push(match state {
                Some(state) => device.restore(state.clone()),
                None => device.requested_size(options.initial_size()),
            });
            config.get_or_insert(machine);
        }
        let machine = Machine::start_with(&config.unwrap_or_default(), builders)?;
        let last_operation = Arc::default();
        let devices = machine.devices().zip(options.devices());
        let controllers = devices.map(|(device, options)| {
            let (events, last) = (self.events.clone(), Arc::clone(&last_operation));
            Controller::watched(&options.id, device.handle(), events, last)
        });
        Ok(Started {
            controllers: controllers.collect::<Result<_, _>>()?,
            machine,
        })
    }

    /// Tells of the beginning, and in time of the end.
    fn begin(&self, phase: &Phase) {
        self.events.tell(Event::Started);
        let (events, ended) = (self.events.clone(), self.ended.clone());
        if let Phase::Started(started) = phase {
            started.machine.on_end(move |outcome| {
                let outcome = outcome.to_string();
                events.tell(Event::Ended { outcome });
                // An error is that nobody waits any more.
                let _ = ended.map(|ended| ended.send(()));
            });
        }
    }

    /// Where the instance is in its life.
    #[must_use]
    pub fn state(&self) -> RunState {
        run_state(&self.read())
    }

    /// How the guest has ended; `None` while it has not.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match &*self.read() {
            Phase::Started(started) => started.machine.outcome(),
            Phase::NotStarted(_) | Phase::Stopped => None,
        }
    }

    /// What the guest runs on; `None` if there is none.
    #[must_use]
    pub fn backend(&self) -> Option<String> {
        match &*self.read() {
            Phase::Started(started) => Some(started.machine.backend().to_string()),
            Phase::NotStarted(_) | Phase::Stopped => None,
        }
    }

    /// Does something to a device of a guest that is started.
    ///
    /// # Errors
    ///
    /// [`InstanceError::NotStarted`], [`InstanceError::Ended`], [`InstanceError::UnknownDevice`].
    pub fn with<T>(&self, id: &str, f: impl FnOnce(&Controller) -> T) -> Result<T, InstanceError> {
        Ok(f(started(&self.read())?.controller(id)?.1))
    }

    /// Every operation that is remembered, in the order asked for.
    ///
    /// # Errors
    ///
    /// [`InstanceError::NotStarted`], [`InstanceError::Ended`].
    pub fn operations(&self) -> Result<Vec<Operation>, InstanceError> {
        let phase = self.read();
        let controllers = started(&phase)?.controllers.iter();
        let mut operations: Vec<_> = controllers.flat_map(Controller::operations).collect();
        operations.sort_by_key(|operation| operation.id);
        Ok(operations)
    }

    /// Does something with an operation, by the controller of the device that has it.
    ///
    /// # Errors
    ///
    /// [`InstanceError`], with [`ControlError::UnknownOperation`] if no device has it.
    pub fn with_operation(
        &self,
        id: u64,
        f: impl Fn(&Controller) -> Result<Operation, ControlError>,
    ) -> Result<Operation, InstanceError> {
        let phase = self.read();
        for controller in &started(&phase)?.controllers {
            match f(controller) {
                Err(ControlError::UnknownOperation(_)) => {}
                result => return Ok(result?),
            }
        }
        Err(ControlError::UnknownOperation(id).into())
    }

    /// How many blocks a device of a guest that is not started is to have.
    ///
    /// # Errors
    ///
    /// [`InstanceError`].
    pub fn block_count(&self, id: &str) -> Result<u64, InstanceError> {
        match &*self.read() {
            Phase::NotStarted(phase) => {
                let device = &phase.options.devices()[index_of(&phase.options, id)?];
                Ok(device.region / device.block_size)
            }
            Phase::Started(_) | Phase::Stopped => Err(InstanceError::Started),
        }
    }

    /// The memory of a device as it is now. Asks the guest, which may take a quarter of a second if it does not answer.
    ///
    /// # Errors
    ///
    /// [`InstanceError`].
    pub fn memory(&self, id: &str) -> Result<MemoryStatus, InstanceError> {
        let resident_size = self.resident_size(id)?;
        let phase = self.read();
        let state = run_state(&phase);
        match &*phase {
            Phase::NotStarted(phase) => {
                let index = index_of(&phase.options, id)?;
                // Described by a device like the one there will be, which has no memory yet.
                let options = &phase.options.with_each()?[index];
                let (_, device) = options.machine()?;
                let device = device.requested_size(options.initial_size());
                let device = device.build().map_err(StartError::from)?;
                let requested = device.handle().status().requested_size > 0;
                Ok(MemoryStatus {
                    reason: requested.then_some(Reason::NotStarted),
                    ..MemoryStatus::of(id, &device, state, resident_size)
                })
            }
            Phase::Started(started) => {
                let (index, controller) = started.controller(id)?;
                let report = &started.reports()[index];
                let Some(device) = started.machine.devices().nth(index) else {
                    return Err(InstanceError::UnknownDevice(id.into()));
                };
                Ok(MemoryStatus {
                    reason: started.reason(controller, report),
                    guest: Some(GuestStatus::from(report)),
                    ..MemoryStatus::of(id, device, state, resident_size)
                })
            }
            Phase::Stopped => Err(InstanceError::Ended),
        }
    }

    /// Host memory behind the plugged blocks of a device; there is none before the guest is started.
    fn resident_size(&self, id: &str) -> Result<u64, InstanceError> {
        // Not under the lock: it takes a while if much is plugged.
        let device = match &*self.read() {
            Phase::NotStarted(phase) => {
                index_of(&phase.options, id)?;
                return Ok(0);
            }
            Phase::Started(started) => started.controller(id)?.1.device().clone(),
            Phase::Stopped => return Err(InstanceError::Ended),
        };
        let resident = device.plugged_resident_bytes();
        Ok(resident.map_err(ControlError::Resident)?)
    }

    /// Why the size of a device is not there; `None` if it is. May take as long as [`memory`](Self::memory).
    ///
    /// # Errors
    ///
    /// [`InstanceError`].
    pub fn reason(&self, id: &str) -> Result<Option<Reason>, InstanceError> {
        let phase = self.read();
        let started = started(&phase)?;
        let (index, controller) = started.controller(id)?;
        Ok(started.reason(controller, &started.reports()[index]))
    }

    /// The blocks of a device: geometry, those plugged, and what the guest does with them.
    ///
    /// # Errors
    ///
    /// [`InstanceError`].
    pub fn blocks(&self, id: &str) -> Result<(Geometry, BlockMap, BlockUse), InstanceError> {
        let phase = self.read();
        let started = started(&phase)?;
        let (index, controller) = started.controller(id)?;
        let block_use = started.machine.block_use(index, REPORT_TIMEOUT);
        let block_use = block_use.ok_or_else(|| InstanceError::UnknownDevice(id.into()))?;
        let device = controller.device();
        Ok((device.geometry(), device.plugged(), block_use))
    }

    /// Ends the guest, which verifies its pages first; how it has ended and what it said last of itself and its first
    /// device. `None` if it was never
    /// started.
    #[must_use]
    pub fn stop(&self) -> Option<(Outcome, GuestStatus)> {
        let Phase::Started(started) = std::mem::replace(&mut *self.write(), Phase::Stopped) else {
            return None;
        };
        let Started {
            controllers,
            mut machine,
        } = *started;
        drop(controllers);
        let outcome = machine.finish(STOP_GRACE);
        Some((outcome, GuestStatus::from(&machine.progress())))
    }

    // A phase is replaced as a whole.
    fn read(&self) -> RwLockReadGuard<'_, Phase> {
        self.phase.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Phase> {
        self.phase.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn started(phase: &Phase) -> Result<&Started, InstanceError> {
    match phase {
        Phase::Started(started) => Ok(started),
        Phase::NotStarted(_) => Err(InstanceError::NotStarted),
        Phase::Stopped => Err(InstanceError::Ended),
    }
}

fn run_state(phase: &Phase) -> RunState {
    match phase {
        Phase::NotStarted(_) => RunState::NotStarted,
        Phase::Started(started) if started.machine.outcome().is_none() => RunState::Running,
        Phase::Started(_) | Phase::Stopped => RunState::Ended,
    }
}

/// What can still be changed, and which device is called `id`.
fn not_started<'a>(
    phase: &'a mut Phase,
    id: &str,
) -> Result<(&'a mut NotStarted, usize), InstanceError> {
    match phase {
        Phase::NotStarted(phase) => {
            let index = index_of(&phase.options, id)?;
            Ok((phase, index))
        }
        Phase::Started(_) | Phase::Stopped => Err(InstanceError::Started),
    }
}

fn index_of(options: &GuestOptions, id: &str) -> Result<usize, InstanceError> {
    let found = options.devices().iter().position(|device| device.id == id);
    found.ok_or_else(|| InstanceError::UnknownDevice(id.into()))
}

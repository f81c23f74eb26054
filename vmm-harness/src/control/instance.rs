//! A guest with a memory device, before and after it is started.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;
use virtio_mem::State;
use virtio_mem::wire::{BlockMap, Geometry};
use vmem_guest::abi::DriverState;

use super::{ControlError, Controller, Event, Events, Reason};
use crate::demo::{DemoError, DemoOptions};
use crate::{Machine, Outcome, Report, StartError};

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

/// What there is to know about the memory: sizes are bytes, or MiB rounded down where the name says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryStatus {
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
    /// Whether requests are held off.
    pub frozen: bool,
    /// Where the guest is in its life.
    pub state: RunState,
    /// Why what is plugged is not what is requested, if it is not.
    pub reason: Option<Reason>,
    /// What the guest says, once it runs.
    pub guest: Option<GuestStatus>,
}

/// What the guest says of itself. Not to be relied on: a guest writes what it likes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GuestStatus {
    /// What its driver makes of the target; `None` if it says nonsense.
    pub driver_state: Option<&'static str>,
    /// Bytes its driver believes plugged.
    pub plugged_size: u64,
    /// Bytes of hotplugged memory its page allocator works with.
    pub online_size: u64,
    /// Bytes between the target and what is plugged that its driver calls out of reach.
    pub unreachable_size: u64,
    /// Pages it has moved out of memory that was being unplugged.
    pub pages_moved: u64,
    /// Pages its workers hold now.
    pub pages_held: u64,
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
            online_size: report.online_size,
            unreachable_size: report.unreachable,
            pages_moved: report.pages_moved,
            pages_held: sum(|worker| worker.pages_held),
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
    NotStarted(Box<DemoOptions>),
    Started(Box<Started>),
    /// The machine is gone.
    Stopped,
}

#[derive(Debug)]
struct Started {
    // Dropped first: its thread uses the device.
    controller: Controller,
    machine: Machine,
}

impl Started {
    fn report(&self) -> Report {
        let report = self.machine.report(REPORT_TIMEOUT);
        report.unwrap_or_else(|_| self.machine.progress())
    }

    fn reason(&self, report: &Report) -> Option<Reason> {
        let status = self.controller.device().status();
        Reason::of(&status, Some(report), self.machine.outcome().as_ref())
    }
}

impl Instance {
    /// A guest that is not started yet.
    ///
    /// # Errors
    ///
    /// [`InstanceError::Guest`] if the options do not go together.
    pub fn new(options: DemoOptions) -> Result<Self, InstanceError> {
        options.check()?;
        Ok(Self {
            phase: RwLock::new(Phase::NotStarted(Box::new(options))),
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

    /// Changes options of a guest that is not started.
    ///
    /// # Errors
    ///
    /// [`InstanceError`]; nothing has changed then.
    pub fn configure(&self, change: impl FnOnce(&mut DemoOptions)) -> Result<(), InstanceError> {
        match &mut *self.write() {
            Phase::NotStarted(options) => {
                let mut changed = options.clone();
                change(&mut changed);
                changed.check()?;
                *options = changed;
                Ok(())
            }
            Phase::Started(_) | Phase::Stopped => Err(InstanceError::Started),
        }
    }

    /// Starts the guest, with a device that is as `state` says, if that is given.
    ///
    /// # Errors
    ///
    /// [`InstanceError`]; the guest can be started otherwise then.
    pub fn start(&self, state: Option<State>) -> Result<(), InstanceError> {
        let mut phase = self.write();
        let Phase::NotStarted(options) = &*phase else {
            return Err(InstanceError::Started);
        };
        let (config, mut device) = options.machine()?;
        device = match state {
            Some(state) => device.restore(state),
            None => device.requested_size(options.initial_size()),
        };
        let machine = Machine::start(&config, device)?;
        let controller = Controller::watched(machine.handle(), self.events.clone())?;
        let (events, ended) = (self.events.clone(), self.ended.clone());
        *phase = Phase::Started(Box::new(Started {
            controller,
            machine,
        }));
        self.events.tell(Event::Started);
        if let Phase::Started(started) = &*phase {
            started.machine.on_end(move |outcome| {
                let outcome = outcome.to_string();
                events.tell(Event::Ended { outcome });
                // An error is that nobody waits any more.
                let _ = ended.map(|ended| ended.send(()));
            });
        }
        Ok(())
    }

    /// Where the instance is in its life.
    #[must_use]
    pub fn state(&self) -> RunState {
        match &*self.read() {
            Phase::NotStarted(_) => RunState::NotStarted,
            Phase::Started(started) if started.machine.outcome().is_none() => RunState::Running,
            Phase::Started(_) | Phase::Stopped => RunState::Ended,
        }
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

    /// Does something to the device of a guest that is started.
    ///
    /// # Errors
    ///
    /// [`InstanceError::NotStarted`], [`InstanceError::Ended`].
    pub fn with<T>(&self, f: impl FnOnce(&Controller) -> T) -> Result<T, InstanceError> {
        Ok(f(&started(&self.read())?.controller))
    }

    /// The memory as it is now. Asks the guest, which may take a quarter of a second if it does not answer.
    ///
    /// # Errors
    ///
    /// [`InstanceError`].
    pub fn memory(&self) -> Result<MemoryStatus, InstanceError> {
        let phase = self.read();
        let (geometry, slot_size, status, resident_size, report, reason) = match &*phase {
            Phase::NotStarted(options) => {
                // Described by a device like the one there will be, which has no memory yet.
                let (_, device) = options.machine()?;
                let device = device.requested_size(options.initial_size());
                let device = device.build().map_err(StartError::from)?;
                let status = device.handle().status();
                let reason = Reason::NotStarted;
                let reason = (status.requested_size > 0).then_some(reason);
                (
                    device.geometry(),
                    device.slot_size(),
                    status,
                    0,
                    None,
                    reason,
                )
            }
            Phase::Started(started) => {
                let report = started.report();
                let device = started.machine.device();
                let resident = device.handle().resident_bytes();
                let resident = resident.map_err(ControlError::Resident)?;
                let reason = started.reason(&report);
                let status = started.controller.device().status();
                let report = Some(report);
                (
                    device.geometry(),
                    device.slot_size(),
                    status,
                    resident,
                    report,
                    reason,
                )
            }
            Phase::Stopped => return Err(InstanceError::Ended),
        };
        drop(phase);
        Ok(MemoryStatus {
            total_size_mib: geometry.region_size() >> 20,
            block_size_mib: geometry.block_size() >> 20,
            slot_size_mib: slot_size >> 20,
            plugged_size_mib: status.plugged_size >> 20,
            requested_size_mib: status.requested_size >> 20,
            total_size: geometry.region_size(),
            block_size: geometry.block_size(),
            slot_size,
            plugged_size: status.plugged_size,
            requested_size: status.requested_size,
            usable_region_size: status.usable_region_size,
            resident_size,
            slot_count: status.slot_count,
            frozen: status.frozen,
            state: self.state(),
            reason,
            guest: report.as_ref().map(GuestStatus::from),
        })
    }

    /// Why the size is not there; `None` if it is. May take as long as [`memory`](Self::memory).
    ///
    /// # Errors
    ///
    /// [`InstanceError::NotStarted`], [`InstanceError::Ended`].
    pub fn reason(&self) -> Result<Option<Reason>, InstanceError> {
        let phase = self.read();
        let started = started(&phase)?;
        Ok(started.reason(&started.report()))
    }

    /// The blocks: geometry, those plugged, and those the guest's driver believes plugged.
    ///
    /// # Errors
    ///
    /// [`InstanceError::NotStarted`], [`InstanceError::Ended`].
    pub fn blocks(&self) -> Result<(Geometry, BlockMap, BlockMap), InstanceError> {
        let phase = self.read();
        let started = started(&phase)?;
        let view = started.report().view;
        let device = started.controller.device();
        Ok((device.geometry(), device.plugged(), view))
    }

    /// Ends the guest, which verifies its pages first; how it has ended and what it said last. `None` if it was never
    /// started.
    #[must_use]
    pub fn stop(&self) -> Option<(Outcome, GuestStatus)> {
        let Phase::Started(started) = std::mem::replace(&mut *self.write(), Phase::Stopped) else {
            return None;
        };
        let Started {
            controller,
            mut machine,
        } = *started;
        drop(controller);
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

//! What can be done to a memory device from outside its guest: one set of operations behind every front end.
//!
//! The lines of [`serve`](crate::serve) and the HTTP of [`api`](crate::api) both end here. [`Controller`] is one
//! device; [`Instance`] is a guest with one or several, before and after it is started.

mod events;
mod instance;
mod options;
mod reason;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_mem::wire::Answer;
use virtio_mem::{Handle, Resize, ResizeError, ResizeState, SaveError, State, Status};

pub use events::{Event, Events, Listener};
pub use instance::{GuestStatus, Instance, InstanceError, MemoryStatus, RequestStatus, RunState};
pub use options::{DeviceOptions, FIRST_DEVICE, GuestOptions};
#[cfg(test)]
pub(crate) use reason::tests::report;
pub use reason::{Reason, explain};

/// Operations that are remembered; of more, the oldest are forgotten.
const MAX_OPERATIONS: usize = 1024;

/// How often a watcher looks whether its device is still controlled.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Why something was not done.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The device cannot have the size.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The host does not say how much memory there is.
    #[error("memory behind the region")]
    Resident(#[source] io::Error),
    /// The device cannot be saved now.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// No such operation, or it has been forgotten.
    #[error("there is no operation {0}")]
    UnknownOperation(u64),
    /// The operation has ended before.
    #[error("operation {0} has ended already")]
    Ended(u64),
}

/// A device at one moment. All sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// What the driver is asked to have plugged.
    pub requested_size: u64,
    /// What is plugged.
    pub plugged_size: u64,
    /// From the region's start, where blocks may be plugged; left out if the device does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usable_region_size: Option<u64>,
    /// Host memory behind the region.
    pub resident_size: u64,
    /// Whether requests are held off.
    pub frozen: bool,
}

/// A resize, by number. All sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Operation {
    /// From 1, in the order asked for, whatever the device.
    pub id: u64,
    /// The device.
    pub device: String,
    /// What was asked for.
    pub requested_size: u64,
    /// What is plugged now.
    pub plugged_size: u64,
    /// How far it is.
    pub state: OperationState,
    /// What was asked for instead, if it is superseded.
    pub superseded_by: Option<u64>,
}

/// See [`ResizeState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// The size is not there yet.
    Converging,
    /// The size is not there, and the device refuses the driver's requests.
    Stalled,
    /// The size was there. Final.
    Settled,
    /// Another size was asked for first. Final.
    Superseded,
    /// It was given up. Final.
    Cancelled,
}

impl OperationState {
    /// Whether it stays so.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Settled | Self::Superseded | Self::Cancelled)
    }
}

/// Controls one device.
#[derive(Debug)]
pub struct Controller {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    id: String,
    device: Handle,
    events: Events,
    last_operation: Arc<AtomicU64>,
    operations: Mutex<VecDeque<Entry>>,
    end: AtomicBool,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    resize: Resize,
    /// Its end was an event.
    announced: bool,
}

impl Controller {
    /// For who asks, and is not told.
    #[must_use]
    pub fn new(device: Handle) -> Self {
        Self {
            shared: Shared::new(FIRST_DEVICE, device, Events::default(), Arc::default()),
            watcher: None,
        }
    }

    /// Tells `events` what happens to the device called `id`, from a thread of its own. Operations are numbered on from
    /// `last_operation`, together with those of others that have the same.
    ///
    /// # Errors
    ///
    /// If the host has no more threads.
    pub fn watched(
        id: &str,
        device: Handle,
        events: Events,
        last_operation: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let shared = Shared::new(id, device, events, last_operation);
        let watched = Arc::clone(&shared);
        let watcher = thread::Builder::new().name("vmem-watch".into());
        Ok(Self {
            shared,
            watcher: Some(watcher.spawn(move || watched.watch())?),
        })
    }

    /// The device's name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Handle {
        &self.shared.device
    }

    /// The device as it is now.
    ///
    /// # Errors
    ///
    /// [`ControlError::Resident`].
    pub fn sizes(&self) -> Result<Sizes, ControlError> {
        let status = self.device().status();
        Ok(Sizes {
            requested_size: status.requested_size,
            plugged_size: status.plugged_size,
            usable_region_size: Some(status.usable_region_size),
            resident_size: self
                .device()
                .resident_bytes()
                .map_err(ControlError::Resident)?,
            frozen: status.frozen,
        })
    }

    /// Asks the driver to have `size` bytes plugged. Who asks for the size that is under way gets a number of his own
    /// for the same resize.
    ///
    /// # Errors
    ///
    /// [`ControlError::Resize`]; nothing has changed then.
    pub fn resize(&self, size: u64) -> Result<Operation, ControlError> {
        // Locked first: numbers are in the order the device was asked.
        let mut operations = self.shared.operations();
        let resize = self.device().resize(size)?;
        let mut entry = Entry {
            id: self.shared.last_operation.fetch_add(1, Ordering::Relaxed) + 1,
            resize,
            announced: false,
        };
        let operation = entry.operation(self.id());
        entry.announced = operation.state.is_final();
        if operations.len() == MAX_OPERATIONS {
            operations.pop_front();
        }
        operations.push_back(entry);
        self.shared.tell(Event::Operation(operation.clone()));
        Ok(operation)
    }

    /// Every operation that is remembered, oldest first.
    #[must_use]
    pub fn operations(&self) -> Vec<Operation> {
        let operations = self.shared.operations();
        let operation = |entry: &Entry| entry.operation(self.id());
        operations.iter().map(operation).collect()
    }

    /// One of them.
    ///
    /// # Errors
    ///
    /// [`ControlError::UnknownOperation`].
    pub fn operation(&self, id: u64) -> Result<Operation, ControlError> {
        self.find(id, |entry| entry.operation(self.id()))
    }

    /// Gives an operation up: what is plugged now is what is requested.
    ///
    /// # Errors
    ///
    /// [`ControlError::UnknownOperation`], [`ControlError::Ended`].
    pub fn cancel(&self, id: u64) -> Result<Operation, ControlError> {
        let resize = self.find(id, |entry| entry.resize.clone())?;
        match resize.cancel() {
            true => self.operation(id),
            false => Err(ControlError::Ended(id)),
        }
    }

    fn find<T>(&self, id: u64, of: impl FnOnce(&Entry) -> T) -> Result<T, ControlError> {
        let operations = self.shared.operations();
        let found = operations.iter().find(|entry| entry.id == id);
        found.map(of).ok_or(ControlError::UnknownOperation(id))
    }

    /// Holds requests off, see [`Handle::freeze`].
    pub fn freeze(&self) {
        self.device().freeze();
    }

    /// Ends that.
    pub fn thaw(&self) {
        self.device().thaw();
    }

    /// The state of the device, see [`Handle::save`].
    ///
    /// # Errors
    ///
    /// [`ControlError::Save`].
    pub fn save(&self) -> Result<State, ControlError> {
        Ok(self.device().save()?)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        if let Some(watcher) = self.watcher.take()
            && watcher.join().is_err()
        {
            log::error!("the thread that watches the device panicked");
        }
    }
}

impl Entry {
    fn operation(&self, device: &str) -> Operation {
        let progress = self.resize.progress();
        let (state, superseded_by) = match progress.state {
            ResizeState::Converging => (OperationState::Converging, None),
            ResizeState::Stalled { .. } => (OperationState::Stalled, None),
            ResizeState::Settled => (OperationState::Settled, None),
            ResizeState::Superseded { by } => (OperationState::Superseded, Some(by)),
            ResizeState::Cancelled => (OperationState::Cancelled, None),
        };
        Operation {
            id: self.id,
            device: device.into(),
            requested_size: progress.requested_size,
            plugged_size: progress.plugged_size,
            state,
            superseded_by,
        }
    }
}

/// What an event is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    sizes: [u64; 3],
    frozen: bool,
    refused: Option<Answer>,
    failed: bool,
}

impl From<&Status> for Seen {
    fn from(status: &Status) -> Self {
        let answer = status.last_answer.map(|(answer, _)| answer);
        Self {
            sizes: [
                status.requested_size,
                status.plugged_size,
                status.usable_region_size,
            ],
            frozen: status.frozen,
            refused: answer.filter(|answer| *answer != Answer::Ack),
            failed: status.failure.is_some(),
        }
    }
}

impl Shared {
    fn new(id: &str, device: Handle, events: Events, last_operation: Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            device,
            events,
            last_operation,
            operations: Mutex::default(),
            end: AtomicBool::new(false),
        })
    }

    fn operations(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // Nothing is left half done under it.
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) {
        self.events.tell(event);
    }

    fn watch(&self) {
        let mut seen = Seen::from(&self.device.status());
        while !self.end.load(Ordering::Acquire) {
            let deadline = Instant::now() + WATCH_INTERVAL;
            let changed = |status: &Status| Seen::from(status) != seen;
            if let Ok(status) = self.device.wait_until(deadline, changed) {
                let now = Seen::from(&status);
                self.tell_changes(&seen, &now, &status);
                seen = now;
            }
            self.announce();
        }
    }

    fn tell_changes(&self, before: &Seen, now: &Seen, status: &Status) {
        let device = || self.id.clone();
        if now.sizes != before.sizes {
            self.tell(Event::Sizes {
                device: device(),
                requested_size: status.requested_size,
                plugged_size: status.plugged_size,
                usable_region_size: status.usable_region_size,
            });
        }
        if now.frozen != before.frozen {
            self.tell(match now.frozen {
                true => Event::Frozen { device: device() },
                false => Event::Thawed { device: device() },
            });
        }
        if let Some(answer) = now.refused
            && now.refused != before.refused
        {
            self.tell(Event::Refused {
                device: device(),
                answer: answer.name(),
            });
        }
        if let Some(failure) = &status.failure
            && !before.failed
        {
            self.tell(Event::Failed {
                device: device(),
                reason: failure.to_string(),
            });
        }
    }

    /// Tells of the operations that have ended since.
    fn announce(&self) {
        for entry in &mut *self.operations() {
            if entry.announced {
                continue;
            }
            let operation = entry.operation(&self.id);
            if operation.state.is_final() {
                entry.announced = true;
                self.tell(Event::Operation(operation));
            }
        }
    }
}

//! Resizing as an operation that can be watched, waited for and cancelled.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use virtio_mem_wire::Answer;

use crate::device::Device;
use crate::handle::{ResizeError, check_size};
use crate::view::View;

/// A resize under way, or how it ended. Cheap to clone.
///
/// It is the driver that resizes, when it likes and as far as it can. Dropping this changes nothing; the size
/// stays requested. A resize ends once, in one of three ways: the size was there ([`Settled`]), somebody
/// asked for another ([`Superseded`]), or it was [cancelled](Self::cancel). What becomes of the sizes after
/// that is not its business.
///
/// [`Settled`]: ResizeState::Settled
/// [`Superseded`]: ResizeState::Superseded
#[derive(Clone, Debug)]
pub struct Resize {
    device: Arc<Device>,
    operation: Arc<Operation>,
}

/// How far a resize has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes this resize asks for.
    pub requested_size: u64,
    /// Bytes plugged.
    pub plugged_size: u64,
    /// What the driver makes of it.
    pub state: ResizeState,
    /// Whether a driver is there. The size is kept for one that is still to come.
    pub driver_ready: bool,
    /// When `plugged_size` last changed, or when the resize was asked for if that is later. A driver that can
    /// unplug no more falls silent, and only the clock of whoever watches can tell that from a slow one.
    pub last_change: Instant,
}

/// The state of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResizeState {
    /// The size is not there, and the driver was not refused anything since it last got somewhere.
    Converging,
    /// The size is not there, and the driver's requests are refused.
    Stalled {
        /// The last answer to PLUG, UNPLUG or UNPLUG ALL.
        last_answer: Answer,
        /// When it was refused first since it last got somewhere.
        since: Instant,
    },
    /// The size was there. Final.
    Settled,
    /// Another size was asked for before this one was there. Final.
    Superseded {
        /// That size, in bytes.
        by: u64,
    },
    /// [`Resize::cancel`] came before the size was there. Final.
    Cancelled,
}

/// Why [`Resize::wait`] returned without the size being there. Each carries how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The driver has not managed by the deadline, and may still.
    #[error("{} of {} bytes plugged at the deadline", .0.plugged_size, .0.requested_size)]
    Deadline(Progress),
    /// See [`ResizeState::Superseded`].
    #[error("another size was asked for")]
    Superseded(Progress),
    /// See [`ResizeState::Cancelled`].
    #[error("the resize was cancelled")]
    Cancelled(Progress),
}

/// What the device keeps of a resize.
#[derive(Debug)]
pub(crate) struct Operation {
    size: u64,
    started: Instant,
    /// One of the final states.
    end: OnceLock<ResizeState>,
}

impl Operation {
    pub(crate) fn new(size: u64) -> Arc<Self> {
        Arc::new(Self {
            size,
            started: Instant::now(),
            end: OnceLock::new(),
        })
    }

    /// Ends the operation, if it has not ended.
    pub(crate) fn end(&self, state: ResizeState) -> bool {
        self.end.set(state).is_ok()
    }
}

impl Resize {
    /// How far it has come. Never waits for a request that is being served.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.device.views().look(|view| self.progress_in(view))
    }

    /// Waits until the size is there, without polling.
    ///
    /// # Errors
    ///
    /// [`WaitError`] if it ended otherwise, or has not ended at `deadline`.
    pub fn wait(&self, deadline: Instant) -> Result<Progress, WaitError> {
        let (progress, _) = self.device.views().wait_for(
            deadline,
            |view| self.progress_in(view),
            |progress| {
                !matches!(
                    progress.state,
                    ResizeState::Converging | ResizeState::Stalled { .. }
                )
            },
        );
        match progress.state {
            ResizeState::Settled => Ok(progress),
            ResizeState::Superseded { .. } => Err(WaitError::Superseded(progress)),
            ResizeState::Cancelled => Err(WaitError::Cancelled(progress)),
            ResizeState::Converging | ResizeState::Stalled { .. } => {
                Err(WaitError::Deadline(progress))
            }
        }
    }

    /// Gives the resize up: what is plugged now becomes the requested size, and the driver is told.
    ///
    /// Nothing that was done is undone; ask for the old size to get it back. A PLUG that is on its way is
    /// answered NACK. False, and nothing happens, if the resize has ended already.
    pub fn cancel(&self) -> bool {
        self.device.cancel(&self.operation)
    }

    fn progress_in(&self, view: &View) -> Progress {
        let operation = &self.operation;
        let live = match (view.refused_since, view.status.last_answer) {
            (Some(since), Some((last_answer, _))) => ResizeState::Stalled { last_answer, since },
            _ => ResizeState::Converging,
        };
        Progress {
            requested_size: operation.size,
            plugged_size: view.status.plugged_size,
            state: operation.end.get().copied().unwrap_or(live),
            driver_ready: self.device.is_ready(),
            last_change: view.last_change.max(operation.started),
        }
    }
}

impl Device {
    /// Requests another size and tells the driver (D-09), also if it is the same size as before.
    pub(crate) fn resize(self: &Arc<Self>, size: u64) -> Result<Resize, ResizeError> {
        check_size(&self.geometry, size)?;
        let mut core = self.lock();
        if core.removed {
            return Err(ResizeError::Removed);
        }
        // Who asks for the same again joins in, unless it has been there and gone.
        if core.operation.size != size || core.operation.end.get().is_some() {
            core.operation.end(ResizeState::Superseded { by: size });
            core.operation = Operation::new(size);
        }
        let operation = Arc::clone(&core.operation);
        self.set_requested(&mut core, size);
        drop(core);
        self.notify_config();
        Ok(Resize {
            device: Arc::clone(self),
            operation,
        })
    }

    fn cancel(&self, operation: &Operation) -> bool {
        let mut core = self.lock();
        // Only the latest operation has not ended.
        if !operation.end(ResizeState::Cancelled) {
            return false;
        }
        let plugged_size = core.sizes.plugged_size;
        core.operation = Operation::new(plugged_size);
        self.set_requested(&mut core, plugged_size);
        drop(core);
        self.notify_config();
        true
    }
}

//! A thread of its own for a device, for VMMs without an event loop to spare.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberOps};
use vm_memory::GuestAddressSpace;

use crate::device::Device;
use crate::queue::QueueHandler;

/// A thread that serves the queue of one device, see [`QueueHandler::spawn`].
///
/// Dropping it stops the thread as [`stop`](Self::stop) does. After a reset of the device the thread has
/// nothing to do any more and only waits to be stopped.
#[derive(Debug)]
pub struct Worker<M: GuestAddressSpace + Send + 'static> {
    device: Arc<Device>,
    stopping: Arc<AtomicBool>,
    endpoint: RemoteEndpoint<QueueHandler<M>>,
    thread: Option<JoinHandle<Option<QueueHandler<M>>>>,
}

/// The thread ended without giving its queue handler back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread of the device died")]
pub struct WorkerDied;

impl<M: GuestAddressSpace + Send + 'static> QueueHandler<M> {
    /// Serves the queue on a thread of this name until the [`Worker`] is stopped.
    ///
    /// # Errors
    ///
    /// If the host has no thread or no descriptor left.
    pub fn spawn(self, name: &str) -> io::Result<Worker<M>> {
        let device = Arc::clone(self.device());
        let mut events = EventManager::new().map_err(io::Error::other)?;
        let endpoint = events.remote_endpoint();
        let id = events.add_subscriber(self);
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                if let Err(error) = events.run() {
                    log::error!("the thread of a memory device stops: {error}");
                    break;
                }
            }
            events.remove_subscriber(id).ok()
        })?;
        Ok(Worker {
            device,
            stopping,
            endpoint,
            thread: Some(thread),
        })
    }
}

impl<M: GuestAddressSpace + Send + 'static> Worker<M> {
    /// Asks the thread to stop after the request it is at, and does not wait for it.
    ///
    /// For a VMM that stops many devices: ask all, then [`stop`](Self::stop) each.
    pub fn ask_to_stop(&self) {
        if self.stopping.swap(true, Ordering::AcqRel) {
            return;
        }
        self.device.pause();
        if let Err(error) = self.endpoint.kick() {
            log::error!("cannot wake the thread of a memory device: {error}");
        }
    }

    /// Stops the thread and waits for it: the request it is at is finished and answered, what else is in the
    /// queue stays there. The handler that is given back may be spawned again and goes on where this stopped.
    ///
    /// # Errors
    ///
    /// [`WorkerDied`] if a trait of the VMM has panicked in it.
    pub fn stop(mut self) -> Result<QueueHandler<M>, WorkerDied> {
        self.join().ok_or(WorkerDied)
    }

    fn join(&mut self) -> Option<QueueHandler<M>> {
        let thread = self.thread.take()?;
        self.ask_to_stop();
        let handler = thread.join().ok().flatten();
        self.device.resume();
        handler
    }
}

impl<M: GuestAddressSpace + Send + 'static> Drop for Worker<M> {
    fn drop(&mut self) {
        drop(self.join());
    }
}

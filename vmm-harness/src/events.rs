//! The event loop: serves the device's queue, on a thread of its own.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{Error, EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use thiserror::Error as ThisError;

/// Anything that listens to events.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The event loop cannot run.
#[derive(Debug, ThisError)]
pub enum EventLoopError {
    /// epoll, or the channel to the loop.
    #[error("event loop")]
    Events(#[from] EventsError),
    /// No thread for it.
    #[error("thread for the event loop")]
    Thread(#[source] io::Error),
}

/// An error of event-manager that can be the source of another.
#[derive(Debug, ThisError)]
#[error("{0}")]
pub struct EventsError(Error);

impl From<Error> for EventsError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

/// A running event loop. [`stop`](Self::stop) it, or it stops when dropped.
#[derive(Debug)]
pub struct EventLoop {
    remote: Remote,
    thread: Option<JoinHandle<()>>,
}

/// Adds to and removes from an event loop on another thread.
#[derive(Clone)]
pub struct Remote {
    endpoint: RemoteEndpoint<Subscriber>,
    stopping: Arc<AtomicBool>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("stopping", &self.stopping)
            .finish_non_exhaustive()
    }
}

impl EventLoop {
    /// Starts an event loop.
    ///
    /// # Errors
    ///
    /// See [`EventLoopError`].
    pub fn start() -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscriber>::new().map_err(EventsError)?;
        let remote = Remote {
            endpoint: manager.remote_endpoint(),
            stopping: Arc::default(),
        };
        let stopping = Arc::clone(&remote.stopping);
        let run = move || {
            while !stopping.load(Ordering::Acquire) {
                match manager.run() {
                    Ok(_) => {}
                    Err(Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                    Err(error) => {
                        log::error!("the event loop ends: {error}");
                        return;
                    }
                }
            }
        };
        let thread = thread::Builder::new()
            .name("vmem-events".into())
            .spawn(run)
            .map_err(EventLoopError::Thread)?;
        Ok(Self {
            remote,
            thread: Some(thread),
        })
    }

    /// For adding and removing subscribers.
    #[must_use]
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Ends the loop after what it is doing, drops its subscribers and joins its thread.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.remote.stopping.store(true, Ordering::Release);
        if let Err(error) = self.remote.endpoint.kick() {
            // Cannot be: the counter of the eventfd would have to be full, and then the loop is awake.
            log::error!("cannot wake the event loop: {error}");
        }
        if thread.join().is_err() {
            log::error!("the event loop panicked");
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Remote {
    /// Adds a subscriber; it is initialised when this returns.
    ///
    /// # Errors
    ///
    /// [`EventsError`] if the loop does not run.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventsError> {
        self.endpoint
            .call_blocking(move |ops| Ok(ops.add_subscriber(subscriber)))
    }

    /// Waits until the loop has ended what it was at when this was called. Not to be called from the loop.
    ///
    /// # Errors
    ///
    /// [`EventsError`] if the loop does not run.
    pub fn barrier(&self) -> Result<(), EventsError> {
        self.endpoint.call_blocking(|_| Ok(()))
    }

    /// Removes and drops a subscriber; it does not run any more when this returns.
    ///
    /// # Errors
    ///
    /// [`EventsError`] if the loop does not run or has no such subscriber.
    pub fn remove(&self, id: SubscriberId) -> Result<(), EventsError> {
        self.endpoint
            .call_blocking(move |ops| ops.remove_subscriber(id).map(drop).map_err(EventsError))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use event_manager::{EventOps, EventSet, Events};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    struct Forward(EventFd, Sender<u64>);

    impl MutEventSubscriber for Forward {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.0, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.1.send(self.0.read().unwrap()).unwrap();
        }
    }

    #[test]
    fn subscriber_hears_events_until_it_is_removed() {
        let mut events = EventLoop::start().unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = channel();
        let subscriber = Forward(fd.try_clone().unwrap(), sender);
        let id = events.remote().add(Box::new(subscriber)).unwrap();
        fd.write(3).unwrap();
        assert_eq!(receiver.recv(), Ok(3));
        events.remote().remove(id).unwrap();
        assert!(receiver.recv().is_err(), "the subscriber is dropped");
        events.stop();
        assert!(events.remote().remove(id).is_err());
    }

    #[test]
    fn stopping_drops_the_subscribers_and_may_be_repeated() {
        let mut events = EventLoop::start().unwrap();
        let (sender, receiver) = channel();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        events.remote().add(Box::new(Forward(fd, sender))).unwrap();
        events.stop();
        events.stop();
        assert!(receiver.recv().is_err());
    }
}

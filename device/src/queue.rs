//! The `guest-request` queue: chains in, answers out.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_mem_wire::{Request, Response};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::device::Device;

/// Serves the queue of an activated device, as a subscriber of an event manager or called by hand.
///
/// It stops by itself when the device is reset; activating the device again makes a new one.
#[derive(Debug)]
pub struct QueueHandler<M> {
    device: Arc<Device>,
    epoch: u64,
    memory: M,
    queue: Queue,
    notify: EventFd,
}

/// What became of the chains that were available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All are served, the driver notifies for the next.
    All,
    /// There may be more; call again.
    More,
    /// The device was reset, this handler has nothing to do any more.
    Stopped,
}

impl<M: GuestAddressSpace> QueueHandler<M> {
    pub(crate) fn new(
        device: Arc<Device>,
        epoch: u64,
        memory: M,
        queue: Queue,
        notify: EventFd,
    ) -> Self {
        Self {
            device,
            epoch,
            memory,
            queue,
            notify,
        }
    }

    /// Answers available requests, one queue's length of them at the most: a guest that keeps adding more
    /// cannot keep others of the same thread, or a reset, waiting.
    pub fn serve(&mut self) -> Served {
        let memory = self.memory.memory();
        let device = Arc::clone(&self.device);
        let served = device.while_active(self.epoch, || self.serve_batch(&*memory));
        served.unwrap_or(Served::Stopped)
    }

    /// The queue, with its indexes, for a VMM that saves it.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The device whose queue this is.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn serve_batch(&mut self, memory: &M::M) -> Served {
        let used_before = self.queue.next_used();
        let result = self.try_serve_batch(memory);
        // Answers already in the used ring are the driver's to read whatever came after them.
        if self.queue.next_used() != used_before && self.wants_interrupt(memory) {
            self.device.used_buffer();
        }
        result.unwrap_or_else(|error| {
            self.queue_error(&error);
            // Or a driver that mends its ring would not notify.
            if let Err(error) = self.queue.enable_notification(memory) {
                log::debug!("nor can notifications be asked for: {error}");
            }
            Served::All
        })
    }

    fn queue_error(&self, error: &virtio_queue::Error) {
        let total = &self.device.totals.queue_errors;
        if self.device.count_event(total, "queue_error") {
            log::warn!("the guest-request queue cannot be used: {error}");
        }
    }

    fn try_serve_batch(&mut self, memory: &M::M) -> Result<Served, virtio_queue::Error> {
        let mut budget = self.queue.size();
        loop {
            self.queue.disable_notification(memory)?;
            loop {
                // Whoever waits for the queue waits for one request, not for all there are.
                if self.device.is_pausing() {
                    return Ok(Served::More);
                }
                let Some(chain) = self.queue.iter(memory)?.next() else {
                    break;
                };
                let head = chain.head_index();
                let written = self.serve_chain(memory, &chain);
                if let Err(error) = self.queue.add_used(memory, head, written) {
                    // No used element can name a head outside the table; the chains behind it are not to
                    // blame. Anything else is the ring itself.
                    if head < self.queue.size() {
                        return Err(error);
                    }
                    self.queue_error(&error);
                }
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    return Ok(Served::More);
                }
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(Served::All);
            }
        }
    }

    /// Answers one chain; the bytes written to it, 0 if it cannot carry a request and its answer.
    ///
    /// Any framing is legal (S-03): the request is the first bytes of the readable part however it is cut,
    /// the answer goes to the first bytes of the writable part, and what is longer is ignored. The answer's
    /// buffer is looked up before anything is done. Its slices pin the blocks they lie in, if it lies in
    /// device memory, so the request cannot take the buffer of its own answer away: that is BUSY.
    fn serve_chain(&self, memory: &M::M, chain: &DescriptorChain<&M::M>) -> u32 {
        let mut request = [0; Request::LEN];
        let answered = chain
            .clone()
            .reader(memory)
            .and_then(|reader| Ok((reader, chain.clone().writer(memory)?)))
            .ok()
            .filter(|(_, writer)| writer.available_bytes() >= Response::LEN)
            .and_then(|(mut reader, writer)| {
                reader.read_exact(&mut request).ok()?;
                Some(writer)
            })
            .and_then(|mut writer| {
                let response = self.device.process(Request::parse(&request));
                writer.write_all(&response.emit()).ok()
            });
        match answered {
            Some(()) => Response::LEN as u32,
            None => {
                let total = &self.device.totals.unusable_chains;
                if self.device.count_event(total, "unusable_chain") {
                    log::debug!("descriptor chain {} is unusable", chain.head_index());
                }
                0
            }
        }
    }

    /// Whether the driver wants to hear of the answers added since the last time it was asked.
    fn wants_interrupt(&mut self, memory: &M::M) -> bool {
        const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;
        // The answers must be visible before the driver's wish is read, or it may change its mind in between.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags = memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
            if flags.is_ok_and(|flags: u16| u16::from_le(flags) & VIRTQ_AVAIL_F_NO_INTERRUPT != 0) {
                return false;
            }
        }
        // A spurious notification is harmless (V-13), a missing one is not.
        self.queue.needs_notification(memory).unwrap_or(true)
    }
}

impl<M: GuestAddressSpace> MutEventSubscriber for QueueHandler<M> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.notify, EventSet::IN)) {
            log::error!("cannot listen for queue notifications: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.notify.read() {
            log::warn!("cannot read a queue notification: {error}");
        }
        match self.serve() {
            Served::All => {}
            Served::More => {
                if let Err(error) = self.notify.write(1) {
                    log::error!("cannot continue serving the queue: {error}");
                }
            }
            Served::Stopped => {
                if let Err(error) = ops.remove(Events::empty(&self.notify)) {
                    log::debug!("{:?}: {error}", events.event_set());
                }
            }
        }
    }
}

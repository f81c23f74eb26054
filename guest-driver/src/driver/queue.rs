//! The request queue: one request in flight, its buffers in DMA memory of their own.
#![expect(
    unsafe_code,
    reason = "buffers are lent to the device through raw DMA memory"
)]

use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::slice;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use virtio_mem_wire::{GUEST_REQUEST_QUEUE, Request, RequestKind, Response};

use super::Failure;

/// One request is two descriptors.
const QUEUE_SIZE: usize = 2;

/// Where the response begins in the page of buffers: a cache line after the request.
const RESPONSE_OFFSET: usize = 64;

/// The virtqueue and the page its requests and responses lie in.
///
/// G-08: all memory the device is shown comes from [`Hal::dma_alloc`].
pub(super) struct RequestQueue<H: Hal> {
    queue: ManuallyDrop<VirtQueue<H, QUEUE_SIZE>>,
    page: NonNull<u8>,
    page_address: PhysAddr,
    /// Token and kind of the request in flight.
    in_flight: Option<(u16, RequestKind)>,
    device_stopped: bool,
    hal: PhantomData<H>,
}

// SAFETY: The page belongs to the queue alone, and DMA memory can be accessed from any thread.
unsafe impl<H: Hal> Send for RequestQueue<H> {}

impl<H: Hal> fmt::Debug for RequestQueue<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestQueue")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl<H: Hal> RequestQueue<H> {
    /// Sets the queue up. The device must not be running yet.
    pub(super) fn new(transport: &mut impl Transport) -> Result<Self, virtio_drivers::Error> {
        let (page_address, page) = H::dma_alloc(1, BufferDirection::Both);
        if page_address == 0 {
            return Err(virtio_drivers::Error::DmaError);
        }
        match VirtQueue::new(transport, GUEST_REQUEST_QUEUE, false, false) {
            Ok(queue) => Ok(Self {
                queue: ManuallyDrop::new(queue),
                page,
                page_address,
                in_flight: None,
                device_stopped: false,
                hal: PhantomData,
            }),
            Err(error) => {
                // SAFETY: Allocated above, and no device has heard of it.
                unsafe { H::dma_dealloc(page_address, page, 1) };
                Err(error)
            }
        }
    }

    /// Hands `request` to the device.
    pub(super) fn send(
        &mut self,
        request: Request,
        transport: &mut impl Transport,
    ) -> Result<(), virtio_drivers::Error> {
        if self.in_flight.is_some() {
            return Err(virtio_drivers::Error::QueueFull);
        }
        // SAFETY: Nothing is in flight and no other buffers are alive.
        let (sent, answer) = unsafe { buffers(self.page) };
        sent.copy_from_slice(&request.emit());
        // An answer the device does not write is no answer.
        answer.fill(u8::MAX);
        let (sent, answer): (&[u8], &mut [u8]) = (sent, answer);
        // SAFETY: Both buffers lie in the page, which lives until the device has stopped, and are not touched
        // until `receive` has popped the token.
        let token = unsafe { self.queue.add(&[sent], &mut [answer]) }?;
        self.in_flight = Some((token, request.kind()));
        // S-05: the device must see the request before its wish for notifications is read.
        fence(Ordering::SeqCst);
        if self.queue.should_notify() {
            transport.notify(GUEST_REQUEST_QUEUE);
        }
        Ok(())
    }

    /// Whether [`receive`](Self::receive) would find an answer.
    pub(super) fn has_answer(&self) -> bool {
        self.queue.can_pop()
    }

    /// The answer to the request in flight, if there is one.
    pub(super) fn receive(&mut self) -> Result<Option<Response>, Failure> {
        let Some((token, kind)) = self.in_flight else {
            return Ok(None);
        };
        if !self.queue.can_pop() {
            return Ok(None);
        }
        // SAFETY: No other buffers are alive; the device has used these.
        let (sent, answer) = unsafe { buffers(self.page) };
        let (sent, answer): (&[u8], &mut [u8]) = (sent, answer);
        // SAFETY: The buffers are those `send` has added under this token.
        let used_len = unsafe { self.queue.pop_used(token, &[sent], &mut [answer]) }?;
        self.in_flight = None;
        // SAFETY: Popped, so they are ours again, and those above are gone.
        let (_, answer) = unsafe { buffers(self.page) };
        // V-14: bytes beyond the used length are not the device's.
        let len = answer.len().min(used_len as usize);
        Ok(Some(Response::parse(kind, &answer[..len])?))
    }

    /// From now on the device does not use the queue: its memory can be given back when this is dropped.
    /// Without that it is leaked (V-11).
    pub(super) fn device_stopped(&mut self) {
        self.device_stopped = true;
    }
}

impl<H: Hal> Drop for RequestQueue<H> {
    fn drop(&mut self) {
        if self.device_stopped {
            // SAFETY: Dropped here only, and nothing uses it afterwards.
            unsafe { ManuallyDrop::drop(&mut self.queue) };
            // SAFETY: Allocated in `new`, not used by the device any more, and given back here only.
            unsafe { H::dma_dealloc(self.page_address, self.page, 1) };
        }
    }
}

/// The buffers of request and response in the page.
///
/// # Safety
///
/// `page` must be a page of DMA memory that outlives `'a`, not in use by the device, and no other buffers of it
/// may be alive.
unsafe fn buffers<'a>(page: NonNull<u8>) -> (&'a mut [u8], &'a mut [u8]) {
    // SAFETY: The page is initialised and longer than this; the caller vouches for the rest.
    let request = unsafe { slice::from_raw_parts_mut(page.as_ptr(), Request::LEN) };
    // SAFETY: The offset lies in the page.
    let answer = unsafe { page.add(RESPONSE_OFFSET) };
    // SAFETY: As above; the two do not overlap.
    let answer = unsafe { slice::from_raw_parts_mut(answer.as_ptr(), Response::LEN) };
    (request, answer)
}

const _: () = assert!(Request::LEN <= RESPONSE_OFFSET);

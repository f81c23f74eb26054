//! The request queue: several requests in flight, their buffers in DMA memory of their own.
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
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use virtio_mem_wire::{GUEST_REQUEST_QUEUE, Request, RequestKind, Response, ResponseError};

/// The most requests in flight.
pub(super) const MAX_IN_FLIGHT: usize = 8;

/// Bytes of the page of buffers that each request has.
const SLOT_SIZE: usize = 128;

/// Where the response begins in them: a cache line after the request.
const RESPONSE_OFFSET: usize = 64;

/// A virtqueue of any size the device may have: one request is two descriptors.
enum Ring<H: Hal> {
    Of16(VirtQueue<H, 16>),
    Of8(VirtQueue<H, 8>),
    Of4(VirtQueue<H, 4>),
    Of2(VirtQueue<H, 2>),
}

/// Does the same with the ring, whatever its size.
macro_rules! each {
    ($ring:expr, $queue:ident => $body:expr) => {
        match $ring {
            Ring::Of16($queue) => $body,
            Ring::Of8($queue) => $body,
            Ring::Of4($queue) => $body,
            Ring::Of2($queue) => $body,
        }
    };
}

impl<H: Hal> Ring<H> {
    /// As large as is of use, and the device has it (M-03).
    fn new(transport: &mut impl Transport) -> Result<Self, virtio_drivers::Error> {
        match transport.max_queue_size(GUEST_REQUEST_QUEUE) {
            16.. => ring(transport).map(Self::Of16),
            8.. => ring(transport).map(Self::Of8),
            4.. => ring(transport).map(Self::Of4),
            _ => ring(transport).map(Self::Of2),
        }
    }

    const fn capacity(&self) -> usize {
        match self {
            Self::Of16(_) => 8,
            Self::Of8(_) => 4,
            Self::Of4(_) => 2,
            Self::Of2(_) => 1,
        }
    }
}

fn ring<H: Hal, const SIZE: usize>(
    transport: &mut impl Transport,
) -> Result<VirtQueue<H, SIZE>, virtio_drivers::Error> {
    VirtQueue::new(transport, GUEST_REQUEST_QUEUE, false, false)
}

/// The virtqueue and the page its requests and responses lie in.
///
/// G-08: all memory the device is shown comes from [`Hal::dma_alloc`].
pub(super) struct RequestQueue<H: Hal> {
    ring: ManuallyDrop<Ring<H>>,
    page: NonNull<u8>,
    page_address: PhysAddr,
    /// Token and kind of each request in flight.
    in_flight: [Option<(u16, RequestKind)>; MAX_IN_FLIGHT],
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

/// An answer, if it is one.
#[derive(Debug)]
pub(super) struct Answered {
    /// The number of its request.
    pub(super) slot: usize,
    pub(super) response: Result<Response, ResponseError>,
}

impl<H: Hal> RequestQueue<H> {
    /// Sets the queue up. The device must not be running yet.
    pub(super) fn new(transport: &mut impl Transport) -> Result<Self, virtio_drivers::Error> {
        let (page_address, page) = H::dma_alloc(1, BufferDirection::Both);
        if page_address == 0 {
            return Err(virtio_drivers::Error::DmaError);
        }
        match Ring::new(transport) {
            Ok(ring) => Ok(Self {
                ring: ManuallyDrop::new(ring),
                page,
                page_address,
                in_flight: [None; MAX_IN_FLIGHT],
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

    /// How many requests can be in flight at a time.
    pub(super) fn capacity(&self) -> usize {
        self.ring.capacity()
    }

    /// Hands `request` to the device; returns its number while it is in flight, less than
    /// [`capacity`](Self::capacity).
    pub(super) fn send(
        &mut self,
        request: Request,
        transport: &mut impl Transport,
    ) -> Result<usize, virtio_drivers::Error> {
        let mut slots = self.in_flight[..self.ring.capacity()].iter();
        let slot = slots.position(Option::is_none);
        let slot = slot.ok_or(virtio_drivers::Error::QueueFull)?;
        // SAFETY: Nothing is in flight in this slot, and no other buffers of it are alive.
        let (sent, answer) = unsafe { buffers(self.page, slot) };
        sent.copy_from_slice(&request.emit());
        // An answer the device does not write is no answer.
        answer.fill(u8::MAX);
        let (sent, answer): (&[u8], &mut [u8]) = (sent, answer);
        // SAFETY: Both buffers lie in the page, which lives until the device has stopped, and are not touched
        // until `receive` has popped the token.
        let token = each!(&mut *self.ring, queue => unsafe { queue.add(&[sent], &mut [answer]) })?;
        self.in_flight[slot] = Some((token, request.kind()));
        // S-05: the device must see the request before its wish for notifications is read.
        fence(Ordering::SeqCst);
        if each!(&*self.ring, queue => queue.should_notify()) {
            transport.notify(GUEST_REQUEST_QUEUE);
        }
        Ok(slot)
    }

    /// Whether [`receive`](Self::receive) would find an answer.
    pub(super) fn has_answer(&self) -> bool {
        each!(&*self.ring, queue => queue.can_pop())
    }

    /// The next answer, if there is one. An error is a queue that does not work any more.
    pub(super) fn receive(&mut self) -> Result<Option<Answered>, virtio_drivers::Error> {
        let Some(token) = each!(&*self.ring, queue => queue.peek_used()) else {
            return Ok(None);
        };
        let mut slots = self.in_flight.iter();
        let slot = slots.position(|entry| entry.is_some_and(|(sent, _)| sent == token));
        let slot = slot.ok_or(virtio_drivers::Error::WrongToken)?;
        let Some((token, kind)) = self.in_flight[slot] else {
            return Err(virtio_drivers::Error::WrongToken);
        };
        // SAFETY: No other buffers of this slot are alive; the device has used these.
        let (sent, answer) = unsafe { buffers(self.page, slot) };
        let (sent, answer): (&[u8], &mut [u8]) = (sent, answer);
        // SAFETY: The buffers are those `send` has added under this token.
        let used_len = each!(&mut *self.ring, queue => unsafe {
            queue.pop_used(token, &[sent], &mut [answer])
        })?;
        self.in_flight[slot] = None;
        // SAFETY: Popped, so they are ours again, and those above are gone.
        let (_, answer) = unsafe { buffers(self.page, slot) };
        // V-14: bytes beyond the used length are not the device's.
        let len = answer.len().min(used_len as usize);
        let response = Response::parse(kind, &answer[..len]);
        Ok(Some(Answered { slot, response }))
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
            unsafe { ManuallyDrop::drop(&mut self.ring) };
            // SAFETY: Allocated in `new`, not used by the device any more, and given back here only.
            unsafe { H::dma_dealloc(self.page_address, self.page, 1) };
        }
    }
}

/// The buffers of request and response in a slot of the page.
///
/// # Safety
///
/// `page` must be a page of DMA memory that outlives `'a`, `slot` less than [`MAX_IN_FLIGHT`] and not in use by the
/// device, and no other buffers of it may be alive.
unsafe fn buffers<'a>(page: NonNull<u8>, slot: usize) -> (&'a mut [u8], &'a mut [u8]) {
    // SAFETY: The slot lies in the page.
    let start = unsafe { page.add(slot * SLOT_SIZE) };
    // SAFETY: The page is initialised, and the slot longer than this; the caller vouches for the rest.
    let request = unsafe { slice::from_raw_parts_mut(start.as_ptr(), Request::LEN) };
    // SAFETY: The offset lies in the slot.
    let answer = unsafe { start.add(RESPONSE_OFFSET) };
    // SAFETY: As above; the two do not overlap.
    let answer = unsafe { slice::from_raw_parts_mut(answer.as_ptr(), Response::LEN) };
    (request, answer)
}

const _: () = assert!(Request::LEN <= RESPONSE_OFFSET);
const _: () = assert!(RESPONSE_OFFSET + Response::LEN <= SLOT_SIZE);
const _: () = assert!(MAX_IN_FLIGHT * SLOT_SIZE <= PAGE_SIZE);

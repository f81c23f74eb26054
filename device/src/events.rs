//! Size changes as events of a file descriptor.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use virtio_mem_wire::MutableConfig;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::Device;

/// Becomes readable when a size of the device changes. For event loops; its end is its drop.
///
/// It holds one number, however many changes a guest causes while nobody looks: changes in between are
/// merged, and [`take`](Self::take) gives what holds now.
#[derive(Debug)]
pub struct SizeEvents {
    device: Arc<Device>,
    event: Arc<EventFd>,
    seen: MutableConfig,
}

impl SizeEvents {
    pub(crate) fn new(device: Arc<Device>) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        device.size_listeners.add(&event);
        Ok(Self {
            seen: device.config.load(),
            device,
            event,
        })
    }

    /// The sizes, if one has changed since the last call. Never waits.
    pub fn take(&mut self) -> Option<MutableConfig> {
        // Emptied before the sizes are read: what changes in between makes it readable again.
        let _ = self.event.read();
        let now = self.device.config.load();
        (now != self.seen).then(|| {
            self.seen = now;
            now
        })
    }
}

impl AsRawFd for SizeEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Who listens to the sizes of one device.
#[derive(Debug, Default)]
pub(crate) struct SizeListeners(Mutex<Vec<Weak<EventFd>>>);

impl SizeListeners {
    fn add(&self, event: &Arc<EventFd>) {
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Arc::downgrade(event));
    }

    pub(crate) fn signal(&self) {
        let listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for event in listeners.iter().filter_map(Weak::upgrade) {
            // It can only fail because the count is at its end, and then the event is readable as it should.
            let _ = event.write(1);
        }
    }
}

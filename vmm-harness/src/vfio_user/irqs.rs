//! The client's eventfds: how interrupts reach its guest.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS,
};
use vfio_user::IrqInfo;

use crate::transport::pci::{PciInterrupt, PciSignals, VECTOR_COUNT};

const VECTORS: usize = VECTOR_COUNT as usize;

/// What the client has set up with SET_IRQS. Each lock is for a moment: nothing waits under it.
#[derive(Debug, Default)]
pub(super) struct Irqs(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    line: Option<File>,
    /// Set with each signal of the line, until the client has seen to it.
    line_is_masked: bool,
    msix_is_enabled: bool,
    vectors: [Option<File>; VECTORS],
}

/// The interrupts of a PCI device, by index.
pub(super) fn info() -> Vec<IrqInfo> {
    let line = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
    let irq = |index| {
        let (flags, count) = match index {
            VFIO_PCI_INTX_IRQ_INDEX => (line, 1),
            VFIO_PCI_MSIX_IRQ_INDEX => (VFIO_IRQ_INFO_EVENTFD, u32::from(VECTOR_COUNT)),
            _ => (0, 0),
        };
        IrqInfo {
            index,
            flags,
            count,
        }
    };
    (0..VFIO_PCI_NUM_IRQS).map(irq).collect()
}

impl Irqs {
    /// A SET_IRQS message, but for [`is_unmask_by_eventfd`]. Afterwards the line may have to be asserted again.
    pub(super) fn set(
        &self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let data = flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
        let action = flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
        let mut state = self.state();
        match (index, data, action) {
            (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_ACTION_MASK) => {
                state.line_is_masked = true;
            }
            (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_ACTION_UNMASK) => {
                state.line_is_masked = false;
            }
            (_, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_ACTION_TRIGGER) if count == 0 => {
                state.disable(index)?;
            }
            (_, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_ACTION_TRIGGER) => {
                for vector in state.eventfds(index, start, count)? {
                    signal(vector);
                }
            }
            (_, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER) => {
                state.connect(index, start, count, fds)?;
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    /// Whether the client wants to hear of the interrupt line.
    pub(super) fn line_is_connected(&self) -> bool {
        self.state().line.is_some()
    }

    fn unmask_line(&self) {
        self.state().line_is_masked = false;
    }

    /// Forgets the client's eventfds.
    pub(super) fn clear(&self) {
        *self.state() = State::default();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each field stands for itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a SET_IRQS message gives an eventfd that is to unmask the line: see [`Unmask`].
pub(super) fn is_unmask_by_eventfd(index: u32, flags: u32) -> bool {
    let unmask = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    (index, flags) == (VFIO_PCI_INTX_IRQ_INDEX, unmask)
}

/// Unmasks the line whenever the client's eventfd is signalled, as KVM does at the end of the guest's interrupt.
///
/// The eventfd is never read, for that could wait: each signal is an edge of its own.
pub(super) struct Unmask {
    eventfd: File,
    irqs: Arc<Irqs>,
    interrupt: Arc<PciInterrupt>,
}

impl Unmask {
    /// What listens to `eventfd`.
    pub(super) fn new(
        eventfd: File,
        irqs: &Arc<Irqs>,
        interrupt: &Arc<PciInterrupt>,
    ) -> io::Result<Self> {
        Ok(Self {
            eventfd: checked(eventfd)?,
            irqs: Arc::clone(irqs),
            interrupt: Arc::clone(interrupt),
        })
    }
}

impl MutEventSubscriber for Unmask {
    fn init(&mut self, ops: &mut EventOps) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(&self.eventfd, edges)) {
            log::error!("the client's unmasking of its interrupt is not heard: {error:?}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.irqs.unmask_line();
        self.interrupt.refresh_line();
    }
}

impl State {
    /// Takes an eventfd for each interrupt, or none for any: then those are signalled no more.
    fn connect(&mut self, index: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        let eventfds = self.eventfds(index, start, count)?;
        if !fds.is_empty() && fds.len() != eventfds.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let fds: io::Result<Vec<_>> = fds.into_iter().map(checked).collect();
        let mut fds = fds?.into_iter();
        for eventfd in eventfds {
            *eventfd = fds.next();
        }
        match index {
            VFIO_PCI_MSIX_IRQ_INDEX => self.msix_is_enabled = true,
            _ => self.line_is_masked = false,
        }
        Ok(())
    }

    fn disable(&mut self, index: u32) -> io::Result<()> {
        match index {
            VFIO_PCI_MSIX_IRQ_INDEX => {
                self.msix_is_enabled = false;
                self.vectors = Default::default();
            }
            VFIO_PCI_INTX_IRQ_INDEX => self.line = None,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    /// The interrupts a message is about, if there are such.
    fn eventfds(&mut self, index: u32, start: u32, count: u32) -> io::Result<&mut [Option<File>]> {
        let all = match index {
            VFIO_PCI_INTX_IRQ_INDEX => std::slice::from_mut(&mut self.line),
            VFIO_PCI_MSIX_IRQ_INDEX => &mut self.vectors,
            _ => &mut [],
        };
        let end = start.checked_add(count).map(|end| end as usize);
        let range = end.filter(|_| count > 0).map(|end| start as usize..end);
        range
            .and_then(|range| all.get_mut(range))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl PciSignals for Irqs {
    fn msix_is_enabled(&self) -> bool {
        self.state().msix_is_enabled
    }

    fn send_message(&self, vector: u16) {
        if let Some(vector) = self.state().vectors.get_mut(usize::from(vector)) {
            signal(vector);
        }
    }

    fn assert_line(&self) {
        let mut state = self.state();
        if !state.line_is_masked {
            state.line_is_masked = true;
            signal(&mut state.line);
        }
    }
}

/// `file`, if it is an eventfd: of anything else nobody could say that it does not make the device wait.
fn checked(file: File) -> io::Result<File> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        let error = "not an eventfd";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    // The client may undo it, which is why `signal` does not rely on it alone.
    rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK)?;
    Ok(file)
}

/// Signals an eventfd, if there is one. The client may have filled it: it must not make the device wait.
fn signal(eventfd: &mut Option<File>) {
    let Some(eventfd) = eventfd else {
        return;
    };
    let mut poll = [PollFd::new(eventfd, PollFlags::OUT)];
    let now = Timespec::default();
    match rustix::event::poll(&mut poll, Some(&now)) {
        Ok(1) if poll.iter().all(|fd| fd.revents().contains(PollFlags::OUT)) => {}
        result => return log::debug!("an interrupt cannot be signalled: {result:?}"),
    }
    if let Err(error) = eventfd.write_all(&1u64.to_ne_bytes()) {
        log::debug!("an interrupt cannot be signalled: {error}");
    }
}

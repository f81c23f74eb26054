//! The memory device as a process of its own: a whole PCI device behind vfio-user.
//!
//! A VMM that speaks vfio-user (QEMU, Cloud Hypervisor) connects to a socket, hands over the guest's memory as
//! files, and carries the guest's register accesses; the device answers them, serves the queue in that memory, and
//! signals eventfds. Nothing has to be linked into the VMM.
//!
//! | file | what |
//! |---|---|
//! | `session.rs` | the messages of one client, and what is left when it goes |
//! | `memory.rs` | the client's memory, mapped and unmapped by it: RAM for the queue, and the device's region |
//! | `irqs.rs` | the client's eventfds |
//!
//! The protocol itself is that of the crate `vfio_user`, whose limits are these: one client at a time, no access to
//! memory that is not given as a file (DMA_READ, DMA_WRITE), no ioeventfds, no dirty tracking, and a client that sends
//! a malformed VERSION ends in a panic, which is caught here and ends its connection.

mod irqs;
mod memory;
mod session;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::ServerRegion;
use virtio_mem::{LentFiles, VirtioMem};

use self::irqs::Irqs;
use self::memory::ClientMemory;
use self::session::Session;
use crate::events::{EventLoop, EventLoopError};
use crate::transport::pci::{
    CONFIG_SPACE_SIZE, MSIX_BAR_SIZE, PciInterrupt, PciTransport, REGISTER_BAR_SIZE,
};

pub use crate::socket::{ServerSocket, SocketError};

/// The server cannot start, or cannot go on.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The event loop that serves the queue.
    #[error(transparent)]
    Events(#[from] EventLoopError),
    /// No descriptor is left.
    #[error("descriptor of the {0}")]
    Descriptor(&'static str, #[source] io::Error),
    /// Nobody can connect any more.
    #[error("cannot accept a connection")]
    Accept(#[source] io::Error),
    /// A fault of its own.
    #[error("the server panicked")]
    Panicked,
}

/// Serves one device to one client after another.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    session: Session,
    // Last: the session removes its handler from it.
    _events: EventLoop,
}

struct Listener(vfio_user::Server);

impl Server {
    /// Serves `device`, whose backing is `lent`, to whoever connects to `socket`.
    ///
    /// # Errors
    ///
    /// [`ServerError`]; nothing runs then.
    pub fn new(
        socket: &ServerSocket,
        device: VirtioMem,
        lent: LentFiles,
    ) -> Result<Self, ServerError> {
        let events = EventLoop::start()?;
        let irqs = Arc::new(Irqs::default());
        let memory = ClientMemory::new(&device, lent, events.remote().clone());
        let interrupt = PciInterrupt::new(Arc::<Irqs>::clone(&irqs));
        let transport = PciTransport::new(
            device,
            memory.space().clone(),
            events.remote().clone(),
            interrupt,
        );
        let transport =
            transport.map_err(|error| ServerError::Descriptor("queue notification", error))?;
        let listener = socket
            .listener()
            .map_err(|error| ServerError::Descriptor("socket", error))?;
        let resettable = true;
        let listener =
            vfio_user::Server::from_owned_fd(listener, resettable, irqs::info(), regions());
        Ok(Self {
            listener: Listener(listener),
            session: Session::new(transport, memory, irqs, events.remote().clone()),
            _events: events,
        })
    }

    /// Waits for a client and serves it until it goes. Nothing of it is left when this returns: its memory is unmapped,
    /// its descriptors are closed, and all blocks are unplugged. What it had plugged keeps its contents: the guest may
    /// run on without the device.
    ///
    /// # Errors
    ///
    /// If nobody can connect any more. What a client does wrong is logged, and ends its connection at most.
    pub fn serve_client(&mut self) -> Result<(), ServerError> {
        let Self {
            listener, session, ..
        } = self;
        // The session is not in the middle of anything when the crate panics over a message it cannot parse; should a
        // panic be its own, the end that follows takes everything back all the same.
        let result = catch_unwind(AssertUnwindSafe(|| listener.0.run(session)));
        session.end();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(vfio_user::Error::SocketAccept(error))) => match error.kind() {
                io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(ServerError::Accept(error)),
            },
            Ok(Err(error)) => {
                log::warn!("the connection to the client is broken: {error}");
                Ok(())
            }
            Err(_) => {
                log::warn!("the client does not speak vfio-user; its connection is closed");
                Ok(())
            }
        }
    }
}

/// The regions of a PCI device: two BARs and the configuration space. None can be mapped.
fn regions() -> Vec<ServerRegion> {
    let bytes = |index| match index {
        0 => REGISTER_BAR_SIZE.into(),
        1 => MSIX_BAR_SIZE.into(),
        VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_SPACE_SIZE,
        _ => 0,
    };
    let region = |index| {
        let size = bytes(index);
        ServerRegion {
            region_info: vfio_region_info {
                argsz: size_of::<vfio_region_info>() as u32,
                flags: match size {
                    0 => 0,
                    _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
                },
                index,
                size,
                ..Default::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

//! The guest program without KVM: threads of this process instead of vCPUs.
//!
//! Driver and device meet at the same registers and in the same rings as on KVM. What is missing is the wall:
//! the guest program is trusted here, and a thread of it cannot be stopped against its will.

mod arena;
mod platform;
mod shadow;
mod transport;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmem_guest::abi::{BootInfo, command};
use vmem_guest::{Guest, Parameters};

pub use self::arena::{Arena, ArenaHal};
pub use self::platform::HostMemory;
pub use self::shadow::{Access, Shadow, Violation};
pub use self::transport::{LoopbackTransport, Registers};

use self::platform::HostPlatform;
use crate::BootMemory;
use crate::bus::Bus;
use crate::layout::Layout;
use crate::lifecycle::Lifecycle;
use crate::mailbox::SharedMailbox;
use crate::outcome::{Outcome, panic_message};

/// A guest in this process could not be started.
#[derive(Debug, Error)]
pub enum InProcessError {
    /// A thread for a vCPU.
    #[error("thread for vCPU {0}")]
    Thread(usize, #[source] io::Error),
    /// The guest's heap is not in boot memory.
    #[error("DMA memory")]
    Arena(#[from] GuestMemoryError),
}

/// A guest that runs in this process.
#[derive(Debug)]
pub(crate) struct InProcess {
    parts: Arc<Parts>,
    threads: Vec<JoinHandle<()>>,
}

/// What the vCPU threads share.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) info: BootInfo,
    pub(crate) mailbox: SharedMailbox,
    pub(crate) bus: Arc<Bus>,
    pub(crate) lifecycle: Arc<Lifecycle>,
}

/// The guest once vCPU 0 has booted it; `None` if that failed. A thread that uses it has entered the arena.
type Booted = OnceLock<Option<Guest<HostPlatform>>>;

impl InProcess {
    pub(crate) fn start(
        parts: Parts,
        memory: &Arc<BootMemory>,
        layout: &Layout,
    ) -> Result<Self, InProcessError> {
        let arena = Arc::new(Arena::new(memory, layout.heap.clone())?);
        let guest = Arc::new(Booted::new());
        let mut running = Self {
            parts: Arc::new(parts),
            threads: Vec::new(),
        };
        for index in 0..layout.vcpu_count {
            let arena = Arc::clone(&arena);
            let guest = Arc::clone(&guest);
            let parts = Arc::clone(&running.parts);
            let run = move || {
                arena.enter();
                HostPlatform::enter_vcpu(index);
                parts.run_vcpu(index, &guest);
                // The last thread drops the guest, here, while it has its arena.
                drop(guest);
            };
            let thread = thread::Builder::new()
                .name(format!("vmem-vcpu{index}"))
                .spawn(run)
                // Dropping `running` ends and joins those that run already.
                .map_err(|error| InProcessError::Thread(index, error))?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// Waits for the threads. The guest must have been told to stop.
    pub(crate) fn join(&mut self) {
        for (vcpu, thread) in self.threads.drain(..).enumerate() {
            if let Err(panic) = thread.join() {
                let message = panic_message(&*panic);
                self.parts
                    .lifecycle
                    .finish(Outcome::Panicked { vcpu, message });
            }
        }
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.parts.stop();
        self.join();
    }
}

impl Parts {
    /// Tells the guest to come to its end.
    pub(crate) fn stop(&self) {
        self.mailbox
            .command
            .fetch_or(command::STOP, Ordering::AcqRel);
        self.bus.port.close();
    }

    /// The guest ends like this.
    fn fail(&self, outcome: Outcome) {
        self.lifecycle.finish(outcome);
        self.stop();
    }

    /// `None`, and an outcome, if the guest cannot use the device.
    fn boot(self: &Arc<Self>) -> Option<Guest<HostPlatform>> {
        let booted = self.try_boot();
        let fail = |message| self.fail(Outcome::Panicked { vcpu: 0, message });
        booted.map_err(fail).ok()
    }

    fn try_boot(self: &Arc<Self>) -> Result<Guest<HostPlatform>, String> {
        let page_size = Parameters::from(&self.info).profile.page_size();
        let mut memory = HostMemory::new(page_size);
        let mut transports = Vec::new();
        for transport in &self.bus.transports {
            let device = transport.device();
            let shadow = Arc::new(Shadow::new(device.geometry(), true));
            let observed = device.handle().add_observer(Arc::clone(&shadow));
            observed.map_err(|error| error.to_string())?;
            memory = memory.with(device, shadow);
            transports.push(LoopbackTransport::new(Arc::clone(transport)));
        }
        let platform = HostPlatform {
            parts: Arc::clone(self),
            started: Instant::now(),
            memory,
        };
        let guest = Guest::boot(platform, transports, Parameters::from(&self.info));
        guest.map_err(|error| error.to_string())
    }

    fn run_vcpu(self: &Arc<Self>, index: usize, guest: &Booted) {
        let run = || {
            let guest = match index {
                0 => guest.get_or_init(|| self.boot()),
                _ => guest.wait(),
            };
            if let Some(guest) = guest {
                guest.run_vcpu(index);
            }
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(()) => self.lifecycle.vcpu_exited(),
            Err(panic) => {
                // Those who wait for the guest to boot need not wait any longer.
                guest.get_or_init(|| None);
                let message = panic_message(&*panic);
                self.fail(Outcome::Panicked {
                    vcpu: index,
                    message,
                });
            }
        }
    }
}

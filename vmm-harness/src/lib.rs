//! A minimal VMM that resizes the memory of a real guest.
//!
//! [`Machine`] starts a guest with a memory device, on KVM or in this process, and is what the command line
//! and the tests work with. Everything else is a part of it:
//!
//! | to find | look at |
//! |---|---|
//! | where things are in guest memory | [`layout`] |
//! | the state a vCPU starts in | `boot.rs` |
//! | what a vCPU thread does about each exit | `vcpu.rs` |
//! | who may run guest code, and how it is stopped | `gate.rs`, `kick.rs` |
//! | how the address of a forbidden access is found | `vcpu.rs`, [`slots`] |
//! | the registers of virtio-mmio and virtio-pci | [`transport`] |
//! | the device behind vfio-user, for VMMs elsewhere | [`vfio_user`] |
//! | what host and guest program share | `mailbox.rs`, `port.rs`, [`vmem_guest::abi`] |
//! | the guest without KVM, and what checks its accesses | [`in_process`] |
//! | what `vmem demo` does and checks | [`demo`] |
//! | what can be done to a device, whoever asks | [`control`] |
//! | HTTP on a Unix socket, both ends | [`api`] |
//! | what `vmem run` keeps alive | [`run`] |
//! | what `vmem watch` shows | [`watch`] |
//! | what keeps text from elsewhere from controlling a terminal | [`text`] |
//! | what can be made to go wrong | [`faults`] |
//! | what `vmem serve` does | [`serve`] |
//! | what `vmem stress` does and checks | [`stress`] |
//! | the page it leaves behind | [`report`] |
//! | what `vmem replay` does and compares | [`replay`] |
//! | what `vmem linux` boots, tries and checks | [`linux`] |
//!
//! # Example
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use virtio_mem::{Anonymous, VirtioMem};
//! use vm_memory::GuestAddress;
//! use vmm_harness::layout::REGION_START;
//! use vmm_harness::{Machine, MachineConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let backing = Anonymous::base_pages(4 << 30)?;
//! let device = VirtioMem::builder(GuestAddress(REGION_START), backing).block_size(2 << 20);
//! let machine = Machine::start(&MachineConfig::default(), device)?;
//! machine.handle().resize(1 << 30)?;
//! println!("{:?}", machine.settled(1 << 30, Duration::from_secs(10))?);
//! println!("{}", machine.stop(Duration::from_secs(1)));
//! # Ok(())
//! # }
//! ```

pub mod api;
mod backend;
mod boot;
mod bus;
pub mod control;
pub mod demo;
mod events;
pub mod faults;
mod gate;
pub mod in_process;
mod kick;
pub mod layout;
mod lifecycle;
pub mod linux;
mod machine;
mod mailbox;
mod outcome;
mod port;
pub mod replay;
pub mod report;
pub mod run;
pub mod serve;
mod signals;
mod size;
pub mod slots;
mod socket;
pub mod stress;
pub mod text;
pub mod transport;
mod vcpu;
pub mod vfio_user;
mod vm;
pub mod watch;

pub use backend::{Backend, KvmError, kvm_module, open_kvm};
pub use boot::BootError;
pub use events::{EventLoop, EventLoopError, EventsError, Remote, Subscriber};
pub use in_process::InProcessError;
pub use layout::LayoutError;
pub use machine::{GuestKind, Machine, MachineConfig, ReportError, StartError};
pub use mailbox::{BlockUse, Report, WorkerReport};
pub use outcome::{Crash, Outcome, UnpluggedAccess, VcpuError};
pub use size::{Size, parse_size};
pub use transport::{InterruptCounts, InterruptLine, MmioTransport};
pub use vcpu::ExitCounts;
pub use vm::VmError;
pub use vmem_guest::abi::{DriverState, Shortfall, Workload};

/// Memory the guest has from the start.
pub type BootMemory = vm_memory::GuestMemoryMmap<()>;

/// The guest program that `vmem` boots.
pub const GUEST_IMAGE: &[u8] = include_bytes!(env!("VMEM_GUEST_IMAGE"));

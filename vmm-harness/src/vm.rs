//! A KVM virtual machine: boot memory, vCPU threads, and their end.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands an address range to the guest"
)]

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::BootMemory;
use crate::boot::{general_registers, system_registers};
use crate::bus::Bus;
use crate::gate::Gate;
use crate::kick;
use crate::layout::{Layout, PAGE, VIRTIO_MMIO};
use crate::lifecycle::Lifecycle;
use crate::mailbox::SharedMailbox;
use crate::outcome::{Outcome, VcpuError, panic_message};
use crate::port::Port;
use crate::transport::NOTIFY_OFFSET;
use crate::vcpu::{self, ExitCounts, ExitTotals, RevokeSlots, VcpuContext, VcpuEnd};

/// Boot memory is this slot; the device's follow.
const BOOT_MEMORY_SLOT: u32 = 0;
/// The first slot number for others.
pub(crate) const FIRST_FREE_SLOT: u32 = BOOT_MEMORY_SLOT + 1;
/// Where Intel processors without "unrestricted guest" keep three pages; below 4 GiB, above everything here.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Assumed where KVM does not say how fast the time stamp counter runs. It only paces the guest's retries.
const TSC_KHZ_FALLBACK: u64 = 2_000_000;

/// KVM did not do something.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// An ioctl.
    #[error("{what}")]
    Kvm {
        /// What it was for.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// A thread for a vCPU.
    #[error("thread for vCPU {0}")]
    Thread(usize, #[source] io::Error),
    /// Boot memory has no address.
    #[error("boot memory")]
    Memory(#[from] GuestMemoryError),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

/// A virtual machine that does not run yet.
#[derive(Debug)]
pub(crate) struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    /// Keeps the memory for as long as the guest may use it.
    memory: Arc<BootMemory>,
}

/// What the vCPUs share besides KVM.
#[derive(Clone)]
pub(crate) struct VmParts {
    pub(crate) bus: Arc<Bus>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) mailbox: SharedMailbox,
    pub(crate) revoke_slots: Arc<RevokeSlots>,
}

/// A virtual machine that runs. It ends when its vCPUs are done or it is halted; [`join`](Self::join) it then.
#[derive(Debug)]
pub(crate) struct RunningVm {
    gate: Arc<Gate>,
    port: Arc<Port>,
    lifecycle: Arc<Lifecycle>,
    exits: Arc<ExitTotals>,
    threads: Vec<JoinHandle<()>>,
    _memory: Arc<BootMemory>,
}

impl Vm {
    /// A virtual machine with `memory` as its memory.
    pub(crate) fn new(kvm_device: Kvm, memory: Arc<BootMemory>) -> Result<Self, VmError> {
        let fd = kvm_device
            .create_vm()
            .map_err(kvm("create a virtual machine"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(kvm("set the TSS address"))?;
        let start = GuestAddress(0);
        let boot_memory = kvm_userspace_memory_region {
            slot: BOOT_MEMORY_SLOT,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: memory.last_addr().0 + 1,
            userspace_addr: memory.get_host_address(start)? as u64,
        };
        // SAFETY: one contiguous mapping that holds guest memory only. `memory` lives in `self` and then in
        // `RunningVm`, beyond the last vCPU thread.
        unsafe { fd.set_user_memory_region(boot_memory) }.map_err(kvm("map boot memory"))?;
        Ok(Self {
            kvm: kvm_device,
            fd: Arc::new(fd),
            memory,
        })
    }

    /// For whoever maps slots of its own.
    pub(crate) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Starts every vCPU at `entry`.
    pub(crate) fn start(
        self,
        parts: &VmParts,
        layout: &Layout,
        entry: u64,
    ) -> Result<RunningVm, VmError> {
        kick::install_handler().map_err(kvm("install the signal handler"))?;
        for (registers, transport) in (VIRTIO_MMIO..)
            .step_by(PAGE as usize)
            .zip(&parts.bus.transports)
        {
            let notify = IoEventAddress::Mmio(registers + NOTIFY_OFFSET);
            self.fd
                .register_ioevent(transport.notify(), &notify, 0u32)
                .map_err(kvm("connect queue notifications"))?;
        }
        let vcpus: Vec<VcpuFd> = (0..layout.vcpu_count)
            .map(|index| self.create_vcpu(index, layout, entry))
            .collect::<Result<_, _>>()?;
        let mut running = RunningVm {
            gate: Arc::new(Gate::new(layout.vcpu_count)),
            port: Arc::clone(&parts.bus.port),
            lifecycle: Arc::clone(&parts.lifecycle),
            exits: Arc::default(),
            threads: Vec::new(),
            _memory: self.memory,
        };
        for (index, fd) in vcpus.into_iter().enumerate() {
            let context = VcpuContext {
                index,
                gate: Arc::clone(&running.gate),
                bus: Arc::clone(&parts.bus),
                exits: Arc::clone(&running.exits),
                revoke_slots: Arc::clone(&parts.revoke_slots),
            };
            let parts = parts.clone();
            let thread = thread::Builder::new()
                .name(format!("vmem-vcpu{index}"))
                .spawn(move || run_vcpu(fd, &context, &parts))
                // Dropping `running` ends and joins those that run already.
                .map_err(|error| VmError::Thread(index, error))?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    fn create_vcpu(&self, index: usize, layout: &Layout, entry: u64) -> Result<VcpuFd, VmError> {
        let vcpu = self
            .fd
            .create_vcpu(index as u64)
            .map_err(kvm("create a vCPU"))?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("ask for the supported CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
        let reset = vcpu.get_sregs().map_err(kvm("read system registers"))?;
        vcpu.set_sregs(&system_registers(reset, layout))
            .map_err(kvm("set system registers"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_or(TSC_KHZ_FALLBACK, u64::from);
        vcpu.set_regs(&general_registers(layout, entry, index, tsc_khz))
            .map_err(kvm("set registers"))?;
        Ok(vcpu)
    }
}

/// The life of a vCPU thread.
fn run_vcpu(fd: VcpuFd, context: &VcpuContext, parts: &VmParts) {
    let outcome = match vcpu::run(fd, context) {
        VcpuEnd::Exited => return parts.lifecycle.vcpu_exited(),
        VcpuEnd::Halted => return,
        VcpuEnd::Panicked => Outcome::Panicked {
            vcpu: context.index,
            message: parts.mailbox.message().unwrap_or_default(),
        },
        VcpuEnd::Fatal(outcome) => outcome,
    };
    parts.lifecycle.finish(outcome);
    context.gate.close();
    context.bus.port.close();
}

impl RunningVm {
    /// Ends every vCPU where it is.
    pub(crate) fn halt(&self) {
        self.gate.close();
        self.port.close();
    }

    /// Waits for the vCPU threads, which must be done or halted.
    pub(crate) fn join(&mut self) {
        for (vcpu, thread) in self.threads.drain(..).enumerate() {
            if let Err(panic) = thread.join() {
                let reason = VcpuError::Thread(panic_message(&*panic));
                self.lifecycle.finish(Outcome::Failed { vcpu, reason });
            }
        }
    }

    pub(crate) fn hold(&self, vcpu: usize) -> bool {
        self.gate.hold(vcpu)
    }

    pub(crate) fn release(&self, vcpu: usize) {
        self.gate.release(vcpu);
    }

    pub(crate) fn exits(&self) -> ExitCounts {
        self.exits.snapshot()
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        self.halt();
        self.join();
    }
}

//! The thread of one vCPU.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, Reaction};
use crate::gate::Gate;
use crate::kick::KickableVcpu;
use crate::outcome::{Crash, Outcome, UnpluggedAccess, VcpuError};

/// Takes the device's memory slots from the guest, see [`crate::slots`].
pub(crate) type RevokeSlots = dyn Fn() -> io::Result<()> + Send + Sync;

/// What a vCPU thread needs.
#[derive(Clone)]
pub(crate) struct VcpuContext {
    pub(crate) index: usize,
    pub(crate) gate: Arc<Gate>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) exits: Arc<ExitTotals>,
    pub(crate) revoke_slots: Arc<RevokeSlots>,
}

/// How a vCPU ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VcpuEnd {
    /// The guest is done with it.
    Exited,
    /// The gate was closed.
    Halted,
    /// The whole guest ends.
    Fatal(Outcome),
    /// The guest panicked; its message is in the mailbox.
    Panicked,
}

/// Exits to the VMM so far, all vCPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// Reads of registers.
    pub mmio_reads: u64,
    /// Writes of registers; notifications that went to an ioeventfd are not among them.
    pub mmio_writes: u64,
    /// Interrupted by a signal.
    pub interrupted: u64,
    /// Memory that could not be accessed.
    pub faults: u64,
    /// Anything else.
    pub others: u64,
}

#[derive(Debug, Default)]
pub(crate) struct ExitTotals {
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    interrupted: AtomicU64,
    faults: AtomicU64,
    others: AtomicU64,
}

impl ExitTotals {
    pub(crate) fn snapshot(&self) -> ExitCounts {
        let load = |total: &AtomicU64| total.load(Ordering::Relaxed);
        ExitCounts {
            mmio_reads: load(&self.mmio_reads),
            mmio_writes: load(&self.mmio_writes),
            interrupted: load(&self.interrupted),
            faults: load(&self.faults),
            others: load(&self.others),
        }
    }
}

fn count(total: &AtomicU64) {
    total.fetch_add(1, Ordering::Relaxed);
}

/// What is left to do about an exit once the vCPU is outside the gate.
enum Next {
    Run,
    /// An unplugged block, the address is known.
    Unplugged {
        address: u64,
        write: bool,
        len: usize,
    },
    /// Memory that is not accessible, the address is not known.
    Fault,
    End(VcpuEnd),
    Crash,
    InternalError,
    Fail(VcpuError),
}

/// Runs `fd` on this thread until it ends.
pub(crate) fn run(fd: VcpuFd, context: &VcpuContext) -> VcpuEnd {
    let mut vcpu = KickableVcpu::new(fd);
    // The device's slots are gone and the others wait, to see where the last access of this vCPU goes.
    let mut examining = false;
    loop {
        vcpu.disarm();
        let Some(inside) = context.gate.enter(context.index) else {
            return VcpuEnd::Halted;
        };
        let exit = vcpu.run();
        drop(inside);
        let next = react(exit, context);
        let failure = match next {
            // While examining: interrupted before the access was made again, which is possible at any time.
            Next::Run => continue,
            Next::End(end) => return end,
            Next::Unplugged { address, .. } if context.bus.is_plugged(address) => {
                VcpuError::HostMemory
            }
            Next::Unplugged {
                address,
                write,
                len,
            } => {
                return VcpuEnd::Fatal(Outcome::UnpluggedAccess(UnpluggedAccess {
                    vcpu: context.index,
                    address,
                    write,
                    len,
                }));
            }
            Next::Fault if examining => VcpuError::HostMemory,
            Next::Fault => {
                // If another vCPU is being examined already, this one never gets in again.
                if !context.gate.isolate(context.index) {
                    continue;
                }
                match (context.revoke_slots)() {
                    Ok(()) => {
                        examining = true;
                        continue;
                    }
                    Err(error) => VcpuError::Slots(error.to_string()),
                }
            }
            Next::Crash => {
                return VcpuEnd::Fatal(Outcome::Crashed(crash(&mut vcpu, context.index)));
            }
            Next::InternalError => VcpuError::Internal {
                suberror: internal_suberror(&mut vcpu),
                rip: vcpu.fd().get_regs().map_or(0, |regs| regs.rip),
            },
            Next::Fail(reason) => reason,
        };
        return VcpuEnd::Fatal(Outcome::Failed {
            vcpu: context.index,
            reason: failure,
        });
    }
}

/// Serves an exit as far as that needs no more than the exit itself.
fn react(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>, context: &VcpuContext) -> Next {
    let exits = &context.exits;
    let after = |reaction, address, write, len| match reaction {
        Reaction::Continue => Next::Run,
        Reaction::Exit => Next::End(VcpuEnd::Exited),
        Reaction::Panic => Next::End(VcpuEnd::Panicked),
        Reaction::Unplugged => Next::Unplugged {
            address,
            write,
            len,
        },
    };
    match exit {
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&exits.mmio_reads);
            after(
                context.bus.read(context.index, address, data),
                address,
                false,
                data.len(),
            )
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&exits.mmio_writes);
            after(
                context.bus.write(context.index, address, data),
                address,
                true,
                data.len(),
            )
        }
        Ok(VcpuExit::Intr) => {
            count(&exits.interrupted);
            Next::Run
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            count(&exits.interrupted);
            Next::Run
        }
        Ok(VcpuExit::MemoryFault { .. }) => {
            count(&exits.faults);
            Next::Fault
        }
        Err(error) if error.errno() == libc::EFAULT => {
            count(&exits.faults);
            Next::Fault
        }
        Err(error) => Next::Fail(VcpuError::Run(error)),
        Ok(other) => {
            count(&exits.others);
            match other {
                VcpuExit::Shutdown => Next::Crash,
                VcpuExit::InternalError => Next::InternalError,
                VcpuExit::FailEntry(reason, _) => Next::Fail(VcpuError::Entry(reason)),
                other => Next::Fail(VcpuError::UnexpectedExit(format!("{other:?}"))),
            }
        }
    }
}

fn crash(vcpu: &mut KickableVcpu, index: usize) -> Crash {
    Crash {
        vcpu: index,
        rip: vcpu.fd().get_regs().map_or(0, |registers| registers.rip),
        cr2: vcpu.fd().get_sregs().map_or(0, |registers| registers.cr2),
    }
}

#[expect(unsafe_code, reason = "the kernel's exit information is a union")]
fn internal_suberror(vcpu: &mut KickableVcpu) -> u32 {
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the member the kernel filled; any bits
    // are valid in it.
    unsafe { vcpu.fd().get_kvm_run().__bindgen_anon_1.internal.suberror }
}

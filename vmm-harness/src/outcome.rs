//! How a guest ends.

use std::any::Any;
use std::fmt;

use thiserror::Error;

/// Why a machine does not run any more. The first reason counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every vCPU said that it is done.
    Exited,
    /// The host stopped a guest that was not done.
    Stopped,
    /// The guest gave up.
    Panicked {
        /// The vCPU it happened on.
        vcpu: usize,
        /// What the guest says about it.
        message: String,
    },
    /// The guest touched memory the device has not plugged.
    UnpluggedAccess(UnpluggedAccess),
    /// The guest ran into an exception it has no handler for.
    Crashed(Crash),
    /// The host could not go on.
    Failed {
        /// The vCPU it happened on.
        vcpu: usize,
        /// What happened.
        reason: VcpuError,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited => write!(f, "the guest is done"),
            Self::Stopped => write!(f, "the guest was stopped"),
            Self::Panicked { vcpu, message } => {
                write!(f, "the guest panicked on vCPU {vcpu}: {message}")
            }
            Self::UnpluggedAccess(access) => access.fmt(f),
            Self::Crashed(crash) => crash.fmt(f),
            Self::Failed { vcpu, reason } => write!(f, "vCPU {vcpu} failed: {reason}"),
        }
    }
}

/// An access of the guest to a block that is not plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("vCPU {vcpu} {} {len} bytes at {address:#x}, which is not plugged", self.verb())]
pub struct UnpluggedAccess {
    /// The vCPU.
    pub vcpu: usize,
    /// Guest-physical address.
    pub address: u64,
    /// Whether it wanted to write.
    pub write: bool,
    /// Bytes, as far as the access was looked at.
    pub len: usize,
}

impl UnpluggedAccess {
    fn verb(&self) -> &'static str {
        if self.write { "wrote" } else { "read" }
    }
}

/// An exception without a handler: a triple fault.
///
/// Some processors reset the vCPU before the host can look; the numbers are then those after reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("vCPU {vcpu} took an exception nobody handles (rip {rip:#x}, cr2 {cr2:#x})")]
pub struct Crash {
    /// The vCPU.
    pub vcpu: usize,
    /// Address of the instruction.
    pub rip: u64,
    /// The address of the last page fault, if this was one.
    pub cr2: u64,
}

/// What the host could not do about a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// `KVM_RUN` failed.
    #[error("KVM_RUN: {0}")]
    Run(kvm_ioctls::Error),
    /// `KVM_RUN` says EFAULT, and not because of the device-managed region.
    #[error("memory of the VMM that the guest reached for cannot be accessed")]
    HostMemory,
    /// KVM could not emulate an instruction, or found itself confused.
    #[error("KVM reports an internal error, suberror {suberror}, at rip {rip:#x}")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`
        suberror: u32,
        /// Address of the instruction.
        rip: u64,
    },
    /// The processor refused the registers.
    #[error("the processor refused to enter the guest, reason {0:#x}")]
    Entry(u64),
    /// An exit this harness never asked for.
    #[error("unexpected exit: {0}")]
    UnexpectedExit(String),
    /// The device's memory slots could not be removed to find the address of an access.
    #[error("memory slots cannot be removed: {0}")]
    Slots(String),
    /// A bug in the harness.
    #[error("the vCPU thread panicked: {0}")]
    Thread(String),
}

/// What a caught panic says.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
        .to_owned()
}

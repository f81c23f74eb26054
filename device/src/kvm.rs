//! Memory slots of a KVM virtual machine (feature `kvm`).
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands an address range to the guest"
)]

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VmFd};

use crate::slots::{Slot, SlotMapper};

/// Maps the device's slots into a KVM virtual machine.
#[derive(Debug)]
pub struct KvmSlots {
    vm: Arc<VmFd>,
    first: u32,
}

impl KvmSlots {
    /// Slots of `vm` from number `first` on. The caller keeps as many numbers free as the device may need,
    /// see [`VirtioMem::max_slot_count`](crate::VirtioMem::max_slot_count); a device that may need more than
    /// the VM can have is not built.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, first: u32) -> Self {
        Self { vm, first }
    }

    fn set(&self, slot: &Slot, memory_size: u64) -> io::Result<()> {
        let number = self.first.checked_add(slot.index);
        let region = kvm_userspace_memory_region {
            slot: number.ok_or(io::ErrorKind::InvalidInput)?,
            flags: 0,
            guest_phys_addr: slot.guest_address,
            memory_size,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the slot's memory is the backing's mapping, which the device keeps until it has unmapped
        // every slot, and which holds guest memory only.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }
}

impl SlotMapper for KvmSlots {
    fn max_count(&self) -> u64 {
        // Kernels that do not tell have 32 (the documentation of KVM_CAP_NR_MEMSLOTS).
        let limit = match self.vm.check_extension_int(Cap::NrMemslots) {
            limit @ 1.. => limit.unsigned_abs(),
            _ => 32,
        };
        u64::from(limit.saturating_sub(self.first))
    }

    fn map(&self, slot: &Slot) -> io::Result<()> {
        self.set(slot, slot.len)
    }

    fn unmap(&self, slot: &Slot) -> io::Result<()> {
        self.set(slot, 0)
    }
}

//! The device's KVM slots, which can be taken from the guest all at once.
//!
//! When a guest touches an unplugged block inside a slot, `KVM_RUN` says EFAULT and not where. With the slot
//! gone the same access comes back as an MMIO exit, which has the address.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_mem::{KvmSlots, Slot, SlotMapper};

/// Maps slots through KVM until they are revoked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RevocableSlots {
    kvm: Arc<KvmSlots>,
    /// The slots there are; `None` once they are revoked.
    mapped: Arc<Mutex<Option<BTreeMap<u32, Slot>>>>,
}

impl RevocableSlots {
    /// Slots that `kvm` maps.
    #[must_use]
    pub fn new(kvm: KvmSlots) -> Self {
        Self {
            kvm: Arc::new(kvm),
            mapped: Arc::new(Mutex::new(Some(BTreeMap::new()))),
        }
    }

    /// Removes every slot, for good: later calls of the device succeed and do nothing.
    ///
    /// # Errors
    ///
    /// Whatever KVM says to the first slot that cannot be removed.
    pub fn revoke(&self) -> io::Result<()> {
        let slots = self.lock().take().unwrap_or_default();
        slots.values().try_for_each(|slot| self.kvm.unmap(slot))
    }

    /// Number of slots there are now.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.lock().as_ref().map_or(0, |mapped| mapped.len() as u64)
    }

    fn lock(&self) -> MutexGuard<'_, Option<BTreeMap<u32, Slot>>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotMapper for RevocableSlots {
    fn max_count(&self) -> u64 {
        self.kvm.max_count()
    }

    fn map(&self, slot: &Slot) -> io::Result<()> {
        let mut mapped = self.lock();
        if let Some(mapped) = mapped.as_mut() {
            self.kvm.map(slot)?;
            mapped.insert(slot.index, *slot);
        }
        Ok(())
    }

    fn unmap(&self, slot: &Slot) -> io::Result<()> {
        let mut mapped = self.lock();
        if let Some(mapped) = mapped.as_mut() {
            self.kvm.unmap(slot)?;
            mapped.remove(&slot.index);
        }
        Ok(())
    }
}

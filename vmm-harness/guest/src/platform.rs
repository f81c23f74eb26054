//! What the guest program needs from the place it runs in.
//!
//! Two platforms exist: the freestanding image on KVM, and the loopback in the harness's own process.

use core::sync::atomic::AtomicU64;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_driver::hotplug::PhysicalMemory;

use crate::abi::Mailbox;

/// The place the guest program runs in. Shared by all vCPUs.
pub trait Platform: Sync {
    /// DMA memory for the virtqueue; must not lie in hotplugged memory (G-08).
    type Hal: Hal;
    /// The registers of a memory device.
    type Transport: Transport + Send;
    /// Access to hotplugged memory.
    type Memory: PhysicalMemory + Send;

    /// The accessor the page bookkeeping uses. Called once, at boot.
    fn memory(&self) -> Self::Memory;

    /// The mailbox shared with the host.
    fn mailbox(&self) -> &Mailbox;

    /// Where the map of plugged blocks of memory device `index` is published
    /// ([`DeviceInfo::view`](crate::abi::DeviceInfo::view)).
    fn view(&self, index: usize) -> &[AtomicU64];

    /// Milliseconds of a monotonic clock with any origin. It need not be precise, only go on: it paces retries.
    fn now_ms(&self) -> u64;

    /// Blocks until [`Mailbox::interrupt`] or [`Mailbox::command`] is not zero, a report is asked for, or
    /// [`now_ms`](Self::now_ms) reaches `deadline_ms`. May return early, and does so at least once for each time one of
    /// the first three has happened, should another vCPU have dealt with it already. A platform that cannot block with
    /// a deadline spins once and returns if there is one.
    fn wait(&self, deadline_ms: Option<u64>);

    /// Called in short waits for another vCPU, or for the device while it is likely to answer soon.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Reads and writes the memory at guest-physical `address`, plugged or not: the rogue guest.
    fn touch(&self, address: u64);
}

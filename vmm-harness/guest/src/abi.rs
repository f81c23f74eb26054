//! What harness and guest program share: boot information, mailbox, port registers.
//!
//! The guest runs at ring 3 without interrupts and without a console, so all it says goes through memory
//! both sides can see. Everything the host reads here is written by a guest and is checked before use.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First field of [`BootInfo`], so that an image built for another layout stops at once.
pub const BOOT_MAGIC: u64 = 0x7631_6d65_6d76_0003;

/// How the guest finds its world. One per guest, in boot memory; the guest only reads it.
///
/// Every vCPU enters the image at its entry point with `rdi` = address of this, `rsi` = vCPU index, `rdx` =
/// TSC frequency in kHz and `rsp` = the top of a stack of its own, at ring 3 in 64-bit mode, all memory mapped one to
/// one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`]
    pub magic: u64,
    /// Bytes of boot memory, which starts at address 0.
    pub boot_memory_size: u64,
    /// Start of the boot memory the guest may use as its heap.
    pub heap_start: u64,
    /// Bytes of heap.
    pub heap_size: u64,
    /// Address of the [`Mailbox`].
    pub mailbox: u64,
    /// Address of the port registers ([`port`]).
    pub port: u64,
    /// Number of vCPUs that run the guest program.
    pub vcpu_count: u64,
    /// Seed of everything the guest program chooses at random.
    pub seed: u64,
    /// Most pages one worker keeps allocated.
    pub worker_pages: u64,
    /// What the driver is to be: bits of [`driver`].
    pub driver: u64,
    /// Bytes of a big block, see [`Policy::bbm_block_size`](virtio_mem_driver::driver::Policy::bbm_block_size).
    pub bbm_block_size: u64,
    /// Number of memory devices, 1 to [`MAX_DEVICES`].
    pub device_count: u64,
    /// The memory devices, as many as that.
    pub devices: [DeviceInfo; MAX_DEVICES],
}

/// Where the guest finds a memory device.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DeviceInfo {
    /// Address of its virtio-mmio registers.
    pub virtio_mmio: u64,
    /// Address of the map the guest publishes, one bit per device block in 64-bit words, see
    /// [`Mailbox::report_request`].
    pub view: u64,
    /// Number of 64-bit words at `view`.
    pub view_words: u64,
    /// Its proximity domain, which firmware would have in its tables, or [`NO_DOMAIN`](Self::NO_DOMAIN).
    pub domain: u64,
}

impl DeviceInfo {
    /// The device is in no proximity domain.
    pub const NO_DOMAIN: u64 = u64::MAX;

    /// In the place of a device that is not there.
    pub const NONE: Self = Self {
        virtio_mmio: 0,
        view: 0,
        view_words: 0,
        domain: Self::NO_DOMAIN,
    };
}

/// Bits of [`BootInfo::driver`], which asks, and of [`DriverReport::driver`], which says what has become of it.
pub mod driver {
    /// [`Strategy::Linux`](virtio_mem_driver::driver::Strategy::Linux), else `Direct`.
    pub const LINUX: u64 = 1 << 0;
    /// Big-Block Mode: asked for even where Sub-Block Mode is possible.
    pub const BIG_BLOCK: u64 = 1 << 1;
    /// Only asked for: added memory goes to kernel zones as well, by Linux's policy `auto-movable`.
    pub const MIXED_ZONES: u64 = 1 << 2;
}

/// The maps at [`DeviceInfo::view`], one after the other, each with the same number of words.
pub mod map {
    /// Blocks the driver believes plugged.
    pub const PLUGGED: usize = 0;
    /// Of those, the ones the page allocator works with. This and the maps after it are as of the last report that
    /// [`Mailbox::use_request`](super::Mailbox::use_request) was asked for with.
    pub const ONLINE: usize = 1;
    /// Of those, the ones in zone Movable.
    pub const MOVABLE: usize = 2;
    /// Of those online, the ones with a page that cannot be moved now.
    pub const PINNED: usize = 3;
    /// Number of maps.
    pub const COUNT: usize = 4;
}

/// Port registers, 32 bits each, offsets from [`BootInfo::port`].
pub mod port {
    /// Read: blocks until [`Mailbox::interrupt`](super::Mailbox::interrupt) or
    /// [`Mailbox::command`](super::Mailbox::command) is not zero, or a report is asked for. The value read
    /// means nothing. Write: the same, for as many milliseconds as are written at the most.
    pub const WAIT: u64 = 0x0;
    /// Write: the vCPU is done (any value); it is not entered again.
    pub const EXIT: u64 = 0x4;
    /// Write: the guest panicked, the message is in the mailbox; the whole VM stops.
    pub const PANIC: u64 = 0x8;
    /// Bytes of port registers.
    pub const LEN: u64 = 0x1000;
}

/// Bits of [`Mailbox::command`].
pub mod command {
    /// Leave the program: verify and free what is held, then write [`port::EXIT`](super::port::EXIT).
    pub const STOP: u32 = 1 << 0;
    /// The last vCPU reads and writes [`Mailbox::rogue_address`](super::Mailbox::rogue_address), once.
    pub const ROGUE: u32 = 1 << 1;
}

/// What the workers do with memory. Values of [`Mailbox::workload`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Workload {
    /// They allocate pages, fill them, read them back and free them. All can be moved.
    #[default]
    Alloc = 0,
    /// As well, many pages cannot be moved for a while: they are pinned, or were allocated for a kernel's own use.
    Pin = 1,
    /// As [`Pin`](Self::Pin), but few pages.
    Mixed = 2,
}

impl Workload {
    /// The workload with this value; what is none is [`Alloc`](Self::Alloc).
    #[must_use]
    pub const fn from_value(value: u32) -> Self {
        match value {
            1 => Self::Pin,
            2 => Self::Mixed,
            _ => Self::Alloc,
        }
    }

    /// Of how many pages written one cannot be moved; `None` if all can.
    #[must_use]
    pub const fn unmovable_one_in(self) -> Option<usize> {
        match self {
            Self::Alloc => None,
            Self::Pin => Some(8),
            Self::Mixed => Some(64),
        }
    }
}

/// What the driver makes of the device's target. Values of [`DriverReport::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DriverState {
    /// The driver has not finished its initialisation.
    Booting = 0,
    /// Plugging or unplugging towards the target.
    Converging = 1,
    /// As close to the target as this driver can get, and nothing in flight; what it lacks is in
    /// [`DriverReport::unreachable`].
    Settled = 2,
    /// Cannot get on for now (memory in use, device busy); will try again.
    Stalled = 3,
    /// The device or the driver is broken; the reason is in [`Mailbox::message`].
    Failed = 4,
}

impl DriverState {
    /// The state with this value.
    #[must_use]
    pub const fn from_value(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Booting,
            1 => Self::Converging,
            2 => Self::Settled,
            3 => Self::Stalled,
            4 => Self::Failed,
            _ => return None,
        })
    }
}

/// Why part of a target is out of reach. Values of [`DriverReport::unreachable_reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Shortfall {
    /// Nothing is out of reach.
    None = 0,
    /// Less than the driver can plug or unplug.
    Remainder = 1,
    /// No whole memory block, or big block, of the region is left.
    Capacity = 2,
    /// Only offline memory may be unplugged.
    OnlineMemory = 3,
    /// The device has answered BUSY.
    DeviceBusy = 4,
    /// The device refuses to plug (NACK) though its target says it should.
    Refused = 5,
    /// Nothing that is still plugged could be emptied.
    MemoryInUse = 6,
    /// There is no memory for the metadata of more memory.
    NoMetadata = 7,
    /// The hotplug core does not add memory that was plugged.
    NotAdded = 8,
    /// The hotplug core does not let go of memory of which nothing is plugged any more.
    NotRemoved = 9,
    /// Too much memory is offline to add more.
    OfflineThreshold = 10,
    /// The configuration of the device does not come to rest.
    ConfigUnstable = 11,
}

impl Shortfall {
    /// The shortfall with this value.
    #[must_use]
    pub const fn from_value(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::None,
            1 => Self::Remainder,
            2 => Self::Capacity,
            3 => Self::OnlineMemory,
            4 => Self::DeviceBusy,
            5 => Self::Refused,
            6 => Self::MemoryInUse,
            7 => Self::NoMetadata,
            8 => Self::NotAdded,
            9 => Self::NotRemoved,
            10 => Self::OfflineThreshold,
            11 => Self::ConfigUnstable,
            _ => return None,
        })
    }
}

/// The most vCPUs a guest can have.
pub const MAX_VCPUS: usize = 16;

/// The most memory devices a guest can have: with as many, mailbox and boot information are one page each, and a node
/// for each is as many as most machines have.
pub const MAX_DEVICES: usize = 4;

/// What the driver of one memory device says of itself.
#[derive(Debug)]
#[repr(C)]
pub struct DriverReport {
    /// A [`DriverState`].
    pub state: AtomicU32,
    /// A [`Shortfall`].
    pub unreachable_reason: AtomicU32,
    /// The target as the driver last read it, in bytes.
    pub requested_size: AtomicU64,
    /// Bytes the driver believes plugged.
    pub plugged_size: AtomicU64,
    /// The node the device's memory is on.
    pub node: AtomicU64,
    /// Bytes of hotplugged memory of that node that the page allocator works with.
    pub online_size: AtomicU64,
    /// Requests sent.
    pub requests: AtomicU64,
    /// Bits of [`driver`].
    pub driver: AtomicU64,
    /// Bytes the driver plugs or unplugs at least.
    pub granule_size: AtomicU64,
    /// Bytes between the target and what is plugged, once the driver has settled.
    pub unreachable: AtomicU64,
}

/// What one worker has done so far.
#[derive(Debug, Default)]
#[repr(C)]
pub struct WorkerCounters {
    /// Pages allocated and filled with their tag.
    pub pages_written: AtomicU64,
    /// Pages read back in full and found right.
    pub pages_verified: AtomicU64,
    /// Pages read back and found wrong: memory was lost or mixed up.
    pub pages_wrong: AtomicU64,
    /// Pages held now.
    pub pages_held: AtomicU64,
    /// Of these, pages that cannot be moved.
    pub pages_unmovable: AtomicU64,
    /// Slices of work done, to see that the worker runs.
    pub slices: AtomicU64,
}

/// Memory both sides write, in boot memory.
///
/// What the guest says of itself, but for its workers' counters, its interrupts and a failure, is as of the
/// last report.
#[derive(Debug)]
#[repr(C)]
pub struct Mailbox {
    /// Host: not zero while the device has raised an interrupt the guest has not looked at. The guest
    /// swaps it with 0 and then reads InterruptStatus.
    pub interrupt: AtomicU32,
    /// Host: bits of [`command`].
    pub command: AtomicU32,
    /// Host: a [`Workload`], at any time.
    pub workload: AtomicU32,
    /// Host: where a [`command::ROGUE`] guest reaches to.
    pub rogue_address: AtomicU64,
    /// Host: raised by one to ask for a report.
    pub report_request: AtomicU64,
    /// Host: not zero to have all [`maps`](map) with the next report; the guest swaps it with 0.
    pub use_request: AtomicU32,
    /// Guest: set to the request it has answered, after the view and all fields below are written.
    pub report_done: AtomicU64,
    /// Guest: bytes of [`message`](Self::message) that are valid.
    pub message_len: AtomicU32,
    /// Guest: one per memory device.
    pub drivers: [DriverReport; MAX_DEVICES],
    /// Guest: pages moved out of memory that was being unplugged.
    pub pages_moved: AtomicU64,
    /// Guest: interrupts taken.
    pub interrupts: AtomicU64,
    /// Guest: one per worker, the vCPU index being the index.
    pub workers: [WorkerCounters; MAX_VCPUS],
    /// Guest: why it panicked or failed, UTF-8.
    pub message: [core::sync::atomic::AtomicU8; 512],
}

impl Mailbox {
    /// Bytes of boot memory to set aside for a mailbox, whole pages.
    pub const PAGES_LEN: u64 = 0x1000;
}

const _: () = assert!(size_of::<Mailbox>() <= Mailbox::PAGES_LEN as usize);

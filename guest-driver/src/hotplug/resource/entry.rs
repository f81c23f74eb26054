//! One resource.

use alloc::string::String;
use core::fmt;
use core::ops::Range;

/// What a resource is (Linux: `IORESOURCE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceFlags {
    /// In use: nothing goes below it.
    pub busy: bool,
    /// System RAM, or, while not busy, a place for it.
    pub system_ram: bool,
    /// User space may not map it.
    pub exclusive: bool,
    /// Only its driver can find it again: it is not in the firmware map, and kexec puts no kernel there.
    pub driver_managed: bool,
    /// Merged with exact neighbours of the same kind.
    pub mergeable: bool,
}

impl ResourceFlags {
    /// A range nobody uses yet: `Persistent Memory`, `Soft Reserved` (special purpose memory), a PCI window.
    pub const RESERVED: Self = Self {
        busy: false,
        system_ram: false,
        exclusive: false,
        driver_managed: false,
        mergeable: false,
    };
    /// A range a device driver uses as something else than RAM: `namespace0.0`, private device memory.
    pub const DEVICE: Self = Self {
        busy: true,
        ..Self::RESERVED
    };
    /// A range below which a driver adds its memory, as kmem does with `dax0.0`.
    pub const RAM_REGION: Self = Self {
        system_ram: true,
        ..Self::RESERVED
    };
    /// The region of a virtio-mem device: a [`RAM_REGION`](Self::RAM_REGION) that cannot be mapped through
    /// `/dev/mem`, as parts of it may not be there.
    pub const VIRTIO_MEM_REGION: Self = Self {
        exclusive: true,
        ..Self::RAM_REGION
    };
}

/// A named range of I/O memory. [`Display`](fmt::Display) is its line in `/proc/iomem`.
#[derive(Debug)]
pub struct Resource {
    pub(super) range: Range<u64>,
    pub(super) name: String,
    pub(super) flags: ResourceFlags,
    pub(super) depth: usize,
}

impl Resource {
    /// Its bytes; the end is exclusive.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    #[must_use]
    pub fn flags(&self) -> ResourceFlags {
        self.flags
    }

    /// Number of resources above it.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Whether memory is there, as opposed to a place for it.
    pub(super) fn is_ram(&self) -> bool {
        self.flags.system_ram && self.flags.busy
    }

    /// System RAM that firmware, or whoever takes its place, describes to the next kernel.
    pub(super) fn is_plain_ram(&self) -> bool {
        self.is_ram() && !self.flags.driver_managed
    }

    pub(super) fn contains(&self, range: &Range<u64>) -> bool {
        self.range.start <= range.start && range.end <= self.range.end
    }

    /// Whether `next`, which follows it in the list, is the same but for the range.
    pub(super) fn continues_in(&self, next: &Self) -> bool {
        self.range.end == next.range.start
            // One level: no children in between, and one parent.
            && self.depth == next.depth
            && self.flags == next.flags
            && self.name == next.name
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (indent, last_byte) = (2 * self.depth, self.range.end - 1);
        let (start, name) = (self.range.start, &self.name);
        write!(f, "{:indent$}{start:08x}-{last_byte:08x} : {name}", "")
    }
}

//! Whose memory it is.

use core::fmt;

/// Who added a piece of System RAM, and so who may take it offline **and remove** it: nobody else.
///
/// Memory of others that happens to be offline is not free storage either: its owner may pull it at any time.
/// What firmware described at boot is [`BOOT`](Self::BOOT)'s, until the driver of the device it lies on
/// [adopts](super::ResourceTree::adopt) it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(u32);

impl Owner {
    /// There since boot.
    pub const BOOT: Self = Self(0);
    /// Added by hand, through the `probe` file.
    pub const PROBE: Self = Self(1);
    /// A memory device ACPI describes, such as a DIMM.
    pub const ACPI: Self = Self(2);

    /// The driver instance with this number: of virtio-mem, kmem, a balloon. The kernel hands the numbers out.
    #[must_use]
    pub fn driver(number: u16) -> Self {
        Self(Self::ACPI.0 + 1 + u32::from(number))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BOOT => f.write_str("boot"),
            Self::PROBE => f.write_str("probe"),
            Self::ACPI => f.write_str("ACPI"),
            Self(number) => write!(f, "driver {}", number - Self::ACPI.0 - 1),
        }
    }
}

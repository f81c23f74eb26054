//! Zones: parts of a node's memory that differ in what may be allocated from them.

use core::fmt;

/// What a zone is for, from the lowest to the highest. Zone Device is not among them: [device
/// memory](super::DeviceRange) never reaches the page allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ZoneKind {
    /// Memory that devices with few address bits reach.
    Dma,
    /// Memory that devices with 32 address bits reach.
    Dma32,
    /// All other memory of the kernel: what it allocates here may never move.
    Normal,
    /// Only pages that can be moved or reclaimed, so that it can be emptied again.
    Movable,
}

impl ZoneKind {
    /// Every kind, from the lowest to the highest.
    pub const ALL: [Self; 4] = [Self::Dma, Self::Dma32, Self::Normal, Self::Movable];

    /// The name as `valid_zones` and `/proc/zoneinfo` show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dma => "DMA",
            Self::Dma32 => "DMA32",
            Self::Normal => "Normal",
            Self::Movable => "Movable",
        }
    }

    /// Whether the kernel may allocate pages for itself there.
    #[must_use]
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::Dma | Self::Dma32 | Self::Normal)
    }
}

impl fmt::Display for ZoneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::ZoneKind;

    #[test]
    fn kernel_zones_are_the_lowest() {
        assert!(ZoneKind::ALL.is_sorted());
        assert_eq!(ZoneKind::ALL.partition_point(|kind| kind.is_kernel()), 3);
    }
}

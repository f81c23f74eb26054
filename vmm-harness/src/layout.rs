//! Where things are in guest-physical memory.
//!
//! ```text
//! 0                        nothing, and not mapped: a null pointer faults
//! IMAGE_START              the guest image, as linked
//!                          BootInfo, mailbox, view words, stacks, heap
//! page_tables.start        page tables, not mapped: the guest cannot change them
//! boot_memory_size         end of boot memory
//! VIRTIO_MMIO, PORT        registers, no memory behind them
//! REGION_START             the device-managed regions
//! ```
//!
//! Guest-virtual addresses are the same numbers.

use std::ops::Range;

use thiserror::Error;
use virtio_mem_wire::Geometry;
use vmem_guest::abi::{MAX_DEVICES, MAX_VCPUS, Mailbox, map};

/// Bytes in a page.
pub const PAGE: u64 = 0x1000;
/// Bytes the guest's page tables map with one entry. (1 GiB pages are not offered everywhere.)
pub const LARGE_PAGE: u64 = 2 << 20;
/// Where the guest image is linked to (`resources/guest-image/harness.ld`).
pub const IMAGE_START: u64 = LARGE_PAGE;
/// The virtio-mmio registers of the devices, a page each.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The port registers, one page.
pub const PORT: u64 = VIRTIO_MMIO + MAX_DEVICES as u64 * PAGE;
/// The usual start of the device-managed region, or of the first.
pub const REGION_START: u64 = 4 << 30;

/// Bytes of stack for each vCPU.
const STACK_LEN: u64 = 256 << 10;
/// The guest gets at least this much heap.
const HEAP_MIN: u64 = 4 << 20;
/// The user half of the address space with four levels of page tables.
const ADDRESS_END: u64 = 1 << 47;
/// Bytes one page-table page maps: on level 2 with large pages, and on level 3.
const LEVEL_2_SPAN: u64 = 1 << 30;
const LEVEL_3_SPAN: u64 = 1 << 39;

/// The parts of one guest's memory. All ranges are inside boot memory and do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of boot memory, which starts at address 0.
    pub boot_memory_size: u64,
    /// Address of the boot information.
    pub boot_info: u64,
    /// Address of the mailbox.
    pub mailbox: u64,
    /// The words of the guest's view of the blocks of each device, all [`map`]s.
    pub views: Vec<Range<u64>>,
    /// The stacks, one after the other.
    pub stacks: Range<u64>,
    /// The guest's heap.
    pub heap: Range<u64>,
    /// The page tables.
    pub page_tables: Range<u64>,
    /// The device-managed regions, widened to large pages.
    pub regions: Vec<Range<u64>>,
    /// Number of vCPUs.
    pub vcpu_count: usize,
}

/// A guest that cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// Boot memory is mapped in large pages.
    #[error("boot memory of {0:#x} bytes is not a multiple of 2 MiB")]
    BootMemoryMisaligned(u64),
    /// The image, the tables and a minimum of heap do not fit.
    #[error("boot memory of {size:#x} bytes is too small, the guest needs {needed:#x}")]
    BootMemoryTooSmall {
        /// Bytes there are.
        size: u64,
        /// Bytes there must be.
        needed: u64,
    },
    /// The registers lie above boot memory.
    #[error("boot memory of {0:#x} bytes reaches into the registers at {VIRTIO_MMIO:#x}")]
    BootMemoryTooLarge(u64),
    /// From 1 to [`MAX_VCPUS`].
    #[error("{0} vCPUs, must be 1 to {MAX_VCPUS}")]
    VcpuCount(usize),
    /// From 1 to [`MAX_DEVICES`].
    #[error("{0} memory devices, must be 1 to {MAX_DEVICES}")]
    DeviceCount(usize),
    /// The region lies between the registers and the end of the address space.
    #[error("the device region at {0:#x} is not between 4 GiB and 128 TiB")]
    RegionPlace(u64),
    /// It shares large pages with the one before.
    #[error("the device region at {0:#x} begins before the end of another")]
    RegionOverlap(u64),
}

impl Layout {
    /// Lays out a guest whose image ends at `image_end`, and whose regions come in the order of their addresses.
    ///
    /// # Errors
    ///
    /// See [`LayoutError`].
    pub fn new(
        boot_memory_size: u64,
        image_end: u64,
        geometries: &[Geometry],
        vcpu_count: usize,
    ) -> Result<Self, LayoutError> {
        if !(1..=MAX_VCPUS).contains(&vcpu_count) {
            return Err(LayoutError::VcpuCount(vcpu_count));
        }
        if !boot_memory_size.is_multiple_of(LARGE_PAGE) {
            return Err(LayoutError::BootMemoryMisaligned(boot_memory_size));
        }
        if boot_memory_size > VIRTIO_MMIO {
            return Err(LayoutError::BootMemoryTooLarge(boot_memory_size));
        }
        if !(1..=MAX_DEVICES).contains(&geometries.len()) {
            return Err(LayoutError::DeviceCount(geometries.len()));
        }
        let mut regions: Vec<Range<u64>> = Vec::new();
        for geometry in geometries {
            let start = geometry.addr();
            // Neither overflows: a geometry's region does not wrap, and an end above the limit is refused.
            let end = start + geometry.region_size();
            if start < REGION_START || end > ADDRESS_END {
                return Err(LayoutError::RegionPlace(start));
            }
            let region = start / LARGE_PAGE * LARGE_PAGE..end.next_multiple_of(LARGE_PAGE);
            if regions.last().is_some_and(|last| region.start < last.end) {
                return Err(LayoutError::RegionOverlap(start));
            }
            regions.push(region);
        }

        // Every number below is bounded by the checks above, so far below 2^64.
        let boot_info = image_end.next_multiple_of(PAGE);
        let mailbox = boot_info + PAGE;
        let mut views_end = mailbox + Mailbox::PAGES_LEN;
        let views = geometries.iter().map(|geometry| {
            let start = views_end;
            views_end += geometry.block_count().div_ceil(64) * 8 * map::COUNT as u64;
            start..views_end
        });
        let views = views.collect();
        let stacks = views_end.next_multiple_of(PAGE);
        let heap = stacks + STACK_LEN * vcpu_count as u64;
        let tables_len = table_count(&regions) * PAGE;
        let tables_span = tables_len.next_multiple_of(LARGE_PAGE);
        let needed = (heap + HEAP_MIN).next_multiple_of(LARGE_PAGE) + tables_span;
        if boot_memory_size < needed {
            return Err(LayoutError::BootMemoryTooSmall {
                size: boot_memory_size,
                needed,
            });
        }
        let page_tables = boot_memory_size - tables_span;
        Ok(Self {
            boot_memory_size,
            boot_info,
            mailbox,
            views,
            stacks: stacks..heap,
            heap: heap..page_tables,
            page_tables: page_tables..page_tables + tables_len,
            regions,
            vcpu_count,
        })
    }

    /// Where the stack of `vcpu` begins to grow down.
    #[must_use]
    pub fn stack_top(&self, vcpu: usize) -> u64 {
        self.stacks.start + STACK_LEN * (vcpu as u64 + 1)
    }

    /// What the guest's page tables map, in large pages.
    pub fn mapped(&self) -> impl Iterator<Item = Range<u64>> {
        let low = [
            IMAGE_START..self.page_tables.start,
            VIRTIO_MMIO..VIRTIO_MMIO + LARGE_PAGE,
        ];
        low.into_iter().chain(self.regions.iter().cloned())
    }
}

/// Page-table pages that map everything below 4 GiB and `regions` in large pages.
fn table_count(regions: &[Range<u64>]) -> u64 {
    let touched = |span| -> u64 {
        let touched = |region: &Range<u64>| region.end.div_ceil(span) - region.start / span;
        regions.iter().map(touched).sum()
    };
    let low = REGION_START / LEVEL_2_SPAN;
    // The root, the level 3 below it, and level 2; at worst low memory and regions share no tables.
    1 + (1 + touched(LEVEL_3_SPAN)) + (low + touched(LEVEL_2_SPAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn four_gib() -> Geometry {
        Geometry::new(REGION_START, 4 << 30, 2 * MIB).unwrap()
    }

    #[test]
    fn parts_follow_each_other_and_fill_boot_memory() {
        let layout = Layout::new(256 * MIB, IMAGE_START + 12345, &[four_gib()], 2).unwrap();
        let ends = [
            IMAGE_START + 12345..layout.boot_info,
            layout.boot_info + PAGE..layout.mailbox,
            layout.mailbox + Mailbox::PAGES_LEN..layout.views[0].start,
            layout.views[0].end..layout.stacks.start,
            layout.stacks.end..layout.heap.start,
            layout.heap.end..layout.page_tables.start,
            layout.page_tables.end..layout.boot_memory_size,
        ];
        for gap in ends {
            assert!(
                gap.start <= gap.end && gap.end - gap.start < LARGE_PAGE,
                "{gap:x?}"
            );
        }
        assert_eq!(layout.views[0].end - layout.views[0].start, 4 * 2048 / 8);
        assert_eq!(layout.stack_top(1), layout.heap.start);
    }

    #[test]
    fn boot_memory_too_small_says_how_much_is_needed() {
        let Err(LayoutError::BootMemoryTooSmall { needed, .. }) =
            Layout::new(2 * MIB, IMAGE_START, &[four_gib()], 2)
        else {
            panic!("accepted");
        };
        assert!(Layout::new(needed, IMAGE_START, &[four_gib()], 2).is_ok());
        assert!(Layout::new(needed - LARGE_PAGE, IMAGE_START, &[four_gib()], 2).is_err());
    }

    #[test]
    fn wrong_sizes_and_places_are_refused() {
        let layout = |boot, geometries: &[Geometry], vcpus| {
            Layout::new(boot, IMAGE_START, geometries, vcpus)
        };
        let region = [four_gib()];
        assert_eq!(
            layout(257 * MIB, &region, 1),
            Err(LayoutError::BootMemoryMisaligned(257 * MIB))
        );
        assert_eq!(
            layout(4096 * MIB, &region, 1),
            Err(LayoutError::BootMemoryTooLarge(4096 * MIB))
        );
        assert_eq!(
            layout(256 * MIB, &region, 0),
            Err(LayoutError::VcpuCount(0))
        );
        assert_eq!(
            layout(256 * MIB, &region, 17),
            Err(LayoutError::VcpuCount(17))
        );
        let low = Geometry::new(2 << 30, 1 << 30, 2 * MIB).unwrap();
        assert_eq!(
            layout(256 * MIB, &[low], 1),
            Err(LayoutError::RegionPlace(2 << 30))
        );
        let high = Geometry::new(1 << 47, 1 << 30, 2 * MIB).unwrap();
        assert_eq!(
            layout(256 * MIB, &[high], 1),
            Err(LayoutError::RegionPlace(1 << 47))
        );
    }
    #[test]
    fn several_regions_have_a_view_each_and_do_not_share_a_large_page() {
        let geometry = |start, size| Geometry::new(start, size, MIB).unwrap();
        let next = REGION_START + (4 << 30);
        let layout = |regions: &[Geometry]| Layout::new(256 * MIB, IMAGE_START, regions, 1);
        let two = layout(&[four_gib(), geometry(next, 64 * MIB)]).unwrap();
        assert_eq!(two.views[0].end, two.views[1].start);
        assert_eq!(two.views[1].end - two.views[1].start, 8 * map::COUNT as u64);
        assert_eq!(two.mapped().last(), Some(next..next + 64 * MIB));
        let odd = geometry(next, MIB);
        assert_eq!(
            layout(&[four_gib(), odd, geometry(next + MIB, MIB)]),
            Err(LayoutError::RegionOverlap(next + MIB))
        );
        for count in [0, MAX_DEVICES + 1] {
            let regions: Vec<_> = (1..=count as u64)
                .map(|index| geometry(index * REGION_START, MIB))
                .collect();
            assert_eq!(layout(&regions), Err(LayoutError::DeviceCount(count)));
        }
    }
}

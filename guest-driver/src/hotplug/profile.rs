//! The sizes an architecture works with, as data.

use super::Error;

/// Sizes of page, pageblock, sub-section, section and memory block, each as the power of two of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Page: the unit of allocation (`PAGE_SHIFT`).
    pub page_shift: u32,
    /// Pageblock: the unit of isolation (`pageblock_order` + `PAGE_SHIFT`).
    pub pageblock_shift: u32,
    /// Sub-section: the unit of device memory (`SUBSECTION_SHIFT`).
    pub sub_section_shift: u32,
    /// Section: the unit of page metadata (`SECTION_SIZE_BITS`).
    pub section_shift: u32,
    /// Memory block: the unit of adding, onlining, offlining and removing.
    pub memory_block_shift: u32,
    pub physical_address_bits: u32,
    pub dma_end: u64,
    pub dma32_end: u64,
    pub boot_memory_removable: bool,
}

impl Profile {
    /// x86-64 with less than 64 GiB at boot: 4 KiB pages, 2 MiB pageblocks, 128 MiB sections and memory blocks.
    pub const X86_64: Self = Self {
        page_shift: 12,
        pageblock_shift: 21,
        sub_section_shift: 21,
        section_shift: 27,
        memory_block_shift: 27,
        physical_address_bits: 46,
        dma_end: 16 << 20,
        dma32_end: 4 << 30,
        boot_memory_removable: true,
    };

    /// Bytes in a page.
    #[must_use]
    pub const fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// Bytes in a pageblock.
    #[must_use]
    pub const fn pageblock_size(&self) -> u64 {
        1 << self.pageblock_shift
    }

    /// Bytes in a section.
    #[must_use]
    pub const fn section_size(&self) -> u64 {
        1 << self.section_shift
    }

    /// Bytes in a memory block.
    #[must_use]
    pub const fn memory_block_size(&self) -> u64 {
        1 << self.memory_block_shift
    }

    /// Pages in a pageblock.
    #[must_use]
    pub const fn pageblock_pages(&self) -> u32 {
        1 << (self.pageblock_shift - self.page_shift)
    }

    /// Checks that page ≤ pageblock ≤ section ≤ memory block, and page < sub-section ≤ section.
    pub(super) fn check(&self) -> Result<(), Error> {
        let ordered = self.page_shift <= self.pageblock_shift
            && self.page_shift < self.sub_section_shift
            && self.pageblock_shift <= self.section_shift
            && self.sub_section_shift <= self.section_shift
            && self.section_shift <= self.memory_block_shift
            && self.memory_block_shift < u64::BITS;
        // A page of a section is numbered with 30 bits.
        let countable = self.section_shift.saturating_sub(self.page_shift) <= 30;
        (ordered && countable).then_some(()).ok_or(Error::Invalid)
    }
}

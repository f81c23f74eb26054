//! The sizes and rules an architecture works with, as data.

use core::ops::Range;

use super::Error;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The memory layout of an architecture with one page size.
///
/// Four units contain each other: page < sub-section ≤ section ≤ memory block. The pageblock stands beside
/// them; it may be smaller or larger than a sub-section.
///
/// The fields are plain data, for anybody to fill in: [`Hotplug::new`](super::Hotplug::new) and
/// [`Hotplug::boot`](super::Hotplug::boot) refuse units that do not fit into each other. The methods here that tell
/// sizes assume that they do, as in a profile of this module or of [`Hotplug::profile`](super::Hotplug::profile).
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
    /// What one entry of the lowest directory of page tables maps (`PMD_SHIFT`), and with it the unit in which
    /// page metadata is mapped.
    pub pmd_shift: u32,
    /// Addresses of memory are smaller than 2 to this power (`MAX_PHYSMEM_BITS`).
    pub physical_address_bits: u32,
    /// Where zone DMA ends, in bytes; 0 if there is no such zone.
    pub dma_end: u64,
    /// Where zone DMA32 ends, in bytes; 0 if there is no such zone. It is empty if DMA reaches as far.
    pub dma32_end: u64,
    /// Whether memory blocks with memory of boot may go offline (on arm64 `prevent_bootmem_remove_notifier`
    /// forbids it, as the firmware's memory map would still list that memory).
    pub boot_memory_removable: bool,
}

impl Profile {
    /// x86-64 with less than 64 GiB at boot and four levels of page tables: 4 KiB pages, 2 MiB pageblocks,
    /// 128 MiB sections and memory blocks. For larger memory blocks see
    /// [`x86_64_memory_block_size`](Self::x86_64_memory_block_size).
    pub const X86_64: Self = Self {
        page_shift: 12,
        pageblock_shift: 21,
        sub_section_shift: 21,
        section_shift: 27,
        memory_block_shift: 27,
        pmd_shift: 21,
        physical_address_bits: 46,
        dma_end: 16 * MIB,
        dma32_end: 4 * GIB,
        boot_memory_removable: true,
    };

    /// arm64 with 4 KiB pages: 2 MiB pageblocks, 128 MiB sections and memory blocks.
    ///
    /// DMA is all that 32 bits address, unless a device reaches less far (then lower
    /// [`dma_end`](Self::dma_end), and DMA32 is the rest).
    pub const ARM64_4K: Self = Self {
        physical_address_bits: 48,
        dma_end: 4 * GIB,
        boot_memory_removable: false,
        ..Self::X86_64
    };

    /// arm64 with 16 KiB pages: 32 MiB pageblocks, 128 MiB sections and memory blocks.
    pub const ARM64_16K: Self = Self {
        page_shift: 14,
        pageblock_shift: 25,
        pmd_shift: 25,
        ..Self::ARM64_4K
    };

    /// arm64 with 64 KiB pages: pageblocks, sections and memory blocks are all 512 MiB.
    pub const ARM64_64K: Self = Self {
        page_shift: 16,
        pageblock_shift: 29,
        section_shift: 29,
        memory_block_shift: 29,
        pmd_shift: 29,
        physical_address_bits: 52,
        ..Self::ARM64_4K
    };

    /// 64-bit RISC-V: units like x86-64, no zone DMA.
    pub const RISCV64: Self = Self {
        physical_address_bits: 56,
        dma_end: 0,
        ..Self::X86_64
    };

    /// s390x up to Linux 6.12: 1 MiB pageblocks, 256 MiB sections and memory blocks, no zone DMA32.
    ///
    /// Where the machine's storage increment is larger than a section, it is the memory block.
    pub const S390X: Self = Self {
        pageblock_shift: 20,
        section_shift: 28,
        memory_block_shift: 28,
        pmd_shift: 20,
        dma_end: 2 * GIB,
        dma32_end: 0,
        ..Self::X86_64
    };

    /// s390x since commit e3a6970b7daf: 128 MiB sections and memory blocks.
    pub const S390X_128M: Self = Self {
        section_shift: 27,
        memory_block_shift: 27,
        ..Self::S390X
    };

    /// Every profile here, with a name for command lines and messages.
    pub const ALL: [(&'static str, Self); 7] = [
        ("x86-64", Self::X86_64),
        ("arm64-4k", Self::ARM64_4K),
        ("arm64-16k", Self::ARM64_16K),
        ("arm64-64k", Self::ARM64_64K),
        ("riscv64", Self::RISCV64),
        ("s390x", Self::S390X),
        ("s390x-128m", Self::S390X_128M),
    ];

    /// The size in bytes x86-64 gives its memory blocks (`probe_memory_block_size`).
    ///
    /// An explicit order, the power of two of the bytes, wins: 27 (128 MiB) to 36 (64 GiB). Otherwise `boot_end`,
    /// the address boot memory ends at, decides: below 64 GiB 128 MiB; from there on 2 GiB on bare metal, and
    /// under a hypervisor the largest size from 2 GiB down to 128 MiB that it is a multiple of.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the explicit order is out of range.
    pub fn x86_64_memory_block_size(
        boot_end: u64,
        hypervisor: bool,
        explicit_order: Option<u32>,
    ) -> Result<u64, Error> {
        const SMALLEST: u32 = Profile::X86_64.section_shift;
        const LARGEST: u32 = 31;
        const LARGE_MEMORY: u32 = 36;
        let order = match explicit_order {
            Some(order @ SMALLEST..=LARGE_MEMORY) => order,
            Some(_) => return Err(Error::Invalid),
            None if boot_end < 1 << LARGE_MEMORY => SMALLEST,
            None if hypervisor => boot_end.trailing_zeros().clamp(SMALLEST, LARGEST),
            None => LARGEST,
        };
        Ok(1 << order)
    }

    /// The same profile with memory blocks of so many bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless that is a power of two, at least a section and within what can be addressed.
    pub fn with_memory_block_size(self, bytes: u64) -> Result<Self, Error> {
        if !bytes.is_power_of_two() {
            return Err(Error::Invalid);
        }
        let profile = Self {
            memory_block_shift: bytes.trailing_zeros(),
            ..self
        };
        profile.check().map(|()| profile)
    }

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

    /// Bytes in a sub-section.
    #[must_use]
    pub const fn sub_section_size(&self) -> u64 {
        1 << self.sub_section_shift
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

    /// Pages in a sub-section (`PAGES_PER_SUBSECTION`).
    #[must_use]
    pub const fn pages_per_sub_section(&self) -> u32 {
        1 << (self.sub_section_shift - self.page_shift)
    }

    /// Pages in a section (`PAGES_PER_SECTION`).
    #[must_use]
    pub const fn pages_per_section(&self) -> u32 {
        1 << (self.section_shift - self.page_shift)
    }

    /// Sub-sections in a section (`SUBSECTIONS_PER_SECTION`), at most 256.
    #[must_use]
    pub const fn sub_sections_per_section(&self) -> u32 {
        1 << (self.section_shift - self.sub_section_shift)
    }

    /// Sections in a memory block (`sections_per_block`).
    #[must_use]
    pub const fn sections_per_memory_block(&self) -> u64 {
        1 << (self.memory_block_shift - self.section_shift)
    }

    /// Pages in a memory block.
    #[must_use]
    pub const fn memory_block_pages(&self) -> u64 {
        1 << (self.memory_block_shift - self.page_shift)
    }

    /// Sections that can exist (`NR_MEM_SECTIONS`).
    #[must_use]
    pub const fn section_count(&self) -> u64 {
        1 << (self.physical_address_bits - self.section_shift)
    }

    /// The id of the memory block an address lies in.
    #[must_use]
    pub const fn memory_block_id(&self, address: u64) -> u64 {
        address >> self.memory_block_shift
    }

    /// The part of a byte range made of whole memory blocks, which may be empty: as much of it as can be added.
    /// A driver of memory of its own trims to that (`dax_kmem_range`), and what it trims is lost.
    #[must_use]
    pub fn whole_memory_blocks(&self, range: Range<u64>) -> Range<u64> {
        let mask = self.memory_block_size() - 1;
        let end = range.end & !mask;
        match range.start.checked_add(mask) {
            Some(start) if start & !mask < end => start & !mask..end,
            _ => end..end,
        }
    }

    /// Checks that the units fit into each other and into the address space, as the build or the boot of
    /// Linux does.
    pub(super) fn check(&self) -> Result<(), Error> {
        let ordered = self.page_shift <= self.pageblock_shift
            && self.page_shift < self.sub_section_shift
            && self.page_shift <= self.pmd_shift
            && self.pageblock_shift <= self.section_shift
            && self.sub_section_shift <= self.section_shift
            && self.section_shift <= self.memory_block_shift
            && self.memory_block_shift <= self.physical_address_bits
            && self.pmd_shift < u64::BITS
            && self.physical_address_bits < u64::BITS;
        // A page of a section is numbered with 30 bits, a sub-section with 8.
        let countable = self.section_shift.saturating_sub(self.page_shift) <= 30
            && self.section_shift.saturating_sub(self.sub_section_shift) <= 8;
        (ordered && countable).then_some(()).ok_or(Error::Invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_each_architecture() {
        for (name, pages, sub_sections, sub_section_pages, pageblock_pages, block) in [
            ("x86-64", 32_768, 64, 512, 512, 128 * MIB),
            ("arm64-4k", 32_768, 64, 512, 512, 128 * MIB),
            ("arm64-16k", 8192, 64, 128, 2048, 128 * MIB),
            ("arm64-64k", 8192, 256, 32, 8192, 512 * MIB),
            ("riscv64", 32_768, 64, 512, 512, 128 * MIB),
            ("s390x", 65_536, 128, 512, 256, 256 * MIB),
            ("s390x-128m", 32_768, 64, 512, 256, 128 * MIB),
        ] {
            let (_, profile) = Profile::ALL.into_iter().find(|p| p.0 == name).unwrap();
            assert_eq!(profile.check(), Ok(()), "{name}");
            assert_eq!(profile.pages_per_section(), pages, "{name}");
            assert_eq!(profile.sub_section_size(), 2 * MIB, "{name}");
            assert_eq!(profile.sub_sections_per_section(), sub_sections, "{name}");
            assert_eq!(profile.pages_per_sub_section(), sub_section_pages, "{name}");
            assert_eq!(profile.pageblock_pages(), pageblock_pages, "{name}");
            assert_eq!(profile.memory_block_size(), block, "{name}");
        }
    }

    #[test]
    fn small_sections_have_eight_sub_sections_and_none_has_more_than_256() {
        let power = Profile {
            page_shift: 16,
            section_shift: 24,
            pageblock_shift: 24,
            ..Profile::X86_64
        };
        assert_eq!(power.check(), Ok(()));
        assert_eq!(power.sub_sections_per_section(), 8);
        let wrong = Profile {
            sub_section_shift: 20,
            ..Profile::ARM64_64K
        };
        assert_eq!(wrong.check(), Err(Error::Invalid));
    }

    #[test]
    fn x86_64_memory_block_size_follows_the_end_of_boot_memory() {
        let size = Profile::x86_64_memory_block_size;
        for hypervisor in [false, true] {
            assert_eq!(size(64 * GIB - 1, hypervisor, None), Ok(128 * MIB));
            assert_eq!(size(64 * GIB, hypervisor, None), Ok(2 * GIB));
        }
        assert_eq!(size(65 * GIB, false, None), Ok(2 * GIB));
        assert_eq!(size(65 * GIB, true, None), Ok(GIB));
        assert_eq!(size(64 * GIB + 256 * MIB, true, None), Ok(256 * MIB));
        assert_eq!(size(64 * GIB + MIB, true, None), Ok(128 * MIB));
    }

    #[test]
    fn x86_64_explicit_order_wins_within_128_mib_and_64_gib() {
        let size = |order| Profile::x86_64_memory_block_size(GIB, true, Some(order));
        assert_eq!(size(26), Err(Error::Invalid));
        assert_eq!(size(27), Ok(128 * MIB));
        assert_eq!(size(36), Ok(64 * GIB));
        assert_eq!(size(37), Err(Error::Invalid));
        assert_eq!(size(u32::MAX), Err(Error::Invalid));
    }

    #[test]
    fn memory_blocks_are_a_power_of_two_of_sections() {
        let with = |bytes| Profile::X86_64.with_memory_block_size(bytes);
        for sections in [1, 2, 4, 8, 16] {
            let profile = with(sections * 128 * MIB).unwrap();
            assert_eq!(profile.sections_per_memory_block(), sections);
            assert_eq!(profile.memory_block_pages(), sections * 32_768);
        }
        for wrong in [0, 64 * MIB, 384 * MIB, 1 << 47, u64::MAX] {
            assert_eq!(with(wrong), Err(Error::Invalid), "{wrong:#x}");
        }
    }

    #[test]
    fn id_of_a_memory_block_is_its_address_in_memory_blocks() {
        assert_eq!(Profile::X86_64.memory_block_id(0x1_0000_0000), 32);
        assert_eq!(Profile::X86_64.memory_block_id(0x1_0fff_ffff), 33);
        assert_eq!(Profile::X86_64.section_count(), 1 << 19);
    }

    #[test]
    fn larger_memory_blocks_strand_more_of_a_range() {
        let window = 4 * GIB + 256 * MIB..8 * GIB + 512 * MIB;
        for (block, stranded) in [
            (128 * MIB, 0),
            (256 * MIB, 0),
            (512 * MIB, 256 * MIB),
            (GIB, GIB + 256 * MIB),
            (2 * GIB, 2 * GIB + 256 * MIB),
        ] {
            let profile = Profile::X86_64.with_memory_block_size(block).unwrap();
            let whole = profile.whole_memory_blocks(window.clone());
            let lost = window.end - window.start - (whole.end - whole.start);
            assert_eq!(lost, stranded, "{block:#x}");
        }
        let whole = |range| Profile::X86_64.whole_memory_blocks(range);
        assert!(whole(MIB..255 * MIB).is_empty());
        assert!(whole(u64::MAX - MIB..u64::MAX).is_empty());
    }
}

//! What the metadata of pages costs, and whether a memory block can carry its own. Who is charged is not decided here.
//!
//! Linux: `memmap_on_memory`, `mhp_supports_memmap_on_memory`.

use super::{Error, Profile};

/// The parameter `memory_hotplug.memmap_on_memory`: whether memory that is added may carry its own metadata.
///
/// ```text
///  a memory block    |<-- pageblocks -->|
///  Off               |                        usable                         |
///  On, Force         |     metadata     |             usable                 |   x86-64: 2 MiB + 126 MiB of 128 MiB
///  Force             | metadata |wasted |             usable                 |   where On cannot: part of a pageblock
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemmapOnMemory {
    /// Metadata is always allocated from memory that is online already (`N`).
    #[default]
    Off,
    /// It may, if the metadata fills whole pageblocks (`Y`).
    On,
    /// It may, and the rest of the last pageblock of metadata is wasted (`force`).
    Force,
}

/// Which memory may carry its own metadata; it changed between kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemmapRule {
    /// Linux 6.1: only a range of a single memory block; asking for any other is an error, and there is no
    /// [`MemmapOnMemory::Force`].
    SingleBlock,
    /// Linux 6.12: each memory block of a range by itself; where it cannot be done, asking has no effect.
    #[default]
    PerBlock,
}

/// Pages that hold the metadata of a range of `size` bytes, at `struct_page_size` bytes a page.
pub(super) fn memmap_pages(profile: &Profile, struct_page_size: u32, size: u64) -> u64 {
    let bytes = (size >> profile.page_shift).saturating_mul(struct_page_size.into());
    bytes.div_ceil(profile.page_size())
}

/// Pages at the start of each memory block that carry its metadata, if a range of `size` bytes supports that
/// (`mhp_supports_memmap_on_memory`). ACPI looks here before it asks.
pub(super) fn supported(
    profile: &Profile,
    struct_page_size: u32,
    mode: MemmapOnMemory,
    rule: MemmapRule,
    size: u64,
) -> Option<u64> {
    let block_pages = profile.memory_block_pages();
    let pageblock_pages = u64::from(profile.pageblock_pages());
    let bytes = block_pages.checked_mul(struct_page_size.into())?;
    // Metadata is mapped by whole entries of the page table, and none of it may come from elsewhere.
    let whole = |shift| bytes.trailing_zeros() >= shift;
    if mode == MemmapOnMemory::Off
        || bytes == 0
        || !whole(profile.page_shift.max(profile.pmd_shift))
    {
        return None;
    }
    let pages = bytes >> profile.page_shift;
    let pages = match rule {
        MemmapRule::SingleBlock if size != profile.memory_block_size() => return None,
        MemmapRule::PerBlock if mode == MemmapOnMemory::Force => {
            pages.checked_next_multiple_of(pageblock_pages)?
        }
        _ => pages,
    };
    // The memory behind the metadata must begin with a pageblock, and there must be some.
    (pages.is_multiple_of(pageblock_pages) && pages < block_pages).then_some(pages)
}

/// Pages at the start of each memory block that carry its metadata when a range of `size` bytes is added by
/// someone who asks for that; `None` if the metadata is allocated elsewhere nevertheless.
///
/// # Errors
///
/// [`Error::Invalid`] if the range does not support it and the rule does not forgive asking.
pub(super) fn self_hosted_pages(
    profile: &Profile,
    struct_page_size: u32,
    mode: MemmapOnMemory,
    rule: MemmapRule,
    size: u64,
) -> Result<Option<u64>, Error> {
    match supported(profile, struct_page_size, mode, rule, size) {
        None if rule == MemmapRule::SingleBlock => Err(Error::Invalid),
        pages => Ok(pages),
    }
}

#[cfg(test)]
mod tests {
    use super::MemmapOnMemory::{Force, Off, On};
    use super::MemmapRule::{PerBlock, SingleBlock};
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn x86_64(block: u64) -> Profile {
        Profile::X86_64.with_memory_block_size(block).unwrap()
    }

    #[test]
    fn metadata_is_one_64th_at_4_kib_pages_one_256th_at_16_kib_one_1024th_at_64_kib() {
        for (profile, expected) in [
            (Profile::X86_64, 4 * GIB),
            (Profile::ARM64_16K, GIB),
            (Profile::ARM64_64K, 256 * MIB),
        ] {
            let pages = memmap_pages(&profile, 64, 256 * GIB);
            assert_eq!(pages * profile.page_size(), expected);
        }
        for (name, kib) in [
            ("x86-64", 2048),
            ("arm64-4k", 2048),
            ("arm64-16k", 512),
            ("arm64-64k", 512),
            ("riscv64", 2048),
            ("s390x", 4096),
            ("s390x-128m", 2048),
        ] {
            let (_, profile) = Profile::ALL.into_iter().find(|p| p.0 == name).unwrap();
            let pages = memmap_pages(&profile, 64, profile.memory_block_size());
            assert_eq!(pages * profile.page_size(), kib << 10, "{name}");
        }
        assert_eq!(memmap_pages(&Profile::X86_64, 0, 256 * GIB), 0);
        assert_eq!(memmap_pages(&Profile::X86_64, 56, 128 * MIB), 448);
        let most = memmap_pages(&Profile::X86_64, u32::MAX, u64::MAX);
        assert_eq!(most, u64::MAX.div_ceil(4096));
    }

    #[test]
    fn usable_part_of_a_memory_block_that_carries_its_metadata() {
        for (block, pages, usable) in [
            (128 * MIB, 512, 126 * MIB),
            (256 * MIB, 1024, 252 * MIB),
            (2 * GIB, 8192, 2 * GIB - 32 * MIB),
        ] {
            let profile = x86_64(block);
            for mode in [On, Force] {
                for size in [block, 3 * block] {
                    let found = self_hosted_pages(&profile, 64, mode, PerBlock, size);
                    assert_eq!(found, Ok(Some(pages)));
                }
            }
            assert_eq!(block - pages * profile.page_size(), usable);
        }
        for profile in [Profile::ARM64_4K, Profile::RISCV64, Profile::S390X_128M] {
            assert_eq!(supported(&profile, 64, On, PerBlock, 128 * MIB), Some(512));
        }
        assert_eq!(
            supported(&Profile::S390X, 64, On, PerBlock, 256 * MIB),
            Some(1024)
        );
    }

    #[test]
    fn arm64_with_large_pages_is_refused_even_with_force() {
        for profile in [Profile::ARM64_16K, Profile::ARM64_64K] {
            let size = profile.memory_block_size();
            for mode in [On, Force] {
                assert_eq!(supported(&profile, 64, mode, PerBlock, size), None);
                assert_eq!(supported(&profile, 64, mode, SingleBlock, size), None);
            }
        }
    }

    #[test]
    fn force_wastes_the_rest_of_a_pageblock_but_never_takes_the_whole_memory_block() {
        // Without arm64's limits on how metadata is mapped only pageblocks are in the way.
        let small_maps = |profile| Profile {
            pmd_shift: 16,
            ..profile
        };
        let profile = small_maps(Profile::ARM64_16K);
        let size = profile.memory_block_size();
        assert_eq!(supported(&profile, 64, On, PerBlock, size), None);
        assert_eq!(supported(&profile, 64, Force, PerBlock, size), Some(2048));
        assert_eq!(supported(&profile, 64, Force, SingleBlock, size), None);
        let profile = small_maps(Profile::ARM64_64K);
        assert_eq!(supported(&profile, 64, Force, PerBlock, size), None);
    }

    #[test]
    fn single_block_rule_refuses_whoever_asks_for_more() {
        let profile = Profile::X86_64;
        let ask = |mode, size| self_hosted_pages(&profile, 64, mode, SingleBlock, size);
        assert_eq!(ask(On, 128 * MIB), Ok(Some(512)));
        assert_eq!(ask(Force, 128 * MIB), Ok(Some(512)));
        for size in [0, 256 * MIB, GIB] {
            assert_eq!(supported(&profile, 64, On, SingleBlock, size), None);
            assert_eq!(ask(On, size), Err(Error::Invalid));
        }
        assert_eq!(ask(Off, 128 * MIB), Err(Error::Invalid));
    }

    #[test]
    fn nothing_is_carried_if_off_or_if_metadata_is_free_or_of_an_odd_size() {
        let ask = |size, mode| self_hosted_pages(&Profile::X86_64, size, mode, PerBlock, GIB);
        assert_eq!(ask(64, Off), Ok(None));
        for size in [0, 56, 63, 4096, u32::MAX] {
            assert_eq!(ask(size, Force), Ok(None), "{size}");
        }
    }
}

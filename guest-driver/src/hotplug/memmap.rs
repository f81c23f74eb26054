//! temp
use super::{Error, Profile};
pub(super) const STRUCT_PAGE_SIZE: u32 = 64;
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemmapOnMemory {
    #[default]
    Off,
    On,
    Force,
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemmapRule {
    #[default]
    PerBlock,
    SingleBlock,
}
pub(super) fn self_hosted_pages(
    profile: &Profile,
    struct_page_size: u32,
    mode: MemmapOnMemory,
    rule: MemmapRule,
    size: u64,
) -> Result<Option<u64>, Error> {
    if mode == MemmapOnMemory::Off
        || (rule == MemmapRule::SingleBlock && size != profile.memory_block_size())
    {
        return Ok(None);
    }
    let bytes = (profile.memory_block_size() >> profile.page_shift) * u64::from(struct_page_size);
    let ok = bytes % profile.pageblock_size() == 0 && bytes < profile.memory_block_size();
    Ok(ok.then_some(bytes >> profile.page_shift))
}

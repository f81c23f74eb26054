//! What the kernel that embeds the driver may choose.

use crate::hotplug::OnlineType;

/// In which order, and how many at a time, blocks are plugged and unplugged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Linux's order, thresholds and delays: one request at a time, each inside one memory block or big block.
    Linux,
    /// The fewest requests: one for each run of blocks, several at a time; and whatever goes wrong is recovered from,
    /// where that is possible.
    #[default]
    Direct,
}

/// What the kernel that embeds the driver may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// In which order blocks are plugged and unplugged.
    pub strategy: Strategy,
    /// Unplug online memory too; without it, only what is offline goes (Linux: parameter `unplug_online`).
    pub unplug_online: bool,
    /// Big-Block Mode even where Sub-Block Mode is possible (Linux: parameter `force_bbm`).
    pub force_bbm: bool,
    /// Bytes of a big block: a power of two, and at least a device block and a memory block, or it is ignored (Linux:
    /// parameter `bbm_block_size`).
    pub bbm_block_size: u64,
    /// How memory that was just added goes online, unless the hotplug core has seen to that; `None` leaves it offline
    /// until [`MemDriver::online_block`](super::MemDriver::online_block).
    pub auto_online: Option<OnlineType>,
}

impl Policy {
    /// What Linux does with its default parameters: bringing memory online is left to the hotplug core
    /// ([`default_online_type`](crate::hotplug::Config::default_online_type)) and to user space.
    #[must_use]
    pub const fn linux() -> Self {
        Self {
            strategy: Strategy::Linux,
            unplug_online: true,
            force_bbm: false,
            bbm_block_size: 0,
            auto_online: None,
        }
    }
}

impl Default for Policy {
    /// [`Strategy::Direct`]; added memory is used for movable pages, so that it can be unplugged again.
    fn default() -> Self {
        Self {
            strategy: Strategy::Direct,
            auto_online: Some(OnlineType::Movable),
            ..Self::linux()
        }
    }
}

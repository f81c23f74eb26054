//! The driver's place in the hotplug core: a resource, a memory group, a notifier.

use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;

use super::layout::Layout;
use super::probe::reset;
use super::watch::Watch;
use super::{MemDriver, Policy, ProbeError, Strategy};
use crate::hotplug::{GroupId, Hotplug, Owner, PhysicalMemory, ResourceFlags};

/// The name of the region among the resources.
const REGION_NAME: &str = "virtio_mem";

/// Whose memory it is: all virtio-mem devices', as they have regions of their own.
pub(super) fn owner() -> Owner {
    Owner::driver(virtio_mem_wire::VIRTIO_ID_MEM as u16)
}

/// What the driver has registered.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) group: GroupId,
    /// Keeps another driver out of the region.
    _presence: Arc<()>,
    pub(super) watch: Watch,
    /// An earlier driver of this region has left memory behind.
    pub(super) adopted: bool,
}

fn region(layout: &Layout) -> Range<u64> {
    let start = layout.geometry.addr();
    start..start + layout.geometry.region_size()
}

/// Bytes of the driver's memory in the region, and the group of some of it.
fn added<M>(hotplug: &Hotplug<M>, layout: &Layout) -> (u64, Option<GroupId>) {
    let size = layout.memory_block_size;
    let ids = region(layout).start / size..region(layout).end.div_ceil(size);
    // Those that there are: how many there could be is the device's choice.
    let ours = hotplug.blocks().filter(|block| {
        ids.contains(&block.id) && hotplug.resources().owner(block.id * size) == Some(owner())
    });
    ours.fold((0, None), |(bytes, group), block| {
        (bytes + size, group.or(block.group))
    })
}

impl Attachment {
    /// Claims the region, and registers group and notifier. An earlier driver's claim and group are taken over under
    /// [`Strategy::Direct`].
    pub(super) fn new<M: PhysicalMemory>(
        hotplug: &mut Hotplug<M>,
        layout: &Layout,
        policy: &Policy,
        node: u32,
    ) -> Result<Self, ProbeError> {
        let (bytes, group) = added(hotplug, layout);
        if bytes > 0 && policy.strategy == Strategy::Linux {
            return Err(ProbeError::MemoryAdded { bytes });
        }
        let region = region(layout);
        let presence = Arc::new(());
        hotplug
            .enter_driver(region.clone(), Arc::downgrade(&presence))
            .map_err(ProbeError::Region)?;
        if !region.is_empty() {
            let left_behind = policy.strategy == Strategy::Direct
                && hotplug
                    .resources()
                    .iomem()
                    .any(|known| known.name() == REGION_NAME && known.range() == region);
            if left_behind {
                hotplug.cancel_taking(region.start, region.end - region.start);
            } else {
                let flags = ResourceFlags::VIRTIO_MEM_REGION;
                hotplug
                    .claim_resource(region.clone(), REGION_NAME, flags)
                    .map_err(ProbeError::Region)?;
            }
        }
        let unit_pages = layout.unit_size >> hotplug.profile().page_shift;
        let group = match group {
            Some(group) => Ok(group),
            None => hotplug.register_dynamic_group(node, unit_pages),
        };
        let group = group.map_err(|error| {
            let _claimed_above_or_empty = hotplug.release_resource(region, REGION_NAME);
            ProbeError::Region(error)
        })?;
        Ok(Self {
            group,
            _presence: presence,
            watch: Watch::new(hotplug, layout),
            adopted: bytes > 0,
        })
    }

    /// Takes everything back but what memory that is still added needs; returns the bytes of that.
    fn remove<M: PhysicalMemory>(&self, hotplug: &mut Hotplug<M>, layout: &Layout) -> u64 {
        self.watch.unregister(hotplug);
        let (bytes, _) = added(hotplug, layout);
        if bytes == 0 {
            let group = hotplug.unregister_group(self.group);
            let resource = hotplug.release_resource(region(layout), REGION_NAME);
            log::debug!("virtio-mem: group {group:?}, resource {resource:?}");
        } else {
            log::warn!("virtio-mem: the device still has {bytes:#x} bytes of memory added");
        }
        bytes
    }
}

/// What a [`remove`](MemDriver::remove) has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Bytes that are still added. Their resource and group stay, and a driver that is probed later takes them over,
    /// under [`Strategy::Direct`]; under [`Strategy::Linux`] it is [refused](ProbeError::MemoryAdded).
    pub added_size: u64,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} bytes are still added", self.added_size)
    }
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Removes the driver (Linux: `virtio_mem_remove`): the device is reset, which keeps all blocks plugged (D-13),
    /// and what was registered with the hotplug core goes, unless memory is still added.
    ///
    /// Memory that was about to be unplugged is given back. Under [`Strategy::Linux`] memory blocks that are
    /// offline and plugged in part are removed, as nobody would keep their unplugged parts from going online; under
    /// [`Strategy::Direct`] they stay, as the hotplug core does.
    pub fn remove<M: PhysicalMemory>(mut self, hotplug: &mut Hotplug<M>) -> Removed {
        self.attachment.watch.set_removing(true);
        self.stop_emptying(hotplug);
        // Nothing that was asked for happens any more once the device is reset.
        if self.queue.is_some() && reset(&mut self.transport) {
            self.stop_queue();
        }
        if self.policy.strategy == Strategy::Linux {
            self.remove_offline_partial(hotplug);
        } else if self.failure.is_none() && self.scan.is_none() {
            self.give_back_everything(hotplug);
        } else {
            // What is plugged of it is not known, so it stays out of use (G-06).
        }
        let added_size = self.attachment.remove(hotplug, &self.layout);
        Removed { added_size }
    }

    fn remove_offline_partial<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        let units = self.layout.all_units();
        for unit in units {
            let state = self.with_view(hotplug, |view| view.state(unit));
            if state == super::UnitState::OfflinePartial {
                let bytes = self.layout.bytes(self.layout.unit(unit));
                let size = bytes.end - bytes.start;
                if let Err(error) = hotplug.remove_memory(owner(), bytes.start, size) {
                    log::warn!("virtio-mem: memory at {:#x} stays: {error}", bytes.start);
                }
            }
        }
    }

    /// Requests in flight may or may not have been done: what they concern is left as it is.
    fn give_back_everything<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        let runs: alloc::vec::Vec<_> = self.maps.taken.runs().collect();
        for run in runs {
            let certain: alloc::vec::Vec<_> = self.maps.intended.runs_in(run, true).collect();
            for run in certain {
                self.maps.release(run);
            }
        }
        let runs: alloc::vec::Vec<_> = self.maps.fresh.runs().collect();
        for run in runs {
            for (id, part) in self.layout.by_memory_block(self.layout.bytes(run)) {
                if hotplug.block_state(id).is_some() {
                    super::take::give_back(&self.layout, hotplug, part);
                }
            }
        }
    }
}

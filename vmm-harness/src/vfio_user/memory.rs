//! The client's memory: mapped where the guest has it, for as long as the client lets us.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use virtio_mem::{Handle, LentFiles, MemoryRegion, VirtioMem};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap, MmapRegion,
};

use crate::events::Remote;

/// Guest memory as the device sees it now.
pub(super) type Space = GuestMemoryAtomic<GuestRegionCollection<MemoryRegion>>;

/// The DMA maps of a client.
///
/// What lies in the device's region becomes its backing, the rest memory that the queue may be in. The region can
/// be reached only if all of it is mapped. Maps without a file, and such that may not be written, are remembered and
/// not used.
#[derive(Debug)]
pub(super) struct ClientMemory {
    space: Space,
    region: Arc<MemoryRegion>,
    lent: LentFiles,
    handle: Handle,
    events: Remote,
    /// Ascending, disjoint.
    maps: Vec<Map>,
}

#[derive(Debug)]
struct Map {
    /// Guest-physical addresses.
    range: Range<u64>,
    /// The parts outside the device's region: at most one before and one after it.
    ram: Vec<Arc<MemoryRegion>>,
}

impl ClientMemory {
    /// No memory yet, for `device` whose backing is `lent`.
    pub(super) fn new(device: &VirtioMem, lent: LentFiles, events: Remote) -> Self {
        Self {
            space: Space::new(GuestRegionCollection::new()),
            region: Arc::new(device.region(())),
            lent,
            handle: device.handle(),
            events,
            maps: Vec::new(),
        }
    }

    /// Guest memory, always as it is now.
    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// DMA_MAP of `size` bytes at guest-physical `address`. `file` is the memory and where it begins there, if the
    /// device may use it.
    pub(super) fn map(
        &mut self,
        address: u64,
        size: u64,
        file: Option<(File, u64)>,
    ) -> io::Result<()> {
        let range = whole_pages(address, size)?;
        if self.maps.iter().any(|map| overlap(&map.range, &range)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let device = self.region.start_addr().0..self.region.start_addr().0 + self.region.len();
        let mut ram = Vec::new();
        if let Some((file, offset)) = file {
            // A page beyond the end of its file would be the end of this process.
            let end = offset.checked_add(size);
            if end.is_none_or(|end| end > file.metadata().map_or(0, |metadata| metadata.len())) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the map reaches beyond its file",
                ));
            }
            // QEMU cuts a PC's memory at 640 KiB and at 1 MiB, which no huge page ends at.
            let page_size = LentFiles::page_size_of(&file)?;
            if ![offset, size]
                .into_iter()
                .all(|value| value.is_multiple_of(page_size))
            {
                let error = "memory in huge pages is not supported";
                return Err(io::Error::new(io::ErrorKind::Unsupported, error));
            }
            let before = range.start..range.end.min(device.start);
            let after = range.start.max(device.end)..range.end;
            let file = Arc::new(file);
            for part in [before, after] {
                if !part.is_empty() {
                    let offset = offset + (part.start - range.start);
                    ram.push(map_ram(
                        part,
                        FileOffset::from_arc(Arc::clone(&file), offset),
                    )?);
                }
            }
            let inside = range.start.max(device.start)..range.end.min(device.end);
            if !inside.is_empty() {
                let offset = offset + (inside.start - range.start);
                let inside = inside.start - device.start..inside.end - device.start;
                self.lent.lend(inside, file.try_clone()?, offset)?;
            }
        }
        let at = self
            .maps
            .partition_point(|map| map.range.start < range.start);
        self.maps.insert(at, Map { range, ram });
        self.publish();
        // A PLUG that found no memory is worth another try.
        self.handle.retry();
        Ok(())
    }

    /// DMA_UNMAP of every map in `size` bytes at `address`. When it returns the device does not touch them any more.
    pub(super) fn unmap(&mut self, address: u64, size: u64) -> io::Result<()> {
        self.unmap_range(whole_pages(address, size)?)
    }

    /// Unmaps everything.
    pub(super) fn unmap_all(&mut self) {
        let end = self.maps.last().map_or(0, |map| map.range.end);
        if let Err(error) = self.unmap_range(0..end) {
            log::error!("memory of the client cannot be unmapped: {error}");
        }
    }

    fn unmap_range(&mut self, range: Range<u64>) -> io::Result<()> {
        let inside = |map: &Map| range.start <= map.range.start && map.range.end <= range.end;
        if self
            .maps
            .iter()
            .any(|map| overlap(&map.range, &range) && !inside(map))
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "part of a map cannot be unmapped",
            ));
        }
        let unmapped: Vec<_> = self.maps.extract_if(.., |map| inside(map)).collect();
        if unmapped.is_empty() {
            return Ok(());
        }
        let (start, len) = (self.region.start_addr().0, self.region.len());
        let lent = |map: &Map| overlap(&map.range, &(start..start + len));
        // Before it is taken back, so that nobody finds a hole in the region.
        self.publish_without_region(unmapped.iter().any(lent));
        // The queue's handler may be at a request with memory as it was before.
        if let Err(error) = self.events.barrier() {
            log::debug!("the event loop is gone: {error}");
        }
        let offset = |address: u64| address.clamp(start, start + len) - start;
        for map in unmapped.iter().filter(|map| lent(map)) {
            self.lent
                .take_back(offset(map.range.start)..offset(map.range.end))?;
        }
        Ok(())
    }

    fn publish(&self) {
        self.publish_without_region(!self.lent.is_whole());
    }

    fn publish_without_region(&self, without_region: bool) {
        let ram = self.maps.iter().flat_map(|map| &map.ram);
        let region = (!without_region && self.lent.is_whole()).then_some(&self.region);
        let mut regions: Vec<_> = ram.chain(region).map(Arc::clone).collect();
        regions.sort_by_key(|region| region.start_addr());
        // It refuses to be empty, for which there is another constructor, and cannot overlap.
        let regions = GuestRegionCollection::from_arc_regions(regions).unwrap_or_default();
        let lock = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        lock.replace(regions);
    }
}

fn map_ram(range: Range<u64>, file: FileOffset) -> io::Result<Arc<MemoryRegion>> {
    let size = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let mapping = MmapRegion::build(Some(file), size, protection, flags);
    let mapping = mapping.map_err(io::Error::other)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start));
    let region = region.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Arc::new(MemoryRegion::Ram(region)))
}

fn whole_pages(address: u64, size: u64) -> io::Result<Range<u64>> {
    let page_size = rustix::param::page_size() as u64;
    let end = address.checked_add(size).filter(|_| size > 0);
    let end = end.filter(|_| (address | size).is_multiple_of(page_size));
    end.map(|end| address..end)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread;
    use std::time::Duration;

    use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
    use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::events::EventLoop;

    const START: u64 = 1 << 32;
    const SIZE: u64 = 4 << 20;

    /// A handler in the middle of a request, with memory as it was when the request came.
    struct Busy {
        notify: EventFd,
        space: Space,
        lent: LentFiles,
        /// Whether the memory was there at the beginning, and was still there at the end.
        seen: Sender<bool>,
    }

    impl MutEventSubscriber for Busy {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.notify, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.notify.read().unwrap();
            self.seen.send(self.lent.is_whole()).unwrap();
            while self.space.memory().num_regions() > 0 {
                thread::yield_now();
            }
            // New requests find no memory from here on. Time for an unmap that does not wait for this one.
            thread::sleep(Duration::from_millis(100));
            self.seen.send(self.lent.is_whole()).unwrap();
        }
    }

    #[test]
    fn unmap_waits_for_the_request_that_has_the_memory() {
        let mut events = EventLoop::start().unwrap();
        let lent = LentFiles::new(SIZE).unwrap();
        let device = VirtioMem::builder(GuestAddress(START), lent.clone());
        let device = device.block_size(2 << 20).build().unwrap();
        let mut memory = ClientMemory::new(&device, lent.clone(), events.remote().clone());
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        memory.map(START, SIZE, Some((file, 0))).unwrap();
        assert_eq!(memory.space().memory().num_regions(), 1);

        let notify = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, received) = channel();
        let busy = Busy {
            notify: notify.try_clone().unwrap(),
            space: memory.space().clone(),
            lent: lent.clone(),
            seen,
        };
        events.remote().add(Box::new(busy)).unwrap();
        notify.write(1).unwrap();
        assert_eq!(received.recv(), Ok(true));
        memory.unmap(START, SIZE).unwrap();
        assert_eq!(
            received.try_recv(),
            Ok(true),
            "taken away from under a request"
        );
        assert!(!lent.is_whole());
        events.stop();
    }
}

//! The messages of one client after another.

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::SubscriberId;
use rustix::io::FdFlags;
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend};

use super::irqs::{self, Irqs, Unmask};
use super::memory::{ClientMemory, Space};
use crate::events::Remote;
use crate::transport::pci::{CONFIG_SPACE_SIZE, MSIX_BAR_SIZE, PciTransport, REGISTER_BAR_SIZE};

/// The device, as far as a client changes it.
#[derive(Debug)]
pub(super) struct Session {
    transport: PciTransport<Space>,
    memory: ClientMemory,
    irqs: Arc<Irqs>,
    events: Remote,
    /// What listens to the eventfd that unmasks the interrupt line, if there is one.
    unmask: Option<SubscriberId>,
}

/// What a region of the device is.
enum Region {
    Bar(u8),
    ConfigSpace,
}

impl Session {
    pub(super) fn new(
        transport: PciTransport<Space>,
        memory: ClientMemory,
        irqs: Arc<Irqs>,
        events: Remote,
    ) -> Self {
        Self {
            transport,
            memory,
            irqs,
            events,
            unmask: None,
        }
    }

    /// The client is gone: nothing of it stays here. Its memory is left as it is, since its guest may run on without
    /// the device; so it is unmapped before the blocks are unplugged, which then gives nothing back.
    pub(super) fn end(&mut self) {
        self.transport.reset();
        self.irqs.clear();
        self.stop_unmasking();
        self.memory.unmap_all();
        let device = self.transport.device();
        // Whoever froze the device did so because of the memory that is gone now.
        device.handle().thaw();
        if let Err(error) = device.system_reset() {
            log::error!("blocks of a client that is gone stay plugged: {error}");
        }
    }

    /// Unmasks the interrupt line by `eventfds`, which are one or none, from now on.
    fn unmask_by(&mut self, start: u32, count: u32, eventfds: Vec<File>) -> io::Result<()> {
        if (start, count) != (0, 1) || eventfds.len() > 1 || !self.irqs.line_is_connected() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let listeners = eventfds
            .into_iter()
            .map(|eventfd| Unmask::new(eventfd, &self.irqs, self.transport.interrupt()));
        let listener = listeners.collect::<io::Result<Vec<_>>>()?.pop();
        self.stop_unmasking();
        if let Some(listener) = listener {
            let id = self.events.add(Box::new(listener));
            self.unmask = Some(id.map_err(io::Error::other)?);
        }
        Ok(())
    }

    fn stop_unmasking(&mut self) {
        if let Some(id) = self.unmask.take()
            && let Err(error) = self.events.remove(id)
        {
            log::debug!("the event loop is gone: {error}");
        }
    }

    /// All blocks are unplugged, which a reset of the device by its driver does not do.
    fn system_reset(&self) -> io::Result<()> {
        self.transport.reset();
        self.transport.device().system_reset().map_err(|error| {
            log::warn!("blocks stay plugged over a system reset: {error}");
            io::Error::other(error)
        })
    }
}

/// The region of number `index`, if `len` bytes at `offset` lie in it.
fn region(index: u32, offset: u64, len: usize) -> io::Result<Region> {
    let (region, size) = match index {
        0 => (Region::Bar(0), REGISTER_BAR_SIZE.into()),
        1 => (Region::Bar(1), MSIX_BAR_SIZE.into()),
        VFIO_PCI_CONFIG_REGION_INDEX => (Region::ConfigSpace, CONFIG_SPACE_SIZE),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    match offset.checked_add(len as u64) {
        Some(end) if end <= size => Ok(region),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// What the crate receives would be left to whatever this process executes.
fn keep_from_children(file: &File) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(file, FdFlags::CLOEXEC)?)
}

impl ServerBackend for Session {
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region(index, offset, data.len())? {
            Region::Bar(bar) => self.transport.read_bar(bar, offset, data),
            Region::ConfigSpace => self.transport.read_config_space(offset, data),
        }
        Ok(())
    }

    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match region(index, offset, data.len())? {
            Region::Bar(bar) => self.transport.write_bar(bar, offset, data),
            Region::ConfigSpace => self.transport.write_config_space(offset, data),
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        if let Some(file) = &fd {
            keep_from_children(file)?;
        }
        // The device writes answers: memory it may only read is of no use to it.
        let file = fd.filter(|_| flags.contains(DmaMapFlags::READ_WRITE));
        let file = file.map(|file| (file, offset));
        let result = self.memory.map(address, size, file);
        result.inspect_err(|error| {
            log::warn!("the client's map of {size:#x} bytes at {address:#x} is refused: {error}");
        })
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.memory.unmap_all();
            return Ok(());
        }
        self.memory.unmap(address, size)
    }

    /// DEVICE_RESET: the machine is reset. A driver that resets the device writes 0 to its status.
    fn reset(&mut self) -> io::Result<()> {
        self.system_reset()
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        for fd in &fds {
            keep_from_children(fd)?;
        }
        match irqs::is_unmask_by_eventfd(index, flags) {
            true => self.unmask_by(start, count, fds)?,
            false => self.irqs.set(index, flags, start, count, fds)?,
        }
        if !self.irqs.line_is_connected() {
            self.stop_unmasking();
        }
        // Unmasked, or connected, while there is something pending.
        self.transport.interrupt().refresh_line();
        Ok(())
    }
}

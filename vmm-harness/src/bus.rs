//! Which address belongs to whom.

use std::sync::Arc;

use virtio_mem::VirtioMem;
use virtio_mem_wire::BlockState;
use vmem_guest::abi::port;

use crate::layout::{PAGE, PORT, VIRTIO_MMIO};
use crate::port::{Port, PortWrite};
use crate::transport::MmioTransport;

/// What a guest reaches outside its memory.
#[derive(Debug)]
pub(crate) struct Bus {
    /// One for each memory device.
    pub(crate) transports: Vec<Arc<MmioTransport>>,
    pub(crate) port: Arc<Port>,
}

/// What an access means for the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    Continue,
    Exit,
    Panic,
    /// The access was to an unplugged block.
    Unplugged,
}

/// Bytes of the widest access a vCPU can make. A host sees it page by page.
const WIDEST_ACCESS: u64 = 64;

impl Bus {
    /// Whether all memory that an access seen at `address` can have reached is plugged: then the guest was in
    /// its right, and what failed is the host.
    pub(crate) fn is_plugged(&self, address: u64) -> bool {
        let Some(device) = self.device_at(address) else {
            return false;
        };
        let geometry = device.geometry();
        // What is beyond the region, another device's memory or nothing, is not looked at.
        let end = geometry.addr() + geometry.region_size();
        let len = end.saturating_sub(address).min(WIDEST_ACCESS);
        let blocks = geometry.blocks_touching(address, len);
        blocks.is_some_and(|blocks| device.handle().plugged().state(blocks) == BlockState::Plugged)
    }

    /// The device in whose region `address` is: where there is no memory there, no block is plugged.
    pub(crate) fn device_at(&self, address: u64) -> Option<&VirtioMem> {
        let mut devices = self.transports.iter().map(|transport| transport.device());
        devices.find(|device| device.geometry().block_at(address).is_some())
    }

    /// The registers at `address`, and the offset in them.
    fn registers_at(&self, address: u64) -> Option<(&MmioTransport, u64)> {
        let offset = address.checked_sub(VIRTIO_MMIO)?;
        let transport = self.transports.get(usize::try_from(offset / PAGE).ok()?)?;
        Some((transport, offset % PAGE))
    }

    pub(crate) fn read(&self, vcpu: usize, address: u64, data: &mut [u8]) -> Reaction {
        if let Some((transport, offset)) = self.registers_at(address) {
            transport.read(offset, data);
        } else if let Some(offset) = offset_in(address, PORT, port::LEN) {
            self.port.read(vcpu, offset, data);
        } else if self.device_at(address).is_some() {
            return Reaction::Unplugged;
        } else {
            // As on a bus where nobody answers.
            log::debug!(
                "read of {} bytes at {address:#x}, where nothing is",
                data.len()
            );
            data.fill(0xff);
        }
        Reaction::Continue
    }

    pub(crate) fn write(&self, vcpu: usize, address: u64, data: &[u8]) -> Reaction {
        if let Some((transport, offset)) = self.registers_at(address) {
            transport.write(offset, data);
        } else if let Some(offset) = offset_in(address, PORT, port::LEN) {
            return match self.port.write(vcpu, offset, data) {
                PortWrite::Continue => Reaction::Continue,
                PortWrite::Exit => Reaction::Exit,
                PortWrite::Panic => Reaction::Panic,
            };
        } else if self.device_at(address).is_some() {
            return Reaction::Unplugged;
        } else {
            log::debug!(
                "write of {} bytes at {address:#x}, where nothing is",
                data.len()
            );
        }
        Reaction::Continue
    }
}

fn offset_in(address: u64, start: u64, len: u64) -> Option<u64> {
    address.checked_sub(start).filter(|offset| *offset < len)
}

//! PCI configuration space: header, BARs and capabilities (virtio 1.4, 4.1.2 and 4.1.4).

use virtio_mem::wire::VIRTIO_ID_MEM;

use super::{
    Area, COMMON, CONFIG_SPACE_SIZE, DEVICE, ISR, MSIX_BAR, MSIX_BAR_SIZE, MSIX_PENDING_OFFSET,
    MSIX_TABLE_OFFSET, NOTIFY, NOTIFY_MULTIPLIER, REGISTER_BAR, REGISTER_BAR_SIZE, VECTOR_COUNT,
};

const VENDOR_ID: u16 = 0x1af4;
/// Modern devices only: 0x1040 and the virtio device id.
const DEVICE_ID: u16 = 0x1040 + VIRTIO_ID_MEM as u16;
/// 4.1.2.1: 1 or higher, so that no transitional driver takes it for a device of its own.
const REVISION: u8 = 1;
/// None of those defined.
const CLASS: u8 = 0xff;
/// 4.1.2.1: 0x40 or higher, for the same reason.
const SUBSYSTEM_ID: u16 = 0x1100;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const BARS: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_LEN: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// `cfg_type` of a virtio capability.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Bytes of `struct virtio_pci_cap`.
const VIRTIO_CAP_LEN: usize = 16;
/// The capability through which BARs are read and written without being mapped. It is the last.
const WINDOW: usize = 0x90;
const WINDOW_BAR: usize = WINDOW + 4;
const WINDOW_OFFSET: usize = WINDOW + 8;
const WINDOW_LENGTH: usize = WINDOW + 12;
const WINDOW_DATA: usize = WINDOW + VIRTIO_CAP_LEN;

const SIZE: usize = CONFIG_SPACE_SIZE as usize;

/// The bytes, and which of their bits software may change.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
}

/// The BAR access that the driver has described in the PCI configuration access capability.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) bar: u8,
    pub(super) offset: u64,
    /// 1, 2 or 4.
    pub(super) len: usize,
}

impl ConfigSpace {
    pub(super) fn new() -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        space.set(0x00, &VENDOR_ID.to_le_bytes());
        space.set(0x02, &DEVICE_ID.to_le_bytes());
        space.set(STATUS, &[STATUS_CAPABILITIES]);
        space.set(0x08, &[REVISION, 0, 0, CLASS]);
        space.set(0x2c, &VENDOR_ID.to_le_bytes());
        space.set(0x2e, &SUBSYSTEM_ID.to_le_bytes());
        space.set(INTERRUPT_PIN, &[1]);
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTERRUPT_DISABLE;
        space.permit(COMMAND, &command.to_le_bytes());
        space.permit(CACHE_LINE_SIZE, &[0xff]);
        space.permit(INTERRUPT_LINE, &[0xff]);
        // 32-bit memory. What cannot be changed tells the size.
        space.permit(BARS, &(!(REGISTER_BAR_SIZE - 1)).to_le_bytes());
        space.permit(BARS + 4, &(!(MSIX_BAR_SIZE - 1)).to_le_bytes());

        let mut link = CAPABILITIES_POINTER;
        let mut at = HEADER_LEN;
        for capability in [
            virtio(CFG_COMMON, &COMMON, &[]),
            virtio(CFG_NOTIFY, &NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()),
            virtio(CFG_ISR, &ISR, &[]),
            virtio(CFG_DEVICE, &DEVICE, &[]),
            msix(),
            // Where it leads to is up to the driver.
            virtio(CFG_PCI, &Area { offset: 0, len: 0 }, &[0; 4]),
        ] {
            space.set(link, &[at as u8]);
            space.set(at, &capability);
            if capability.first() == Some(&CAPABILITY_MSIX) {
                space.permit(at + 2, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
            }
            link = at + 1;
            at += capability.len();
        }
        space.permit(WINDOW_BAR, &[0xff]);
        space.permit(WINDOW_OFFSET, &[0xff; 12]);
        space
    }

    /// Copies from `offset` on; 0 beyond the end. `interrupt` is Interrupt Status of the status register.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], interrupt: bool) {
        data.fill(0);
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = self.bytes.get(at).copied().unwrap_or(0);
            if at == STATUS && interrupt {
                *byte |= STATUS_INTERRUPT;
            }
        }
    }

    /// Changes the bits that may be changed.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, new) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// Whether the driver wants to hear of the interrupt line.
    pub(super) fn line_is_enabled(&self) -> bool {
        u16::from_le_bytes(self.get(COMMAND)) & COMMAND_INTERRUPT_DISABLE == 0
    }

    /// Whether an access goes through the window and not to the configuration space itself.
    pub(super) fn is_window_access(offset: u64, len: usize) -> bool {
        offset == WINDOW_DATA as u64 && (1..=4).contains(&len)
    }

    /// Where the window leads to; `None` if it is no access the specification allows (4.1.4.9.2).
    pub(super) fn window(&self) -> Option<Window> {
        let [bar] = self.get(WINDOW_BAR);
        let offset = u32::from_le_bytes(self.get(WINDOW_OFFSET));
        let len = u32::from_le_bytes(self.get(WINDOW_LENGTH));
        (matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len)).then_some(Window {
            bar,
            offset: offset.into(),
            len: len as usize,
        })
    }

    pub(super) fn window_data(&self) -> [u8; 4] {
        self.get(WINDOW_DATA)
    }

    pub(super) fn set_window_data(&mut self, data: [u8; 4]) {
        self.set(WINDOW_DATA, &data);
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (byte, at) in bytes.iter_mut().zip(at..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
        bytes
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (at, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *at = *byte;
        }
    }

    fn permit(&mut self, at: usize, mask: &[u8]) {
        for (at, mask) in self.writable.iter_mut().skip(at).zip(mask) {
            *at = *mask;
        }
    }
}

/// `struct virtio_pci_cap` for an area of the register BAR, and what follows it.
fn virtio(cfg_type: u8, area: &Area, more: &[u8]) -> Vec<u8> {
    let len = (VIRTIO_CAP_LEN + more.len()) as u8;
    let mut bytes = vec![CAPABILITY_VENDOR, 0, len, cfg_type, REGISTER_BAR, 0, 0, 0];
    bytes.extend(area.offset.to_le_bytes());
    bytes.extend(area.len.to_le_bytes());
    bytes.extend(more);
    bytes
}

fn msix() -> Vec<u8> {
    let mut bytes = vec![CAPABILITY_MSIX, 0];
    bytes.extend((VECTOR_COUNT - 1).to_le_bytes());
    bytes.extend((MSIX_TABLE_OFFSET | u32::from(MSIX_BAR)).to_le_bytes());
    bytes.extend((MSIX_PENDING_OFFSET | u32::from(MSIX_BAR)).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Id and offset of each capability, as software finds them.
    fn capabilities(space: &ConfigSpace) -> Vec<(u8, usize)> {
        let mut found = Vec::new();
        let [mut at] = space.get(CAPABILITIES_POINTER);
        while at != 0 && found.len() < 48 {
            let [id, next] = space.get(at.into());
            found.push((id, usize::from(at)));
            at = next;
        }
        found
    }

    #[test]
    fn capabilities_are_a_list_inside_the_space_and_do_not_overlap() {
        let space = ConfigSpace::new();
        let found = capabilities(&space);
        let ids: Vec<_> = found.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [9, 9, 9, 9, 0x11, 9]);
        let mut free = HEADER_LEN;
        for (id, at) in &found {
            assert!(at % 4 == 0 && *at >= free, "{at:#x}");
            let [len] = space.get(at + 2);
            free = at
                + if *id == CAPABILITY_MSIX {
                    12
                } else {
                    usize::from(len)
                };
        }
        assert!(free <= SIZE);
        assert_eq!(found.last(), Some(&(CAPABILITY_VENDOR, WINDOW)));
        assert_eq!(space.get::<1>(WINDOW + 3), [CFG_PCI]);
    }

    #[test]
    fn accesses_beyond_the_end_read_zero_and_write_nothing() {
        let mut space = ConfigSpace::new();
        space.write(254, &[0xff; 8]);
        space.write(u64::MAX - 3, &[0xff; 4]);
        let mut data = [0xa5; 8];
        space.read(254, &mut data, true);
        assert_eq!(data, [0; 8]);
        space.read(u64::MAX - 3, &mut data[..4], true);
        assert_eq!(data, [0; 8]);
    }
}

//! Feature bits (virtio 1.4, 5.15.3, and the reserved bits of section 6 used here).

use bitflags::bitflags;

bitflags! {
    /// Feature bits a memory device may offer.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `VIRTIO_MEM_F_ACPI_PXM`: `node_id` is valid and is an ACPI proximity domain.
        const ACPI_PXM = 1 << 0;
        /// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver must not touch unplugged blocks at all.
        const UNPLUGGED_INACCESSIBLE = 1 << 1;
        /// `VIRTIO_MEM_F_PERSISTENT_SUSPEND`: plugged blocks survive suspend and wake (virtio 1.4).
        const PERSISTENT_SUSPEND = 1 << 2;
        /// `VIRTIO_F_INDIRECT_DESC`.
        const RING_INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`.
        const RING_EVENT_IDX = 1 << 29;
        /// `VIRTIO_F_VERSION_1`; virtio-mem has no legacy form.
        const VERSION_1 = 1 << 32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_the_specification() {
        assert_eq!(Features::ACPI_PXM.bits(), 1);
        assert_eq!(Features::UNPLUGGED_INACCESSIBLE.bits(), 2);
        assert_eq!(Features::PERSISTENT_SUSPEND.bits(), 4);
        assert_eq!(Features::VERSION_1.bits(), 0x1_0000_0000);
    }
}

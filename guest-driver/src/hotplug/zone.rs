//! temp
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneKind {
    Dma,
    Dma32,
    Normal,
    Movable,
    Device,
}
impl ZoneKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dma => "DMA",
            Self::Dma32 => "DMA32",
            Self::Normal => "Normal",
            Self::Movable => "Movable",
            Self::Device => "Device",
        }
    }
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::Dma | Self::Dma32 | Self::Normal)
    }
}

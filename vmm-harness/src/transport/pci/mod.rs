//! A memory device on PCI: configuration space and BARs (virtio 1.4, 4.1).
//!
//! | where | what | file |
//! |---|---|---|
//! | configuration space | header, BARs, capabilities | `config_space.rs` |
//! | BAR 0 + 0x0000 | common configuration (4.1.4.3) | `common_config.rs` |
//! | BAR 0 + 0x1000 | ISR status (4.1.4.5) | `interrupt.rs` |
//! | BAR 0 + 0x2000 | configuration space of the memory device (5.15.4) | |
//! | BAR 0 + 0x3000 | notification of queue 0 (4.1.4.4) | |
//! | BAR 1 | MSI-X table and pending bits: whoever delivers messages has them | |
//!
//! This is a model of registers, for whatever carries the accesses: it decodes no addresses and sends no messages.
//! Accesses of another width than the specification gives a register read as 0 and are otherwise ignored, as
//! they are to registers that are not there. There is no transitional interface and no queue reset
//! (`VIRTIO_F_RING_RESET`).

mod common_config;
mod config_space;
mod interrupt;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_mem::VirtioMem;
use virtio_mem::wire::Config;
use vm_memory::GuestAddressSpace;

use self::config_space::{ConfigSpace, Window};
use super::core::TransportCore;
use crate::events::Remote;

pub use self::interrupt::{NO_VECTOR, PciInterrupt, PciSignals, VECTOR_COUNT};

/// Bytes of PCI configuration space: no extended capability is there.
pub const CONFIG_SPACE_SIZE: u64 = 256;
/// Bytes of BAR 0, the registers.
pub const REGISTER_BAR_SIZE: u32 = 0x4000;
/// Bytes of BAR 1, which MSI-X tables and pending bits have to themselves.
pub const MSIX_BAR_SIZE: u32 = 0x1000;

/// A structure in BAR 0.
struct Area {
    offset: u32,
    len: u32,
}

const COMMON: Area = Area {
    offset: 0,
    len: 0x40,
};
const ISR: Area = Area {
    offset: 0x1000,
    len: 1,
};
const DEVICE: Area = Area {
    offset: 0x2000,
    len: Config::LEN as u32,
};
const NOTIFY: Area = Area {
    offset: 0x3000,
    len: NOTIFY_MULTIPLIER,
};
/// Bytes from the notification address of one queue to that of the next.
const NOTIFY_MULTIPLIER: u32 = 4;

const MSIX_TABLE_OFFSET: u32 = 0;
const MSIX_PENDING_OFFSET: u32 = 0x800;

const REGISTER_BAR: u8 = 0;
const MSIX_BAR: u8 = 1;

impl Area {
    /// `offset` of the BAR as an offset of this structure, if it lies inside.
    fn locate(&self, offset: u64) -> Option<u64> {
        let inside = offset.checked_sub(self.offset.into())?;
        (inside < u64::from(self.len)).then_some(inside)
    }
}

/// One memory device behind the registers of virtio-pci. `M` is where its queue lies.
pub struct PciTransport<M> {
    core: TransportCore<M, PciInterrupt>,
    config: Mutex<ConfigSpace>,
    generation: Mutex<Generation>,
}

/// The generation of the device's configuration, in the 8 bits virtio-pci has for it.
///
/// The low bits alone would be the same again after 256 changes. This one goes on by one if there was any change
/// since the driver last looked, and so never comes round between two looks.
#[derive(Debug, Default)]
struct Generation {
    seen: u32,
    shown: u8,
}

impl<M> PciTransport<M>
where
    M: GuestAddressSpace + Clone + Send + 'static,
{
    /// Puts `device` behind registers. Its queue lies in `memory` and is served in the event loop of `events`.
    ///
    /// # Errors
    ///
    /// No eventfd is left.
    pub fn new(
        device: VirtioMem,
        memory: M,
        events: Remote,
        interrupt: Arc<PciInterrupt>,
    ) -> io::Result<Self> {
        Ok(Self {
            core: TransportCore::new(device, memory, Some(events), interrupt)?,
            config: Mutex::new(ConfigSpace::new()),
            generation: Mutex::default(),
        })
    }

    /// Reads `data.len()` bytes of PCI configuration space at `offset`; 0 beyond its end.
    ///
    /// An access of up to four bytes at `pci_cfg_data` reads a BAR (4.1.4.9).
    pub fn read_config_space(&self, offset: u64, data: &mut [u8]) {
        if let Some(window) = self.window(offset, data.len()) {
            let mut word = [0; 4];
            if let Some(word) = word.get_mut(..window.len) {
                self.read_bar(window.bar, window.offset, word);
            }
            self.config().set_window_data(word);
        }
        let pending = self.interrupt().line_is_pending();
        self.config().read(offset, data, pending);
    }

    /// Writes `data` to PCI configuration space at `offset`, as far as it is writable there.
    ///
    /// An access of up to four bytes at `pci_cfg_data` writes a BAR (4.1.4.9).
    pub fn write_config_space(&self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        let line_is_enabled = config.line_is_enabled();
        let word = config.window_data();
        drop(config);
        self.interrupt().enable_line(line_is_enabled);
        if let Some(window) = self.window(offset, data.len())
            && let Some(word) = word.get(..window.len)
        {
            self.write_bar(window.bar, window.offset, word);
        }
    }

    /// Reads `data.len()` bytes of BAR `bar` at `offset`.
    pub fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != REGISTER_BAR {
            return;
        }
        if let Some(offset) = COMMON.locate(offset) {
            if let Some(value) = self.read_common(offset, data.len()) {
                for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
                    *byte = value;
                }
            }
        } else if let Some(offset) = DEVICE.locate(offset) {
            self.core.read_config(offset, data);
        } else if ISR.locate(offset).is_some()
            && let [isr] = data
        {
            *isr = self.interrupt().take_pending();
        }
    }

    /// Writes `data` to BAR `bar` at `offset`.
    pub fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar != REGISTER_BAR {
            return;
        }
        // The device's configuration and the ISR status are read-only to the driver (G-01).
        if let Some(offset) = COMMON.locate(offset) {
            let mut value = [0; 8];
            if let Some(bytes) = value.get_mut(..data.len()) {
                bytes.copy_from_slice(data);
                self.write_common(offset, data.len(), u64::from_le_bytes(value));
            }
        } else if NOTIFY.locate(offset) == Some(0)
            && let Ok(index) = <[u8; 2]>::try_from(data)
        {
            self.core.notify_queue(u16::from_le_bytes(index).into());
        }
    }

    /// Reset of the PCI function: the configuration space and the device are as when they were new, but for the
    /// blocks, which stay as they are (D-13). A system reset is [`VirtioMem::system_reset`] after this.
    pub fn reset(&self) {
        self.core.reset();
        *self.config() = ConfigSpace::new();
        self.interrupt().enable_line(true);
    }

    /// The BAR access that `len` bytes at `offset` of the configuration space stand for.
    fn window(&self, offset: u64, len: usize) -> Option<Window> {
        let window = self.config().window();
        window.filter(|_| ConfigSpace::is_window_access(offset, len))
    }

    fn generation(&self) -> u8 {
        let mut generation = self
            .generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = self.device().config_generation();
        if generation.seen != now {
            generation.seen = now;
            generation.shown = generation.shown.wrapping_add(1);
        }
        generation.shown
    }
}

impl<M> PciTransport<M> {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &VirtioMem {
        self.core.device()
    }

    /// Interrupts raised, and their status.
    #[must_use]
    pub fn interrupt(&self) -> &Arc<PciInterrupt> {
        self.core.interrupt()
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        // Each byte stands for itself.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> fmt::Debug for PciTransport<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciTransport")
            .field("core", &self.core)
            .finish_non_exhaustive()
    }
}

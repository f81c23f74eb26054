//! What of the region a crash dump may read: nothing is plugged, unplugged or added (Linux: `virtio_mem_kdump_init`).

use core::fmt;
use core::ops::Range;

use alloc::vec::Vec;
use virtio_drivers::Hal;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_mem_wire::{BlockRange, BlockState, Config, Request, Response, Span};

use super::ProbeError;
use super::probe::{Ready, SUPPORTED, reset};
use super::queue::{Answered, RequestQueue};

/// A read-only view of a memory device, for the kernel that writes a crash dump.
///
/// ```text
///  address outside the region ---------------------> RAM, as far as this device goes
///  plugged_size 0 ---------------------------------> not RAM
///  STATE of its block: PLUGGED --------------------> RAM
///                      anything else, no answer ---> not RAM
/// ```
pub struct DumpView<H: Hal, T: Transport> {
    transport: T,
    queue: RequestQueue<H>,
    config: Config,
    /// The device block asked for last, and whether it is plugged.
    last: Option<(u64, bool)>,
    /// A request was not answered: nothing more is asked.
    dead: bool,
}

impl<H: Hal, T: Transport> fmt::Debug for DumpView<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DumpView")
            .field("config", &self.config)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

impl<H: Hal, T: Transport> DumpView<H, T> {
    /// Initialises the device, which keeps all blocks plugged (D-13).
    ///
    /// # Errors
    ///
    /// See [`ProbeError`].
    pub fn probe(mut transport: T) -> Result<Self, ProbeError> {
        let device_type = transport.device_type();
        if device_type != DeviceType::Memory {
            return Err(ProbeError::WrongDevice(device_type));
        }
        let ready = Ready::new(&mut transport, SUPPORTED)?;
        let config = ready.config;
        let (_, queue) = ready.start(&mut transport);
        Ok(Self {
            transport,
            queue,
            config,
            last: None,
            dead: false,
        })
    }

    /// The device's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the page at `address` may be read. `keep_waiting` is called while the device has not answered; once it
    /// returns `false`, this and every later answer is that it may not (Linux: `virtio_mem_vmcore_pfn_is_ram`).
    pub fn is_ram(&mut self, address: u64, keep_waiting: impl FnMut() -> bool) -> bool {
        let Some(block) = self.config.geometry.block_at(address) else {
            return true;
        };
        let usable = self.config.mutable.usable_region_size;
        let in_usable = address - self.config.geometry.addr() < usable;
        // N-03
        if self.config.mutable.plugged_size == 0 || !in_usable {
            return false;
        }
        if let Some((known, plugged)) = self.last
            && known == block
        {
            return plugged;
        }
        let range = BlockRange {
            first: block,
            count: 1,
        };
        let plugged = self.state(range, keep_waiting) == Some(BlockState::Plugged);
        self.last = Some((block, plugged));
        plugged
    }

    /// The addresses of the region that may be read, ascending, found in chunks of `chunk_size` bytes (at least a
    /// device block): a chunk that is plugged in part is asked for block by block (Linux:
    /// `virtio_mem_vmcore_get_device_ram`).
    pub fn ram(
        &mut self,
        chunk_size: u64,
        mut keep_waiting: impl FnMut() -> bool,
    ) -> Vec<Range<u64>> {
        let geometry = self.config.geometry;
        let mut found: Vec<Range<u64>> = Vec::new();
        if self.config.mutable.plugged_size == 0 {
            return found;
        }
        let most = u64::from(virtio_mem_wire::MAX_BLOCKS_PER_REQUEST);
        let chunk = (chunk_size / geometry.block_size()).clamp(1, most);
        let end = self.config.mutable.usable_region_size / geometry.block_size();
        let mut first = 0;
        // What of a chunk is asked for once more, the next block last.
        let mut singly: Vec<BlockRange> = Vec::new();
        while !self.dead && (first < end || !singly.is_empty()) {
            let range = singly.pop().unwrap_or_else(|| {
                let count = chunk.min(end - first);
                let range = BlockRange { first, count };
                first = range.end();
                range
            });
            match self.state(range, &mut keep_waiting) {
                Some(BlockState::Plugged) => {
                    let start = geometry.address(range.first);
                    let end = start + geometry.bytes(range.count);
                    match found.last_mut() {
                        Some(last) if last.end == start => last.end = end,
                        _ => found.push(start..end),
                    }
                }
                Some(BlockState::Mixed) if range.count > 1 => {
                    let blocks = (range.first..range.end()).rev();
                    singly.extend(blocks.map(|first| BlockRange { first, count: 1 }));
                }
                _ => {}
            }
        }
        found
    }

    /// G-20, G-21: the state, if the device says so in time and acknowledges.
    fn state(
        &mut self,
        range: BlockRange,
        mut keep_waiting: impl FnMut() -> bool,
    ) -> Option<BlockState> {
        if self.dead {
            return None;
        }
        let span = Span {
            addr: self.config.geometry.address(range.first),
            block_count: u16::try_from(range.count).ok()?,
        };
        let sent = self.queue.send(Request::State(span), &mut self.transport);
        self.dead = sent.is_err();
        while !self.dead && !self.queue.has_answer() {
            self.dead = !keep_waiting();
        }
        if self.dead {
            return None;
        }
        match self.queue.receive() {
            Ok(Some(Answered {
                response: Ok(Response::AckState(state)),
                ..
            })) => Some(state),
            Ok(_) => None,
            Err(_) => {
                self.dead = true;
                None
            }
        }
    }
}

impl<H: Hal, T: Transport> Drop for DumpView<H, T> {
    fn drop(&mut self) {
        // V-11
        if reset(&mut self.transport) {
            self.queue.device_stopped();
        }
    }
}

//! Asking the device which blocks are plugged, by STATE requests, and starting anew where that is needed.
//!
//! A range that is neither plugged nor unplugged throughout is asked for in halves, so a region in few runs takes few
//! requests.

use alloc::vec::Vec;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;
use virtio_mem_wire::{BlockMap, BlockRange, BlockState};

use super::answers::Sent;
use super::attach::owner;
use super::config::moved;
use super::events::Event;
use super::layout::Layout;
use super::maps::Maps;
use super::probe::{Ready, reset};
use super::progress::{Failure, Progress, ResyncReason};
use super::queue::MAX_IN_FLIGHT;
use super::state::Presence;
use super::take::withdraw_free;
use super::{MemDriver, Strategy};
use crate::hotplug::{Hotplug, PhysicalMemory};

/// How often the driver starts anew before it gives up, unless it reaches its target in between: after a wrong
/// answer or size, and after a reset.
const RESYNCS_MAX: u8 = 1;
const RESETS_MAX: u8 = 3;

/// A scan of the usable region.
#[derive(Debug)]
pub(super) struct Scan {
    /// Ranges to ask for, the next one last.
    todo: Vec<BlockRange>,
    plugged: BlockMap,
}

impl Scan {
    pub(super) fn new(layout: &Layout, usable_size: u64) -> Self {
        let geometry = &layout.geometry;
        let end = usable_size.min(geometry.region_size()) / geometry.block_size();
        let most = layout.request_blocks;
        let pieces = (0..end.div_ceil(most)).map(|i| BlockRange {
            first: i * most,
            count: most.min(end - i * most),
        });
        let mut todo: Vec<_> = pieces.collect();
        todo.reverse();
        Self {
            todo,
            plugged: BlockMap::new(geometry.block_count()),
        }
    }

    /// Asks for a range again.
    pub(super) fn repeat(&mut self, range: BlockRange) {
        self.todo.push(range);
    }

    /// Takes the state of a range.
    pub(super) fn answer(&mut self, layout: &Layout, range: BlockRange, state: BlockState) {
        match state {
            BlockState::Plugged => self.plugged.insert(range),
            BlockState::Unplugged => {}
            // A device that says so of a single block will not say more.
            BlockState::Mixed if range.count < 2 => {}
            BlockState::Mixed => {
                let [low, high] = halves(layout, range);
                self.todo.push(high);
                self.todo.push(low);
            }
        }
    }
}

/// Two parts of a range of at least two blocks, if possible with whole granules in both.
fn halves(layout: &Layout, range: BlockRange) -> [BlockRange; 2] {
    let middle = range.first + range.count / 2;
    let granule = layout.granule_of(middle);
    let middle = match granule.first > range.first && granule.first < range.end() {
        true => granule.first,
        false => middle,
    };
    [
        BlockRange {
            first: range.first,
            count: middle - range.first,
        },
        BlockRange {
            first: middle,
            count: range.end() - middle,
        },
    ]
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Starts a scan because of `failure`, after a reset where it takes one, unless that has been tried.
    pub(super) fn resync<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        reason: ResyncReason,
        failure: Failure,
    ) -> Result<(), Failure> {
        let (most, needs_reset) = match reason {
            ResyncReason::NeedsReset | ResyncReason::AnswerTimeout => (RESETS_MAX, true),
            ResyncReason::Queue => (RESYNCS_MAX, true),
            _ => (RESYNCS_MAX, false),
        };
        if self.policy.strategy == Strategy::Linux || self.resyncs >= most {
            return Err(failure);
        }
        self.resyncs += 1;
        log::warn!("virtio-mem: {failure}: asking the device what is plugged");
        self.events.emit(Event::Resync(reason));
        self.stop_emptying(hotplug);
        if needs_reset {
            self.restart()?;
        }
        self.end_rest();
        let usable_size = self.config.mutable.usable_region_size;
        self.scan = Some(Scan::new(&self.layout, usable_size));
        Ok(())
    }

    /// Whether the driver can go on after `failure`, and what it takes.
    pub(super) fn recover<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        failure: Failure,
    ) -> Result<(), Failure> {
        let reason = match failure {
            Failure::Answer { .. } | Failure::Response(_) => ResyncReason::Answer,
            Failure::Queue(_) => ResyncReason::Queue,
            Failure::NeedsReset => ResyncReason::NeedsReset,
            Failure::AnswerTimeout => ResyncReason::AnswerTimeout,
            other => return Err(other),
        };
        self.resync(hotplug, reason, failure)
    }

    /// V-09: resets the device, which keeps all blocks plugged (D-13), and initialises it again. What was in flight
    /// may or may not have been done.
    pub(super) fn restart(&mut self) -> Result<(), Failure> {
        if !reset(&mut self.transport) {
            return Err(Failure::NeedsReset);
        }
        self.stop_queue();
        let ready =
            Ready::<H>::new(&mut self.transport, self.features).map_err(Failure::Restart)?;
        let config = ready.config;
        if moved(&self.config, &config) {
            // D-02. The queue is the driver's, so that it goes with it.
            self.queue = Some(ready.start(&mut self.transport).1);
            return Err(Failure::RegionChanged);
        }
        let (features, queue) = ready.start(&mut self.transport);
        self.features = features;
        self.queue = Some(queue);
        self.config = config;
        self.config_changed = true;
        self.needs_reset = false;
        self.end_rest();
        Ok(())
    }

    /// Forgets the queue of a device that has been reset, and what was in flight.
    pub(super) fn stop_queue(&mut self) {
        if let Some(mut queue) = self.queue.take() {
            queue.device_stopped();
        }
        self.in_flight = [None; MAX_IN_FLIGHT];
    }

    /// Asks for the next range, or makes use of what was found.
    pub(super) fn scan_some<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
    ) -> Result<Progress, Failure> {
        // What was sent before the scan has to be answered first.
        let before = |sent: Sent| !matches!(sent, Sent::State(_));
        if self
            .in_flight
            .iter()
            .flatten()
            .any(|entry| before(entry.sent))
            || !self.can_send()
        {
            return Ok(Progress::AwaitingDevice);
        }
        if let Some(range) = self.scan.as_mut().and_then(|scan| scan.todo.pop()) {
            self.send(Sent::State(range))?;
            return Ok(Progress::Converging);
        }
        if self.requests_in_flight() > 0 {
            return Ok(Progress::AwaitingDevice);
        }
        if let Some(scan) = self.scan.take() {
            self.adopt(hotplug, scan.plugged)?;
        }
        Ok(Progress::Converging)
    }

    /// Brings what is plugged and what the hotplug core has together. Memory the device has lost is withdrawn, if
    /// no page of it is in use.
    ///
    /// This is one step, however large the region is.
    fn adopt<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        plugged: BlockMap,
    ) -> Result<(), Failure> {
        let mut taken = plugged.clone();
        let mut lost: Option<(u64, u64)> = None;
        let mut foreign = Vec::new();
        for unit in self.layout.all_units() {
            let blocks = self.layout.unit(unit);
            let mut ids = self.layout.memory_blocks(unit);
            let presence = |id| Presence::of(hotplug, owner(), id);
            if ids.clone().all(|id| presence(id) == Presence::Absent) {
                continue;
            }
            if ids.clone().any(|id| presence(id) == Presence::Foreign) {
                foreign.push(unit);
                continue;
            }
            if let Some(id) = ids.find(|id| presence(*id) == Presence::Absent) {
                return Err(Failure::NotAdoptable { id });
            }
            for granule in self.layout.granules_in(blocks) {
                let bytes = self.layout.bytes(granule);
                let size = bytes.end - bytes.start;
                let whole = plugged.state(granule) == BlockState::Plugged;
                match hotplug.withheld(bytes.start, size) {
                    Ok(Some(true)) => {}
                    Ok(Some(false)) if whole => taken.remove(granule),
                    Ok(Some(false)) => {
                        if !withdraw_free(&self.layout, hotplug, bytes.clone()) {
                            let (first, sum) = lost.unwrap_or((bytes.start, 0));
                            lost = Some((first, sum + size));
                        }
                    }
                    _ => {
                        let id = bytes.start / self.layout.memory_block_size;
                        return Err(Failure::NotAdoptable { id });
                    }
                }
            }
        }
        self.maps = Maps::rebuild(&self.layout, plugged, taken);
        for unit in foreign {
            self.maps.leave_alone(self.layout.unit(unit));
        }
        if let Some((address, bytes)) = lost {
            return Err(Failure::MemoryLost { address, bytes });
        }
        self.check_removal();
        self.config_changed = true;
        let plugged_size = self.plugged_size();
        self.events.emit(Event::Resynced { plugged_size });
        Ok(())
    }
}

//! What has changed, for the event sink.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_drivers::Hal;
use virtio_drivers::transport::Transport;

use super::MemDriver;
use super::events::Event;
use super::progress::Progress;
use super::state::UnitState;
use crate::hotplug::{Hotplug, PhysicalMemory};

/// What was reported last.
#[derive(Debug, Default)]
pub(super) struct Reported {
    target: Option<u64>,
    progress: Option<Progress>,
    units: Vec<UnitState>,
}

impl<H: Hal, T: Transport> MemDriver<H, T> {
    /// Lets `sink` have every [`Event`] from now on, in order, from within [`poll`](Self::poll).
    pub fn set_event_sink(&mut self, sink: Box<dyn FnMut(Event) + Send>) {
        self.events.0 = Some(sink);
    }

    /// The state of a unit: a memory block, or in Big-Block Mode a big block. `None` for an id (address / size) that
    /// does not lie in the region as a whole.
    pub fn unit_state<M: PhysicalMemory>(
        &self,
        hotplug: &Hotplug<M>,
        id: u64,
    ) -> Option<UnitState> {
        let known = self.layout.all_units().contains(&id);
        known.then(|| self.with_view(hotplug, |view| view.state(id)))
    }

    /// Emits what has changed since the last poll.
    pub(super) fn report<M: PhysicalMemory>(&mut self, hotplug: &Hotplug<M>, progress: Progress) {
        if self.events.0.is_none() {
            return;
        }
        let requested_size = self.config.mutable.requested_size;
        // The first configuration is read again before anything else.
        if !self.config_changed && self.reported.target != Some(requested_size) {
            self.reported.target = Some(requested_size);
            self.events.emit(Event::Target { requested_size });
        }
        // What is plugged is not known before a scan has come to its end.
        if self.scan.is_some() {
            return;
        }
        let last = self.reported.progress.replace(progress);
        // Moving pages changes nothing that is reported.
        let unchanged = self.emptying.is_some() || !matches!(progress, Progress::Converging);
        if last == Some(progress) && unchanged {
            return;
        }
        self.report_units(hotplug);
        if last == Some(progress) {
            return;
        }
        match progress {
            Progress::Settled => {
                let (plugged_size, unreachable) = (self.plugged_size(), self.unreachable());
                self.events.emit(Event::Settled {
                    plugged_size,
                    unreachable,
                });
            }
            Progress::Stalled {
                reason,
                retry_at_ms,
            } => self.events.emit(Event::Stalled {
                reason,
                retry_at_ms,
            }),
            Progress::Failed(failure) => self.events.emit(Event::Failed(failure)),
            Progress::Converging | Progress::AwaitingDevice | Progress::Suspended => {}
        }
    }

    fn report_units<M: PhysicalMemory>(&mut self, hotplug: &Hotplug<M>) {
        let units = self.layout.all_units();
        let states: Vec<_> = self.with_view(hotplug, |view| {
            units.clone().map(|unit| view.state(unit)).collect()
        });
        let old = core::mem::replace(&mut self.reported.units, states);
        for (index, (id, state)) in units.zip(self.reported.units.clone()).enumerate() {
            let before = old.get(index).copied().unwrap_or(UnitState::Unused);
            if before != state {
                self.events.emit(Event::Unit { id, state });
            }
        }
    }
}

//! ACPI adds DIMMs and ejects them, as far as the trace shows that it went.

use std::collections::VecDeque;
use std::ops::Range;

use virtio_mem_driver::hotplug::{AddMemory, BlockState, Error, GroupId, Isolation, Owner, Target};

use super::eject::{Action, Attempt, Eject};
use super::guest::{Check, Guest, lock};
use super::qmp::Message;
use super::step::{EjectOutcome, Step};
use super::trace::{Dimm, MAX_MEMORY, PAGE_SIZE};

/// A DIMM that is plugged in.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) bytes: Range<u64>,
    /// `None` if the kernel did not take it.
    group: Option<GroupId>,
}

/// An eject the guest has not answered yet.
#[derive(Debug)]
pub(super) struct PendingEject {
    dimm: String,
    eject: Eject,
    /// The memory block it cannot empty and does not give up.
    pub(super) open: Option<Isolation>,
}

impl Guest {
    /// ACPI announces a DIMM: one static group, all of its memory at once.
    pub(super) fn add_dimm(&mut self, dimm: &Dimm) -> Result<(), String> {
        let bytes = dimm.addr..dimm.addr + dimm.size;
        let others = self.dimms.values().map(|other| &other.bytes);
        if self.dimms.contains_key(&dimm.id) {
            return Err(format!("{} is there already", dimm.id));
        }
        let mut memory = others.chain(&self.boot_memory);
        if memory.any(|other| other.start < bytes.end && bytes.start < other.end) {
            return Err(format!("{} overlaps memory that is there", dimm.id));
        }
        let total: u64 = self
            .dimms
            .values()
            .map(|dimm| dimm.bytes.end - dimm.bytes.start)
            .sum();
        if total + dimm.size > MAX_MEMORY {
            return Err(format!("{}: more memory than can be replayed", dimm.id));
        }
        let group = self
            .hotplug
            .register_static_group(dimm.node.unwrap_or(0), dimm.size / PAGE_SIZE)
            .map_err(|error| format!("{}: {error}", dimm.id))?;
        let added = self.hotplug.add_memory(&AddMemory {
            target: Target::Group(group),
            owner: Owner::ACPI,
            // ACPI always wants it, but looks whether it can be had before it asks.
            memmap_on_memory: self.hotplug.supports_memmap_on_memory(dimm.size),
            ..AddMemory::new(dimm.addr, dimm.size)
        });
        let group = match added {
            Ok(()) => Some(group),
            Err(_) => {
                // What the kernel makes of it, too: the DIMM is there, but nobody uses it.
                let _empty = self.hotplug.unregister_group(group);
                None
            }
        };
        self.dimms
            .insert(dimm.id.clone(), Attached { bytes, group });
        Ok(())
    }

    /// The machine names a DIMM's slot together with the DIMM, until it is gone.
    pub(super) fn learn_slots(&mut self, messages: &[Message]) {
        for message in messages {
            if let Message {
                device: Some(device),
                slot: Some(slot),
                ..
            } = message
            {
                self.slots.insert(device.clone(), slot.clone());
            }
        }
    }

    /// The machine asks for a DIMM back.
    pub(super) fn ask_for(&mut self, id: &str) -> Result<(), String> {
        let dimm = self
            .dimms
            .get(id)
            .ok_or_else(|| format!("there is no {id}"))?;
        let blocks = dimm.bytes.start / self.block_size..dimm.bytes.end / self.block_size;
        let blocks = match dimm.group {
            Some(_) => blocks,
            None => 0..0,
        };
        self.ejects.push_back(PendingEject {
            dimm: id.to_owned(),
            eject: Eject::new(blocks),
            open: None,
        });
        Ok(())
    }

    /// Goes on with ejects as far as the recorded step shows that they went; to the end, if the machine has heard
    /// the guest's answer. `asked` is what came of the one that the step began.
    pub(super) fn continue_ejects(
        &mut self,
        step: &Step,
        asked: Option<(&str, EjectOutcome)>,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        let mut ended = Vec::new();
        while let Some(mut pending) = self.ejects.pop_front() {
            let outcome = asked
                .filter(|(id, outcome)| *id == pending.dimm && *outcome != EjectOutcome::Timeout);
            let answer = self.answer(&pending.dimm, &step.messages);
            let answered = outcome.is_some() || answer.is_some();
            let Some(got) = self.continue_eject(&mut pending, step, answered)? else {
                self.ejects.push_front(pending);
                break;
            };
            checks.extend(answer.map(|expected| Check {
                subject: pending.dimm.clone(),
                field: "answer",
                expected: expected.to_string(),
                got: got.to_string(),
            }));
            ended.push((pending.dimm, got));
        }
        checks.extend(asked.map(|(id, expected)| {
            let end = ended.iter().find(|(dimm, _)| dimm == id);
            let got = end.map_or(EjectOutcome::Timeout, |(_, outcome)| *outcome);
            Check {
                subject: id.to_owned(),
                field: "outcome",
                expected: expected.to_string(),
                got: got.to_string(),
            }
        }));
        Ok(())
    }

    /// What the guest has answered to an eject of this DIMM. A DIMM that is gone is known by its slot only.
    fn answer(&self, dimm: &str, messages: &[Message]) -> Option<EjectOutcome> {
        let of_it = messages.iter().filter(|message| match &message.device {
            Some(device) => device == dimm,
            None => message.slot.is_some() && message.slot.as_ref() == self.slots.get(dimm),
        });
        of_it.filter_map(|message| message.answer).next()
    }

    /// Goes on with one eject. Returns how it ended, if it did.
    fn continue_eject(
        &mut self,
        pending: &mut PendingEject,
        step: &Step,
        answered: bool,
    ) -> Result<Option<EjectOutcome>, String> {
        // What was heard of its blocks, and has not been done before it was heard.
        let of_it = |event: &&String| {
            block_of(event).is_some_and(|id| pending.eject.blocks().contains(&id))
        };
        let done = self.held.iter().filter(of_it).count();
        let mut heard: VecDeque<&str> = step
            .uevents
            .iter()
            .filter(of_it)
            .skip(done)
            .map(String::as_str)
            .collect();
        loop {
            let action = pending.eject.next();
            let over = heard.is_empty() && !answered;
            match action {
                Action::Offline(id) => {
                    let seen = over && is_offline(step, id);
                    let succeeded =
                        seen || heard.front() == Some(&format!("offline memory{id}").as_str());
                    let tried = self.hotplug.block_state(id) != Some(BlockState::Offline);
                    if tried && over && !seen && self.waits(pending, id, step) {
                        return Ok(None);
                    }
                    let attempt = match tried {
                        false => Attempt::WasOffline,
                        true => self.attempt(&mut pending.open, id, succeeded),
                    };
                    if attempt == Attempt::Succeeded {
                        self.taken.insert(id);
                        heard.pop_front();
                    }
                    pending.eject.attempted(attempt);
                }
                _ if over => return Ok(None),
                Action::Online(id) => {
                    // Whatever comes of it.
                    if self.hotplug.device_online(id).is_ok() {
                        heard.pop_front();
                    }
                    pending.eject.brought_back();
                }
                Action::Remove => {
                    self.remove_dimm(&pending.dimm)?;
                    return Ok(Some(EjectOutcome::Deleted));
                }
                Action::Refuse => return Ok(Some(EjectOutcome::GuestError)),
            }
        }
    }

    /// An eject takes memory block `id` offline, if the trace says that it could.
    fn attempt(&mut self, open: &mut Option<Isolation>, id: u64, succeeds: bool) -> Attempt {
        let result = match (open.take(), succeeds) {
            (Some(isolation), true) => self.hotplug.commit(isolation),
            (Some(isolation), false) => {
                self.hotplug.cancel(isolation);
                self.inputs.busy += 1;
                Err(Error::Busy)
            }
            (None, true) => self.hotplug.device_offline(id).map(|_| ()),
            // Whatever a notifier objects with, it objects without help.
            (None, false) if lock(&self.vetoes).going_offline.is_some() => {
                self.hotplug.device_offline(id).map(|_| ())
            }
            (None, false) => self
                .told(Error::Busy, |hotplug| hotplug.device_offline(id))
                .map(|_| ()),
        };
        match result {
            Ok(()) => Attempt::Succeeded,
            Err(_) => Attempt::Failed,
        }
    }

    /// Nothing more was heard of an eject whose turn is memory block `id`: whether the step ended before the attempt
    /// did. The trace shows the block going offline then, or no block at all and the attempt has not begun.
    fn waits(&mut self, pending: &mut PendingEject, id: u64, step: &Step) -> bool {
        let Some(blocks) = &step.blocks else {
            return true;
        };
        let going = BlockState::GoingOffline.name();
        // Those that have arrived were read before.
        let mut open = blocks
            .iter()
            .filter(|(id, block)| block.state == going && !self.taken.contains(id))
            .map(|(id, _)| *id);
        if !open.clone().any(|open| open == id) {
            // It went on to another block, so this attempt is over.
            let elsewhere = open.any(|id| pending.eject.blocks().contains(&id));
            return pending.open.is_none() && !elsewhere;
        }
        if pending.open.is_none() {
            pending.open = self.hotplug.isolate_block(id).ok();
            self.inputs.endless += u64::from(pending.open.is_some());
        }
        true
    }

    /// The DIMM's blocks are all offline: its memory goes.
    fn remove_dimm(&mut self, id: &str) -> Result<(), String> {
        let Some(dimm) = self.dimms.remove(id) else {
            return Ok(());
        };
        let size = dimm.bytes.end - dimm.bytes.start;
        let Some(group) = dimm.group else {
            return Ok(());
        };
        self.hotplug
            .remove_memory(Owner::ACPI, dimm.bytes.start, size)
            .and_then(|()| self.hotplug.unregister_group(group))
            .map_err(|error| format!("{id} cannot be removed: {error}"))
    }
}

/// The memory block of `online memory37`.
fn block_of(uevent: &str) -> Option<u64> {
    uevent.split_once(" memory")?.1.parse().ok()
}

/// Whether the step shows a memory block offline.
fn is_offline(step: &Step, id: u64) -> bool {
    let block = step.blocks.as_ref().and_then(|blocks| blocks.get(&id));
    block.is_some_and(|block| block.state == BlockState::Offline.name())
}

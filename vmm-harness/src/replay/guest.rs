//! The model under the operations of a trace, and what it has to be told.
//!
//! Where the kernel keeps its own pages is no function of the operations. So whether a memory block could be emptied
//! is taken from the trace: as EBUSY or EINTR of the one step that finds out, if the model gets that far. What the
//! model refuses for reasons of its own, it refuses whatever the trace says.
#![expect(
    unsafe_code,
    reason = "the model wants physical memory, and a trace says nothing of contents"
)]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Error, Fault, GroupId, Hotplug, Isolation, MemoryAction, MemoryEvent,
    Owner, PhysicalMemory, Step as Point, Target,
};

use super::ReplayError;
use super::boot::Plan;
use super::eject::{Action, Attempt, Eject};
use super::inputs::Inputs;
use super::shell;
use super::snapshot::Snapshot;
use super::step::{EjectOutcome, Op, Outcome, Step};
use super::trace::{BlockRow, Dimm, MAX_MEMORY, PAGE_SIZE, ZoneRow, impossible};

/// Where the module `memory-notifier-error-inject` has its files.
const ERROR_INJECTION: &str = "/sys/kernel/debug/notifier-error-inject/memory/actions/";

/// Memory nobody looks into: nothing is ever allocated here, so nothing is moved.
#[derive(Debug)]
struct NoContents;

// SAFETY: The method never returns, so there is no pointer that could break the contract.
unsafe impl PhysicalMemory for NoContents {
    fn page(&self, address: u64) -> NonNull<u8> {
        unreachable!("no page is allocated, so none is moved from {address:#x}")
    }
}

/// What notifiers object with.
#[derive(Debug, Default)]
struct Vetoes {
    going_online: Option<Error>,
    going_offline: Option<Error>,
}

/// A DIMM that is plugged in.
#[derive(Debug)]
struct Attached {
    bytes: Range<u64>,
    /// `None` if the kernel did not take it.
    group: Option<GroupId>,
}

/// An eject the guest has not answered yet.
#[derive(Debug)]
struct PendingEject {
    dimm: String,
    eject: Eject,
    /// The memory block it cannot empty and does not give up.
    open: Option<Isolation>,
}

/// One more value to compare, that only this step has.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) subject: String,
    pub(super) field: &'static str,
    pub(super) expected: String,
    pub(super) got: String,
}

/// The guest.
pub(super) struct Guest {
    hotplug: Hotplug<NoContents>,
    memory_failure: bool,
    block_size: u64,
    boot_memory: Vec<Range<u64>>,
    uevents: Arc<Mutex<Vec<String>>>,
    vetoes: Arc<Mutex<Vetoes>>,
    dimms: BTreeMap<String, Attached>,
    ejects: VecDeque<PendingEject>,
    pub(super) inputs: Inputs,
}

/// The lock's value, whoever panicked with it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// Boots, and adds the DIMMs that are there at boot.
    pub(super) fn boot(plan: &Plan) -> Result<Self, ReplayError> {
        let hotplug = Hotplug::boot(plan.config, &plan.boot, NoContents)
            .map_err(|error| ReplayError::Boot { error })?;
        let mut guest = Self {
            hotplug,
            memory_failure: plan.kernel.memory_failure,
            block_size: plan.config.profile.memory_block_size(),
            boot_memory: plan
                .boot
                .ram
                .iter()
                .map(|range| range.bytes.clone())
                .collect(),
            uevents: Arc::default(),
            vetoes: Arc::default(),
            dimms: BTreeMap::new(),
            ejects: VecDeque::new(),
            inputs: Inputs::default(),
        };
        let uevents = Arc::clone(&guest.uevents);
        guest.hotplug.set_uevent_sink(Box::new(move |event| {
            lock(&uevents).push(event.to_string());
        }));
        let vetoes = Arc::clone(&guest.vetoes);
        let veto = move |event: &MemoryEvent| {
            let vetoes = lock(&vetoes);
            let veto = match event.action {
                MemoryAction::GoingOnline => vetoes.going_online,
                MemoryAction::GoingOffline => vetoes.going_offline,
                _ => None,
            };
            veto.map_or(Ok(()), Err)
        };
        guest.hotplug.register_notifier(0, Box::new(veto));
        for dimm in &plan.dimms {
            guest
                .add_dimm(dimm)
                .map_err(|what| impossible("boot.machine_args", what))?;
        }
        guest.take_uevents();
        Ok(guest)
    }

    /// The uevents since the last call.
    pub(super) fn take_uevents(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.uevents))
    }

    /// The text of a file below `/sys/devices/system/memory`, or of a module parameter.
    pub(super) fn read(&self, file: &str) -> String {
        self.hotplug
            .read(file)
            .unwrap_or_else(|error| error.errno_name().to_owned())
    }

    /// Writes a file whatever it says at boot.
    pub(super) fn set(&mut self, file: &str, text: &str) -> Result<(), Error> {
        self.hotplug.write(file, text)
    }

    /// Does what the trace says was done. Returns how it ended, if that says something of the guest, and what else
    /// there is to compare.
    pub(super) fn perform(&mut self, step: &Step) -> Result<(Option<Outcome>, Vec<Check>), String> {
        let mut checks = Vec::new();
        let mut outcome = None;
        let mut answered = step.eject_answered;
        match &step.op {
            Op::Other => {}
            Op::AddDimm(dimm) => {
                // The result is the machine's; whether the guest took it is seen from the blocks.
                if step.result == Some(Outcome::Success) {
                    self.add_dimm(dimm)?;
                }
            }
            Op::Write { file, text } => {
                let errno = match &step.result {
                    Some(Outcome::Errno(name)) => placement_dependent(name),
                    _ => None,
                };
                outcome = Some(as_outcome(self.write(file, text, errno)));
            }
            Op::WriteParam {
                name,
                text,
                value_after,
            } => {
                let parameter = format!("parameters/{name}");
                // The recorder wrote this file with the parameters.
                let file = if name == "auto_online_blocks" {
                    name
                } else {
                    &parameter
                };
                outcome = Some(as_outcome(self.write(file, text, None)));
                checks.extend(value_after.as_ref().map(|expected| Check {
                    subject: name.clone(),
                    field: "value_after",
                    expected: expected.trim().to_owned(),
                    got: self.read(file),
                }));
            }
            Op::Shell { script, out } => self.shell(script, out, step, &mut checks)?,
            // The machine refused to ask.
            Op::DeviceDel { .. } if matches!(step.result, Some(Outcome::Errno(_))) => {}
            Op::DeviceDel { id, outcome } => {
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
                    dimm: id.clone(),
                    eject: Eject::new(blocks),
                    open: None,
                });
                answered |= *outcome != EjectOutcome::Timeout;
            }
        }
        self.continue_eject(step, answered)?;
        Ok((outcome, checks))
    }

    /// ACPI announces a DIMM: one static group, all of its memory at once.
    fn add_dimm(&mut self, dimm: &Dimm) -> Result<(), String> {
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

    fn write(&mut self, file: &str, text: &str, errno: Option<Error>) -> Result<(), Error> {
        if file.ends_with("_offline_page") && !self.memory_failure {
            return Err(Error::NotFound);
        }
        match errno {
            // While an eject goes on, nobody else gets at the state of a memory block.
            Some(Error::Interrupted) if self.ejects.iter().any(|eject| eject.open.is_some()) => {
                self.inputs.interrupted += 1;
                Err(Error::Interrupted)
            }
            Some(errno) => self.told(errno, |hotplug| hotplug.write(file, text)),
            None => self.hotplug.write(file, text),
        }
    }

    /// Does something that takes a memory block offline, with the knowledge that this will fail. A notifier that
    /// objects needs no help from the trace.
    fn told<T>(
        &mut self,
        errno: Error,
        operation: impl FnOnce(&mut Hotplug<NoContents>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if lock(&self.vetoes).going_offline == Some(errno) {
            return operation(&mut self.hotplug);
        }
        let step = match errno {
            Error::Interrupted => Point::Commit,
            _ => Point::Isolate,
        };
        self.hotplug.inject(Fault {
            step,
            skip: 0,
            error: errno,
        });
        let result = operation(&mut self.hotplug);
        if self.hotplug.clear_faults() == 0 {
            match errno {
                Error::Interrupted => self.inputs.interrupted += 1,
                _ => self.inputs.busy += 1,
            }
        }
        result
    }

    fn shell(
        &mut self,
        script: &str,
        out: &str,
        step: &Step,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        let printed = shell::run(script, &mut |file, text| self.shell_write(file, text, step))
            .map_err(|error| error.to_string())?;
        // Other commands print, too: what `echo` prints must be there, in this order.
        let mut lines = out.lines();
        for expected in printed.into_iter().map(|line| line.text) {
            let found = lines.by_ref().any(|line| line == expected);
            checks.push(Check {
                subject: "shell".into(),
                field: "output",
                expected: if found {
                    expected.clone()
                } else {
                    format!("{expected:?} in {out:?}")
                },
                got: expected,
            });
        }
        let corrupted = out
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("HardwareCorrupted:"));
        checks.extend(corrupted.map(|recorded| Check {
            subject: "meminfo".into(),
            field: "HardwareCorrupted",
            expected: recorded.trim().to_owned(),
            got: format!(
                "{} kB",
                self.hotplug.hardware_corrupted_pages() * PAGE_SIZE / 1024
            ),
        }));
        Ok(())
    }

    /// `echo text > file`; whether that worked.
    fn shell_write(&mut self, file: &str, text: &str, step: &Step) -> bool {
        if let Some(file) = file.strip_prefix("/sys/devices/system/memory/") {
            // Taking a block offline has worked if it was heard of.
            let heard = file.split_once('/').is_none_or(|(block, _)| {
                step.uevents
                    .iter()
                    .any(|event| event.strip_prefix("offline ") == Some(block))
            });
            return self
                .write(file, text, (!heard).then_some(Error::Busy))
                .is_ok();
        }
        if let Some(name) = file.strip_prefix("/sys/module/memory_hotplug/parameters/") {
            return self
                .hotplug
                .write(&format!("parameters/{name}"), text)
                .is_ok();
        }
        let Some((action, "error")) = file
            .strip_prefix(ERROR_INJECTION)
            .and_then(|rest| rest.split_once('/'))
        else {
            return true;
        };
        let Ok(number) = text.trim().parse::<i32>() else {
            return false;
        };
        let veto = number.checked_neg().and_then(Error::from_errno);
        let mut vetoes = lock(&self.vetoes);
        match action {
            "MEM_GOING_ONLINE" => vetoes.going_online = veto,
            "MEM_GOING_OFFLINE" => vetoes.going_offline = veto,
            _ => return false,
        }
        true
    }

    /// Goes on with ejects as far as the recorded step shows that they went; to the end, if the machine has heard
    /// the guest's answer.
    fn continue_eject(&mut self, step: &Step, mut answered: bool) -> Result<(), String> {
        while let Some(mut pending) = self.ejects.pop_front() {
            // What was heard of its blocks.
            let mut heard: VecDeque<&str> = step
                .uevents
                .iter()
                .filter(|event| {
                    block_of(event).is_some_and(|id| pending.eject.blocks().contains(&id))
                })
                .map(String::as_str)
                .collect();
            loop {
                let action = pending.eject.next();
                let over = heard.is_empty() && !answered;
                match action {
                    Action::Offline(id) => {
                        let succeeded =
                            heard.front() == Some(&format!("offline memory{id}").as_str());
                        let tried = self.hotplug.block_state(id) != Some(BlockState::Offline);
                        if tried && over && self.waits(&mut pending, id, step) {
                            self.ejects.push_front(pending);
                            return Ok(());
                        }
                        let attempt = match tried {
                            false => Attempt::WasOffline,
                            true => self.attempt(&mut pending.open, id, succeeded),
                        };
                        if attempt == Attempt::Succeeded {
                            heard.pop_front();
                        }
                        pending.eject.attempted(attempt);
                    }
                    _ if over => {
                        self.ejects.push_front(pending);
                        return Ok(());
                    }
                    Action::Online(id) => {
                        // Whatever comes of it.
                        if self.hotplug.device_online(id).is_ok() {
                            heard.pop_front();
                        }
                        pending.eject.brought_back();
                    }
                    Action::Remove => {
                        let removed = self.remove_dimm(&pending.dimm)?;
                        heard.drain(..heard.len().min(removed));
                        break;
                    }
                    Action::Refuse => break,
                }
            }
            // The answer was to this one.
            answered = false;
        }
        Ok(())
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
        let open = blocks.iter().filter(|(_, block)| block.state == going);
        let open: Vec<u64> = open.map(|(id, _)| *id).collect();
        if !open.contains(&id) {
            // It went on to another block, so this attempt is over.
            let elsewhere = open.iter().any(|id| pending.eject.blocks().contains(id));
            return pending.open.is_none() && !elsewhere;
        }
        if pending.open.is_none() {
            pending.open = self.hotplug.isolate_block(id).ok();
            self.inputs.endless += u64::from(pending.open.is_some());
        }
        true
    }

    /// The DIMM's blocks are all offline: its memory goes. Returns how many blocks there were.
    fn remove_dimm(&mut self, id: &str) -> Result<usize, String> {
        let Some(dimm) = self.dimms.remove(id) else {
            return Ok(0);
        };
        let size = dimm.bytes.end - dimm.bytes.start;
        let Some(group) = dimm.group else {
            return Ok(0);
        };
        self.hotplug
            .remove_memory(Owner::ACPI, dimm.bytes.start, size)
            .and_then(|()| self.hotplug.unregister_group(group))
            .map_err(|error| format!("{id} cannot be removed: {error}"))?;
        usize::try_from(size / self.block_size).map_err(|error| error.to_string())
    }

    /// The state in the shape the traces have.
    pub(super) fn snapshot(&self) -> Snapshot {
        let hotplug = &self.hotplug;
        let blocks = hotplug.blocks().map(|block| {
            let row = BlockRow {
                state: block.state.name().to_owned(),
                valid_zones: self.read(&format!("memory{}/valid_zones", block.id)),
                node: block.nid,
            };
            (block.id, row)
        });
        let zones = hotplug
            .zones()
            .filter(|zone| zone.present_pages > 0)
            .map(|zone| ZoneRow {
                node: zone.nid,
                zone: zone.kind.name().to_owned(),
                start_pfn: zone.start_pfn,
                spanned: zone.spanned_pages,
                present: zone.present_pages,
                managed: zone.managed_pages,
            });
        let nodes: Vec<_> = hotplug.nodes().collect();
        let resources = hotplug.resources().iomem();
        let ram = resources.filter(|resource| resource.name().starts_with("System RAM"));
        Snapshot {
            blocks: blocks.collect(),
            zones: zones.collect(),
            memtotal_kib: hotplug.total_pages() * PAGE_SIZE / 1024,
            nodes_online: nodes
                .iter()
                .filter(|node| node.online)
                .map(|node| node.nid)
                .collect(),
            nodes_with_memory: nodes
                .iter()
                .filter(|node| node.has_memory)
                .map(|node| node.nid)
                .collect(),
            nodes_with_normal_memory: nodes
                .iter()
                .filter(|node| node.has_normal_memory)
                .map(|node| node.nid)
                .collect(),
            system_ram: ram
                .map(|resource| (resource.range(), resource.name().to_owned()))
                .collect(),
        }
    }
}

/// The memory block of `online memory37`.
fn block_of(uevent: &str) -> Option<u64> {
    uevent.split_once(" memory")?.1.parse().ok()
}

fn as_outcome(result: Result<(), Error>) -> Outcome {
    match result {
        Ok(()) => Outcome::Success,
        Err(error) => Outcome::Errno(error.errno_name().to_owned()),
    }
}

/// The errors that tell where the kernel's pages are.
fn placement_dependent(errno: &str) -> Option<Error> {
    Error::from_errno_name(errno).filter(|error| matches!(error, Error::Busy | Error::Interrupted))
}

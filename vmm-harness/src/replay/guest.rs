//! The model under the operations of a trace, and what it has to be told.
//!
//! Where the kernel keeps its own pages is no function of the operations. So whether a memory block could be emptied
//! is taken from the trace: as EBUSY or EINTR of the one step that finds out, if the model gets that far. What the
//! model refuses for reasons of its own, it refuses whatever the trace says.
#![expect(
    unsafe_code,
    reason = "the model wants physical memory, and a trace says nothing of contents"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_mem_driver::hotplug::{
    Error, Fault, Hotplug, MemoryAction, MemoryEvent, PhysicalMemory, Step as Point,
};

use super::ReplayError;
use super::acpi::{Attached, PendingEject};
use super::boot::Plan;
use super::course::Course;
use super::inputs::Inputs;
use super::mem_device::MemDevice;
use super::requests::RecordedDevice;
use super::snapshot::Snapshot;
use super::step::{Op, Outcome, Step};
use super::trace::{BlockRow, PAGE_SIZE, ZoneRow, impossible};

/// Memory nobody looks into: nothing is ever allocated here, so nothing is moved.
#[derive(Debug)]
pub(super) struct NoContents;

// SAFETY: The method never returns, so there is no pointer that could break the contract.
unsafe impl PhysicalMemory for NoContents {
    fn page(&self, address: u64) -> NonNull<u8> {
        unreachable!("no page is allocated, so none is moved from {address:#x}")
    }
}

/// What notifiers object with.
#[derive(Debug, Default)]
pub(super) struct Vetoes {
    pub(super) going_online: Option<Error>,
    pub(super) going_offline: Option<Error>,
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
    pub(super) hotplug: Hotplug<NoContents>,
    pub(super) memory_failure: bool,
    pub(super) block_size: u64,
    pub(super) boot_memory: Vec<Range<u64>>,
    uevents: Arc<Mutex<Vec<String>>>,
    pub(super) vetoes: Arc<Mutex<Vetoes>>,
    pub(super) dimms: BTreeMap<String, Attached>,
    pub(super) recorded_device: Option<RecordedDevice>,
    pub(super) mem_device: Option<MemDevice>,
    pub(super) ejects: VecDeque<PendingEject>,
    /// Slots of DIMMs, as the machine has named them.
    pub(super) slots: BTreeMap<String, String>,
    /// Blocks an eject has taken offline during this step.
    pub(super) taken: BTreeSet<u64>,
    /// Uevents of an eject that no step has shown yet.
    pub(super) held: Vec<String>,
    pub(super) inputs: Inputs,
    /// Requests of the driver of virtio-mem that were compared.
    pub(super) requests: u64,
}

/// The lock's value, whoever panicked with it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
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
            recorded_device: plan.device,
            mem_device: None,
            ejects: VecDeque::new(),
            slots: BTreeMap::new(),
            taken: BTreeSet::new(),
            held: Vec::new(),
            inputs: Inputs::default(),
            requests: 0,
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
        self.taken.clear();
        self.learn_slots(&step.messages);
        let mut asked = None;
        let cut_short = step.result.is_none() || step.settle_timeout;
        let mut course = Course::new(&step.requests, cut_short);
        match &step.op {
            Op::Other => {}
            Op::Probe { out } => self.probe(out, &mut checks)?,
            Op::Resize(size) => {
                let device = self.mem_device.as_mut();
                let device = device.ok_or("there is no device to resize")?;
                device.retry_before(*size, &mut self.hotplug, &mut course)?;
                outcome = Some(match (device.resize(*size), &step.result) {
                    (Ok(()), _) => Outcome::Success,
                    // Whatever name the machine has for that.
                    (Err(_), Some(errno @ Outcome::Errno(_))) => errno.clone(),
                    (Err(error), _) => Outcome::Errno(error),
                });
            }
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
                self.ask_for(id)?;
                asked = outcome.map(|outcome| (id.as_str(), outcome));
            }
        }
        self.continue_ejects(step, asked, &mut checks)?;
        self.finish_requests(step, course, &mut checks)?;
        Ok((outcome, checks))
    }

    /// A program writes a file.
    pub(super) fn write(
        &mut self,
        file: &str,
        text: &str,
        errno: Option<Error>,
    ) -> Result<(), Error> {
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
    pub(super) fn told<T>(
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

    /// The state in the shape the traces have.
    pub(super) fn snapshot(&self) -> Snapshot {
        let hotplug = &self.hotplug;
        let blocks = hotplug.blocks().map(|block| {
            let row = BlockRow {
                state: block.state.name().to_owned(),
                valid_zones: Some(self.read(&format!("memory{}/valid_zones", block.id))),
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

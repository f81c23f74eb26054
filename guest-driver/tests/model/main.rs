//! Random operations on random machines of all architectures, against a naive model of what must come of them.
//!
//! After every operation the core's invariants hold, everything that can be observed is as the model says, and every
//! allocated page holds what was written into it. An operation that was refused has changed nothing.
//!
//! `VMEM_SEED` repeats a run, `VMEM_OPERATIONS` makes it longer or shorter.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, DeviceRange, Error, Fault, Hotplug, Isolation, MemoryEvent, NotifierId,
    PageHandle, Step, Target as CoreTarget,
};

mod boot;
mod generate;
mod memory;
mod model;
mod operation;
mod random;
mod regressions;

use boot::Layout;
use generate::Generator;
use memory::{Machine, SparseMemory, read_tag, write_tag};
use model::{Hint, KINDS, Model, Outcome, Told, Trail};
use operation::{Add, Operation, Target, Veto};
use random::Random;

/// Operations of a machine before it is replaced by another.
const OPERATIONS_OF_A_MACHINE: u64 = 250;

/// How often operations of a kind were done and refused.
#[derive(Debug, Default)]
struct Coverage {
    kinds: BTreeMap<&'static str, (u64, u64)>,
    errors: BTreeMap<&'static str, u64>,
    steps: BTreeMap<String, u64>,
    vetoes: u64,
    moved_pages: u64,
}

/// The core, and what there is beside it.
struct Subject {
    machine: Machine,
    isolations: Vec<Isolation>,
    notifiers: Vec<Option<NotifierId>>,
    uevents: Arc<Mutex<Vec<String>>>,
    told: Arc<Mutex<Vec<Told>>>,
    veto: Arc<Mutex<Option<Veto>>>,
    /// A page that was freed.
    freed: Option<PageHandle>,
}

/// Prints how it came to a panic.
struct History {
    seed: u64,
    layout: Layout,
    last: VecDeque<String>,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "VMEM_SEED={}, {}\n{:#?}",
                self.seed, self.layout.profile_name, self.layout
            );
            for operation in &self.last {
                eprintln!("{operation}");
            }
        }
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn core_does_what_a_naive_model_says_whatever_happens() {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
    let seed = from_environment("VMEM_SEED", now.map_or(0, |time| time.as_secs()));
    println!("VMEM_SEED={seed}");
    let operations = from_environment("VMEM_OPERATIONS", 100_000);
    let mut random = Random::new(seed);
    let mut coverage = Coverage::default();
    let profiles = boot::profiles();
    let shares: Vec<usize> = profiles
        .iter()
        .enumerate()
        .flat_map(|(index, (.., share))| (0..*share).map(move |_| index))
        .collect();
    for number in 0..operations.div_ceil(OPERATIONS_OF_A_MACHINE) {
        let share = shares[(number as usize * 7) % shares.len()];
        let (name, profile, _) = profiles[share];
        let layout = boot::layout(&mut random, name, profile);
        run(&layout, seed, &mut random, &mut coverage);
    }
    println!("{coverage:#?}");
    if operations >= 50_000 {
        assert_sensible(&coverage);
    }
}

/// Everything succeeded and was refused. The rarest are expected about twelve times in 100,000 operations, so that no
/// seed falls short by chance.
fn assert_sensible(coverage: &Coverage) {
    let never_refused = ["cancel", "register notifier", "unregister notifier"];
    let never_done = ["write anything", "use freed page"];
    for (kind, (done, refused)) in &coverage.kinds {
        assert!(
            *done >= 20 || never_done.contains(kind),
            "{kind} succeeded {done} times"
        );
        assert!(
            *refused >= 1 || never_refused.contains(kind),
            "{kind} was refused {refused} times"
        );
    }
    assert_eq!(coverage.kinds.len(), 40, "a kind of operation never came");
    for step in Step::ALL {
        let hits = coverage
            .steps
            .get(&format!("{step:?}"))
            .copied()
            .unwrap_or(0);
        assert!(hits >= 2, "{step:?} failed {hits} times");
    }
    assert!(coverage.vetoes >= 50);
    assert!(coverage.moved_pages >= 1000);
}

fn run(layout: &Layout, seed: u64, random: &mut Random, coverage: &mut Coverage) {
    let mut history = History {
        seed,
        layout: layout.clone(),
        last: VecDeque::new(),
    };
    let memory = SparseMemory::new(layout.config.profile.page_size());
    let machine =
        Hotplug::boot(layout.config, &layout.boot, memory).expect("the layout is possible");
    let mut subject = Subject {
        machine,
        isolations: Vec::new(),
        notifiers: Vec::new(),
        uevents: Arc::default(),
        told: Arc::default(),
        veto: Arc::default(),
        freed: None,
    };
    let uevents = Arc::clone(&subject.uevents);
    subject.machine.set_uevent_sink(Box::new(move |event| {
        uevents
            .lock()
            .expect("nobody panics with it")
            .push(event.to_string());
    }));
    let mut model = Model::new(layout.config, &layout.boot);
    compare(&model, &mut subject, random, true);
    for _ in 0..OPERATIONS_OF_A_MACHINE {
        let mut generator = Generator {
            random,
            layout,
            model: &model,
        };
        let operation = generator.operation();
        let (fault, veto) = (generator.fault(), generator.veto());
        if history.last.len() == 30 {
            history.last.pop_front();
        }
        history
            .last
            .push_back(format!("{operation:?} {fault:?} {veto:?}"));
        let snapshot = (fault.is_some() || random.one_in(4))
            .then(|| (subject.machine.snapshot(), model.clone()));
        if let Some(fault) = fault {
            subject.machine.inject(Fault {
                step: fault.step,
                skip: fault.skip,
                error: fault.error,
            });
        }
        *subject.veto.lock().expect("nobody panics with it") = veto;
        let mut hint = subject.perform(&operation, &model);
        hint.fault_hit = fault.is_some() && subject.machine.clear_faults() == 0;
        let uevents = std::mem::take(&mut *subject.uevents.lock().expect("nobody panics with it"));
        hint.offlined = uevents
            .iter()
            .filter(|event| event.starts_with("offline"))
            .count();
        let moves = moves(&subject.machine, &model);
        hint.moved = moves.len() as u64;
        if let Some(last) = history.last.back_mut() {
            *last = format!("{last} -> {:?}", hint.result);
        }
        let mut trail = Trail {
            fault,
            veto,
            ..Trail::default()
        };
        let expected = model.play(&operation, &hint, &mut trail);
        assert_eq!(hint.result, expected, "{operation:?} (core, model)");
        assert_eq!(
            hint.fault_hit, trail.fault_came,
            "whether the injected fault came"
        );
        assert_eq!(uevents, trail.uevents, "uevents");
        let told = std::mem::take(&mut *subject.told.lock().expect("nobody panics with it"));
        assert_eq!(told, trail.told, "what notifiers were told");
        assert_eq!(
            *subject.veto.lock().expect("nobody panics with it"),
            trail.veto,
            "whether somebody objected"
        );
        for (index, pfn) in &moves {
            model.page_is_at(*index, *pfn, &trail.emptied);
        }
        if let Operation::Allocate(..) = operation {
            for page in model.held.iter().rev().take(hint.allocated.len()) {
                write_tag(&mut subject.machine, page.handle, page.tag);
            }
        }
        if let (Operation::PinLongTerm(index), Ok(())) = (&operation, expected) {
            let pfn = model.held[*index].pfn.expect("it is pinned");
            assert!(
                model.is_in_kernel_memory(pfn),
                "a long-term pin among movable pages"
            );
        }
        if let (Some((before, model_before)), Err(_)) = (&snapshot, expected)
            && model_before.sections() == model.sections()
            && *model_before == model
        {
            assert_eq!(
                *before,
                subject.machine.snapshot(),
                "a refused operation left a trace"
            );
        }
        let entry = coverage.kinds.entry(operation.kind()).or_default();
        match expected {
            Ok(()) => entry.0 += 1,
            Err(error) => {
                entry.1 += 1;
                *coverage.errors.entry(error.errno_name()).or_default() += 1;
            }
        }
        if trail.fault_came {
            let step = fault.map_or(String::new(), |fault| format!("{:?}", fault.step));
            *coverage.steps.entry(step).or_default() += 1;
        }
        coverage.vetoes += u64::from(veto != trail.veto);
        coverage.moved_pages += hint.moved;
        compare(&model, &mut subject, random, !moves.is_empty());
    }
    for isolation in subject.isolations.drain(..) {
        subject.machine.cancel(isolation);
    }
}

/// The pages that are elsewhere than the model thinks.
fn moves(machine: &Machine, model: &Model) -> Vec<(usize, u64)> {
    let pages = model.held.iter().enumerate();
    let moved = pages.filter_map(|(index, page)| {
        let address = machine.address(page.handle).ok()?;
        let pfn = address / model.page();
        (page.pfn != Some(pfn)).then_some((index, pfn))
    });
    moved.collect()
}

impl Subject {
    /// Lets the core do it.
    fn perform(&mut self, operation: &Operation, model: &Model) -> Hint {
        let mut hint = Hint {
            result: Ok(()),
            fault_hit: false,
            offlined: 0,
            migration: None,
            allocated: Vec::new(),
            group: None,
            pinned: false,
            moved: 0,
        };
        let before = self.machine.statistics().pages_pinned;
        hint.result = self.result(operation, model, &mut hint);
        hint.pinned = self.machine.statistics().pages_pinned > before;
        hint
    }

    fn result(&mut self, operation: &Operation, model: &Model, hint: &mut Hint) -> Outcome {
        let machine = &mut self.machine;
        let size = |bytes: &Range<u64>| bytes.end.wrapping_sub(bytes.start);
        match operation {
            Operation::Add(add) => machine.add_memory(&request(add, model)),
            Operation::Remove(owner, bytes) => {
                machine.remove_memory(*owner, bytes.start, size(bytes))
            }
            Operation::OfflineAndRemove(owner, bytes) => {
                machine.offline_and_remove_memory(*owner, bytes.start, size(bytes))
            }
            Operation::Adopt(owner, bytes) => machine.adopt(*owner, bytes.start, size(bytes)),
            Operation::Online(id, online_type) => machine.online(*id, *online_type),
            Operation::DeviceOnline(id) => machine.device_online(*id).map(|_| ()),
            Operation::DeviceOffline(id) => machine.device_offline(*id).map(|_| ()),
            Operation::Offline(id) => machine.offline(*id),
            Operation::Write(file, text) => machine.write(file, text),
            Operation::Isolate(bytes) => {
                self.isolations
                    .push(machine.isolate(bytes.start, size(bytes))?);
                Ok(())
            }
            Operation::IsolateBlock(id) => {
                self.isolations.push(machine.isolate_block(*id)?);
                Ok(())
            }
            Operation::Migrate(index, budget) => {
                let migration = machine.migrate(&self.isolations[*index], *budget)?;
                hint.migration = Some(migration);
                Ok(())
            }
            Operation::Commit(index) => machine.commit(self.isolations.swap_remove(*index)),
            Operation::Cancel(index) => {
                machine.cancel(self.isolations.swap_remove(*index));
                Ok(())
            }
            Operation::FakeOffline(bytes) => machine.fake_offline(bytes.start, size(bytes)),
            Operation::FakeOnline(bytes) => machine.fake_online(bytes.start, size(bytes)),
            Operation::Allocate(nid, mobility, count) => {
                let first_tag = model.held.len();
                for _ in first_tag..first_tag + count {
                    let handle = machine.allocate_on(*nid, *mobility)?;
                    let address = machine.address(handle)?;
                    hint.allocated.push((handle, address / model.page()));
                }
                Ok(())
            }
            Operation::Free(index, count) => {
                let mut held: Vec<PageHandle> = model.held.iter().map(|page| page.handle).collect();
                for _ in 0..*count {
                    if *index >= held.len() {
                        break;
                    }
                    machine.free(held[*index])?;
                    self.freed = Some(held.swap_remove(*index));
                }
                Ok(())
            }
            Operation::Pin(index) => machine.pin(model.held[*index].handle).map(|_| ()),
            Operation::Unpin(index) => machine.unpin(model.held[*index].handle),
            Operation::PinLongTerm(index) => {
                machine.pin_long_term(model.held[*index].handle).map(|_| ())
            }
            Operation::UseFreedPage => {
                let Some(freed) = self.freed else {
                    return Err(Error::Invalid);
                };
                let results = [
                    machine.free(freed),
                    machine.unpin(freed),
                    machine.pin(freed).map(|_| ()),
                    machine.pin_long_term(freed).map(|_| ()),
                    machine.address(freed).map(|_| ()),
                ];
                assert_eq!(results, [Err(Error::Invalid); 5], "a page that was freed");
                results[0]
            }
            Operation::HardOffline(address) => machine.hard_offline_page(*address),
            Operation::SoftOffline(address) => machine.soft_offline_page(*address),
            Operation::AddDevice(bytes, nid, kind) => {
                let range = DeviceRange {
                    altmap: 0,
                    bytes: bytes.clone(),
                    nid: *nid,
                    kind: *kind,
                };
                machine.add_device_memory(range, "namespace")
            }
            Operation::RemoveDevice(bytes) => machine.remove_device_memory(bytes.clone()),
            Operation::RegisterStatic(nid, pages) => {
                hint.group = Some(machine.register_static_group(*nid, *pages)?);
                Ok(())
            }
            Operation::RegisterDynamic(nid, pages) => {
                hint.group = Some(machine.register_dynamic_group(*nid, *pages)?);
                Ok(())
            }
            Operation::Unregister(index) => machine.unregister_group(model.groups[*index].id),
            Operation::RegisterNotifier(priority) => {
                let notifier = self.notifiers.len();
                let (told, veto) = (Arc::clone(&self.told), Arc::clone(&self.veto));
                let listen = move |event: &MemoryEvent| {
                    told.lock().expect("nobody panics with it").push(Told {
                        notifier,
                        action: event.action,
                        start_pfn: event.start_pfn,
                        page_count: event.page_count,
                        nid: event.nid,
                        early: event.early,
                    });
                    let mut veto = veto.lock().expect("nobody panics with it");
                    match *veto {
                        Some(wanted)
                            if wanted.notifier == notifier && wanted.action == event.action =>
                        {
                            *veto = None;
                            Err(wanted.error)
                        }
                        _ => Ok(()),
                    }
                };
                self.notifiers
                    .push(Some(machine.register_notifier(*priority, Box::new(listen))));
                Ok(())
            }
            Operation::UnregisterNotifier(number) => {
                let id = self.notifiers[*number].take().expect("it is registered");
                assert!(machine.unregister_notifier(id).is_some());
                assert!(
                    machine.unregister_notifier(id).is_none(),
                    "a notifier is taken out twice"
                );
                Ok(())
            }
        }
    }
}

fn request(add: &Add, model: &Model) -> AddMemory<'static> {
    AddMemory {
        target: match add.target {
            Target::Node(nid) => CoreTarget::Node(nid),
            Target::Group(index) => CoreTarget::Group(model.groups[index].id),
        },
        owner: add.owner,
        resource_name: add.name,
        merge_resource: add.merge,
        memmap_on_memory: add.memmap,
        withheld: add.withheld.clone(),
        ..AddMemory::new(add.start, add.size)
    }
}

/// Whatever can be asked of the core gets the answer the model gives.
fn compare(model: &Model, subject: &mut Subject, random: &mut Random, all_pages: bool) {
    let machine = &mut subject.machine;
    machine.check_invariants().expect("the invariants hold");
    let blocks: Vec<u64> = machine.blocks().map(|block| block.id).collect();
    assert_eq!(
        blocks,
        model.blocks.keys().copied().collect::<Vec<_>>(),
        "memory blocks"
    );
    for block in machine.blocks() {
        let expected = &model.blocks[&block.id];
        let group = expected.group.map(|group| model.groups[group].id);
        assert_eq!(
            (
                block.state,
                block.nid,
                block.zone,
                block.group,
                block.memmap_pages,
                block.poisoned_pages,
                block.early
            ),
            (
                expected.state,
                expected.nid,
                expected.zone,
                group,
                expected.memmap_pages,
                expected.poisoned,
                expected.early
            ),
            "memory block {}",
            block.id
        );
        assert_eq!(
            machine.valid_zones(block.id),
            Ok(model.valid_zones(block.id)),
            "valid_zones of {}",
            block.id
        );
        let file = format!("memory{}/valid_zones", block.id);
        let shown = machine.config().hot_remove;
        assert_eq!(machine.read(&file).is_ok(), shown, "{file}");
        let state = match expected.state {
            BlockState::Offline => "offline",
            BlockState::Online => "online",
            BlockState::GoingOffline => "going-offline",
        };
        assert_eq!(
            machine
                .read(&format!("memory{}/state", block.id))
                .as_deref(),
            Ok(state)
        );
        let address = block.id * machine.profile().memory_block_size()
            + random.below(machine.profile().memory_block_size());
        assert_eq!(
            machine.resources().owner(address),
            model.owner(address),
            "the owner of {address:#x}"
        );
        let pfn = address / model.page();
        assert_eq!(
            machine.pfn_valid(pfn),
            model.pfn_valid(pfn),
            "whether page {pfn:#x} is valid"
        );
        assert_eq!(
            machine.pfn_is_online(pfn),
            model.pfn_is_online(pfn),
            "whether page {pfn:#x} is online"
        );
    }
    let sections: Vec<_> = machine
        .sections()
        .map(|section| {
            (
                section.number,
                section.online,
                section.early,
                section.device_taint,
                section.active.count(),
            )
        })
        .collect();
    assert_eq!(sections, model.sections(), "sections");
    let counted = model.zones();
    let mut managed = 0;
    for nid in 0..model.config.possible_nodes {
        for kind in KINDS {
            let expected = counted
                .get(&(nid, kind as usize))
                .copied()
                .unwrap_or_default();
            let span = model.span(nid, kind);
            managed += expected.managed;
            let Some(zone) = machine
                .zones()
                .find(|zone| (zone.nid, zone.kind) == (nid, kind))
            else {
                assert_eq!(expected.present, 0, "{kind:?} of node {nid} is missing");
                continue;
            };
            assert_eq!(
                (zone.start_pfn, zone.spanned_pages),
                (
                    span.as_ref().map(|span| span.start),
                    span.as_ref().map_or(0, |span| span.end - span.start)
                ),
                "span of {kind:?} of node {nid}"
            );
            assert_eq!(
                [
                    zone.present_pages,
                    zone.present_early_pages,
                    zone.managed_pages,
                    zone.free_pages,
                    zone.cma_pages,
                    zone.isolated_pageblocks
                ],
                [
                    expected.present,
                    expected.early,
                    expected.managed,
                    expected.free,
                    expected.cma,
                    expected.isolated
                ],
                "present, early, managed, free, cma, isolated of {kind:?} of node {nid}"
            );
            if expected.charged == 0 {
                assert_eq!(
                    zone.free_pageblocks, expected.whole,
                    "free pageblocks of {kind:?} of node {nid}"
                );
            }
        }
    }
    assert_eq!(machine.total_pages(), managed, "MemTotal");
    let allocatable = counted.values().map(|counts| counts.allocatable).sum();
    assert_eq!(
        machine.counts().allocatable,
        allocatable,
        "allocatable pages"
    );
    for (nid, online, memory, normal) in model.nodes() {
        match machine.nodes().find(|node| node.nid == nid) {
            Some(node) => assert_eq!(
                (node.online, node.has_memory, node.has_normal_memory),
                (online, memory, normal),
                "node {nid}"
            ),
            None => assert!(!online, "node {nid} is missing"),
        }
    }
    assert_eq!(
        machine.hardware_corrupted_pages(),
        model.poisoned(),
        "HardwareCorrupted"
    );
    assert_eq!(machine.resources().to_string(), model.iomem(), "iomem");
    assert_eq!(
        machine.resources().kexec_destinations().collect::<Vec<_>>(),
        model.kexec_destinations()
    );
    let mut devices: Vec<_> = model
        .devices
        .iter()
        .map(|device| (device.bytes.clone(), device.nid, device.kind))
        .collect();
    devices.sort_by_key(|(bytes, ..)| bytes.start);
    let found: Vec<_> = machine
        .device_memory()
        .map(|range| (range.bytes.clone(), range.nid, range.kind))
        .collect();
    assert_eq!(found, devices, "device memory");
    assert_eq!(machine.config(), &model.config, "parameters");
    model.check_places();
    let fresh = model.held.len().saturating_sub(8);
    for (index, page) in model.held.iter().enumerate() {
        let expected = page
            .pfn
            .map(|pfn| pfn * model.page())
            .ok_or(Error::HwPoison);
        assert_eq!(machine.address(page.handle), expected, "where a page is");
        if page.pfn.is_some() && (all_pages || index >= fresh || random.one_in(16)) {
            assert_eq!(
                read_tag(machine, page.handle),
                Some(page.tag),
                "contents of a page"
            );
        }
    }
}

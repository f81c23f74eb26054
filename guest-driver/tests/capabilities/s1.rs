//! Boot memory, and who may remove what.
//!
//! Without a test: S1-13 (metadata of huge pages that is freed). The core has no huge pages, whose metadata could be
//! shared; what metadata costs is in `Config::struct_page_size`.
#![expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges that have one"
)]
#![expect(unsafe_code, reason = "physical memory some of which is not there")]

use std::cell::{RefCell, UnsafeCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Boot, BootRange, Config, Error, Fault, FirmwareMap, Hotplug, Isolation,
    MemoryAction, MemoryEvent, Migration, Mobility, Obstacle, OnlineType, Owner, PageHandle,
    PhysicalMemory, Profile, ResourceFlags, ResourceTree, SectionInfo, Step, ZoneInfo, ZoneKind,
};

use crate::support::{
    GIB, MIB, Machine, SparseMemory, add_online, bare, booted, check, read, refused, write,
};

const BLOCK: u64 = 128 * MIB;
const PAGEBLOCK: u64 = 2 * MIB;
const PAGE: u64 = 4096;

const BOOT: u64 = 4 * GIB;
const MODULES: [u64; 2] = [8 * GIB, 9 * GIB];
const REGION: u64 = 16 * GIB;

fn section(machine: &Machine, address: u64) -> Option<SectionInfo> {
    let number = address >> machine.profile().section_shift;
    machine.sections().find(|section| section.number == number)
}

fn zone(machine: &Machine, kind: ZoneKind) -> ZoneInfo {
    let mut zones = machine.zones();
    zones.find(|z| z.nid == 0 && z.kind == kind).unwrap()
}

/// What ACPI does for a memory module that is plugged in: it adds it, or takes over what was there at boot.
fn acpi_finds(machine: &mut Machine, start: u64, size: u64) -> Result<(), Error> {
    let added = machine.add_memory(&AddMemory {
        owner: Owner::ACPI,
        ..AddMemory::new(start, size)
    });
    match added {
        Err(Error::Exists) => machine.adopt(Owner::ACPI, start, size),
        other => other,
    }
}

/// The next kernel on the same machine: all it knows is the firmware's memory map.
fn reboot(machine: &Machine, movable_from: Option<u64>, reserved: &[(u64, u64)]) -> Machine {
    let ram = machine.resources().reboot().unwrap();
    let boot = Boot {
        ram: ram
            .into_iter()
            .map(|bytes| BootRange { bytes, nid: 0 })
            .collect(),
        movable_from: movable_from.iter().map(|start| (0, *start)).collect(),
        reserved: reserved.iter().map(|(start, end)| *start..*end).collect(),
        ..Boot::default()
    };
    Hotplug::boot(*machine.config(), &boot, SparseMemory::default()).unwrap()
}

/// The actions a notifier of this priority hears.
fn listen(machine: &mut Machine, priority: i32) -> Arc<Mutex<Vec<(MemoryAction, bool)>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    machine.register_notifier(
        priority,
        Box::new(move |event: &MemoryEvent| {
            log.lock().unwrap().push((event.action, event.early));
            Ok(())
        }),
    );
    events
}

/// Memory that a driver lends to others: it hears when somebody wants it back, and objects.
struct Lender {
    /// Bytes that somebody else accesses by their addresses.
    lent: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Lender {
    fn attach<M>(machine: &mut Hotplug<M>) -> Self {
        let lent = Arc::new(Mutex::new(Vec::<Range<u64>>::new()));
        let notified = Arc::clone(&lent);
        machine.register_notifier(
            0,
            Box::new(move |event: &MemoryEvent| {
                let bytes = event.start_pfn * PAGE..(event.start_pfn + event.page_count) * PAGE;
                let overlaps = |lent: &Range<u64>| lent.start < bytes.end && bytes.start < lent.end;
                let mine = notified.lock().unwrap().iter().any(overlaps);
                match event.action {
                    MemoryAction::GoingOffline if mine => Err(Error::Busy),
                    _ => Ok(()),
                }
            }),
        );
        Self { lent }
    }

    fn borrow<M: PhysicalMemory>(&self, machine: &mut Hotplug<M>, start: u64, size: u64) -> bool {
        let done = machine.fake_offline(start, size).is_ok();
        if done {
            self.lent.lock().unwrap().push(start..start + size);
        }
        done
    }

    fn give_back<M: PhysicalMemory>(&self, machine: &mut Hotplug<M>, index: usize) {
        let range = self.lent.lock().unwrap().swap_remove(index);
        machine
            .fake_online(range.start, range.end - range.start)
            .unwrap();
    }
}

/// What is in a page.
type Contents = UnsafeCell<[u64; 512]>;

/// Physical memory part of which is not there: accesses to that are counted.
#[derive(Clone, Debug, Default)]
struct Slots {
    memory: Rc<RefCell<BTreeMap<u64, Box<Contents>>>>,
    plugged: Arc<Mutex<BTreeSet<u64>>>,
    violations: Arc<Mutex<Vec<u64>>>,
}

// SAFETY: Each address has its own allocation, which stays where it is until the memory is pulled.
unsafe impl PhysicalMemory for Slots {
    fn page(&self, address: u64) -> NonNull<u8> {
        if !self
            .plugged
            .lock()
            .unwrap()
            .contains(&(address / PAGEBLOCK))
        {
            self.violations.lock().unwrap().push(address);
        }
        let mut memory = self.memory.borrow_mut();
        let page = memory
            .entry(address)
            .or_insert_with(|| Box::new(UnsafeCell::new([0; 512])));
        NonNull::new(page.get().cast()).unwrap()
    }
}

impl Slots {
    fn plug(&self, start: u64, size: u64) {
        let pageblocks = start / PAGEBLOCK..(start + size) / PAGEBLOCK;
        self.plugged.lock().unwrap().extend(pageblocks);
    }

    fn pull(&self, start: u64, size: u64) {
        let gone = start / PAGEBLOCK..(start + size) / PAGEBLOCK;
        self.plugged
            .lock()
            .unwrap()
            .retain(|pageblock| !gone.contains(pageblock));
        self.memory
            .borrow_mut()
            .retain(|address, _| !gone.contains(&(address / PAGEBLOCK)));
    }

    fn violations(&self) -> usize {
        self.violations.lock().unwrap().len()
    }
}

/// Numbers that look random, the same ones each time (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// What became of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unplug {
    Going,
    Refused,
    Pulled,
}

/// A machine whose memory can be pulled: memory at boot, two modules, the region of a virtio-mem device.
struct Hardware {
    slots: Slots,
    machine: Hotplug<Slots>,
    /// The modules that are on their way out.
    emptying: [Option<Isolation>; 2],
    /// The plugged device blocks of the region, numbered from its start.
    device_blocks: BTreeSet<u64>,
}

fn virtio_mem() -> Owner {
    Owner::driver(0)
}

impl Hardware {
    fn new() -> Self {
        let slots = Slots::default();
        slots.plug(BOOT, BLOCK);
        let boot = Boot {
            ram: vec![BootRange {
                bytes: BOOT..BOOT + BLOCK,
                nid: 0,
            }],
            ..Boot::default()
        };
        let machine = Hotplug::boot(Config::new(Profile::X86_64), &boot, slots.clone()).unwrap();
        Self {
            slots,
            machine,
            emptying: [None; 2],
            device_blocks: BTreeSet::new(),
        }
    }

    /// A step of plugging a module in, or of pulling it: that takes several, with whatever happens between them.
    fn work_on_module(&mut self, index: usize) -> Unplug {
        let start = MODULES[index];
        let id = start / BLOCK;
        let emptied = match (self.machine.block_state(id), self.emptying[index].take()) {
            (None, _) => {
                self.slots.plug(start, BLOCK);
                let request = AddMemory {
                    owner: Owner::ACPI,
                    ..AddMemory::new(start, BLOCK)
                };
                self.machine.add_memory(&request).unwrap();
                self.machine.online(id, OnlineType::Movable).unwrap();
                return Unplug::Going;
            }
            (Some(BlockState::Online), _) => {
                let Ok(isolation) = self.machine.isolate_block(id) else {
                    return Unplug::Refused;
                };
                self.emptying[index] = Some(isolation);
                return Unplug::Going;
            }
            (_, Some(isolation)) => match self.machine.migrate(&isolation, 40) {
                Ok(Migration::More) => {
                    self.emptying[index] = Some(isolation);
                    return Unplug::Going;
                }
                Ok(Migration::Done) => self.machine.commit(isolation),
                Err(error) => {
                    self.machine.cancel(isolation);
                    Err(error)
                }
            },
            (_, None) => Ok(()),
        };
        if emptied.is_err() {
            return Unplug::Refused;
        }
        self.machine
            .remove_memory(Owner::ACPI, start, BLOCK)
            .unwrap();
        self.slots.pull(start, BLOCK);
        Unplug::Pulled
    }

    /// virtio-mem plugs a device block of 2 MiB or unplugs it; returns whether that was done.
    fn toggle_device_block(&mut self, number: u64) -> bool {
        let start = REGION + number * PAGEBLOCK;
        let id = start / BLOCK;
        let block = id * BLOCK;
        let blocks_per_memory_block = BLOCK / PAGEBLOCK;
        let first = number / blocks_per_memory_block * blocks_per_memory_block;
        if self.device_blocks.contains(&number) {
            if self.machine.fake_offline(start, PAGEBLOCK).is_err() {
                return false;
            }
            self.slots.pull(start, PAGEBLOCK);
            self.device_blocks.remove(&number);
            if self
                .device_blocks
                .range(first..first + blocks_per_memory_block)
                .next()
                .is_none()
            {
                self.machine
                    .offline_and_remove_memory(virtio_mem(), block, BLOCK)
                    .unwrap();
            }
            return true;
        }
        if self.machine.block_state(id).is_none() {
            let request = AddMemory {
                owner: virtio_mem(),
                resource_name: "System RAM (virtio_mem)",
                withheld: block..block + BLOCK,
                ..AddMemory::new(block, BLOCK)
            };
            self.machine.add_memory(&request).unwrap();
            self.machine.online(id, OnlineType::Movable).unwrap();
        }
        self.slots.plug(start, PAGEBLOCK);
        self.machine.fake_online(start, PAGEBLOCK).unwrap();
        self.device_blocks.insert(number)
    }

    fn allocate(&mut self, tag: u64) -> Option<(PageHandle, u64)> {
        let page = self.machine.allocate(Mobility::Movable).ok()?;
        let word = self.machine.pin(page).unwrap().cast::<u64>();
        // SAFETY: The page is pinned, and nothing else runs.
        unsafe { word.write(tag) };
        self.machine.unpin(page).unwrap();
        Some((page, tag))
    }

    /// The page still holds what was written.
    fn look_at(&mut self, (page, tag): (PageHandle, u64)) {
        let word = self.machine.pin(page).unwrap().cast::<u64>();
        // SAFETY: The page is pinned, and nothing else runs.
        assert_eq!(unsafe { word.read() }, tag);
        self.machine.unpin(page).unwrap();
    }
}

#[test]
fn s1_01_only_the_owner_removes_memory_and_acpi_adopts_what_it_finds_after_a_reboot() {
    let memory = [
        (8 * GIB, Owner::PROBE, "System RAM"),
        (9 * GIB, Owner::ACPI, "System RAM"),
        (10 * GIB, Owner::driver(0), "System RAM (virtio_mem)"),
        (11 * GIB, Owner::driver(1), "System RAM (virtio_mem)"),
    ];
    let everybody = [
        Owner::BOOT,
        Owner::PROBE,
        Owner::ACPI,
        Owner::driver(0),
        Owner::driver(1),
    ];
    let mut machine = booted(Config::new(Profile::X86_64), &[(4 * GIB, 5 * GIB, 0)]);
    for (start, owner, resource_name) in memory {
        let request = AddMemory {
            owner,
            resource_name,
            ..AddMemory::new(start, 2 * BLOCK)
        };
        machine.add_memory(&request).unwrap();
        machine.online(start / BLOCK, OnlineType::Movable).unwrap();
    }
    for (start, owner, _) in memory {
        for foreign in everybody.into_iter().filter(|other| *other != owner) {
            // Online or offline, a part or all of it.
            for (start, size) in [(start, BLOCK), (start + BLOCK, BLOCK), (start, 2 * BLOCK)] {
                refused(&mut machine, Error::NotPermitted, |m| {
                    m.remove_memory(foreign, start, size)
                });
                refused(&mut machine, Error::NotPermitted, |m| {
                    m.offline_and_remove_memory(foreign, start, size)
                });
            }
            refused(&mut machine, Error::NotPermitted, |m| {
                m.adopt(foreign, start, BLOCK)
            });
        }
    }
    // Boot memory belongs to nobody who could remove it.
    for owner in everybody.into_iter().skip(1) {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(owner, 4 * GIB, BLOCK)
        });
    }

    // The next kernel cannot tell who added what; what drivers manage it does not see.
    let mut machine = reboot(&machine, None, &[]);
    let found: Vec<u64> = machine
        .blocks()
        .map(|b| b.id * BLOCK)
        .filter(|start| *start >= 5 * GIB)
        .collect();
    assert_eq!(found, [8 * GIB, 8 * GIB + BLOCK, 9 * GIB, 9 * GIB + BLOCK]);
    refused(&mut machine, Error::NotPermitted, |m| {
        m.offline_and_remove_memory(Owner::ACPI, 9 * GIB, 2 * BLOCK)
    });
    let exists = machine.add_memory(&AddMemory::new(9 * GIB, 2 * BLOCK));
    assert_eq!(exists, Err(Error::Exists));
    acpi_finds(&mut machine, 9 * GIB, 2 * BLOCK).unwrap();
    check(&machine);
    // It owns the module now, and not a byte more.
    for owner in [Owner::PROBE, Owner::driver(0), Owner::BOOT] {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(owner, 9 * GIB, BLOCK)
        });
        refused(&mut machine, Error::NotPermitted, |m| {
            m.adopt(owner, 9 * GIB, BLOCK)
        });
    }
    for foreign in [8 * GIB, 4 * GIB] {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.offline_and_remove_memory(Owner::ACPI, foreign, BLOCK)
        });
    }
    machine
        .offline_and_remove_memory(Owner::ACPI, 9 * GIB, 2 * BLOCK)
        .unwrap();
    assert_eq!(machine.block_state(9 * GIB / BLOCK), None);
    // Plugged in again it is added, not adopted.
    acpi_finds(&mut machine, 9 * GIB, BLOCK).unwrap();
    assert_eq!(
        machine.block_state(9 * GIB / BLOCK),
        Some(BlockState::Offline)
    );
    machine.remove_memory(Owner::ACPI, 9 * GIB, BLOCK).unwrap();
    check(&machine);
}

#[test]
fn s1_02_lender_never_touches_memory_that_is_pulled() {
    // What is offline is not free: the module goes without anybody being asked.
    let mut wrong = Hardware::new();
    wrong.work_on_module(0);
    wrong.machine.offline(MODULES[0] / BLOCK).unwrap();
    let lender = Lender::attach(&mut wrong.machine);
    lender
        .lent
        .lock()
        .unwrap()
        .push(MODULES[0]..MODULES[0] + PAGEBLOCK);
    wrong.slots.page(MODULES[0]);
    assert_eq!(wrong.slots.violations(), 0);
    // Nothing goes offline, so nobody can object.
    assert_eq!(wrong.work_on_module(0), Unplug::Pulled);
    wrong.slots.page(MODULES[0]);
    assert_eq!(wrong.slots.violations(), 1);

    // What was allocated is not pulled, or is moved first.
    let (mut vetoed, mut pulled, mut lent, mut unplugged, mut kept) = (0, 0, 0, 0, 0);
    for seed in 0..12 {
        let mut random = Random(seed);
        let mut hardware = Hardware::new();
        let lender = Lender::attach(&mut hardware.machine);
        let mut pages: Vec<(PageHandle, u64)> = Vec::new();
        for step in 0..400 {
            match random.below(9) {
                0 | 8 => {
                    let done = hardware.work_on_module(random.below(2));
                    vetoed += usize::from(done == Unplug::Refused);
                    pulled += usize::from(done == Unplug::Pulled);
                }
                1 | 2 => {
                    let number = (random.below(2) * 64 + random.below(16)) as u64;
                    let was_there = hardware.device_blocks.contains(&number);
                    let done = hardware.toggle_device_block(number);
                    kept += usize::from(!done);
                    unplugged += usize::from(was_there && done);
                }
                3 | 4 => {
                    let from = [BOOT, MODULES[0], MODULES[1], REGION, REGION + BLOCK];
                    let start = from[random.below(5)] + random.below(16) as u64 * PAGEBLOCK;
                    lent += usize::from(lender.borrow(&mut hardware.machine, start, PAGEBLOCK));
                }
                5 => {
                    let count = lender.lent.lock().unwrap().len();
                    if count > 0 {
                        lender.give_back(&mut hardware.machine, random.below(count));
                    }
                }
                6 => pages.extend((0..100).map_while(|_| hardware.allocate(random.next()))),
                _ => {
                    for _ in 0..90.min(pages.len()) {
                        let (page, _) = pages.swap_remove(random.below(pages.len()));
                        hardware.machine.free(page).unwrap();
                    }
                }
            }
            // Others access what they were lent by its address, the lender its own pages by their handles.
            for range in lender.lent.lock().unwrap().iter() {
                hardware.slots.page(range.start);
                hardware.slots.page(range.end - PAGE);
            }
            for _ in 0..20.min(pages.len()) {
                hardware.look_at(pages[random.below(pages.len())]);
            }
            if step % 50 == 0 {
                for page in &pages {
                    hardware.look_at(*page);
                }
                assert_eq!(hardware.machine.check_invariants(), Ok(()), "seed {seed}");
            }
            assert_eq!(hardware.slots.violations(), 0, "seed {seed}, step {step}");
        }
    }
    // All of it happened, many times.
    let counts = [vetoed, pulled, lent, unplugged, kept];
    assert!(counts.iter().all(|count| *count >= 20), "{counts:?}");
}

#[test]
fn s1_03_memory_lent_as_contiguous_allocation_stays_present_and_removable() {
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(4 * GIB, 4 * GIB + 2 * BLOCK, 0)],
    );
    acpi_finds(&mut machine, 8 * GIB, 2 * BLOCK).unwrap();
    machine.online(64, OnlineType::Movable).unwrap();
    machine.online(65, OnlineType::Movable).unwrap();
    let pages: Vec<PageHandle> = (0..1000)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    for (tag, page) in (1..).zip(&pages) {
        write(&mut machine, *page, tag);
    }
    assert!(
        pages
            .iter()
            .all(|page| machine.address(*page).unwrap() / BLOCK == 64)
    );
    let before = machine.snapshot();
    let (blocks, resources) = (
        machine.blocks().collect::<Vec<_>>(),
        machine.resources().to_string(),
    );
    let (counts, total) = (machine.counts(), machine.total_pages());

    // In use, so it is allocated, which moves what is there; and it is not offline.
    machine.fake_offline(8 * GIB, BLOCK).unwrap();
    check(&machine);
    assert_eq!(machine.blocks().collect::<Vec<_>>(), blocks);
    assert_eq!(machine.resources().to_string(), resources);
    assert_eq!(machine.block_state(64), Some(BlockState::Online));
    assert!(machine.pfn_is_online(8 * GIB / PAGE) && machine.pfn_valid(8 * GIB / PAGE));
    assert_eq!(machine.counts().present, counts.present);
    assert_eq!(machine.total_pages(), total - BLOCK / PAGE);
    assert_eq!(machine.statistics().pages_migrated, 1000);
    for (tag, page) in (1..).zip(&pages) {
        assert_eq!(machine.address(*page).unwrap() / BLOCK, 65);
        assert_eq!(read(&mut machine, *page), tag);
    }
    // Nobody else gets it.
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(8 * GIB, PAGEBLOCK)
    });
    // Nor can be given back what was not lent.
    refused(&mut machine, Error::Invalid, |m| {
        m.fake_online(8 * GIB + BLOCK - PAGEBLOCK, 2 * PAGEBLOCK)
    });
    // Given back, all is as before, but for where the pages are.
    machine.fake_online(8 * GIB, BLOCK).unwrap();
    assert_eq!(machine.counts(), counts);
    refused(&mut machine, Error::Invalid, |m| {
        m.fake_online(8 * GIB, BLOCK)
    });
    for (tag, page) in (1..).zip(&pages) {
        assert_eq!(read(&mut machine, *page), tag);
    }
    assert_eq!(machine.snapshot(), before);

    // The module can be unplugged while it is lent: who does not want that has to object.
    machine.fake_offline(8 * GIB, BLOCK).unwrap();
    assert_eq!(machine.obstacle(64), Ok(None));
    machine
        .offline_and_remove_memory(Owner::ACPI, 8 * GIB, BLOCK)
        .unwrap();
    assert_eq!(machine.block_state(64), None);
    check(&machine);
    // Boot memory is lent the same way; what can never move is not.
    let fixed = machine.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(machine.address(fixed), Ok(4 * GIB));
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB, BLOCK)
    });
    assert_eq!(
        machine.obstacle(32),
        Ok(Some((4 * GIB, Obstacle::Unmovable)))
    );
    machine.fake_offline(4 * GIB + BLOCK, BLOCK).unwrap();
    assert!(section(&machine, 4 * GIB + BLOCK).unwrap().early);
    check(&machine);
}

/// As powernv's memtrace does it since it no longer removes memory: allocated, so nobody has to object.
#[test]
fn s1_03_memory_that_is_allocated_to_be_lent_cannot_be_pulled() {
    let mut machine = booted(
        Config::new(Profile::X86_64),
        &[(4 * GIB, 4 * GIB + 2 * BLOCK, 0)],
    );
    acpi_finds(&mut machine, 8 * GIB, BLOCK).unwrap();
    machine.online(64, OnlineType::Kernel).unwrap();
    let events = listen(&mut machine, 0);
    let page = machine.allocate(Mobility::Movable).unwrap();
    write(&mut machine, page, 3);
    assert_eq!(machine.address(page), Ok(4 * GIB));
    let counts = machine.counts();

    let trace = machine.allocate_contiguous(4 * GIB, BLOCK).unwrap();
    check(&machine);
    for (address, page) in (4 * GIB..4 * GIB + BLOCK)
        .step_by(PAGE as usize)
        .zip(&trace)
    {
        assert_eq!(machine.address(*page), Ok(address));
    }
    assert_eq!(trace.len() as u64, BLOCK / PAGE);
    assert_eq!(read(&mut machine, page), 3);
    assert!(machine.address(page).unwrap() >= 4 * GIB + BLOCK);
    // Present and managed like any other memory in use; the block is online, and stays that.
    let lent = machine.counts();
    assert_eq!(
        (lent.present, lent.managed),
        (counts.present, counts.managed)
    );
    assert_eq!(lent.free, counts.free - BLOCK / PAGE);
    assert_eq!(
        machine.obstacle(32),
        Ok(Some((4 * GIB, Obstacle::Unmovable)))
    );
    machine.adopt(Owner::ACPI, 4 * GIB, BLOCK).unwrap();
    refused(&mut machine, Error::Busy, |m| {
        m.offline_and_remove_memory(Owner::ACPI, 4 * GIB, BLOCK)
    });
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB, PAGEBLOCK)
    });
    refused(&mut machine, Error::Busy, |m| {
        m.allocate_contiguous(4 * GIB, PAGEBLOCK)
    });
    assert_eq!(*events.lock().unwrap(), []);
    // Given back in any order it is free, in one piece, and the module goes.
    for page in trace.into_iter().rev() {
        machine.free(page).unwrap();
    }
    assert_eq!(machine.counts(), counts);
    machine
        .offline_and_remove_memory(Owner::ACPI, 4 * GIB, BLOCK)
        .unwrap();
    check(&machine);

    // Failure leaves nothing allocated, whatever failed.
    for (step, error) in [
        (Step::Isolate, Error::Busy),
        (Step::Migrate, Error::NoMemory),
        (Step::Migrate, Error::Busy),
        (Step::Commit, Error::Interrupted),
    ] {
        let page = machine.allocate(Mobility::Movable).unwrap();
        let start = machine.address(page).unwrap() / PAGEBLOCK * PAGEBLOCK;
        machine.inject(Fault {
            step,
            skip: 0,
            error,
        });
        let before = machine.counts();
        assert_eq!(machine.allocate_contiguous(start, PAGEBLOCK), Err(error));
        assert_eq!(machine.counts(), before, "{step:?}");
        assert_eq!(machine.isolations().count(), 0);
        machine.free(page).unwrap();
        check(&machine);
    }
    // Nothing stays in Movable, and nothing is allocated where no memory is online.
    let mut machine = bare(Profile::X86_64);
    add_online(&mut machine, 4 * GIB, BLOCK, OnlineType::Movable);
    machine.add_memory(&AddMemory::new(8 * GIB, BLOCK)).unwrap();
    for start in [4 * GIB, 8 * GIB, 12 * GIB, 4 * GIB + PAGE] {
        refused(&mut machine, Error::Invalid, |m| {
            m.allocate_contiguous(start, PAGEBLOCK)
        });
    }
}

#[test]
fn s1_04_arm64_vetoes_offlining_of_boot_memory_and_everybody_hears_the_cancellation() {
    use MemoryAction::{CancelOffline, GoingOffline, Offline};
    for profile in [
        Profile::ARM64_4K,
        Profile::ARM64_16K,
        Profile::ARM64_64K,
        Profile::X86_64,
    ] {
        let block = profile.memory_block_size();
        let mut machine = booted(Config::new(profile), &[(4 * GIB, 5 * GIB, 0)]);
        add_online(&mut machine, 5 * GIB, block, OnlineType::Movable);
        let page = machine.allocate_on(0, Mobility::Movable).unwrap();
        write(&mut machine, page, 7);
        let ahead = listen(&mut machine, 1);
        let behind = listen(&mut machine, -1);
        let heard = |log: &Mutex<Vec<_>>| std::mem::take(&mut *log.lock().unwrap());
        let boot_id = 4 * GIB / block;

        if profile.boot_memory_removable {
            machine.offline(boot_id).unwrap();
            assert_eq!(heard(&ahead), [(GoingOffline, true), (Offline, true)]);
            assert_eq!(heard(&behind), [(GoingOffline, true), (Offline, true)]);
        } else {
            refused(&mut machine, Error::NotPermitted, |m| m.offline(boot_id));
            assert_eq!(Error::NotPermitted.errno_name(), "EPERM");
            assert_eq!(heard(&ahead), [(GoingOffline, true), (CancelOffline, true)]);
            // Not asked any more, but told.
            assert_eq!(heard(&behind), [(CancelOffline, true)]);
            let file = format!("memory{boot_id}/state");
            refused(&mut machine, Error::NotPermitted, |m| {
                m.write(&file, "offline")
            });
            refused(&mut machine, Error::NotPermitted, |m| {
                m.isolate_block(boot_id)
            });
            assert_eq!(machine.isolations().count(), 0);
            assert_eq!(machine.read(&file).unwrap(), "online");
            // Not even its firmware may.
            machine.adopt(Owner::ACPI, 4 * GIB, block).unwrap();
            refused(&mut machine, Error::NotPermitted, |m| {
                m.offline_and_remove_memory(Owner::ACPI, 4 * GIB, block)
            });
            assert_eq!(heard(&ahead).len(), 6);
            assert_eq!(heard(&behind), [(CancelOffline, true); 3]);
        }
        assert_eq!(machine.statistics().pages_migrated, 0);
        // Memory that was added later is nobody's business.
        machine
            .offline_and_remove_memory(Owner::PROBE, 5 * GIB, block)
            .unwrap();
        assert_eq!(heard(&ahead), [(GoingOffline, false), (Offline, false)]);
        assert_eq!(heard(&behind), [(GoingOffline, false), (Offline, false)]);
        assert_eq!(machine.statistics().pages_migrated, 1);
        assert_eq!(read(&mut machine, page), 7);
        check(&machine);
    }
}

#[test]
fn s1_05_removed_boot_memory_in_a_fixed_firmware_map_is_a_fault_of_the_next_kernel() {
    let gone = 5 * GIB..5 * GIB + BLOCK;
    let boot = |ram: Vec<Range<u64>>, slots: &Slots| {
        let boot = Boot {
            ram: ram
                .into_iter()
                .map(|bytes| BootRange { bytes, nid: 0 })
                .collect(),
            ..Boot::default()
        };
        Hotplug::boot(Config::new(Profile::X86_64), &boot, slots.clone()).unwrap()
    };
    // Both start with a module at boot, which is removed; then comes the next kernel.
    for (map, faults) in [
        (FirmwareMap::FollowsHotplug, false),
        (FirmwareMap::Fixed, true),
    ] {
        let slots = Slots::default();
        slots.plug(4 * GIB, BLOCK);
        let mut tree = ResourceTree::new(map);
        tree.add_boot_ram(4 * GIB..4 * GIB + BLOCK).unwrap();
        tree.add_boot_ram(gone.clone()).unwrap();
        assert_eq!(tree.stale_firmware_ranges().count(), 0);
        tree.adopt(Owner::ACPI, gone.clone()).unwrap();
        tree.remove_ram(gone.clone()).unwrap();

        // Seen before it happens.
        let stale: Vec<_> = tree.stale_firmware_ranges().collect();
        assert_eq!(stale.contains(&gone), faults);
        assert_eq!(stale.len(), usize::from(faults));
        // kexec may not put anything there, but the kernel it starts believes the map.
        assert!(tree.kexec_destinations().eq([4 * GIB..4 * GIB + BLOCK]));
        let mut next = boot(tree.reboot().unwrap(), &slots);
        assert_eq!(next.block_state(gone.start / BLOCK).is_some(), faults);
        let mut touched = 0;
        while let Ok(page) = next.allocate(Mobility::Movable) {
            next.pin(page).unwrap();
            touched += 1;
        }
        assert_eq!(touched, if faults { 2 } else { 1 } * BLOCK / PAGE);
        assert_eq!(slots.violations() as u64, touched - BLOCK / PAGE);
    }
    // So arm64, whose map is fixed, does not let it happen, and x86 corrects the map.
    for profile in [Profile::ARM64_4K, Profile::X86_64] {
        let ram = [(4 * GIB, 4 * GIB + BLOCK, 0), (gone.start, gone.end, 0)];
        let mut machine = booted(Config::new(profile), &ram);
        acpi_finds(&mut machine, gone.start, BLOCK).unwrap();
        let removed = machine.offline_and_remove_memory(Owner::ACPI, gone.start, BLOCK);
        assert_eq!(removed.is_ok(), profile.boot_memory_removable);
        assert_eq!(machine.resources().stale_firmware_ranges().count(), 0);
        let next = reboot(&machine, None, &[]);
        assert_eq!(
            next.block_state(gone.start / BLOCK).is_none(),
            profile.boot_memory_removable
        );
    }
    // Memory a driver manages is never in the map: the next kernel has it once the driver adds it again.
    for profile in [Profile::ARM64_4K, Profile::X86_64] {
        let mut machine = booted(Config::new(profile), &[(4 * GIB, 4 * GIB + BLOCK, 0)]);
        let request = AddMemory {
            owner: virtio_mem(),
            resource_name: "System RAM (virtio_mem)",
            ..AddMemory::new(REGION, 2 * BLOCK)
        };
        let mut known = vec![];
        for _ in 0..2 {
            machine.add_memory(&request).unwrap();
            machine.online(REGION / BLOCK, OnlineType::Movable).unwrap();
            known.push(machine.resources().firmware_map().collect::<Vec<_>>());
            machine = reboot(&machine, None, &[]);
            assert_eq!(machine.block_state(REGION / BLOCK), None);
            assert!(!machine.pfn_valid(REGION / PAGE));
            assert_eq!(section(&machine, REGION), None);
            check(&machine);
        }
        assert_eq!(known, vec![vec![4 * GIB..4 * GIB + BLOCK]; 2]);
        // Added again it is not early, so it can go, on any architecture.
        machine.add_memory(&request).unwrap();
        machine.online(REGION / BLOCK, OnlineType::Movable).unwrap();
        assert!(!section(&machine, REGION).unwrap().early);
        machine
            .offline_and_remove_memory(virtio_mem(), REGION, 2 * BLOCK)
            .unwrap();
        check(&machine);
    }
}

#[test]
fn s1_06_module_is_early_memory_after_a_reboot_and_goes_again_if_movable() {
    const DIMM: u64 = 8 * GIB;
    let mut first = booted(
        Config {
            movable_node: true,
            ..Config::new(Profile::X86_64)
        },
        &[(0, GIB, 0)],
    );
    acpi_finds(&mut first, DIMM, 2 * BLOCK).unwrap();
    for id in [64, 65] {
        first.online(id, OnlineType::Online).unwrap();
        assert_eq!(
            first.read(&format!("memory{id}/valid_zones")).unwrap(),
            "Movable"
        );
    }
    assert!(!section(&first, DIMM).unwrap().early);
    check(&first);

    // With movable_node, what firmware calls hotpluggable is Movable from boot on.
    let mut next = reboot(&first, Some(DIMM), &[]);
    let movable = zone(&next, ZoneKind::Movable);
    assert_eq!(movable.present_early_pages, 2 * BLOCK / PAGE);
    for address in [DIMM, DIMM + BLOCK] {
        assert!(section(&next, address).unwrap().early);
    }
    assert!(
        next.blocks()
            .filter(|b| b.id >= 64)
            .all(|b| b.early && b.zone == Some(ZoneKind::Movable))
    );
    let fixed = next.allocate(Mobility::Unmovable).unwrap();
    let moving = next.allocate(Mobility::Movable).unwrap();
    write(&mut next, moving, 5);
    assert!(next.address(fixed).unwrap() < GIB);
    assert_eq!(next.address(moving), Ok(DIMM));
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    next.offline_and_remove_memory(Owner::ACPI, DIMM, 2 * BLOCK)
        .unwrap();
    assert_eq!(read(&mut next, moving), 5);
    assert_eq!(zone(&next, ZoneKind::Movable).present_pages, 0);
    check(&next);
    // The kernel after that does not find it any more.
    assert_eq!(next.resources().reboot().unwrap(), [0..GIB]);

    // Without, it is kernel memory like any other: the first to be used for what never moves.
    let mut next = reboot(&first, None, &[]);
    assert!(
        next.blocks()
            .filter(|b| b.id >= 64)
            .all(|b| b.early && b.zone == Some(ZoneKind::Normal))
    );
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    let fixed = next.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(next.address(fixed), Ok(DIMM));
    for (start, size) in [(DIMM, BLOCK), (DIMM, 2 * BLOCK)] {
        refused(&mut next, Error::Busy, |m| {
            m.offline_and_remove_memory(Owner::ACPI, start, size)
        });
    }
    assert_eq!(next.obstacle(64), Ok(Some((DIMM, Obstacle::Unmovable))));
    // The half without such a page goes, and the rest once that page is free.
    next.offline_and_remove_memory(Owner::ACPI, DIMM + BLOCK, BLOCK)
        .unwrap();
    next.free(fixed).unwrap();
    next.offline_and_remove_memory(Owner::ACPI, DIMM, BLOCK)
        .unwrap();
    check(&next);

    // What the kernel put there while it booted never goes.
    let mut next = reboot(&first, None, &[(DIMM + 5 * PAGE, DIMM + 6 * PAGE)]);
    acpi_finds(&mut next, DIMM, 2 * BLOCK).unwrap();
    refused(&mut next, Error::Busy, |m| {
        m.offline_and_remove_memory(Owner::ACPI, DIMM, BLOCK)
    });
    assert_eq!(
        next.obstacle(64),
        Ok(Some((DIMM + 5 * PAGE, Obstacle::Reserved)))
    );
}

/// There is no way to say so: only who removes memory and adds it again gets a section that is not early.
#[test]
fn s1_07_section_is_early_until_it_is_removed() {
    let mut machine = booted(Config::new(Profile::X86_64), &[(4 * GIB, 5 * GIB, 0)]);
    let early = |machine: &Machine| section(machine, 4 * GIB).map(|section| section.early);
    machine.adopt(Owner::ACPI, 4 * GIB, BLOCK).unwrap();
    assert_eq!(early(&machine), Some(true));
    machine.offline(32).unwrap();
    assert_eq!(early(&machine), Some(true));
    machine.online(32, OnlineType::Movable).unwrap();
    assert_eq!(early(&machine), Some(true));
    let movable = zone(&machine, ZoneKind::Movable);
    assert_eq!(movable.present_early_pages, movable.present_pages);
    machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
    machine
        .offline_and_remove_memory(Owner::ACPI, 4 * GIB, BLOCK)
        .unwrap();
    assert_eq!(early(&machine), None);

    acpi_finds(&mut machine, 4 * GIB, BLOCK).unwrap();
    assert_eq!(early(&machine), Some(false));
    machine.online(32, OnlineType::Movable).unwrap();
    assert_eq!(early(&machine), Some(false));
    assert_eq!(zone(&machine, ZoneKind::Movable).present_early_pages, 0);
    assert!(!machine.blocks().find(|block| block.id == 32).unwrap().early);
    check(&machine);
}

/// Allocates all pages there are and frees all but `count` at random places: the same ones for the same seed, and more.
fn scatter(machine: &mut Machine, mobility: Mobility, count: usize, seed: u64) -> Vec<PageHandle> {
    let mut pages = Vec::new();
    while let Ok(page) = machine.allocate(mobility) {
        pages.push(page);
    }
    Random(seed).shuffle(&mut pages);
    for page in pages.split_off(count) {
        machine.free(page).unwrap();
    }
    pages
}

/// How many ranges of `size` of `bytes` can be allocated, each alone.
fn contiguous_ranges(machine: &mut Machine, bytes: Range<u64>, size: u64) -> u64 {
    let mut found = 0;
    for start in bytes.step_by(size as usize) {
        if machine.fake_offline(start, size).is_ok() {
            machine.fake_online(start, size).unwrap();
            found += 1;
        }
    }
    found
}

#[test]
fn s1_08_contiguous_memory_to_lend_is_sure_where_it_was_set_aside_and_rare_in_fragmented_kernel_memory()
 {
    const RAM: Range<u64> = 4 * GIB..4 * GIB + BLOCK;
    const SIZES: [u64; 4] = [PAGEBLOCK, 4 * PAGEBLOCK, 16 * PAGEBLOCK, 64 * PAGEBLOCK];
    const PAGES: [usize; 6] = [0, 1, 8, 32, 128, 2048];
    let kernel = |fragments| {
        let mut machine = booted(Config::new(Profile::X86_64), &[(RAM.start, RAM.end, 0)]);
        let pages = scatter(&mut machine, Mobility::Unmovable, fragments, 1);
        (machine, pages)
    };
    let mut table = Vec::new();
    for fragments in PAGES {
        let (mut machine, pages) = kernel(fragments);
        let found = SIZES.map(|size| contiguous_ranges(&mut machine, RAM, size));
        // A range is had if and only if nothing in it stays where it is.
        let expected = SIZES.map(|size| {
            let hit = pages
                .iter()
                .map(|page| (machine.address(*page).unwrap() - RAM.start) / size);
            BLOCK / size - hit.collect::<BTreeSet<_>>().len() as u64
        });
        assert_eq!(found, expected);
        check(&machine);
        table.push(found);
    }
    assert_eq!(
        table[0],
        SIZES.map(|size| BLOCK / size),
        "nothing is in use"
    );
    assert_eq!(table[PAGES.len() - 1], [0; 4]);
    for rows in table.windows(2) {
        for (fewer, more) in rows[0].iter().zip(rows[1]) {
            assert!(*fewer >= more, "worse with more pages");
        }
    }
    for found in &table {
        for (index, sizes) in SIZES.windows(2).enumerate() {
            // The share of ranges that can be had, with the ranges of both sizes as common denominator.
            let (small, large) = (found[index] * sizes[0], found[index + 1] * sizes[1]);
            assert!(small >= large, "worse with larger ranges");
        }
    }
    // 128 pages of 32768 leave hardly anything of 8 MiB.
    assert!(table[4][1] <= 1 && table[4][0] > 0);

    // Alternatives, with the most pages of above. Movable: whatever is there moves.
    let mut machine = booted(Config::new(Profile::X86_64), &[(RAM.start, RAM.end, 0)]);
    add_online(&mut machine, 8 * GIB, BLOCK, OnlineType::Movable);
    scatter(&mut machine, Mobility::Movable, 2048, 2);
    for size in SIZES {
        assert_eq!(
            contiguous_ranges(&mut machine, 8 * GIB..8 * GIB + BLOCK, size),
            BLOCK / size
        );
    }
    // Huge pages set aside before anybody else comes: there, but others cannot use them meanwhile.
    let (mut machine, _) = kernel(0);
    machine
        .fake_offline(RAM.start + BLOCK / 2, BLOCK / 2)
        .unwrap();
    let pages = scatter(&mut machine, Mobility::Unmovable, 2048, 3);
    assert!(
        pages
            .iter()
            .all(|page| machine.address(*page).unwrap() < RAM.start + BLOCK / 2)
    );
    assert_eq!(contiguous_ranges(&mut machine, RAM, PAGEBLOCK), 0);
    machine
        .fake_online(RAM.start + BLOCK / 2, BLOCK / 2)
        .unwrap();
    assert_eq!(contiguous_ranges(&mut machine, RAM, PAGEBLOCK), 32);
    // Memory for contiguous allocations: others use it, but for nothing that stays.
    let boot = Boot {
        ram: vec![BootRange { bytes: RAM, nid: 0 }],
        cma: vec![RAM.start..RAM.start + BLOCK / 2],
        ..Boot::default()
    };
    let mut machine =
        Hotplug::boot(Config::new(Profile::X86_64), &boot, SparseMemory::default()).unwrap();
    scatter(&mut machine, Mobility::Unmovable, 2048, 4);
    scatter(&mut machine, Mobility::Movable, 8192, 5);
    assert_eq!(contiguous_ranges(&mut machine, RAM, PAGEBLOCK), 32);
    // mem=: the kernel does not know it, so nothing can get in the way, and it cannot use it.
    let machine = booted(
        Config::new(Profile::X86_64),
        &[(RAM.start, RAM.end - BLOCK / 2, 0)],
    );
    assert_eq!(machine.total_pages(), BLOCK / 2 / PAGE);
    assert!(!machine.pfn_is_online((RAM.end - PAGE) / PAGE));
}

/// The pages of programs come and go, those of the kernel come and stay: the same ones for the same seed.
fn workload(machine: &mut Machine, seed: u64) {
    let mut random = Random(seed);
    let mut programs = Vec::new();
    for _ in 0..8 {
        while let Ok(page) = machine.allocate(Mobility::Movable) {
            programs.push(page);
        }
        // Memory is full when the kernel wants some, so that programs lose pages until it gets what it wants.
        for _ in 0..120 {
            while machine.allocate(Mobility::Unmovable).is_err() {
                let page = programs.swap_remove(random.below(programs.len()));
                machine.free(page).unwrap();
            }
        }
        random.shuffle(&mut programs);
        for page in programs.drain(..programs.len() / 4) {
            machine.free(page).unwrap();
        }
    }
    for page in programs {
        machine.free(page).unwrap();
    }
}

#[test]
fn s1_09_movable_memory_leaves_more_free_huge_pages_than_kernel_memory() {
    for seed in 0..4 {
        let huge_pages_after = |online_type| {
            let mut machine = booted(
                Config::new(Profile::X86_64),
                &[(4 * GIB, 4 * GIB + BLOCK, 0)],
            );
            add_online(&mut machine, 8 * GIB, BLOCK, online_type);
            workload(&mut machine, seed);
            check(&machine);
            let free = machine.counts().free;
            let zones: Vec<ZoneInfo> = machine.zones().collect();
            let added = (0..64)
                .filter(|index| {
                    machine
                        .fake_offline(8 * GIB + index * PAGEBLOCK, PAGEBLOCK)
                        .is_ok()
                })
                .count();
            (
                free,
                zones.iter().map(|zone| zone.free_pageblocks).sum::<u64>(),
                added,
            )
        };
        let (free_movable, movable, of_added_movable) = huge_pages_after(OnlineType::Movable);
        let (free_kernel, kernel, of_added_kernel) = huge_pages_after(OnlineType::Kernel);
        // As much is free, but not as much in one piece.
        assert_eq!(free_movable, free_kernel);
        assert!(movable > kernel, "{movable} {kernel}");
        assert_eq!(of_added_movable, 64, "all of it");
        assert!(of_added_kernel < 64);
    }
}

#[test]
fn s1_10_unplug_always_works_in_movable_but_for_pins_and_less_in_kernel_memory() {
    const PINS: [usize; 4] = [0, 4, 32, 256];
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Pins {
        Short,
        Long,
    }
    // Device blocks of 2 MiB that can be unplugged, of 64, for every number of pins.
    let unplugged = |online_type, pins, unmovable| {
        PINS.map(|count| {
            let mut machine = bare(Profile::X86_64);
            // Room for what is moved.
            add_online(&mut machine, 4 * GIB, BLOCK, OnlineType::Kernel);
            let filler: Vec<PageHandle> = (0..BLOCK / PAGE)
                .map(|_| machine.allocate(Mobility::Unmovable).unwrap())
                .collect();
            add_online(&mut machine, 8 * GIB, BLOCK, online_type);
            if online_type == OnlineType::Kernel {
                scatter(&mut machine, Mobility::Unmovable, unmovable, 6);
            }
            let movable = scatter(&mut machine, Mobility::Movable, 1024, 7);
            for page in filler {
                machine.free(page).unwrap();
            }
            for page in &movable[..count] {
                let pinned = match pins {
                    Pins::Short => machine.pin(*page),
                    Pins::Long => machine.pin_long_term(*page),
                };
                pinned.unwrap();
            }
            let held: BTreeSet<u64> = movable[..count]
                .iter()
                .map(|page| machine.address(*page).unwrap() / PAGEBLOCK)
                .filter(|pageblock| *pageblock >= 8 * GIB / PAGEBLOCK)
                .collect();
            // From high to low, as virtio-mem does it.
            let done = (0..64)
                .rev()
                .filter(|index| {
                    machine
                        .fake_offline(8 * GIB + index * PAGEBLOCK, PAGEBLOCK)
                        .is_ok()
                })
                .count();
            if unmovable == 0 {
                assert_eq!(done, 64 - held.len(), "only pins are in the way");
            }
            if count == 0 {
                assert_eq!(machine.statistics().pages_pinned, 0);
            }
            check(&machine);
            done
        })
    };
    let movable = unplugged(OnlineType::Movable, Pins::Short, 0);
    let kernel = unplugged(OnlineType::Kernel, Pins::Short, 0);
    let fragmented = unplugged(OnlineType::Kernel, Pins::Short, 64);
    for row in [movable, kernel, fragmented] {
        assert!(
            row.is_sorted_by(|few, many| few >= many),
            "pins make it worse: {row:?}"
        );
    }
    assert_eq!(
        (movable[0], kernel[0]),
        (64, 64),
        "without pins or unmovable pages all of it"
    );
    for (index, pins) in PINS.into_iter().enumerate() {
        let [movable, kernel, fragmented] = [movable, kernel, fragmented].map(|row| row[index]);
        assert!(movable >= kernel, "{pins} pins");
        assert!(kernel > fragmented || pins > 64, "{pins} pins");
    }
    assert_eq!(movable[1], 60, "four pins cost four blocks");
    assert!(
        movable[3] <= 2 && fragmented[3] <= 2,
        "many cost nearly all"
    );
    // Devices that pin for long get their pages out of Movable, but not out of kernel zones.
    assert_eq!(unplugged(OnlineType::Movable, Pins::Long, 0), [64; 4]);
    assert_eq!(unplugged(OnlineType::Kernel, Pins::Long, 0), kernel);
}

#[test]
fn s1_11_virtio_mem_minds_its_own_region_only() {
    let region = REGION..REGION + 4 * BLOCK;
    let mut machine = booted(Config::new(Profile::X86_64), &[(4 * GIB, 5 * GIB, 0)]);
    let flags = ResourceFlags::RESERVED;
    machine
        .claim_resource(region.clone(), "virtio0", flags)
        .unwrap();
    // What the driver hears of its region, and how often of elsewhere.
    let heard = Arc::new(Mutex::new(Vec::new()));
    let foreign = Arc::new(AtomicUsize::new(0));
    let (log, ignored) = (Arc::clone(&heard), Arc::clone(&foreign));
    machine.register_notifier(
        0,
        Box::new(move |event: &MemoryEvent| {
            let start = event.start_pfn * PAGE;
            if !region.contains(&start) {
                ignored.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            log.lock().unwrap().push((event.action, start / BLOCK));
            // Plugged, all of it: not without the driver.
            match event.action {
                MemoryAction::GoingOffline if start == REGION => Err(Error::Busy),
                _ => Ok(()),
            }
        }),
    );
    let hears = || std::mem::take(&mut *heard.lock().unwrap());
    let request = |start| AddMemory {
        owner: virtio_mem(),
        resource_name: "System RAM (virtio_mem)",
        ..AddMemory::new(start, BLOCK)
    };
    for start in [REGION, REGION + BLOCK] {
        machine.add_memory(&request(start)).unwrap();
        machine.online(start / BLOCK, OnlineType::Movable).unwrap();
    }
    let first = REGION / BLOCK;
    assert_eq!(hears().len(), 4);

    // A module beside it, and boot memory, come and go.
    acpi_finds(&mut machine, REGION - BLOCK, BLOCK).unwrap();
    acpi_finds(&mut machine, REGION + 4 * BLOCK, BLOCK).unwrap();
    for id in [first - 1, first + 4] {
        machine.online(id, OnlineType::Movable).unwrap();
        machine
            .offline_and_remove_memory(Owner::ACPI, id * BLOCK, BLOCK)
            .unwrap();
    }
    machine.offline(33).unwrap();
    machine.online(33, OnlineType::Online).unwrap();
    assert_eq!(hears(), []);
    assert_eq!(foreign.load(Ordering::Relaxed), 12);

    // Somebody else takes its memory offline: it hears that, and may object, but nobody else may remove it.
    machine
        .write(&format!("memory{}/state", first + 1), "offline")
        .unwrap();
    refused(&mut machine, Error::Busy, |m| {
        m.write(&format!("memory{first}/state"), "offline")
    });
    {
        use MemoryAction::{CancelOffline, GoingOffline, Offline};
        let expected = [
            (GoingOffline, first + 1),
            (Offline, first + 1),
            (GoingOffline, first),
            (CancelOffline, first),
        ];
        assert_eq!(hears(), expected);
    }
    for other in [Owner::ACPI, Owner::PROBE, Owner::driver(1)] {
        refused(&mut machine, Error::NotPermitted, |m| {
            m.remove_memory(other, REGION + BLOCK, BLOCK)
        });
    }
    // Nor may anybody else add what it has added.
    refused(&mut machine, Error::Exists, |m| {
        m.add_memory(&AddMemory::new(REGION, BLOCK))
    });
    refused(&mut machine, Error::NotPermitted, |m| {
        m.adopt(Owner::ACPI, REGION, BLOCK)
    });
    // It removes its own concurrently: between the steps of a module that is being emptied.
    acpi_finds(&mut machine, 8 * GIB, BLOCK).unwrap();
    machine.online(64, OnlineType::Movable).unwrap();
    let pages: Vec<PageHandle> = (0..100)
        .map(|_| machine.allocate(Mobility::Movable).unwrap())
        .collect();
    assert!(machine.address(pages[0]).unwrap() / BLOCK == 64);
    let emptying = machine.isolate_block(64).unwrap();
    assert_eq!(machine.migrate(&emptying, 10), Ok(Migration::More));
    machine
        .remove_memory(virtio_mem(), REGION + BLOCK, BLOCK)
        .unwrap();
    refused(&mut machine, Error::NotPermitted, |m| {
        m.remove_memory(virtio_mem(), 8 * GIB, BLOCK)
    });
    while machine.migrate(&emptying, 10).unwrap() == Migration::More {}
    machine.commit(emptying).unwrap();
    machine.remove_memory(Owner::ACPI, 8 * GIB, BLOCK).unwrap();
    assert_eq!(machine.block_state(first), Some(BlockState::Online));
    assert_eq!(machine.block_state(first + 1), None);
    check(&machine);
}

#[test]
fn s1_12_contiguous_allocation_tries_five_times_in_movable_and_once_in_kernel_zones() {
    let busy = Fault {
        step: Step::Migrate,
        skip: 0,
        error: Error::Busy,
    };
    for (online_type, passes) in [(OnlineType::Movable, 5), (OnlineType::Kernel, 1)] {
        for failures in 0..=6 {
            let mut machine = bare(Profile::X86_64);
            add_online(&mut machine, 4 * GIB, BLOCK, online_type);
            let page = machine.allocate(Mobility::Movable).unwrap();
            write(&mut machine, page, 9);
            for _ in 0..failures {
                machine.inject(busy);
            }
            if failures < passes {
                machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
                assert_eq!(machine.clear_faults(), 0);
                assert_eq!(machine.address(page), Ok(4 * GIB + PAGEBLOCK));
            } else {
                refused(&mut machine, Error::Busy, |m| {
                    m.fake_offline(4 * GIB, PAGEBLOCK)
                });
                assert_eq!(
                    machine.clear_faults(),
                    failures - passes,
                    "tried {passes} times"
                );
                assert_eq!(machine.address(page), Ok(4 * GIB));
                assert_eq!(machine.isolations().count(), 0);
                // The next attempt has as many.
                machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
            }
            assert_eq!(read(&mut machine, page), 9);
            check(&machine);
        }
        // A pin is such a failure; it is counted once each time.
        let mut machine = bare(Profile::X86_64);
        add_online(&mut machine, 4 * GIB, 2 * BLOCK, online_type);
        let pinned = machine.allocate(Mobility::Movable).unwrap();
        machine.pin(pinned).unwrap();
        refused(&mut machine, Error::Busy, |m| {
            m.fake_offline(4 * GIB, PAGEBLOCK)
        });
        assert_eq!(machine.statistics().pages_pinned, passes as u64);
        // Offlining tries five times, whatever the zone.
        refused(&mut machine, Error::Busy, |m| m.offline(32));
        assert_eq!(machine.statistics().pages_pinned, passes as u64 + 5);
        // Other ranges do not suffer.
        machine
            .fake_offline(4 * GIB + PAGEBLOCK, PAGEBLOCK)
            .unwrap();
        machine.unpin(pinned).unwrap();
        machine.fake_offline(4 * GIB, PAGEBLOCK).unwrap();
        check(&machine);
    }
    // Memory for contiguous allocations is in a kernel zone, too; what never moves is not in it.
    let boot = Boot {
        ram: vec![BootRange {
            bytes: 4 * GIB..4 * GIB + BLOCK,
            nid: 0,
        }],
        cma: vec![4 * GIB..4 * GIB + 4 * PAGEBLOCK],
        ..Boot::default()
    };
    let mut machine =
        Hotplug::boot(Config::new(Profile::X86_64), &boot, SparseMemory::default()).unwrap();
    let fixed = machine.allocate(Mobility::Unmovable).unwrap();
    assert_eq!(machine.address(fixed), Ok(4 * GIB + 4 * PAGEBLOCK));
    // Movable pages go there when all other pageblocks without unmovable pages are full.
    for _ in 0..59 * 512 {
        machine.allocate(Mobility::Movable).unwrap();
    }
    let movable = machine.allocate(Mobility::Movable).unwrap();
    assert_eq!(machine.address(movable), Ok(4 * GIB));
    machine.inject(busy);
    refused(&mut machine, Error::Busy, |m| {
        m.fake_offline(4 * GIB, 4 * PAGEBLOCK)
    });
    machine.fake_offline(4 * GIB, 4 * PAGEBLOCK).unwrap();
    assert_eq!(machine.address(movable), Ok(4 * GIB + 4 * PAGEBLOCK + PAGE));
    check(&machine);
    // It stays memory for contiguous allocations while one has it, and after.
    machine.fake_online(4 * GIB, 4 * PAGEBLOCK).unwrap();
    let cma = zone(&machine, ZoneKind::Normal).cma_pages;
    let device = machine.allocate_contiguous(4 * GIB, PAGEBLOCK).unwrap();
    assert_eq!(zone(&machine, ZoneKind::Normal).cma_pages, cma);
    machine.free(device[7]).unwrap();
    let fixed = machine.allocate(Mobility::Unmovable).unwrap();
    assert!(machine.address(fixed).unwrap() >= 4 * GIB + 4 * PAGEBLOCK);
    check(&machine);
}

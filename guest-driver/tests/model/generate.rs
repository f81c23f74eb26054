//! Random operations, half of them aimed at what is there.

use std::ops::Range;

use virtio_mem_driver::hotplug::{
    BlockState, DeviceKind, Error, MemoryAction, Mobility, OnlineType, Owner, Profile, Step,
};

use crate::boot::Layout;
use crate::model::Model;
use crate::operation::{Add, Injected, Operation, Target, Veto};
use crate::random::Random;

/// Generates operations for one machine.
pub(crate) struct Generator<'a> {
    pub(crate) random: &'a mut Random,
    pub(crate) layout: &'a Layout,
    pub(crate) model: &'a Model,
}

/// Errors that nothing but an injected failure has.
const INJECTED: [Error; 3] = [Error::Io, Error::NotPermitted, Error::Interrupted];

impl Generator<'_> {
    fn profile(&self) -> Profile {
        self.layout.config.profile
    }

    fn id(&mut self) -> u64 {
        let window = self.layout.window.clone();
        match self.random.below(24) {
            0 => window.end + self.random.below(2),
            _ => self.random.within(window),
        }
    }

    /// A block in this state, if there is one.
    fn id_in(&mut self, state: BlockState) -> u64 {
        let blocks = self.model.blocks.iter();
        let ids: Vec<u64> = blocks
            .filter(|(_, block)| block.state == state)
            .map(|(id, _)| *id)
            .collect();
        match ids.is_empty() || self.random.one_in(6) {
            true => self.id(),
            false => self.random.pick(&ids),
        }
    }

    fn bytes_of_blocks(&mut self, id: u64) -> Range<u64> {
        let size = self.profile().memory_block_size();
        let count = self.random.pick(&[1, 1, 1, 2, 2, 3]);
        let mut bytes = id * size..(id + count) * size;
        match self.random.below(40) {
            0 => bytes.start += size / 2,
            1 => bytes.end -= self.profile().section_size() / 2,
            2 => bytes.end = bytes.start,
            3 => bytes.end += self.profile().page_size(),
            _ => {}
        }
        bytes
    }

    fn owner(&mut self, at: u64) -> Owner {
        match self.model.owner(at) {
            Some(owner) if !self.random.one_in(8) => owner,
            _ => self.random.pick(&[
                Owner::BOOT,
                Owner::PROBE,
                Owner::ACPI,
                Owner::driver(0),
                Owner::driver(1),
            ]),
        }
    }

    fn nid(&mut self) -> u32 {
        let nodes = u64::from(self.layout.config.possible_nodes);
        let bad = u64::from(self.random.one_in(24));
        self.random.below(nodes + bad) as u32
    }

    fn live_groups(&self) -> Vec<usize> {
        (0..self.model.groups.len())
            .filter(|index| self.model.group_is_live(*index))
            .collect()
    }

    /// A group that is there, or one whose id means nothing any more.
    fn group(&mut self) -> Option<usize> {
        let live = self.live_groups();
        if !live.is_empty() && !self.random.one_in(12) {
            return Some(self.random.pick(&live));
        }
        let used: Vec<_> = live
            .iter()
            .map(|index| self.model.groups[*index].id)
            .collect();
        (0..self.model.groups.len())
            .rev()
            .find(|index| !used.contains(&self.model.groups[*index].id))
    }

    fn add(&mut self) -> Operation {
        let free: Vec<u64> = self
            .layout
            .window
            .clone()
            .filter(|id| !self.model.blocks.contains_key(id))
            .collect();
        let id = match free.is_empty() || self.random.one_in(6) {
            true => self.id(),
            false => self.random.pick(&free),
        };
        let mut bytes = self.bytes_of_blocks(id);
        match self.random.below(60) {
            0 => bytes = 1 << 63..(1 << 63) + self.profile().memory_block_size(),
            1 => bytes = u64::MAX - 4095..u64::MAX,
            2 => {
                let end = 1u64 << self.profile().physical_address_bits;
                bytes = end - self.profile().memory_block_size()
                    ..end + self.profile().memory_block_size();
            }
            _ => {}
        }
        let withheld = match self.random.below(3) {
            0 => {
                let mut range = self.pageblocks();
                range.start = range.start.max(bytes.start).min(bytes.end);
                range.end = range.end.clamp(range.start, bytes.end);
                range
            }
            _ => 0..0,
        };
        let target = match self.group() {
            Some(group) if self.random.one_in(2) => Target::Group(group),
            _ => Target::Node(self.nid()),
        };
        let owner = self.random.pick(&[
            Owner::PROBE,
            Owner::ACPI,
            Owner::driver(0),
            Owner::driver(0),
            Owner::driver(1),
        ]);
        let name = match self.random.below(30) {
            0 => "RAM",
            1 => "System RAM (",
            2 => "System RAM ()x",
            3..=13 => "System RAM (virtio_mem)",
            14..=16 => "System RAM (kmem)",
            _ => "System RAM",
        };
        Operation::Add(Add {
            start: bytes.start,
            size: if self.random.one_in(200) {
                u64::MAX
            } else {
                bytes.end - bytes.start
            },
            target,
            owner,
            name,
            merge: self.random.one_in(2),
            memmap: self.random.one_in(3),
            withheld,
        })
    }

    /// A run of pageblocks in a memory block, mostly: from one of them to all.
    fn pageblocks(&mut self) -> Range<u64> {
        let profile = self.profile();
        let (block, pageblock) = (profile.memory_block_size(), profile.pageblock_size());
        let id = match self.random.below(4) {
            0 => self.id(),
            1 => self.id_in(BlockState::Offline),
            _ => self.id_in(BlockState::Online),
        };
        let count = block / pageblock;
        let (first, length) = match self.random.below(4) {
            0 => (0, count),
            1 => (1, count - 1),
            _ => (self.random.below(count), self.random.within(1..4)),
        };
        let mut bytes = id * block + first * pageblock..id * block + (first + length) * pageblock;
        match self.random.below(40) {
            0 => bytes.start += profile.page_size(),
            1 => bytes.end -= profile.page_size(),
            _ => {}
        }
        if pageblock == profile.page_size() {
            bytes.start..bytes.end.max(bytes.start)
        } else {
            bytes
        }
    }

    /// An address in memory, often of a page in use.
    fn address(&mut self) -> u64 {
        let page = self.profile().page_size();
        if let Some(held) = self.held()
            && self.random.one_in(2)
            && let Some(pfn) = self.model.held[held].pfn
        {
            return pfn * page;
        }
        let block = self.profile().memory_block_size();
        let id = self.id_in(BlockState::Online);
        let within = match self.random.one_in(3) {
            true => {
                self.random.below(4) * self.profile().pageblock_size() + self.random.below(8) * page
            }
            false => self.random.below(block),
        };
        id * block + within.min(block - 1)
    }

    fn held(&mut self) -> Option<usize> {
        (!self.model.held.is_empty()).then(|| self.random.index(self.model.held.len()))
    }

    fn online_type(&mut self) -> OnlineType {
        self.random
            .pick(&[OnlineType::Online, OnlineType::Kernel, OnlineType::Movable])
    }

    fn write(&mut self) -> Operation {
        let (file, text): (String, String) = match self.random.below(24) {
            0..=11 => {
                let state = self.random.pick(&[
                    BlockState::Online,
                    BlockState::Offline,
                    BlockState::Offline,
                ]);
                let id = self.id_in(state);
                let (name, texts): (&str, &[&str]) = match self.random.below(10) {
                    0..=5 => (
                        "state",
                        &[
                            "online",
                            "online_kernel",
                            "online_movable",
                            "online_movable",
                            "offline",
                            "Online",
                            "",
                        ],
                    ),
                    6..=8 => ("online", &["1", "0", "on", "n", "2", ""]),
                    _ => ("valid_zones", &["Normal"]),
                };
                let newline = if self.random.one_in(3) { "\n" } else { "" };
                let text = self.random.pick(texts);
                (
                    format!("memory{id}/{name}"),
                    if text.is_empty() {
                        String::new()
                    } else {
                        format!("{text}{newline}")
                    },
                )
            }
            12 | 13 => {
                let texts = [
                    "offline",
                    "offline",
                    "online",
                    "online_kernel",
                    "online_movable",
                    "onlin",
                    "",
                ];
                ("auto_online_blocks".into(), self.random.pick(&texts).into())
            }
            14 => (
                "parameters/online_policy".into(),
                self.random
                    .pick(&["contig-zones", "auto-movable", "bogus"])
                    .into(),
            ),
            15 => {
                let texts = ["301", "100", "0", "1", "0x64", "-5", "abc", "4294967296"];
                (
                    "parameters/auto_movable_ratio".into(),
                    self.random.pick(&texts).into(),
                )
            }
            16 => (
                "parameters/auto_movable_numa_aware".into(),
                self.random.pick(&["Y", "N", "1", "x"]).into(),
            ),
            17..=19 => {
                let id = self.id();
                let offset = if self.random.one_in(8) {
                    self.profile().page_size()
                } else {
                    0
                };
                let address = id * self.profile().memory_block_size() + offset;
                ("probe".into(), format!("{address:#x}"))
            }
            20 | 21 => {
                let file = self
                    .random
                    .pick(&["hard_offline_page", "soft_offline_page"]);
                let address = self.address();
                (
                    file.into(),
                    if self.random.one_in(4) {
                        "here".into()
                    } else {
                        format!("{address:#x}")
                    },
                )
            }
            22 => {
                let files = [
                    "block_size_bytes",
                    "parameters/memmap_on_memory",
                    "parameters/none",
                    "nothing",
                    "memory/state",
                ];
                (self.random.pick(&files).into(), "1".into())
            }
            _ => {
                let id = self.id();
                let name = self
                    .random
                    .pick(&["phys_index", "removable", "node", "nothing"]);
                (format!("memory{id}/{name}"), "1".into())
            }
        };
        // Not a number, and not a file of a block.
        let file = if file == "memory/state" {
            "memory_/state".into()
        } else {
            file
        };
        Operation::Write(file, text)
    }

    fn device_range(&mut self) -> Range<u64> {
        let size = self.profile().sub_section_size();
        let block = self.profile().memory_block_size();
        let id = self.id();
        let subs = block / size;
        let first = id * subs + self.random.below(subs);
        let count = match self.random.one_in(4) {
            true => self.random.within(1..2 * subs),
            false => self.random.within(1..5),
        };
        let mut bytes = first * size..(first + count) * size;
        match self.random.below(30) {
            0 => bytes.start += self.profile().page_size(),
            1 => bytes.end = bytes.start,
            _ => {}
        }
        bytes
    }

    pub(crate) fn operation(&mut self) -> Operation {
        // Pages are given back before there are too many of them to look at each time.
        let crowded = self.model.held.len() > 600;
        if crowded && self.random.one_in(4) {
            let index = self.random.index(self.model.held.len());
            return Operation::Free(index, 200);
        }
        loop {
            if let Some(operation) = self.any_operation(crowded) {
                return operation;
            }
        }
    }

    fn any_operation(&mut self, crowded: bool) -> Option<Operation> {
        let isolations = self.model.isolations.len();
        Some(match self.random.below(200) {
            0..=19 => self.add(),
            20..=27 => {
                let id = self.id_in(BlockState::Offline);
                let bytes = self.bytes_of_blocks(id);
                Operation::Remove(self.owner(bytes.start), bytes)
            }
            28..=33 => {
                let id = self.id_in(BlockState::Online);
                let bytes = self.bytes_of_blocks(id);
                Operation::OfflineAndRemove(self.owner(bytes.start), bytes)
            }
            34 | 35 => {
                let id = self.id();
                let mut bytes = self.bytes_of_blocks(id);
                // Whole sub-sections, as the model knows no smaller parts.
                let size = self.profile().sub_section_size();
                bytes.end = bytes.end / size * size;
                bytes.start = bytes.start.div_ceil(size) * size;
                bytes.end = bytes.end.max(bytes.start);
                Operation::Adopt(self.random.pick(&[Owner::ACPI, Owner::driver(0)]), bytes)
            }
            36..=53 => {
                let id = self.id_in(BlockState::Offline);
                Operation::Online(id, self.online_type())
            }
            54..=57 => Operation::DeviceOnline(self.id_in(BlockState::Offline)),
            58..=60 => Operation::DeviceOffline(self.id_in(BlockState::Online)),
            61..=67 => Operation::Offline(self.id_in(BlockState::Online)),
            68..=87 => self.write(),
            88..=92 => Operation::Isolate(self.pageblocks()),
            93..=96 => Operation::IsolateBlock(self.id_in(BlockState::Online)),
            97..=105 if isolations > 0 => {
                let budget = self.random.pick(&[0, 1, 2, 5, 100, u32::MAX, u32::MAX]);
                Operation::Migrate(self.random.index(isolations), budget)
            }
            106..=110 if isolations > 0 => Operation::Commit(self.random.index(isolations)),
            111..=113 if isolations > 0 => Operation::Cancel(self.random.index(isolations)),
            97..=113 => return None,
            114..=122 => Operation::FakeOffline(self.pageblocks()),
            123..=129 => Operation::FakeOnline(self.pageblocks()),
            130..=142 if !crowded => {
                let pages = self.profile().pageblock_size() / self.profile().page_size();
                let count = match self.random.below(40) {
                    0 => (pages + 3).min(1000),
                    1..=4 => self.random.within(10..60),
                    _ => self.random.within(1..8),
                };
                let mobility = match self.random.below(8) {
                    0 => Mobility::Unmovable,
                    _ => Mobility::Movable,
                };
                Operation::Allocate(self.nid(), mobility, count as usize)
            }
            143..=150 => {
                let count = self.random.pick(&[1, 1, 2, 5, 20]);
                Operation::Free(self.held()?, count)
            }
            151..=154 => Operation::Pin(self.held()?),
            155..=162 => {
                let pinned: Vec<usize> = (0..self.model.held.len())
                    .filter(|index| self.model.held[*index].pins > 0)
                    .collect();
                match pinned.is_empty() || self.random.one_in(8) {
                    true => Operation::Unpin(self.held()?),
                    false => Operation::Unpin(self.random.pick(&pinned)),
                }
            }
            163..=166 => Operation::PinLongTerm(self.held()?),
            167 => Operation::UseFreedPage,
            168 if self.random.one_in(2) => Operation::HardOffline(self.address()),
            169 if self.random.one_in(2) => Operation::SoftOffline(self.address()),
            170..=177 => {
                let kinds = [
                    DeviceKind::FsDax,
                    DeviceKind::DevDax,
                    DeviceKind::PeerToPeer,
                    DeviceKind::Private,
                ];
                let (range, nid) = (self.device_range(), self.nid());
                Operation::AddDevice(range, nid, self.random.pick(&kinds))
            }
            178..=182 => {
                let known: Vec<_> = self
                    .model
                    .devices
                    .iter()
                    .map(|device| device.bytes.clone())
                    .collect();
                let range = match known.is_empty() || self.random.one_in(6) {
                    true => self.device_range(),
                    false => self.random.pick(&known),
                };
                Operation::RemoveDevice(range)
            }
            183..=186 if self.live_groups().len() < 4 => {
                let block = self.profile().memory_block_size() / self.profile().page_size();
                let nid = self.nid();
                match self.random.one_in(2) {
                    true => Operation::RegisterStatic(
                        nid,
                        self.random
                            .pick(&[0, block, 2 * block, 3 * block, 8 * block]),
                    ),
                    false => {
                        let units = [block, block, 2 * block, 4 * block, block / 2, block + 1, 0];
                        Operation::RegisterDynamic(nid, self.random.pick(&units))
                    }
                }
            }
            187..=189 => Operation::Unregister(self.group()?),
            190 | 191 if self.model.registered_notifiers().len() < 3 => {
                Operation::RegisterNotifier(self.random.pick(&[-1, 0, 0, 1, 10]))
            }
            192 => {
                let registered = self.model.registered_notifiers();
                if registered.is_empty() {
                    return None;
                }
                Operation::UnregisterNotifier(self.random.pick(&registered))
            }
            _ => return None,
        })
    }

    pub(crate) fn fault(&mut self) -> Option<Injected> {
        self.random.one_in(8).then(|| Injected {
            step: self.random.pick(&Step::ALL),
            skip: self.random.pick(&[0, 0, 0, 1, 2, 5]),
            error: self.random.pick(&INJECTED),
        })
    }

    pub(crate) fn veto(&mut self) -> Option<Veto> {
        let registered = self.model.registered_notifiers();
        let going = [MemoryAction::GoingOnline, MemoryAction::GoingOffline];
        let told = [
            MemoryAction::Online,
            MemoryAction::Offline,
            MemoryAction::CancelOnline,
            MemoryAction::CancelOffline,
        ];
        (!registered.is_empty() && self.random.one_in(6)).then(|| Veto {
            notifier: self.random.pick(&registered),
            action: if self.random.one_in(5) {
                self.random.pick(&told)
            } else {
                self.random.pick(&going)
            },
            error: self
                .random
                .pick(&[Error::Io, Error::Again, Error::NotPermitted]),
        })
    }
}

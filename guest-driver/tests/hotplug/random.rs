//! Random operations, checked after each one against a recount and a model of who holds what.

use proptest::prelude::*;
use virtio_mem_driver::hotplug::{
    AddMemory, BlockState, Error, Hotplug, Isolation, Mobility, OnlineType, Owner, PageHandle,
};

use crate::memory::{BLOCK, BLOCK_COUNT, HostMemory, PAGEBLOCK, SMALL, START, read, write};

#[derive(Clone, Debug)]
enum Operation {
    Add { block: u64, count: u64 },
    Remove { block: u64, count: u64 },
    Online { block: u64, withheld: u8 },
    Offline { block: u64 },
    FakeOffline { pageblock: u64, count: u64 },
    FakeOnline { pageblock: u64, count: u64 },
    Isolate { pageblock: u64, count: u64 },
    IsolateBlock { block: u64 },
    Migrate { pages: u32 },
    Commit,
    Cancel,
    Allocate { count: u8, unmovable: bool },
    Free { index: usize },
    Pin { index: usize },
    Unpin { index: usize },
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let block = || 0..BLOCK_COUNT;
    let pageblocks = || (0..BLOCK_COUNT * BLOCK / PAGEBLOCK, 1..4u64);
    prop_oneof![
        2 => (block(), 1..3u64).prop_map(|(block, count)| Add { block, count }),
        2 => (block(), 1..3u64).prop_map(|(block, count)| Remove { block, count }),
        4 => (block(), any::<u8>()).prop_map(|(block, withheld)| Online { block, withheld }),
        2 => block().prop_map(|block| Offline { block }),
        3 => pageblocks().prop_map(|(pageblock, count)| FakeOffline { pageblock, count }),
        3 => pageblocks().prop_map(|(pageblock, count)| FakeOnline { pageblock, count }),
        2 => pageblocks().prop_map(|(pageblock, count)| Isolate { pageblock, count }),
        1 => block().prop_map(|block| IsolateBlock { block }),
        4 => (0..9u32).prop_map(|pages| Migrate { pages }),
        2 => Just(Commit),
        1 => Just(Cancel),
        6 => (1..16u8, prop::bool::weighted(0.1))
            .prop_map(|(count, unmovable)| Allocate { count, unmovable }),
        8 => any::<usize>().prop_map(|index| Free { index }),
        3 => any::<usize>().prop_map(|index| Pin { index }),
        4 => any::<usize>().prop_map(|index| Unpin { index }),
    ]
}

/// A page somebody holds, with what was written into it.
#[derive(Clone, Copy)]
struct HeldPage {
    handle: PageHandle,
    tag: u64,
    pins: u32,
    unmovable: bool,
    address: u64,
}

struct Model {
    hotplug: Hotplug<HostMemory>,
    held: Vec<HeldPage>,
    isolations: Vec<Isolation>,
    next_tag: u64,
}

impl Model {
    fn apply(&mut self, operation: Operation) -> Result<(), Error> {
        let block_at = |block: u64| START / BLOCK + block;
        let hotplug = &mut self.hotplug;
        match operation {
            Operation::Add { block, count } => hotplug.add_memory(&AddMemory::new(
                START + block * BLOCK,
                count.min(BLOCK_COUNT - block) * BLOCK,
            )),
            Operation::Remove { block, count } => {
                hotplug.remove_memory(Owner::PROBE, START + block * BLOCK, count * BLOCK)
            }
            Operation::Online { block, withheld } => {
                for index in 0..BLOCK / PAGEBLOCK {
                    let start = START + block * BLOCK + index * PAGEBLOCK;
                    let _refused_unless_offline = match withheld & (1 << index) == 0 {
                        _ if hotplug.block_state(block_at(block)) != Some(BlockState::Offline) => {
                            Ok(())
                        }
                        true => hotplug.fake_online(start, PAGEBLOCK),
                        false => hotplug.fake_offline(start, PAGEBLOCK),
                    };
                }
                hotplug.online(block_at(block), OnlineType::Kernel)
            }
            Operation::Offline { block } => hotplug.offline(block_at(block)),
            Operation::FakeOffline { pageblock, count } => {
                hotplug.fake_offline(START + pageblock * PAGEBLOCK, count * PAGEBLOCK)
            }
            Operation::FakeOnline { pageblock, count } => {
                hotplug.fake_online(START + pageblock * PAGEBLOCK, count * PAGEBLOCK)
            }
            Operation::Isolate { pageblock, count } => {
                let start = START + pageblock * PAGEBLOCK;
                self.isolations
                    .push(hotplug.isolate(start, count * PAGEBLOCK)?);
                Ok(())
            }
            Operation::IsolateBlock { block } => {
                self.isolations
                    .push(hotplug.isolate_block(block_at(block))?);
                Ok(())
            }
            Operation::Migrate { pages } => match self.isolations.last_mut() {
                Some(isolation) => {
                    let result = hotplug.migrate(isolation, pages).map(|_| ());
                    if result == Err(Error::Busy) {
                        hotplug.cancel(self.isolations.pop().unwrap());
                    }
                    result
                }
                None => Ok(()),
            },
            Operation::Commit => match self.isolations.pop() {
                Some(isolation) => hotplug.commit(isolation),
                None => Ok(()),
            },
            Operation::Cancel => {
                if let Some(isolation) = self.isolations.pop() {
                    hotplug.cancel(isolation);
                }
                Ok(())
            }
            Operation::Allocate { count, unmovable } => {
                for _ in 0..count {
                    let mobility = match unmovable {
                        true => Mobility::Unmovable,
                        false => Mobility::Movable,
                    };
                    let handle = self.hotplug.allocate(mobility)?;
                    write(&mut self.hotplug, handle, self.next_tag);
                    self.held.push(HeldPage {
                        handle,
                        tag: self.next_tag,
                        pins: 0,
                        unmovable,
                        address: self.hotplug.address(handle)?,
                    });
                    self.next_tag += 1;
                }
                Ok(())
            }
            Operation::Free { index } => {
                let Some(index) = index.checked_rem(self.held.len()) else {
                    return Ok(());
                };
                let page = self.held[index];
                assert_eq!(read(&mut self.hotplug, page.handle), page.tag);
                let result = self.hotplug.free(page.handle);
                assert_eq!(result == Err(Error::Busy), page.pins > 0);
                if result.is_ok() {
                    self.held.swap_remove(index);
                    assert_eq!(self.hotplug.free(page.handle), Err(Error::Invalid));
                }
                result
            }
            Operation::Pin { index } => {
                let Some(index) = index.checked_rem(self.held.len()) else {
                    return Ok(());
                };
                let page = &mut self.held[index];
                hotplug.pin(page.handle)?;
                page.pins += 1;
                page.address = hotplug.address(page.handle)?;
                Ok(())
            }
            Operation::Unpin { index } => {
                let pinned: Vec<_> = (0..self.held.len())
                    .filter(|i| self.held[*i].pins > 0)
                    .collect();
                let Some(index) = index.checked_rem(pinned.len()) else {
                    return Ok(());
                };
                let page = &mut self.held[pinned[index]];
                page.pins -= 1;
                hotplug.unpin(page.handle)
            }
        }
    }

    /// Every page is where it may be, and holds what was written.
    fn check(&mut self) {
        self.hotplug.check_invariants().unwrap();
        for page in &self.held {
            assert_eq!(read(&mut self.hotplug, page.handle), page.tag);
            if page.pins > 0 || page.unmovable {
                assert_eq!(self.hotplug.address(page.handle), Ok(page.address));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn no_page_is_lost_and_refusals_change_nothing(
        operations in prop::collection::vec(operation(), 1..120),
    ) {
        let mut model = Model {
            hotplug: Hotplug::new(SMALL, HostMemory::new()).unwrap(),
            held: Vec::new(),
            isolations: Vec::new(),
            next_tag: 1,
        };
        // Something to begin with, or little would succeed.
        model.hotplug.add_memory(&AddMemory::new(START, 2 * BLOCK)).unwrap();
        model.hotplug.online(START / BLOCK, OnlineType::Kernel).unwrap();
        for operation in operations {
            let counts = model.hotplug.counts();
            let blocks: Vec<_> = model.hotplug.blocks().collect();
            let may_do_part = matches!(
                operation,
                Operation::Allocate { .. } | Operation::Migrate { .. } | Operation::Commit
            );
            if model.apply(operation).is_err() && !may_do_part {
                prop_assert_eq!(model.hotplug.counts(), counts);
                prop_assert_eq!(model.hotplug.blocks().collect::<Vec<_>>(), blocks);
            }
            model.check();
        }
    }
}

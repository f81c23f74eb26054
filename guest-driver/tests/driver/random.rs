//! Random targets, users of memory and refusals: nothing is lost, nothing unplugged is touched, and at the end
//! everything is given back.

use proptest::prelude::*;
use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{self, Policy, Progress};
use virtio_mem_driver::hotplug::{Error, Fault, Mobility, OnlineType, PageHandle, Step};
use virtio_mem_wire::Answer;

use crate::support::device::{Device, Misbehave};
use crate::support::{GIB, MIB, Rig, tagged};

const REGION: u64 = 512 * MIB;

#[derive(Clone, Debug)]
enum Operation {
    Request {
        blocks: u64,
    },
    Busy {
        times: usize,
    },
    Steps {
        count: usize,
    },
    Rest,
    Allocate {
        count: usize,
        unmovable: bool,
    },
    Free {
        count: usize,
        seed: usize,
    },
    Pin {
        index: usize,
    },
    Unpin {
        index: usize,
    },
    /// User space.
    Online {
        block: u64,
        kernel: bool,
    },
    Offline {
        block: u64,
    },
    /// A step of the hotplug core fails.
    Fault {
        step: usize,
        skip: u32,
    },
    /// Direct only: what it recovers from.
    Error,
    NeedsReset,
    ProbeAgain,
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let index = any::<usize>;
    prop_oneof![
        6 => (0..=REGION / MIB).prop_map(|blocks| Request { blocks }),
        2 => (1..4usize).prop_map(|times| Busy { times }),
        6 => (1..40usize).prop_map(|count| Steps { count }),
        4 => Just(Rest),
        4 => (1..600usize, prop::bool::weighted(0.05))
            .prop_map(|(count, unmovable)| Allocate { count: if unmovable { 1 } else { count }, unmovable }),
        4 => (1..600usize, index()).prop_map(|(count, seed)| Free { count, seed }),
        1 => index().prop_map(|index| Pin { index }),
        2 => index().prop_map(|index| Unpin { index }),
        1 => (32..37u64, any::<bool>()).prop_map(|(block, kernel)| Online { block, kernel }),
        1 => (32..37u64).prop_map(|block| Offline { block }),
        1 => (0..Step::ALL.len(), 0..5u32).prop_map(|(step, skip)| Fault { step, skip }),
        1 => Just(Error),
        1 => Just(NeedsReset),
        1 => Just(ProbeAgain),
    ]
}

struct HeldPage {
    handle: PageHandle,
    tag: u64,
    pins: u32,
}

struct World {
    rig: Rig,
    direct: bool,
    held: Vec<HeldPage>,
    next_tag: u64,
}

impl World {
    fn apply(&mut self, operation: Operation) {
        let rig = &mut self.rig;
        match operation {
            Operation::Request { blocks } => rig.device.request(blocks * MIB),
            Operation::Busy { times } => {
                let busy = std::iter::repeat_n(Misbehave::Answer(Answer::Busy), times);
                rig.device.state().misbehave.extend(busy);
            }
            Operation::Steps { count } => {
                for _ in 0..count {
                    let progress = rig.step();
                    assert!(!matches!(progress, Progress::Failed(_)), "{progress:?}");
                }
            }
            Operation::Rest => self.rest(),
            Operation::Online { block, kernel } => {
                let online_type = match kernel {
                    true => OnlineType::Kernel,
                    false => OnlineType::Movable,
                };
                let _refused_or_not = rig.hotplug.online(block, online_type);
            }
            Operation::Offline { block } => {
                let _refused_or_not = rig.hotplug.offline(block);
            }
            Operation::Fault { step, skip } => {
                let step = Step::ALL[step];
                let error = match step {
                    Step::Isolate | Step::Commit | Step::PrepareOnline => Error::Busy,
                    _ => Error::NoMemory,
                };
                rig.hotplug.inject(Fault { step, skip, error });
            }
            Operation::Error | Operation::NeedsReset | Operation::ProbeAgain if !self.direct => {}
            Operation::Error => {
                // Once, until the driver has got somewhere.
                self.rest();
                self.forget_errors();
                if self.rig.driver.unreachable().is_none() {
                    let error = Misbehave::Answer(Answer::Error);
                    self.rig.device.state().misbehave.push_back(error);
                }
            }
            Operation::NeedsReset => {
                self.rest();
                self.forget_errors();
                let mut state = self.rig.device.state();
                state.status |= DeviceStatus::DEVICE_NEEDS_RESET;
                state.change_config();
            }
            Operation::ProbeAgain => {
                self.forget_errors();
                let spare = Rig::new(2 * MIB);
                let Rig {
                    device,
                    driver,
                    mut hotplug,
                    now_ms,
                    ..
                } = std::mem::replace(&mut self.rig, spare);
                let policy = *driver.policy();
                driver.remove(&mut hotplug);
                self.rig = Rig::again(device, hotplug, policy, now_ms).unwrap();
            }
            Operation::Allocate { count, unmovable } => {
                let mobility = match unmovable {
                    true => Mobility::Unmovable,
                    false => Mobility::Movable,
                };
                for _ in 0..count {
                    let Ok(handle) = rig.hotplug.allocate(mobility) else {
                        break;
                    };
                    let tag = self.next_tag;
                    self.next_tag += 1;
                    tagged::write(&mut rig.hotplug, handle, tag);
                    let pins = 0;
                    self.held.push(HeldPage { handle, tag, pins });
                }
            }
            Operation::Free { count, seed } => {
                for step in 0..count {
                    let Some(index) = (seed.wrapping_add(step * 7)).checked_rem(self.held.len())
                    else {
                        break;
                    };
                    if self.held[index].pins == 0 {
                        let page = self.held.swap_remove(index);
                        assert_eq!(tagged::read(&mut rig.hotplug, page.handle), page.tag);
                        rig.hotplug.free(page.handle).unwrap();
                    }
                }
            }
            Operation::Pin { index } => {
                if let Some(index) = index.checked_rem(self.held.len()) {
                    rig.hotplug.pin(self.held[index].handle).unwrap();
                    self.held[index].pins += 1;
                }
            }
            Operation::Unpin { index } => {
                let pinned: Vec<_> = (0..self.held.len())
                    .filter(|index| self.held[*index].pins > 0)
                    .collect();
                if let Some(index) = index.checked_rem(pinned.len()) {
                    rig.hotplug.unpin(self.held[pinned[index]].handle).unwrap();
                    self.held[pinned[index]].pins -= 1;
                }
            }
        }
    }

    /// Two errors in a row are one too many.
    fn forget_errors(&self) {
        let mut state = self.rig.device.state();
        let busy = |how: &Misbehave| !matches!(how, Misbehave::Answer(Answer::Error));
        state.misbehave.retain(busy);
    }

    /// Lets the driver get as far as it can: to its target, or until it has tried in vain for longer than it
    /// waits for memory to move pages to.
    fn rest(&mut self) {
        const TRIES_IN_VAIN: usize = 8;
        let mut plugged_before = None;
        let mut in_vain = 0;
        // Each refusal of the device takes a try, and each range that cannot be emptied may take several.
        for _ in 0..1000 {
            let refusals = self.rig.device.state().misbehave.len();
            let progress = self.rig.run();
            let refused = self.rig.device.state().misbehave.len() < refusals;
            assert!(!matches!(progress, Progress::Failed(_)), "{progress:?}");
            self.rig.hotplug.check_invariants().unwrap();
            match progress {
                Progress::Settled => {
                    self.rig.check();
                    return;
                }
                Progress::Stalled {
                    retry_at_ms: Some(at),
                    ..
                } => self.rig.now_ms = at,
                // Until something changes.
                Progress::Stalled { .. } => return,
                other => panic!("{other:?}"),
            }
            let plugged = self.rig.driver.plugged_size();
            let same = plugged_before.replace(plugged) == Some(plugged);
            in_vain = if same && !refused { in_vain + 1 } else { 0 };
            if in_vain == TRIES_IN_VAIN {
                return;
            }
        }
        panic!("the driver makes no progress");
    }

    fn check(&mut self) {
        self.rig.hotplug.check_invariants().unwrap();
        for page in &self.held {
            assert_eq!(tagged::read(&mut self.rig.hotplug, page.handle), page.tag);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn memory_follows_the_target_and_nobody_loses_a_page(
        operations in prop::collection::vec(operation(), 1..60),
        offset_mib in prop_oneof![Just(0u64), Just(64), Just(3)],
        stay_offline in prop::bool::weighted(0.1),
        linux in any::<bool>(),
        big_blocks in prop::bool::weighted(0.3),
    ) {
        let policy = Policy {
            auto_online: (!stay_offline).then_some(OnlineType::Movable),
            strategy: if linux { driver::Strategy::Linux } else { driver::Strategy::Direct },
            force_bbm: big_blocks,
            ..Policy::default()
        };
        let device = Device::new(4 * GIB + offset_mib * MIB, REGION, MIB);
        let mut world = World { rig: Rig::on(device, policy), direct: !linux, held: Vec::new(), next_tag: 1 };
        for operation in operations {
            world.apply(operation);
            world.check();
        }
        for page in std::mem::take(&mut world.held) {
            for _ in 0..page.pins {
                world.rig.hotplug.unpin(page.handle).unwrap();
            }
            world.rig.hotplug.free(page.handle).unwrap();
        }
        world.rig.hotplug.clear_faults();
        world.rig.device.request(0);
        world.rest();
        prop_assert_eq!(world.rig.driver.plugged_size(), 0);
        prop_assert_eq!(world.rig.hotplug.blocks().count(), 0);
    }
}

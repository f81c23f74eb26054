//! The strategies and modes every rule is tested under, and how a run ends.

use virtio_drivers::transport::DeviceStatus;
use virtio_mem_driver::driver::{Failure, Mode, Policy, Progress, Stall, Strategy};
use virtio_mem_driver::hotplug::PageHandle;
use virtio_mem_wire::Field;

use crate::support::device::Device;
use crate::support::{GIB, LINUX, MIB, Rig};

/// Timed waits that are sat out before a run counts as stalled.
pub(crate) const WAITS: usize = 12;

/// Far more steps than any run of these tests takes; fewer than a driver that loops.
const POLLS: u64 = 5000;

/// A memory block of x86-64, and a big block.
pub(crate) const UNIT: u64 = 128 * MIB;

/// The 64-bit fields of the configuration space.
pub(crate) const FIELDS: [Field; 6] = [
    Field::BlockSize,
    Field::Addr,
    Field::RegionSize,
    Field::UsableRegionSize,
    Field::PluggedSize,
    Field::RequestedSize,
];

/// A strategy and a mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) strategy: Strategy,
    pub(crate) mode: Mode,
}

pub(crate) const SETUPS: [Setup; 4] = [
    Setup::new(Strategy::Linux, Mode::SubBlock),
    Setup::new(Strategy::Linux, Mode::BigBlock),
    Setup::new(Strategy::Direct, Mode::SubBlock),
    Setup::new(Strategy::Direct, Mode::BigBlock),
];

impl Setup {
    const fn new(strategy: Strategy, mode: Mode) -> Self {
        Self { strategy, mode }
    }

    pub(crate) fn is_linux(self) -> bool {
        self.strategy == Strategy::Linux
    }

    pub(crate) fn policy(self) -> Policy {
        let policy = match self.strategy {
            Strategy::Linux => LINUX,
            Strategy::Direct => Policy::default(),
        };
        Policy {
            force_bbm: self.mode == Mode::BigBlock,
            ..policy
        }
    }

    /// A driver of a device of 1 GiB in blocks of 2 MiB that a test has prepared.
    pub(crate) fn prepared(self, prepare: impl FnOnce(&Device)) -> Rig {
        let device = Device::new(4 * GIB, GIB, 2 * MIB);
        prepare(&device);
        let rig = Rig::on(device, self.policy());
        assert_eq!(rig.driver.mode(), self.mode);
        rig
    }

    pub(crate) fn rig(self) -> Rig {
        self.prepared(|_| {})
    }

    /// The same with so much plugged.
    pub(crate) fn with_plugged(self, size: u64) -> Rig {
        let mut rig = self.rig();
        rig.resize(size);
        rig.device.state().take_requests();
        rig
    }
}

/// How a run has ended, and what held it up on the way.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) stalls: Vec<Stall>,
    pub(crate) last: Progress,
}

impl Run {
    /// What has ended the driver: the device has been told, and nothing moves any more.
    #[track_caller]
    pub(crate) fn failure(&self, rig: &mut Rig) -> Failure {
        let Progress::Failed(failure) = self.last else {
            panic!("the driver goes on: {self:?}");
        };
        assert!(rig.device.state().status.contains(DeviceStatus::FAILED));
        let sent = rig.driver.counters().total_requests();
        rig.device.request(UNIT);
        rig.now_ms += 1_000_000;
        assert_eq!(rig.run(), Progress::Failed(failure));
        assert_eq!(rig.driver.counters().total_requests(), sent);
        assert_eq!(rig.driver.deadline_ms(), None);
        failure
    }

    #[track_caller]
    pub(crate) fn settled(&self, rig: &Rig) {
        assert_eq!(self.last, Progress::Settled, "{self:?}");
        rig.check();
    }
}

/// Runs the driver through its waits, a number of times; in a number of steps.
#[track_caller]
pub(crate) fn run(rig: &mut Rig) -> Run {
    let before = rig.polls;
    let mut stalls = Vec::new();
    let mut silences = 0;
    let last = loop {
        match rig.run() {
            Progress::Stalled {
                reason,
                retry_at_ms: Some(at),
            } if stalls.len() < WAITS => {
                assert!(at > rig.now_ms, "a wait of no time");
                stalls.push(reason);
                rig.now_ms = at;
            }
            Progress::AwaitingDevice if silences < WAITS => {
                silences += 1;
                rig.now_ms = rig.driver.deadline_ms().expect("waits for ever");
            }
            last => break last,
        }
    };
    let polls = rig.polls - before;
    assert!(polls <= POLLS, "{polls} steps");
    rig.hotplug.check_invariants().unwrap();
    Run { stalls, last }
}

/// Grows and shrinks with `pages` in use, then to nothing: the driver is in order.
#[track_caller]
pub(crate) fn works(rig: &mut Rig, pages: &[PageHandle]) {
    for size in [3 * UNIT, UNIT, 2 * UNIT] {
        rig.device.request(size);
        run(rig).settled(rig);
        assert_eq!(rig.driver.plugged_size(), size);
        assert_eq!(rig.hotplug.counts().managed, size / 4096);
    }
    rig.verify(pages);
    for page in pages {
        rig.hotplug.free(*page).unwrap();
    }
    rig.device.request(0);
    run(rig).settled(rig);
    assert_eq!(rig.driver.plugged_size(), 0);
    assert_eq!(rig.hotplug.blocks().count(), 0);
}

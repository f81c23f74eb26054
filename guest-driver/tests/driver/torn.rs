//! H-2: big blocks of more than 65,535 device blocks take several requests, any of which may be refused.

use virtio_mem_driver::driver::{Policy, Progress};
use virtio_mem_driver::hotplug::Mobility;
use virtio_mem_wire::Answer;

use crate::support::device::{Device, Misbehave};
use crate::support::{GIB, LINUX, MIB, Rig};

/// Big blocks of 512 MiB on a device with blocks of 4 KiB: 131,072 of them in each.
fn rig(policy: Policy) -> Rig {
    let policy = Policy {
        force_bbm: true,
        bbm_block_size: 512 * MIB,
        ..policy
    };
    Rig::on(Device::new(4 * GIB, GIB, 4096), policy)
}

fn run_through_waits(rig: &mut Rig) {
    while let Progress::Stalled {
        retry_at_ms: Some(at),
        ..
    } = rig.run()
    {
        rig.check();
        rig.now_ms = at;
    }
    rig.check();
}

#[test]
fn h_02_big_block_is_plugged_and_unplugged_in_pieces() {
    for policy in [LINUX, Policy::default()] {
        let mut rig = rig(policy);
        rig.resize(GIB);
        let requests = rig.device.state().take_requests();
        assert_eq!(requests.len(), 6);
        let pages = rig.allocate(100, Mobility::Movable);
        rig.resize(512 * MIB);
        assert_eq!(rig.device.state().take_requests().len(), 3);
        assert_eq!(rig.hotplug.counts().managed, 512 * MIB / 4096);
        rig.verify(&pages);
    }
}

#[test]
fn h_02_pieces_that_are_refused_follow_later() {
    for policy in [LINUX, Policy::default()] {
        for good in 0..3 {
            let mut rig = rig(policy);
            for size in [512 * MIB, 0] {
                rig.device.request(size);
                let done = |rig: &Rig| rig.device.state().requests.len();
                let before = done(&rig);
                // One request may be all there is: UNPLUG ALL.
                while done(&rig) < before + good && rig.step() != Progress::Settled {}
                let busy = Misbehave::Answer(Answer::Busy);
                rig.device.state().misbehave.push_back(busy);
                run_through_waits(&mut rig);
                rig.device.state().misbehave.clear();
                assert_eq!(rig.driver.plugged_size(), size, "{good}");
                assert_eq!(rig.hotplug.counts().managed, size / 4096);
            }
            assert_eq!(rig.hotplug.blocks().count(), 0);
        }
    }
}

#[test]
fn h_02_big_block_that_is_not_wanted_any_more_is_taken_back() {
    for policy in [LINUX, Policy::default()] {
        let mut rig = rig(policy);
        rig.resize(512 * MIB);
        rig.device.request(GIB);
        rig.device.state().hold = true;
        assert_eq!(rig.run(), Progress::AwaitingDevice);
        rig.device.answer();
        rig.device.request(512 * MIB);
        rig.device.state().hold = false;
        run_through_waits(&mut rig);
        assert_eq!(rig.driver.plugged_size(), 512 * MIB);
        assert_eq!(rig.hotplug.blocks().count(), 4);
    }
}

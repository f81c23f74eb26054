//! A device that follows no rule for a while, at random: the driver ends somewhere, in a bounded number of steps, and
//! touches nothing that is not plugged; and unless it has given up, it is in order as soon as the device is.

use proptest::prelude::*;
use virtio_mem_driver::driver::Progress;
use virtio_mem_driver::hotplug::Mobility;
use virtio_mem_wire::{Answer, Field};

use crate::answers::answer;
use crate::setup::{FIELDS, SETUPS, UNIT, run, works};
use crate::support::device::{Device, Misbehave};
use crate::support::tagged;

#[derive(Clone, Debug)]
enum Trick {
    Answer(Misbehave),
    /// A register, for a while.
    Forge(Field, u64),
    Truth,
    Target(u64),
    /// A restless configuration for so many reads.
    Restless(u32),
    NeedsReset,
    SlowReset(u32),
    Interrupt,
    Steps(usize),
    /// Time goes by.
    Wait(u64),
    Allocate(usize),
}

/// An ACK that is a lie cannot be told from one that is not, so there is none.
const ANSWERS: [Answer; 3] = [Answer::Nack, Answer::Busy, Answer::Error];

fn misbehaviour() -> impl Strategy<Value = Misbehave> {
    prop_oneof![
        4 => prop::sample::select(&ANSWERS).prop_map(Misbehave::Answer),
        2 => (1..=u16::MAX, any::<u16>(), any::<u32>())
            .prop_map(|(answer_type, state, len)| Misbehave::Raw(answer(answer_type, state), len)),
        1 => (0..4u16, 0..4u16, 0..8u32)
            .prop_map(|(answer_type, state, len)| Misbehave::Raw(answer(answer_type, state), len)),
        1 => (0..12u32).prop_map(Misbehave::Length),
        1 => Just(Misbehave::WrongBuffer),
        1 => (0..20u32).prop_map(Misbehave::UsedId),
        1 => Just(Misbehave::Twice),
        1 => any::<u16>().prop_map(Misbehave::Ahead),
        1 => any::<bool>().prop_map(|done| Misbehave::Lost { done }),
        1 => any::<bool>().prop_map(|done| Misbehave::NeedsReset { done }),
    ]
}

fn trick() -> impl Strategy<Value = Trick> {
    let value = prop_oneof![
        any::<u64>(),
        (0..10u64).prop_map(|units| units * UNIT),
        Just(0)
    ];
    prop_oneof![
        6 => misbehaviour().prop_map(Trick::Answer),
        1 => (prop::sample::select(&FIELDS), value).prop_map(|(field, value)| Trick::Forge(field, value)),
        2 => Just(Trick::Truth),
        6 => (0..=8u64).prop_map(|units| Trick::Target(units * UNIT)),
        1 => (1..100u32).prop_map(Trick::Restless),
        1 => Just(Trick::NeedsReset),
        1 => (0..10u32).prop_map(Trick::SlowReset),
        1 => Just(Trick::Interrupt),
        8 => (1..60usize).prop_map(Trick::Steps),
        3 => (0..100_000u64).prop_map(Trick::Wait),
        2 => (1..200usize).prop_map(Trick::Allocate),
    ]
}

fn restless(device: &Device, mut reads: u32) {
    device.state().on_config_read = Some(Box::new(move |state, _| {
        if reads > 0 {
            reads -= 1;
            state.generation += 1;
        }
    }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn driver_survives_a_device_that_follows_no_rule(
        tricks in prop::collection::vec(trick(), 1..40),
        setup in prop::sample::select(&SETUPS),
    ) {
        let mut rig = setup.with_plugged(2 * UNIT);
        let mut pages = rig.allocate(50, Mobility::Movable);
        for trick in tricks {
            match trick {
                Trick::Answer(misbehave) => rig.device.state().misbehave.push_back(misbehave),
                Trick::Forge(field, value) => {
                    let mut state = rig.device.state();
                    state.forged.push((field.offset(), value));
                    state.change_config();
                }
                Trick::Truth => rig.device.state().forged.clear(),
                Trick::Target(size) => rig.device.request(size),
                Trick::Restless(reads) => restless(&rig.device, reads),
                Trick::NeedsReset => rig.device.state().need_reset(),
                Trick::SlowReset(reads) => rig.device.state().reset_reads = reads,
                Trick::Interrupt => rig.driver.on_interrupt(),
                Trick::Steps(count) => {
                    for _ in 0..count {
                        rig.device.scribble();
                        rig.step();
                    }
                }
                Trick::Wait(ms) => rig.now_ms += ms,
                Trick::Allocate(count) => {
                    for _ in 0..count {
                        let Ok(page) = rig.hotplug.allocate(Mobility::Movable) else {
                            break;
                        };
                        tagged::write(&mut rig.hotplug, page, pages.len() as u64);
                        pages.push(page);
                    }
                }
            }
            rig.hotplug.check_invariants().unwrap();
        }
        {
            let mut state = rig.device.state();
            state.misbehave.clear();
            state.forged.clear();
            state.on_config_read = None;
            state.change_config();
        }
        let ended = run(&mut rig);
        match ended.last {
            Progress::Failed(_) => {
                ended.failure(&mut rig);
                rig.verify(&pages);
            }
            _ => works(&mut rig, &pages),
        }
    }
}

//! Answers: G-17 … G-21, and every answer to every request that there can be.
//!
//! ```text
//!              ACK    BUSY        NACK                ERROR, unknown, too short, wrong buffer, reset, silence
//!  PLUG        done   again (wait)  look, again (wait)  Linux: the end; Direct: STATE scan, and again, once
//!  UNPLUG      done   again (wait)  as ERROR            (three times after a reset)
//!  UNPLUG ALL  done   again (wait)  as ERROR
//!  STATE       state  again (wait)  as ERROR
//! ```

use virtio_mem_driver::driver::{DumpView, Failure, Mode, Progress, Stall, Strategy};
use virtio_mem_driver::hotplug::{Mobility, PageHandle};
use virtio_mem_wire::{Answer, BlockRange, RequestKind, ResponseError};

use crate::setup::{Run, SETUPS, Setup, UNIT, WAITS, run, works};
use crate::support::device::{Device, FakeTransport, Misbehave};
use crate::support::dma::FakeHal;
use crate::support::{GIB, MIB, Rig};

const KINDS: [RequestKind; 4] = [
    RequestKind::Plug,
    RequestKind::Unplug,
    RequestKind::UnplugAll,
    RequestKind::State,
];

/// A driver whose next request is of a kind, and what it is on the way to.
struct Scene {
    rig: Rig,
    target: u64,
    /// Allocated, with tags in them.
    pages: Vec<PageHandle>,
}

/// `None` under the strategy that never sends such a request.
fn scene(setup: Setup, kind: RequestKind) -> Option<Scene> {
    let leftovers = |device: &Device| {
        let mut state = device.state();
        let range = BlockRange {
            first: 64,
            count: 128,
        };
        state.plugged.insert(range);
        state.config.mutable.plugged_size = 2 * UNIT;
    };
    let (mut rig, target) = match (kind, setup.is_linux()) {
        (RequestKind::Plug, _) => (setup.with_plugged(UNIT), 3 * UNIT),
        (RequestKind::Unplug, _) => (setup.with_plugged(3 * UNIT), UNIT),
        (RequestKind::UnplugAll, true) => (setup.prepared(leftovers), UNIT),
        (RequestKind::UnplugAll, false) => (setup.with_plugged(3 * UNIT), 0),
        (RequestKind::State, true) => return None,
        (RequestKind::State, false) => (setup.prepared(leftovers), 2 * UNIT),
    };
    let in_use = matches!(kind, RequestKind::Plug | RequestKind::Unplug);
    let pages = rig.allocate(if in_use { 100 } else { 0 }, Mobility::Movable);
    rig.device.request(target);
    Some(Scene { rig, target, pages })
}

/// Each setup with each kind of request it sends.
fn scenes() -> impl Iterator<Item = (Setup, RequestKind)> {
    let all = SETUPS.into_iter();
    let all = all.flat_map(|setup| KINDS.map(|kind| (setup, kind)));
    all.filter(|(setup, kind)| *kind != RequestKind::State || !setup.is_linux())
}

impl Scene {
    /// Lets the device misbehave in these ways first.
    fn answered(mut self, answers: impl IntoIterator<Item = Misbehave>) -> (Self, Run) {
        self.rig.device.state().misbehave.extend(answers);
        let ended = run(&mut self.rig);
        (self, ended)
    }

    /// It has got there, with all pages as they were, and goes on as ever.
    #[track_caller]
    fn arrived(&mut self, ended: &Run) {
        ended.settled(&self.rig);
        assert_eq!(self.rig.driver.plugged_size(), self.target);
        assert_eq!(self.rig.hotplug.counts().managed, self.target / 4096);
        works(&mut self.rig, &self.pages);
    }

    fn states_asked(&self) -> u64 {
        self.rig.driver.counters().requests(RequestKind::State)
    }
}

/// An answer of a type, all bytes there, the state as given.
pub(crate) fn answer(answer_type: u16, state: u16) -> Vec<u8> {
    let [low, high] = answer_type.to_le_bytes();
    let [state_low, state_high] = state.to_le_bytes();
    vec![low, high, 0x5a, 0xa5, 0xff, 0, 1, 2, state_low, state_high]
}

// ---- G-17 … G-20: what of an answer counts ----

/// The requests a scene takes, with all that is to be ignored full of junk, and the used length as given.
fn requests(setup: Setup, kind: RequestKind, junk: u8, len: u32) -> Vec<(String, u64, u64)> {
    let Some(scene) = scene(setup, kind) else {
        return Vec::new();
    };
    scene.rig.device.state().junk = junk;
    scene.rig.device.state().take_requests();
    // As many as it takes.
    let (mut scene, ended) = scene.answered((0..40).map(|_| Misbehave::Length(len)));
    let requests = scene.rig.device.state().take_requests();
    assert!(requests.iter().any(|request| request.0 == kind.name()));
    scene.rig.device.state().misbehave.clear();
    scene.arrived(&ended);
    requests
}

/// V-14: a used length beyond the buffer is cut, and one that covers the type is enough.
fn only_the_type_counts(kind: RequestKind, lens: &[u32]) {
    for setup in SETUPS {
        let plain = requests(setup, kind, 0, 10);
        for junk in [0, 1, 2, 3, 0x7f, 0xff] {
            for len in lens {
                assert_eq!(requests(setup, kind, junk, *len), plain, "{junk} {len}");
            }
        }
    }
}

const ENOUGH: [u32; 5] = [8, 9, 10, 11, u32::MAX];

#[test]
fn g_17_only_the_type_of_an_answer_to_plug_counts() {
    only_the_type_counts(RequestKind::Plug, &ENOUGH);
}

#[test]
fn g_18_only_the_type_of_an_answer_to_unplug_counts() {
    only_the_type_counts(RequestKind::Unplug, &ENOUGH);
}

#[test]
fn g_19_only_the_type_of_an_answer_to_unplug_all_counts() {
    only_the_type_counts(RequestKind::UnplugAll, &ENOUGH);
}

#[test]
fn g_20_only_type_and_state_of_an_answer_to_state_count() {
    only_the_type_counts(RequestKind::State, &[10, 11, u32::MAX]);
}

/// The state fields say the opposite of what is the case.
#[test]
fn g_21_state_is_ignored_unless_acknowledged() {
    for (setup, kind) in scenes().filter(|(_, kind)| *kind == RequestKind::State) {
        for answer_type in [1, 2, 3, 4, 9, 0xffff] {
            for state in [0, 1, 2, 3, 0xffff] {
                let wrong = Misbehave::Raw(answer(answer_type, state), 10);
                let (mut scene, ended) = scene(setup, kind).unwrap().answered([wrong]);
                let waits = usize::from(answer_type == Answer::Busy as u16);
                assert_eq!(ended.stalls, vec![Stall::DeviceBusy; waits]);
                // `arrived` compares the maps of both.
                scene.arrived(&ended);
            }
        }
    }
    // Nor by the view of a crash dump.
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    device.state().config.mutable.plugged_size = UNIT;
    let mut view = DumpView::<FakeHal, _>::probe(FakeTransport(device.clone())).unwrap();
    for (block, answer_type) in (0..).zip([1, 2, 3, 4, 9, 0xffff]) {
        let wrong = Misbehave::Raw(answer(answer_type, 0), 10);
        device.state().misbehave.push_back(wrong);
        assert!(!view.is_ram(4 * GIB + block * 2 * MIB, || true));
        assert!(device.state().misbehave.is_empty());
    }
}

// ---- every answer to every request ----

/// Answers of which nothing can be believed, with what Linux's strategy makes of them.
pub(crate) fn unbelievable(kind: RequestKind) -> Vec<(Misbehave, ResponseError)> {
    let unknown = [4, 5, 0x100, 0x8000, 0xffff].map(|answer_type| {
        let raw = Misbehave::Raw(answer(answer_type, 0), 10);
        (raw, ResponseError::UnknownType(answer_type))
    });
    let state = kind == RequestKind::State;
    let lens: &[u32] = if state {
        &[0, 1, 2, 7, 8, 9]
    } else {
        &[0, 1, 2, 7]
    };
    // ACK, PLUGGED: what is beyond the length is the device's secret.
    let short = lens.iter().map(|len| {
        let have = *len as usize;
        let need = if have < 8 { 8 } else { 10 };
        let raw = Misbehave::Raw(answer(0, 0), *len);
        (raw, ResponseError::TooShort { have, need })
    });
    let states = [3, 0x100, 0xffff].map(|state| {
        let raw = Misbehave::Raw(answer(0, state), 10);
        (raw, ResponseError::UnknownState(state))
    });
    let states = states.into_iter().filter(|_| state);
    unknown.into_iter().chain(short).chain(states).collect()
}

#[test]
fn h_04_v_14_unbelievable_answer_ends_linux_and_makes_direct_ask_for_the_states() {
    for (setup, kind) in scenes() {
        for (wrong, error) in unbelievable(kind) {
            let (mut scene, ended) = scene(setup, kind).unwrap().answered([wrong.clone()]);
            if setup.is_linux() {
                let failure = ended.failure(&mut scene.rig);
                assert_eq!(failure, Failure::Response(error), "{kind:?}");
                continue;
            }
            assert!(scene.states_asked() > 0, "{kind:?}");
            assert_eq!(ended.stalls, []);
            scene.arrived(&ended);
        }
    }
}

#[test]
fn device_that_is_never_to_be_believed_is_given_up() {
    for (setup, kind) in scenes() {
        for (wrong, error) in unbelievable(kind) {
            let always = std::iter::repeat_n(wrong, 100);
            let (mut scene, ended) = scene(setup, kind).unwrap().answered(always);
            let failure = ended.failure(&mut scene.rig);
            // In answer to PLUG it may be all right, but not in answer to the STATE that follows, and vice versa.
            assert!(
                failure == Failure::Response(error) || !setup.is_linux(),
                "{failure}"
            );
            assert!(matches!(failure, Failure::Response(_)), "{failure}");
            scene.rig.verify(&scene.pages);
        }
    }
}

#[test]
fn d_28_d_35_d_40_d_47_busy_is_waited_out_after_any_request() {
    for (setup, kind) in scenes() {
        for times in 1..6 {
            let busy = std::iter::repeat_n(Misbehave::Answer(Answer::Busy), times);
            let (mut scene, ended) = scene(setup, kind).unwrap().answered(busy);
            assert!(
                ended.stalls.iter().all(|stall| *stall == Stall::DeviceBusy),
                "{kind:?} {ended:?}"
            );
            let waits = ended.stalls.len();
            match (setup.strategy, setup.mode, kind) {
                // Memory was removed before it was to be unplugged: the first refusal is followed up at once.
                (Strategy::Linux, Mode::BigBlock, RequestKind::Unplug) => {
                    assert_eq!(waits, times - 1);
                }
                (Strategy::Linux, _, _) => assert_eq!(waits, times, "{kind:?}"),
                // Several requests in flight are refused at a time.
                (Strategy::Direct, _, _) => assert!((1..=times).contains(&waits), "{kind:?}"),
            }
            scene.arrived(&ended);
        }
    }
}

#[test]
fn device_that_is_always_busy_is_asked_a_few_times_a_wait() {
    for (setup, kind) in scenes() {
        let busy = std::iter::repeat_n(Misbehave::Answer(Answer::Busy), 1000);
        let (mut scene, ended) = scene(setup, kind).unwrap().answered(busy);
        let stalled = Progress::Stalled {
            reason: Stall::DeviceBusy,
            retry_at_ms: scene.rig.driver.deadline_ms(),
        };
        assert_eq!((ended.stalls.len(), ended.last), (WAITS, stalled));
        let sent = scene.rig.driver.counters().requests(kind);
        let in_flight = if setup.is_linux() { 1 } else { 8 };
        assert!(sent <= (WAITS as u64 + 2) * in_flight, "{kind:?}: {sent}");
        scene.rig.device.state().misbehave.clear();
        scene.rig.driver.retry();
        let ended = run(&mut scene.rig);
        scene.arrived(&ended);
    }
}

#[test]
fn h_01_refused_plug_is_waited_out() {
    for setup in SETUPS {
        for times in 1..4 {
            let nack = std::iter::repeat_n(Misbehave::Answer(Answer::Nack), times);
            let scene = scene(setup, RequestKind::Plug).unwrap();
            let (mut scene, ended) = scene.answered(nack);
            assert!(ended.stalls.iter().all(|stall| *stall == Stall::Refused));
            assert!((1..=times).contains(&ended.stalls.len()));
            scene.arrived(&ended);
        }
        // For ever.
        let nack = std::iter::repeat_n(Misbehave::Answer(Answer::Nack), 1000);
        let scene = scene(setup, RequestKind::Plug).unwrap();
        let (scene, ended) = scene.answered(nack);
        assert_eq!(ended.stalls, [Stall::Refused; WAITS]);
        assert_eq!(scene.rig.driver.plugged_size(), UNIT);
    }
}

#[test]
fn answer_that_no_request_deserves_ends_linux_and_makes_direct_ask_for_the_states() {
    for (setup, kind) in scenes() {
        for wrong in [Answer::Nack, Answer::Error] {
            if (kind, wrong) == (RequestKind::Plug, Answer::Nack) {
                continue;
            }
            let is_it = |failure: Failure, sent: RequestKind| {
                matches!(
                    failure,
                    Failure::Answer { request, answer } if request.kind() == sent && answer == wrong
                )
            };
            let once = [Misbehave::Answer(wrong)];
            let (mut scene_once, ended) = scene(setup, kind).unwrap().answered(once);
            if setup.is_linux() {
                let failure = ended.failure(&mut scene_once.rig);
                assert!(is_it(failure, kind), "{failure}");
                assert!(failure.to_string().starts_with(kind.name()));
                continue;
            }
            assert!(scene_once.states_asked() > 0);
            scene_once.arrived(&ended);
            let always = std::iter::repeat_n(Misbehave::Answer(wrong), 100);
            let (mut scene, ended) = scene(setup, kind).unwrap().answered(always);
            let failure = ended.failure(&mut scene.rig);
            assert!(is_it(failure, RequestKind::State), "{failure}");
            scene.rig.verify(&scene.pages);
        }
    }
}

// ---- silence and resets ----

#[test]
fn h_03_v_09_request_that_is_lost_ends_linux_and_makes_direct_reset_the_device() {
    for (setup, kind) in scenes() {
        for done in [false, true] {
            for (lost, failure) in [
                (Misbehave::Lost { done }, Failure::AnswerTimeout),
                (Misbehave::NeedsReset { done }, Failure::NeedsReset),
            ] {
                let (mut scene, ended) = scene(setup, kind).unwrap().answered([lost]);
                if setup.is_linux() {
                    assert_eq!(ended.failure(&mut scene.rig), failure);
                    continue;
                }
                assert!(scene.states_asked() > 0);
                scene.arrived(&ended);
            }
        }
    }
}

#[test]
fn device_that_never_answers_is_given_up() {
    for (setup, kind) in scenes() {
        let Some(mut scene) = scene(setup, kind) else {
            continue;
        };
        scene.rig.device.state().hold = true;
        let ended = run(&mut scene.rig);
        assert_eq!(ended.failure(&mut scene.rig), Failure::AnswerTimeout);
        scene.rig.verify(&scene.pages);
    }
}

#[test]
fn device_that_needs_a_reset_at_each_request_is_given_up() {
    for (setup, kind) in scenes() {
        for done in [false, true] {
            let always = std::iter::repeat_n(Misbehave::NeedsReset { done }, 100);
            let (mut scene, ended) = scene(setup, kind).unwrap().answered(always);
            assert_eq!(ended.failure(&mut scene.rig), Failure::NeedsReset);
            scene.rig.verify(&scene.pages);
        }
    }
}

// ---- the used ring ----

#[test]
fn used_ring_with_a_wrong_buffer_ends_linux_and_makes_direct_reset_the_device() {
    let wrong_token = Failure::Queue(virtio_drivers::Error::WrongToken);
    for (setup, kind) in scenes() {
        for wrong in [
            Misbehave::WrongBuffer,
            Misbehave::UsedId(15),
            Misbehave::UsedId(16),
            Misbehave::UsedId(0xffff),
            Misbehave::UsedId(u32::MAX),
            Misbehave::Twice,
            Misbehave::Ahead(1),
            Misbehave::Ahead(7),
            Misbehave::Ahead(0x7fff),
        ] {
            let (mut scene, ended) = scene(setup, kind).unwrap().answered([wrong.clone()]);
            if setup.is_linux() {
                assert_eq!(ended.failure(&mut scene.rig), wrong_token, "{wrong:?}");
                continue;
            }
            assert!(scene.states_asked() > 0);
            scene.arrived(&ended);
            let always = std::iter::repeat_n(wrong, 100);
            let (mut scene, ended) = self::scene(setup, kind).unwrap().answered(always);
            assert_eq!(ended.failure(&mut scene.rig), wrong_token);
            scene.rig.verify(&scene.pages);
        }
    }
}

// ---- answers that are lies ----

/// ACK, and nothing was done: it shows as soon as the sizes are compared.
#[test]
fn h_07_acknowledged_request_that_was_not_done_is_noticed_at_the_next_change() {
    for (setup, kind) in scenes().filter(|(_, kind)| *kind != RequestKind::State) {
        let scene = scene(setup, kind).unwrap();
        let (mut scene, _) = scene.answered([Misbehave::Answer(Answer::Ack)]);
        scene.rig.device.state().change_config();
        let ended = run(&mut scene.rig);
        match setup.is_linux() {
            true => assert!(matches!(
                ended.failure(&mut scene.rig),
                Failure::OutOfSync { .. } | Failure::Answer { .. }
            )),
            false => scene.arrived(&ended),
        }
    }
}

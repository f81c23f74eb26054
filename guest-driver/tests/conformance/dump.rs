//! The view of a crash dump, which must not be led astray either: it only sends STATE, and reads what is plugged.

use std::sync::Arc;

use virtio_mem_driver::driver::DumpView;
use virtio_mem_wire::{BlockRange, Field, RequestKind};

use crate::answers::{answer, unbelievable};
use crate::support::device::{Device, FakeTransport, Misbehave};
use crate::support::dma::FakeHal;
use crate::support::{GIB, MIB};

type View = DumpView<FakeHal, FakeTransport>;

fn view(device: &Arc<Device>) -> View {
    DumpView::probe(FakeTransport(Arc::clone(device))).unwrap()
}

/// Everything is plugged, so that no answer but the right one makes it so.
fn device() -> Arc<Device> {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    let mut state = device.state();
    let range = BlockRange {
        first: 0,
        count: 512,
    };
    state.plugged.insert(range);
    state.config.mutable.plugged_size = GIB;
    drop(state);
    device
}

#[test]
fn g_20_g_21_only_an_acknowledged_state_is_believed() {
    let wrong_types = [1, 2, 3].map(|answer_type| Misbehave::Raw(answer(answer_type, 0), 10));
    let unbelievable = unbelievable(RequestKind::State);
    let unbelievable = unbelievable.into_iter().map(|(wrong, _)| wrong);
    for wrong in unbelievable.chain(wrong_types) {
        let device = device();
        let mut view = view(&device);
        device.state().misbehave.push_back(wrong.clone());
        assert!(!view.is_ram(4 * GIB, || true), "{wrong:?}");
        assert!(device.state().misbehave.is_empty());
        // The next one may be right.
        assert!(view.is_ram(5 * GIB - 1, || true));
        let region = 4 * GIB..5 * GIB;
        assert_eq!(view.ram(GIB, || true), [region]);
    }
}

#[test]
fn queue_that_is_broken_is_not_asked_again() {
    for wrong in [
        Misbehave::WrongBuffer,
        Misbehave::UsedId(u32::MAX),
        Misbehave::Lost { done: false },
        Misbehave::NeedsReset { done: false },
    ] {
        let device = device();
        let mut view = view(&device);
        device.state().misbehave.push_back(wrong.clone());
        let mut patience = 10;
        let keep_waiting = || {
            patience -= 1;
            patience > 0
        };
        assert!(!view.is_ram(4 * GIB, keep_waiting));
        assert!(!view.is_ram(5 * GIB - 1, || panic!("waits again")));
        assert_eq!(view.ram(2 * MIB, || panic!("waits again")), []);
        assert_eq!(device.state().requests, []);
    }
}

/// Regression: the chunks of the region were listed before the first was asked for, and a device that had not answered
/// was passed over chunk by chunk.
#[test]
fn region_beyond_all_memory_takes_no_memory_and_no_time_to_look_through() {
    let device = Device::new(4 * GIB, GIB, 2 * MIB);
    let fields = [
        (Field::BlockSize, 1),
        (Field::Addr, 0),
        (Field::RegionSize, 1 << 63),
        (Field::UsableRegionSize, 1 << 63),
        (Field::PluggedSize, 1),
    ];
    let forged = fields.map(|(field, value)| (field.offset(), value));
    device.state().forged = forged.to_vec();
    let mut view = view(&device);
    device.state().hold = true;
    assert_eq!(view.ram(1, || false), []);
}

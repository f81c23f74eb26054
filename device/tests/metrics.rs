//! The numbers as a recorder of the `metrics` facade gets them.
#![cfg(feature = "metrics")]
#![cfg_attr(
    feature = "metrics",
    expect(clippy::unwrap_used, reason = "fixtures may fail as tests do")
)]

mod rig;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use rig::{BLOCK, GIB, Rig};

/// Sums of counters, last values of gauges, numbers of samples, by name and labels.
#[derive(Debug, Default)]
struct Ledger(Arc<Mutex<BTreeMap<String, f64>>>);

struct Entry {
    ledger: Arc<Mutex<BTreeMap<String, f64>>>,
    name: String,
}

impl Entry {
    fn add(&self, value: f64) {
        *self
            .ledger
            .lock()
            .unwrap()
            .entry(self.name.clone())
            .or_default() += value;
    }
}

impl CounterFn for Entry {
    fn increment(&self, value: u64) {
        self.add(value as f64);
    }

    fn absolute(&self, _: u64) {}
}

impl GaugeFn for Entry {
    fn increment(&self, value: f64) {
        self.add(value);
    }

    fn decrement(&self, value: f64) {
        self.add(-value);
    }

    fn set(&self, value: f64) {
        self.ledger.lock().unwrap().insert(self.name.clone(), value);
    }
}

impl HistogramFn for Entry {
    fn record(&self, value: f64) {
        assert!((0.0..60.0).contains(&value), "seconds");
        self.add(1.0);
    }
}

impl Ledger {
    fn entry(&self, key: &Key) -> Arc<Entry> {
        let labels = key.labels().map(|l| format!(" {}={}", l.key(), l.value()));
        Arc::new(Entry {
            ledger: Arc::clone(&self.0),
            name: std::iter::once(key.name().to_owned())
                .chain(labels)
                .collect(),
        })
    }
}

impl Recorder for Ledger {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.entry(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.entry(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.entry(key))
    }
}

#[test]
fn recorder_gets_requests_latencies_and_sizes() {
    let ledger = Ledger::default();
    metrics::with_local_recorder(&ledger, || {
        let mut rig = Rig::with(4 * GIB, |b| b.requested_size(4 * BLOCK));
        rig.plug(0, 2);
        rig.plug(2, 1);
        rig.plug(0, 1);
        rig.unplug(0, 1);
        rig.fill(1, 1);
        rig.handle.resident_bytes().unwrap();
        rig.handle.resize(8 * BLOCK).unwrap();
        rig.faults.open.script(&[false]);
        rig.plug(5, 1);
    });
    let ledger = ledger.0.lock().unwrap();
    let expected = [
        (
            "virtio_mem_requests_total region=0x100000000 request=plug answer=ack",
            2.0,
        ),
        (
            "virtio_mem_requests_total region=0x100000000 request=plug answer=error",
            1.0,
        ),
        (
            "virtio_mem_requests_total region=0x100000000 request=unplug answer=ack",
            1.0,
        ),
        (
            "virtio_mem_request_seconds region=0x100000000 request=plug answer=ack",
            2.0,
        ),
        (
            "virtio_mem_request_seconds region=0x100000000 request=plug answer=error",
            1.0,
        ),
        (
            "virtio_mem_request_seconds region=0x100000000 request=unplug answer=ack",
            1.0,
        ),
        (
            "virtio_mem_requests_total region=0x100000000 request=plug answer=busy",
            1.0,
        ),
        (
            "virtio_mem_request_seconds region=0x100000000 request=plug answer=busy",
            1.0,
        ),
        (
            "virtio_mem_events_total region=0x100000000 event=used_notification",
            5.0,
        ),
        (
            "virtio_mem_events_total region=0x100000000 event=config_notification",
            1.0,
        ),
        (
            "virtio_mem_events_total region=0x100000000 event=host_failure",
            1.0,
        ),
        (
            "virtio_mem_requested_bytes region=0x100000000",
            (8 * BLOCK) as f64,
        ),
        (
            "virtio_mem_plugged_bytes region=0x100000000",
            (2 * BLOCK) as f64,
        ),
        ("virtio_mem_resident_bytes region=0x100000000", BLOCK as f64),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(*ledger, BTreeMap::from(expected));
}

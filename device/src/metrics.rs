//! The same numbers for the recorder of the `metrics` facade, if the program has one (feature `metrics`).
//!
//! | name | kind | labels |
//! |---|---|---|
//! | `virtio_mem_requests_total` | counter | `region`, `request`, `answer` |
//! | `virtio_mem_request_seconds` | histogram | `region`, `request`, `answer` |
//! | `virtio_mem_events_total` | counter | `region`, `event`: what [`Counters`](crate::Counters) counts beside requests |
//! | `virtio_mem_requested_bytes` | gauge | `region` |
//! | `virtio_mem_plugged_bytes` | gauge | `region` |
//! | `virtio_mem_resident_bytes` | gauge | `region` |
//!
//! `region` is the guest-physical address of the region, which tells the devices of a VMM apart. What is
//! resident must be measured, so that gauge follows [`Handle::resident_bytes`](crate::Handle::resident_bytes) and
//! [`Handle::plugged_resident_bytes`](crate::Handle::plugged_resident_bytes).

use std::time::Duration;

use virtio_mem_wire::{Answer, MutableConfig, RequestKind};

use crate::device::Device;

#[cfg(feature = "metrics")]
impl Device {
    pub(crate) fn publish_request(&self, kind: RequestKind, answer: Answer, duration: Duration) {
        // The recorder may be installed later than the device is built, so nothing is registered ahead.
        let labels = [
            ("region", self.label()),
            ("request", kind.name().to_owned()),
            ("answer", answer.name().to_owned()),
        ];
        metrics::counter!("virtio_mem_requests_total", &labels).increment(1);
        metrics::histogram!("virtio_mem_request_seconds", &labels).record(duration.as_secs_f64());
    }

    pub(crate) fn publish_event(&self, event: &'static str) {
        let labels = [("region", self.label()), ("event", event.to_owned())];
        metrics::counter!("virtio_mem_events_total", &labels).increment(1);
    }

    pub(crate) fn publish_gauges(&self, sizes: &MutableConfig) {
        let labels = [("region", self.label())];
        metrics::gauge!("virtio_mem_requested_bytes", &labels).set(sizes.requested_size as f64);
        metrics::gauge!("virtio_mem_plugged_bytes", &labels).set(sizes.plugged_size as f64);
    }

    pub(crate) fn publish_resident(&self, bytes: u64) {
        let labels = [("region", self.label())];
        metrics::gauge!("virtio_mem_resident_bytes", &labels).set(bytes as f64);
    }

    fn label(&self) -> String {
        format!("{:#x}", self.geometry.addr())
    }
}

#[cfg(not(feature = "metrics"))]
#[expect(clippy::unused_self, reason = "nobody listens")]
impl Device {
    pub(crate) fn publish_request(&self, _: RequestKind, _: Answer, _: Duration) {}

    pub(crate) fn publish_event(&self, _: &'static str) {}

    pub(crate) fn publish_gauges(&self, _: &MutableConfig) {}

    pub(crate) fn publish_resident(&self, _: u64) {}
}

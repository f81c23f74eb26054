//! What `/metrics` answers: the recorder of the `metrics` facade, into which the device counts.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::control::Instance;

/// Upper bounds of the latency buckets, in seconds: from a system call to a driver's patience.
const BUCKETS: [f64; 8] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0];

/// The recorder of this process, installed by whoever is first. `None` if the program has another.
pub(super) fn recorder() -> Option<&'static PrometheusHandle> {
    static RECORDER: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    let install = || {
        let suffix = Matcher::Suffix("_seconds".into());
        let builder = PrometheusBuilder::new().set_buckets_for_metric(suffix, &BUCKETS);
        let recorder = builder
            .inspect_err(|error| log::warn!("latency buckets: {error}"))
            .ok()?
            .build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder)
            .inspect_err(|error| log::warn!("no metrics: {error}"))
            .ok()?;
        Some(handle)
    };
    RECORDER.get_or_init(install).as_ref()
}

/// All metrics in Prometheus' text format, with what must be measured measured now.
pub(super) fn render(instance: &Instance) -> String {
    let Some(recorder) = recorder() else {
        return String::new();
    };
    for id in instance.devices() {
        // An error is that the guest has come to its end meanwhile.
        let Ok(status) = instance.memory(&id) else {
            continue;
        };
        let Some(guest) = status.guest else {
            continue;
        };
        // By it, series with the one label are joined with those with the other.
        if let Ok(geometry) = instance.with(&id, |controller| controller.device().geometry()) {
            let region = format!("{:#x}", geometry.addr());
            metrics::gauge!("vmem_device_info", "device" => id.clone(), "region" => region)
                .set(1.0);
        }
        for (name, value) in [
            ("vmem_guest_plugged_bytes", guest.plugged_size),
            ("vmem_guest_online_bytes", guest.online_size),
            ("vmem_guest_unreachable_bytes", guest.unreachable_size),
            ("vmem_frozen", u64::from(status.frozen)),
            ("vmem_slots", status.slot_count),
        ] {
            metrics::gauge!(name, "device" => id.clone()).set(value as f64);
        }
        // The same whatever the device.
        metrics::gauge!("vmem_guest_pages_held").set(guest.pages_held as f64);
        for (name, value) in [
            ("vmem_guest_pages_moved_total", guest.pages_moved),
            ("vmem_guest_pages_verified_total", guest.pages_verified),
            ("vmem_guest_pages_wrong_total", guest.pages_wrong),
        ] {
            metrics::counter!(name).absolute(value);
        }
    }
    recorder.render()
}

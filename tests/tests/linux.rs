//! The device under an unmodified Linux driver, held against QEMU's own device under the same one.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use vmm_harness::linux::{
    self, Cache, DeviceKind, KernelSeries, LinuxOptions, LinuxStep, Progress, Script,
};

/// Runs a script on both devices; nothing if kernel and QEMU are not to be had here.
fn on_both_devices(script: &str) -> Option<[Vec<LinuxStep>; 2]> {
    let cache = std::env::var_os("VMEM_LINUX_CACHE")
        .map(PathBuf::from)
        .or_else(Cache::default_path);
    let cache = cache.expect("VMEM_LINUX_CACHE or HOME names a folder");
    let run = |device| {
        let options = LinuxOptions {
            cache: &cache,
            kernel: KernelSeries::V6_12,
            device,
            seed: 0,
            random_for: Duration::ZERO,
        };
        let found = Script::named(script).expect("the script exists");
        match linux::run_script(&options, found, &mut Progress::stderr(), &mut |_| ()) {
            Ok(steps) => Some(steps),
            Err(error) => {
                assert!(error.is_about_packages(), "{script} on {device:?}: {error}");
                // `eprintln` would be captured, and a skip must be seen. Nobody is left to tell if this fails.
                let _ = writeln!(std::io::stderr(), "SKIPPED {script} on Linux: {error}");
                None
            }
        }
    };
    Some([run(DeviceKind::Qemu)?, run(DeviceKind::Ours)?])
}

/// What device and guest make of a step, without what the host and its clock make of it.
#[derive(Debug, PartialEq, Eq)]
struct Facts<'a> {
    what: &'a str,
    /// Requested, plugged, `MemTotal`, System RAM.
    sizes: [u64; 4],
    memory_blocks: usize,
}

fn facts(steps: &[LinuxStep]) -> Vec<Facts<'_>> {
    let facts = steps.iter().map(|step| Facts {
        what: &step.what,
        sizes: [
            step.requested,
            step.plugged,
            step.mem_total,
            step.system_ram,
        ],
        memory_blocks: step.memory_blocks,
    });
    facts.collect()
}

#[test]
fn linux_does_the_same_with_this_device_as_with_qemus() {
    let Some([reference, ours]) = on_both_devices("grow-shrink") else {
        return;
    };
    assert_eq!(facts(&ours), facts(&reference));
    assert_eq!(
        ours.last().map(|step| (step.plugged, step.resident)),
        Some((0, 0))
    );
}

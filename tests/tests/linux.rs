//! The device under an unmodified Linux driver, held against QEMU's own device under the same one. A small part of
//! `vmem linux --matrix`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use vmm_harness::linux::{
    Cache, DeviceKind, KernelSeries, MatrixOptions, Progress, Script, run_matrix,
};

/// For the skip, which is counted by test.
const TEST: &str = "linux_finds_nothing_amiss_and_the_same_as_with_qemus_device";

/// Runs scripts on the kernel that boots anywhere; what each run said, `None` if it is not to be had here.
fn matrix(scripts: &[&str], devices: &[DeviceKind]) -> Option<(bool, Vec<String>)> {
    let cache = std::env::var_os("VMEM_LINUX_CACHE")
        .map(PathBuf::from)
        .or_else(Cache::default_path);
    let cache = cache.expect("VMEM_LINUX_CACHE or HOME names a folder");
    let scripts: Vec<_> = scripts
        .iter()
        .map(|name| Script::named(name).expect("the script exists"))
        .collect();
    let options = MatrixOptions {
        cache: &cache,
        kernels: &[KernelSeries::V6_12],
        scripts: &scripts,
        devices,
        seed: 0,
        random_for: Duration::ZERO,
    };
    match run_matrix(&options, &mut Progress::stderr(), &mut |_| Ok(())) {
        Ok(matrix) => {
            let lines = matrix.runs().iter().map(|run| matrix.line(run));
            Some((matrix.is_green(), lines.collect()))
        }
        Err(error) => {
            assert!(error.is_about_packages(), "{error}");
            // `eprintln` would be captured, and a skip must be seen. Nobody is left to tell if this fails.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED {TEST}: packages cannot be had: {error}"
            );
            None
        }
    }
}

/// One test, for one guest at a time.
#[test]
fn linux_finds_nothing_amiss_and_the_same_as_with_qemus_device() {
    let devices = [DeviceKind::Ours, DeviceKind::Qemu];
    let Some((green, lines)) = matrix(&["sub-block", "reboot", "frozen"], &devices) else {
        return;
    };
    assert!(green, "{}", lines.join("\n"));
    // QEMU's device cannot be frozen.
    assert_eq!(lines.len(), 5, "{}", lines.join("\n"));
    for line in &lines[3..] {
        assert!(line.ends_with("the same with both devices"), "{line}");
    }
}

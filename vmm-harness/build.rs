//! Builds the guest image with a cargo of its own and tells the crate where it is.
//!
//! The image is a workspace of its own (other profiles, other link arguments). It goes into one target folder
//! beside the outer one, so that neither profile nor tool (build, test, clippy, doc) builds it again.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What the image is made from, relative to this crate.
const SOURCES: [&str; 8] = [
    "../resources/guest-image/src",
    "../resources/guest-image/Cargo.toml",
    "../resources/guest-image/Cargo.lock",
    "../resources/guest-image/harness.ld",
    "../resources/guest-image/qemu.ld",
    "../guest-driver",
    "../device/wire",
    "guest",
];

fn main() -> ExitCode {
    let crate_folder = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    for source in SOURCES {
        println!(
            "cargo:rerun-if-changed={}",
            crate_folder.join(source).display()
        );
    }
    let target = target_folder();
    let manifest = crate_folder.join("../resources/guest-image/Cargo.toml");

    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--release", "--locked", "--manifest-path"]);
    cargo.arg(&manifest).arg("--target-dir").arg(&target);
    // Flags and wrappers of the outer build (clippy, coverage, sanitizers) are not meant for the guest.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let kept = name == "CARGO_HOME" || name.starts_with("RUSTUP");
        if (name.starts_with("CARGO") || name.starts_with("RUST")) && !kept {
            cargo.env_remove(name);
        }
    }
    let failure = match cargo.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(failure) = failure {
        let manifest = manifest.display();
        eprintln!("cannot build the guest image; to see it alone, run");
        eprintln!("  cargo build --release --locked --manifest-path {manifest}\n\n{failure}");
        return ExitCode::FAILURE;
    }
    for (name, file) in [
        ("VMEM_GUEST_IMAGE", "vmem-guest"),
        ("VMEM_PROBE_IMAGE", "probe"),
        ("VMEM_QEMU_GUEST_IMAGE", "qemu-guest"),
    ] {
        println!(
            "cargo:rustc-env={name}={}",
            target.join("release").join(file).display()
        );
    }
    ExitCode::SUCCESS
}

/// `<outer target>/guest-image`: cargo hands out `<outer target>/[triple/]<profile>/build/<crate>/out`.
fn target_folder() -> PathBuf {
    let out = PathBuf::from(variable("OUT_DIR"));
    let profile = out.ancestors().nth(3).unwrap_or(&out);
    let above = profile.parent().unwrap_or(profile);
    let triple = variable("TARGET");
    let outer = match above.file_name() {
        Some(name) if name == triple.as_str() => above.parent().unwrap_or(above),
        _ => above,
    };
    Path::new(outer).join("guest-image")
}

fn variable(name: &str) -> String {
    env::var(name).expect("cargo sets its variables for build scripts")
}

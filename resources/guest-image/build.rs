//! Links the programs for a machine without an operating system, on the ordinary host target.

/// The programs, and what lays them out.
const PROGRAMS: [(&str, &str); 3] = [
    ("vmem-guest", "harness.ld"),
    ("probe", "harness.ld"),
    ("qemu-guest", "qemu.ld"),
];

fn main() {
    let folder = env!("CARGO_MANIFEST_DIR");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none,-z,max-page-size=4096,-z,noexecstack",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    for (program, script) in PROGRAMS {
        println!("cargo:rerun-if-changed={script}");
        println!("cargo:rustc-link-arg-bin={program}=-Wl,-T,{folder}/{script}");
    }
}

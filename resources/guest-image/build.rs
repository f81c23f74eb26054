//! Links the programs for a machine without an operating system, on the ordinary host target.

fn main() {
    let folder = env!("CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=linker.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        &format!("-Wl,-T,{folder}/linker.ld"),
        "-Wl,--build-id=none,-z,max-page-size=4096,-z,noexecstack",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}

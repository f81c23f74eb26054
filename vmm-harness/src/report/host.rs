//! The machine a run was made on, in a line.

use std::fs;

use crate::demo::size;

/// Processors, memory and kernel; what cannot be read is left out.
pub(super) fn describe() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (processors, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let kernel = read("/proc/sys/kernel/osrelease");
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let processor = value(&processors, "model name").map(|name| format!("{count} × {name}"));
    let memory = value(&memory, "MemTotal").and_then(|text| {
        let kib: u64 = text.strip_suffix(" kB")?.parse().ok()?;
        Some(size(kib << 10))
    });
    let kernel = (!kernel.is_empty()).then(|| format!("Linux {}", kernel.trim()));
    let parts = [processor, memory, kernel];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

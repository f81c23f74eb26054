//! The demonstration as people read it.

use std::io::{self, Write};

use bytesize::ByteSize;
use virtio_mem_driver::driver::Mode;

use super::options::{Plan, policy_name};
use super::{DemoOptions, Rogue, Step, Summary};
use crate::Machine;
use crate::layout::REGION_START;

/// A size in binary units: `130 MiB`, `1 GiB`; exact where it is a whole number of the unit.
pub fn size(bytes: u64) -> String {
    let text = ByteSize::b(bytes).display().iec().to_string();
    text.replace(".0 ", " ")
}

pub(super) fn header(
    out: &mut dyn Write,
    machine: &Machine,
    options: &DemoOptions,
    plan: &Plan,
) -> io::Result<()> {
    writeln!(out, "backend: {}", machine.backend())?;
    writeln!(
        out,
        "guest: {} vCPUs, {} boot memory; device: {} at {REGION_START:#x} in blocks of {}; seed {}",
        options.vcpu_count,
        size(options.boot_memory),
        size(options.region),
        size(options.block_size),
        options.seed,
    )?;
    let strategy = policy_name(plan.policy.strategy);
    let (unit, granule) = (size(plan.sizes.unit_size), size(plan.sizes.granule_size));
    match plan.sizes.mode {
        Mode::SubBlock => writeln!(
            out,
            "driver: policy {strategy}; Sub-Block Mode: memory blocks of {unit}, granules of {granule}"
        )?,
        Mode::BigBlock => writeln!(
            out,
            "driver: policy {strategy}; Big-Block Mode: granules are big blocks of {unit}"
        )?,
    }
    writeln!(out)?;
    writeln!(
        out,
        "{:>9} {:>9} {:>9} {:>10} {:>11} {:>9} {:>8} {:>9}  requests",
        "target", "plugged", "online", "resident", "interrupts", "verified", "moved", "time"
    )
}

pub(super) fn row(out: &mut dyn Write, step: &Step) -> io::Result<()> {
    let mut requests: Vec<_> = step
        .requests
        .iter()
        .map(|count| format!("{} {} {}", count.count, count.request, count.answer))
        .collect();
    if requests.is_empty() {
        requests.push("none".into());
    }
    let unreachable = step.unreachable.map_or(String::new(), |unreachable| {
        format!(
            "; {} unreachable: {}",
            size(unreachable.bytes),
            unreachable.reason
        )
    });
    writeln!(
        out,
        "{:>9} {:>9} {:>9} {:>10} {:>11} {:>9} {:>8} {:>6.0} ms  {}{unreachable}",
        size(step.target),
        size(step.plugged),
        size(step.online),
        size(step.resident),
        format!("{} + {}", step.used_interrupts, step.config_interrupts),
        step.pages_verified,
        step.pages_moved,
        step.resize_ms,
        requests.join(", "),
    )
}

pub(super) fn end(out: &mut dyn Write, summary: &Summary) -> io::Result<()> {
    writeln!(out)?;
    writeln!(
        out,
        "interrupts: used-buffer + config-change; time: until the driver had settled; verified, moved: pages of 4 KiB"
    )?;
    writeln!(
        out,
        "ok: {} steps, every check held at each; {} requests; {} tagged pages verified, none lost or wrong",
        summary.steps.len(),
        summary.requests,
        summary.pages_verified
    )
}

pub(super) fn rogue(out: &mut dyn Write, rogue: &Rogue) -> io::Result<()> {
    writeln!(out)?;
    writeln!(
        out,
        "rogue guest: vCPU {} tried to {} {:#x}, which is not plugged; the run ends here",
        rogue.vcpu,
        if rogue.write { "write to" } else { "read from" },
        rogue.address,
    )?;
    writeln!(
        out,
        "resident behind unplugged blocks: {} before, {} after; behind the whole region: {} before, {} after",
        size(rogue.unplugged_resident.0),
        size(rogue.unplugged_resident.1),
        size(rogue.resident.0),
        size(rogue.resident.1),
    )
}

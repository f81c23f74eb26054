//! What no machine can have recorded is refused by name.

use std::ops::Range;

use virtio_mem_wire::Geometry;

use super::requests::RecordedDevice;
use super::step::{Op, Outcome};
use super::trace::{Dimm, MAX_MEMORY, PAGE_SIZE, Trace, TraceError, ZoneRow, impossible};

/// Bits of a physical address (x86-64 with four-level page tables).
const PHYSICAL_ADDRESS_BITS: u32 = 46;

/// Most nodes Linux is built for (`NODES_SHIFT` 10).
const MAX_NODES: u32 = 1 << 10;

/// Most blocks of a memory device.
const MAX_DEVICE_BLOCKS: u64 = 1 << 18;

/// Most lines of `/proc/iomem` or zones of `/proc/zoneinfo`.
const MAX_ROWS: usize = 4096;

impl Trace {
    /// Whether every number is in a range a machine can have.
    pub(super) fn check(&self) -> Result<(), TraceError> {
        let boot = &self.boot;
        check_rows("boot.iomem", boot.iomem.len())?;
        check_rows("boot.zones", boot.zones.len())?;
        let block_size = boot.block_size;
        if !block_size.is_power_of_two() || !(128 << 20..=2 << 30).contains(&block_size) {
            let what = format!("{block_size} is not the size of a memory block");
            return Err(impossible("boot.block_size", what));
        }
        if boot.ram_bytes > MAX_MEMORY {
            return Err(impossible("boot.ram_bytes", "more than can be replayed"));
        }
        self.system_ram()?;
        for (index, zone) in boot.zones.iter().enumerate() {
            check_zone(&format!("boot.zones[{index}]"), zone)?;
        }
        for (id, block) in &boot.blocks {
            check_node(&format!("boot.blocks.{id}.node"), block.node)?;
        }
        for dimm in &self.dimms {
            check_dimm(&format!("dimms.{}", dimm.id), dimm, block_size)?;
        }
        if let Some(device) = &self.device {
            check_device(device)?;
        }
        for (index, step) in self.steps.iter().enumerate() {
            let place = format!("steps[{index}]");
            if self.device.is_none() && !step.requests.is_empty() {
                return Err(impossible(place, "there are requests but no device"));
            }
            check_rows(&place, step.zoneinfo.as_ref().map_or(0, Vec::len))?;
            check_rows(&place, step.iomem.as_ref().map_or(0, Vec::len))?;
            for (row, zone) in step.zoneinfo.iter().flatten().enumerate() {
                check_zone(&format!("{place}.zoneinfo[{row}]"), zone)?;
            }
            if let Op::AddDimm(dimm) = &step.op {
                check_dimm(&format!("{place}.arg"), dimm, block_size)?;
            }
            let last = index + 1 == self.steps.len();
            if step.result.is_none() && !(self.incomplete && last) {
                return Err(impossible(place, "there is no result"));
            }
            if self.incomplete {
                continue;
            }
            // The first step of a virtio-mem trace shows the same as the state at boot.
            if matches!(step.op, Op::Probe { .. }) {
                continue;
            }
            // Without them, a model would agree that is not looked at.
            for (what, there) in [
                ("blocks", step.blocks.is_some()),
                ("zoneinfo", step.zoneinfo.is_some()),
                ("memtotal_kib", step.memtotal_kib.is_some()),
                (
                    "plugged_size",
                    step.plugged_size.is_some() || self.device.is_none(),
                ),
            ] {
                if !there {
                    return Err(impossible(place, format!("there is no {what}")));
                }
            }
            let refused = matches!(step.result, Some(Outcome::Errno(_)));
            if matches!(step.op, Op::DeviceDel { outcome: None, .. }) && !refused {
                return Err(impossible(place, "device_del has no outcome"));
            }
        }
        Ok(())
    }

    /// System RAM at boot, in bytes, ascending.
    pub(super) fn system_ram(&self) -> Result<Vec<Range<u64>>, TraceError> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut total = 0;
        for (index, line) in self.boot.iomem.iter().enumerate() {
            let wrong = |what: &str| impossible(format!("boot.iomem[{index}]"), what);
            let (range, name) = parse_iomem(line).ok_or_else(|| wrong("not a line of iomem"))?;
            if name != "System RAM" {
                continue;
            }
            if range.end > 1 << PHYSICAL_ADDRESS_BITS {
                return Err(wrong("beyond what the machine can address"));
            }
            if ranges.last().is_some_and(|last| last.end > range.start) {
                return Err(wrong("overlaps the line before"));
            }
            total += range.end - range.start;
            if total > MAX_MEMORY {
                return Err(wrong("more memory than can be replayed"));
            }
            ranges.push(range);
        }
        if ranges.is_empty() {
            return Err(impossible("boot.iomem", "there is no System RAM"));
        }
        Ok(ranges)
    }
}

/// A line of `/proc/iomem`: `00001000-0009fbff : System RAM`.
pub(super) fn parse_iomem(line: &str) -> Option<(Range<u64>, &str)> {
    let (range, name) = line.trim().split_once(" : ")?;
    let (start, last) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(last, 16).ok()?.checked_add(1)?;
    (start < end).then_some((start..end, name))
}

/// A list of nodes: `0-1,3`.
pub(super) fn parse_node_list(list: &str) -> Option<Vec<u32>> {
    let mut nodes = Vec::new();
    for part in list
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MAX_NODES {
            return None;
        }
        nodes.extend(first..=last);
    }
    Some(nodes)
}

/// Whether a list is one that a machine can have: each row is compared with many.
fn check_rows(place: &str, rows: usize) -> Result<(), TraceError> {
    if rows <= MAX_ROWS {
        return Ok(());
    }
    Err(impossible(place, format!("more than {MAX_ROWS} lines")))
}

fn check_node(place: &str, node: u32) -> Result<(), TraceError> {
    if node < MAX_NODES {
        return Ok(());
    }
    Err(impossible(place, format!("there is no node {node}")))
}

fn check_zone(place: &str, zone: &ZoneRow) -> Result<(), TraceError> {
    check_node(place, zone.node)?;
    let known = ["DMA", "DMA32", "Normal", "Movable", "Device"];
    if !known.contains(&zone.zone.as_str()) {
        return Err(impossible(place, format!("there is no zone {}", zone.zone)));
    }
    let most = (1 << PHYSICAL_ADDRESS_BITS) / PAGE_SIZE;
    let end = zone.start_pfn.unwrap_or(0).checked_add(zone.spanned);
    if end.is_none_or(|end| end > most) {
        return Err(impossible(
            place,
            "the zone spans more than can be addressed",
        ));
    }
    if zone.managed > zone.present || zone.present > zone.spanned {
        return Err(impossible(place, "not managed <= present <= spanned"));
    }
    Ok(())
}

/// Whether a machine can have this memory device.
fn check_device(device: &RecordedDevice) -> Result<(), TraceError> {
    let RecordedDevice {
        addr,
        region_size,
        block_size,
        ..
    } = *device;
    let geometry = Geometry::new(addr, region_size, block_size);
    let geometry = geometry.map_err(|error| impossible("device", error.to_string()))?;
    if addr + region_size > 1 << PHYSICAL_ADDRESS_BITS {
        return Err(impossible("device", "beyond what the machine can address"));
    }
    if region_size > MAX_MEMORY || geometry.block_count() > MAX_DEVICE_BLOCKS {
        return Err(impossible("device", "larger than what can be replayed"));
    }
    Ok(())
}

/// Whether a machine can have this DIMM.
pub(super) fn check_dimm(place: &str, dimm: &Dimm, block_size: u64) -> Result<(), TraceError> {
    check_node(place, dimm.node.unwrap_or(0))?;
    if dimm.size == 0 || !(dimm.addr | dimm.size).is_multiple_of(block_size) {
        let what = format!(
            "{:#x} bytes at {:#x} are not whole memory blocks",
            dimm.size, dimm.addr
        );
        return Err(impossible(place, what));
    }
    if dimm.size > MAX_MEMORY {
        return Err(impossible(place, "more memory than can be replayed"));
    }
    let end = dimm.addr.checked_add(dimm.size);
    if end.is_none_or(|end| end > 1 << PHYSICAL_ADDRESS_BITS) {
        return Err(impossible(place, "beyond what the machine can address"));
    }
    Ok(())
}

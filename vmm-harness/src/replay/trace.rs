//! Recorded traces as they lie on disk: one JSON document for one boot, one step for each operation.
//!
//! Nothing here knows what hotplug does. A file that parses has numbers in sane ranges, so that whoever works with
//! it need not fear overflow or exhaustion.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use super::step::Step;

/// Most bytes of a file: a hundred times what the longest recording has.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// Most memory a trace may work with: a file of a few bytes must not make us keep books on petabytes.
pub(super) const MAX_MEMORY: u64 = 128 << 30;

/// Bits of a physical address (x86-64 with four-level page tables).
const PHYSICAL_ADDRESS_BITS: u32 = 46;

/// Most nodes Linux is built for (`NODES_SHIFT` 10).
const MAX_NODES: u32 = 1 << 10;

/// Bytes of a page.
pub(super) const PAGE_SIZE: u64 = 4096;

/// Why a file is not a trace that can be replayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// No recording is that long.
    #[error("is longer than a trace can be")]
    TooLong,
    /// Not JSON, or not what the schema says; says where.
    #[error("is not a trace: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Well-formed, but it cannot have been recorded; names the place.
    #[error("is not a trace: {place}: {what}")]
    Impossible {
        /// Path of the value.
        place: String,
        /// What is wrong with it.
        what: String,
    },
    /// A recording of the virtio-mem driver.
    #[error("{0} records a virtio-mem device, and such traces are not replayed yet")]
    VirtioMem(String),
}

/// Shorthand for [`TraceError::Impossible`].
pub(super) fn impossible(place: impl Into<String>, what: impl Into<String>) -> TraceError {
    TraceError::Impossible {
        place: place.into(),
        what: what.into(),
    }
}

/// What tells the kinds of traces apart; the rest is read once the kind is known.
#[derive(Deserialize)]
struct Header {
    scenario: String,
    device: Option<de::IgnoredAny>,
}

/// One boot and what was done after it.
#[derive(Debug, Deserialize)]
pub struct Trace {
    /// `uname -r` of the kernel.
    pub(super) kernel: String,
    /// The state before the first step.
    pub(super) boot: Boot,
    /// The DIMMs of the steps.
    #[serde(default)]
    pub(super) dimms: Vec<Dimm>,
    /// Module parameters after the last step.
    #[serde(default)]
    pub(super) params_at_end: BTreeMap<String, String>,
    /// The recording was cut short.
    #[serde(default)]
    pub(super) incomplete: bool,
    /// What was done, in order.
    #[serde(deserialize_with = "steps")]
    pub(super) steps: Vec<Step>,
}

/// The state before the first step.
#[derive(Debug, Deserialize)]
pub(super) struct Boot {
    /// The kernel's command line.
    pub(super) cmdline: String,
    /// Memory the machine was started with.
    pub(super) ram_bytes: u64,
    /// Bytes of a memory block.
    pub(super) block_size: u64,
    /// Text of the file.
    pub(super) auto_online_blocks: String,
    /// Module parameters.
    pub(super) memory_hotplug_params: BTreeMap<String, String>,
    /// QEMU's command line.
    pub(super) machine_args: Vec<String>,
    /// `/proc/zoneinfo`.
    pub(super) zones: Vec<ZoneRow>,
    /// `MemTotal`.
    pub(super) memtotal_kib: u64,
    /// The memory blocks, by id.
    pub(super) blocks: BTreeMap<u64, BlockRow>,
    /// System RAM in `/proc/iomem`.
    pub(super) iomem: Vec<String>,
    /// Nodes by state.
    pub(super) nodes: Option<NodeLists>,
}

/// A zone in `/proc/zoneinfo`, in pages.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(super) struct ZoneRow {
    /// The node.
    pub(super) node: u32,
    /// Name of the zone.
    pub(super) zone: String,
    /// First page frame; `None` while it has no page.
    pub(super) start_pfn: Option<u64>,
    /// First to last page.
    pub(super) spanned: u64,
    /// Of these, how many there are.
    pub(super) present: u64,
    /// Of these, how many the allocator works with.
    pub(super) managed: u64,
}

impl ZoneRow {
    /// First to last page; `None` while it has no page.
    pub(super) fn span(&self) -> Option<Range<u64>> {
        self.start_pfn.map(|start| start..start + self.spanned)
    }
}

/// A memory block as sysfs shows it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(super) struct BlockRow {
    /// Text of `state`.
    pub(super) state: String,
    /// Text of `valid_zones`.
    pub(super) valid_zones: String,
    /// The node, given only if it is not 0.
    #[serde(default)]
    pub(super) node: u32,
}

/// Lists of nodes in `/sys/devices/system/node`: `"0-1,3"`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) struct NodeLists {
    /// Nodes with memory blocks or CPUs.
    pub(super) online: Option<String>,
    /// Nodes with online memory.
    pub(super) has_memory: Option<String>,
    /// Of these, those with online memory in a kernel zone.
    pub(super) has_normal_memory: Option<String>,
}

/// A DIMM of the steps.
#[derive(Debug, Deserialize)]
pub(super) struct Dimm {
    /// QEMU's name.
    pub(super) id: String,
    /// Physical address.
    pub(super) addr: u64,
    /// Bytes.
    pub(super) size: u64,
    /// The node.
    pub(super) node: Option<u32>,
}

/// Reads the steps one by one, so that an error can name the one it is in.
fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Step>, D::Error> {
    struct Steps;
    impl<'de> Visitor<'de> for Steps {
        type Value = Vec<Step>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of steps")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Step>, A::Error> {
            let mut steps = Vec::new();
            loop {
                match seq.next_element() {
                    Ok(Some(step)) => steps.push(step),
                    Ok(None) => return Ok(steps),
                    Err(error) => {
                        return Err(de::Error::custom(format!("step {}: {error}", steps.len())));
                    }
                }
            }
        }
    }
    deserializer.deserialize_seq(Steps)
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`TraceError`] if it cannot be read or replayed.
    pub fn load(path: &Path) -> Result<Self, TraceError> {
        // Not by its length: some files have none and never end.
        let mut json = Vec::new();
        File::open(path)?
            .take(MAX_FILE_SIZE + 1)
            .read_to_end(&mut json)?;
        if json.len() as u64 > MAX_FILE_SIZE {
            return Err(TraceError::TooLong);
        }
        Self::parse(&json)
    }

    /// Reads a document.
    ///
    /// # Errors
    ///
    /// [`TraceError`] if it cannot be replayed.
    pub fn parse(json: &[u8]) -> Result<Self, TraceError> {
        let header: Header = serde_json::from_slice(json)?;
        if header.device.is_some() || header.scenario.starts_with("S5") {
            return Err(TraceError::VirtioMem(header.scenario));
        }
        let trace: Self = serde_json::from_slice(json)?;
        trace.check()?;
        Ok(trace)
    }

    /// Whether every number is in a range a machine can have.
    fn check(&self) -> Result<(), TraceError> {
        let boot = &self.boot;
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
        for (index, step) in self.steps.iter().enumerate() {
            let place = format!("steps[{index}]");
            for (row, zone) in step.zoneinfo.iter().flatten().enumerate() {
                check_zone(&format!("{place}.zoneinfo[{row}]"), zone)?;
            }
            if let super::step::Op::AddDimm(dimm) = &step.op {
                check_dimm(&format!("{place}.arg"), dimm, block_size)?;
            }
            let last = index + 1 == self.steps.len();
            if step.result.is_none() && !(self.incomplete && last) {
                return Err(impossible(place, "there is no result"));
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The smallest trace that has everything.
    fn trace() -> Value {
        let zone = json!({ "node": 0, "zone": "DMA32", "start_pfn": 4096, "spanned": 28672, "present": 28672,
            "managed": 28000 });
        json!({
            "kernel": "6.12.117+deb12-cloud-amd64",
            "scenario": "S1-test",
            "boot": {
                "cmdline": "quiet", "ram_bytes": 134_217_728, "block_size": 134_217_728,
                "auto_online_blocks": "offline", "memory_hotplug_params": { "auto_movable_ratio": "301" },
                "machine_args": [], "zones": [zone], "memtotal_kib": 112_000,
                "blocks": { "0": { "state": "online", "valid_zones": "DMA32" } },
                "iomem": ["01000000-07ffffff : System RAM"],
            },
            "dimms": [{ "id": "dimm0", "addr": 4_294_967_296u64, "size": 134_217_728, "node": null }],
            "steps": [
                { "op": "add_dimm", "target": "dimm0", "result": 0,
                  "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null } },
                { "op": "write_state", "target": 32, "arg": "online", "result": "EINVAL" },
            ],
        })
    }

    /// The error of the trace above with one value replaced.
    fn error_with(pointer: &str, value: Value) -> String {
        let mut trace = trace();
        *trace.pointer_mut(pointer).expect("there is such a value") = value;
        Trace::parse(trace.to_string().as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn trace_with_everything_is_read() {
        let trace = Trace::parse(trace().to_string().as_bytes()).unwrap();
        assert_eq!(trace.steps.len(), 2);
        assert_eq!(trace.steps[1].label, "write_state 32 online");
    }

    #[test]
    fn truncated_file_is_refused_with_its_position_wherever_it_ends() {
        let text = serde_json::to_string_pretty(&trace()).unwrap();
        for length in 0..text.len() {
            let error = Trace::parse(&text.as_bytes()[..length])
                .unwrap_err()
                .to_string();
            assert!(error.contains("at line "), "{length}: {error}");
        }
    }

    #[test]
    fn wrong_types_and_numbers_are_refused_with_their_position() {
        for (pointer, value) in [
            ("/boot/block_size", json!("128M")),
            ("/boot/block_size", json!(-1)),
            ("/boot/ram_bytes", json!(1e30)),
            ("/boot/blocks/0/state", json!(1)),
            ("/boot/zones/0/spanned", json!(-5)),
            ("/dimms/0/addr", json!("4G")),
            ("/dimms/0/node", json!(4_294_967_296u64)),
            ("/steps/0/result", json!(1)),
            ("/steps/0/result", json!([])),
        ] {
            let error = error_with(pointer, value.clone());
            assert!(
                error.contains("at line 1 column "),
                "{pointer} {value}: {error}"
            );
        }
        let text = trace()
            .to_string()
            .replace(r#""blocks":{"0""#, r#""blocks":{"memory0""#);
        let error = Trace::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("at line 1 column "), "{error}");
    }

    #[test]
    fn wrong_steps_are_named() {
        for (pointer, value, expected) in [
            (
                "/steps/1/op",
                json!("frobnicate"),
                "step 1: unknown operation \"frobnicate\"",
            ),
            ("/steps/1/op", json!("write_"), "step 1: unknown operation"),
            (
                "/steps/1/target",
                json!("x"),
                "step 1: target of write_state: not a memory block",
            ),
            (
                "/steps/1/target",
                json!(-1),
                "step 1: target of write_state",
            ),
            (
                "/steps/1/arg",
                json!({}),
                "step 1: arg of write_state: expected text",
            ),
            ("/steps/0/arg", json!(null), "step 0: arg of add_dimm"),
            (
                "/steps/0/arg/size",
                json!(-4096),
                "step 0: arg of add_dimm: invalid value",
            ),
            (
                "/steps/0/op",
                json!("device_del"),
                "step 0: device_del has no outcome",
            ),
            (
                "/steps/0/result",
                json!(null),
                "steps[0]: there is no result",
            ),
        ] {
            let error = error_with(pointer, value);
            assert!(error.contains(expected), "{pointer}: {error}");
        }
    }

    #[test]
    fn what_no_machine_can_have_is_refused_by_name() {
        for (pointer, value, place) in [
            ("/boot/block_size", json!(0), "boot.block_size"),
            ("/boot/block_size", json!(1u64 << 63), "boot.block_size"),
            ("/boot/ram_bytes", json!(u64::MAX), "boot.ram_bytes"),
            ("/boot/iomem", json!([]), "boot.iomem"),
            ("/boot/iomem/0", json!("garbage"), "boot.iomem[0]"),
            ("/boot/iomem/0", json!("5-3 : System RAM"), "boot.iomem[0]"),
            (
                "/boot/iomem/0",
                json!("0-ffffffffffffffff : System RAM"),
                "boot.iomem[0]",
            ),
            (
                "/boot/iomem/0",
                json!("0-fffffffffffffff : System RAM"),
                "boot.iomem[0]",
            ),
            (
                "/boot/iomem/0",
                json!("0-3fffffffffff : System RAM"),
                "boot.iomem[0]",
            ),
            ("/boot/zones/0/zone", json!("HighMem"), "boot.zones[0]"),
            ("/boot/zones/0/start_pfn", json!(u64::MAX), "boot.zones[0]"),
            ("/boot/zones/0/managed", json!(28_673), "boot.zones[0]"),
            ("/boot/zones/0/node", json!(1024), "boot.zones[0]"),
            ("/dimms/0/addr", json!(4_294_967_297u64), "dimms.dimm0"),
            ("/dimms/0/size", json!(0), "dimms.dimm0"),
            ("/steps/0/arg/size", json!(1u64 << 46), "steps[0].arg"),
            (
                "/steps/0/arg/addr",
                json!(u64::MAX - (128 << 20) + 1),
                "steps[0].arg",
            ),
            ("/steps/0/arg/node", json!(5000), "steps[0].arg"),
        ] {
            let error = error_with(pointer, value);
            assert!(
                error.contains(&format!("is not a trace: {place}: ")),
                "{pointer}: {error}"
            );
        }
    }

    #[test]
    fn traces_of_virtio_mem_are_told_apart() {
        let error = error_with("/scenario", json!("S5-rand01"));
        assert!(error.contains("not replayed yet"), "{error}");
        let mut with_device = trace();
        with_device["device"] = json!({ "addr": 1 });
        let error = Trace::parse(with_device.to_string().as_bytes()).unwrap_err();
        assert!(matches!(error, TraceError::VirtioMem(_)), "{error}");
    }

    #[test]
    fn result_may_be_missing_where_the_recording_was_cut_short() {
        let mut cut = trace();
        cut["incomplete"] = json!(true);
        cut["steps"][1]["result"] = json!(null);
        assert!(Trace::parse(cut.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(parse_node_list("0-1,3"), Some(vec![0, 1, 3]));
        assert_eq!(parse_node_list(""), Some(vec![]));
        for wrong in ["a", "1-", "0-4294967295"] {
            assert_eq!(parse_node_list(wrong), None, "{wrong}");
        }
    }
}

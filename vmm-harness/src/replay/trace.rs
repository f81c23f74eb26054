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
use serde_json::Value;
use thiserror::Error;

use super::step::Step;

/// Most bytes of a file: a hundred times what the longest recording has.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// Most memory a trace may work with: a file of a few bytes must not make us keep books on petabytes.
pub(super) const MAX_MEMORY: u64 = 128 << 30;

/// Most steps: twenty times what the longest recording has.
const MAX_STEPS: usize = 10_000;

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
    #[serde(default, deserialize_with = "or_default")]
    pub(super) dimms: Vec<Dimm>,
    /// Module parameters after the last step.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) params_at_end: BTreeMap<String, Parameter>,
    /// The recording was cut short.
    #[serde(default, deserialize_with = "or_default")]
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
    #[serde(default, deserialize_with = "or_default")]
    pub(super) memory_hotplug_params: BTreeMap<String, Parameter>,
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

impl Boot {
    /// Whether the command line sets a parameter of memory hotplug.
    pub(super) fn sets(&self, parameter: &str) -> bool {
        self.cmdline.split_whitespace().any(|word| {
            // To the kernel, dashes and underscores are the same.
            let name = word.split('=').next().unwrap_or_default().replace('-', "_");
            name.strip_prefix("memory_hotplug.") == Some(parameter)
        })
    }
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
    /// Text of `valid_zones`; nothing if it could not be read, as while the block goes away.
    pub(super) valid_zones: Option<String>,
    /// The node, given only if it is not 0.
    #[serde(default, deserialize_with = "or_default")]
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

/// Text of a module parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parameter(pub(super) String);

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self(text)),
            Value::Number(number) => Ok(Self(number.to_string())),
            Value::Bool(truth) => Ok(Self(if truth { "Y" } else { "N" }.into())),
            other => Err(de::Error::custom(format!(
                "a parameter is text or a number, not {other}"
            ))),
        }
    }
}

/// What is null is as if it were missing.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
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
                    Ok(Some(_)) if steps.len() == MAX_STEPS => {
                        return Err(de::Error::custom(format!("more than {MAX_STEPS} steps")));
                    }
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
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::check::parse_node_list;
    use super::*;

    fn zone_row() -> Value {
        json!({ "node": 0, "zone": "DMA32", "start_pfn": 4096, "spanned": 28672, "present": 28672, "managed": 28000 })
    }

    /// The smallest trace that has everything.
    fn trace() -> Value {
        let zone = zone_row();
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
                { "op": "add_dimm", "target": "dimm0", "result": 0, "blocks": {}, "zoneinfo": [], "memtotal_kib": 112_000,
                  "arg": { "addr": 4_294_967_296u64, "size": 134_217_728, "node": null } },
                { "op": "write_state", "target": 32, "arg": "online", "result": "EINVAL",
                  "blocks": {}, "zoneinfo": [], "memtotal_kib": 112_000 },
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
            ("/steps/0/blocks", json!(null), "steps[0]: there is no blocks"),
            ("/steps/1/zoneinfo", json!(null), "steps[1]: there is no zoneinfo"),
            ("/steps/1/memtotal_kib", json!(null), "steps[1]: there is no memtotal_kib"),
            ("/steps/1/zoneinfo", json!(vec![zone_row(); 4097]), "steps[1]: more than 4096"),
            (
                "/steps/0/arg/size",
                json!(-4096),
                "step 0: arg of add_dimm: invalid value",
            ),
            (
                "/steps/0/op",
                json!("device_del"),
                "steps[0]: device_del has no outcome",
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
    fn null_is_as_good_as_missing() {
        for pointer in ["/boot/memory_hotplug_params", "/boot/blocks/0/valid_zones", "/boot/blocks/0/node", "/dimms",
            "/params_at_end", "/incomplete"] {
            for missing in [false, true] {
                let mut changed = trace();
                let (parent, key) = pointer.rsplit_once('/').expect("it has one");
                let parent = changed.pointer_mut(parent).unwrap().as_object_mut().unwrap();
                parent.insert(key.to_owned(), Value::Null);
                if missing {
                    parent.remove(key);
                }
                let parsed = Trace::parse(changed.to_string().as_bytes());
                assert!(parsed.is_ok(), "{pointer}: {parsed:?}");
            }
        }
        let mut number = trace();
        number["boot"]["memory_hotplug_params"]["auto_movable_ratio"] = json!(301);
        let params = Trace::parse(number.to_string().as_bytes()).unwrap().boot.memory_hotplug_params;
        assert_eq!(params["auto_movable_ratio"], Parameter("301".into()));
    }

    #[test]
    fn eject_without_outcome_was_cut_short_or_never_asked_for() {
        let mut cut = trace();
        cut["steps"][1] = json!({ "op": "device_del", "target": "dimm0", "result": 0 });
        cut["incomplete"] = json!(true);
        assert!(Trace::parse(cut.to_string().as_bytes()).is_ok());
        let mut refused = trace();
        refused["steps"][1]["op"] = json!("device_del");
        refused["steps"][1]["target"] = json!("dimm0");
        assert!(Trace::parse(refused.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn results_that_are_not_compared_may_be_anything() {
        for op in ["shell", "read", "wait", "checksum"] {
            for result in [json!(1), json!(-1), json!("EIO")] {
                let mut other = trace();
                other["steps"][1]["op"] = json!(op);
                other["steps"][1]["result"] = result.clone();
                let parsed = Trace::parse(other.to_string().as_bytes());
                assert!(parsed.is_ok(), "{op} {result}: {parsed:?}");
            }
        }
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

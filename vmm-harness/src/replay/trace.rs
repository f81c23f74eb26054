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

use super::boot::{options, parse_bytes, property};
use super::requests::RecordedDevice;
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
}

/// Shorthand for [`TraceError::Impossible`].
pub(super) fn impossible(place: impl Into<String>, what: impl Into<String>) -> TraceError {
    TraceError::Impossible {
        place: place.into(),
        what: what.into(),
    }
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
    /// The virtio-mem device.
    pub(super) device: Option<RecordedDevice>,
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

    /// A property the machine's command line gives its virtio-mem device.
    fn of_mem_device(&self, name: &str) -> Option<&str> {
        let mut devices =
            options(self, "-device").filter(|option| option.starts_with("virtio-mem-pci,"));
        devices.find_map(|option| property(option, name))
    }

    /// Reads a document.
    ///
    /// # Errors
    ///
    /// [`TraceError`] if it cannot be replayed.
    pub fn parse(json: &[u8]) -> Result<Self, TraceError> {
        let mut trace: Self = serde_json::from_slice(json)?;
        let requested_size = trace.of_mem_device("requested-size").and_then(parse_bytes);
        let node = trace
            .of_mem_device("node")
            .and_then(|node| node.parse().ok());
        if let Some(device) = &mut trace.device {
            device.requested_size = requested_size.unwrap_or(0);
            device.node = node.unwrap_or(0);
        }
        trace.check()?;
        Ok(trace)
    }
}

#[cfg(test)]
mod tests;

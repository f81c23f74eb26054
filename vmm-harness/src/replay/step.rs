//! One step of a trace: what was done, and what was seen afterwards.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::trace::{BlockRow, Dimm, NodeLists, ZoneRow};

/// What was done, and what was seen afterwards. What was not recorded is not compared.
#[derive(Debug, Deserialize)]
#[serde(try_from = "RawStep")]
pub(super) struct Step {
    /// What was done.
    pub(super) op: Op,
    /// How the operation is called in messages.
    pub(super) label: String,
    /// How it ended.
    pub(super) result: Option<Outcome>,
    /// Memory blocks, by id.
    pub(super) blocks: Option<BTreeMap<u64, BlockRow>>,
    /// Zones.
    pub(super) zoneinfo: Option<Vec<ZoneRow>>,
    /// `MemTotal`.
    pub(super) memtotal_kib: Option<u64>,
    /// Uevents of memory blocks since the step before, in order.
    pub(super) uevents: Vec<String>,
    /// Nodes by state.
    pub(super) nodes: Option<NodeLists>,
    /// System RAM in `/proc/iomem`, above 4 GiB.
    pub(super) iomem: Option<Vec<String>>,
    /// An eject was refused or completed during this step, as the machine heard of it.
    pub(super) eject_answered: bool,
}

/// An operation.
#[derive(Debug)]
pub(super) enum Op {
    /// A DIMM was plugged in.
    AddDimm(Dimm),
    /// The machine asked for a DIMM back.
    DeviceDel {
        /// QEMU's name of it.
        id: String,
        /// What came of it while the recorder waited.
        outcome: EjectOutcome,
    },
    /// A file of the memory subsystem was written.
    Write {
        /// Path below `/sys/devices/system/memory`.
        file: String,
        /// What was written, without a newline.
        text: String,
    },
    /// A module parameter was written.
    WriteParam {
        /// Its name.
        name: String,
        /// What was written.
        text: String,
        /// What was read afterwards.
        value_after: Option<String>,
    },
    /// A shell script was run.
    Shell {
        /// The script.
        script: String,
        /// What it printed.
        out: String,
    },
    /// Something that is none of memory hotplug's business.
    Other,
}

/// What came of an eject while the recorder waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EjectOutcome {
    /// The DIMM is gone.
    Deleted,
    /// The guest refused.
    GuestError,
    /// No answer yet.
    Timeout,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Well.
    Success,
    /// With this errno.
    Errno(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Success => f.write_str("success"),
            Self::Errno(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for Outcome {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Number(number) if number.as_u64() == Some(0) => Ok(Self::Success),
            Value::String(name) => Ok(Self::Errno(name)),
            other => Err(de::Error::custom(format!(
                "the result is 0 or the name of an errno, not {other}"
            ))),
        }
    }
}

/// A step as it lies on disk: what the arguments mean depends on the operation.
#[derive(Deserialize)]
struct RawStep {
    op: String,
    #[serde(default)]
    target: Value,
    #[serde(default)]
    arg: Value,
    result: Option<Outcome>,
    blocks: Option<BTreeMap<u64, BlockRow>>,
    zoneinfo: Option<Vec<ZoneRow>>,
    memtotal_kib: Option<u64>,
    uevents: Option<Vec<String>>,
    nodes: Option<NodeLists>,
    iomem: Option<Vec<String>>,
    qmp_events: Option<Vec<QmpEvent>>,
    outcome: Option<EjectOutcome>,
    out: Option<String>,
    #[serde(default)]
    value_after: Value,
}

#[derive(Deserialize)]
struct QmpEvent {
    event: String,
    #[serde(default)]
    info: Value,
}

impl QmpEvent {
    /// Whether the guest has come to an end with an eject: `_OST` other than "in progress", for an eject request.
    fn answers_eject(&self) -> bool {
        const EJECT_REQUEST: u64 = 3;
        const IN_PROGRESS: u64 = 0x84;
        let info = |key: &str| self.info.get(key).and_then(Value::as_u64);
        match self.event.as_str() {
            "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" => true,
            "ACPI_DEVICE_OST" => {
                info("source") == Some(EJECT_REQUEST) && info("status") != Some(IN_PROGRESS)
            }
            _ => false,
        }
    }
}

/// Where a DIMM goes.
#[derive(Deserialize)]
struct Placement {
    addr: u64,
    size: u64,
    node: Option<u32>,
}

impl TryFrom<RawStep> for Step {
    type Error = String;

    fn try_from(raw: RawStep) -> Result<Self, String> {
        let op = raw.operation()?;
        let words = [&raw.target, &raw.arg].map(|value| match value {
            Value::Null => String::new(),
            Value::String(text) => format!(" {text}"),
            Value::Object(_) => String::new(),
            other => format!(" {other}"),
        });
        Ok(Self {
            label: format!("{}{}", raw.op, words.concat()),
            op,
            result: raw.result,
            blocks: raw.blocks,
            zoneinfo: raw.zoneinfo,
            memtotal_kib: raw.memtotal_kib,
            uevents: raw
                .uevents
                .into_iter()
                .flatten()
                .filter(|event| is_memory_event(event))
                .collect(),
            nodes: raw.nodes,
            iomem: raw.iomem,
            eject_answered: raw.qmp_events.iter().flatten().any(QmpEvent::answers_eject),
        })
    }
}

impl RawStep {
    fn operation(&self) -> Result<Op, String> {
        match self.op.as_str() {
            "add_dimm" => {
                let Placement { addr, size, node } = Placement::deserialize(&self.arg)
                    .map_err(|error| format!("arg of add_dimm: {error}"))?;
                let id = self.text("target", &self.target)?;
                Ok(Op::AddDimm(Dimm {
                    id,
                    addr,
                    size,
                    node,
                }))
            }
            "device_del" => Ok(Op::DeviceDel {
                id: self.text("target", &self.target)?,
                outcome: self.outcome.ok_or("device_del has no outcome")?,
            }),
            "write_param" => {
                let path = self.text("target", &self.target)?;
                let name = path.rsplit(['/', '.']).next().unwrap_or_default();
                Ok(Op::WriteParam {
                    name: name.to_owned(),
                    text: self.text("arg", &self.arg)?,
                    value_after: match &self.value_after {
                        Value::Null => None,
                        value => Some(self.text("value_after", value)?),
                    },
                })
            }
            "shell" => Ok(Op::Shell {
                script: self.text("arg", &self.arg)?,
                out: self.out.clone().unwrap_or_default(),
            }),
            "read" | "wait" | "fill_tmpfs" | "checksum" | "rm" | "hog" => Ok(Op::Other),
            op => match op.strip_prefix("write_") {
                Some(file) if !file.is_empty() => Ok(Op::Write {
                    file: match &self.target {
                        Value::Null => file.to_owned(),
                        Value::Number(block) if block.is_u64() => format!("memory{block}/{file}"),
                        _ => return Err(format!("target of {op}: not a memory block")),
                    },
                    text: self.text("arg", &self.arg)?,
                }),
                _ => Err(format!("unknown operation {op:?}")),
            },
        }
    }

    fn text(&self, field: &str, value: &Value) -> Result<String, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            // What can be written as a number sometimes was.
            Value::Number(number) if field != "target" => Ok(number.to_string()),
            other => Err(format!(
                "{field} of {}: expected text, got {other}",
                self.op
            )),
        }
    }
}

/// `online memory37`; the kernel has others to tell of, too.
fn is_memory_event(event: &str) -> bool {
    event.split_once(' ').is_some_and(|(_, device)| {
        device
            .strip_prefix("memory")
            .is_some_and(|id| id.parse::<u64>().is_ok())
    })
}

//! One step of a trace: what was done, and what was seen afterwards.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use super::qmp::Message;
use super::requests::Recorded;
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
    /// What the machine heard from ACPI during this step.
    pub(super) messages: Vec<Message>,
    /// What the virtio-mem driver asked of its device since the step before.
    pub(super) requests: Vec<Recorded>,
    /// The recorder did not wait until the driver had done all it could.
    pub(super) settle_timeout: bool,
    /// Bytes the device wants plugged, afterwards.
    pub(super) requested_size: Option<u64>,
    /// Bytes the device has plugged, afterwards.
    pub(super) plugged_size: Option<u64>,
}

impl Step {
    /// Whether there is a state to compare.
    pub(super) fn shows_state(&self) -> bool {
        let lists = self.blocks.is_some() || self.zoneinfo.is_some() || self.nodes.is_some();
        lists || self.memtotal_kib.is_some() || self.iomem.is_some()
    }
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
        /// What came of it while the recorder waited; nothing if the recording was cut short.
        outcome: Option<EjectOutcome>,
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
    /// The driver of a virtio-mem device came to it; what its module and the kernel's log said.
    Probe {
        /// Lines.
        out: String,
    },
    /// The operator asked for another size of a virtio-mem device, in bytes.
    Resize(u64),
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

impl fmt::Display for EjectOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deleted => "deleted",
            Self::GuestError => "guest_error",
            Self::Timeout => "timeout",
        })
    }
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

impl TryFrom<&Value> for Outcome {
    type Error = String;

    fn try_from(value: &Value) -> Result<Self, String> {
        match value {
            Value::Number(number) if number.as_u64() == Some(0) => Ok(Self::Success),
            Value::String(name) => Ok(Self::Errno(name.clone())),
            other => Err(format!(
                "the result is 0 or the name of an errno, not {other}"
            )),
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
    result: Option<Value>,
    blocks: Option<BTreeMap<u64, BlockRow>>,
    zoneinfo: Option<Vec<ZoneRow>>,
    memtotal_kib: Option<u64>,
    uevents: Option<Vec<String>>,
    nodes: Option<NodeLists>,
    iomem: Option<Vec<String>>,
    qmp_events: Option<Vec<Value>>,
    outcome: Option<EjectOutcome>,
    out: Option<String>,
    #[serde(default)]
    requests: Vec<Value>,
    #[serde(default)]
    settle_timeout: Value,
    requested_size: Option<u64>,
    plugged_size: Option<u64>,
    #[serde(default)]
    value_after: Value,
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
            result: raw.outcome_of(&op)?,
            op,
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
            messages: raw
                .qmp_events
                .iter()
                .flatten()
                .filter_map(Message::read)
                .collect(),
            requests: raw
                .requests
                .iter()
                .filter_map(|request| Recorded::read(request).transpose())
                .collect::<Result<_, _>>()?,
            settle_timeout: ![Value::Null, Value::Bool(false)].contains(&raw.settle_timeout),
            requested_size: raw.requested_size,
            plugged_size: raw.plugged_size,
        })
    }
}

impl RawStep {
    /// How the operation ended. Where nothing is compared with it, any number or text will do: scripts have a status
    /// of their own.
    fn outcome_of(&self, op: &Op) -> Result<Option<Outcome>, String> {
        match (&self.result, op) {
            (None, _) => Ok(None),
            (Some(Value::Number(_) | Value::String(_)), Op::Shell { .. } | Op::Other) => {
                Ok(Some(Outcome::Success))
            }
            (Some(value), _) => Outcome::try_from(value).map(Some),
        }
    }

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
                outcome: self.outcome,
            }),
            "write_param" => {
                let (name, text) = self.parameter()?;
                Ok(Op::WriteParam {
                    name: name.rsplit(['/', '.']).next().unwrap_or_default().into(),
                    text,
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
            "probe" => Ok(Op::Probe {
                out: self.out.clone().unwrap_or_default(),
            }),
            "resize" => match self.arg.as_u64() {
                Some(size) => Ok(Op::Resize(size)),
                None => Err(format!("arg of resize: {} is no size", self.arg)),
            },
            "initial" | "read" | "wait" | "fill_tmpfs" | "checksum" | "rm" | "hog" => Ok(Op::Other),
            op => match op.strip_prefix("write_") {
                Some(file) if !file.is_empty() => Ok(Op::Write {
                    file: match self.block()? {
                        None => file.to_owned(),
                        Some(block) => format!("memory{block}/{file}"),
                    },
                    text: self.text("arg", &self.arg)?,
                }),
                _ => Err(format!("unknown operation {op:?}")),
            },
        }
    }

    /// Name and value of the parameter that was written: target and argument, or both in the argument.
    fn parameter(&self) -> Result<(String, String), String> {
        let pair = match (&self.target, &self.arg) {
            (Value::Null, Value::String(text)) => text
                .split_once('=')
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
            (Value::Null, Value::Object(fields)) => match fields.get("name") {
                Some(Value::String(name)) => {
                    let value = fields.get("value").unwrap_or(&Value::Null);
                    Some((name.clone(), self.text("arg", value)?))
                }
                _ => None,
            },
            (Value::Null, Value::Array(pair)) => match &pair[..] {
                [Value::String(name), value] => Some((name.clone(), self.text("arg", value)?)),
                _ => None,
            },
            (target, arg) => Some((self.text("target", target)?, self.text("arg", arg)?)),
        };
        pair.ok_or_else(|| format!("arg of {}: no name and value in {}", self.op, self.arg))
    }

    /// The memory block that was written to; none if the file is of all of them.
    fn block(&self) -> Result<Option<u64>, String> {
        let block = match &self.target {
            Value::Null => return Ok(None),
            Value::Number(block) => block.as_u64(),
            Value::String(text) => text.strip_prefix("memory").unwrap_or(text).parse().ok(),
            _ => None,
        };
        block
            .map(Some)
            .ok_or_else(|| format!("target of {}: not a memory block", self.op))
    }

    fn text(&self, field: &str, value: &Value) -> Result<String, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            // What can be written as a number or a truth sometimes was, and nothing was written as null.
            Value::Number(number) if field != "target" => Ok(number.to_string()),
            Value::Bool(truth) if field != "target" => Ok(if *truth { "Y" } else { "N" }.into()),
            Value::Null if field == "arg" => Ok(String::new()),
            other => Err(format!(
                "{field} of {}: expected text, got {other}",
                self.op
            )),
        }
    }
}

/// `online memory37`; the kernel has others to tell of, too.
fn is_memory_event(event: &str) -> bool {
    event.split_once(' ').is_some_and(|(action, device)| {
        let block = device.strip_prefix("memory");
        ["add", "remove", "online", "offline"].contains(&action)
            && block.is_some_and(|id| id.parse::<u64>().is_ok())
    })
}

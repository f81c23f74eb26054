//! Recorded against replayed, field by field, up to the first difference.

use std::collections::BTreeSet;
use std::fmt::{self, Display};

use serde::Serialize;

use super::check::{parse_iomem, parse_node_list};
use super::snapshot::Snapshot;
use super::step::Step;
use super::trace::{BlockRow, Boot, NodeLists, ZoneRow};

/// The recorder kept the lines of `/proc/iomem` from here on.
const IOMEM_START: u64 = 4 << 30;

/// Where recording and replay part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Number of the step, from 0; none if it is the state at boot, or the parameters at the end.
    pub step: Option<usize>,
    /// What was done.
    pub operation: String,
    /// What differs: a memory block, a zone, …
    pub subject: String,
    /// What of it; nothing if it is one value.
    pub field: String,
    /// What was recorded.
    pub expected: String,
    /// What the model says.
    pub got: String,
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "step {step} ({}): ", self.operation)?,
            None => write!(f, "{}: ", self.operation)?,
        }
        let Self {
            subject,
            field,
            expected,
            got,
            ..
        } = self;
        f.write_str(subject)?;
        if !field.is_empty() {
            write!(f, " {field}")?;
        }
        write!(f, ": expected {expected}, got {got}")
    }
}

/// A difference, before it is known where in the trace it is.
#[derive(Debug)]
pub(super) struct Mismatch {
    pub(super) subject: String,
    pub(super) field: &'static str,
    pub(super) expected: String,
    pub(super) got: String,
}

impl Mismatch {
    pub(super) fn at(self, step: Option<usize>, operation: &str) -> Difference {
        Difference {
            step,
            operation: operation.to_owned(),
            subject: self.subject,
            field: self.field.to_owned(),
            expected: self.expected,
            got: self.got,
        }
    }
}

/// Compares, and counts how often.
#[derive(Debug)]
pub(super) struct Comparison<'a> {
    boot: &'a Boot,
    /// The blocks that were there at boot were recorded in each step, too.
    boot_blocks_recorded: bool,
    /// Blocks of boot memory.
    boot_blocks: BTreeSet<u64>,
    /// Blocks that may be recorded as going offline, because they were read before they were there.
    pub(super) arriving: BTreeSet<u64>,
    /// How many were.
    pub(super) early_states: u64,
    pub(super) count: u64,
}

impl<'a> Comparison<'a> {
    pub(super) fn new(boot: &'a Boot, boot_blocks: BTreeSet<u64>, steps: &[Step]) -> Self {
        let boot_blocks_recorded = steps
            .iter()
            .filter_map(|step| step.blocks.as_ref())
            .any(|blocks| blocks.keys().any(|id| boot_blocks.contains(id)));
        Self {
            boot,
            boot_blocks_recorded,
            boot_blocks,
            arriving: BTreeSet::new(),
            early_states: 0,
            count: 0,
        }
    }

    /// One value.
    pub(super) fn value<T: PartialEq + Display>(
        &mut self,
        subject: impl Display,
        field: &'static str,
        expected: &T,
        got: &T,
    ) -> Result<(), Mismatch> {
        self.count += 1;
        if expected == got {
            return Ok(());
        }
        Err(Mismatch {
            subject: subject.to_string(),
            field,
            expected: format!("{expected}"),
            got: format!("{got}"),
        })
    }

    /// The state at boot.
    pub(super) fn boot(&mut self, got: &Snapshot) -> Result<(), Mismatch> {
        let boot = self.boot;
        // Blocks of DIMMs were recorded only where they had been brought online.
        let mut ids = self.boot_blocks.clone();
        ids.extend(boot.blocks.keys());
        for id in ids {
            self.block(id, boot.blocks.get(&id), got.blocks.get(&id))?;
        }
        self.zones(&boot.zones, got)?;
        self.value("MemTotal", "kib", &boot.memtotal_kib, &got.memtotal_kib)?;
        boot.nodes
            .iter()
            .try_for_each(|nodes| self.nodes(nodes, got))
    }

    /// The state after a step. The result is compared by who has it.
    pub(super) fn step(&mut self, step: &Step, got: &Snapshot) -> Result<(), Mismatch> {
        if let Some(blocks) = &step.blocks {
            let mut ids: BTreeSet<u64> = got.blocks.keys().copied().collect();
            if !self.boot_blocks_recorded {
                ids.retain(|id| !self.boot_blocks.contains(id));
            }
            ids.extend(blocks.keys());
            for id in ids {
                self.block(id, blocks.get(&id), got.blocks.get(&id))?;
            }
        }
        if let Some(zones) = &step.zoneinfo {
            self.zones(zones, got)?;
        }
        if let Some(recorded) = step.memtotal_kib {
            self.value("MemTotal", "kib", &recorded, &got.memtotal_kib)?;
        }
        if let Some(nodes) = &step.nodes {
            self.nodes(nodes, got)?;
        }
        if let Some(lines) = &step.iomem {
            self.iomem(lines, got)?;
        }
        Ok(())
    }

    fn block(
        &mut self,
        id: u64,
        recorded: Option<&BlockRow>,
        got: Option<&BlockRow>,
    ) -> Result<(), Mismatch> {
        let subject = format_args!("memory{id}");
        let (Some(recorded), Some(got)) = (recorded, got) else {
            let [recorded, got] =
                [recorded, got].map(|row| row.map_or("no such block", |row| &row.state));
            return self.value(subject, "state", &recorded, &got);
        };
        if self.arriving.contains(&id)
            && recorded.state == "going-offline"
            && got.state == "offline"
        {
            // The zones it may go to were read then, too.
            self.early_states += 1;
            return self.value(subject, "node", &recorded.node, &got.node);
        }
        self.value(subject, "state", &recorded.state, &got.state)?;
        if let (Some(recorded), Some(got)) = (&recorded.valid_zones, &got.valid_zones) {
            self.value(subject, "valid_zones", recorded, got)?;
        }
        self.value(subject, "node", &recorded.node, &got.node)
    }

    fn zones(&mut self, recorded: &[ZoneRow], got: &Snapshot) -> Result<(), Mismatch> {
        let same = |a: &ZoneRow, b: &ZoneRow| a.node == b.node && a.zone == b.zone;
        let empty = |row: &ZoneRow| ZoneRow {
            start_pfn: None,
            spanned: 0,
            present: 0,
            managed: 0,
            ..row.clone()
        };
        for row in recorded.iter().filter(|row| row.zone != "Device") {
            let found = got.zones.iter().find(|zone| same(zone, row));
            self.zone(row, &found.cloned().unwrap_or_else(|| empty(row)))?;
        }
        for zone in &got.zones {
            if !recorded.iter().any(|row| same(zone, row)) {
                self.zone(&empty(zone), zone)?;
            }
        }
        Ok(())
    }

    fn zone(&mut self, recorded: &ZoneRow, got: &ZoneRow) -> Result<(), Mismatch> {
        let subject = format_args!("node {} zone {}", recorded.node, recorded.zone);
        let start = |row: &ZoneRow| row.start_pfn.map_or("none".into(), |pfn| pfn.to_string());
        self.value(subject, "start_pfn", &start(recorded), &start(got))?;
        self.value(subject, "spanned", &recorded.spanned, &got.spanned)?;
        self.value(subject, "present", &recorded.present, &got.present)?;
        self.value(subject, "managed", &recorded.managed, &got.managed)
    }

    /// What was heard during a step.
    pub(super) fn uevents(&mut self, recorded: &[String], got: &[String]) -> Result<(), Mismatch> {
        let nothing = String::from("nothing more");
        for index in 0..recorded.len().max(got.len()) {
            let [recorded, got] = [recorded, got].map(|list| list.get(index).unwrap_or(&nothing));
            self.value(format_args!("uevent {index}"), "text", recorded, got)?;
        }
        Ok(())
    }

    fn nodes(&mut self, recorded: &NodeLists, got: &Snapshot) -> Result<(), Mismatch> {
        let lists = [
            ("online", &recorded.online, &got.nodes_online),
            ("has_memory", &recorded.has_memory, &got.nodes_with_memory),
            (
                "has_normal_memory",
                &recorded.has_normal_memory,
                &got.nodes_with_normal_memory,
            ),
        ];
        for (field, recorded, got) in lists {
            let Some(text) = recorded else { continue };
            let list: Option<BTreeSet<u32>> =
                parse_node_list(text).map(|list| list.into_iter().collect());
            let same = list.as_ref() == Some(got);
            let shown = if same {
                text.clone()
            } else {
                format!("{got:?}")
            };
            self.value("nodes", field, text, &shown)?;
        }
        Ok(())
    }

    fn iomem(&mut self, recorded: &[String], got: &Snapshot) -> Result<(), Mismatch> {
        let recorded: Vec<_> = recorded
            .iter()
            .filter(|line| {
                parse_iomem(line).is_some_and(|(range, name)| {
                    range.start >= IOMEM_START && name.starts_with("System RAM")
                })
            })
            .map(|line| line.trim().to_owned())
            .collect();
        let got: Vec<_> = got
            .system_ram
            .iter()
            .filter(|(range, _)| range.start >= IOMEM_START)
            .map(|(range, name)| format!("{:08x}-{:08x} : {name}", range.start, range.end - 1))
            .collect();
        let nothing = String::from("nothing more");
        for index in 0..recorded.len().max(got.len()) {
            let [recorded, got] = [&recorded, &got].map(|list| list.get(index).unwrap_or(&nothing));
            self.value(format_args!("iomem line {index}"), "text", recorded, got)?;
        }
        Ok(())
    }
}

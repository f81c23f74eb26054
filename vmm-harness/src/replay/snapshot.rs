//! The model's state in the shape the traces have.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::trace::{BlockRow, ZoneRow};

/// The model's state in the shape the traces have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Memory blocks, by id.
    pub(super) blocks: BTreeMap<u64, BlockRow>,
    /// Zones that have pages, by node and address.
    pub(super) zones: Vec<ZoneRow>,
    /// `MemTotal`.
    pub(super) memtotal_kib: u64,
    /// Nodes with memory blocks or CPUs.
    pub(super) nodes_online: BTreeSet<u32>,
    /// Nodes with online memory.
    pub(super) nodes_with_memory: BTreeSet<u32>,
    /// Nodes with online memory in a kernel zone.
    pub(super) nodes_with_normal_memory: BTreeSet<u32>,
    /// Top-level System RAM, in bytes, and its name.
    pub(super) system_ram: Vec<(Range<u64>, String)>,
}

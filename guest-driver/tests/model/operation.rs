//! What can happen to a machine.

use std::ops::Range;

use virtio_mem_driver::hotplug::{
    DeviceKind, Error, MemoryAction, Mobility, OnlineType, Owner, Step,
};

/// Where memory is added to; groups by their place in the list of all that were ever registered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Node(u32),
    Group(usize),
}

/// A request to add memory.
#[derive(Clone, Debug)]
pub(crate) struct Add {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) target: Target,
    pub(crate) owner: Owner,
    pub(crate) name: &'static str,
    pub(crate) merge: bool,
    pub(crate) memmap: bool,
    pub(crate) withheld: Range<u64>,
}

/// One operation. Pages, isolations, groups and notifiers are named by their place in lists both sides keep.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Add(Add),
    Remove(Owner, Range<u64>),
    OfflineAndRemove(Owner, Range<u64>),
    Adopt(Owner, Range<u64>),
    Online(u64, OnlineType),
    DeviceOnline(u64),
    DeviceOffline(u64),
    Offline(u64),
    Write(String, String),
    Isolate(Range<u64>),
    IsolateBlock(u64),
    Migrate(usize, u32),
    Commit(usize),
    Cancel(usize),
    FakeOffline(Range<u64>),
    FakeOnline(Range<u64>),
    Allocate(u32, Mobility, usize),
    Free(usize, usize),
    Pin(usize),
    Unpin(usize),
    PinLongTerm(usize),
    UseFreedPage,
    HardOffline(u64),
    SoftOffline(u64),
    AddDevice(Range<u64>, u32, DeviceKind),
    RemoveDevice(Range<u64>),
    RegisterStatic(u32, u64),
    RegisterDynamic(u32, u64),
    Unregister(usize),
    RegisterNotifier(i32),
    UnregisterNotifier(usize),
}

impl Operation {
    /// What it counts as.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Remove(..) => "remove",
            Self::OfflineAndRemove(..) => "offline and remove",
            Self::Adopt(..) => "adopt",
            Self::Online(_, OnlineType::Online) => "online",
            Self::Online(_, OnlineType::Kernel) => "online_kernel",
            Self::Online(_, OnlineType::Movable) => "online_movable",
            Self::DeviceOnline(_) => "device online",
            Self::DeviceOffline(_) => "device offline",
            Self::Offline(_) => "offline",
            Self::Write(file, _) if file.ends_with("/state") => "write state",
            Self::Write(file, _) if file.ends_with("/online") => "write online",
            Self::Write(file, _) if file == "probe" => "write probe",
            Self::Write(file, _) if file == "auto_online_blocks" => "write auto_online_blocks",
            Self::Write(file, _) if file.starts_with("parameters/") => "write parameter",
            Self::Write(file, _) if file.ends_with("_offline_page") => "write offline_page",
            Self::Write(..) => "write anything",
            Self::Isolate(_) => "isolate",
            Self::IsolateBlock(_) => "isolate block",
            Self::Migrate(..) => "migrate",
            Self::Commit(_) => "commit",
            Self::Cancel(_) => "cancel",
            Self::FakeOffline(_) => "fake offline",
            Self::FakeOnline(_) => "fake online",
            Self::Allocate(_, Mobility::Movable, _) => "allocate movable",
            Self::Allocate(_, Mobility::Unmovable, _) => "allocate unmovable",
            Self::Free(..) => "free",
            Self::Pin(_) => "pin",
            Self::Unpin(_) => "unpin",
            Self::PinLongTerm(_) => "pin long-term",
            Self::UseFreedPage => "use freed page",
            Self::HardOffline(_) => "hard offline",
            Self::SoftOffline(_) => "soft offline",
            Self::AddDevice(..) => "add device memory",
            Self::RemoveDevice(_) => "remove device memory",
            Self::RegisterStatic(..) => "register static group",
            Self::RegisterDynamic(..) => "register dynamic group",
            Self::Unregister(_) => "unregister group",
            Self::RegisterNotifier(_) => "register notifier",
            Self::UnregisterNotifier(_) => "unregister notifier",
        }
    }
}

/// A notifier that objects once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Veto {
    /// Its place in the chain's list, in the order of registration.
    pub(crate) notifier: usize,
    pub(crate) action: MemoryAction,
    pub(crate) error: Error,
}

/// A failure injected before an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Injected {
    pub(crate) step: Step,
    pub(crate) skip: u32,
    pub(crate) error: Error,
}

//! The options of a guest and its device, on a command line or in a file.

use clap::{Args, ValueEnum};
use serde::Deserialize;
use virtio_mem_driver::driver::{Mode, Strategy};
use vmm_harness::demo::{BackingKind, DemoOptions};
use vmm_harness::{GuestKind, Size};

/// What is not given is as in [`DemoOptions`].
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct MachineArgs {
    /// Memory the guest has from the start [default: 256M]
    #[arg(long, value_name = "SIZE")]
    boot_memory: Option<Size>,
    /// Size of the device-managed region [default: 4G]
    #[arg(long, value_name = "SIZE")]
    region: Option<Size>,
    /// Size of a device block, a power of two [default: 2M]
    #[arg(long, value_name = "SIZE")]
    block_size: Option<Size>,
    /// Size of a hypervisor memory slot, a multiple of the block size [default: 128M, or a 256th of the region]
    #[arg(long, value_name = "SIZE")]
    slot_size: Option<Size>,
    /// Proximity domain the device names
    #[arg(long, value_name = "N")]
    node: Option<u16>,
    /// In which order the guest's driver plugs and unplugs [default: direct]
    #[arg(long, value_enum)]
    policy: Option<Policy>,
    /// How the guest's driver deals with blocks; by default sbm where that is possible
    #[arg(long, value_enum)]
    mode: Option<DriverMode>,
    /// Size of a big block, a power of two; by default the larger of a block and a memory block
    #[arg(long, value_name = "SIZE")]
    bbm_block_size: Option<Size>,
    /// Host memory behind the region [default: anon]
    #[arg(long, value_enum)]
    backing: Option<Backing>,
    /// Number of vCPUs, all of which work in the memory [default: 2]
    #[arg(long, value_name = "N")]
    vcpus: Option<usize>,
    /// Where the guest runs [default: auto]
    #[arg(long, value_enum)]
    guest: Option<Guest>,
    /// Seed of everything chosen at random [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Guest {
    /// On KVM if it can be used, else in this process
    Auto,
    /// On KVM or not at all
    Kvm,
    /// In this process
    InProcess,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Policy {
    /// The fewest requests, several in flight, retries after 10 ms or more
    Direct,
    /// Linux's order, one request at a time, retries after 50 s or more
    Linux,
}

impl From<Policy> for Strategy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Direct => Self::Direct,
            Policy::Linux => Self::Linux,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum DriverMode {
    /// Sub-Block Mode: memory blocks of 128 MiB may be plugged in part; for blocks up to 64 MiB
    Sbm,
    /// Big-Block Mode: one or more memory blocks are plugged as a whole
    Bbm,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backing {
    /// Private anonymous memory, base pages
    Anon,
    /// Private anonymous memory, transparent huge pages
    Thp,
    /// Shared memory (memfd), base pages
    Memfd,
    /// Huge pages of 2 MiB from the host's pool
    #[value(name = "hugetlb-2m")]
    #[serde(rename = "hugetlb-2m")]
    Hugetlb2m,
}

impl From<Backing> for BackingKind {
    fn from(backing: Backing) -> Self {
        match backing {
            Backing::Anon => Self::Anon,
            Backing::Thp => Self::Thp,
            Backing::Memfd => Self::Memfd,
            Backing::Hugetlb2m => Self::Hugetlb2m,
        }
    }
}

impl MachineArgs {
    /// These, and where something is not given, `others`.
    pub(crate) fn or(self, others: Self) -> Self {
        Self {
            boot_memory: self.boot_memory.or(others.boot_memory),
            region: self.region.or(others.region),
            block_size: self.block_size.or(others.block_size),
            slot_size: self.slot_size.or(others.slot_size),
            node: self.node.or(others.node),
            policy: self.policy.or(others.policy),
            mode: self.mode.or(others.mode),
            bbm_block_size: self.bbm_block_size.or(others.bbm_block_size),
            backing: self.backing.or(others.backing),
            vcpus: self.vcpus.or(others.vcpus),
            guest: self.guest.or(others.guest),
            seed: self.seed.or(others.seed),
        }
    }

    /// The seed, if one is given.
    pub(crate) fn seed(&self) -> Option<u64> {
        self.seed
    }

    pub(crate) fn options(&self) -> DemoOptions {
        let default = DemoOptions::default();
        let size = |size: Option<Size>, default| size.map_or(default, |Size(bytes)| bytes);
        DemoOptions {
            boot_memory: size(self.boot_memory, default.boot_memory),
            region: size(self.region, default.region),
            block_size: size(self.block_size, default.block_size),
            slot_size: self.slot_size.map(|Size(bytes)| bytes),
            node_id: self.node,
            strategy: self.policy.map_or(default.strategy, Strategy::from),
            mode: self.mode.map(|mode| match mode {
                DriverMode::Sbm => Mode::SubBlock,
                DriverMode::Bbm => Mode::BigBlock,
            }),
            bbm_block_size: self.bbm_block_size.map(|Size(bytes)| bytes),
            backing: self.backing.map_or(default.backing, BackingKind::from),
            vcpu_count: self.vcpus.unwrap_or(default.vcpu_count),
            guest: match self.guest {
                None => default.guest,
                Some(Guest::Auto) => GuestKind::Auto,
                Some(Guest::Kvm) => GuestKind::Kvm,
                Some(Guest::InProcess) => GuestKind::InProcess,
            },
            seed: self.seed.unwrap_or(default.seed),
            ..default
        }
    }
}

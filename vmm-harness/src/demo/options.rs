//! What the demonstration is asked to do, and what follows from that before anything is started.

use std::fmt;
use std::io;

use serde::Serialize;
use virtio_mem::{Anonymous, Backing, Builder, Hugetlb, Memfd, VirtioMem};
use virtio_mem_driver::driver::{Mode, Policy, Sizes, Strategy};
use virtio_mem_driver::hotplug::Profile;
use virtio_mem_wire::Geometry;
use vm_memory::GuestAddress;
use vmem_guest::abi::MAX_VCPUS;

use super::DemoError;
use super::table::size;
use crate::faults::Faults;
use crate::layout::{LARGE_PAGE, REGION_START};
use crate::{GUEST_IMAGE, GuestKind, MachineConfig, Workload};

/// Sizes to ask for, if none are named; rounded up to what the driver can do.
const TARGETS: [u64; 5] = [1 << 30, 130 << 20, 2 << 30, 6 << 20, 0];

/// What to run.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// Bytes of memory the guest has from the start.
    pub boot_memory: u64,
    /// Guest-physical address of the device-managed region.
    pub region_start: u64,
    /// Bytes of the device-managed region.
    pub region: u64,
    /// Bytes per device block.
    pub block_size: u64,
    /// Bytes per memory slot; `None` is what the device chooses.
    pub slot_size: Option<u64>,
    /// Proximity domain of the region; `None` is a device without one.
    pub node_id: Option<u16>,
    /// Host memory behind the region.
    pub backing: BackingKind,
    /// In which order the guest's driver plugs and unplugs.
    pub strategy: Strategy,
    /// The mode of the guest's driver; `None` is what it chooses itself.
    pub mode: Option<Mode>,
    /// Bytes of a big block; `None` is the least that is possible.
    pub bbm_block_size: Option<u64>,
    /// Sizes to ask for, in bytes, one after another; `None` is a choice that suits the driver.
    pub targets: Option<Vec<u64>>,
    /// Pages the workers verify at each size before the next step, if the size leaves them any.
    pub pages_per_step: u64,
    /// Most pages one worker of the guest holds; the default is 256 MiB of them.
    pub worker_pages: u64,
    /// What the workers of the guest do with their memory.
    pub workload: Workload,
    /// Number of vCPUs.
    pub vcpu_count: usize,
    /// Where the guest runs.
    pub guest: GuestKind,
    /// Seed of everything the guest chooses at random.
    pub seed: u64,
    /// Whether the guest finally touches an unplugged block.
    pub rogue: bool,
}

impl Default for DemoOptions {
    /// What `vmem demo` runs.
    fn default() -> Self {
        Self {
            boot_memory: 256 << 20,
            region_start: REGION_START,
            region: 4 << 30,
            block_size: 2 << 20,
            slot_size: None,
            node_id: None,
            backing: BackingKind::Anon,
            strategy: Strategy::Direct,
            mode: None,
            bbm_block_size: None,
            targets: None,
            pages_per_step: 200_000,
            worker_pages: 65_536,
            workload: Workload::Alloc,
            vcpu_count: 2,
            guest: GuestKind::Auto,
            seed: 0,
            rogue: false,
        }
    }
}

impl DemoOptions {
    /// Whether the options go together; no more is looked at than the options.
    pub(crate) fn check(&self) -> Result<(), DemoError> {
        Plan::new(self)?;
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            let reason = format!("{} vCPUs are not 1 to {MAX_VCPUS}", self.vcpu_count);
            return Err(DemoError::Options(reason));
        }
        match self.slot_size {
            Some(slot_size) if slot_size == 0 || !slot_size.is_multiple_of(self.block_size) => {
                Err(DemoError::Options(format!(
                    "slots of {} are not a multiple of the block size {}",
                    size(slot_size),
                    size(self.block_size)
                )))
            }
            _ => Ok(()),
        }
    }

    /// The guest and its device.
    pub(crate) fn machine(&self) -> Result<(MachineConfig, Builder), DemoError> {
        self.machine_for(&Plan::new(self)?, Faults::default())
    }

    /// As [`machine`](Self::machine), for who has a plan, or wants something to go wrong.
    pub(crate) fn machine_for(
        &self,
        plan: &Plan,
        faults: Faults,
    ) -> Result<(MachineConfig, Builder), DemoError> {
        let backing = self.backing.map(self.region);
        let backing = backing.map_err(|error| DemoError::Backing(size(self.region), error))?;
        let mut device =
            VirtioMem::builder(GuestAddress(self.region_start), faults.backing(backing))
                .block_size(self.block_size);
        if let Some(slot_size) = self.slot_size {
            device = device.slot_size(slot_size);
        }
        if let Some(node_id) = self.node_id {
            device = device.node_id(node_id);
        }
        let config = MachineConfig {
            boot_memory: self.boot_memory,
            vcpu_count: self.vcpu_count,
            guest: self.guest,
            seed: self.seed,
            worker_pages: self.worker_pages,
            workload: self.workload,
            policy: plan.policy,
            faults,
            ..MachineConfig::default()
        };
        Ok((config, device))
    }

    /// The first of the sizes to ask for, if any is named.
    pub(crate) fn initial_size(&self) -> u64 {
        let targets = self.targets.as_deref().unwrap_or_default();
        targets.first().copied().unwrap_or(0)
    }
}

/// Host memory behind the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackingKind {
    /// Private anonymous memory in base pages.
    Anon,
    /// Private anonymous memory in transparent huge pages.
    Thp,
    /// Shared memory in base pages.
    Memfd,
    /// 2 MiB pages from the host's pool.
    #[serde(rename = "hugetlb-2m")]
    Hugetlb2m,
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl BackingKind {
    fn map(self, region: u64) -> io::Result<Box<dyn Backing>> {
        Ok(match self {
            Self::Anon => Box::new(Anonymous::base_pages(region)?),
            Self::Thp => Box::new(Anonymous::thp(region)?),
            Self::Memfd => Box::new(Memfd::new(region)?),
            Self::Hugetlb2m => Box::new(Hugetlb::pages_2m(region)?),
        })
    }
}

/// A policy, as on the command line.
pub(crate) fn policy_name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Linux => "linux",
        Strategy::Direct => "direct",
    }
}

/// A mode, as on the command line.
pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::SubBlock => "sbm",
        Mode::BigBlock => "bbm",
    }
}

/// What is going to happen.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) policy: Policy,
    pub(crate) sizes: Sizes,
    pub(crate) targets: Vec<u64>,
    pub(crate) pages_per_step: u64,
}

impl Plan {
    /// # Errors
    ///
    /// [`DemoError::Options`] if the options do not go together.
    pub(crate) fn new(options: &DemoOptions) -> Result<Self, DemoError> {
        let geometry = Geometry::new(options.region_start, options.region, options.block_size)
            .map_err(|error| DemoError::Options(error.to_string()))?;
        check_boot_memory(options.boot_memory)?;
        let policy = Policy {
            strategy: options.strategy,
            force_bbm: options.mode == Some(Mode::BigBlock),
            bbm_block_size: options.bbm_block_size.unwrap_or(0),
            ..match options.strategy {
                Strategy::Linux => Policy::linux(),
                Strategy::Direct => Policy::default(),
            }
        };
        // The guest's, see `vmem_guest::Parameters`.
        let profile = Profile::X86_64;
        let sizes = Sizes::new(options.block_size, &profile, &policy);
        check_mode(options, &sizes, profile.memory_block_size())?;
        let mut plan = Self {
            geometry,
            policy,
            sizes,
            targets: Vec::new(),
            pages_per_step: options.pages_per_step,
        };
        let capacity = plan.capacity();
        if capacity == 0 {
            return Err(DemoError::Options(format!(
                "the region of {} at {} holds no whole {} of {}",
                size(options.region),
                size(options.region_start),
                unit_name(sizes.mode),
                size(sizes.unit_size)
            )));
        }
        plan.targets = match &options.targets {
            Some(targets) => targets.clone(),
            None => TARGETS
                .map(|target| target.next_multiple_of(sizes.granule_size).min(capacity))
                .to_vec(),
        };
        plan.check_targets(options)?;
        Ok(plan)
    }

    /// Bytes of the region the driver can use: those in whole units.
    pub(crate) fn capacity(&self) -> u64 {
        let unit = self.sizes.unit_size;
        let (start, len) = (self.geometry.addr(), self.geometry.region_size());
        let (first, end) = (start.div_ceil(unit), (start + len) / unit);
        end.saturating_sub(first) * unit
    }

    /// Bytes that are plugged once the driver has done what it can about `target`, coming from `plugged`.
    ///
    /// Granules are plugged and unplugged as a whole. Where that leaves a remainder, Linux is content with the side
    /// it comes from, and `Direct` rounds the target down.
    pub(crate) fn reachable(&self, target: u64, plugged: u64) -> u64 {
        let granule = self.sizes.granule_size;
        let whole = |bytes: u64| bytes / granule * granule;
        let reachable = match self.policy.strategy {
            Strategy::Direct => whole(target),
            Strategy::Linux if target >= plugged => plugged + whole(target - plugged),
            Strategy::Linux => plugged - whole(plugged - target),
        };
        reachable.min(self.capacity())
    }

    fn check_targets(&self, options: &DemoOptions) -> Result<(), DemoError> {
        if options.rogue && self.targets.last() == Some(&options.region) {
            return Err(DemoError::Options(
                "every block will be plugged, none is left for the rogue guest to touch".into(),
            ));
        }
        for target in &self.targets {
            if *target > options.region {
                return Err(DemoError::Options(format!(
                    "target {} exceeds the region of {}",
                    size(*target),
                    size(options.region)
                )));
            }
            if !target.is_multiple_of(options.block_size) {
                return Err(DemoError::Options(format!(
                    "target {} is not a multiple of the block size {}",
                    size(*target),
                    size(options.block_size)
                )));
            }
        }
        Ok(())
    }
}

/// What is added and removed at a time.
pub(crate) fn unit_name(mode: Mode) -> &'static str {
    match mode {
        Mode::SubBlock => "memory block",
        Mode::BigBlock => "big block",
    }
}

fn check_boot_memory(boot_memory: u64) -> Result<(), DemoError> {
    // What an empty guest needs; the exact sum, which depends on the image, is the layout's business.
    if boot_memory < 2 * LARGE_PAGE + GUEST_IMAGE.len() as u64 {
        return Err(DemoError::Options(format!(
            "boot memory of {} does not hold the guest program",
            size(boot_memory)
        )));
    }
    if !boot_memory.is_multiple_of(LARGE_PAGE) {
        return Err(DemoError::Options(format!(
            "boot memory of {boot_memory} bytes is not a multiple of {}",
            size(LARGE_PAGE)
        )));
    }
    Ok(())
}

/// Whether the driver will run in the mode that was asked for.
fn check_mode(
    options: &DemoOptions,
    sizes: &Sizes,
    memory_block_size: u64,
) -> Result<(), DemoError> {
    let refuse = |reason| Err(DemoError::Options(reason));
    if options.mode == Some(Mode::SubBlock) && sizes.mode != Mode::SubBlock {
        return refuse(format!(
            "Sub-Block Mode needs at least two device blocks in a memory block of the guest, which has {}: \
             a block size of {} is too large, {} is the largest",
            size(memory_block_size),
            size(options.block_size),
            size(memory_block_size / 2)
        ));
    }
    match options.bbm_block_size {
        Some(_) if sizes.mode == Mode::SubBlock => refuse(
            "there are big blocks in Big-Block Mode only, ask for that with --mode bbm".into(),
        ),
        Some(wanted) if wanted != sizes.unit_size => refuse(format!(
            "big blocks of {} are not possible, only powers of two from {}",
            size(wanted),
            size(options.block_size.max(memory_block_size))
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn options(strategy: Strategy, block_size: u64) -> DemoOptions {
        DemoOptions {
            block_size,
            strategy,
            ..DemoOptions::default()
        }
    }

    #[test]
    fn targets_nobody_named_suit_the_driver() {
        for (block_size, expected) in [
            (2 * MIB, [1024, 130, 2048, 6, 0]),
            (4 * MIB, [1024, 132, 2048, 8, 0]),
            (128 * MIB, [1024, 256, 2048, 128, 0]),
            (256 * MIB, [1024, 256, 2048, 256, 0]),
            (4 * GIB, [4096, 4096, 4096, 4096, 0]),
        ] {
            let plan = Plan::new(&options(Strategy::Direct, block_size)).unwrap();
            assert_eq!(plan.targets, expected.map(|mib| mib * MIB));
        }
        // No more than there is.
        let small = DemoOptions {
            region: 320 * MIB,
            ..options(Strategy::Linux, 2 * MIB)
        };
        let expected = [256, 130, 256, 6, 0].map(|mib| mib * MIB);
        assert_eq!(Plan::new(&small).unwrap().targets, expected);
    }

    #[test]
    fn remainders_are_left_on_the_side_linux_comes_from_and_below_the_target_by_direct() {
        let plan = |strategy| {
            let options = DemoOptions {
                mode: Some(Mode::BigBlock),
                region: 1088 * MIB,
                ..options(strategy, 2 * MIB)
            };
            Plan::new(&options).unwrap()
        };
        for (strategy, target, plugged, expected) in [
            (Strategy::Direct, 130, 1024, 128),
            (Strategy::Direct, 6, 256, 0),
            (Strategy::Linux, 130, 1024, 256),
            (Strategy::Linux, 6, 256, 128),
            (Strategy::Linux, 250, 0, 128),
            (Strategy::Linux, 0, 128, 0),
            // The region's end is in no whole big block.
            (Strategy::Linux, 1088, 128, 1024),
            (Strategy::Direct, 1088, 128, 1024),
        ] {
            let reachable = plan(strategy).reachable(target * MIB, plugged * MIB);
            assert_eq!(reachable, expected * MIB, "{strategy:?} {target}");
        }
    }
}

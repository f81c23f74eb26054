//! The driver with a device nobody here wrote: QEMU's `virtio-mem-pci`, under a kernel of this project's.
//!
//! What driver, page allocator, device and host have is compared after each change.

use std::io::Write;
use std::path::PathBuf;

use virtio_mem_driver::driver::Strategy;
use virtio_mem_wire::Features;
use vmm_harness::linux::{
    Cache, DeviceKind, DriverFacts, LinuxError, OwnGuest, OwnOptions, Progress,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const MEMORY_BLOCK: u64 = 128 * MIB;

/// A guest, or nothing if QEMU is not to be had here.
fn boot(
    name: &str,
    strategy: Strategy,
    change: impl FnOnce(&mut OwnOptions<'_>),
) -> Result<Option<Rig>, LinuxError> {
    let cache = std::env::var_os("VMEM_LINUX_CACHE")
        .map(PathBuf::from)
        .or_else(Cache::default_path);
    let cache = cache.expect("VMEM_LINUX_CACHE or HOME names a folder");
    let mut options = OwnOptions::new(&cache, strategy, DeviceKind::Qemu);
    change(&mut options);
    match OwnGuest::boot(&options, &mut Progress::silent()) {
        Ok(guest) => Ok(Some(Rig(guest))),
        Err(error) if error.is_about_packages() => {
            // `eprintln` would be captured, and a skip must be seen. Nobody is left to tell if this fails.
            let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

struct Rig(OwnGuest);

impl Rig {
    /// Asks for `bytes`; once they are there or gone, everybody must say so.
    fn resize(&mut self, bytes: u64) -> Result<DriverFacts, LinuxError> {
        self.0.request(bytes)?;
        self.settled(bytes)
    }

    /// Waits until the driver has settled at `bytes`, and checks what everybody has.
    fn settled(&mut self, bytes: u64) -> Result<DriverFacts, LinuxError> {
        let settled = |facts: &DriverFacts| {
            facts.requested == bytes && facts.plugged == bytes && facts.progress == "settled"
        };
        let facts = self.0.wait_for(settled)?;
        assert!(settled(&facts), "{bytes:#x} bytes: {facts:?}");
        self.agree(&facts)?;
        Ok(facts)
    }

    /// Device, page allocator and host have what the driver has.
    fn agree(&mut self, facts: &DriverFacts) -> Result<(), LinuxError> {
        let device = self.0.device()?;
        let sizes = (device.requested_size, device.plugged_size);
        assert_eq!(sizes, (facts.requested, facts.plugged));
        assert_eq!(facts.hotplugged, facts.plugged, "{facts:?}");
        assert!(
            device.resident_size <= facts.plugged,
            "{device:?}: {facts:?}"
        );
        Ok(())
    }

    /// Host memory behind the device's region.
    fn resident(&mut self) -> Result<u64, LinuxError> {
        Ok(self.0.device()?.resident_size)
    }

    /// Fills `bytes` of memory with pages that may be moved.
    fn load(&mut self, bytes: u64) -> Result<(), LinuxError> {
        self.0.run(&format!("load {}", bytes / PAGE))?;
        Ok(())
    }

    /// All pages have their content.
    fn verify(&mut self, bytes: u64) -> Result<(), LinuxError> {
        assert_eq!(self.0.run("verify")?, (bytes / PAGE).to_string());
        Ok(())
    }
}

/// What must not depend on the device: sizes, memory blocks and requests after a step.
type Step = [u64; 5];

/// 1 GiB, sizes that are no multiple of a memory block, live pages kept while their memory goes, and nothing left.
fn grows_and_shrinks(
    name: &str,
    strategy: Strategy,
    device: DeviceKind,
) -> Result<Option<Vec<Step>>, LinuxError> {
    let Some(mut rig) = boot(name, strategy, |options| options.device = device)? else {
        return Ok(None);
    };
    let mut steps = Vec::new();
    let facts = rig.settled(0)?;
    assert_eq!((facts.mode.as_str(), facts.granule), ("SubBlock", 2 * MIB));
    let features = match device {
        DeviceKind::Qemu => Features::UNPLUGGED_INACCESSIBLE | Features::PERSISTENT_SUSPEND,
        DeviceKind::Ours => Features::UNPLUGGED_INACCESSIBLE,
    };
    assert_eq!(facts.features, (features | Features::VERSION_1).bits());

    let facts = rig.resize(1 << 30)?;
    assert_eq!(facts.memory_blocks, 8);
    let requests = match strategy {
        Strategy::Linux => 8,
        Strategy::Direct => 1,
    };
    assert_eq!(facts.requests, requests);
    // Nobody has touched it.
    assert_eq!(rig.resident()?, 0);

    rig.load(300 * MIB)?;
    let resident = rig.resident()?;
    assert_eq!(resident, 300 * MIB);
    for size in [130 * MIB, 6 * MIB, 130 * MIB, 0] {
        let facts = rig.resize(size)?;
        assert_eq!(facts.memory_blocks, size.div_ceil(MEMORY_BLOCK));
        rig.verify(300 * MIB)?;
        let DriverFacts {
            usable, requests, ..
        } = facts;
        let resident = rig.resident()?;
        steps.push([size, facts.memory_blocks, usable, requests, resident]);
    }
    let facts = rig.0.facts()?;
    assert!(facts.moved >= 300 * MIB / PAGE, "{facts:?}");
    assert_eq!(rig.resident()?, 0);
    Ok(Some(steps))
}

/// The same on QEMU's device and on this project's.
fn grows_and_shrinks_on_both(name: &str, strategy: Strategy) -> Result<(), LinuxError> {
    let on = |device| grows_and_shrinks(name, strategy, device);
    if let Some(reference) = on(DeviceKind::Qemu)? {
        assert_eq!(on(DeviceKind::Ours)?, Some(reference));
    }
    Ok(())
}

#[test]
fn direct_grows_and_shrinks() -> Result<(), LinuxError> {
    grows_and_shrinks_on_both("direct_grows_and_shrinks", Strategy::Direct)
}

#[test]
fn linux_grows_and_shrinks() -> Result<(), LinuxError> {
    grows_and_shrinks_on_both("linux_grows_and_shrinks", Strategy::Linux)
}

/// A page that somebody has pinned keeps its device block plugged and the driver says why; without the pin it goes.
fn waits_for_a_pinned_page(name: &str, strategy: Strategy) -> Result<(), LinuxError> {
    let Some(mut rig) = boot(name, strategy, |_| {})? else {
        return Ok(());
    };
    rig.resize(256 * MIB)?;
    rig.load(16 * MIB)?;
    let pinned: u64 = rig.0.run("pin")?.parse().expect("a number");
    rig.0.request(0)?;
    let stuck =
        |facts: &DriverFacts| facts.plugged == 2 * MIB && facts.progress.contains("is in use");
    let facts = rig.0.wait_for(stuck)?;
    assert!(stuck(&facts), "{facts:?}");
    rig.agree(&facts)?;
    let obstacle = format!("{} {pinned} Pinned", pinned / MEMORY_BLOCK);
    assert_eq!(rig.0.run("obstacles")?, obstacle);
    rig.verify(16 * MIB)?;

    rig.0.run("unpin")?;
    rig.0.run("retry")?;
    rig.settled(0)?;
    rig.verify(16 * MIB)?;
    assert_eq!(rig.resident()?, 0);
    Ok(())
}

#[test]
fn direct_waits_for_a_pinned_page() -> Result<(), LinuxError> {
    waits_for_a_pinned_page("direct_waits_for_a_pinned_page", Strategy::Direct)
}

#[test]
fn linux_waits_for_a_pinned_page() -> Result<(), LinuxError> {
    waits_for_a_pinned_page("linux_waits_for_a_pinned_page", Strategy::Linux)
}

/// A size that is requested before the kernel starts; a system reset, which takes all memory away; another kernel in
/// the place of the first, and another driver, which find memory plugged.
fn starts_with_what_there_is(name: &str, strategy: Strategy) -> Result<(), LinuxError> {
    let Some(mut rig) = boot(name, strategy, |options| options.requested = 130 * MIB)? else {
        return Ok(());
    };
    rig.settled(130 * MIB)?;
    rig.load(200 * MIB)?;

    // The reset leaves nothing plugged and nothing resident, what is requested stays.
    rig.0.system_reset()?;
    let facts = rig.settled(130 * MIB)?;
    assert_eq!(facts.pages, 0);
    assert_eq!(rig.resident()?, 0);

    rig.load(100 * MIB)?;
    rig.0.restart()?;
    let facts = rig.settled(130 * MIB)?;
    let resident = rig.resident()?;
    match strategy {
        // It unplugs everything first.
        Strategy::Linux => assert_eq!(resident, 0, "{facts:?}"),
        // It asks for the state and takes it over.
        Strategy::Direct => assert!(resident >= 100 * MIB, "{resident:#x} {facts:?}"),
    }

    rig.load(50 * MIB)?;
    let added: u64 = rig.0.run("remove")?.parse().expect("a number");
    assert_eq!(added, 2 * MEMORY_BLOCK);
    let probed = rig.0.run("probe");
    match strategy {
        // Linux's driver has no way to find out what is plugged.
        Strategy::Linux => {
            let error = probed
                .expect_err("the driver has nothing to go by")
                .to_string();
            assert!(error.contains("still added"), "{error}");
        }
        Strategy::Direct => {
            probed?;
            rig.settled(130 * MIB)?;
            rig.verify(50 * MIB)?;
            rig.resize(0)?;
            rig.verify(50 * MIB)?;
        }
    }
    Ok(())
}

#[test]
fn direct_starts_with_what_there_is() -> Result<(), LinuxError> {
    starts_with_what_there_is("direct_starts_with_what_there_is", Strategy::Direct)
}

#[test]
fn linux_starts_with_what_there_is() -> Result<(), LinuxError> {
    starts_with_what_there_is("linux_starts_with_what_there_is", Strategy::Linux)
}

/// Device blocks larger than memory blocks.
fn uses_big_blocks(name: &str, strategy: Strategy) -> Result<(), LinuxError> {
    let change = |options: &mut OwnOptions<'_>| options.block_size = 256 * MIB;
    let Some(mut rig) = boot(name, strategy, change)? else {
        return Ok(());
    };
    let facts = rig.settled(0)?;
    assert_eq!(
        (facts.mode.as_str(), facts.granule),
        ("BigBlock", 256 * MIB)
    );
    let facts = rig.resize(1 << 30)?;
    assert_eq!(facts.memory_blocks, 8);
    rig.load(400 * MIB)?;
    for size in [512 * MIB, 256 * MIB, 0] {
        let facts = rig.resize(size)?;
        assert_eq!(facts.memory_blocks, size / MEMORY_BLOCK);
        rig.verify(400 * MIB)?;
    }
    assert_eq!(rig.resident()?, 0);
    // QEMU refuses what is no multiple of its blocks.
    let refused = rig.0.request(130 * MIB);
    assert!(matches!(refused, Err(LinuxError::Qemu(_))), "{refused:?}");
    rig.settled(0)?;
    Ok(())
}

#[test]
fn direct_uses_big_blocks() -> Result<(), LinuxError> {
    uses_big_blocks("direct_uses_big_blocks", Strategy::Direct)
}

#[test]
fn linux_uses_big_blocks() -> Result<(), LinuxError> {
    uses_big_blocks("linux_uses_big_blocks", Strategy::Linux)
}

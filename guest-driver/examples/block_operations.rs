//! What the bookkeeping of hotplugged memory costs: bytes of metadata, and time for each operation on a memory block.
//!
//! ```text
//! cargo run --release -p virtio-mem-driver --example block_operations
//! ```
#![expect(unsafe_code, reason = "host memory stands in for physical memory")]

use std::error::Error;
use std::hint::black_box;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use virtio_mem_driver::hotplug::{
    AddMemory, Hotplug, Mobility, OnlineType, Owner, PhysicalMemory, Profile,
};

const START: u64 = 4 << 30;
const SIZE: u64 = 2 << 30;
const REPEATS: u32 = 20;

/// All of the memory, lent by the host page by page as it is touched.
struct Pages(Vec<u8>);

// SAFETY: Every page of the range has bytes of its own; none is accessed but through `Hotplug`.
unsafe impl PhysicalMemory for Pages {
    fn page(&self, address: u64) -> NonNull<u8> {
        let offset = (address - START) as usize;
        NonNull::from(&self.0[offset])
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("memory block          add      online     offline      remove   metadata per GiB");
    for (name, profile) in Profile::ALL {
        measure(name, profile)?;
    }
    println!();
    println!("x86-64, one memory block with pages in use:");
    println!("pages in use      offline   moved   per page");
    for used in [0, 1, 512, 8192, 32768] {
        measure_offline(used)?;
    }
    Ok(())
}

/// The cost of each operation on idle memory blocks, the shortest of several runs.
fn measure(name: &str, profile: Profile) -> Result<(), Box<dyn Error>> {
    let block = profile.memory_block_size();
    let ids = START / block..(START + SIZE) / block;
    let count = (ids.end - ids.start) as u32;
    let mut best = [Duration::MAX; 4];
    let mut metadata = 0;
    for _ in 0..REPEATS {
        let mut hotplug = Hotplug::new(profile, Pages(Vec::new()))?;
        let mut times = [Duration::ZERO; 4];
        let start = Instant::now();
        for id in ids.clone() {
            hotplug.add_memory(&AddMemory::new(id * block, block))?;
        }
        times[0] = start.elapsed();
        let start = Instant::now();
        for id in ids.clone() {
            hotplug.online(id, OnlineType::Movable)?;
        }
        times[1] = start.elapsed();
        metadata = hotplug.metadata_bytes() as u64;
        let start = Instant::now();
        for id in ids.clone() {
            hotplug.offline(id)?;
        }
        times[2] = start.elapsed();
        let start = Instant::now();
        for id in ids.clone() {
            hotplug.remove_memory(Owner::PROBE, id * block, block)?;
        }
        times[3] = start.elapsed();
        for (best, time) in best.iter_mut().zip(times) {
            *best = time.min(*best);
        }
    }
    let [add, online, offline, remove] = best.map(|time| time / count);
    println!(
        "{name:<10} {:>4} MiB {add:>9.1?} {online:>11.1?} {offline:>11.1?} {remove:>11.1?} {:>10} KiB = 1/{}",
        block >> 20,
        metadata / (SIZE >> 30) / 1024,
        SIZE / metadata,
    );
    Ok(())
}

/// The cost of taking a memory block offline that has pages in use.
fn measure_offline(used: u64) -> Result<(), Box<dyn Error>> {
    let profile = Profile::X86_64;
    let block = profile.memory_block_size();
    let first = START / block;
    let mut best = Duration::MAX;
    let mut moved = 0;
    for _ in 0..REPEATS {
        let mut hotplug = Hotplug::new(profile, Pages(vec![0; 2 * block as usize]))?;
        hotplug.add_memory(&AddMemory::new(START, 2 * block))?;
        hotplug.online(first, OnlineType::Movable)?;
        for _ in 0..used {
            let page = hotplug.allocate(Mobility::Movable)?;
            let bytes = hotplug.pin(page)?;
            // SAFETY: The page is pinned, and nothing else runs.
            unsafe { bytes.write_bytes(1, profile.page_size() as usize) };
            hotplug.unpin(page)?;
        }
        hotplug.online(first + 1, OnlineType::Movable)?;
        let start = Instant::now();
        hotplug.offline(first)?;
        best = best.min(start.elapsed());
        moved = hotplug.statistics().pages_migrated;
        black_box(&hotplug);
    }
    let per_page = match used {
        0 => Duration::ZERO,
        _ => best / used as u32,
    };
    println!("{used:>12} {best:>12.1?} {moved:>7} {per_page:>10.1?}");
    Ok(())
}

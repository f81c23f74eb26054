//! A virtio memory device on a bare KVM virtual machine.
//!
//! What an integrator writes stands between the two marks below, and `docs/attaching.md` walks through it. The
//! rest is what a VMM has already, or a guest brings: see `support`. The virtual machine has one vCPU, at ring
//! 3 on x86-64; its driver is the host, which writes requests into the guest's queue, and the vCPU rings the
//! doorbell and uses the memory.
//!
//! ```text
//! cargo run -p virtio-mem --features kvm --example attach
//! ```

mod support;

use std::error::Error;
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use support::{CONFIG, DONE, DOORBELL, Driver, Guest};
use virtio_mem::wire::{BlockState, Features, Request, Response, Span};
use virtio_mem::{Anonymous, Interrupt, KvmSlots, MemoryRegion, QueueHandler, VirtioMem};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestRegionCollection, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

// ---- glue: begin ---------------------------------------------------------------------------------------

/// Above boot memory, at a multiple of the guest's memory block, and in no firmware memory map.
const REGION: GuestAddress = GuestAddress(4 << 30);

type Memory = Arc<GuestRegionCollection<MemoryRegion>>;

/// One event for each notification; a VMM may register them with `KVM_IRQFD`.
struct Interrupts {
    used_buffer: EventFd,
    config_change: EventFd,
}

impl Interrupt for Interrupts {
    fn used_buffer(&self) {
        let _ = self.used_buffer.write(1); // fails only if it is pending many times over
    }

    fn config_change(&self) {
        let _ = self.config_change.write(1);
    }
}

/// Before boot: the device, guest memory that has its region beside the VMM's own, and the doorbell.
fn attach(vm: &Arc<VmFd>, ram: GuestRegionMmap) -> Result<(VirtioMem, Memory, EventFd)> {
    let device = VirtioMem::builder(REGION, Anonymous::base_pages(1 << 30)?)
        .slots(KvmSlots::new(Arc::clone(vm), 1)) // slot 0 is boot memory
        .build()?;
    let regions = vec![MemoryRegion::Ram(ram), device.region(())];
    let memory = Arc::new(GuestRegionCollection::from_regions(regions)?);
    let notify = EventFd::new(EFD_NONBLOCK)?;
    vm.register_ioevent(&notify, &IoEventAddress::Mmio(DOORBELL), 0u32)?;
    Ok((device, memory, notify))
}

/// At DRIVER_OK: the features the driver accepted, the queue it set up, and how to interrupt it.
fn start(
    (device, memory, notify): &(VirtioMem, Memory, EventFd),
    accepted: u64,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
) -> Result<EventManager<QueueHandler<Memory>>> {
    device.acknowledge_features(accepted)?; // at FEATURES_OK already, where an error clears that bit
    let notify = notify.try_clone()?; // a driver may reset the device and start it again
    let handler = device.activate(Arc::clone(memory), queue, notify, interrupt)?;
    let mut events = EventManager::new()?;
    events.add_subscriber(handler);
    Ok(events)
}

/// In the vCPU loop: the configuration space, and what an access to an unplugged block looks like.
fn run(vcpu: &mut VcpuFd, device: &VirtioMem) -> Result<Exit> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(at, data)) if CONFIG.contains(&at) => {
                device.read_config(at - CONFIG.start, data);
            }
            // An unplugged block whose slot is there for the sake of others.
            Ok(VcpuExit::MemoryFault { .. }) => return Ok(Exit::Fault),
            Err(error) if error.errno() == libc::EFAULT => return Ok(Exit::Fault),
            // A register, or if the address is in the region an unplugged block without a slot.
            Ok(VcpuExit::MmioRead(at, _) | VcpuExit::MmioWrite(at, _)) => {
                return Ok(Exit::Mmio(at));
            }
            other => return Err(format!("unexpected exit {other:?}").into()),
        }
    }
}

// ---- glue: end -----------------------------------------------------------------------------------------

/// Why the vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Fault,
    Mmio(u64),
}

impl Exit {
    fn describe(self) -> String {
        match self {
            Self::Fault => "KVM_RUN returned EFAULT".into(),
            Self::Mmio(address) => format!("MMIO exit at {address:#x}"),
        }
    }
}

fn main() -> Result<()> {
    let (kvm, vm) = match Kvm::new().and_then(|kvm| Ok((kvm.create_vm()?, kvm))) {
        Ok((vm, kvm)) => (kvm, Arc::new(vm)),
        Err(error) => {
            println!("skipped: /dev/kvm cannot be used: {error}");
            return Ok(());
        }
    };
    let boot_memory = support::boot_memory(&vm)?;
    let mut guest = Guest::new(&kvm, &vm, &boot_memory)?;

    let attached = attach(&vm, boot_memory)?;
    let (device, memory, _) = &attached;
    let handle = device.handle();
    let geometry = device.geometry();
    let report = |what: &str| -> Result<()> {
        let (status, resident) = (handle.status(), handle.resident_bytes()?);
        println!("{what}");
        println!(
            "    requested {} MiB, plugged {} MiB, memory slots {}, resident {} KiB",
            status.requested_size >> 20,
            status.plugged_size >> 20,
            status.slot_count,
            resident >> 10,
        );
        let granted = resident <= status.plugged_size;
        expect("no more is resident than plugged", granted)
    };
    report("the region is there, and empty")?;

    let interrupts = Arc::new(Interrupts {
        used_buffer: EventFd::new(EFD_NONBLOCK)?,
        config_change: EventFd::new(EFD_NONBLOCK)?,
    });
    let features = Features::VERSION_1 | Features::UNPLUGGED_INACCESSIBLE;
    let interrupt = Arc::clone(&interrupts) as Arc<dyn Interrupt>;
    let mut events = start(&attached, features.bits(), Driver::queue()?, interrupt)?;

    let mut driver = Driver::new(Arc::clone(memory));
    // The driver writes a request, the vCPU rings, the event loop of the VMM turns once, the driver is told.
    let mut request = |guest: &mut Guest, request: Request| -> Result<Response> {
        driver.submit(request)?;
        guest.prepare_doorbell()?;
        let exit = run(&mut guest.vcpu, device)?;
        expect("the doorbell rings", exit == Exit::Mmio(DONE))?;
        events.run()?;
        interrupts.used_buffer.read()?;
        driver.response(request)
    };
    // The vCPU fills a block. It finds the region in the configuration space.
    let fill = |guest: &mut Guest, block: u64, tag: u64| -> Result<Exit> {
        guest.prepare_fill(geometry.bytes(block), geometry.block_size(), tag)?;
        run(&mut guest.vcpu, device)
    };
    let blocks = |first: u64, block_count: u16| Span {
        addr: geometry.address(first),
        block_count,
    };

    let exit = fill(&mut guest, 0, 0x11)?;
    println!("the vCPU writes to block 0: {}", exit.describe());
    expect("there is no slot", exit == Exit::Mmio(REGION.0))?;

    handle.resize(64 << 20)?;
    let told = interrupts.config_change.read().is_ok();
    expect("the driver is told", told)?;
    let response = request(&mut guest, Request::Plug(blocks(0, 2)))?;
    expect("PLUG is acknowledged", response == Response::Ack)?;
    report("the driver has plugged blocks 0 and 1")?;

    for (block, tag) in [(0, 0x11), (1, 0x22)] {
        let exit = fill(&mut guest, block, tag)?;
        expect("the block is filled", exit == Exit::Mmio(DONE))?;
        let mut bytes = vec![0; usize::try_from(geometry.block_size())?];
        memory.read_slice(&mut bytes, GuestAddress(geometry.address(block)))?;
        let words = bytes.chunks_exact(8);
        let same = words.into_iter().all(|word| word == tag.to_le_bytes());
        expect("the VMM reads what the vCPU wrote", same)?;
    }
    report("the vCPU has filled both, the VMM read them")?;

    let response = request(&mut guest, Request::Unplug(blocks(0, 1)))?;
    expect("UNPLUG is acknowledged", response == Response::Ack)?;
    report("the driver has unplugged block 0")?;
    let exit = fill(&mut guest, 0, 0x33)?;
    println!("the vCPU writes to block 0: {}", exit.describe());
    expect("the block is closed", exit == Exit::Fault)?;
    match memory.read_obj::<u64>(GuestAddress(geometry.address(0))) {
        Ok(_) => return Err("the VMM's devices read an unplugged block".into()),
        Err(error) => println!("the VMM reads block 0: {error}"),
    }
    let mut bytes = [0; 8];
    memory.read_slice(&mut bytes, GuestAddress(geometry.address(1)))?;
    expect("block 1 is as it was", bytes == 0x22u64.to_le_bytes())?;

    let response = request(&mut guest, Request::Unplug(blocks(1, 1)))?;
    expect("UNPLUG is acknowledged", response == Response::Ack)?;
    report("the driver has unplugged block 1")?;
    let exit = fill(&mut guest, 1, 0x33)?;
    println!("the vCPU writes to block 1: {}", exit.describe());
    let address = geometry.address(1);
    expect("its slot is gone", exit == Exit::Mmio(address))?;

    let response = request(&mut guest, Request::State(blocks(0, 2)))?;
    let unplugged = Response::AckState(BlockState::Unplugged);
    expect("STATE knows", response == unplugged)?;
    expect("nothing is resident", handle.resident_bytes()? == 0)?;
    device.reset();
    Ok(())
}

fn expect(what: &str, holds: bool) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(format!("not so: {what}").into()),
    }
}

//! A real vCPU that touches what it should not, and touches it while it is taken away.
//!
//! The virtual machine is as bare as can be: page tables, nineteen bytes of code and the device's slots. The
//! code runs at ring 3, because some KVM backends emulate ring 0 instruction by instruction.
#![cfg(feature = "kvm")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::allow_attributes,
    reason = "a test fails where it stands"
)]

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use rig::backings::{BLOCKS, HugePages, KINDS, Kind, plug, rig_of, skip, unplug};
use rig::{GIB, MIB, REGION, Rig};
use virtio_mem::wire::Response;
use virtio_mem::{Anonymous, BuildError, KvmSlots, VirtioMem};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Boot memory: page tables below, code at 2 MiB.
const BOOT_SIZE: u64 = 4 * MIB;
const TABLES: u64 = 0x1000;
const CODE: u64 = 2 * MIB;
/// Where the guest says that it has come to the end of the region; no slot is there.
const SWEPT: u64 = 3 * GIB;
/// Slots from 1 on are the device's.
const FIRST_SLOT: u32 = 1;
/// Writes per block in one sweep.
const WRITES: u64 = 32;

/// Writes to every `rdx`th byte from `r8` to `rsi`, then to `rbx`, and begins again.
const SWEEP: [u8; 19] = [
    0x48, 0x89, 0x3f, // 0: mov [rdi], rdi
    0x48, 0x01, 0xd7, // 3: add rdi, rdx
    0x48, 0x39, 0xf7, // 6: cmp rdi, rsi
    0x72, 0xf5, // 9: jb 0
    0x48, 0x89, 0x33, // 11: mov [rbx], rsi
    0x4c, 0x89, 0xc7, // 14: mov rdi, r8
    0xeb, 0xed, // 17: jmp 0
];
/// Bytes of the instruction that writes.
const WRITE_LEN: u64 = 3;

/// What stopped the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// A write to closed memory inside a slot, at this address. The rest of its block is skipped.
    Closed(u64),
    /// A write where there is no slot.
    NoSlot(u64),
    /// The end of the region.
    Swept,
}

/// A vCPU that sweeps over the region again and again.
struct Rogue {
    vcpu: VcpuFd,
    block_size: u64,
    stride: u64,
    _boot: GuestMemoryMmap,
}

impl Rogue {
    fn new(kvm: &Kvm, vm: &VmFd, block_size: u64) -> Self {
        let boot = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), BOOT_SIZE as usize)]).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: BOOT_SIZE,
            userspace_addr: boot.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: `boot` lives as long as the vCPU that could reach it.
        #[expect(unsafe_code, reason = "hands boot memory to the guest")]
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let end = REGION + BLOCKS * block_size;
        let region = (REGION..end).step_by(2 << 20);
        build_page_tables(&boot, region.chain([CODE, SWEPT]));
        boot.write_slice(&SWEEP, GuestAddress(CODE)).unwrap();

        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let reset = vcpu.get_sregs().unwrap();
        vcpu.set_sregs(&user_mode(reset)).unwrap();
        let stride = block_size / WRITES;
        let regs = kvm_regs {
            rip: CODE,
            rdi: REGION,
            r8: REGION,
            rsi: end,
            rdx: stride,
            rbx: SWEPT,
            rflags: 1 << 1,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        Self {
            vcpu,
            block_size,
            stride,
            _boot: boot,
        }
    }

    fn run(&mut self) -> Stop {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(SWEPT, _)) => return Stop::Swept,
                Ok(VcpuExit::MmioWrite(at, _)) => return Stop::NoSlot(at),
                Ok(exit) => panic!("unexpected exit {exit:?}"),
                Err(error) if error.errno() == libc::EFAULT => return self.skip_block(),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("KVM_RUN: {error}"),
            }
        }
    }

    /// Goes on behind the write that was refused, with the next block.
    fn skip_block(&self) -> Stop {
        let mut regs = self.vcpu.get_regs().unwrap();
        assert_eq!(regs.rip, CODE, "only the write can be refused");
        let at = regs.rdi;
        regs.rip += WRITE_LEN;
        regs.rdi = at - at % self.block_size + self.block_size - self.stride;
        self.vcpu.set_regs(&regs).unwrap();
        Stop::Closed(at)
    }

    /// What stops the vCPU until it has come to the end of the region.
    fn sweep(&mut self) -> Vec<Stop> {
        let mut stops = Vec::new();
        loop {
            match self.run() {
                Stop::Swept => return stops,
                stop => stops.push(stop),
            }
        }
    }
}

/// Maps large pages one to one for user mode (Intel SDM volume 3, 4.5).
fn build_page_tables(boot: &GuestMemoryMmap, pages: impl Iterator<Item = u64>) {
    const PRESENT_WRITABLE_USER: u64 = 0b111;
    // Accessed and dirty from the start, so that the processor never writes to the tables.
    const LARGE_PAGE: u64 = PRESENT_WRITABLE_USER | 1 << 5 | 1 << 6 | 1 << 7;
    let slot = |table: u64, index: u64| GuestAddress(table + index % 512 * 8);
    let mut free = TABLES + 0x1000;
    let mut below = |table, index| {
        let entry: u64 = boot.read_obj(slot(table, index)).unwrap();
        if entry != 0 {
            return entry & !0xfff;
        }
        let page = free;
        free += 0x1000;
        let entry = page | PRESENT_WRITABLE_USER | 1 << 5;
        boot.write_obj(entry, slot(table, index)).unwrap();
        page
    };
    for page in pages {
        let level_3 = below(TABLES, page >> 39);
        let level_2 = below(level_3, page >> 30);
        boot.write_obj(page | LARGE_PAGE, slot(level_2, page >> 21))
            .unwrap();
    }
}

/// 64-bit mode at ring 3. There is no IDT: any exception ends the machine.
fn user_mode(reset: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 1 << 3 | 3,
        type_: 0xb,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 2 << 3 | 3,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    let tss = kvm_segment {
        limit: 0x67,
        selector: 3 << 3,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: tss,
        idt: Default::default(),
        gdt: Default::default(),
        // PE, MP, ET, NE, WP, PG
        cr0: 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31,
        cr3: TABLES,
        // PAE
        cr4: 1 << 5,
        // LME, LMA
        efer: 1 << 8 | 1 << 10,
        ..reset
    }
}

fn kvm(test_name: &str) -> Option<(Kvm, Arc<VmFd>)> {
    let machine = Kvm::new().and_then(|kvm| kvm.create_vm().map(|vm| (kvm, Arc::new(vm))));
    machine
        .inspect_err(|error| skip(test_name, &format!("no KVM: {error}")))
        .ok()
}

/// Runs `test` on each kind of backing, with pages in the pool for `plugged` blocks.
fn on_every_backing(test_name: &str, plugged: u64, test: impl Fn(&Kind, Rig, Rogue)) {
    for kind in &KINDS {
        let Some((kvm, vm)) = kvm(test_name) else {
            return;
        };
        let _pages: Option<HugePages> = match kind.pages(plugged) {
            Ok(pages) => pages,
            Err(reason) => {
                skip(&format!("{test_name} on {}", kind.name), &reason);
                continue;
            }
        };
        let rogue = Rogue::new(&kvm, &vm, kind.block_size);
        let rig = rig_of(kind, |builder| builder.slots(KvmSlots::new(vm, FIRST_SLOT)));
        test(kind, rig, rogue);
    }
}

#[test]
fn vcpu_that_touches_the_whole_region_reaches_plugged_blocks_and_nothing_else() {
    on_every_backing("rogue vCPU", 2, |kind, mut rig, mut rogue| {
        // The first slot is there, with blocks 0 and 3 closed; the second is not.
        assert_eq!(plug(&mut rig, kind, 1, 2), Response::Ack);
        let block = |index: u64| REGION + index * kind.block_size;
        for _ in 0..2 {
            let stops = rogue.sweep();
            let no_slot = (block(4)..block(8)).step_by(rogue.stride as usize);
            let expected: Vec<_> = [0, 3]
                .map(|index| Stop::Closed(block(index)))
                .into_iter()
                .chain(no_slot.map(Stop::NoSlot))
                .collect();
            assert_eq!(stops, expected, "{}", kind.name);
        }
        let last = block(3) - rogue.stride;
        let written: u64 = rig.memory.read_obj(GuestAddress(last)).unwrap();
        assert_eq!(written, last, "plugged blocks were reached");
        let resident = rig.handle.resident_bytes().unwrap();
        let plugged = rig.handle.status().plugged_size;
        println!(
            "{}: {} KiB resident of {} KiB plugged after two sweeps",
            kind.name,
            resident >> 10,
            plugged >> 10
        );
        assert!(resident > 0 && resident <= plugged, "{}", kind.name);
    });
}

#[test]
fn vcpu_that_races_an_unplug_faults_nothing_back_in() {
    const SEED: u64 = 0x5eed_0f00_d1e5;
    println!("seed {SEED:#x}");
    on_every_backing("racing vCPU", 2, |kind, mut rig, mut rogue| {
        let rounds = if kind.block_size == GIB { 10 } else { 100 };
        let stop = AtomicBool::new(false);
        let (swept, sweeps) = mpsc::channel();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let swept = swept;
                let mut closed = 0;
                while !stop.load(Ordering::Relaxed) {
                    let stops = rogue.sweep();
                    closed += stops
                        .iter()
                        .filter(|stop| matches!(stop, Stop::Closed(_)))
                        .count();
                    // Nobody listens any more once the test has failed.
                    let _ = swept.send(());
                }
                closed
            });
            // The end of a sweep that was not over when this was called.
            let sweep = || {
                while sweeps.try_recv().is_ok() {}
                sweeps.recv().unwrap();
            };
            // Stops the vCPU even if an assertion fails.
            let _stop = StopOnDrop(&stop);
            let mut random = SEED;
            let mut unplugs = 0;
            for _ in 0..rounds {
                // Xorshift (Marsaglia): any mix of blocks will do.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let index = random % BLOCKS;
                // So that the vCPU has its hands on what is taken away, whatever the scheduler does.
                sweep();
                if plug(&mut rig, kind, index, 1) == Response::Error {
                    assert_eq!(unplug(&mut rig, kind, index, 1), Response::Ack);
                    unplugs += 1;
                }
                let resident = rig.handle.resident_bytes().unwrap();
                let plugged = rig.handle.status().plugged_size;
                assert!(resident <= plugged, "{}: {resident:#x}", kind.name);
            }
            assert_eq!(rig.unplug_all(), Response::Ack);
            assert_eq!(rig.handle.resident_bytes().unwrap(), 0, "{}", kind.name);
            // The second of two sweeps began after the memory was gone.
            sweep();
            sweep();
            assert_eq!(rig.handle.resident_bytes().unwrap(), 0, "{}", kind.name);
            stop.store(true, Ordering::Relaxed);
            let closed = vcpu.join().unwrap();
            println!(
                "{}: {unplugs} unplugs under a writing vCPU, {closed} writes refused, 0 KiB resident",
                kind.name
            );
        });
    });
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn more_slots_than_the_vm_has_are_an_error_at_the_start() {
    let Some((_, vm)) = kvm("slot limit") else {
        return;
    };
    let limit = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap();
    println!("{limit} memory slots");
    let build = |first| {
        let backing = Anonymous::base_pages(GIB).unwrap();
        VirtioMem::builder(GuestAddress(REGION), backing)
            .slots(KvmSlots::new(Arc::clone(&vm), first))
            .build()
    };
    let refused = build(limit - 7).unwrap_err();
    assert!(matches!(
        refused,
        BuildError::TooManySlots {
            needed: 8,
            available: 7
        }
    ));
    assert!(build(limit - 8).is_ok());
    assert!(build(u32::MAX).is_err());
}

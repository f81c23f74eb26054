//! The smallest guest there is: two pieces of machine code at ring 3, with page tables the host has built.
//!
//! Registers follow the Intel SDM volume 3, 4.5 (four-level paging) and 27.3.1 (what a VM entry checks).
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands an address range to the guest"
)]

use std::error::Error;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use virtio_mem::wire::Field;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::{CONFIG, DONE, DOORBELL};

const BOOT_MEMORY_SIZE: usize = 2 << 20;
const BOOT_MEMORY_SLOT: u32 = 0;
/// Three pages some Intel processors need, where nothing else is.
const TSS_ADDRESS: usize = 0xfffb_d000;

const RING_DOORBELL_AT: u64 = 0x8000;
const RING_DOORBELL: [u8; 4] = [
    0x89, 0x02, // mov [rdx], eax
    0x89, 0x03, // mov [rbx], eax
];

const FILL_AT: u64 = 0x8100;
const FILL: [u8; 21] = [
    0x44, 0x8b, 0x06, // mov r8d, [rsi]
    0x8b, 0x7e, 0x04, // mov edi, [rsi + 4]
    0x48, 0xc1, 0xe7, 0x20, // shl rdi, 32
    0x4c, 0x09, 0xc7, // or rdi, r8
    0x48, 0x01, 0xd7, // add rdi, rdx
    0xf3, 0x48, 0xab, // rep stosq
    0x89, 0x03, // mov [rbx], eax
];

const PAGE_TABLES: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;
/// What the page tables map, one to one.
const MAPPED_GIB: u64 = 6;

/// Memory from address 0, mapped into `vm`.
pub(crate) fn boot_memory(vm: &VmFd) -> Result<GuestRegionMmap, Box<dyn Error>> {
    let memory = GuestRegionMmap::from_range(GuestAddress(0), BOOT_MEMORY_SIZE, None)?;
    let slot = kvm_userspace_memory_region {
        slot: BOOT_MEMORY_SLOT,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.len(),
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: one mapping that holds guest memory only. It goes into the collection that `main` keeps until
    // its end, and no vCPU runs after that.
    unsafe { vm.set_user_memory_region(slot) }?;
    Ok(memory)
}

/// A vCPU and what it is to do next.
pub(crate) struct Guest {
    pub(crate) vcpu: VcpuFd,
}

impl Guest {
    /// Puts programs and page tables into `memory`, and a vCPU at ring 3.
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        memory: &GuestRegionMmap,
    ) -> Result<Self, Box<dyn Error>> {
        memory.write_slice(&RING_DOORBELL, MemoryRegionAddress(RING_DOORBELL_AT))?;
        memory.write_slice(&FILL, MemoryRegionAddress(FILL_AT))?;
        write_page_tables(memory)?;
        vm.set_tss_address(TSS_ADDRESS)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        vcpu.set_sregs(&ring_3(vcpu.get_sregs()?))?;
        Ok(Self { vcpu })
    }

    /// The vCPU is to notify queue 0, and then to say that it has.
    pub(crate) fn prepare_doorbell(&self) -> Result<(), kvm_ioctls::Error> {
        self.vcpu.set_regs(&kvm_regs {
            rip: RING_DOORBELL_AT,
            rax: 0,
            rdx: DOORBELL,
            rbx: DONE,
            rflags: 1 << 1,
            ..Default::default()
        })
    }

    /// The vCPU is to fill `len` bytes at `offset` of the region with `tag`, and then to say that it has.
    pub(crate) fn prepare_fill(
        &self,
        offset: u64,
        len: u64,
        tag: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        self.vcpu.set_regs(&kvm_regs {
            rip: FILL_AT,
            rax: tag,
            rcx: len / 8,
            rdx: offset,
            rbx: DONE,
            rsi: CONFIG.start + Field::Addr.offset() as u64,
            rflags: 1 << 1,
            ..Default::default()
        })
    }
}

/// Four levels, in pages of 2 MiB, all for user mode.
fn write_page_tables(memory: &GuestRegionMmap) -> Result<(), Box<dyn Error>> {
    // Present, writable, user; and accessed, so that the processor does not write to the tables.
    const TABLE: u64 = 0b10_0111;
    // The same, dirty, and a large page.
    const LARGE_PAGE: u64 = TABLE | 0b1100_0000;
    let write = |table: u64, index: u64, entry: u64| {
        let at = MemoryRegionAddress(PAGE_TABLES + table * PAGE + index * 8);
        memory.write_obj(entry, at)
    };
    write(0, 0, (PAGE_TABLES + PAGE) | TABLE)?;
    for gib in 0..MAPPED_GIB {
        let table = 2 + gib;
        write(1, gib, (PAGE_TABLES + table * PAGE) | TABLE)?;
        for index in 0..512 {
            write(table, index, (gib << 30 | index << 21) | LARGE_PAGE)?;
        }
    }
    Ok(())
}

/// 64-bit mode at ring 3, from the registers of a vCPU after reset. There is no IDT: an exception ends it.
fn ring_3(reset: kvm_sregs) -> kvm_sregs {
    const CR0_PG_WP_NE_ET_MP_PE: u64 = 0x8001_0033;
    const CR4_OSXMMEXCPT_OSFXSR_PAE: u64 = 0x620;
    const EFER_LMA_LME: u64 = 0x500;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x0b,
        type_: 0xb,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x13,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    // Not used, but asked for at entry.
    let tss = kvm_segment {
        limit: 0x67,
        selector: 0x18,
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
        cr0: CR0_PG_WP_NE_ET_MP_PE,
        cr3: PAGE_TABLES,
        cr4: CR4_OSXMMEXCPT_OSFXSR_PAE,
        efer: EFER_LMA_LME,
        ..reset
    }
}

//! What is in boot memory and in the registers when a vCPU starts.
//!
//! The guest starts where firmware and boot loader would have brought it: in 64-bit mode at ring 3, with page
//! tables the host has built. It never has to run privileged code, which some KVM backends emulate instruction
//! by instruction. There is no IDT: an exception in the guest ends the machine, see
//! [`Outcome::Crashed`](crate::Outcome::Crashed).
//!
//! Registers follow the Intel SDM volume 3, 4.1 (paging modes) and 27.3.1 (what a VM entry checks).
#![expect(
    unsafe_code,
    reason = "BootInfo is declared plain data here, for vm-memory to write it"
)]

use std::io::Cursor;
use std::ops::Range;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use virtio_mem_driver::driver::{Policy, Strategy};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};
use vmem_guest::abi::{BOOT_MAGIC, BootInfo, DeviceInfo, MAX_DEVICES, driver};

use crate::BootMemory;
use crate::layout::{IMAGE_START, LARGE_PAGE, Layout, PAGE, PORT, VIRTIO_MMIO};

/// Boot memory could not be prepared.
#[derive(Debug, Error)]
pub enum BootError {
    /// The image is no ELF file for this machine, or does not fit.
    #[error("the guest image cannot be loaded into boot memory")]
    Image(#[source] linux_loader::loader::Error),
    /// Something of the layout is outside boot memory.
    #[error("boot memory cannot be written")]
    Memory(#[from] GuestMemoryError),
    /// There are not enough page-table pages.
    #[error("the page tables do not fit into the {0:#x} bytes set aside for them")]
    PageTables(u64),
}

/// A loaded image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoadedImage {
    /// Where execution starts.
    pub(crate) entry: u64,
    /// Address after the last byte.
    pub(crate) end: u64,
}

/// What the guest program is told besides the layout.
#[derive(Clone, Debug)]
pub(crate) struct GuestParameters {
    pub(crate) seed: u64,
    pub(crate) worker_pages: u64,
    pub(crate) policy: Policy,
    pub(crate) mixed_zones: bool,
    /// The proximity domain each device names.
    pub(crate) domains: Vec<Option<u16>>,
}

/// Loads the image where it is linked.
pub(crate) fn load_image(memory: &BootMemory, image: &[u8]) -> Result<LoadedImage, BootError> {
    let start = GuestAddress(IMAGE_START);
    let loaded =
        Elf::load(memory, None, &mut Cursor::new(image), Some(start)).map_err(BootError::Image)?;
    Ok(LoadedImage {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
    })
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct RawBootInfo(BootInfo);

const _: () = assert!(size_of::<BootInfo>() == 28 * size_of::<u64>());

// SAFETY: numbers of 64 bits, any value of each valid, no padding (asserted above).
unsafe impl ByteValued for RawBootInfo {}

/// Writes the boot information.
pub(crate) fn write_boot_info(
    memory: &BootMemory,
    layout: &Layout,
    parameters: &GuestParameters,
) -> Result<BootInfo, BootError> {
    let Policy {
        strategy,
        force_bbm,
        bbm_block_size,
        ..
    } = parameters.policy;
    let linux = match strategy {
        Strategy::Linux => driver::LINUX,
        Strategy::Direct => 0,
    };
    let big_block = if force_bbm { driver::BIG_BLOCK } else { 0 };
    let mixed_zones = match parameters.mixed_zones {
        true => driver::MIXED_ZONES,
        false => 0,
    };
    let mut devices = [DeviceInfo::NONE; MAX_DEVICES];
    let known = layout.views.iter().zip(&parameters.domains);
    for (index, ((view, domain), device)) in (0..).zip(known.zip(&mut devices)) {
        *device = DeviceInfo {
            virtio_mmio: VIRTIO_MMIO + index * PAGE,
            view: view.start,
            view_words: (view.end - view.start) / 8,
            domain: domain.map_or(DeviceInfo::NO_DOMAIN, u64::from),
        };
    }
    let info = BootInfo {
        magic: BOOT_MAGIC,
        boot_memory_size: layout.boot_memory_size,
        heap_start: layout.heap.start,
        heap_size: layout.heap.end - layout.heap.start,
        mailbox: layout.mailbox,
        port: PORT,
        vcpu_count: layout.vcpu_count as u64,
        seed: parameters.seed,
        worker_pages: parameters.worker_pages,
        driver: linux | big_block | mixed_zones,
        bbm_block_size,
        device_count: layout.views.len() as u64,
        devices,
    };
    memory.write_obj(RawBootInfo(info), GuestAddress(layout.boot_info))?;
    Ok(info)
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Builds the page tables: what the layout wants mapped, one to one, in large pages, for user mode.
pub(crate) fn build_page_tables(memory: &BootMemory, layout: &Layout) -> Result<(), BootError> {
    let mut tables = PageTables {
        memory,
        range: layout.page_tables.clone(),
        next: layout.page_tables.start,
    };
    let root = tables.allocate()?;
    for range in layout.mapped() {
        for page in range.step_by(LARGE_PAGE as usize) {
            let level_3 = tables.below(root, page >> 39)?;
            let level_2 = tables.below(level_3, page >> 30)?;
            // Accessed and dirty from the start, so that the processor never writes to the tables.
            let entry = page | PRESENT | WRITABLE | USER | ACCESSED | DIRTY | LARGE;
            tables.set(level_2, page >> 21, entry)?;
        }
    }
    Ok(())
}

struct PageTables<'a> {
    memory: &'a BootMemory,
    range: Range<u64>,
    next: u64,
}

impl PageTables<'_> {
    /// A new page; boot memory starts zeroed.
    fn allocate(&mut self) -> Result<u64, BootError> {
        let page = self.next;
        if page >= self.range.end {
            return Err(BootError::PageTables(self.range.end - self.range.start));
        }
        self.next += PAGE;
        Ok(page)
    }

    /// The table that entry `index` (taken modulo 512) of `table` refers to, made if it is not there.
    fn below(&mut self, table: u64, index: u64) -> Result<u64, BootError> {
        let entry: u64 = self.memory.read_obj(Self::slot(table, index))?;
        if entry & PRESENT != 0 {
            return Ok(entry & ADDRESS);
        }
        let page = self.allocate()?;
        self.set(table, index, page | PRESENT | WRITABLE | USER | ACCESSED)?;
        Ok(page)
    }

    fn set(&self, table: u64, index: u64, entry: u64) -> Result<(), BootError> {
        Ok(self.memory.write_obj(entry, Self::slot(table, index))?)
    }

    fn slot(table: u64, index: u64) -> GuestAddress {
        GuestAddress(table + index % 512 * 8)
    }
}

/// General registers at the entry point: the arguments of [`BootInfo`]'s contract, and in `rdx` how fast the
/// time stamp counter runs, which a program at ring 3 cannot find out.
pub(crate) fn general_registers(
    layout: &Layout,
    entry: u64,
    vcpu: usize,
    tsc_khz: u64,
) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsp: layout.stack_top(vcpu),
        rdi: layout.boot_info,
        rsi: vcpu as u64,
        rdx: tsc_khz,
        // Bit 1 is always set; interrupts stay off, there is nobody to take them.
        rflags: 1 << 1,
        ..Default::default()
    }
}

/// Privileged registers, starting from those of a vCPU after reset.
pub(crate) fn system_registers(reset: kvm_sregs, layout: &Layout) -> kvm_sregs {
    const CR0_PE: u64 = 1 << 0;
    const CR0_MP: u64 = 1 << 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_NE: u64 = 1 << 5;
    const CR0_WP: u64 = 1 << 16;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const CR4_OSFXSR: u64 = 1 << 9;
    const CR4_OSXMMEXCPT: u64 = 1 << 10;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    const RING_3: u8 = 3;
    const CODE_ACCESSED: u8 = 0xb;
    const DATA_ACCESSED: u8 = 0x3;
    const BUSY_TSS_64: u8 = 0xb;

    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: (1 << 3) | u16::from(RING_3),
        type_: CODE_ACCESSED,
        present: 1,
        dpl: RING_3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: (2 << 3) | u16::from(RING_3),
        type_: DATA_ACCESSED,
        db: 1,
        l: 0,
        ..code
    };
    // Never used, but a VM entry in 64-bit mode wants one.
    let tss = kvm_segment {
        base: 0,
        limit: 0x67,
        selector: 3 << 3,
        type_: BUSY_TSS_64,
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
        // Empty: with no descriptor for it, any exception shuts the vCPU down.
        idt: Default::default(),
        gdt: Default::default(),
        cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3: layout.page_tables.start,
        cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer: EFER_LME | EFER_LMA,
        ..reset
    }
}

#[cfg(test)]
mod tests {
    use virtio_mem_wire::Geometry;

    use super::*;
    use crate::layout::REGION_START;

    fn boot_memory(bytes: u64) -> BootMemory {
        BootMemory::from_ranges(&[(GuestAddress(0), usize::try_from(bytes).unwrap())]).unwrap()
    }

    /// What a processor finds at `address`: its physical address, or nothing.
    fn walk(memory: &BootMemory, layout: &Layout, address: u64) -> Option<u64> {
        let mut table = layout.page_tables.start;
        for shift in [39, 30, 21] {
            let entry: u64 = memory
                .read_obj(PageTables::slot(table, address >> shift))
                .unwrap();
            if entry & PRESENT == 0 {
                return None;
            }
            assert_eq!(entry & (WRITABLE | USER), WRITABLE | USER);
            assert_eq!(entry & LARGE != 0, shift == 21);
            table = entry & ADDRESS;
        }
        Some(table + address % LARGE_PAGE)
    }

    #[test]
    fn tables_map_what_the_guest_may_use_and_nothing_else() {
        let geometry = Geometry::new(REGION_START + (1 << 30), 600 << 30, 2 << 20).unwrap();
        let layout = Layout::new(64 << 20, IMAGE_START + 1, &[geometry], 1).unwrap();
        let memory = boot_memory(layout.boot_memory_size);
        build_page_tables(&memory, &layout).unwrap();

        let end = layout.regions[0].end;
        let mapped = [
            IMAGE_START,
            layout.heap.end - 1,
            VIRTIO_MMIO,
            PORT,
            layout.regions[0].start,
            end - 1,
        ];
        for address in mapped {
            assert_eq!(
                walk(&memory, &layout, address),
                Some(address),
                "{address:#x}"
            );
        }
        for address in [0, 8, layout.page_tables.start, 64 << 20, REGION_START, end] {
            assert_eq!(walk(&memory, &layout, address), None, "{address:#x}");
        }
    }

    #[test]
    fn image_that_is_none_or_does_not_fit_is_refused() {
        let memory = boot_memory(4 << 20);
        assert!(matches!(
            load_image(&memory, b"#!/bin/sh"),
            Err(BootError::Image(_))
        ));
        assert!(load_image(&memory, crate::GUEST_IMAGE).is_ok());
        let small = boot_memory(IMAGE_START);
        assert!(matches!(
            load_image(&small, crate::GUEST_IMAGE),
            Err(BootError::Image(_))
        ));
    }
}

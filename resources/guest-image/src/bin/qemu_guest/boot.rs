//! From the PVH entry to Rust, and what the VMM says about the machine.
//!
//! Xen: `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`.
#![expect(
    unsafe_code,
    reason = "the entry is assembly, and what the VMM passes are raw addresses"
)]

use core::arch::global_asm;
use core::ffi::CStr;
use core::ops::Range;
use core::panic::PanicInfo;
use core::ptr;

use alloc::vec::Vec;
use virtio_mem_driver::hotplug::{Boot, BootRange};
use vmem_guest_image::heap;
use vmem_guest_image::identity::address;

use crate::{println, serial};

/// Everything below is mapped one to one, in pages of 1 GiB.
pub(crate) const MAPPED: u64 = 512 << 30;

/// Bytes of heap, right behind the image.
const HEAP: u64 = 64 << 20;

/// What is below belongs to firmware, which has left the VMM's description there.
const LOW_MEMORY: u64 = 1 << 20;

/// With the byte that ends it.
const LONGEST_COMMAND_LINE: usize = 4096;

// The entry is in 32-bit protected mode without paging, with the address of the description in ebx.
global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY, with an address as long as those of this ELF file.
    ".section .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad _start",
    ".section .data.boot, \"aw\"",
    ".balign 4096",
    "boot_pml4:",
    ".quad boot_pdpt + 3",
    ".fill 511, 8, 0",
    "boot_pdpt:",
    ".set boot_page, 0x83",
    ".rept 512",
    ".quad boot_page",
    ".set boot_page, boot_page + (1 << 30)",
    ".endr",
    "boot_gdt:",
    ".quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff",
    "boot_gdt_pointer:",
    ".word 23",
    ".long boot_gdt",
    ".section .bss.boot, \"aw\", @nobits",
    ".balign 16",
    ".skip 0x40000",
    "boot_stack:",
    ".section .text.boot, \"ax\"",
    ".code32",
    ".globl _start",
    "_start:",
    "cld",
    "mov esp, offset boot_stack",
    "mov edi, ebx",
    "mov eax, offset boot_pml4",
    "mov cr3, eax",
    // PAE, and SSE with its exceptions.
    "mov eax, cr4",
    "or eax, 0x620",
    "mov cr4, eax",
    // EFER.LME
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    // Paging, and the processor's own floating point.
    "mov eax, cr0",
    "and eax, 0xfffffff3",
    "or eax, 0x80000002",
    "mov cr0, eax",
    "lgdt [boot_gdt_pointer]",
    "push 8",
    "mov eax, offset boot_long_mode",
    "push eax",
    "retf",
    ".code64",
    "boot_long_mode:",
    "mov eax, 16",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, offset boot_stack",
    "mov edi, edi",
    "xor ebp, ebp",
    "call {enter}",
    "ud2",
    enter = sym enter,
);

unsafe extern "C" {
    /// First byte behind the image, by the linker script.
    static image_end: u8;
}

/// `hvm_start_info`
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;

/// `hvm_memmap_table_entry`
#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    start: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const RAM: u32 = 1;

/// What the VMM says about the machine.
pub(crate) struct Machine {
    /// RAM, and what of it is in use.
    pub(crate) memory: Boot,
    pub(crate) command_line: &'static str,
}

extern "C" fn enter(info: *const StartInfo) -> ! {
    // SAFETY: the VMM passes the address of its description, which is below what this program writes.
    let info = unsafe { &*info };
    assert_eq!(info.magic, MAGIC, "no description of the machine");
    assert!(info.version > 0, "the description has no memory map");
    let heap = heap_range();
    // SAFETY: the memory behind the image is RAM, which is checked below, and nobody else has it.
    unsafe { heap::init(heap.start, heap.end - heap.start) };
    crate::main(&describe(info))
}

fn heap_range() -> Range<u64> {
    let start = (&raw const image_end).addr() as u64;
    start..start + HEAP
}

fn describe(info: &StartInfo) -> Machine {
    let entries = ptr::with_exposed_provenance::<MapEntry>(address(info.memory_map));
    // SAFETY: the description says how many there are, and nobody writes them.
    let entries = unsafe { core::slice::from_raw_parts(entries, info.memory_map_entries as usize) };
    let command_line = match info.command_line {
        0 => "",
        text => {
            let text = ptr::with_exposed_provenance::<u8>(address(text));
            // SAFETY: low memory, which nobody writes.
            let text = unsafe { core::slice::from_raw_parts(text, LONGEST_COMMAND_LINE) };
            let text = CStr::from_bytes_until_nul(text).expect("the command line is short");
            text.to_str().expect("the command line is text")
        }
    };
    let limit = option(command_line, "mem=").map_or(MAPPED, |limit| {
        limit.parse().expect("mem= is a number of bytes")
    });
    let ram: Vec<_> = entries
        .iter()
        .filter(|entry| entry.kind == RAM && entry.start < limit)
        .map(|entry| BootRange {
            bytes: entry.start..limit.min(entry.start + entry.size),
            nid: 0,
        })
        .collect();
    let end = heap_range().end;
    let has = |range: &BootRange| range.bytes.start <= LOW_MEMORY && range.bytes.end >= end;
    assert!(ram.iter().any(has), "too little memory: {ram:x?}");
    Machine {
        memory: Boot {
            ram,
            reserved: core::iter::once(0..end).collect(),
            ..Boot::default()
        },
        command_line,
    }
}

/// The value of an option on the command line.
pub(crate) fn option<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    let mut options = command_line.split_ascii_whitespace();
    options.find_map(|option| option.strip_prefix(name))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // As Linux says it, for who waits for that.
    println!("Kernel panic - not syncing: {info}");
    serial::exit(1)
}

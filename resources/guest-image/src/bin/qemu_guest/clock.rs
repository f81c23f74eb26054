//! The clock: the main counter of the HPET.
#![expect(unsafe_code, reason = "registers are raw addresses")]

use core::ptr;

use vmem_guest_image::identity::address;

/// Where PCs have it.
const HPET: u64 = 0xfed0_0000;
const CAPABILITIES: u64 = HPET;
const CONFIGURATION: u64 = HPET + 0x10;
const COUNTER: u64 = HPET + 0xf0;
const ENABLE: u64 = 1;

/// Femtoseconds in a millisecond.
const FEMTOSECONDS: u64 = 1_000_000_000_000;

/// A running HPET.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    ticks_per_ms: u64,
}

impl Clock {
    /// Starts the counter. `None` if there is none.
    pub(crate) fn start() -> Option<Self> {
        let period = read(CAPABILITIES) >> 32;
        // The specification has at most 100 ns.
        if period == 0 || period > 100_000_000 {
            return None;
        }
        write(CONFIGURATION, read(CONFIGURATION) | ENABLE);
        Some(Self {
            ticks_per_ms: FEMTOSECONDS / period,
        })
    }

    /// Milliseconds since the counter was started.
    pub(crate) fn now_ms(self) -> u64 {
        read(COUNTER) / self.ticks_per_ms
    }
}

fn read(register: u64) -> u64 {
    let register = ptr::with_exposed_provenance::<u64>(address(register));
    // SAFETY: registers of the machine, or nothing, which reads as ones; no Rust object is there.
    unsafe { register.read_volatile() }
}

fn write(register: u64, value: u64) {
    let register = ptr::with_exposed_provenance_mut::<u64>(address(register));
    // SAFETY: as above.
    unsafe { register.write_volatile(value) };
}

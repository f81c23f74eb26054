//! Every thread is joined. A process of its own, because other tests have threads of theirs.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{LONG, device, kvm_or_skip};
use vmm_harness::{GuestKind, Machine, MachineConfig, Outcome};

static PROBE: &[u8] = include_bytes!(env!("VMEM_PROBE_IMAGE"));
/// `resources/guest-image/src/bin/probe.rs`
const SPIN: u64 = 4;
const WAIT: u64 = 5;

fn start(vcpu_count: usize, behaviour: u64) -> Machine {
    let config = MachineConfig {
        boot_memory: 32 << 20,
        vcpu_count,
        guest: GuestKind::Kvm,
        seed: behaviour,
        image: PROBE,
        ..MachineConfig::default()
    };
    Machine::start(&config, device(256 << 20)).unwrap()
}

/// Threads of machines, by their names: KVM has a thread of its own in the process, as long as it likes.
fn thread_count() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread that ends meanwhile has no name to read.
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("vmem-")).count()
}

/// Waits until there are so many; one that was joined is still listed for a moment.
fn await_threads(count: usize) {
    let begun = Instant::now();
    while thread_count() != count {
        assert!(begun.elapsed() < LONG, "{} threads", thread_count());
        std::thread::yield_now();
    }
}

#[test]
fn stopped_guests_leave_no_thread_behind() {
    if !kvm_or_skip() {
        return;
    }
    for round in 0..50 {
        // Sometimes the vCPUs run already, sometimes they have yet to start: no kick may be lost.
        let pause = Duration::from_millis(if round % 3 == 0 { 3 } else { 0 });

        let machine = start(1 + round % 3, SPIN);
        assert_eq!(machine.wait(pause), None);
        if round == 0 {
            // The event loop and the vCPU that spins, once they have given themselves their names.
            await_threads(2);
        }
        assert_eq!(machine.stop(Duration::ZERO), Outcome::Stopped);
        await_threads(0);

        let machine = start(2, WAIT);
        assert_eq!(machine.wait(pause), None);
        assert_eq!(machine.stop(LONG), Outcome::Exited);
        await_threads(0);

        drop(start(1, SPIN));
        await_threads(0);
    }
}

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

/// Threads of machines, by their names: KVM has a thread of its own in the process, as long as it likes. One that was
/// joined may be listed for a moment still, but the kernel is at its end then (`do_exit`), and says so.
fn thread_count() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread that ends meanwhile has nothing to read.
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats.filter(|stat| is_running_machine(stat)).count()
}

/// By a line of `/proc/PID/stat`: `30118 (vmem-vcpu0) S 1 …`.
fn is_running_machine(stat: &str) -> bool {
    const PF_EXITING: u64 = 4;
    let (head, fields) = stat.rsplit_once(") ").unwrap();
    let flags: u64 = fields.split(' ').nth(6).unwrap().parse().unwrap();
    head.contains("(vmem-") && flags & PF_EXITING == 0
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
            let begun = Instant::now();
            while thread_count() < 2 {
                assert!(begun.elapsed() < LONG);
                std::thread::yield_now();
            }
        }
        assert_eq!(machine.stop(Duration::ZERO), Outcome::Stopped);
        assert_eq!(thread_count(), 0);

        let machine = start(2, WAIT);
        assert_eq!(machine.wait(pause), None);
        assert_eq!(machine.stop(LONG), Outcome::Exited);
        assert_eq!(thread_count(), 0);

        drop(start(1, SPIN));
        assert_eq!(thread_count(), 0);
    }
}

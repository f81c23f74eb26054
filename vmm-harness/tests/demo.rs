//! The demonstration with every policy, mode and block size, on KVM and in this process.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[expect(dead_code, reason = "the demonstration makes its own device")]
mod common;

use common::kvm_or_skip;
use virtio_mem_driver::driver::{Mode, Strategy};
use vmm_harness::GuestKind;
use vmm_harness::demo::{self, DemoOptions, Step, Summary};

const MIB: u64 = 1 << 20;

/// Enough to find a page that was lost, and soon done.
fn options(guest: GuestKind, strategy: Strategy) -> DemoOptions {
    DemoOptions {
        region: 2048 * MIB,
        strategy,
        pages_per_step: 2000,
        guest,
        ..DemoOptions::default()
    }
}

fn run(options: &DemoOptions) -> Summary {
    demo::run(options, &mut std::io::sink()).unwrap_or_else(|error| panic!("{options:?}: {error}"))
}

fn requests(step: &Step) -> u64 {
    step.requests.iter().map(|requests| requests.count).sum()
}

/// Every combination that exists: block size and mode in MiB, and the unit that comes of it.
const COMBINATIONS: [(u64, Mode, u64); 6] = [
    (2, Mode::SubBlock, 128),
    (4, Mode::SubBlock, 128),
    (2, Mode::BigBlock, 128),
    (4, Mode::BigBlock, 128),
    (128, Mode::BigBlock, 128),
    (256, Mode::BigBlock, 256),
];

fn every_combination(guest: GuestKind) {
    for strategy in [Strategy::Direct, Strategy::Linux] {
        for (block_size, mode, unit) in COMBINATIONS {
            let targets = [1024, 256, 768, 0].map(|target| target * MIB);
            let options = DemoOptions {
                block_size: block_size * MIB,
                mode: Some(mode),
                targets: Some(targets.to_vec()),
                ..options(guest, strategy)
            };
            let summary = run(&options);
            let (policy, names) = match strategy {
                Strategy::Direct => ("direct", ["sbm", "bbm"]),
                Strategy::Linux => ("linux", ["sbm", "bbm"]),
            };
            let (name, granule) = match mode {
                Mode::SubBlock => (names[0], block_size),
                Mode::BigBlock => (names[1], unit),
            };
            let driver = &summary.driver;
            assert_eq!((driver.policy, driver.mode), (policy, name));
            assert_eq!(driver.granule_size, granule * MIB);
            let mut before = 0;
            for (step, target) in summary.steps.iter().zip(targets) {
                assert_eq!((step.plugged, step.online), (target, target));
                assert!(step.unreachable.is_none(), "{options:?} {step:?}");
                let units = target.abs_diff(before) / (unit * MIB);
                match strategy {
                    // One gap takes it all.
                    Strategy::Direct if target > before => {
                        assert_eq!(requests(step), 1, "{options:?} {step:?}");
                    }
                    Strategy::Direct => {}
                    // Each request stays inside a memory block, or a big block.
                    Strategy::Linux => {
                        assert!(requests(step) >= units, "{options:?} {step:?}");
                    }
                }
                before = target;
            }
            if strategy == Strategy::Linux {
                assert_eq!(requests(&summary.steps[0]), 1024 / unit, "{options:?}");
            }
            let all: u64 = summary.steps.iter().map(requests).sum();
            assert_eq!(summary.requests, all);
        }
    }
}

#[test]
fn every_policy_mode_and_block_size_in_process() {
    every_combination(GuestKind::InProcess);
}

#[test]
fn every_policy_mode_and_block_size_on_kvm() {
    if kvm_or_skip() {
        every_combination(GuestKind::Kvm);
    }
}

#[test]
fn mode_nobody_asked_for_follows_the_block_size() {
    for (block_size, mode) in [(64, "sbm"), (128, "bbm"), (512, "bbm")] {
        let options = DemoOptions {
            block_size: block_size * MIB,
            targets: Some(vec![512 * MIB]),
            ..options(GuestKind::InProcess, Strategy::Linux)
        };
        let summary = run(&options);
        assert_eq!(summary.driver.mode, mode);
        assert_eq!(summary.driver.granule_size, block_size * MIB);
    }
}

#[test]
fn sub_block_mode_is_refused_where_it_is_impossible() {
    for strategy in [Strategy::Direct, Strategy::Linux] {
        for block_size in [128, 256] {
            let options = DemoOptions {
                block_size: block_size * MIB,
                mode: Some(Mode::SubBlock),
                ..options(GuestKind::InProcess, strategy)
            };
            let error = demo::run(&options, &mut std::io::sink()).unwrap_err();
            assert!(error.is_usage(), "{error}");
            let expected =
                format!("a block size of {block_size} MiB is too large, 64 MiB is the largest");
            assert!(error.to_string().ends_with(&expected), "{error}");
        }
    }
}

/// Bytes plugged and bytes out of reach in MiB after each of `targets`.
fn shortfalls(options: DemoOptions, targets: &[u64]) -> Vec<(u64, u64, &'static str)> {
    let options = DemoOptions {
        targets: Some(targets.iter().map(|target| target * MIB).collect()),
        ..options
    };
    let of = |step: &Step| {
        let (bytes, reason) = step.unreachable.map_or((0, ""), |u| (u.bytes, u.reason));
        (step.plugged / MIB, bytes / MIB, reason)
    };
    run(&options).steps.iter().map(of).collect()
}

#[test]
fn remainder_smaller_than_a_big_block_is_reported() {
    const LESS: &str = "less than a granule";
    let targets = [1026, 130, 6, 0];
    let big_blocks = |strategy| DemoOptions {
        mode: Some(Mode::BigBlock),
        bbm_block_size: Some(256 * MIB),
        ..options(GuestKind::InProcess, strategy)
    };
    assert_eq!(
        shortfalls(big_blocks(Strategy::Direct), &targets),
        [(1024, 2, LESS), (0, 130, LESS), (0, 6, LESS), (0, 0, "")]
    );
    assert_eq!(
        shortfalls(big_blocks(Strategy::Linux), &targets),
        [
            (1024, 2, LESS),
            (256, 126, LESS),
            (256, 250, LESS),
            (0, 0, "")
        ]
    );
}

#[test]
fn region_that_ends_inside_a_memory_block_is_not_used_to_its_end() {
    for strategy in [Strategy::Direct, Strategy::Linux] {
        let options = DemoOptions {
            region: 600 * MIB,
            ..options(GuestKind::InProcess, strategy)
        };
        let none_left = "no whole unit of the region is left";
        assert_eq!(
            shortfalls(options, &[600, 4]),
            [(512, 88, none_left), (4, 0, "")],
            "{strategy:?}"
        );
    }
}

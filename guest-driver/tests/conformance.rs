//! One test for each driver rule of virtio 1.4, section 5.15, and a scripted device that answers anything.
//!
//! The ids are ours: G-01 … G-21 are the driver's normative statements in the order of the specification; the test of
//! G-01 is `g_01_…`. Each runs under both strategies, in Sub-Block Mode and in Big-Block Mode, where that makes a
//! difference.
//!
//! | rules | from |
//! |---|---|
//! | G-01 … G-03 | `config`: layout of the configuration space; wrong, torn and restless configurations |
//! | G-04, G-05 | `init`: initialisation; feature bits, queue sizes, memory from an earlier life |
//! | G-06 … G-16 | `operation` |
//! | G-17 … G-21 | `answers`: every answer to every request, in every wrong shape |
//! | G-20, G-21 | `dump`: the view of a crash dump |
//! | all | `hostile`: a device that follows no rule, at random |
//!
//! Of these rules the support module checks some at every step of every test: a write to the configuration space
//! (G-01), an access to a page of an unplugged block (G-06, G-07, G-09, G-10) and a buffer outside DMA memory (G-08)
//! panic, and so does a driver that never comes to rest; padding is never zero (G-02, G-17 … G-20).
//!
//! A request that is acknowledged and was not done cannot be told from one that was, so what the driver may believe is
//! never a lie here, but where the lie can be found out (`h_07_…`).
//!
//! What a driver of a kernel cannot be caught at from here: that no *other* code of the kernel touches unplugged
//! blocks. The guest image does that under KVM, where such an access ends the run (`vmm-harness/tests/guest.rs`). That
//! the registers of the configuration space refuse writes is `g_01_…` of `vmm-harness/tests/mmio.rs`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

#[path = "conformance/answers.rs"]
mod answers;
#[path = "conformance/config.rs"]
mod config;
#[path = "conformance/dump.rs"]
mod dump;
#[path = "conformance/hostile.rs"]
mod hostile;
#[path = "conformance/init.rs"]
mod init;
#[path = "conformance/operation.rs"]
mod operation;
#[path = "conformance/setup.rs"]
mod setup;
#[path = "driver/support/mod.rs"]
#[expect(dead_code, reason = "the target `driver` uses the rest")]
mod support;

/// The table above, checked: each rule has a test of its name.
#[test]
fn every_rule_has_a_test() {
    let sources = [
        include_str!("conformance/config.rs"),
        include_str!("conformance/init.rs"),
        include_str!("conformance/operation.rs"),
        include_str!("conformance/answers.rs"),
    ]
    .concat();
    for rule in 1..=21 {
        let test = format!("#[test]\nfn g_{rule:02}_");
        assert!(sources.contains(&test), "G-{rule:02} has no test");
    }
}

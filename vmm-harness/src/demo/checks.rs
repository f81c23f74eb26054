//! What must hold at every step. Each check has a name, and a failed one is an error that says it.

use thiserror::Error;
use virtio_mem::{Counters, VirtioMem};
use virtio_mem_wire::{Answer, RequestKind};

use super::options::Plan;
use super::residency::unplugged_resident;
use super::{DemoError, Rogue};
use crate::{Report, Shortfall};

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("check `{name}` failed: {found}")]
pub struct CheckFailed {
    /// Name of the check.
    pub name: &'static str,
    /// What was found instead.
    pub found: String,
}

impl CheckFailed {
    pub(crate) fn new(name: &'static str, found: String) -> Self {
        Self { name, found }
    }
}

pub(crate) fn check(
    name: &'static str,
    holds: bool,
    found: impl FnOnce() -> String,
) -> Result<(), CheckFailed> {
    match holds {
        true => Ok(()),
        false => Err(CheckFailed::new(name, found())),
    }
}

/// What a step has to come to.
pub(crate) struct Expected<'a> {
    pub(crate) plan: &'a Plan,
    /// Bytes asked for.
    pub(crate) target: u64,
    /// Bytes the driver can have plugged then: the target, but for what no driver of this kind can reach.
    pub(crate) plugged: u64,
    /// How often the host has refused something.
    pub(crate) host_failures: u64,
}

/// What must hold of the driver before the first step.
pub(crate) fn driver(plan: &Plan, report: &Report) -> Result<(), CheckFailed> {
    let asked = (
        plan.policy.strategy,
        plan.sizes.mode,
        plan.sizes.granule_size,
    );
    let found = (report.strategy, report.mode, report.granule_size);
    check("driver-is-as-asked", found == asked, || {
        format!("{found:?} instead of {asked:?}")
    })
}

/// What must hold as soon as the guest says that it has settled on a target.
pub(crate) fn reached(
    device: &VirtioMem,
    expected: &Expected<'_>,
    report: &Report,
) -> Result<(), CheckFailed> {
    let handle = device.handle();
    let target = expected.target;
    let plugged = handle.status().plugged_size;
    check("plugged-equals-target", plugged == expected.plugged, || {
        format!(
            "{plugged} bytes are plugged, {target} were asked for and {} can be",
            expected.plugged
        )
    })?;
    let granule_size = expected.plan.sizes.granule_size;
    let reason = match target.abs_diff(plugged) {
        0 => Shortfall::None,
        bytes if bytes < granule_size => Shortfall::Remainder,
        _ => Shortfall::Capacity,
    };
    let told = (report.unreachable, report.unreachable_reason);
    check(
        "unreachable-is-told",
        told == (target.abs_diff(plugged), Some(reason)),
        || format!("{told:?} at {plugged} bytes of {target}"),
    )?;
    let bitmap = handle.plugged();
    let geometry = device.geometry();
    let torn = bitmap.runs().find(|run| {
        let ends = [geometry.address(run.first), geometry.bytes(run.count)];
        ends.iter().any(|end| !end.is_multiple_of(granule_size))
    });
    check("only-whole-granules", torn.is_none(), || {
        format!("blocks {torn:?} are plugged in granules of {granule_size} bytes")
    })?;
    check("guest-view-equals-bitmap", report.view == bitmap, || {
        format!(
            "the guest believes {} blocks in {} runs plugged, the device has {} in {}",
            report.view.count(),
            report.view.run_count(),
            bitmap.count(),
            bitmap.run_count()
        )
    })
}

/// Everything that must hold once the guest has worked in its memory for a while; the resident bytes measured on the
/// way.
pub(crate) fn step(
    device: &VirtioMem,
    expected: &Expected<'_>,
    plugged_before: u64,
    report: &Report,
) -> Result<u64, DemoError> {
    let handle = device.handle();
    reached(device, expected, report)?;
    let plugged = handle.status().plugged_size;
    check(
        "online-equals-plugged",
        report.online_size == plugged,
        || {
            format!(
                "the guest works with {} bytes of {plugged}",
                report.online_size
            )
        },
    )?;
    no_page_lost(report)?;
    let resident = resident_within_plugged(device)?;
    if plugged < plugged_before {
        let left = unplugged_resident(device)?;
        check("memory-is-back-with-the-host", left == 0, || {
            format!("{left} bytes are resident behind unplugged blocks")
        })?;
    }
    let counters = handle.counters();
    protocol(&counters)?;
    let answered = requests(&counters);
    check(
        "requests-are-counted-alike",
        report.requests == answered,
        || format!("{} were sent, {answered} answered", report.requests),
    )?;
    let failures = (counters.host_failures, expected.host_failures);
    check(
        "host-failures-are-counted",
        failures.0 == failures.1,
        || format!("{failures:?}: {counters:?}"),
    )?;
    Ok(resident)
}

/// What must hold of the driver's requests at any time.
pub(crate) fn protocol(counters: &Counters) -> Result<(), CheckFailed> {
    let broken = counters.unusable_chains + counters.unknown_requests + counters.queue_errors;
    check("driver-speaks-the-protocol", broken == 0, || {
        format!("{counters:?}")
    })
}

/// Requests the device has answered.
fn requests(counters: &Counters) -> u64 {
    let all = RequestKind::ALL
        .iter()
        .flat_map(|kind| Answer::ALL.map(|answer| (*kind, answer)));
    all.map(|(kind, answer)| counters.requests(kind, answer))
        .sum()
}

pub(crate) fn no_page_lost(report: &Report) -> Result<(), CheckFailed> {
    let wrong: u64 = report.workers.iter().map(|worker| worker.pages_wrong).sum();
    check("no-page-lost-or-wrong", wrong == 0, || {
        format!("{wrong} tagged pages were read back wrong")
    })
}

/// What must hold once the guest has verified and freed all its pages and exited; the pages verified in all.
pub(crate) fn end(device: &VirtioMem, report: &Report) -> Result<u64, DemoError> {
    no_page_lost(report)?;
    let held: u64 = report.workers.iter().map(|worker| worker.pages_held).sum();
    check("every-page-is-freed", held == 0, || {
        format!("{held} pages are still held")
    })?;
    resident_within_plugged(device)?;
    Ok(report
        .workers
        .iter()
        .map(|worker| worker.pages_verified)
        .sum())
}

pub(crate) fn resident_within_plugged(device: &VirtioMem) -> Result<u64, DemoError> {
    let handle = device.handle();
    let (resident, plugged) = (handle.resident_bytes()?, handle.status().plugged_size);
    check("resident-within-plugged", resident <= plugged, || {
        format!("{resident} bytes are resident, {plugged} are plugged")
    })?;
    Ok(resident)
}

/// What must hold after the guest reached for `address`.
pub(crate) fn rogue(device: &VirtioMem, address: u64, rogue: &Rogue) -> Result<(), DemoError> {
    check("rogue-access-is-found", rogue.address == address, || {
        format!("told to touch {address:#x}, found at {:#x}", rogue.address)
    })?;
    let (before, after) = rogue.unplugged_resident;
    check(
        "rogue-access-gains-nothing",
        (before, after) == (0, 0),
        || format!("{before} bytes resident behind unplugged blocks before, {after} after"),
    )?;
    resident_within_plugged(device)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use virtio_mem::Anonymous;
    use virtio_mem_driver::driver::{Mode, Strategy};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::demo::DemoOptions;
    use crate::layout::REGION_START;
    use crate::{GuestKind, Machine, MachineConfig};

    const LONG: Duration = Duration::from_secs(60);
    const TARGET: u64 = 6 << 20;

    /// What makes a report wrong.
    type Spoil = fn(&mut Report);

    fn machine() -> Machine {
        let config = MachineConfig {
            guest: GuestKind::InProcess,
            ..MachineConfig::default()
        };
        let backing = Anonymous::base_pages(1 << 30).unwrap();
        let device = VirtioMem::builder(GuestAddress(REGION_START), backing).block_size(2 << 20);
        let machine = Machine::start(&config, device).unwrap();
        machine.handle().resize(TARGET).unwrap();
        machine
    }

    fn plan(mode: Option<Mode>) -> Plan {
        let options = DemoOptions {
            region: 1 << 30,
            mode,
            ..DemoOptions::default()
        };
        Plan::new(&options).unwrap()
    }

    fn name(result: Result<impl Sized, DemoError>) -> &'static str {
        match result {
            Ok(_) => "none",
            Err(DemoError::Check(failed)) => failed.name,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn each_check_of_a_step_fails_by_its_name() {
        let machine = machine();
        let report = machine.settled(TARGET, LONG).unwrap();
        let plan_as_run = plan(None);
        let expected = Expected {
            plan: &plan_as_run,
            target: TARGET,
            plugged: TARGET,
            host_failures: 0,
        };
        let found = |expected: &Expected<'_>, spoil: Spoil| {
            let mut report = report.clone();
            spoil(&mut report);
            name(step(machine.device(), expected, 0, &report))
        };
        assert_eq!(found(&expected, |_| {}), "none");
        let spoilt: [(&str, Spoil); 7] = [
            ("unreachable-is-told", |r| r.unreachable = 2 << 20),
            ("unreachable-is-told", |r| {
                r.unreachable_reason = Some(Shortfall::Remainder);
            }),
            ("unreachable-is-told", |r| r.unreachable_reason = None),
            ("guest-view-equals-bitmap", |r| r.view.clear()),
            ("online-equals-plugged", |r| r.online_size -= 4096),
            ("no-page-lost-or-wrong", |r| r.workers[1].pages_wrong = 1),
            ("requests-are-counted-alike", |r| r.requests += 1),
        ];
        for (check, spoil) in spoilt {
            assert_eq!(found(&expected, spoil), check);
        }
        let more = Expected {
            plugged: 8 << 20,
            ..expected
        };
        assert_eq!(found(&more, |_| {}), "plugged-equals-target");
        let big_blocks = plan(Some(Mode::BigBlock));
        let refused = Expected {
            host_failures: 1,
            ..expected
        };
        assert_eq!(found(&refused, |_| {}), "host-failures-are-counted");
        let torn = Expected {
            plan: &big_blocks,
            ..expected
        };
        assert_eq!(found(&torn, |_| {}), "only-whole-granules");
    }

    #[test]
    fn driver_that_is_not_as_asked_is_found() {
        let machine = machine();
        let report = machine.settled(TARGET, LONG).unwrap();
        assert_eq!(driver(&plan(None), &report), Ok(()));
        let spoilt: [Spoil; 3] = [
            |r| r.strategy = Strategy::Linux,
            |r| r.mode = Mode::BigBlock,
            |r| r.granule_size *= 2,
        ];
        for spoil in spoilt {
            let mut report = report.clone();
            spoil(&mut report);
            let failed = driver(&plan(None), &report).unwrap_err();
            assert_eq!(failed.name, "driver-is-as-asked");
        }
    }
}

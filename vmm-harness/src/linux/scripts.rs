//! What is tried with a guest. Each script is a function over guest, device and QEMU that checks facts on all sides.

use std::time::{Duration, Instant};

use virtio_mem_wire::{Answer, RequestKind};

use super::LinuxError;
use super::qemu::Setup;
use super::session::{LONG, Session, check, until};
use crate::serve::control::Command;

const MIB: u64 = 1 << 20;

/// Mounts the file system whose files live in memory, larger than any memory the guest ever has.
const TMPFS: &str = "mkdir /data && mount -t tmpfs -o size=16G data /data";

/// How long a device's state must stay the same to be taken as final.
const STILL: Duration = Duration::from_secs(10);

/// How long a driver is left alone that was refused. Linux tries again after 5 seconds at the earliest.
const REFUSED: Duration = Duration::from_secs(2);

/// What a script may be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choices {
    /// Seed of what is random.
    pub(super) seed: u64,
    /// How long random resizing goes on.
    pub(super) random_for: Duration,
}

/// Something to try, and the machine to try it on.
#[derive(Debug)]
pub struct Script {
    name: &'static str,
    about: &'static str,
    setup: Setup,
    needs_ours: bool,
    run: fn(&mut Session<'_>, &Choices) -> Result<(), LinuxError>,
}

/// 1 GiB of memory and a region of 2 GiB, in blocks of 2 MiB, which the guest takes for memory that can be moved.
pub(super) const SETUP: Setup = Setup {
    boot_memory: 1 << 30,
    region: 2 << 30,
    block_size: 2 * MIB,
    requested: 0,
    online: "online_movable",
};

/// Every script.
pub static SCRIPTS: &[Script] = &[
    Script {
        name: "grow-shrink",
        about: "up and down in steps, with memory written in between that must come back to the host",
        setup: SETUP,
        needs_ours: false,
        run: grow_shrink,
    },
    Script {
        name: "sub-block",
        about: "sizes that are no multiple of the guest's memory blocks: 130 and 6 MiB",
        setup: SETUP,
        needs_ours: false,
        run: sub_block,
    },
    Script {
        name: "live-data",
        about: "shrinks under a file in tmpfs, whose checksum must not change",
        setup: SETUP,
        needs_ours: false,
        run: live_data,
    },
    Script {
        name: "stuck-shrink",
        about: "a shrink for which memory is missing, and which goes on once some is freed",
        setup: SETUP,
        needs_ours: false,
        run: stuck_shrink,
    },
    Script {
        name: "reboot",
        about: "a system reset with memory plugged",
        setup: SETUP,
        needs_ours: false,
        run: reboot,
    },
    Script {
        name: "rebind",
        about: "the driver removed and inserted, with nothing plugged and with memory plugged",
        setup: SETUP,
        needs_ours: false,
        run: rebind,
    },
    Script {
        name: "big-block",
        about: "device blocks of 256 MiB, larger than memory blocks",
        setup: Setup {
            block_size: 256 * MIB,
            ..SETUP
        },
        needs_ours: false,
        run: big_block,
    },
    Script {
        name: "requested-at-boot",
        about: "a size that is requested before the guest starts",
        setup: Setup {
            requested: 512 * MIB,
            ..SETUP
        },
        needs_ours: false,
        run: requested_at_boot,
    },
    Script {
        name: "frozen",
        about: "requests answered BUSY, and the driver that goes on when they are not any more",
        setup: SETUP,
        needs_ours: true,
        run: frozen,
    },
    Script {
        name: "random",
        about: "random sizes under a load of files that come, are verified, and go",
        setup: SETUP,
        needs_ours: false,
        run: random,
    },
];

impl Script {
    /// The script of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        SCRIPTS.iter().find(|script| script.name == name)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it does, for people.
    #[must_use]
    pub fn about(&self) -> &'static str {
        self.about
    }

    /// Whether it does what only this project's device can.
    #[must_use]
    pub fn needs_ours(&self) -> bool {
        self.needs_ours
    }

    pub(super) fn setup(&self) -> &Setup {
        &self.setup
    }

    pub(super) fn run(
        &self,
        session: &mut Session<'_>,
        choices: &Choices,
    ) -> Result<(), LinuxError> {
        (self.run)(session, choices)
    }
}

fn grow_shrink(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    for target in [256, 1536] {
        session.resize(target * MIB)?;
    }
    let begun = Instant::now();
    session.run(TMPFS)?;
    session.run("dd if=/dev/zero of=/data/file bs=1M count=600")?;
    session.note("write 600 MiB", begun)?;
    // The guest may take memory of its own first, but has less than 1 GiB of that.
    let resident = session.status()?.resident_size;
    check(resident >= 300 * MIB, || {
        format!(
            "{} MiB of host memory after 600 were written",
            resident / MIB
        )
    })?;
    session.run("rm /data/file")?;
    for target in [256, 2048, 0] {
        session.resize(target * MIB)?;
    }
    Ok(())
}

fn sub_block(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    for target in [130, 6, 130, 2, 0] {
        session.resize(target * MIB)?;
    }
    Ok(())
}

fn live_data(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    // Random numbers are slow to make: the same ones over and over, each time at another offset in a page.
    const WRITE: &str = "dd if=/dev/urandom of=/data/part bs=1M count=16; \
        for copy in $(seq 25); do echo $copy; cat /data/part; done > /data/file; rm /data/part";
    session.resize(1024 * MIB)?;
    session.run(TMPFS)?;
    let begun = Instant::now();
    session.run(WRITE)?;
    session.note("write 400 MiB", begun)?;
    let resident = session.status()?.resident_size;
    check(resident >= 200 * MIB, || {
        format!(
            "only {} MiB of the file are in plugged memory",
            resident / MIB
        )
    })?;
    let sum = session.run("md5sum /data/file")?;
    // At last the file does not fit into what is plugged.
    for target in [512, 128, 0] {
        session.resize(target * MIB)?;
        let now = session.run("md5sum /data/file")?;
        check(now == sum, || {
            format!("the checksum was {sum}, and is {now} after the shrink to {target} MiB")
        })?;
    }
    Ok(())
}

fn stuck_shrink(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    session.resize(512 * MIB)?;
    session.run(TMPFS)?;
    // If the kernel looks for something to kill, it must not be the only process there is.
    session.run(
        "for i in 1 2 3 4; do (echo 1000 > /proc/self/oom_score_adj; exec sleep 100000) & done",
    )?;
    let begun = Instant::now();
    for file in ["a", "b"] {
        session.run(&format!("dd if=/dev/zero of=/data/{file} bs=1M count=550"))?;
    }
    session.note("write 1100 MiB", begun)?;

    let begun = Instant::now();
    session.request(0)?;
    let status = session.unchanged(STILL)?;
    // More was written than the guest has memory of its own.
    check(status.plugged_size > 0, || {
        format!("1100 MiB of data, and the device has {status:?}")
    })?;
    session.note("resize to 0 B, which gets stuck", begun)?;

    // Without a process of its own: there may be no memory for one.
    let begun = Instant::now();
    session.run(": > /data/a; : > /data/b")?;
    // Nobody asks again: the driver tries by itself.
    session.settled("files truncated", 0, begun)
}

fn reboot(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    session.resize(512 * MIB)?;
    let begun = Instant::now();
    session.guest.qemu.system_reset()?;
    // The reset has unplugged everything; the driver plugs what is still requested.
    session.settled("system reset", 512 * MIB, begun)?;
    let left = session.driver_says("unplugging all memory is required")?;
    check(left.is_empty(), || {
        format!("memory was still plugged after the reset: {left:?}")
    })?;
    session.resize(0)
}

fn rebind(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    const INSERT: &str = "insmod /modules/*-virtio_mem.ko";
    session.resize(256 * MIB)?;
    session.resize(0)?;
    session.run(&format!("rmmod virtio_mem && {INSERT}"))?;
    session.resize(256 * MIB)?;

    let begun = Instant::now();
    session.run("rmmod virtio_mem")?;
    let said = session.driver_says("device still has system memory added")?;
    check(said.len() == 1, || {
        format!("the driver went and said {said:?} of the memory it leaves")
    })?;
    // A module stays even if no device takes it; the driver refuses the device.
    let inserted = session.guest.qemu.console.try_run(INSERT, LONG)?;
    let refused = session.driver_says("reloading the driver is not supported")?;
    check(refused.len() == 1, || {
        format!("the driver came back ({inserted:?}) and said {refused:?}")
    })?;
    // Nothing was unplugged: the guest uses the memory.
    let (status, facts) = (session.status()?, session.facts()?);
    check(status.plugged_size == 256 * MIB, || {
        format!("the device has {status:?}")
    })?;
    check(facts.differ_from(256 * MIB).is_none(), || {
        format!("{:?}", facts.differ_from(256 * MIB))
    })?;
    session.note("rebind with memory plugged, refused", begun)
}

fn big_block(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    let said = session.driver_says("big block size: 0x10000000")?;
    check(said.len() == 1, || {
        "the driver is not in Big-Block Mode".into()
    })?;
    for target in [1024, 256, 0] {
        session.resize(target * MIB)?;
    }
    Ok(())
}

fn requested_at_boot(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    session.settled("requested before boot", 512 * MIB, Instant::now())?;
    session.resize(1024 * MIB)?;
    session.resize(0)
}

fn frozen(session: &mut Session<'_>, _: &Choices) -> Result<(), LinuxError> {
    session.resize(256 * MIB)?;
    for target in [512, 128] {
        let before = session.status()?.plugged_size;
        session.execute(Command::Freeze)?;
        let (refused, _) = refused_and_told(session)?;
        let begun = Instant::now();
        session.request(target * MIB)?;
        // The driver asks at once, is refused, and goes to sleep.
        let mut now = refused;
        until(LONG, || {
            (now, _) = refused_and_told(session)?;
            Ok(now > refused)
        })?;
        check(now > refused, || "the driver was not refused".into())?;
        let status = session.unchanged(REFUSED)?;
        check(status.plugged_size == before, || {
            format!("frozen at {before:#x}, the device has {status:?}")
        })?;
        session.note(&format!("resize to {target} MiB, refused: BUSY"), begun)?;

        // One notification wakes the driver, which would have slept for most of a minute.
        let (_, told) = refused_and_told(session)?;
        let begun = Instant::now();
        session.execute(Command::Thaw)?;
        session.settled("thaw", target * MIB, begun)?;
        let (_, told_now) = refused_and_told(session)?;
        check(told_now == told + 1, || {
            format!("{} notifications by the thaw", told_now - told)
        })?;
    }
    session.resize(0)
}

/// Requests the device has answered BUSY, and configuration changes it has told the driver.
fn refused_and_told(session: &Session<'_>) -> Result<(u64, u64), LinuxError> {
    let handle = session.guest.device.handle();
    let handle =
        handle.ok_or_else(|| LinuxError::Unsupported("the device does not count".into()))?;
    let counters = handle.counters();
    let busy = |kind| counters.requests(kind, Answer::Busy);
    let refused = busy(RequestKind::Plug) + busy(RequestKind::Unplug);
    Ok((refused, counters.config_notifications))
}

/// Files of up to 32 MiB in 8 places, in turn made and, at their next turn, verified and removed.
const LOAD: &str = "(while [ ! -e /data/stop ]; do \
    place=/data/$((RANDOM % 8)); \
    if [ -e $place ]; then \
        md5sum -s -c $place.md5 || echo $place >> /data/bad; rm $place $place.md5; echo $place >> /data/verified; \
    else \
        dd if=/dev/urandom of=$place bs=64k count=$((RANDOM % 512 + 1)) 2>/dev/null; md5sum $place > $place.md5; \
    fi; done; \
    for sum in /data/*.md5; do md5sum -s -c $sum || echo $sum >> /data/bad; done; rm /data/*.md5 /data/[0-7]; \
    echo > /data/stopped) &";

fn random(session: &mut Session<'_>, choices: &Choices) -> Result<(), LinuxError> {
    let mut random = fastrand::Rng::with_seed(choices.seed);
    session.run(TMPFS)?;
    session.run(LOAD)?;
    let begun = Instant::now();
    while begun.elapsed() < choices.random_for {
        let step = Instant::now();
        let target = random.u64(0..=1024) * 2 * MIB;
        session.request(target)?;
        // Half of the sizes are left before they are reached.
        let patience = if random.bool() {
            LONG
        } else {
            Duration::from_millis(random.u64(0..2000))
        };
        until(patience, || Ok(session.status()?.plugged_size == target))?;
        let status = session.status()?;
        check(patience < LONG || status.plugged_size == target, || {
            format!("stuck: the device has {status:?}")
        })?;
        session.note(&format!("resize to {}", crate::demo::size(target)), step)?;
    }
    session.run("echo > /data/stop; while [ ! -e /data/stopped ]; do sleep 1; done")?;
    let verified = session.run("wc -l < /data/verified")?;
    check(verified.trim() != "0", || "no file was verified".into())?;
    let bad = session.run("cat /data/bad 2>/dev/null || true")?;
    check(bad.is_empty(), || {
        format!("of {verified} files, these were not what was written: {bad}")
    })?;
    session.resize(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_has_a_name_of_its_own_and_fits_the_console() {
        for script in SCRIPTS {
            assert!(
                std::ptr::eq(Script::named(script.name()).unwrap(), script),
                "{}",
                script.name()
            );
        }
        // A terminal's line ends at 4096 bytes.
        assert!(LOAD.len() < 4000 && super::super::facts::COMMAND.len() < 4000);
    }
}

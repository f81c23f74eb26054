//! What the guest's kernel says about its memory.

use std::collections::BTreeMap;
use std::ops::Range;

use super::LinuxError;

/// Prints everything [`Facts::read`] reads, from `/proc` and `/sys`.
pub(super) const COMMAND: &str = "grep MemTotal: /proc/meminfo /boot-meminfo; \
    echo block_size $(cat /sys/devices/system/memory/block_size_bytes); \
    for block in $(grep '^memory[0-9]' /boot-memory); do echo boot $block; done; \
    cd /sys/devices/system/memory; for block in memory[0-9]*; do echo state $block $(cat $block/state); done; cd /; \
    grep virtio_mem /proc/iomem | sed 's/^/iomem /'";

/// A look at the guest. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// `MemTotal` now, and before the driver was there.
    pub(super) mem_total: u64,
    pub(super) boot_mem_total: u64,
    /// Size of a memory block.
    pub(super) block_size: u64,
    /// Blocks that were not there before the driver, with their states.
    pub(super) added: BTreeMap<u64, String>,
    /// Ranges of `System RAM (virtio_mem)`, last byte included.
    pub(super) ranges: Vec<(u64, u64)>,
}

impl Facts {
    /// Reads what [`COMMAND`] printed.
    pub(super) fn read(text: &str) -> Result<Self, LinuxError> {
        Self::parse(text)
            .ok_or_else(|| LinuxError::Check(format!("the guest's state cannot be read:\n{text}")))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut facts = Self {
            mem_total: 0,
            boot_mem_total: 0,
            block_size: 0,
            added: BTreeMap::new(),
            ranges: Vec::new(),
        };
        let mut at_boot = Vec::new();
        let block = |name: &str| name.strip_prefix("memory")?.parse::<u64>().ok();
        for line in text.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                ["/proc/meminfo:MemTotal:", kib, "kB"] => {
                    facts.mem_total = kib.parse::<u64>().ok()? << 10;
                }
                ["/boot-meminfo:MemTotal:", kib, "kB"] => {
                    facts.boot_mem_total = kib.parse::<u64>().ok()? << 10;
                }
                ["block_size", size] => facts.block_size = u64::from_str_radix(size, 16).ok()?,
                ["boot", name] => at_boot.push(block(name)?),
                ["state", name, state] => {
                    facts.added.insert(block(name)?, state.to_owned());
                }
                ["iomem", range, ":", "System", "RAM", "(virtio_mem)"] => {
                    let (first, last) = range.split_once('-')?;
                    let number = |text| u64::from_str_radix(text, 16).ok();
                    facts.ranges.push((number(first)?, number(last)?));
                }
                _ => {}
            }
        }
        facts.added.retain(|id, _| !at_boot.contains(id));
        (facts.mem_total > 0 && facts.boot_mem_total > 0 && facts.block_size > 0).then_some(facts)
    }

    /// Bytes in ranges of the driver.
    pub(super) fn added_bytes(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(first, last)| last - first + 1)
            .sum()
    }

    /// What is wrong with them for a device with `plugged` bytes; nothing if they fit.
    ///
    /// In Sub-Block Mode a block holds less than its size, and `MemTotal` counts what is plugged of it.
    pub(super) fn differ_from(&self, plugged: u64) -> Option<String> {
        let expected = self.boot_mem_total + plugged;
        if self.mem_total != expected {
            return Some(format!(
                "MemTotal is {} KiB, not {} KiB",
                self.mem_total >> 10,
                expected >> 10
            ));
        }
        let blocks: u64 = self.added.keys().map(|_| self.block_size).sum();
        if blocks != self.added_bytes() {
            let (count, ranges) = (self.added.len(), self.added_bytes());
            return Some(format!(
                "{count} memory blocks were added, but {ranges:#x} bytes in /proc/iomem"
            ));
        }
        if blocks < plugged || (plugged == 0) != (blocks == 0) {
            return Some(format!(
                "{} memory blocks for {plugged:#x} plugged bytes",
                self.added.len()
            ));
        }
        let other = self.added.iter().find(|(_, state)| *state != "online")?;
        Some(format!("memory block {} is {}", other.0, other.1))
    }
}

/// Number of pages in what [`Facts::pages_command`] prints a line of.
const PAGES_PER_LINE: u64 = 512;
const PAGE: u64 = 4096;

/// Flags of a page that is not there, and of one that is not online, in `/proc/kpageflags`.
const NOT_ONLINE: u64 = 1 << 20 | 1 << 23;

impl Facts {
    /// Prints, of each block, the flags of the first of each [`PAGES_PER_LINE`] pages.
    pub(super) fn pages_command(&self) -> String {
        let blocks: String = self.added.keys().map(|id| format!("{id} ")).collect();
        let lines = self.block_size / PAGE / PAGES_PER_LINE;
        let bytes = 8 * PAGES_PER_LINE;
        format!(
            "for block in {blocks}; do dd if=/proc/kpageflags bs={bytes} skip=$((block * {lines})) count={lines} \
             2>/dev/null | od -An -v -t x8 -w{bytes} | cut -c1-17 | sed \"s/^/pages $block/\"; done"
        )
    }

    /// Where they differ from a device whose plugged memory is `plugged`, ascending; nothing if they agree.
    ///
    /// `pages` is what [`pages_command`](Self::pages_command) printed.
    pub(super) fn misplaced(&self, plugged: &[Range<u64>], pages: &str) -> Option<String> {
        let mut online = Vec::new();
        let (mut block, mut start) = (None, 0);
        for line in pages.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let ["pages", id, flags] = words[..] else {
                return Some(format!("no flags of pages: {line:?}"));
            };
            let (Ok(id), Ok(flags)) = (id.parse::<u64>(), u64::from_str_radix(flags, 16)) else {
                return Some(format!("no flags of pages: {line:?}"));
            };
            if block.replace(id) != Some(id) {
                start = id * self.block_size;
            }
            let end = start + PAGES_PER_LINE * PAGE;
            if flags & NOT_ONLINE == 0 {
                add(&mut online, start..end);
            }
            start = end;
        }
        let mut merged = Vec::new();
        for run in plugged {
            add(&mut merged, run.clone());
        }
        let first = online
            .iter()
            .zip(&merged)
            .find(|(guest, device)| guest != device);
        match first {
            Some((guest, device)) => {
                Some(format!("online is {guest:#x?}, plugged is {device:#x?}"))
            }
            None if online.len() != merged.len() => {
                Some(format!("online is {online:#x?}, plugged is {merged:#x?}"))
            }
            None => None,
        }
    }
}

/// Appends a range to ascending ones, in one with the last if they touch.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    const TEXT: &str = "/proc/meminfo:MemTotal:         541736 kB
/boot-meminfo:MemTotal:         408616 kB
block_size 8000000
boot memory0
boot memory3
state memory0 online
state memory3 online
state memory32 online
state memory33 online
iomem   100000000-10fffffff : System RAM (virtio_mem)";

    #[test]
    fn what_the_driver_added_is_told_from_what_was_there() {
        let facts = Facts::read(TEXT).unwrap();
        assert_eq!(facts.added.keys().copied().collect::<Vec<_>>(), [32, 33]);
        assert_eq!(facts.added_bytes(), 256 << 20);
        assert_eq!(facts.differ_from(130 << 20), None);
    }

    #[test]
    fn each_difference_is_found() {
        let differs = |from: &str, to: &str, plugged: u64| {
            assert!(TEXT.contains(from));
            Facts::read(&TEXT.replace(from, to))
                .unwrap()
                .differ_from(plugged << 20)
                .unwrap_or_default()
        };
        assert!(differs("541736", "541732", 130).starts_with("MemTotal is 541732 KiB"));
        assert!(differs("541736", "541736", 128).starts_with("MemTotal"));
        assert!(differs("10fffffff", "107ffffff", 130).starts_with("2 memory blocks were added"));
        assert_eq!(
            differs("33 online", "33 offline", 130),
            "memory block 33 is offline"
        );
        assert!(differs("541736", "408616", 0).starts_with("2 memory blocks for 0x0"));
        assert!(differs("541736", "671784", 257).starts_with("2 memory blocks for"));
        assert!(Facts::read("").is_err());
    }

    #[test]
    fn online_pages_and_plugged_blocks_are_compared_by_address() {
        const MIB: u64 = 1 << 20;
        let facts = Facts::read(TEXT).unwrap();
        // Block 32 is online, of block 33 the first 2 MiB are.
        let mut pages = String::new();
        for line in 0..128 {
            let flags = if line <= 64 { 1_u64 << 32 } else { 1 << 23 };
            pages += &format!("pages{:4} {flags:016x}\n", 32 + line / 64);
        }
        let (start, end) = (4096 * MIB, 4096 * MIB + 130 * MIB);
        let differs = |runs: &[Range<u64>]| facts.misplaced(runs, &pages);
        assert_eq!(differs(slice::from_ref(&(start..end))), None);
        assert_eq!(
            differs(&[start..start + 2 * MIB, start + 2 * MIB..end]),
            None
        );
        for other in [
            start..end - 2 * MIB,
            start..end + 2 * MIB,
            start + 2 * MIB..end,
        ] {
            assert!(differs(slice::from_ref(&other)).is_some(), "{other:#x?}");
        }
        assert!(differs(&[start..end, end + 8 * MIB..end + 10 * MIB]).is_some());
        assert!(differs(&[]).is_some());
        assert!(facts.misplaced(&[], "").is_none());
        assert!(facts.misplaced(&[], "pages 32").is_some());
    }
}

//! What a kernel is built and booted with.

use core::num::IntErrorKind;

use super::memmap::{MemmapOnMemory, MemmapRule, memmap_pages};
use super::online_type::OnlineType;
use super::zone_rules::ZoneRules;
use super::{Error, Profile};

/// Where a plain `online` puts a memory block (Linux: `memory_hotplug.online_policy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnlinePolicy {
    /// Beside its neighbours.
    #[default]
    ContigZones,
    /// Into Movable, as long as there is kernel memory enough to go with it.
    AutoMovable,
}

impl OnlinePolicy {
    /// The word Linux has for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ContigZones => "contig-zones",
            Self::AutoMovable => "auto-movable",
        }
    }

    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        [Self::ContigZones, Self::AutoMovable]
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or(Error::Invalid)
    }
}

/// What a kernel is built and booted with.
///
/// The default online type has four sources, each stronger than the one before: the build (this field), the boot
/// parameter ([`apply_command_line`](Self::apply_command_line)), the file `auto_online_blocks`
/// ([`Hotplug::write`](super::Hotplug::write)), and what user space writes to a memory block's `state`:
///
/// ```text
///  1  default_online_type         as built
///  2  memhp_default_state=        boot parameter
///  3  auto_online_blocks          file, at any time     1 to 3, the last one set: each memory block as it is added
///  4  memoryN/state               file                  that memory block: now if it is offline, else the next time
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Sizes and limits of the architecture.
    pub profile: Profile,
    /// How memory blocks are brought online as they are added; `None` leaves them offline (Linux:
    /// `MHP_DEFAULT_ONLINE_TYPE`).
    pub default_online_type: Option<OnlineType>,
    /// Where a plain `online` puts them.
    pub online_policy: OnlinePolicy,
    /// Most percent of Movable to kernel memory under [`OnlinePolicy::AutoMovable`].
    pub auto_movable_ratio: u32,
    /// Whether that holds for each node too.
    pub auto_movable_numa_aware: bool,
    /// Whether memory blocks hold their own metadata, where the one who adds them asks for it.
    pub memmap_on_memory: MemmapOnMemory,
    /// When they can.
    pub memmap_rule: MemmapRule,
    /// Plain `online` prefers Movable (Linux: boot parameter `movable_node`).
    pub movable_node: bool,
    /// Which zones a memory block may go to.
    pub zone_rules: ZoneRules,
    /// Whether memory can be taken offline and removed at all (Linux: `MEMORY_HOTREMOVE`).
    pub hot_remove: bool,
    /// Bytes of metadata that each page is charged in kernel memory: 64 in Linux. With 0, metadata is on somebody's
    /// heap, and no page of this memory is taken for it; where memory holds its own metadata, that is still of Linux's
    /// size.
    pub struct_page_size: u32,
    /// Whether memory that firmware calls special purpose is left to its drivers (Linux: `EFI_SOFT_RESERVE`, off with
    /// the boot parameter `efi=nosoftreserve`); else it is RAM like any other.
    pub soft_reserve: bool,
    /// Number of nodes that can ever be.
    pub possible_nodes: u32,
}

impl Config {
    /// Linux's defaults, but metadata is not charged.
    #[must_use]
    pub const fn new(profile: Profile) -> Self {
        Self {
            profile,
            default_online_type: None,
            online_policy: OnlinePolicy::ContigZones,
            auto_movable_ratio: 301,
            auto_movable_numa_aware: true,
            memmap_on_memory: MemmapOnMemory::Off,
            memmap_rule: MemmapRule::PerBlock,
            movable_node: false,
            zone_rules: ZoneRules::Since4_14,
            hot_remove: true,
            struct_page_size: 0,
            soft_reserve: true,
            possible_nodes: 1,
        }
    }

    /// Pages of kernel memory the metadata of `size` bytes of memory takes, unless the memory holds it itself: of
    /// 256 GiB at 4 KiB a page and 64 bytes of metadata for each, 4 GiB.
    #[must_use]
    pub fn metadata_pages(&self, size: u64) -> u64 {
        memmap_pages(&self.profile, self.struct_page_size, size)
    }

    /// Bytes of metadata of each page in memory that holds its own.
    pub(super) const fn self_hosted_page_size(&self) -> u32 {
        match self.struct_page_size {
            0 => 64,
            size => size,
        }
    }

    /// Applies Linux's boot parameters: `memhp_default_state`, `movable_node`, `efi=nosoftreserve` and those of
    /// `memory_hotplug.`; others are not ours, and wrong values are ignored, as Linux does both.
    pub fn apply_command_line(&mut self, command_line: &str) {
        for word in command_line.split_ascii_whitespace() {
            match word.split_once('=') {
                None if word == "movable_node" => self.movable_node = true,
                Some(("memhp_default_state", state)) => {
                    if let Ok(online_type) = OnlineType::parse_default(state) {
                        self.default_online_type = online_type;
                    }
                }
                Some(("efi", options)) => {
                    self.soft_reserve &= !options.split(',').any(|o| o == "nosoftreserve");
                }
                Some((name, value)) => {
                    if let Some(name) = name.strip_prefix("memory_hotplug.") {
                        let _ignored_as_linux_does = self.set_at_boot(name, value);
                    }
                }
                None => {}
            }
        }
    }

    /// Sets a parameter of the module `memory_hotplug`, as the command line can.
    fn set_at_boot(&mut self, name: &str, value: &str) -> Result<(), Error> {
        match name {
            "memmap_on_memory" => {
                self.memmap_on_memory = match value {
                    // There was no such word while only single memory blocks could do it.
                    "force" if self.memmap_rule == MemmapRule::PerBlock => MemmapOnMemory::Force,
                    text if parse_bool(text)? => MemmapOnMemory::On,
                    _ => MemmapOnMemory::Off,
                };
                Ok(())
            }
            _ => self.set_parameter(name, value),
        }
    }

    /// The text of a parameter of the module `memory_hotplug`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is none of this name.
    pub(super) fn parameter(&self, name: &str) -> Result<alloc::string::String, Error> {
        let yes_or_no = |yes| if yes { "Y" } else { "N" };
        Ok(match name {
            "online_policy" => self.online_policy.name().into(),
            "auto_movable_ratio" => alloc::format!("{}", self.auto_movable_ratio),
            "auto_movable_numa_aware" => yes_or_no(self.auto_movable_numa_aware).into(),
            "memmap_on_memory" => match self.memmap_on_memory {
                MemmapOnMemory::Force => "force".into(),
                mode => yes_or_no(mode == MemmapOnMemory::On).into(),
            },
            _ => return Err(Error::NotFound),
        })
    }

    /// Sets a parameter of the module `memory_hotplug` at run time.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is none of this name, [`Error::AccessDenied`] if it is fixed at boot,
    /// [`Error::Invalid`] for a wrong value.
    pub(super) fn set_parameter(&mut self, name: &str, value: &str) -> Result<(), Error> {
        match name {
            "online_policy" => self.online_policy = OnlinePolicy::parse(value)?,
            "auto_movable_ratio" => self.auto_movable_ratio = parse_u32(value)?,
            "auto_movable_numa_aware" => self.auto_movable_numa_aware = parse_bool(value)?,
            "memmap_on_memory" => return Err(Error::AccessDenied),
            _ => return Err(Error::NotFound),
        }
        Ok(())
    }
}

/// A truth value in any of the spellings Linux takes (`kstrtobool`): the first letter counts, or two after `o`.
pub(super) fn parse_bool(text: &str) -> Result<bool, Error> {
    let mut letters = text.bytes().map(|letter| letter.to_ascii_lowercase());
    match letters.next() {
        Some(b'e' | b'y' | b't' | b'1') => Ok(true),
        Some(b'd' | b'n' | b'f' | b'0') => Ok(false),
        Some(b'o') => match letters.next() {
            Some(b'n') => Ok(true),
            Some(b'f') => Ok(false),
            _ => Err(Error::Invalid),
        },
        _ => Err(Error::Invalid),
    }
}

/// A number as Linux takes it (`kstrtouint` with base 0): decimal, hexadecimal or octal by its prefix.
fn parse_u32(text: &str) -> Result<u32, Error> {
    parse_u64(text)?.try_into().map_err(|_| Error::OutOfRange)
}

/// A number as Linux takes it (`kstrtoull` with base 0).
pub(super) fn parse_u64(text: &str) -> Result<u64, Error> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match digits.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (&digits[2..], 16),
        [b'0', _, ..] => (&digits[1..], 8),
        _ => (digits, 10),
    };
    // from_str_radix would take a second sign.
    if digits.starts_with('+') {
        return Err(Error::Invalid);
    }
    u64::from_str_radix(digits, radix).map_err(|error| match error.kind() {
        IntErrorKind::PosOverflow => Error::OutOfRange,
        _ => Error::Invalid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truth_values_are_those_of_kstrtobool() {
        for yes in ["1", "y", "Y", "yes", "on", "On", "t"] {
            assert_eq!(parse_bool(yes), Ok(true), "{yes}");
        }
        for no in ["0", "n", "no", "off", "OFF", "f"] {
            assert_eq!(parse_bool(no), Ok(false), "{no}");
        }
        for wrong in ["", "2", "x", "o", "-1"] {
            assert_eq!(parse_bool(wrong), Err(Error::Invalid), "{wrong}");
        }
    }

    #[test]
    fn numbers_are_those_of_kstrtoull() {
        assert_eq!(parse_u64("18446744073709551616"), Err(Error::OutOfRange));
        assert_eq!(parse_u32("0x100000000"), Err(Error::OutOfRange));
        for (text, number) in [("10", 10), ("0x10", 16), ("010", 8), ("+3", 3), ("0", 0)] {
            assert_eq!(parse_u64(text), Ok(number), "{text}");
        }
        for wrong in ["", "-5", "abc", "0x", "++3", "0x+3"] {
            assert_eq!(parse_u64(wrong), Err(Error::Invalid), "{wrong}");
        }
    }

    #[test]
    fn command_line_sets_what_is_right_and_ignores_the_rest() {
        let mut config = Config::new(Profile::X86_64);
        config.apply_command_line(
            "quiet movable_node memhp_default_state=online_movable memory_hotplug.memmap_on_memory=force \
             memory_hotplug.online_policy=auto-movable memory_hotplug.auto_movable_ratio=-1",
        );
        assert!(config.movable_node);
        assert_eq!(config.default_online_type, Some(OnlineType::Movable));
        assert_eq!(config.memmap_on_memory, MemmapOnMemory::Force);
        assert_eq!(config.online_policy, OnlinePolicy::AutoMovable);
        assert_eq!(config.auto_movable_ratio, 301);
        config.apply_command_line("memhp_default_state=offline memhp_default_state=bogus");
        assert_eq!(config.default_online_type, None);
        let mut old = Config {
            memmap_rule: MemmapRule::SingleBlock,
            ..Config::new(Profile::X86_64)
        };
        old.apply_command_line("memory_hotplug.memmap_on_memory=force");
        assert_eq!(old.memmap_on_memory, MemmapOnMemory::Off);
        old.apply_command_line("memory_hotplug.memmap_on_memory=1");
        assert_eq!(old.memmap_on_memory, MemmapOnMemory::On);
    }
}

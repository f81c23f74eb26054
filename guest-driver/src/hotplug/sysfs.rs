//! The files of `/sys/devices/system/memory` and of the module `memory_hotplug`: text in, text out, errors as Linux has
//! them. There is no file system here.
//!
//! Linux: `drivers/base/memory.c`, the parameters in `mm/memory_hotplug.c`.

use alloc::format;
use alloc::string::{String, ToString};

use super::config::{parse_bool, parse_u64};
use super::online_type::OnlineType;
use super::{AddMemory, BlockState, Error, Hotplug, PhysicalMemory, Target};

impl<M: PhysicalMemory> Hotplug<M> {
    /// Reads a file. There is no newline at the end.
    ///
    /// | file | | |
    /// |---|---|---|
    /// | `memoryN/state` | rw | `online`, `offline`, `going-offline`; written also `online_kernel`, `online_movable` |
    /// | `memoryN/online` | rw | `1` or `0`; the zone is chosen automatically |
    /// | `memoryN/valid_zones` | r | see [`valid_zones`](Self::valid_zones); it exists where memory can be removed |
    /// | `memoryN/phys_index`, `phys_device` | r | id in hexadecimal; 0 |
    /// | `memoryN/removable` | r | 1 where memory can be removed at all |
    /// | `memoryN/node` | r | the node's number (Linux has a link) |
    /// | `auto_online_blocks` | rw | how memory blocks added from now on go online |
    /// | `block_size_bytes`, `crash_hotplug` | r | hexadecimal; 1: nobody need reload a crash kernel |
    /// | `probe` | w | adds the memory block at an address |
    /// | `soft_offline_page`, `hard_offline_page` | w | takes a page out of use |
    /// | `parameters/…` | rw | `online_policy`, `auto_movable_ratio`, `auto_movable_numa_aware` |
    /// | `parameters/memmap_on_memory` | r | `Y`, `N` or `force` |
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is no such file, [`Error::AccessDenied`] if it can only be written.
    pub fn read(&self, file: &str) -> Result<String, Error> {
        if let Some(name) = file.strip_prefix("parameters/") {
            return self.config.parameter(name);
        }
        if let Some((id, name)) = self.block_file(file) {
            return self.read_block_file(id, name);
        }
        match file {
            "auto_online_blocks" => {
                Ok(OnlineType::default_name(self.config.default_online_type).into())
            }
            "block_size_bytes" => Ok(format!("{:x}", self.config.profile.memory_block_size())),
            "crash_hotplug" => Ok("1".into()),
            "probe" | "soft_offline_page" | "hard_offline_page" => Err(Error::AccessDenied),
            _ => Err(Error::NotFound),
        }
    }

    fn read_block_file(&self, id: u64, name: &str) -> Result<String, Error> {
        let block = self.blocks.get(&id).ok_or(Error::NotFound)?;
        Ok(match name {
            "state" => block.state.name().into(),
            "online" => u8::from(block.state != BlockState::Offline).to_string(),
            "valid_zones" if self.config.hot_remove => return self.valid_zones(id),
            "phys_index" => format!("{id:08x}"),
            "phys_device" => "0".into(),
            "removable" => u8::from(self.config.hot_remove).to_string(),
            "node" => block.nid.to_string(),
            _ => return Err(Error::NotFound),
        })
    }

    /// Writes a file. One newline at the end of the text does not count, and an empty text never arrives. The files are
    /// those of [`read`](Self::read).
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is no such file, [`Error::AccessDenied`] if it can only be read,
    /// [`Error::Invalid`] for a text it does not take, and those of what the text asks for.
    pub fn write(&mut self, file: &str, text: &str) -> Result<(), Error> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        if let Some(name) = file.strip_prefix("parameters/") {
            let done = self.config.set_parameter(name, line);
            // Whether there is such a file, and it can be written, does not depend on the text.
            return match done {
                Err(Error::Invalid) if text.is_empty() => Ok(()),
                done => done,
            };
        }
        if let Some((id, name)) = self.block_file(file) {
            return self.write_block_file(id, name, text, line);
        }
        match file {
            "block_size_bytes" | "crash_hotplug" => Err(Error::AccessDenied),
            "auto_online_blocks" | "probe" | "soft_offline_page" | "hard_offline_page"
                if text.is_empty() =>
            {
                Ok(())
            }
            "auto_online_blocks" => {
                self.config.default_online_type = OnlineType::parse_default(line)?;
                Ok(())
            }
            "probe" => self.probe(parse_u64(line)?),
            "soft_offline_page" => self.soft_offline_page(parse_address(line)?),
            "hard_offline_page" => self.hard_offline_page(parse_address(line)?),
            _ => Err(Error::NotFound),
        }
    }

    fn write_block_file(
        &mut self,
        id: u64,
        name: &str,
        text: &str,
        line: &str,
    ) -> Result<(), Error> {
        self.blocks.get(&id).ok_or(Error::NotFound)?;
        match name {
            "state" | "online" if text.is_empty() => Ok(()),
            "state" => {
                let changed = match OnlineType::parse_default(line)? {
                    None => self.device_offline(id)?,
                    Some(online_type) => {
                        // Stays in the block if that is online already, and is used up by whatever brings it online
                        // next without a type.
                        if let Some(block) = self.blocks.get_mut(&id) {
                            block.online_type = Some(online_type);
                        }
                        self.device_online(id)?
                    }
                };
                changed.then_some(()).ok_or(Error::Invalid)
            }
            "online" => match parse_bool(line)? {
                true => self.device_online(id),
                false => self.device_offline(id),
            }
            .map(|_already_so_is_fine| ()),
            "valid_zones" if self.config.hot_remove => Err(Error::AccessDenied),
            "phys_index" | "phys_device" | "removable" | "node" => Err(Error::AccessDenied),
            _ => Err(Error::NotFound),
        }
    }

    /// Adds the memory block at an address by hand, for machines where nothing announces memory.
    fn probe(&mut self, address: u64) -> Result<(), Error> {
        let size = self.config.profile.memory_block_size();
        if !address.is_multiple_of(size) {
            return Err(Error::Invalid);
        }
        let nid = self.node_of_added(address);
        self.add_memory(&AddMemory {
            target: Target::Node(nid),
            ..AddMemory::new(address, size)
        })
    }

    /// The node that memory added at an address goes to, unless something else names one: that of the RAM at boot around
    /// it, which takes the holes in one node's RAM in; else that of the first RAM firmware named, whatever else it said
    /// (Linux: `memory_add_physaddr_to_nid`).
    pub fn node_of_added(&self, address: u64) -> u32 {
        let ram = self.boot_ram.iter();
        let below = ram.clone().filter(|range| range.bytes.start <= address);
        let above = ram.filter(|range| address < range.bytes.start);
        let below = below.max_by_key(|range| range.bytes.start);
        let above = above.min_by_key(|range| range.bytes.start);
        let around = below.filter(|below| {
            address < below.bytes.end || above.is_some_and(|above| above.nid == below.nid)
        });
        around
            .or(self.boot_ram.first())
            .map_or(0, |range| range.nid)
    }

    /// The node that firmware named for an address at boot, whether there was RAM or only a place for some: where
    /// a driver that is not told otherwise adds the memory of its device (Linux: `phys_to_target_node`).
    pub fn target_node(&self, address: u64) -> Option<u32> {
        let mut named = self.boot_ram.iter().chain(&self.reserved_ranges);
        let range = named.find(|range| range.bytes.contains(&address));
        range.map(|range| range.nid)
    }

    /// The node that ACPI calls by this number (Linux: `pxm_to_node`).
    pub fn node_of_proximity_domain(&self, domain: u32) -> Option<u32> {
        let index = self
            .proximity_domains
            .iter()
            .position(|known| *known == domain)?;
        u32::try_from(index).ok()
    }

    /// Whether the machine has proximity domains.
    pub fn has_proximity_domains(&self) -> bool {
        !self.proximity_domains.is_empty()
    }

    /// Splits `memory37/state`. Ids are written as Linux does, without sign or leading zeros.
    fn block_file<'a>(&self, file: &'a str) -> Option<(u64, &'a str)> {
        let (block, name) = file.split_once('/')?;
        let digits = block.strip_prefix("memory")?;
        let id = digits.parse::<u64>().ok()?;
        (id.to_string() == digits).then_some((id, name))
    }
}

/// An address for the files that say of any wrong number that it is invalid.
fn parse_address(text: &str) -> Result<u64, Error> {
    parse_u64(text).map_err(|_| Error::Invalid)
}

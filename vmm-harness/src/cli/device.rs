//! A further memory device, on a command line or in a file.

use std::str::FromStr;

use serde::Deserialize;
use serde_json::{Map, Value};
use vmm_harness::Size;
use vmm_harness::control::DeviceOptions;

use super::machine::Backing;

/// What is not given is as for the first device.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DeviceArgs {
    id: String,
    region: Option<Size>,
    block_size: Option<Size>,
    slot_size: Option<Size>,
    node: Option<u16>,
    backing: Option<Backing>,
    size: Option<Size>,
}

impl FromStr for DeviceArgs {
    type Err = String;

    /// `id=mem1,region=1G,node=1`: the fields of a file.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = Map::new();
        for field in text.split(',') {
            let (name, value) = field
                .split_once('=')
                .ok_or_else(|| format!("{field:?} is no NAME=VALUE"))?;
            let value = match (name, value.parse::<u16>()) {
                ("node", Ok(number)) => Value::from(number),
                _ => Value::from(value),
            };
            if fields.insert(name.into(), value).is_some() {
                return Err(format!("{name} is given twice"));
            }
        }
        serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())
    }
}

impl From<DeviceArgs> for DeviceOptions {
    fn from(args: DeviceArgs) -> Self {
        let default = Self::new(&args.id);
        let size = |size: Option<Size>, default| size.map_or(default, |Size(bytes)| bytes);
        Self {
            region: size(args.region, default.region),
            block_size: size(args.block_size, default.block_size),
            slot_size: args.slot_size.map(|Size(bytes)| bytes),
            node_id: args.node,
            backing: args.backing.map_or(default.backing, Into::into),
            size: size(args.size, default.size),
            ..default
        }
    }
}

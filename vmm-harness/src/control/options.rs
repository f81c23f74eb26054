//! What a guest and its memory devices are to be.

use vmem_guest::abi::MAX_DEVICES;

use crate::demo::{BackingKind, DemoError, DemoOptions, size};

/// The device a guest has if no other is asked for, and the first one otherwise.
pub const FIRST_DEVICE: &str = "mem0";

/// Regions begin at multiples of this, and of the size of their blocks.
const REGION_ALIGNMENT: u64 = 1 << 30;

/// What is below a device in the API.
const RESERVED: [&str; 4] = ["blocks", "freeze", "thaw", "state"];

/// A memory device. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Its name: small letters, digits, `-` and `_`, 32 at the most.
    pub id: String,
    /// The device-managed region.
    pub region: u64,
    /// A device block.
    pub block_size: u64,
    /// A memory slot; `None` is what the device chooses.
    pub slot_size: Option<u64>,
    /// Proximity domain of the region; `None` is a device without one.
    pub node_id: Option<u16>,
    /// Host memory behind the region.
    pub backing: BackingKind,
    /// What the driver is asked for at the start.
    pub size: u64,
}

impl DeviceOptions {
    /// What a device is of which nothing but the name is said.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self::of(id, &DemoOptions::default())
    }

    fn of(id: &str, options: &DemoOptions) -> Self {
        Self {
            id: id.into(),
            region: options.region,
            block_size: options.block_size,
            slot_size: options.slot_size,
            node_id: options.node_id,
            backing: options.backing,
            size: options.initial_size(),
        }
    }
}

/// A guest and its devices.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// All that is not a device's.
    guest: DemoOptions,
    devices: Vec<DeviceOptions>,
}

impl GuestOptions {
    /// A guest with the device of `guest`, and `others`.
    #[must_use]
    pub fn new(guest: DemoOptions, others: Vec<DeviceOptions>) -> Self {
        let mut devices = vec![DeviceOptions::of(FIRST_DEVICE, &guest)];
        devices.extend(others);
        Self { guest, devices }
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &[DeviceOptions] {
        &self.devices
    }

    pub(super) fn devices_mut(&mut self) -> &mut [DeviceOptions] {
        &mut self.devices
    }

    /// The guest with each device, as if that were the only one, in the place it has; one region comes after the other.
    ///
    /// # Errors
    ///
    /// [`DemoError::Options`] if the options do not go together.
    pub(super) fn with_each(&self) -> Result<Vec<DemoOptions>, DemoError> {
        let refuse = |reason| Err(DemoError::Options(reason));
        if self.devices.len() > MAX_DEVICES {
            let count = self.devices.len();
            return refuse(format!(
                "{count} memory devices, {MAX_DEVICES} are the most"
            ));
        }
        let mut next = self.guest.region_start;
        let mut all = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            let id = &device.id;
            if !is_name(id) || self.devices[..index].iter().any(|other| other.id == *id) {
                return refuse(format!(
                    "{id:?} cannot be the name of a device, or not of two"
                ));
            }
            let alignment = REGION_ALIGNMENT.max(device.block_size);
            let start = next.checked_next_multiple_of(alignment);
            let end = start.and_then(|start| start.checked_add(device.region));
            let (Some(start), Some(end)) = (start, end) else {
                let region = size(device.region);
                return refuse(format!(
                    "there is no place for the region of {region} of {id}"
                ));
            };
            next = end;
            let options = DemoOptions {
                region_start: start,
                region: device.region,
                block_size: device.block_size,
                slot_size: device.slot_size,
                node_id: device.node_id,
                backing: device.backing,
                targets: Some(vec![device.size]),
                ..self.guest.clone()
            };
            options.check()?;
            all.push(options);
        }
        Ok(all)
    }
}

impl From<DemoOptions> for GuestOptions {
    fn from(guest: DemoOptions) -> Self {
        Self::new(guest, Vec::new())
    }
}

/// Whether a device can have this name.
fn is_name(id: &str) -> bool {
    let fits = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_');
    (1..=32).contains(&id.len()) && id.chars().all(fits) && !RESERVED.contains(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn options(others: &[DeviceOptions]) -> Result<Vec<DemoOptions>, DemoError> {
        GuestOptions::new(DemoOptions::default(), others.to_vec()).with_each()
    }

    #[test]
    fn regions_come_one_after_the_other_where_their_blocks_can_be() {
        let device = |id: &str, region, block_size| DeviceOptions {
            region,
            block_size,
            ..DeviceOptions::new(id)
        };
        let all = options(&[device("a", GIB / 2, 2 << 20), device("b", 8 * GIB, 4 * GIB)]).unwrap();
        let starts: Vec<_> = all
            .iter()
            .map(|options| options.region_start / GIB)
            .collect();
        assert_eq!(starts, [4, 8, 12]);
    }

    #[test]
    fn names_are_of_one_device_and_fit_into_a_path() {
        for id in ["", "mem0", "a/b", "Big", "blocks", "state", &"x".repeat(33)] {
            let refused = options(&[DeviceOptions::new(id)]);
            assert!(matches!(refused, Err(DemoError::Options(_))), "{id:?}");
        }
        let many = [1, 2, 3, 4].map(|index| DeviceOptions::new(&format!("mem{index}")));
        assert!(options(&many[..3]).is_ok());
        assert!(options(&many).is_err());
        let twice = [DeviceOptions::new("a"), DeviceOptions::new("a")];
        assert!(options(&twice).is_err());
    }

    #[test]
    fn what_is_wrong_with_any_device_is_refused() {
        let wrong: [fn(&mut DeviceOptions); 4] = [
            |device| device.block_size = 3 << 20,
            |device| device.slot_size = Some(1),
            |device| device.size = 5 * GIB,
            |device| device.region = u64::MAX / 2,
        ];
        for change in wrong {
            let mut device = DeviceOptions::new("a");
            change(&mut device);
            assert!(options(&[device.clone()]).is_err(), "{device:?}");
        }
    }
}

//! What QEMU told the recorder of ejects.

use serde_json::Value;

use super::step::EjectOutcome;

/// ACPI's `_OST` source of an answer to an eject request.
const EJECT_REQUEST: u64 = 3;

/// The machine heard something from a DIMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// QEMU's name of the DIMM; it has none once it is gone.
    pub(super) device: Option<String>,
    /// The slot it is or was in.
    pub(super) slot: Option<String>,
    /// What the guest has made of the eject, if that is what it says.
    pub(super) answer: Option<EjectOutcome>,
}

impl Message {
    /// Reads an event; nothing if it is not about a device.
    pub(super) fn read(event: &Value) -> Option<Self> {
        // Some events were recorded with their data in a field of its own.
        let field = |key: &str| {
            let nested = ["info", "data"].map(|inner| event.get(inner)?.get(key));
            nested.into_iter().flatten().next().or(event.get(key))
        };
        let text = |key: &str| match field(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let number = |key: &str| field(key).and_then(Value::as_u64);
        let answer = match event.get("event")?.as_str()? {
            "DEVICE_DELETED" => Some(EjectOutcome::Deleted),
            "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" => Some(EjectOutcome::GuestError),
            "ACPI_DEVICE_OST" if number("source") == Some(EJECT_REQUEST) => {
                match number("status")? {
                    0 => Some(EjectOutcome::Deleted),
                    // Without a reason, unknown; not supported, in use, busy, something depends on it.
                    1 | 2 | 0x80..=0x83 => Some(EjectOutcome::GuestError),
                    // 0x84: in progress.
                    _ => None,
                }
            }
            "ACPI_DEVICE_OST" => None,
            _ => return None,
        };
        Some(Self {
            device: text("device"),
            slot: text("slot"),
            answer,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_are_told_from_progress() {
        let ost = |source: u64, status: u64| {
            let info = json!({ "device": "d", "slot": "1", "source": source, "status": status });
            Message::read(&json!({ "event": "ACPI_DEVICE_OST", "info": info }))
                .and_then(|message| message.answer)
        };
        assert_eq!(ost(3, 0), Some(EjectOutcome::Deleted));
        assert_eq!(ost(3, 0x84), None);
        for status in 0x80..=0x83 {
            assert_eq!(ost(3, status), Some(EjectOutcome::GuestError));
        }
        // An answer to an insertion.
        assert_eq!(ost(0x103, 0), None);
        assert_eq!(Message::read(&json!({ "event": "RESUME" })), None);
    }
}

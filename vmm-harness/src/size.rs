//! Sizes as people write them.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// Bytes, or a number with a binary unit: `6M`, `130MiB`, `4G`.
///
/// # Errors
///
/// If it is neither.
pub fn parse_size(text: &str) -> Result<u64, parse_size::Error> {
    parse_size::Config::new().with_binary().parse_size(text)
}

/// Bytes, in a document: an integer, or a string with a whole number for [`parse_size()`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = parse_size::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_size(text).map(Self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size: bytes, or a string as \"512M\"")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
        Ok(Size(bytes))
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
        let negative = |_| E::invalid_value(serde::de::Unexpected::Signed(bytes), &self);
        u64::try_from(bytes).map(Size).map_err(negative)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
        let unknown = || E::invalid_value(serde::de::Unexpected::Str(text), &self);
        // What people may type, as fractions and underscores, is more than a document promises.
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let unit = unit.strip_prefix(' ').unwrap_or(unit);
        let known = text.starts_with(|c: char| c.is_ascii_digit())
            && ["", "B"]
                .contains(&unit.trim_start_matches(['k', 'K', 'M', 'G', 'T', 'P', 'E', 'i']));
        match known {
            true => text.parse().map_err(|_| unknown()),
            false => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_documents_are_integers_or_strings_with_units() {
        let read = |json: &str| serde_json::from_str::<Size>(json).ok();
        assert_eq!(read("4096"), Some(Size(4096)));
        assert_eq!(read("\"130MiB\""), Some(Size(130 << 20)));
        assert_eq!(read("\"1G\""), Some(Size(1 << 30)));
        for none in [
            "-1",
            "1.5",
            "\"much\"",
            "\"\"",
            "\"1.5G\"",
            "\" 1G\"",
            "\"1_024M\"",
            "\"1gb\"",
            "\"1G \"",
            "null",
            "[1]",
            "true",
        ] {
            assert_eq!(read(none), None, "{none}");
        }
    }
}

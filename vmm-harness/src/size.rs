//! Sizes as people write them.

/// Bytes, or a number with a binary unit: `6M`, `130MiB`, `4G`.
///
/// # Errors
///
/// If it is neither.
pub fn parse_size(text: &str) -> Result<u64, parse_size::Error> {
    parse_size::Config::new().with_binary().parse_size(text)
}

//! When and on what something was measured.

use std::fs;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// The date (UTC) and the kind of machine, for people.
pub(crate) fn date_and_machine() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let (year, month, day) = civil(since.map_or(0, |since| since.as_secs() / 86400));
    let first = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.split_once(':'));
        line.map_or_else(
            || "unknown".to_owned(),
            |(_, value)| value.trim().to_owned(),
        )
    };
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let model = first("/proc/cpuinfo", "model name");
    let memory = first("/proc/meminfo", "MemTotal");
    format!("{year:04}-{month:02}-{day:02}, {cpus} CPUs ({model}), memory {memory}")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (789, (1972, 2, 29)),
            (11_016, (2000, 2, 29)),
            (11_322, (2000, 12, 31)),
            (20_513, (2026, 3, 1)),
        ] {
            assert_eq!(civil(days), date);
        }
        assert!(date_and_machine().contains(" CPUs ("));
    }
}

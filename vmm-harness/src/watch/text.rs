//! Words and numbers on their way to the terminal.

use std::time::Duration;

/// A duration in 5 characters at the most: `350ns`, `1.2ms`, `42s`.
pub(super) fn short_duration(nanos: u64) -> String {
    let (divisor, unit) = match nanos {
        0..1_000 => return format!("{nanos}ns"),
        1_000..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    match nanos / divisor {
        whole @ 0..10 => format!("{whole}.{}{unit}", nanos % divisor * 10 / divisor),
        whole @ 0..10_000 => format!("{whole}{unit}"),
        _ => ">2h".to_owned(),
    }
}

/// A number in 5 characters at the most: `99999`, `123k`, `45M`.
pub(super) fn short_count(count: u64) -> String {
    match count {
        0..100_000 => count.to_string(),
        100_000..10_000_000 => format!("{}k", count / 1_000),
        10_000_000..10_000_000_000 => format!("{}M", count / 1_000_000),
        _ => format!("{}G", (count / 1_000_000_000).min(9_999)),
    }
}

/// A rate in 5 characters at the most: `0`, `0.2`, `12`, `123k`.
pub(super) fn short_rate(count: u64, time: Duration) -> String {
    let tenths = u128::from(count) * 10_000 / time.as_millis().max(1);
    match u64::try_from(tenths).unwrap_or(u64::MAX) {
        0 if count == 0 => "0".to_owned(),
        0 => "<0.1".to_owned(),
        tenths @ 1..100 if tenths % 10 != 0 => format!("{}.{}", tenths / 10, tenths % 10),
        tenths => short_count(tenths / 10),
    }
}

/// How long ago or after, in 4 characters at the most: `7s`, `12m`, `3h`, `40d`.
pub(super) fn short_time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds}s"),
        seconds @ 100..6_000 => format!("{}m", seconds / 60),
        seconds @ 6_000..360_000 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", (seconds / 86_400).min(999)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_right() {
        for (nanos, text) in [
            (0, "0ns"),
            (999, "999ns"),
            (1_000, "1.0µs"),
            (9_990, "9.9µs"),
            (10_000, "10µs"),
            (1_234_567, "1.2ms"),
            (999_999_999, "999ms"),
            (3_600_000_000_000, "3600s"),
            (u64::MAX, ">2h"),
        ] {
            assert_eq!(short_duration(nanos), text);
        }
        for (count, text) in [
            (99_999, "99999"),
            (100_000, "100k"),
            (9_999_999, "9999k"),
            (10_000_000, "10M"),
            (u64::MAX, "9999G"),
        ] {
            assert_eq!(short_count(count), text);
        }
        let five = Duration::from_secs(5);
        for (count, text) in [
            (0, "0"),
            (1, "0.2"),
            (5, "1"),
            (61, "12"),
            (u64::MAX, "9999G"),
        ] {
            assert_eq!(short_rate(count, five), text);
        }
        assert_eq!(short_rate(1, Duration::from_secs(100)), "<0.1");
        for (seconds, text) in [
            (0, "0s"),
            (99, "99s"),
            (100, "1m"),
            (5_999, "99m"),
            (6_000, "1h"),
            (u64::MAX, "999d"),
        ] {
            assert_eq!(short_time(Duration::from_secs(seconds)), text);
        }
    }
}

//! Sizes, rates and durations as people write and read them.
//!
//! Invariant: what is printed is binary (`KiB`, `MiB`, …, 1,024 each) and says so; what is read may be either. `KiB` and
//! the bare `K` are binary, `kB` is decimal, case does not matter.

use std::{ops::RangeInclusive, time::Duration};

use thiserror::Error;

/// Rates that can be limits, bytes a second. Under less than the shortest chunk a second, a source would seem dead.
pub const RATES: RangeInclusive<u64> = 16 << 10..=1 << 50;

/// A text that is not a size, rate or duration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not {expected}")]
pub struct UnitError {
    text: String,
    expected: &'static str,
}

/// Reads a size in bytes: `4096`, `500k`, `1.5 GiB`, `20MB`. Fails on anything else and on more than `u64::MAX` bytes.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let size = || {
        let (number, unit) = split_number(text.trim());
        let factor = size_factor(unit.trim_start())?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        // Nine digits resolve a byte in a GiB; more would only invite overflow.
        let tail = u128::from(fraction.get(..9).unwrap_or(fraction).parse::<u64>().ok()?);
        let tail_scale = 10u128.pow(u32::try_from(fraction.len().min(9)).ok()?);
        let bytes = u128::from(whole.parse::<u64>().ok()?).checked_mul(factor)?
            + tail * factor / tail_scale;
        u64::try_from(bytes).ok()
    };
    size().ok_or_else(|| UnitError {
        text: text.into(),
        expected: "a size; write 64MiB, 20MB, 1G or 500k",
    })
}

/// Reads a limit in bytes a second: a size, with or without `/s`, or `none`.
pub fn parse_rate(text: &str) -> Result<Option<u64>, UnitError> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("none") {
        return Ok(None);
    }
    let rate = parse_size(text.strip_suffix("/s").unwrap_or(text))
        .ok()
        .filter(|rate| RATES.contains(rate));
    let expected = "a limit; write none, or 500k, 20MB or 1GiB (a second, at least 16k)";
    rate.map(Some).ok_or_else(|| UnitError {
        text: text.into(),
        expected,
    })
}

/// Writes a limit for people: `19.1 MiB/s`, `none`.
pub fn human_rate(rate: Option<u64>) -> String {
    rate.map_or_else(|| "none".into(), |rate| format!("{}/s", human_size(rate)))
}

/// Reads a duration in whole weeks, days, hours, minutes and seconds: `7d`, `24h`, `10m`, `1h30m`. A unit is required.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let duration = || {
        let mut rest = text.trim();
        let mut seconds = 0u64;
        while !rest.is_empty() {
            let (number, tail) = split_number(rest);
            let unit = tail.chars().next()?;
            let factor = match unit {
                's' => 1,
                'm' => 60,
                'h' => 3_600,
                'd' => 86_400,
                'w' => 604_800,
                _ => return None,
            };
            seconds = seconds.checked_add(number.parse::<u64>().ok()?.checked_mul(factor)?)?;
            rest = tail[unit.len_utf8()..].trim_start();
        }
        (!text.trim().is_empty()).then_some(Duration::from_secs(seconds))
    };
    duration().ok_or_else(|| UnitError {
        text: text.into(),
        expected: "a duration; write 90s, 10m, 24h or 7d",
    })
}

/// Writes a size for people, with one decimal from 1 KiB up: `1023 B`, `1.5 KiB`, `2.0 GiB`.
pub fn human_size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 1024u128;
    for name in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        let tenths = (u128::from(bytes) * 10 + unit / 2) / unit;
        if tenths < 10_240 {
            return format!("{}.{} {name}", tenths / 10, tenths % 10);
        }
        unit *= 1024;
    }
    let tenths = (u128::from(bytes) * 10 + unit / 2) / unit;
    format!("{}.{} EiB", tenths / 10, tenths % 10)
}

fn split_number(text: &str) -> (&str, &str) {
    text.split_at(
        text.find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len()),
    )
}

fn size_factor(unit: &str) -> Option<u128> {
    let unit = unit.to_ascii_lowercase();
    let (base, prefix) = match unit.as_str() {
        "" | "b" => return Some(1),
        unit => match (unit.strip_suffix("ib"), unit.strip_suffix('b')) {
            (Some(prefix), _) => (1024, prefix),
            (None, Some(prefix)) => (1000, prefix),
            (None, None) => (1024, unit),
        },
    };
    let power = ["k", "m", "g", "t", "p", "e"]
        .iter()
        .position(|name| *name == prefix)?;
    Some(u128::pow(base, u32::try_from(power).ok()? + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("7 b", 7),
            ("64MiB", 64 << 20),
            ("20MB", 20_000_000),
            ("1G", 1 << 30),
            ("500k", 500 << 10),
            ("500kB", 500_000),
            (" 1.5 GiB ", 3 << 29),
            ("2tib", 2 << 40),
            ("16777215TiB", 16_777_215 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn texts_that_are_no_size() {
        for text in [
            "",
            " ",
            "MiB",
            "-1",
            "1.2.3M",
            ".5G",
            "1.",
            "1 Mib s",
            "16EiB",
            "1x",
            "1iB",
            "18446744073709551616",
            "1é",
        ] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{text:?} is not a size")),
                "{error}"
            );
        }
    }

    #[test]
    fn limits_people_write() {
        for (text, rate) in [
            ("20MB", Some(20_000_000)),
            ("1GiB/s", Some(1 << 30)),
            ("16k", Some(16 << 10)),
            (" 1048576 ", Some(1 << 20)),
            ("none", None),
            ("None", None),
        ] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for text in ["", "0", "fast", "16383", "2000TB", "20MB/h", "20Mbit", "-1"] {
            let error = parse_rate(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{text:?} is not a limit; write none, or")),
                "{error}"
            );
        }
        assert_eq!(
            (
                human_rate(Some(20_000_000)).as_str(),
                human_rate(None).as_str()
            ),
            ("19.1 MiB/s", "none")
        );
    }

    #[test]
    fn durations_people_write() {
        for (text, seconds) in [
            ("24h", 86_400),
            ("10m", 600),
            ("90s", 90),
            ("7d", 604_800),
            ("1h30m", 5_400),
            ("1h 5s", 3_605),
            ("2w", 1_209_600),
            ("0s", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_secs(seconds)),
                "{text}"
            );
        }
        for text in [
            "",
            " ",
            "90",
            "h",
            "1.5h",
            "-1s",
            "1y",
            "1h5",
            "1é",
            "99999999999999999999s",
            "18446744073709551615w",
        ] {
            let error = parse_duration(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{text:?} is not a duration")),
                "{error}"
            );
        }
    }

    #[test]
    fn sizes_people_read() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (2 << 30, "2.0 GiB"),
            (1 << 40, "1.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC*") {
            let _ = (parse_size(&text), parse_duration(&text));
        }

        #[test]
        fn whole_bytes_round_trip(bytes: u64) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        }

        #[test]
        fn what_is_printed_reads_back_within_a_rounding(bytes in 0..1u64 << 60) {
            let text = human_size(bytes);
            let back = parse_size(&text).unwrap();
            prop_assert!(back.abs_diff(bytes) <= bytes / 20 + 1, "{} {}", text, back);
            prop_assert!(text.split(' ').next().unwrap().len() <= 6, "{}", text);
        }

        #[test]
        fn durations_add_up(days in 0..10_000u64, hours in 0..24u64, minutes in 0..60u64, seconds in 0..60u64) {
            let total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds;
            let text = format!("{days}d{hours}h{minutes}m{seconds}s");
            prop_assert_eq!(parse_duration(&text), Ok(Duration::from_secs(total)));
        }
    }
}

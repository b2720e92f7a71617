//! Times as people write them, and the names that times give to snapshots and versions.
//!
//! [`parse_instant`] is the one grammar for the command line and for the folders
//! `.snapshots/.at/…`. Names are in UTC and without colons, so that they sort by time and are good
//! on every filesystem. Nothing here does I/O except that [`Zone::Local`] reads the system's time
//! zone.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Span, ToSpan};

use crate::error::{Error, Result};
use crate::types::{Timestamp, escape};

/// The forms that [`parse_instant`] takes, for error texts and help.
pub const ACCEPTED: &str = "accepted: now, today, yesterday, 'yesterday 14:00', 10m, 2h30m, 3d, \
     '2 hours ago', 2026-11-22, '2026-11-22 19:30', 2026-11-22_19-30-07 (UTC), \
     2026-11-22T19:30:07Z, @1763839807";

/// Where a time without an offset was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// By a person at this computer: the system's time zone.
    Local,
    /// In a folder's name, which must mean the same to everybody.
    Utc,
}

impl Zone {
    fn time_zone(self) -> TimeZone {
        match self {
            Zone::Local => TimeZone::system(),
            Zone::Utc => TimeZone::UTC,
        }
    }
}

/// The instant that `text` means when it is read at `now`.
///
/// A date without a time means its first moment; an amount (`2h30m`, with or without a leading `-`
/// or a trailing `ago`) counts back from `now`, days being 24 hours and months calendar months. A
/// date and time joined by `_` is always UTC, like the names of snapshots. Fails with the list of
/// accepted forms.
pub fn parse_instant(text: &str, now: Timestamp, zone: Zone) -> Result<Timestamp> {
    let trimmed = text.trim();
    let parsed = match trimmed.strip_prefix('@') {
        Some(rest) => match rest.strip_prefix("GMT-") {
            Some(gmt) => parse_gmt(gmt),
            None => parse_unix(rest),
        },
        None => parse_named_day(trimmed, now, zone)
            .or_else(|| parse_amount(trimmed, now, zone))
            .or_else(|| parse_absolute(trimmed, zone)),
    };
    parsed.ok_or_else(|| {
        let text = escape(text.as_bytes());
        Error::Refused(format!("'{text}' is not a time that can be understood; {ACCEPTED}"))
    })
}

/// Whether `text` means a time that depends on when it is read: `now`, `yesterday 14:00`, `2h`.
pub fn is_relative(text: &str) -> bool {
    let (text, now) = (text.trim(), Timestamp::now());
    parse_named_day(text, now, Zone::Utc).or_else(|| parse_amount(text, now, Zone::Utc)).is_some()
}

/// `2026.11.22-19.30.00`, the rest of Samba's form; always UTC.
fn parse_gmt(text: &str) -> Option<Timestamp> {
    let date_time = DateTime::strptime("%Y.%m.%d-%H.%M.%S", text).ok()?;
    resolve(date_time, &TimeZone::UTC)
}

/// `1763839807` or `1763839807.25`, also negative.
fn parse_unix(text: &str) -> Option<Timestamp> {
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) => (whole, fraction),
        None => (text, ""),
    };
    let digits = whole.strip_prefix('-').unwrap_or(whole);
    if !is_digits(digits) || !(fraction.is_empty() || is_digits(fraction)) || text.ends_with('.') {
        return None;
    }
    let secs: i64 = whole.parse().ok()?;
    let nanos = fraction_nanos(fraction);
    if !whole.starts_with('-') || nanos == 0 {
        return checked(Timestamp { secs, nanos });
    }
    // -1.25 lies a quarter second before -1: the fraction counts away from zero.
    checked(Timestamp { secs: secs - 1, nanos: 1_000_000_000 - nanos })
}

/// The first nine digits of a decimal fraction as nanoseconds.
fn fraction_nanos(digits: &str) -> u32 {
    digits
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// `now`, `today`, `yesterday`, the latter two with an optional time of day.
fn parse_named_day(text: &str, now: Timestamp, zone: Zone) -> Option<Timestamp> {
    let lower = text.to_ascii_lowercase();
    if lower == "now" {
        return Some(now);
    }
    let (days_back, rest) = if let Some(rest) = lower.strip_prefix("yesterday") {
        (1, rest)
    } else {
        (0, lower.strip_prefix("today")?)
    };
    let time_zone = zone.time_zone();
    let today = to_jiff(now)?.to_zoned(time_zone.clone()).date();
    let date = today.checked_sub(i64::from(days_back).days()).ok()?;
    let time = match rest.strip_prefix([' ', '_', 'T', 't']) {
        Some(time) => parse_time(time.trim())?,
        None if rest.is_empty() => Time::midnight(),
        None => return None,
    };
    resolve(date.to_datetime(time), &time_zone)
}

/// An amount of time before `now`: numbers with units, in any order.
fn parse_amount(text: &str, now: Timestamp, zone: Zone) -> Option<Timestamp> {
    let lower = text.to_ascii_lowercase();
    let amount = lower.strip_prefix('-').unwrap_or(&lower);
    let amount = amount.strip_suffix("ago").unwrap_or(amount);
    // In a folder's name spaces are a nuisance: `2_hours_ago` is the same.
    let mut rest = amount.trim_matches([' ', '_']);
    let mut span = Span::new();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let count: i64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start_matches([' ', '_']);
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        span = add_unit(span, count, &rest[..letters])?;
        rest = rest[letters..].trim_start_matches([' ', '_', ',']);
    }
    let then = to_jiff(now)?.to_zoned(zone.time_zone()).checked_sub(span).ok()?;
    Some(from_jiff(then.timestamp()))
}

/// Adds `count` units to what is counted so far.
fn add_unit(span: Span, count: i64, unit: &str) -> Option<Span> {
    let seconds = match unit {
        "s" | "sec" | "secs" | "second" | "seconds" => 1,
        "m" | "min" | "mins" | "minute" | "minutes" => 60,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3_600,
        "d" | "day" | "days" => 86_400,
        "w" | "week" | "weeks" => 604_800,
        "mo" | "month" | "months" => {
            return span.try_months(count.checked_add(i64::from(span.get_months()))?).ok();
        }
        "y" | "year" | "years" => {
            return span.try_years(count.checked_add(i64::from(span.get_years()))?).ok();
        }
        _ => return None,
    };
    let total = count.checked_mul(seconds)?.checked_add(span.get_seconds())?;
    span.try_seconds(total).ok()
}

/// A date, a date and a time, or a complete RFC 3339 timestamp.
fn parse_absolute(text: &str, zone: Zone) -> Option<Timestamp> {
    if let Ok(timestamp) = text.parse::<jiff::Timestamp>() {
        return Some(from_jiff(timestamp));
    }
    let (date, rest) = (text.get(..10)?, text.get(10..)?);
    let date: Date = date.parse().ok()?;
    let Some(separator) = rest.chars().next() else {
        return resolve(date.to_datetime(Time::midnight()), &zone.time_zone());
    };
    let time = parse_time(rest.get(1..)?.trim())?;
    let time_zone = match separator {
        '_' => TimeZone::UTC,
        ' ' | 'T' | 't' => zone.time_zone(),
        _ => return None,
    };
    resolve(date.to_datetime(time), &time_zone)
}

/// `19:30`, `19:30:07`, `19-30-07`, the seconds with an optional fraction.
fn parse_time(text: &str) -> Option<Time> {
    let separator = if text.contains(':') { ':' } else { '-' };
    let mut parts = text.split(separator);
    let hour = two_digits(parts.next()?)?;
    let minute = two_digits(parts.next()?)?;
    let (second, fraction) = match parts.next() {
        None => ("00", ""),
        Some(part) => part.split_once('.').unwrap_or((part, "")),
    };
    if parts.next().is_some() || !(fraction.is_empty() || is_digits(fraction)) {
        return None;
    }
    let nanos = i32::try_from(fraction_nanos(fraction)).ok()?;
    Time::new(hour, minute, two_digits(second)?, nanos).ok()
}

fn two_digits(text: &str) -> Option<i8> {
    if text.len() > 2 || !is_digits(text) {
        return None;
    }
    text.parse().ok()
}

/// A civil time in a zone. One that a clock change skips or repeats is taken as RFC 5545 says.
fn resolve(date_time: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    date_time.to_zoned(zone.clone()).ok().map(|zoned| from_jiff(zoned.timestamp()))
}

/// The same instant in jiff's form; `None` beyond the years -9999 to 9999.
pub(crate) fn to_jiff(time: Timestamp) -> Option<jiff::Timestamp> {
    jiff::Timestamp::new(time.secs, i32::try_from(time.nanos).ok()?).ok()
}

/// The same instant in our form.
pub(crate) fn from_jiff(time: jiff::Timestamp) -> Timestamp {
    let nanos = time.as_nanosecond();
    // Both fit: jiff's years lie between -9999 and 9999.
    Timestamp {
        secs: nanos.div_euclid(1_000_000_000) as i64,
        nanos: nanos.rem_euclid(1_000_000_000) as u32,
    }
}

/// Only times that can be shown as a date again.
fn checked(time: Timestamp) -> Option<Timestamp> {
    to_jiff(time).map(|_| time)
}

fn format_utc(time: Timestamp, format: &str) -> String {
    match to_jiff(time) {
        Some(time) => time.strftime(format).to_string(),
        // Years beyond 9999, from a file's attributes: still a unique name.
        None => format!("@{}", time.secs),
    }
}

/// The name of an automatic snapshot: `2026-11-22_19-30-00`, UTC.
pub fn snapshot_name(time: Timestamp) -> String {
    format_utc(time, "%Y-%m-%d_%H-%M-%S")
}

/// The name by which Samba's `shadow_copy2` asks for a snapshot: `@GMT-2026.11.22-19.30.00`.
pub fn gmt_name(time: Timestamp) -> String {
    format_utc(time, "@GMT-%Y.%m.%d-%H.%M.%S")
}

/// The stem of a version's name: `2026-11-22_19-30-07.123`, UTC; with all nine digits on request.
pub fn version_name(time: Timestamp, nanos: bool) -> String {
    let second = snapshot_name(time);
    match nanos {
        true => format!("{second}.{:09}", time.nanos),
        false => format!("{second}.{:03}", time.nanos / 1_000_000),
    }
}

/// The time for a person, in the system's zone: `2026-11-22 20:30:07`.
pub fn local(time: Timestamp) -> String {
    match to_jiff(time) {
        Some(time) => time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        None => format!("@{}", time.secs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_times_are_told_from_names_and_dates() {
        for text in ["now", "Today", "yesterday", "yesterday 14:00", "2h", "3d", "2 hours ago"] {
            assert!(is_relative(text), "{text}");
        }
        for text in ["2026-11-22_19-30-00", "2026-11-22", "before", "v2", "today-s", "2h-later"] {
            assert!(!is_relative(text), "{text}");
        }
    }

    /// 2026-11-22 20:45:34.5 UTC, a Sunday.
    const NOW: Timestamp = Timestamp { secs: 1_795_380_334, nanos: 500_000_000 };

    fn utc(text: &str) -> Option<String> {
        let time = parse_instant(text, NOW, Zone::Utc).ok()?;
        Some(format_utc(time, "%Y-%m-%dT%H:%M:%S%.f"))
    }

    #[test]
    fn every_accepted_form_means_its_instant() {
        for (text, expected) in [
            ("now", "2026-11-22T20:45:34.5"),
            (" Now ", "2026-11-22T20:45:34.5"),
            ("0s", "2026-11-22T20:45:34.5"),
            ("today", "2026-11-22T00:00:00"),
            ("today 08:15", "2026-11-22T08:15:00"),
            ("yesterday", "2026-11-21T00:00:00"),
            ("yesterday 14:00", "2026-11-21T14:00:00"),
            ("yesterday_14-00-07", "2026-11-21T14:00:07"),
            ("10m", "2026-11-22T20:35:34.5"),
            ("-10m", "2026-11-22T20:35:34.5"),
            ("10m ago", "2026-11-22T20:35:34.5"),
            ("90s", "2026-11-22T20:44:04.5"),
            ("2h", "2026-11-22T18:45:34.5"),
            ("2h30m", "2026-11-22T18:15:34.5"),
            ("2 hours ago", "2026-11-22T18:45:34.5"),
            ("1 day, 2 hours ago", "2026-11-21T18:45:34.5"),
            ("2_hours_ago", "2026-11-22T18:45:34.5"),
            ("3d", "2026-11-19T20:45:34.5"),
            ("1w", "2026-11-15T20:45:34.5"),
            ("1mo", "2026-10-22T20:45:34.5"),
            ("1 year ago", "2025-11-22T20:45:34.5"),
            ("2026-11-22", "2026-11-22T00:00:00"),
            ("2026-11-22 19:30", "2026-11-22T19:30:00"),
            ("2026-11-22 19:30:07", "2026-11-22T19:30:07"),
            ("2026-11-22T19:30:07", "2026-11-22T19:30:07"),
            ("2026-11-22_19-30-07", "2026-11-22T19:30:07"),
            ("2026-11-22_19-30-07.123", "2026-11-22T19:30:07.123"),
            ("2026-11-22_19-30", "2026-11-22T19:30:00"),
            ("2026-11-22T19:30:07Z", "2026-11-22T19:30:07"),
            ("2026-11-22T19:30:07.25+01:00", "2026-11-22T18:30:07.25"),
            ("2026-11-22 19:30:07-05:00", "2026-11-23T00:30:07"),
            ("@1763839807", "2025-11-22T19:30:07"),
            ("@1763839807.25", "2025-11-22T19:30:07.25"),
            ("@-1.25", "1969-12-31T23:59:58.75"),
            ("@GMT-2026.11.22-19.30.00", "2026-11-22T19:30:00"),
        ] {
            assert_eq!(utc(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused_with_the_accepted_forms() {
        for text in [
            "",
            " ",
            "ago",
            "-",
            "@",
            "@x",
            "@1.",
            "@GMT-2026",
            "2x",
            "h",
            "2h3",
            "10",
            "tomorrow",
            "yesterdayx",
            "2026-13-01",
            "2026-02-30",
            "2026-11-22 25:00",
            "2026-11-22 19",
            "2026-11-22x19:30",
            "2026-11-22 19:30:07:08",
            "99999999999999999999s",
            "99999999999y",
            "@99999999999999",
            "2026-11-2\u{e9}",
            "\u{1b}[31m",
        ] {
            let error = parse_instant(text, NOW, Zone::Utc).expect_err(text).to_string();
            assert!(error.contains("accepted:"), "{text}: {error}");
            assert!(!error.contains('\u{1b}'));
        }
    }

    #[test]
    fn names_of_snapshots_and_versions_are_utc_and_parse_back() {
        let time = Timestamp { secs: 1_795_380_334, nanos: 123_456_789 };
        assert_eq!(snapshot_name(time), "2026-11-22_20-45-34");
        assert_eq!(gmt_name(time), "@GMT-2026.11.22-20.45.34");
        assert_eq!(version_name(time, false), "2026-11-22_20-45-34.123");
        assert_eq!(version_name(time, true), "2026-11-22_20-45-34.123456789");
        let parsed = parse_instant(&version_name(time, true), NOW, Zone::Local).expect("parses");
        assert_eq!(parsed, time);
        assert_eq!(snapshot_name(Timestamp { secs: i64::MAX, nanos: 0 }), format!("@{}", i64::MAX));
    }

    #[test]
    fn joined_dates_are_utc_even_on_the_command_line() {
        let utc = parse_instant("2026-11-22_19-30-07", NOW, Zone::Utc).expect("parses");
        let local = parse_instant("2026-11-22_19-30-07", NOW, Zone::Local).expect("parses");
        assert_eq!(utc, local);
    }
}

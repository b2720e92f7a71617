//! Lengths of time as policies write them: `14d`, `1y5m7d2h`, `30min`.

use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::time::to_jiff;
use crate::types::{Timestamp, escape};

const HOUR_SECS: u64 = 3_600;
const DAY_SECS: u64 = 86_400;

/// A length of time: years, months and days of the calendar, then hours, minutes and seconds.
///
/// Written as numbers with units: `y`, `m` (months, as restic has it; `mo` too), `w`, `d`, `h`,
/// `min` and `s`, in any order; or `0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span {
    years: u32,
    months: u32,
    days: u32,
    secs: u64,
}

impl Span {
    /// No time at all.
    pub const ZERO: Span = Span { years: 0, months: 0, days: 0, secs: 0 };

    /// That many hours.
    pub const fn hours(hours: u32) -> Span {
        Span { secs: hours as u64 * HOUR_SECS, ..Span::ZERO }
    }

    /// That many days.
    pub const fn days(days: u32) -> Span {
        Span { days, ..Span::ZERO }
    }

    /// Whether it is no time at all.
    pub fn is_zero(self) -> bool {
        self == Span::ZERO
    }

    /// Whether it counts in months or years, whose lengths differ.
    pub fn has_months(self) -> bool {
        self.years != 0 || self.months != 0
    }

    /// Its length in seconds with days of 24 hours, months of 30 and years of 365 days: for limits
    /// that must move evenly as time goes on.
    pub fn even_secs(self) -> u64 {
        let days = u64::from(self.years) * 365 + u64::from(self.months) * 30 + u64::from(self.days);
        days.saturating_mul(DAY_SECS).saturating_add(self.secs)
    }

    /// The time that lies this length, counted evenly, before `time`.
    pub fn even_before(self, time: Timestamp) -> Timestamp {
        let secs = i64::try_from(self.even_secs()).unwrap_or(i64::MAX);
        Timestamp { secs: time.secs.saturating_sub(secs), ..time }
    }

    /// The time that lies this length before `time` by the calendar of `zone`: first years, months
    /// and days, then the rest. `None` where that is before all calendars.
    pub fn before(self, time: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let date = jiff::Span::new()
            .try_years(self.years)
            .and_then(|span| span.try_months(self.months))
            .and_then(|span| span.try_days(self.days))
            .ok()?;
        let secs = jiff::SignedDuration::from_secs(i64::try_from(self.secs).ok()?);
        let then = to_jiff(time)?.to_zoned(zone.clone()).checked_sub(date).ok()?;
        let then = then.timestamp().checked_sub(secs).ok()?;
        Some(crate::time::from_jiff(then))
    }

    /// Adds `count` of a unit; `None` if there is no such unit or the sum is too large.
    fn plus(self, count: u32, unit: &str) -> Option<Span> {
        let mut span = self;
        let add = |to: u32, factor: u32| to.checked_add(count.checked_mul(factor)?);
        match unit {
            "y" => span.years = add(span.years, 1)?,
            "m" | "mo" => span.months = add(span.months, 1)?,
            "w" => span.days = add(span.days, 7)?,
            "d" => span.days = add(span.days, 1)?,
            "h" => span.secs += u64::from(count) * HOUR_SECS,
            "min" => span.secs += u64::from(count) * 60,
            "s" => span.secs += u64::from(count),
            _ => return None,
        }
        Some(span)
    }
}

/// Takes the longest beginning of `text` that fits, and leaves the rest.
fn take<'a>(text: &mut &'a str, fits: impl Fn(char) -> bool) -> &'a str {
    let (head, rest) = text.split_at(text.find(|c| !fits(c)).unwrap_or(text.len()));
    *text = rest;
    head
}

fn parse(text: &str) -> Option<Span> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    if rest == "0" {
        return Some(Span::ZERO);
    }
    let mut span = Span::ZERO;
    while !rest.is_empty() {
        let count = take(&mut rest, |c| c.is_ascii_digit()).parse().ok()?;
        span = span.plus(count, take(&mut rest, |c| c.is_ascii_lowercase()))?;
    }
    Some(span)
}

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Span> {
        parse(text).ok_or_else(|| {
            Error::Refused(format!(
                "'{}' is not a length of time; write numbers with y, m (months), w, d, h, min or \
                 s: 14d, 1y5m7d2h, 30min",
                escape(text.as_bytes())
            ))
        })
    }
}

impl TryFrom<String> for Span {
    type Error = Error;

    fn try_from(text: String) -> Result<Span> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return f.write_str("0");
        }
        let parts = [
            (u64::from(self.years), "y"),
            (u64::from(self.months), "m"),
            (u64::from(self.days), "d"),
            (self.secs / HOUR_SECS, "h"),
            (self.secs % HOUR_SECS / 60, "min"),
            (self.secs % 60, "s"),
        ];
        parts
            .iter()
            .filter(|(count, _)| *count > 0)
            .try_for_each(|(n, unit)| write!(f, "{n}{unit}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{Zone, parse_instant};

    #[test]
    fn lengths_are_read_and_written() {
        for (text, written) in [
            ("0", "0"),
            ("0d", "0"),
            ("14d", "14d"),
            ("1y5m7d2h", "1y5m7d2h"),
            ("2h7d5m1y", "1y5m7d2h"),
            ("1w", "7d"),
            ("1w1d", "8d"),
            ("3mo", "3m"),
            ("24h", "24h"),
            ("90min", "1h30min"),
            ("30s", "30s"),
            (" 2d ", "2d"),
        ] {
            let span: Span = text.parse().expect(text);
            assert_eq!(span.to_string(), written, "{text}");
            assert_eq!(written.parse::<Span>().expect(written), span);
        }
    }

    #[test]
    fn what_is_no_length_is_refused_with_the_units() {
        for text in ["", " ", "d", "7", "7x", "-7d", "1.5d", "7 d", "7D", "99999999999d", "\u{1b}"]
        {
            let error = text.parse::<Span>().expect_err(text).to_string();
            assert!(error.contains("30min") && !error.contains('\u{1b}'), "{error}");
        }
        assert!("4000000000w".parse::<Span>().is_err());
    }

    #[test]
    fn lengths_reach_back_by_the_calendar_or_evenly() {
        let now = Timestamp::now();
        let at = |text| parse_instant(text, now, Zone::Utc).expect(text);
        let utc = TimeZone::UTC;
        for (span, from, to) in [
            ("1y", "2024-02-29T12:00:00Z", "2023-02-28T12:00:00Z"),
            ("1m", "2026-03-31T12:00:00Z", "2026-02-28T12:00:00Z"),
            ("1y1m1d1h", "2026-03-02T12:00:00Z", "2025-02-01T11:00:00Z"),
            ("1w", "2026-03-02T12:00:00Z", "2026-02-23T12:00:00Z"),
        ] {
            let span: Span = span.parse().expect(span);
            assert_eq!(span.before(at(from), &utc), Some(at(to)), "{span}");
        }
        let month: Span = "1m".parse().expect("a month");
        assert_eq!(month.even_before(at("2026-03-31T12:00:00Z")), at("2026-03-01T12:00:00Z"));
        let ages: Span = "4000000000y".parse().expect("long");
        assert_eq!(ages.before(now, &utc), None);
        assert!(ages.even_before(now) < at("1970-01-01"));
        // A day is a day of the calendar, also when it has 23 hours.
        let berlin = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("a zone");
        let day: Span = "1d".parse().expect("a day");
        let spring = at("2026-03-29T10:00:00Z");
        assert_eq!(day.before(spring, &berlin), Some(at("2026-03-28T11:00:00Z")));
    }
}

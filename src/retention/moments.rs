//! Thinning the continuous history: the longer ago, the fewer moments of it can be seen.
//!
//! Down to the *horizon* every generation is kept. Below it, those that were in force at the end of
//! an hour, further back at the end of a day, and none beyond that. What was in force at a given
//! time can be told from the kept generations as well as from all of them, as long as that time
//! was among the chosen ones; and the ends of days are ends of hours. So thinning today what was
//! thinned yesterday keeps the same as thinning it all today.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::civil;
use super::span::Span;
use crate::error::{Error, Result};
use crate::types::{Generation, Timestamp};

/// How long which moments are kept. Days have 24 hours here, months 30 and years 365 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tiers {
    /// Every version, for so long.
    pub all: Span,
    /// The state at the end of each hour.
    pub hourly: Span,
    /// The state at the end of each day.
    pub daily: Span,
    /// The last state of what was deleted.
    pub deleted: Span,
}

impl Default for Tiers {
    fn default() -> Tiers {
        Tiers {
            all: Span::hours(24),
            hourly: Span::days(7),
            daily: Span::days(30),
            deleted: Span::days(90),
        }
    }
}

impl Tiers {
    /// Refuses tiers that do not follow one another.
    pub(super) fn check(&self) -> Result<()> {
        let Tiers { all, hourly, daily, .. } = self;
        if all.even_secs() > hourly.even_secs() || hourly.even_secs() > daily.even_secs() {
            return Err(Error::Refused(format!(
                "versions: all ({all}), hourly ({hourly}) and daily ({daily}) must follow in this \
                 order, each at least as long as the one before (m means months, min minutes)"
            )));
        }
        Ok(())
    }
}

/// What stays of the continuous history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thinning {
    /// From this generation on, all stays.
    pub horizon: Generation,
    /// The generations below the horizon that stay, ascending.
    pub keep: Vec<Generation>,
}

/// What can still be seen, as [`moments`] wants it: of the generations of one time the last.
///
/// `moments` are the kept generations below the `horizon`, each with its time, and the horizon has
/// its own; `ticks` are the first generations of their times, from the horizon on; `newest` is the
/// newest generation.
pub fn seen(
    moments: &[(Generation, Timestamp)],
    horizon: (Generation, Timestamp),
    ticks: &[(Generation, Timestamp)],
    newest: Generation,
) -> Vec<(Generation, Timestamp)> {
    // The horizon can lie in the midst of a time, whose tick then lies below it.
    let cut = ticks.first().is_none_or(|(first, _)| *first > horizon.0);
    let begun: Vec<_> = cut.then_some(horizon).into_iter().chain(ticks.iter().copied()).collect();
    let ends = begun.iter().skip(1).map(|(next, _)| Generation(next.0.saturating_sub(1)));
    let last = begun.iter().zip(ends.chain([newest])).map(|((_, time), last)| (last, *time));
    moments.iter().copied().chain(last).collect()
}

/// Which moments stay, of those that were left by the last thinning.
///
/// `seen` are the generations that can still be seen, ascending, each with the time from which on
/// it was in force, until the next one: see [`seen`]. The horizon is the one that was in force when
/// `tiers.all`, or `protect` if that is longer, began; kept below it are those in force at the end
/// of an hour later than `tiers.hourly` ago, and at the end of a day later than `tiers.daily` ago,
/// hours and days being those of `zone`. Nothing is ever kept that could not be seen before.
///
/// If the clock was set back, the horizon can lie below an earlier one: then all stays as it was.
pub fn moments(
    tiers: &Tiers,
    protect: Span,
    seen: impl Iterator<Item = (Generation, Timestamp)>,
    zone: &TimeZone,
    now: Timestamp,
) -> Thinning {
    let horizon = tiers.all.even_before(now).min(protect.even_before(now));
    let hourly = tiers.hourly.even_before(now).min(horizon);
    let daily = tiers.daily.even_before(now).min(hourly);
    // Whether something ended later than `after` and not later than `until`.
    let ended = |after: Timestamp, until: Timestamp, same: fn(DateTime, DateTime) -> bool| {
        after < until && !same(civil(after, zone), civil(until, zone))
    };
    let mut keep = Vec::new();
    let mut current: Option<(Generation, Timestamp)> = None;
    for (generation, time) in seen {
        // A generation cannot begin before the one that it follows, whatever the clock said.
        let time = current.map_or(time, |(_, begun)| time.max(begun));
        if let Some((earlier, begun)) = current {
            if time > horizon {
                break;
            }
            if ended(begun.max(hourly), time, same_hour)
                || ended(begun.max(daily), time.min(hourly), same_day)
            {
                keep.push(earlier);
            }
        }
        current = Some((generation, time));
    }
    Thinning { horizon: current.map_or(Generation(0), |(generation, _)| generation), keep }
}

fn same_hour(a: DateTime, b: DateTime) -> bool {
    a.date() == b.date() && a.hour() == b.hour()
}

fn same_day(a: DateTime, b: DateTime) -> bool {
    a.date() == b.date()
}

//! Retention: which snapshots and which moments between them are kept. Decisions only; nothing
//! here looks at a store or changes one.
//!
//! # Snapshots
//! [`decide`] applies a [`Policy`] with the rules that restic's users know. The snapshots are gone
//! through from the newest to the oldest. A rule on periods keeps a snapshot if it lies in another
//! period than the one that the rule kept before it, until its number is used up, or as far back
//! as its length of time reaches from the newest snapshot; and it keeps the oldest of all if its
//! number is not used up by then. The rules are independent: one is enough to keep a snapshot.
//!
//! An hour that a clock change repeats is one hour.
//!
//! Some snapshots stand outside of all this, neither removed nor counted: held ones, those from
//! the future (a clock was wrong, and they must not push out the real ones), and, when a store
//! applies its own policy, those that a person made. Snapshots younger than the protected time are
//! counted, but kept in any case.
//!
//! # Versions
//! [`moments()`] thins the continuous history between the snapshots.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::error::{Error, Result};
use crate::time::to_jiff;
use crate::types::Timestamp;

pub mod moments;
pub mod policy;
pub mod span;
pub mod store;

#[cfg(test)]
mod tests;

pub use moments::{Thinning, Tiers, moments, seen};
pub use policy::{Keep, Policy, TagRule};
pub use span::Span;
pub use store::StorePolicy;

/// How a person says that nothing need be kept.
const ALLOW_NONE: &str = "--unsafe-allow-remove-all";

/// A snapshot as far as retention looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// The moment it shows.
    pub time: Timestamp,
    /// Its tags.
    pub tags: Vec<String>,
    /// It must not be removed.
    pub held: bool,
    /// A schedule made it.
    pub automatic: bool,
}

/// What becomes of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it stays.
    pub keep: bool,
    /// Why: every rule that keeps it, or why each rule does not.
    pub reasons: Vec<String>,
}

/// A policy, and to what and how strictly it is to be applied.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The rules.
    pub policy: &'a Policy,
    /// Only snapshots made by a schedule may go.
    pub automatic_only: bool,
    /// Younger snapshots are kept in any case.
    pub protect: Span,
    /// To keep nothing is what is wanted.
    pub allow_none: bool,
}

/// Decides on each of `items`, in their order; of several of one time the last is the newest.
/// Periods are those of `zone`.
///
/// `Refused` if the policy is empty, or keeps not one of those it applies to, unless that is
/// allowed.
pub fn decide(
    asked: &Asked<'_>,
    items: &[Item],
    now: Timestamp,
    zone: &TimeZone,
) -> Result<Vec<Decision>> {
    let policy = asked.policy;
    policy.check()?;
    if policy.is_empty() && !asked.allow_none {
        return Err(Error::Refused(
            "refused: this policy would keep nothing; say what to keep, for example \
             --keep-daily 7 --keep-monthly 12"
                .into(),
        ));
    }
    let mut decisions: Vec<Option<Decision>> =
        items.iter().map(|item| outside(item, asked, now)).collect();
    let mut counted: Vec<usize> =
        (0..items.len()).filter(|&index| decisions[index].is_none()).collect();
    counted.sort_by_key(|&index| std::cmp::Reverse((items[index].time, index)));
    let past = items.iter().map(|item| item.time).filter(|time| *time <= now);
    let mut rules = rules(policy, past.max(), zone);
    let protected_since = asked.protect.even_before(now);
    for (number, &index) in counted.iter().enumerate() {
        let item = &items[index];
        let oldest = number + 1 == counted.len();
        let protected = !asked.protect.is_zero() && item.time > protected_since;
        let protection = protected.then(|| format!("protected: younger than {}", asked.protect));
        decisions[index] = Some(weigh(item, number, oldest, policy, &mut rules, zone, protection));
    }
    let decisions: Vec<Decision> = decisions.into_iter().flatten().collect();
    let none_kept = counted.iter().all(|&index| !decisions[index].keep);
    if none_kept && !counted.is_empty() && !asked.allow_none {
        let count = counted.len();
        return Err(Error::Refused(format!(
            "refused: this policy would remove all of the {count} snapshots that it applies to; \
             keep more, or, if that is what you want, add {ALLOW_NONE}"
        )));
    }
    Ok(decisions)
}

/// The decision on a snapshot that no rule is asked about.
fn outside(item: &Item, asked: &Asked<'_>, now: Timestamp) -> Option<Decision> {
    let reason = if item.held {
        "held"
    } else if item.time > now {
        "in the future"
    } else if asked.automatic_only && !item.automatic {
        "made by hand"
    } else {
        return None;
    };
    Some(Decision { keep: true, reasons: vec![reason.into()] })
}

/// Asks every rule about one snapshot, so that each counts it.
fn weigh(
    item: &Item,
    number: usize,
    oldest: bool,
    policy: &Policy,
    rules: &mut [Rule],
    zone: &TimeZone,
    protection: Option<String>,
) -> Decision {
    let mut kept: Vec<String> = protection.into_iter().collect();
    let mut dropped = Vec::new();
    let fitting = policy.tags.iter().filter(|rule| rule.fits(&item.tags));
    kept.extend(fitting.map(|rule| format!("tagged {rule}")));
    if !policy.tags.is_empty() {
        dropped.push("no such tag".to_string());
    }
    let local = civil(item.time, zone);
    for rule in rules {
        match rule.offer(item.time, rule.period.key(local, number), oldest) {
            Ok(reason) => kept.push(reason),
            Err(reason) => dropped.push(reason),
        }
    }
    if policy.is_empty() {
        dropped.push("the policy keeps nothing".into());
    }
    match kept.is_empty() {
        true => Decision { keep: false, reasons: dropped },
        false => Decision { keep: true, reasons: kept },
    }
}

/// A time by the calendar and clocks of a zone. Times beyond the calendar are its first or last.
fn civil(time: Timestamp, zone: &TimeZone) -> DateTime {
    let time = to_jiff(time).unwrap_or(match time.secs < 0 {
        true => jiff::Timestamp::MIN,
        false => jiff::Timestamp::MAX,
    });
    zone.to_datetime(time)
}

/// The periods of which a rule keeps one snapshot each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Period {
    /// Every snapshot is one of its own.
    Each,
    Hour,
    Day,
    /// From Monday, in the year that ISO 8601 gives it to.
    Week,
    Month,
    Year,
}

impl Period {
    /// What two snapshots have in common if they lie in the same period.
    fn key(self, local: DateTime, number: usize) -> i64 {
        let year = i64::from(local.year());
        let month = year * 100 + i64::from(local.month());
        let day = month * 100 + i64::from(local.day());
        match self {
            Period::Each => i64::try_from(number).unwrap_or(i64::MAX),
            Period::Hour => day * 100 + i64::from(local.hour()),
            Period::Day => day,
            Period::Week => {
                let week = local.date().iso_week_date();
                i64::from(week.year()) * 100 + i64::from(week.week())
            }
            Period::Month => month,
            Period::Year => year,
        }
    }

    /// The rule's name and the period's.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Period::Each => ("last", "moment"),
            Period::Hour => ("hourly", "hour"),
            Period::Day => ("daily", "day"),
            Period::Week => ("weekly", "week"),
            Period::Month => ("monthly", "month"),
            Period::Year => ("yearly", "year"),
        }
    }
}

/// How far a rule goes.
enum Reach {
    /// So many more of `of` in all.
    Count { left: u64, of: u64 },
    /// Without an end.
    Unlimited,
    /// Later than `after`; all if there is no such time.
    Within { span: Span, after: Option<Timestamp> },
}

/// One rule on periods, and how far it got.
struct Rule {
    period: Period,
    reach: Reach,
    /// The key of the period that it kept last.
    kept: Option<i64>,
}

/// The rules of a policy. `newest` is the time from which lengths reach back.
fn rules(policy: &Policy, newest: Option<Timestamp>, zone: &TimeZone) -> Vec<Rule> {
    let counts = [
        (Period::Each, policy.last),
        (Period::Hour, policy.hourly),
        (Period::Day, policy.daily),
        (Period::Week, policy.weekly),
        (Period::Month, policy.monthly),
        (Period::Year, policy.yearly),
    ];
    let spans = [
        (Period::Each, policy.within),
        (Period::Hour, policy.within_hourly),
        (Period::Day, policy.within_daily),
        (Period::Week, policy.within_weekly),
        (Period::Month, policy.within_monthly),
        (Period::Year, policy.within_yearly),
    ];
    let spans =
        spans.into_iter().map(|(period, span)| (period, Keep::Within(span.unwrap_or(Span::ZERO))));
    let rule = |(period, keep): (Period, Keep)| {
        let reach = match keep {
            _ if keep.is_nothing() => return None,
            Keep::Nothing => return None,
            Keep::Count(of) => Reach::Count { left: of, of },
            Keep::Unlimited => Reach::Unlimited,
            Keep::Within(span) => {
                let after = newest.and_then(|newest| span.before(newest, zone));
                Reach::Within { span, after }
            }
        };
        Some(Rule { period, reach, kept: None })
    };
    counts.into_iter().chain(spans).filter_map(rule).collect()
}

impl Rule {
    /// Asks whether the next older snapshot is kept: the reason for it, or against it.
    fn offer(&mut self, time: Timestamp, key: i64, oldest: bool) -> Result<String, String> {
        let (name, period) = self.period.words();
        match &self.reach {
            Reach::Count { left: 0, of } => {
                return Err(format!("{name}: {of} newer ones are kept"));
            }
            Reach::Within { span, after: Some(after) } if time <= *after => {
                return Err(match self.period {
                    Period::Each => format!("not within {span}"),
                    _ => format!("{name}: not within {span}"),
                });
            }
            _ => {}
        }
        let same = self.kept == Some(key);
        if same && !oldest {
            return Err(format!("{name}: a newer one of that {period} is kept"));
        }
        self.kept = Some(key);
        if let Reach::Count { left, .. } = &mut self.reach {
            *left -= 1;
        }
        let lead = if same { "oldest " } else { "" };
        Ok(match (&self.reach, self.period) {
            (Reach::Within { span, .. }, Period::Each) => format!("within {span}"),
            (Reach::Within { span, .. }, _) => format!("{lead}{name} within {span}"),
            _ => format!("{lead}{name} snapshot"),
        })
    }
}

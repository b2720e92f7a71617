//! Retention against tables, and against plain restatements of its rules.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::time::{Zone, parse_instant};
use crate::types::Generation;

/// Central European time without a database of zones.
fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("a zone")
}

fn at(text: &str) -> Timestamp {
    parse_instant(text, Timestamp::now(), Zone::Utc).expect(text)
}

fn item(time: &str) -> Item {
    Item { name: time.into(), time: at(time), tags: vec![], held: false, automatic: false }
}

fn items(times: &[&str]) -> Vec<Item> {
    times.iter().map(|time| item(time)).collect()
}

fn policy(text: &str) -> Policy {
    toml::from_str(&text.replace("; ", "\n")).expect(text)
}

fn asked(policy: &Policy) -> Asked<'_> {
    Asked { policy, automatic_only: false, protect: Span::ZERO, allow_none: false }
}

/// Each snapshot with its first reason, the kept ones marked.
fn told(rules: &str, items: &[Item], zone: &TimeZone) -> Vec<String> {
    let policy = policy(rules);
    let decisions = decide(&asked(&policy), items, at("2100-01-01"), zone).expect(rules);
    let line = |(item, decision): (&Item, &Decision)| {
        let mark = if decision.keep { '+' } else { '-' };
        format!("{mark} {} {}", item.name, decision.reasons.join(", "))
    };
    items.iter().zip(&decisions).map(line).collect()
}

fn kept(rules: &str, items: &[Item], zone: &TimeZone) -> Vec<String> {
    let lines = told(rules, items, zone);
    lines.iter().filter_map(|line| line.strip_prefix("+ ")).map(String::from).collect()
}

#[test]
fn the_newest_of_each_period_is_kept_and_empty_periods_do_not_count() {
    // One every Sunday, as in restic's manual.
    let sundays = items(&[
        "2019-09-01",
        "2019-09-08",
        "2019-09-15",
        "2019-09-22",
        "2019-09-29",
        "2019-10-06",
        "2019-10-13",
        "2019-10-20",
        "2019-10-27",
        "2019-11-03",
        "2019-11-10",
        "2019-11-17",
    ]);
    let days = kept("daily = 4", &sundays, &TimeZone::UTC);
    let expected = ["2019-10-27", "2019-11-03", "2019-11-10", "2019-11-17"];
    assert_eq!(days, expected.map(|day| format!("{day} daily snapshot")));
    let all = kept("last = 1; monthly = 2", &sundays, &TimeZone::UTC);
    assert_eq!(all, ["2019-10-27 monthly snapshot", "2019-11-17 last snapshot, monthly snapshot"]);
}

#[test]
fn reasons_are_told_for_what_is_kept_and_for_what_is_not() {
    let mut all = items(&[
        "2026-11-20T08:00:00Z",
        "2026-11-21T08:00:00Z",
        "2026-11-21T08:30:00Z",
        "2026-11-21T09:00:00Z",
    ]);
    all[0].tags = vec!["x".into(), "y".into()];
    assert_eq!(
        told("last = 1; hourly = 2; within_daily = \"1h\"; tags = [\"x\"]", &all, &TimeZone::UTC),
        [
            "+ 2026-11-20T08:00:00Z tagged [x]",
            "- 2026-11-21T08:00:00Z no such tag, last: 1 newer ones are kept, \
             hourly: 2 newer ones are kept, daily: not within 1h",
            "+ 2026-11-21T08:30:00Z hourly snapshot",
            "+ 2026-11-21T09:00:00Z last snapshot, hourly snapshot, daily within 1h",
        ]
    );
    assert_eq!(
        told("daily = 1", &all[1..], &TimeZone::UTC)[1],
        "- 2026-11-21T08:30:00Z daily: 1 newer ones are kept"
    );
    assert_eq!(
        told("daily = 2", &all, &TimeZone::UTC)[2],
        "- 2026-11-21T08:30:00Z daily: a newer one of that day is kept"
    );
}

#[test]
fn a_rule_that_is_not_full_keeps_the_oldest_and_says_so() {
    let all = items(&["2026-11-21T08:00:00Z", "2026-11-21T08:30:00Z", "2026-11-21T09:00:00Z"]);
    let oldest = |rules| kept(rules, &all, &TimeZone::UTC)[0].clone();
    assert_eq!(oldest("daily = 7"), "2026-11-21T08:00:00Z oldest daily snapshot");
    assert_eq!(oldest("yearly = -1"), "2026-11-21T08:00:00Z oldest yearly snapshot");
    assert_eq!(oldest("within_daily = \"2h\""), "2026-11-21T08:00:00Z oldest daily within 2h");
    assert_eq!(oldest("daily = \"2h\""), "2026-11-21T08:00:00Z oldest daily within 2h");
    assert_eq!(oldest("within_daily = \"50min\""), "2026-11-21T09:00:00Z daily within 50min");
    assert_eq!(oldest("daily = 1"), "2026-11-21T09:00:00Z daily snapshot");
    // A rule whose number is used up exactly by the last period has nothing left for the oldest.
    assert_eq!(kept("hourly = 2", &all, &TimeZone::UTC).len(), 2);
}

#[test]
fn weeks_begin_on_monday_and_belong_to_the_year_that_iso_gives_them() {
    // 2020 has 53 weeks; its last goes from Monday, 28 December to Sunday, 3 January 2021.
    let all = items(&["2020-12-27", "2020-12-28", "2020-12-31", "2021-01-03", "2021-01-04"]);
    assert_eq!(
        kept("weekly = 3", &all, &TimeZone::UTC),
        ["2020-12-27 weekly snapshot", "2021-01-03 weekly snapshot", "2021-01-04 weekly snapshot"]
    );
    assert_eq!(
        kept("yearly = 2", &all, &TimeZone::UTC),
        ["2020-12-31 yearly snapshot", "2021-01-04 yearly snapshot"]
    );
    // The week of 29 December 2025 is the first of 2026.
    let turn = items(&["2025-12-28", "2025-12-29", "2026-01-01", "2026-01-04", "2026-01-05"]);
    assert_eq!(kept("weekly = 2", &turn, &TimeZone::UTC).len(), 2);
    assert_eq!(kept("weekly = 2", &turn, &TimeZone::UTC)[0], "2026-01-04 weekly snapshot");
}

#[test]
fn periods_are_those_of_local_time_through_clock_changes() {
    // 2026-03-29 01:00 UTC: the clocks in Berlin go from 02:00 to 03:00.
    let spring = items(&["2026-03-29T00:30:00Z", "2026-03-29T00:59:00Z", "2026-03-29T01:00:00Z"]);
    assert_eq!(
        kept("hourly = 2", &spring, &berlin()),
        ["2026-03-29T00:59:00Z hourly snapshot", "2026-03-29T01:00:00Z hourly snapshot"]
    );
    // 2026-10-25 01:00 UTC: from 03:00 back to 02:00. The hour that comes twice is one.
    let autumn = items(&[
        "2026-10-24T23:30:00Z",
        "2026-10-25T00:30:00Z",
        "2026-10-25T01:30:00Z",
        "2026-10-25T02:30:00Z",
    ]);
    assert_eq!(
        kept("hourly = 3", &autumn, &berlin()),
        [
            "2026-10-24T23:30:00Z hourly snapshot",
            "2026-10-25T01:30:00Z hourly snapshot",
            "2026-10-25T02:30:00Z hourly snapshot"
        ]
    );
    assert_eq!(
        kept("hourly = 3", &autumn, &TimeZone::UTC)[0],
        "2026-10-25T00:30:00Z hourly snapshot"
    );
    // The day begins at local midnight, 22:00 or 23:00 UTC.
    let days = items(&["2026-10-24T21:59:00Z", "2026-10-24T22:00:00Z", "2026-10-25T22:59:00Z"]);
    assert_eq!(
        kept("daily = 2", &days, &berlin()),
        ["2026-10-24T21:59:00Z daily snapshot", "2026-10-25T22:59:00Z daily snapshot"]
    );
    // A length of one day from noon reaches to the noon before, 25 hours ago.
    let noon = items(&["2026-10-24T10:30:00Z", "2026-10-25T11:00:00Z"]);
    assert_eq!(kept("within = \"1d\"", &noon, &berlin()).len(), 2);
    assert_eq!(kept("within = \"24h\"", &noon, &berlin()).len(), 1);
}

#[test]
fn the_length_of_a_rule_ends_before_the_moment_it_reaches_to() {
    let all = items(&["2026-11-20T08:00:00Z", "2026-11-20T08:00:01Z", "2026-11-22T08:00:00Z"]);
    assert_eq!(kept("within = \"2d\"", &all, &TimeZone::UTC).len(), 2);
    assert_eq!(kept("within = \"19000y\"", &all, &TimeZone::UTC).len(), 3);
}

#[test]
fn held_future_and_young_snapshots_stay() {
    let now = at("2026-11-22T12:00:00Z");
    let mut all = items(&[
        "2026-11-20T12:00:00Z",
        "2026-11-21T12:00:00Z",
        "2026-11-22T11:30:00Z",
        "2026-11-22T11:59:00Z",
        "2026-11-23T12:00:00Z",
    ]);
    all[0].held = true;
    let policy = policy("last = 1");
    let asked = Asked { protect: Span::hours(1), ..asked(&policy) };
    let decisions = decide(&asked, &all, now, &TimeZone::UTC).unwrap();
    let reasons: Vec<_> = decisions.iter().map(|decision| decision.reasons.join(", ")).collect();
    assert_eq!(
        reasons,
        [
            "held",
            "last: 1 newer ones are kept",
            "protected: younger than 1h",
            "protected: younger than 1h, last snapshot",
            "in the future",
        ]
    );
    assert_eq!(decisions.iter().filter(|decision| !decision.keep).count(), 1);
}

#[test]
fn a_store_removes_only_what_its_schedule_made() {
    let mut all = items(&["2026-11-20", "2026-11-21", "2026-11-22"]);
    all[1].automatic = true;
    all[2].automatic = true;
    let policy = policy("last = 1");
    let asked = Asked { automatic_only: true, ..asked(&policy) };
    let decisions = decide(&asked, &all, at("2100-01-01"), &TimeZone::UTC).unwrap();
    let keep: Vec<bool> = decisions.iter().map(|decision| decision.keep).collect();
    assert_eq!(keep, [true, false, true]);
    assert_eq!(decisions[0].reasons, ["made by hand"]);
}

#[test]
fn policies_that_keep_nothing_are_refused_unless_that_is_wanted() {
    let now = at("2100-01-01");
    let mut all = items(&["2026-11-20", "2026-11-21"]);
    all[1].held = true;
    for (rules, part) in [
        ("", "would keep nothing"),
        ("last = 0", "keep nothing"),
        ("tags = [\"x\"]", "all of the 1"),
    ] {
        let policy = policy(rules);
        let refused = decide(&asked(&policy), &all, now, &TimeZone::UTC).unwrap_err();
        assert!(refused.to_string().contains(part), "{refused}");
        let wanted = Asked { allow_none: true, ..asked(&policy) };
        let decisions = decide(&wanted, &all, now, &TimeZone::UTC).unwrap();
        assert!(!decisions[0].keep && !decisions[0].reasons.is_empty());
        assert!(decisions[1].keep, "held");
    }
    // Where there is nothing to remove, there is nothing to refuse.
    let policy = policy("tags = [\"x\"]");
    assert!(decide(&asked(&policy), &all[1..], now, &TimeZone::UTC).is_ok());
    assert!(decide(&asked(&policy), &[], now, &TimeZone::UTC).unwrap().is_empty());
}

#[test]
fn of_one_time_the_last_is_the_newest() {
    let mut all = items(&["2026-11-20", "2026-11-20", "2026-11-19"]);
    all[1].name = "second".into();
    assert_eq!(kept("last = 1", &all, &TimeZone::UTC), ["second last snapshot"]);
}

#[test]
fn times_beyond_the_calendar_do_no_harm() {
    let mut all = items(&["2026-11-20", "2026-11-21"]);
    all[0].time = Timestamp { secs: i64::MIN, nanos: 0 };
    assert_eq!(kept("yearly = 2; within = \"1d\"", &all, &berlin()).len(), 2);
}

/// The rules said plainly: sets of periods, looked up for each snapshot.
fn plainly_kept(policy: &Policy, items: &[Item], zone: &TimeZone) -> BTreeSet<usize> {
    let zoned = |index: usize| to_jiff(items[index].time).unwrap().to_zoned(zone.clone());
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&index| (items[index].time, index));
    let Some((&oldest, &newest)) = order.first().zip(order.last()) else { return BTreeSet::new() };
    let mut kept = BTreeSet::new();
    let formats = ["", "%Y %m %d %H", "%Y %m %d", "%G %V", "%Y %m", "%Y"];
    let period = |index: usize, format: &str| match format {
        "" => format!("{:08}", order.iter().position(|&other| other == index).unwrap()),
        _ => zoned(index).strftime(format).to_string(),
    };
    let counts =
        [policy.last, policy.hourly, policy.daily, policy.weekly, policy.monthly, policy.yearly];
    let spans = [
        policy.within,
        policy.within_hourly,
        policy.within_daily,
        policy.within_weekly,
        policy.within_monthly,
        policy.within_yearly,
    ];
    let as_rules = spans.map(|span| span.map_or(Keep::Nothing, Keep::Within));
    for (keep, format) in counts.iter().zip(formats).chain(as_rules.iter().zip(formats)) {
        let (count, from) = match keep {
            Keep::Nothing => continue,
            Keep::Count(count) => (*count as usize, None),
            Keep::Unlimited => (usize::MAX, None),
            Keep::Within(span) => (usize::MAX, span.before(items[newest].time, zone)),
        };
        // The newest of each period, by period; the text of a period sorts as its time does.
        let mut newest_of: BTreeMap<String, usize> = BTreeMap::new();
        for &index in order.iter().filter(|&&index| Some(items[index].time) > from) {
            newest_of.insert(period(index, format), index);
        }
        kept.extend(newest_of.values().rev().take(count));
        if newest_of.len() < count && Some(items[oldest].time) > from {
            kept.insert(oldest);
        }
    }
    let fits = |rule: &TagRule, tags: &[String]| match String::from(rule.clone()).as_str() {
        "" => tags.is_empty(),
        text => text.split(',').all(|wanted| tags.iter().any(|tag| tag == wanted)),
    };
    for &index in &order {
        if policy.tags.iter().any(|rule| fits(rule, &items[index].tags)) {
            kept.insert(index);
        }
    }
    kept
}

fn any_keep() -> impl Strategy<Value = Keep> {
    prop_oneof![
        4 => Just(Keep::Nothing),
        4 => (1u64..8).prop_map(Keep::Count),
        1 => Just(Keep::Unlimited),
        2 => any_span().prop_map(Keep::Within),
    ]
}

fn any_span() -> impl Strategy<Value = Span> {
    let lengths = ["1h", "5h", "1d", "3d", "1w", "1m", "2m3d", "1y", "1y1h"];
    prop::sample::select(lengths.to_vec()).prop_map(|text| text.parse().unwrap())
}

prop_compose! {
    fn any_policy()(
        counts in prop::array::uniform6(any_keep()),
        spans in prop::array::uniform6(prop::option::weighted(0.2, any_span())),
        tags in prop::collection::vec(prop::sample::select(vec!["", "a", "b", "a,b"]), 0..2),
    ) -> Policy {
        let [last, hourly, daily, weekly, monthly, yearly] = counts;
        let [within, within_hourly, within_daily, within_weekly, within_monthly, within_yearly] =
            spans;
        let tags = tags.into_iter().map(|text| text.parse().unwrap()).collect();
        Policy {
            last, hourly, daily, weekly, monthly, yearly, within, within_hourly, within_daily,
            within_weekly, within_monthly, within_yearly, tags,
        }
    }
}

prop_compose! {
    /// Snapshots around a clock change, hours, days or months apart.
    fn any_items()(
        steps in prop::collection::vec((0usize..3, 0i64..40), 0..40),
        tags in prop::collection::vec(prop::sample::subsequence(vec!["a", "b"], 0..=2), 40),
    ) -> Vec<Item> {
        let mut time = at("2026-10-26");
        let mut items = Vec::new();
        for (number, ((unit, count), tags)) in steps.into_iter().zip(tags).enumerate() {
            time.secs -= [600, 3 * 3_600, 2 * 86_400][unit] * count;
            let tags = tags.into_iter().map(String::from).collect();
            let name = number.to_string();
            items.push(Item { name, time, tags, held: false, automatic: true });
        }
        items.reverse();
        items
    }
}

proptest! {
    #[test]
    fn a_policy_keeps_what_its_rules_say_plainly(policy in any_policy(), items in any_items()) {
        let zone = berlin();
        let asked = Asked { allow_none: true, ..asked(&policy) };
        let decisions = decide(&asked, &items, at("2100-01-01"), &zone).unwrap();
        let kept: BTreeSet<usize> = (0..items.len()).filter(|&i| decisions[i].keep).collect();
        prop_assert_eq!(kept, plainly_kept(&policy, &items, &zone));
        prop_assert!(decisions.iter().all(|decision| !decision.reasons.is_empty()));
    }

    #[test]
    fn what_a_policy_kept_it_keeps_again(policy in any_policy(), items in any_items()) {
        let zone = berlin();
        let asked = Asked { allow_none: true, ..asked(&policy) };
        let decisions = decide(&asked, &items, at("2100-01-01"), &zone).unwrap();
        let left: Vec<Item> =
            items.iter().zip(&decisions).filter(|(_, d)| d.keep).map(|(i, _)| i.clone()).collect();
        let again = decide(&asked, &left, at("2100-01-01"), &zone).unwrap();
        for (item, decision) in left.iter().zip(&again) {
            prop_assert!(decision.keep, "{}: {:?}", item.name, decision.reasons);
        }
    }
}

type Tick = (Generation, Timestamp);

/// The thinning said plainly: at every end of an hour or day, look up what was in force.
fn plain_moments(tiers: &Tiers, ticks: &[Tick], zone: &TimeZone, now: Timestamp) -> Thinning {
    let in_force = |fits: &dyn Fn(Timestamp) -> bool| {
        ticks.iter().rev().find(|(_, time)| fits(*time)).map(|(generation, _)| *generation)
    };
    let before = |span: Span| Timestamp { secs: now.secs - span.even_secs() as i64, ..now };
    let (all, hourly, daily) = (before(tiers.all), before(tiers.hourly), before(tiers.daily));
    let first = ticks.first().map_or(Generation(0), |(generation, _)| *generation);
    let horizon = in_force(&|time| time <= all).unwrap_or(first);
    let mut keep = BTreeSet::new();
    let mut end = Timestamp { secs: daily.secs - daily.secs.rem_euclid(900), nanos: 0 };
    while end <= all {
        let local = |secs: i64| {
            let time = to_jiff(Timestamp { secs, nanos: 0 }).unwrap();
            time.to_zoned(zone.clone()).strftime("%d %H").to_string()
        };
        let (ended, begun) = (local(end.secs - 1), local(end.secs));
        let hour_ends = end > hourly && ended != begun;
        let day_ends = end > daily && end <= hourly && ended[..2] != begun[..2];
        if hour_ends || day_ends {
            keep.extend(in_force(&|time| time < end).filter(|generation| *generation < horizon));
        }
        end.secs += 900;
    }
    Thinning { horizon, keep: keep.into_iter().collect() }
}

fn thin(tiers: &Tiers, ticks: &[Tick], now: Timestamp) -> Thinning {
    moments(tiers, Span::ZERO, ticks.iter().copied(), &berlin(), now)
}

#[test]
fn moments_are_the_ends_of_hours_then_of_days() {
    let now = at("2026-11-22T12:30:00Z");
    let ticks: Vec<Tick> = [
        "2026-10-01T10:00:00Z", // in force at no end of a day that counts
        "2026-10-20T10:00:00Z", // in force until 10-30: at ends of days within 30 days
        "2026-10-30T10:00:00Z",
        "2026-10-30T11:00:00Z", // the last of its day
        "2026-11-20T10:00:00Z",
        "2026-11-20T10:59:59Z", // the last of its hour
        "2026-11-20T11:00:00Z", // in force at the ends of the hours until it was replaced
        "2026-11-20T14:10:00Z", // in force 24 hours ago
        "2026-11-22T11:45:00Z",
        "2026-11-22T12:00:00Z",
    ]
    .iter()
    .zip(1..)
    .map(|(text, number)| (Generation(number), at(text)))
    .collect();
    let thinning = thin(&Tiers::default(), &ticks, now);
    assert_eq!(thinning.horizon, Generation(8));
    assert_eq!(thinning.keep, [2, 4, 6, 7].map(Generation));
    // Nothing of what is protected is thinned.
    let long = moments(&Tiers::default(), Span::days(60), ticks.iter().copied(), &berlin(), now);
    assert_eq!(long, Thinning { horizon: Generation(1), keep: vec![] });
    let none = thin(&Tiers::default(), &[], now);
    assert_eq!(none, Thinning { horizon: Generation(0), keep: vec![] });
    assert_eq!(thin(&Tiers::default(), &ticks[8..], now).horizon, Generation(9));
}

prop_compose! {
    /// Ticks that end around a clock change in autumn.
    fn any_ticks()(steps in prop::collection::vec((0usize..3, 0i64..50), 0..60)) -> Vec<Tick> {
        let mut time = at("2026-10-27");
        let mut ticks = Vec::new();
        for (number, (unit, count)) in steps.into_iter().enumerate() {
            time.secs -= [150, 900, 6 * 3_600][unit] * count;
            ticks.push((Generation(1_000 - number as u64), time));
        }
        ticks.reverse();
        ticks
    }
}

fn any_tiers() -> impl Strategy<Value = Tiers> {
    let tiers = |(all, hourly, daily): (u32, u32, u32)| Tiers {
        all: Span::hours(all),
        hourly: Span::hours(all + hourly),
        daily: Span::hours(all + hourly + daily),
        ..Tiers::default()
    };
    (0u32..30, 0u32..100, 0u32..400).prop_map(tiers)
}

/// Generations that come several to one time: (the first of it, its time).
fn several(ticks: &[Tick], sizes: &[u64]) -> Vec<Tick> {
    let mut next = 1;
    let mut first = |size: u64| {
        let first = Generation(next);
        next += size;
        first
    };
    ticks.iter().zip(sizes).map(|((_, time), size)| (first(*size), *time)).collect()
}

#[test]
fn of_one_time_the_last_generation_is_seen() {
    let tick = |g, secs| (Generation(g), Timestamp { secs, nanos: 0 });
    let ticks = [tick(5, 50), tick(9, 90)];
    let newest = Generation(11);
    assert_eq!(
        seen(&[tick(2, 20)], tick(5, 50), &ticks, newest),
        [tick(2, 20), tick(8, 50), tick(11, 90)]
    );
    assert_eq!(seen(&[], tick(7, 50), &ticks[1..], newest), [tick(8, 50), tick(11, 90)]);
    assert_eq!(seen(&[], tick(10, 90), &[], newest), [tick(11, 90)]);
}

proptest! {
    #[test]
    fn moments_are_what_was_in_force_at_the_ends(
        ticks in any_ticks(), tiers in any_tiers(), later in 0i64..200_000,
    ) {
        let now = Timestamp { secs: at("2026-10-27").secs + later, nanos: 0 };
        prop_assert_eq!(thin(&tiers, &ticks, now), plain_moments(&tiers, &ticks, &berlin(), now));
    }

    #[test]
    fn thinning_in_steps_keeps_the_same_as_at_once(
        ticks in any_ticks(), tiers in any_tiers(),
        sizes in prop::collection::vec(1u64..4, 60),
        steps in prop::collection::vec(0i64..50_000, 1..30),
    ) {
        let mut now = Timestamp { secs: at("2026-10-27").secs - 20 * 86_400, nanos: 0 };
        let ticks = several(&ticks, &sizes);
        let end = ticks.last().map_or(0, |(first, _)| first.0 + sizes[ticks.len() - 1]);
        // As a store has it: the kept ones below the horizon with their times, and the horizon.
        let mut kept: Vec<Tick> = Vec::new();
        let mut horizon = ticks.first().copied().unwrap_or((Generation(1), now));
        for step in steps {
            now.secs += step;
            let happened = ticks.iter().take_while(|(_, time)| *time <= now).count();
            let (Some(first), true) = (ticks.first(), happened > 0) else { continue };
            let newest = Generation(ticks.get(happened).map_or(end, |(next, _)| next.0) - 1);
            let all = seen(&[], *first, &ticks[..happened], newest);
            let from = ticks[..happened].iter().filter(|(g, _)| *g >= horizon.0);
            let left = seen(&kept, horizon, &from.copied().collect::<Vec<_>>(), newest);
            let thinning = thin(&tiers, &left, now);
            prop_assert_eq!(&thinning, &thin(&tiers, &all, now));
            let time_of = |at| *left.iter().find(|(generation, _)| *generation == at).unwrap();
            kept = thinning.keep.iter().copied().map(time_of).collect();
            horizon = time_of(thinning.horizon);
        }
    }
}

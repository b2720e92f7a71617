//! The store's own policy at work on a mount, with spans of seconds: what the defaults do in days
//! and months.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

use common::json::{all, parsed, texts};
use common::{Mounted, wait_until};
use serde_json::Value;

/// Between two versions.
const PACE_SECS: f64 = 0.05;
const PROTECT_SECS: f64 = 4.0;
const ALL_SECS: f64 = 6.0;
const DELETED_SECS: f64 = 14.0;
/// What lived shorter is not kept as deleted.
const LIFE_SECS: f64 = 31.0;
/// Below its hours and days, which are no longer, nothing continuous is kept.
const POLICY: &str = r#"
every = "1s"
protect = "4s"
[snapshots]
last = 2
tags = ["keep"]
[versions]
all = "6s"
hourly = "6s"
daily = "6s"
deleted = "14s"
"#;

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
}

/// One version of the file that is written all the time: its number, and when it was complete.
struct Written {
    number: usize,
    time: f64,
}

/// Writes versions until `until` is over, and tells when each was complete.
fn write_on(store: &Mounted, written: &mut Vec<Written>, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain");
        let number = written.len();
        // In one write, so that no snapshot meets it empty.
        let mut file = fs::OpenOptions::new().write(true).open(store.path("f")).unwrap();
        file.write_all(format!("version {number:06}").as_bytes()).unwrap();
        drop(file);
        written.push(Written { number, time: now() });
        let next = now() + PACE_SECS;
        wait_until("the next version is due", 60, || now() >= next);
    }
}

fn list(store: &Mounted) -> Vec<Value> {
    let list = parsed(store.rearview(&["snapshot", "list", "--json"]));
    all(&list, "snapshots")[0].as_array().unwrap().clone()
}

fn names(store: &Mounted, automatic: bool) -> Vec<String> {
    let made = list(store).into_iter().filter(|one| one["automatic"] == automatic);
    made.map(|one| one["name"].as_str().unwrap().to_string()).collect()
}

/// The numbers of the versions of the file that can still be read.
fn readable(store: &Mounted) -> BTreeSet<usize> {
    let folder = store.path(".snapshots/.versions/f");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        // One may be thinned out between the listing and the reading.
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        found.extend(text.strip_prefix("version ").and_then(|number| number.parse::<usize>().ok()));
    }
    found
}

#[test]
fn a_store_keeps_what_its_policy_says_and_nothing_older() {
    let mut store = Mounted::new();
    store.set_policy(POLICY);
    fs::write(store.path("f"), "begun").unwrap();
    let mut written = Vec::new();
    // By the schedule, while something changes.
    write_on(&store, &mut written, || names(&store, true).len() >= 3);
    let held = names(&store, true)[0].clone();
    store.rearview(&["snapshot", "hold", &held]).ok();
    store.rearview(&["snapshot", "create", "by-hand"]).ok();
    let tagged = ["snapshot", "create", "--automatic", "--tag", "keep", "tagged"];
    store.rearview(&tagged).ok();
    // Until the first versions are too old to be kept, and most snapshots are not protected.
    let begun = written[0].time;
    write_on(&store, &mut written, || now() - begun > ALL_SECS + 3.0);

    let plan = parsed(store.rearview(&["prune", "-n", "--json"]));
    let told: Vec<&Value> = all(&plan, "reasons");
    assert_eq!(told.len(), texts(&plan, "name").len(), "{plan}");
    assert!(told.iter().all(|reasons| !reasons.as_array().unwrap().is_empty()), "{plan}");
    let reasons = plan.to_string();
    for reason in ["held", "made by hand", "tagged [keep]", "last snapshot", "protected: younger"] {
        assert!(reasons.contains(reason), "no '{reason}' in {plan}");
    }
    assert!(reasons.contains("last: 2 newer ones are kept"), "{plan}");

    let automatic: BTreeSet<String> = names(&store, true).into_iter().collect();
    let before = now();
    store.rearview(&["prune"]).ok();
    let left = readable(&store);
    let read = now();
    // The protected window is not cut into.
    for one in written.iter().filter(|one| one.time > read - PROTECT_SECS) {
        assert!(left.contains(&one.number), "{} is protected: {left:?}", one.number);
    }
    let snapshots = list(&store);
    let kept: BTreeSet<String> = names(&store, true).into_iter().collect();
    assert!(kept.contains(&held) && kept.contains("tagged"), "{kept:?}");
    assert!(names(&store, false).contains(&"by-hand".to_string()));
    assert!(kept.len() < automatic.len(), "{kept:?} of {automatic:?}");
    let excess: Vec<&String> =
        kept.iter().filter(|name| **name != held && *name != "tagged").collect();
    // Two by number, and one for each second of the protected window, its two ends included.
    assert!(excess.len() <= 2 + PROTECT_SECS as usize + 2 + (read - before) as usize, "{excess:?}");
    // What is older than all tiers is shown by snapshots only.
    let shown: BTreeSet<usize> = snapshots
        .iter()
        .filter_map(|one| {
            let path = store.past(one["name"].as_str().unwrap()).join("f");
            fs::read_to_string(path).ok()?.strip_prefix("version ")?.parse().ok()
        })
        .collect();
    for (one, next) in written.iter().zip(&written[1..]) {
        // A moment goes on until the next version; times are kept in whole seconds.
        if next.time < before - ALL_SECS - 1.0 && !shown.contains(&one.number) {
            assert!(
                !left.contains(&one.number),
                "{} is too old: {left:?}, shown: {shown:?}, {snapshots:?}",
                one.number
            );
        }
    }
    assert!(left.len() < written.len());
    store.finish();
}

#[test]
fn the_schedule_makes_no_snapshot_of_what_did_not_change() {
    let mut store = Mounted::new();
    store.set_policy(POLICY);
    fs::write(store.path("f"), "once").unwrap();
    wait_until("a snapshot by the schedule", 60, || names(&store, true).len() == 1);
    let first = names(&store, true);
    let begun = Instant::now();
    wait_until("the schedule had two more occasions", 60, || begun.elapsed().as_secs() >= 3);
    assert_eq!(names(&store, true), first);
    fs::write(store.path("f"), "twice").unwrap();
    wait_until("the next snapshot", 60, || names(&store, true).len() == 2);
    let newest = names(&store, true).pop().unwrap();
    assert_eq!(fs::read_to_string(store.past(&newest).join("f")).unwrap(), "twice");
    store.finish();
}

#[test]
fn the_last_state_of_what_was_deleted_outlives_all_other_history() {
    let mut store = Mounted::new();
    store.set_policy(&POLICY.replace("every = \"1s\"", "every = \"0\""));
    fs::write(store.path("gone"), "earlier").unwrap();
    let born = now();
    // What lived shorter than half a minute is no loss.
    fs::write(store.path("fleeting"), "x").unwrap();
    fs::remove_file(store.path("fleeting")).unwrap();
    let lived = || now() > born + LIFE_SECS;
    wait_until("the file has lived long enough", 60, lived);
    fs::write(store.path("gone"), "the last state").unwrap();
    fs::remove_file(store.path("gone")).unwrap();
    let deleted = now();
    fs::write(store.path("other"), "goes on").unwrap();
    let lost = |name: &str| store.path(".snapshots/.deleted").join(name);
    wait_until("all else that is so old is forgotten", 60, || now() > deleted + ALL_SECS + 2.0);
    store.rearview(&["prune"]).ok();
    if now() < deleted + DELETED_SECS {
        assert_eq!(fs::read_to_string(lost("gone")).unwrap(), "the last state");
    }
    assert!(!lost("fleeting").exists());
    wait_until("the deleted file is forgotten in its turn", 60, || {
        store.rearview(&["prune"]).ok();
        let is_there = lost("gone").exists();
        assert!(is_there || now() > deleted + DELETED_SECS, "forgotten too early");
        !is_there
    });
    store.finish();
}

/// What is left of an instant that was thinned out is no whole tree: who stands in it is told, and
/// is not shown a part of it.
#[test]
fn an_instant_that_is_thinned_out_is_stale_for_who_stands_in_it() {
    let mut store = Mounted::new();
    let short = "every = \"0\"\nprotect = \"1s\"\n[versions]\nall = \"2s\"\n";
    store.set_policy(&format!("{short}hourly = \"2s\"\ndaily = \"2s\""));
    fs::write(store.path("f"), "old").unwrap();
    fs::write(store.path("g"), "old").unwrap();
    let old = now();
    wait_until("the next second", 10, || now() > old + 1.5);
    fs::write(store.path("f"), "new").unwrap();
    fs::remove_file(store.path("g")).unwrap();
    let instant = store.path(&format!(".snapshots/.at/@{}", old as u64 + 1));
    let folder = fs::File::open(&instant).unwrap();
    let standing = format!("/proc/self/fd/{}", folder.as_raw_fd());
    assert_eq!(fs::read_to_string(format!("{standing}/f")).unwrap(), "old");
    wait_until("the instant is old", 20, || now() > old + 5.0);
    fs::write(store.path("f"), "newest").unwrap();
    store.rearview(&["prune"]).ok();
    let error = fs::read_to_string(format!("{standing}/g")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}");
    drop(folder);
    // Asked for anew it is none: the oldest state that is kept is not what was then.
    assert!(!instant.exists());
    store.finish();
}

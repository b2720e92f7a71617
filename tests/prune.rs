//! `rearview prune`, end to end: what stays, what goes, and what is said about it.

mod common;

use std::fs;

use common::Mounted;
use common::json::{all, parsed, texts};
use common::mounted::word;
use common::run::rearview;

fn names(store: &Mounted) -> Vec<String> {
    texts(&parsed(store.rearview(&["snapshot", "list", "--json"])), "name")
}

/// A store with snapshots of these names, oldest first; a name with `:` has tags behind it.
fn with_snapshots(names: &[&str]) -> Mounted {
    let store = Mounted::new();
    for (number, name) in names.iter().enumerate() {
        fs::write(store.path("f"), number.to_string()).expect("a file can be written");
        match name.split_once(':') {
            Some((name, tags)) => {
                let made = store.rearview(&["snapshot", "create", "--tag", tags, name]);
                assert!(made.ok().contains("created"));
            }
            None => store.snapshot(name),
        }
    }
    store
}

#[test]
fn what_no_option_keeps_is_removed_and_everything_has_its_reason() {
    let store = with_snapshots(&["a", "b:release,v1", "c", "held", "d", "e"]);
    store.rearview(&["snapshot", "hold", "held"]).ok();
    assert!(store.rearview(&["snapshot", "list"]).ok().contains("[release, v1]"));
    let options = ["prune", "--keep-last", "2", "--keep-tag", "release"];
    let dry: Vec<&str> = options.iter().copied().chain(["-n"]).collect();
    let told = store.rearview(&dry).ok();
    for part in [
        "keep 4 snapshots:",
        "would remove 2 snapshots:",
        "last snapshot",
        "tagged [release]",
        "held",
        "last: 2 newer ones are kept",
        "2 to remove, 4 to keep; nothing was removed",
    ] {
        assert!(told.contains(part), "no '{part}' in {told}");
    }
    assert_eq!(names(&store).len(), 6, "a dry run removes nothing");
    let told = store.rearview(&options).ok();
    assert!(told.contains("2 removed, 4 kept"), "{told}");
    assert_eq!(names(&store), ["b", "held", "d", "e"]);
    assert!(!store.past("a").exists() && store.past("d").exists());
    // All is as the policy wants it: once more changes nothing.
    let json = parsed(store.rearview(&[&options[..], &["--json"]].concat()));
    assert_eq!(all(&json, "dropped")[0].as_array().map(Vec::len), Some(0));
    assert_eq!(texts(&json, "name"), ["b", "held", "d", "e"]);
    store.finish();
}

#[test]
fn what_would_keep_nothing_is_refused() {
    let store = with_snapshots(&["a", "b", "held"]);
    store.rearview(&["snapshot", "hold", "held"]).ok();
    let last = ["prune", "--keep-last", "0"];
    store.rearview(&last).fails(1, &["refused", "keep nothing", "--keep-daily 7"]);
    let tag = ["prune", "--keep-tag", "x"];
    store.rearview(&tag).fails(1, &["all of the 2", "--unsafe-allow-remove-all"]);
    store.rearview(&["prune", "--unsafe-allow-remove-all"]).fails(2, &["--keep"]);
    store.rearview(&["prune", "--keep-daily", "often"]).fails(2, &["'often'", "14d"]);
    store.rearview(&["snapshot", "create", "--tag", "", "x"]).fails(1, &["tag", "empty"]);
    assert_eq!(names(&store).len(), 3);
    store.rearview(&[&last[..], &["--unsafe-allow-remove-all"]].concat()).ok();
    assert_eq!(names(&store), ["held"]);
    store.finish();
}

#[test]
fn the_stores_own_policy_leaves_alone_what_a_person_made() {
    let mut store = with_snapshots(&["a", "b"]);
    store.rearview(&["snapshot", "create", "--automatic", "c"]).ok();
    let told = store.rearview(&["prune"]).ok();
    assert!(told.contains("made by hand") && told.contains("protected: younger than 1h"), "{told}");
    assert_eq!(names(&store), ["a", "b", "c"]);
    store.unmount();
    // Unmounted, only a look is possible; the path is a backing.
    let backing = word(&store.backings[1]);
    let told = rearview(["prune", "-n", &backing, "--keep-last", "1"]).ok();
    assert!(told.contains("2 to remove, 1 to keep"), "{told}");
    assert!(rearview(["prune", "-n", &backing]).ok().contains("0 to remove, 3 to keep"));
    rearview(["prune", &backing, "--keep-last", "1"]).fails(10, &["not mounted"]);
}

#[test]
fn saved_options_are_the_stores_policy_on_every_backing() {
    let mut store = with_snapshots(&["a", "b"]);
    store.rearview(&["snapshot", "create", "--automatic", "c"]).ok();
    let told = store.rearview(&["prune", "--keep-last", "2", "--keep-tag", "x,y", "--save"]).ok();
    assert!(told.contains("1 removed") && told.contains("the store's policy now"), "{told}");
    store.remount();
    store.unmount();
    for backing in &store.backings {
        let marker = fs::read_to_string(backing.join(".rearview/store.toml")).expect("a marker");
        let saved = "[policy.snapshots]\nlast = 2\ntags = [\"x,y\"]\n";
        assert!(marker.contains(saved), "{marker}");
    }
    assert!(rearview(["prune", "-n", &word(&store.backings[0])]).ok().contains("2 to keep"));
}

#[test]
fn a_read_only_mount_is_looked_at_only() {
    let mut store = with_snapshots(&["a", "b"]);
    store.unmount();
    store.set_options(&["-o", "ro"]);
    store.mount().ok();
    assert!(store.rearview(&["prune", "-n", "--keep-last", "1"]).ok().contains("1 to remove"));
    store.rearview(&["prune", "--keep-last", "1"]).fails(1, &["-o ro"]);
    assert_eq!(names(&store), ["a", "b"]);
    store.unmount();
}

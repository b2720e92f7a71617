//! What the kernel may keep of the past, and what is at hand of it.

use super::*;
use crate::past::ino::ROOT_SNAPSHOTS;

#[test]
fn names_of_snapshots_last_in_the_root_alone() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    store.file(dir, "f", "1");
    let past = store.past();
    assert!(!past.enter(ROOT).expect("entered").lasting, "its times are those of the live root");
    let made = store.snapshot("s");
    for entry in [past.enter(ROOT), past.stat(ROOT_SNAPSHOTS.encode())] {
        let entry = entry.expect("it is there");
        assert_eq!((entry.lasting, entry.stat.mtime), (true, made.time));
    }
    let lasts = |dir, path: &str| past.walk(dir, path).expect(path).lasting;
    assert!(lasts(ROOT, "s") && lasts(ROOT, "s/d/f"));
    let gmt = crate::time::gmt_name(made.time);
    for path in ["latest", ".at", ".at/now", ".versions", ".deleted", &gmt] {
        assert!(!lasts(ROOT, path), "{path}");
    }
    assert!(!past.enter(dir).expect("entered").lasting && !lasts(dir, "s"));
    assert!(lasts(dir, "s/f"));
}

#[test]
fn the_root_counts_as_entered_whatever_is_forgotten() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    let past = store.past();
    past.enter(dir).expect("entered");
    assert_eq!(past.forget(), [dir, ROOT]);
    past.enter(ROOT).expect("entered");
    assert_eq!(past.forget(), [ROOT]);
}

#[test]
fn what_a_listing_has_at_hand_is_what_lookups_find() {
    let store = Store::new();
    let src = store.dir(ROOT, "src");
    let first = store.file(src, "a", "one");
    store.link(first, ROOT, "linked");
    store.file(src, "b", "two");
    store.dir(src, "c");
    store.make(src, "d", Kind::Symlink);
    store.snapshot("first");
    store.remove(src, "a");
    store.chmod(src, 0o700);
    store.remove(src, "b");
    store.rename(src, "c", ROOT, "moved");
    let past = store.past();
    let dir = past.walk(ROOT, "first/src").expect("the directory").stat.ino;
    let inos: Vec<u64> = past.list(dir).expect("a listing").iter().map(|line| line.ino).collect();
    past.expect(dir, &inos).expect("states");
    // A past of its own looks all of it up.
    let other = store.past();
    let found = other.walk(ROOT, "first/src").expect("the directory").stat.ino;
    for line in other.list(found).expect("a listing") {
        let looked_up = other.lookup(found, &line.name).expect("an entry");
        assert_eq!(past.stat(line.ino).expect("an entry"), looked_up, "{}", line.name);
    }
    assert_eq!(inos.len(), 4);
    assert_eq!(past.stat(inos[0]).expect("the file").stat.nlink, 2);
    assert!(past.is_whole());
    past.forget();
    assert!(!past.is_whole());
}

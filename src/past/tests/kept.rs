//! What the kernel may keep of the past.

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

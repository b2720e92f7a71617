//! What an import recognises after an end that lost the last commits.

use super::*;
use crate::catalog::{Base, Change};

/// `names` with contents of equal size and time.
fn write_alike(root: &Path, names: &[&str]) {
    for name in names {
        let path = root.join(name);
        write(&path, format!("hello {name}").as_bytes());
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        fs::File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        // Births are told apart by the clock's ticks; wait for the next.
        let born = fs::metadata(&path).unwrap().created().unwrap();
        let next = root.join(".rearview-tick");
        loop {
            fs::write(&next, b"").unwrap();
            let now = fs::metadata(&next).unwrap().created().unwrap();
            fs::remove_file(&next).unwrap();
            if now > born {
                break;
            }
        }
    }
}

/// What a death leaves on the backing: the file under its name in `preserved/`.
pub(super) fn preserve(root: &Path, name: &str, of: (NodeId, ContentId), remove: bool) {
    let (node, content) = of;
    let shard = root.join(format!(".rearview/preserved/{:02x}", node.0 & 0xff));
    fs::create_dir_all(&shard).unwrap();
    let kept = shard.join(format!("{:016x}.{:016x}", node.0, content.0));
    match remove {
        true => fs::rename(root.join(name), kept).unwrap(),
        false => fs::hard_link(root.join(name), kept).unwrap(),
    }
}

fn row_at(catalog: &Catalog, name: &str) -> NodeRow {
    catalog.node(id_of(catalog, name)).unwrap().unwrap()
}

/// Opens with the given contents found in `preserved/`, as history recovery would.
pub(super) fn open_with_preserved(bench: &Bench, names: &[&str], found: &[ContentId]) -> Store {
    let recover = |_: &ReplicaSet, catalog: &Catalog, _| {
        for &id in found {
            catalog.push(vec![Change::ContentPreserved { id, cloned: false }])?;
        }
        Ok(())
    };
    let paths = bench.paths(names);
    open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap()
}

#[test]
fn a_rename_over_a_file_of_equal_size_and_time_is_seen_as_such() {
    let bench = Bench::new();
    let a = bench.path("a");
    write_alike(&a, &["f1", "f2", "f3", "f4", "f5"]);
    bench.settle(&["a"]);
    let store = bench.open(&["a"]).unwrap();
    let (f3, f4) = (row_at(&store.catalog, "f3"), row_at(&store.catalog, "f4"));
    drop(store);
    bench.lose_logs();
    preserve(&a, "f4", (f4.id, f4.content), false);
    fs::rename(a.join("f3"), a.join("f4")).unwrap();
    let store = open_with_preserved(&bench, &["a"], &[f4.content]);
    assert_eq!(row_at(&store.catalog, "f4"), f3);
    assert_eq!(store.catalog.node(f4.id).unwrap(), None, "what it replaced is gone");
    assert_recorded(&store.catalog, &a);
}

#[test]
fn a_file_renamed_to_a_freed_name_of_equal_size_and_time_is_seen_as_such() {
    let bench = Bench::new();
    let a = bench.path("a");
    write_alike(&a, &["f1", "f2", "f3"]);
    bench.settle(&["a"]);
    let store = bench.open(&["a"]).unwrap();
    let (f1, f2) = (row_at(&store.catalog, "f1"), row_at(&store.catalog, "f2"));
    drop(store);
    bench.lose_logs();
    preserve(&a, "f1", (f1.id, f1.content), true);
    fs::rename(a.join("f2"), a.join("f1")).unwrap();
    let store = open_with_preserved(&bench, &["a"], &[f1.content]);
    assert_eq!(row_at(&store.catalog, "f1"), f2);
    assert_recorded(&store.catalog, &a);
}

#[test]
fn chains_and_rings_of_renames_among_files_that_look_alike_are_followed_by_their_births() {
    let bench = Bench::new();
    let a = bench.path("a");
    write_alike(&a, &["f1", "f2", "f3", "f4", "f5"]);
    bench.settle(&["a"]);
    let store = bench.open(&["a"]).unwrap();
    let id = |name| id_of(&store.catalog, name);
    let ids = [id("f1"), id("f2"), id("f3"), id("f4")];
    let f5 = row_at(&store.catalog, "f5");
    drop(store);
    bench.lose_logs();
    fs::rename(a.join("f1"), a.join("x")).unwrap();
    fs::rename(a.join("f2"), a.join("f1")).unwrap();
    fs::rename(a.join("x"), a.join("f2")).unwrap();
    preserve(&a, "f5", (f5.id, f5.content), false);
    fs::rename(a.join("f4"), a.join("f5")).unwrap();
    fs::rename(a.join("f3"), a.join("f4")).unwrap();
    let store = open_with_preserved(&bench, &["a"], &[f5.content]);
    let id = |name| id_of(&store.catalog, name);
    assert_eq!([id("f2"), id("f1"), id("f4"), id("f5")], ids);
    assert_recorded(&store.catalog, &a);
}

#[test]
fn a_hard_linked_file_renamed_over_another_keeps_its_node() {
    let bench = Bench::new();
    let a = bench.path("a");
    write_alike(&a, &["f1", "f2"]);
    fs::hard_link(a.join("f2"), a.join("g2")).unwrap();
    bench.settle(&["a"]);
    let store = bench.open(&["a"]).unwrap();
    let (f1, f2) = (row_at(&store.catalog, "f1"), row_at(&store.catalog, "f2"));
    drop(store);
    bench.lose_logs();
    preserve(&a, "f1", (f1.id, f1.content), false);
    fs::rename(a.join("f2"), a.join("f1")).unwrap();
    let store = open_with_preserved(&bench, &["a"], &[f1.content]);
    assert_eq!(id_of(&store.catalog, "f1"), f2.id);
    assert_eq!(id_of(&store.catalog, "g2"), f2.id);
    assert_recorded(&store.catalog, &a);
}

#[test]
fn a_file_cloned_before_it_was_overwritten_is_a_later_content() {
    let bench = Bench::new();
    let a = bench.path("a");
    write_alike(&a, &["f1"]);
    bench.settle(&["a"]);
    let store = bench.open(&["a"]).unwrap();
    let f1 = row_at(&store.catalog, "f1");
    drop(store);
    bench.lose_logs();
    let store = open_with_preserved(&bench, &["a"], &[f1.content]);
    let now = row_at(&store.catalog, "f1");
    assert_eq!(now.id, f1.id);
    assert!(now.content > f1.content);
}

#[test]
fn what_was_changed_behind_our_back_is_kept_from_another_replica() {
    let bench = Bench::new();
    let a = bench.path("a");
    write(&a.join("d/edited"), b"as it was recorded");
    write(&a.join("gone"), b"the last of it");
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let (edited, gone) = (row_at(&store.catalog, "d/edited"), row_at(&store.catalog, "gone"));
    drop(store);
    bench.lose_logs();
    write(&a.join("d/edited"), b"edited");
    fs::remove_file(a.join("gone")).unwrap();
    let store = bench.open(&["a", "b"]).unwrap();
    assert!(row_at(&store.catalog, "d/edited").content > edited.content);
    for (row, bytes) in [(&edited, &b"as it was recorded"[..]), (&gone, b"the last of it")] {
        let sources = store.catalog.sources(row.id, row.content).unwrap();
        assert!(matches!(sources.base, Base::Preserved { content, .. } if content == row.content));
        let (shard, node, content) = (row.id.0 & 0xff, row.id.0, row.content.0);
        let kept = format!(".rearview/preserved/{shard:02x}/{node:016x}.{content:016x}");
        for name in ["a", "b"] {
            assert_eq!(fs::read(bench.path(name).join(&kept)).unwrap(), bytes, "{name}");
        }
    }
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b"]);
}

/// A power cut kept a directory on one replica only, with a second name of a file that both had.
/// The name went to quarantine with the directory, and the replicas differed in the file's links.
#[test]
fn a_directory_in_quarantine_has_no_name_of_a_file_that_stays() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    bench.settle(&["a", "b"]);
    drop(bench.open(&["a", "b"]).unwrap());
    bench.lose_logs();
    write(&bench.path("b/d/e/own"), b"lost on a");
    fs::hard_link(bench.path("b/f"), bench.path("b/d/e/other")).unwrap();
    fs::hard_link(bench.path("b/d/e/own"), bench.path("b/d/own too")).unwrap();
    bench.settle(&["a", "b"]);
    assert_eq!(fs::metadata(bench.path("b/f")).unwrap().nlink(), 1);
    let kept: Vec<_> = fs::read_dir(bench.path("b/.rearview/quarantine")).unwrap().collect();
    let kept = kept[0].as_ref().unwrap().path().join("d");
    let found = fs::read(kept.join("e/own")).or_else(|_| fs::read(kept.join("own too")));
    assert_eq!(found.unwrap(), b"lost on a");
}

#[test]
fn reports_are_sentences_for_people() {
    let report = ImportReport { added: 12, changed: 3, ..ImportReport::default() };
    assert_eq!(report.to_string(), "12 files added, 3 changed");
    assert_eq!(ImportReport { moved: 1, ..Default::default() }.to_string(), "1 file renamed");
    assert_eq!(ImportReport::default().to_string(), "nothing to do");
    let filled = FillReport { made: 2, bytes: 2048, adjusted: 1, ..Default::default() };
    assert_eq!(filled.to_string(), "2 files copied (2.0 KiB), 1 adjusted");
    assert_eq!(FillReport::default().to_string(), "nothing to do");
}

/// What was born after the last commit and overwritten or deleted again is of no version. It stayed
/// on the one, and was told to have differed on the other. Where commits that were durable may be
/// gone, it may be what is left of a version.
#[test]
fn what_is_preserved_of_a_file_that_no_commit_knows_goes_with_the_recovery() {
    for is_bounded in [true, false] {
        let bench = Bench::new();
        write(&bench.path("a/f"), b"what was here");
        bench.settle(&["a", "b"]);
        let store = bench.open(&["a", "b"]).unwrap();
        let of = (store.catalog.next_node(), store.catalog.next_content());
        let what = [crate::replica::intent::Dirty::Dir(NodeId::ROOT)];
        drop(store.intents.begin(&store.replicas, &what).unwrap());
        drop(store);
        for backing in ["a", "b"] {
            write(&bench.path(backing).join("born"), b"deleted again");
            preserve(&bench.path(backing), "born", of, true);
        }
        if !is_bounded {
            bench.lose_logs();
        }
        let paths = bench.paths(&["a", "b"]);
        let recover = |replicas: &ReplicaSet, catalog: &Catalog, from| {
            crate::history::History::recover(replicas, catalog, from)
        };
        let store = open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap();
        store.close().unwrap();
        for path in &paths {
            let shard = path.join(format!(".rearview/preserved/{:02x}", of.0.0 & 0xff));
            let left = fs::read_dir(shard).unwrap().count();
            assert_eq!(left, if is_bounded { 0 } else { 1 }, "{}", path.display());
            let aside = fs::read_dir(path.join(".rearview/quarantine")).map(Iterator::count);
            assert_eq!(aside.unwrap_or(0), 0, "{}", path.display());
        }
        bench.assert_equal(&["a", "b"]);
    }
}

//! What a power cut left of contents of which the catalog says that they lie in `preserved/`, or
//! that a live file has them.

use super::*;
use crate::catalog::{Change, Durability};
use crate::replica::intent::Dirty;

/// When the content came to be that is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Age {
    /// Before the last checkpoint.
    Durable,
    /// After it, but an older one that was durable relies on it.
    Relied,
    /// After it, with its file.
    Young,
    /// Likewise, and a snapshot was taken of it.
    Promised,
}

/// A store of two replicas with one file, which is recorded to be gone; opened at that, and dropped
/// as by a power cut. Tells the node and its last content.
fn gone(bench: &Bench, preserved: bool, age: Age) -> (NodeId, ContentId) {
    gone_after(bench, preserved, age, |_, _| {})
}

/// Likewise, after something else was pushed.
fn gone_after(
    bench: &Bench,
    preserved: bool,
    age: Age,
    first_of_all: impl Fn(&Catalog, &NodeRow),
) -> (NodeId, ContentId) {
    let (store, row) = made(bench, age);
    let catalog = &store.catalog;
    first_of_all(catalog, &row);
    let (parent, name) = (NodeId::ROOT, EntryName::new("f").unwrap());
    let mut changes = vec![Change::EntryRemove { parent, name }, Change::NodeGone(row.id)];
    if preserved {
        changes.push(Change::ContentPreserved { id: row.content, cloned: false });
    }
    catalog.push(changes).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    (row.id, row.content)
}

/// A store of two replicas with one file, opened.
fn made(bench: &Bench, age: Age) -> (Store, NodeRow) {
    let is_young = matches!(age, Age::Young | Age::Promised);
    let first = if is_young { "other" } else { "f" };
    write(&bench.path("a").join(first), b"what was here");
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let catalog = &store.catalog;
    let mut row = catalog.node(id_of(catalog, first)).unwrap().unwrap();
    let what = [Dirty::File(row.id), Dirty::Dir(NodeId::ROOT)];
    drop(store.intents.begin(&store.replicas, &what).unwrap());
    if age != Age::Durable {
        row.content = catalog.next_content();
        let mut born = Vec::new();
        if is_young {
            for backing in ["a", "b"] {
                write(&bench.path(backing).join("f"), b"what was here");
            }
            row.id = catalog.next_node();
            let meta = fs::metadata(bench.path("a/f")).unwrap();
            row.mtime = Timestamp { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
            let (parent, name) = (NodeId::ROOT, EntryName::new("f").unwrap());
            born.push(Change::EntryAdd { parent, name, node: row.id });
        }
        born.push(Change::ContentAdd { id: row.content, node: row.id, size: row.size });
        born.push(Change::NodePut(row.clone()));
        catalog.push(born).unwrap();
        let at = catalog.freeze();
        if age == Age::Promised {
            catalog.create_durable_snapshot("promised", at, false, &[]).unwrap();
        }
    }
    (store, row)
}

fn preserved(bench: &Bench, backing: &str, (node, content): (NodeId, ContentId)) -> PathBuf {
    let name = format!("{:02x}/{:016x}.{:016x}", node.0 & 0xff, node.0, content.0);
    bench.path(backing).join(".rearview/preserved").join(name)
}

/// btrfs: the catalog was durable, the rename into `preserved/` was not.
#[test]
fn a_file_that_is_live_still_is_preserved_again() {
    for age in [Age::Durable, Age::Relied, Age::Young, Age::Promised] {
        let bench = Bench::new();
        let of = gone(&bench, true, age);
        let store = bench.open(&["a", "b"]).unwrap();
        for backing in ["a", "b"] {
            assert_eq!(fs::read(preserved(&bench, backing, of)).unwrap(), b"what was here");
        }
        assert!(id_of(&store.catalog, "f") != of.0, "the live one is another file");
        assert_recorded(&store.catalog, &bench.path("b"));
        store.close().unwrap();
        bench.assert_equal(&["a", "b"]);
    }
}

/// Its times were set before it was removed, and neither came to the disk: it was looked for with
/// its last times only.
#[test]
fn a_file_touched_and_removed_is_preserved_again() {
    for age in [Age::Durable, Age::Relied, Age::Young, Age::Promised] {
        let bench = Bench::new();
        let of = gone_after(&bench, true, age, |catalog, row| {
            let mtime = Timestamp { secs: 1_000_000_000, nanos: 0 };
            catalog.push(vec![Change::NodePut(NodeRow { mtime, ..row.clone() })]).unwrap();
            catalog.freeze();
        });
        let store = bench.open(&["a", "b"]).unwrap();
        for backing in ["a", "b"] {
            let kept = fs::read(preserved(&bench, backing, of)).ok();
            assert_eq!(kept.as_deref(), Some(&b"what was here"[..]), "{age:?}");
        }
        store.close().unwrap();
        bench.assert_equal(&["a", "b"]);
    }
}

/// It was moved aside after the snapshot, of which no state tells, and neither does the intent log
/// of one that was born since the last checkpoint: it was not among what recovery looked for.
#[test]
fn a_file_of_a_snapshot_of_which_only_its_preserving_is_recorded_is_preserved_again() {
    let bench = Bench::new();
    let (store, row) = made(&bench, Age::Promised);
    let preserving = Change::ContentPreserved { id: row.content, cloned: false };
    store.catalog.push(vec![preserving]).unwrap();
    store.catalog.flush(Durability::Durable).unwrap();
    drop(store);
    let store = bench.open(&["a", "b"]).unwrap();
    for backing in ["a", "b"] {
        let kept = fs::read(preserved(&bench, backing, (row.id, row.content)));
        assert_eq!(kept.ok().as_deref(), Some(&b"what was here"[..]));
    }
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

/// A store whose one file was appended to, sealed and then emptied by being moved away: the catalog
/// has it, and the disk has the file as the checkpoint left it. Tells the node and the content that
/// is not in `preserved/`. With `taken` another file has the name since, and
/// the recorded birth is so many seconds off.
fn unmoved(bench: &Bench, size: u64, taken: Option<i64>) -> (NodeId, ContentId) {
    write(&bench.path("a/f"), b"what was here");
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let catalog = &store.catalog;
    let first = catalog.node(id_of(catalog, "f")).unwrap().unwrap();
    let what = [Dirty::File(first.id), Dirty::Dir(NodeId::ROOT)];
    drop(store.intents.begin(&store.replicas, &what).unwrap());
    let birth = fs::metadata(bench.path("b/f")).unwrap().created().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while birth.elapsed().unwrap().as_millis() < 100 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    let later = |nanos| Timestamp::from_nanos(Timestamp::now().as_nanos() + nanos);
    let (content, mtime) = (catalog.next_content(), later(0));
    let btime = Timestamp { secs: first.btime.secs + taken.unwrap_or(0), ..first.btime };
    let longer = NodeRow { content, size, mtime, btime, ..first.clone() };
    let added = Change::ContentAdd { id: content, node: first.id, size };
    let digest = Change::DigestAdd { content, digest: [7; 16] };
    catalog.push(vec![added, Change::NodePut(longer), digest]).unwrap();
    catalog.freeze();
    let mut emptied = vec![Change::ContentPreserved { id: content, cloned: false }];
    let empty = NodeRow { content: ContentId::EMPTY, size: 0, mtime: later(1), ..first.clone() };
    if taken.is_some() {
        let (parent, name) = (NodeId::ROOT, EntryName::new("f").unwrap());
        let node = catalog.next_node();
        emptied.push(Change::EntryRemove { parent, name: name.clone() });
        emptied.push(Change::NodeGone(first.id));
        emptied.push(Change::NodePut(NodeRow { id: node, ..empty }));
        emptied.push(Change::EntryAdd { parent, name, node });
    } else {
        emptied.push(Change::NodePut(empty));
    }
    catalog.push(emptied).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    (first.id, content)
}

/// An fsync of another file had committed that it was moved away.
#[test]
fn what_older_versions_rely_on_is_taken_from_the_file_that_was_not_moved() {
    let bench = Bench::new();
    let of = unmoved(&bench, 20, None);
    let store = bench.open(&["a", "b"]).unwrap();
    for backing in ["a", "b"] {
        let kept = fs::read(preserved(&bench, backing, of)).unwrap();
        assert_eq!(kept, b"what was here\0\0\0\0\0\0\0");
    }
    assert_digest(&store.catalog, of.1, b"what was here\0\0\0\0\0\0\0");
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

#[test]
fn what_was_appended_since_is_no_part_of_what_is_taken() {
    let bench = Bench::new();
    let of = unmoved(&bench, 8, None);
    let store = bench.open(&["a", "b"]).unwrap();
    assert_eq!(fs::read(preserved(&bench, "b", of)).unwrap(), b"what was here");
    assert_digest(&store.catalog, of.1, b"what was");
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

fn assert_digest(catalog: &Catalog, content: ContentId, bytes: &[u8]) {
    let want = crate::catalog::digest::first_half(blake3::hash(bytes).as_bytes());
    assert_eq!(catalog.digest(content).unwrap(), Some(want));
}

#[test]
fn what_has_a_name_that_was_taken_by_another_is_not_believed_to_be_the_lost_file() {
    let bench = Bench::new();
    let of = unmoved(&bench, 20, Some(1));
    let store = bench.open(&["a", "b"]).unwrap();
    assert!(!preserved(&bench, "a", of).exists());
    store.close().unwrap();
}

/// An editor saved over what a shell had appended to: the file under that name was not the only one
/// that had it, and its bytes, which a snapshot has, were lost.
#[test]
fn what_has_a_name_that_was_taken_by_another_is_known_by_its_birth() {
    let bench = Bench::new();
    let of = unmoved(&bench, 20, Some(0));
    let store = bench.open(&["a", "b"]).unwrap();
    let kept = fs::read(preserved(&bench, "a", of)).unwrap();
    assert_eq!(kept, b"what was here\0\0\0\0\0\0\0");
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

/// It was moved aside on one, which is not recorded, and on the other it was not. What is made of
/// it goes to both catalogs: with the other's ahead at the next end, nobody had its bytes.
#[test]
fn what_one_replica_has_preserved_every_one_has_before_it_is_recorded() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"what was here");
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let row = store.catalog.node(id_of(&store.catalog, "f")).unwrap().unwrap();
    drop(store.intents.begin(&store.replicas, &[Dirty::File(row.id)]).unwrap());
    drop(store);
    let of = (row.id, row.content);
    let kept = preserved(&bench, "a", of);
    fs::create_dir_all(kept.parent().unwrap()).unwrap();
    fs::rename(bench.path("a/f"), &kept).unwrap();
    write(&bench.path("a/f"), b"");
    let recover = |replicas: &ReplicaSet, catalog: &Catalog, from| {
        assert!(!catalog.is_preserved(of.1)?);
        assert_eq!(fs::read(preserved(&bench, "b", of)).unwrap(), b"what was here");
        crate::history::History::recover(replicas, catalog, from)
    };
    let paths = bench.paths(&["a", "b"]);
    let store = open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap();
    assert!(store.catalog.is_preserved(of.1).unwrap());
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

#[test]
fn what_one_replica_lost_is_taken_from_another() {
    let bench = Bench::new();
    let of = gone(&bench, true, Age::Durable);
    for backing in ["a", "b"] {
        let kept = preserved(&bench, backing, of);
        fs::create_dir_all(kept.parent().unwrap()).unwrap();
        fs::rename(bench.path(backing).join("f"), kept).unwrap();
    }
    fs::write(preserved(&bench, "a", of), b"").unwrap();
    let store = bench.open(&["a", "b"]).unwrap();
    assert_eq!(fs::read(preserved(&bench, "a", of)).unwrap(), b"what was here");
    store.close().unwrap();
    bench.assert_equal(&["a", "b"]);
}

#[test]
fn a_version_that_was_never_durable_has_zeros_for_what_is_gone() {
    for recorded in [true, false] {
        for left in [0, 4] {
            let bench = Bench::new();
            let of = gone(&bench, recorded, Age::Young);
            for backing in ["a", "b"] {
                fs::remove_file(bench.path(backing).join("f")).unwrap();
                if recorded && left > 0 {
                    write(&preserved(&bench, backing, of), &b"what was here"[..left]);
                }
            }
            let store = bench.open(&["a", "b"]).unwrap();
            let mut want = b"what was here".to_vec();
            want[if recorded { left } else { 0 }..].fill(0);
            for backing in ["a", "b"] {
                assert_eq!(fs::read(preserved(&bench, backing, of)).unwrap(), want);
            }
            assert!(store.catalog.is_preserved(of.1).unwrap());
            store.close().unwrap();
            bench.assert_equal(&["a", "b"]);
        }
    }
}

/// Nothing may look well that is not: what a checkpoint or a snapshot made durable, and what relies
/// on that, is left for `check` to tell.
#[test]
fn a_version_that_was_durable_and_is_gone_stays_damage() {
    let ages = [Age::Durable, Age::Relied, Age::Promised];
    for (recorded, age) in ages.into_iter().flat_map(|age| [(true, age), (false, age)]) {
        let bench = Bench::new();
        let of = gone(&bench, recorded, age);
        for backing in ["a", "b"] {
            fs::remove_file(bench.path(backing).join("f")).unwrap();
        }
        let store = bench.open(&["a", "b"]).unwrap();
        assert!(!preserved(&bench, "a", of).exists());
        store.close().unwrap();
    }
}

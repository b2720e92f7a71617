//! After an unclean end only what the intent log names is looked at, and all of that is.

use std::process::Command;

use super::*;
use crate::catalog::{Change, Durability};
use crate::replica::intent::{Base, Dirty, MovedDir};
use crate::store::marker::PeerState;

/// Tells the log of an open store that a directory with this path may move.
fn intend_move(store: &Store, node: NodeId, path: &str) {
    let path = RelPath::parse(path).unwrap();
    let (above, name) = path.split_last().unwrap();
    let known: Vec<MovedDir> = store
        .replicas
        .ids()
        .map(|id| {
            let replica = store.replicas.get(id);
            let dir = replica.backing().open_dir(&above).unwrap();
            let stat = replica.backing().stat_at(&dir, name).unwrap();
            let birth = stat.btime.as_nanos();
            MovedDir { node, replica: replica.short_id(), ino: stat.ino, birth }
        })
        .collect();
    store.intents.begin(&store.replicas, &[]).unwrap().moves(node, &known).unwrap();
}

pub(super) fn intend(store: &Store, what: &[Dirty]) {
    drop(store.intents.begin(&store.replicas, what).unwrap());
}

/// What is in none of the directories that the tests dirty: changed on one side only, it shows that
/// nobody looked at it.
fn leave_marks(bench: &Bench) {
    write(&bench.path("a/far/away/mark"), b"changed behind our back");
    write(&bench.path("b/far/away/extra"), b"made behind our back");
}

fn assert_marks_untouched(bench: &Bench) {
    assert_eq!(fs::read(bench.path("b/far/away/mark")).unwrap(), b"mark");
    assert!(bench.path("b/far/away/extra").exists());
    fs::write(bench.path("a/far/away/mark"), b"mark").unwrap();
    fs::remove_file(bench.path("b/far/away/extra")).unwrap();
    set_times(&bench.path("a/far/away"));
    set_times(&bench.path("b/far/away"));
}

/// Gives the mark and its directory the times that they have in the catalog.
fn set_times(dir: &Path) {
    let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    for path in [&dir.join("mark"), dir] {
        fs::File::open(path).unwrap().set_times(times).unwrap();
    }
}

/// A store of two replicas with some directories; opened.
pub(super) fn opened(bench: &Bench) -> Store {
    let a = bench.path("a");
    for (path, bytes) in [
        ("one/f", &b"f"[..]),
        ("one/g", b"g"),
        ("one/sub/deep/x", b"x"),
        ("two/h", b"h"),
        ("two/sub/y", b"y"),
        ("far/away/mark", b"mark"),
    ] {
        write(&a.join(path), bytes);
    }
    fs::hard_link(a.join("one/g"), a.join("far/g")).unwrap();
    set_times(&a.join("far/away"));
    bench.settle(&["a", "b"]);
    bench.open(&["a", "b"]).unwrap()
}

/// Recovers; the replicas are equal, the catalog has what is there.
fn recover(bench: &Bench) -> Store {
    leave_marks(bench);
    let store = bench.open(&["a", "b"]).unwrap();
    assert_marks_untouched(bench);
    bench.assert_equal(&["a", "b"]);
    for path in ["a", "b"] {
        let peers = inspect(&bench.path(path)).unwrap().marker.peers;
        assert!(peers.iter().all(|peer| peer.state == PeerState::Ok));
    }
    store
}

fn nodes(store: &Store, paths: &[&str]) -> Vec<NodeId> {
    paths.iter().map(|path| id_of(&store.catalog, path)).collect()
}

#[test]
fn entries_and_attributes_of_a_dirty_directory_are_recovered() {
    let bench = Bench::new();
    let store = opened(&bench);
    let one = id_of(&store.catalog, "one");
    let before = nodes(&store, &["one/f", "one/g", "one/sub/deep/x"]);
    intend(&store, &[Dirty::Dir(one)]);
    drop(store);
    // Born in it, with all below, on one replica or both; renamed; removed; of another mode.
    write(&bench.path("a/one/new/below/n"), b"n");
    write(&bench.path("b/one/other"), b"only there");
    fs::rename(bench.path("a/one/f"), bench.path("a/one/renamed")).unwrap();
    fs::remove_file(bench.path("a/one/g")).unwrap();
    fs::set_permissions(bench.path("a/one"), fs::Permissions::from_mode(0o700)).unwrap();
    let store = recover(&bench);
    assert_eq!(nodes(&store, &["one/renamed", "far/g", "one/sub/deep/x"]), before);
    assert_eq!(fs::read(bench.path("b/one/new/below/n")).unwrap(), b"n");
    assert!(!bench.path("b/one/other").exists());
    store.close().unwrap();
    drop(store);
    let store = bench.open(&["a", "b"]).unwrap();
    assert_recorded(&store.catalog, &bench.path("b"));
}

/// A file of a snapshot got other times, another mode and another name, and none of that was in the
/// catalog when the power went: its older contents, which lie in it, were lost.
#[test]
fn a_file_touched_and_renamed_in_one_breath_is_the_one_it_was() {
    let bench = Bench::new();
    let store = opened(&bench);
    let before = nodes(&store, &["one/f", "two/h"]);
    let (old, over) = (before[0], before[1]);
    let content = store.catalog.node(over).unwrap().unwrap().content;
    intend(&store, &[Dirty::File(old), Dirty::Dir(id_of(&store.catalog, "one"))]);
    intend(&store, &[Dirty::Dir(id_of(&store.catalog, "two"))]);
    drop(store);
    for name in ["a", "b"] {
        let (from, to) = (bench.path(name).join("one/f"), bench.path(name).join("two/h"));
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        fs::File::open(&from).unwrap().set_times(times).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o640)).unwrap();
        unclean::preserve(&bench.path(name), "two/h", (over, content), true);
        fs::rename(from, to).unwrap();
        // A new file of another size.
        write(&bench.path(name).join("two/new"), b"longer");
    }
    let store = unclean::open_with_preserved(&bench, &["a", "b"], &[content]);
    assert_eq!(nodes(&store, &["two/h"]), [old]);
    assert_eq!(store.catalog.node(over).unwrap(), None, "what it replaced is gone");
    assert_recorded(&store.catalog, &bench.path("b"));
}

#[test]
fn dirty_files_are_compared_byte_by_byte_under_all_their_names() {
    let bench = Bench::new();
    let store = opened(&bench);
    let before = nodes(&store, &["one/g", "two/h"]);
    intend(&store, &[Dirty::File(before[0]), Dirty::File(before[1])]);
    drop(store);
    // As a power cut leaves it: equal size and time, other bytes.
    let keep = |path: &Path, bytes: &[u8]| {
        let times =
            fs::FileTimes::new().set_modified(fs::metadata(path).unwrap().modified().unwrap());
        fs::write(path, bytes).unwrap();
        fs::File::open(path).unwrap().set_times(times).unwrap();
    };
    keep(&bench.path("b/one/g"), b"?");
    write(&bench.path("a/two/h"), b"longer");
    let store = recover(&bench);
    assert_eq!(nodes(&store, &["one/g", "two/h"]), before);
    assert_eq!(fs::read(bench.path("b/far/g")).unwrap(), b"g");
    assert_eq!(fs::read(bench.path("b/two/h")).unwrap(), b"longer");
    assert_recorded(&store.catalog, &bench.path("b"));
}

/// A file of a snapshot was written to and took one name of another that lives on under its second
/// one. Nothing of the other is preserved by that, so the file was taken for it.
#[test]
fn a_file_written_to_and_renamed_over_a_link_is_the_one_it_was() {
    // The order in which a directory is read decides which name is met first.
    for (kept, taken) in [("far/g", "one/g"), ("one/g", "far/g")] {
        for births in [true, false] {
            written_and_renamed_over(taken, Some(kept), births);
        }
    }
}

/// Nor is anything of an empty one.
#[test]
fn a_file_written_to_and_renamed_over_an_empty_one_is_the_one_it_was() {
    for births in [true, false] {
        written_and_renamed_over("far/empty", None, births);
    }
}

/// The file `one/long` is written to and takes the name `taken` of another, which is otherwise
/// `kept`.
fn written_and_renamed_over(taken: &str, kept: Option<&str>, births: bool) {
    let bench = Bench::new();
    let (long, empty) = (bench.path("a/one/long"), bench.path("a/far/empty"));
    let born = |path: &Path| fs::metadata(path).unwrap().created().ok();
    write(&long, b"long");
    write(&empty, b"");
    // The clock of births has ticks.
    while born(&long).is_some() && born(&long) == born(&empty) {
        fs::remove_file(&empty).unwrap();
        write(&empty, b"");
    }
    let store = opened(&bench);
    let paths: Vec<&str> = [taken].into_iter().chain(kept).collect();
    let moved = id_of(&store.catalog, "one/long");
    let before: Vec<NodeId> =
        [moved].into_iter().chain(kept.map(|kept| id_of(&store.catalog, kept))).collect();
    let dirs = ["one", "far"].map(|dir| Dirty::Dir(id_of(&store.catalog, dir)));
    intend(&store, &dirs);
    before.iter().for_each(|&node| intend(&store, &[Dirty::File(node)]));
    drop(store);
    for name in ["a", "b"] {
        let root = bench.path(name);
        let from = root.join("one/long");
        match births {
            // Its birth tells, so its size may be another as well.
            true => fs::write(&from, b"longer").unwrap(),
            // As on a replica whose births are not those that were recorded.
            false => {
                fs::remove_file(&from).unwrap();
                write(&from, b"LONG");
            }
        }
        fs::rename(from, root.join(taken)).unwrap();
        // The other one, too, is not as it is recorded.
        if let Some(kept) = kept {
            fs::write(root.join(kept), b"other").unwrap();
        }
    }
    let store = recover(&bench);
    assert_eq!(nodes(&store, &paths), before, "over {taken}, by birth: {births}");
    store.close().unwrap();
}

#[test]
fn a_hard_link_made_or_renamed_is_the_file_that_it_names() {
    let bench = Bench::new();
    let store = opened(&bench);
    let before = nodes(&store, &["one/g", "two/h"]);
    let dirs = nodes(&store, &["one", "two"]);
    intend(&store, &[Dirty::Dir(dirs[0]), Dirty::Dir(dirs[1]), Dirty::File(before[1])]);
    drop(store);
    fs::rename(bench.path("a/one/g"), bench.path("a/two/moved")).unwrap();
    fs::hard_link(bench.path("a/two/h"), bench.path("a/one/linked")).unwrap();
    let store = recover(&bench);
    assert_eq!(nodes(&store, &["two/moved", "far/g"]), [before[0]; 2]);
    assert_eq!(nodes(&store, &["two/h", "one/linked"]), [before[1]; 2]);
    assert_recorded(&store.catalog, &bench.path("b"));
}

/// A renamed name was met before the other one, by which the file is known: it was taken for a new
/// file, which took the other name too, and what the old one had been was lost.
#[test]
fn a_hard_link_that_is_met_under_a_new_name_first_is_the_file_that_it_was() {
    for (from, to) in [("one/g", "one/a"), ("far/g", "far/new"), ("one/g", "far/a")] {
        let bench = Bench::new();
        let store = opened(&bench);
        let g = id_of(&store.catalog, "one/g");
        let dirs = nodes(&store, &["one", "far"]);
        intend(&store, &[Dirty::Dir(dirs[0]), Dirty::Dir(dirs[1]), Dirty::File(g)]);
        drop(store);
        fs::rename(bench.path("a").join(from), bench.path("a").join(to)).unwrap();
        write(&bench.path("a").join(to), b"changed");
        let store = recover(&bench);
        assert_eq!(id_of(&store.catalog, to), g, "{from} is {to}");
        assert_recorded(&store.catalog, &bench.path("b"));
    }
}

/// Every way in which a move of a directory can have come through: on no replica, on one, on both.
#[test]
fn a_moved_directory_keeps_its_nodes_and_nothing_below_it_is_looked_at() {
    for (on_a, on_b) in [(false, false), (true, false), (false, true), (true, true)] {
        let bench = Bench::new();
        let store = opened(&bench);
        let before = nodes(&store, &["one/sub", "one/sub/deep", "one/sub/deep/x", "far"]);
        let dirs = nodes(&store, &["one", "two"]);
        intend(&store, &[Dirty::Dir(dirs[0]), Dirty::Dir(dirs[1]), Dirty::Dir(NodeId::ROOT)]);
        intend_move(&store, before[0], "one/sub");
        intend_move(&store, before[3], "far");
        drop(store);
        for (name, moves) in [("a", on_a), ("b", on_b)] {
            if moves {
                let root = bench.path(name);
                fs::create_dir(root.join("two/new")).unwrap();
                fs::rename(root.join("one/sub"), root.join("two/new/sub")).unwrap();
                fs::rename(root.join("far"), root.join("two/new/far")).unwrap();
            }
        }
        // Found below a moved directory: nobody has looked.
        let place = |moved: bool, name: &str| match moved {
            true => bench.path(name).join("two/new"),
            false => bench.path(name),
        };
        write(&place(on_a, "a").join("far/away/mark"), b"changed behind our back");
        let store = bench.open(&["a", "b"]).unwrap();
        let mark = |name: &str| place(on_a, name).join("far/away/mark");
        assert_eq!(fs::read(mark("b")).unwrap(), b"mark", "{on_a} {on_b}");
        for name in ["a", "b"] {
            fs::write(mark(name), b"mark").unwrap();
            set_times(mark(name).parent().unwrap());
        }
        bench.assert_equal(&["a", "b"]);
        let after = match on_a {
            true => ["two/new/sub", "two/new/sub/deep", "two/new/sub/deep/x", "two/new/far"],
            false => ["one/sub", "one/sub/deep", "one/sub/deep/x", "far"],
        };
        assert_eq!(nodes(&store, &after), before, "{on_a} {on_b}");
        assert_eq!(fs::read_dir(bench.path("b/.rearview/tmp")).unwrap().count(), 0);
    }
}

#[test]
fn directories_that_changed_places_are_followed() {
    let bench = Bench::new();
    let store = opened(&bench);
    let paths = ["one/sub", "two/sub", "one/sub/deep/x", "two/sub/y"];
    let before = nodes(&store, &paths);
    let dirs = nodes(&store, &["one", "two"]);
    intend(&store, &[Dirty::Dir(dirs[0]), Dirty::Dir(dirs[1])]);
    intend_move(&store, before[0], "one/sub");
    intend_move(&store, before[1], "two/sub");
    drop(store);
    let a = bench.path("a");
    fs::rename(a.join("one/sub"), a.join("spare")).unwrap();
    fs::rename(a.join("two/sub"), a.join("one/sub")).unwrap();
    fs::rename(a.join("spare"), a.join("two/sub")).unwrap();
    let times = fs::metadata(bench.path("b")).unwrap().modified().unwrap();
    fs::File::open(&a).unwrap().set_times(fs::FileTimes::new().set_modified(times)).unwrap();
    let store = recover(&bench);
    let after = ["two/sub", "one/sub", "two/sub/deep/x", "one/sub/y"];
    assert_eq!(nodes(&store, &after), before);
    assert_recorded(&store.catalog, &a);
}

/// A backing had other inode numbers after the crash than before it, as several filesystems over
/// others do: what was made in a directory that may have moved was not looked for.
#[test]
fn a_directory_that_is_not_recognised_after_a_move_is_looked_through() {
    for exchanged in [false, true] {
        let bench = Bench::new();
        let store = opened(&bench);
        let dirs = nodes(&store, &["one", "two", "one/sub", "two/sub", "one/sub/deep"]);
        intend(&store, &dirs.iter().map(|&dir| Dirty::Dir(dir)).collect::<Vec<_>>());
        intend_move(&store, dirs[2], "one/sub");
        intend_move(&store, dirs[3], "two/sub");
        drop(store);
        for name in ["a", "b"] {
            let root = bench.path(name);
            for sub in ["one/sub", "two/sub"] {
                let (old, new) = (root.join(sub), bench.path("spare"));
                let copied = Command::new("cp").arg("-a").args([&old, &new]).status();
                assert!(copied.unwrap().success());
                fs::remove_dir_all(&old).unwrap();
                fs::rename(&new, &old).unwrap();
            }
        }
        let a = bench.path("a");
        if exchanged {
            fs::rename(a.join("one/sub"), bench.path("spare")).unwrap();
            fs::rename(a.join("two/sub"), a.join("one/sub")).unwrap();
            fs::rename(bench.path("spare"), a.join("two/sub")).unwrap();
        }
        let deep = if exchanged { "two/sub/deep" } else { "one/sub/deep" };
        fs::create_dir(a.join(deep).join("new")).unwrap();
        write(&bench.path("b/one/sub/deep/made"), b"on the other alone");
        let store = recover(&bench);
        assert_recorded(&store.catalog, &a);
        assert!(bench.path("b").join(deep).join("new").is_dir());
    }
}

#[test]
fn a_lost_or_foreign_log_means_that_all_is_compared() {
    for lose in [true, false] {
        let bench = Bench::new();
        drop(opened(&bench));
        let log = bench.path("a/.rearview/intent.log");
        match lose {
            true => fs::remove_file(&log).unwrap(),
            false => fs::write(&log, vec![1; 100_000]).unwrap(),
        }
        write(&bench.path("a/far/away/mark"), b"changed behind our back");
        let store = bench.open(&["a", "b"]).unwrap();
        bench.assert_equal(&["a", "b"]);
        assert_recorded(&store.catalog, &bench.path("b"));
    }
}

/// A disk lost a checkpoint that it had acknowledged. Neither its own log, which is older, nor the
/// other's, which was closed, named what it lacks, so the catalog had names without files.
#[test]
fn a_replica_that_lost_a_checkpoint_is_compared_wholly() {
    for lost in ["a", "b"] {
        let bench = Bench::new();
        let store = opened(&bench);
        let copy = |from: &Path, to: &Path| {
            let copied = Command::new("cp").arg("-a").args([from, to]).status();
            assert!(copied.unwrap().success());
        };
        let (lost, before) = (bench.path(lost), bench.path("before"));
        copy(&lost, &before);
        let (one, catalog) = (id_of(&store.catalog, "one"), &store.catalog);
        let row = catalog.node(id_of(catalog, "one/f")).unwrap().unwrap();
        intend(&store, &[Dirty::Dir(one)]);
        for path in bench.paths(&["a/one/empty", "b/one/empty"]) {
            write(&path, b"");
        }
        let meta = fs::metadata(bench.path("a/one/empty")).unwrap();
        let mtime = Timestamp { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
        let (id, content, size) = (catalog.next_node(), ContentId::EMPTY, 0);
        let name = EntryName::new("empty").unwrap();
        let added = Change::EntryAdd { parent: one, name, node: id };
        catalog
            .push(vec![Change::NodePut(NodeRow { id, content, size, mtime, ..row }), added])
            .unwrap();
        store.intents.turn(|| catalog.upcoming_node());
        let generation = catalog.freeze().0;
        catalog.flush(Durability::Durable).unwrap();
        let (_, sequence) = catalog.committed();
        store.intents.close(&store.replicas, Base { generation, sequence, undo_from: 0 }).unwrap();
        drop(store);
        fs::remove_dir_all(&lost).unwrap();
        copy(&before, &lost);
        let store = bench.open(&["a", "b"]).unwrap();
        assert_eq!(id_of(&store.catalog, "one/empty"), id);
        assert!(lost.join("one/empty").exists(), "{}", lost.display());
        store.close().unwrap();
        drop(store);
        bench.assert_equal(&["a", "b"]);
    }
}

/// Each replica can recover alone, whatever step a recovery of both was stopped at.
#[test]
fn a_recovery_that_is_stopped_anywhere_goes_on_on_both_or_on_each() {
    for alone in [None, Some("a"), Some("b")] {
        for number in 1.. {
            let bench = Bench::new();
            let store = opened(&bench);
            let dirs = nodes(&store, &["one", "two", "one/sub"]);
            intend(&store, &[Dirty::Dir(dirs[0]), Dirty::Dir(dirs[1])]);
            intend_move(&store, dirs[2], "one/sub");
            drop(store);
            let a = bench.path("a");
            fs::rename(a.join("one/sub"), a.join("two/other")).unwrap();
            write(&a.join("two/new/n"), b"n");
            fs::remove_file(a.join("one/f")).unwrap();
            let paths = bench.paths(&["a", "b"]);
            match open_with(&paths, &OpenOptions::default(), &stopping_at(number)) {
                Err(Error::Interrupted) => {}
                Err(error) => panic!("stopped at {number}: {error}"),
                Ok(_) => {
                    assert!(number > 3);
                    break;
                }
            }
            if let Some(alone) = alone {
                let store = bench.open(&[alone]).unwrap();
                assert_recorded(&store.catalog, &bench.path(alone));
                store.close().unwrap();
            }
            bench.settle(&["a", "b"]);
        }
    }
}

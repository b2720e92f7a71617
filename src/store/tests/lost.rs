//! Which file under a new name is one that lost its own, where it was written to as well: from what
//! of its content there are before-images, and what was there before the catalog was last told.

use super::bounded::{intend, opened};
use super::*;
use crate::catalog::{Change, Durability, UndoRow};
use crate::replica::intent::Dirty;
use crate::store::bounds::TICK_NANOS;

/// What is known of births on the replica that goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Births {
    /// Nothing.
    Unknown,
    /// They are the recorded ones, and several files share one.
    Recorded,
    /// They are not the recorded ones: those are of the other replica.
    Others,
}

const ALL: [Births; 3] = [Births::Unknown, Births::Recorded, Births::Others];

/// A store that dies with some files written to and renamed.
struct Dying {
    bench: Bench,
    births: Births,
    nodes: Vec<NodeRow>,
}

impl Dying {
    /// The files `one/0`, `one/1`... of these sizes, and what is about to happen to them.
    fn new(births: Births, sizes: &[usize]) -> Dying {
        let paths: Vec<String> = (0..sizes.len()).map(|index| format!("one/{index}")).collect();
        let bench = std::iter::repeat_with(|| {
            let bench = Bench::new();
            let at = |path: &String| bench.path("a").join(path);
            fs::create_dir_all(bench.path("a/one")).unwrap();
            for (path, &size) in paths.iter().zip(sizes) {
                fs::write(at(path), vec![b'o'; size]).unwrap();
            }
            let born = |path| fs::metadata(at(path)).unwrap().created().ok();
            let in_one_tick = paths.iter().all(|path| born(path) == born(&paths[0]));
            in_one_tick.then_some(bench)
        });
        let bench = bench.flatten().next().unwrap();
        let store = opened(&bench);
        let row = |path: &String| store.catalog.node(id_of(&store.catalog, path)).unwrap().unwrap();
        let nodes: Vec<NodeRow> = paths.iter().map(row).collect();
        if births == Births::Unknown {
            let unknown = |row: &NodeRow| NodeRow { btime: Timestamp::default(), ..row.clone() };
            let rows = nodes.iter().map(|row| Change::NodePut(unknown(row))).collect();
            store.catalog.push(rows).unwrap();
            store.catalog.flush(Durability::Durable).unwrap();
        }
        for dir in ["one", "two"] {
            intend(&store, &[Dirty::Dir(id_of(&store.catalog, dir))]);
        }
        nodes.iter().for_each(|row| intend(&store, &[Dirty::File(row.id)]));
        drop(store);
        Dying { bench, births, nodes }
    }

    fn on_each(&self, act: impl Fn(&Path)) {
        ["a", "b"].iter().for_each(|name| act(&self.bench.path(name)));
    }

    /// `one/INDEX` is written to, which leaves `size` bytes of it, and renamed to `two/INDEX`.
    fn write_and_rename(&self, index: usize, size: usize) {
        self.on_each(|root| {
            let from = root.join(format!("one/{index}"));
            fs::write(&from, vec![b'n'; size]).unwrap();
            fs::rename(from, root.join(format!("two/{index}"))).unwrap();
        });
    }

    /// A new file, which was born later than the catalog was told of anything, as far as the clock
    /// tells that.
    fn make(&self, path: &str, size: usize) {
        let now = Timestamp::now().as_nanos();
        let told = Timestamp::from_nanos(now + TICK_NANOS);
        self.on_each(|root| {
            let made = root.join(path);
            let born = || fs::metadata(&made).unwrap().created().map(Timestamp::from).ok();
            write(&made, &vec![b'x'; size]);
            while born().is_some_and(|born| born <= told) {
                fs::remove_file(&made).unwrap();
                write(&made, &vec![b'x'; size]);
            }
        });
    }

    /// Recovers, with before-images of these bytes of the files found.
    fn recover(&self, images: &[(usize, std::ops::Range<u64>)]) -> Store {
        let recover = |_: &ReplicaSet, catalog: &Catalog, _| {
            for (index, bytes) in images {
                let NodeRow { id: node, content, .. } = self.nodes[*index];
                let (offset, length) = (bytes.start, bytes.end - bytes.start);
                let row = UndoRow { node, content, offset, length, at: None };
                catalog.push(vec![Change::UndoAdd(row)])?;
            }
            Ok(())
        };
        let names = if self.births == Births::Others { &["b"][..] } else { &["a", "b"] };
        let paths = self.bench.paths(names);
        open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap()
    }

    fn is_at(&self, store: &Store, index: usize, path: &str) -> bool {
        id_of(&store.catalog, path) == self.nodes[index].id
    }
}

/// A power cut took the record of it. The file was taken for a new one, and of its older versions
/// nothing was left but before-images.
#[test]
fn a_file_truncated_and_renamed_in_one_breath_is_the_one_it_was() {
    for births in ALL {
        for size in [40, 0] {
            let dying = Dying::new(births, &[100]);
            dying.write_and_rename(0, size);
            if births != Births::Unknown {
                dying.make("two/new", 200);
            }
            let store = dying.recover(&[(0, size as u64..100)]);
            assert!(dying.is_at(&store, 0, "two/0"), "{births:?}, {size} bytes left");
            assert_recorded(&store.catalog, &dying.bench.path("b"));
        }
    }
}

/// One file that is now shorter than what there are before-images for is not the one.
#[test]
fn files_written_to_and_renamed_together_are_told_apart_by_their_before_images() {
    for births in ALL {
        let dying = Dying::new(births, &[100, 80, 90]);
        dying.write_and_rename(0, 30);
        dying.write_and_rename(1, 60);
        dying.write_and_rename(2, 120);
        let store = dying.recover(&[(0, 30..100), (1, 50..80)]);
        for index in 0..3 {
            let path = format!("two/{index}");
            assert!(dying.is_at(&store, index, &path), "{births:?}, {path}");
        }
    }
}

/// Its content would show what never was in it.
#[test]
fn a_new_file_is_not_taken_for_one_that_a_disk_lost() {
    for births in ALL {
        let dying = Dying::new(births, &[100]);
        dying.on_each(|root| fs::remove_file(root.join("one/0")).unwrap());
        match births {
            // Not all of what it lacks is in before-images.
            Births::Unknown => dying.make("two/new", 40),
            _ => dying.make("two/new", 110),
        }
        let store = dying.recover(&[(0, 60..100)]);
        assert!(!dying.is_at(&store, 0, "two/new"), "{births:?}");
        assert_eq!(store.catalog.node(dying.nodes[0].id).unwrap(), None, "{births:?}");
    }
}

/// Which one it is cannot be known.
#[test]
fn of_two_files_that_may_be_the_lost_one_neither_is() {
    let dying = Dying::new(Births::Unknown, &[100]);
    dying.write_and_rename(0, 120);
    dying.make("two/new", 110);
    let store = dying.recover(&[]);
    assert!(!dying.is_at(&store, 0, "two/0") && !dying.is_at(&store, 0, "two/new"));
}

/// It was born after the last checkpoint, and a snapshot was taken of it. Its newest content, which
/// nobody was promised, had to be there nevertheless, and the file was taken for a new one.
#[test]
fn a_file_of_a_snapshot_that_grew_and_was_renamed_is_the_one_it_was() {
    let bench = Bench::new();
    let store = opened(&bench);
    let catalog = &store.catalog;
    let [one, two] = ["one", "two"].map(|path| id_of(catalog, path));
    write(&bench.path("a/one/new"), &[b'o'; 52]);
    write_later(&bench.path("b/one/new"), &[b'o'; 52], &bench.path("a/one/new"));
    let meta = fs::metadata(bench.path("a/one/new")).unwrap();
    let (node, content) = (catalog.next_node(), catalog.next_content());
    let row = NodeRow {
        id: node,
        size: 52,
        mtime: meta.modified().unwrap().into(),
        btime: meta.created().map(Timestamp::from).unwrap_or_default(),
        content,
        ..catalog.node(id_of(catalog, "one/f")).unwrap().unwrap()
    };
    for what in [Dirty::Dir(one), Dirty::Dir(two), Dirty::File(node)] {
        intend(&store, &[what]);
    }
    let name = RelPath::parse("new").unwrap().names()[0].clone();
    catalog
        .push(vec![
            Change::ContentAdd { id: content, node, size: 52 },
            Change::NodePut(row.clone()),
            Change::EntryAdd { parent: one, name, node },
        ])
        .unwrap();
    catalog.create_durable_snapshot("s", catalog.freeze(), false, &[]).unwrap();
    let content = catalog.next_content();
    let grown = NodeRow { content, size: 60, mtime: Timestamp::now(), ..row };
    catalog
        .push(vec![Change::ContentAdd { id: content, node, size: 60 }, Change::NodePut(grown)])
        .unwrap();
    catalog.flush(Durability::Durable).unwrap();
    drop(store);
    // What was appended did not come to the disk; its name did.
    for root in bench.paths(&["a", "b"]) {
        let file = fs::File::open(root.join("one/new")).unwrap();
        file.set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH)).unwrap();
        fs::rename(root.join("one/new"), root.join("two/new")).unwrap();
    }
    let store = bench.open(&["b"]).unwrap();
    assert_eq!(id_of(&store.catalog, "two/new"), node);
    assert_recorded(&store.catalog, &bench.path("b"));
}

/// Two links, each renamed: the file had no name left by which it was known.
#[test]
fn a_file_all_of_whose_names_are_new_is_the_one_it_was() {
    for changed in [false, true] {
        let bench = Bench::new();
        let store = opened(&bench);
        let g = id_of(&store.catalog, "one/g");
        for dir in ["one", "two", "far"] {
            intend(&store, &[Dirty::Dir(id_of(&store.catalog, dir))]);
        }
        intend(&store, &[Dirty::File(g)]);
        drop(store);
        for root in bench.paths(&["a", "b"]) {
            if changed {
                fs::write(root.join("one/g"), b"longer").unwrap();
            }
            fs::rename(root.join("one/g"), root.join("two/g")).unwrap();
            fs::rename(root.join("far/g"), root.join("one/a")).unwrap();
        }
        let store = bench.open(&["a", "b"]).unwrap();
        let found = ["two/g", "one/a"].map(|path| id_of(&store.catalog, path));
        assert_eq!(found, [g; 2], "changed: {changed}");
        assert_recorded(&store.catalog, &bench.path("b"));
    }
}

/// Writes a file that is born in another tick of the clock than one that is there.
fn write_later(path: &Path, bytes: &[u8], than: &Path) {
    let born = |path: &Path| fs::metadata(path).unwrap().created().ok();
    write(path, bytes);
    while born(path).is_some() && born(path) == born(than) {
        fs::remove_file(path).unwrap();
        write(path, bytes);
    }
}

/// Exchanges two names on some of the replicas, whose directories are known to change.
fn exchange(bench: &Bench, replicas: &[&str], one: &str, other: &str) {
    let spare = bench.path("spare");
    for root in bench.paths(replicas) {
        fs::rename(root.join(one), &spare).unwrap();
        fs::rename(root.join(other), root.join(one)).unwrap();
        fs::rename(&spare, root.join(other)).unwrap();
    }
}

/// Nothing of either was preserved, and the catalog did not know: the file was taken for the linked
/// one and that for it. Of the names that the linked one has in one directory one was dropped
/// twice, and the file was gone from the mount.
#[test]
fn a_file_that_changed_names_with_a_hard_linked_one_is_the_one_it_was() {
    for size in [0, 200] {
        for births in [true, false] {
            for exchanged in [&["a"][..], &["a", "b"]] {
                exchanged_with_a_link(size, births, exchanged);
            }
        }
    }
}

/// A file of so many bytes and one of three names of another are exchanged on some replicas.
fn exchanged_with_a_link(size: usize, births: bool, exchanged: &[&str]) {
    let bench = Bench::new();
    let at = |path: &str| bench.path("a").join(path);
    write(&at("one/linked"), &[b'l'; 100]);
    write_later(&at("two/file"), &vec![b'f'; size], &at("one/linked"));
    ["two/p", "two/q"].iter().for_each(|p| fs::hard_link(at("one/linked"), at(p)).unwrap());
    let store = opened(&bench);
    let [linked, file] = ["two/p", "two/file"].map(|path| id_of(&store.catalog, path));
    let dirs = ["one", "two"].map(|dir| Dirty::Dir(id_of(&store.catalog, dir)));
    intend(&store, &dirs);
    drop(store);
    exchange(&bench, exchanged, "one/linked", "two/file");
    // The replica that was filled has births of its own.
    let opened = if births { &["a", "b"][..] } else { &["b"] };
    let store = bench.open(opened).unwrap();
    let told = format!("{size} bytes, by birth: {births}, exchanged on {exchanged:?}");
    let is_exchanged = exchanged.contains(&opened[0]);
    let names = if is_exchanged { ["two/file", "one/linked"] } else { ["one/linked", "two/file"] };
    for path in [names[0], "two/p", "two/q"] {
        assert_eq!(id_of(&store.catalog, path), linked, "{path}, {told}");
    }
    // Of an empty one that was moved nothing is left but its name.
    assert!(size == 0 || id_of(&store.catalog, names[1]) == file, "{told}");
    opened.iter().for_each(|name| assert_recorded(&store.catalog, &bench.path(name)));
}

/// Of each a version showed the bytes of the other.
#[test]
fn hard_linked_files_that_changed_names_are_the_ones_they_were() {
    for all in [false, true] {
        for births in [true, false] {
            let bench = Bench::new();
            let at = |path: &str| bench.path("a").join(path);
            write(&at("one/x"), &[b'x'; 100]);
            write_later(&at("two/y"), &[b'y'; 80], &at("one/x"));
            fs::hard_link(at("one/x"), at("one/x2")).unwrap();
            fs::hard_link(at("two/y"), at("one/y2")).unwrap();
            let store = opened(&bench);
            let [x, y] = ["one/x", "two/y"].map(|path| id_of(&store.catalog, path));
            let dirs = ["one", "two"].map(|dir| Dirty::Dir(id_of(&store.catalog, dir)));
            intend(&store, &dirs);
            drop(store);
            exchange(&bench, &["a", "b"], "one/x", "two/y");
            if all {
                exchange(&bench, &["a", "b"], "one/x2", "one/y2");
            }
            let opened = if births { &["a", "b"][..] } else { &["b"] };
            let store = bench.open(opened).unwrap();
            let (x2, y2) = if all { (y, x) } else { (x, y) };
            for (path, node) in [("one/x", y), ("two/y", x), ("one/x2", x2), ("one/y2", y2)] {
                let found = id_of(&store.catalog, path);
                assert_eq!(found, node, "{path}, all: {all}, by birth: {births}");
            }
            opened.iter().for_each(|name| assert_recorded(&store.catalog, &bench.path(name)));
        }
    }
}

/// It had a name of a linked file, and it was feared that nothing would be left of that: the file
/// was taken for a new one.
#[test]
fn a_file_written_to_under_a_name_of_a_linked_one_is_known_by_its_birth() {
    let bench = Bench::new();
    let at = |path: &str| bench.path("a").join(path);
    write(&at("one/x"), &[b'x'; 50]);
    write_later(&at("one/y"), &[b'y'; 50], &at("one/x"));
    fs::hard_link(at("one/x"), at("one/x2")).unwrap();
    let store = opened(&bench);
    let [x, y] = ["one/x", "one/y"].map(|path| id_of(&store.catalog, path));
    let dirs = ["one", "two"].map(|dir| Dirty::Dir(id_of(&store.catalog, dir)));
    intend(&store, &dirs);
    intend(&store, &[Dirty::File(x), Dirty::File(y)]);
    drop(store);
    fs::write(at("one/x"), [b'x'; 90]).unwrap();
    fs::write(at("one/y"), [b'y'; 90]).unwrap();
    exchange(&bench, &["a"], "one/x", "one/y");
    fs::hard_link(at("one/x"), at("two/y2")).unwrap();
    let store = bench.open(&["a", "b"]).unwrap();
    for (path, node) in [("one/x", y), ("two/y2", y), ("one/y", x), ("one/x2", x)] {
        assert_eq!(id_of(&store.catalog, path), node, "{path}");
    }
    assert_recorded(&store.catalog, &bench.path("b"));
}

/// Another is written to and renamed in the same breath: where births are unknown, either could
/// have been it, and its content was gone.
#[test]
fn an_empty_file_that_is_written_to_is_known_by_its_access_time() {
    let dying = Dying::new(Births::Unknown, &[100, 0]);
    dying.write_and_rename(0, 120);
    dying.on_each(|root| fs::write(root.join("one/1"), [b'n'; 200]).unwrap());
    let store = dying.recover(&[]);
    assert!(dying.is_at(&store, 0, "two/0") && dying.is_at(&store, 1, "one/1"));
    assert_recorded(&store.catalog, &dying.bench.path("b"));
}

/// A disk that kept the catalog, and not the rename that it tells of, as btrfs does: under the new
/// name lies what had it before.
#[test]
fn a_file_whose_recorded_rename_the_disk_lost_is_the_one_it_was() {
    for births in ALL {
        for written in [false, true] {
            let dying = Dying::new(births, &[100]);
            let names = if births == Births::Others { &["b"][..] } else { &["a", "b"] };
            let store = dying.bench.open(names).unwrap();
            let catalog = &store.catalog;
            let [one, two, over] = ["one", "two", "two/h"].map(|path| id_of(catalog, path));
            let [from, to] =
                ["0", "h"].map(|name| RelPath::parse(name).unwrap().names()[0].clone());
            let replaced = catalog.node(over).unwrap().unwrap();
            let mut row = catalog.node(dying.nodes[0].id).unwrap().unwrap();
            let mut changes = vec![
                Change::EntryRemove { parent: one, name: from },
                Change::EntryRemove { parent: two, name: to.clone() },
                Change::NodeGone(over),
                Change::ContentPreserved { id: replaced.content, cloned: false },
                Change::EntryAdd { parent: two, name: to, node: row.id },
            ];
            if written {
                row.content = catalog.next_content();
                row.size = 300;
                row.mtime = Timestamp::now();
                changes.push(Change::ContentAdd { id: row.content, node: row.id, size: 300 });
                changes.push(Change::NodePut(row.clone()));
            }
            let dirs = [one, two].map(Dirty::Dir);
            intend(&store, &dirs);
            intend(&store, &[Dirty::File(row.id)]);
            catalog.push(changes).unwrap();
            catalog.flush(Durability::Durable).unwrap();
            drop(store);
            let store = dying.recover(&[]);
            assert!(dying.is_at(&store, 0, "one/0"), "{births:?}, written to: {written}");
            assert!(!dying.is_at(&store, 0, "two/h"));
            assert_recorded(&store.catalog, &dying.bench.path("b"));
        }
    }
}

/// A file has the birth that is recorded for another, and not its own: so births are where a file
/// was made anew. It was taken for the other, and of its own versions nothing was left.
#[test]
fn a_file_under_its_name_is_not_taken_for_another_of_its_birth() {
    let dying = Dying::new(Births::Recorded, &[100, 80]);
    let store = dying.bench.open(&["a", "b"]).unwrap();
    let own = &dying.nodes[0];
    let btime = Timestamp { secs: own.btime.secs - 1, ..own.btime };
    store.catalog.push(vec![Change::NodePut(NodeRow { btime, ..own.clone() })]).unwrap();
    store.catalog.flush(Durability::Durable).unwrap();
    for dir in ["one", "two"] {
        intend(&store, &[Dirty::Dir(id_of(&store.catalog, dir))]);
    }
    dying.nodes.iter().for_each(|row| intend(&store, &[Dirty::File(row.id)]));
    drop(store);
    dying.on_each(|root| {
        fs::write(root.join("one/0"), [b'n'; 130]).unwrap();
        fs::remove_file(root.join("one/1")).unwrap();
    });
    dying.make("two/1", 120);
    let store = dying.recover(&[]);
    assert!(dying.is_at(&store, 0, "one/0"));
}

/// Another file that had its name for a while has nothing to lie in, and could be it by its size.
/// It was taken for that one, and of its own versions nothing was left.
#[test]
fn a_file_that_may_be_its_node_is_not_one_that_had_the_name_before() {
    [Births::Recorded, Births::Others].into_iter().for_each(had_the_name_before);
}

fn had_the_name_before(births: Births) {
    let dying = Dying::new(births, &[100, 80]);
    let store = dying.bench.open(&["a", "b"]).unwrap();
    let [one, two] = ["one", "two"].map(|path| id_of(&store.catalog, path));
    let name = |text: &str| RelPath::parse(text).unwrap().names()[0].clone();
    let [first, second] = [0, 1].map(|index| dying.nodes[index].id);
    let moved = |from: [(NodeId, &str); 2], to: [(NodeId, &str); 2]| {
        let gone = from.map(|(parent, text)| Change::EntryRemove { parent, name: name(text) });
        let nodes = [first, second].into_iter().zip(to);
        let come =
            nodes.map(|(node, (parent, text))| Change::EntryAdd { parent, name: name(text), node });
        store.catalog.push(gone.into_iter().chain(come).collect()).unwrap();
        store.catalog.flush(Durability::Durable).unwrap();
        store.catalog.freeze();
    };
    // The first one has the second's name for a while.
    let [before, while_away] = [[(one, "0"), (one, "1")], [(one, "1"), (two, "1")]];
    moved(before, while_away);
    moved(while_away, before);
    for dir in [one, two] {
        intend(&store, &[Dirty::Dir(dir)]);
    }
    [first, second].iter().for_each(|&node| intend(&store, &[Dirty::File(node)]));
    drop(store);
    dying.on_each(|root| {
        fs::remove_file(root.join("one/0")).unwrap();
        fs::write(root.join("one/1"), [b'n'; 130]).unwrap();
    });
    dying.make("one/0", 0);
    let store = dying.recover(&[]);
    assert!(dying.is_at(&store, 1, "one/1"), "{births:?}");
}

/// One name of a linked file was removed, unrecorded, and a new file of its size was made, on a
/// replica whose births are not the recorded ones. That was taken for the linked one.
#[test]
fn a_linked_file_that_lies_under_one_of_its_names_is_no_other() {
    let dying = Dying::new(Births::Others, &[100]);
    let store = dying.bench.open(&["b"]).unwrap();
    let node = dying.nodes[0].id;
    dying.on_each(|root| fs::hard_link(root.join("one/0"), root.join("two/link")).unwrap());
    let (parent, name) = (id_of(&store.catalog, "two"), RelPath::parse("link").unwrap());
    let name = name.names()[0].clone();
    store.catalog.push(vec![Change::EntryAdd { parent, name, node }]).unwrap();
    store.catalog.flush(Durability::Durable).unwrap();
    for dir in ["one", "two"] {
        intend(&store, &[Dirty::Dir(id_of(&store.catalog, dir))]);
    }
    intend(&store, &[Dirty::File(node)]);
    drop(store);
    dying.on_each(|root| fs::remove_file(root.join("one/0")).unwrap());
    dying.make("one/new", 100);
    let store = dying.recover(&[]);
    assert!(dying.is_at(&store, 0, "two/link"));
    assert_ne!(id_of(&store.catalog, "one/new"), node);
}

//! The past over a real catalog; only the bytes of contents come from a map.

use std::collections::HashMap;

use super::*;
use crate::catalog::{Change, Snapshot};
use crate::types::{ReplicaMap, Timestamp, XattrSetId};

mod kept;

/// A store without a live tree: a catalog to push to, and contents.
struct Store {
    catalog: Catalog,
    contents: Mutex<HashMap<ContentId, Vec<u8>>>,
    settled: Mutex<u32>,
    _dir: tempfile::TempDir,
}

impl History for Store {
    fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    fn settle(&self) -> Result<Generation> {
        *self.settled.lock() += 1;
        Ok(self.catalog.freeze())
    }

    fn read_content(
        &self,
        _node: NodeId,
        content: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let contents = self.contents.lock();
        let bytes = &contents[&content][offset as usize..];
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn seek_content(&self, _: NodeId, _: ContentId, offset: u64, to: Seek) -> Result<u64> {
        match to {
            Seek::Data => Ok(offset),
            Seek::Hole => Ok(offset + 1),
        }
    }
}

fn name(text: &str) -> EntryName {
    EntryName::new(text).expect("a valid name")
}

impl Store {
    fn new() -> Arc<Store> {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let file = dir.path().join("catalog.db");
        Catalog::create(&file, uuid::Uuid::new_v4()).expect("a new catalog");
        let catalog = Catalog::open(ReplicaMap::new(vec![Some(file)]), true).expect("opens");
        let (contents, settled) = (Mutex::default(), Mutex::default());
        let store = Store { catalog, contents, settled, _dir: dir };
        store.push(vec![Change::NodePut(store.row(NodeId::ROOT, Kind::Dir))]);
        Arc::new(store)
    }

    fn past(self: &Arc<Store>) -> Past {
        Past::new(self.clone(), PastOptions::new(1000, 1000))
    }

    fn push(&self, changes: Vec<Change>) -> Generation {
        self.catalog.push(changes).expect("pushed")
    }

    fn row(&self, id: NodeId, kind: Kind) -> NodeRow {
        let now = Timestamp::now();
        NodeRow {
            id,
            kind,
            mode: 0o750,
            uid: 7,
            gid: 8,
            rdev: 0,
            size: 0,
            blocks: 8,
            mtime: now,
            ctime: now,
            btime: now,
            xattrs: XattrSetId::NONE,
            content: ContentId::EMPTY,
        }
    }

    fn make(&self, parent: NodeId, text: &str, kind: Kind) -> NodeId {
        let node = self.catalog.next_node();
        let mut changes = vec![
            Change::NodePut(self.row(node, kind)),
            Change::EntryAdd { parent, name: name(text), node },
        ];
        if kind == Kind::Symlink {
            changes.push(Change::SymlinkTarget { node, target: b"to/there".to_vec() });
        }
        self.push(changes);
        node
    }

    fn dir(&self, parent: NodeId, text: &str) -> NodeId {
        self.make(parent, text, Kind::Dir)
    }

    /// A new file with a content, as one save.
    fn file(&self, parent: NodeId, text: &str, bytes: &str) -> NodeId {
        let node = self.make(parent, text, Kind::File);
        self.write(node, bytes);
        node
    }

    fn write(&self, node: NodeId, bytes: &str) {
        let id = self.catalog.next_content();
        let size = bytes.len() as u64;
        self.contents.lock().insert(id, bytes.as_bytes().to_vec());
        let row = NodeRow { size, content: id, ..self.row(node, Kind::File) };
        self.push(vec![Change::ContentAdd { id, node, size }, Change::NodePut(row)]);
    }

    fn chmod(&self, node: NodeId, mode: u32) {
        let row = self.catalog.node(node).expect("a query").expect("lives");
        self.catalog.freeze();
        self.push(vec![Change::NodePut(NodeRow { mode, ..row })]);
    }

    fn remove(&self, parent: NodeId, text: &str) {
        let name = name(text);
        let (node, _) = self.catalog.lookup(parent, &name).expect("a query").expect("is there");
        let names = self.catalog.names(node).expect("a query").len();
        let mut changes = vec![Change::EntryRemove { parent, name }];
        if names == 1 {
            changes.push(Change::NodeGone(node));
        }
        self.push(changes);
    }

    fn rename(&self, parent: NodeId, from: &str, new_parent: NodeId, to: &str) {
        let (from, to) = (name(from), name(to));
        let (node, _) = self.catalog.lookup(parent, &from).expect("a query").expect("is there");
        let mut changes = Vec::new();
        if let Some((old, _)) = self.catalog.lookup(new_parent, &to).expect("a query") {
            changes.push(Change::EntryRemove { parent: new_parent, name: to.clone() });
            changes.push(Change::NodeGone(old));
        }
        changes.push(Change::EntryRemove { parent, name: from });
        changes.push(Change::EntryAdd { parent: new_parent, name: to, node });
        self.push(changes);
    }

    fn link(&self, node: NodeId, parent: NodeId, text: &str) {
        self.push(vec![Change::EntryAdd { parent, name: name(text), node }]);
    }

    fn snapshot(&self, text: &str) -> Snapshot {
        let at = self.catalog.freeze();
        self.catalog.create_snapshot(text, at, false, &[]).expect("a snapshot")
    }
}

/// Shorthands of a person walking through the past.
impl Past {
    fn walk(&self, dir: NodeId, path: &str) -> Result<Entry> {
        let mut entry = self.enter(dir)?;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            entry = self.lookup(entry.stat.ino, &name(part))?;
            let again = self.stat(entry.stat.ino)?;
            assert_eq!(again.stat, entry.stat, "stat and lookup agree on {path}");
        }
        Ok(entry)
    }

    fn names(&self, dir: NodeId, path: &str) -> Vec<String> {
        let ino = self.walk(dir, path).expect(path).stat.ino;
        let listed = self.list(ino).expect(path);
        for entry in &listed {
            let found = self.lookup(ino, &entry.name).expect("what is listed can be looked up");
            assert_eq!(found.stat.kind, entry.kind);
            assert!(entry.ino == ino::UNKNOWN || entry.ino == found.stat.ino);
        }
        listed.iter().map(|entry| entry.name.to_string()).collect()
    }

    fn text(&self, dir: NodeId, path: &str) -> String {
        let entry = self.walk(dir, path).expect(path);
        let mut buffer = [0; 100];
        let count = self.read(entry.stat.ino, 0, &mut buffer).expect("a read");
        assert_eq!(count as u64, entry.stat.size);
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }

    fn fails(&self, dir: NodeId, path: &str, errno: Errno) {
        let error = self.walk(dir, path).expect_err(path);
        assert!(error.is(errno), "{path}: {error}");
    }
}

const ROOT: NodeId = NodeId::ROOT;

#[test]
fn a_snapshot_shows_what_was_live_and_nothing_later() {
    let store = Store::new();
    let src = store.dir(ROOT, "src");
    let main = store.file(src, "main.rs", "one");
    store.make(src, "link", Kind::Symlink);
    store.snapshot("first");
    store.write(main, "two, longer");
    store.remove(src, "link");
    store.file(src, "new.rs", "new");
    let past = store.past();
    assert_eq!(past.text(ROOT, "first/src/main.rs"), "one");
    assert_eq!(past.names(ROOT, "first"), ["src"]);
    assert_eq!(past.names(ROOT, "first/src"), ["link", "main.rs"]);
    let link = past.walk(ROOT, "first/src/link").expect("the symlink");
    assert_eq!(past.readlink(link.stat.ino).expect("a target"), b"to/there");
    past.fails(ROOT, "first/src/new.rs", Errno::NOENT);
    past.fails(ROOT, "first/.snapshots", Errno::NOENT);
    past.fails(ROOT, "nothing", Errno::NOENT);
    let file = past.walk(ROOT, "first/src/main.rs").expect("the file");
    assert!(file.lasting, "a snapshot's files never change");
    assert_eq!((file.stat.mode, file.stat.uid, file.stat.gid, file.stat.nlink), (0o750, 7, 8, 1));
    let dir = past.walk(ROOT, "first/src").expect("the directory");
    assert_eq!((dir.stat.size, dir.stat.nlink), (4096, 1));
    let named = past.walk(ROOT, "first").expect("the snapshot");
    assert!(named.lasting, "the kernel is told when it loses its name");
}

#[test]
fn reads_and_seeks_end_with_the_file_and_need_one() {
    let store = Store::new();
    store.file(ROOT, "f", "abc");
    store.file(ROOT, "empty", "");
    store.snapshot("s");
    let past = store.past();
    let file = past.walk(ROOT, "s/f").expect("the file").stat.ino;
    let mut buffer = [0; 8];
    assert_eq!(past.read(file, 1, &mut buffer).expect("a read"), 2);
    assert_eq!(past.read(file, 3, &mut buffer).expect("a read"), 0);
    assert_eq!(past.read(file, u64::MAX, &mut buffer).expect("a read"), 0);
    assert_eq!(past.seek(file, 1, Seek::Data).expect("a seek"), 1);
    assert!(past.seek(file, 3, Seek::Hole).is_err_and(|error| error.is(Errno::NXIO)));
    let dir = past.walk(ROOT, "s").expect("the snapshot").stat.ino;
    assert!(past.read(dir, 0, &mut buffer).is_err_and(|error| error.is(Errno::ISDIR)));
    assert!(past.readlink(file).is_err_and(|error| error.is(Errno::INVAL)));
    assert!(past.lookup(file, &name("x")).is_err());
}

#[test]
fn every_directory_shows_its_own_past_also_after_a_rename() {
    let store = Store::new();
    let old = store.dir(ROOT, "old");
    let deep = store.dir(old, "deep");
    store.file(deep, "f", "1");
    store.snapshot("before");
    store.rename(ROOT, "old", ROOT, "renamed");
    let late = store.dir(ROOT, "late");
    store.snapshot("after");
    let past = store.past();
    assert_eq!(past.text(deep, "before/f"), "1");
    assert_eq!(past.text(old, "before/deep/f"), "1");
    assert_eq!(past.names(old, ""), ["before", "after", "latest"]);
    assert_eq!(past.names(late, ""), ["after", "latest"]);
    past.fails(late, "before", Errno::NOENT);
    assert_eq!(past.names(ROOT, "before"), ["old"]);
    assert_eq!(past.names(ROOT, "after"), ["late", "renamed"]);
}

#[test]
fn a_name_used_again_shows_the_directory_that_bore_it_then() {
    let store = Store::new();
    let first = store.dir(ROOT, "d");
    store.file(first, "a", "1");
    store.snapshot("one");
    store.remove(first, "a");
    store.remove(ROOT, "d");
    let second = store.dir(ROOT, "d");
    store.file(second, "b", "2");
    store.snapshot("two");
    let past = store.past();
    assert_eq!(past.names(ROOT, "one/d"), ["a"]);
    assert_eq!(past.names(ROOT, "two/d"), ["b"]);
    // The new directory has no part in the old one's past.
    past.fails(second, "one", Errno::NOENT);
    past.enter(first).expect_err("the old directory is gone");
}

#[test]
fn latest_points_to_the_newest_snapshot() {
    let store = Store::new();
    let past = store.past();
    past.fails(ROOT, "latest", Errno::NOENT);
    assert!(past.names(ROOT, "").is_empty());
    store.snapshot("zz-first");
    store.file(ROOT, "f", "1");
    store.snapshot("aa-second");
    let latest = past.walk(ROOT, "latest").expect("the link");
    assert_eq!(past.readlink(latest.stat.ino).expect("a target"), b"aa-second");
    assert_eq!(latest.stat.size, 9);
    assert_eq!(past.names(ROOT, ""), ["zz-first", "aa-second", "latest"]);
}

#[test]
fn an_instant_shows_the_tree_of_that_moment() {
    let store = Store::new();
    let file = store.file(ROOT, "f", "1");
    let first = store.catalog.freeze();
    let begun = store.catalog.time_of(first).expect("a time");
    // The catalog tells times apart to about 10 ms.
    while Timestamp::now().as_nanos() - begun.as_nanos() < 50_000_000 {
        std::thread::yield_now();
    }
    store.write(file, "two");
    let past = store.past();
    let instant = begun.as_nanos() + 20_000_000;
    let path = format!(".at/@{}.{:09}", instant / 1_000_000_000, instant % 1_000_000_000);
    assert_eq!(past.text(ROOT, &format!("{path}/f")), "1");
    assert_eq!(past.text(ROOT, ".at/0s/f"), "two");
    assert_eq!(past.text(ROOT, ".at/now/f"), "two");
    assert_eq!(*store.settled.lock(), 2, "only the present needs open files sealed");
    assert!(past.names(ROOT, ".at").is_empty(), "instants are looked up and never listed");
    for absent in ["1h", "2999-01-01", "1999-01-01", "soon", "2026-99-99"] {
        past.fails(ROOT, &format!(".at/{absent}"), Errno::NOENT);
    }
    let not_utf8 = EntryName::new(b"\xff").expect("a name");
    let at = past.walk(ROOT, ".at").expect(".at").stat.ino;
    assert!(past.lookup(at, &not_utf8).is_err_and(|error| error.is(Errno::NOENT)));
}

#[test]
fn samba_finds_a_snapshot_by_its_second() {
    let store = Store::new();
    store.file(ROOT, "f", "1");
    let snapshot = store.snapshot("s");
    let past = store.past();
    let gmt = crate::time::gmt_name(snapshot.time);
    assert_eq!(past.text(ROOT, &format!("{gmt}/f")), "1");
    past.fails(ROOT, "@GMT-2001.01.01-00.00.00", Errno::NOENT);
    assert_eq!(past.names(ROOT, ""), ["s", "latest"]);
    let by_name = past.walk(ROOT, "s").expect("by name");
    let by_time = past.walk(ROOT, &gmt).expect("by time");
    assert_ne!(by_name.stat.ino, by_time.stat.ino, "no directory has two paths");
}

#[test]
fn versions_are_the_contents_of_a_file_through_renames() {
    let store = Store::new();
    let sub = store.dir(ROOT, "sub");
    let file = store.file(ROOT, "draft.txt", "1");
    store.chmod(file, 0o600);
    store.write(file, "22");
    store.rename(ROOT, "draft.txt", sub, "notes.txt");
    store.write(file, "333");
    let past = store.past();
    let versions = past.names(sub, ".versions/notes.txt");
    assert!(versions.iter().all(|version| version.ends_with(".txt")));
    let texts: Vec<String> = versions
        .iter()
        .map(|version| past.text(sub, &format!(".versions/notes.txt/{version}")))
        .collect();
    assert_eq!(texts, ["1", "22", "333"], "one for each content, none for a chmod");
    let first = past.walk(sub, &format!(".versions/notes.txt/{}", versions[0])).expect("a file");
    assert_eq!((first.stat.mode, first.stat.nlink), (0o600, 1), "with its last attributes");
    assert_eq!(past.names(sub, ".versions"), ["notes.txt"]);
    assert!(past.names(ROOT, ".versions").is_empty());
    past.fails(sub, ".versions/other", Errno::NOENT);
    past.fails(ROOT, ".versions/sub", Errno::NOENT);
    past.fails(sub, ".versions/notes.txt/2001-01-01_00-00-00.000.txt", Errno::NOENT);
}

#[test]
fn versions_reach_past_programs_that_save_by_renaming_over() {
    let store = Store::new();
    store.file(ROOT, "notes.txt", "1");
    for (tmp, text) in [("a.tmp", "22"), ("b.tmp", "333")] {
        store.file(ROOT, tmp, text);
        store.rename(ROOT, tmp, ROOT, "notes.txt");
    }
    let past = store.past();
    let read = |past: &Past| -> Vec<String> {
        past.names(ROOT, ".versions/notes.txt")
            .iter()
            .map(|version| past.text(ROOT, &format!(".versions/notes.txt/{version}")))
            .collect()
    };
    assert_eq!(read(&past), ["1", "22", "333"]);
    store.remove(ROOT, "notes.txt");
    assert_eq!(read(&past), ["1", "22", "333"], "a deleted file's versions stay");
    assert_eq!(past.names(ROOT, ".versions"), ["notes.txt"]);
}

#[test]
fn deleted_shows_files_and_directories_in_their_last_state() {
    let store = Store::new();
    let dir = store.dir(ROOT, "dir");
    let sub = store.dir(dir, "sub");
    store.file(sub, "deep", "deep");
    store.file(dir, "a", "a");
    let file = store.file(ROOT, "file", "1");
    store.write(file, "last");
    store.file(ROOT, "kept", "k");
    store.file(ROOT, "moved", "m");
    store.rename(ROOT, "moved", ROOT, "elsewhere");
    // As `rm -r` does it: the contents first.
    store.remove(dir, "a");
    store.remove(sub, "deep");
    store.remove(dir, "sub");
    store.remove(ROOT, "dir");
    store.remove(ROOT, "file");
    let past = store.past();
    assert_eq!(past.names(ROOT, ".deleted"), ["dir", "file"]);
    assert_eq!(past.text(ROOT, ".deleted/file"), "last");
    assert_eq!(past.names(ROOT, ".deleted/dir"), ["a", "sub"]);
    assert_eq!(past.text(ROOT, ".deleted/dir/sub/deep"), "deep");
    past.fails(ROOT, ".deleted/kept", Errno::NOENT);
    past.fails(ROOT, ".deleted/moved", Errno::NOENT);
    past.fails(ROOT, ".deleted/never", Errno::NOENT);
    // A name in use again is not deleted.
    store.file(ROOT, "file", "new");
    assert_eq!(past.names(ROOT, ".deleted"), ["dir"]);
}

#[test]
fn a_deleted_directory_begins_with_its_deepest_removal_and_ends_with_what_was_made_meanwhile() {
    let store = Store::new();
    let dir = store.dir(ROOT, "dir");
    let first = store.dir(dir, "first");
    store.file(first, "x", "x");
    store.remove(first, "x");
    store.remove(dir, "first");
    store.remove(ROOT, "dir");
    let other = store.dir(ROOT, "other");
    store.file(other, "early", "e");
    store.remove(other, "early");
    store.file(other, "late", "l");
    store.remove(other, "late");
    store.remove(ROOT, "other");
    let past = store.past();
    assert_eq!(past.text(ROOT, ".deleted/dir/first/x"), "x");
    assert_eq!(past.names(ROOT, ".deleted/other"), ["late"], "the newest state is what counts");
    store.dir(ROOT, "empty");
    store.remove(ROOT, "empty");
    assert!(past.names(ROOT, ".deleted/empty").is_empty());
}

#[test]
fn inode_numbers_are_unique_and_those_of_named_snapshots_stable() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    let file = store.file(dir, "f", "1");
    store.link(file, ROOT, "hard");
    store.snapshot("one");
    store.write(file, "22");
    store.snapshot("two");
    let past = store.past();
    let ino = |past: &Past, from: NodeId, path: &str| past.walk(from, path).expect(path).stat.ino;
    let hard = past.walk(ROOT, "one/hard").expect("the file").stat;
    assert_eq!(hard.ino, ino(&past, ROOT, "one/d/f"), "two names of one file");
    assert_eq!(hard.nlink, 2);
    let gmt = crate::time::gmt_name(store.catalog.snapshots().expect("a query")[1].time);
    let paths = [
        (ROOT, "/ latest .at .versions .deleted one two one/d two/d .at/now .at/now/d"),
        (ROOT, ".versions/hard one/d/f two/d/f"),
        (dir, "/ latest .at .versions .deleted one two .at/now .versions/f one/f"),
        (ROOT, &gmt),
        (dir, &gmt),
    ];
    let mut seen = HashMap::new();
    for (from, paths) in paths {
        for path in paths.split(' ') {
            let number = ino(&past, from, path);
            assert!(Past::owns(number) && !Past::owns(from.0));
            if let Some(other) = seen.insert(number, (from, path)) {
                panic!("{other:?} and {:?} share an inode number", (from, path));
            }
            assert_eq!(ino(&past, from, path), number, "asked again");
        }
    }
    // Another mount of the same store.
    let remounted = store.past();
    for path in ["one", "two", "one/d", "two/d", "one/d/f", "one/hard"] {
        assert_eq!(ino(&remounted, ROOT, path), ino(&past, ROOT, path), "{path}");
    }
}

#[test]
fn parents_lead_back_to_the_live_tree() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    let sub = store.dir(dir, "sub");
    store.file(sub, "f", "1");
    store.snapshot("s");
    store.rename(dir, "sub", ROOT, "moved");
    let past = store.past();
    let ino = |path: &str| past.walk(dir, path).expect(path).stat.ino;
    assert_eq!(past.parent(ino("s/sub")), ino("s"));
    assert_eq!(past.parent(ino("s")), ino(""));
    assert_eq!(past.parent(ino("")), dir.0);
    assert_eq!(past.parent(ino(".at/now")), ino(".at"));
    assert_eq!(past.parent(ino(".at")), ino(""));
    assert_eq!(past.parent(u64::MAX), u64::MAX);
}

#[test]
fn snapshots_are_made_renamed_and_forgotten_in_any_snapshots_directory() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    let past = store.past();
    let snapshots = past.enter(dir).expect("entered").stat.ino;
    let text = past.snapshot_to_create(snapshots, &name("mine")).expect("allowed");
    let made = store.snapshot(&text);
    let entry = past.created(snapshots, &made).expect("made");
    assert_eq!(entry.stat.ino, past.walk(dir, "mine").expect("found").stat.ino);
    let fails = |result: Result<()>, errno| {
        let error = result.expect_err("refused");
        assert!(error.is(errno), "{error}, not {errno}");
    };
    let create = |ino, text: &str| past.snapshot_to_create(ino, &name(text)).map(|_| ());
    fails(create(snapshots, "mine"), Errno::EXIST);
    for taken in ["latest", ".at"] {
        fails(create(snapshots, taken), Errno::EXIST);
    }
    for bad in [".hidden", "@GMT-x", "a\nb", "now", "2h"] {
        fails(create(snapshots, bad), Errno::INVAL);
    }
    for elsewhere in ["mine", ".at", ".versions", ".deleted"] {
        let ino = past.walk(dir, elsewhere).expect(elsewhere).stat.ino;
        fails(create(ino, "x"), Errno::ROFS);
        fails(past.remove_snapshot(ino, &name("x")), Errno::ROFS);
        fails(past.rename_snapshot(ino, &name("x"), ino, &name("y")), Errno::ROFS);
    }
    let root = past.enter(ROOT).expect("entered").stat.ino;
    fails(past.rename_snapshot(snapshots, &name("mine"), root, &name("x")), Errno::XDEV);
    fails(past.rename_snapshot(snapshots, &name("no"), snapshots, &name("x")), Errno::NOENT);
    fails(past.rename_snapshot(snapshots, &name(".at"), snapshots, &name("x")), Errno::PERM);
    past.rename_snapshot(snapshots, &name("mine"), snapshots, &name("ours")).expect("renamed");
    let renamed = past.walk(dir, "ours").expect("found by its new name");
    assert_eq!(renamed.stat.ino, entry.stat.ino);
    past.fails(dir, "mine", Errno::NOENT);
    store.catalog.hold_snapshot("ours", true).expect("held");
    fails(past.remove_snapshot(root, &name("ours")), Errno::BUSY);
    store.catalog.hold_snapshot("ours", false).expect("released");
    fails(past.remove_snapshot(snapshots, &name("ours")), Errno::PERM);
    past.remove_snapshot(root, &name("ours")).expect("forgotten");
    fails(past.remove_snapshot(root, &name("ours")), Errno::NOENT);
}

#[test]
fn what_lies_below_a_deleted_snapshot_is_stale() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    store.file(dir, "f", "1");
    store.snapshot("s");
    let past = store.past();
    let inner = past.walk(ROOT, "s/d").expect("found").stat.ino;
    let from_dir = past.walk(dir, "s").expect("found").stat.ino;
    let root = past.enter(ROOT).expect("entered").stat.ino;
    past.remove_snapshot(root, &name("s")).expect("forgotten");
    past.fails(ROOT, "s", Errno::NOENT);
    for ino in [inner, from_dir] {
        assert!(past.lookup(ino, &name("f")).is_err_and(|error| error.is(Errno::STALE)));
        assert!(past.list(ino).is_err_and(|error| error.is(Errno::STALE)));
    }
    store.snapshot("s");
    assert_ne!(past.walk(ROOT, "s/d").expect("the new one").stat.ino, inner);
}

#[test]
fn what_lists_a_directory_is_as_private_as_the_directory() {
    let store = Store::new();
    let dir = store.dir(ROOT, "d");
    let set = Xattrs(
        [(ACCESS_ACL.to_vec(), b"acl".to_vec()), (b"user.x".to_vec(), b"1".to_vec())].into(),
    );
    let xattrs = store.catalog.intern_xattrs(&set).expect("interned");
    let row = store.row(dir, Kind::Dir);
    store.push(vec![Change::NodePut(NodeRow { mode: 0o711, xattrs, ..row })]);
    store.snapshot("s");
    let past = store.past();
    for path in [".versions", ".deleted"] {
        let entry = past.walk(dir, path).expect(path);
        assert_eq!((entry.stat.mode, entry.stat.uid), (0o511, 7));
        let shown = past.xattrs(entry.stat.ino).expect("xattrs");
        assert_eq!(shown.0.keys().collect::<Vec<_>>(), [ACCESS_ACL]);
    }
    let entry = past.walk(dir, "s").expect("the view");
    assert_eq!(entry.stat.mode, 0o711);
    assert_eq!(*past.xattrs(entry.stat.ino).expect("xattrs"), set);
    let snapshots = past.enter(dir).expect("entered");
    assert_eq!((snapshots.stat.mode, snapshots.stat.uid), (0o755, 1000));
    assert!(past.xattrs(snapshots.stat.ino).expect("none").0.is_empty());
}

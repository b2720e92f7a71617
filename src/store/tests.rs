//! Whole stores on real directories.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::catalog::NodeRow;
use crate::progress::ProgressSink;
use crate::retention::StorePolicy;
use crate::types::{ContentId, EntryName, Kind, NodeId, RelPath};

mod bounded;
mod crash;
mod frozen;
mod lost;
mod refusals;
mod regain;
mod shuffled;
mod silent;
mod space;
mod unclean;

/// Backings side by side in a scratch directory.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    /// Where no other program's writing makes a call wait that does not hang.
    fn in_memory() -> Bench {
        Bench { dir: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    fn paths(&self, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|name| self.path(name)).collect()
    }

    fn open(&self, names: &[&str]) -> Result<Store> {
        open_with(&self.paths(names), &OpenOptions::default(), &Progress::silent())
    }

    /// Removes the intent logs: the store is as a mount of an older version left it, and all of it
    /// is compared.
    fn lose_logs(&self) {
        for backing in fs::read_dir(self.dir.path()).unwrap().flatten() {
            let _ = fs::remove_file(backing.path().join(".rearview/intent.log"));
        }
    }

    /// Opens, closes and compares all with the first.
    fn settle(&self, names: &[&str]) {
        let store = self.open(names).unwrap();
        store.close().unwrap();
        drop(store);
        self.assert_equal(names);
    }

    fn assert_equal(&self, names: &[&str]) {
        for name in &names[1..] {
            let found = compare::compare(&self.path(names[0]), &self.path(name)).unwrap();
            assert!(found.is_empty(), "{}: {found:#?}", names[0]);
        }
    }
}

fn open_with(paths: &[PathBuf], options: &OpenOptions, progress: &Progress) -> Result<Store> {
    open(paths, options, &|_, _, _| Ok(()), progress)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A tree with every kind of object.
fn make_tree(root: &Path) {
    write(&root.join("a.txt"), b"first");
    write(&root.join("empty"), b"");
    write(&root.join("d/e/deep"), &[7; 100_000]);
    write(&root.join("d/name\n\x1b[31m"), b"odd");
    fs::create_dir(root.join("d/hollow")).unwrap();
    symlink("a.txt", root.join("link")).unwrap();
    symlink("/nowhere/at/all", root.join("d/dangling")).unwrap();
    fs::hard_link(root.join("a.txt"), root.join("d/a-again")).unwrap();
    fs::hard_link(root.join("link"), root.join("d/link-again")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    use std::os::unix::fs::FileExt;
    sparse.write_at(b"end", 50 << 20).unwrap();
    sparse.set_len(60 << 20).unwrap();
    let dir = rustix::fs::open(root, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(&dir, "fifo", rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    if is_root() {
        let device = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(&dir, "null", rustix::fs::FileType::CharacterDevice, mode, device)
            .unwrap();
        std::os::unix::fs::lchown(root.join("d/e/deep"), Some(1234), Some(99)).unwrap();
        std::os::unix::fs::lchown(root.join("link"), Some(5), Some(6)).unwrap();
    }
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("a.txt"), "user.note", b"x\0y", none).unwrap();
    rustix::fs::setxattr(root.join("d"), "user.dir", b"1", none).unwrap();
    rustix::fs::setxattr(root.join("d"), "system.posix_acl_default", &acl(), none).unwrap();
    rustix::fs::setxattr(root.join("empty"), "system.posix_acl_access", &acl(), none).unwrap();
    fs::set_permissions(root.join("d/e/deep"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(root.join("d/hollow"), fs::Permissions::from_mode(0o3511)).unwrap();
    let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    fs::File::open(root.join("d/e")).unwrap().set_times(times).unwrap();
}

/// `user::rw- user:7:r-- group::r-- mask::r-- other::---` in the form of the kernel.
fn acl() -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 7), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)];
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Every object of the catalog's live tree by path; equal node ids mean hard links.
fn catalog_tree(catalog: &Catalog) -> Vec<(RelPath, NodeRow)> {
    let mut found = vec![(RelPath::root(), catalog.node(NodeId::ROOT).unwrap().unwrap())];
    let mut next = 0;
    while next < found.len() {
        let (path, row) = found[next].clone();
        next += 1;
        if row.kind == Kind::Dir {
            for one in catalog.list(row.id).unwrap() {
                let row = catalog.node(one.node).unwrap().unwrap();
                assert_eq!(one.kind, row.kind);
                found.push((path.join(&one.name), row));
            }
        }
    }
    found
}

/// The catalog's live tree is the one on the backing.
fn assert_recorded(catalog: &Catalog, root: &Path) {
    let site = Site::open(root).unwrap();
    let tree = catalog_tree(catalog);
    let mut on_disk = 1;
    let mut inodes = std::collections::HashMap::new();
    for (path, row) in &tree {
        let (object, entries) = match path.split_last() {
            None => {
                let dir = site.dir(path).unwrap();
                (site.object_of(&dir, path).unwrap(), site.live_entries(&dir, path).unwrap().len())
            }
            Some((above, name)) => {
                let dir = site.dir(&above).unwrap();
                let object = site.object(&dir, &above, name).unwrap().expect("on disk");
                let entries = match row.kind {
                    Kind::Dir => {
                        let own = site.dir(path).unwrap();
                        site.live_entries(&own, path).unwrap().len()
                    }
                    _ => 0,
                };
                (object, entries)
            }
        };
        on_disk += entries;
        let stat = &object.stat;
        let known = (row.kind, row.mode, row.uid, row.gid, row.rdev, row.mtime);
        assert_eq!(
            known,
            (stat.kind, stat.mode, stat.uid, stat.gid, stat.rdev, stat.mtime),
            "{path}"
        );
        assert_eq!(*catalog.xattrs(row.xattrs).unwrap(), object.xattrs, "{path}");
        if row.kind == Kind::Symlink {
            let target = catalog.symlink_target(row.id).unwrap().unwrap();
            assert_eq!(target, object.target, "{path}");
        }
        if row.kind == Kind::File {
            assert_eq!(row.size, stat.size, "{path}");
            assert_eq!(row.content == ContentId::EMPTY, row.size == 0, "{path}");
            if row.size > 0 {
                assert_eq!(catalog.content_size(row.content).unwrap(), Some(row.size));
            }
        }
        assert_eq!(*inodes.entry(stat.ino).or_insert(row.id), row.id, "{path}: hard links");
        if row.kind != Kind::Dir {
            assert_eq!(catalog.names(row.id).unwrap().len(), stat.nlink as usize, "{path}");
        }
    }
    assert_eq!(on_disk, tree.len(), "names on disk and in the catalog");
}

fn id_of(catalog: &Catalog, path: &str) -> NodeId {
    let path = RelPath::parse(path).unwrap();
    catalog.resolve_at(catalog.generation(), &path).unwrap().expect("recorded").id
}

/// Stops the work at the nth report.
struct StopAt {
    left: AtomicU64,
    stop: Arc<AtomicBool>,
}

impl ProgressSink for StopAt {
    fn begin(&self, _phase: &str, _items: u64, _bytes: u64) {}
    fn advance(&self, _items: u64, _bytes: u64) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
    fn end(&self) {}
}

fn stopping_at(number: u64) -> Progress {
    let stop = Arc::new(AtomicBool::new(false));
    Progress::new(Arc::new(StopAt { left: AtomicU64::new(number), stop: stop.clone() }), stop)
}

#[test]
fn empty_and_absent_backings_become_a_store() {
    let bench = Bench::new();
    fs::create_dir(bench.path("a")).unwrap();
    let store = bench.open(&["a", "b", "c"]).unwrap();
    assert_eq!(store.replicas.ids().count(), 3);
    assert_recorded(&store.catalog, &bench.path("a"));
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        let info = inspect(&bench.path(name)).unwrap();
        assert!(info.clean && info.owner.is_none());
        assert_eq!((info.marker.label.as_str(), info.marker.peers.len()), (name, 2));
        let private = fs::metadata(bench.path(name).join(".rearview")).unwrap();
        assert_eq!(private.mode() & 0o777, 0o700);
    }
    assert!(bench.open(&["b"]).is_ok());
}

#[test]
fn adoption_records_and_copies_every_kind_of_object() {
    let bench = Bench::new();
    make_tree(&{
        let path = bench.path("a");
        fs::create_dir(&path).unwrap();
        path
    });
    let store = bench.open(&["a", "b"]).unwrap();
    assert_recorded(&store.catalog, &bench.path("a"));
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b"]);
    let (sparse, copy) = (
        fs::metadata(bench.path("a/sparse")).unwrap(),
        fs::metadata(bench.path("b/sparse")).unwrap(),
    );
    assert!(copy.blocks() <= sparse.blocks() + 64, "holes stay holes: {}", copy.blocks());
    // Either alone is the store.
    let store = bench.open(&["b"]).unwrap();
    assert_recorded(&store.catalog, &bench.path("b"));
}

#[test]
fn a_clean_store_is_opened_without_looking_at_its_tree() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "b"]);
    fs::remove_file(bench.path("a/f")).unwrap();
    let store = bench.open(&["a", "b"]).unwrap();
    assert!(catalog_tree(&store.catalog).iter().any(|(path, _)| path.to_string() == "/f"));
}

#[test]
fn what_an_unclean_end_left_is_taken_in_and_mirrored() {
    let bench = Bench::new();
    let a = bench.path("a");
    fs::create_dir(&a).unwrap();
    make_tree(&a);
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let (deep, kept) = (id_of(&store.catalog, "d/e/deep"), id_of(&store.catalog, "a.txt"));
    // Dropped without closing: as if killed.
    drop(store);
    bench.lose_logs();
    assert!(!inspect(&a).unwrap().clean);
    fs::rename(a.join("d/e/deep"), a.join("moved")).unwrap();
    fs::remove_dir_all(a.join("d/e")).unwrap();
    fs::remove_file(a.join("link")).unwrap();
    write(&a.join("link"), b"now a file");
    write(&a.join("new/dir/file"), b"new");
    write(&a.join("empty"), b"no more");
    fs::set_permissions(a.join("a.txt"), fs::Permissions::from_mode(0o600)).unwrap();
    write(&bench.path("b/only-there"), b"dropped, but kept");
    let recovered = AtomicBool::new(false);
    let recover = |set: &ReplicaSet, _: &Catalog, _| {
        assert_eq!(set.ids().count(), 1);
        recovered.store(true, Ordering::Relaxed);
        Ok(())
    };
    let paths = bench.paths(&["a", "b"]);
    let store = open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap();
    assert!(recovered.load(Ordering::Relaxed));
    assert_recorded(&store.catalog, &a);
    assert_eq!(id_of(&store.catalog, "moved"), deep, "a renamed file stays itself");
    assert_eq!(id_of(&store.catalog, "a.txt"), kept);
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b"]);
    let quarantine = bench.path("b/.rearview/quarantine");
    let found: Vec<_> = fs::read_dir(quarantine)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("only-there"))
        .filter(|path| path.exists())
        .collect();
    assert_eq!(fs::read(&found[0]).unwrap(), b"dropped, but kept");
    bench.settle(&["a", "b"]);
}

#[test]
fn equal_times_and_sizes_do_not_hide_bytes_that_differ_after_a_crash() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"right");
    bench.settle(&["a", "b"]);
    drop(bench.open(&["a", "b"]).unwrap());
    bench.lose_logs();
    let modified = fs::metadata(bench.path("a/f")).unwrap().modified().unwrap();
    fs::write(bench.path("b/f"), b"wrong").unwrap();
    let times = fs::FileTimes::new().set_modified(modified);
    fs::File::options().write(true).open(bench.path("b/f")).unwrap().set_times(times).unwrap();
    bench.settle(&["a", "b"]);
    assert_eq!(fs::read(bench.path("b/f")).unwrap(), b"right");
}

#[test]
fn a_replica_that_was_away_is_brought_up() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a"]).unwrap();
    let mut row = store.catalog.node(id_of(&store.catalog, "f")).unwrap().unwrap();
    row.mode = 0o600;
    fs::set_permissions(bench.path("a/f"), fs::Permissions::from_mode(0o600)).unwrap();
    store.catalog.push(vec![crate::catalog::Change::NodePut(row)]).unwrap();
    store.close().unwrap();
    drop(store);
    assert_eq!(inspect(&bench.path("a")).unwrap().marker.peers[0].state, PeerState::Stale);
    bench.settle(&["a", "b"]);
    assert_eq!(inspect(&bench.path("a")).unwrap().marker.peers[0].state, PeerState::Ok);
}

#[test]
fn who_missed_nothing_is_not_stale() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    bench.settle(&["a", "b"]);
    bench.settle(&["a"]);
    bench.settle(&["b"]);
    assert_eq!(inspect(&bench.path("b")).unwrap().marker.peers[0].state, PeerState::Ok);
    bench.settle(&["a", "b"]);
}

#[test]
fn a_new_backing_joins_and_is_filled() {
    let bench = Bench::new();
    fs::create_dir(bench.path("a")).unwrap();
    make_tree(&bench.path("a"));
    bench.settle(&["a"]);
    bench.settle(&["new", "a"]);
    assert_eq!(bench.open(&["new", "a"]).unwrap().replicas.ids().count(), 2);
}

#[test]
fn all_replicas_have_one_policy_whoever_was_away_or_is_new() {
    let bench = Bench::new();
    bench.settle(&["a", "b"]);
    let policy = |name: &str| inspect(&bench.path(name)).unwrap().marker.policy;
    let mut own = StorePolicy { every: crate::retention::Span::hours(6), ..StorePolicy::default() };
    let store = bench.open(&["a"]).unwrap();
    assert!(store.policy().is_default());
    store.set_policy(&own).unwrap();
    assert_eq!((store.policy(), policy("a")), (own.clone(), own.clone()));
    let hopeless = StorePolicy { snapshots: Default::default(), ..own.clone() };
    assert!(matches!(store.set_policy(&hopeless), Err(Error::Refused(_))));
    store.close().unwrap();
    drop(store);
    assert!(policy("b").is_default());
    bench.settle(&["b", "a", "new"]);
    assert_eq!([policy("a"), policy("b"), policy("new")], [own.clone(), own.clone(), own.clone()]);
    // The default is a policy as any other.
    let store = bench.open(&["a", "b", "new"]).unwrap();
    own = StorePolicy::default();
    store.set_policy(&own).unwrap();
    assert_eq!([policy("a"), policy("b"), policy("new")], [own.clone(), own.clone(), own]);
    store.close().unwrap();
}

#[test]
fn history_files_are_filled_too() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    bench.settle(&["a"]);
    write(&bench.path("a/.rearview/preserved/0a/00.11"), b"old bytes");
    write(&bench.path("a/.rearview/undo/0000000000000001.seg"), b"undo 1");
    bench.settle(&["a", "b"]);
    assert_eq!(fs::read(bench.path("b/.rearview/preserved/0a/00.11")).unwrap(), b"old bytes");
    write(&bench.path("b/.rearview/undo/0000000000000001.seg"), b"undo X");
    drop(bench.open(&["a", "b"]).unwrap());
    bench.lose_logs();
    bench.settle(&["a", "b"]);
    assert_eq!(fs::read(bench.path("b/.rearview/undo/0000000000000001.seg")).unwrap(), b"undo 1");
}

#[test]
fn a_replica_thrown_out_while_mounted_is_stale_for_the_others() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    let store = bench.open(&["a", "b"]).unwrap();
    let last = store.replicas.ids().last().unwrap();
    store.catalog.detach(last);
    store.mark_stale(last, "write: Input/output error").unwrap();
    store.close().unwrap();
    drop(store);
    let info = inspect(&bench.path("a")).unwrap();
    assert_eq!(info.marker.peers[0].state, PeerState::Stale);
    assert!(info.marker.peers[0].reason.contains("Input/output"));
    assert!(!inspect(&bench.path("b")).unwrap().clean);
    bench.settle(&["a", "b"]);
}

#[test]
fn a_damaged_catalog_is_taken_from_another_replica() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    bench.settle(&["a", "b"]);
    let catalog = bench.path("a/.rearview/catalog.db");
    fs::write(&catalog, vec![0x5a; 20_000]).unwrap();
    bench.settle(&["a", "b"]);
    fs::write(&catalog, b"").unwrap();
    fs::write(bench.path("b/.rearview/catalog.db"), b"junk").unwrap();
    let error = bench.open(&["a", "b"]).err().unwrap();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert_eq!(fs::read(bench.path("a/f")).unwrap(), b"one");
}

#[test]
fn a_catalog_damaged_in_part_is_taken_from_another_replica() {
    for unclean in [false, true] {
        let bench = Bench::new();
        for number in 0..500 {
            write(&bench.path(&format!("a/a-file-with-a-long-name-{number}")), b"one");
        }
        bench.settle(&["a", "b"]);
        if unclean {
            drop(bench.open(&["a", "b"]).unwrap());
            bench.lose_logs();
        }
        let catalog = bench.path("a/.rearview/catalog.db");
        let mut bytes = fs::read(&catalog).unwrap();
        let from = bytes.len() / 2;
        bytes[from..].fill(0x5a);
        fs::write(&catalog, bytes).unwrap();
        Catalog::inspect(&catalog).expect("its head is whole");
        assert!(bench.open(&["a"]).is_err());
        bench.settle(&["a", "b"]);
        let store = bench.open(&["a"]).unwrap();
        assert_recorded(&store.catalog, &bench.path("a"));
    }
}

#[test]
fn a_name_that_we_give_a_meaning_is_kept() {
    let bench = Bench::new();
    write(&bench.path("a/.snapshots/x"), b"mine");
    bench.settle(&["a", "b"]);
    assert_eq!(fs::read(bench.path("b/.snapshots/x")).unwrap(), b"mine");
}

#[test]
fn symlinks_planted_among_our_own_files_lead_nowhere() {
    let bench = Bench::new();
    write(&bench.path("outside/store.toml"), b"precious");
    fs::create_dir(bench.path("a")).unwrap();
    symlink(bench.path("outside"), bench.path("a/.rearview")).unwrap();
    assert!(bench.open(&["a"]).is_err());
    assert_eq!(fs::read_dir(bench.path("outside")).unwrap().count(), 1);
    assert_eq!(fs::read(bench.path("outside/store.toml")).unwrap(), b"precious");
}

fn entry(name: &str) -> EntryName {
    EntryName::new(name).unwrap()
}

#[test]
fn changes_of_hard_links_are_followed() {
    let bench = Bench::new();
    let a = bench.path("a");
    write(&a.join("one"), b"bytes");
    fs::hard_link(a.join("one"), a.join("two")).unwrap();
    write(&a.join("three"), b"other");
    bench.settle(&["a"]);
    drop(bench.open(&["a"]).unwrap());
    bench.lose_logs();
    // `two` becomes a file of its own, `three` another name of `one`.
    fs::remove_file(a.join("two")).unwrap();
    write(&a.join("two"), b"bytes of its own");
    fs::remove_file(a.join("three")).unwrap();
    fs::hard_link(a.join("one"), a.join("three")).unwrap();
    let store = bench.open(&["a"]).unwrap();
    assert_recorded(&store.catalog, &a);
    let root = NodeId::ROOT;
    assert_eq!(
        store.catalog.lookup(root, &entry("one")).unwrap(),
        store.catalog.lookup(root, &entry("three")).unwrap()
    );
}

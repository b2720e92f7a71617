//! Death at every call on a backing: the operation is wholly there or wholly not, the replicas are
//! equal, and what a snapshot showed before is unchanged.
//!
//! One store lives through all deaths of one operation. Each time the backings are frozen at the
//! next call: from there on nothing reaches them. What the catalog committed after the operation
//! began is taken away again, or left on one replica only.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use rearviewfs::catalog::{Catalog, Durability};
use rearviewfs::error::Result;
use rearviewfs::history::History;
use rearviewfs::progress::Progress;
use rearviewfs::replica::backing::{Creds, RenameMode};
use rearviewfs::replica::faulty::{Faulty, Injected};
use rearviewfs::store::{self, Between, OpenOptions};
use rearviewfs::types::{EntryName, Generation, Kind, NodeId};
use rearviewfs::volume::nodes::Node;
use rearviewfs::volume::{Caller, Changes, Newborn, Volume, VolumeOptions};
use rustix::io::Errno;

/// Path → kind, mode, links, content or target.
type Dump = BTreeMap<String, (char, u32, u64, Vec<u8>)>;
type Op = fn(&Scene) -> Result<()>;

/// Freezes the backings after so many calls.
struct Death {
    armed: AtomicBool,
    left: AtomicI64,
}

impl Death {
    fn arm(&self, calls: i64) {
        self.left.store(calls, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
    }

    fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    fn came(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }
}

struct Bench {
    dir: tempfile::TempDir,
    death: Arc<Death>,
}

/// One directory of an open volume, in which an operation is tried.
struct Scene {
    volume: Arc<Volume>,
    dir: Arc<Node>,
    path: String,
}

fn caller() -> Caller {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Caller { creds: Creds { uid, gid, umask: 0 }, pid: 0 }
}

fn name(text: &str) -> EntryName {
    EntryName::new(text).unwrap()
}

impl Bench {
    fn new() -> Bench {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("rv-deaths").tempdir_in(base).unwrap();
        let death = Death { armed: AtomicBool::new(false), left: AtomicI64::new(0) };
        Bench { dir, death: Arc::new(death) }
    }

    fn paths(&self) -> [PathBuf; 2] {
        [self.dir.path().join("a"), self.dir.path().join("b")]
    }

    fn try_open(&self) -> Result<Arc<Volume>> {
        let death = self.death.clone();
        let between = Between::new(move |_, backing| {
            let death = death.clone();
            let plan = move |_: rearviewfs::replica::faulty::Call<'_>| {
                let dead = death.armed.load(Ordering::SeqCst)
                    && death.left.fetch_sub(1, Ordering::SeqCst) <= 0;
                dead.then_some(Injected::Error(Errno::IO))
            };
            Box::new(Faulty::new(backing, Arc::new(plan)))
        });
        let options = OpenOptions { between, ..OpenOptions::default() };
        let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
        let store = store::open(&self.paths(), &options, &recover, &Progress::silent())?;
        // Nobody else may make calls meanwhile.
        let never = Duration::from_secs(3600);
        Volume::open(store, VolumeOptions { housekeeping: never, ..VolumeOptions::default() })
    }

    fn open(&self) -> Arc<Volume> {
        self.try_open().unwrap()
    }

    /// Copies of the catalogs as they are now.
    fn keep_catalogs(&self) -> Vec<BTreeMap<PathBuf, Vec<u8>>> {
        let read = |path: &PathBuf| {
            let private = path.join(".rearview");
            ["catalog.db", "catalog.db-wal"]
                .iter()
                .filter_map(|file| {
                    let file = private.join(file);
                    fs::read(&file).ok().map(|bytes| (file, bytes))
                })
                .collect()
        };
        self.paths().iter().map(read).collect()
    }

    fn restore_catalog(&self, index: usize, kept: &BTreeMap<PathBuf, Vec<u8>>) {
        let private = self.paths()[index].join(".rearview");
        for file in ["catalog.db-wal", "catalog.db-shm"] {
            let _ = fs::remove_file(private.join(file));
        }
        kept.iter().for_each(|(file, bytes)| fs::write(file, bytes).unwrap());
    }

    fn assert_equal(&self) {
        let [a, b] = self.paths();
        let found = store::compare::compare(&a, &b).unwrap();
        assert!(found.is_empty(), "{found:#?}");
        let head = |path: &Path| Catalog::inspect(&path.join(".rearview/catalog.db")).unwrap();
        assert_eq!(head(&a), head(&b));
    }

    fn dump(&self, scene: &str) -> Dump {
        let mut dump = Dump::new();
        dump_dir(&self.paths()[0].join(scene), "", &mut dump);
        dump
    }
}

fn dump_dir(dir: &Path, below: &str, dump: &mut Dump) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let shown = format!("{below}/{}", path.file_name().unwrap().to_str().unwrap());
        let (kind, links, content) = if meta.is_dir() {
            dump_dir(&path, &shown, dump);
            ('d', 0, Vec::new())
        } else if meta.is_symlink() {
            ('l', 1, fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
        } else {
            let mut content = fs::read(&path).unwrap();
            let mut value = [0; 16];
            if let Ok(length) = rustix::fs::getxattr(&path, "user.a", &mut value) {
                content.extend(&value[..length]);
            }
            ('f', meta.nlink(), content)
        };
        dump.insert(shown, (kind, meta.mode() & 0o7777, links, content));
    }
}

impl Scene {
    fn node(&self, path: &str) -> Result<Arc<Node>> {
        let mut at = self.dir.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at = self.volume.lookup(at.id, &name(part))?.0;
        }
        Ok(at)
    }

    fn write(&self, path: &str, offset: u64, bytes: &[u8]) {
        let (above, last) = path.rsplit_once('/').map_or(("", path), |(above, last)| (above, last));
        let above = self.node(above).unwrap();
        let (node, _) = self.volume.create(above.id, &name(last), 0o644, true, &caller()).unwrap();
        self.volume.write(&node, offset, bytes, false, &caller()).unwrap();
        self.volume.release(&node, true).unwrap();
    }

    fn mkdir(&self, path: &str) {
        let (above, last) = path.rsplit_once('/').map_or(("", path), |(above, last)| (above, last));
        let above = self.node(above).unwrap();
        self.volume.make(above.id, &name(last), &Newborn::Dir, 0o755, &caller()).unwrap();
    }

    /// The tree of the scene at a generation, with the contents that history has.
    fn dump_at(&self, at: Generation) -> Dump {
        let mut dump = Dump::new();
        let row = self.volume.catalog().lookup_at(at, NodeId::ROOT, &name(&self.path)).unwrap();
        self.dump_dir_at(at, row.unwrap().id, "", &mut dump);
        dump
    }

    fn dump_dir_at(&self, at: Generation, dir: NodeId, below: &str, dump: &mut Dump) {
        let catalog = self.volume.catalog();
        for line in catalog.list_at(at, dir).unwrap() {
            let row = catalog.lookup_at(at, dir, &line.name).unwrap().unwrap();
            let path = format!("{below}/{}", std::str::from_utf8(line.name.as_bytes()).unwrap());
            let (kind, links, content) = match row.kind {
                Kind::Dir => {
                    self.dump_dir_at(at, row.id, &path, dump);
                    ('d', 0, Vec::new())
                }
                Kind::Symlink => ('l', 1, catalog.symlink_target(row.id).unwrap().unwrap()),
                _ => {
                    let mut bytes = vec![0; row.size as usize];
                    let got = self.volume.read_content(row.id, row.content, 0, &mut bytes).unwrap();
                    assert_eq!(got as u64, row.size);
                    let xattrs = catalog.xattrs(row.xattrs).unwrap();
                    let own = xattrs.0.iter().filter(|(key, _)| key.as_slice() == b"user.a");
                    own.for_each(|(_, value)| bytes.extend(value));
                    ('f', u64::from(catalog.links_at(at, row.id).unwrap()), bytes)
                }
            };
            dump.insert(path, (kind, row.mode & 0o7777, links, content));
        }
    }
}

/// Makes the tree that every operation begins with.
fn set(volume: Arc<Volume>, path: &str) -> Scene {
    let (dir, _) = volume.make(NodeId::ROOT, &name(path), &Newborn::Dir, 0o755, &caller()).unwrap();
    let scene = Scene { volume, dir, path: path.into() };
    for path in ["d", "d/sub", "d/sub/deep", "e", "e/other", "empty"] {
        scene.mkdir(path);
    }
    scene.write("f", 0, &[1; 9000]);
    scene.write("g", 0, &[2; 5000]);
    scene.write("s", 12_288, &[6; 100]);
    scene.write("d/h", 0, &[3; 100]);
    scene.write("d/sub/deep/i", 0, &[4; 100]);
    scene.write("e/other/j", 0, &[5; 100]);
    let (f, e) = (scene.node("f").unwrap(), scene.node("e").unwrap());
    scene.volume.link(&f, e.id, &name("linked"), &caller()).unwrap();
    scene.volume.set_xattr(&f, "user.a".as_ref(), b"value", 0, &caller()).unwrap();
    scene
}

/// What the call number of a death stands for when the operation had ended: which replicas keep
/// what their catalogs committed.
const KEEPS: [[bool; 2]; 4] = [[false, false], [true, true], [true, false], [false, true]];

/// Tries an operation with a death at each call, and after it.
fn dies_at_each_call(op: Op) {
    let _ = env_logger::try_init();
    let bench = Bench::new();
    let mut volume = bench.open();
    let mut after = None;
    let mut calls = 0;
    let mut ends = KEEPS.iter();
    for number in 0.. {
        let path = format!("w{number}");
        let scene = set(volume, &path);
        let snapshot = scene.volume.create_snapshot(&path, false, &[]).unwrap();
        scene.volume.catalog().flush(Durability::Durable).unwrap();
        let before = bench.dump(&path);
        assert_eq!(scene.dump_at(snapshot.generation), before);
        let catalogs = bench.keep_catalogs();
        // First to its end, to know what comes of it.
        bench.death.arm(if number == 0 { i64::MAX } else { calls });
        let done = op(&scene);
        let died = bench.death.came();
        if number == 0 {
            assert!(done.is_ok(), "{done:?}");
            after = Some(bench.dump(&path));
        } else if !died {
            assert!(done.is_ok(), "{done:?}");
        }
        drop(scene);
        let keeps = match (number, died) {
            (0, _) => [true, true],
            (_, true) => [false, false],
            (_, false) => *ends.next().unwrap(),
        };
        for (index, kept) in catalogs.iter().enumerate().filter(|(index, _)| !keeps[*index]) {
            bench.restore_catalog(index, kept);
        }
        bench.death.disarm();
        volume = bench.open();
        bench.assert_equal();
        let found = bench.dump(&path);
        let after = after.as_ref().unwrap();
        let told = format!("death at call {calls}, operation {done:?}");
        assert!(found == before || found == *after, "{told}:\n{found:#?}");
        if !died {
            assert!(found == *after, "{told}");
        }
        let dir = volume.lookup(NodeId::ROOT, &name(&path)).unwrap().0;
        let scene = Scene { volume, dir, path };
        let shown = scene.dump_at(snapshot.generation);
        assert!(shown == before, "{told}: the snapshot shows\n{shown:#?}");
        volume = scene.volume;
        if number > 0 && died {
            calls += 1;
        }
        if number > 0 && !died && ends.len() == 0 {
            break;
        }
    }
    assert!(calls > 1, "{calls}");
    volume.close().unwrap();
    drop(volume);
    bench.assert_equal();
}

macro_rules! each_call {
    ($($test:ident: $op:expr;)*) => {
        $(#[test]
        fn $test() {
            dies_at_each_call($op);
        })*
    };
}

fn rename(scene: &Scene, from: (&str, &str), to: (&str, &str), mode: RenameMode) -> Result<()> {
    let (old, new) = (scene.node(from.0)?, scene.node(to.0)?);
    scene.volume.rename(old.id, &name(from.1), new.id, &name(to.1), mode, &caller())
}

fn with_open<T>(
    scene: &Scene,
    path: &str,
    f: impl FnOnce(&Volume, &Arc<Node>) -> Result<T>,
) -> Result<()> {
    let node = scene.node(path)?;
    scene.volume.open_file(&node, true, false, &caller())?;
    f(&scene.volume, &node).map(drop)
}

each_call! {
    create: |s| s.volume.create(s.dir.id, &name("new"), 0o600, true, &caller()).map(drop);
    mkdir: |s| {
        s.volume.make(s.dir.id, &name("new"), &Newborn::Dir, 0o700, &caller()).map(drop)
    };
    symlink: |s| {
        let what = Newborn::Symlink(b"target");
        s.volume.make(s.dir.id, &name("new"), &what, 0o777, &caller()).map(drop)
    };
    link: |s| s.volume.link(&s.node("g")?, s.node("d")?.id, &name("new"), &caller()).map(drop);
    unlink: |s| s.volume.unlink(s.dir.id, &name("g"), &caller());
    unlink_of_one_of_two_names: |s| s.volume.unlink(s.dir.id, &name("f"), &caller());
    rmdir: |s| s.volume.rmdir(s.dir.id, &name("empty"), &caller());
    rename_of_a_file: |s| rename(s, ("", "g"), ("d", "new"), RenameMode::NoReplace);
    rename_of_one_of_two_names: |s| rename(s, ("", "f"), ("d", "new"), RenameMode::Replace);
    rename_over_a_file: |s| rename(s, ("", "g"), ("d", "h"), RenameMode::Replace);
    rename_over_one_of_two_names: |s| rename(s, ("", "g"), ("", "f"), RenameMode::Replace);
    rename_of_a_directory: |s| rename(s, ("d", "sub"), ("e", "new"), RenameMode::Replace);
    rename_over_a_directory: |s| rename(s, ("d", "sub"), ("", "empty"), RenameMode::Replace);
    exchange_of_files: |s| rename(s, ("", "g"), ("d", "h"), RenameMode::Exchange);
    exchange_of_directories: |s| rename(s, ("d", "sub"), ("e", "other"), RenameMode::Exchange);
    exchange_of_file_and_directory: |s| rename(s, ("d", "sub"), ("", "g"), RenameMode::Exchange);
    chmod: |s| {
        let changes = Changes { mode: Some(0o600), ..Changes::default() };
        s.volume.set_attributes(&s.node("g")?, &changes, &caller()).map(drop)
    };
    chmod_of_a_directory: |s| {
        let changes = Changes { mode: Some(0o700), ..Changes::default() };
        s.volume.set_attributes(&s.node("d")?, &changes, &caller()).map(drop)
    };
    set_xattr: |s| s.volume.set_xattr(&s.node("f")?, "user.a".as_ref(), b"other", 0, &caller());
    remove_xattr: |s| s.volume.remove_xattr(&s.node("f")?, "user.a".as_ref(), &caller());
    truncate: |s| {
        let changes = Changes { size: Some(4000), ..Changes::default() };
        s.volume.set_attributes(&s.node("g")?, &changes, &caller()).map(drop)
    };
    truncate_to_nothing: |s| {
        let changes = Changes { size: Some(0), ..Changes::default() };
        s.volume.set_attributes(&s.node("g")?, &changes, &caller()).map(drop)
    };
    overwrite: |s| with_open(s, "f", |v, n| v.write(n, 4000, &[9; 3000], false, &caller()));
    append: |s| with_open(s, "f", |v, n| v.write(n, 9000, &[9; 3000], false, &caller()));
    overwrite_of_a_hole: |s| with_open(s, "s", |v, n| {
        v.write(n, 4089, &[9; 100], false, &caller())
    });
    truncate_within_a_hole: |s| {
        let changes = Changes { size: Some(5000), ..Changes::default() };
        s.volume.set_attributes(&s.node("s")?, &changes, &caller()).map(drop)
    };
    punch: |s| with_open(s, "f", |v, n| {
        let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
        v.fallocate(n, mode, 0, 4096, &caller())
    });
    copy: |s| {
        let (from, to) = (s.node("g")?, s.node("f")?);
        s.volume.copy_range((&from, 0), (&to, 100), 5000, &caller()).map(drop)
    };
    snapshot: |s| {
        s.volume.unlink(s.dir.id, &name("g"), &caller())?;
        s.volume.create_snapshot(&format!("own-{}", s.path), false, &[]).map(drop)
    };
    checkpoint: |s| {
        s.volume.unlink(s.dir.id, &name("g"), &caller())?;
        s.volume.checkpoint()
    };
}

/// A death in the midst of an operation, then one at each call of the recovery.
#[test]
fn recovery_that_dies_at_any_call_is_gone_on_with() {
    let ops: [Op; 3] = [
        |s| rename(s, ("d", "sub"), ("e", "new"), RenameMode::Replace),
        |s| rename(s, ("", "g"), ("d", "h"), RenameMode::Replace),
        |s| with_open(s, "f", |v, n| v.write(n, 4000, &[9; 3000], false, &caller())),
    ];
    let bench = Bench::new();
    let mut volume = bench.open();
    let mut number = 0;
    for op in ops {
        // Every early call of the recovery, then some: most of them look at one thing.
        for died_at in [0, 1, 2, 5, 40, 150, 400, 800, 1600, 3200] {
            let path = format!("r{number}");
            number += 1;
            let scene = set(volume, &path);
            let snapshot = scene.volume.create_snapshot(&path, false, &[]).unwrap();
            scene.volume.catalog().flush(Durability::Durable).unwrap();
            let before = bench.dump(&path);
            let catalogs = bench.keep_catalogs();
            bench.death.arm(12 + died_at % 7);
            let _ = op(&scene);
            drop(scene);
            (0..2).for_each(|index| bench.restore_catalog(index, &catalogs[index]));
            bench.death.arm(died_at);
            let opened = bench.try_open();
            let died = bench.death.came();
            drop(opened);
            bench.death.disarm();
            volume = bench.open();
            bench.assert_equal();
            let dir = volume.lookup(NodeId::ROOT, &name(&path)).unwrap().0;
            let scene = Scene { volume, dir, path };
            assert!(scene.dump_at(snapshot.generation) == before, "{died_at}");
            volume = scene.volume;
            if !died {
                break;
            }
        }
    }
}

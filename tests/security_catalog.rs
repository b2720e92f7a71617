//! A catalog whose rows are hostile: whatever it says, nothing panics, hangs or takes memory
//! without bounds, and nothing outside of the backing is touched.
//!
//! The file itself is intact and its schema is ours (`catalog/trust.rs` sees to that), so every
//! layer above SQLite is reached. `REARVIEW_CASES` sets how many catalogs are tried.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::types::Value;

use rearviewfs::control::server::Handler;
use rearviewfs::control::service::Service;
use rearviewfs::control::{DaemonInfo, Request};
use rearviewfs::fs::{Filesystem, FsOptions, SnapDir, Wish, Writing};
use rearviewfs::history::History;
use rearviewfs::progress::Progress;
use rearviewfs::replica::backing::RenameMode;
use rearviewfs::report::who::Who;
use rearviewfs::report::{MomentText, PathText};
use rearviewfs::types::{Creds, EntryName, Kind, NodeId};
use rearviewfs::volume::{Caller, Newborn, Volume, VolumeOptions};
use rearviewfs::{control, error, store};

use common::{Mounted, shell};

/// No catalog may keep us busy for longer; the machine may be busy as well.
const CASE_SECONDS_MAX: u64 = 120;
/// Memory that opening and looking through a store of a few files takes, at most.
const PEAK_KIB_MAX: u64 = 1 << 20;
/// Objects looked at in one walk: a circle of directories has no end.
const WALK_MAX: usize = 400;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Numbers that follow from a seed.
struct Dice(blake3::OutputReader);

impl Dice {
    fn new(seed: u64) -> Dice {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        Dice(hasher.finalize_xof())
    }

    fn below(&mut self, end: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        (u64::from_le_bytes(bytes) % end as u64) as usize
    }

    fn blob(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.fill(&mut bytes);
        bytes
    }

    /// A value that no catalog of ours would have in most places.
    fn value(&mut self) -> Value {
        match self.below(24) {
            0 => Value::Null,
            1 => Value::Integer(-1),
            2 => Value::Integer(i64::MAX),
            3 => Value::Integer(i64::MIN),
            4 => Value::Integer(1 << 43),
            5 => Value::Integer(u32::MAX.into()),
            6 => Value::Integer((1 << 62) - 1),
            7 => Value::Integer(1 << self.below(63)),
            8 => Value::Blob(b"..".to_vec()),
            9 => Value::Blob(b"a/../../canary".to_vec()),
            10 => Value::Blob(b"/canary".to_vec()),
            11 => Value::Blob(b"n\0ul".to_vec()),
            12 => Value::Blob(b".rearview".to_vec()),
            13 => Value::Blob(Vec::new()),
            14 => Value::Blob(vec![b'n'; 300]),
            15 => Value::Blob(vec![0xff; 32]),
            16 => {
                let length = self.below(40);
                Value::Blob(self.blob(length))
            }
            17 => Value::Text("../\u{1b}[31m\n".into()),
            18 => Value::Real(f64::NAN),
            _ => Value::Integer(self.below(30) as i64),
        }
    }
}

/// A store with everything a catalog can tell of, closed.
fn template() -> Mounted {
    let mut store = Mounted::with_replicas(1);
    shell(
        &store.mnt,
        "mkdir -p a/b/c d; for i in 1 2 3 4; do seq $i 9000 > a/f$i; echo $i > d/s$i; done
         ln a/f1 d/linked; ln -s ../a/f2 d/link; setfattr -n user.k -v v a/b; mkfifo d/fifo",
    );
    store.snapshot("one");
    shell(
        &store.mnt,
        "printf X | dd of=a/f1 bs=1 seek=5000 conv=notrunc status=none; rm a/f2; mv a/b d/moved
         echo two > a/f3; cp a/f4 a/f5; chmod 600 d/s1; rm -r d/moved/c",
    );
    store.snapshot("two");
    shell(&store.mnt, "rm d/s2; seq 20000 > a/f4; mkdir d/e; mv d/s3 d/e/; rm a/f5");
    store.rearview(&["prune"]).ok();
    shell(&store.mnt, "echo later > a/f3; rm d/s4; echo x >> a/f1");
    store.unmount();
    store
}

/// Writes hostile values into some rows, and says what was done.
fn poison(catalog: &Path, dice: &mut Dice) -> Vec<String> {
    let db = Connection::open(catalog).unwrap();
    let texts = |sql: &str, column: usize| -> Vec<String> {
        let mut statement = db.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(column)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let tables = texts(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        0,
    );
    let mut done = Vec::new();
    for _ in 0..1 + dice.below(4) {
        let table = &tables[dice.below(tables.len())];
        let columns = texts(&format!("PRAGMA table_info({table})"), 1);
        let column = &columns[dice.below(columns.len())];
        let count: i64 =
            db.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap();
        if count == 0 {
            continue;
        }
        let nth = dice.below(count as usize);
        // Another row's value makes circles, twins and references to the wrong kind of thing.
        let value = match dice.below(3) {
            0 => {
                let other = &columns[dice.below(columns.len())];
                let nth = dice.below(count as usize);
                let sql = format!("SELECT {other} FROM {table} LIMIT 1 OFFSET {nth}");
                db.query_row(&sql, [], |row| row.get(0)).unwrap()
            }
            _ => dice.value(),
        };
        let sql = format!(
            "UPDATE OR IGNORE {table} SET {column} = ?1 \
             WHERE {column} IS (SELECT {column} FROM {table} LIMIT 1 OFFSET {nth})"
        );
        let changed = db.execute(&sql, [&value]);
        done.push(format!("{sql} [{value:?}]: {changed:?}"));
    }
    done
}

/// Everything below an object, as far as it goes.
struct Walk<'a> {
    fs: &'a Filesystem,
    seen: usize,
}

impl Walk<'_> {
    fn visit(&mut self, ino: u64, kind: Kind, depth: usize) {
        self.seen += 1;
        if self.seen > WALK_MAX || depth > 40 {
            return;
        }
        let fs = self.fs;
        let _ = fs.stat(ino);
        let _ = fs.xattrs(ino);
        match kind {
            Kind::Symlink => drop(fs.readlink(ino)),
            Kind::File => self.read(ino),
            Kind::Dir => {
                let fh = fs.open_dir(0, ino);
                let lines = fs.list(ino, fh, true);
                fs.release_dir(fh);
                for line in lines.iter().flat_map(|lines| lines.iter()) {
                    assert!(!line.name.contains(&b'/') && !line.name.contains(&0));
                    let Ok(name) = EntryName::new(&line.name) else { continue };
                    self.enter(ino, &name, depth + 1);
                }
            }
            _ => {}
        }
    }

    fn enter(&mut self, ino: u64, name: &EntryName, depth: usize) {
        if let Ok(found) = self.fs.lookup(ino, name) {
            self.visit(found.stat.ino, found.stat.kind, depth);
            self.fs.forget(found.stat.ino, 1);
        }
    }

    fn read(&self, ino: u64) {
        let wish = Wish::from_flags(libc::O_RDONLY);
        let Ok(fh) = self.fs.open(ino, wish, &caller()) else { return };
        let mut buffer = vec![0; 64 << 10];
        for offset in [0, 4096, 60_000, 1 << 40, i64::MAX as u64 - 4096] {
            let _ = self.fs.read(ino, fh, offset, &mut buffer);
        }
        let _ = self.fs.release(fh);
    }
}

fn caller() -> Caller {
    Caller { creds: Creds { uid: 0, gid: 0, umask: 0o22 }, pid: 0 }
}

fn name(text: &str) -> EntryName {
    EntryName::new(text).unwrap()
}

/// Changes a little of everything; what comes of it does not matter.
fn change(fs: &Filesystem) -> error::Result<()> {
    let (root, caller) = (NodeId::ROOT.0, caller());
    let dir = fs.make(root, &name("new"), &Newborn::Dir, 0o755, &caller);
    let wish = Wish::from_flags(libc::O_RDWR);
    let dir = dir.map_or(root, |dir| dir.stat.ino);
    if let Ok((_, fh)) = fs.create(dir, &name("file"), 0o644, wish, &caller) {
        let _ = fs.write(fh, 0, b"new", Writing::default(), &caller);
        let _ = fs.fsync(fh, false);
        let _ = fs.release(fh);
    }
    let a = fs.lookup(root, &name("a"))?.stat.ino;
    for file in ["f1", "f4"] {
        let Ok(found) = fs.lookup(a, &name(file)) else { continue };
        let Ok(fh) = fs.open(found.stat.ino, wish, &caller) else { continue };
        let _ = fs.write(fh, 100, b"changed", Writing::default(), &caller);
        let _ = fs.release(fh);
    }
    let d = fs.lookup(root, &name("d"))?.stat.ino;
    let _ = fs.rename(a, &name("f1"), d, &name("s1"), RenameMode::Replace, &caller);
    let _ = fs.unlink(a, &name("f3"), &caller);
    let _ = fs.rename(root, &name("a"), d, &name("into"), RenameMode::Replace, &caller);
    fs.rmdir(d, &name("e"), &caller)
}

/// What the commands ask.
fn requests() -> Vec<Request> {
    let path = |text: &str| PathText::new(text.as_bytes());
    let moment = MomentText::new;
    let mut all = vec![
        Request::Status,
        Request::SnapshotList,
        Request::Prune { policy: None, dry_run: true, allow_none: true, save: false },
        Request::UndoPlan { path: path(""), who: Who::Uid(0), since: moment("one"), force: true },
        Request::Purge { paths: vec![path("d")], dry_run: true, even_held: true },
    ];
    for text in ["", "a", "a/f1", "d/s4", "d/linked"] {
        all.push(Request::Log { path: path(text), names_max: None });
    }
    for (a, b) in [("one", "two"), ("one", "now"), ("latest", "2h")] {
        all.push(Request::Diff { a: moment(a), b: moment(b), path: path("") });
    }
    all.push(Request::SnapshotDelete { name: "one".into() });
    all.push(Request::Prune { policy: None, dry_run: false, allow_none: true, save: false });
    all
}

/// Opens the store, looks at everything, changes something, and closes it.
fn use_store(backing: &Path) -> error::Result<()> {
    let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
    let options = store::OpenOptions::default();
    let opened = store::open(&[backing.to_path_buf()], &options, &recover, &Progress::silent())?;
    let volume = Volume::open(opened, VolumeOptions::default())?;
    let mountpoint = PathBuf::from("/nowhere");
    let options =
        FsOptions { snapdir: SnapDir::Hidden, snapdir_name: name(".snapshots"), mountpoint };
    let fs = Arc::new(Filesystem::new(volume.clone(), options));
    for start in ["", ".snapshots", ".versions", ".deleted", ".at"] {
        let mut walk = Walk { fs: &fs, seen: 0 };
        match start {
            "" => walk.visit(NodeId::ROOT.0, Kind::Dir, 0),
            ".snapshots" => walk.enter(NodeId::ROOT.0, &name(start), 0),
            special => {
                let Ok(door) = fs.lookup(NodeId::ROOT.0, &name(".snapshots")) else { continue };
                if let Ok(found) = fs.lookup(door.stat.ino, &name(special)) {
                    walk.visit(found.stat.ino, Kind::Dir, 0);
                    walk.enter(found.stat.ino, &name("1h"), 0);
                }
            }
        }
    }
    let _ = change(&fs);
    let info = DaemonInfo {
        pid: 1,
        mountpoint: PathText::new(b"/nowhere"),
        snapdir_name: PathText::new(b".snapshots"),
        snapdir_enabled: true,
    };
    let service = Service::new(fs.clone(), info, false);
    for request in requests() {
        if let Ok(answer) = service.handle(request) {
            let mut frame = Vec::new();
            let _ = control::write_frame(&mut frame, &answer, control::RESPONSE_BYTES_MAX);
        }
    }
    drop(service);
    drop(fs);
    volume.close()
}

fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn hostile_catalogs_are_survived() {
    let cases: u64 = std::env::var("REARVIEW_CASES").map_or(60, |text| text.parse().unwrap());
    let first: u64 = std::env::var("REARVIEW_SEED").map_or(0, |text| text.parse().unwrap());
    let template = template();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        hook(info);
    }));
    let canary = template.beside("canary");
    fs::write(&canary, "untouched").unwrap();
    let case = template.beside("case");
    let (mut opened, mut bad) = (0, BTreeSet::new());
    for seed in first..first + cases {
        let _ = fs::remove_dir_all(&case);
        shell(template.beside("").as_path(), "cp -a backing0 case");
        let done = poison(&case.join(".rearview/catalog.db"), &mut Dice::new(seed));
        println!("seed {seed}");
        let panics = PANICS.load(Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        let backing = case.clone();
        let thread = std::thread::spawn(move || {
            let outcome = use_store(&backing).map_err(|error| error.to_string());
            let _ = sender.send(outcome);
        });
        match receiver.recv_timeout(Duration::from_secs(CASE_SECONDS_MAX)) {
            Ok(outcome) => opened += usize::from(outcome.is_ok()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("seed {seed} does not end: {done:#?}")
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {}
        }
        let _ = thread.join();
        if PANICS.load(Ordering::Relaxed) > panics {
            eprintln!("seed {seed} panicked after {done:#?}");
            bad.insert(seed);
        }
        assert!(peak_kib() < PEAK_KIB_MAX, "seed {seed}: {} KiB after {done:#?}", peak_kib());
        assert_eq!(fs::read_to_string(&canary).unwrap(), "untouched");
        let names = common::tree::names_in(&template.beside(""));
        assert_eq!(names.len(), 4, "seed {seed}: {names:?} after {done:#?}");
    }
    let _ = std::panic::take_hook();
    eprintln!("{cases} hostile catalogs, {opened} of them usable to the end");
    assert_eq!(bad, BTreeSet::new(), "these panicked");
}

//! A disk that hangs below a catalog. SQLite reaches its files by no seam of ours, so here the disk
//! is a mount of our own, in whose backing calls hang.
//!
//! It is served by another process, this program again: one that waits for its own mount could not
//! even be killed.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::*;
use crate::fs::{Filesystem, FsOptions, SnapDir};
use crate::fuse::{ServeOptions, serve};
use crate::mountpoint::device;
use crate::mountpoint::options::MountOptions;
use crate::progress::Progress;
use crate::replica::State as ReplicaState;
use crate::replica::faulty::{Call, Faulty};
use crate::store::{Between, Fork};
use crate::sys::patience;

/// Short enough to wait for, long enough for a busy machine to make a call that does not hang.
const TIMEOUT: Duration = Duration::from_secs(1);
/// What meets one that hangs has ended by then.
const BOUND: Duration = Duration::from_secs(15);
/// What nobody waits for as long.
const NEVER: Duration = Duration::from_secs(3600);
/// At so many calls each piece of work is made to hang.
const POINTS: u64 = 3;
/// Tells the process that serves a disk where.
const SERVE: &str = "RV_TEST_DISK";
/// What its answers begin with.
const ANSWER: &str = "disk:";

/// A directory whose filesystem can be made to hang.
struct Disk {
    server: Child,
    talk: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in ["backing", "mount"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "volume::tests::catalogs::serves_a_disk", "--ignored", "--nocapture"])
            .env(SERVE, dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let talk = (server.stdin.take().unwrap(), BufReader::new(server.stdout.take().unwrap()));
        let disk = Disk { server, talk: Mutex::new(talk), dir };
        disk.ask("");
        std::fs::create_dir(disk.path()).unwrap();
        disk
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mount/disk")
    }

    /// Sends a word and returns the answer; without a word, what comes first.
    fn ask(&self, word: &str) -> u64 {
        let (to, from) = &mut *self.talk.lock();
        if !word.is_empty() {
            writeln!(to, "{word}").unwrap();
        }
        let mut line = String::new();
        loop {
            line.clear();
            assert!(from.read_line(&mut line).unwrap() > 0, "the disk is gone");
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().parse().unwrap();
            }
        }
    }

    /// Calls hang from this one on, counted from now.
    fn arm(&self, from: u64) {
        self.ask(&from.to_string());
    }

    /// It answers nothing at all until it is told to go on.
    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.server), signal).unwrap();
    }

    /// It answers again. Returns how many calls there were.
    fn release(&self) -> u64 {
        self.ask("release")
    }
}

/// A thread that waits for an answer of a disk.
struct Waiting(std::thread::JoinHandle<()>);

impl Waiting {
    /// Begins `work` and returns when it waits.
    fn new(work: impl FnOnce() + Send + 'static) -> Waiting {
        let (tell, told) = crossbeam_channel::bounded(1);
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
            work();
        });
        let thread_id = told.recv().unwrap();
        let place = format!("/proc/self/task/{thread_id}/wchan");
        let waits = || std::fs::read_to_string(&place).is_ok_and(|at| at == "request_wait_answer");
        await_that("it waits for the disk", waits);
        Waiting(thread)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = device::unmount(&self.dir.path().join("mount"), true);
    }
}

/// The other process.
#[test]
#[ignore = "serves a disk to the others"]
fn serves_a_disk() {
    let Some(dir) = std::env::var_os(SERVE).map(PathBuf::from) else { return };
    let (count, from) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(u64::MAX)));
    let hung = Arc::new((Mutex::new(()), parking_lot::Condvar::new()));
    let (own, limit, gate) = (count.clone(), from.clone(), hung.clone());
    let between = Between::new(move |_, inner| {
        let (own, limit, gate) = (own.clone(), limit.clone(), gate.clone());
        let plan = move |_: Call<'_>| {
            let number = own.fetch_add(1, Ordering::SeqCst);
            let mut held = gate.0.lock();
            while number >= limit.load(Ordering::SeqCst) {
                gate.1.wait(&mut held);
            }
            None
        };
        Box::new(Faulty::new(inner, Arc::new(plan)))
    });
    let between = between.with_timeout(NEVER);
    let options = OpenOptions { init: true, between, ..OpenOptions::default() };
    let store = open_in(&[dir.join("backing")], &options).unwrap();
    let volume = Volume::open(store, VolumeOptions { call_timeout: NEVER, ..quiet() }).unwrap();
    let mount = dir.join("mount");
    let options = FsOptions {
        snapdir: SnapDir::Disabled,
        snapdir_name: EntryName::new(".snapshots").unwrap(),
        mountpoint: mount.clone(),
    };
    let fs = Arc::new(Filesystem::new(volume, options));
    let device = device::mount(&mount, b"disk", &MountOptions::default()).unwrap();
    let _session = serve(fs, device, &ServeOptions { threads: 8, over_rings: true }).unwrap();
    println!("{ANSWER}0");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let asked = count.load(Ordering::SeqCst);
        let held = hung.0.lock();
        from.store(line.parse().unwrap_or(u64::MAX), Ordering::SeqCst);
        count.store(0, Ordering::SeqCst);
        drop(held);
        hung.1.notify_all();
        println!("{ANSWER}{asked}");
    }
    // Whoever asked is gone, and takes the mount away.
    std::process::exit(0);
}

fn open_in(paths: &[PathBuf], options: &OpenOptions) -> Result<Store> {
    let recover =
        |replicas: &ReplicaSet, catalog: &Catalog, from| History::recover(replicas, catalog, from);
    store::open(paths, options, &recover, &Progress::silent())
}

/// For what is to hang.
fn options() -> OpenOptions {
    OpenOptions { between: Between::default().with_timeout(TIMEOUT), ..OpenOptions::default() }
}

fn await_that(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND * 2;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// A store on a directory and on a disk, in the order that is asked for.
struct Rig {
    disk: Disk,
    plain: tempfile::TempDir,
    disk_first: bool,
}

impl Rig {
    fn new(disk_first: bool) -> Rig {
        let rig =
            Rig { disk: Disk::new(), plain: tempfile::tempdir_in("/dev/shm").unwrap(), disk_first };
        let options = OpenOptions { init: true, ..OpenOptions::default() };
        let store = open_in(&rig.paths(), &options).unwrap();
        let volume = Volume::open(store, quiet()).unwrap();
        create(&volume, "before");
        volume.close().unwrap();
        rig
    }

    fn plain(&self) -> PathBuf {
        self.plain.path().canonicalize().unwrap()
    }

    fn paths(&self) -> Vec<PathBuf> {
        match self.disk_first {
            true => vec![self.disk.path(), self.plain()],
            false => vec![self.plain(), self.disk.path()],
        }
    }

    /// Changes something on one of the two alone.
    fn change_on(&self, path: &Path) {
        let store = open_in(&[path.into()], &OpenOptions::default()).unwrap();
        let volume = Volume::open(store, quiet()).unwrap();
        create(&volume, "alone");
        volume.close().unwrap();
    }

    /// Opens all, with a disk that hangs from its call of this number on; returns how many it had.
    fn opens_in_time(&self, from: u64) -> u64 {
        self.disk.arm(from);
        let begun = Instant::now();
        let opened = open_in(&self.paths(), &options());
        assert!(begun.elapsed() < BOUND, "call {from}: {:?}", begun.elapsed());
        let disk = self.disk.path();
        match opened {
            Ok(store) => {
                let fell = store.silent() == [disk];
                store.close().unwrap();
                let count = self.disk.release();
                assert!(
                    fell || count <= from.saturating_add(POINTS),
                    "call {from} of {count} did not matter"
                );
                count
            }
            Err(error) => {
                let text = error.to_string();
                assert!(self.disk_first && text.starts_with(&*disk.to_string_lossy()), "{text}");
                self.disk.release()
            }
        }
    }

    /// All is well again.
    fn is_sound(&self) {
        let store = open_in(&self.paths(), &OpenOptions::default()).unwrap();
        assert_eq!(store.silent(), [] as [PathBuf; 0]);
        store.close().unwrap();
        let [a, b] = [self.plain(), self.disk.path()];
        let found = store::compare::compare(&a, &b).unwrap();
        assert!(found.is_empty(), "{found:#?}");
    }
}

fn create(volume: &Volume, name: &str) {
    let name = EntryName::new(name).unwrap();
    let caller = Caller { creds: Creds::DAEMON, pid: 0 };
    let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &caller).unwrap();
    volume.write(&node, 0, name.as_bytes(), false, &caller).unwrap();
    volume.release(&node, true).unwrap();
}

/// Opens what `prepare` makes with a disk that hangs at calls from the first to the last.
fn hangs_anywhere(disk_first: bool, prepare: impl Fn(&Rig)) {
    let rig = Rig::new(disk_first);
    prepare(&rig);
    let all = rig.opens_in_time(u64::MAX);
    drop(rig);
    for point in 0..POINTS {
        let rig = Rig::new(disk_first);
        prepare(&rig);
        rig.opens_in_time(all * point / POINTS);
        rig.is_sound();
    }
}

#[test]
fn a_disk_that_hangs_while_catalogs_are_read_and_opened_is_left_out() {
    hangs_anywhere(true, |_| ());
}

#[test]
fn a_disk_that_hangs_while_a_catalog_is_copied_to_it_is_left_out() {
    hangs_anywhere(false, |rig| rig.change_on(&rig.plain()));
}

#[test]
fn a_mount_whose_source_hangs_while_its_catalog_is_copied_is_refused_in_time() {
    hangs_anywhere(true, |rig| rig.change_on(&rig.disk.path()));
}

/// A disk comes back that hangs from its call of this number on; returns how many it had.
fn returns(from: u64) -> u64 {
    let rig = Rig::new(false);
    let options = VolumeOptions { call_timeout: TIMEOUT, ..quiet() };
    let volume = Volume::open(open_in(&rig.paths(), &self::options()).unwrap(), options).unwrap();
    let disk = rig.disk.path();
    let disk = disk.to_str().unwrap();
    let id = volume.replicas().ids().nth(1).unwrap();
    volume.replica_offline(disk).unwrap();
    create(&volume, "missed");
    rig.disk.arm(from);
    let begun = Instant::now();
    let expected = match volume.replica_online(disk, Fork::Refuse) {
        Ok(_) => {
            await_that("it has failed, or is in use", || {
                volume.housekeep().unwrap();
                let retry = matches!(volume.resync_of(id), Some(resync::Progressing::Retry(_)));
                retry || volume.replicas().is_online(id)
            });
            Errno::TIMEDOUT
        }
        // It hung before it was known what came back.
        Err(error) => {
            assert!(error.to_string().contains(disk), "{error}");
            Errno::CANCELED
        }
    };
    let state = volume.replicas().health(id).state;
    let told = matches!(&state, ReplicaState::Offline { fault, .. } if fault.errno == expected);
    assert!(told || state == ReplicaState::Online, "call {from}: {state:?}");
    create(&volume, "meanwhile");
    assert!(begun.elapsed() < BOUND, "call {from}: {:?}", begun.elapsed());
    let count = rig.disk.release();
    await_that("it is in use again", || {
        // As above.
        if matches!(volume.resync_of(id), Some(resync::Progressing::Parked)) {
            let _ = volume.replica_online(disk, Fork::Refuse);
        }
        volume.resync_now();
        volume.replicas().is_online(id)
    });
    volume.close().unwrap();
    drop(volume);
    rig.is_sound();
    count
}

#[test]
fn a_disk_that_hangs_when_it_returns_is_brought_back_when_it_answers() {
    let all = returns(u64::MAX);
    for point in 0..POINTS {
        returns(all * point / POINTS);
    }
}

#[test]
fn a_store_that_is_not_mounted_is_looked_at_in_time() {
    let rig = Rig::new(false);
    let look = |path: &Path| store::inspect_within(path, TIMEOUT).map(|info| info.clean);
    rig.disk.signal(Signal::STOP);
    let begun = Instant::now();
    let error = look(&rig.disk.path()).unwrap_err();
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    rig.disk.signal(Signal::CONT);
    assert_eq!(error.to_errno(), Errno::TIMEDOUT);
    assert!(error.to_string().contains(rig.disk.path().to_str().unwrap()), "{error}");
    assert!(look(&rig.plain()).unwrap() && look(&rig.disk.path()).unwrap());
}

/// SQLite closes a database, and asks which one it opens, under a lock of the whole process. Here
/// the databases have no WAL: it would be closed first, and hang without that lock.
#[test]
fn a_disk_that_hangs_holds_up_no_database_on_another() {
    let (disk, plain) = (Disk::new(), tempfile::tempdir_in("/dev/shm").unwrap());
    let open = |dir: &Path| {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let vfs = crate::sys::sqlite::plain_path_vfs().unwrap();
        let db = Connection::open_with_flags_and_vfs(dir.join("db"), flags, vfs).unwrap();
        db.execute_batch("CREATE TABLE IF NOT EXISTS t(a); INSERT INTO t VALUES (1)").unwrap();
        db
    };
    let (closed, other, last) = (open(&disk.path()), open(&disk.path()), open(plain.path()));
    disk.signal(Signal::STOP);
    let path = disk.path();
    let waiting = [Waiting::new(move || drop(closed)), Waiting::new(move || drop(open(&path)))];
    let dir = plain.path().to_path_buf();
    let done = patience::within(BOUND, move || drop((open(&dir), last, open(&dir))));
    disk.signal(Signal::CONT);
    assert!(done.is_some(), "another database waits");
    waiting.into_iter().for_each(|thread| thread.0.join().unwrap());
    drop(other);
    let rows = |dir: &Path| -> u32 {
        open(dir).query_row("SELECT COUNT(*) FROM t", (), |row| row.get(0)).unwrap()
    };
    assert_eq!([rows(&disk.path()), rows(plain.path())], [4, 4]);
}

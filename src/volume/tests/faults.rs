//! Every call on every replica fails once, in every operation: the operation is done all the same,
//! exactly once, and whoever did not follow is out of use.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::replica::Replica;
use crate::replica::dir_backing::DirBacking;
use crate::replica::faulty::{Faulty, Injected, Plan};
use crate::replica::{Fault, State as ReplicaState};

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
/// More calls than any operation makes on one replica.
const CALLS_MAX: usize = 200;

fn name(text: &str) -> EntryName {
    EntryName::new(text).expect("a valid name")
}

/// A volume on two replicas of which one has calls that fail.
struct Rig {
    volume: Arc<Volume>,
    dirs: Vec<tempfile::TempDir>,
    /// The call after so many more fails.
    left: Arc<AtomicUsize>,
}

impl Rig {
    /// With the errors on the replica `faulty`.
    fn new(faulty: usize, errno: Errno) -> Rig {
        let left = Arc::new(AtomicUsize::new(usize::MAX));
        let count = left.clone();
        let plan = move |_: crate::replica::faulty::Call<'_>| {
            let fails = match count.load(Ordering::SeqCst) {
                usize::MAX => false,
                left => {
                    count.store(left.wrapping_sub(1), Ordering::SeqCst);
                    left == 0
                }
            };
            fails.then_some(Injected::Error(errno))
        };
        Rig::planned(faulty, left, Arc::new(plan))
    }

    fn planned(faulty: usize, left: Arc<AtomicUsize>, plan: Plan) -> Rig {
        let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
        let store = open_store(&dirs);
        put_between(&store, faulty, plan);
        Rig { volume: open_volume(store), dirs, left }
    }

    fn id(&self, index: usize) -> ReplicaId {
        self.volume.replicas().ids().nth(index).unwrap()
    }

    fn lookup(&self, text: &str) -> Result<Arc<Node>> {
        Ok(self.volume.lookup(NodeId::ROOT, &name(text))?.0)
    }

    fn write(&self, text: &str, data: &[u8]) -> Result<()> {
        let node = self.lookup(text)?;
        self.volume.open_file(&node, true, false, &CALLER)?;
        let written = self.volume.write(&node, 0, data, false, &CALLER);
        // What was deferred is told with the close.
        let closed = self.volume.flush(&node);
        self.volume.release(&node, true)?;
        written.and(closed)
    }

    fn create(&self, text: &str) -> Result<()> {
        let (node, _) = self.volume.create(NodeId::ROOT, &name(text), 0o644, true, &CALLER)?;
        self.volume.release(&node, true)
    }
}

/// Puts a plan between us and the backing of one replica.
pub(super) fn put_between(store: &Store, index: usize, plan: Plan) {
    let id = store.replicas.ids().nth(index).unwrap();
    let before = store.replicas.get(id);
    let inner = Box::new(DirBacking::open(&before.path).unwrap());
    let backing = Box::new(Faulty::new(inner, plan));
    let replica = Replica::new(before.uuid, before.label.clone(), before.path.clone(), backing);
    store.replicas.eject(id, Fault::new("exchange", Errno::IO));
    assert!(store.replicas.replace(id, replica));
    let replica = store.replicas.get(id);
    store.intents.join(&store.replicas, id, replica.backing()).unwrap();
    store.replicas.admit(id);
}

/// What everything begins with.
fn prepare(rig: &Rig) {
    for text in ["old", "other", "gone"] {
        rig.create(text).unwrap();
        rig.write(text, text.repeat(3000).as_bytes()).unwrap();
    }
    rig.volume.make(NodeId::ROOT, &name("dir"), &Newborn::Dir, 0o755, &CALLER).unwrap();
    rig.volume.settle().unwrap();
    rig.volume.checkpoint().unwrap();
}

type Work = (&'static str, fn(&Rig) -> Result<()>, fn(&Path) -> bool);

/// Each operation, and whether a backing shows that it was done.
const WORKS: &[Work] = &[
    ("create", |rig| rig.create("new"), |root| root.join("new").is_file()),
    (
        "overwrite",
        |rig| rig.write("old", b"NEW"),
        |root| std::fs::read(root.join("old")).unwrap().starts_with(b"NEWold"),
    ),
    (
        "large write",
        |rig| rig.write("old", &[7; 100_000]),
        |root| std::fs::read(root.join("old")).unwrap() == [7; 100_000],
    ),
    (
        "empty",
        |rig| {
            let node = rig.lookup("old")?;
            rig.volume.open_file(&node, true, true, &CALLER)?;
            rig.volume.release(&node, true)
        },
        |root| std::fs::read(root.join("old")).unwrap().is_empty(),
    ),
    (
        "unlink",
        |rig| rig.volume.unlink(NodeId::ROOT, &name("gone"), &CALLER),
        |root| !root.join("gone").exists(),
    ),
    (
        "rename over",
        |rig| {
            let (from, to) = (name("old"), name("other"));
            let mode = crate::replica::backing::RenameMode::Replace;
            rig.volume.rename(NodeId::ROOT, &from, NodeId::ROOT, &to, mode, &CALLER)
        },
        |root| std::fs::read(root.join("other")).unwrap().starts_with(b"old"),
    ),
    (
        "link",
        |rig| {
            let node = rig.lookup("old")?;
            rig.volume.link(&node, NodeId::ROOT, &name("hard"), &CALLER).map(|_| ())
        },
        |root| root.join("hard").is_file(),
    ),
    (
        "mkdir",
        |rig| {
            rig.volume.make(NodeId::ROOT, &name("made"), &Newborn::Dir, 0o700, &CALLER).map(|_| ())
        },
        |root| root.join("made").is_dir(),
    ),
    (
        "rmdir",
        |rig| rig.volume.rmdir(NodeId::ROOT, &name("dir"), &CALLER),
        |root| !root.join("dir").exists(),
    ),
    (
        "chmod",
        |rig| {
            let changes = Changes { mode: Some(0o600), ..Changes::default() };
            rig.volume.set_attributes(&rig.lookup("old")?, &changes, &CALLER).map(|_| ())
        },
        |root| {
            use std::os::unix::fs::PermissionsExt;
            root.join("old").metadata().unwrap().permissions().mode() & 0o7777 == 0o600
        },
    ),
    (
        "setxattr",
        |rig| {
            let node = rig.lookup("old")?;
            rig.volume.set_xattr(&node, "user.x".as_ref(), b"y", 0, &CALLER)
        },
        |root| rustix::fs::getxattr(root.join("old"), "user.x", &mut [0; 8][..]).is_ok(),
    ),
    (
        "write and fsync",
        |rig| {
            let node = rig.lookup("other")?;
            rig.volume.open_file(&node, true, false, &CALLER)?;
            let done = rig
                .volume
                .write(&node, 0, b"synced", false, &CALLER)
                .and_then(|_| rig.volume.fsync(&node, false));
            rig.volume.release(&node, true)?;
            done
        },
        |root| std::fs::read(root.join("other")).unwrap().starts_with(b"synced"),
    ),
];

#[test]
fn a_call_that_fails_costs_its_replica_at_most_and_never_the_operation() {
    if !crate::sys::is_root() {
        return;
    }
    let mut cut_points = 0;
    for (what, work, is_done) in WORKS {
        for faulty in 0..2 {
            for nth in 0..CALLS_MAX {
                let rig = Rig::new(faulty, Errno::IO);
                prepare(&rig);
                rig.left.store(nth, Ordering::SeqCst);
                let told = format!("{what}, replica {faulty}, call {nth}");
                work(&rig).unwrap_or_else(|error| panic!("{told}: {error}"));
                let fired = rig.left.swap(usize::MAX, Ordering::SeqCst) == usize::MAX;
                let health = rig.volume.replicas().health(rig.id(faulty));
                let is_online = health.state == ReplicaState::Online;
                let well = rig.volume.replicas().is_online(rig.id(1 - faulty));
                assert!(well, "{told}: the other replica is in use");
                if !fired {
                    assert!(is_online, "{told}: nothing failed");
                    break;
                }
                cut_points += 1;
                for (index, dir) in rig.dirs.iter().enumerate() {
                    if index != faulty || is_online {
                        assert!(is_done(dir.path()), "{told}: not done on replica {index}");
                    }
                }
                // A call that only looks may fail on the one and be answered by the other.
                let failures = rig.volume.replicas().failures(rig.id(faulty));
                assert!(!failures.is_empty(), "{told}: status names what failed");
                rig.volume.close().unwrap();
                assert!(nth + 1 < CALLS_MAX, "{told}: it never ends");
            }
        }
    }
    assert!(cut_points > 100, "{cut_points}");
}

/// As a sector that cannot be read, until it is written.
#[test]
fn a_file_that_a_device_cannot_read_is_answered_by_another_and_written_anew() {
    if !crate::sys::is_root() {
        return;
    }
    const BYTES: u64 = 12_345;
    let bad = Arc::new(AtomicUsize::new(0));
    let sector = bad.clone();
    let plan = move |call: crate::replica::faulty::Call<'_>| match (call.op, call.len) {
        ("write_at", BYTES) => {
            sector.store(0, Ordering::SeqCst);
            None
        }
        ("read_at", _) if sector.load(Ordering::SeqCst) > 0 => Some(Injected::Error(Errno::IO)),
        _ => None,
    };
    let rig = Rig::planned(0, Arc::new(AtomicUsize::new(usize::MAX)), Arc::new(plan));
    prepare(&rig);
    let content = [7; BYTES as usize];
    rig.create("bad").unwrap();
    rig.write("bad", &content).unwrap();
    rig.volume.settle().unwrap();
    bad.store(1, Ordering::SeqCst);
    let node = rig.lookup("bad").unwrap();
    let mut read = [0; BYTES as usize];
    assert_eq!(rig.volume.read(&node, 0, &mut read).unwrap(), read.len());
    assert_eq!(read, content);
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while bad.load(Ordering::SeqCst) > 0 {
        assert!(std::time::Instant::now() < until, "it is not written anew");
        std::thread::yield_now();
    }
    let health = rig.volume.replicas().health(rig.id(0));
    assert!(health.read_errors > 0, "{health:?}");
    assert_eq!(health.state, ReplicaState::Online);
    rig.volume.close().unwrap();
    assert_eq!(std::fs::read(rig.dirs[0].path().join("bad")).unwrap(), content);
    let quarantine = std::fs::read_dir(rig.dirs[0].path().join(".rearview/quarantine")).unwrap();
    assert_eq!(quarantine.count(), 1, "what could be read of it");
}

#[test]
fn a_write_that_failed_differently_everywhere_is_compared_at_the_next_mount() {
    if !crate::sys::is_root() {
        return;
    }
    for ends_well in [true, false] {
        let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
        let store = open_store(&dirs);
        let armed = Arc::new(AtomicBool::new(false));
        for index in 0..2 {
            let armed = armed.clone();
            let plan = move |call: crate::replica::faulty::Call<'_>| {
                // The reading is for making the replicas equal again.
                let hit = matches!(call.op, "write_at" | "read_at") && call.len == 5;
                let fails = hit && armed.load(Ordering::SeqCst);
                fails.then_some(Injected::ShortWrite(index * 3, Errno::IO))
            };
            put_between(&store, index, Arc::new(plan));
        }
        let rig = Rig { volume: open_volume(store), dirs, left: Arc::default() };
        prepare(&rig);
        armed.store(true, Ordering::SeqCst);
        assert!(rig.write("old", b"wrong").is_err());
        armed.store(false, Ordering::SeqCst);
        let contents = |dirs: &[tempfile::TempDir]| -> Vec<Vec<u8>> {
            dirs.iter().map(|dir| std::fs::read(dir.path().join("old")).unwrap()).collect()
        };
        let differ = contents(&rig.dirs);
        assert!(differ[0] != differ[1], "the write was done in part");
        assert!(rig.volume.replicas().is_doubtful());
        // What is done later does not wipe out what is not known.
        rig.write("other", b"more").unwrap();
        rig.volume.checkpoint().unwrap();
        rig.write("other", b"again").unwrap();
        rig.volume.checkpoint().unwrap();
        if ends_well {
            rig.volume.close().unwrap();
        }
        let Rig { volume, dirs, .. } = rig;
        drop(volume);
        let volume = open_volume(open_store(&dirs));
        let same = contents(&dirs);
        assert!(same[0] == same[1], "ended well: {ends_well}");
        assert!(!volume.replicas().is_doubtful());
        volume.close().unwrap();
    }
}

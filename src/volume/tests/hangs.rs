//! Our own files on a backing that hangs: nobody waits longer than a call may take, the mount goes
//! on with the others, and status says who is out of use, since when and why.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender};

use super::*;
use crate::replica::State as ReplicaState;
use crate::replica::faulty::{Call, Faulty, Injected};
use crate::store::Between;
use crate::store::marker::PeerState;

/// Short enough to wait for, long enough for a busy machine to make a call that does not hang.
const TIMEOUT: Duration = Duration::from_millis(300);
/// What meets one that hangs has ended by then.
const BOUND: Duration = Duration::from_secs(10);
/// The calls by which a marker is written, or a lock looked at and written: from the first opening
/// on.
const CALLS: usize = 6;

/// A volume of three replicas. On the one that is `bad`, calls hang from one on, until the rig is
/// dropped.
struct Rig {
    volume: Arc<Volume>,
    dirs: Vec<tempfile::TempDir>,
    bad: usize,
    trap: Arc<Trap>,
    go_on: Option<Sender<()>>,
}

/// With which call it begins.
#[derive(Clone, Copy)]
enum On {
    /// An opening of this file.
    Opening(&'static str),
    /// One that the thread of this name makes itself; all others pass.
    Thread(&'static str),
}

struct Trap {
    on: On,
    /// So many calls after that one.
    after: usize,
    armed: AtomicBool,
    /// How many more calls pass; `usize::MAX` while the file is not open.
    left: AtomicUsize,
    hung: AtomicBool,
    resume: Receiver<()>,
}

impl Trap {
    fn meets(&self, call: Call<'_>) -> Option<Injected> {
        if !self.armed.load(Ordering::SeqCst) {
            return None;
        }
        let begins = match self.on {
            On::Opening(file) => {
                let is_it = |name: &EntryName| name.as_bytes() == file.as_bytes();
                call.op == "open_file" && call.name.is_some_and(is_it)
            }
            On::Thread(name) if std::thread::current().name() == Some(name) => true,
            On::Thread(_) => return None,
        };
        let passes = |left: usize| match (left, begins) {
            (usize::MAX, true) => Some(self.after.wrapping_sub(1)),
            (usize::MAX, false) => None,
            (left, _) => Some(left.saturating_sub(1)),
        };
        let before = self.left.load(Ordering::SeqCst);
        let hangs = begins && before == usize::MAX && self.after == 0 || before == 0;
        let _ = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, passes);
        if hangs {
            self.hung.store(true, Ordering::SeqCst);
            let _ = self.resume.recv();
            return Some(Injected::Error(Errno::IO));
        }
        None
    }
}

impl Rig {
    fn new(bad: usize, on: On, after: usize) -> Rig {
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
        let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
        let (go_on, resume) = crossbeam_channel::unbounded();
        let trap = Arc::new(Trap {
            on,
            after,
            armed: AtomicBool::new(false),
            left: AtomicUsize::new(usize::MAX),
            hung: AtomicBool::new(false),
            resume,
        });
        let (own, bad_path) = (trap.clone(), paths[bad].clone());
        let between = Between::new(move |path, inner| {
            if path != bad_path {
                return inner;
            }
            let trap = own.clone();
            Box::new(Faulty::new(inner, Arc::new(move |call: Call<'_>| trap.meets(call))))
        });
        let between = between.with_timeout(TIMEOUT);
        let options = OpenOptions { init: true, between, ..OpenOptions::default() };
        let recover = |replicas: &ReplicaSet, catalog: &Catalog, from| {
            History::recover(replicas, catalog, from)
        };
        let silent = crate::progress::Progress::silent();
        let store = store::open(&paths, &options, &recover, &silent).unwrap();
        let options = VolumeOptions { call_timeout: TIMEOUT, ..quiet() };
        let volume = Volume::open(store, options).unwrap();
        Rig { volume, dirs, bad, trap, go_on: Some(go_on) }
    }

    fn id(&self, index: usize) -> ReplicaId {
        self.volume.replicas().ids().nth(index).unwrap()
    }

    /// Does something that meets the trap, within the bound. Then the second replica is out of use,
    /// and status says since when and why; the first is in use.
    fn survives(&self, file: &str, work: impl FnOnce()) {
        self.trap.armed.store(true, Ordering::SeqCst);
        let (begun, begun_at) = (Instant::now(), Timestamp::now());
        work();
        assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        self.trap.armed.store(false, Ordering::SeqCst);
        assert!(self.trap.hung.load(Ordering::SeqCst), "after {} calls", self.trap.after);
        let status = self.volume.status().unwrap();
        assert_eq!(status.replicas[0].health.state, ReplicaState::Online);
        let own = RelPath::parse(format!("{PRIVATE_DIR}/{file}")).unwrap();
        assert_eq!(self.fault_since(begun_at).path, Some(own));
        // It goes on.
        self.create("after");
        assert!(begun.elapsed() < BOUND * 2, "{:?}", begun.elapsed());
    }

    /// Why the bad one is out of use, as status tells.
    fn fault_since(&self, begun_at: Timestamp) -> Fault {
        let status = self.volume.status().unwrap();
        let state = &status.replicas[self.bad].health.state;
        let ReplicaState::Offline { fault, since } = state else { panic!("{state:?}") };
        assert!(fault.to_string().contains("timed out"), "{fault}");
        assert!((begun_at..=Timestamp::now()).contains(since), "{since:?}");
        fault.clone()
    }

    fn create(&self, name: &str) {
        let name = EntryName::new(name).unwrap();
        let caller = Caller { creds: Creds::DAEMON, pid: 0 };
        let made = self.volume.create(NodeId::ROOT, &name, 0o644, true, &caller).unwrap();
        self.volume.write(&made.0, 0, name.as_bytes(), false, &caller).unwrap();
        self.volume.release(&made.0, true).unwrap();
    }

    fn is_online(&self, index: usize) -> bool {
        self.volume.replicas().is_online(self.id(index))
    }

    /// Takes the second replica out of use, and brings it back after changes that it missed, until
    /// its resync hangs and is given up.
    fn resync_until_it_is_given_up(&self) {
        let (volume, second) = (&self.volume, self.dirs[1].path().to_str().unwrap());
        for n in 0..20 {
            self.create(&format!("before {n}"));
        }
        volume.replica_offline(second).unwrap();
        for n in 0..20 {
            self.create(&format!("missed {n}"));
        }
        volume.settle().unwrap();
        let (begun, begun_at) = (Instant::now(), Timestamp::now());
        self.trap.armed.store(true, Ordering::SeqCst);
        volume.replica_online(second, store::Fork::Refuse).unwrap();
        let id = self.id(1);
        await_that("it has failed", || {
            volume.housekeep().unwrap();
            matches!(volume.resync_of(id), Some(resync::Progressing::Retry(_)))
        });
        assert!(self.trap.hung.load(Ordering::SeqCst), "after {} calls", self.trap.after);
        self.fault_since(begun_at);
        self.create("meanwhile");
        assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    }

    /// The disk answers again: all come back, and are equal.
    fn recovers(mut self) {
        self.trap.armed.store(false, Ordering::SeqCst);
        drop(self.go_on.take());
        await_that("all are in use again", || {
            self.volume.resync_now();
            (0..3).all(|index| self.is_online(index))
        });
        self.volume.close().unwrap();
        for (dir, n) in self.dirs.iter().flat_map(|dir| (0..20).map(move |n| (dir, n))) {
            let name = format!("missed {n}");
            assert_eq!(std::fs::read_to_string(dir.path().join(&name)).unwrap(), name);
            assert!(dir.path().join("meanwhile").exists());
        }
    }
}

fn await_that(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND * 2;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The text of a marker on a backing.
fn marker_at(dir: &Path) -> String {
    std::fs::read_to_string(dir.join(PRIVATE_DIR).join("store.toml")).unwrap()
}

/// Hangs at each call of `work` in turn from the first opening of `on` on.
fn at_every_call(on: &'static str, file: &str, work: impl Fn(&Rig)) {
    for after in 0..CALLS {
        let rig = Rig::new(1, On::Opening(on), after);
        rig.survives(file, || work(&rig));
    }
}

#[test]
fn a_marker_that_hangs_while_another_replica_is_lost_costs_its_own_replica_alone() {
    at_every_call("store.toml.new", "store.toml", |rig| {
        rig.volume.replicas().eject(rig.id(2), Fault::new("write", Errno::IO));
        let status = rig.volume.status().unwrap();
        let marker = status.marker.unwrap();
        let stale = |peer: &crate::store::marker::Peer| peer.state == PeerState::Stale;
        let third = &status.replicas[2].uuid;
        assert!(marker.peer(*third).is_some_and(stale), "{marker:?}");
        let text = marker_at(rig.dirs[0].path());
        assert!(text.contains("write failed: Input/output error"), "{text}");
        assert!(marker.peer(status.replicas[1].uuid).is_some_and(stale), "{marker:?}");
        assert!(text.contains("timed out"), "{text}");
    });
}

#[test]
fn a_policy_that_one_marker_cannot_take_is_noted_by_the_others() {
    at_every_call("store.toml.new", "store.toml", |rig| {
        let mut policy = rig.volume.policy();
        policy.every = crate::retention::Span::hours(6);
        rig.volume.set_policy(&policy).unwrap();
        for index in [0, 2] {
            assert!(marker_at(rig.dirs[index].path()).contains("every = \"6h\""));
        }
    });
}

#[test]
fn a_lock_that_hangs_while_its_record_is_written_anew_costs_its_replica_alone() {
    at_every_call("lock", "lock", |rig| {
        std::fs::write(rig.dirs[1].path().join(PRIVATE_DIR).join("lock"), "rubbish").unwrap();
        let found = rig.volume.store.check_own_files();
        let lock = found.iter().find(|(_, path, _)| path.ends_with("lock"));
        assert!(lock.is_some_and(|(_, _, healed)| healed.is_err()), "{found:?}");
    });
}

#[test]
fn a_marker_that_hangs_at_the_end_of_a_mount_leaves_the_others_clean() {
    let rig = Rig::new(1, On::Opening("store.toml.new"), 3);
    rig.trap.armed.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    rig.volume.close().unwrap();
    assert!(rig.trap.hung.load(Ordering::SeqCst));
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    let clean = |index: usize| marker_at(rig.dirs[index].path()).contains("[clean]");
    assert_eq!([clean(0), clean(1), clean(2)], [true, false, true]);
}

/// The thread that resyncs, which makes its calls itself.
const RESYNC: On = On::Thread("rv-resync");

#[test]
fn a_resync_whose_disk_hangs_has_failed_in_time_and_is_made_when_it_answers() {
    for after in [0, 2, 15, 60] {
        let rig = Rig::new(1, RESYNC, after);
        rig.resync_until_it_is_given_up();
        assert!(rig.is_online(0) && rig.is_online(2));
        rig.recovers();
    }
}

#[test]
fn a_resync_gives_up_the_disk_that_it_copies_from_where_that_hangs() {
    for after in [0, 15] {
        let rig = Rig::new(0, RESYNC, after);
        rig.resync_until_it_is_given_up();
        assert!(rig.is_online(2));
        rig.recovers();
    }
}

#[test]
fn no_command_and_no_end_of_a_mount_waits_for_a_resync_that_hangs() {
    let rig = Rig::new(1, RESYNC, 5);
    rig.resync_until_it_is_given_up();
    let begun = Instant::now();
    rig.volume.replica_offline(rig.dirs[1].path().to_str().unwrap()).unwrap();
    rig.volume.close().unwrap();
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
}

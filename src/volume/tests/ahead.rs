//! What is asked for ahead of a walk through a directory, as a replica sees it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::replica::State as ReplicaState;
use crate::replica::faulty::{Call, Faulty, Injected};
use crate::store::Between;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
/// Files of the directory.
const FILES: usize = 200;

/// A volume whose first replica has nothing at hand, and tells what it is asked.
struct Rig {
    volume: Arc<Volume>,
    asked: crossbeam_channel::Receiver<String>,
    /// A look at this name hangs until the sender is dropped.
    _go_on: crossbeam_channel::Sender<()>,
    hangs: Arc<AtomicBool>,
    _dirs: [tempfile::TempDir; 2],
}

const HANGING: &str = "f010";

impl Rig {
    fn new() -> Rig {
        let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
        let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
        let (tell, asked) = crossbeam_channel::unbounded();
        let (go_on, resume) = crossbeam_channel::unbounded::<()>();
        let (first, hangs) = (paths[0].clone(), Arc::new(AtomicBool::new(false)));
        let own = hangs.clone();
        let between = Between::new(move |path, inner| {
            if path != first {
                return inner;
            }
            let (tell, resume, hangs) = (tell.clone(), resume.clone(), own.clone());
            let plan = move |call: Call<'_>| {
                let name = call.name.filter(|_| call.op == "stat_at")?.to_string();
                if name == HANGING && hangs.load(Ordering::SeqCst) {
                    let _ = tell.send(name);
                    let _ = resume.recv();
                    return Some(Injected::Error(Errno::IO));
                }
                let _ = tell.send(name);
                None
            };
            Box::new(Faulty::new(inner, Arc::new(plan)).looked_ahead_on())
        });
        let options = OpenOptions { init: true, between, ..OpenOptions::default() };
        let recover = |replicas: &ReplicaSet, catalog: &Catalog, from| {
            History::recover(replicas, catalog, from)
        };
        let silent = crate::progress::Progress::silent();
        let volume = open_volume(store::open(&paths, &options, &recover, &silent).unwrap());
        for number in 0..FILES {
            let (node, _) =
                volume.create(NodeId::ROOT, &name(number), 0o644, true, &CALLER).unwrap();
            volume.release(&node, true).unwrap();
            let id = node.id;
            drop(node);
            volume.forget(id, 1);
        }
        volume.settle().unwrap();
        volume.catalog().flush(crate::catalog::Durability::Written).unwrap();
        while asked.try_recv().is_ok() {}
        Rig { volume, asked, _go_on: go_on, hangs, _dirs: dirs }
    }

    fn look(&self, number: usize) {
        let (node, _) = self.volume.lookup(NodeId::ROOT, &name(number)).unwrap();
        let id = node.id;
        drop(node);
        self.volume.forget(id, 1);
    }

    /// The next names that it is asked for, in their order.
    fn asked(&self, count: usize) -> Vec<String> {
        let next = || self.asked.recv_timeout(Duration::from_secs(20)).expect("it is asked");
        let mut asked: Vec<_> = (0..count).map(|_| next()).collect();
        asked.sort_unstable();
        asked
    }
}

fn name(number: usize) -> EntryName {
    EntryName::new(format!("f{number:03}")).unwrap()
}

#[test]
fn who_looks_up_one_name_after_another_has_the_next_ones_asked_for() {
    let rig = Rig::new();
    rig.look(20);
    assert_eq!(rig.asked(1), ["f020"]);
    rig.volume.unlink(NodeId::ROOT, &name(25), &CALLER).unwrap();
    assert_eq!(rig.asked(1), ["f025"]);
    rig.look(21);
    let expected: Vec<_> = (21..54).map(|number| name(number).to_string()).collect();
    let asked = rig.asked(expected.len());
    // Whether the one that is gone counts depends on what is committed.
    assert!(asked.iter().all(|one| expected.contains(one) || one == "f054"), "{asked:?}");
    // What they mean is right, also of the one that is not there any more.
    for number in 20..60 {
        let found = rig.volume.lookup(NodeId::ROOT, &name(number));
        assert_eq!(found.is_ok(), number != 25, "{number}");
    }
    rig.volume.close().unwrap();
}

#[test]
fn what_nobody_waits_for_may_hang() {
    let rig = Rig::new();
    rig.hangs.store(true, Ordering::SeqCst);
    rig.look(7);
    rig.look(8);
    // The names up to the one that hangs, and those that were looked up.
    rig.asked(2 + 2);
    let begun = Instant::now();
    for number in [9, 11, 12, 100, 101, 102, 199] {
        rig.look(number);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let status = rig.volume.status().unwrap();
    assert!(status.replicas.iter().all(|one| one.health.state == ReplicaState::Online));
    rig.volume.close().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

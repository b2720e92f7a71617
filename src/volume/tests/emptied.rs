//! What is durable of a file that was emptied when its new content is preserved.

use parking_lot::Mutex;

use super::*;
use crate::replica::faulty::{Call, Faulty};
use crate::store::Between;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };

/// A volume whose replicas tell what they are asked to write and to sync.
struct Rig {
    volume: Arc<Volume>,
    asked: Arc<Mutex<[Vec<&'static str>; 2]>>,
    _dirs: [tempfile::TempDir; 2],
}

impl Rig {
    fn new() -> Rig {
        let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
        let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
        let asked = Arc::<Mutex<[Vec<&'static str>; 2]>>::default();
        let (all, own) = (paths.clone(), asked.clone());
        let between = Between::new(move |path, inner| {
            let replica = all.iter().position(|own| own == path).unwrap();
            let asked = own.clone();
            let plan = move |call: Call<'_>| {
                if ["write_at", "sync", "sync_all"].contains(&call.op) {
                    asked.lock()[replica].push(call.op);
                }
                None
            };
            Box::new(Faulty::new(inner, Arc::new(plan)))
        });
        let options = OpenOptions { init: true, between, ..OpenOptions::default() };
        let recover = |replicas: &ReplicaSet, catalog: &Catalog, from| {
            History::recover(replicas, catalog, from)
        };
        let silent = crate::progress::Progress::silent();
        let volume = open_volume(store::open(&paths, &options, &recover, &silent).unwrap());
        let rig = Rig { volume, asked, _dirs: dirs };
        let name = EntryName::new("file").unwrap();
        let (node, _) = rig.volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        rig.volume.release(&node, true).unwrap();
        // The undo log is begun, whose own first record waits for its name.
        rig.write(false);
        rig.write(false);
        rig
    }

    /// Writes a version, emptying the file before or not; returns what the replicas were asked.
    fn write(&self, truncate: bool) -> [Vec<&'static str>; 2] {
        let name = EntryName::new("file").unwrap();
        let (node, _) = self.volume.lookup(NodeId::ROOT, &name).unwrap();
        *self.asked.lock() = Default::default();
        self.volume.open_file(&node, true, truncate, &CALLER).unwrap();
        self.volume.write(&node, 0, &[7; 10_000], false, &CALLER).unwrap();
        self.volume.release(&node, true).unwrap();
        std::mem::take(&mut *self.asked.lock())
    }
}

/// The records of a content that was written after the file was emptied were durable, and that the
/// older one had been moved aside was not: recovery took them for the older one's.
#[test]
fn that_a_file_was_moved_aside_is_durable_before_its_next_content_is_preserved() {
    let rig = Rig::new();
    let preserved = ["write_at", "sync", "write_at"];
    assert_eq!(rig.write(false), [preserved, preserved]);
    assert_eq!(rig.write(true), [["write_at"], ["write_at"]], "the file is moved aside");
    let settled = ["sync", "write_at", "sync", "write_at"];
    assert_eq!(rig.write(false), [settled, settled]);
    assert_eq!(rig.write(false), [preserved, preserved], "once is enough");
    rig.write(true);
    rig.volume.checkpoint().unwrap();
    let intended = ["write_at", "sync", "write_at", "sync", "write_at"];
    assert_eq!(rig.write(false), [intended, intended], "a checkpoint will do");
}

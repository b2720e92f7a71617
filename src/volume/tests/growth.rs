//! Memory follows what is in use, not what ever was.

use super::*;
use crate::history::History;
use crate::store::{self, OpenOptions};

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };

#[test]
fn files_that_came_and_went_leave_nothing_in_memory() {
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
    let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
    let options = OpenOptions { init: true, ..OpenOptions::default() };
    let recover =
        |replicas: &ReplicaSet, catalog: &Catalog, from| History::recover(replicas, catalog, from);
    let progress = crate::progress::Progress::silent();
    let store = store::open(&paths, &options, &recover, &progress).unwrap();
    // Nothing is done by anybody but the test.
    let long = Duration::from_secs(3600);
    let options =
        VolumeOptions { housekeeping: long, pack_after: long, ..VolumeOptions::default() };
    let volume = Volume::open(store, options).unwrap();
    for number in 0..300 {
        let name = EntryName::new(format!("file{number}")).unwrap();
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, b"what is soon gone", false, &CALLER).unwrap();
        if number % 2 == 0 {
            volume.release(&node, true).unwrap();
            volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap();
        } else {
            volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap();
            volume.release(&node, true).unwrap();
        }
        let id = node.id;
        drop(node);
        volume.forget(id, 1);
    }
    volume.settle().unwrap();
    volume.nodes.sweep();
    assert_eq!(volume.nodes.count(), 1, "the root");
    assert!(volume.unsealed.lock().is_empty());
    assert!(volume.undigested.lock().is_empty());
    volume.close().unwrap();
}

//! Memory and our own directories follow what is in use, not what ever was.

use super::*;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };

#[test]
fn files_that_came_and_went_leave_nothing_in_memory() {
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
    let volume = open_volume(open_store(&dirs));
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

#[test]
fn a_clean_end_leaves_no_empty_shards_and_takes_nothing_that_waits() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let shards = || {
        dirs.each_ref().map(|dir| {
            let preserved = dir.path().join(".rearview/preserved");
            std::fs::read_dir(preserved).map_or(0, |shards| shards.count())
        })
    };
    let volume = open_volume(open_store(&dirs));
    for number in 0..20 {
        let name = EntryName::new(format!("file{number}")).unwrap();
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, b"what was once", false, &CALLER).unwrap();
        volume.release(&node, true).unwrap();
    }
    volume.create_snapshot("before", false, &[]).unwrap();
    for number in 0..20 {
        let name = EntryName::new(format!("file{number}")).unwrap();
        volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap();
    }
    volume.close().unwrap();
    assert_eq!(shards(), [20, 20], "what waits stays");
    let volume = open_volume(open_store(&dirs));
    volume.pack_in_steps(&|_| Ok(())).unwrap();
    assert_eq!(shards(), [20, 20], "they stay while they may be in use");
    volume.close().unwrap();
    assert_eq!(shards(), [0, 0]);
    let volume = open_volume(open_store(&dirs));
    let name = EntryName::new("again").unwrap();
    let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
    volume.release(&node, true).unwrap();
    volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap();
    volume.close().unwrap();
}

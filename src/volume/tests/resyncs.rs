//! What a resync looks at, and how long others wait for it.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::history::parse_preserved_name;
use crate::replica::faulty::{Call, Faulty};
use crate::store::{Between, Fork};

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
/// Deleted files that wait to be packed.
const DELETED: usize = 200;
/// What a resync looks at beside those.
const FEW: usize = 40;

fn save(volume: &Volume, name: &str) -> Arc<Node> {
    let name = EntryName::new(name).unwrap();
    let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
    volume.write(&node, 0, name.as_bytes(), false, &CALLER).unwrap();
    node
}

fn delete(volume: &Volume, name: &str) {
    volume.unlink(NodeId::ROOT, &EntryName::new(name).unwrap(), &CALLER).unwrap();
}

fn wait_until_online(volume: &Volume, id: ReplicaId) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !volume.replicas().is_online(id) {
        assert!(Instant::now() < deadline, "{:?}", volume.resync_of(id));
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn preserved_files_that_a_replica_had_are_not_looked_at_again() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
    let looks = Arc::new(AtomicUsize::new(0));
    let own = looks.clone();
    let between = Between::new(move |_, inner| {
        let looks = own.clone();
        let count = move |call: Call<'_>| {
            let is_preserved = |name: &EntryName| parse_preserved_name(name).is_some();
            if call.op == "stat_at" && call.name.is_some_and(is_preserved) {
                looks.fetch_add(1, Ordering::SeqCst);
            }
            None
        };
        Box::new(Faulty::new(inner, Arc::new(count)))
    });
    let options = OpenOptions { init: true, between, ..OpenOptions::default() };
    let recover =
        |replicas: &ReplicaSet, catalog: &Catalog, from| History::recover(replicas, catalog, from);
    let silent = crate::progress::Progress::silent();
    let volume = open_volume(store::open(&paths, &options, &recover, &silent).unwrap());
    let names: Vec<String> = (0..DELETED).map(|n| format!("f{n}")).collect();
    for name in &names {
        volume.release(&save(&volume, name), true).unwrap();
    }
    volume.create_snapshot("one", false, &[]).unwrap();
    let (gone, missed) = names.split_at(DELETED - 3);
    gone.iter().for_each(|name| delete(&volume, name));
    let second = paths[1].to_str().unwrap();
    let id = volume.replica_offline(second).unwrap();
    missed.iter().for_each(|name| delete(&volume, name));
    looks.store(0, Ordering::SeqCst);
    volume.replica_online(second, Fork::Refuse).unwrap();
    wait_until_online(&volume, id);
    let looked = looks.load(Ordering::SeqCst);
    assert!((3..FEW).contains(&looked), "{looked} looks");
    volume.close().unwrap();
    let files = |path: &std::path::Path| -> std::collections::BTreeSet<_> {
        let shards = std::fs::read_dir(path.join(PRIVATE_DIR).join("preserved")).unwrap();
        let listed = shards.flat_map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap());
        listed.map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(files(&paths[0]), files(&paths[1]));
    assert_eq!(files(&paths[0]).len(), DELETED);
}

#[test]
fn who_saves_a_file_waits_once_for_a_resync_that_cannot_keep_up() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = open_volume(open_store(&dirs));
    let wait = Duration::from_millis(200);
    volume.resyncs.brake.set(wait);
    let begun = Instant::now();
    let node = save(&volume, "file");
    assert!(begun.elapsed() >= wait, "it is made");
    let begun = Instant::now();
    for at in 0..50 {
        volume.write(&node, at, b"more", false, &CALLER).unwrap();
    }
    assert!(begun.elapsed() < wait * 25, "{:?}", begun.elapsed());
    volume.release(&node, true).unwrap();
    let begun = Instant::now();
    volume.open_file(&node, true, false, &CALLER).unwrap();
    volume.write(&node, 0, b"again", false, &CALLER).unwrap();
    assert!(begun.elapsed() >= wait, "it is changed anew");
    volume.resyncs.brake.set(Duration::ZERO);
    volume.release(&node, true).unwrap();
    volume.close().unwrap();
}

#[test]
fn a_deleted_open_file_that_was_written_to_is_the_same_on_a_replica_that_returns() {
    [true, false].into_iter().for_each(deleted_and_written_to);
}

fn deleted_and_written_to(also_before: bool) {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
    let volume = open_volume(open_store(&dirs));
    let node = save(&volume, "file");
    volume.create_snapshot("one", false, &[]).unwrap();
    delete(&volume, "file");
    // Where nothing was before: no before-image tells of it.
    volume.write(&node, 4, b"tail", false, &CALLER).unwrap();
    volume.flush(&node).unwrap();
    let second = paths[1].to_str().unwrap();
    let id = volume.replica_offline(second).unwrap();
    // As many bytes as before; a look has them carried out.
    let mut bytes = [0; 16];
    if also_before {
        volume.write(&node, 0, b"FILE", false, &CALLER).unwrap();
    }
    volume.write(&node, 4, b"TAIL", false, &CALLER).unwrap();
    assert_eq!(volume.read(&node, 0, &mut bytes).unwrap(), 8);
    volume.flush(&node).unwrap();
    volume.replica_online(second, Fork::Refuse).unwrap();
    wait_until_online(&volume, id);
    volume.replica_offline(paths[0].to_str().unwrap()).unwrap();
    let read = volume.read(&node, 0, &mut bytes).unwrap();
    assert_eq!(&bytes[..read], if also_before { b"FILETAIL" } else { b"fileTAIL" });
    volume.release(&node, true).unwrap();
    volume.close().unwrap();
}

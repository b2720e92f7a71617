//! What several names in one directory mean, asked at once.

use super::faults::put_between;
use super::*;
use crate::replica::faulty::Injected;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };

fn name(text: &str) -> EntryName {
    EntryName::new(text).expect("a valid name")
}

#[test]
fn names_asked_at_once_mean_what_each_means_alone() {
    if !crate::sys::is_root() {
        return;
    }
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
    let store = open_store(&dirs);
    let fails = Arc::new(AtomicBool::new(false));
    let armed = fails.clone();
    let plan = move |call: crate::replica::faulty::Call<'_>| {
        let hit = call.op == "stat_at" && armed.load(Ordering::SeqCst);
        hit.then_some(Injected::Error(Errno::IO))
    };
    put_between(&store, 0, Arc::new(plan));
    let volume = open_volume(store);
    let create =
        |text: &str| volume.create(NodeId::ROOT, &name(text), 0o640, true, &CALLER).unwrap().0;
    let (closed, open) = (create("closed"), create("open"));
    volume.write(&closed, 0, b"some", false, &CALLER).unwrap();
    volume.release(&closed, true).unwrap();
    volume.make(NodeId::ROOT, &name("dir"), &Newborn::Dir, 0o700, &CALLER).unwrap();
    let link = Newborn::Symlink(b"to");
    volume.make(NodeId::ROOT, &name("link"), &link, 0o777, &CALLER).unwrap();
    volume.settle().unwrap();
    volume.catalog().flush(Durability::Written).unwrap();
    create("gone");
    volume.unlink(NodeId::ROOT, &name("gone"), &CALLER).unwrap();
    volume.write(&open, 0, b"not sealed", false, &CALLER).unwrap();
    // Somebody put another kind of object in its place on the backing that is asked first.
    let swapped = create("swapped");
    volume.release(&swapped, true).unwrap();
    std::fs::remove_file(dirs[0].path().join("swapped")).unwrap();
    std::fs::create_dir(dirs[0].path().join("swapped")).unwrap();
    let names = ["closed", "open", "dir", "link", "swapped", "gone", "never", PRIVATE_DIR];
    let names = names.map(name);
    for failing in [false, true] {
        fails.store(failing, Ordering::SeqCst);
        let all = volume.lookup_all(NodeId::ROOT, &names).unwrap();
        for (name, found) in names.iter().zip(all) {
            let alone = volume.lookup(NodeId::ROOT, name).ok();
            let (found, alone) = (found.map(told), alone.map(told));
            assert_eq!(found, alone, "{name}");
            let means_nothing = [&b"gone"[..], b"never", PRIVATE_DIR.as_bytes()];
            assert_eq!(found.is_none(), means_nothing.contains(&name.as_bytes()), "{name}");
            found.iter().for_each(|(id, _)| volume.forget(*id, 2));
        }
    }
}

fn told((node, stat): (Arc<Node>, crate::replica::backing::Stat)) -> (NodeId, String) {
    (node.id, format!("{:?} {stat:?}", node.kind))
}

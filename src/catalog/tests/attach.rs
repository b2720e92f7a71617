//! A catalog that joins others while they are written.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::sys::device::Alive;

fn third() -> ReplicaId {
    ReplicaId::all().nth(2).unwrap()
}

fn add(catalog: &Catalog, id: u64) {
    let node = NodeId(id);
    let changes = vec![
        Change::NodePut(row(id, Kind::File)),
        Change::EntryAdd { parent: ROOT, name: name(&format!("file {id:06}")), node },
    ];
    catalog.push(changes).unwrap();
}

#[test]
fn a_catalog_joins_while_the_others_are_written_and_is_equal_to_them() {
    let scratch = Scratch::new(3);
    let files =
        ReplicaMap::new(vec![Some(scratch.files[0].clone()), Some(scratch.files[1].clone()), None]);
    let catalog = Catalog::open(files, true).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    (2..60_000).for_each(|id| add(&catalog, id));
    catalog.flush(Durability::Written).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut id = 60_000;
            while !stop.load(Ordering::Relaxed) {
                (id..id + 50).for_each(|id| add(&catalog, id));
                id += 50;
                catalog.flush(Durability::Written).unwrap();
            }
        });
        let mut steps = 0;
        let mut joining = catalog
            .copy_live(third(), &scratch.files[2], &mut || {
                steps += 1;
                Ok(())
            })
            .unwrap();
        joining.catch_up().unwrap();
        joining.attach().unwrap();
        // Some more, written to all three.
        catalog.flush(Durability::Written).unwrap();
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        assert!(steps > 1, "the copy was made in one step: nothing came between");
    });
    add(&catalog, 1_000_000);
    catalog.close().unwrap();
    assert_eq!(catalog.failed_replicas(), []);
    let heads: Vec<Head> =
        scratch.files.iter().map(|file| Catalog::inspect(file).unwrap()).collect();
    assert!(heads.iter().all(|head| *head == heads[0]), "{heads:?}");
}

#[test]
fn a_copy_that_is_stopped_leaves_the_old_catalog_and_the_next_one_succeeds() {
    let scratch = Scratch::new(3);
    let files = ReplicaMap::new(vec![Some(scratch.files[0].clone()), None, None]);
    let catalog = Catalog::open(files, true).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    (2..10_000).for_each(|id| add(&catalog, id));
    catalog.flush(Durability::Written).unwrap();
    let before = Catalog::inspect(&scratch.files[2]).unwrap();
    let stopped = catalog.copy_live(third(), &scratch.files[2], &mut || Err(Error::Interrupted));
    assert!(matches!(stopped.err(), Some(Error::Interrupted)));
    assert_eq!(Catalog::inspect(&scratch.files[2]).unwrap(), before);
    catalog.copy_live(third(), &scratch.files[2], &mut || Ok(())).unwrap().attach().unwrap();
    // The one that joined answers once the other is gone.
    catalog.detach(ReplicaId::all().next().unwrap());
    assert!(catalog.lookup(ROOT, &name("file 000007")).unwrap().is_some());
    add(&catalog, 1_000_000);
    catalog.close().unwrap();
    assert!(Catalog::inspect(&scratch.files[2]).unwrap().sequence > before.sequence);
}

#[test]
fn what_is_wrong_with_one_of_two_compared_catalogs_is_told_of_that_one() {
    for bad in [0, 1] {
        let scratch = Scratch::new(2);
        let both = scratch.files.iter().cloned().map(Some).collect();
        let catalog = Catalog::open(ReplicaMap::new(both), true).unwrap();
        catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
        (2..2_000).for_each(|id| add(&catalog, id));
        catalog.close().unwrap();
        let first = || ReplicaMap::new(vec![Some(scratch.files[0].clone())]);
        let compare = |catalog: &Catalog| {
            catalog.comparing(&scratch.files[1]).unwrap().run(&Alive::default())
        };
        let catalog = Catalog::open(first(), true).unwrap();
        assert_eq!(compare(&catalog).unwrap(), Differing::default());
        catalog.close().unwrap();
        let root: u32 = rusqlite::Connection::open(&scratch.files[bad])
            .unwrap()
            .query_row("SELECT rootpage FROM sqlite_master WHERE name = 'node'", [], |row| {
                row.get(0)
            })
            .unwrap();
        let file = std::fs::File::options().write(true).open(&scratch.files[bad]).unwrap();
        let at = u64::from(root - 1) * 4096;
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], at).unwrap();
        let catalog = Catalog::open(first(), true).unwrap();
        let error = compare(&catalog).unwrap_err();
        let Error::Damaged { what, .. } = &error else { panic!("{error}") };
        assert!(what.contains(&*scratch.files[bad].to_string_lossy()), "{what}");
    }
}

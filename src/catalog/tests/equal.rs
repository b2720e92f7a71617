//! Catalogs in use are compared as they were at one moment.

use std::sync::atomic::AtomicBool;

use super::*;

#[test]
fn catalogs_are_compared_at_one_moment_however_much_is_committed() {
    let scratch = Scratch::new_in(3, "/dev/shm");
    let catalog = scratch.open_rooted();
    let ids: Vec<ReplicaId> = ReplicaId::all().take(3).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut id = 100;
            while !stop.load(Ordering::Relaxed) {
                catalog.push(create(1, &format!("file {id}"), file(id, id))).unwrap();
                catalog.flush(Durability::Written).unwrap();
                id += 1;
            }
        });
        let mut seen = Vec::new();
        for round in 0..20 {
            let hashes = catalog.table_hashes_at_once(&ids, &mut || Ok(()));
            let hashes = hashes.unwrap().expect("a moment is met");
            assert!(hashes.iter().all(|one| *one == hashes[0]), "{round}");
            seen.extend(hashes.into_iter().next());
        }
        stop.store(true, Ordering::Relaxed);
        seen.dedup();
        assert!(seen.len() > 1, "nothing was committed between the looks");
    });
    catalog.close().unwrap();
    let other = rusqlite::Connection::open(&scratch.files[1]).unwrap();
    other.execute("UPDATE node SET mode = mode + 1 WHERE id = 1", []).unwrap();
    drop(other);
    let catalog = scratch.open();
    let hashes = catalog.table_hashes_at_once(&ids, &mut || Ok(())).unwrap().unwrap();
    assert_eq!(hashes[0], hashes[2]);
    let differing = hashes[0].iter().zip(&hashes[1]).filter(|(one, other)| one != other);
    assert_eq!(differing.map(|((table, _), _)| table.as_str()).collect::<Vec<_>>(), ["node"]);
}

#[test]
fn a_comparison_ends_when_it_is_told_to() {
    let scratch = Scratch::new_in(2, "/dev/shm");
    let catalog = scratch.open_rooted();
    for id in 100..10_000 {
        catalog.push(create(1, &format!("file {id}"), file(id, id))).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
    let ids: Vec<ReplicaId> = ReplicaId::all().take(2).collect();
    let stop = catalog.table_hashes_at_once(&ids, &mut || Err(Error::Interrupted));
    assert!(matches!(stop, Err(Error::Interrupted)));
}

#[test]
fn an_audit_ends_when_it_is_told_to() {
    let scratch = Scratch::new_in(1, "/dev/shm");
    let catalog = scratch.open_rooted();
    for id in 100..20_000 {
        catalog.push(create(1, &format!("file {id}"), file(id, id))).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
    let alive = crate::sys::device::Alive::default();
    alive.end();
    Catalog::audit_alive(&scratch.files[0], &alive).unwrap_err();
    catalog.close().unwrap();
    Catalog::audit(&scratch.files[0]).unwrap();
}

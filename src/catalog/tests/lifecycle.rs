//! Opening, closing, copying, failing, and the overlay.

use std::process::Command;

use rustix::io::Errno;

use super::*;
use crate::catalog::copy::{Original, put_in_place};
use crate::catalog::database::Place;
use crate::catalog::lane::TIMEOUT;
use crate::sys::device::Alive;

#[test]
fn the_overlay_and_the_database_answer_alike() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    let check = |catalog: &Catalog| {
        assert_eq!(catalog.lookup(ROOT, &name("a")).unwrap(), None);
        assert_eq!(catalog.lookup(ROOT, &name("b")).unwrap(), Some((NodeId(2), Kind::File)));
        let all = catalog.lookup_all(ROOT, &["l", "a", "b", "c"].map(name)).unwrap();
        let (two, link) = (Some((NodeId(2), Kind::File)), Some((NodeId(3), Kind::Symlink)));
        assert_eq!(all, [link, None, two, two]);
        assert_eq!(catalog.node(NodeId(2)).unwrap(), Some(file(2, 1)));
        assert_eq!(
            listed(catalog.list(ROOT).unwrap()),
            [("b".to_string(), 2), ("c".to_string(), 2), ("l".to_string(), 3)]
        );
        assert_eq!(catalog.names(NodeId(2)).unwrap(), [(ROOT, name("b")), (ROOT, name("c"))]);
        assert_eq!(catalog.symlink_target(NodeId(3)).unwrap(), Some(b"b".to_vec()));
        assert_eq!(catalog.meta("policy").unwrap().as_deref(), Some("x"));
    };
    catalog.push(create(1, "a", file(2, 1))).unwrap();
    catalog.push(vec![add(1, "c", 2)]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    catalog.push(vec![remove(1, "a"), add(1, "b", 2)]).unwrap();
    let mut link = create(1, "l", row(3, Kind::Symlink));
    link.push(Change::SymlinkTarget { node: NodeId(3), target: b"b".to_vec() });
    catalog.push(link).unwrap();
    catalog.push(vec![Change::MetaPut { key: "policy", value: "x".into() }]).unwrap();
    check(&catalog);
    catalog.flush(Durability::Durable).unwrap();
    check(&catalog);
    catalog.close().unwrap();
    assert!(catalog.push(vec![]).is_err());
    check(&scratch.open());
    check(&Catalog::open_read_only(&scratch.files[1]).unwrap());
}

#[test]
fn a_closed_catalog_is_one_file_with_the_sums_of_its_pages() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.close().unwrap();
    let heads = ReplicaId::all().map(|id| catalog.closed_head(id)).take(2);
    let mut names: Vec<String> = std::fs::read_dir(scratch.files[0].parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains('-'))
        .collect();
    names.sort();
    assert_eq!(names, [""; 0]);
    for (file, head) in scratch.files.iter().zip(heads) {
        assert_eq!(Catalog::inspect(file).ok(), head);
    }
}

/// Ids take a byte or two of many rows: those of a new store begin at 1, whatever came of the
/// mount that made it.
#[test]
fn ids_are_skipped_after_an_unclean_end_but_not_in_a_new_store() {
    let scratch = Scratch::new(1);
    let new = Catalog::open(scratch.map(), false).unwrap();
    assert_eq!((new.next_node(), new.next_content()), (NodeId(2), ContentId(1)));
    new.push(create(1, "f", file(2, 1))).unwrap();
    new.flush(Durability::Written).unwrap();
    drop(new);
    let after = Catalog::open(scratch.map(), false).unwrap();
    assert!(after.next_node().0 > 1 << 20);
}

/// Else a mount that commits nothing would tell its log that nothing is durable.
#[test]
fn what_was_durable_at_a_clean_end_is_durable_after_it() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.close().unwrap();
    let after = scratch.open();
    assert_eq!(after.durable_sequence(), after.committed().1);
    assert!(after.durable_sequence() > 0);
}

#[test]
fn replicas_have_one_chain() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    for round in 0..20 {
        catalog.push(create(1, &format!("f{round}"), file(10 + round, 1))).unwrap();
        catalog.flush(Durability::Written).unwrap();
    }
    let heads: Vec<_> = scratch.files.iter().map(|file| Catalog::inspect(file).unwrap()).collect();
    assert_eq!(heads[0], heads[1]);
    assert!(heads[0].sequence >= 20);
    assert_eq!(heads[0].generation, Generation(21));
}

/// SQLite maps the index of a WAL into memory by itself. An XFS that had shut itself down gave no
/// page for a store to it, and the daemon ended by SIGBUS.
#[test]
fn no_file_of_a_catalog_in_use_is_mapped() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(catalog.next_node().0, 1))).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    assert!(catalog.lookup(ROOT, &name("f")).unwrap().is_some());
    Catalog::audit(&scratch.files[1]).unwrap();
    scratch.files.iter().for_each(|file| assert_not_mapped(file));
    catalog.close().unwrap();
}

#[track_caller]
fn assert_not_mapped(file: &Path) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let file = file.display().to_string();
    let mapped = maps.lines().find(|line| line.contains(&file));
    assert_eq!(mapped, None, "a dying disk would end the process");
}

#[test]
fn a_catalog_that_is_held_is_not_mapped_and_stays_as_it_is() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(catalog.next_node().0, 1))).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    let dead = scratch.files[0].with_file_name("dead.db");
    std::fs::copy(&scratch.files[0], &dead).unwrap();
    std::fs::copy(wal(&scratch.files[0]), wal(&dead)).unwrap();
    let bytes = || [&dead, &wal(&dead)].map(|file| std::fs::read(file).unwrap());
    let before = bytes();
    let held = Catalog::open_held(&dead).unwrap();
    assert!(held.lookup(ROOT, &name("f")).unwrap().is_some());
    assert_not_mapped(&dead);
    drop(held);
    assert!(bytes() == before, "it was changed");
}

#[test]
fn a_catalog_whose_writer_died_is_inspected_copied_and_opened() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let id = catalog.next_node();
    catalog.push(create(1, "f", file(id.0, 1))).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    // What a dead process leaves: the database and its WAL as they are.
    let dead = scratch.files[0].with_file_name("dead.db");
    let copy = scratch.files[0].with_file_name("copy.db");
    std::fs::copy(&scratch.files[0], &dead).unwrap();
    std::fs::copy(wal(&scratch.files[0]), wal(&dead)).unwrap();
    let head = Catalog::inspect(&dead).unwrap();
    assert_eq!(head.generation, Generation(2));
    Catalog::copy(&dead, &copy).unwrap();
    assert!(!wal(&copy).exists());
    assert_eq!(Catalog::inspect(&copy).unwrap(), head);
    for file in [dead, copy] {
        let again = Catalog::open(ReplicaMap::new(vec![Some(file)]), false).unwrap();
        assert_eq!(again.lookup(ROOT, &name("f")).unwrap(), Some((id, Kind::File)));
        assert!(again.next_node().0 > id.0 + 1000, "ids that may be in use are skipped");
    }
}

fn wal(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_os_string();
    name.push("-wal");
    name.into()
}

/// Its disk hung: when that answers, others may be at it.
#[test]
fn a_copy_that_was_given_up_takes_no_further_step() {
    let scratch = Scratch::new(2);
    scratch.open_rooted().close().unwrap();
    let [from, to] = [&scratch.files[0], &scratch.files[1]];
    let before = std::fs::read(to).unwrap();
    let [new, sums] = ["new", "sums"].map(|suffix| to.with_extension(format!("db.{suffix}")));
    let given_up = Alive::default();
    given_up.end();
    std::fs::write(&new, "another's").unwrap();
    std::fs::write(&sums, "another's").unwrap();
    let copied = Original::open(from, TIMEOUT).unwrap().copy_to(to, &given_up);
    assert_eq!(copied.unwrap_err().to_errno(), Errno::TIMEDOUT);
    assert_eq!(std::fs::read(&new).unwrap(), b"another's");
    std::fs::copy(from, &new).unwrap();
    let put = put_in_place(&Place::of(to).unwrap(), &given_up);
    assert_eq!(put.unwrap_err().to_errno(), Errno::TIMEDOUT);
    assert_eq!(std::fs::read(to).unwrap(), before);
    assert!(new.exists() && sums.exists());
}

#[test]
fn a_copy_that_fails_names_the_one_that_it_is_the_fault_of() {
    let scratch = Scratch::new(1);
    scratch.open_rooted().close().unwrap();
    let from = scratch.files[0].clone();
    let small = from.with_file_name("small");
    std::fs::create_dir(&small).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=16k", "small"].map(std::ffi::OsStr::new);
    let mounted = Command::new("mount").args(mount).arg(&small).status().unwrap();
    assert!(mounted.success());
    let to = small.join("catalog.db");
    let full = Catalog::copy(&from, &to);
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    let Err(Error::Io { path, source, .. }) = full else { panic!("{full:?}") };
    assert_eq!((path, source.raw_os_error()), (to, Some(libc::ENOSPC)));
    let whole = std::fs::read(&from).unwrap();
    std::fs::write(&from, &whole[..whole.len() / 2]).unwrap();
    let torn = Catalog::copy(&from, &from.with_file_name("copy.db")).unwrap_err();
    assert!(torn.to_string().contains(&*from.to_string_lossy()), "{torn}");
}

#[test]
fn a_copy_replaces_an_older_catalog_and_its_wal() {
    let scratch = Scratch::new(2);
    let one = Catalog::open(ReplicaMap::new(vec![Some(scratch.files[0].clone())]), true).unwrap();
    one.push(vec![Change::NodePut(dir(1))]).unwrap();
    one.close().unwrap();
    let other = Catalog::open(ReplicaMap::new(vec![Some(scratch.files[1].clone())]), true).unwrap();
    for _ in 0..5 {
        other.push(vec![Change::NodePut(dir(1))]).unwrap();
        other.flush(Durability::Written).unwrap();
    }
    drop(other);
    assert!(Catalog::open(scratch.map(), true).is_err(), "differing catalogs are not opened");
    Catalog::copy(&scratch.files[0], &scratch.files[1]).unwrap();
    assert_eq!(
        Catalog::inspect(&scratch.files[0]).unwrap(),
        Catalog::inspect(&scratch.files[1]).unwrap()
    );
    scratch.open().close().unwrap();
}

#[test]
fn garbage_is_refused_by_name() {
    let scratch = Scratch::new(1);
    let path = scratch.files[0].with_file_name("garbage.db");
    assert!(matches!(Catalog::inspect(&path), Err(Error::NoStore(_))));
    for garbage in [vec![], vec![7; 100], vec![7; 100_000], b"SQLite format 3\0".to_vec()] {
        std::fs::write(&path, garbage).unwrap();
        let files = || ReplicaMap::new(vec![Some(path.clone())]);
        for error in [Catalog::inspect(&path).err(), Catalog::open(files(), true).err()] {
            let error = error.unwrap();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
            assert!(error.to_string().contains("garbage.db"), "{error}");
        }
    }
    let whole = std::fs::read(&scratch.files[0]).unwrap();
    for at in (0..whole.len()).step_by(97) {
        let mut bad = whole.clone();
        bad[at..].iter_mut().take(8).for_each(|byte| *byte ^= 0xa5);
        std::fs::write(&path, bad).unwrap();
        // Any answer will do, but an answer it must be.
        let _ = Catalog::inspect(&path);
        if let Ok(catalog) = Catalog::open_read_only(&path) {
            let _ = (catalog.list(ROOT), catalog.totals(), catalog.snapshots());
        }
    }
}

#[test]
fn a_newer_format_is_refused_with_its_reason() {
    let scratch = Scratch::new(1);
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    db.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(db);
    let error = Catalog::open(scratch.map(), true).err().unwrap().to_string();
    assert!(error.contains("newer rearview (format 99"), "{error}");
}

#[test]
fn rows_out_of_range_are_errors_and_no_panics() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.close().unwrap();
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    db.execute_batch(
        "UPDATE node SET kind = -4, mode = 'x' WHERE id = 2; UPDATE entry SET born = -1;
         INSERT INTO entry VALUES(1, 'a/b', 2, 1, NULL)",
    )
    .unwrap();
    drop(db);
    let catalog = scratch.open();
    assert!(catalog.node(NodeId(2)).is_err());
    assert!(catalog.list(ROOT).is_err());
    assert!(catalog.versions(NodeId(2)).is_err());
    let _ = catalog.diff(Generation(0), catalog.generation(), &RelPath::root());
}

#[test]
fn a_failing_replica_is_dropped_and_the_last_one_latches() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    catalog.flush(Durability::Written).unwrap();
    let break_replica = |index: usize| {
        let db = rusqlite::Connection::open(&scratch.files[index]).unwrap();
        db.execute_batch("DROP TABLE touched").unwrap();
    };
    break_replica(0);
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    let failed = catalog.failed_replicas();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].0.index(), 0);
    assert_eq!(listed(catalog.list(ROOT).unwrap()).len(), 1, "read from the other replica");
    break_replica(1);
    catalog.push(create(1, "g", file(3, 1))).unwrap();
    assert!(catalog.flush(Durability::Written).is_err());
    assert!(catalog.push(create(1, "h", file(4, 1))).is_err());
    assert!(catalog.flush(Durability::Written).is_err());
    assert!(catalog.close().is_err());
}

#[test]
fn a_detached_replica_stays_as_it_was() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    catalog.flush(Durability::Written).unwrap();
    let before = Catalog::inspect(&scratch.files[0]).unwrap();
    catalog.detach(scratch.map().ids().next().unwrap());
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    assert_eq!(Catalog::inspect(&scratch.files[0]).unwrap(), before);
    assert_eq!(Catalog::inspect(&scratch.files[1]).unwrap().generation, Generation(2));
    assert!(catalog.failed_replicas().is_empty());
    assert_eq!(catalog.lookup(ROOT, &name("f")).unwrap(), Some((NodeId(2), Kind::File)));
}

#[test]
fn a_reader_beside_the_mount_sees_commits_and_refuses_to_write() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.flush(Durability::Written).unwrap();
    let reader = Catalog::open_read_only(&scratch.files[0]).unwrap();
    let at = catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.flush(Durability::Written).unwrap();
    assert_eq!(reader.generation(), at);
    assert_eq!(reader.lookup_at(at, ROOT, &name("f")).unwrap(), Some(file(2, 1)));
    assert!(matches!(reader.push(vec![]), Err(Error::Refused(_))));
    assert!(reader.create_snapshot("x", at, false, &[]).is_err());
    reader.flush(Durability::Durable).unwrap();
    reader.close().unwrap();
}

#[test]
fn equal_sets_of_attributes_have_one_id() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let mut set = Xattrs::default();
    assert_eq!(catalog.intern_xattrs(&set).unwrap(), XattrSetId::NONE);
    set.0.insert(b"user.a".to_vec(), b"1".to_vec());
    let id = catalog.intern_xattrs(&set).unwrap();
    assert_eq!(catalog.intern_xattrs(&set).unwrap(), id);
    assert_eq!(*catalog.xattrs(id).unwrap(), set);
    catalog.close().unwrap();
    let catalog = scratch.open();
    assert_eq!(catalog.intern_xattrs(&set).unwrap(), id);
    assert_eq!(*catalog.xattrs(id).unwrap(), set);
    assert!(catalog.xattrs(XattrSetId(99)).is_err());
}

#[test]
fn lookups_never_miss_an_entry_while_batches_are_committed() {
    let scratch = Scratch::new(2);
    let catalog = Arc::new(scratch.open_rooted());
    catalog.push(create(1, "a", file(2, 1))).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let (catalog, stop) = (catalog.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                assert!(catalog.node(NodeId(2)).unwrap().is_some());
                assert_eq!(catalog.names(NodeId(2)).unwrap().len(), 1);
                assert_eq!(catalog.list(ROOT).unwrap().len(), 1);
            }
        })
    };
    for round in 0..300 {
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        catalog.push(vec![remove(1, from), add(1, to, 2)]).unwrap();
        catalog.flush(Durability::Written).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
}

#[test]
fn a_snapshot_is_durable_by_one_commit_with_what_was_pushed_before_it() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    let created = |round: u64| {
        catalog.flush(Durability::Durable).unwrap();
        let (_, before) = catalog.committed();
        catalog.push(create(1, &format!("f{round}"), file(2 + round, 1))).unwrap();
        let at = catalog.freeze();
        let snapshot = catalog.create_snapshot(&format!("s{round}"), at, false, &[]).unwrap();
        assert_eq!(snapshot.generation, at);
        let durable = catalog.shared.waiting.queue.lock().durable;
        assert_eq!(durable, catalog.generation());
        assert_eq!(catalog.durable_sequence(), catalog.committed().1);
        catalog.committed().1 - before
    };
    // Where the machine is busy, a commit that nobody asked for may come between.
    assert!((0..50).any(|round| created(round) == 1));
}

#[test]
fn a_snapshot_is_found_by_its_id_under_each_of_its_names() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let made = catalog.create_snapshot("one", catalog.freeze(), false, &[]).unwrap();
    assert_eq!(catalog.snapshot_of(made.id).unwrap(), Some(made.clone()));
    catalog.rename_snapshot("one", "two").unwrap();
    let renamed = catalog.snapshot_of(made.id).unwrap().unwrap();
    assert_eq!(renamed.name, "two");
    catalog.delete_snapshot("two").unwrap();
    assert_eq!(catalog.snapshot_of(made.id).unwrap(), None);
}

#[test]
fn whoever_watches_snapshots_hears_of_each_change_and_of_names_that_are_gone() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    catalog.watch_snapshots(Box::new(move |nameless| {
        hears.lock().push(nameless.iter().map(|snapshot| snapshot.name.clone()).collect());
    }));
    let told = |wanted: &[&[&str]]| {
        let heard: Vec<Vec<String>> = std::mem::take(&mut *heard.lock());
        assert_eq!(heard, wanted);
    };
    for name in ["a", "b", "c"] {
        catalog.create_snapshot(name, catalog.freeze(), false, &[]).unwrap();
    }
    told(&[&[], &[], &[]]);
    catalog.rename_snapshot("a", "d").unwrap();
    told(&[&["a"]]);
    catalog.hold_snapshot("d", true).unwrap();
    catalog.rename_snapshot("d", "d").unwrap();
    catalog.rename_snapshot("d", "b").unwrap_err();
    told(&[]);
    catalog.delete_snapshots(&["b", "none", "d", "c"]).unwrap();
    told(&[&["b", "c"]]);
}

//! Who made which generation.

use std::ops::Range;

use proptest::prelude::*;

use super::*;

fn actor(pid: u32, command: &str) -> Actor {
    Actor { uid: 1000, pid, command: command.as_bytes().to_vec() }
}

fn count(catalog: &Catalog, sql: &str) -> i64 {
    catalog.flush(Durability::Written).unwrap();
    catalog.shared.read(|db| db.query_row(sql, [], |row| row.get(0))).unwrap()
}

#[test]
fn alternating_actors_are_told_apart_and_one_that_goes_on_costs_nothing() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let (cp, git) = (actor(7, "cp"), actor(8, "git"));
    let mut expected = Vec::new();
    for round in 0..30u64 {
        let by = match round / 5 % 3 {
            0 => Some(&cp),
            1 => Some(&git),
            _ => None,
        };
        let at = catalog.push_by(by, create(1, &format!("f{round}"), file(2 + round, 1))).unwrap();
        expected.push((at, by.cloned()));
        if round % 7 == 0 {
            catalog.flush(Durability::Written).unwrap();
        }
    }
    for (at, by) in &expected {
        assert_eq!(&catalog.actor_of(*at).unwrap(), by, "{at}");
    }
    assert_eq!(count(&catalog, "SELECT count(*) FROM act"), 6);
    assert_eq!(count(&catalog, "SELECT count(*) FROM actor"), 2);
    let first = expected[0].0.0;
    let range = |from: u64, to: u64| Generation(first + from)..Generation(first + to);
    let by_git = |since| catalog.made_by(since, |one| one.command == b"git").unwrap();
    assert_eq!(by_git(Generation(0)), [range(5, 10), range(20, 25)]);
    assert_eq!(by_git(Generation(first + 6)), [range(7, 10), range(20, 25)]);
    assert_eq!(by_git(Generation(first + 24)), Vec::<Range<Generation>>::new());
    let touched = catalog.touched_in(&by_git(Generation(first + 19))).unwrap();
    assert!((22..27).all(|id| touched.contains(&NodeId(id))), "{touched:?}");
}

#[test]
fn what_is_no_version_leaves_the_actor_as_he_was() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let by = actor(7, "cp");
    catalog.push_by(Some(&by), create(1, "a", file(2, 1))).unwrap();
    catalog.push(vec![Change::ContentPreserved { id: ContentId(1), cloned: false }]).unwrap();
    let at = catalog.push_by(Some(&by), create(1, "b", file(3, 1))).unwrap();
    assert_eq!(catalog.actor_of(at).unwrap(), Some(by));
    assert_eq!(count(&catalog, "SELECT count(*) FROM act"), 1);
}

#[test]
fn actors_outlive_the_mount_on_every_replica() {
    let scratch = Scratch::new(2);
    let (cp, git) = (actor(7, "cp"), actor(8, "git"));
    let catalog = scratch.open_rooted();
    let first = catalog.push_by(Some(&cp), create(1, "a", file(2, 1))).unwrap();
    catalog.close().unwrap();
    // The last actor goes on; then the same command with another number, and an unclean end.
    let catalog = Catalog::open(scratch.map(), false).unwrap();
    let same = catalog.push_by(Some(&cp), create(1, "b", file(3, 1))).unwrap();
    let other = catalog.push_by(Some(&git), create(1, "c", file(4, 1))).unwrap();
    catalog.flush(Durability::Written).unwrap();
    drop(catalog);
    let catalog = Catalog::open(scratch.map(), false).unwrap();
    let ours = catalog.push(vec![Change::NodePut(file(4, 2))]).unwrap();
    let again = catalog.push_by(Some(&git), create(1, "d", file(5, 1))).unwrap();
    for (at, by) in [(first, Some(&cp)), (same, Some(&cp)), (other, Some(&git)), (ours, None)] {
        assert_eq!(catalog.actor_of(at).unwrap().as_ref(), by, "{at}");
    }
    assert_eq!(catalog.actor_of(again).unwrap(), Some(git));
    assert_eq!(catalog.actor_of(Generation(1)).unwrap(), None);
    catalog.close().unwrap();
    let dump = |file: &PathBuf| {
        let db = rusqlite::Connection::open(file).unwrap();
        let mut rows = Vec::new();
        for sql in
            ["SELECT g || ' ' || actor FROM act", "SELECT id || ' ' || hex(command) FROM actor"]
        {
            let mut statement = db.prepare(sql).unwrap();
            let found = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
            rows.extend(found.map(Result::unwrap));
        }
        rows
    };
    assert_eq!(dump(&scratch.files[0]), dump(&scratch.files[1]));
    assert_eq!(
        Catalog::inspect(&scratch.files[0]).unwrap(),
        Catalog::inspect(&scratch.files[1]).unwrap()
    );
}

#[test]
fn a_burst_of_two_actors_is_two_versions() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let (cp, chmod) = (actor(7, "cp"), actor(8, "chmod"));
    catalog.push_by(Some(&cp), create(1, "f", file(2, 1))).unwrap();
    let mode = NodeRow { mode: 0o600, ..file(2, 1) };
    let at = catalog.push_by(Some(&chmod), vec![Change::NodePut(mode.clone())]).unwrap();
    // What we add ourselves is no version of its own.
    catalog.push(vec![Change::NodePut(NodeRow { blocks: 8, ..mode })]).unwrap();
    let versions = catalog.versions(NodeId(2)).unwrap();
    assert_eq!(versions.len(), 2);
    assert_eq!((versions[1].born, versions[1].row.blocks), (at, 8));
    assert_eq!(catalog.actor_of(versions[0].born).unwrap(), Some(cp));
    assert_eq!(catalog.actor_of(at).unwrap(), Some(chmod));
}

#[test]
fn a_new_file_belongs_to_whoever_wrote_it() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    // A shell makes the file, and becomes the command that writes it.
    let (sh, sort) = (actor(7, "sh"), actor(7, "sort"));
    let born = catalog.push_by(Some(&sh), create(1, "f", file(2, 0))).unwrap();
    let other = catalog.push_by(Some(&sh), create(1, "g", dir(3))).unwrap();
    let sealed = catalog.push_by(Some(&sort), vec![Change::NodePut(file(2, 1))]).unwrap();
    assert_eq!(catalog.versions(NodeId(2)).unwrap().len(), 1);
    for (at, by) in [(born, &sort), (other, &sh), (sealed, &sort)] {
        assert_eq!(catalog.actor_of(at).unwrap().as_ref(), Some(by), "{at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_generation_is_its_actors(
        steps in proptest::collection::vec((0u32..5, any::<bool>()), 1..200),
    ) {
        let scratch = Scratch::new(2);
        let catalog = scratch.open_rooted();
        let mut expected = Vec::new();
        for (index, &(who, flush)) in steps.iter().enumerate() {
            let by = (who > 0).then(|| actor(who, "sh"));
            let row = file(2 + index as u64, 1);
            let at = catalog.push_by(by.as_ref(), create(1, &format!("f{index}"), row)).unwrap();
            expected.push((at, by));
            if flush {
                catalog.flush(Durability::Written).unwrap();
            }
        }
        for (at, by) in &expected {
            prop_assert_eq!(&catalog.actor_of(*at).unwrap(), by);
        }
        for who in 1..5 {
            let ranges = catalog.made_by(Generation(0), |one| one.pid == who).unwrap();
            for (at, by) in &expected {
                let within = ranges.iter().any(|range| range.contains(at));
                prop_assert_eq!(within, by.as_ref().is_some_and(|by| by.pid == who));
            }
        }
        catalog.close().unwrap();
        let heads: Vec<_> =
            scratch.files.iter().map(|file| Catalog::inspect(file).unwrap()).collect();
        prop_assert_eq!(&heads[0], &heads[1]);
    }
}

/// `cargo test --lib catalog::tests::actors -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn bytes_per_version() {
    let measure = |who: &dyn Fn(u64) -> Option<Actor>| {
        let scratch = Scratch::new(1);
        let catalog = scratch.open_rooted();
        for index in 0..10_000u64 {
            let row = NodeRow { mtime: Timestamp::now(), ..file(2 + index, 1) };
            let name = format!("some-file-{index}.rs");
            catalog.push_by(who(index).as_ref(), create(1, &name, row)).unwrap();
        }
        catalog.flush(Durability::Written).unwrap();
        rest(&catalog);
        std::fs::metadata(&scratch.files[0]).unwrap().len() as f64 / 10_000.0
    };
    println!("nobody: {:.1}", measure(&|_| None));
    println!("one process: {:.1}", measure(&|_| Some(actor(4242, "python3"))));
    let many = |index: u64| Some(actor(100_000 + index as u32 / 10, "python3"));
    println!("1,000 processes with 10 files each: {:.1}", measure(&many));
    let mixed = |index: u64| Some(actor(100_000 + index as u32 % 1000, "python3"));
    println!("1,000 processes, one file each in turn: {:.1}", measure(&mixed));
}

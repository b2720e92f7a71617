//! Power cuts on simulated disks: what was acknowledged survives, in the live tree and in history,
//! on all replicas alike, also when recovery itself is cut.
//!
//! `REARVIEW_CRASHES` sets how many states are tried (default: 50), `REARVIEW_SEED` from which seed
//! on. A failure tells the seed that repeats it with `REARVIEW_CRASHES=1`.

mod common;
mod crash;
#[allow(dead_code)] // The driver is used in part.
mod model {
    pub mod compare;
    pub mod drive;
    pub mod exclude;
    pub mod names;
    pub mod open;
    pub mod ops;
    pub mod reference;
}

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crash::dice::{Dice, number};
use crash::experiment::Recording;
use crash::sequence::operations;
use model::drive::Driver;
use model::ops::Op;
use rearviewfs::catalog::Durability;
use rearviewfs::store::Between;

/// States tried of one recorded sequence.
const CUTS_PER_SEQUENCE: usize = 12;
/// Every so many states, the recovery of one is cut as well, so many times.
const NESTED_EVERY: usize = 5;
const NESTED_CUTS: usize = 3;

#[test]
fn what_was_acknowledged_survives_every_power_cut() {
    common::need(&["fusermount3"]);
    let wanted = number("REARVIEW_CRASHES", 50) as usize;
    let first = number("REARVIEW_SEED", 1);
    let (mut states, mut nested, mut failures) = (0, 0, Vec::new());
    for seed in first.. {
        let left = wanted.saturating_sub(states + nested);
        if left == 0 {
            break;
        }
        let sequence = operations(seed);
        let recording = Recording::of(&sequence)
            .unwrap_or_else(|error| panic!("seed {seed}: before any cut: {error}"));
        for index in 0..left.min(CUTS_PER_SEQUENCE) {
            let mut dice = Dice::new(seed << 16 | index as u64);
            let cut = recording.cut(&mut dice);
            let disks = recording.disks_after(&cut, &mut dice);
            let mut verdict = recording.judge(&disks, &cut);
            states += 1;
            if verdict.is_ok() && index % NESTED_EVERY == 0 {
                let done = recording.judge_cut_recovery(&disks, &cut, NESTED_CUTS, &mut dice);
                verdict = done.map(|times| nested += times);
            }
            if let Err(why) = verdict {
                let window = recording.window(&cut);
                let told = recording.story.tell(window);
                failures.push(format!("seed {seed}, cut {index}, {cut:?}: {why}\n{told}"));
            }
        }
    }
    println!("{states} power cuts on simulated disks, {nested} of recovery from one");
    let count = failures.len();
    failures.truncate(5);
    assert!(count == 0, "{count} of {states} states were wrong:\n{}", failures.join("\n\n"));
}

/// btrfs brought the link of a file into `preserved/` to the disk, and not the end of another of
/// its names before that. The live name would have changed the past, and the replicas differed in
/// links.
#[test]
fn a_preserved_file_that_has_a_live_name_again_becomes_one_of_its_own() {
    let scratch = common::scratch();
    let root = scratch.path().canonicalize().expect("a scratch folder has a path");
    let paths = vec![root.join("a"), root.join("b")];
    let mut driver = Driver::over(paths.clone(), false, Between::default()).expect("a store");
    let steps = [
        Op::Create { dir: 0, name: 0, keep_open: false },
        Op::Write { file: 0, offset: 0, length: 9000, fill: 7 },
        Op::Link { file: 0, dir: 0, name: 1 },
        Op::Snapshot,
        Op::Unlink { dir: 0, name: 1 },
        Op::OpenTruncate { file: 0 },
    ];
    steps.iter().for_each(|op| driver.step(op).expect("an operation"));
    driver.catalog().flush(Durability::Durable).expect("a commit");
    let want = driver.snapshots["s1"]["/n0"].content.clone();
    drop(driver);
    let preserved: Vec<_> = paths.iter().map(|path| only_preserved(path)).collect();
    for (path, kept) in paths.iter().zip(&preserved) {
        std::fs::hard_link(kept, path.join("n1")).expect("a link can be made");
    }
    let mut driver = Driver::over(paths.clone(), false, Between::default()).expect("it recovers");
    for (path, kept) in paths.iter().zip(&preserved) {
        assert_eq!(std::fs::metadata(kept).expect("it is there").nlink(), 1);
        assert_eq!(std::fs::metadata(path.join("n1")).expect("it is there").nlink(), 1);
    }
    let snapshot = driver.catalog().snapshot("s1").expect("a look").expect("it is there");
    let shown = driver.dump_moment(snapshot.generation).expect("it can be read");
    assert!(shown["/n0"].content == want, "the past changed");
    driver.unmount().expect("the replicas are equal");
}

/// A file was emptied, written and overwritten, and the power of one disk was gone before it was
/// moved aside there. The before-images that the other one had were taken for the older content's.
#[test]
fn before_images_of_an_emptied_file_are_not_those_of_what_it_was() {
    let scratch = common::scratch();
    let root = scratch.path().canonicalize().expect("a scratch folder has a path");
    let paths = vec![root.join("a"), root.join("b")];
    for linked in [false, true] {
        let mut driver = Driver::over(paths.clone(), false, Between::default()).expect("a store");
        let steps = [
            Op::Create { dir: 0, name: 0, keep_open: false },
            Op::Write { file: 0, offset: 0, length: 30_000, fill: 7 },
            Op::Snapshot,
        ];
        steps.iter().for_each(|op| driver.step(op).expect("an operation"));
        driver.catalog().flush(Durability::Durable).expect("a commit");
        let want = driver.snapshots["s1"]["/n0"].content.clone();
        let catalogs = ["catalog.db", "catalog.db-wal"];
        let catalog = |path: &Path, file: &str| path.join(".rearview").join(file);
        for (path, file) in paths.iter().flat_map(|path| catalogs.map(|file| (path, file))) {
            let kept = root.join(format!("{}-{file}", path.ends_with("b")));
            std::fs::copy(catalog(path, file), kept).expect("a copy");
        }
        let steps = [
            Op::OpenTruncate { file: 0 },
            Op::Write { file: 0, offset: 8253, length: 10_000, fill: 107 },
            Op::Write { file: 0, offset: 8220, length: 4000, fill: 50 },
        ];
        steps.iter().for_each(|op| driver.step(op).expect("an operation"));
        drop(driver);
        for (path, file) in paths.iter().flat_map(|path| catalogs.map(|file| (path, file))) {
            let kept = root.join(format!("{}-{file}", path.ends_with("b")));
            std::fs::copy(kept, catalog(path, file)).expect("a copy");
        }
        let (live, preserved) = (paths[0].join("n0"), only_preserved(&paths[0]));
        match linked {
            false => std::fs::rename(preserved, live).expect("it is moved back"),
            // It was cut off between the two steps.
            true => {
                std::fs::remove_file(&live).expect("it is there");
                std::fs::hard_link(preserved, live).expect("a link can be made");
            }
        }
        let mut driver =
            Driver::over(paths.clone(), false, Between::default()).expect("it recovers");
        let snapshot = driver.catalog().snapshot("s1").expect("a look").expect("it is there");
        let shown = driver.dump_moment(snapshot.generation).expect("it can be read");
        assert!(shown["/n0"].content == want, "the past changed, linked: {linked}");
        driver.unmount().expect("the replicas are equal");
        paths.iter().for_each(|path| std::fs::remove_dir_all(path).expect("it is there"));
    }
}

/// The one file in `preserved/`.
fn only_preserved(backing: &Path) -> PathBuf {
    let shards = std::fs::read_dir(backing.join(".rearview/preserved")).expect("it is there");
    let files = shards.flat_map(|shard| {
        let shard = shard.expect("an entry").path();
        std::fs::read_dir(shard).expect("it is there").map(|file| file.expect("an entry").path())
    });
    let files: Vec<PathBuf> = files.collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

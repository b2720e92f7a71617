//! The model test: random operations on the filesystem and on an in-memory reference; then the live
//! tree, every snapshot, every remembered instant and both replicas are compared with it.
//!
//! `MODEL_CASES` sets how many sequences are run (default: 200), `MODEL_DIR` on which filesystem
//! the backings lie: on one that can share blocks contents are preserved by cloning.

mod model {
    pub mod compare;
    pub mod drive;
    pub mod exclude;
    pub mod names;
    pub mod open;
    pub mod ops;
    pub mod reference;
}

use model::drive::Driver;
use model::ops::{Op, ops};
use proptest::prelude::*;

fn cases() -> u32 {
    std::env::var("MODEL_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200)
}

/// Runs one sequence; `Err` tells what differed.
fn run(sequence: &[Op]) -> Result<(), String> {
    run_to_the_end(sequence).map(drop)
}

/// Runs one sequence, and tells at which steps of packing it died.
fn run_to_the_end(sequence: &[Op]) -> Result<Vec<String>, String> {
    let mut driver = Driver::new(sequence.iter().any(Op::wants_excludes));
    for (index, op) in sequence.iter().enumerate() {
        driver.step(op).map_err(|error| format!("op {index} {op:?}: {error}"))?;
    }
    driver.finish()?;
    Ok(driver.deaths)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn live_tree_snapshots_and_instants_are_what_the_reference_says(sequence in ops()) {
        if let Err(difference) = run(&sequence) {
            prop_assert!(false, "{difference}\nsequence: {sequence:#?}");
        }
    }
}

/// The failures that the random test found, shrunk: each stays a test.
mod found {
    use super::model::ops::Op::{self, *};

    /// The steps of packing, in the order of the alphabet.
    const STEPS: [&str; 8] = [
        "scratch files were forgotten",
        "a pack was recorded",
        "a pack was removed",
        "a pack was written",
        "a segment was removed",
        "an original was removed",
        "recipes were made durable",
        "recipes were recorded",
    ];

    fn holds(sequence: &[Op]) {
        super::run(sequence).unwrap_or_else(|difference| panic!("{difference}"));
    }

    /// Death at each step of the background work in turn, until it ends by itself: contents and
    /// before-images packed, one that equals the live file given up, packs copied out and removed.
    #[test]
    fn dying_at_any_step_of_packing_loses_and_doubles_nothing() {
        let write = |file, offset, length, fill| Write { file, offset, length, fill };
        let mut died_at = std::collections::BTreeSet::new();
        for steps in 0.. {
            let sequence = [
                Create { dir: 0, name: 0, keep_open: false },
                write(0, 0, 20_000, 1),
                Create { dir: 0, name: 1, keep_open: false },
                write(1, 8000, 9_000, 2),
                Create { dir: 0, name: 2, keep_open: false },
                write(2, 0, 15_000, 7),
                Snapshot,
                write(0, 4000, 4096, 9),
                write(1, 100, 12_000, 8),
                Snapshot,
                OpenTruncate { file: 0 },
                write(0, 0, 10, 3),
                Unlink { dir: 0, name: 1 },
                // Saved again with the same bytes.
                OpenTruncate { file: 1 },
                write(1, 0, 15_000, 7),
                DieWhilePacking { steps },
                Compare,
                DeleteSnapshot { snapshot: 0 },
                write(0, 5, 300, 4),
                Thin { every: 1 },
                DieWhilePacking { steps },
                Compare,
            ];
            let deaths = super::run_to_the_end(&sequence).unwrap_or_else(|told| panic!("{told}"));
            if deaths.is_empty() {
                break;
            }
            died_at.extend(deaths);
        }
        assert_eq!(died_at, STEPS.map(String::from).into(), "each step was met");
    }

    #[test]
    fn packed_contents_are_what_they_were() {
        holds(&[
            Create { dir: 0, name: 0, keep_open: false },
            Write { file: 0, offset: 0, length: 10_000, fill: 1 },
            Snapshot,
            Write { file: 0, offset: 4000, length: 4096, fill: 9 },
            Snapshot,
            Tidy,
            Compare,
            OpenTruncate { file: 0 },
            Write { file: 0, offset: 20_000, length: 10_000, fill: 3 },
            Tidy,
            Compare,
            Thin { every: 1 },
            Tidy,
            Compare,
            Unlink { dir: 0, name: 0 },
            DieWhilePacking { steps: 3 },
            Compare,
            DeleteSnapshot { snapshot: 0 },
            Thin { every: 1 },
            Tidy,
            Compare,
        ]);
    }

    /// The check took the preserved file of an orphan that grew for a damaged one.
    #[test]
    fn an_unlinked_file_that_grows_is_sound() {
        holds(&[
            Create { dir: 0, name: 0, keep_open: false },
            Open { file: 0 },
            Truncate { file: 0, size: 1 },
            Unlink { dir: 0, name: 0 },
            WriteOpen { handle: 0, offset: 1, length: 1, fill: 0 },
        ]);
    }

    /// The second emptying moved an empty file over the content that the first had preserved.
    #[test]
    fn a_file_emptied_twice_while_open_keeps_its_content() {
        holds(&[
            Create { dir: 0, name: 0, keep_open: true },
            WriteOpen { handle: 0, offset: 0, length: 1, fill: 1 },
            Open { file: 0 },
            Close { handle: 0 },
            Freeze,
            Truncate { file: 0, size: 0 },
            Truncate { file: 0, size: 0 },
        ]);
    }

    /// The empty file that takes the place of the old one was entered in the directory like a new
    /// one.
    #[test]
    fn emptying_a_file_leaves_its_directorys_time_alone() {
        holds(&[
            Mkdir { dir: 0, name: 3 },
            Create { dir: 1, name: 0, keep_open: false },
            Write { file: 0, offset: 0, length: 1, fill: 0 },
            SetTimes { node: 0, secs: 0 },
            Snapshot,
            OpenTruncate { file: 0 },
        ]);
    }

    /// Where blocks can be shared, an orphan was cloned over the preserved file that it itself is.
    #[test]
    fn an_unlinked_file_that_is_still_written_keeps_its_content() {
        holds(&[
            Create { dir: 0, name: 2, keep_open: false },
            Open { file: 0 },
            Write { file: 0, offset: 8000, length: 4090, fill: 0 },
            Unlink { dir: 0, name: 2 },
            WriteOpen { handle: 0, offset: 0, length: 1, fill: 0 },
        ]);
    }
}

//! The model test: random operations on the filesystem and on an in-memory reference; then the live
//! tree, every snapshot, every remembered instant and both replicas are compared with it.
//!
//! `MODEL_CASES` sets how many sequences are run (default: 200), `MODEL_DIR` on which filesystem the
//! backings lie: on one that can share blocks contents are preserved by cloning.

mod model {
    pub mod compare;
    pub mod drive;
    pub mod names;
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
    let mut driver = Driver::new();
    for (index, op) in sequence.iter().enumerate() {
        driver.step(op).map_err(|error| format!("op {index} {op:?}: {error}"))?;
    }
    driver.finish()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 4000,
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

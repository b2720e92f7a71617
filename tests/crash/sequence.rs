//! Sequences of operations from seeds.

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::dice::Dice;
use crate::model::ops::{Op, ops};

/// The operations of a seed, with more syncs among them than users have.
pub fn operations(seed: u64) -> Vec<Op> {
    let mut dice = Dice::new(seed);
    let bytes: Vec<u8> = (0..4).flat_map(|_| dice.roll().to_le_bytes()).collect();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let drawn = ops().new_tree(&mut runner).expect("operations can be drawn").current();
    let mut all = vec![Op::Create { dir: 0, name: 0, keep_open: true }];
    // What is excluded is not promised anything.
    for op in drawn.into_iter().filter(|op| !op.wants_excludes()) {
        let twice = matches!(op, Op::Write { .. } | Op::WriteOpen { .. } | Op::Rename { .. });
        all.push(op);
        if dice.percent(if twice { 30 } else { 10 }) {
            let handle = dice.below(64);
            all.extend([
                Op::Freeze,
                Op::Open { file: handle },
                Op::Fsync { handle: dice.below(64) },
            ]);
        }
    }
    all
}

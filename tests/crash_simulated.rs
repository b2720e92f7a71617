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
    pub mod ops;
    pub mod reference;
}

use crash::dice::{Dice, number};
use crash::experiment::Recording;
use crash::sequence::operations;

/// States tried of one recorded sequence.
const CUTS_PER_SEQUENCE: usize = 12;
/// Every so many states, the recovery of one is cut as well, so many times.
const NESTED_EVERY: usize = 5;
const NESTED_CUTS: usize = 3;

#[test]
fn what_was_acknowledged_survives_every_power_cut() {
    let _ = env_logger::try_init();
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

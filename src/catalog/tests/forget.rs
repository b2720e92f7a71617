//! Random histories that are thinned, packed, purged and swept, against a plain computation of what
//! must be left.
//!
//! `FORGET_CASES` sets how many sequences are run (default: 256).

mod background;
mod liveness;
mod shown;
mod world;

use proptest::prelude::*;

use self::world::World;
use super::*;

/// One step; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
pub enum Step {
    /// A new file.
    Create {
        name: u8,
    },
    /// A new symlink.
    Symlink {
        name: u8,
    },
    /// Bytes are preserved and overwritten; `seal` makes it a version.
    Write {
        which: usize,
        at: u64,
        length: u64,
        fill: u8,
        seal: bool,
    },
    /// The sealed content is preserved as a clone, before it is overwritten.
    Clone {
        which: usize,
        cloned: bool,
    },
    /// The file is emptied: its content is moved aside.
    Empty {
        which: usize,
    },
    /// A new file with the same bytes takes its place.
    Resave {
        which: usize,
    },
    /// An unlinked file is written by somebody who has it open.
    WriteOrphan {
        which: usize,
        at: u64,
        length: u64,
        fill: u8,
    },
    Link {
        which: usize,
        name: u8,
    },
    Rename {
        which: usize,
        name: u8,
    },
    Unlink {
        which: usize,
    },
    /// All names go in one generation.
    UnlinkAll {
        which: usize,
    },
    Chmod {
        which: usize,
        mode: u32,
    },
    Attribute {
        which: usize,
        value: u8,
    },
    /// The file is excluded from history, or included again.
    Turn {
        which: usize,
    },
    /// The clock goes on.
    Wait {
        long: bool,
    },
    /// A generation is looked at.
    Freeze,
    /// What waits is committed.
    Flush,
    Snapshot,
    Hold {
        which: usize,
    },
    DeleteSnapshots {
        which: usize,
        more: bool,
    },
    /// Versions are thinned.
    Thin {
        horizon: usize,
        every: usize,
    },
    /// Deletions before a generation are not kept any more.
    Expire {
        which: usize,
    },
    /// Preserved contents are packed.
    Pack {
        every: u64,
    },
    /// Before-images are packed.
    PackImages {
        count: usize,
    },
    /// Preserved contents that are live again.
    Same,
    /// Packs are copied.
    Repack,
    /// Some steps of the sweep, of a size.
    Sweep {
        steps: usize,
        cost: usize,
    },
    Purge {
        which: usize,
    },
    /// The process ends, cleanly or not.
    Reopen {
        clean: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0usize..1000;
    let name = 0u8..5;
    let bytes = (which.clone(), 0u64..12, 1u64..8, 0u8..3, any::<bool>());
    prop_oneof![
        6 => name.clone().prop_map(|name| Step::Create { name }),
        1 => name.clone().prop_map(|name| Step::Symlink { name }),
        12 => bytes.clone().prop_map(|(which, at, length, fill, seal)| {
            Step::Write { which, at, length, fill, seal }
        }),
        2 => (which.clone(), any::<bool>())
            .prop_map(|(which, cloned)| Step::Clone { which, cloned }),
        2 => which.clone().prop_map(|which| Step::Empty { which }),
        3 => which.clone().prop_map(|which| Step::Resave { which }),
        2 => bytes.prop_map(|(which, at, length, fill, _)| {
            Step::WriteOrphan { which, at, length, fill }
        }),
        1 => (which.clone(), name.clone()).prop_map(|(which, name)| Step::Link { which, name }),
        2 => (which.clone(), name).prop_map(|(which, name)| Step::Rename { which, name }),
        3 => which.clone().prop_map(|which| Step::Unlink { which }),
        1 => which.clone().prop_map(|which| Step::UnlinkAll { which }),
        1 => (which.clone(), 0u32..3).prop_map(|(which, mode)| Step::Chmod { which, mode }),
        1 => (which.clone(), 0u8..3)
            .prop_map(|(which, value)| Step::Attribute { which, value }),
        1 => which.clone().prop_map(|which| Step::Turn { which }),
        3 => any::<bool>().prop_map(|long| Step::Wait { long }),
        5 => Just(Step::Freeze),
        2 => Just(Step::Flush),
        4 => Just(Step::Snapshot),
        1 => which.clone().prop_map(|which| Step::Hold { which }),
        3 => (which.clone(), any::<bool>())
            .prop_map(|(which, more)| Step::DeleteSnapshots { which, more }),
        4 => (which.clone(), 1usize..6)
            .prop_map(|(horizon, every)| Step::Thin { horizon, every }),
        1 => which.clone().prop_map(|which| Step::Expire { which }),
        2 => (1u64..3).prop_map(|every| Step::Pack { every }),
        2 => (1usize..5).prop_map(|count| Step::PackImages { count }),
        2 => Just(Step::Same),
        1 => Just(Step::Repack),
        5 => (1usize..30, 1usize..9).prop_map(|(steps, cost)| Step::Sweep { steps, cost }),
        1 => which.prop_map(|which| Step::Purge { which }),
        1 => any::<bool>().prop_map(|clean| Step::Reopen { clean }),
    ]
}

/// Runs one sequence and compares in the end, and what each snapshot is said to free with what its
/// deletion frees.
fn run(steps: &[Step]) {
    let mut world = World::new();
    for step in steps {
        world.take(step);
    }
    world.sweep_all(5);
    world.check_shown();
    // What is continuous is swept later: here, for the sake of the comparison, at once.
    world.thin_all();
    world.reopen(true);
    world.sweep_all(1000);
    world.check_shown();
    liveness::check(&world);
    world.check_freed();
}

fn cases() -> u32 {
    std::env::var("FORGET_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_is_left_is_what_the_visible_generations_need(
        steps in proptest::collection::vec(step(), 1..90),
    ) {
        run(&steps);
    }
}

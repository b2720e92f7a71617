//! Tests of epochs and of the log: what is recorded, when, and what it says after a death.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::replica::Replica;
use crate::replica::dir_backing::DirBacking;
use crate::replica::faulty::{Faulty, Injected};

const OLD: NodeId = NodeId(5);
const NEXT: NodeId = NodeId(100);
const MOUNT: i64 = 77;

struct Rig {
    dirs: Vec<TempDir>,
    set: ReplicaSet,
    intents: Intents,
    /// Syncs of the log on all replicas.
    syncs: Arc<AtomicUsize>,
    /// The replica whose writes fail.
    failing: Arc<AtomicUsize>,
}

fn rig(count: usize) -> Rig {
    let dirs: Vec<TempDir> = (0..count).map(|_| TempDir::new().unwrap()).collect();
    let (syncs, failing) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(usize::MAX)));
    let replicas = dirs.iter().enumerate().map(|(index, dir)| {
        let inner = Box::new(DirBacking::open(dir.path()).unwrap());
        let (syncs, failing) = (syncs.clone(), failing.clone());
        let plan = move |call: crate::replica::faulty::Call<'_>| {
            syncs.fetch_add(usize::from(call.op == "sync"), Ordering::SeqCst);
            let fails = call.op == "write_at" && failing.load(Ordering::SeqCst) == index;
            fails.then_some(Injected::Error(Errno::IO))
        };
        let backing = Box::new(Faulty::new(inner, Arc::new(plan)));
        Replica::new(uuid::Uuid::new_v4(), format!("r{index}"), dir.path(), backing)
    });
    let set = ReplicaSet::new(replicas.collect());
    let intents = Intents::begin_log(&set, MOUNT, NEXT, Base::default()).unwrap();
    syncs.store(0, Ordering::SeqCst);
    Rig { dirs, set, intents, syncs, failing }
}

impl Rig {
    fn begin(&self, what: &[Dirty]) -> Intent<'_> {
        self.intents.begin(&self.set, what).unwrap()
    }

    /// What the log of a replica would say if we died now.
    fn past(&self, index: usize) -> Past {
        let backing = DirBacking::open(self.dirs[index].path()).unwrap();
        format::read(&backing).unwrap().expect("a log")
    }

    fn syncs(&self) -> usize {
        self.syncs.swap(0, Ordering::SeqCst)
    }
}

fn sorted(set: &std::collections::HashSet<NodeId>) -> Vec<u64> {
    let mut ids: Vec<u64> = set.iter().map(|id| id.0).collect();
    ids.sort();
    ids
}

#[test]
fn what_is_born_in_an_epoch_is_told_by_its_directory_alone() {
    let rig = rig(1);
    drop(rig.begin(&[Dirty::Dir(OLD), Dirty::File(NEXT), Dirty::Dir(NodeId(101))]));
    let set = rig.intents.dirty_since(Epoch(1));
    assert_eq!((sorted(&set.dirs), set.files.len(), set.born_from), (vec![5], 0, Some(NEXT)));
    assert_eq!(rig.past(0).dirty, set);
    // In the next epoch it is as old as all others, but for the log nothing has changed.
    let epoch = rig.intents.open(|| NodeId(102));
    rig.syncs();
    drop(rig.begin(&[Dirty::File(NEXT)]));
    assert!(rig.intents.dirty_in(epoch).files.contains(&NEXT));
    assert_eq!((rig.syncs(), rig.past(0).dirty), (0, set));
}

#[test]
fn a_birth_that_an_earlier_epoch_began_is_none_of_the_next() {
    let rig = rig(1);
    let creating = rig.begin(&[Dirty::Dir(OLD)]);
    let epoch = rig.intents.turn(|| NEXT);
    creating.born(NEXT);
    drop(creating);
    rig.intents.close(&rig.set, Base::default()).unwrap();
    drop(rig.begin(&[Dirty::File(NEXT)]));
    assert!(rig.intents.dirty_in(epoch).files.contains(&NEXT));
    assert!(rig.past(0).dirty.files.contains(&NEXT));
}

#[test]
fn an_operation_counts_in_the_epoch_in_which_it_began() {
    let rig = rig(1);
    let early = rig.begin(&[Dirty::Dir(OLD)]);
    let epoch = rig.intents.open(|| NEXT);
    let late = rig.begin(&[]);
    early.also(Dirty::Dir(NodeId(7))).unwrap();
    assert!(rig.intents.dirty_in(epoch).is_empty());
    assert!(rig.intents.dirty_in(Epoch(1)).dirs.contains(&NodeId(7)));
    let ending = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            rig.intents.drain(epoch);
            assert!(ending.load(Ordering::SeqCst), "drained before the operation ended");
        });
        ending.store(true, Ordering::SeqCst);
        drop(early);
    });
    // What began later is not waited for.
    drop(late);
}

#[test]
fn sets_are_kept_until_they_are_forgotten_and_the_log_is_closed() {
    let rig = rig(1);
    drop(rig.begin(&[Dirty::Dir(OLD)]));
    let epoch = rig.intents.open(|| NEXT);
    drop(rig.begin(&[Dirty::Dir(NodeId(6))]));
    assert_eq!(sorted(&rig.intents.dirty_since(Epoch(1)).dirs), [5, 6]);
    let turn = rig.intents.turn(|| NEXT);
    assert_eq!(sorted(&rig.intents.dirty_before(turn).dirs), [5, 6]);
    rig.intents.close(&rig.set, Base::default()).unwrap();
    assert!(rig.intents.dirty_before(turn).is_empty());
    assert_eq!(sorted(&rig.intents.dirty_since(Epoch(1)).dirs), [6], "somebody asked for it");
    rig.intents.forget_before(None);
    assert!(rig.intents.dirty_since(Epoch(1)).is_empty());
    assert!(epoch < turn);
}

#[test]
fn a_first_touch_is_on_record_everywhere_and_a_second_costs_nothing() {
    let rig = rig(2);
    drop(rig.begin(&[Dirty::Dir(OLD), Dirty::File(NodeId(6))]));
    assert_eq!(rig.syncs(), 2, "one for each replica");
    for index in 0..2 {
        let dirty = rig.past(index).dirty;
        assert_eq!((sorted(&dirty.dirs), sorted(&dirty.files)), (vec![5], vec![6]));
    }
    drop(rig.begin(&[Dirty::File(NodeId(6)), Dirty::Dir(OLD)]));
    assert_eq!(rig.syncs(), 0);
}

#[test]
fn a_checkpoint_closes_what_was_before_it_and_nothing_else() {
    let rig = rig(2);
    drop(rig.begin(&[Dirty::Dir(OLD)]));
    rig.intents.turn(|| NodeId(200));
    drop(rig.begin(&[Dirty::Dir(NodeId(6))]));
    assert_eq!(sorted(&rig.past(0).dirty.dirs), [5, 6]);
    assert_eq!(rig.past(0).dirty.born_from, Some(NEXT));
    let base = Base { generation: 3, sequence: 2, undo_from: 1 };
    rig.intents.close(&rig.set, base).unwrap();
    let past = rig.past(1);
    assert_eq!((sorted(&past.dirty.dirs), past.base), (vec![6], base));
    assert_eq!(past.dirty.born_from, Some(NodeId(200)));
    // Again and again: the halves take turns.
    for number in 0..5 {
        rig.intents.turn(|| NodeId(200));
        drop(rig.begin(&[Dirty::Dir(NodeId(10 + number))]));
        rig.intents.close(&rig.set, base).unwrap();
        assert_eq!(sorted(&rig.past(0).dirty.dirs), [10 + number]);
    }
    assert!(!rig.intents.is_clean());
}

#[test]
fn a_checkpoint_that_failed_is_gone_on_with() {
    let rig = rig(1);
    drop(rig.begin(&[Dirty::Dir(OLD)]));
    let first = rig.intents.turn(|| NEXT);
    assert_eq!(rig.intents.turn(|| NEXT), first);
    rig.intents.close(&rig.set, Base::default()).unwrap();
    assert!(rig.intents.turn(|| NEXT) > first);
}

#[test]
fn threads_that_meet_share_their_writes() {
    let rig = rig(1);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let rig = &rig;
            scope.spawn(move || {
                for number in 0..50 {
                    let node = NodeId(1000 + thread * 50 + number);
                    // The older ones are below the first newborn.
                    drop(rig.begin(&[Dirty::Dir(NodeId(node.0 % 90))]));
                }
                // Whoever goes on finds it on record, whoever wrote it.
                assert!(rig.past(0).dirty.dirs.contains(&NodeId((1049 + thread * 50) % 90)));
            });
        }
    });
    assert!(rig.syncs() <= 90);
}

#[test]
fn a_replica_that_cannot_be_written_is_out_and_the_last_one_fails_the_operation() {
    let rig = rig(2);
    rig.failing.store(1, Ordering::SeqCst);
    drop(rig.begin(&[Dirty::Dir(OLD)]));
    assert_eq!(rig.set.online().count(), 1);
    rig.failing.store(0, Ordering::SeqCst);
    assert!(rig.intents.begin(&rig.set, &[Dirty::Dir(NodeId(6))]).is_err());
    rig.failing.store(usize::MAX, Ordering::SeqCst);
    drop(rig.begin(&[Dirty::Dir(NodeId(6))]));
    assert_eq!(sorted(&rig.past(0).dirty.dirs), [5, 6]);
}

#[test]
fn a_full_half_says_that_everything_may_be_dirty() {
    let rig = rig(1);
    rig.intents.turn(|| NodeId(1 << 40));
    rig.intents.close(&rig.set, Base::default()).unwrap();
    let mut id = 10;
    while !rig.past(0).everything {
        let what: Vec<Dirty> = (id..id + 4000).map(|id| Dirty::File(NodeId(id))).collect();
        id += 4000;
        drop(rig.begin(&what));
        assert!(id < 100_000);
    }
    assert!(rig.intents.is_long());
    rig.intents.turn(|| NodeId(1 << 40));
    rig.intents.close(&rig.set, Base::default()).unwrap();
    assert_eq!(rig.past(0).dirty, DirtySet::default());
    assert!(!rig.past(0).everything && rig.intents.is_clean());
}

#[test]
fn a_replica_that_joins_has_what_the_others_have() {
    let mut rig = rig(2);
    drop(rig.begin(&[Dirty::Dir(OLD)]));
    let moved = MovedDir { node: NodeId(9), replica: 1, ino: 2, birth: 3 };
    rig.begin(&[]).moves(NodeId(9), &[moved]).unwrap();
    let id = rig.set.ids().nth(1).unwrap();
    rig.set.eject(id, crate::replica::Fault::new("write", Errno::IO));
    rig.dirs[1] = TempDir::new().unwrap();
    let backing = Box::new(DirBacking::open(rig.dirs[1].path()).unwrap());
    let uuid = uuid::Uuid::new_v4();
    assert!(rig.set.replace(id, Replica::new(uuid, "new", rig.dirs[1].path(), backing)));
    rig.intents.join(&rig.set, id, rig.set.get(id).backing()).unwrap();
    rig.set.admit(id);
    assert_eq!(rig.past(1).dirty, rig.past(0).dirty);
    drop(rig.begin(&[Dirty::Dir(NodeId(6))]));
    assert_eq!((rig.past(1).dirty, rig.past(1).moved), (rig.past(0).dirty, rig.past(0).moved));
}

#[test]
fn what_is_damaged_in_a_log_is_found_and_healed_and_nothing_else_is_taken_for_it() {
    use std::os::unix::fs::FileExt;
    let rig = rig(2);
    let ids: Vec<_> = rig.set.ids().collect();
    let heal = |index: usize| rig.intents.heal(&rig.set, ids[index]).map(|healed| healed.unwrap());
    let file = rig.dirs[0].path().join(".rearview/intent.log");
    let flip = |at: u64| {
        let open = std::fs::File::options().read(true).write(true).open(&file).unwrap();
        let mut byte = [0];
        open.read_exact_at(&mut byte, at).unwrap();
        open.write_all_at(&[byte[0] ^ 8], at).unwrap();
    };
    let damages: [&dyn Fn(); 5] = [
        &|| (0..2).for_each(|slot| flip(slot * 4096 + 20)),
        // The records of the newest interval, wherever they lie.
        &|| (0..2).for_each(|half| flip(format::record_at(half, 0) + 16)),
        &|| std::fs::remove_file(&file).unwrap(),
        &|| std::fs::write(&file, vec![0; 5000]).unwrap(),
        &|| {
            let newest = |at: usize| std::fs::read(&file).unwrap()[at + 8];
            flip(if newest(0) > newest(4096) { 100 } else { 4196 });
        },
    ];
    for (number, damage) in damages.iter().enumerate() {
        drop(rig.begin(&[Dirty::File(NodeId(number as u64 + 2))]));
        assert_eq!((heal(0), heal(1)), (None, None), "{number}");
        damage();
        assert_eq!((heal(0), heal(1)), (Some(()), None), "{number}");
        assert_eq!((heal(0), heal(1)), (None, None), "{number}");
        let (healed, other) = (rig.past(0), rig.past(1));
        assert!(healed.everything || healed.dirty == other.dirty, "{number}");
        rig.intents.turn(|| NEXT);
        rig.intents.close(&rig.set, Base::default()).unwrap();
        assert!(!rig.past(0).everything, "{number}: exact again");
    }
}

//! Sweeping: what was lost or left behind once, each as a small story. The random test is in
//! [`super::forget`].

use super::*;

const SECOND: i64 = 1_000_000_000;

/// A catalog with a clock that only the test moves.
fn open_with(scratch: &Scratch, clock: &Arc<AtomicI64>) -> Catalog {
    let clock = clock.clone();
    let now = Box::new(move || Timestamp::from_nanos(clock.load(Ordering::Relaxed)));
    Catalog::open_with_clock(scratch.map(), true, now).unwrap()
}

fn sweep_all(catalog: &Catalog, deleted_since: Generation) -> Vec<SweepStep> {
    let mut steps = Vec::new();
    while let Some(sweep) = catalog.next_sweep().unwrap() {
        steps.push(catalog.sweep_on(&sweep, deleted_since).unwrap());
        assert!(steps.len() < 100_000, "a sweep ends");
    }
    catalog.flush(Durability::Written).unwrap();
    steps
}

/// Makes only the newest generation visible, and those in `keep`.
fn thin_to(catalog: &Catalog, keep: &[Generation]) -> Generation {
    let now = catalog.freeze();
    catalog.thin(now, &keep.iter().copied().collect()).unwrap();
    now
}

fn count(scratch: &Scratch, what: &str) -> i64 {
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    db.query_row(&format!("SELECT count(*) FROM {what}"), [], |row| row.get(0)).unwrap()
}

fn flush(catalog: &Catalog) {
    catalog.flush(Durability::Written).unwrap();
}

fn content(id: u64, node: u64, size: u64) -> Change {
    Change::ContentAdd { id: ContentId(id), node: NodeId(node), size }
}

fn state(node: u64, content: u64, size: u64) -> Change {
    Change::NodePut(NodeRow { size, content: ContentId(content), ..row(node, Kind::File) })
}

fn image(node: u64, content: u64, offset: u64, length: u64) -> UndoRow {
    let at = Some(UndoPlace { file: UndoFile::Segment(1), offset: content * 1000 + offset });
    UndoRow { node: NodeId(node), content: ContentId(content), offset, length, at }
}

/// The tick by which its life was measured went with the first part of the gap, and with it the
/// last state of a file that was to be kept for 90 days.
#[test]
fn a_deletion_is_kept_however_often_its_gap_is_swept() {
    let scratch = Scratch::new(1);
    let clock = Arc::new(AtomicI64::new(1_700_000_000 * SECOND));
    let catalog = open_with(&scratch, &clock);
    let wait = |seconds: i64| {
        clock.fetch_add(seconds * SECOND, Ordering::Relaxed);
        Timestamp::from_nanos(clock.load(Ordering::Relaxed))
    };
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    for node in 2..40 {
        let btime = wait(1);
        let made = NodeRow { btime, mtime: btime, ..file(node, 0) };
        catalog.push(create(1, &format!("f{node}"), made)).unwrap();
        flush(&catalog);
    }
    wait(3600);
    let mut gone = Vec::new();
    for node in 2..40 {
        wait(1);
        let end = vec![remove(1, &format!("f{node}")), Change::NodeGone(NodeId(node))];
        gone.push((node, catalog.push(end).unwrap()));
        flush(&catalog);
    }
    for _ in 0..3 {
        wait(10);
        catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
        thin_to(&catalog, &[]);
        sweep_all(&catalog, Generation(1));
    }
    for (node, died) in &gone {
        let versions = catalog.versions(NodeId(*node)).unwrap();
        assert_eq!(versions.last().unwrap().died, Some(*died), "of {node}");
        assert_eq!(catalog.name_history(NodeId(*node)).unwrap().len(), 1, "of {node}");
    }
    // Until they are kept no longer.
    catalog.sweep_again(Generation(1), catalog.generation()).unwrap();
    sweep_all(&catalog, catalog.generation());
    assert_eq!(count(&scratch, "node_h WHERE id > 1"), 0);
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    let touched = touched::all(&db).unwrap();
    assert!(touched.iter().all(|(_, node)| *node == NodeId(1)), "{touched:?}");
}

/// It shared its time with the last change of a store that was then left alone, and was kept for as
/// long as nothing else happened.
#[test]
fn a_deletion_is_forgotten_although_nothing_happened_after_it() {
    let scratch = Scratch::new(1);
    let clock = Arc::new(AtomicI64::new(4_000_000_000 * SECOND));
    let catalog = open_with(&scratch, &clock);
    let now = || Timestamp::from_nanos(clock.load(Ordering::Relaxed));
    let made = NodeRow { btime: now(), mtime: now(), ..file(2, 0) };
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    catalog.push(create(1, "f", made)).unwrap();
    flush(&catalog);
    clock.fetch_add(3600 * SECOND, Ordering::Relaxed);
    let before = Timestamp::from_nanos(now().as_nanos() - 1);
    let died = catalog.push(vec![remove(1, "f"), Change::NodeGone(NodeId(2))]).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    flush(&catalog);
    thin_to(&catalog, &[]);
    for (forget, left) in [(before, 1), (now(), 0)] {
        let since = catalog.recorded_after(forget).unwrap().unwrap();
        assert_eq!(since <= died, left == 1);
        catalog.sweep_again(Generation(0), since).unwrap();
        sweep_all(&catalog, since);
        assert_eq!(count(&scratch, "node_h WHERE id = 2"), left);
    }
}

/// A batch that began before the gap counted as touched at its end.
#[test]
fn a_batch_that_reaches_over_a_border_is_told_apart_and_swept_whole() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    flush(&catalog);
    let zero = catalog.freeze();
    // All in one batch, with visible generations in its midst.
    let mut points = Vec::new();
    for node in 2..8 {
        catalog.push(create(1, &format!("f{node}"), file(node, 0))).unwrap();
        points.push(catalog.freeze());
        catalog.push(vec![Change::NodePut(NodeRow { mode: 0o600, ..file(node, 0) })]).unwrap();
        catalog.freeze();
    }
    flush(&catalog);
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    let all = RelPath::root();
    let before: Vec<_> =
        points.iter().map(|point| catalog.diff(zero, *point, &all).unwrap()).collect();
    thin_to(&catalog, &[&[zero], &points[..]].concat());
    let mut left = true;
    while left {
        // In the midst of the sweep too.
        for (point, before) in points.iter().zip(&before) {
            let now = catalog.diff(zero, *point, &all).unwrap();
            assert!(before.iter().all(|one| now.contains(one)), "{before:?} {now:?}");
        }
        left = match catalog.next_sweep().unwrap() {
            Some(sweep) => {
                catalog.sweep_within(&sweep, Generation(0), 1).unwrap();
                true
            }
            None => false,
        };
    }
    thin_to(&catalog, &[]);
    sweep_all(&catalog, Generation(0));
    assert_eq!(count(&scratch, "node_h"), 0, "nothing is left but what is live");
}

/// Others that relied on a content with before-images were led past them.
#[test]
fn what_relies_on_a_content_with_before_images_keeps_them() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    for node in [2, 3, 4] {
        let mut changes = create(1, &format!("f{node}"), file(node, node - 1));
        changes.push(content(node - 1, node, 10));
        catalog.push(changes).unwrap();
    }
    let preserved = |id| Change::ContentPreserved { id: ContentId(id), cloned: false };
    let same = |id, to| {
        let (id, to) = (ContentId(id), ContentId(to));
        Change::Pack(PackChange::ContentSame { id, to })
    };
    catalog.push(vec![preserved(1), remove(1, "f2"), Change::NodeGone(NodeId(2))]).unwrap();
    catalog.push(vec![same(1, 2)]).unwrap();
    // The second is unlinked, and overwritten by somebody who has it open.
    catalog.push(vec![preserved(2), remove(1, "f3"), Change::NodeGone(NodeId(3))]).unwrap();
    catalog.push(vec![Change::UndoAdd(image(3, 2, 4, 2))]).unwrap();
    catalog.push(vec![same(2, 3)]).unwrap();
    let sources = catalog.sources(NodeId(2), ContentId(1)).unwrap();
    assert_eq!(sources.undo, [image(3, 2, 4, 2)]);
    assert_eq!(sources.base, Base::Live(NodeId(4)));
}

/// Whoever has a deleted file open writes while the sweep forgets its content, and one commit has
/// both: the before-image stayed, of no content.
#[test]
fn a_before_image_of_what_the_same_commit_forgets_is_not_kept() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push([create(1, "a", file(2, 1)), vec![content(1, 2, 10)]].concat()).unwrap();
    let preserved = Change::ContentPreserved { id: ContentId(1), cloned: false };
    catalog.push(vec![preserved, remove(1, "a"), Change::NodeGone(NodeId(2))]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    for forgotten_first in [true, false] {
        let mut changes = vec![
            Change::Forget(ForgetChange::Content(ContentId(1))),
            Change::UndoAdd(image(2, 1, 0, 4)),
            Change::UndoAdd(image(2, 1, 6, 4)),
        ];
        if !forgotten_first {
            changes.reverse();
        }
        catalog.push(changes).unwrap();
        catalog.flush(Durability::Written).unwrap();
        assert_eq!(catalog.sources(NodeId(2), ContentId(1)).unwrap().undo, []);
        assert_eq!(catalog.totals().unwrap().undo_bytes, 0);
    }
}

/// The horizon that was read was the one before the thinning.
#[test]
fn a_snapshot_deleted_right_after_thinning_leaves_nothing() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "a", file(2, 0))).unwrap();
    catalog.create_snapshot("s", catalog.generation(), false, &[]).unwrap();
    catalog.push(vec![remove(1, "a"), Change::NodeGone(NodeId(2))]).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    let since = thin_to(&catalog, &[]);
    catalog.delete_snapshot("s").unwrap();
    sweep_all(&catalog, since);
    assert!(catalog.versions(NodeId(2)).unwrap().is_empty());
}

/// Where deletions are kept from a generation on, one of that generation lies in the gap that ends
/// there.
#[test]
fn a_deletion_at_the_end_of_a_gap_expires() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let made = NodeRow { btime: Timestamp { secs: 1, nanos: 0 }, ..file(2, 0) };
    catalog.push(create(1, "a", made)).unwrap();
    let died = catalog.push(vec![remove(1, "a"), Change::NodeGone(NodeId(2))]).unwrap();
    assert_eq!(thin_to(&catalog, &[]), died);
    sweep_all(&catalog, died);
    assert_eq!(catalog.versions(NodeId(2)).unwrap().len(), 1, "it is kept");
    let since = Generation(died.0 + 1);
    catalog.sweep_again(died, since).unwrap();
    sweep_all(&catalog, since);
    assert!(catalog.versions(NodeId(2)).unwrap().is_empty());
}

/// Whoever packed the last of a stream's before-images anew left the stream behind.
#[test]
fn a_stream_goes_with_its_last_before_image_whoever_forgets_it() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push([create(1, "a", file(2, 1)), vec![content(1, 2, 100)]].concat()).unwrap();
    catalog
        .push(vec![Change::UndoAdd(image(2, 1, 0, 4)), Change::UndoAdd(image(2, 1, 8, 4))])
        .unwrap();
    let (stream, node, content) = (ContentId(90), NodeId(2), ContentId(1));
    let moved = |offset: u64| PackChange::UndoMove { node, content, offset, stream, at: offset };
    let recipe = PackChange::RecipeAdd { id: stream, chunks: vec![(ChunkId::HOLE, 12)] };
    catalog.push([recipe, moved(0), moved(8)].map(Change::Pack).into()).unwrap();
    let forget = |offset| Change::Forget(ForgetChange::Undo { node, content, offset });
    catalog.push(vec![forget(0)]).unwrap();
    flush(&catalog);
    assert!(catalog.recipe(stream).unwrap().is_some());
    catalog.push(vec![forget(8)]).unwrap();
    flush(&catalog);
    assert!(catalog.recipe(stream).unwrap().is_none());
}

/// The names that a kept deletion keeps filled every step, and the sweep never came on.
#[test]
fn a_node_that_lost_a_thousand_names_at_once_is_swept() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let made = NodeRow { btime: Timestamp { secs: 1, nanos: 0 }, ..file(2, 0) };
    catalog.push(create(1, "name", made)).unwrap();
    for index in 0..1000 {
        catalog.push(vec![add(1, &format!("n{index}"), 2)]).unwrap();
    }
    let names = (0..1000).map(|index| remove(1, &format!("n{index}")));
    let mut changes: Vec<_> = names.collect();
    changes.extend([remove(1, "name"), Change::NodeGone(NodeId(2))]);
    let died = catalog.push(changes).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    thin_to(&catalog, &[]);
    sweep_all(&catalog, died);
    assert_eq!(catalog.name_history(NodeId(2)).unwrap().len(), 1001);
    let since = Generation(died.0 + 1);
    catalog.sweep_again(died, since).unwrap();
    sweep_all(&catalog, since);
    assert!(catalog.name_history(NodeId(2)).unwrap().is_empty());
}

/// One step took out all there was of a content.
#[test]
fn a_step_is_bounded_whatever_it_takes_apart() {
    const IMAGES: u64 = 5_000;
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    // One that goes, one whose before-images an older one inherits, and one of many chunks.
    catalog.push([create(1, "a", file(2, 1)), vec![content(1, 2, 1 << 30)]].concat()).unwrap();
    let kept = catalog.freeze();
    catalog.push(vec![Change::UndoAdd(image(2, 1, 0, 1))]).unwrap();
    catalog.push(vec![content(2, 2, 1 << 30), state(2, 2, 1 << 30)]).unwrap();
    let images = (0..IMAGES).map(|at| Change::UndoAdd(image(2, 2, at * 4, 4)));
    catalog.push(images.collect()).unwrap();
    catalog.push(vec![content(3, 2, 1 << 30), state(2, 3, 1 << 30)]).unwrap();
    catalog.push([create(1, "b", file(3, 4)), vec![content(4, 3, 1 << 30)]].concat()).unwrap();
    let chunks = (0..IMAGES).map(|_| (ChunkId::HOLE, 1)).collect();
    catalog.push(vec![Change::ContentPreserved { id: ContentId(4), cloned: false }]).unwrap();
    catalog
        .push(vec![
            Change::Pack(PackChange::RecipeAdd { id: ContentId(4), chunks }),
            Change::Pack(PackChange::ContentPacked(ContentId(4))),
        ])
        .unwrap();
    let died = catalog.push(vec![remove(1, "b"), Change::NodeGone(NodeId(3))]).unwrap();
    let before = catalog.sources(NodeId(2), ContentId(1)).unwrap();
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    thin_to(&catalog, &[kept]);
    let steps = sweep_all(&catalog, Generation(died.0 + 1));
    let longest = steps.iter().map(|step| step.changes.len()).max().unwrap();
    assert!(longest <= 2 * super::super::sweep::COST_MAX, "{longest} changes in one step");
    assert!(
        steps.len() > 2 * IMAGES as usize / super::super::sweep::COST_MAX,
        "{} steps",
        steps.len()
    );
    assert_eq!(count(&scratch, "content"), 2);
    assert_eq!(count(&scratch, "recipe"), 0);
    let after = catalog.sources(NodeId(2), ContentId(1)).unwrap();
    assert_eq!(after.undo.len(), before.undo.len());
    assert!(after.undo.iter().all(|row| row.content == ContentId(1)));
}

/// What nothing refers to stayed for ever.
#[test]
fn attributes_actors_and_times_go_with_what_they_told_of() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let set = |value: u8| {
        let mut set = Xattrs::default();
        set.0.insert(b"user.a".to_vec(), vec![value]);
        set
    };
    let ids: Vec<_> = (0..50).map(|value| catalog.intern_xattrs(&set(value)).unwrap()).collect();
    catalog.push(create(1, "a", file(2, 0))).unwrap();
    for (pid, &xattrs) in ids.iter().enumerate() {
        let actor = Actor { uid: 0, pid: pid as u32, command: b"chmod".to_vec() };
        catalog.freeze();
        let change = Change::NodePut(NodeRow { xattrs, ..file(2, 0) });
        catalog.push_by(Some(&actor), vec![change]).unwrap();
    }
    let newest = catalog.generation();
    thin_to(&catalog, &[]);
    catalog.close().unwrap();
    let catalog = scratch.open();
    // One is given out before it is in a row: it stays.
    let wanted = catalog.intern_xattrs(&set(3)).unwrap();
    sweep_all(&catalog, Generation(0));
    let mut from = Some(Unused::default());
    while let Some(at) = from {
        from = catalog.forget_unused(at).unwrap();
    }
    flush(&catalog);
    assert_eq!(count(&scratch, "xattr_set"), 2);
    assert_eq!(*catalog.xattrs(wanted).unwrap(), set(3));
    // One that was removed gets a new id.
    let again = catalog.intern_xattrs(&set(4)).unwrap();
    assert!(!ids.contains(&again));
    assert_eq!(*catalog.xattrs(again).unwrap(), set(4));
    assert_eq!(count(&scratch, "actor"), 1);
    assert_eq!(catalog.actor_of(newest).unwrap().unwrap().pid, 49);
    assert!(count(&scratch, "act") <= 2);
}

/// Snapshots that go together leave one gap, and one commit.
#[test]
fn many_snapshots_are_deleted_at_once() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let names: Vec<String> = (0..20).map(|index| format!("s{index}")).collect();
    for (index, text) in names.iter().enumerate() {
        catalog.push(create(1, text, file(10 + index as u64, 0))).unwrap();
        catalog.create_snapshot(text, catalog.generation(), false, &[]).unwrap();
    }
    // Two names of one generation.
    catalog
        .create_snapshot("twin", catalog.snapshot("s5").unwrap().unwrap().generation, false, &[])
        .unwrap();
    catalog.hold_snapshot("s9", true).unwrap();
    thin_to(&catalog, &[]);
    sweep_all(&catalog, Generation(0));
    let going: Vec<&str> =
        names[1..19].iter().map(String::as_str).chain(["twin", "none"]).collect();
    let before = Catalog::inspect(&scratch.files[0]).unwrap().sequence;
    let outcomes = catalog.delete_snapshots(&going).unwrap();
    assert!(Catalog::inspect(&scratch.files[0]).unwrap().sequence <= before + 2);
    let failed: Vec<_> = outcomes.iter().filter_map(|one| one.as_ref().err()).collect();
    assert!(matches!(failed[..], [Error::InUse(_), Error::NotFound(_)]), "{failed:?}");
    let left: Vec<_> = catalog.snapshots().unwrap().iter().map(|one| one.name.clone()).collect();
    assert_eq!(left, ["s0", "s9", "s19"]);
    assert_eq!(count(&scratch, "sweep"), 2);
}

/// A generation that was chosen before the horizon passed it has no snapshot any more.
#[test]
fn a_snapshot_shows_only_what_is_visible() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let kept = catalog.freeze();
    let chosen = catalog.push(create(1, "a", file(2, 0))).unwrap();
    catalog.push(vec![remove(1, "a"), Change::NodeGone(NodeId(2))]).unwrap();
    thin_to(&catalog, &[kept]);
    let snapshot = catalog.create_snapshot("late", chosen, false, &[]).unwrap();
    assert_eq!(snapshot.generation, kept);
}

#[test]
fn what_a_snapshot_would_free_is_exact_or_not_told_at_all() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let files = 50;
    for node in 2..2 + files {
        let mut made = create(1, &format!("f{node}"), file(node, node));
        made.push(content(node, node, 100));
        catalog.push(made).unwrap();
    }
    let snapshot = catalog.create_snapshot("s", catalog.freeze(), false, &[]).unwrap();
    for node in 2..2 + files {
        let preserved = Change::ContentPreserved { id: ContentId(node), cloned: false };
        let gone = Change::NodeGone(NodeId(node));
        catalog.push(vec![remove(1, &format!("f{node}")), preserved, gone]).unwrap();
    }
    thin_to(&catalog, &[]);
    let never = Generation(i64::MAX as u64);
    let asked = AtomicI64::new(0);
    let freed_within = |steps: i64| {
        asked.store(0, Ordering::Relaxed);
        let go_on = || asked.fetch_add(1, Ordering::Relaxed) < steps;
        catalog.freed_without(&snapshot, never, &go_on).unwrap()
    };
    assert_eq!(freed_within(i64::MAX), Some(100 * files));
    let all = asked.load(Ordering::Relaxed);
    assert!(all >= files as i64, "it is asked before each node: {all}");
    for steps in [0, 1, all / 2, all - 1] {
        assert_eq!(freed_within(steps), None, "{steps} of {all}");
        assert_eq!(asked.load(Ordering::Relaxed), steps + 1, "it ends at once");
    }
    assert_eq!(freed_within(all), Some(100 * files));
}

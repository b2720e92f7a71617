//! What the past shows, bursts, snapshots, time and differences.

use super::*;

#[test]
fn a_file_created_written_and_closed_in_one_burst_is_one_state() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let at = catalog.push(create(1, "f", file(2, 0))).unwrap();
    catalog.push(vec![Change::NodePut(NodeRow { mode: 0o600, ..file(2, 0) })]).unwrap();
    catalog.push(vec![Change::NodePut(file(2, 1))]).unwrap();
    catalog.push(vec![Change::NodePut(NodeRow { mode: 0o600, ..file(2, 1) })]).unwrap();
    let versions = catalog.versions(NodeId(2)).unwrap();
    assert_eq!(versions.len(), 1);
    assert_eq!((versions[0].born, versions[0].died), (at, None));
    assert_eq!(versions[0].row, NodeRow { mode: 0o600, ..file(2, 1) });
    assert_eq!(catalog.totals().unwrap().past_versions, 0);
}

#[test]
fn a_new_content_a_freeze_and_a_commit_each_end_a_burst() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    catalog.push(vec![Change::NodePut(file(2, 2))]).unwrap();
    catalog.freeze();
    catalog.push(vec![Change::NodePut(NodeRow { mode: 0o600, ..file(2, 2) })]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    catalog.push(vec![Change::NodePut(NodeRow { mode: 0o640, ..file(2, 2) })]).unwrap();
    let versions = catalog.versions(NodeId(2)).unwrap();
    let modes: Vec<_> = versions.iter().map(|one| (one.row.content.0, one.row.mode)).collect();
    assert_eq!(modes, [(1, 0o644), (2, 0o644), (2, 0o600), (2, 0o640)]);
    for pair in versions.windows(2) {
        assert_eq!(pair[0].died, Some(pair[1].born));
    }
    assert_eq!(catalog.totals().unwrap().past_versions, 3);
}

#[test]
fn what_lived_within_one_batch_has_its_history() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let born = catalog.push(create(1, "tmp", file(2, 1))).unwrap();
    let died = catalog.push(vec![remove(1, "tmp"), Change::NodeGone(NodeId(2))]).unwrap();
    assert_eq!(catalog.node(NodeId(2)).unwrap(), None);
    assert_eq!(catalog.resolve_at(born, &path("tmp")).unwrap(), Some(file(2, 1)));
    assert_eq!(catalog.resolve_at(died, &path("tmp")).unwrap(), None);
    let deleted = catalog.deleted(ROOT).unwrap();
    assert_eq!(deleted.len(), 1);
    assert_eq!((deleted[0].born, deleted[0].died), (born, Some(died)));
    assert_eq!(deleted, catalog.name_history(NodeId(2)).unwrap());
    assert_eq!(catalog.totals().unwrap().live_nodes, 1);
}

#[test]
fn the_past_is_found_through_renames_deletes_and_recreations() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    let g1 = catalog.push(create(1, "d", dir(2))).unwrap();
    let g2 = catalog.push(create(2, "f", file(3, 1))).unwrap();
    catalog.flush(Durability::Written).unwrap();
    let g3 = catalog.push(vec![remove(1, "d"), add(1, "e", 2)]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    let g4 = catalog.push(vec![remove(2, "f"), Change::NodeGone(NodeId(3))]).unwrap();
    let g5 = catalog.push(create(2, "f", file(4, 2))).unwrap();
    assert_eq!(catalog.resolve_at(g1, &path("d/f")).unwrap(), None);
    assert_eq!(catalog.resolve_at(g2, &path("d/f")).unwrap().unwrap().id, NodeId(3));
    assert_eq!(catalog.resolve_at(g3, &path("d/f")).unwrap(), None);
    assert_eq!(catalog.resolve_at(g3, &path("e/f")).unwrap().unwrap().id, NodeId(3));
    assert_eq!(catalog.resolve_at(g4, &path("e/f")).unwrap(), None);
    assert_eq!(catalog.resolve_at(g5, &path("e/f")).unwrap().unwrap().id, NodeId(4));
    assert_eq!(catalog.path_at(g2, NodeId(3)).unwrap(), Some(path("d/f")));
    assert_eq!(catalog.path_at(g3, NodeId(3)).unwrap(), Some(path("e/f")));
    assert_eq!(catalog.path_at(g4, NodeId(3)).unwrap(), None);
    assert_eq!(listed(catalog.list_at(g2, ROOT).unwrap()), [("d".to_string(), 2)]);
    assert_eq!(catalog.links_at(g3, NodeId(3)).unwrap(), 1);
    assert_eq!(catalog.links_at(g4, NodeId(3)).unwrap(), 0);
    let nodes: Vec<_> = catalog
        .entry_history(NodeId(2), &name("f"))
        .unwrap()
        .iter()
        .map(|one| one.node.0)
        .collect();
    assert_eq!(nodes, [3, 4]);
    assert!(catalog.deleted(NodeId(2)).unwrap().is_empty());
    let beyond = Generation(g5.0 + 1000);
    assert_eq!(catalog.lookup_at(beyond, NodeId(2), &name("f")).unwrap().unwrap().id, NodeId(4));
}

#[test]
fn sources_end_at_the_first_whole_content() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let undo = |content, offset, length| {
        let at = Some(UndoPlace { file: UndoFile::Segment(1), offset: content * 1000 + offset });
        UndoRow { node: NodeId(2), content: ContentId(content), offset, length, at }
    };
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    for content in 1..=4 {
        let add = Change::ContentAdd { id: ContentId(content), node: NodeId(2), size: 100 };
        catalog.push(vec![add, Change::NodePut(file(2, content))]).unwrap();
        catalog.push(vec![Change::UndoAdd(undo(content, 0, 10))]).unwrap();
    }
    assert_eq!(catalog.content_size(ContentId(3)).unwrap(), Some(100));
    catalog.push(vec![Change::ContentPreserved { id: ContentId(3), cloned: false }]).unwrap();
    let sources = catalog.sources(NodeId(2), ContentId(2)).unwrap();
    assert!(matches!(sources.base, Base::Preserved { content: ContentId(3), .. }));
    assert_eq!(sources.undo, [undo(2, 0, 10), undo(3, 0, 10)]);
    // A before-image at the same byte does not displace the older one.
    catalog.push(vec![Change::UndoAdd(undo(4, 0, 25))]).unwrap();
    let sources = catalog.sources(NodeId(2), ContentId(4)).unwrap();
    assert_eq!(sources.undo, [undo(4, 0, 10), undo(4, 10, 15)]);
    assert_eq!(catalog.totals().unwrap().undo_bytes, 55);
    assert_eq!(catalog.totals().unwrap().preserved_bytes, 100);
    assert_eq!(catalog.content_size(ContentId(3)).unwrap(), Some(100));
    assert_eq!(catalog.content_size(ContentId(77)).unwrap(), None);
}

#[test]
fn snapshots_are_named_renamed_held_and_forgotten() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let at = catalog.freeze();
    let monday = catalog.create_snapshot("monday", at, false, &[]).unwrap();
    assert_eq!(catalog.snapshot("monday").unwrap(), Some(monday.clone()));
    assert!(matches!(catalog.create_snapshot("monday", at, false, &[]), Err(Error::Refused(_))));
    catalog.hold_snapshot("monday", true).unwrap();
    assert!(matches!(catalog.delete_snapshot("monday"), Err(Error::InUse(_))));
    catalog.rename_snapshot("monday", "first day").unwrap();
    catalog.push(create(1, "f", file(2, 1))).unwrap();
    let second = catalog.create_snapshot("second", catalog.freeze(), true, &[]).unwrap();
    assert!(second.time >= monday.time);
    assert_eq!(catalog.latest_snapshot().unwrap(), Some(second));
    let error = catalog.delete_snapshot("frist day").unwrap_err();
    assert_eq!(error.to_string(), "no snapshot 'frist day'; nearest names: first day, second");
    catalog.hold_snapshot("first day", false).unwrap();
    catalog.delete_snapshot("first day").unwrap();
    assert_eq!(catalog.snapshots().unwrap().len(), 1);
    assert_eq!(catalog.totals().unwrap().snapshots, 1);
    let long = "x".repeat(201);
    for bad in ["", ".", "..", ".x", "@GMT", "a/b", "latest", "a\nb", "a\0", &long] {
        assert!(
            matches!(catalog.create_snapshot(bad, at, false, &[]), Err(Error::Refused(_))),
            "{bad}"
        );
    }
}

#[test]
fn times_and_generations_agree_through_a_clock_that_is_set_back() {
    let scratch = Scratch::new(1);
    let clock = Arc::new(AtomicI64::new(0));
    let now = {
        let clock = clock.clone();
        Box::new(move || Timestamp::from_nanos(clock.load(Ordering::Relaxed)))
    };
    let start = Timestamp::now().as_nanos();
    let second = 1_000_000_000;
    let catalog = Catalog::open_with_clock(scratch.map(), true, now).unwrap();
    let mut last = Timestamp::default();
    let mut steps = Vec::new();
    for offset in [10, 20, 30, -3600, -3590, -3580, 40, 50] {
        clock.store(start + offset * second, Ordering::Relaxed);
        let at = catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
        let same = catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
        let time = catalog.time_of(at).unwrap();
        assert!(time > last, "times ascend");
        assert_eq!(catalog.time_of(same).unwrap(), time);
        assert_eq!(catalog.generation_at(time).unwrap(), Some(same));
        (last, steps) = (time, {
            steps.push((time, same));
            steps
        });
    }
    for (time, newest) in steps {
        assert_eq!(catalog.generation_at(time).unwrap(), Some(newest));
    }
    assert_eq!(catalog.time_of(Generation(1)).unwrap().as_nanos(), start + 10 * second);
    assert_eq!(catalog.generation_at(Timestamp::from_nanos(start - second)).unwrap(), None);
}

fn shown(differences: Vec<Difference>) -> Vec<String> {
    let line = |one: Difference| {
        let letter = match one.kind {
            DiffKind::Added => '+',
            DiffKind::Removed => '-',
            DiffKind::Modified => 'M',
            DiffKind::Renamed => 'R',
        };
        let to = one.to.map(|to| format!(" -> {to}")).unwrap_or_default();
        format!("{letter} {}{to}", one.path)
    };
    differences.into_iter().map(line).collect()
}

#[test]
fn diff_tells_added_removed_modified_and_renamed() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "d", dir(2))).unwrap();
    catalog.push(create(2, "kept", file(3, 1))).unwrap();
    catalog.push(create(2, "changed", file(4, 2))).unwrap();
    catalog.push(create(1, "gone", file(5, 3))).unwrap();
    catalog.push(create(1, "linked", file(6, 4))).unwrap();
    let a = catalog.freeze();
    assert!(catalog.diff(a, a, &RelPath::root()).unwrap().is_empty());
    catalog.push(vec![remove(1, "d"), add(1, "e", 2)]).unwrap();
    catalog.push(vec![Change::NodePut(file(4, 7))]).unwrap();
    catalog.push(vec![remove(1, "gone"), Change::NodeGone(NodeId(5))]).unwrap();
    catalog.push(vec![add(2, "link", 6)]).unwrap();
    catalog.push(create(2, "new", file(8, 8))).unwrap();
    catalog.push(create(1, "fleeting", file(9, 9))).unwrap();
    catalog.push(vec![remove(1, "fleeting"), Change::NodeGone(NodeId(9))]).unwrap();
    let b = catalog.freeze();
    let all = RelPath::root();
    assert_eq!(
        shown(catalog.diff(a, b, &all).unwrap()),
        ["M /", "R /d -> /e", "M /e", "M /e/changed", "+ /e/link", "+ /e/new", "- /gone"]
    );
    assert_eq!(
        shown(catalog.diff(b, a, &all).unwrap()),
        ["M /", "M /d", "M /d/changed", "R /e -> /d", "- /e/link", "- /e/new", "+ /gone"]
    );
    assert_eq!(shown(catalog.diff(a, b, &path("gone")).unwrap()), ["- /gone"]);
    // Changes that were taken back are none.
    catalog.push(vec![remove(1, "e"), add(1, "d", 2)]).unwrap();
    let c = catalog.push(vec![remove(1, "d"), add(1, "e", 2)]).unwrap();
    assert_eq!(shown(catalog.diff(b, c, &all).unwrap()), Vec::<String>::new());
}

#[test]
fn what_is_unversioned_is_live_and_leaves_nothing_behind() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let unversioned = |id: u64, content: u64| Change::NodeUnversioned(file(id, content));
    let entry = |text: &str, node: u64| Change::EntryUnversioned {
        parent: ROOT,
        name: name(text),
        node: NodeId(node),
    };
    let link = Change::NodeUnversioned(row(9, Kind::Symlink));
    let target = Change::SymlinkTarget { node: NodeId(9), target: b"there".to_vec() };
    catalog.push(vec![link, target, entry("link", 9)]).unwrap();
    for flush in [false, true] {
        catalog.flush(Durability::Written).unwrap();
        let before = catalog.freeze();
        catalog.push(vec![unversioned(2, 0), entry("x.o", 2)]).unwrap();
        for size in 1..9 {
            catalog.push(vec![Change::NodeUnversioned(NodeRow { size, ..file(2, 0) })]).unwrap();
            if flush {
                catalog.flush(Durability::Written).unwrap();
            }
        }
        let now = catalog.freeze();
        assert_eq!(catalog.node(NodeId(2)).unwrap().unwrap().size, 8);
        assert_eq!(listed(catalog.list(ROOT).unwrap()).last().unwrap().0, "x.o");
        assert!(!catalog.is_versioned(NodeId(2)).unwrap());
        assert_eq!(catalog.entry_is_versioned(ROOT, &name("x.o")).unwrap(), Some(false));
        assert!(catalog.unversioned(ROOT).unwrap().contains(&name("x.o")));
        assert!(catalog.list_at(now, ROOT).unwrap().is_empty());
        assert!(catalog.versions(NodeId(2)).unwrap().is_empty());
        assert!(catalog.name_history(NodeId(2)).unwrap().is_empty());
        assert!(catalog.diff(before, now, &RelPath::root()).unwrap().is_empty());
        assert!(!catalog.changed_since(before).unwrap());
        catalog.push(vec![remove(1, "x.o"), Change::NodeGone(NodeId(2))]).unwrap();
        assert!(catalog.deleted(ROOT).unwrap().is_empty());
        assert!(catalog.entry_history(ROOT, &name("x.o")).unwrap().is_empty());
        assert_eq!(catalog.totals().unwrap().past_versions, 0);
    }
    assert!(catalog.symlink_target(NodeId(9)).unwrap().is_some());
    catalog.push(vec![remove(1, "link"), Change::NodeGone(NodeId(9))]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    assert!(catalog.symlink_target(NodeId(9)).unwrap().is_none());
    assert_eq!(catalog.totals().unwrap().live_nodes, 1);
}

#[test]
fn history_ends_where_something_is_excluded_and_begins_where_it_is_not() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let entry =
        |text: &str| Change::EntryUnversioned { parent: ROOT, name: name(text), node: NodeId(2) };
    catalog.push(create(1, "a", file(2, 1))).unwrap();
    let first = catalog.freeze();
    let hidden = Change::NodeUnversioned(file(2, 1));
    let ended = catalog.push(vec![remove(1, "a"), entry("a"), hidden]).unwrap();
    let second = catalog.freeze();
    catalog.flush(Durability::Written).unwrap();
    catalog.push(vec![Change::NodeUnversioned(file(2, 0))]).unwrap();
    let third = catalog.push(vec![remove(1, "a"), add(1, "a", 2), Change::NodePut(file(2, 5))]);
    let third = third.unwrap();
    let shows = |at| catalog.resolve_at(at, &path("a")).unwrap().map(|row| row.content.0);
    assert_eq!([first, second, third].map(shows), [Some(1), None, Some(5)]);
    let lives = |version: &Version| (version.born, version.died);
    let versions = catalog.versions(NodeId(2)).unwrap();
    let spans: Vec<_> = versions.iter().map(lives).collect();
    assert_eq!(spans, [(first, Some(ended)), (third, None)]);
    assert_eq!(catalog.name_history(NodeId(2)).unwrap().len(), 2);
    assert_eq!(catalog.totals().unwrap().past_versions, 1);
    let kinds = |from, to| -> Vec<DiffKind> {
        let all = catalog.diff(from, to, &RelPath::root()).unwrap();
        all.iter().filter(|one| one.path == path("a")).map(|one| one.kind).collect()
    };
    assert_eq!(kinds(first, second), [DiffKind::Removed]);
    assert_eq!(kinds(second, third), [DiffKind::Added]);
}

#[test]
fn a_name_is_a_nodes_own_where_no_other_had_it_and_its_directories_stayed() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    for (node, name) in [(2, "d"), (3, "e"), (4, "stays")] {
        catalog.push(create(1, name, dir(node))).unwrap();
    }
    for (node, parent) in [(5, 2), (6, 3), (7, 4), (8, 4)] {
        catalog.push(create(parent, &format!("f{}", node % 2), file(node, 0))).unwrap();
    }
    let since = catalog.freeze();
    let own = |node| {
        let mut names = catalog.names_since(NodeId(node), since).unwrap();
        names.retain(|one| one.is_own);
        names
    };
    assert_eq!([5, 6, 7, 8].map(|node| own(node).len()), [1; 4]);
    // A directory that has a name now that another had.
    let moved = |node, from: &str, to: &str| {
        let (parent, node) = (NodeId(1), NodeId(node));
        let name = |text| EntryName::new(text).unwrap();
        let old = Change::EntryRemove { parent, name: name(from) };
        catalog.push(vec![old, Change::EntryAdd { parent, name: name(to), node }]).unwrap();
    };
    moved(2, "d", "x");
    moved(3, "e", "d");
    // A name that another file has now.
    catalog.push(vec![remove(4, "f1"), Change::NodeGone(NodeId(7))]).unwrap();
    catalog.push(create(4, "f1", file(9, 0))).unwrap();
    assert_eq!([5, 6, 7, 8].map(|node| own(node).len()), [0, 0, 0, 1]);
    let one = own(8).remove(0);
    assert_eq!(one.dir.join(&one.name).to_string(), "/stays/f0");
}

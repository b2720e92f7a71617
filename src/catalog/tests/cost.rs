//! What keeps history small: names that nobody saw, bytes that are live again, scratch files, room.

use super::*;

/// A file of 100 bytes with this content.
fn same_sized(id: u64, content: u64) -> NodeRow {
    NodeRow { size: 100, ..file(id, content) }
}

fn content_add(content: u64, node: u64) -> Change {
    Change::ContentAdd { id: ContentId(content), node: NodeId(node), size: 100 }
}

fn names_ever(catalog: &Catalog) -> Vec<String> {
    let intervals = catalog.entries_ever(ROOT).unwrap().into_iter();
    intervals.map(|interval| interval.name.to_string()).collect()
}

#[test]
fn the_first_name_of_a_file_that_is_renamed_in_its_first_burst_leaves_nothing() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "saved.new~", file(5, 1))).unwrap();
    catalog.push(vec![remove(1, "saved.new~"), add(1, "saved", 5)]).unwrap();
    assert_eq!(names_ever(&catalog), ["saved"]);
}

#[test]
fn a_first_name_that_somebody_saw_stays() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "seen", file(5, 1))).unwrap();
    let seen = catalog.freeze();
    catalog.push(vec![remove(1, "seen"), add(1, "renamed", 5)]).unwrap();
    assert_eq!(names_ever(&catalog), ["seen", "renamed"]);
    assert_eq!(listed(catalog.list_at(seen, ROOT).unwrap()), [("seen".to_string(), 5)]);
}

#[test]
fn a_file_that_was_there_before_keeps_all_its_names() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    catalog.push(create(1, "a", file(5, 1))).unwrap();
    catalog.flush(Durability::Written).unwrap();
    catalog.push(vec![remove(1, "a"), add(1, "b", 5)]).unwrap();
    catalog.push(vec![remove(1, "b"), add(1, "c", 5)]).unwrap();
    assert_eq!(names_ever(&catalog), ["a", "b", "c"]);
}

#[test]
fn the_live_file_is_found_through_saves_and_renames() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let with_content = |parent, name: &str, id| {
        let mut changes = create(parent, name, same_sized(id, id));
        changes.push(content_add(id, id));
        changes
    };
    catalog.push(with_content(1, "1.jpg", 5)).unwrap();
    for (node, old, new) in [(5, "1.jpg", "2.jpg"), (6, "2.jpg", "3.jpg")] {
        catalog.push(vec![remove(1, old), add(1, new, node)]).unwrap();
        // Saved by an editor: another file takes the name.
        let mut changes = vec![remove(1, new), Change::NodeGone(NodeId(node))];
        let preserved = ContentId(node);
        changes.push(Change::ContentPreserved { id: preserved, cloned: false });
        changes.extend(with_content(1, new, node + 1));
        catalog.push(changes).unwrap();
        catalog.flush(Durability::Written).unwrap();
    }
    catalog.push(vec![remove(1, "3.jpg"), add(1, "4.jpg", 7)]).unwrap();
    let waiting = catalog.waiting_contents(ContentId::EMPTY, 10).unwrap();
    assert_eq!(waiting.iter().map(|content| content.node.0).collect::<Vec<_>>(), [5, 6]);
    for content in waiting {
        let found = catalog.successor(&content).unwrap();
        assert_eq!(found, Some((NodeId(7), ContentId(7))));
    }
}

#[test]
fn a_scratch_file_is_one_programs_own_and_in_no_snapshot() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let actor = |pid| Actor { uid: 1000, pid, command: b"sqlite3".to_vec() };
    let mut next = 10;
    let mut life = |makers: [u32; 2], between: &dyn Fn(u64)| {
        next += 1;
        let name = format!("file{next}");
        catalog.push_by(Some(&actor(makers[0])), create(1, &name, file(next, next))).unwrap();
        between(next);
        let gone = vec![remove(1, &name), Change::NodeGone(NodeId(next))];
        // One that was renamed has another name by then.
        if catalog.lookup(ROOT, &self::name(&name)).unwrap().is_some() {
            catalog.push_by(Some(&actor(makers[1])), gone).unwrap();
        }
        catalog.flush(Durability::Written).unwrap();
        catalog.is_scratch(NodeId(next)).unwrap()
    };
    let flush = || catalog.flush(Durability::Written).unwrap();
    assert!(life([1, 1], &|_| flush()));
    assert!(!life([1, 2], &|_| flush()), "another program deleted it");
    assert!(
        !life([1, 1], &|_| {
            catalog.freeze();
        }),
        "somebody looked at it"
    );
    assert!(!life([1, 1], &|_| {
        catalog.create_snapshot("shown", catalog.generation(), false, &[]).map(drop).unwrap();
    }));
    assert!(!life([1, 1], &|node| {
        flush();
        let rename = vec![remove(1, &format!("file{node}")), add(1, "kept", node)];
        catalog.push_by(Some(&actor(1)), rename).unwrap();
    }));
    assert!(!catalog.is_scratch(ROOT).unwrap());
}

#[test]
fn a_catalog_that_grew_in_the_middle_is_written_anew_when_closed() {
    let scratch = Scratch::new(2);
    let catalog = scratch.open_rooted();
    let size = |index: usize| std::fs::metadata(&scratch.files[index]).unwrap().len();
    for id in 2..4000 {
        catalog.push(create(1, &format!("file{}", id * 7919 % 4001), file(id, id))).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
    let later = Timestamp { secs: 1_800_000_000, nanos: 1 };
    for id in 2..4000 {
        let row = NodeRow { mtime: later, ctime: Timestamp::now(), ..file(id, id + 5000) };
        catalog.push(vec![Change::NodePut(row)]).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
    rest(&catalog);
    let before = size(0);
    catalog.close().unwrap();
    assert!(size(0) < before, "{} is not below {before}", size(0));
    let catalog = scratch.open();
    assert_eq!(catalog.list_at(catalog.generation(), ROOT).unwrap().len(), 3998);
}

#[test]
fn a_digest_that_follows_from_where_the_bytes_lie_is_not_stored() {
    let scratch = Scratch::new(1);
    let catalog = scratch.open_rooted();
    let hash = |id: u64| *blake3::hash(&id.to_le_bytes()).as_bytes();
    let digest = |id: u64| digest::first_half(&hash(id));
    // Content 7 is packed as the chunk that it says it is, 8 as another, 9 has the bytes of 7.
    for (id, said) in [(7, 7), (8, 3), (9, 7)] {
        catalog.push(create(1, &format!("{id}"), same_sized(id, id))).unwrap();
        let said = Change::DigestAdd { content: ContentId(id), digest: digest(said) };
        catalog.push(vec![content_add(id, id), said]).unwrap();
        let gone = vec![remove(1, &format!("{id}")), Change::NodeGone(NodeId(id))];
        catalog.push(gone).unwrap();
        catalog.push(vec![Change::ContentPreserved { id: ContentId(id), cloned: false }]).unwrap();
    }
    let pack = catalog.next_pack();
    let mut changes = vec![PackChange::PackAdd { id: pack, bytes: 100, hash: [0; 32] }];
    for id in [7, 8] {
        let chunk = catalog.next_chunk();
        let place = ChunkPlace { pack, frame: id, at: 0 };
        let row = ChunkRow { id: chunk, hash: hash(id), place, length: 100, stored: 50 };
        changes.push(PackChange::ChunkAdd(row));
        let chunks = vec![(chunk, 100)];
        changes.push(PackChange::RecipeAdd { id: ContentId(id), chunks });
        changes.push(PackChange::ContentPacked(ContentId(id)));
    }
    changes.push(PackChange::ContentSame { id: ContentId(9), to: ContentId(7) });
    catalog.push(changes.into_iter().map(Change::Pack).collect()).unwrap();
    catalog.flush(Durability::Written).unwrap();
    for (id, said) in [(7, 7), (8, 3), (9, 7)] {
        assert_eq!(catalog.digest(ContentId(id)).unwrap(), Some(digest(said)), "{id}");
    }
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    let stored = "SELECT group_concat(content) FROM digest";
    assert_eq!(db.query_row(stored, [], |row| row.get::<_, String>(0)).unwrap(), "8");
    // One that has the bytes of a live file, which is digested later.
    catalog.push(create(1, "live", same_sized(10, 10))).unwrap();
    catalog.push(vec![content_add(10, 10)]).unwrap();
    catalog.push(create(1, "11", same_sized(11, 11))).unwrap();
    let said = |id, said| Change::DigestAdd { content: ContentId(id), digest: digest(said) };
    catalog.push(vec![content_add(11, 11), said(11, 4)]).unwrap();
    let (id, to) = (ContentId(11), ContentId(10));
    catalog.push(vec![Change::ContentPreserved { id, cloned: false }]).unwrap();
    catalog.push(vec![Change::Pack(PackChange::ContentSame { id, to })]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    assert_eq!(db.query_row(stored, [], |row| row.get::<_, String>(0)).unwrap(), "8,11");
    catalog.push(vec![said(10, 4)]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    assert_eq!(db.query_row(stored, [], |row| row.get::<_, String>(0)).unwrap(), "8,10");
    assert_eq!(catalog.digest(id).unwrap(), Some(digest(4)));
    assert_eq!(catalog.packed_like(&digest(7), 100).unwrap(), Some(ContentId(7)));
    assert_eq!(catalog.packed_like(&digest(3), 100).unwrap(), Some(ContentId(8)));
    assert_eq!(catalog.packed_like(&digest(8), 100).unwrap(), Some(ContentId(8)));
}

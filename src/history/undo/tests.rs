//! Records, segments, and what recovery makes of them.

use proptest::prelude::*;

use super::segment::*;
use super::*;
use crate::catalog::NodeRow;
use crate::replica::Replica;
use crate::replica::dir_backing::DirBacking;
use crate::types::{Kind, ReplicaMap, Timestamp, XattrSetId};

fn encode(magic: [u8; 4], of: (NodeId, ContentId), offset: u64, data: &[u8]) -> Vec<u8> {
    [header(magic, of, offset, data).as_slice(), data].concat()
}

#[test]
fn a_record_tells_what_its_row_would() {
    let of = (NodeId(7), ContentId(9));
    let record = encode(MAGIC, of, 4096, b"old bytes");
    let Record { row, is_hole, bytes } = decode(&record).expect("a valid record");
    assert_eq!((row.node, row.content, row.offset, row.length), (of.0, of.1, 4096, 9));
    assert_eq!((is_hole, bytes), (false, record.len()));
    let record = encode(MAGIC_HOLE, of, 4096, &(1u64 << 60).to_le_bytes());
    let Record { row, is_hole, bytes } = decode(&record).expect("a valid record");
    assert_eq!((row.node, row.content, row.offset, row.length), (of.0, of.1, 4096, 1 << 60));
    assert_eq!((is_hole, bytes), (true, record.len()));
}

#[test]
fn only_names_that_we_write_are_segments() {
    let parse = |name: &str| parse_segment_name(&EntryName::new(name).expect("a name"));
    assert_eq!(parse("00000000000000ff.seg"), Some(255));
    let beyond = format!("{SEGMENT_MAX:016x}.seg");
    for other in
        ["ffffffffffffffff.seg", "+0000000000000ff.seg", "00000000000000FF.seg", "ff.seg", &beyond]
    {
        assert_eq!(parse(other), None, "{other}");
    }
}

fn replicas(count: usize) -> (Vec<tempfile::TempDir>, ReplicaSet) {
    let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().expect("a folder")).collect();
    let replicas = dirs.iter().map(|dir| {
        std::fs::create_dir_all(dir.path().join(".rearview/undo")).expect("a folder");
        let backing = Box::new(DirBacking::open(dir.path()).expect("it opens"));
        Replica::new(uuid::Uuid::new_v4(), "r", dir.path(), backing)
    });
    let set = ReplicaSet::new(replicas.collect());
    (dirs, set)
}

/// Whatever their sizes: each begins in the block in which the one before ends.
#[test]
fn what_is_appended_is_found_again_on_every_replica_at_every_moment() {
    let (dirs, replicas) = replicas(2);
    let log = UndoLog::open(&replicas).expect("it opens");
    let of = (NodeId(7), ContentId(9));
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    for (round, length) in [1, 4096, 4032, 4033, 63, 65, 70_000, 1 << 20, 5, 4 << 20, 9, 3 << 20]
        .into_iter()
        .enumerate()
    {
        let image = || Image::Bytes((round as u64) << 30, vec![round as u8 + 1; length]);
        // More than once around the end of a segment.
        for _ in 0..2 {
            let images = [image(), Image::Hole(ByteRange::new(1 << 50, 10)), image()];
            rows.extend(log.append(&replicas, of, &images).expect("appended"));
            all.extend([image(), Image::Hole(ByteRange::new(1 << 50, 10)), image()]);
        }
        log.sync(&replicas).expect("synced");
        for (row, image) in rows.iter().zip(&all) {
            let (Some(place), Image::Bytes(_, data)) = (row.at, image) else { continue };
            let UndoFile::Segment(segment) = place.file else { panic!("it is not packed") };
            for dir in &dirs {
                let path = dir.path().join(format!(".rearview/undo/{segment:016x}.seg"));
                let bytes = std::fs::read(path).expect("a segment");
                let (end, record) = &records(&bytes)[&place.offset];
                assert_eq!(&bytes[place.offset as usize..*end as usize], &data[..]);
                assert_eq!((record.row.offset, record.is_hole), (row.offset, false));
            }
        }
    }
    assert!(segments(&replicas).expect("a look").len() > 1);
}

/// So a sync has no metadata to write.
#[test]
fn small_appends_go_over_what_was_written_ahead() {
    let (dirs, replicas) = replicas(1);
    let log = UndoLog::open(&replicas).expect("it opens");
    let file = dirs[0].path().join(".rearview/undo/0000000000000001.seg");
    let mut sizes = std::collections::BTreeSet::new();
    for round in 0..100u64 {
        let image = Image::Bytes(round << 12, vec![1; 4096]);
        log.append(&replicas, (NodeId(7), ContentId(9)), &[image]).expect("appended");
        sizes.insert(file.metadata().expect("it is there").len());
    }
    assert!(sizes.len() < 10, "{sizes:?}");
    let bytes = std::fs::read(file).expect("it is there");
    assert_eq!(records(&bytes).len(), 100);
}

const NODE: NodeId = NodeId(7);
const SEALED: ContentId = ContentId(8);
const UNKNOWN: ContentId = ContentId(9);

/// A catalog that knows the content `SEALED` of a file, of 100 bytes.
fn catalog_in(dir: &std::path::Path) -> Catalog {
    let file = dir.join(".rearview/catalog.db");
    Catalog::create(&file, uuid::Uuid::nil()).expect("a catalog");
    let catalog = Catalog::open(ReplicaMap::new(vec![Some(file)]), true).expect("it opens");
    let zero = Timestamp::default();
    let row = NodeRow {
        id: NODE,
        kind: Kind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: 100,
        blocks: 0,
        mtime: zero,
        ctime: zero,
        btime: zero,
        xattrs: XattrSetId::NONE,
        content: SEALED,
    };
    let add = Change::ContentAdd { id: SEALED, node: NODE, size: 100 };
    catalog.push(vec![add, Change::NodePut(row)]).expect("pushed");
    catalog
}

/// Recovery was killed after it had committed the rows and before what their content is: the next
/// one found the rows, looked no further, and the check found before-images of no content.
#[test]
fn before_images_of_an_unknown_content_are_recorded_with_it_in_one_push() {
    let (dirs, replicas) = replicas(1);
    let catalog = catalog_in(dirs[0].path());
    let before = catalog.generation();
    let log = UndoLog::open(&replicas).expect("it opens");
    let append = |offset| {
        let image = Image::Bytes(offset, b"old bytes!".to_vec());
        log.append(&replicas, (NODE, UNKNOWN), &[image]).expect("appended");
    };
    for offset in [0, 10, 50] {
        append(offset);
    }
    // Twice: as after a write that was tried again.
    append(10);
    recover(&replicas, &catalog, 0).expect("recovered");
    assert_eq!(catalog.generation().0, before.0 + 1, "one group, which is there or not");
    assert_eq!(catalog.content_size(UNKNOWN).expect("a look"), Some(60));
    assert_eq!(catalog.sources(NODE, UNKNOWN).expect("a look").undo.len(), 3);
    recover(&replicas, &catalog, 0).expect("recovered");
    assert_eq!(catalog.generation().0, before.0 + 1, "nothing is left to do");
}

/// A file was deleted, and written to by who had it open, before its last content was committed.
/// Of that content only what the before-image had was packed, and older ones lost the rest.
#[test]
fn an_unknown_content_is_as_long_as_the_file_in_which_it_is_preserved() {
    let (dirs, replicas) = replicas(1);
    let catalog = catalog_in(dirs[0].path());
    let log = UndoLog::open(&replicas).expect("it opens");
    let image = Image::Bytes(0, b"old bytes!".to_vec());
    log.append(&replicas, (NODE, UNKNOWN), &[image]).expect("appended");
    let shard = dirs[0].path().join(format!(".rearview/preserved/{:02x}", NODE.0));
    std::fs::create_dir_all(&shard).expect("a folder");
    let name = format!("{:016x}.{:016x}", NODE.0, UNKNOWN.0);
    std::fs::write(shard.join(name), [b'n'; 100]).expect("a file");
    crate::history::History::recover(&replicas, &catalog, 0).expect("recovered");
    assert_eq!(catalog.content_size(UNKNOWN).expect("a look"), Some(100));
    let sources = catalog.sources(NODE, SEALED).expect("a look");
    assert_eq!(sources.base, crate::catalog::Base::Preserved { node: NODE, content: UNKNOWN });
}

/// The file was born, written and emptied after the last commit: its preserved content stayed for
/// good, as that of a node of which nobody knows anything.
#[test]
fn only_files_of_nodes_that_the_catalog_has_nothing_of_are_strays() {
    use crate::history::recover::remove_strays;
    let (dirs, replicas) = replicas(2);
    let catalog = catalog_in(dirs[0].path());
    let dead = NodeId(6);
    let past = NodeRow { id: dead, ..catalog.node(NODE).expect("a look").expect("it lives") };
    catalog.push(vec![Change::NodePut(past)]).expect("pushed");
    catalog.freeze();
    catalog.push(vec![Change::NodeGone(dead)]).expect("pushed");
    let unknown = NodeId(NODE.0 + 1);
    let place = |dir: &tempfile::TempDir, of: (NodeId, ContentId)| {
        let shard = dir.path().join(format!(".rearview/preserved/{:02x}", of.0.0));
        std::fs::create_dir_all(&shard).expect("a folder");
        shard.join(format!("{:016x}.{:016x}", of.0.0, of.1.0))
    };
    let needed = [(NODE, SEALED), (NODE, UNKNOWN), (dead, UNKNOWN)];
    let strays = [(unknown, UNKNOWN), (unknown, ContentId(UNKNOWN.0 + 1))];
    for dir in &dirs {
        for of in needed.into_iter().chain(strays) {
            std::fs::write(place(dir, of), b"bytes").expect("a file");
        }
    }
    // One that took no name away any more: the file itself is live.
    let live = dirs[0].path().join("live");
    std::fs::hard_link(place(&dirs[0], strays[0]), &live).expect("a link");
    remove_strays(&replicas, &catalog).expect("removed");
    for dir in &dirs {
        assert!(needed.iter().all(|&of| place(dir, of).exists()));
        assert!(!strays.iter().any(|&of| place(dir, of).exists()));
    }
    assert_eq!(std::fs::read(live).expect("it is there"), b"bytes");
}

proptest! {
    #[test]
    fn a_changed_record_is_never_taken(at in 0usize..73, flip in 1u8..=255) {
        let mut record = encode(MAGIC, (NodeId(7), ContentId(9)), 4096, b"old bytes");
        record[at] ^= flip;
        prop_assert!(decode(&record).is_none());
    }

    /// Whoever can write a record can also write its hash.
    #[test]
    fn a_segment_of_any_numbers_never_panics(
        of in any::<[u64; 3]>(), data in proptest::collection::vec(any::<u8>(), 1..200),
        cut in any::<prop::sample::Index>(),
    ) {
        let (node, content, offset) = (NodeId(of[0]), ContentId(of[1]), of[2]);
        let mut bytes = encode(MAGIC, (node, content), offset >> 2, &data);
        let hole = encode(MAGIC_HOLE, (node, content), offset, &data);
        prop_assert!(decode(&hole).is_none_or(|hole| hole.row.length > 0));
        bytes.resize(bytes.len().next_multiple_of(RECORD_ALIGN as usize), 0);
        bytes.extend_from_within(..);
        prop_assert_eq!(records(&bytes).len(), 2);
        prop_assert!(records(&bytes[..cut.index(bytes.len())]).len() <= 2);
    }

    #[test]
    fn garbage_is_no_record(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode(&bytes).is_none());
    }
}

/// The catalogs of both get the rows of what one has at once: killed then, the next mount went on
/// with the one that lacked the record.
#[test]
fn a_record_that_one_replica_has_alone_is_given_to_the_others() {
    let (dirs, replicas) = replicas(3);
    let log = UndoLog::open(&replicas).expect("it opens");
    let of = (NodeId(7), ContentId(9));
    let mut rows = Vec::new();
    for number in 0..4 {
        let image = Image::Bytes(number * 5000, vec![number as u8 + 1; 5000]);
        rows.extend(log.append(&replicas, of, &[image]).expect("it appends"));
    }
    log.sync(&replicas).expect("it syncs");
    let paths: Vec<_> = dirs
        .iter()
        .map(|dir| dir.path().join(".rearview/undo").join("0000000000000001.seg"))
        .collect();
    let whole = std::fs::read(&paths[0]).expect("it is there");
    let start = |row: &UndoRow| row.at.expect("bytes have a place").offset as usize;
    // One ends within the last record, one has garbage in the second, and one has no file.
    let mut torn = whole.clone();
    torn[start(&rows[1]) + 100..][..512].fill(0xaa);
    std::fs::write(&paths[0], torn).expect("it can be written");
    let short = &whole[..start(&rows[3]) + 17];
    std::fs::write(&paths[1], short).expect("it can be written");
    std::fs::remove_file(&paths[2]).expect("it can be removed");
    complete(&replicas, 2).expect("it has nothing to do");
    assert!(!paths[2].exists());
    complete(&replicas, 1).expect("it completes");
    for path in &paths {
        let bytes = std::fs::read(path).expect("it is there");
        assert_eq!(missing(&bytes, &rows), [], "{}", path.display());
    }
}

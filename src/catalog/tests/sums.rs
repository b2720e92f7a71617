//! Rot in a catalog's pages: found wherever it is, and nothing else is taken for it.

use std::os::unix::fs::FileExt;

use super::*;

/// A xorshift generator: the same flips in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

fn fill(catalog: &Catalog, from: u64, count: u64) {
    for id in from..from + count {
        catalog.push(create(1, &format!("a file named {id}"), file(id, id))).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
}

fn rotten(catalog: &Catalog, index: usize) -> Vec<usize> {
    let id = ReplicaId::all().nth(index).unwrap();
    catalog.rotten_pages(id, &mut |_| Ok(())).unwrap()
}

fn none() -> Vec<usize> {
    Vec::new()
}

/// Flips a bit, and tells in which page.
fn flip(file: &Path, at: u64, bit: u64) -> usize {
    let open = std::fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).unwrap();
    open.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
    (at / 4096) as usize
}

/// The place of a file's name in the database.
fn place_of(file: &Path, text: &str) -> u64 {
    let bytes = std::fs::read(file).unwrap();
    bytes.windows(text.len()).rposition(|found| found == text.as_bytes()).unwrap() as u64
}

#[test]
fn what_commits_change_is_no_rot() {
    let scratch = Scratch::new_in(2, "/dev/shm");
    let mut catalog = scratch.open_rooted();
    for round in 0..8 {
        fill(&catalog, 100 + round * 300, 300);
        if round % 3 > 0 {
            rest(&catalog);
        }
        assert_eq!((rotten(&catalog, 0), rotten(&catalog, 1)), (none(), none()), "{round}");
        if round % 4 == 3 {
            catalog.close().unwrap();
            catalog = scratch.open();
        }
    }
}

/// Sums are taken a few at a time: a bit must not turn unseen before its page's turn comes.
#[test]
fn a_bit_that_is_flipped_once_the_wal_is_empty_is_found() {
    let scratch = Scratch::new_in(1, "/dev/shm");
    let catalog = scratch.open_rooted();
    for round in 0..4 {
        fill(&catalog, 100 + round * 4000, 4000);
        let wal = scratch.files[0].with_extension("db-wal");
        while std::fs::metadata(&wal).unwrap().len() > 0 {
            catalog.shared.checkpoint(true);
        }
        let size = std::fs::metadata(&scratch.files[0]).unwrap().len();
        let page = flip(&scratch.files[0], size - 1, 0);
        assert_eq!(rotten(&catalog, 0), vec![page], "{round}");
        flip(&scratch.files[0], size - 1, 0);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_healed_from_the_other_replica() {
    let scratch = Scratch::new_in(2, "/dev/shm");
    let catalog = scratch.open_rooted();
    fill(&catalog, 100, 1000);
    rest(&catalog);
    assert_eq!((rotten(&catalog, 0), rotten(&catalog, 1)), (none(), none()));
    let ids: Vec<ReplicaId> = ReplicaId::all().take(2).collect();
    let mut dice = Dice(20_261_125);
    for round in 0..60 {
        let (bad, good) = (round % 2, 1 - round % 2);
        let file = &scratch.files[bad];
        let size = std::fs::metadata(file).unwrap().len();
        let page = flip(file, dice.below(size), dice.below(8));
        assert_eq!((rotten(&catalog, bad), rotten(&catalog, good)), (vec![page], none()));
        catalog.replace(ids[bad], Some(ids[good])).unwrap();
        assert_eq!((rotten(&catalog, bad), rotten(&catalog, good)), (none(), none()));
        let hashes = |file| Catalog::table_hashes(file).unwrap();
        assert_eq!(hashes(&scratch.files[0]), hashes(&scratch.files[1]));
    }
}

#[test]
fn rot_is_known_after_the_next_mount_and_after_a_commit_on_its_page() {
    let scratch = Scratch::new_in(1, "/dev/shm");
    let catalog = scratch.open_rooted();
    fill(&catalog, 100, 500);
    catalog.close().unwrap();
    let file = &scratch.files[0];
    let catalog = scratch.open();
    assert!(rotten(&catalog, 0).is_empty());
    catalog.close().unwrap();
    let page = flip(file, place_of(file, "a file named 333"), 0);
    let catalog = scratch.open();
    assert_eq!(rotten(&catalog, 0), vec![page]);
    // The page is written anew, with a sum of its own that tells nothing.
    catalog.push(vec![remove(1, "a file named 334"), Change::NodeGone(NodeId(334))]).unwrap();
    catalog.flush(Durability::Written).unwrap();
    rest(&catalog);
    assert!(rotten(&catalog, 0).contains(&page));
    catalog.close().unwrap();
    assert!(rotten(&scratch.open(), 0).contains(&page));
}

#[test]
fn a_database_that_was_cut_off_is_found() {
    let scratch = Scratch::new_in(2, "/dev/shm");
    let catalog = scratch.open_rooted();
    fill(&catalog, 100, 500);
    rest(&catalog);
    assert!(rotten(&catalog, 1).is_empty());
    let file = std::fs::File::options().write(true).open(&scratch.files[1]).unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    file.set_len((pages - 1) * 4096).unwrap();
    assert_eq!(rotten(&catalog, 1), [pages as usize - 1]);
    let ids: Vec<ReplicaId> = ReplicaId::all().take(2).collect();
    catalog.replace(ids[1], Some(ids[0])).unwrap();
    assert!(rotten(&catalog, 1).is_empty());
}

#[test]
fn sums_that_are_damaged_or_of_another_state_say_nothing() {
    let scratch = Scratch::new_in(1, "/dev/shm");
    let catalog = scratch.open_rooted();
    fill(&catalog, 100, 500);
    catalog.close().unwrap();
    let file = scratch.files[0].with_extension("db.sums");
    let sums = std::fs::read(&file).unwrap();
    let mut flipped = sums.clone();
    flipped[60] ^= 4;
    let mut long = sums.clone();
    long.resize(1 << 20, 0);
    for left in [&flipped[..], &sums[..50], &[], &long, &sums] {
        std::fs::write(&file, left).unwrap();
        let catalog = scratch.open();
        assert!(rotten(&catalog, 0).is_empty());
        assert!(!file.exists(), "it is of no use while the catalog changes");
        fill(&catalog, 5000, 1);
        catalog.push(vec![remove(1, "a file named 5000"), Change::NodeGone(NodeId(5000))]).unwrap();
        catalog.close().unwrap();
    }
}

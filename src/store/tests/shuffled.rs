//! Files that change names and are written to at random, none of it recorded when the mount ends:
//! each is the one it was.

use std::collections::HashMap;

use proptest::prelude::*;

use super::bounded::intend;
use super::*;
use crate::catalog::{Change, UndoRow};
use crate::replica::intent::Dirty;

const DIRS: [&str; 3] = ["one", "two", "far"];
const NAMES: usize = 3;
const SLOTS: usize = DIRS.len() * NAMES;

/// What happens to files; numbers choose among the names that there can be.
#[derive(Clone, Copy, Debug)]
enum Act {
    Create(usize, u8),
    Rename(usize, usize),
    Exchange(usize, usize),
    Link(usize, usize),
    Unlink(usize),
    /// Bytes are appended, of which there need not be any before-image.
    Append(usize),
    /// It is given other bytes, or fewer.
    Overwrite(usize),
    Truncate(usize, u8),
}

fn act() -> impl Strategy<Value = Act> {
    let at = || 0..SLOTS;
    prop_oneof![
        1 => (at(), 0..9u8).prop_map(|(to, size)| Act::Create(to, size)),
        4 => (at(), at()).prop_map(|(from, to)| Act::Rename(from, to)),
        4 => (at(), at()).prop_map(|(one, other)| Act::Exchange(one, other)),
        2 => (at(), at()).prop_map(|(from, to)| Act::Link(from, to)),
        1 => at().prop_map(Act::Unlink),
        2 => at().prop_map(Act::Append),
        1 => at().prop_map(Act::Overwrite),
        1 => (at(), 0..9u8).prop_map(|(at, size)| Act::Truncate(at, size)),
    ]
}

/// A store whose mount ends, and what only the files know.
struct Shuffle {
    bench: Bench,
    /// By inode, the recorded files.
    known: HashMap<u64, NodeRow>,
    /// Those that were written to.
    written: HashMap<u64, UndoRow>,
    preserved: Vec<ContentId>,
}

impl Shuffle {
    fn new(sizes: &[usize], links: &[(usize, usize)]) -> Shuffle {
        let bench = Bench::new();
        DIRS.iter().for_each(|dir| fs::create_dir_all(bench.path("a").join(dir)).unwrap());
        let mut last = None;
        for (index, &size) in sizes.iter().enumerate() {
            let path = bench.path("a").join(path_of(index));
            let born = || fs::metadata(&path).unwrap().created().unwrap();
            write(&path, &vec![index as u8; size]);
            // The clock of births has ticks.
            while last == Some(born()) {
                fs::remove_file(&path).unwrap();
                write(&path, &vec![index as u8; size]);
            }
            last = Some(born());
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(index as u64);
            let times = fs::FileTimes::new().set_modified(time);
            fs::File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        }
        for &(from, to) in links {
            let at = |index| bench.path("a").join(path_of(index));
            if at(from).exists() && !at(to).exists() {
                fs::hard_link(at(from), at(to)).unwrap();
            }
        }
        bench.settle(&["a", "b"]);
        let store = bench.open(&["a", "b"]).unwrap();
        let mut known = HashMap::new();
        for (path, row) in catalog_tree(&store.catalog) {
            let path = path.to_string();
            let path = path.trim_start_matches('/');
            if row.kind == Kind::File {
                let at = bench.path("a").join(path);
                known.insert(fs::symlink_metadata(at).unwrap().ino(), row);
            }
        }
        let dirs = DIRS.map(|dir| Dirty::Dir(id_of(&store.catalog, dir)));
        intend(&store, &dirs);
        known.values().for_each(|row| intend(&store, &[Dirty::File(row.id)]));
        drop(store);
        let (written, preserved) = (HashMap::new(), Vec::new());
        Shuffle { bench, known, written, preserved }
    }

    fn at(&self, index: usize) -> PathBuf {
        self.bench.path("a").join(path_of(index))
    }

    fn ino(&self, index: usize) -> Option<(u64, u64, u64)> {
        let stat = fs::symlink_metadata(self.at(index)).ok()?;
        Some((stat.ino(), stat.nlink(), stat.size()))
    }

    /// Takes a name away. What is recorded and had no other goes into `preserved/`; what was also
    /// written to cannot, as far as this test knows.
    fn clear(&mut self, index: usize) -> bool {
        let Some((ino, links, _)) = self.ino(index) else { return true };
        let row = self.known.get(&ino).filter(|row| links == 1 && row.size > 0);
        match row {
            Some(_) if self.written.contains_key(&ino) => return false,
            Some(row) => {
                unclean::preserve(
                    &self.bench.path("a"),
                    &path_of(index),
                    (row.id, row.content),
                    true,
                );
                self.preserved.push(row.content);
            }
            None => fs::remove_file(self.at(index)).unwrap(),
        }
        true
    }

    fn write(&mut self, index: usize, from: u64) {
        let Some((ino, ..)) = self.ino(index) else { return };
        let Some(row) = self.known.get(&ino).filter(|row| row.size > from) else { return };
        let image = self.written.entry(ino).or_insert(UndoRow {
            node: row.id,
            content: row.content,
            offset: row.size,
            length: 0,
            at: None,
        });
        image.offset = image.offset.min(from);
        image.length = row.size - image.offset;
    }

    /// The number of one of the names that there are.
    fn present(&self, number: usize) -> usize {
        let present: Vec<usize> = (0..SLOTS).filter(|&index| self.ino(index).is_some()).collect();
        present.get(number % present.len().max(1)).copied().unwrap_or(0)
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Create(to, size) => {
                if self.clear(to) {
                    fs::write(self.at(to), vec![b'n'; size as usize]).unwrap();
                }
            }
            Act::Rename(from, to) => {
                let from = self.present(from);
                let (one, other) = (self.ino(from), self.ino(to));
                let same = one.map(|one| one.0) == other.map(|other| other.0);
                if one.is_some() && !same && self.clear(to) {
                    fs::rename(self.at(from), self.at(to)).unwrap();
                }
            }
            Act::Exchange(one, other) => {
                let (one, other) = (self.present(one), self.present(other));
                if one != other && self.ino(one).is_some() && self.ino(other).is_some() {
                    let spare = self.bench.path("spare");
                    fs::rename(self.at(one), &spare).unwrap();
                    fs::rename(self.at(other), self.at(one)).unwrap();
                    fs::rename(&spare, self.at(other)).unwrap();
                }
            }
            Act::Link(from, to) => {
                let from = self.present(from);
                if self.ino(from).is_some() && self.ino(to).is_none() {
                    fs::hard_link(self.at(from), self.at(to)).unwrap();
                }
            }
            Act::Unlink(index) => {
                self.clear(self.present(index));
            }
            Act::Append(index) => {
                let index = self.present(index);
                if let Some((_, _, size)) = self.ino(index) {
                    let file = fs::File::options().write(true).open(self.at(index)).unwrap();
                    file.set_len(size + 3).unwrap();
                }
            }
            Act::Overwrite(index) => {
                let index = self.present(index);
                if let Some((_, _, size)) = self.ino(index) {
                    self.write(index, 0);
                    fs::write(self.at(index), vec![b'w'; size as usize]).unwrap();
                }
            }
            Act::Truncate(index, size) => {
                let index = self.present(index);
                if self.ino(index).is_some_and(|(_, _, own)| own > u64::from(size)) {
                    self.write(index, size.into());
                    let file = fs::File::options().write(true).open(self.at(index)).unwrap();
                    file.set_len(size.into()).unwrap();
                }
            }
        }
    }

    /// Whether a recorded content needs bytes of the file that the node was.
    fn relies_on_its_file(&self, row: &NodeRow) -> bool {
        let is_whole = |image: &UndoRow| image.node == row.id && image.offset == 0;
        let kept = self.preserved.contains(&row.content) || self.written.values().any(is_whole);
        row.size > 0 && !kept
    }

    fn recover(&self) -> Store {
        let recover = |_: &ReplicaSet, catalog: &Catalog, _| {
            for &id in &self.preserved {
                catalog.push(vec![Change::ContentPreserved { id, cloned: false }])?;
            }
            for row in self.written.values() {
                catalog.push(vec![Change::UndoAdd(row.clone())])?;
            }
            Ok(())
        };
        let paths = self.bench.paths(&["a", "b"]);
        open(&paths, &OpenOptions::default(), &recover, &Progress::silent()).unwrap()
    }

    /// Does all of this, and looks whether the files are the ones they were.
    fn judge(mut self, acts: &[Act]) {
        acts.iter().for_each(|&act| self.act(act));
        let store = self.recover();
        for index in 0..SLOTS {
            let Some((ino, _, size)) = self.ino(index) else { continue };
            let found = id_of(&store.catalog, &path_of(index));
            match self.known.get(&ino) {
                Some(row) if size > 0 && self.relies_on_its_file(row) => {
                    assert_eq!(found, row.id, "{}", path_of(index));
                }
                // It may be a later content of any that is kept whole.
                _ => {
                    let mut others = self.known.values().filter(|row| row.id == found);
                    assert!(!others.any(|row| self.relies_on_its_file(row)));
                }
            }
        }
        assert_recorded(&store.catalog, &self.bench.path("a"));
        self.bench.assert_equal(&["a", "b"]);
    }
}

fn path_of(index: usize) -> String {
    format!("{}/{}", DIRS[index / NAMES], index % NAMES)
}

/// One of its names was taken by a new file, which moved on.
#[test]
fn a_linked_file_that_lost_a_name_lies_where_it_was_born() {
    let acts = [Act::Create(7, 7), Act::Link(6, 6), Act::Unlink(7), Act::Append(7), Act::Append(6)];
    Shuffle::new(&[1, 0, 0, 0, 0, 0], &[(0, 7)]).judge(&acts);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn files_that_were_shuffled_are_the_ones_they_were(
        sizes in proptest::collection::vec(0..9usize, 2..8),
        links in proptest::collection::vec((0..8usize, 0..SLOTS), 0..4),
        acts in proptest::collection::vec(act(), 1..9),
    ) {
        Shuffle::new(&sizes, &links).judge(&acts);
    }
}

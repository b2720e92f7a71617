//! What the catalog shows, read through it and compared with what it should show.

use std::collections::{BTreeMap, BTreeSet};

use super::world::{Shown, World, open};
use super::*;

impl World {
    pub fn db(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(&self.scratch.files[0]).unwrap()
    }

    fn place(&self, place: UndoPlace, at: u64) -> u8 {
        match place.file {
            UndoFile::Segment(number) => self.segments[&number][(place.offset + at) as usize],
            UndoFile::Stream(id) => self.packed(id)[(place.offset + at) as usize],
        }
    }

    fn packed(&self, id: ContentId) -> Vec<u8> {
        let recipe = self.catalog.recipe(id).unwrap().expect("what is packed has a recipe");
        let bytes = |row: &ChunkRow| match row.id {
            ChunkId::HOLE => vec![0; row.length as usize],
            id => self.chunks[&id].clone(),
        };
        recipe.chunks.iter().flat_map(bytes).collect()
    }

    fn read(&self, node: NodeId, content: ContentId) -> Vec<u8> {
        let size = self.catalog.content_size(content).unwrap().expect("a content has a size");
        if size == 0 {
            return Vec::new();
        }
        let sources = self.catalog.sources(node, content).unwrap();
        let base = match sources.base {
            Base::Live(node) => self.live.get(&node.0).map_or(vec![], |one| one.bytes.clone()),
            Base::Preserved { node, content } => self.preserved[&(node, content)].clone(),
            Base::Packed(id) => self.packed(id),
        };
        let byte = |at: u64| {
            let covers = |row: &&UndoRow| row.offset <= at && at < row.offset + row.length;
            match sources.undo.iter().find(covers) {
                Some(row) => row.at.map_or(0, |place| self.place(place, at - row.offset)),
                None => base[at as usize],
            }
        };
        (0..size).map(byte).collect()
    }

    /// Compares what is visible with what it should be, and the differences.
    pub fn check_shown(&self) {
        let root = RelPath::root();
        let mut last: Option<(Generation, &BTreeMap<String, Shown>)> = None;
        for (at, tree) in &self.shown {
            let mut found = BTreeMap::new();
            for one in self.catalog.list_at(*at, ROOT).unwrap() {
                let row = self.catalog.node_at(*at, one.node).unwrap().expect("it has a state");
                self.catalog.xattrs(row.xattrs).unwrap();
                if row.kind == Kind::Symlink {
                    assert!(self.catalog.symlink_target(one.node).unwrap().is_some());
                }
                let bytes = self.read(row.id, row.content);
                found.insert(one.name.to_string(), Shown { row, bytes });
            }
            assert_eq!(&found, tree, "at {at}");
            if let Some((from, old)) = last {
                self.check_diff(&self.catalog.diff(from, *at, &root).unwrap(), old, tree);
            }
            last = Some((*at, tree));
        }
    }

    fn check_diff(
        &self,
        differences: &[Difference],
        old: &BTreeMap<String, Shown>,
        new: &BTreeMap<String, Shown>,
    ) {
        let mut told = BTreeSet::new();
        for one in differences {
            told.extend(one.path.names().last().map(|name| name.to_string()));
            told.extend(one.to.iter().map(|to| to.names().last().unwrap().to_string()));
        }
        let changed = |name: &&String| {
            let of = |tree: &BTreeMap<String, Shown>| tree.get(*name).map(|one| one.row.clone());
            let same = |a: NodeRow, b: NodeRow| NodeRow { ctime: a.ctime, ..b } == a;
            match (of(old), of(new)) {
                (Some(a), Some(b)) => !same(a, b),
                (a, b) => a.is_some() || b.is_some(),
            }
        };
        for name in old.keys().chain(new.keys()).filter(changed) {
            let linked = new.get(name).is_some_and(|one| {
                // Of a file that was changed one name is told.
                new.values().filter(|other| other.row.id == one.row.id).count() > 1
            });
            assert!(told.contains(name) || linked, "{name} differs: {differences:?}");
        }
    }

    /// What each snapshot is said to free, its deletion frees.
    pub fn check_freed(mut self) {
        let snapshots = self.catalog.snapshots().unwrap();
        let told: Vec<_> = snapshots
            .iter()
            .map(|one| self.catalog.freed_without(one, self.since, &|| true).unwrap().unwrap())
            .collect();
        // Any four, beginning with another one in each sequence.
        let begin = self.catalog.generation().0 as usize;
        let chosen = (begin..begin + snapshots.len().min(4)).map(|index| index % snapshots.len());
        self.catalog.close().unwrap();
        let whole = std::fs::read(&self.scratch.files[0]).unwrap();
        for (index, at) in chosen.enumerate() {
            let (snapshot, told) = (&snapshots[at], told[at]);
            let copy = Scratch::new(1);
            std::fs::write(&copy.files[0], &whole).unwrap();
            self.catalog = open(&copy, &self.clock, true);
            if snapshot.held {
                self.catalog.hold_snapshot(&snapshot.name, false).unwrap();
            }
            let before = liveness::history_bytes(&self.catalog);
            self.catalog.delete_snapshot(&snapshot.name).unwrap();
            let cost = if index == 0 { 4 } else { 1000 };
            while let Some(sweep) = self.catalog.next_sweep().unwrap() {
                self.catalog.sweep_within(&sweep, self.since, cost).unwrap();
            }
            let after = liveness::history_bytes(&self.catalog);
            assert_eq!(before - after, told, "freed by {}", snapshot.name);
        }
    }
}

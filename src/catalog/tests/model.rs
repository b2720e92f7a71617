//! Random histories against a plain list of full trees: every frozen generation, live tree and
//! difference must come out as the model has them, whenever commits happened in between.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// One step of a random history; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Create { parent: usize, name: u8, dir: bool },
    Rename { which: usize, parent: usize, name: u8 },
    Link { which: usize, parent: usize, name: u8 },
    Unlink { which: usize },
    Write { which: usize },
    Chmod { which: usize, mode: u32 },
    Exclude { which: usize },
    Freeze,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let index = 0usize..1000;
    prop_oneof![
        4 => (index.clone(), 0u8..6, any::<bool>())
            .prop_map(|(parent, name, dir)| Step::Create { parent, name, dir }),
        3 => (index.clone(), index.clone(), 0u8..6)
            .prop_map(|(which, parent, name)| Step::Rename { which, parent, name }),
        1 => (index.clone(), index.clone(), 0u8..6)
            .prop_map(|(which, parent, name)| Step::Link { which, parent, name }),
        3 => index.clone().prop_map(|which| Step::Unlink { which }),
        2 => index.clone().prop_map(|which| Step::Write { which }),
        2 => (index.clone(), 0u32..3).prop_map(|(which, mode)| Step::Chmod { which, mode }),
        2 => index.prop_map(|which| Step::Exclude { which }),
        2 => Just(Step::Freeze),
        1 => Just(Step::Flush),
    ]
}

/// A full tree.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tree {
    nodes: BTreeMap<u64, NodeRow>,
    entries: BTreeMap<(u64, String), u64>,
    /// Nodes that history does not show.
    hidden: BTreeSet<u64>,
    /// Entries that it does not show: all of hidden nodes, and further names in hidden directories.
    dark: BTreeSet<(u64, String)>,
}

impl Tree {
    fn dirs(&self) -> Vec<u64> {
        self.nodes.values().filter(|row| row.kind == Kind::Dir).map(|row| row.id.0).collect()
    }

    fn links(&self, node: u64) -> usize {
        self.entries.values().filter(|other| **other == node).count()
    }

    /// What history shows of it.
    fn shown(&self) -> Tree {
        let mut tree = self.clone();
        tree.nodes.retain(|node, _| !self.hidden.contains(node));
        tree.entries.retain(|key, _| !self.dark.contains(key));
        tree.hidden.clear();
        tree.dark.clear();
        tree
    }

    fn is_leaf(&self, node: u64) -> bool {
        !self.entries.keys().any(|(parent, _)| *parent == node)
    }

    /// Enters a name, which is dark where its node or directory is hidden.
    fn enter(&mut self, key: (u64, String), node: u64) -> Change {
        let (parent, text) = (NodeId(key.0), name(&key.1));
        self.entries.insert(key.clone(), node);
        if self.hidden.contains(&node) || self.hidden.contains(&key.0) {
            self.dark.insert(key);
            return Change::EntryUnversioned { parent, name: text, node: NodeId(node) };
        }
        self.dark.remove(&key);
        Change::EntryAdd { parent, name: text, node: NodeId(node) }
    }

    fn leave(&mut self, key: &(u64, String)) -> Change {
        self.entries.remove(key);
        self.dark.remove(key);
        remove(key.0, &key.1)
    }

    fn put(&self, node: u64) -> Change {
        let row = self.nodes[&node].clone();
        match self.hidden.contains(&node) {
            true => Change::NodeUnversioned(row),
            false => Change::NodePut(row),
        }
    }

    fn has_shown_name(&self, node: u64) -> bool {
        self.entries.iter().any(|(key, other)| *other == node && !self.dark.contains(key))
    }

    /// Hides a leaf, or shows it again under the names in directories that are shown.
    fn turn(&mut self, node: u64) -> Vec<Change> {
        let names: Vec<_> =
            self.entries.iter().filter(|(_, n)| **n == node).map(|(key, _)| key.clone()).collect();
        if !self.hidden.remove(&node) {
            self.hidden.insert(node);
        } else if names.iter().all(|(parent, _)| self.hidden.contains(parent)) {
            self.hidden.insert(node);
            return Vec::new();
        }
        let mut changes = vec![self.put(node)];
        for key in names {
            changes.push(self.leave(&key));
            changes.push(self.enter(key, node));
        }
        changes
    }

    /// Whether `dir` lies in `node` or is it.
    fn within(&self, mut dir: u64, node: u64) -> bool {
        loop {
            if dir == node {
                return true;
            }
            match self.entries.iter().find(|(_, child)| **child == dir) {
                Some(((parent, _), _)) => dir = *parent,
                None => return false,
            }
        }
    }

    /// Takes a step if it is possible and gives its changes.
    fn take(&mut self, step: &Step, catalog: &Catalog) -> Vec<Change> {
        let mut changes = Vec::new();
        let names: Vec<_> = self.entries.keys().cloned().collect();
        let dirs = self.dirs();
        let free = |tree: &Tree, parent: usize, name: u8| {
            let key = (dirs[parent % dirs.len()], format!("n{name}"));
            (!tree.entries.contains_key(&key)).then_some(key)
        };
        let existing = |which: usize| names.get(which % names.len().max(1)).cloned();
        match *step {
            Step::Create { parent, name, dir: is_dir } => {
                let Some(key) = free(self, parent, name) else { return changes };
                let id = catalog.next_node().0;
                let row = if is_dir { dir(id) } else { file(id, 0) };
                self.nodes.insert(id, row);
                if self.hidden.contains(&key.0) {
                    self.hidden.insert(id);
                }
                changes = vec![self.put(id), self.enter(key, id)];
            }
            Step::Rename { which, parent, name } => {
                let (Some(old), Some(new)) = (existing(which), free(self, parent, name)) else {
                    return changes;
                };
                let node = self.entries[&old];
                if self.within(new.0, node) {
                    return changes;
                }
                // With directories that are not empty the model does not go where the catalog's
                // users do: their children would have to be hidden as well.
                let hides = self.hidden.contains(&new.0) && !self.hidden.contains(&node);
                if hides && !self.is_leaf(node) {
                    return changes;
                }
                changes = vec![self.leave(&old), self.enter(new, node)];
                if hides && !self.has_shown_name(node) {
                    self.hidden.insert(node);
                    changes.push(self.put(node));
                }
            }
            Step::Link { which, parent, name } => {
                let (Some(old), Some(new)) = (existing(which), free(self, parent, name)) else {
                    return changes;
                };
                let node = self.entries[&old];
                if self.nodes[&node].kind == Kind::File {
                    changes = vec![self.enter(new, node)];
                }
            }
            Step::Unlink { which } => {
                let Some(key) = existing(which) else { return changes };
                let node = self.entries[&key];
                if !self.is_leaf(node) {
                    return changes;
                }
                changes = vec![self.leave(&key)];
                if self.links(node) == 0 {
                    self.nodes.remove(&node);
                    self.hidden.remove(&node);
                    changes.push(Change::NodeGone(NodeId(node)));
                } else if !self.hidden.contains(&node) && !self.has_shown_name(node) {
                    self.hidden.insert(node);
                    changes.push(self.put(node));
                }
            }
            Step::Write { which } | Step::Chmod { which, .. } => {
                let Some(key) = existing(which) else { return changes };
                let node = self.entries[&key];
                let Some(row) = self.nodes.get_mut(&node) else { return changes };
                match *step {
                    Step::Chmod { mode, .. } => row.mode = mode,
                    _ if row.kind == Kind::File => {
                        row.content = catalog.next_content();
                        row.size += 1;
                    }
                    _ => {}
                }
                changes = vec![self.put(node)];
            }
            Step::Exclude { which } => {
                let Some(key) = existing(which) else { return changes };
                let node = self.entries[&key];
                if self.is_leaf(node) {
                    changes = self.turn(node);
                }
            }
            Step::Freeze | Step::Flush => {}
        }
        changes
    }
}

fn read_tree(catalog: &Catalog, at: Option<Generation>) -> Tree {
    let mut tree = Tree::default();
    let node = |id| match at {
        Some(at) => catalog.node_at(at, id).unwrap(),
        None => catalog.node(id).unwrap(),
    };
    let mut open = vec![ROOT];
    tree.nodes.extend(node(ROOT).map(|row| (1, row)));
    while let Some(parent) = open.pop() {
        let list = match at {
            Some(at) => catalog.list_at(at, parent).unwrap(),
            None => catalog.list(parent).unwrap(),
        };
        for one in list {
            let row = node(one.node).unwrap();
            assert_eq!(row.kind, one.kind);
            match at {
                Some(at) => {
                    let found = catalog.lookup_at(at, parent, &one.name).unwrap();
                    assert_eq!(found.as_ref(), Some(&row));
                }
                None => {
                    let found = catalog.lookup(parent, &one.name).unwrap();
                    assert_eq!(found, Some((one.node, one.kind)));
                    let names = catalog.names(one.node).unwrap();
                    assert!(names.contains(&(parent, one.name.clone())));
                }
            }
            if one.kind == Kind::Dir {
                open.push(one.node);
            }
            tree.entries.insert((parent.0, one.name.to_string()), one.node.0);
            tree.nodes.insert(one.node.0, row);
        }
        if at.is_none() {
            // What is read ahead now must mislead nobody later.
            for other in 0..6 {
                let other = name(&format!("n{other}"));
                let found = catalog.lookup(parent, &other).unwrap();
                assert_eq!(
                    found.is_some(),
                    tree.entries.contains_key(&(parent.0, other.to_string()))
                );
            }
            catalog.foresee(parent, None, 100).unwrap();
        }
    }
    tree
}

fn check_diff(catalog: &Catalog, from: &(Generation, Tree), to: &(Generation, Tree)) {
    let all = RelPath::root();
    let count = |differences: &[Difference], kind| {
        differences.iter().filter(|one| one.kind == kind).count() as i64
    };
    let there = catalog.diff(from.0, to.0, &all).unwrap();
    let back = catalog.diff(to.0, from.0, &all).unwrap();
    let added = count(&there, DiffKind::Added);
    let removed = count(&there, DiffKind::Removed);
    assert_eq!((added, removed), (count(&back, DiffKind::Removed), count(&back, DiffKind::Added)));
    assert_eq!(added - removed, to.1.entries.len() as i64 - from.1.entries.len() as i64);
    assert_eq!(there.is_empty(), from.1 == to.1);
    for one in &there {
        let (old, new) = match one.kind {
            DiffKind::Added => (None, Some(&one.path)),
            DiffKind::Removed => (Some(&one.path), None),
            DiffKind::Modified => (None, Some(&one.path)),
            DiffKind::Renamed => (Some(&one.path), one.to.as_ref()),
        };
        assert!(old.is_none_or(|path| catalog.resolve_at(from.0, path).unwrap().is_some()));
        assert!(new.is_none_or(|path| catalog.resolve_at(to.0, path).unwrap().is_some()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_frozen_generation_shows_what_the_model_had(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let scratch = Scratch::new(2);
        let catalog = scratch.open_rooted();
        let mut tree = Tree::default();
        tree.nodes.insert(1, dir(1));
        let mut frozen = vec![(catalog.freeze(), tree.shown())];
        for step in &steps {
            match step {
                Step::Freeze => frozen.push((catalog.freeze(), tree.shown())),
                Step::Flush => catalog.flush(Durability::Written).unwrap(),
                step => {
                    let changes = tree.take(step, &catalog);
                    if !changes.is_empty() {
                        catalog.push(changes).unwrap();
                    }
                }
            }
        }
        let live = Tree { hidden: BTreeSet::new(), dark: BTreeSet::new(), ..tree.clone() };
        prop_assert_eq!(&read_tree(&catalog, None), &live);
        for key in tree.entries.keys() {
            let shown = catalog.entry_is_versioned(NodeId(key.0), &name(&key.1)).unwrap();
            prop_assert_eq!(shown, Some(!tree.dark.contains(key)));
        }
        for node in tree.nodes.keys() {
            let shown = catalog.is_versioned(NodeId(*node)).unwrap();
            prop_assert_eq!(shown, !tree.hidden.contains(node));
        }
        frozen.push((catalog.freeze(), tree.shown()));
        for (at, model) in &frozen {
            prop_assert_eq!(&read_tree(&catalog, Some(*at)), model, "at {}", at);
        }
        for pair in frozen.windows(2) {
            check_diff(&catalog, &pair[0], &pair[1]);
        }
        check_diff(&catalog, &frozen[0], frozen.last().unwrap());
        let totals = catalog.totals().unwrap();
        prop_assert_eq!(totals.live_nodes, tree.nodes.len() as u64);
        let bytes: u64 = tree.nodes.values().map(|row| row.size).sum();
        prop_assert_eq!(totals.live_bytes, bytes);
        catalog.close().unwrap();
        let heads: Vec<_> =
            scratch.files.iter().map(|file| Catalog::inspect(file).unwrap()).collect();
        prop_assert_eq!(&heads[0], &heads[1]);
        prop_assert_eq!(&read_tree(&scratch.open(), None), &live);
    }
}

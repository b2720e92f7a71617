//! The plan against random histories: a tree as it was, a script that does anything to it, and the
//! plan's steps done in an image of the tree. Nobody else interferes, so the tree must be again
//! what it was, whatever the script did.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::catalog::{Actor, Change, Durability, NodeRow};
use crate::types::{ContentId, EntryName, Kind, ReplicaMap, Timestamp, XattrSetId};

/// How many random histories are tried, unless `UNDO_CASES` says otherwise.
const CASES_DEFAULT: u32 = 150;

/// One operation; numbers pick among what there is.
#[derive(Clone, Debug)]
enum Op {
    Create {
        dir: usize,
        name: u8,
    },
    Mkdir {
        dir: usize,
        name: u8,
    },
    Write {
        at: usize,
    },
    Chmod {
        at: usize,
        mode: u32,
    },
    Link {
        at: usize,
        dir: usize,
        name: u8,
    },
    Remove {
        at: usize,
    },
    Rename {
        at: usize,
        dir: usize,
        name: u8,
    },
    Exchange {
        at: usize,
        with: usize,
    },
    /// Somebody looks: states so far are not folded.
    Look,
    /// Directories get their times recorded.
    Settle,
}

fn op() -> impl Strategy<Value = Op> {
    let (at, name) = (0..64usize, 0..4u8);
    prop_oneof![
        3 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Create { dir, name }),
        3 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Mkdir { dir, name }),
        2 => at.clone().prop_map(|at| Op::Write { at }),
        1 => (at.clone(), 0..8u32).prop_map(|(at, mode)| Op::Chmod { at, mode }),
        1 => (at.clone(), at.clone(), name.clone())
            .prop_map(|(at, dir, name)| Op::Link { at, dir, name }),
        3 => at.clone().prop_map(|at| Op::Remove { at }),
        8 => (at.clone(), at.clone(), name.clone())
            .prop_map(|(at, dir, name)| Op::Rename { at, dir, name }),
        1 => (at.clone(), at).prop_map(|(at, with)| Op::Exchange { at, with }),
        1 => Just(Op::Look),
        1 => Just(Op::Settle),
    ]
}

/// What a path is: kind, mode, content.
type Shown = BTreeMap<RelPath, (Kind, u32, ContentId)>;

/// A live tree in memory.
#[derive(Clone, Default)]
struct Image {
    dirs: BTreeMap<NodeId, BTreeMap<EntryName, NodeId>>,
    nodes: BTreeMap<NodeId, NodeRow>,
}

impl Image {
    fn find(&self, path: &RelPath) -> Option<NodeId> {
        let mut at = NodeId::ROOT;
        for name in path.names() {
            at = *self.dirs.get(&at)?.get(name)?;
        }
        Some(at)
    }

    /// Every slot, those of a directory after its own.
    fn slots(&self) -> Vec<(NodeId, EntryName, NodeId)> {
        let (mut slots, mut waiting) = (Vec::new(), vec![NodeId::ROOT]);
        while let Some(dir) = waiting.pop() {
            for (name, node) in &self.dirs[&dir] {
                slots.push((dir, name.clone(), *node));
                if self.dirs.contains_key(node) {
                    waiting.push(*node);
                }
            }
        }
        slots
    }

    fn dirs(&self) -> Vec<NodeId> {
        let slots = self.slots().into_iter().map(|(_, _, node)| node);
        let dirs = slots.filter(|node| self.dirs.contains_key(node));
        std::iter::once(NodeId::ROOT).chain(dirs).collect()
    }

    fn contains(&self, dir: NodeId, node: NodeId) -> bool {
        dir == node
            || self
                .dirs
                .get(&dir)
                .is_some_and(|names| names.values().any(|inner| self.contains(*inner, node)))
    }

    fn shown(&self) -> Shown {
        let mut shown = Shown::new();
        self.show(NodeId::ROOT, &RelPath::root(), &mut shown);
        shown
    }

    fn show(&self, dir: NodeId, path: &RelPath, shown: &mut Shown) {
        for (name, node) in &self.dirs[&dir] {
            let (path, row) = (path.join(name), &self.nodes[node]);
            shown.insert(path.clone(), (row.kind, row.mode, row.content));
            if row.kind == Kind::Dir {
                self.show(*node, &path, shown);
            }
        }
    }

    /// The directory and the name of a path that a step gives.
    fn place(&self, path: &PathText) -> Result<(NodeId, EntryName), String> {
        let path = RelPath::parse(path.bytes().expect("text")).expect("a path");
        let (dir, name) = path.split_last().ok_or("the root itself")?;
        let dir = self.find(&dir).filter(|dir| self.dirs.contains_key(dir));
        Ok((dir.ok_or_else(|| format!("{path}: no directory"))?, name.clone()))
    }

    fn take(&mut self, (dir, name): &(NodeId, EntryName)) -> Result<NodeId, String> {
        self.dirs.get_mut(dir).and_then(|names| names.remove(name)).ok_or("not there".into())
    }

    fn put(&mut self, (dir, name): &(NodeId, EntryName), node: NodeId) -> Result<(), String> {
        match self.dirs.get_mut(dir).expect("a directory").insert(name.clone(), node) {
            Some(_) => Err("something is there".into()),
            None => Ok(()),
        }
    }

    /// Does one step of a plan as the system would.
    fn step(&mut self, step: &UndoStep, catalog: &Catalog, views: &[u64]) -> Result<(), String> {
        let source = || -> Option<NodeRow> {
            let (view, path) = step.source.as_ref()?;
            let path = RelPath::parse(path.bytes()?).ok()?;
            catalog.resolve_at(Generation(views[*view]), &path).expect("a query")
        };
        if matches!(step.action, UndoAction::Attributes | UndoAction::Times) {
            let path = RelPath::parse(step.path.bytes().expect("text")).expect("a path");
            let node = self.find(&path).ok_or("no such directory")?;
            let row = source().ok_or("no source")?;
            if step.action == UndoAction::Attributes {
                self.nodes.get_mut(&node).expect("a node").mode = row.mode;
            }
            return Ok(());
        }
        let at = self.place(&step.path)?;
        match step.action {
            UndoAction::Remove => match self.take(&at)? {
                node if self.dirs.contains_key(&node) => Err("a directory".into()),
                _ => Ok(()),
            },
            UndoAction::RemoveDir => {
                let node = self.take(&at)?;
                match self.dirs.remove(&node) {
                    Some(names) if names.is_empty() => Ok(()),
                    names => Err(format!("not an empty directory: {names:?}")),
                }
            }
            UndoAction::MakeDir => {
                let node = self.fresh();
                self.nodes.insert(node, row(node, Kind::Dir, 0));
                self.dirs.insert(node, BTreeMap::new());
                self.put(&at, node)
            }
            UndoAction::Rename => {
                let to = self.place(step.to.as_ref().expect("a target"))?;
                let node = self.take(&at)?;
                if self.contains(node, to.0) {
                    return Err("moved into itself".into());
                }
                self.put(&to, node)
            }
            UndoAction::Exchange => {
                let to = self.place(step.to.as_ref().expect("a target"))?;
                let (one, other) = (self.take(&at)?, self.take(&to)?);
                if self.contains(one, to.0) || self.contains(other, at.0) {
                    return Err("moved into itself".into());
                }
                self.put(&at, other)?;
                self.put(&to, one)
            }
            UndoAction::Link => {
                let of = self.place(step.to.as_ref().expect("a target"))?;
                let node = *self.dirs[&of.0].get(&of.1).ok_or("no file to link")?;
                self.put(&at, node)
            }
            _ => {
                let found = self.take(&at).ok();
                let is_file = found.is_none_or(|node| !self.dirs.contains_key(&node));
                if !is_file || found.is_some() != (step.action == UndoAction::Restore) {
                    return Err("restored over something else".into());
                }
                let node = self.fresh();
                let row = source().ok_or("no source")?;
                self.nodes.insert(node, NodeRow { id: node, ..row });
                self.put(&at, node)
            }
        }
    }

    fn fresh(&self) -> NodeId {
        NodeId(self.nodes.keys().next_back().expect("the root").0 + 1)
    }
}

fn row(id: NodeId, kind: Kind, content: u64) -> NodeRow {
    let time = Timestamp { secs: 1_700_000_000 + content as i64, nanos: 0 };
    NodeRow {
        id,
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: content,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: Timestamp::default(),
        xattrs: XattrSetId::NONE,
        content: ContentId(content),
    }
}

/// A catalog, and beside it what the live tree is.
struct World {
    _dir: tempfile::TempDir,
    catalog: Catalog,
    image: Image,
    by: Option<Actor>,
    next_content: u64,
    stale: BTreeSet<NodeId>,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("catalog.db");
        Catalog::create(&file, uuid::Uuid::new_v4()).unwrap();
        let catalog = Catalog::open(ReplicaMap::new(vec![Some(file)]), true).unwrap();
        let root = row(NodeId::ROOT, Kind::Dir, 0);
        catalog.push(vec![Change::NodePut(root.clone())]).unwrap();
        let mut image = Image::default();
        image.dirs.insert(NodeId::ROOT, BTreeMap::new());
        image.nodes.insert(NodeId::ROOT, root);
        let stale = Default::default();
        World { _dir: dir, catalog, image, by: None, next_content: 1, stale }
    }

    fn push(&self, changes: Vec<Change>) {
        self.catalog.push_by(self.by.as_ref(), changes).unwrap();
    }

    fn leave(&mut self, dir: NodeId, name: &EntryName) -> Vec<Change> {
        let node = self.image.dirs.get_mut(&dir).unwrap().remove(name).unwrap();
        self.stale.insert(dir);
        let mut changes = vec![Change::EntryRemove { parent: dir, name: name.clone() }];
        let lives = self.image.dirs.values().any(|names| names.values().any(|one| *one == node));
        if !lives {
            self.image.dirs.remove(&node);
            self.stale.remove(&node);
            changes.push(Change::NodeGone(node));
        }
        changes
    }

    fn enter(&mut self, dir: NodeId, name: &EntryName, node: NodeId) -> Change {
        self.image.dirs.get_mut(&dir).unwrap().insert(name.clone(), node);
        self.stale.insert(dir);
        Change::EntryAdd { parent: dir, name: name.clone(), node }
    }

    fn step(&mut self, op: &Op) {
        let (dirs, slots) = (self.image.dirs(), self.image.slots());
        let name = |number: u8| EntryName::new(format!("n{number}")).unwrap();
        let slot = |at: usize| (!slots.is_empty()).then(|| slots[at % slots.len()].clone());
        match *op {
            Op::Create { dir, name: number } | Op::Mkdir { dir, name: number } => {
                let (dir, name) = (dirs[dir % dirs.len()], name(number));
                if self.image.dirs[&dir].contains_key(&name) {
                    return;
                }
                let is_dir = matches!(op, Op::Mkdir { .. });
                self.next_content += 1;
                let (kind, content) = match is_dir {
                    true => (Kind::Dir, 0),
                    false => (Kind::File, self.next_content),
                };
                let node = self.catalog.next_node();
                let row = row(node, kind, content);
                self.image.nodes.insert(node, row.clone());
                if is_dir {
                    self.image.dirs.insert(node, BTreeMap::new());
                }
                let entered = self.enter(dir, &name, node);
                self.push(vec![Change::NodePut(row), entered]);
            }
            Op::Write { at } | Op::Chmod { at, .. } => {
                let Some((_, _, node)) = slot(at) else { return };
                let was = self.image.nodes[&node].clone();
                let row = match *op {
                    Op::Chmod { mode, .. } => NodeRow { mode, ..was },
                    _ if was.kind == Kind::Dir => return,
                    _ => {
                        self.next_content += 1;
                        NodeRow { mode: was.mode, ..row(node, Kind::File, self.next_content) }
                    }
                };
                self.image.nodes.insert(node, row.clone());
                self.push(vec![Change::NodePut(row)]);
            }
            Op::Link { at, dir, name: number } => {
                let Some((_, _, node)) = slot(at) else { return };
                let (dir, name) = (dirs[dir % dirs.len()], name(number));
                if self.image.dirs.contains_key(&node) || self.image.dirs[&dir].contains_key(&name)
                {
                    return;
                }
                let entered = self.enter(dir, &name, node);
                self.push(vec![entered]);
            }
            Op::Remove { at } => {
                let Some((dir, name, node)) = slot(at) else { return };
                if self.image.dirs.get(&node).is_some_and(|names| !names.is_empty()) {
                    return;
                }
                let left = self.leave(dir, &name);
                self.push(left);
            }
            Op::Rename { at, dir, name: number } => {
                let Some((from, old, node)) = slot(at) else { return };
                let (to, new) = (dirs[dir % dirs.len()], name(number));
                let target = self.image.dirs[&to].get(&new).copied();
                if target == Some(node) || self.image.contains(node, to) {
                    return;
                }
                let mut changes = Vec::new();
                if let Some(target) = target {
                    let full = self.image.dirs.get(&target).is_some_and(|names| !names.is_empty());
                    let kinds = [node, target].map(|one| self.image.dirs.contains_key(&one));
                    if full || kinds[0] != kinds[1] {
                        return;
                    }
                    changes.extend(self.leave(to, &new));
                }
                self.image.dirs.get_mut(&from).unwrap().remove(&old);
                self.stale.insert(from);
                changes.push(Change::EntryRemove { parent: from, name: old });
                changes.push(self.enter(to, &new, node));
                self.push(changes);
            }
            Op::Exchange { at, with } => {
                let (Some(one), Some(other)) = (slot(at), slot(with)) else { return };
                if one.2 == other.2
                    || self.image.contains(one.2, other.0)
                    || self.image.contains(other.2, one.0)
                {
                    return;
                }
                let remove = |slot: &(NodeId, EntryName, NodeId)| Change::EntryRemove {
                    parent: slot.0,
                    name: slot.1.clone(),
                };
                let changes = vec![
                    remove(&one),
                    remove(&other),
                    self.enter(one.0, &one.1, other.2),
                    self.enter(other.0, &other.1, one.2),
                ];
                self.push(changes);
            }
            Op::Look => {
                self.catalog.freeze();
            }
            Op::Settle => {
                for dir in std::mem::take(&mut self.stale) {
                    self.next_content += 1;
                    let was = self.image.nodes[&dir].clone();
                    let mtime = row(dir, Kind::Dir, self.next_content).mtime;
                    let row = NodeRow { mtime, ..was };
                    self.image.nodes.insert(dir, row.clone());
                    self.catalog.push(vec![Change::NodePut(row)]).unwrap();
                }
            }
        }
    }
}

fn actor(command: &str) -> Actor {
    Actor { uid: 0, pid: 7, command: command.as_bytes().to_vec() }
}

/// Lets one make a tree and a script change it, and takes back what the script did. Operations with
/// a mark are somebody else's.
fn run(before: &[Op], script: &[(Op, bool)]) -> Result<(), String> {
    let mut world = World::new();
    world.by = Some(actor("somebody"));
    before.iter().for_each(|op| world.step(op));
    world.step(&Op::Settle);
    let wanted = world.image.shown();
    let since =
        Moment { name: None, time: Timestamp::default(), generation: world.catalog.freeze() };
    let mut others = BTreeSet::new();
    for (op, by_others) in script {
        world.by = Some(actor(if *by_others { "somebody" } else { "script" }));
        let known = world.next_content;
        world.step(op);
        if *by_others {
            others.extend((known + 1..=world.next_content).map(ContentId));
        }
    }
    world.step(&Op::Settle);
    world.catalog.flush(Durability::Written).unwrap();
    let who = Who::Command("script".into());
    let plan = plan(&world.catalog, &since, &who, &RelPath::root(), false).unwrap();
    let alone = script.iter().all(|(_, by_others)| !by_others);
    if alone && !plan.conflicts.is_empty() {
        return Err(format!("conflicts: {:?}", plan.conflicts));
    }
    let mut image = world.image.clone();
    for step in &plan.steps {
        image
            .step(step, &world.catalog, &plan.views)
            .map_err(|error| format!("{step:?}: {error}\nin {:?}", plan.steps))?;
    }
    let shown = image.shown();
    let contents = |shown: &Shown| -> BTreeSet<ContentId> {
        shown.values().map(|(_, _, content)| *content).filter(|one| others.contains(one)).collect()
    };
    let theirs = contents(&world.image.shown());
    if !theirs.is_subset(&contents(&shown)) {
        return Err(format!("theirs {theirs:?}\nshown {shown:?}\nsteps {:?}", plan.steps));
    }
    if alone && shown != wanted {
        return Err(format!("wanted {wanted:?}\nshown {shown:?}\nsteps {:?}", plan.steps));
    }
    Ok(())
}

fn cases() -> u32 {
    std::env::var("UNDO_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES_DEFAULT)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_a_script_did_is_taken_back(
        before in proptest::collection::vec(op(), 0..20),
        script in proptest::collection::vec(op(), 1..30),
    ) {
        let script: Vec<_> = script.into_iter().map(|op| (op, false)).collect();
        if let Err(difference) = run(&before, &script) {
            prop_assert!(false, "{difference}\nbefore: {before:?}\nscript: {script:?}");
        }
    }

    #[test]
    fn what_others_made_meanwhile_is_not_lost_and_every_step_can_be_done(
        before in proptest::collection::vec(op(), 0..20),
        script in proptest::collection::vec((op(), prop::bool::weighted(0.3)), 1..30),
    ) {
        if let Err(difference) = run(&before, &script) {
            prop_assert!(false, "{difference}\nbefore: {before:?}\nscript: {script:?}");
        }
    }
}

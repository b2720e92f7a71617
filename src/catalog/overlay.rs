//! What is pushed but not yet in the database: one batch of changes, folded as far as history
//! allows.
//!
//! A batch is built under the queue's lock, one change after another, and answers queries of the
//! live tree meanwhile. It knows nothing of what the database holds: "the state before this batch"
//! ends at the batch's first change of it, and the commit finds out what that state was.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::actor::Acts;
use super::digest::Digest;
use super::schema::NextIds;
use super::{
    Change, ForgetChange, NEVER, NodeRow, PackChange, Snapshot, UndoFile, UndoPlace, UndoRow,
};
use crate::types::{
    ContentId, EntryName, Generation, Kind, NodeId, SnapshotId, XattrSetId, Xattrs,
};

/// All that one commit writes.
#[derive(Debug)]
pub(super) struct Batch {
    /// Node ids from here on were unknown when the batch was opened: no database has a state of
    /// them.
    pub first_newborn: u64,
    /// The generation of the newest change.
    pub last: Generation,
    /// The counters at the end of the batch.
    pub next: NextIds,
    /// How many changes were pushed.
    pub count: usize,
    /// Begin of generations, in nanoseconds.
    pub ticks: Vec<(Generation, i64)>,
    /// Who made the generations.
    pub acts: Acts,
    pub nodes: HashMap<NodeId, NodeDelta>,
    pub entries: HashMap<NodeId, BTreeMap<EntryName, EntryDelta>>,
    /// Names that nodes got in this batch; they may be gone again.
    pub named: HashMap<NodeId, Vec<(NodeId, EntryName)>>,
    pub symlinks: BTreeMap<NodeId, Vec<u8>>,
    pub contents: BTreeMap<ContentId, (NodeId, u64)>,
    /// The contents preserved whole, and whether as clones.
    pub preserved: Vec<(ContentId, bool)>,
    pub undo: Vec<UndoRow>,
    pub digests: BTreeMap<ContentId, Digest>,
    pub xattrs: BTreeMap<XattrSetId, Arc<Xattrs>>,
    pub snapshots: Vec<SnapshotChange>,
    pub meta: BTreeMap<&'static str, String>,
    /// Moves of preserved bytes and what is forgotten, in their order, after all else.
    pub late: Vec<Late>,
}

/// A change that no query of the live tree sees.
#[derive(Clone, Debug)]
pub(super) enum Late {
    Pack(PackChange),
    Forget(ForgetChange),
}

/// A change of the snapshots; their order matters, for names are freed and taken.
#[derive(Clone, Debug)]
pub(super) enum SnapshotChange {
    Put(Snapshot),
    Remove(SnapshotId),
}

/// What a batch does to one node.
#[derive(Debug)]
pub(super) struct NodeDelta {
    /// No earlier batch has a state of it.
    pub newborn: bool,
    /// Where the state that an earlier batch left ends.
    pub base_died: Generation,
    /// States that began and ended in this batch: born, died.
    pub past: Vec<(Generation, Generation, NodeRow)>,
    /// The newest state and its birth; `None`: the node is gone.
    pub current: Option<(Generation, NodeRow)>,
}

/// What a batch does to one name of a directory.
#[derive(Debug)]
pub(super) struct EntryDelta {
    /// The first change was an addition, so the name should be free in the database.
    pub added_first: bool,
    /// Where the entry that an earlier batch left ends.
    pub base_died: Generation,
    /// Entries that began and ended in this batch: node, born, died.
    pub past: Vec<(NodeId, Generation, Generation)>,
    /// The newest entry and its birth; `None`: the name is free.
    pub current: Option<(NodeId, Generation)>,
}

impl Batch {
    /// An empty batch.
    pub fn new(generation: Generation, next: NextIds) -> Batch {
        Batch {
            first_newborn: next.node,
            last: generation,
            next,
            count: 0,
            ticks: Vec::new(),
            acts: Acts::default(),
            nodes: HashMap::new(),
            entries: HashMap::new(),
            named: HashMap::new(),
            symlinks: BTreeMap::new(),
            contents: BTreeMap::new(),
            preserved: Vec::new(),
            undo: Vec::new(),
            digests: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            snapshots: Vec::new(),
            meta: BTreeMap::new(),
            late: Vec::new(),
        }
    }

    /// Takes one change of generation `at`. States born at or before `frozen` are not folded away.
    pub fn apply(&mut self, change: Change, at: Generation, frozen: Generation) {
        self.count += 1;
        match change {
            Change::NodePut(row) => self.put_node(row, at, at, frozen),
            Change::NodeUnversioned(row) => self.put_node(row, NEVER, at, frozen),
            Change::NodeGone(id) => self.end_node(id, at),
            Change::EntryAdd { parent, name, node } => {
                self.fold_first_name(node, at, frozen);
                self.named.entry(node).or_default().push((parent, name.clone()));
                self.set_entry(parent, name, Some((node, at)), at);
            }
            Change::EntryUnversioned { parent, name, node } => {
                self.named.entry(node).or_default().push((parent, name.clone()));
                self.set_entry(parent, name, Some((node, NEVER)), at);
            }
            Change::EntryRemove { parent, name } => self.set_entry(parent, name, None, at),
            Change::SymlinkTarget { node, target } => {
                self.symlinks.insert(node, target);
            }
            Change::ContentAdd { id, node, size } => {
                self.contents.insert(id, (node, size));
            }
            Change::ContentPreserved { id, cloned } => self.preserved.push((id, cloned)),
            Change::UndoAdd(row) => self.undo.push(row),
            Change::DigestAdd { content, digest } => {
                self.digests.insert(content, digest);
            }
            Change::XattrSetAdd { id, set } => {
                self.xattrs.insert(id, set);
            }
            Change::SnapshotPut(snapshot) => self.snapshots.push(SnapshotChange::Put(snapshot)),
            Change::SnapshotRemove(id) => self.snapshots.push(SnapshotChange::Remove(id)),
            Change::MetaPut { key, value } => {
                self.meta.insert(key, value);
            }
            Change::Pack(change) => self.late.push(Late::Pack(change)),
            Change::Forget(change) => self.late.push(Late::Forget(change)),
        }
    }

    /// Enters a state of generation `at`, which history shows from `born` on.
    fn put_node(&mut self, row: NodeRow, born: Generation, at: Generation, frozen: Generation) {
        let newborn = row.id.0 >= self.first_newborn;
        let delta = self.nodes.entry(row.id).or_insert_with(|| NodeDelta {
            newborn,
            base_died: at,
            past: Vec::new(),
            current: None,
        });
        let Some((old_born, old)) = delta.current.take() else {
            delta.current = Some((born, row));
            return;
        };
        // A file that was created, written and closed in one burst has one state: the empty one in
        // between was seen by nobody. It is the work of whoever wrote it.
        let first_and_empty =
            old.content == ContentId::EMPTY && delta.newborn && delta.past.is_empty();
        let written = old.content != row.content;
        let folds = if written { first_and_empty } else { self.acts.may_fold(old_born) };
        let unseen = old_born > frozen && folds;
        if born == NEVER || old_born >= at {
            // What was never shown leaves nothing behind.
            if old_born < at {
                delta.past.push((old_born, at, old));
            }
            delta.current = Some((born, row));
        } else if unseen {
            if written {
                self.acts.take_over(old_born);
            }
            delta.current = Some((old_born, row));
        } else {
            delta.past.push((old_born, at, old));
            delta.current = Some((born, row));
        }
    }

    fn end_node(&mut self, id: NodeId, at: Generation) {
        let newborn = id.0 >= self.first_newborn;
        let delta = self.nodes.entry(id).or_insert_with(|| NodeDelta {
            newborn,
            base_died: at,
            past: Vec::new(),
            current: None,
        });
        if let Some((born, old)) = delta.current.take()
            && born < at
        {
            delta.past.push((born, at, old));
        }
    }

    /// Gives a name its node and the entry's birth, or frees it.
    fn set_entry(
        &mut self,
        parent: NodeId,
        name: EntryName,
        to: Option<(NodeId, Generation)>,
        at: Generation,
    ) {
        let delta = self.entries.entry(parent).or_default().entry(name).or_insert(EntryDelta {
            added_first: to.is_some(),
            base_died: at,
            past: Vec::new(),
            current: None,
        });
        if let Some((old, born)) = delta.current.take()
            && born < at
        {
            delta.past.push((old, born, at));
        }
        delta.current = to;
    }

    /// A file that gets another name in the burst in which it came into being, as editors and
    /// `rsync` save, never had the first one: nobody saw it.
    fn fold_first_name(&mut self, node: NodeId, at: Generation, frozen: Generation) {
        // Not a directory's: what was made in it meanwhile had a path by that name.
        let is_file = |delta: &NodeDelta| {
            delta.current.as_ref().is_some_and(|(_, row)| row.kind != Kind::Dir)
        };
        let newborn = self.nodes.get(&node).is_some_and(|delta| delta.newborn && is_file(delta));
        let Some([(parent, name)]) = self.named.get(&node).map(Vec::as_slice) else { return };
        let entry = self.entries.get_mut(parent).and_then(|names| names.get_mut(name));
        let Some(delta) = entry.filter(|_| newborn) else { return };
        if let Some(&(last, born, died)) = delta.past.last()
            && (last, died) == (node, at)
            && born > frozen
            && self.acts.may_fold(born)
        {
            delta.past.pop();
        }
    }

    /// What this batch says of a name: `None` nothing, `Some(None)` that it is free.
    pub fn entry(&self, parent: NodeId, name: &EntryName) -> Option<Option<NodeId>> {
        let delta = self.entries.get(&parent)?.get(name)?;
        Some(delta.current.map(|(node, _)| node))
    }

    /// What this batch says of a node: `None` nothing, `Some(None)` that it is gone.
    pub fn node(&self, id: NodeId) -> Option<Option<&NodeRow>> {
        Some(self.nodes.get(&id)?.current.as_ref().map(|(_, row)| row))
    }

    /// The changes in the order of their keys, as the commit writes them, and their hash.
    pub fn plan(&self) -> Plan<'_> {
        let mut nodes: Vec<_> = self.nodes.iter().map(|(&id, delta)| (id, delta)).collect();
        nodes.sort_unstable_by_key(|&(id, _)| id);
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .flat_map(|(&parent, names)| {
                names.iter().map(move |(name, delta)| (parent, name, delta))
            })
            .collect();
        entries.sort_unstable_by_key(|&(parent, name, _)| (parent, name));
        let mut plan = Plan { batch: self, nodes, entries, digest: [0; 32] };
        plan.digest = digest(&plan);
        plan
    }
}

/// A batch in a fixed order.
pub(super) struct Plan<'a> {
    pub batch: &'a Batch,
    pub nodes: Vec<(NodeId, &'a NodeDelta)>,
    pub entries: Vec<(NodeId, &'a EntryName, &'a EntryDelta)>,
    /// Hash of all of it.
    pub digest: [u8; 32],
}

/// Hashes a batch: each part with its tag and each variable part with its length, so that no two
/// different batches have the same bytes.
fn digest(plan: &Plan<'_>) -> [u8; 32] {
    let batch = plan.batch;
    let mut out = Bytes(Vec::with_capacity(64 + batch.count * 96));
    out.numbers(&[batch.last.0, batch.next.node, batch.next.content, batch.next.snapshot]);
    out.numbers(&[batch.next.xattrs, batch.next.chunk, batch.next.pack]);
    out.numbers(&[batch.ticks.len() as u64]);
    for &(at, time) in &batch.ticks {
        out.numbers(&[at.0, time as u64]);
    }
    batch.acts.digest(&mut out);
    for &(id, delta) in &plan.nodes {
        out.numbers(&[1, id.0, delta.newborn.into(), delta.base_died.0, delta.past.len() as u64]);
        for (born, died, row) in &delta.past {
            out.numbers(&[born.0, died.0]);
            out.node(row);
        }
        out.numbers(&[delta.current.is_some().into()]);
        if let Some((born, row)) = &delta.current {
            out.numbers(&[born.0]);
            out.node(row);
        }
    }
    for &(parent, name, delta) in &plan.entries {
        out.numbers(&[2, parent.0, delta.base_died.0, delta.past.len() as u64]);
        out.blob(name.as_bytes());
        for &(node, born, died) in &delta.past {
            out.numbers(&[node.0, born.0, died.0]);
        }
        let (node, born) = delta.current.unwrap_or_default();
        out.numbers(&[node.0, born.0]);
    }
    digest_rest(batch, &mut out);
    *blake3::hash(&out.0).as_bytes()
}

fn digest_rest(batch: &Batch, out: &mut Bytes) {
    for (node, target) in &batch.symlinks {
        out.numbers(&[3, node.0]);
        out.blob(target);
    }
    for (id, (node, size)) in &batch.contents {
        out.numbers(&[4, id.0, node.0, *size]);
    }
    for (id, cloned) in &batch.preserved {
        out.numbers(&[5, id.0, (*cloned).into()]);
    }
    for row in &batch.undo {
        out.numbers(&[6]);
        out.undo(row);
    }
    for (content, digest) in &batch.digests {
        out.numbers(&[11, content.0]);
        out.blob(digest);
    }
    for (id, set) in &batch.xattrs {
        out.numbers(&[7, id.0]);
        out.blob(&super::xattr::encode(set));
    }
    for change in &batch.snapshots {
        match change {
            SnapshotChange::Put(snapshot) => {
                let flags = u64::from(snapshot.automatic) | u64::from(snapshot.held) << 1;
                out.numbers(&[8, snapshot.id.0, snapshot.generation.0, flags]);
                out.numbers(&[snapshot.time.secs as u64, snapshot.time.nanos.into()]);
                out.blob(snapshot.name.as_bytes());
                snapshot.tags.iter().for_each(|tag| out.blob(tag.as_bytes()));
            }
            SnapshotChange::Remove(id) => out.numbers(&[9, id.0]),
        }
    }
    for (key, value) in &batch.meta {
        out.numbers(&[10]);
        out.blob(key.as_bytes());
        out.blob(value.as_bytes());
    }
    for late in &batch.late {
        match late {
            Late::Pack(change) => super::packed::digest(change, out),
            Late::Forget(change) => super::retain::digest(change, out),
        }
    }
}

/// What is hashed.
pub(super) struct Bytes(Vec<u8>);

impl Bytes {
    pub fn numbers(&mut self, numbers: &[u64]) {
        numbers.iter().for_each(|number| self.0.extend(number.to_le_bytes()));
    }

    pub fn blob(&mut self, blob: &[u8]) {
        self.numbers(&[blob.len() as u64]);
        self.0.extend(blob);
    }

    pub fn undo(&mut self, row: &UndoRow) {
        let (kind, file, offset) = match row.at {
            None => (0, 0, 0),
            Some(UndoPlace { file: UndoFile::Segment(number), offset }) => (1, number, offset),
            Some(UndoPlace { file: UndoFile::Stream(id), offset }) => (2, id.0, offset),
        };
        self.numbers(&[row.node.0, row.content.0, row.offset, row.length, kind, file, offset]);
    }

    fn node(&mut self, row: &NodeRow) {
        self.numbers(&[row.kind.mode_bits().into(), row.mode.into(), row.uid.into()]);
        self.numbers(&[row.gid.into(), row.rdev, row.size, row.blocks]);
        for time in [row.mtime, row.ctime, row.btime] {
            self.numbers(&[time.secs as u64, time.nanos.into()]);
        }
        self.numbers(&[row.xattrs.0, row.content.0]);
    }
}

//! The catalog: what every path was at every moment.
//!
//! One SQLite database, the same on every replica. Changes are pushed in the order of history, each
//! push gets the next [`Generation`], and a committer thread writes them in batches to every replica's
//! database. What is pushed but not yet committed is held in an overlay, so that queries of the live tree
//! see it at once; queries of the past wait for the commit of the generation that they ask for.
//!
//! **Bursts.** While the batch that holds a node's newest state is still open, a newer state of the same
//! node with the same content replaces it and keeps its `born`: nobody has seen the one in between, for
//! whoever looks at a generation first closes the batch ([`Catalog::freeze`]).
//!
//! The catalog never touches live files, preserved files or packs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::types::{
    ContentId, EntryName, Generation, Kind, NodeId, RelPath, ReplicaId, ReplicaMap, SnapshotId,
    Timestamp, XattrSetId, Xattrs,
};

/// One state of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    /// Which node.
    pub id: NodeId,
    /// What it is; never changes.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number (`makedev` form) of a device node, else 0.
    pub rdev: u64,
    /// Bytes of the content; the target's length for a symlink; 0 for a directory.
    pub size: u64,
    /// Allocated blocks of 512 bytes at that moment.
    pub blocks: u64,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of attributes.
    pub ctime: Timestamp,
    /// Birth, zero where unknown.
    pub btime: Timestamp,
    /// Extended attributes.
    pub xattrs: XattrSetId,
    /// A file's content.
    pub content: ContentId,
}

/// One change of the store. Pushed in groups that become visible and durable together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node has a new state, or is born with it.
    NodePut(NodeRow),
    /// A node's last name is gone.
    NodeGone(NodeId),
    /// A directory has a new entry. The name is free.
    EntryAdd { parent: NodeId, name: EntryName, node: NodeId },
    /// A directory lost an entry.
    EntryRemove { parent: NodeId, name: EntryName },
    /// A symlink's target, pushed with its birth.
    SymlinkTarget { node: NodeId, target: Vec<u8> },
    /// A content was sealed. Pushed with the `NodePut` that first shows it.
    ContentAdd { id: ContentId, node: NodeId, size: u64 },
    /// The bytes of a content lie whole in `preserved/` under its id.
    ContentPreserved { id: ContentId },
    /// A before-image: bytes of `content` that the live file no longer has.
    UndoAdd(UndoRow),
    /// A set of extended attributes got its id.
    XattrSetAdd { id: XattrSetId, set: Arc<Xattrs> },
    /// A snapshot was made, or renamed, held, released (same id).
    SnapshotPut(Snapshot),
    /// A snapshot was forgotten.
    SnapshotRemove(SnapshotId),
    /// A setting of the store, by name.
    MetaPut { key: &'static str, value: String },
}

/// A before-image of a byte range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndoRow {
    /// Whose bytes.
    pub node: NodeId,
    /// The content that had them.
    pub content: ContentId,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// Where the bytes are; `None` for a hole (all zero).
    pub at: Option<UndoPlace>,
}

/// A place in the undo segments, the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoPlace {
    /// Number of the segment file.
    pub segment: u64,
    /// First byte of the data in it.
    pub offset: u64,
}

/// A named generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name: an [`EntryName`] that is valid UTF-8 and does not begin with a dot or '@'.
    pub name: String,
    /// The moment it shows.
    pub generation: Generation,
    /// The wall-clock time of that moment.
    pub time: Timestamp,
    /// Made by a schedule, not by a person.
    pub automatic: bool,
    /// Cannot be deleted while held.
    pub held: bool,
}

/// What a catalog file says of itself, read without joining the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The store it belongs to.
    pub store: uuid::Uuid,
    /// How many batches were committed.
    pub sequence: u64,
    /// Hash over all batches: equal sequence and chain mean equal catalogs.
    pub chain: [u8; 32],
    /// The newest generation in it.
    pub generation: Generation,
}

/// How sure a commit must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives the death of the process.
    Written,
    /// Survives a power cut: on stable storage of every attached replica.
    Durable,
}

/// An entry of a live or past directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: EntryName,
    /// What it names.
    pub node: NodeId,
    /// What that is.
    pub kind: Kind,
}

/// One state of a node with the interval in which it was the node's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The state.
    pub row: NodeRow,
    /// First generation that shows it.
    pub born: Generation,
    /// First generation that no longer does; `None` while it is the newest.
    pub died: Option<Generation>,
    /// When it was born.
    pub time: Timestamp,
}

/// A name that a node had, or a node that a name meant, with its interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameInterval {
    /// The directory.
    pub parent: NodeId,
    /// The name in it.
    pub name: EntryName,
    /// The node.
    pub node: NodeId,
    /// First generation of it.
    pub born: Generation,
    /// First generation without it.
    pub died: Option<Generation>,
}

/// Where the bytes of a content are: the before-images of it and of later contents of the same node,
/// oldest content first, and the first whole content at or after it. For each byte the first place that
/// has it counts; what none has is in the live file.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Sources {
    /// Before-images, ordered by (content, offset); none later than `whole`.
    pub undo: Vec<UndoRow>,
    /// The first content at or after the asked one that lies whole in `preserved/`.
    pub whole: Option<ContentId>,
}

/// How a path differs between two generations (letters as `zfs diff`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffKind {
    /// `+`
    Added,
    /// `-`
    Removed,
    /// `M`
    Modified,
    /// `R`
    Renamed,
}

/// One difference between two generations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// How it differs.
    pub kind: DiffKind,
    /// What kind of node it is.
    pub node_kind: Kind,
    /// Its path: in the older tree for `Removed` and `Renamed`, else in the newer.
    pub path: RelPath,
    /// The newer path of a renamed one.
    pub to: Option<RelPath>,
}

/// Totals of the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Totals {
    /// Live nodes (files, directories and the rest).
    pub live_nodes: u64,
    /// Bytes of live regular files.
    pub live_bytes: u64,
    /// States of nodes that are not the newest, or whose node is gone.
    pub past_versions: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Bytes of before-images.
    pub undo_bytes: u64,
    /// Bytes of contents preserved whole.
    pub preserved_bytes: u64,
}

/// The catalog of a mounted store, or of an unmounted one opened for looking.
pub struct Catalog {
    _todo: (),
}

#[allow(unused_variables)]
impl Catalog {
    /// Reads the head of the catalog in `file` without changing anything.
    pub fn inspect(file: &Path) -> Result<Head> {
        todo!()
    }

    /// Makes an empty catalog in `file`: the root directory does not exist yet, generation 0.
    pub fn create(file: &Path, store: uuid::Uuid) -> Result<()> {
        todo!()
    }

    /// Replaces the catalog in `to` by a copy of the one in `from`; neither may be open. `to` is whole
    /// at every moment: the copy is written beside it, made durable and renamed.
    pub fn copy(from: &Path, to: &Path) -> Result<()> {
        todo!()
    }

    /// Opens the replicas' catalogs for a mount; `None` for a replica that has none. All must have
    /// the same [`Head`]. `clean` tells that the last mount ended with [`Catalog::close`]; otherwise
    /// ids that may have been handed out but never committed are skipped.
    pub fn open(files: ReplicaMap<Option<PathBuf>>, clean: bool) -> Result<Catalog> {
        todo!()
    }

    /// Opens one catalog for queries only, beside a mount or without one.
    pub fn open_read_only(file: &Path) -> Result<Catalog> {
        todo!()
    }

    /// Commits all, durably, and ends the committer. Later pushes fail.
    pub fn close(&self) -> Result<()> {
        todo!()
    }

    /// Stops writing to a replica's catalog: the replica is out of the store until it is resynced.
    pub fn detach(&self, replica: ReplicaId) {
        todo!()
    }

    // --- writing

    /// Appends one group of changes to history and gives it the next generation. Fails once a commit
    /// failed on every replica. Blocks while too much is waiting.
    pub fn push(&self, changes: Vec<Change>) -> Result<Generation> {
        todo!()
    }

    /// Ends the open burst: no later change is folded into a state that this generation shows.
    pub fn freeze(&self) -> Generation {
        todo!()
    }

    /// Commits all that was pushed, and waits.
    pub fn flush(&self, durability: Durability) -> Result<()> {
        todo!()
    }

    /// The newest generation.
    pub fn generation(&self) -> Generation {
        todo!()
    }

    /// A new node id.
    pub fn next_node(&self) -> NodeId {
        todo!()
    }

    /// A new content id, greater than all before it.
    pub fn next_content(&self) -> ContentId {
        todo!()
    }

    /// A new snapshot id.
    pub fn next_snapshot(&self) -> SnapshotId {
        todo!()
    }

    /// The id of a set of extended attributes; a new one is pushed.
    pub fn intern_xattrs(&self, set: &Xattrs) -> Result<XattrSetId> {
        todo!()
    }

    // --- the live tree: overlay first, then the database

    /// The node that `name` in `parent` means, and its kind.
    pub fn lookup(&self, parent: NodeId, name: &EntryName) -> Result<Option<(NodeId, Kind)>> {
        todo!()
    }

    /// A live node's newest state.
    pub fn node(&self, node: NodeId) -> Result<Option<NodeRow>> {
        todo!()
    }

    /// All entries of a live directory, ordered by name.
    pub fn list(&self, parent: NodeId) -> Result<Vec<Listed>> {
        todo!()
    }

    /// All live names of a node.
    pub fn names(&self, node: NodeId) -> Result<Vec<(NodeId, EntryName)>> {
        todo!()
    }

    // --- the past: what generation `at` shows; waits until it is committed

    /// The state of a node, if it lived then.
    pub fn node_at(&self, at: Generation, node: NodeId) -> Result<Option<NodeRow>> {
        todo!()
    }

    /// The state of what `name` in `parent` meant.
    pub fn lookup_at(
        &self,
        at: Generation,
        parent: NodeId,
        name: &EntryName,
    ) -> Result<Option<NodeRow>> {
        todo!()
    }

    /// The entries of a directory, ordered by name.
    pub fn list_at(&self, at: Generation, parent: NodeId) -> Result<Vec<Listed>> {
        todo!()
    }

    /// How many names a node had.
    pub fn links_at(&self, at: Generation, node: NodeId) -> Result<u32> {
        todo!()
    }

    /// One path of a node (the first by parent and name), root-relative; `None` if it had none.
    pub fn path_at(&self, at: Generation, node: NodeId) -> Result<Option<RelPath>> {
        todo!()
    }

    /// The state of what `path` meant, from the root.
    pub fn resolve_at(&self, at: Generation, path: &RelPath) -> Result<Option<NodeRow>> {
        todo!()
    }

    /// A symlink's target.
    pub fn symlink_target(&self, node: NodeId) -> Result<Option<Vec<u8>>> {
        todo!()
    }

    /// A set of extended attributes.
    pub fn xattrs(&self, id: XattrSetId) -> Result<Arc<Xattrs>> {
        todo!()
    }

    /// Where the bytes of `content` are.
    pub fn sources(&self, node: NodeId, content: ContentId) -> Result<Sources> {
        todo!()
    }

    /// The size of a sealed content.
    pub fn content_size(&self, content: ContentId) -> Result<Option<u64>> {
        todo!()
    }

    // --- time

    /// The newest generation at `time`; `None` before the store's first.
    pub fn generation_at(&self, time: Timestamp) -> Result<Option<Generation>> {
        todo!()
    }

    /// When a generation began, to about 10 ms.
    pub fn time_of(&self, generation: Generation) -> Result<Timestamp> {
        todo!()
    }

    /// The oldest generation whose tree is still known.
    pub fn oldest(&self) -> Result<Generation> {
        todo!()
    }

    // --- snapshots

    /// All snapshots, oldest first (by generation, then id).
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        todo!()
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, name: &str) -> Result<Option<Snapshot>> {
        todo!()
    }

    /// The newest snapshot.
    pub fn latest_snapshot(&self) -> Result<Option<Snapshot>> {
        todo!()
    }

    /// Names the generation `at`. `Refused` for a name that is taken or not allowed. Committed
    /// (`Written`) when it returns.
    pub fn create_snapshot(&self, name: &str, at: Generation, automatic: bool) -> Result<Snapshot> {
        todo!()
    }

    /// Forgets a snapshot. `NotFound` names the nearest names; `InUse` if it is held.
    pub fn delete_snapshot(&self, name: &str) -> Result<Snapshot> {
        todo!()
    }

    /// Renames a snapshot.
    pub fn rename_snapshot(&self, from: &str, to: &str) -> Result<Snapshot> {
        todo!()
    }

    /// Holds or releases a snapshot.
    pub fn hold_snapshot(&self, name: &str, held: bool) -> Result<Snapshot> {
        todo!()
    }

    // --- reports

    /// All states of a node, oldest first.
    pub fn versions(&self, node: NodeId) -> Result<Vec<Version>> {
        todo!()
    }

    /// All names that a node ever had, oldest first.
    pub fn name_history(&self, node: NodeId) -> Result<Vec<NameInterval>> {
        todo!()
    }

    /// All nodes that a name in a directory ever meant, oldest first.
    pub fn entry_history(&self, parent: NodeId, name: &EntryName) -> Result<Vec<NameInterval>> {
        todo!()
    }

    /// For each name that a directory had and has no more, its last interval, ordered by name.
    pub fn deleted(&self, parent: NodeId) -> Result<Vec<NameInterval>> {
        todo!()
    }

    /// The differences between the trees of two generations below `under`, ordered by path. Costs what
    /// changed between them, not the size of the trees.
    pub fn diff(
        &self,
        from: Generation,
        to: Generation,
        under: &RelPath,
    ) -> Result<Vec<Difference>> {
        todo!()
    }

    /// Totals for status.
    pub fn totals(&self) -> Result<Totals> {
        todo!()
    }

    /// A setting of the store.
    pub fn meta(&self, key: &str) -> Result<Option<String>> {
        todo!()
    }
}

//! The catalog: what every path was at every moment.
//!
//! One SQLite database, the same on every replica. Changes are pushed in the order of history, each
//! push gets the next [`Generation`], and a committer thread writes them in batches to every
//! replica's database. What is pushed but not yet committed is held in an overlay, so that queries
//! of the live tree see it at once; queries of the past wait for the commit of the generation that
//! they ask for.
//!
//! **Bursts.** While the batch that holds a node's newest state is still open, a newer state of the
//! same node with the same content replaces it and keeps its `born`: nobody has seen the one in
//! between, for whoever looks at a generation first closes the batch ([`Catalog::freeze`]).
//!
//! The catalog never touches live files, preserved files or packs.

mod apply;
mod commit;
mod diff;
mod live;
mod open;
mod overlay;
mod query;
mod reader;
mod report;
mod schema;
mod snapshot;
#[cfg(test)]
mod tests;
mod xattr;

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use self::commit::{Waiting, Writer};
use self::open::Ids;
use self::reader::Readers;
use self::xattr::Interned;
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
    #[allow(missing_docs)]
    EntryAdd { parent: NodeId, name: EntryName, node: NodeId },
    /// A directory lost an entry.
    #[allow(missing_docs)]
    EntryRemove { parent: NodeId, name: EntryName },
    /// A symlink's target, pushed with its birth.
    #[allow(missing_docs)]
    SymlinkTarget { node: NodeId, target: Vec<u8> },
    /// A content was sealed. Pushed with the `NodePut` that first shows it.
    #[allow(missing_docs)]
    ContentAdd { id: ContentId, node: NodeId, size: u64 },
    /// The bytes of a content lie whole in `preserved/` under its id.
    #[allow(missing_docs)]
    ContentPreserved { id: ContentId },
    /// A before-image: bytes of `content` that the live file no longer has.
    UndoAdd(UndoRow),
    /// A set of extended attributes got its id.
    #[allow(missing_docs)]
    XattrSetAdd { id: XattrSetId, set: Arc<Xattrs> },
    /// A snapshot was made, or renamed, held, released (same id).
    SnapshotPut(Snapshot),
    /// A snapshot was forgotten.
    SnapshotRemove(SnapshotId),
    /// A setting of the store, by name.
    #[allow(missing_docs)]
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

/// Where the bytes of a content are: the before-images of it and of later contents of the same
/// node, oldest content first, and the first whole content at or after it. For each byte the first
/// place that has it counts; what none has is in the live file.
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
    shared: Arc<Shared>,
    /// The committer; gone after [`Catalog::close`], and for a catalog opened for reading.
    committer: Mutex<Option<JoinHandle<()>>>,
}

/// What the handle and the committer share.
struct Shared {
    waiting: Waiting,
    /// The replicas' databases; `None` for one that is detached or has none.
    writers: Mutex<ReplicaMap<Option<Writer>>>,
    readers: Readers,
    ids: Ids,
    xattrs: Interned,
    /// Serializes the checks and changes of snapshot names.
    snapshots: Mutex<()>,
    /// Replicas that failed, and why.
    failures: Mutex<Vec<(ReplicaId, String)>>,
    read_only: bool,
    /// The wall clock.
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

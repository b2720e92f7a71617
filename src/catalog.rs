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
//! **Unversioned.** What is excluded from history is live all the same: its state and its entry are
//! born at [`NEVER`], a generation that no query of the past reaches, and leave nothing behind when
//! they end. An entry is versioned only while its node is.
//!
//! The catalog never touches live files, preserved files or packs.

mod actor;
mod apply;
mod attach;
mod audit;
mod commit;
mod copy;
mod database;
mod diff;
pub mod digest;
mod equal;
mod failure;
mod foreseen;
mod freed;
mod lane;
mod leb128;
mod live;
mod lost;
mod open;
mod overlay;
mod packed;
mod places;
mod query;
mod reader;
mod report;
mod retain;
mod schema;
mod scratch;
mod snapshot;
mod sums;
mod sweep;
#[cfg(test)]
pub(crate) mod tests;
mod touched;
mod trust;
mod unused;
mod wal;
mod xattr;

pub use self::actor::Actor;
pub use self::attach::{Comparing, Differing, Joining};
pub use self::audit::Audit;
pub use self::copy::Original;
pub use self::equal::TableHashes;
pub use self::failure::Failure;
pub use self::lost::{PastContent, PastName};
pub use self::packed::{PackRow, WaitingContent, Whereabouts};
pub use self::places::{LiveNode, VersionRecord};
pub use self::snapshot::SnapshotWatch;
pub use self::sweep::{Sweep, SweepPlace, SweepStep};
pub use self::unused::Unused;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use self::commit::{Waiting, Writer};
use self::open::Ids;
use self::reader::Readers;
use self::xattr::Interned;
use crate::types::{
    ChunkId, ContentId, EntryName, Generation, Kind, NodeId, PackId, RelPath, ReplicaId,
    ReplicaMap, SnapshotId, Timestamp, XattrSetId, Xattrs,
};

/// The birth of what history does not show: beyond all generations.
const NEVER: Generation = Generation(1 << 62);

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
    /// A node has a new state that history does not show. The one before it ends.
    NodeUnversioned(NodeRow),
    /// A node's last name is gone.
    NodeGone(NodeId),
    /// A directory has a new entry. The name is free.
    #[allow(missing_docs)]
    EntryAdd { parent: NodeId, name: EntryName, node: NodeId },
    /// A directory has a new entry that history does not show. The name is free.
    #[allow(missing_docs)]
    EntryUnversioned { parent: NodeId, name: EntryName, node: NodeId },
    /// A directory lost an entry.
    #[allow(missing_docs)]
    EntryRemove { parent: NodeId, name: EntryName },
    /// A symlink's target, pushed with its birth.
    #[allow(missing_docs)]
    SymlinkTarget { node: NodeId, target: Vec<u8> },
    /// A content was sealed. Pushed with the `NodePut` that first shows it.
    #[allow(missing_docs)]
    ContentAdd { id: ContentId, node: NodeId, size: u64 },
    /// The bytes of a content lie whole in `preserved/` under its id; as a clone they share their
    /// blocks with the live file.
    #[allow(missing_docs)]
    ContentPreserved { id: ContentId, cloned: bool },
    /// A before-image: bytes of `content` that the live file no longer has.
    UndoAdd(UndoRow),
    /// A content's bytes have this digest.
    #[allow(missing_docs)]
    DigestAdd { content: ContentId, digest: digest::Digest },
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
    /// What is preserved came to lie elsewhere.
    Pack(PackChange),
    /// A part of history is over.
    Forget(ForgetChange),
}

/// Moves of preserved bytes between their places. No version changes by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackChange {
    /// A pack lies durably on every replica.
    #[allow(missing_docs)]
    PackAdd { id: PackId, bytes: u64, hash: [u8; 32] },
    /// A pack is of no use any more: no chunk in it is in a recipe.
    PackRemove(PackId),
    /// A pack holds a new chunk.
    ChunkAdd(ChunkRow),
    /// A chunk was copied to another pack.
    #[allow(missing_docs)]
    ChunkMove { id: ChunkId, place: ChunkPlace, stored: u32 },
    /// The chunks, with their lengths, that make up a packed content or stream of before-images.
    #[allow(missing_docs)]
    RecipeAdd { id: ContentId, chunks: Vec<(ChunkId, u32)> },
    /// The bytes of a content are in the recipe of its id; its preserved file is of no use any
    /// more.
    ContentPacked(ContentId),
    /// A content has the same bytes as another one, on which it relies from now on.
    #[allow(missing_docs)]
    ContentSame { id: ContentId, to: ContentId },
    /// A before-image lies in the recipe `stream` from byte `at` on.
    #[allow(missing_docs)]
    UndoMove { node: NodeId, content: ContentId, offset: u64, stream: ContentId, at: u64 },
}

/// What retention takes out of history. Nothing of it is shown by a generation that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForgetChange {
    /// A past state of a node.
    #[allow(missing_docs)]
    State { node: NodeId, died: Generation },
    /// A past entry of a directory.
    #[allow(missing_docs)]
    Entry { parent: NodeId, name: EntryName, born: Generation, died: Generation },
    /// A content that no state has and no other content relies on.
    Content(ContentId),
    /// A before-image that no content needs. A packed stream goes with its last one.
    #[allow(missing_docs)]
    Undo { node: NodeId, content: ContentId, offset: u64 },
    /// A before-image that an older content of the node needs: it is that one's from now on.
    UndoPut(UndoRow),
    /// A recipe.
    Recipe(ContentId),
    /// The end of a recipe that nobody reads any more.
    #[allow(missing_docs)]
    RecipeCut { id: ContentId, keep: usize },
    /// The target of a symlink that history does not know any more.
    Symlink(NodeId),
    /// A generation below the horizon stays visible.
    MomentPut(Generation),
    /// A generation below the horizon is visible no more, unless a snapshot shows it.
    MomentRemove(Generation),
    /// From here on every generation is visible.
    Horizon(Generation),
    /// Between these two visible generations none is visible any more: what only those showed is
    /// to be swept out.
    #[allow(missing_docs)]
    SweepAdd { after: Generation, until: Generation },
    /// The sweep of a gap has come from here to there.
    #[allow(missing_docs)]
    SweepAt { after: Generation, until: Generation, from: SweepPlace, at: SweepPlace },
    /// A gap is swept, from here on at once.
    #[allow(missing_docs)]
    SweepEnd { after: Generation, until: Generation, from: SweepPlace },
    /// No row of this node begins or ends there any more.
    #[allow(missing_docs)]
    Untouched { node: NodeId, at: Generation },
    /// A row of this node begins or ends there, which was known by its batch only.
    #[allow(missing_docs)]
    Touched { node: NodeId, at: Generation },
    /// The time of a generation in whose interval nothing begins or ends any more.
    Tick(Generation),
    /// Likewise, who made it.
    Act(Generation),
    /// An actor who made nothing that is known.
    Actor(u64),
    /// A set of extended attributes that no state has.
    XattrSet(XattrSetId),
    /// A path was removed from all of history on request.
    Purged(PurgeRow),
}

/// The record of a purge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgeRow {
    /// When.
    pub time: Timestamp,
    /// Which path, from the root.
    pub path: RelPath,
    /// How many versions went.
    pub versions: u64,
    /// How many bytes they had.
    pub bytes: u64,
}

/// Where a chunk lies, the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The pack.
    pub pack: PackId,
    /// Where its frame begins in the pack file.
    pub frame: u64,
    /// Where it begins in the decoded frame.
    pub at: u32,
}

/// A stored chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// Its id.
    pub id: ChunkId,
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// Where it lies.
    pub place: ChunkPlace,
    /// Its bytes.
    pub length: u32,
    /// Its share of the pack's bytes.
    pub stored: u32,
}

/// The chunks that make up a packed content, or a packed stream of before-images, in order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Recipe {
    /// The chunks.
    pub chunks: Vec<ChunkRow>,
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

/// A place of before-images, the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoPlace {
    /// The file.
    pub file: UndoFile,
    /// First byte of the data in it.
    pub offset: u64,
}

impl UndoPlace {
    /// The place `bytes` further on.
    pub fn further(self, bytes: u64) -> UndoPlace {
        UndoPlace { offset: self.offset + bytes, ..self }
    }
}

/// What holds before-images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UndoFile {
    /// An undo segment, by its number.
    Segment(u64),
    /// A packed stream, by its recipe.
    Stream(ContentId),
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
    /// Words by which retention may know it: without commas and control characters.
    pub tags: Vec<String>,
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
/// node, oldest content first, up to the first content that lies somewhere as a whole. If that one
/// has the bytes of another content, the sources of that one follow. For each byte the first place
/// that has it counts; what none has is in the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Before-images, those that count first before others.
    pub undo: Vec<UndoRow>,
    /// What has all bytes that no before-image has.
    pub base: Base,
}

impl Sources {
    /// Whether all bytes lie somewhere in history: none in a live file.
    pub fn is_whole(&self) -> bool {
        !matches!(self.base, Base::Live(_))
    }

    /// Whether any byte lies in history.
    pub fn is_preserved(&self) -> bool {
        self.is_whole() || !self.undo.is_empty()
    }

    /// Whether before-images alone have all bytes from `from` until `to`.
    pub fn covers(&self, from: u64, to: u64) -> bool {
        let mut ranges: Vec<(u64, u64)> =
            self.undo.iter().map(|row| (row.offset, row.offset + row.length)).collect();
        ranges.sort_unstable();
        let mut end = from;
        for (begin, until) in ranges {
            if begin > end {
                break;
            }
            end = end.max(until);
        }
        end >= to
    }
}

/// What holds the bytes of a content that no before-image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The live file of this node.
    Live(NodeId),
    /// A file in `preserved/`.
    #[allow(missing_docs)]
    Preserved { node: NodeId, content: ContentId },
    /// The recipe of this id.
    Packed(ContentId),
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
    /// Bytes of contents preserved whole that were not packed yet.
    pub preserved_bytes: u64,
    /// Bytes of contents preserved as clones of the live files, whose blocks they share as long as
    /// those do not change.
    pub cloned_bytes: u64,
    /// Bytes of packs.
    pub packed_bytes: u64,
}

impl Totals {
    /// Bytes that history takes on each replica, the catalog and clones not counted.
    pub fn history_bytes(&self) -> u64 {
        self.undo_bytes + self.preserved_bytes + self.packed_bytes
    }

    /// Bytes of contents that lie whole in files of their own.
    pub fn whole_bytes(&self) -> u64 {
        self.preserved_bytes + self.cloned_bytes
    }
}

/// The catalog of a mounted store, or of an unmounted one opened for looking.
pub struct Catalog {
    shared: Arc<Shared>,
    /// The committer; gone after [`Catalog::close`], and for a catalog opened for reading.
    committer: Mutex<Option<JoinHandle<()>>>,
    /// See [`Catalog::open_held`]. Nobody uses it; closed after all other connections.
    held: Option<Mutex<database::Db>>,
}

/// What the handle and the committer share.
struct Shared {
    waiting: Waiting,
    /// The replicas' databases; `None` for one that is detached or has none.
    writers: Mutex<ReplicaMap<Option<Writer>>>,
    lanes: lane::Lanes,
    /// What copies WALs into the databases. Taken after `writers`.
    copies: Mutex<wal::Copies>,
    /// What is committed while a copy for a replica that joins is made. A leaf lock.
    kept: Mutex<Option<attach::Kept>>,
    readers: Readers,
    ids: Ids,
    xattrs: Interned,
    foreseen: foreseen::Foreseen,
    /// Serializes the checks and changes of snapshot names.
    snapshots: Mutex<()>,
    /// Replicas that failed, and why.
    failures: Mutex<Vec<(ReplicaId, Failure)>>,
    /// The heads of the catalogs that were closed.
    ended: Mutex<ReplicaMap<Option<Head>>>,
    read_only: bool,
    /// Counts changes of what is visible of history, and of where it lies.
    epoch: AtomicU64,
    /// Counts changes of the snapshots.
    snapshot_changes: AtomicU64,
    /// All snapshots, as of a count of their changes.
    snapshot_list: Mutex<Option<(u64, Arc<Vec<Snapshot>>)>>,
    snapshot_watch: OnceLock<SnapshotWatch>,
    /// The wall clock.
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

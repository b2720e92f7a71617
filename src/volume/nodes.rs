//! The table of the live nodes that somebody uses: the kernel, an open file, a running operation.
//!
//! A node knows one of its names, by which all replicas reach it; the path above follows from its
//! parents. A node that nobody uses is dropped and loaded again from the catalog when needed. The
//! kernel, with much memory, knows millions for hours after a walk through a large tree: of those
//! that were not used for a while no more is kept than how often it was told of them.
//!
//! Locks: `Node::state` protects everything about one node, its content included, and is held
//! across an operation on it. The order among all locks is in `locks.rs`.

pub mod replaced;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};

use crate::catalog::{Actor, Catalog, NodeRow};
use crate::error::{Error, Result};
use crate::history::ranges::{ByteRange, RangeSet};
use crate::replica::Handles;
use crate::replica::backing::Stat;
use crate::types::{EntryName, Kind, NodeId, RelPath};
use replaced::Replaced;
use rustix::io::Errno;

use super::deferred::Slot;

/// Shards of the table: more than threads, so that they rarely meet.
const SHARDS: usize = 64;
/// More nodes than this are kept only if they were used lately; each takes some 200 bytes.
const NODES_MAX: usize = 64 << 10;
/// A shorter run tells nothing: a database changes a few neighbouring pages as well.
const RUN_BYTES_MIN: u64 = 256 << 10;
/// The most that is preserved ahead of a write, which waits for it.
const AHEAD_BYTES_MAX: u64 = 8 << 20;
/// No path is deeper; a longer walk means that the catalog's entries form a circle.
pub(super) const DEPTH_MAX: usize = 4096;

/// One live node in use.
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// What it is.
    pub kind: Kind,
    /// How many lookups the kernel has not forgotten yet.
    lookups: AtomicU64,
    /// A leaf lock: nothing but the catalog is asked under it.
    place: Mutex<Place>,
    state: Mutex<State>,
    /// Its mode has neither setuid nor setgid that a write would have to take away. Cleared, under
    /// the lock of the state, before it may get one.
    unprivileged: AtomicBool,
    /// When it was sealed last, while it waits for a digest.
    pub(super) undigested: Mutex<Option<Instant>>,
    /// It was asked for since the last [`Nodes::sweep`].
    used: AtomicBool,
    /// What was written to it and is not carried out yet; of a file that is open for writing.
    pub(super) deferred: Slot,
}

/// By which name a node is reached.
enum Place {
    /// Not looked up yet.
    Unknown,
    /// This one, of all that it may have.
    At(NodeId, EntryName),
    /// None: it is the root, or its last name is gone.
    Nowhere,
}

/// What changes about a node.
pub struct State {
    /// Its last name is gone; only its open handles reach it.
    pub orphan: bool,
    /// An orphan's attributes, for when no handle is open.
    pub ghost: Option<Box<Stat>>,
    /// How a file is open.
    pub open: Option<Box<Open>>,
    /// Changes whenever the before-images of the node's contents do. Never repeats for one node.
    pub stamp: u64,
}

/// A file that is open, or changed and not sealed yet.
pub struct Open {
    /// Handles for reading and writing on every online replica.
    pub write: Option<Arc<Handles>>,
    /// A handle for reading on the replica that was primary, while nobody writes.
    pub read: Option<Arc<Handles>>,
    /// How many opens there are.
    pub opens: u32,
    /// How many of them may write.
    pub writers: u32,
    /// What the catalog knows, with the sealed content.
    pub sealed: NodeRow,
    /// Bytes of the sealed content that are preserved already.
    pub saved: RangeSet,
    /// Whether it is being overwritten from one end to the other.
    pub run: Run,
    /// What went wrong with that.
    pub failed: Option<Errno>,
    /// The content or the attributes changed since the seal.
    pub dirty: bool,
    /// The content did.
    pub written: bool,
    /// The last change of the content was to empty it.
    pub emptied: bool,
    /// Extended attributes were set or removed since the seal.
    pub attributed: bool,
    /// When it was changed last.
    pub touched: Instant,
    /// Who changed it last, or opened it to do so.
    pub by: Option<Changer>,
}

/// Bytes that were preserved one after another.
#[derive(Default)]
pub struct Run {
    end: u64,
    bytes: u64,
}

impl Run {
    /// A range is preserved. Tells what is likely to be overwritten next: as much as was in a row
    /// before it, so that at most as much as was needed is in vain.
    pub fn took(&mut self, range: ByteRange) -> Option<ByteRange> {
        if self.end != range.start {
            self.bytes = 0;
        }
        let ahead = self.bytes.min(AHEAD_BYTES_MAX);
        self.bytes += range.len();
        self.end = range.end;
        (ahead >= RUN_BYTES_MIN).then(|| ByteRange::new(self.end, ahead))
    }
}

/// Who changed a file: the request's word, and what was found out about it.
pub struct Changer {
    /// The thread that asked.
    pub thread: u32,
    /// As which user.
    pub uid: u32,
    /// Its process then.
    pub actor: Option<Actor>,
}

impl Open {
    /// A file as the catalog knows it, with no handles yet.
    pub fn new(sealed: NodeRow) -> Open {
        Open {
            write: None,
            read: None,
            opens: 0,
            writers: 0,
            sealed,
            saved: RangeSet::default(),
            run: Run::default(),
            failed: None,
            dirty: false,
            written: false,
            emptied: false,
            attributed: false,
            touched: Instant::now(),
            by: None,
        }
    }

    /// Any handles by which the file can be read.
    pub fn any(&self) -> Option<&Arc<Handles>> {
        self.write.as_ref().or(self.read.as_ref())
    }
}

impl Node {
    /// Locks the node with writes to it that may be deferred: operations lock it by
    /// [`Volume::lock`](super::Volume::lock).
    pub fn lock_as_is(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Locks the node unless an operation has it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    /// Whether a write has no privileges to take away, as far as is known.
    pub fn is_unprivileged(&self) -> bool {
        self.unprivileged.load(Ordering::Relaxed)
    }

    /// Notes that, or that it is not known any more.
    pub fn set_unprivileged(&self, known: bool) {
        self.unprivileged.store(known, Ordering::Relaxed);
    }

    /// With the lookups that were kept of it while it was not in the table.
    fn knowing(self, quiet: &mut HashMap<NodeId, u64>) -> Arc<Node> {
        self.lookups.store(quiet.remove(&self.id).unwrap_or(0), Ordering::Relaxed);
        Arc::new(self)
    }

    /// Counts one more lookup by the kernel. The caller holds an `Arc` of the node.
    pub fn looked_up(&self) {
        self.lookups.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the kernel knows the node.
    pub fn is_known(&self) -> bool {
        self.lookups.load(Ordering::Relaxed) > 0
    }

    /// A directory and a name in it by which the node is reached; `None` for the root and for a
    /// node whose last name is gone.
    pub fn place(&self, catalog: &Catalog) -> Result<Option<(NodeId, EntryName)>> {
        let mut place = self.place.lock();
        if let Place::Unknown = *place {
            *place = match catalog.names(self.id)?.into_iter().next() {
                Some((parent, name)) => Place::At(parent, name),
                None => Place::Nowhere,
            };
        }
        Ok(match &*place {
            Place::At(parent, name) => Some((*parent, name.clone())),
            Place::Unknown | Place::Nowhere => None,
        })
    }

    /// The node has a new name instead of the one it was reached by.
    pub fn moved(&self, parent: NodeId, name: &EntryName) {
        *self.place.lock() = Place::At(parent, name.clone());
    }

    /// The name is gone; if the node was reached by it, another is looked for when needed.
    pub fn lost_name(&self, parent: NodeId, name: &EntryName, last: bool) {
        let mut place = self.place.lock();
        if last {
            *place = Place::Nowhere;
        } else if matches!(&*place, Place::At(at, own) if *at == parent && own == name) {
            *place = Place::Unknown;
        }
    }
}

/// A part of the table.
#[derive(Default)]
struct Shard {
    nodes: HashMap<NodeId, Arc<Node>>,
    /// What the kernel knows and has not used for a while: how many lookups it has not forgotten
    /// yet. None of these is among the nodes.
    quiet: HashMap<NodeId, u64>,
}

/// The nodes in use.
pub struct Nodes {
    shards: Vec<Mutex<Shard>>,
    stamps: AtomicU64,
    /// Nodes that were in use when the kernel forgot them, to be looked at again.
    lingering: Mutex<Vec<NodeId>>,
    /// Files that took the name of another.
    pub replaced: Replaced,
    /// Files that were emptied: another one took their place.
    pub emptied: Replaced,
    /// One makes durable at a time that they were. Held while nothing else is waited for.
    pub settling: Mutex<()>,
}

impl Nodes {
    /// The table with the root in it, which is never dropped.
    pub fn with_root() -> Nodes {
        let nodes = Nodes {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            stamps: AtomicU64::new(1),
            lingering: Mutex::default(),
            replaced: Replaced::default(),
            emptied: Replaced::default(),
            settling: Mutex::default(),
        };
        let root = Arc::new(nodes.make(NodeId::ROOT, Kind::Dir, Place::Nowhere));
        root.looked_up();
        nodes.shard(NodeId::ROOT).lock().nodes.insert(NodeId::ROOT, root);
        nodes
    }

    fn make(&self, id: NodeId, kind: Kind, place: Place) -> Node {
        Node {
            id,
            kind,
            lookups: AtomicU64::new(0),
            place: Mutex::new(place),
            state: Mutex::new(State {
                orphan: false,
                ghost: None,
                open: None,
                stamp: self.next_stamp(),
            }),
            unprivileged: AtomicBool::new(false),
            undigested: Mutex::default(),
            used: AtomicBool::new(true),
            deferred: Slot::default(),
        }
    }

    fn shard(&self, id: NodeId) -> &Mutex<Shard> {
        &self.shards[id.0 as usize % SHARDS]
    }

    /// A value that no [`State::stamp`] had before.
    pub fn next_stamp(&self) -> u64 {
        self.stamps.fetch_add(1, Ordering::Relaxed)
    }

    /// A node in use.
    pub fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        let node = self.shard(id).lock().nodes.get(&id).cloned()?;
        node.used.store(true, Ordering::Relaxed);
        Some(node)
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().nodes.len()).sum()
    }

    /// Enters a newborn node.
    pub fn insert(&self, id: NodeId, kind: Kind, parent: NodeId, name: &EntryName) -> Arc<Node> {
        let Shard { nodes, quiet } = &mut *self.shard(id).lock();
        let born = || self.make(id, kind, Place::At(parent, name.clone())).knowing(quiet);
        nodes.entry(id).or_insert_with(born).clone()
    }

    /// A live node, entered if it is not in use. Its name is looked up when first needed: a rename
    /// that comes before that finds the node in the table and tells it, so no old name is ever
    /// kept.
    pub fn load(&self, id: NodeId, kind: Kind) -> Arc<Node> {
        let Shard { nodes, quiet } = &mut *self.shard(id).lock();
        let loaded = || self.make(id, kind, Place::Unknown).knowing(quiet);
        let node = nodes.entry(id).or_insert_with(loaded);
        node.used.store(true, Ordering::Relaxed);
        node.clone()
    }

    /// The nodes that are open. Their locks are taken one after another.
    pub fn open_ones(&self) -> Vec<Arc<Node>> {
        let is_open =
            |node: &&Arc<Node>| node.kind == Kind::File && node.lock_as_is().open.is_some();
        let mut open = Vec::new();
        for shard in &self.shards {
            let all: Vec<Arc<Node>> = shard.lock().nodes.values().cloned().collect();
            open.extend(all.iter().filter(is_open).cloned());
        }
        open
    }

    /// Takes back `count` lookups and drops the node if nobody uses it any more.
    pub fn forget(&self, id: NodeId, count: u64) {
        if id == NodeId::ROOT {
            return;
        }
        {
            let Shard { nodes, quiet } = &mut *self.shard(id).lock();
            if let Some(node) = nodes.get(&id) {
                let less = |lookups: u64| Some(lookups.saturating_sub(count));
                let _ = node.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            } else if let Entry::Occupied(mut lookups) = quiet.entry(id) {
                match lookups.get().saturating_sub(count) {
                    0 => _ = lookups.remove(),
                    left => _ = lookups.insert(left),
                }
                return;
            }
        }
        self.drop_unused(id);
    }

    /// Ends the use of a node, and drops it if that was the last.
    pub fn let_go(&self, node: Arc<Node>) {
        let id = node.id;
        drop(node);
        self.drop_unused(id);
    }

    /// Drops a node that neither the kernel, nor an open file, nor an operation uses.
    pub fn drop_unused(&self, id: NodeId) {
        let shard = &mut *self.shard(id).lock();
        let Some(node) = shard.nodes.get(&id) else { return };
        if id == NodeId::ROOT {
            return;
        }
        // Asked in this order: whoever has it may count a lookup before letting go of it.
        match (is_idle(node), node.is_known()) {
            (_, true) => {}
            (true, false) => _ = shard.nodes.remove(&id),
            (false, false) => self.lingering.lock().push(id),
        }
    }

    /// Drops what lingered, and where there are many what the kernel knows but has not used since
    /// the last call: to be called now and then.
    pub fn sweep(&self) {
        let lingering = std::mem::take(&mut *self.lingering.lock());
        for id in lingering {
            self.drop_unused(id);
        }
        for shard in &self.shards {
            let Shard { nodes, quiet } = &mut *shard.lock();
            if nodes.len() > NODES_MAX / SHARDS {
                nodes.retain(|&id, node| {
                    let stays = id == NodeId::ROOT
                        || node.used.swap(false, Ordering::Relaxed)
                        || !is_idle(node)
                        || node.state.try_lock().is_none_or(|state| state.orphan);
                    let lookups = node.lookups.load(Ordering::Relaxed);
                    if !stays && lookups > 0 {
                        quiet.insert(id, lookups);
                    }
                    stays
                });
                nodes.shrink_to(NODES_MAX / SHARDS);
            }
            if quiet.capacity() > 4 * quiet.len() {
                quiet.shrink_to(2 * quiet.len());
            }
        }
    }

    /// A directory and a name in it by which a node is reached: see [`Node::place`].
    pub fn place(&self, catalog: &Catalog, id: NodeId) -> Result<Option<(NodeId, EntryName)>> {
        match self.get(id) {
            Some(node) => node.place(catalog),
            None => Ok(catalog.names(id)?.into_iter().next()),
        }
    }

    /// The path of a directory, from the names in the table and, above those, in the catalog.
    pub fn path(&self, catalog: &Catalog, id: NodeId) -> Result<RelPath> {
        let mut names = Vec::new();
        let mut at = id;
        while at != NodeId::ROOT {
            let (parent, name) = self.place(catalog, at)?.ok_or(Error::Posix(Errno::NOENT))?;
            names.push(name);
            at = parent;
            if names.len() > DEPTH_MAX {
                return Err(Error::Posix(Errno::LOOP));
            }
        }
        names.reverse();
        Ok(RelPath::from(names))
    }
}

/// Whether nobody but the table has a node, and it is not open; with the lock of its shard. New
/// references are made under that only, so a count of one is final.
fn is_idle(node: &Arc<Node>) -> bool {
    let is_alone = Arc::strong_count(node) == 1;
    // What whoever let go of it did before is seen after this.
    fence(Ordering::Acquire);
    is_alone
        && node.state.try_lock().is_some_and(|state| state.open.is_none())
        && node.deferred.lock().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_the_kernel_does_not_use_only_its_lookups_are_kept() {
        let nodes = Nodes::with_root();
        let count = 2 * NODES_MAX as u64;
        for id in 2..2 + count {
            nodes.load(NodeId(id), Kind::File).looked_up();
        }
        let (held, orphan) = (nodes.load(NodeId(2), Kind::File), NodeId(3));
        nodes.load(orphan, Kind::File).lock_as_is().orphan = true;
        nodes.load(NodeId(4), Kind::File).looked_up();
        nodes.sweep();
        assert_eq!(nodes.count() as u64, count + 1, "all were used since the last one");
        let used = NodeId(5);
        assert!(nodes.get(used).is_some());
        nodes.sweep();
        assert_eq!(nodes.count(), 4, "the root, one held, an orphan, one used");
        assert!(nodes.get(used).is_some() && nodes.get(held.id).is_some());
        assert!(nodes.get(NodeId(4)).is_none());
        // Two lookups: the first to be forgotten while it is quiet.
        nodes.forget(NodeId(4), 1);
        let again = nodes.load(NodeId(4), Kind::File);
        assert!(again.is_known());
        drop(again);
        nodes.forget(NodeId(4), 1);
        nodes.forget(NodeId(6), 1);
        assert!(!nodes.load(NodeId(4), Kind::File).is_known());
        assert!(!nodes.load(NodeId(6), Kind::File).is_known());
    }

    #[test]
    fn only_a_long_run_has_more_preserved_ahead_and_no_more_than_it_is_long() {
        let mut run = Run::default();
        let page = |number: u64| ByteRange::new(number * 4096, 4096);
        for number in 0..64 {
            assert_eq!(run.took(page(number)), None, "page {number}");
        }
        let ahead = ByteRange::new(65 * 4096, RUN_BYTES_MIN);
        assert_eq!(run.took(page(64)), Some(ahead));
        assert_eq!(run.took(page(66)), None, "a gap");
        run.took(ByteRange::new(67 * 4096, 100 << 20));
        let end = 67 * 4096 + (100 << 20);
        let ahead = ByteRange::new(end + 4096, AHEAD_BYTES_MAX);
        assert_eq!(run.took(ByteRange::new(end, 4096)), Some(ahead));
        assert_eq!(run.took(page(7)), None, "begun anew elsewhere");
        assert_eq!(run.took(page(8)), None);
    }
}

//! One object on every replica: its handles, and the caches of directories' handles.
//!
//! Handles cost file descriptors, so those of directories are kept for the most recently used ones
//! only; those of our private directories, which are few, for ever.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::backing::{Backing, Creds, Handle};
use crate::types::{EntryName, NodeId, PRIVATE_DIR, RelPath, ReplicaId, ReplicaMap};

/// The most directories whose handles are kept.
const DIRS_MAX: usize = 1024;
/// The fewest, however low the limit of open files.
const DIRS_MIN: usize = 16;

/// Handles of one object on every replica that was online when they were opened.
#[derive(Debug)]
pub struct Handles(ReplicaMap<Option<Handle>>);

impl Handles {
    /// Takes the handles opened on each replica.
    pub fn new(handles: ReplicaMap<Option<Handle>>) -> Handles {
        Handles(handles)
    }

    /// The handle on one replica. Where there is none, an error without an errno: a changing
    /// operation takes it for a fault of that replica (`EIO`), a reading one passes it over.
    pub fn get(&self, id: ReplicaId) -> io::Result<&Handle> {
        let handle = self.0.get(id).and_then(Option::as_ref);
        handle.ok_or_else(not_open)
    }

    /// Makes the object durable on one replica. One that joined after it was opened does not have
    /// it open, and is made durable as a whole.
    pub fn sync(&self, id: ReplicaId, b: &dyn Backing, data_only: bool) -> io::Result<()> {
        match self.has(id) {
            true => b.sync(self.get(id)?, data_only),
            false => Ok(()),
        }
    }

    /// The same object, with its handle on a replica that joined since.
    pub fn with(&self, id: ReplicaId, handle: Handle) -> Handles {
        let mut handles = ReplicaMap::for_all(|own| self.0.get(own).cloned().flatten());
        handles[id] = Some(handle);
        Handles(handles)
    }

    /// Whether there is a handle on that replica.
    pub fn has(&self, id: ReplicaId) -> bool {
        self.0.get(id).is_some_and(Option::is_some)
    }
}

/// What is said of an object that is not open on a replica: see [`Handles::get`].
pub(super) fn not_open() -> io::Error {
    io::Error::other("not open on this replica")
}

/// One of our own directories in every backing, below [`PRIVATE_DIR`]. Mode 0700.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrivateDir {
    /// `.rearview` itself.
    Root,
    /// `preserved/XX`: whole files moved aside, in 256 shards.
    Preserved(u8),
    /// `undo`: before-images.
    Undo,
    /// `packs/XX`: packed history, in 256 shards.
    Packs(u8),
    /// `quarantine`: what healing replaced.
    Quarantine,
    /// `tmp`: what is not finished; emptied at mount.
    Tmp,
}

impl PrivateDir {
    /// Its path below the backing's root.
    pub fn path(self) -> RelPath {
        let name = |text: &str| EntryName::new(text).expect("our own names are valid");
        let root = name(PRIVATE_DIR);
        RelPath::from(match self {
            PrivateDir::Root => vec![root],
            PrivateDir::Preserved(shard) => {
                vec![root, name("preserved"), name(&format!("{shard:02x}"))]
            }
            PrivateDir::Undo => vec![root, name("undo")],
            PrivateDir::Packs(shard) => vec![root, name("packs"), name(&format!("{shard:02x}"))],
            PrivateDir::Quarantine => vec![root, name("quarantine")],
            PrivateDir::Tmp => vec![root, name("tmp")],
        })
    }
}

/// Opens one of our directories, making it and what leads to it where missing. Whatever is durable
/// in it later has its name with it: where names reach the disk in their order by itself, else
/// because the name is made durable at once. If we die before, the next mount makes it again.
pub(crate) fn open_private(backing: &dyn Backing, dir: PrivateDir) -> io::Result<Handle> {
    let path = dir.path();
    match backing.open_dir(&path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        other => return other,
    }
    let mut parent_path = RelPath::root();
    for name in path.names() {
        let parent = backing.open_dir(&parent_path)?;
        match backing.mkdir(&parent, name, 0o700, Creds::DAEMON) {
            // There are hundreds of them: a sync for each would be felt by whoever deletes files.
            Ok(()) if backing.orders_names() => {}
            Ok(()) => backing.sync(&parent, false)?,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
        parent_path = parent_path.join(name);
    }
    backing.open_dir(&path)
}

/// The handles of directories that are kept open.
pub(super) struct DirCache {
    dirs: Mutex<LruCache<NodeId, Arc<Handles>>>,
    private: Mutex<HashMap<PrivateDir, Arc<Handles>>>,
}

impl DirCache {
    /// A cache that leaves three quarters of the process's open files to others.
    pub(super) fn new(replica_count: usize) -> DirCache {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let dirs = (limit / 4 / replica_count.max(1)).clamp(DIRS_MIN, DIRS_MAX);
        let dirs = NonZeroUsize::new(dirs).expect("the minimum is above zero");
        DirCache { dirs: Mutex::new(LruCache::new(dirs)), private: Mutex::default() }
    }

    pub(super) fn dir(&self, node: NodeId) -> Option<Arc<Handles>> {
        self.dirs.lock().get(&node).cloned()
    }

    pub(super) fn keep_dir(&self, node: NodeId, handles: &Arc<Handles>) {
        // The one that leaves is closed after the lock is released.
        let _left = self.dirs.lock().push(node, handles.clone());
    }

    pub(super) fn forget_dir(&self, node: NodeId) {
        let _left = self.dirs.lock().pop(&node);
    }

    /// Closes the less recently used half, when file descriptors ran out.
    pub(super) fn shrink(&self) {
        let mut left = Vec::new();
        let mut dirs = self.dirs.lock();
        for _ in 0..dirs.len().div_ceil(2) {
            left.extend(dirs.pop_lru());
        }
        drop(dirs);
    }

    pub(super) fn private(&self, dir: PrivateDir) -> Option<Arc<Handles>> {
        self.private.lock().get(&dir).cloned()
    }

    pub(super) fn keep_private(&self, dir: PrivateDir, handles: &Arc<Handles>) {
        self.private.lock().insert(dir, handles.clone());
    }

    pub(super) fn forget_private(&self, dir: PrivateDir) {
        let _left = self.private.lock().remove(&dir);
    }

    /// Forgets everything, because the replicas that take part have changed.
    pub(super) fn clear(&self) {
        let mut dirs = self.dirs.lock();
        let capacity = dirs.cap();
        let _left = std::mem::replace(&mut *dirs, LruCache::new(capacity));
        drop(dirs);
        self.private.lock().clear();
    }
}

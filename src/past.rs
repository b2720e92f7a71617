//! The past as folders: what `.snapshots` of every directory shows.
//!
//! ```text
//! .snapshots/<name>/…                     the directory as it was in a snapshot
//! .snapshots/latest                       symlink to the newest of them
//! .snapshots/.at/<time>/…                 the directory at any instant (looked up, not listed)
//! .snapshots/.versions/<name>/<time>.ext  every version of one file
//! .snapshots/.deleted/…                   what the directory once had, in its last state
//! .snapshots/@GMT-2026.11.22-19.30.00/    a snapshot by its time, for Samba (looked up, not
//! listed)
//! ```
//!
//! A directory is found again by its identity, so a renamed one still shows its own past. Nothing
//! is held in memory but bounded tables: every answer is an indexed query of the catalog. An inode
//! number whose table entry was forgotten answers `ESTALE`, upon which the kernel looks the path up
//! again; the limits are the `*_MAX` below.
//!
//! All is read-only here. The three exceptions (mkdir, rmdir and rename directly in a `.snapshots`)
//! are in `past/snapshots.rs`. Whoever calls answers `EROFS` to everything else.

pub mod ino;

mod deleted;
mod instant;
mod kept;
mod snapshots;
mod table;
mod versions;
mod views;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lru::LruCache;
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::catalog::{Catalog, Durability, NodeRow, Snapshot};
use crate::error::Result;
use crate::past::ino::{ROOT_SNAPSHOTS, Target};
use crate::past::table::Table;
use crate::past::views::{View, Way};
use crate::replica::backing::{Seek, Stat};
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId, SnapshotId, Xattrs};
use crate::volume::Volume;

/// Views that can be in use at once (about 150 bytes each).
const VIEWS_MAX: usize = 16_384;
/// States outside of views (version files, deleted files) that can be in use at once.
const MOMENTS_MAX: usize = 65_536;
/// Directories below `.versions` that can be in use at once.
const VERSION_DIRS_MAX: usize = 16_384;
/// States whose attributes are kept at hand, so that a read does not ask the catalog.
const KNOWN_MAX: usize = 16_384;
/// Directories whose birth is kept at hand, and deleted ones whose last full moment is.
const DIRS_MAX: usize = 4_096;
/// Relative instants (`.at/10m`) that can be in use at once.
const INSTANTS_MAX: usize = 1_024;
/// Live directories of which it is known that their past was entered.
const ENTERED_MAX: usize = 16_384;
/// Snapshots that are kept at hand, as of an epoch of theirs.
const SNAPSHOTS_MAX: usize = 4_096;
/// What a directory's size is said to be: the past has no blocks of its own.
const DIR_SIZE: u64 = 4_096;
/// The name of the access ACL among the extended attributes.
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// What the past needs from a mounted store.
pub trait History: Send + Sync {
    /// The catalog.
    fn catalog(&self) -> &Catalog;
    /// See [`Volume::settle`].
    fn settle(&self) -> Result<Generation>;
    /// See [`Volume::read_content`].
    fn read_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize>;
    /// See [`Volume::seek_content`].
    fn seek_content(&self, node: NodeId, content: ContentId, offset: u64, to: Seek) -> Result<u64>;
}

impl History for Volume {
    fn catalog(&self) -> &Catalog {
        Volume::catalog(self)
    }

    fn settle(&self) -> Result<Generation> {
        Volume::settle(self)
    }

    fn read_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        Volume::read_content(self, node, content, offset, buffer)
    }

    fn seek_content(&self, node: NodeId, content: ContentId, offset: u64, to: Seek) -> Result<u64> {
        Volume::seek_content(self, node, content, offset, to)
    }
}

/// How the past is shown.
#[derive(Clone, Debug)]
pub struct PastOptions {
    /// The name of the directory through which the past is entered.
    pub snapdir_name: EntryName,
    /// Who may make and forget snapshots by mkdir and rmdir: the user that mounted.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
    /// Whether some directory lists its `.snapshots`. Then programs that empty a tree find it, and
    /// `rmdir` must not forget anything.
    pub listed: bool,
}

impl PastOptions {
    /// The usual name, `.snapshots`.
    pub fn new(uid: u32, gid: u32) -> PastOptions {
        let snapdir_name = EntryName::new(".snapshots").expect("the name is valid");
        PastOptions { snapdir_name, uid, gid, listed: false }
    }
}

/// What an inode number of the past stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its attributes; `ino` is our inode number.
    pub stat: Stat,
    /// Tells two uses of one inode number apart (`generation` of a FUSE entry).
    pub incarnation: u64,
    /// Whether the kernel may keep the answer until it is told otherwise, or not at all. From
    /// [`Past::lookup`] this is about the name and the attributes, from [`Past::stat`] about the
    /// attributes. What lasts and can change all the same is the root's `.snapshots`, and the names
    /// of snapshots in it: see [`ino::ROOT_SNAPSHOTS`].
    pub lasting: bool,
}

/// An entry of a directory of the past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastListed {
    /// Its name.
    pub name: EntryName,
    /// Its inode number, [`ino::UNKNOWN`] for one that gets its number when it is looked up.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
}

/// The past of a mounted store.
pub struct Past {
    history: Arc<dyn History>,
    options: PastOptions,
    /// Taken for a moment only, never while the catalog or the volume is asked.
    tables: Mutex<Tables>,
    /// See [`Past::is_whole`].
    was_purged: AtomicBool,
}

struct Tables {
    views: Table<View>,
    moments: Table<Moment>,
    version_dirs: Table<VersionDir>,
    known: LruCache<u64, Known>,
    snapshots: LruCache<SnapshotId, (u64, Snapshot)>,
    /// Live directories whose past was entered: what the kernel knows of it lies below.
    entered: LruCache<NodeId, ()>,
    /// What relative instants in use mean.
    instants: LruCache<(NodeId, EntryName), instant::InUse>,
    /// First generations of directories.
    births: LruCache<NodeId, Generation>,
    /// For a deleted directory at its last generation, the one before it was emptied.
    swept: LruCache<Moment, Generation>,
}

/// One state of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Moment {
    node: NodeId,
    generation: Generation,
}

/// The directory of the versions of what `name` in `dir` means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct VersionDir {
    dir: NodeId,
    name: EntryName,
}

/// The state behind an inode number; it can not change.
#[derive(Clone, Debug)]
struct Known {
    row: NodeRow,
    nlink: u32,
}

fn capacity(entries: usize) -> NonZeroUsize {
    NonZeroUsize::new(entries).expect("the limits above are not zero")
}

impl Past {
    /// The past of `history`, usually an `Arc<Volume>`.
    pub fn new(history: Arc<dyn History>, options: PastOptions) -> Past {
        let tables = Tables {
            views: Table::new(VIEWS_MAX, ino::DYNAMIC_SLOTS),
            moments: Table::new(MOMENTS_MAX, 1 << 58),
            version_dirs: Table::new(VERSION_DIRS_MAX, 1 << 58),
            known: LruCache::new(capacity(KNOWN_MAX)),
            snapshots: LruCache::new(capacity(SNAPSHOTS_MAX)),
            entered: LruCache::new(capacity(ENTERED_MAX)),
            instants: LruCache::new(capacity(INSTANTS_MAX)),
            births: LruCache::new(capacity(DIRS_MAX)),
            swept: LruCache::new(capacity(DIRS_MAX)),
        };
        Past { history, options, tables: Mutex::new(tables), was_purged: AtomicBool::new(false) }
    }

    /// Whether `ino` is an inode number of the past.
    pub fn owns(ino: u64) -> bool {
        ino::is_past(ino)
    }

    /// The name under which every live directory shows its past.
    pub fn snapdir_name(&self) -> &EntryName {
        &self.options.snapdir_name
    }

    /// The `.snapshots` of a live directory. `ENOENT` if there is no such directory.
    pub fn enter(&self, dir: NodeId) -> Result<Entry> {
        match self.catalog().node(dir)? {
            Some(row) if row.kind == Kind::Dir => {
                self.tables.lock().entered.put(dir, ());
                self.virtual_entry(Target::Snapshots(dir), &row)
            }
            _ => Err(Errno::NOENT.into()),
        }
    }

    /// What `name` in the directory `parent` is.
    pub fn lookup(&self, parent: u64, name: &EntryName) -> Result<Entry> {
        match target(parent)? {
            Target::Snapshots(dir) => self.lookup_snapshots(dir, name),
            Target::At(dir) => self.lookup_instant(dir, name),
            Target::Versions(dir) => self.lookup_version_dir(dir, name),
            Target::VersionsOf(id) => self.lookup_version(id, name),
            Target::Deleted(dir) => self.lookup_deleted(dir, name),
            Target::Latest(_) | Target::Moment(_) => Err(Errno::NOTDIR.into()),
            Target::Object { slot, node } => {
                let view = self.view(slot)?;
                if *name == self.options.snapdir_name {
                    return Err(Errno::NOENT.into());
                }
                let found = self.catalog().find_at(view.generation, node, name)?;
                let (row, links) = found.ok_or(Errno::NOENT)?;
                let ino = Target::Object { slot, node: row.id }.encode();
                Ok(self.known_entry(ino, row, links.max(1), true))
            }
        }
    }

    /// The attributes of `ino`. `ESTALE` if it stands for nothing any more.
    pub fn stat(&self, ino: u64) -> Result<Entry> {
        let target = target(ino)?;
        match target {
            Target::Snapshots(dir)
            | Target::Latest(dir)
            | Target::At(dir)
            | Target::Versions(dir)
            | Target::Deleted(dir) => self.virtual_entry(target, &self.live(dir)?),
            Target::VersionsOf(id) => {
                let dir = self.version_dir(id)?.dir;
                self.virtual_entry(target, &self.live(dir)?)
            }
            Target::Moment(_) | Target::Object { .. } => {
                let Known { row, nlink } = self.known(ino)?;
                Ok(self.entry(ino, &row, nlink, true))
            }
        }
    }

    /// The directory that `..` of the directory `ino` means; `ino` itself where that is not known.
    pub fn parent(&self, ino: u64) -> u64 {
        self.find_parent(ino).ok().flatten().unwrap_or(ino)
    }

    fn find_parent(&self, ino: u64) -> Result<Option<u64>> {
        Ok(Some(match target(ino)? {
            Target::Snapshots(dir) => dir.0,
            Target::Latest(dir)
            | Target::At(dir)
            | Target::Versions(dir)
            | Target::Deleted(dir) => Target::Snapshots(dir).encode(),
            Target::VersionsOf(id) => Target::Versions(self.version_dir(id)?.dir).encode(),
            Target::Moment(_) => return Ok(None),
            Target::Object { slot, node } => {
                let view = self.view(slot)?;
                if node == view.anchor {
                    return Ok(Some(match view.way {
                        Way::Snapshot(_) | Way::Gmt(_) => Target::Snapshots(view.dir).encode(),
                        Way::At(_) => Target::At(view.dir).encode(),
                        Way::Deleted(_) => Target::Deleted(view.dir).encode(),
                    }));
                }
                let at = view.generation;
                let names = self.catalog().name_history(node)?;
                let name = names
                    .into_iter()
                    .find(|name| name.born <= at && name.died.is_none_or(|died| at < died));
                return Ok(name.map(|name| Target::Object { slot, node: name.parent }.encode()));
            }
        }))
    }

    /// All entries of the directory `ino` that are not hidden, without `.` and `..`.
    pub fn list(&self, ino: u64) -> Result<Vec<PastListed>> {
        match target(ino)? {
            Target::Snapshots(dir) => self.list_snapshots(dir),
            Target::At(_) => Ok(Vec::new()),
            Target::Versions(dir) => self.list_version_dirs(dir),
            Target::VersionsOf(id) => self.list_versions(id),
            Target::Deleted(dir) => self.list_deleted(dir),
            Target::Latest(_) | Target::Moment(_) => Err(Errno::NOTDIR.into()),
            Target::Object { slot, node } => {
                let view = self.view(slot)?;
                let listed = self.catalog().list_at(view.generation, node)?;
                let shown = listed.into_iter().filter(|e| e.name != self.options.snapdir_name);
                Ok(shown
                    .map(|entry| PastListed {
                        ino: Target::Object { slot, node: entry.node }.encode(),
                        name: entry.name,
                        kind: entry.kind,
                    })
                    .collect())
            }
        }
    }

    /// The target of a symlink; `EINVAL` for anything else.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>> {
        if let Target::Latest(dir) = target(ino)? {
            let newest = self.newest_snapshot(dir)?.ok_or(Errno::NOENT)?;
            return Ok(newest.name.into_bytes());
        }
        let row = self.state(ino)?.ok_or(Errno::INVAL)?;
        if row.kind != Kind::Symlink {
            return Err(Errno::INVAL.into());
        }
        // A symlink's target is recorded with its birth: without it the record is damaged.
        Ok(self.catalog().symlink_target(row.id)?.ok_or(Errno::IO)?)
    }

    /// The extended attributes.
    pub fn xattrs(&self, ino: u64) -> Result<Arc<Xattrs>> {
        if let Some(row) = self.state(ino)? {
            return self.catalog().xattrs(row.xattrs);
        }
        let dir = match target(ino)? {
            Target::Versions(dir) | Target::Deleted(dir) => dir,
            Target::VersionsOf(id) => self.version_dir(id)?.dir,
            _ => return Ok(Arc::default()),
        };
        // They list what the live directory has or had, so they are as private as it is.
        let mut set = Xattrs::clone(&*self.catalog().xattrs(self.live(dir)?.xattrs)?);
        set.0.retain(|name, _| name == ACCESS_ACL);
        Ok(Arc::new(set))
    }

    /// Reads a regular file; the count is short only at its end.
    pub fn read(&self, ino: u64, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let row = self.file(ino)?;
        let rest = row.size.saturating_sub(offset);
        let count = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        if count == 0 {
            return Ok(0);
        }
        self.history.read_content(row.id, row.content, offset, &mut buffer[..count])
    }

    /// Finds data or a hole in a regular file; `ENXIO` at or past its end.
    pub fn seek(&self, ino: u64, offset: u64, to: Seek) -> Result<u64> {
        let row = self.file(ino)?;
        if offset >= row.size {
            return Err(Errno::NXIO.into());
        }
        self.history.seek_content(row.id, row.content, offset, to)
    }

    // --- parts

    fn catalog(&self) -> &Catalog {
        self.history.catalog()
    }

    /// A live directory's state. `ESTALE` once it is gone: its `.snapshots` went with it.
    fn live(&self, dir: NodeId) -> Result<NodeRow> {
        Ok(self.catalog().node(dir)?.ok_or(Errno::STALE)?)
    }

    /// Ends the open burst and waits for its commit, so that reports show all that was done before.
    fn catch_up(&self) -> Result<Generation> {
        let generation = self.catalog().freeze();
        self.catalog().flush(Durability::Written)?;
        Ok(generation)
    }

    /// The state behind an object or a moment; `None` for a virtual directory.
    fn state(&self, ino: u64) -> Result<Option<NodeRow>> {
        match target(ino)? {
            Target::Moment(_) | Target::Object { .. } => Ok(Some(self.known(ino)?.row)),
            _ => Ok(None),
        }
    }

    fn file(&self, ino: u64) -> Result<NodeRow> {
        match self.state(ino)? {
            Some(row) if row.kind == Kind::File => Ok(row),
            Some(row) if row.kind != Kind::Dir => Err(Errno::INVAL.into()),
            _ => Err(Errno::ISDIR.into()),
        }
    }

    /// The state behind an object or a moment, kept at hand.
    fn known(&self, ino: u64) -> Result<Known> {
        let (cached, moment) = {
            let mut tables = self.tables.lock();
            let cached = tables.known.get(&ino).cloned();
            match target(ino)? {
                // The tables are touched as well, so that what is in use is never forgotten.
                Target::Moment(id) => (cached, tables.moments.get(id)),
                Target::Object { slot, .. } if slot >= ino::STABLE_SLOTS => {
                    tables.views.get(slot - ino::STABLE_SLOTS);
                    (cached, None)
                }
                _ => (cached, None),
            }
        };
        if let Some(known) = cached {
            return Ok(known);
        }
        let (node, generation) = match (target(ino)?, moment) {
            (Target::Object { slot, node }, _) => (node, self.view(slot)?.generation),
            (_, Some(moment)) => (moment.node, moment.generation),
            _ => return Err(Errno::STALE.into()),
        };
        let row = self.catalog().node_at(generation, node)?.ok_or(Errno::STALE)?;
        let nlink = match target(ino)? {
            Target::Object { .. } if row.kind != Kind::Dir => {
                self.catalog().links_at(generation, node)?.max(1)
            }
            _ => 1,
        };
        let known = Known { row, nlink };
        self.tables.lock().known.put(ino, known.clone());
        Ok(known)
    }

    /// A state outside of any view: a version, or a deleted file. It has one name.
    fn moment_entry(&self, generation: Generation, row: NodeRow) -> Entry {
        let moment = Moment { node: row.id, generation };
        let id = self.tables.lock().moments.id(&moment);
        self.known_entry(Target::Moment(id).encode(), row, 1, false)
    }

    /// The entry of a state, which is kept at hand: the kernel asks for it again at once.
    fn known_entry(&self, ino: u64, row: NodeRow, nlink: u32, lasting: bool) -> Entry {
        let entry = self.entry(ino, &row, nlink, lasting);
        self.tables.lock().known.put(ino, Known { row, nlink });
        entry
    }

    fn entry(&self, ino: u64, row: &NodeRow, nlink: u32, lasting: bool) -> Entry {
        let stat = Stat {
            kind: row.kind,
            mode: row.mode,
            uid: row.uid,
            gid: row.gid,
            rdev: row.rdev,
            nlink,
            size: if row.kind == Kind::Dir { DIR_SIZE } else { row.size },
            blocks: row.blocks,
            ino,
            // Reading the past leaves no trace in it, so there is no access time of its own.
            atime: row.mtime,
            mtime: row.mtime,
            ctime: row.ctime,
            btime: row.btime,
        };
        Entry { stat, incarnation: self.incarnation(ino), lasting }
    }

    fn incarnation(&self, ino: u64) -> u64 {
        match Target::decode(ino) {
            Some(Target::Object { slot, .. }) if slot >= ino::STABLE_SLOTS => {
                self.tables.lock().views.rounds()
            }
            _ => 0,
        }
    }

    /// A directory (or `latest`) that exists nowhere but here, with the times of its live
    /// directory.
    fn virtual_entry(&self, target: Target, dir: &NodeRow) -> Result<Entry> {
        let (kind, mode, uid, gid) = match target {
            // Its owner may make, rename and forget snapshots with ordinary tools.
            Target::Snapshots(_) => (Kind::Dir, 0o755, self.options.uid, self.options.gid),
            Target::Latest(_) => (Kind::Symlink, 0o777, self.options.uid, self.options.gid),
            Target::At(_) => (Kind::Dir, 0o555, self.options.uid, self.options.gid),
            // They list what the live directory has or had, so they are as private as it is.
            _ => (Kind::Dir, dir.mode & 0o555, dir.uid, dir.gid),
        };
        let newest = match target {
            Target::Snapshots(of) | Target::Latest(of) => self.newest_snapshot(of)?,
            _ => None,
        };
        // It changes with the snapshots, and without any with the live directory.
        let lasting = target == ROOT_SNAPSHOTS && newest.is_some();
        let changed = newest.as_ref().map_or(dir.mtime, |snapshot| snapshot.time);
        let size = match target {
            Target::Latest(_) => newest.map_or(0, |snapshot| snapshot.name.len() as u64),
            _ => DIR_SIZE,
        };
        let stat = Stat {
            kind,
            mode,
            uid,
            gid,
            rdev: 0,
            nlink: 1,
            size,
            blocks: 0,
            ino: target.encode(),
            atime: changed,
            mtime: changed,
            ctime: changed,
            btime: dir.btime,
        };
        Ok(Entry { stat, incarnation: 0, lasting })
    }
}

fn target(ino: u64) -> Result<Target> {
    Ok(Target::decode(ino).ok_or(Errno::STALE)?)
}

#[cfg(test)]
mod tests;

//! The filesystem as operations: live tree and past behind one set of inode numbers, without FUSE.
//!
//! Owns the open handles and the decision whether an inode is live or past; everything else is the
//! volume's or the past's. The past is read-only: whatever would change it answers `EROFS`, except
//! the three operations on `.snapshots` that make, forget and rename a snapshot.

mod barrier;
mod habits;
mod kernel;
mod listing;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::catalog::Snapshot;
use crate::error::{Error, Result};
use crate::past::{Past, PastOptions};
use crate::replica::backing::{RenameMode, Seek, Space, Stat};
use crate::types::{EntryName, NodeId, Xattrs};
use crate::volume::nodes::Node;
use crate::volume::{Caller, Changes, Newborn, Volume};

pub use kernel::KernelCache;
pub use listing::Line;

use habits::{Habits, Manner};
use kernel::Forgetting;

/// Where the directory of snapshots is listed; it can be entered by name all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapDir {
    /// Nowhere.
    Hidden,
    /// In the root of the mount.
    Root,
    /// In every directory.
    Visible,
    /// It does not exist.
    Disabled,
}

/// How a filesystem is shown.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// Where the directory of snapshots is listed.
    pub snapdir: SnapDir,
    /// Its name.
    pub snapdir_name: EntryName,
    /// Where the filesystem is mounted: written-to memory maps are flushed by way of it.
    pub mountpoint: PathBuf,
}

/// How long the kernel may keep what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It cannot change.
    Always,
    /// It changes through this mount only, which tells the kernel by itself.
    WhileMounted,
    /// It may change at any time.
    Never,
}

/// An object as the kernel is told of it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Its attributes; `ino` is its inode number in the mount.
    pub stat: Stat,
    /// How long that holds.
    pub keep: Keep,
    /// Tells a reused inode number of the past from its former bearer (FUSE's "generation").
    pub incarnation: u64,
}

/// Identifies an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fh(pub u64);

/// Something open.
enum Opened {
    File {
        node: Arc<Node>,
        writable: bool,
        readable: bool,
        past_cache: bool,
    },
    Dir {
        thread: u32,
        manner: Manner,
        /// The listing as it was when reading began: entries removed meanwhile do not shift the
        /// rest.
        lines: Mutex<Option<Arc<Vec<Line>>>>,
    },
    Past,
}

/// The filesystem of one mount.
pub struct Filesystem {
    volume: Arc<Volume>,
    past: Past,
    options: FsOptions,
    opened: Mutex<HashMap<u64, Arc<Opened>>>,
    next_handle: AtomicU64,
    forgetting: OnceLock<Arc<Forgetting>>,
    habits: Habits,
    /// Writes may go past the kernel's cache.
    may_pass_cache: bool,
}

fn read_only<T>() -> Result<T> {
    Err(Error::Posix(Errno::ROFS))
}

impl Filesystem {
    /// The filesystem of a volume.
    pub fn new(volume: Arc<Volume>, options: FsOptions) -> Filesystem {
        let past_options = PastOptions {
            snapdir_name: options.snapdir_name.clone(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            listed: matches!(options.snapdir, SnapDir::Root | SnapDir::Visible),
        };
        Filesystem {
            past: Past::new(volume.clone(), past_options),
            volume,
            options,
            opened: Mutex::default(),
            next_handle: AtomicU64::new(1),
            forgetting: OnceLock::new(),
            habits: Habits::new(),
            may_pass_cache: crate::sys::kernel_version() >= PAST_CACHE_SINCE,
        }
    }

    /// A part of the past was removed: neither we nor the kernel show any of it from memory. Who
    /// has a file of it open can read on what the kernel holds of that. Not to be called by a
    /// thread that answers the kernel's requests.
    pub fn forget_past(&self) {
        let entered = self.past.forget();
        let Some(forgetting) = self.forgetting.get() else { return };
        let name = self.past.snapdir_name().as_os_str();
        entered.into_iter().for_each(|dir| forgetting.cache.forget_name(dir.0, name));
    }

    /// The volume.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Takes a snapshot that has everything which any program wrote before the call, also through
    /// memory maps. Not to be called by a thread that answers the kernel's requests.
    pub fn create_snapshot(
        &self,
        name: &str,
        automatic: bool,
        tags: &[String],
    ) -> Result<Snapshot> {
        self.flush_maps();
        self.volume.create_snapshot(name, automatic, tags)
    }

    fn keep_open(&self, opened: Opened) -> Fh {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.opened.lock().insert(handle, Arc::new(opened));
        Fh(handle)
    }

    fn opened(&self, fh: Fh) -> Result<Arc<Opened>> {
        self.opened.lock().get(&fh.0).cloned().ok_or(Error::Posix(Errno::BADF))
    }

    fn file(&self, fh: Fh) -> Result<Arc<Node>> {
        match &*self.opened(fh)? {
            Opened::File { node, .. } => Ok(node.clone()),
            Opened::Past => read_only(),
            Opened::Dir { .. } => Err(Error::Posix(Errno::ISDIR)),
        }
    }

    /// The live node of an inode number; `EROFS` for one of the past.
    fn live(&self, ino: u64) -> Result<Arc<Node>> {
        if Past::owns(ino) { read_only() } else { self.volume.node(NodeId(ino)) }
    }

    fn live_dir(&self, ino: u64) -> Result<NodeId> {
        if Past::owns(ino) { read_only() } else { Ok(NodeId(ino)) }
    }

    /// Whether the name is the door to the past.
    fn is_snapdir(&self, name: &EntryName) -> bool {
        self.options.snapdir != SnapDir::Disabled && *name == self.options.snapdir_name
    }

    /// Refuses to make or remove the door to the past, in a live directory.
    fn check_name(&self, name: &EntryName) -> Result<()> {
        if self.is_snapdir(name) { Err(Error::Posix(Errno::PERM)) } else { Ok(()) }
    }

    // --- looking

    /// What a name in a directory means.
    pub fn lookup(&self, parent: u64, name: &EntryName) -> Result<Found> {
        if Past::owns(parent) {
            return self.past.lookup(parent, name).map(found_past);
        }
        if self.is_snapdir(name) {
            return self.past.enter(NodeId(parent)).map(found_past);
        }
        let (_, stat) = self.volume.lookup(NodeId(parent), name)?;
        Ok(found_live(stat))
    }

    /// The kernel forgot `count` lookups.
    pub fn forget(&self, ino: u64, count: u64) {
        if !Past::owns(ino) {
            self.volume.forget(NodeId(ino), count);
        }
    }

    /// Attributes.
    pub fn stat(&self, ino: u64) -> Result<Found> {
        if Past::owns(ino) {
            return self.past.stat(ino).map(found_past);
        }
        let node = self.volume.node(NodeId(ino))?;
        Ok(found_live(self.volume.stat(&node)?))
    }

    /// A symlink's target.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>> {
        if Past::owns(ino) {
            return self.past.readlink(ino);
        }
        self.volume.readlink(&self.live(ino)?)
    }

    /// All extended attributes.
    pub fn xattrs(&self, ino: u64) -> Result<Arc<Xattrs>> {
        if Past::owns(ino) {
            return self.past.xattrs(ino);
        }
        self.volume.list_xattrs(&self.live(ino)?).map(Arc::new)
    }

    /// One extended attribute.
    pub fn xattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>> {
        if Past::owns(ino) {
            use std::os::unix::ffi::OsStrExt;
            let all = self.past.xattrs(ino)?;
            return all.0.get(name.as_bytes()).cloned().ok_or(Error::Posix(Errno::NODATA));
        }
        self.volume.get_xattr(&self.live(ino)?, name)
    }

    /// Space of the tightest replica.
    pub fn space(&self) -> Result<Space> {
        self.volume.space()
    }

    // --- names

    /// Makes a file and opens it.
    pub fn create(
        &self,
        parent: u64,
        name: &EntryName,
        mode: u32,
        access: Wish,
        caller: &Caller,
    ) -> Result<(Found, Fh)> {
        let dir = self.live_dir(parent)?;
        self.check_name(name)?;
        let (node, stat) = self.volume.create(dir, name, mode, access.writable, caller)?;
        Ok((found_live(stat), self.keep_file_open(node, access)))
    }

    /// Makes a directory, symlink or special file. In `.snapshots`, `mkdir` takes a snapshot.
    pub fn make(
        &self,
        parent: u64,
        name: &EntryName,
        what: &Newborn<'_>,
        mode: u32,
        caller: &Caller,
    ) -> Result<Found> {
        if Past::owns(parent) {
            if !matches!(what, Newborn::Dir) {
                return read_only();
            }
            let name = self.past.snapshot_to_create(parent, name)?;
            let snapshot = self.create_snapshot(&name, false, &[])?;
            return self.past.created(parent, &snapshot).map(found_past);
        }
        self.check_name(name)?;
        let (_, stat) = self.volume.make(NodeId(parent), name, what, mode, caller)?;
        Ok(found_live(stat))
    }

    /// Gives a file another name.
    pub fn link(&self, ino: u64, parent: u64, name: &EntryName, caller: &Caller) -> Result<Found> {
        let node = self.live(ino)?;
        let dir = self.live_dir(parent)?;
        self.check_name(name)?;
        let (_, stat) = self.volume.link(&node, dir, name, caller)?;
        Ok(found_live(stat))
    }

    /// Removes a name that is no directory's.
    pub fn unlink(&self, parent: u64, name: &EntryName, caller: &Caller) -> Result<()> {
        let dir = self.live_dir(parent)?;
        self.check_name(name)?;
        self.volume.unlink(dir, name, caller)
    }

    /// Removes an empty directory. In `.snapshots` it forgets a snapshot.
    pub fn rmdir(&self, parent: u64, name: &EntryName, caller: &Caller) -> Result<()> {
        if Past::owns(parent) {
            let remove = || self.past.remove_snapshot(parent, name);
            return self.by_kernel(parent, name, remove);
        }
        self.check_name(name)?;
        self.volume.rmdir(NodeId(parent), name, caller)
    }

    /// Renames. Within `.snapshots` it renames a snapshot.
    pub fn rename(
        &self,
        parent: u64,
        name: &EntryName,
        new_parent: u64,
        new_name: &EntryName,
        mode: RenameMode,
        caller: &Caller,
    ) -> Result<()> {
        match (Past::owns(parent), Past::owns(new_parent)) {
            (true, true) => self.by_kernel(parent, name, || {
                self.past.rename_snapshot(parent, name, new_parent, new_name)
            }),
            (false, false) => {
                self.check_name(name)?;
                self.check_name(new_name)?;
                let (from, to) = (NodeId(parent), NodeId(new_parent));
                self.volume.rename(from, name, to, new_name, mode, caller)
            }
            // Out of the past things are copied, not moved; `mv` does that on EXDEV.
            (true, false) | (false, true) => Err(Error::Posix(Errno::XDEV)),
        }
    }

    // --- attributes

    /// Changes attributes.
    pub fn set_attributes(&self, ino: u64, changes: &Changes, caller: &Caller) -> Result<Found> {
        let node = self.live(ino)?;
        Ok(found_live(self.volume.set_attributes(&node, changes, caller)?))
    }

    /// Sets an extended attribute.
    pub fn set_xattr(
        &self,
        ino: u64,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        caller: &Caller,
    ) -> Result<()> {
        self.volume.set_xattr(&self.live(ino)?, name, value, flags, caller)
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, ino: u64, name: &OsStr, caller: &Caller) -> Result<()> {
        self.volume.remove_xattr(&self.live(ino)?, name, caller)
    }

    // --- content

    /// Opens a file.
    pub fn open(&self, ino: u64, wish: Wish, caller: &Caller) -> Result<Fh> {
        if Past::owns(ino) {
            if wish.writable || wish.truncate {
                return read_only();
            }
            // A program that got rights by its mode may be an old one with a hole that was mended
            // since. Its mode is shown, so that it can be restored; it runs from the present only.
            if wish.execute && self.past.stat(ino)?.stat.mode & 0o6000 != 0 {
                return Err(Error::Posix(Errno::ACCESS));
            }
            return Ok(self.keep_open(Opened::Past));
        }
        let node = self.live(ino)?;
        self.volume.open_file(&node, wish.writable, wish.truncate, caller)?;
        Ok(self.keep_file_open(node, wish))
    }

    fn keep_file_open(&self, node: Arc<Node>, wish: Wish) -> Fh {
        let Wish { writable, readable, .. } = wish;
        // For a program that only writes it would be copied once more, into pages that are taken
        // from other files. Who has a file open for both may store to a map of it, and a page of a
        // map that goes back while a part of it is written past it has the old bytes of that part:
        // so not then. Nor where each write is to be durable: then the kernel holds the file's lock
        // until it is, which it does not when it asks for that itself.
        let only_writes = writable && !readable && !wish.synchronous;
        let past_cache = self.may_pass_cache && only_writes && self.volume.writers(&node) == 1;
        self.keep_open(Opened::File { node, writable, readable, past_cache })
    }

    /// Whether what is written to an open file is better not kept by the kernel as well.
    pub fn writes_past_cache(&self, fh: Fh) -> bool {
        matches!(self.opened(fh).as_deref(), Ok(Opened::File { past_cache: true, .. }))
    }

    /// Ends an open.
    pub fn release(&self, fh: Fh) -> Result<()> {
        let opened = self.opened.lock().remove(&fh.0);
        match opened.as_deref() {
            Some(Opened::File { node, writable, .. }) => self.volume.release(node, *writable),
            _ => Ok(()),
        }
    }

    /// A descriptor was closed.
    pub fn flush(&self, fh: Fh) -> Result<()> {
        match &*self.opened(fh)? {
            Opened::File { node, writable: true, .. } => self.volume.flush(node),
            _ => Ok(()),
        }
    }

    /// Reads; short only at the file's end.
    pub fn read(&self, ino: u64, fh: Fh, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if Past::owns(ino) {
            return self.past.read(ino, offset, buffer);
        }
        self.volume.read(&self.file(fh)?, offset, buffer)
    }

    /// Writes all of `data`.
    pub fn write(
        &self,
        fh: Fh,
        offset: u64,
        data: &[u8],
        how: Writing,
        caller: &Caller,
    ) -> Result<()> {
        let node = self.file(fh)?;
        let has_lost_rights = self.volume.write(&node, offset, data, how.strip, caller)?;
        if let (true, Some(forgetting)) = (has_lost_rights, self.forgetting.get()) {
            // Past its cache the kernel would go on with the mode that it knows, and run it so.
            forgetting.cache.forget_attributes(node.id.0);
        }
        match how.sync {
            // What goes through its cache the kernel makes durable by a request of its own.
            Some(sync) if self.writes_past_cache(fh) => {
                self.volume.fsync(&node, sync == WriteSync::Data)
            }
            _ => Ok(()),
        }
    }

    /// Allocates, punches or zeroes.
    pub fn fallocate(
        &self,
        fh: Fh,
        mode: u32,
        offset: u64,
        length: u64,
        caller: &Caller,
    ) -> Result<()> {
        self.volume.fallocate(&self.file(fh)?, mode, offset, length, caller)
    }

    /// Finds data or a hole.
    pub fn seek(&self, ino: u64, fh: Fh, offset: u64, to: Seek) -> Result<u64> {
        if Past::owns(ino) {
            return self.past.seek(ino, offset, to);
        }
        self.volume.seek(&self.file(fh)?, offset, to)
    }

    /// Copies between files; the count may be short. Out of the past by reading and writing:
    /// `EXDEV` tells the kernel to do so.
    pub fn copy_range(
        &self,
        (from, from_offset): (Fh, u64),
        (to, to_offset): (Fh, u64),
        length: u64,
        caller: &Caller,
    ) -> Result<u64> {
        if matches!(&*self.opened(from)?, Opened::Past) {
            return Err(Error::Posix(Errno::XDEV));
        }
        let (from, to) = (self.file(from)?, self.file(to)?);
        self.volume.copy_range((&from, from_offset), (&to, to_offset), length, caller)
    }

    /// Makes a file durable.
    pub fn fsync(&self, fh: Fh, data_only: bool) -> Result<()> {
        match &*self.opened(fh)? {
            Opened::File { node, .. } => self.volume.fsync(node, data_only),
            _ => Ok(()),
        }
    }
}

/// What an open is for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// `O_RDONLY` or `O_RDWR`.
    pub readable: bool,
    /// `O_WRONLY` or `O_RDWR`.
    pub writable: bool,
    /// `O_TRUNC`.
    pub truncate: bool,
    /// `O_SYNC` or `O_DSYNC`.
    pub synchronous: bool,
    /// It is to be run.
    pub execute: bool,
}

/// How a write is meant.
#[derive(Clone, Copy, Debug, Default)]
pub struct Writing {
    /// Setuid and setgid must go.
    pub strip: bool,
    /// What is to be durable when it is answered.
    pub sync: Option<WriteSync>,
}

/// What a write is to make durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteSync {
    /// What reading it back needs.
    Data,
    /// The metadata as well.
    All,
}

impl Writing {
    /// What the flags of `open(2)`, or of `pwritev2(2)` as the kernel tells them here, ask for.
    pub fn from_flags(strip: bool, flags: i32) -> Writing {
        let sync = match flags & libc::O_SYNC {
            // O_DSYNC is a part of it.
            libc::O_SYNC => Some(WriteSync::All),
            libc::O_DSYNC => Some(WriteSync::Data),
            _ => None,
        };
        Writing { strip, sync }
    }
}

/// Kernels that drop what they have cached of a file also after a write past the cache: those
/// before leave what somebody read meanwhile, and from 5.15 to 6.5 all that was read before.
const PAST_CACHE_SINCE: (u32, u32, u32) = (6, 18, 20);

/// What `execve(2)` opens a file with, in the kernel's own flags (`__FMODE_EXEC`).
const FMODE_EXEC: i32 = 0x20;

impl Wish {
    /// What the flags of `open(2)` ask for.
    pub fn from_flags(flags: i32) -> Wish {
        let mode = flags & libc::O_ACCMODE;
        Wish {
            readable: mode != libc::O_WRONLY,
            writable: mode != libc::O_RDONLY,
            truncate: flags & libc::O_TRUNC != 0,
            synchronous: flags & libc::O_DSYNC != 0,
            execute: flags & FMODE_EXEC != 0,
        }
    }
}

fn found_live(stat: Stat) -> Found {
    // Node ids are never reused.
    Found { stat, keep: Keep::WhileMounted, incarnation: 0 }
}

fn found_past(entry: crate::past::Entry) -> Found {
    let keep = if entry.lasting { Keep::Always } else { Keep::Never };
    Found { stat: entry.stat, keep, incarnation: entry.incarnation }
}

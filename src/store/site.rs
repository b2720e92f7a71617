//! A backing while a store is being opened: its path for people, its handle for work, and the files
//! of its private directory.
//!
//! Everything goes through [`Backing`], so a symlink planted in the private directory leads
//! nowhere.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, IoContext, Result};
use crate::history::ranges::ByteRange;
use crate::replica::backing::{
    Access, Backing, Creds, DirEntry, Handle, RenameMode, SetTime, Stat,
};
use crate::replica::guarded::Guarded;
use crate::types::{EntryName, Kind, PRIVATE_DIR, RelPath, Xattrs};

/// Directories of the private directory, made with it.
pub const PRIVATE_DIRS: [&str; 5] = ["preserved", "undo", "packs", "quarantine", "tmp"];
/// A name that [`Site::probe`] uses for an instant in the root of the backing.
const PROBE: &str = ".rearview-probe";
/// The mode of the private directory and of those in it.
const PRIVATE_MODE: u32 = 0o700;
const LOST_FOUND: &str = "lost+found";
/// Files are hashed in pieces of this size.
const READ_BYTES: usize = 1 << 20;
/// So many entries of a directory are looked at by one that is handed over.
const AT_ONCE: usize = 128;

/// One backing.
#[derive(Clone)]
pub struct Site {
    /// Its absolute path, symlinks resolved.
    pub path: PathBuf,
    /// Its handle.
    pub backing: Arc<dyn Backing>,
    /// The same, where its calls are bounded: those of a store in use are.
    pub guard: Option<Arc<Guarded>>,
}

/// A file object with all that is compared and copied of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Attributes.
    pub stat: Stat,
    /// Extended attributes, ACLs among them.
    pub xattrs: Xattrs,
    /// A symlink's target, else empty.
    pub target: Vec<u8>,
}

/// The name of one of our own files.
pub fn own_name(name: &str) -> EntryName {
    EntryName::new(name).expect("the names of our own files are entry names")
}

/// The path of something in the private directory.
pub fn private(path: &str) -> RelPath {
    RelPath::parse(format!("{PRIVATE_DIR}/{path}")).expect("the paths of our own files are paths")
}

/// The ids that our own files get: the process's.
pub fn own_creds() -> Creds {
    Creds {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        umask: 0,
    }
}

impl Site {
    /// The full path of `path`, for texts.
    pub fn at(&self, path: &RelPath) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        match path.is_root() {
            true => self.path.clone(),
            false => self.path.join(std::ffi::OsStr::from_bytes(&path.to_bytes())),
        }
    }

    /// The full path of one of our own files.
    pub fn private_path(&self, name: &str) -> PathBuf {
        self.path.join(PRIVATE_DIR).join(name)
    }

    /// Opens a directory.
    pub fn dir(&self, path: &RelPath) -> Result<Handle> {
        self.backing.open_dir(path).context("open the directory", self.at(path))
    }

    /// Reads one of our own files, at most `bytes_max` of it; `None` if it is not there.
    pub fn read_private(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>> {
        let path = self.private_path(name);
        let found = self
            .backing
            .open_dir(&private(""))
            .and_then(|dir| self.backing.open_file(&dir, &own_name(name), Access::Read));
        let file = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("open", &path)?,
        };
        let mut bytes = vec![0; bytes_max];
        let count = self.backing.read_at(&file, &mut bytes, 0).context("read", &path)?;
        bytes.truncate(count);
        Ok(Some(bytes))
    }

    /// Replaces one of our own small files, durably.
    ///
    /// Two files take turns, so that on a full disk no block and no inode has to be found for it.
    pub fn write_private(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let dir = self.dir(&private(""))?;
        let path = self.private_path(name);
        let spare = own_name(&format!("{name}.new"));
        let name = own_name(name);
        let backing = &self.backing;
        let file = match backing.open_file(&dir, &spare, Access::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                backing.create(&dir, &spare, 0o600, own_creds())
            }
            other => other,
        }
        .context("create the successor of", &path)?;
        backing.write_at(&file, bytes, 0).context("write", &path)?;
        backing.truncate(&file, bytes.len() as u64).context("write", &path)?;
        // Were the rename durable before the bytes are, a power cut could leave a torn file.
        backing.sync(&file, false).context("sync", &path)?;
        let swapped = backing.rename(&dir, &spare, &dir, &name, RenameMode::Exchange);
        match swapped {
            // The first of its kind, or a filesystem that cannot exchange.
            Err(_) => backing.rename(&dir, &spare, &dir, &name, RenameMode::Replace),
            Ok(()) => Ok(()),
        }
        .context("rename", &path)?;
        backing.sync(&dir, false).context("sync the directory of", &path)
    }

    /// Makes the private directory and those in it, where they are missing.
    pub fn make_private(&self) -> Result<()> {
        self.keeping_root_times(|root| self.make_private_in(root))
    }

    /// Does `f` with the root, whose times then are what they were: what we make for ourselves is
    /// no change of the user's tree.
    fn keeping_root_times(&self, f: impl FnOnce(&Handle) -> Result<()>) -> Result<()> {
        let root = self.dir(&RelPath::root())?;
        let before = self.backing.stat(&root).context("look at", &self.path)?;
        let outcome = f(&root);
        let (atime, mtime) = (SetTime::To(before.atime), SetTime::To(before.mtime));
        if let Err(error) = self.backing.set_times(&root, atime, mtime) {
            log::debug!("cannot restore the times of {}: {error}", self.path.display());
        }
        outcome
    }

    /// Sees to it that the private directory, if there is one, is the process's own: what lies in
    /// it is believed, and was hidden from all others. `close` also closes it to them.
    ///
    /// One of another user is refused. The one exception: root takes over that of the user whose
    /// directory the backing is, who could have put anything there at any time.
    pub fn guard_private(&self, close: bool) -> Result<()> {
        let dir = match self.backing.open_dir(&private("")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("open the directory", self.private_path(""))?,
        };
        let path = self.private_path("");
        let stat = self.backing.stat(&dir).context("look at", &path)?;
        let own = own_creds();
        if stat.uid != own.uid {
            let root = self.dir(&RelPath::root())?;
            let backing_owner = self.backing.stat(&root).context("look at", &self.path)?.uid;
            if own.uid != 0 || stat.uid != backing_owner {
                return Err(Error::Refused(format!(
                    "{} belongs to user {}, not to user {} who mounts: what lies in it cannot be \
                     believed. If it is yours, change its owner",
                    shown(&path),
                    stat.uid,
                    own.uid
                )));
            }
            if close {
                self.backing.chown(&dir, Some(own.uid), Some(own.gid)).context("own", &path)?;
                let was = stat.uid;
                log::warn!("{} belonged to user {was}: it is root's from here on", shown(&path));
            }
        }
        if close && stat.mode & 0o7777 != PRIVATE_MODE {
            self.backing.chmod(&dir, PRIVATE_MODE).context("close", &path)?;
            log::warn!("{} was open (mode {:o}): it is closed", shown(&path), stat.mode);
        }
        Ok(())
    }

    fn make_private_in(&self, root: &Handle) -> Result<()> {
        self.make_dir(root, PRIVATE_DIR, &self.path)?;
        self.guard_private(true)?;
        let dir = self.dir(&private(""))?;
        for name in PRIVATE_DIRS {
            self.make_dir(&dir, name, &self.path.join(PRIVATE_DIR))?;
        }
        self.backing.sync(&dir, false).context("sync", self.private_path(""))?;
        self.backing.sync(root, false).context("sync", &self.path)
    }

    fn make_dir(&self, parent: &Handle, name: &str, parent_path: &Path) -> Result<()> {
        match self.backing.mkdir(parent, &own_name(name), PRIVATE_MODE, own_creds()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(error).context("make the directory", parent_path.join(name))
            }
            _ => Ok(()),
        }
    }

    /// Tries what a store needs of the backing's filesystem: renames between the private directory
    /// and the tree, symlinks; and warns where it has no extended attributes.
    pub fn probe(&self) -> Result<()> {
        self.keeping_root_times(|root| self.probe_in(root))
    }

    fn probe_in(&self, root: &Handle) -> Result<()> {
        let tmp = self.dir(&private("tmp"))?;
        let name = own_name(PROBE);
        let clear = || {
            let _ = self.backing.unlink(&tmp, &name);
            let _ = self.backing.unlink(root, &name);
        };
        clear();
        let result = self.try_needs(root, &tmp, &name);
        clear();
        result
    }

    fn try_needs(&self, root: &Handle, tmp: &Handle, name: &EntryName) -> Result<()> {
        let backing = &self.backing;
        let file = backing
            .create(tmp, name, 0o600, own_creds())
            .context("make a file for trying in", self.private_path("tmp"))?;
        if let Err(error) = backing.set_xattr(&file, "user.rearview".as_ref(), b"1", 0) {
            log::warn!(
                "{}: no extended attributes there ({error}): files that have some cannot be kept",
                self.path.display()
            );
        }
        backing.rename(tmp, name, root, name, RenameMode::NoReplace).context(
            "rename from the private directory (it must lie on the backing's own filesystem) to",
            &self.path,
        )?;
        backing.unlink(root, name).context("remove the file made for trying in", &self.path)?;
        backing.symlink(tmp, name, b"x", own_creds()).context(
            "make a symlink (the filesystem must be able to hold them) in",
            self.private_path("tmp"),
        )
    }

    /// The entries of a directory of the live tree, ordered by name. What is ours and a
    /// filesystem's own `lost+found` are no part of the tree.
    pub fn live_entries(&self, dir: &Handle, path: &RelPath) -> Result<Vec<DirEntry>> {
        let mut entries = self.backing.list(dir).context("list", self.at(path))?;
        if path.is_root() {
            entries.retain(|entry| {
                let name = entry.name.as_bytes();
                name != PRIVATE_DIR.as_bytes() && name != PROBE.as_bytes()
            });
            let own = own_name(LOST_FOUND);
            if entries.iter().any(|entry| entry.name == own) && self.is_lost_found(dir, &own) {
                entries.retain(|entry| entry.name != own);
            }
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Whether `lost+found` is the one that mkfs made: root's own, closed to others, with nothing
    /// in it.
    fn is_lost_found(&self, root: &Handle, name: &EntryName) -> bool {
        let Ok(stat) = self.backing.stat_at(root, name) else { return false };
        if stat.kind != Kind::Dir || stat.uid != 0 || stat.mode & 0o077 != 0 {
            return false;
        }
        let listed = self
            .backing
            .open_dir(&RelPath::root().join(name))
            .and_then(|dir| self.backing.list(&dir));
        // Unreadable to an ordinary user: it cannot be theirs.
        listed.map_or(true, |entries| entries.is_empty())
    }

    /// The BLAKE3 of parts of an open file and how many bytes they have; of a file that lacks some
    /// of them the error is [`io::ErrorKind::UnexpectedEof`].
    pub fn hash_parts(&self, file: &Handle, parts: &[ByteRange]) -> io::Result<([u8; 32], u64)> {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        for part in parts {
            let there = self.hash_into(&mut hasher, file, *part)?;
            if there < part.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes += there;
        }
        Ok((*hasher.finalize().as_bytes(), bytes))
    }

    /// The BLAKE3 of an open file and its size.
    pub fn hash(&self, file: &Handle) -> io::Result<([u8; 32], u64)> {
        let mut hasher = blake3::Hasher::new();
        let size = self.hash_into(&mut hasher, file, ByteRange { start: 0, end: u64::MAX })?;
        Ok((*hasher.finalize().as_bytes(), size))
    }

    /// Adds what a file has of a part, and tells how many bytes that are.
    fn hash_into(
        &self,
        hasher: &mut blake3::Hasher,
        file: &Handle,
        part: ByteRange,
    ) -> io::Result<u64> {
        let mut buffer = vec![0; part.len().min(READ_BYTES as u64) as usize];
        let mut left = part;
        while !left.is_empty() {
            let wanted = left.len().min(buffer.len() as u64) as usize;
            let count = self.backing.read_at(file, &mut buffer[..wanted], left.start)?;
            hasher.update(&buffer[..count]);
            left.start += count as u64;
            if count < wanted {
                break;
            }
        }
        Ok(left.start - part.start)
    }

    /// Reads an entry with all that belongs to it. `None` if it is gone.
    pub fn object(&self, dir: &Handle, path: &RelPath, name: &EntryName) -> Result<Option<Object>> {
        let (dir, own) = (dir.clone(), name.clone());
        let look = move |backing: &dyn Backing, _: &dyn Fn()| Ok(object_at(backing, &dir, &own));
        self.told(&path.join(name), self.at_once("look at", look))
    }

    /// Reads what belongs to an open object.
    pub fn object_of(&self, node: &Handle, path: &RelPath) -> Result<Object> {
        let node = node.clone();
        let look = move |backing: &dyn Backing, _: &dyn Fn()| Ok(object_of(backing, &node));
        self.told(path, self.at_once("look at", look))
    }

    /// Entries of a directory, each as [`Site::object`] tells of it.
    pub fn objects<'a>(
        &'a self,
        dir: &'a Handle,
        path: &'a RelPath,
        entries: &'a [DirEntry],
    ) -> impl Iterator<Item = Result<Option<Object>>> + 'a {
        let found = self.each(dir, entries, object_at);
        found.zip(entries).map(|(found, entry)| self.told(&path.join(&entry.name), found))
    }

    /// The attributes of what has these names in a directory.
    pub fn stats<'a>(
        &'a self,
        dir: &'a Handle,
        entries: &'a [DirEntry],
    ) -> impl Iterator<Item = io::Result<Stat>> + 'a {
        self.each(dir, entries, |backing, dir, name| backing.stat_at(dir, name)).map(|found| found?)
    }

    /// Opens a file for reading and reads its first bytes, past what the kernel has of it in memory
    /// if that is to be forgotten.
    pub fn begin_reading(
        &self,
        dir: &Handle,
        name: &EntryName,
        bytes_max: usize,
        forget: bool,
    ) -> io::Result<(Handle, io::Result<Vec<u8>>)> {
        let (dir, name) = (dir.clone(), name.clone());
        self.at_once("read_at", move |backing, _| {
            let file = backing.open_file(&dir, &name, Access::Read)?;
            if forget {
                backing.forget_cached(&file);
            }
            let mut bytes = vec![0; bytes_max];
            let count = backing.read_at(&file, &mut bytes, 0);
            bytes.truncate(*count.as_ref().unwrap_or(&0));
            Ok((file, count.map(|_| bytes)))
        })
    }

    /// Looks at entries of a directory, many at once: handed over one by one, each would cost two
    /// turns of a processor.
    fn each<'a, T: Send + 'static>(
        &'a self,
        dir: &'a Handle,
        entries: &'a [DirEntry],
        look: fn(&dyn Backing, &Handle, &EntryName) -> T,
    ) -> impl Iterator<Item = io::Result<T>> + 'a {
        entries.chunks(AT_ONCE).flat_map(move |chunk| {
            let dir = dir.clone();
            let names: Vec<EntryName> = chunk.iter().map(|entry| entry.name.clone()).collect();
            let found = self.at_once("look at", move |backing, alive| {
                let look = |name| {
                    alive();
                    look(backing, &dir, name)
                };
                Ok(names.iter().map(look).collect::<Vec<_>>())
            });
            match found {
                Ok(found) => found.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            }
        })
    }

    /// Makes several calls, which are handed over as one where they are bounded.
    fn at_once<T: Send + 'static>(
        &self,
        op: &'static str,
        calls: impl FnOnce(&dyn Backing, &dyn Fn()) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match &self.guard {
            Some(guard) => guard.batch(op, calls),
            None => calls(&*self.backing, &|| ()),
        }
    }

    fn told<T>(&self, path: &RelPath, found: io::Result<Result<T, Failed>>) -> Result<T> {
        let found = found.context("look at", self.at(path))?;
        found.map_err(|(action, source)| Error::Io { action, path: self.at(path), source })
    }
}

/// In doing what a look failed, and how.
type Failed = (&'static str, io::Error);

fn object_at(
    backing: &dyn Backing,
    dir: &Handle,
    name: &EntryName,
) -> Result<Option<Object>, Failed> {
    match backing.open_node(dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(("open", error)),
        Ok(node) => object_of(backing, &node).map(Some),
    }
}

fn object_of(backing: &dyn Backing, node: &Handle) -> Result<Object, Failed> {
    let stat = backing.stat(node).map_err(|error| ("read the attributes of", error))?;
    let xattrs =
        backing.xattrs(node).map_err(|error| ("read the extended attributes of", error))?;
    let target = match stat.kind {
        Kind::Symlink => backing.readlink(node).map_err(|error| ("read the symlink", error))?,
        _ => Vec::new(),
    };
    Ok(Object { stat, xattrs, target })
}

/// A path for people.
fn shown(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    crate::types::escape(path.as_os_str().as_bytes())
}

/// Whether the error says that an entry is another mount's root, which is no part of the backing.
pub fn is_other_mount(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::XDEV.raw_os_error())
}

/// Takes "is not there" for success.
pub fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

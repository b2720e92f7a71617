//! What a simulated disk holds, and the changes that make it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

pub type Ino = u64;
pub const ROOT: Ino = 1;
/// The unit in which a disk keeps data or loses it.
pub const PAGE: usize = 4096;

#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    File(Vec<u8>),
    Dir(BTreeMap<OsString, Ino>),
    Symlink(Vec<u8>),
    Other(FileType),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Inode {
    pub body: Body,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub atime: SystemTime,
    pub mtime: SystemTime,
    pub ctime: SystemTime,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// A place for a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub dir: Ino,
    pub name: OsString,
}

/// Attributes that are set together; `None` is left alone.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<SystemTime>,
    pub mtime: Option<SystemTime>,
}

/// One change of a disk, or a demand that changes be durable.
#[derive(Clone, Debug)]
pub enum Change {
    Make { ino: Ino, inode: Box<Inode>, at: Place },
    Link { ino: Ino, at: Place },
    Remove { at: Place },
    Rename { from: Place, to: Place, exchange: bool },
    Attributes { ino: Ino, set: Attributes },
    Xattr { ino: Ino, name: OsString, value: Option<Vec<u8>> },
    Size { ino: Ino, size: usize },
    Write { ino: Ino, at: usize, bytes: Vec<u8> },
    Zero { ino: Ino, start: usize, end: usize },
    Sync { ino: Ino, data_only: bool },
    SyncAll,
}

/// A change and when it came.
#[derive(Clone, Debug)]
pub struct Event {
    pub change: Change,
    pub when: SystemTime,
}

impl Event {
    pub fn now(change: Change) -> Event {
        Event { change, when: SystemTime::now() }
    }
}

#[derive(Clone, Debug)]
pub struct Tree {
    pub inodes: BTreeMap<Ino, Inode>,
}

impl Tree {
    pub fn new() -> Tree {
        let root = Inode::new(Body::Dir(BTreeMap::new()), 0o755);
        Tree { inodes: BTreeMap::from([(ROOT, root)]) }
    }

    pub fn entries(&self, dir: Ino) -> Option<&BTreeMap<OsString, Ino>> {
        match &self.inodes.get(&dir)?.body {
            Body::Dir(entries) => Some(entries),
            _ => None,
        }
    }

    pub fn find(&self, place: &Place) -> Option<Ino> {
        self.entries(place.dir)?.get(&place.name).copied()
    }

    pub fn file(&mut self, ino: Ino) -> Option<&mut Vec<u8>> {
        match &mut self.inodes.get_mut(&ino)?.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    /// All places of an object.
    pub fn places(&self, ino: Ino) -> Vec<Place> {
        let mut found = Vec::new();
        for (&dir, inode) in &self.inodes {
            if let Body::Dir(entries) = &inode.body {
                let own = entries.iter().filter(|(_, child)| **child == ino);
                found.extend(own.map(|(name, _)| Place { dir, name: name.clone() }));
            }
        }
        found
    }

    pub fn enter(&mut self, at: &Place, ino: Ino) {
        if let Some(Inode { body: Body::Dir(entries), .. }) = self.inodes.get_mut(&at.dir) {
            entries.insert(at.name.clone(), ino);
        }
    }

    pub fn leave(&mut self, at: &Place) {
        if let Some(Inode { body: Body::Dir(entries), .. }) = self.inodes.get_mut(&at.dir) {
            entries.remove(&at.name);
        }
    }

    /// Notes a change of an object's record, or of its content too.
    pub fn touch(&mut self, ino: Ino, content: bool, when: SystemTime) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.ctime = when;
            if content {
                inode.mtime = inode.ctime;
            }
        }
    }

    /// Does a change. What it is about must be there, or nothing is done.
    pub fn apply(&mut self, event: &Event) {
        let when = event.when;
        match &event.change {
            Change::Make { ino, inode, at } => {
                self.inodes.insert(*ino, (**inode).clone());
                self.enter(at, *ino);
                self.touch(at.dir, true, when);
            }
            Change::Link { ino, at } => {
                self.enter(at, *ino);
                self.touch(*ino, false, when);
                self.touch(at.dir, true, when);
            }
            Change::Remove { at } => {
                if let Some(ino) = self.find(at) {
                    self.touch(ino, false, when);
                }
                self.leave(at);
                self.touch(at.dir, true, when);
            }
            Change::Rename { from, to, exchange } => self.rename(from, to, *exchange, when),
            Change::Attributes { ino, set } => {
                if let Some(inode) = self.inodes.get_mut(ino) {
                    inode.mode = set.mode.unwrap_or(inode.mode);
                    inode.uid = set.uid.unwrap_or(inode.uid);
                    inode.gid = set.gid.unwrap_or(inode.gid);
                    inode.atime = set.atime.unwrap_or(inode.atime);
                    inode.mtime = set.mtime.unwrap_or(inode.mtime);
                }
                self.touch(*ino, false, when);
            }
            Change::Xattr { ino, name, value } => {
                if let Some(inode) = self.inodes.get_mut(ino) {
                    match value {
                        Some(value) => inode.xattrs.insert(name.clone(), value.clone()),
                        None => inode.xattrs.remove(name),
                    };
                }
                self.touch(*ino, false, when);
            }
            Change::Size { ino, size } => {
                if let Some(content) = self.file(*ino) {
                    content.resize(*size, 0);
                }
                self.touch(*ino, true, when);
            }
            Change::Write { ino, at, bytes } => {
                if let Some(content) = self.file(*ino) {
                    put(content, *at, bytes);
                }
                self.touch(*ino, true, when);
            }
            Change::Zero { ino, start, end } => {
                if let Some(content) = self.file(*ino) {
                    let end = content.len().min(*end);
                    if *start < end {
                        content[*start..end].fill(0);
                    }
                }
                self.touch(*ino, true, when);
            }
            Change::Sync { .. } | Change::SyncAll => {}
        }
    }

    fn rename(&mut self, from: &Place, to: &Place, exchange: bool, when: SystemTime) {
        let Some(moved) = self.find(from) else { return };
        let target = self.find(to);
        match (exchange, target) {
            (true, Some(other)) => self.enter(from, other),
            // Both names are of one object already: POSIX leaves them.
            (false, Some(other)) if other == moved => return,
            _ => self.leave(from),
        }
        self.enter(to, moved);
        for ino in [Some(moved), target].into_iter().flatten() {
            self.touch(ino, false, when);
        }
        self.touch(from.dir, true, when);
        self.touch(to.dir, true, when);
    }

    /// Writes the tree into an empty directory of a real filesystem.
    pub fn materialise(&self, root: &Path) {
        let mut made = BTreeMap::new();
        self.write_dir(ROOT, root, &mut made);
    }

    fn write_dir(&self, dir: Ino, path: &Path, made: &mut BTreeMap<Ino, PathBuf>) {
        for (name, ino) in self.entries(dir).into_iter().flatten() {
            // An entry whose object never reached the disk is none.
            let Some(inode) = self.inodes.get(ino) else { continue };
            let at = path.join(name);
            if let Some(first) = made.get(ino) {
                fs::hard_link(first, &at).expect("a link can be made");
                continue;
            }
            match &inode.body {
                Body::File(content) => write_file(&at, content),
                Body::Dir(_) => {
                    fs::create_dir(&at).expect("a directory can be made");
                    self.write_dir(*ino, &at, made);
                }
                Body::Symlink(target) => {
                    std::os::unix::fs::symlink(OsStr::from_bytes(target), &at).expect("a symlink");
                }
                Body::Other(kind) => {
                    let mode = Mode::from_raw_mode(0o600);
                    rustix::fs::mknodat(CWD, &at, *kind, mode, inode.rdev.into()).expect("a node");
                }
            }
            if !matches!(inode.body, Body::Dir(_)) {
                made.insert(*ino, at.clone());
            }
            inode.dress(&at);
        }
        self.inodes[&dir].dress(path);
    }
}

impl Inode {
    pub fn new(body: Body, mode: u32) -> Inode {
        let now = SystemTime::now();
        Inode {
            body,
            mode,
            uid: 0,
            gid: 0,
            rdev: 0,
            atime: now,
            mtime: now,
            ctime: now,
            xattrs: BTreeMap::new(),
        }
    }

    /// Gives an object in the real filesystem these attributes.
    fn dress(&self, at: &Path) {
        let (uid, gid) = (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(CWD, at, uid, gid, flags).expect("an owner can be set");
        if !matches!(self.body, Body::Symlink(_)) {
            let mode = Mode::from_raw_mode(self.mode);
            rustix::fs::chmodat(CWD, at, mode, AtFlags::empty()).expect("a mode can be set");
        }
        for (name, value) in &self.xattrs {
            rustix::fs::lsetxattr(at, name, value, XattrFlags::empty()).expect("an xattr");
        }
        let times = Timestamps {
            last_access: timespec(self.atime),
            last_modification: timespec(self.mtime),
        };
        rustix::fs::utimensat(CWD, at, &times, flags).expect("times can be set");
    }
}

fn write_file(at: &Path, content: &[u8]) {
    let file = fs::File::create_new(at).expect("a file can be made");
    file.set_len(content.len() as u64).expect("a file can be sized");
    for (index, page) in content.chunks(PAGE).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, (index * PAGE) as u64).expect("a file can be written");
        }
    }
}

pub fn put(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if content.len() < at + bytes.len() {
        content.resize(at + bytes.len(), 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

fn timespec(time: SystemTime) -> Timespec {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => {
            Timespec { tv_sec: after.as_secs() as i64, tv_nsec: after.subsec_nanos().into() }
        }
        Err(before) => {
            let before = before.duration();
            let nanos = i64::from(before.subsec_nanos());
            let borrow = i64::from(nanos > 0);
            Timespec {
                tv_sec: -(before.as_secs() as i64) - borrow,
                tv_nsec: (borrow * 1_000_000_000 - nanos) as _,
            }
        }
    }
}

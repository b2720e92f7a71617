//! The nodes of the filesystem, in memory, and what the disks do with each change.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo, Request, TimeOrNow};
use rustix::fs::Timespec;

use super::disks::Disks;

pub const DIR: FileType = FileType::Directory;

/// What a node has beside its attributes.
pub enum Body {
    Dir(BTreeMap<OsString, u64>),
    /// Of a file, or a symbolic link's target.
    Bytes(Vec<u8>),
    /// On the disks; the attributes have the size.
    OnDisk,
}

pub struct Node {
    pub attr: FileAttr,
    /// The directory and the name.
    pub place: (u64, OsString),
    pub body: Body,
}

pub struct Nodes {
    pub all: HashMap<u64, Node>,
    pub last: u64,
    pub disks: Disks,
}

impl Nodes {
    pub fn node(&mut self, ino: INodeNo) -> Result<&mut Node, Errno> {
        self.all.get_mut(&ino.0).ok_or(Errno::ESTALE)
    }

    pub fn names(&mut self, ino: INodeNo) -> Result<&mut BTreeMap<OsString, u64>, Errno> {
        match &mut self.node(ino)?.body {
            Body::Dir(names) => Ok(names),
            Body::Bytes(_) | Body::OnDisk => Err(Errno::ENOTDIR),
        }
    }

    pub fn bytes(&mut self, ino: INodeNo) -> Result<&mut Vec<u8>, Errno> {
        match &mut self.node(ino)?.body {
            Body::Bytes(bytes) => Ok(bytes),
            Body::Dir(_) => Err(Errno::EISDIR),
            Body::OnDisk => Err(Errno::EIO),
        }
    }

    pub fn named(&mut self, parent: INodeNo, name: &OsStr) -> Result<INodeNo, Errno> {
        self.names(parent)?.get(name).map(|&ino| INodeNo(ino)).ok_or(Errno::ENOENT)
    }

    pub fn attr(&mut self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let node = self.node(ino)?;
        if let Body::Bytes(bytes) = &node.body {
            node.attr.size = bytes.len() as u64;
            node.attr.blocks = node.attr.size.div_ceil(512);
        }
        Ok(node.attr)
    }

    pub fn make(
        &mut self,
        (parent, name): (INodeNo, &OsStr),
        (kind, mode): (FileType, u32),
        bytes: &[u8],
        req: &Request,
    ) -> Result<FileAttr, Errno> {
        let ino = self.last + 1;
        if self.names(parent)?.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        self.names(parent)?.insert(name.into(), ino);
        self.last = ino;
        let attr = attr_of(ino, kind, mode, (req.uid(), req.gid()));
        let place = (parent.0, name);
        let (body, made) = match kind {
            DIR => (Body::Dir(BTreeMap::new()), self.disks.mkdir(place, ino, mode)),
            FileType::RegularFile if !self.disks.is_none() => {
                (Body::OnDisk, self.disks.create(place, ino, mode))
            }
            FileType::RegularFile => (Body::Bytes(Vec::new()), Ok(())),
            _ => (Body::Bytes(bytes.into()), self.disks.symlink(place, bytes)),
        };
        made.map_err(errno)?;
        self.all.insert(ino, Node { attr, place: (parent.0, name.into()), body });
        self.attr(INodeNo(ino))
    }

    pub fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let ino = self.named(parent, name)?;
        if self.names(ino).is_ok_and(|names| !names.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        self.names(parent)?.remove(name);
        let place = (parent.0, name);
        let removed = match self.all.remove(&ino.0) {
            Some(Node { body: Body::Dir(_), .. }) => self.disks.rmdir(place, ino.0),
            _ => self.disks.unlink(place, ino.0),
        };
        removed.map_err(errno)
    }

    pub fn rename(
        &mut self,
        (parent, name): (INodeNo, &OsStr),
        (new_parent, new_name): (INodeNo, &OsStr),
    ) -> Result<(), Errno> {
        let ino = self.named(parent, name)?;
        match self.remove(new_parent, new_name) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        self.disks.rename((parent.0, name), (new_parent.0, new_name)).map_err(errno)?;
        self.names(parent)?.remove(name);
        self.names(new_parent)?.insert(new_name.into(), ino.0);
        self.node(ino)?.place = (new_parent.0, new_name.into());
        Ok(())
    }

    pub fn resize(&mut self, ino: INodeNo, size: u64) -> Result<(), Errno> {
        let Nodes { all, disks, .. } = self;
        let node = all.get_mut(&ino.0).ok_or(Errno::ESTALE)?;
        match &mut node.body {
            Body::Dir(_) => return Err(Errno::EISDIR),
            Body::Bytes(bytes) => bytes.resize(size as usize, 0),
            Body::OnDisk => {
                let (parent, name) = &node.place;
                disks.resize((*parent, name), ino.0, size).map_err(errno)?;
                node.attr.size = size;
            }
        }
        Ok(())
    }

    pub fn set(
        &mut self,
        ino: INodeNo,
        mode: Option<u32>,
        (uid, gid): (Option<u32>, Option<u32>),
        mtime: Option<TimeOrNow>,
    ) -> Result<(), Errno> {
        let Nodes { all, disks, .. } = self;
        let Node { attr, place: (parent, name), .. } = all.get_mut(&ino.0).ok_or(Errno::ESTALE)?;
        let place = (*parent, name.as_os_str());
        if let Some(mode) = mode {
            disks.chmod(place, mode).map_err(errno)?;
            attr.perm = (mode & 0o7777) as u16;
        }
        if uid.is_some() || gid.is_some() {
            disks.chown(place, uid, gid).map_err(errno)?;
            attr.uid = uid.unwrap_or(attr.uid);
            attr.gid = gid.unwrap_or(attr.gid);
        }
        let mtime = match mtime {
            Some(TimeOrNow::SpecificTime(time)) => time,
            Some(TimeOrNow::Now) => SystemTime::now(),
            None => return Ok(()),
        };
        disks.set_mtime(place, timespec(mtime)).map_err(errno)?;
        attr.mtime = mtime;
        Ok(())
    }

    pub fn open(&mut self, ino: INodeNo, to_write: bool) -> Result<(), Errno> {
        let Nodes { all, disks, .. } = self;
        let Node { place: (parent, name), body, .. } = all.get(&ino.0).ok_or(Errno::ESTALE)?;
        match body {
            Body::OnDisk => disks.open((*parent, name), ino.0, to_write).map_err(errno),
            Body::Dir(_) | Body::Bytes(_) => Ok(()),
        }
    }

    pub fn read(&mut self, ino: INodeNo, offset: u64, size: usize) -> Result<Cow<'_, [u8]>, Errno> {
        let Nodes { all, disks, .. } = self;
        match &all.get(&ino.0).ok_or(Errno::ESTALE)?.body {
            Body::Dir(_) => Err(Errno::EISDIR),
            Body::OnDisk => disks.read(ino.0, offset, size).map(Cow::from).map_err(errno),
            Body::Bytes(bytes) => {
                let from = bytes.len().min(offset as usize);
                Ok(Cow::from(&bytes[from..bytes.len().min(from + size)]))
            }
        }
    }

    pub fn write(&mut self, ino: INodeNo, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let Nodes { all, disks, .. } = self;
        let node = all.get_mut(&ino.0).ok_or(Errno::ESTALE)?;
        let (from, to) = (offset as usize, offset as usize + data.len());
        match &mut node.body {
            Body::Dir(_) => return Err(Errno::EISDIR),
            Body::OnDisk => {
                disks.write(ino.0, offset, data).map_err(errno)?;
                node.attr.size = node.attr.size.max(to as u64);
                node.attr.blocks = node.attr.size.div_ceil(512);
            }
            Body::Bytes(bytes) => {
                if bytes.len() < to {
                    bytes.resize(to, 0);
                }
                bytes[from..to].copy_from_slice(data);
            }
        }
        Ok(data.len())
    }

    pub fn listed(
        &mut self,
        dir: INodeNo,
        offset: u64,
    ) -> Result<Vec<(OsString, FileAttr)>, Errno> {
        let names = self.names(dir)?;
        let names: Vec<(OsString, u64)> =
            names.iter().skip(offset as usize).map(|(name, ino)| (name.clone(), *ino)).collect();
        names.into_iter().map(|(name, ino)| Ok((name, self.attr(INodeNo(ino))?))).collect()
    }
}

pub fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn timespec(time: SystemTime) -> Timespec {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timespec { tv_sec: since.as_secs() as i64, tv_nsec: since.subsec_nanos().into() }
}

pub fn attr_of(ino: u64, kind: FileType, mode: u32, (uid, gid): (u32, u32)) -> FileAttr {
    let now = SystemTime::now();
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind,
        perm: (mode & 0o7777) as u16,
        nlink: if kind == DIR { 2 } else { 1 },
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

//! The least that a filesystem costs which programs reach through FUSE: one that keeps all in
//! memory, on no disk, once, without history. It has the library, the kernel options and the
//! answers of ours, so what the same work takes here no change below `src/fuse` can undercut.
//!
//! `scripts/bench speed --systems floor,...` measures it beside the others.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

const TTL: Duration = Duration::from_secs(86400);
const DIR: FileType = FileType::Directory;

/// What a node has beside its attributes.
enum Body {
    Dir(BTreeMap<OsString, u64>),
    Bytes(Vec<u8>),
}

struct Node {
    attr: FileAttr,
    body: Body,
}

struct Nodes {
    all: HashMap<u64, Node>,
    last: u64,
}

struct Memory(Mutex<Nodes>);

impl Nodes {
    fn node(&mut self, ino: INodeNo) -> Result<&mut Node, Errno> {
        self.all.get_mut(&ino.0).ok_or(Errno::ESTALE)
    }

    fn names(&mut self, ino: INodeNo) -> Result<&mut BTreeMap<OsString, u64>, Errno> {
        match &mut self.node(ino)?.body {
            Body::Dir(names) => Ok(names),
            Body::Bytes(_) => Err(Errno::ENOTDIR),
        }
    }

    fn bytes(&mut self, ino: INodeNo) -> Result<&mut Vec<u8>, Errno> {
        match &mut self.node(ino)?.body {
            Body::Bytes(bytes) => Ok(bytes),
            Body::Dir(_) => Err(Errno::EISDIR),
        }
    }

    fn named(&mut self, parent: INodeNo, name: &OsStr) -> Result<INodeNo, Errno> {
        self.names(parent)?.get(name).map(|&ino| INodeNo(ino)).ok_or(Errno::ENOENT)
    }

    fn attr(&mut self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let node = self.node(ino)?;
        if let Body::Bytes(bytes) = &node.body {
            node.attr.size = bytes.len() as u64;
            node.attr.blocks = node.attr.size.div_ceil(512);
        }
        Ok(node.attr)
    }

    fn make(
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
        let body = if kind == DIR { Body::Dir(BTreeMap::new()) } else { Body::Bytes(bytes.into()) };
        self.all.insert(ino, Node { attr, body });
        self.attr(INodeNo(ino))
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let ino = self.named(parent, name)?;
        if self.names(ino).is_ok_and(|names| !names.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        self.names(parent)?.remove(name);
        self.all.remove(&ino.0);
        Ok(())
    }

    fn listed(&mut self, dir: INodeNo, offset: u64) -> Result<Vec<(OsString, FileAttr)>, Errno> {
        let names = self.names(dir)?;
        let names: Vec<(OsString, u64)> =
            names.iter().skip(offset as usize).map(|(name, ino)| (name.clone(), *ino)).collect();
        names.into_iter().map(|(name, ino)| Ok((name, self.attr(INodeNo(ino))?))).collect()
    }
}

fn attr_of(ino: u64, kind: FileType, mode: u32, (uid, gid): (u32, u32)) -> FileAttr {
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

fn answer(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn answer_entry(reply: ReplyEntry, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        // Kept by the kernel as "there is no such name", as ours is.
        Err(Errno::ENOENT) => reply.entry(&TTL, &attr_of(0, DIR, 0, (0, 0)), Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

fn answer_attr(reply: ReplyAttr, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attr) => reply.attr(&TTL, &attr),
        Err(errno) => reply.error(errno),
    }
}

impl fuser::Filesystem for Memory {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        rearviewfs::fuse::ask_kernel(config);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut nodes = self.0.lock();
        let found = nodes.named(parent, name).and_then(|ino| nodes.attr(ino));
        answer_entry(reply, found);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer_attr(reply, self.0.lock().attr(ino));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut nodes = self.0.lock();
        let done = (|| {
            if let Some(size) = size {
                nodes.bytes(ino)?.resize(size as usize, 0);
            }
            let attr = &mut nodes.node(ino)?.attr;
            attr.perm = mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
            attr.uid = uid.unwrap_or(attr.uid);
            attr.gid = gid.unwrap_or(attr.gid);
            match mtime {
                Some(TimeOrNow::SpecificTime(time)) => attr.mtime = time,
                Some(TimeOrNow::Now) => attr.mtime = SystemTime::now(),
                None => {}
            }
            nodes.attr(ino)
        })();
        answer_attr(reply, done);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.lock().bytes(ino) {
            Ok(target) => reply.data(target),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.0.lock().make((parent, name), (DIR, mode & !umask), &[], req);
        answer_entry(reply, made);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let bytes = target.as_os_str().as_bytes();
        let made = self.0.lock().make((parent, name), (FileType::Symlink, 0o777), bytes, req);
        answer_entry(reply, made);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let what = (FileType::RegularFile, mode & !umask);
        match self.0.lock().make((parent, name), what, &[], req) {
            Ok(attr) => {
                let mut answer = FopenFlags::FOPEN_KEEP_CACHE;
                if flags & libc::O_ACCMODE == libc::O_WRONLY {
                    answer |= FopenFlags::FOPEN_DIRECT_IO;
                }
                reply.created(&TTL, &attr, Generation(0), FileHandle(1), answer);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.0.lock().remove(parent, name));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.0.lock().remove(parent, name));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut nodes = self.0.lock();
        let done = (|| {
            let ino = nodes.named(parent, name)?;
            let _ = nodes.remove(newparent, newname);
            nodes.names(parent)?.remove(name);
            nodes.names(newparent)?.insert(newname.into(), ino.0);
            Ok(())
        })();
        answer(reply, done);
    }

    fn open(&self, _req: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut answer = FopenFlags::FOPEN_KEEP_CACHE;
        match flags.0 & libc::O_ACCMODE {
            libc::O_RDONLY => answer |= FopenFlags::FOPEN_NOFLUSH,
            libc::O_WRONLY => answer |= FopenFlags::FOPEN_DIRECT_IO,
            _ => {}
        }
        reply.opened(FileHandle(1), answer);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.lock().bytes(ino) {
            Ok(bytes) => {
                let from = bytes.len().min(offset as usize);
                reply.data(&bytes[from..bytes.len().min(from + size as usize)]);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.lock().bytes(ino) {
            Ok(bytes) => {
                let (from, to) = (offset as usize, offset as usize + data.len());
                if bytes.len() < to {
                    bytes.resize(to, 0);
                }
                bytes[from..to].copy_from_slice(data);
                reply.written(data.len() as u32);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let mut nodes = self.0.lock();
        let copied = (|| {
            let from = nodes.bytes(ino_in)?;
            let start = from.len().min(offset_in as usize);
            let part = from[start..from.len().min(start + len as usize)].to_vec();
            let (to, at) = (nodes.bytes(ino_out)?, offset_out as usize);
            if to.len() < at + part.len() {
                to.resize(at + part.len(), 0);
            }
            to[at..at + part.len()].copy_from_slice(&part);
            Ok(part.len())
        })();
        match copied {
            Ok(copied) => reply.written(copied as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        reply.opened(FileHandle(1), flags);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.0.lock().listed(ino, offset) {
            Ok(listed) => {
                for (at, (name, attr)) in (offset + 1..).zip(listed) {
                    if reply.add(attr.ino, at, attr.kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        match self.0.lock().listed(ino, offset) {
            Ok(listed) => {
                for (at, (name, attr)) in (offset + 1..).zip(listed) {
                    if reply.add(attr.ino, at, name, &TTL, &attr, Generation(0)) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }
}

/// Serves the mountpoint `FLOOR` until it is unmounted.
#[test]
#[ignore = "a server for scripts/bench"]
fn serve() {
    let point = PathBuf::from(std::env::var_os("FLOOR").expect("FLOOR names a mountpoint"));
    let root = Node { attr: attr_of(1, DIR, 0o755, (0, 0)), body: Body::Dir(BTreeMap::new()) };
    let memory = Memory(Mutex::new(Nodes { all: HashMap::from([(1, root)]), last: 1 }));
    let mut config = Config::default();
    config.n_threads = Some(2);
    config.clone_fd = true;
    config.acl = SessionACL::All;
    config.mount_options =
        vec![MountOption::FSName("floor".into()), MountOption::DefaultPermissions];
    fuser::mount(memory, &point, &config).expect("it mounts");
}

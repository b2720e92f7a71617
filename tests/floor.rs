//! The least that a filesystem costs which programs reach through FUSE: one that keeps all in
//! memory, on no disk, once, without history. It has the library, the kernel options and the
//! answers of ours, so what the same work takes here no change below `src/fuse` can undercut.
//!
//! With disks it keeps files on each of them, and what is deleted as well, and does nothing else
//! ([`floor::disks`]): the least that a mirror costs which keeps what was. Names and attributes are
//! told from memory then as before. One lock is held meanwhile, so it bounds one program at a time.
//!
//! `scripts/bench speed --systems floor,floor-twice,...` measures it beside the others.

mod floor {
    pub mod disks;
    pub mod nodes;
}

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use floor::disks::Disks;
use floor::nodes::{Body, DIR, Node, Nodes, attr_of, errno};
use fuser::{
    BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

const TTL: Duration = Duration::from_secs(86400);

struct Memory(Mutex<Nodes>);

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
                nodes.resize(ino, size)?;
            }
            nodes.set(ino, mode, (uid, gid), mtime)?;
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
        let done = self.0.lock().rename((parent, name), (newparent, newname));
        answer(reply, done);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut answer = FopenFlags::FOPEN_KEEP_CACHE;
        let mode = flags.0 & libc::O_ACCMODE;
        match mode {
            libc::O_RDONLY => answer |= FopenFlags::FOPEN_NOFLUSH,
            libc::O_WRONLY => answer |= FopenFlags::FOPEN_DIRECT_IO,
            _ => {}
        }
        match self.0.lock().open(ino, mode != libc::O_RDONLY) {
            Ok(()) => reply.opened(FileHandle(1), answer),
            Err(errno) => reply.error(errno),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.0.lock().disks.release(ino.0);
        reply.ok();
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
        match self.0.lock().read(ino, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
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
        match self.0.lock().write(ino, offset, data) {
            Ok(written) => reply.written(written as u32),
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
            let part = nodes.read(ino_in, offset_in, len as usize)?.into_owned();
            nodes.write(ino_out, offset_out, &part)
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

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.0.lock().disks.sync(ino.0).map_err(errno));
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

/// Serves the mountpoint `FLOOR` until it is unmounted, from the empty directories `FLOOR_DISKS`,
/// which are separated by colons.
#[test]
#[ignore = "a server for scripts/bench"]
fn serve() {
    let point = PathBuf::from(std::env::var_os("FLOOR").expect("FLOOR names a mountpoint"));
    let paths = std::env::var_os("FLOOR_DISKS").unwrap_or_default();
    let paths: Vec<PathBuf> =
        std::env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty()).collect();
    let disks = Disks::new(paths.iter().map(PathBuf::as_path), 1).expect("its disks are there");
    let attr = attr_of(1, DIR, 0o755, (0, 0));
    let root = Node { attr, place: (1, ".".into()), body: Body::Dir(BTreeMap::new()) };
    let memory = Memory(Mutex::new(Nodes { all: HashMap::from([(1, root)]), last: 1, disks }));
    let mut config = Config::default();
    config.n_threads = Some(2);
    config.clone_fd = true;
    config.acl = SessionACL::All;
    config.mount_options =
        vec![MountOption::FSName("floor".into()), MountOption::DefaultPermissions];
    fuser::mount(memory, &point, &config).expect("it mounts");
}

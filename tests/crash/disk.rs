//! A disk in memory that remembers every change in the order in which it came: what a crash may
//! leave of them is [`super::cut`]'s to say.
//!
//! It is a real filesystem, by FUSE, so that nothing a store does escapes it: not what SQLite
//! writes, nor markers, nor recovery itself. The one thing that the kernel does not pass on is
//! `syncfs`; the store's seam for backings tells of it.
//!
//! SQLite maps its `-shm` file, which is void after a crash. The process that serves a mapping must
//! not be the one that maps: to unmap it waits for its own answer. So such a file is passed through
//! to a real one.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BackgroundSession, BackingId, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow,
    WriteFlags,
};
use parking_lot::Mutex;
use rustix::mount::UnmountFlags;

use super::answers::{Answer, TTL, attr, end, entered, kind, time, value};
use super::tree::{Attributes, Body, Change, Event, Ino, Inode, Place, Tree};

/// The changes of all disks of one experiment, in one order.
#[derive(Default)]
pub struct Recorder(Mutex<Vec<(usize, Event)>>);

impl Recorder {
    /// How many changes there were.
    pub fn position(&self) -> usize {
        self.0.lock().len()
    }

    /// The changes of one disk among the first `until` of all.
    pub fn changes_of(&self, disk: usize, until: usize) -> Vec<Event> {
        let log = self.0.lock();
        let own = log[..until].iter().filter(|(of, _)| *of == disk);
        own.map(|(_, event)| event.clone()).collect()
    }

    pub fn note(&self, disk: usize, event: Event) {
        self.0.lock().push((disk, event));
    }
}

/// A mounted disk; unmounted when dropped.
pub struct Disk {
    at: PathBuf,
    session: Option<BackgroundSession>,
}

impl Disk {
    /// Mounts a disk that holds `tree`.
    pub fn mount(at: &Path, number: usize, tree: Tree, recorder: Arc<Recorder>) -> Disk {
        let next = tree.inodes.keys().max().map_or(2, |last| last + 1);
        let state = Mutex::new((tree, next));
        let server = Server { number, recorder, state, mapped: Mutex::default() };
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("rearview-test-disk".into()),
            MountOption::Dev,
            MountOption::Suid,
        ];
        config.acl = SessionACL::All;
        let session = fuser::spawn_mount(server, at, &config).expect("a test disk can be mounted");
        Disk { at: at.to_path_buf(), session: Some(session) }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A store that was dropped may be held by a thread of its own for a moment more.
        let flags = UnmountFlags::empty();
        crate::common::wait_until("a test disk is not used any more", 20, || {
            rustix::mount::unmount(&self.at, flags) != Err(rustix::io::Errno::BUSY)
        });
        if let Some(session) = self.session.take()
            && let Err(error) = session.join()
        {
            eprintln!("the server of a test disk: {error}");
        }
    }
}

struct Server {
    number: usize,
    recorder: Arc<Recorder>,
    state: Mutex<(Tree, Ino)>,
    /// The real files behind those that are mapped.
    mapped: Mutex<BTreeMap<Ino, Mapped>>,
}

/// A file that is passed through.
struct Mapped {
    file: File,
    id: Option<BackingId>,
}

impl Server {
    /// Does a change and remembers it. One lock, so that the order remembered is the one it
    /// happened in.
    fn change(&self, tree: &mut Tree, change: Change) {
        let event = Event::now(change);
        tree.apply(&event);
        self.recorder.note(self.number, event);
    }

    fn place(dir: INodeNo, name: &OsStr) -> Place {
        Place { dir: dir.0, name: name.to_owned() }
    }

    fn make(&self, req: &Request, at: Place, body: Body, mode: u32, rdev: u32) -> Answer<FileAttr> {
        let mut state = self.state.lock();
        let (tree, next) = &mut *state;
        if tree.find(&at).is_some() {
            return Err(Errno::EEXIST);
        }
        let ino = *next;
        *next += 1;
        let mut inode = Inode::new(body, mode & 0o7777);
        (inode.uid, inode.gid, inode.rdev) = (req.uid(), req.gid(), rdev);
        if matches!(inode.body, Body::File(_)) {
            self.note_mapped(ino, &at.name);
        }
        self.change(tree, Change::Make { ino, inode: Box::new(inode), at });
        self.attr(tree, ino)
    }

    fn remove(&self, at: Place, dir: bool) -> Answer<()> {
        let mut state = self.state.lock();
        let tree = &mut state.0;
        let ino = tree.find(&at).ok_or(Errno::ENOENT)?;
        match tree.entries(ino) {
            Some(entries) if dir && !entries.is_empty() => return Err(Errno::ENOTEMPTY),
            Some(_) if !dir => return Err(Errno::EISDIR),
            None if dir => return Err(Errno::ENOTDIR),
            _ => {}
        }
        self.change(tree, Change::Remove { at });
        Ok(())
    }

    fn rename(&self, from: Place, to: Place, flags: RenameFlags) -> Answer<()> {
        let mut state = self.state.lock();
        let tree = &mut state.0;
        tree.find(&from).ok_or(Errno::ENOENT)?;
        let target = tree.find(&to);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && target.is_some() {
            return Err(Errno::EEXIST);
        }
        if exchange && target.is_none() {
            return Err(Errno::ENOENT);
        }
        let full = |ino| tree.entries(ino).is_some_and(|entries| !entries.is_empty());
        if !exchange && target.is_some_and(full) {
            return Err(Errno::ENOTEMPTY);
        }
        self.change(tree, Change::Rename { from, to, exchange });
        Ok(())
    }

    /// Notes that a new file will be mapped.
    fn note_mapped(&self, ino: Ino, name: &OsStr) {
        if name.as_encoded_bytes().ends_with(b"-shm") {
            let file =
                tempfile::tempfile_in(crate::common::scratch_root()).expect("a scratch file");
            self.mapped.lock().insert(ino, Mapped { file, id: None });
        }
    }

    /// The attributes of an object, as its real file has them.
    fn attr(&self, tree: &Tree, ino: Ino) -> Answer<FileAttr> {
        let mut attr = attr(tree, ino)?;
        if let Some(mapped) = self.mapped.lock().get(&ino) {
            attr.size = mapped.file.metadata().map_or(0, |meta| meta.len());
        }
        Ok(attr)
    }

    fn look<T>(&self, ino: INodeNo, f: impl FnOnce(&Inode) -> T) -> Answer<T> {
        self.state.lock().0.inodes.get(&ino.0).map(f).ok_or(Errno::ENOENT)
    }
}

impl Filesystem for Server {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let unable = |_| std::io::Error::other("this kernel passes no files through");
        config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).map_err(unable)?;
        config.set_max_stack_depth(2).map_err(|_| std::io::Error::other("a stack of two"))?;
        // What a disk held before is mapped as well.
        let mut state = self.state.lock();
        let names = state.0.inodes.values().filter_map(|inode| match &inode.body {
            Body::Dir(entries) => Some(entries.clone()),
            _ => None,
        });
        let names: Vec<(OsString, Ino)> = names.flatten().collect();
        names.into_iter().for_each(|(name, ino)| {
            if state.0.file(ino).is_some() {
                self.note_mapped(ino, &name);
            }
        });
        Ok(())
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.mapped.lock().get_mut(&ino.0) {
            None => reply.opened(FileHandle(0), FopenFlags::empty()),
            Some(Mapped { file, id }) => {
                let id = id.get_or_insert_with(|| {
                    reply.open_backing(&*file).expect("a scratch file can be passed through")
                });
                reply.opened_passthrough(FileHandle(0), FopenFlags::FOPEN_PASSTHROUGH, id);
            }
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state.lock();
        let found = state.0.find(&Server::place(parent, name)).ok_or(Errno::ENOENT);
        entered(reply, found.and_then(|ino| self.attr(&state.0, ino)));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(&self.state.lock().0, ino.0) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state.lock();
        let tree = &mut state.0;
        if let (Some(size), Some(mapped)) = (size, self.mapped.lock().get(&ino.0)) {
            mapped.file.set_len(size).expect("a scratch file can be sized");
        } else if let Some(size) = size {
            self.change(tree, Change::Size { ino: ino.0, size: size as usize });
        }
        let mode = mode.map(|mode| mode & 0o7777);
        let set = Attributes { mode, uid, gid, atime: time(atime), mtime: time(mtime) };
        let any = set.mode.is_some() || uid.or(gid).is_some() || set.atime.or(set.mtime).is_some();
        if any {
            self.change(tree, Change::Attributes { ino: ino.0, set });
        }
        match self.attr(tree, ino.0) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.look(ino, |inode| match &inode.body {
            Body::Symlink(target) => Some(target.clone()),
            _ => None,
        });
        match target {
            Ok(Some(target)) => reply.data(&target),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let body = match rustix::fs::FileType::from_raw_mode(mode) {
            rustix::fs::FileType::RegularFile => Body::File(Vec::new()),
            other => Body::Other(other),
        };
        entered(reply, self.make(req, Server::place(parent, name), body, mode, rdev));
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let body = Body::Dir(BTreeMap::new());
        entered(reply, self.make(req, Server::place(parent, name), body, mode, 0));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        end(reply, self.remove(Server::place(parent, name), false));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        end(reply, self.remove(Server::place(parent, name), true));
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let body = Body::Symlink(target.as_os_str().as_encoded_bytes().to_vec());
        entered(reply, self.make(req, Server::place(parent, name), body, 0o777, 0));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (Server::place(parent, name), Server::place(newparent, newname));
        end(reply, Server::rename(self, from, to, flags));
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let mut state = self.state.lock();
        let at = Server::place(newparent, newname);
        if state.0.find(&at).is_some() {
            return reply.error(Errno::EEXIST);
        }
        self.change(&mut state.0, Change::Link { ino: ino.0, at });
        entered(reply, attr(&state.0, ino.0));
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
        let mut state = self.state.lock();
        match state.0.file(ino.0) {
            Some(content) => {
                let start = content.len().min(offset as usize);
                let end = content.len().min(start + size as usize);
                reply.data(&content[start..end]);
            }
            None => reply.error(Errno::EINVAL),
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
        let write = Change::Write { ino: ino.0, at: offset as usize, bytes: data.to_vec() };
        self.change(&mut self.state.lock().0, write);
        reply.written(data.len() as u32);
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

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.change(&mut self.state.lock().0, Change::Sync { ino: ino.0, data_only });
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let state = self.state.lock();
        let tree = &state.0;
        let Some(entries) = tree.entries(ino.0) else { return reply.error(Errno::ENOTDIR) };
        let dots = [(OsString::from("."), ino.0), (OsString::from(".."), ino.0)];
        let all = dots.into_iter().chain(entries.iter().map(|(name, ino)| (name.clone(), *ino)));
        for (index, (name, ino)) in all.enumerate().skip(offset as usize) {
            let kind = tree.inodes.get(&ino).map_or(FileType::RegularFile, |i| kind(&i.body));
            if reply.add(INodeNo(ino), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.change(&mut self.state.lock().0, Change::Sync { ino: ino.0, data_only });
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let plenty = 1 << 20;
        reply.statfs(plenty, plenty, plenty, plenty, plenty, 4096, 255, 4096);
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state.lock();
        let has = state.0.inodes.get(&ino.0).is_some_and(|i| i.xattrs.contains_key(name));
        match flags {
            libc::XATTR_CREATE if has => return reply.error(Errno::EEXIST),
            libc::XATTR_REPLACE if !has => return reply.error(Errno::from_i32(libc::ENODATA)),
            _ => {}
        }
        let (name, value) = (name.to_owned(), Some(value.to_vec()));
        self.change(&mut state.0, Change::Xattr { ino: ino.0, name, value });
        reply.ok();
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.look(ino, |inode| inode.xattrs.get(name).cloned()) {
            Ok(Some(bytes)) => value(reply, size, &bytes),
            Ok(None) => reply.error(Errno::from_i32(libc::ENODATA)),
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.look(ino, |inode| {
            let names = inode.xattrs.keys().map(|name| name.as_encoded_bytes());
            names.flat_map(|name| [name, &b"\0"[..]].concat()).collect::<Vec<u8>>()
        });
        match names {
            Ok(names) => value(reply, size, &names),
            Err(errno) => reply.error(errno),
        }
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.look(ino, |inode| inode.xattrs.contains_key(name)) {
            Ok(true) => {
                let change = Change::Xattr { ino: ino.0, name: name.to_owned(), value: None };
                self.change(&mut self.state.lock().0, change);
                reply.ok();
            }
            Ok(false) => reply.error(Errno::from_i32(libc::ENODATA)),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let body = Body::File(Vec::new());
        match self.make(req, Server::place(parent, name), body, mode, 0) {
            Ok(attr) => match self.mapped.lock().get_mut(&attr.ino.0) {
                None => {
                    reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::empty());
                }
                Some(Mapped { file, id }) => {
                    let flags = FopenFlags::FOPEN_PASSTHROUGH;
                    let id = id.get_or_insert_with(|| {
                        reply.open_backing(&*file).expect("a scratch file can be passed through")
                    });
                    reply.created_passthrough(&TTL, &attr, Generation(0), FileHandle(0), flags, id);
                }
            },
            Err(errno) => reply.error(errno),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (start, end) = (offset as usize, (offset + length) as usize);
        let mut state = self.state.lock();
        let tree = &mut state.0;
        let zeroes = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !(zeroes | libc::FALLOC_FL_KEEP_SIZE) != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        if mode & zeroes != 0 {
            self.change(tree, Change::Zero { ino: ino.0, start, end });
        }
        let size = tree.file(ino.0).map_or(0, |content| content.len());
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > size {
            self.change(tree, Change::Size { ino: ino.0, size: end });
        }
        reply.ok();
    }
}

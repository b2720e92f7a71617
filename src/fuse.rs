//! FUSE: the kernel's requests, one call each on [`Filesystem`], and its answers as replies.
//!
//! Translates, never decides. A handler that panics answers `EIO` (an unanswered reply does so when
//! dropped) and leaves its thread alive.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};

use crate::error::{Error, Result};
use crate::fs::{Fh, Filesystem, Found, Keep, Wish};
use crate::past::Past;
use crate::replica::backing::{Creds, RenameMode, Seek, SetTime, Stat};
use crate::types::{EntryName, Kind, Timestamp};
use crate::volume::{Caller, Changes, Newborn};

/// The kernel keeps what cannot change for this long: longer than any mount.
const TTL_ALWAYS: Duration = Duration::from_secs(10 * 365 * 86400);
/// The live tree changes through this mount only, and the kernel notes its own changes.
const TTL_MOUNTED: Duration = Duration::from_secs(86400);
/// Requests the kernel may have under way in the background; more than its default of 12, above
/// which writeback is skipped as "congested".
const MAX_BACKGROUND: u16 = 512;

/// How the kernel's requests are served.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Threads; at least two, since a snapshot flushes files by way of the mount.
    pub threads: usize,
}

/// A mount that is being served.
pub struct Session {
    background: fuser::BackgroundSession,
}

/// Serves the mount of an opened `/dev/fuse`. When it returns, the kernel's handshake is done.
pub fn serve(fs: Arc<Filesystem>, device: OwnedFd, options: &ServeOptions) -> Result<Session> {
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(2));
    config.clone_fd = true;
    // The kernel itself keeps other users out unless the mount allows them. The library's own check
    // would refuse requests that the kernel makes on its own behalf.
    config.acl = SessionACL::All;
    let session = fuser::Session::from_fd(Fuse { fs }, device, SessionACL::All, config)
        .and_then(fuser::Session::spawn)
        .map_err(|error| Error::Refused(format!("the kernel's FUSE handshake failed: {error}")))?;
    Ok(Session { background: session })
}

impl Session {
    /// Waits until the filesystem is unmounted and every request is answered.
    pub fn join(self) -> Result<()> {
        self.background.join().map_err(Error::from_io)
    }
}

struct Fuse {
    fs: Arc<Filesystem>,
}

fn errno(error: &Error) -> Errno {
    match error {
        Error::Posix(_) => {}
        other => log::warn!("{other}"),
    }
    Errno::from_i32(error.to_errno().raw_os_error())
}

/// Runs a handler so that a panic costs one request, not the thread.
fn guarded(handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        log::error!("a request failed by a bug of ours; it was answered with EIO");
    }
}

fn caller(req: &Request, umask: u32) -> Caller {
    let creds = Creds { uid: req.uid(), gid: req.gid(), umask: umask & 0o777 };
    Caller { creds, pid: req.pid() }
}

fn name(name: &OsStr) -> Result<EntryName> {
    Ok(EntryName::new(name.as_bytes())?)
}

fn ttl(keep: Keep) -> Duration {
    match keep {
        Keep::Always => TTL_ALWAYS,
        Keep::WhileMounted => TTL_MOUNTED,
        Keep::Never => Duration::ZERO,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDev => FileType::CharDevice,
        Kind::BlockDev => FileType::BlockDevice,
    }
}

fn attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.ino),
        size: stat.size,
        blocks: stat.blocks,
        atime: SystemTime::from(stat.atime),
        mtime: SystemTime::from(stat.mtime),
        ctime: SystemTime::from(stat.ctime),
        crtime: SystemTime::from(stat.btime),
        kind: file_type(stat.kind),
        perm: (stat.mode & 0o7777) as u16,
        nlink: stat.nlink,
        uid: stat.uid,
        gid: stat.gid,
        // The kernel's encoding equals the low 32 bits of makedev's.
        rdev: stat.rdev as u32,
        blksize: 4096,
        flags: 0,
    }
}

/// The kernel keeps this as "there is no such name".
fn negative() -> FileAttr {
    let zero = Timestamp::default();
    let mut attr = attr(&Stat {
        kind: Kind::File,
        mode: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        nlink: 0,
        size: 0,
        blocks: 0,
        ino: 0,
        atime: zero,
        mtime: zero,
        ctime: zero,
        btime: zero,
    });
    attr.ino = INodeNo(0);
    attr
}

/// The time of a `setattr`. The library decodes a time before 1970 as if the nanoseconds counted
/// backwards; this takes back what it did, so that the kernel's own numbers are used.
fn set_time(time: Option<TimeOrNow>) -> Option<SetTime> {
    Some(match time? {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(_) => SetTime::To(Timestamp::from(time)),
            Err(before) => {
                let before = before.duration();
                let secs = -(before.as_secs() as i64);
                SetTime::To(Timestamp { secs, nanos: before.subsec_nanos() })
            }
        },
    })
}

fn answer_entry(reply: ReplyEntry, found: Result<Found>) {
    match found {
        Ok(found) => reply.entry(&ttl(found.keep), &attr(&found.stat), Generation(0)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_empty(reply: ReplyEmpty, outcome: Result<()>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

impl fuser::Filesystem for Fuse {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_NO_EXPORT_SUPPORT,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                log::debug!("the kernel lacks {flag:?}");
            }
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
        Ok(())
    }

    fn destroy(&mut self) {}

    fn lookup(&self, _req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEntry) {
        guarded(|| match name(entry).and_then(|entry| self.fs.lookup(parent.0, &entry)) {
            Err(error) if error.is(rustix::io::Errno::NOENT) && !Past::owns(parent.0) => {
                reply.entry(&TTL_MOUNTED, &negative(), Generation(0));
            }
            found => answer_entry(reply, found),
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        guarded(|| self.fs.forget(ino.0, nlookup));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        guarded(|| match self.fs.stat(ino.0) {
            Ok(found) => reply.attr(&ttl(found.keep), &attr(&found.stat)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn setattr(
        &self,
        req: &Request,
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
        guarded(|| {
            let (atime, mtime) = (set_time(atime), set_time(mtime));
            let changes = Changes { mode, uid, gid, size, atime, mtime };
            match self.fs.set_attributes(ino.0, &changes, &caller(req, 0)) {
                Ok(found) => reply.attr(&ttl(found.keep), &attr(&found.stat)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        guarded(|| match self.fs.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        guarded(|| {
            let made = name(entry).and_then(|entry| {
                let kind = Kind::from_mode(mode).unwrap_or(Kind::File);
                let what = Newborn::Special(kind, u64::from(rdev));
                self.fs.make(parent.0, &entry, &what, mode, &caller(req, umask))
            });
            answer_entry(reply, made);
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let caller = caller(req, umask);
        let entry = match name(entry) {
            Ok(entry) => entry,
            Err(error) => return reply.error(errno(&error)),
        };
        let fs = self.fs.clone();
        let make = move || {
            guarded(|| {
                answer_entry(reply, fs.make(parent.0, &entry, &Newborn::Dir, mode, &caller));
            });
        };
        if !Past::owns(parent.0) {
            return make();
        }
        // A snapshot flushes files by way of this mount, so this thread must stay free to serve it.
        // If no thread can be had, the dropped reply answers EIO.
        if let Err(error) = std::thread::Builder::new().name("rv-snapshot".into()).spawn(make) {
            log::error!("cannot start a thread for a snapshot: {error}");
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        guarded(|| {
            answer_empty(reply, name(entry).and_then(|entry| self.fs.unlink(parent.0, &entry)));
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        guarded(|| {
            answer_empty(reply, name(entry).and_then(|entry| self.fs.rmdir(parent.0, &entry)));
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        guarded(|| {
            let made = name(entry).and_then(|entry| {
                let what = Newborn::Symlink(target.as_os_str().as_bytes());
                self.fs.make(parent.0, &entry, &what, 0o777, &caller(req, 0))
            });
            answer_entry(reply, made);
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            let mode = if flags.is_empty() {
                RenameMode::Replace
            } else if flags == RenameFlags::RENAME_NOREPLACE {
                RenameMode::NoReplace
            } else if flags == RenameFlags::RENAME_EXCHANGE {
                RenameMode::Exchange
            } else {
                return reply.error(Errno::EINVAL);
            };
            let renamed = name(entry).and_then(|from| {
                self.fs.rename(parent.0, &from, newparent.0, &name(newname)?, mode)
            });
            answer_empty(reply, renamed);
        });
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        guarded(|| {
            let linked = name(newname).and_then(|name| self.fs.link(ino.0, newparent.0, &name));
            answer_entry(reply, linked);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| {
            let wish = Wish::from_flags(flags.0);
            match self.fs.open(ino.0, wish, &caller(req, 0)) {
                Ok(fh) => {
                    let mut answer = FopenFlags::FOPEN_KEEP_CACHE;
                    if !wish.writable {
                        // Its close changes nothing: the kernel need not ask.
                        answer |= FopenFlags::FOPEN_NOFLUSH;
                    }
                    reply.opened(FileHandle(fh.0), answer);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        guarded(|| {
            let wish = Wish::from_flags(flags);
            let made = name(entry).and_then(|entry| {
                self.fs.create(parent.0, &entry, mode, wish, &caller(req, umask))
            });
            match made {
                Ok((found, fh)) => reply.created(
                    &ttl(found.keep),
                    &attr(&found.stat),
                    Generation(0),
                    FileHandle(fh.0),
                    FopenFlags::FOPEN_KEEP_CACHE,
                ),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded(|| {
            let mut buffer = vec![0; size as usize];
            match self.fs.read(ino.0, Fh(fh.0), offset, &mut buffer) {
                Ok(got) => reply.data(&buffer[..got]),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded(|| {
            let strip = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
            match self.fs.write(Fh(fh.0), offset, data, strip) {
                Ok(()) => reply.written(data.len() as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        guarded(|| answer_empty(reply, self.fs.flush(Fh(fh.0))));
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| answer_empty(reply, self.fs.release(Fh(fh.0))));
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| answer_empty(reply, self.fs.fsync(Fh(fh.0), datasync)));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| match self.fs.open_dir(ino.0) {
            Ok(fh) => {
                // The listing of `.snapshots` changes without the kernel's doing.
                let flags = if Past::owns(ino.0) {
                    FopenFlags::empty()
                } else {
                    FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE
                };
                reply.opened(FileHandle(fh.0), flags);
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded(|| match self.fs.list(ino.0, Fh(fh.0), offset == 0) {
            Ok(lines) => {
                for (index, line) in lines.iter().enumerate().skip(offset as usize) {
                    let next = index as u64 + 1;
                    let kind = file_type(line.kind);
                    if reply.add(INodeNo(line.ino), next, kind, OsStr::from_bytes(&line.name)) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        guarded(|| match self.fs.list(ino.0, Fh(fh.0), offset == 0) {
            Ok(lines) => {
                for (index, line) in lines.iter().enumerate().skip(offset as usize) {
                    let dot = line.name == b"." || line.name == b"..";
                    let found = if dot {
                        self.fs.stat(line.ino)
                    } else {
                        name(OsStr::from_bytes(&line.name))
                            .and_then(|name| self.fs.lookup(ino.0, &name))
                    };
                    // An entry removed since the listing began is passed over.
                    let Ok(found) = found else { continue };
                    let full = reply.add(
                        INodeNo(found.stat.ino),
                        index as u64 + 1,
                        OsStr::from_bytes(&line.name),
                        &ttl(found.keep),
                        &attr(&found.stat),
                        Generation(0),
                    );
                    if full {
                        if !dot {
                            // The kernel never saw it, so it will not forget it either.
                            self.fs.forget(found.stat.ino, 1);
                        }
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            self.fs.release_dir(Fh(fh.0));
            reply.ok();
        });
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| answer_empty(reply, self.fs.fsync_dir(ino.0)));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        guarded(|| match self.fs.space() {
            Ok(space) => reply.statfs(
                space.blocks,
                space.free,
                space.available,
                space.files,
                space.files_free,
                space.block_bytes as u32,
                crate::types::NAME_BYTES_MAX as u32,
                space.block_bytes as u32,
            ),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            answer_empty(reply, self.fs.set_xattr(ino.0, name, value, flags, &caller(req, 0)));
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        guarded(|| answer_xattr(reply, size, self.fs.xattr(ino.0, name)));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guarded(|| {
            let names = self.fs.xattrs(ino.0).map(|all| {
                let mut names = Vec::new();
                for name in all.0.keys() {
                    names.extend_from_slice(name);
                    names.push(0);
                }
                names
            });
            answer_xattr(reply, size, names);
        });
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded(|| answer_empty(reply, self.fs.remove_xattr(ino.0, name)));
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        guarded(|| answer_empty(reply, self.fs.fallocate(Fh(fh.0), mode as u32, offset, length)));
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        guarded(|| {
            let to = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match self.fs.seek(ino.0, Fh(fh.0), offset, to) {
                Ok(found) => reply.offset(found as i64),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        guarded(|| {
            let (from, to) = ((Fh(fh_in.0), offset_in), (Fh(fh_out.0), offset_out));
            match self.fs.copy_range(from, to, len) {
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}

/// Answers the size where the caller asks for it, else the value if it fits.
fn answer_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

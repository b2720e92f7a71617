//! FUSE: the kernel's requests, one call each on [`Filesystem`], and its answers as replies.
//!
//! They come from `/dev/fuse`, unpacked by the library, which calls [`Fuse`]; or, where the kernel
//! offers it, over io_uring to threads of ours ([`rings`]), which unpack them themselves ([`wire`])
//! and have the same calls made ([`ring_requests`]).
//!
//! Translates, never decides. A handler that panics answers `EIO` (an unanswered reply does so when
//! dropped) and leaves its thread alive.

mod convert;
mod listing;
mod ring_requests;
mod rings;
mod session;
mod wire;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, FileHandle, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use crate::fs::{Fh, Filesystem, Found, Line, Wish, Writing};
use crate::sys::fuse_ring::PAYLOAD_BYTES;
use crate::types::Kind;
use crate::volume::{Changes, Newborn};

use listing::{add_line, add_line_plus, list, list_plus};
pub use session::{ServeOptions, Session, serve};
use session::{guarded, guarded_at};

use convert::{
    answer_empty, answer_entry, answer_lookup, answer_xattr, attr, caller, errno, handle_flags,
    listing_flags, name, names_of, rename_mode, seek_to, set_time, ttl,
};

/// Requests the kernel may have under way in the background; more than its default of 12, above
/// which writeback is skipped as "congested".
const MAX_BACKGROUND: u16 = 512;

/// Asks the kernel for what we want of it, where it has that.
pub fn ask_kernel(config: &mut KernelConfig) {
    // Not FUSE_ASYNC_DIO: the kernel answers such a write by libaio or io_uring before it is made
    // durable, and drops what it has cached when it is sent, not when it is done.
    // Not FUSE_ATOMIC_O_TRUNC, though it saves a request: with it, open(O_RDONLY|O_TRUNC) of a
    // running program empties it before the kernel says ETXTBSY.
    let wanted = [
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_CACHE_SYMLINKS,
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_POSIX_ACL,
        InitFlags::FUSE_DONT_MASK,
        InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        InitFlags::FUSE_NO_EXPORT_SUPPORT,
    ];
    for flag in wanted {
        if config.add_capabilities(flag).is_err() {
            log::debug!("the kernel lacks {flag:?}");
        }
    }
    // What the kernel sends at once anyway, by its limit of 256 pages; a ring has memory for it.
    let _ = config.set_max_write(PAYLOAD_BYTES as u32);
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
}

/// What the library calls for the kernel.
struct Fuse {
    fs: Arc<Filesystem>,
    /// It may send requests over io_uring.
    over_rings: bool,
    /// It is going to.
    are_rings_agreed: Arc<AtomicBool>,
}

impl fuser::Filesystem for Fuse {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        ask_kernel(config);
        let rings = InitFlags::FUSE_OVER_IO_URING;
        if self.over_rings && config.capabilities().contains(rings) && rings::can_serve() {
            let agreed = config.add_capabilities(rings).is_ok();
            self.are_rings_agreed.store(agreed, Ordering::Relaxed);
        }
        Ok(())
    }

    fn destroy(&mut self) {}

    fn lookup(&self, _req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEntry) {
        guarded(|| {
            let found = name(entry).and_then(|entry| self.fs.lookup(parent.0, &entry));
            if let Ok(found) = &found {
                self.fs.looked_up(parent.0, found);
            }
            answer_lookup(reply, parent, found);
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
        guarded_at(parent.0, move || {
            answer_entry(reply, fs.make(parent.0, &entry, &Newborn::Dir, mode, &caller));
        });
    }

    fn unlink(&self, req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        guarded(|| {
            let by = caller(req, 0);
            let done = name(entry).and_then(|entry| self.fs.unlink(parent.0, &entry, &by));
            answer_empty(reply, done);
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        let (by, fs, entry) = (caller(req, 0), self.fs.clone(), name(entry));
        guarded_at(parent.0, move || {
            let done = entry.and_then(|entry| fs.rmdir(parent.0, &entry, &by));
            answer_empty(reply, done);
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
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (by, fs) = (caller(req, 0), self.fs.clone());
        let how =
            rename_mode(flags.bits()).and_then(|mode| Ok((mode, name(entry)?, name(newname)?)));
        guarded_at(parent.0, move || {
            let renamed = how.and_then(|(mode, from, to)| {
                fs.rename(parent.0, &from, newparent.0, &to, mode, &by)
            });
            answer_empty(reply, renamed);
        });
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        guarded(|| {
            let linked = name(newname)
                .and_then(|name| self.fs.link(ino.0, newparent.0, &name, &caller(req, 0)));
            answer_entry(reply, linked);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| {
            let wish = Wish::from_flags(flags.0);
            match self.fs.open(ino.0, wish, &caller(req, 0)) {
                Ok(fh) => {
                    reply.opened(FileHandle(fh.0), handle_flags(&self.fs, fh, wish.writable));
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
                    handle_flags(&self.fs, fh, true),
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
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded(|| {
            let strip = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
            let how = Writing::from_flags(strip, flags.0);
            match self.fs.write(Fh(fh.0), offset, data, how, &caller(req, 0)) {
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

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| {
            let fh = self.fs.open_dir(req.pid(), ino.0);
            reply.opened(FileHandle(fh.0), listing_flags(&self.fs, ino.0, fh));
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
        guarded(|| {
            let add = |line: &Line, next| add_line(&mut reply, line, next);
            match list(&self.fs, ino.0, Fh(fh.0), offset as usize, add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
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
        guarded(|| {
            let add = |line: &Line, found: Option<&Found>, next| {
                add_line_plus(&mut reply, line, found, next)
            };
            match list_plus(&self.fs, ino.0, Fh(fh.0), offset as usize, add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
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
            let names = self.fs.xattrs(ino.0).map(|all| names_of(&all));
            answer_xattr(reply, size, names);
        });
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded(|| answer_empty(reply, self.fs.remove_xattr(ino.0, name, &caller(req, 0))));
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            let by = caller(req, 0);
            answer_empty(reply, self.fs.fallocate(Fh(fh.0), mode as u32, offset, length, &by));
        });
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
            let found = seek_to(whence, offset)
                .and_then(|(to, offset)| self.fs.seek(ino.0, Fh(fh.0), offset, to));
            match found {
                Ok(found) => reply.offset(found as i64),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        req: &Request,
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
            match self.fs.copy_range(from, to, len, &caller(req, 0)) {
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}

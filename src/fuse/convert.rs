//! Between the kernel's words and ours.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileType, FopenFlags, Generation, INodeNo, ReplyEmpty, ReplyEntry, ReplyXattr,
    Request, TimeOrNow,
};
use rustix::io::Errno as Unix;

use crate::error::{Error, Result};
use crate::fs::{Fh, Filesystem, Found, Keep, Line};
use crate::past::Past;
use crate::past::ino::is_settled;
use crate::replica::backing::{Creds, RenameMode, Seek, SetTime, Stat};
use crate::types::{EntryName, Kind, Timestamp, Xattrs};
use crate::volume::Caller;

/// The kernel keeps what cannot change for this long: longer than any mount.
const TTL_ALWAYS: Duration = Duration::from_secs(10 * 365 * 86400);
/// The live tree changes through this mount only, and the kernel notes its own changes.
const TTL_MOUNTED: Duration = Duration::from_secs(86400);

/// The errno of an error. What a person must read is logged.
pub(super) fn errno(error: &Error) -> Errno {
    match error {
        Error::Posix(_) => {}
        other => log::warn!("{other}"),
    }
    Errno::from_i32(error.to_errno().raw_os_error())
}

/// Who asks.
pub(super) fn caller(req: &Request, umask: u32) -> Caller {
    caller_of((req.uid(), req.gid()), req.pid(), umask)
}

/// Who asks, by these numbers.
pub(super) fn caller_of((uid, gid): (u32, u32), pid: u32, umask: u32) -> Caller {
    Caller { creds: Creds { uid, gid, umask: umask & 0o777 }, pid }
}

/// A name as the kernel sent it.
pub(super) fn name(name: &OsStr) -> Result<EntryName> {
    Ok(EntryName::new(name.as_bytes())?)
}

/// How long the kernel may keep an answer.
pub(super) fn ttl(keep: Keep) -> Duration {
    match keep {
        Keep::Always => TTL_ALWAYS,
        Keep::WhileMounted => TTL_MOUNTED,
        Keep::Never => Duration::ZERO,
    }
}

/// How the kernel is to treat an open file: what it has of the content stays good, for nothing
/// changes it but what the kernel itself sends.
pub(super) fn handle_flags(fs: &Filesystem, fh: Fh, is_writable: bool) -> FopenFlags {
    let mut flags = FopenFlags::FOPEN_KEEP_CACHE;
    if fs.writes_past_cache(fh) {
        flags |= FopenFlags::FOPEN_DIRECT_IO;
    }
    if !is_writable {
        // Its close changes nothing: the kernel need not ask.
        flags |= FopenFlags::FOPEN_NOFLUSH;
    }
    flags
}

/// The same of an open directory. The listing of `.snapshots` changes without the kernel's doing.
pub(super) fn listing_flags(fs: &Filesystem, ino: u64, fh: Fh) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if fs.keeps_listing(ino) {
        flags |= FopenFlags::FOPEN_CACHE_DIR;
        if !fs.is_listed_anew(ino, fh) {
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
    }
    flags
}

/// How to rename, by the flags of `renameat2(2)`.
pub(super) fn rename_mode(flags: u32) -> Result<RenameMode> {
    match flags {
        0 => Ok(RenameMode::Replace),
        libc::RENAME_NOREPLACE => Ok(RenameMode::NoReplace),
        libc::RENAME_EXCHANGE => Ok(RenameMode::Exchange),
        _ => Err(Error::Posix(Unix::INVAL)),
    }
}

/// What to look for, and from where on, by the words of `lseek(2)`.
pub(super) fn seek_to(whence: i32, offset: i64) -> Result<(Seek, u64)> {
    let to = match whence {
        libc::SEEK_DATA => Seek::Data,
        libc::SEEK_HOLE => Seek::Hole,
        _ => return Err(Error::Posix(Unix::INVAL)),
    };
    let offset = u64::try_from(offset).map_err(|_| Error::Posix(Unix::NXIO))?;
    Ok((to, offset))
}

/// The names of attributes as `listxattr(2)` gives them: a zero after each.
pub(super) fn names_of(xattrs: &Xattrs) -> Vec<u8> {
    let mut names = Vec::new();
    for name in xattrs.0.keys() {
        names.extend_from_slice(name);
        names.push(0);
    }
    names
}

/// The kernel's word for a kind.
pub(super) fn file_type(kind: Kind) -> FileType {
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

/// Attributes as the kernel takes them.
pub(super) fn attr(stat: &Stat) -> FileAttr {
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
    bare(Kind::File, 0)
}

/// What is told of `.` and `..` in a listing: the kernel takes no attributes of them.
pub(super) fn dot(line: &Line) -> FileAttr {
    bare(line.kind, line.ino)
}

/// Attributes of which only these count.
fn bare(kind: Kind, ino: u64) -> FileAttr {
    let zero = Timestamp::default();
    attr(&Stat {
        kind,
        mode: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        nlink: 0,
        size: 0,
        blocks: 0,
        ino,
        atime: zero,
        mtime: zero,
        ctime: zero,
        btime: zero,
    })
}

/// The time of a `setattr`. The library decodes a time before 1970 as if the nanoseconds counted
/// backwards; this takes back what it did, so that the kernel's own numbers are used.
pub(super) fn set_time(time: Option<TimeOrNow>) -> Option<SetTime> {
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

/// How long the kernel may keep that there is no such name in a directory; `None`: not at all.
pub(super) fn absence(parent: u64) -> Option<Keep> {
    match (Past::owns(parent), is_settled(parent)) {
        (false, _) => Some(Keep::WhileMounted),
        (true, true) => Some(Keep::Always),
        (true, false) => None,
    }
}

/// Answers a lookup. That there is no such name is kept as well, where it can be.
pub(super) fn answer_lookup(reply: ReplyEntry, parent: INodeNo, found: Result<Found>) {
    match (found, absence(parent.0)) {
        (Err(error), Some(keep)) if error.is(Unix::NOENT) => {
            reply.entry(&ttl(keep), &negative(), Generation(0));
        }
        (found, _) => answer_entry(reply, found),
    }
}

/// Answers with an object, or an error.
pub(super) fn answer_entry(reply: ReplyEntry, found: Result<Found>) {
    match found {
        Ok(found) => {
            reply.entry(&ttl(found.keep), &attr(&found.stat), Generation(found.incarnation));
        }
        Err(error) => reply.error(errno(&error)),
    }
}

/// Answers with success or an error.
pub(super) fn answer_empty(reply: ReplyEmpty, outcome: Result<()>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// What is answered to who asks for attributes, or for their names.
pub(super) enum XattrAnswer {
    /// How long it is, in bytes.
    Size(u32),
    /// It.
    Value(Vec<u8>),
}

/// The size where the caller asks for it, else the value if it fits.
pub(super) fn xattr_answer(size: u32, value: Vec<u8>) -> Result<XattrAnswer> {
    match size {
        0 => Ok(XattrAnswer::Size(value.len() as u32)),
        size if value.len() > size as usize => Err(Error::Posix(Unix::RANGE)),
        _ => Ok(XattrAnswer::Value(value)),
    }
}

/// Answers with the size or the value.
pub(super) fn answer_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value.and_then(|value| xattr_answer(size, value)) {
        Ok(XattrAnswer::Size(size)) => reply.size(size),
        Ok(XattrAnswer::Value(value)) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

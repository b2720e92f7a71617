//! Between the kernel's words and ours.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileType, FopenFlags, Generation, INodeNo, ReplyEmpty, ReplyEntry, ReplyXattr,
    Request, TimeOrNow,
};

use crate::error::{Error, Result};
use crate::fs::{Fh, Filesystem, Found, Keep, Line};
use crate::past::Past;
use crate::past::ino::is_settled;
use crate::replica::backing::{Creds, SetTime, Stat};
use crate::types::{EntryName, Kind, Timestamp};
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
    let creds = Creds { uid: req.uid(), gid: req.gid(), umask: umask & 0o777 };
    Caller { creds, pid: req.pid() }
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
pub(super) fn open_flags(fs: &Filesystem, fh: Fh) -> FopenFlags {
    match fs.writes_past_cache(fh) {
        true => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_DIRECT_IO,
        false => FopenFlags::FOPEN_KEEP_CACHE,
    }
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

/// Answers a lookup. That there is no such name is kept as well, where it can be.
pub(super) fn answer_lookup(reply: ReplyEntry, parent: INodeNo, found: Result<Found>) {
    let keep = match (Past::owns(parent.0), is_settled(parent.0)) {
        (false, _) => Keep::WhileMounted,
        (true, true) => Keep::Always,
        (true, false) => Keep::Never,
    };
    match found {
        Err(error) if error.is(rustix::io::Errno::NOENT) && keep != Keep::Never => {
            reply.entry(&ttl(keep), &negative(), Generation(0));
        }
        found => answer_entry(reply, found),
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

/// Answers the size where the caller asks for it, else the value if it fits.
pub(super) fn answer_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

//! Attributes of an object by `statx(2)`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::replica::backing::Stat;
use crate::types::{Kind, Timestamp};

pub(super) fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_path(fd, OsStr::new(""))
}

pub(super) fn stat_path(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Stat> {
    let mut flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    if name.is_empty() {
        flags |= AtFlags::EMPTY_PATH;
    }
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = retry_on_intr(|| rustix::fs::statx(dir, name, flags, mask))?;
    let mode = u32::from(stat.stx_mode);
    let time = |t: rustix::fs::StatxTimestamp| Timestamp { secs: t.tv_sec, nanos: t.tv_nsec };
    let born = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(Stat {
        kind: Kind::from_mode(mode).ok_or(Errno::IO)?,
        mode: mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        nlink: stat.stx_nlink,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        ino: stat.stx_ino,
        atime: time(stat.stx_atime),
        mtime: time(stat.stx_mtime),
        ctime: time(stat.stx_ctime),
        btime: if born { time(stat.stx_btime) } else { Timestamp::default() },
    })
}

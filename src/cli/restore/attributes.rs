//! Owner, mode, times, extended attributes and ACLs of what is restored.
//!
//! Objects are named by a directory's descriptor and one name, and symlinks are never followed: a
//! directory that another user swaps for a symlink meanwhile leads nowhere.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, Result};

/// The longest value of an extended attribute (`XATTR_SIZE_MAX`, limits.h).
const XATTR_BYTES_MAX: usize = 65536;
/// Set-user-id, set-group-id.
const SUID_BITS: u32 = 0o6000;

/// One name in an open directory.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The directory.
    pub dir: BorrowedFd<'a>,
    /// The name in it.
    pub name: &'a OsStr,
}

impl Place<'_> {
    /// A path to the object for the calls that know no directory descriptors.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(self.name)
    }

    /// The object's attributes; a symlink's are its own.
    pub fn stat(&self) -> Result<Stat> {
        rustix::fs::statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// Gives `to` the attributes of `from`, whose stat is given. What an ordinary user may not set (the
/// owner, attributes of the system) is left; without its owner a program loses its set-id bits.
pub fn copy(from: Place<'_>, stat: &Stat, to: Place<'_>) -> Result<()> {
    let is_symlink = stat.st_mode & libc::S_IFMT == libc::S_IFLNK;
    let owned = copy_owner(stat, to)?;
    copy_xattrs(from, to)?;
    if !is_symlink {
        // After the owner, whose change clears set-id bits, and after the ACL, whose mask is in the
        // mode.
        let mut mode = stat.st_mode & 0o7777;
        if !owned && stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            mode &= !SUID_BITS;
        }
        set_mode(to, mode)?;
    }
    copy_times(stat, to)
}

/// By way of a descriptor: chmod by name would follow a symlink that was swapped in.
fn set_mode(to: Place<'_>, mode: u32) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let object = rustix::fs::openat(to.dir, to.name, flags, Mode::empty())?;
    if rustix::fs::fstat(&object)?.st_mode & libc::S_IFMT == libc::S_IFLNK {
        return Err(Errno::LOOP);
    }
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))
}

/// Whether the owner and the group are now those of `stat`.
fn copy_owner(stat: &Stat, to: Place<'_>) -> Result<bool> {
    let present = to.stat()?;
    if (present.st_uid, present.st_gid) == (stat.st_uid, stat.st_gid) {
        return Ok(true);
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    match rustix::fs::chownat(to.dir, to.name, Some(uid), Some(gid), flags) {
        Ok(()) => Ok(true),
        // A member of the group may still set that.
        Err(Errno::PERM) => match rustix::fs::chownat(to.dir, to.name, None, Some(gid), flags) {
            Ok(()) => Ok(present.st_uid == stat.st_uid),
            Err(Errno::PERM) => Ok(false),
            Err(errno) => Err(errno),
        },
        Err(errno) => Err(errno),
    }
}

/// Sets the times of `stat`.
pub fn copy_times(stat: &Stat, to: Place<'_>) -> Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    };
    rustix::fs::utimensat(to.dir, to.name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn copy_xattrs(from: Place<'_>, to: Place<'_>) -> Result<()> {
    let wanted = xattrs(from)?;
    let present = xattrs(to)?;
    let path = to.path();
    for (name, value) in &wanted {
        if present.get(name) == Some(value) {
            continue;
        }
        match rustix::fs::lsetxattr(&path, name.as_c_str(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // Attributes of the system are root's; elsewhere than in a mount of ours there may be
            // none.
            Err(Errno::PERM | Errno::OPNOTSUPP) if !is_essential(name) => {}
            Err(errno) => return Err(errno),
        }
    }
    for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
        match rustix::fs::lremovexattr(&path, name.as_c_str()) {
            Ok(()) | Err(Errno::NODATA | Errno::PERM | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Whether two objects have the same extended attributes and ACLs, as far as we may read them.
pub fn same_xattrs(a: Place<'_>, b: Place<'_>) -> Result<bool> {
    Ok(xattrs(a)? == xattrs(b)?)
}

/// An ACL that could not be set would give or take rights: that is a failure. Others are a loss
/// that the place restored to makes unavoidable.
fn is_essential(name: &CString) -> bool {
    name.as_bytes().starts_with(b"system.posix_acl")
}

fn xattrs(of: Place<'_>) -> Result<BTreeMap<CString, Vec<u8>>> {
    let path = of.path();
    let mut list = vec![0u8; XATTR_BYTES_MAX];
    let length = match rustix::fs::llistxattr(&path, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(errno) => return Err(errno),
    };
    let mut all = BTreeMap::new();
    for name in list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let Ok(name) = CString::new(name) else { continue };
        let mut value = vec![0u8; XATTR_BYTES_MAX];
        match rustix::fs::lgetxattr(&path, name.as_c_str(), &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                all.insert(name, value);
            }
            // Gone meanwhile, or not for us to read.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(all)
}

/// A name for showing.
pub fn show(name: &OsStr) -> String {
    crate::types::escape(name.as_bytes())
}

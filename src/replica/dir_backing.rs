//! A backing that is a real directory: [`Backing`] by `*at` system calls.
//!
//! Paths are resolved by `openat2(2)` beneath the root, without symlinks and without crossing
//! mounts, so that a name swapped under our hands can fail a call but never lead it astray.
//!
//! `create`, `mkdir`, `mknod` and `symlink` make the calling thread assume the creator's ids, and
//! it stays so until the next of them ([`crate::sys`]). All other calls do the same whatever the
//! thread's ids are, with one exception that is meant: `write_at`, `truncate`, `fallocate` and
//! `copy_range` clear suid and sgid bits when the thread last assumed an ordinary user.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, ResolveFlags,
    SeekFrom, Timestamps, Uid,
};
use rustix::io::{Errno, retry_on_intr};

use super::backing::{
    Access, Backing, Creds, DirEntry, Handle, RenameMode, Seek, SetTime, Space, Stat,
};
use crate::error::{IoContext, Result};
use crate::sys::{self, device::Device};
use crate::types::{EntryName, Kind, RelPath, Xattrs};

mod direct;
mod kind;
mod stat;
mod xattrs;

use direct::Direct;
use kind::FsKind;
use stat::{stat_fd, stat_path};

/// The most bytes of a path given to one `openat2`; longer ones go in steps (`PATH_MAX` is 4096).
const PATH_STEP_BYTES_MAX: usize = 4000;
/// Bytes of directory entries fetched at a time.
const LIST_BUFFER_BYTES: usize = 32 * 1024;
/// `openat2` answers `EAGAIN` when a rename elsewhere disturbed it; so often we ask again.
const RESOLVE_ATTEMPTS_MAX: usize = 64;

/// How every path is resolved.
const RESOLVE_BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV)
    .union(ResolveFlags::NO_MAGICLINKS);

/// A directory of the system as a backing.
pub struct DirBacking {
    path: PathBuf,
    root: OwnedFd,
    /// Open since the start, so that `syncfs` reports every write error from then on, once.
    sync_fd: OwnedFd,
    /// Held while a file's mode is widened for opening it, so that two such never interleave.
    widening: Mutex<()>,
    kind: FsKind,
    device: Option<Device>,
    direct: Direct,
}

impl DirBacking {
    /// Opens the directory at `path`; a symlink there is followed, none below it ever is.
    pub fn open(path: &Path) -> Result<DirBacking> {
        let action = "open the backing";
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |extra| retry_on_intr(|| rustix::fs::open(path, flags | extra, Mode::empty()));
        let sync_fd = open(OFlags::RDONLY).context(action, path)?;
        Ok(DirBacking {
            path: path.to_path_buf(),
            root: open(OFlags::PATH).context(action, path)?,
            widening: Mutex::new(()),
            kind: FsKind::of(&sync_fd).context(action, path)?,
            device: Device::of(&sync_fd),
            sync_fd,
            direct: Direct::default(),
        })
    }

    /// The directory's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens one name for content. Tries without updating the access time first, which only the
    /// owner and root may ask for.
    fn open_content(
        &self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        flags: OFlags,
    ) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
        match open_beneath(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => Ok(open_beneath(dir, name, flags, Mode::empty())?),
            other => Ok(other?),
        }
    }

    /// Opens `object` anew with `flags`, through its magic link.
    fn reopen(&self, object: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = || {
            retry_on_intr(|| rustix::fs::open(&*ProcPath::of(object), flags, Mode::empty()))
                .map_err(io::Error::from)
        };
        self.widened(object, open)
    }

    /// Runs `open`; if the mode of a file or directory of our own forbids it, with `u+rw` (`u+rwx`
    /// for a directory) given for that moment. Only an ordinary user ever gets that far. If we die
    /// in between, the owner's bits stay widened, and the next scrub finds the mode differing.
    fn widened(
        &self,
        object: BorrowedFd<'_>,
        open: impl Fn() -> io::Result<OwnedFd>,
    ) -> io::Result<OwnedFd> {
        let refused = match open() {
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => error,
            other => return other,
        };
        let _alone = self.widening.lock();
        let stat = stat_fd(object)?;
        let own = stat.uid == rustix::process::geteuid().as_raw();
        let wanted = match stat.kind {
            Kind::File => stat.mode | 0o600,
            Kind::Dir => stat.mode | 0o700,
            _ => return Err(refused),
        };
        if !own || wanted == stat.mode {
            return Err(refused);
        }
        chmod_fd(object, wanted)?;
        let opened = open();
        chmod_fd(object, stat.mode)?;
        opened
    }
}

/// Looks an object up in the kernel's cache of names alone; `None` where that does not have it, or
/// the kernel cannot do it.
fn open_cached(
    dir: BorrowedFd<'_>,
    path: impl rustix::path::Arg,
    flags: OFlags,
) -> Option<io::Result<Handle>> {
    let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = RESOLVE_BENEATH | ResolveFlags::CACHED;
    Some(Ok(rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve).ok()?.into()))
}

/// `openat2` beneath `dir`: no symlinks, no other mounts.
fn open_beneath(
    dir: BorrowedFd<'_>,
    path: impl rustix::path::Arg + Copy,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 1..RESOLVE_ATTEMPTS_MAX {
        match rustix::fs::openat2(dir, path, flags, mode, RESOLVE_BENEATH) {
            Err(Errno::INTR | Errno::AGAIN) => continue,
            other => return other,
        }
    }
    rustix::fs::openat2(dir, path, flags, mode, RESOLVE_BENEATH)
}

/// The magic link of a file descriptor, by which the calls that refuse `O_PATH` reach its object.
/// It leads to the object itself, even where that is a symlink, and no further.
struct ProcPath {
    text: [u8; 32],
    len: usize,
}

impl ProcPath {
    fn of(fd: BorrowedFd<'_>) -> ProcPath {
        use std::io::Write;
        let mut path = ProcPath { text: [0; 32], len: 0 };
        let mut rest = &mut path.text[..];
        write!(rest, "/proc/self/fd/{}", fd.as_raw_fd()).expect("a number fits into 32 bytes");
        path.len = 32 - rest.len();
        path
    }
}

impl std::ops::Deref for ProcPath {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.text[..self.len]
    }
}

fn chmod_fd(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    Ok(retry_on_intr(|| rustix::fs::chmodat(CWD, &*ProcPath::of(fd), mode, AtFlags::empty()))?)
}

fn kind_of(file_type: FileType) -> Option<Kind> {
    Kind::from_mode(file_type.as_raw_mode())
}

/// Makes the thread the creator. A mode with sgid has been granted by the kernel above us, which
/// knows the caller's supplementary groups; without `CAP_FSETID` the backing would strip it again.
fn become_creator(by: Creds, mode: u32) -> io::Result<()> {
    sys::try_assume(by)?;
    if mode & 0o2000 != 0 { sys::regain_fsetid() } else { Ok(()) }
}

impl Backing for DirBacking {
    fn open_dir(&self, path: &RelPath) -> io::Result<Handle> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut dir: Option<OwnedFd> = None;
        let mut step: Vec<u8> = Vec::new();
        for name in path.names() {
            if step.len() + 1 + name.as_bytes().len() > PATH_STEP_BYTES_MAX {
                let from = dir.as_ref().unwrap_or(&self.root).as_fd();
                dir = Some(open_beneath(from, step.as_slice(), flags, Mode::empty())?);
                step.clear();
            }
            if !step.is_empty() {
                step.push(b'/');
            }
            step.extend_from_slice(name.as_bytes());
        }
        if step.is_empty() {
            step.push(b'.');
        }
        let from = dir.as_ref().unwrap_or(&self.root).as_fd();
        Ok(open_beneath(from, step.as_slice(), flags, Mode::empty())?.into())
    }

    fn open_node(&self, dir: &Handle, name: &EntryName) -> io::Result<Handle> {
        let opened = open_beneath(dir.as_fd(), name.as_os_str(), OFlags::PATH, Mode::empty());
        Ok(opened?.into())
    }

    fn open_file(&self, dir: &Handle, name: &EntryName, access: Access) -> io::Result<Handle> {
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
            Access::Direct => OFlags::RDWR | self.direct.flag(),
        };
        let file = match self.open_content(dir.as_fd(), name.as_os_str(), flags) {
            // Not every filesystem can.
            Err(error) if flags.contains(OFlags::DIRECT) && direct::is_invalid(&error) => {
                self.direct.give_up();
                return self.open_file(dir, name, Access::ReadWrite);
            }
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                let node = self.open_node(dir, name)?;
                if stat_fd(node.as_fd())?.kind != Kind::File {
                    return Err(error);
                }
                self.reopen(node.as_fd(), flags)?
            }
            other => other?,
        };
        match stat_fd(file.as_fd())?.kind {
            Kind::File => Ok(file.into()),
            Kind::Dir => Err(Errno::ISDIR.into()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    fn create(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> io::Result<Handle> {
        become_creator(by, mode)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(open_beneath(dir.as_fd(), name.as_os_str(), flags, mode)?.into())
    }

    fn mkdir(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> io::Result<()> {
        become_creator(by, mode)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(retry_on_intr(|| rustix::fs::mkdirat(dir.as_fd(), name.as_os_str(), mode))?)
    }

    fn mknod(
        &self,
        dir: &Handle,
        name: &EntryName,
        kind: Kind,
        mode: u32,
        rdev: u64,
        by: Creds,
    ) -> io::Result<()> {
        if matches!(kind, Kind::Dir | Kind::Symlink) {
            return Err(Errno::INVAL.into());
        }
        become_creator(by, mode)?;
        let file_type = FileType::from_raw_mode(kind.mode_bits());
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let name = name.as_os_str();
        Ok(retry_on_intr(|| rustix::fs::mknodat(dir.as_fd(), name, file_type, mode, rdev))?)
    }

    fn symlink(&self, dir: &Handle, name: &EntryName, target: &[u8], by: Creds) -> io::Result<()> {
        become_creator(by, 0)?;
        Ok(retry_on_intr(|| rustix::fs::symlinkat(target, dir.as_fd(), name.as_os_str()))?)
    }

    fn link(
        &self,
        from: &Handle,
        from_name: &EntryName,
        to: &Handle,
        to_name: &EntryName,
    ) -> io::Result<()> {
        let (old, new) = (from_name.as_os_str(), to_name.as_os_str());
        let flags = AtFlags::empty();
        Ok(retry_on_intr(|| rustix::fs::linkat(from.as_fd(), old, to.as_fd(), new, flags))?)
    }

    fn rename(
        &self,
        from: &Handle,
        from_name: &EntryName,
        to: &Handle,
        to_name: &EntryName,
        mode: RenameMode,
    ) -> io::Result<()> {
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
        };
        let (old, new) = (from_name.as_os_str(), to_name.as_os_str());
        Ok(retry_on_intr(|| rustix::fs::renameat_with(from.as_fd(), old, to.as_fd(), new, flags))?)
    }

    fn unlink(&self, dir: &Handle, name: &EntryName) -> io::Result<()> {
        let flags = AtFlags::empty();
        Ok(retry_on_intr(|| rustix::fs::unlinkat(dir.as_fd(), name.as_os_str(), flags))?)
    }

    fn rmdir(&self, dir: &Handle, name: &EntryName) -> io::Result<()> {
        let flags = AtFlags::REMOVEDIR;
        Ok(retry_on_intr(|| rustix::fs::unlinkat(dir.as_fd(), name.as_os_str(), flags))?)
    }

    fn list(&self, dir: &Handle) -> io::Result<Vec<DirEntry>> {
        let open = || self.open_content(dir.as_fd(), OsStr::new("."), OFlags::DIRECTORY);
        let fd = self.widened(dir.as_fd(), open)?;
        let mut buffer = vec![MaybeUninit::uninit(); LIST_BUFFER_BYTES];
        let mut raw = RawDir::new(&fd, &mut buffer);
        let mut entries = Vec::new();
        while let Some(entry) = raw.next() {
            let entry = match entry {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            // Some foreign filesystems hold names longer than any Linux call can take; leaving one
            // out would look like a deletion.
            let name = EntryName::new(name).map_err(|_| Errno::NAMETOOLONG)?;
            let kind = match kind_of(entry.file_type()) {
                Some(kind) => kind,
                None => match stat_path(fd.as_fd(), name.as_os_str()) {
                    Ok(stat) => stat.kind,
                    // Removed meanwhile: as good as not there.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                    Err(error) => return Err(error),
                },
            };
            entries.push(DirEntry { name, kind, ino: entry.ino() });
        }
        Ok(entries)
    }

    fn stat(&self, object: &Handle) -> io::Result<Stat> {
        stat_fd(object.as_fd())
    }

    fn stat_at(&self, dir: &Handle, name: &EntryName) -> io::Result<Stat> {
        stat_path(dir.as_fd(), name.as_os_str())
    }

    fn readlink(&self, object: &Handle) -> io::Result<Vec<u8>> {
        match retry_on_intr(|| rustix::fs::readlinkat(object.as_fd(), "", Vec::new())) {
            Ok(target) => Ok(target.into_bytes()),
            // What `readlinkat` with an empty path says of other kinds; `readlink(2)` says EINVAL.
            Err(Errno::NOENT) => Err(Errno::INVAL.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn chmod(&self, object: &Handle, mode: u32) -> io::Result<()> {
        if mode & 0o2000 != 0 {
            sys::regain_fsetid()?;
        }
        chmod_fd(object.as_fd(), mode)
    }

    fn chown(&self, object: &Handle, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        // -1 would mean "leave alone" to the kernel and is nobody's id.
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(Errno::INVAL.into());
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        let flags = AtFlags::EMPTY_PATH;
        Ok(retry_on_intr(|| rustix::fs::chownat(object.as_fd(), "", uid, gid, flags))?)
    }

    fn set_times(&self, object: &Handle, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let times = Timestamps { last_access: atime.into(), last_modification: mtime.into() };
        let flags = AtFlags::EMPTY_PATH;
        Ok(retry_on_intr(|| rustix::fs::utimensat(object.as_fd(), "", &times, flags))?)
    }

    fn get_xattr(&self, object: &Handle, name: &OsStr) -> io::Result<Vec<u8>> {
        xattrs::get(&ProcPath::of(object.as_fd()), name)
    }

    fn set_xattr(&self, object: &Handle, name: &OsStr, value: &[u8], flags: i32) -> io::Result<()> {
        // Setting an ACL may clear sgid; whether the caller's groups forbid it is not ours to know.
        sys::regain_fsetid()?;
        xattrs::set(&ProcPath::of(object.as_fd()), name, value, flags)
    }

    fn remove_xattr(&self, object: &Handle, name: &OsStr) -> io::Result<()> {
        xattrs::remove(&ProcPath::of(object.as_fd()), name)
    }

    fn xattrs(&self, object: &Handle) -> io::Result<Xattrs> {
        xattrs::all(&ProcPath::of(object.as_fd()))
    }

    fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        sys::read_full_at(file.as_fd(), buffer, offset)
    }

    fn forget_cached(&self, file: &Handle) {
        // Advice: if it is not taken, the page cache answers.
        let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    }

    fn will_need(&self, file: &Handle, ranges: &[(u64, NonZeroU64)]) {
        for &(offset, length) in ranges {
            // Advice again.
            let _ = rustix::fs::fadvise(file, offset, Some(length), rustix::fs::Advice::WillNeed);
        }
    }

    fn write_at(&self, file: &Handle, data: &[u8], offset: u64) -> io::Result<()> {
        match sys::write_all_at(file.as_fd(), data, offset) {
            Err(error) if direct::is_invalid(&error) && direct::is_on(file.as_fd())? => {
                self.write_buffered(file.as_fd(), data, offset)
            }
            answer => answer,
        }
    }

    fn truncate(&self, file: &Handle, size: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::ftruncate(file.as_fd(), size))?)
    }

    fn fallocate(&self, file: &Handle, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(retry_on_intr(|| rustix::fs::fallocate(file.as_fd(), mode, offset, length))?)
    }

    fn seek(&self, file: &Handle, offset: u64, to: Seek) -> io::Result<u64> {
        let to = match to {
            Seek::Data => SeekFrom::Data(offset),
            Seek::Hole => SeekFrom::Hole(offset),
        };
        // It moves the descriptor's position, which nobody uses: all transfers give their offset.
        Ok(retry_on_intr(|| rustix::fs::seek(file.as_fd(), to))?)
    }

    fn copy_range(
        &self,
        from: &Handle,
        from_offset: u64,
        to: &Handle,
        to_offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let count = retry_on_intr(|| {
            let (mut source, mut target) = (from_offset, to_offset);
            let (source, target) = (Some(&mut source), Some(&mut target));
            rustix::fs::copy_file_range(from.as_fd(), source, to.as_fd(), target, length)
        })?;
        Ok(count as u64)
    }

    fn clone_file(&self, from: &Handle, to: &Handle) -> io::Result<()> {
        match retry_on_intr(|| rustix::fs::ioctl_ficlone(to.as_fd(), from.as_fd())) {
            // What filesystems say that know nothing of clones.
            Err(Errno::NOTTY | Errno::NOSYS) => Err(Errno::OPNOTSUPP.into()),
            other => Ok(other?),
        }
    }

    fn is_fragmented(&self, file: &Handle, most: u32) -> io::Result<bool> {
        sys::is_fragmented(file.as_fd(), most)
    }

    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()> {
        let sync = |fd: BorrowedFd<'_>| match data_only {
            true => retry_on_intr(|| rustix::fs::fdatasync(fd)),
            false => retry_on_intr(|| rustix::fs::fsync(fd)),
        };
        let object = object.as_fd();
        match sync(object) {
            // An `O_PATH` handle.
            Err(Errno::BADF) => {}
            other => return Ok(other?),
        }
        match stat_fd(object)?.kind {
            Kind::File => sync(self.reopen(object, OFlags::RDONLY)?.as_fd())?,
            Kind::Dir => sync(self.reopen(object, OFlags::DIRECTORY)?.as_fd())?,
            // Opening a device or a pipe has effects of its own.
            _ => self.sync_all()?,
        }
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::syncfs(&self.sync_fd))?)
    }

    fn space(&self) -> io::Result<Space> {
        let stat = retry_on_intr(|| rustix::fs::fstatvfs(&self.sync_fd))?;
        Ok(Space {
            block_bytes: stat.f_frsize.max(1),
            blocks: stat.f_blocks,
            free: stat.f_bfree,
            available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
        })
    }

    fn orders_names(&self) -> bool {
        self.kind.orders_names()
    }

    fn device(&self) -> Option<Device> {
        self.device
    }

    fn is_gone(&self) -> bool {
        rustix::fs::fstat(&self.sync_fd).is_ok_and(|stat| stat.st_nlink == 0)
    }

    fn path_of(&self, object: &Handle) -> Option<RelPath> {
        let read = |fd: BorrowedFd<'_>| {
            let path = rustix::fs::readlink(&*ProcPath::of(fd), Vec::new()).ok()?.into_bytes();
            Some(path.strip_suffix(b" (deleted)").map_or_else(|| path.clone(), <[u8]>::to_vec))
        };
        let (root, path) = (read(self.root.as_fd())?, read(object.as_fd())?);
        let below = path.strip_prefix(&*root)?;
        RelPath::parse(below.strip_prefix(b"/").unwrap_or(below)).ok()
    }

    fn open_dir_at_hand(&self, path: &RelPath) -> Option<io::Result<Handle>> {
        let bytes = path.to_bytes();
        let path = if bytes.is_empty() { &b"."[..] } else { &bytes };
        if path.len() > PATH_STEP_BYTES_MAX {
            return None;
        }
        open_cached(self.root.as_fd(), path, OFlags::DIRECTORY)
    }

    fn open_node_at_hand(&self, dir: &Handle, name: &EntryName) -> Option<io::Result<Handle>> {
        open_cached(dir.as_fd(), name.as_os_str(), OFlags::empty())
    }

    fn stat_at_hand(&self, object: &Handle) -> Option<io::Result<Stat>> {
        self.kind.is_local().then(|| self.stat(object))
    }

    fn knows_what_is_at_hand(&self) -> bool {
        self.kind.is_local()
    }

    fn stat_name_at_hand(&self, dir: &Handle, name: &EntryName) -> Option<io::Result<Stat>> {
        self.kind.is_local().then_some(())?;
        let node = open_cached(dir.as_fd(), name.as_os_str(), OFlags::empty())?;
        Some(node.and_then(|node| self.stat(&node)))
    }

    fn read_at_hand(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> Option<usize> {
        sys::read_cached_at(file.as_fd(), buffer, offset)
    }
}

#[cfg(test)]
mod tests;

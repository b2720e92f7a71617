//! The seam to one backing directory: every system call on a replica goes through [`Backing`].
//!
//! Objects are reached by directory handles and single names (`*at` calls), never by absolute
//! paths, and symlinks are never followed, so nothing outside the backing can be touched even when
//! somebody swaps a directory for a symlink meanwhile. Errors are the kernel's own, unchanged: the
//! replica set decides what they mean.
//!
//! [`Backing::open_dir`], [`Backing::open_node`] give handles for looking and changing attributes
//! (`O_PATH`), [`Backing::open_file`] and [`Backing::create`] handles for content. Attribute calls
//! take both.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::sys::device::Device;
use crate::sys::patience;
use rustix::fs::{Timespec, UTIME_NOW, UTIME_OMIT};

pub use crate::types::Creds;
use crate::types::{EntryName, Kind, RelPath, Timestamp, Xattrs};

/// An object of one backing, held open. It follows the object through renames and unlinks. Clones
/// are the same open object, which is closed with the last of them.
#[derive(Clone, Debug)]
pub struct Handle {
    /// Always there but while it is dropped.
    fd: Option<Arc<OwnedFd>>,
    keeper: Option<Arc<Keeper>>,
}

/// How long it is waited for that a backing is closed, which nobody uses any more.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the descriptors of one opening of a backing go to be closed: closing one can hang like any
/// other call, so the owner of a handle must not do it.
#[derive(Debug, Default)]
pub struct Keeper {
    left: Mutex<Vec<OwnedFd>>,
}

impl Keeper {
    /// What was left to be closed since the last call.
    pub fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.left.lock())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let left = self.take();
        if !left.is_empty() {
            // Whoever lets go of the last handle must not hang either.
            patience::within(CLOSE_TIMEOUT, move || drop(left));
        }
    }
}

impl Handle {
    /// The same handle, whose descriptor `keeper` gets in the end.
    pub fn kept_by(mut self, keeper: &Arc<Keeper>) -> Handle {
        self.keeper = Some(keeper.clone());
        self
    }

    /// Whether it was opened by that opening of the backing.
    pub fn is_of(&self, keeper: &Arc<Keeper>) -> bool {
        self.keeper.as_ref().is_some_and(|own| Arc::ptr_eq(own, keeper))
    }
}

impl From<OwnedFd> for Handle {
    fn from(fd: OwnedFd) -> Handle {
        Handle { fd: Some(Arc::new(fd)), keeper: None }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken by drop alone").as_fd()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper
            && let Some(last) = self.fd.take().and_then(Arc::into_inner)
        {
            keeper.left.lock().push(last);
        }
    }
}

/// The attributes of an object, as `statx(2)` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the form `makedev` gives; 0 otherwise.
    pub rdev: u64,
    /// Hard links.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// The backing filesystem's own inode number.
    pub ino: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of attributes.
    pub ctime: Timestamp,
    /// Birth; zero where the backing does not tell.
    pub btime: Timestamp,
}

/// How a file is opened for content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading only.
    Read,
    /// For reading and writing.
    ReadWrite,
    /// For writing whole blocks of [`BLOCK_BYTES`] past the page cache, where the backing can
    /// (`O_DIRECT`, open(2)). What nobody will read soon is on its disk with one copy less, and
    /// without memory for it.
    Direct,
}

/// What writes begin and end at a multiple of, in the file and in memory, that go past the page
/// cache: no disk has larger blocks.
pub const BLOCK_BYTES: usize = 4096;

/// A time to set: left alone, the backing's present, or a given one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// `UTIME_OMIT`.
    Omit,
    /// `UTIME_NOW`.
    Now,
    /// This time.
    To(Timestamp),
}

impl From<SetTime> for Timespec {
    fn from(time: SetTime) -> Timespec {
        match time {
            SetTime::Omit => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            SetTime::Now => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            SetTime::To(time) => Timespec { tv_sec: time.secs, tv_nsec: i64::from(time.nanos) },
        }
    }
}

/// What a rename does with the target name (`renameat2(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// The target is replaced.
    Replace,
    /// `RENAME_NOREPLACE`.
    NoReplace,
    /// `RENAME_EXCHANGE`.
    Exchange,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name.
    pub name: EntryName,
    /// What it is.
    pub kind: Kind,
    /// The backing filesystem's own inode number.
    pub ino: u64,
}

/// Space of the backing's filesystem (`statvfs(3)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Unit of the block counts, in bytes.
    pub block_bytes: u64,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Blocks free to ordinary users.
    pub available: u64,
    /// All inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

/// Which of `SEEK_DATA` and `SEEK_HOLE` is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next data at or after the offset.
    Data,
    /// The next hole at or after the offset.
    Hole,
}

/// One backing directory.
pub trait Backing: Send + Sync {
    /// Opens the directory at `path` below the root for use as a parent. Neither the path nor its
    /// end may be a symlink, nor lead out of the backing or onto another mount within it.
    fn open_dir(&self, path: &RelPath) -> io::Result<Handle>;
    /// Opens any object for attribute calls, without following a symlink.
    fn open_node(&self, dir: &Handle, name: &EntryName) -> io::Result<Handle>;
    /// Opens a regular file for content; `ELOOP` for a symlink. As an ordinary user, a file of
    /// one's own whose mode forbids it is opened all the same.
    fn open_file(&self, dir: &Handle, name: &EntryName, access: Access) -> io::Result<Handle>;
    /// Makes a regular file (`O_CREAT|O_EXCL|O_RDWR`).
    fn create(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> io::Result<Handle>;
    /// Makes a directory.
    fn mkdir(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> io::Result<()>;
    /// Makes a FIFO, socket, device or empty regular file.
    fn mknod(
        &self,
        dir: &Handle,
        name: &EntryName,
        kind: Kind,
        mode: u32,
        rdev: u64,
        by: Creds,
    ) -> io::Result<()>;
    /// Makes a symlink with the given target.
    fn symlink(&self, dir: &Handle, name: &EntryName, target: &[u8], by: Creds) -> io::Result<()>;
    /// Gives the object `from_name` another name.
    fn link(
        &self,
        from: &Handle,
        from_name: &EntryName,
        to: &Handle,
        to_name: &EntryName,
    ) -> io::Result<()>;
    /// Renames.
    fn rename(
        &self,
        from: &Handle,
        from_name: &EntryName,
        to: &Handle,
        to_name: &EntryName,
        mode: RenameMode,
    ) -> io::Result<()>;
    /// Removes a name that is no directory's.
    fn unlink(&self, dir: &Handle, name: &EntryName) -> io::Result<()>;
    /// Removes an empty directory.
    fn rmdir(&self, dir: &Handle, name: &EntryName) -> io::Result<()>;
    /// All entries but `.` and `..`, in no order.
    fn list(&self, dir: &Handle) -> io::Result<Vec<DirEntry>>;

    /// Attributes of an open object.
    fn stat(&self, object: &Handle) -> io::Result<Stat>;
    /// Attributes of an entry, without following a symlink.
    fn stat_at(&self, dir: &Handle, name: &EntryName) -> io::Result<Stat>;
    /// A symlink's target.
    fn readlink(&self, object: &Handle) -> io::Result<Vec<u8>>;
    /// Sets the permission bits.
    fn chmod(&self, object: &Handle, mode: u32) -> io::Result<()>;
    /// Sets owner and group, each where given.
    fn chown(&self, object: &Handle, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    /// Sets times; also a symlink's own.
    fn set_times(&self, object: &Handle, atime: SetTime, mtime: SetTime) -> io::Result<()>;
    /// One extended attribute's value; `ENODATA` where there is none.
    fn get_xattr(&self, object: &Handle, name: &OsStr) -> io::Result<Vec<u8>>;
    /// Sets an extended attribute; `flags` as in `setxattr(2)` (`XATTR_CREATE`, `XATTR_REPLACE`).
    fn set_xattr(&self, object: &Handle, name: &OsStr, value: &[u8], flags: i32) -> io::Result<()>;
    /// Removes an extended attribute.
    fn remove_xattr(&self, object: &Handle, name: &OsStr) -> io::Result<()>;
    /// All extended attributes with their values. Empty where the backing has none at all.
    fn xattrs(&self, object: &Handle) -> io::Result<Xattrs>;

    /// Reads until `buffer` is full or the file ends; the count tells which.
    fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Drops what memory holds of a file's clean pages, so that what is read next comes from the
    /// device. A backing that cannot reads from where it will.
    fn forget_cached(&self, _file: &Handle) {}
    /// Begins to read what will be read soon, each by its offset and length, all at the same time.
    /// A backing that cannot reads it when it is asked to.
    fn will_need(&self, file: &Handle, ranges: &[(u64, NonZeroU64)]);
    /// Writes all of `data`; on an error an unknown part of it is written.
    fn write_at(&self, file: &Handle, data: &[u8], offset: u64) -> io::Result<()>;
    /// Sets the size of a file that is open for writing.
    fn truncate(&self, file: &Handle, size: u64) -> io::Result<()>;
    /// `fallocate(2)` with its mode bits.
    fn fallocate(&self, file: &Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
    /// `SEEK_DATA` or `SEEK_HOLE`; `ENXIO` at or past the end.
    fn seek(&self, file: &Handle, offset: u64, to: Seek) -> io::Result<u64>;
    /// Copies a range between two files of this backing, sharing blocks where it can; the count may
    /// be short.
    fn copy_range(
        &self,
        from: &Handle,
        from_offset: u64,
        to: &Handle,
        to_offset: u64,
        length: u64,
    ) -> io::Result<u64>;
    /// Makes `to` share all of `from`'s blocks (`FICLONE`); `EOPNOTSUPP` where the backing cannot.
    fn clone_file(&self, from: &Handle, to: &Handle) -> io::Result<()>;
    /// Whether a file lies in more than `most` runs of blocks, as far as is known without writing
    /// anything back; `false` where the backing cannot tell.
    fn is_fragmented(&self, file: &Handle, most: u32) -> io::Result<bool>;
    /// Makes a file's content (and with `!data_only` its attributes) or a directory durable. A
    /// handle from `open_dir` or `open_node` is reopened for it.
    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()>;
    /// Makes all of the backing's filesystem durable.
    fn sync_all(&self) -> io::Result<()>;
    /// Space of the backing's filesystem.
    fn space(&self) -> io::Result<Space>;

    /// Whether the root was deleted: then nothing below it is found, which is no answer.
    fn is_gone(&self) -> bool {
        false
    }

    /// Whether names reach the disk in the order in which they were changed, whatever is synced in
    /// between. ext4 and XFS do so; btrfs makes what is synced durable without what came before it.
    fn orders_names(&self) -> bool {
        false
    }

    /// The block device below, where there is one that does nothing else.
    fn device(&self) -> Option<Device> {
        None
    }

    /// Where an open object is, from the root, as the kernel remembers it; `None` if that is not
    /// known. Only for people.
    fn path_of(&self, _object: &Handle) -> Option<RelPath> {
        None
    }

    // What can be answered from memory, certainly without waiting for the device; `None` where that
    // is not known of the backing, or not so this time.

    /// [`Backing::open_dir`] at hand.
    fn open_dir_at_hand(&self, _path: &RelPath) -> Option<io::Result<Handle>> {
        None
    }
    /// [`Backing::open_node`] at hand.
    fn open_node_at_hand(&self, _dir: &Handle, _name: &EntryName) -> Option<io::Result<Handle>> {
        None
    }
    /// [`Backing::stat`] at hand.
    fn stat_at_hand(&self, _object: &Handle) -> Option<io::Result<Stat>> {
        None
    }
    /// Whether what is not at hand is in no cache: of some filesystems nothing is known to be.
    fn knows_what_is_at_hand(&self) -> bool {
        false
    }
    /// [`Backing::stat_at`] at hand.
    fn stat_name_at_hand(&self, _dir: &Handle, _name: &EntryName) -> Option<io::Result<Stat>> {
        None
    }
    /// [`Backing::read_at`] at hand.
    fn read_at_hand(&self, _file: &Handle, _buffer: &mut [u8], _offset: u64) -> Option<usize> {
        None
    }
}

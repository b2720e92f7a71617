//! What is known of the filesystem that a backing lies on.

use std::io;
use std::os::fd::AsFd;

const EXT4: u32 = 0x0000_ef53;
const XFS: u32 = 0x5846_5342;
const BTRFS: u32 = 0x9123_683e;
const F2FS: u32 = 0xf2f5_2010;
const TMPFS: u32 = 0x0102_1994;

/// The kind of a filesystem, by its magic number. ext2 to ext4 have the same.
#[derive(Clone, Copy)]
pub(super) struct FsKind(u32);

impl FsKind {
    /// Of the filesystem that something open lies on.
    pub(super) fn of(open: impl AsFd) -> io::Result<FsKind> {
        Ok(FsKind(rustix::fs::fstatfs(open)?.f_type as u32))
    }

    /// Whether it keeps on a device of this machine, and the inodes of open files in memory, so
    /// that it is known what does not wait for anything.
    pub(super) fn is_local(self) -> bool {
        [EXT4, XFS, BTRFS, F2FS, TMPFS].contains(&self.0)
    }

    /// See [`super::Backing::orders_names`]. tmpfs has nothing to lose.
    pub(super) fn orders_names(self) -> bool {
        [EXT4, XFS, TMPFS].contains(&self.0)
    }
}

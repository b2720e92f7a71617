//! Files that are written to past the page cache, and those that cannot be.
//!
//! What a filesystem can is seen by what it says: none tells reliably beforehand. Some refuse to
//! open a file so, some every write to it, and some only those that are not of whole blocks of
//! their own, which may be larger than [`BLOCK_BYTES`].

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;

use super::DirBacking;
use crate::replica::backing::BLOCK_BYTES;
use crate::sys;

/// Whether a backing has shown that it cannot.
#[derive(Default)]
pub(super) struct Direct {
    refused: AtomicBool,
}

impl Direct {
    /// What to open a file with.
    pub(super) fn flag(&self) -> OFlags {
        if self.refused.load(Ordering::Relaxed) { OFlags::empty() } else { OFlags::DIRECT }
    }

    /// It cannot: from now on it is not asked to.
    pub(super) fn give_up(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

impl DirBacking {
    /// Writes through the page cache what was refused past it; so is all that follows. What had
    /// been written of it is written again, the same in the same place.
    pub(super) fn write_buffered(
        &self,
        file: BorrowedFd<'_>,
        data: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        if is_of_whole_blocks(data, offset) {
            self.direct.give_up();
        }
        // Opened anew: without the flag alone, a filesystem that passes calls on to another one
        // (mergerfs, bindfs) has the file open there as before.
        let again = self.reopen(file, OFlags::RDWR)?;
        sys::replace_fd(file, again)?;
        sys::write_all_at(file, data, offset)
    }
}

/// Whether that is how a filesystem says that it cannot.
pub(super) fn is_invalid(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Whether a file is written to past the page cache.
pub(super) fn is_on(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(rustix::fs::fcntl_getfl(file)?.contains(OFlags::DIRECT))
}

/// Whether a write is what can go past the page cache wherever anything can.
fn is_of_whole_blocks(data: &[u8], offset: u64) -> bool {
    let block = BLOCK_BYTES as u64;
    [data.as_ptr().addr() as u64, data.len() as u64, offset].iter().all(|at| at % block == 0)
}
